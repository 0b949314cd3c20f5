"""A row in any usual shape -> Conversation, or BadRow with what is wrong and how to fix it.

Shapes, told apart by their keys, row by row:
    messages       [{role, content}, ...]            OpenAI, TRL
    conversations  [{from, value}, ...]              ShareGPT
    instruction    (+ input) + output or response    Alpaca, Dolly
    prompt         + completion or response          TRL; text, or lists of messages
    question       + answer;  query + response
    text           plain text, trained as it is
Each of them but `text` may carry `system` (text) and, for pairs, `history` ([[user, assistant], ...]).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from lora_practice.console.text import text
from lora_practice.data.bad_row import BadRow
from lora_practice.data.messages import (
    Message,
    as_list,
    bad_row,
    check_order,
    content_of,
    json_type_name,
    read_messages,
)
from lora_practice.data.readers import RowFile, open_rows

PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
)
KNOWN_KEYS = {"messages", "conversations", "text", *(key for pair in PAIRS for key in pair)}
SHAPES = "messages | conversations | " + " | ".join(f"{ask} + {answer}" for ask, answer in PAIRS) + " | text"


@dataclass(frozen=True)
class Conversation:
    """One row to train on: messages (an optional system, then user and assistant in turn), or plain text.

    `origin` is its place, such as "data.jsonl:41"; `shape` its shape in the file, such as "prompt + completion".
    """

    messages: tuple[Message, ...]
    origin: str
    raw_text: str = ""
    shape: str = field(default="", compare=False)

    @property
    def content(self) -> tuple[Any, ...]:
        """Its text without its origin: rows with the same content are copies."""
        return (self.raw_text, *((turn["role"], turn["content"]) for turn in self.messages))

    def as_dicts(self) -> list[dict[str, str]]:
        """Copies of the messages, for `tokenizer.apply_chat_template`."""
        return [{"role": turn["role"], "content": turn["content"]} for turn in self.messages]


Outcome = Union[Conversation, BadRow]


@dataclass(frozen=True)
class ConversationFile:
    """A data file; iterating reads it lazily from the start and yields a Conversation or BadRow per row."""

    rows: RowFile

    @property
    def encoding(self) -> str:
        """Python's name of the file's encoding ("utf-8", "gb18030", ...); empty for Parquet."""
        return self.rows.encoding

    def __iter__(self) -> Iterator[Outcome]:
        for located in self.rows:
            yield located if isinstance(located, BadRow) else _outcome(located[1], located[0])


def read_file(path: str | Path) -> ConversationFile:
    """Open a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file of conversations.

    Raises:
        UserError: now, if the file cannot be read at all; while iterating, if a JSON document, a table's
            header or a Parquet file turns out to be broken.
    """
    return ConversationFile(open_rows(path, _check_columns))


def _check_columns(names: Sequence[str]) -> None:
    _shape(dict.fromkeys(names))


def read_dataset(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Outcome]:
    """Rows of a `datasets.Dataset` or any iterable of dicts; origins are "name:row N", N from 0."""
    for number, row in enumerate(rows):
        yield _outcome(row, f"{name}:row {number}")


def _outcome(row: Any, origin: str) -> Outcome:
    try:
        return from_row(row, origin)
    except BadRow as bad:
        return bad.with_traceback(None)  # a traceback would keep the whole row alive


def from_row(row: Any, origin: str) -> Conversation:
    """One row, of any shape named at the top of this file.

    Raises:
        BadRow: with cause, fix and the place within the row.
    """
    try:
        if not isinstance(row, Mapping):
            raise bad_row(
                text("这一行不是对象", "the row is not an object"),
                text('每行写成 {"messages": [...]}', 'write each row as {"messages": [...]}'),
                json_type_name(row),
            )
        ask, answer = _shape(row)
        if ask == "text":
            return Conversation((), origin, content_of(row["text"], "text"), ask)
        turns = _pair(row, ask, answer) if answer else read_messages(row[ask], ask)
        system = row.get("system")
        if is_given(system) and not (turns and turns[0] == {"role": "system", "content": system}):
            turns.insert(0, {"role": "system", "content": content_of(system, "system")})
        check_order(turns)
        return Conversation(tuple(turns), origin, shape=f"{ask} + {answer}" if answer else ask)
    except BadRow as bad:
        bad.origin = origin
        raise


def _shape(row: Mapping[str, Any]) -> tuple[str, str]:
    """The keys that hold the row: (key, "") for messages and text, (question key, answer key) for a pair.

    A column that is null counts as absent at first (Parquet fills absent columns with null), then as present, so that
    the error is about the null.
    """
    for present in ({key for key, value in row.items() if value is not None}, row.keys()):
        for key in ("messages", "conversations"):
            if key in present:
                return key, ""
        for ask, answer in PAIRS:
            if ask in present and answer in present:
                return ask, answer
        if "text" in present:
            return "text", ""
    keys = [str(key)[:30] for key in list(row)[:8]]
    fix = text(f"改成其中一种：{SHAPES}", f"use one of: {SHAPES}")
    if misspelt := _misspelt(keys):
        wrong, right = misspelt
        fix = text(f"{wrong!r} 是不是 {right!r}？把它改过来", f"did you mean {right!r} by {wrong!r}? rename it")
    raise bad_row(
        text("无法识别这一行的格式", "no known shape of row"),
        fix,
        text("这一行的键：", "its keys are ") + (text("、", ", ").join(map(repr, keys)) or text("（没有）", "(none)")),
    )


def _misspelt(keys: Sequence[str]) -> Optional[tuple[str, str]]:
    """(a key, the known key that it is nearly) where that one would complete the row; None if there is none."""
    lowered = {key.strip().lower(): key for key in keys}
    unknown = [low for low, key in lowered.items() if key not in KNOWN_KEYS]
    wanted = [key for pair in PAIRS for key, other in (pair, pair[::-1]) if other in lowered]
    for known in [*wanted, "messages", "conversations", "text"]:
        if near := difflib.get_close_matches(known, unknown, n=1, cutoff=0.8):
            return lowered[near[0]], known
    return None


def _pair(row: Mapping[str, Any], ask: str, answer: str) -> list[Message]:
    turns: list[Message] = []
    history = as_list(row["history"], "history") if is_given(row.get("history")) else []
    for number, past in enumerate(history, 1):
        where = f"history {number}"
        if not isinstance(past, (list, tuple)) or len(past) != 2:
            raise bad_row(
                text("history 的格式不对", "history is not in pairs"),
                text("写成 [[问, 答], ...]", "write it as [[question, answer], ...]"),
                where,
            )
        turns.append({"role": "user", "content": content_of(past[0], where)})
        turns.append({"role": "assistant", "content": content_of(past[1], where)})
    if isinstance(row[ask], (list, tuple)):
        turns += read_messages(row[ask], ask)
    else:
        question = content_of(row[ask], ask)
        for key in ("input", "context"):
            if is_given(row.get(key)):
                question += "\n" + content_of(row[key], key)
        turns.append({"role": "user", "content": question})
    if isinstance(row[answer], (list, tuple)):
        return turns + read_messages(row[answer], answer)
    return [*turns, {"role": "assistant", "content": content_of(row[answer], answer)}]


def is_given(value: Any) -> bool:
    """Whether an optional field is present: not null, "" or blank."""
    return bool(value) and not (isinstance(value, str) and value.isspace())
