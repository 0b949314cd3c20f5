"""How `--help` looks: one spelling per flag, and lines that fit the terminal in Chinese too."""

from __future__ import annotations

import argparse
from typing import Any, Optional

from lora_practice.console.terminal import wrap
from lora_practice.console.text import text


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
