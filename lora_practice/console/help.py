"""The page that `--help` prints: usage, one line of description, sections of options in two aligned columns."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from lora_practice.console.terminal import columns, wrap
from lora_practice.console.text import text

INDENT, GAP = 2, 2  # terminal columns before a name and between a name and its sentence
NAMES_WIDTH = 28  # a longer name has its sentence on the next line
NARROWEST = 40


@dataclass(frozen=True)
class Section:
    """A heading and its rows: (name as it is typed, sentence)."""

    heading: str
    rows: Sequence[tuple[str, str]]


def help_page(usage: str, description: str, sections: Sequence[Section], epilog: str = "") -> str:
    """The whole page, as wide as the terminal; columns are aligned by display width (a Chinese character takes two)."""
    width = max(NARROWEST, shutil.get_terminal_size().columns - 2)
    shown = [section for section in sections if section.rows]
    names = [columns(name) for section in shown for name, _ in section.rows]
    start = min(INDENT + max(names, default=0) + GAP, INDENT + NAMES_WIDTH)
    parts = [[text("用法：", "usage: ") + usage], wrap(description, width)]
    parts += [[f"{section.heading}{text('：', ':')}", *_rows(section.rows, start, width)] for section in shown]
    parts += [wrap(epilog, width)] if epilog else []
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _rows(rows: Sequence[tuple[str, str]], start: int, width: int) -> list[str]:
    """The lines of a section; the sentences begin at column `start`."""
    lines = []
    for name, sentence in rows:
        first = " " * INDENT + name
        said = wrap(sentence, width - start)
        if columns(first) + GAP > start:
            lines.append(first)
        else:
            said[0] = first + " " * (start - columns(first)) + said[0]
            lines.append(said[0].rstrip())
            said = said[1:]
        lines += [" " * start + line for line in said]
    return lines


def default_note(default: object) -> str:
    """What follows the sentence of a setting with this default: nothing for a switch that is off."""
    if default is False or default == "":
        return ""
    if default is True:
        return text("（默认打开）", " (on by default)")
    return text(f"（默认 {default}）", f" (default {default})")


def shown_flag(spelling: str) -> str:
    """The spelling of a flag that is shown everywhere: underscores, as TRL and transformers write theirs."""
    dashes = len(spelling) - len(spelling.lstrip("-"))
    return spelling[:dashes] + spelling[dashes:].replace("-", "_")
