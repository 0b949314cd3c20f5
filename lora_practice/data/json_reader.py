"""Rows of JSON Lines files and of JSON documents, each with the line where it starts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.data.bad_row import BLANK, MAX_ROW, BadRow, Lines, Located, RowTooLong, too_deep, too_long

# parse_int: int() refuses more than 4300 digits. strict=False: a raw tab may stand in a string.
_DECODER = json.JSONDecoder(parse_int=float, strict=False)
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
# Strings and brackets. A string may end with the text, so that no match ever backtracks.
_STRUCTURE = re.compile(r'"(?:[^"\\]+|\\.)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_TOO_DEEP = object()  # stands for a value that is nested too deep to be decoded
MAX_DOCUMENT = 512 << 20  # bytes; a document is held in memory, JSON lines are not


def json_rows(path: Path, handle: TextIO) -> Iterator[Located]:
    """Rows of a JSON Lines file or of one JSON document: the content decides, the suffix only in doubt."""
    lines = iter(lambda: handle.readline(MAX_ROW + 1), "")
    heads = list(islice((line for line in lines if line.strip(BLANK)), 2))
    handle.seek(0)
    if _is_document(heads, path.suffix.lower() == ".json"):
        if path.stat().st_size > MAX_DOCUMENT:
            raise UserError(
                text(
                    f"JSON 文档超过 {MAX_DOCUMENT >> 20} MB，要整个放进内存",
                    f"a JSON document of more than {MAX_DOCUMENT >> 20} MB, which memory would have to hold whole",
                ),
                f"{path.name}:1",
                text("改写成 JSONL：一行一个对象", "write it as JSONL, one object per line: that is read bit by bit"),
            )
        return JsonDocument(path.name, handle.read()).rows()
    return _line_rows(path.name, Lines(handle))


def _is_document(heads: list[str], named_json: bool) -> bool:
    """Whether the first two non-blank lines begin one JSON document rather than JSON lines."""
    first = heads[0].strip(BLANK) if heads else ""

    def value(line: str) -> Any:
        try:
            return parse_json(line.strip(BLANK))
        except (ValueError, RecursionError):
            return None

    if first.startswith("["):
        return len(heads) == 1 or value(first) is None
    if not first.startswith("{"):
        return False
    if len(first) > MAX_ROW:
        return named_json
    row = value(first)
    if isinstance(row, dict):
        return isinstance(row.get("data"), list)
    if first[-1] in "[{,:":  # the value continues on the next line
        return True
    return named_json and not (len(heads) == 2 and isinstance(value(heads[1]), dict))


def _line_rows(name: str, lines: Lines) -> Iterator[Located]:
    while True:
        lines.row_characters = 0
        try:
            line = next(lines).rstrip(BLANK).lstrip("\ufeff")
            if line:
                yield f"{name}:{lines.number}", parse_json(line)
        except StopIteration:
            return
        except RowTooLong:
            yield too_long(f"{name}:{lines.number}")
        except RecursionError:
            yield too_deep(f"{name}:{lines.number}")
        except ValueError as error:
            detail, fix = explain_json_error(error)
            yield BadRow(f"{name}:{lines.number}", text("JSON 格式有误", "broken JSON"), fix, detail)


def parse_json(body: str) -> Any:
    """One JSON value; NaN and repeated keys are accepted. Raises json.JSONDecodeError or RecursionError."""
    return _DECODER.decode(body)


def explain_json_error(error: ValueError) -> tuple[str, str]:
    """(detail, fix) for a JSON error: its column and the text there, and how the usual mistake is corrected."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error), text("检查这一行的写法", "check how this row is written")
    body, pos = error.doc, error.pos
    near = body[pos : pos + 20].split("\n")[0]
    detail = text(f"第 {error.colno} 列", f"column {error.colno}") + (f" {near!r}" if near else "")
    rest, before = body[pos : pos + 60].lstrip(), body[max(pos - 60, 0) : pos].rstrip()
    if not rest or error.msg.startswith("Unterminated"):
        fix = text("没写完：补上缺的引号或括号，一行写一个完整的对象", "it breaks off: close quotes and brackets")
    elif rest[0] in "“”‘’，：｛｝［］":
        fix = text('把全角标点换成英文的 " , : { } [ ]', 'replace full-width marks by " , : { } [ ]')
    elif rest[0] == "'":
        fix = text("JSON 的字符串用双引号，不用单引号", "JSON strings take double quotes, not single ones")
    elif (rest[0] in "}]" and before[-1:] == ",") or re.match(r",\s*[}\]]", rest):
        fix = text("删掉最后一项后面的逗号", "delete the comma after the last item")
    elif error.msg.startswith("Extra data"):
        fix = text("一行写一个对象，多出的另起一行", "one object per line: move the rest to its own line")
    elif re.match(r"None|True|False", rest):
        fix = text("写成 null、true、false", "write null, true, false")
    elif "escape" in error.msg:
        fix = text("反斜杠要写成两个：\\\\", "write a backslash twice: \\\\")
    elif error.msg.startswith("Expecting ',' delimiter"):
        fix = text(
            '内容里的双引号写成 \\"，各项之间加逗号',
            'write a quote in a string as \\", a comma between items',
        )
    else:
        fix = text("检查这一列附近的引号、冒号和逗号", "check the quotes, colons and commas near this column")
    return detail, fix


