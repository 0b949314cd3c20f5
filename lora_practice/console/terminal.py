"""Lines that fit a terminal: they end at words, Chinese too, and what is copied from them stays whole.

Imports nothing of ours, so that every other file may use it.
"""

from __future__ import annotations

import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

# one wide character or a word, with the punctuation that may not begin (or end) a line
_WORD = re.compile(r"(?:[（《]*[\u2e80-\uffef]|[^\s\u2e80-\uffef]+)[，。；：、）？！]*\s*|\s+")
# a command, up to where its sentence goes on: half of one would be copied
_COMMAND = (
    r"(?:(?:→|->) )?(?<![\w/.-])(?:cd|lora-practice|pip|(?:[^\s：]*/)?python|sudo|uv) "
    r"(?:(?! [\u2e80-\uffef]|[，。；）]|[,;] ).)+[，。；）,;]*\s*"
)
_PIECE = re.compile(f"{_COMMAND}|{_WORD.pattern}")


def fit_to_terminal(words: str, stream: TextIO) -> str:
    """The words as they are printed to `stream`: a terminal's lines end at words; a file or a pipe gets them as is."""
    if not stream.isatty():
        return words
    width = shutil.get_terminal_size().columns
    return "\n".join(line for one in words.split("\n") for line in _broken(one, width))


class StreamPrinter:
    """Prints an answer to `stream` as it is written; at a terminal a word waits for its end, to see whether it fits."""

    def __init__(self, stream: TextIO, column: int = 0) -> None:
        self.stream, self.column = stream, column
        self.width = shutil.get_terminal_size().columns if stream.isatty() else 0
        self.waiting, self.gap = "", ""

    def add(self, words: str) -> None:
        """The next piece of the answer, a part of a word or several."""
        if not self.width:
            self._print(words)
            return
        *whole, self.waiting = _WORD.findall(self.waiting + words) or [""]
        for piece in whole:
            self._place(piece)

    def end(self) -> None:
        """Print what waits; nothing more comes."""
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


def _broken(line: str, width: int) -> list[str]:
    if columns(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip(" "))]
    return [indent + one for one in wrap(line[len(indent) :], width - len(indent))]


def wrap(words: str, width: int) -> list[str]:
    """Lines of at most `width` terminal columns, Chinese too; what has no place to break stays whole, a command too."""
    lines = [""]
    for piece in _PIECE.findall(words):
        if lines[-1] and columns(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def columns(words: str) -> int:
    """Terminal columns that these words take: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in words)


def aligned(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Rows of cells with their columns under each other."""
    rows = [*rows]
    widths = [max(columns(cell) for cell in column) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell + " " * (width - columns(cell)) for cell, width in zip(row, widths)).rstrip()
