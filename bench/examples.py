"""The two benchmark loads: short conversations (95 % of the embedded ones, about 55 tokens each), and long rows."""

from __future__ import annotations

import json
from pathlib import Path

SHORT_TOKENS = 128  # maximum of a short conversation
LONG_TOKENS = 480  # minimum of a long row


def write_examples(path: Path, short: int, long: int, assistant_only: bool) -> None:
    """JSON {"short": [...], "long": [...]} of {"input_ids", "labels"} rows from the embedded conversations."""
    from lora_practice.data.conversations import read_file
    from lora_practice.data.good_rows import collect
    from lora_practice.data.tokenization import Encoder
    from lora_practice.model.load import load_tokenizer
    from lora_practice.sources import embedded
    from lora_practice.sources.find import Source

    folder = embedded.model_dir()
    tokenizer = load_tokenizer(Source("folder", str(folder), folder))
    found, _ = collect(read_file(embedded.conversations_file()), None, False)
    encoder = Encoder(tokenizer, 512, assistant_only)
    rows = [{"input_ids": one.input_ids, "labels": one.labels} for one in encoder.encode(found)]
    chats = [row for row in rows if len(row["input_ids"]) <= SHORT_TOKENS]
    step = max(1, len(chats) // short)  # spread over all topics
    path.write_text(json.dumps({"short": chats[::step][:short], "long": _joined(rows, long)}), encoding="utf-8")


def _joined(rows: list[dict], count: int) -> list[dict]:
    """`count` long rows of several conversations each; each row starts elsewhere in the data set."""
    made = []
    for index in range(count):
        ids: list[int] = []
        labels: list[int] = []
        at = index * 37
        while len(ids) < LONG_TOKENS:
            row = rows[at % len(rows)]
            ids, labels, at = ids + row["input_ids"], labels + row["labels"], at + 1
        made.append({"input_ids": ids[:512], "labels": labels[:512]})
    return made
