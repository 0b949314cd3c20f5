"""A command that is shown can be copied into a shell: paths in it are quoted."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import lora_practice

PACKAGE = Path(lora_practice.__file__).parent
BEFORE_A_PATH = re.compile(r"(lora-practice [a-z-]+|--(output_dir|local_dir|model_dir)) $")
QUOTED = re.compile(r"\bquote\(|\bplace\b")  # `place`: the quoted folder in report/page_content.py


def paths_in_commands(tree: ast.AST) -> Iterator[str]:
    """The expressions that follow a command or a path's flag in f-strings; what an error is about is no command."""
    if isinstance(tree, ast.keyword) and tree.arg == "where":
        return
    if isinstance(tree, ast.JoinedStr):
        for text, value in zip(tree.values, tree.values[1:]):
            words = str(text.value) if isinstance(text, ast.Constant) else ""
            if isinstance(value, ast.FormattedValue) and BEFORE_A_PATH.search(words):
                yield ast.unparse(value.value)
    for child in ast.iter_child_nodes(tree):
        yield from paths_in_commands(child)


def test_a_path_in_a_shown_command_is_quoted() -> None:
    found = {
        f"{file.relative_to(PACKAGE)}: {one}"
        for file in PACKAGE.rglob("*.py")
        for one in paths_in_commands(ast.parse(file.read_text("utf-8")))
    }
    assert len(found) >= 8
    assert sorted(one for one in found if not QUOTED.search(one)) == []
