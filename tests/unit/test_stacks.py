"""The constraint files: versions that the project allows, and nothing about anybody's servers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to start scripts in: modules that lie there by chance must not be imported."""
    (tmp_path / "here").mkdir()
    for name in ("torch", "pip", "runpy", "threading", "urllib"):
        (tmp_path / "here" / f"{name}.py").write_text(f"raise SystemExit('the stray {name}.py was imported')", "utf-8")
    return tmp_path / "here"


def in_bash(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    whole = f". '{ROOT}/scripts/environment.sh'; PYTHON='{sys.executable}'; {script}"
    environment = {**os.environ, "LORA_PRACTICE_LANG": "en", **variables}
    return subprocess.run(["bash", "-uc", whole], cwd=folder, env=environment, capture_output=True, text=True)


INSTALL = "card() { echo none; }; install_torch() { echo torch; }; run_module() { :; }; install_all"


@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
def test_a_torch_on_pythonpath_counts_and_one_in_the_current_folder_does_not(folder: Path, tmp_path: Path) -> None:
    """An HPC module, or a site of the user's own: nothing is to be installed over it."""
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "torch.py").write_text("", "utf-8")
    done = in_bash(INSTALL, folder, PYTHONPATH=str(tmp_path / "module"))
    assert done.stdout == "", done.stderr
    (tmp_path / "module" / "torch.py").write_text("raise ImportError", "utf-8")
    done = in_bash(INSTALL, folder, PYTHONPATH=str(tmp_path / "module"))
    assert done.stdout == "torch\n", done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
@pytest.mark.parametrize("safe", ["", "1"])
def test_the_users_own_pip_is_run_and_not_one_in_the_current_folder(folder: Path, tmp_path: Path, safe: str) -> None:
    (tmp_path / "module").mkdir()
    (tmp_path / "module" / "pip.py").write_text("import os, sys; print(os.getcwd(), *sys.argv[1:])", "utf-8")
    done = in_bash("run_module pip a 'b c'", folder, PYTHONPATH=str(tmp_path / "module"), PYTHONSAFEPATH=safe)
    assert done.stdout == f"{folder} a b c\n", done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a bash script")
def test_an_index_is_asked_with_the_modules_of_python_itself(folder: Path) -> None:
    with HubServer() as server:
        server.add_repo("models", "an/index")
        ask = f"answers {server.url}/api/models/an/index"
        assert in_bash(ask, folder).returncode == 0
        assert len(server.requests) == 1
    assert in_bash(ask, folder).returncode == 1


@pytest.mark.parametrize("place", ["home", "beside the program", "PYENV_ROOT"])
def test_the_pythons_of_pyenv_are_found_where_homebrew_has_it_too(place: str, tmp_path: Path) -> None:
    pytest.importorskip("nox")
    program = tmp_path / "brew" / "bin" / ("pyenv.exe" if sys.platform == "win32" else "pyenv")
    program.parent.mkdir(parents=True)
    program.write_text("", "utf-8")
    program.chmod(0o755)
    root = {"home": tmp_path / ".pyenv", "beside the program": tmp_path / "brew", "PYENV_ROOT": tmp_path / "own"}[place]
    (root / "versions" / "3.9.1").mkdir(parents=True)
    found = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "PATH": str(program.parent)}
    environment = {**os.environ, **found, "PYENV_ROOT": str(root) if place == "PYENV_ROOT" else ""}
    script = "import os, noxfile; print(noxfile.VERSIONS, os.environ['PYENV_VERSION'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{root / 'versions'} 3.9.1\n", done.stderr
