"""A source of data -> the examples of one run, with everything that was lost on the way told once."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Optional

from tqdm import tqdm

from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.data import conversations
from lora_practice.data.conversations import Conversation
from lora_practice.data.examples import Examples
from lora_practice.data.good_rows import GoodRows
from lora_practice.data.tokenization import Encoder, preview
from lora_practice.sources import embedded
from lora_practice.sources.find import Source, load_hub_rows


@dataclass(frozen=True)
class PreparedData:
    """`train` and `held_out` examples; `facts` for the record."""

    train: Examples
    held_out: Examples
    facts: dict[str, Any] = field(default_factory=dict)


def prepare(source: Source, config: Optional[str], tokenizer: Any, settings: Any) -> PreparedData:
    """Read, check, hold out and tokenise. `settings` holds TrainSettings' fields.

    Rows stream through, so memory holds their tokens only; held-out rows are chosen among all, which keeps the
    conversations in memory too.

    Raises:
        UserError: the data cannot be read, holds wrong rows, is empty, or has nothing to train on.
    """
    limit = settings.train_subset_size + settings.eval_subset_size if settings.train_subset_size else None
    found = GoodRows(_open(source, config), limit, settings.skip_bad_rows, source.name)
    kept, held_out = hold_out(found, settings.eval_subset_size, settings.seed)
    encoder = Encoder(tokenizer, settings.max_length, settings.assistant_only_loss)
    words = text("读数据", "reading the data")
    train = Examples(encoder.encode(tqdm(kept, words, delay=3, unit=text(" 行", " rows"), leave=False)))
    if found.tally.bad:
        tell(str(found.tally))
    if source.kind == "embedded":
        tell(_counted(**embedded.conversation_counts()))
    for line in encoder.lost.lines(settings.max_length):
        tell(line)
    if not train:
        raise UserError(
            text("没有一行有可学的 token", "not one row has a token to train on"),
            where=source.name,
            fix=text(
                "加大 --max_length，或检查数据里有没有助手的回答",
                "raise --max_length, or look for answers in the data",
            ),
        )
    measure = Encoder(tokenizer, settings.max_length, settings.assistant_only_loss)
    held_out_examples = Examples(measure.encode(held_out))
    for line in measure.lost.lines(settings.max_length):
        tell(text("留出的数据：", "held-out data: ") + line)
    facts = {
        "rows_read": found.tally.good,
        "rows_trained": len(train),
        "rows_held_out": len(held_out_examples),
        "rows_lost": encoder.lost.counts,
        "bad_rows_skipped": found.tally.causes,
        "first_row": preview(tokenizer, train[0]),
        "tokens": train.tokens,
        "trained_tokens": train.trained_tokens,
        "fingerprint": train.fingerprint(),
    }
    return PreparedData(train, held_out_examples, facts)


def _counted(usable: int, distinct: int, most_repeated: int) -> str:
    return text(
        f"内置对话：{usable} 段可用，去重后 {distinct} 段（最多的一段原本出现 {most_repeated} 次）",
        f"embedded conversations: {usable} usable, {distinct} distinct, each kept once (one stood there "
        f"{most_repeated} times)",
    )


def hold_out(rows: Iterable[Conversation], count: int, seed: int) -> tuple[Iterable[Conversation], list[Conversation]]:
    """Take `count` rows out at random; no row with the same content stays in the training set.

    Raises:
        UserError: nothing would be left to train on.
    """
    if not count:
        return rows, []
    found = list(rows)
    chosen = random.Random(seed).sample(range(len(found)), min(count, len(found)))
    contents = {found[i].content for i in chosen}
    kept = [row for row in found if row.content not in contents]
    if not kept:
        raise UserError(
            text(f"留出 {count} 行后没有可训练的了", "no row is left to train on"),
            where="--eval_subset_size",
            fix=text("改小一点", "make it smaller"),
        )
    repeated = len(found) - len(kept) - len(chosen)
    if repeated:
        zh, en = "行与留出的行内容相同，不训练", "rows are the same as held-out ones and are not trained on"
        tell(text(f"{repeated} {zh}", f"{repeated} {en}"))
    return kept, [found[i] for i in sorted(chosen)]


def _open(source: Source, config: Optional[str]) -> Iterable[Any]:
    if source.kind == "hub":
        return conversations.read_dataset(load_hub_rows(source, config), source.name)
    assert source.path is not None
    reader = conversations.read_file(source.path)
    if reader.encoding not in ("", "utf-8"):
        name = {"gb18030": "GBK (gb18030)"}.get(reader.encoding, reader.encoding)
        tell(text(f"{source.name} 的编码是 {name}", f"{source.name} is encoded in {name}"))
    return reader