class JsonDocument:
    """Rows of a JSON text: a list, {"data": [...]}, or objects one after another, each with its line.

    Linear time: every character is decoded at most twice and its line counted once.
    """

    def __init__(self, name: str, body: str) -> None:
        self.name, self.body = name, body
        self.pos, self.line, self.counted = 0, 1, 0

    def rows(self) -> Iterator[Located]:
        """Yield (origin, row) or BadRow for each row.

        Raises:
            UserError: the JSON itself is broken, so nothing after that place can be read.
        """
        while self._peek():
            start = self.pos
            if self._peek() == "[":
                yield from self._elements()
            elif self._peek() == "{" and self._enter_data():
                yield from self._elements()
                while self._peek() == ",":
                    self._expect(",")
                    self._key()
                    self._value()
                self._expect("}")
            else:
                self.pos = start
                yield self._row()

    def _elements(self) -> Iterator[Located]:
        self._expect("[")
        if self._peek() != "]":
            yield self._row()
            while self._peek() == ",":
                self._expect(",")
                yield self._row()
        self._expect("]")

    def _enter_data(self) -> bool:
        """Move into an object up to the list under "data"; False if it has none, so is a row itself."""
        self._expect("{")
        while self._peek() == '"':
            if self._key() == "data" and self._peek() == "[":
                return True
            self._value()
            if self._peek() != ",":
                return False
            self._expect(",")
        return False

    def _key(self) -> Any:
        key = self._value()
        self._expect(":")
        return key

    def _row(self) -> Located:
        self._peek()
        start = self.pos
        self.line += self.body.count("\n", self.counted, start)
        self.counted = start
        origin = f"{self.name}:{self.line}"
        value = self._value()
        if value is _TOO_DEEP:
            return too_deep(origin)
        return too_long(origin) if self.pos - start > MAX_ROW else (origin, value)

    def _value(self) -> Any:
        self._peek()
        try:
            value, self.pos = _DECODER.raw_decode(self.body, self.pos)
            return value
        except RecursionError:
            self.pos = self._after_brackets()
            return _TOO_DEEP
        except json.JSONDecodeError as error:
            raise self._broken_json(error) from error

    def _after_brackets(self) -> int:
        depth = 0
        for match in _STRUCTURE.finditer(self.body, self.pos):
            mark = self.body[match.start()]
            depth += (mark in "[{") - (mark in "]}")
            if depth == 0:
                return match.end()
        raise self._broken_json(json.JSONDecodeError("Expecting ',' delimiter", self.body, len(self.body)))

    def _peek(self) -> str:
        """The next non-blank character; empty at the end."""
        self.pos = _SPACE.match(self.body, self.pos).end()  # type: ignore[union-attr]  # always matches
        return self.body[self.pos : self.pos + 1]

    def _expect(self, mark: str) -> None:
        if self._peek() != mark:
            raise self._broken_json(json.JSONDecodeError(f"Expecting '{mark}' delimiter", self.body, self.pos))
        self.pos += 1

    def _broken_json(self, error: json.JSONDecodeError) -> UserError:
        detail, fix = explain_json_error(error)
        return UserError(
            text(
                f"JSON 格式有误，后面的内容都无法读取：{detail}",
                f"broken JSON, nothing after it can be read: {detail}",
            ),
            f"{self.name}:{error.lineno}",
            fix,
        )
