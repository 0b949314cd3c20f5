"""The constraint files: versions that the project allows, and nothing about anybody's servers."""

from __future__ import annotations

import re
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
    return {one.name.lower(): one for one in found}


@pytest.mark.parametrize("path", STACKS, ids=lambda path: path.stem)
def test_a_stack_is_allowed_and_pins_exactly(path: Path) -> None:
    allowed = bounds()
    for pin in pins(path):
        (only,) = pin.specifier
        assert only.operator == "==" and not pin.url
        if pin.name.lower() in allowed:
            assert allowed[pin.name.lower()].specifier.contains(only.version), pin
    assert "://" not in path.read_text("utf-8")


def test_the_lowest_stack_is_what_the_project_says() -> None:
    lowest = {pin.name.lower(): next(iter(pin.specifier)).version for pin in pins(ROOT / "requirements/lowest.txt")}
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface-hub", "gguf"):
        floor = next(one.version for one in bounds()[name].specifier if one.operator == ">=")
        assert lowest[name].startswith(floor), name
