"""The constraint files: versions that the project allows, and nothing about anybody's servers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
STACKS = sorted((ROOT / "requirements").glob("*.txt"))


def pins(path: Path) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [Requirement(line) for line in lines if line]


def bounds() -> dict[str, Requirement]:
    """The dependencies of pyproject.toml (tomllib is there from Python 3.11 only)."""
    listed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.M | re.S)
    assert listed
    found = [Requirement(text) for text in re.findall(r'"([^"]+)"', listed.group(1))]
    return {one.name.lower(): one for one in found if one.name != "pip"}


@pytest.mark.parametrize("path", STACKS, ids=lambda path: path.stem)
def test_a_stack_is_allowed_and_pins_exactly(path: Path) -> None:
    allowed = bounds()
    for pin in pins(path):
        (only,) = pin.specifier
        assert only.operator == "==" and not pin.url
        if pin.name.lower() in allowed:
            assert allowed[pin.name.lower()].specifier.contains(only.version), pin
    assert "://" not in path.read_text("utf-8")


@pytest.mark.parametrize("path", STACKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("python", ["3.9", "3.10", "3.11", "3.12", "3.13"])
def test_a_stack_pins_every_dependency_once_on_every_python(path: Path, python: str) -> None:
    here = {"python_version": python}
    pinned = [pin.name.lower() for pin in pins(path) if not pin.marker or pin.marker.evaluate(here)]
    assert len(set(pinned)) == len(pinned) and bounds().keys() <= set(pinned)


def test_the_lowest_stack_is_what_the_project_says() -> None:
    lowest = {pin.name.lower(): next(iter(pin.specifier)).version for pin in pins(ROOT / "requirements/lowest.txt")}
    for name, bound in bounds().items():
        floor = next(one.version for one in bound.specifier if one.operator == ">=")
        assert re.fullmatch(re.escape(floor) + r"(\.0)*", lowest[name]), name


@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
@pytest.mark.parametrize(
    ("card", "python", "stack"),
    [
        ("none", "3, 11", "cpu"),
        ("new", "3, 10", "newest"),
        ("old", "3, 13", "cu126"),
        ("none", "3, 9", "cu126"),
        ("new", "3, 9", "cu126"),
    ],
)
def test_the_scripts_take_the_stack_of_this_python_and_this_card(
    card: str, python: str, stack: str, tmp_path: Path
) -> None:
    interpreter = tmp_path / "python"  # this one, but for its version
    lines = ["#!/bin/sh", f'exec "{sys.executable}" -c "import sys; sys.version_info = ({python}); $2"']
    interpreter.write_text("\n".join(lines), "utf-8")
    interpreter.chmod(0o755)
    script = f". scripts/environment.sh; card() {{ echo {card}; }}; PYTHON={interpreter} stack"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"requirements/{stack}.txt\n", done.stderr
    assert (ROOT / done.stdout.strip()).is_file()
