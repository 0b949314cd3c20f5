"""Wrap text to the terminal's width: at words, in Chinese too, and never inside a command that may be copied."""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

PAGE_COLUMNS = 80  # the width of a page of text; only a command or a path that does not fit is longer
# one CJK character or a word, with the punctuation that must not begin (or end) a line
_WORD = re.compile(r"(?:[（《]*[\u2e80-\uffef]|[^\s\u2e80-\uffef]+)[，。；：、）？！]*\s*|\s+")
# a command up to the end of its clause, so that it is never copied in half
_COMMAND = (
    r"(?:(?:→|->) )?(?<![\w/.-])(?:cd|lora-practice|pip|(?:[^\s：]*/)?python|sudo|uv) "
    r"(?:(?! [\u2e80-\uffef]|[，。；）]|[,;] ).)+[，。；）,;]*\s*"
)
_PIECE = re.compile(f"{_COMMAND}|{_WORD.pattern}")


def fit_to_terminal(words: str, stream: TextIO) -> str:
    """Wrap the words to the terminal's width if `stream` is one; unchanged for a file or a pipe."""
    if not stream.isatty():
        return words
    width = shutil.get_terminal_size().columns
    return "\n".join(line for one in words.split("\n") for line in _wrapped(one, width))


class StreamPrinter:
    """Prints an answer to `stream` while it is generated; at a terminal whole words, wrapped to its width."""

    def __init__(self, stream: TextIO, column: int = 0) -> None:
        self.stream, self.column = stream, column
        self.width = shutil.get_terminal_size().columns if stream.isatty() else 0
        self.waiting, self.gap = "", ""  # an unfinished word, and the white space before it

    def add(self, words: str) -> None:
        """Print the next piece of the answer: a part of a word, or several words."""
        if not self.width:
            self._print(words)
            return
        *whole, self.waiting = _WORD.findall(self.waiting + words) or [""]
        for piece in whole:
            self._place(piece)

    def end(self) -> None:
        """Print the last word; nothing may be added afterwards."""
        self._place(self.waiting)
        self._print(self.gap)
        self.waiting = self.gap = ""

    def _place(self, piece: str) -> None:
        word = piece.rstrip()
        if word and self.column and self.column + columns(self.gap + word) > self.width:
            self.gap, self.column = "\n", 0
        self._print(self.gap + word)
        self.column += columns(self.gap.strip("\n") + word)
        self.gap = piece[len(word) :]
        if "\n" in self.gap:
            self._print(self.gap)
            self.column, self.gap = columns(self.gap.rpartition("\n")[2]), ""

    def _print(self, words: str) -> None:
        self.stream.write(words)
        self.stream.flush()


def _wrapped(line: str, width: int) -> list[str]:
    if columns(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip(" "))]
    return [indent + one for one in wrap(line[len(indent) :], width - len(indent))]


def wrap(words: str, width: int) -> list[str]:
    """Lines of at most `width` terminal columns; a command, or a word that is longer, stays whole."""
    lines = [""]
    for piece in _PIECE.findall(words):
        if lines[-1] and columns(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def columns(words: str) -> int:
    """Display width in terminal columns: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in words)


def aligned(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a table whose columns are aligned by display width."""
    rows = [*rows]
    widths = [max(columns(cell) for cell in column) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell + " " * (width - columns(cell)) for cell, width in zip(row, widths)).rstrip()
