"""Shared by all readers of rows: the bad row with its cause and fix, and lines of bounded length."""

from __future__ import annotations

from typing import Any, TextIO, Union

from lora_practice.console.text import text, visible

MAX_ROW = 8_000_000  # characters in one row: no conversation is this long, a file in a wrong format is
BLANK = " \t\r\n\ufeff"  # a BOM can stand inside a file that was glued together from several


class BadRow(Exception):
    """A row that cannot be trained on; its texts are in the user's language.

    Args:
        origin: "data.jsonl:41" or "name:row 12".
        cause: what is wrong, without details, so that rows with the same cause can be counted together.
        fix: what to do about it.
        detail: the column, value or place that is wrong; may be empty.
    """

    def __init__(self, origin: str, cause: str, fix: str, detail: str = "") -> None:
        super().__init__(origin, cause, fix, detail)
        self.origin, self.cause, self.fix, self.detail = visible(origin).replace("\n", "\\n"), cause, fix, detail

    @property
    def reason(self) -> str:
        """Cause and detail, without the origin and the fix."""
        return f"{self.cause}{text('：', ': ')}{self.detail}" if self.detail else self.cause

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason} {text('→', '->')} {self.fix}"


Located = Union[tuple[str, Any], BadRow]  # (origin, row), or why there is no row


def too_long(origin: str) -> BadRow:
    """The BadRow for a row of more than MAX_ROW characters."""
    return BadRow(
        origin,
        text(f"这一行超过 {MAX_ROW:,} 个字符", f"a row of more than {MAX_ROW:,} characters"),
        text(
            "检查换行是否丢失；太长的内容请拆成几行",
            "look for lost line breaks; split a long row into several",
        ),
    )


def too_deep(origin: str) -> BadRow:
    """The BadRow for JSON that is nested deeper than Python can read."""
    return BadRow(
        origin,
        text("JSON 嵌套太深", "JSON nested too deep"),
        text("对话只需要两三层括号", "a conversation needs two or three levels of brackets"),
    )


class RowTooLong(Exception):
    """The row that was just read past has more than MAX_ROW characters."""


class Lines:
    """Lines of a text file, none of which is held beyond MAX_ROW characters.

    `number` is the number of the last line read. `row_characters` counts the characters of a row that spans several
    lines; the reader sets it to 0 at the start of each row.
    """

    def __init__(self, handle: TextIO) -> None:
        self.handle, self.number, self.row_characters = handle, 0, 0

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        line = self.handle.readline(MAX_ROW + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > MAX_ROW:
            while line and line[-1] not in "\r\n":
                line = self.handle.readline(MAX_ROW)
            raise RowTooLong
        self.row_characters += len(line)
        if self.row_characters > MAX_ROW:
            raise RowTooLong
        return line
