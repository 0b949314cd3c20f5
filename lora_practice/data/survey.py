"""A survey of a data file before training, through the same readers and encoder that training uses."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_practice.console.text import text
from lora_practice.data.bad_row import BadRow
from lora_practice.data.conversations import Conversation, Outcome, read_file
from lora_practice.data.language import AnswerLanguage
from lora_practice.data.tokenization import Encoder, count_trained

LISTED = 100  # problems of each kind that are listed; all are counted
BINS = 8


@dataclass(frozen=True)
class Problem:
    """A problem with one row: `kind` is "bad" (training stops), "cut", "nothing", "rewritten" or "duplicate"."""

    kind: str
    origin: str
    what: str
    fix: str


@dataclass
class Survey:
    """Counts over a data file. `lengths` are in tokens before any cut; `counts` has all problems by kind.

    `language` is a warning about the answers' script, or empty: see `AnswerLanguage`.
    """

    path: Path
    encoding: str
    good: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)  # user and assistant messages in a row -> rows
    with_system: int = 0
    lengths: array[int] = field(default_factory=lambda: array("i"))
    tokens: int = 0
    trained_tokens: int = 0
    rows_trained: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    language: str = ""

    @property
    def trainable(self) -> bool:
        """Whether a run would accept this file as it is."""
        return self.rows_trained > 0 and not self.counts["bad"]

    def add(self, kind: str, origin: str, what: str, fix: str) -> None:
        """Count a problem, and list it if it is one of the first of its kind."""
        self.counts[kind] += 1
        if self.counts[kind] <= LISTED:
            self.problems.append(Problem(kind, origin, what, fix))


def survey_file(path: Path, tokenizer: Any, max_length: int) -> Survey:
    """Read the whole file once; memory grows only by a digest per row.

    Raises:
        UserError: it cannot be read at all.
    """
    reader = read_file(path)
    found = Survey(path, reader.encoding)
    encoder = Encoder(tokenizer, max_length)
    encoder.lost.shown = LISTED
    language = AnswerLanguage()
    for example in encoder.encode(language.watch(_good_rows(reader, found))):
        found.rows_trained += 1
        found.tokens += len(example.input_ids)
        found.trained_tokens += count_trained(example.labels)
    found.lengths, found.language = encoder.lengths, language.warning(tokenizer)
    for kind, (what, fix) in _lost_row_texts(max_length, max(found.lengths, default=0)).items():
        for origin in encoder.lost.origins.get(kind, []):
            found.problems.append(Problem(kind, origin, what, fix))
        found.counts[kind] = encoder.lost.counts.get(kind, 0)
    order = ["bad", "nothing", "cut", "rewritten", "duplicate"]
    found.problems.sort(key=lambda one: order.index(one.kind))  # stable: in the order of the file within a kind
    return found


def _good_rows(rows: Iterable[Outcome], found: Survey) -> Iterator[Conversation]:
    """Yield the rows that can be trained on, and count all rows in `found`."""
    first: dict[bytes, str] = {}
    for row in rows:
        if isinstance(row, BadRow):
            found.add("bad", row.origin, row.reason, row.fix)
            continue
        found.good += 1
        found.shapes[row.shape] += 1
        if row.messages:
            found.with_system += row.messages[0]["role"] == "system"
            found.turns[sum(turn["role"] != "system" for turn in row.messages)] += 1
        digest = hashlib.blake2b(repr(row.content).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        before = first.setdefault(digest, row.origin)
        if before != row.origin:
            what = text(f"与 {before} 内容相同", f"the same content as {before}")
            fix = text("只留一份：重复的会训练两遍", "keep one: copies are learned twice")
            found.add("duplicate", row.origin, what, fix)
        yield row


def _lost_row_texts(max_length: int, longest: int) -> dict[str, tuple[str, str]]:
    """(what, fix) for each kind of row that the encoder counts as lost."""
    shorter = f"split it, or raise --max_length (the longest row has {longest} tokens)"
    return {
        "nothing": (
            text("没有可训练的内容", "nothing to train on"),
            text(
                "回答在 max_length 之后，或是空的：改短提问，或加大 --max_length",
                "the answer is empty or lies behind max_length: shorten the question, or raise --max_length",
            ),
        ),
        "cut": (
            text(f"超过 max_length={max_length}，结尾会被截断", f"its ending is cut off at max_length={max_length}"),
            text(f"拆短，或加大 --max_length（最长的一行 {longest} token）", shorter),
        ),
        "rewritten": (
            text("聊天模板会改写历史，只训练最后一个回答", "the chat template rewrites all answers but the last"),
            text("要训练每个回答：拆成单轮的行", "to train them all, split it into rows of one turn"),
        ),
    }


def histogram(lengths: Iterable[int]) -> list[tuple[int, int, int]]:
    """(from, to, rows) in at most BINS equal steps of a round number of tokens; `to` is inclusive."""
    values = sorted(lengths)
    if not values:
        return []
    step = next(size for power in range(12) for size in (1 * 10**power, 2 * 10**power, 5 * 10**power)
                if -(-values[-1] // size) <= BINS)  # fmt: skip
    counts = Counter((value - 1) // step for value in values)
    return [(i * step + 1, (i + 1) * step, counts[i]) for i in range((values[-1] - 1) // step + 1)]
