"""What every reader of rows shares: the bad row, and lines of bounded length."""

from __future__ import annotations

from typing import Any, TextIO, Union

from lora_practice.console.text import text, visible

MAX_ROW = 8_000_000  # characters in one row: no conversation is this long, a file in a wrong format is
BLANK = " \t\r\n\ufeff"  # a BOM can stand inside a file that was glued together from several


class BadRow(Exception):
    """A row that cannot be trained on; all its words are in the user's language.

    Args:
        origin: "data.jsonl:41" or "name:row 12".
        cause: what is wrong, without particulars, so that equal causes can be counted.
        fix: what to do about it.
        detail: the particulars, such as a column or a value; may be empty.
    """

    def __init__(self, origin: str, cause: str, fix: str, detail: str = "") -> None:
        super().__init__(origin, cause, fix, detail)
        self.origin, self.cause, self.fix, self.detail = visible(origin).replace("\n", "\\n"), cause, fix, detail

    @property
    def told(self) -> str:
        """Cause and particulars, without the origin and the fix."""
        return f"{self.cause}{text('：', ': ')}{self.detail}" if self.detail else self.cause

    def __str__(self) -> str:
        return f"{self.origin}: {self.told} {text('→', '->')} {self.fix}"


Located = Union[tuple[str, Any], BadRow]  # (origin, row) or the reason why there is no row


def too_long(origin: str) -> BadRow:
    """The bad row that stands for one of more than MAX_ROW characters."""
    return BadRow(
        origin,
        text(f"这一行超过 {MAX_ROW:,} 个字符", f"a row of more than {MAX_ROW:,} characters"),
        text(
            "检查换行是否丢失；太长的内容请拆成几行",
            "look for lost line breaks; split a long row into several",
        ),
    )


def too_deep(origin: str) -> BadRow:
    """The bad row that stands for JSON that nests deeper than Python reads."""
    return BadRow(
        origin,
        text("JSON 嵌套太深", "JSON nested too deep"),
        text("对话只需要两三层括号", "a conversation needs two or three levels of brackets"),
    )


class RowTooLong(Exception):
    """The row just passed holds more than MAX_ROW characters."""


class Lines:
    """Lines of a text file; `number` is that of the last one read. Never holds more than MAX_ROW of one.

    `taken` counts the characters of a row that goes over several lines; who begins a new row sets it to 0.
    """

    def __init__(self, handle: TextIO) -> None:
        self.handle, self.number, self.taken = handle, 0, 0

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
        self.taken += len(line)
        if self.taken > MAX_ROW:
            raise RowTooLong
        return line
