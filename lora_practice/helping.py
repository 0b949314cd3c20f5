"""How `--help` looks: one spelling per flag, and lines that fit the terminal in Chinese too."""

from __future__ import annotations

import argparse
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Optional

from lora_practice.errors import text

# one wide character or a word, with the punctuation that may not begin (or end) a line
_PIECE = re.compile(r"(?:[（《]*[\u2e80-\uffef]|[^\s\u2e80-\uffef]+)[，。；：、）？！]*\s*|\s+")


class Help(argparse.HelpFormatter):
    """One flag spelling in the help, though three are accepted."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Optional[str] = None) -> None:
        super().add_usage(usage, actions, groups, text("用法：", "usage: "))

    def start_section(self, heading: Optional[str]) -> None:
        if heading and heading.startswith("positional"):
            heading = text("参数", "arguments")
        elif heading and heading.startswith("option"):
            heading = text("选项", "options")
        super().start_section(heading)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.dest == "help":
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {action.metavar or ''}".rstrip()

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(text, width)


def wrap(words: str, width: int) -> list[str]:
    """Lines of at most `width` terminal columns, Chinese too; what has no place to break stays whole."""
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
