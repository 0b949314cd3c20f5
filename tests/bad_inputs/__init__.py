"""The corpus of bad inputs, and how an entry point is run on one of them inside this process."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Union

import pytest

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Said:
    """What an entry point ended with: its exit code, and what it printed."""

    code: Any
    out: str
    err: str


def put(path: Path, body: Union[bytes, Callable[[Path], None]]) -> None:
    """Make a data file of these bytes, or by this function."""
    if isinstance(body, bytes):
        path.write_bytes(body)
    else:
        body(path)


def enter(main: Callable[..., None], capsys: pytest.CaptureFixture, *argv: str) -> Said:
    """Run an entry point with these words; any other exception than its exit fails the test."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    out, err = capsys.readouterr()
    return Said(ended.value.code, out, err)


def refusal(said: Said) -> str:
    """The whole complaint, after making sure that it is one: exit code 2, one line for it, fit for a terminal."""
    assert said.code == 2, said
    assert "Traceback" not in said.err and said.out == ""
    assert not CONTROL.search(said.err), repr(said.err)
    lines = said.err.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith(("Error: ", "错误："))]
    assert len(errors) == 1, said.err
    told = lines[errors[0] :]
    # below the line may stand the first few bad rows, indented, each with its cure, and in the end one for all of them
    assert len(told) == 1 or (len(told) > 2 and not told[-1].startswith(" ")), said.err
    assert all(line.startswith("  ") for line in told[1:-1]), said.err
    assert len(told) <= 8 and all(len(line) < 1500 for line in told), said.err
    return "\n".join(told)


def snapshot(place: Path) -> dict[str, str]:
    """Every name below a folder, with a digest of what it is and holds."""
    found = {}
    for one in place.rglob("*"):
        if one.is_symlink():
            content = f"link to {one.readlink()}" if hasattr(one, "readlink") else "link"
        elif one.is_file():
            content = hashlib.sha256(one.read_bytes()).hexdigest()
        else:
            content = "folder" if one.is_dir() else "other"
        found[one.relative_to(place).as_posix()] = content
    return found
