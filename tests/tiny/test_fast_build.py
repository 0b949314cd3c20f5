"""A kernel library is loaded only if this user built it; a file that others could have written is built again."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from lora_practice.fast.kernels import build

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
LIBRARY = build._openmp_runtime()  # any shared library that can be loaded


class Compiler:
    """A fast stand-in for the C++ compiler: it copies an existing library and counts its calls."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self.folder = place / "log", place / "cache" / "lora-practice" / "kernels"
        script = place / "c++"
        script.write_text(
            f'#!/bin/sh\necho built >> {self.log}\nwhile [ "$1" != -o ]; do shift; done\n'
            f'rm -f "$2"; umask 002; cp {LIBRARY} "$2"; chmod 775 "$2"\n'
        )
        script.chmod(0o700)
        monkeypatch.setenv("CXX", str(script))
        monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))

    def load(self) -> tuple[int, Path]:
        """(number of compiler calls so far, path of the loaded library)"""
        loaded = build.library.__wrapped__("float")
        assert isinstance(loaded, ctypes.CDLL)
        return len(self.log.read_text().splitlines()), Path(loaded._name)


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    if LIBRARY is None:
        pytest.skip("no library to copy")
    return Compiler(tmp_path, monkeypatch)


def test_kernels_are_built_once_and_nobody_else_may_write_them(compiler: Compiler) -> None:
    built, path = compiler.load()
    assert (built, path.parent) == (1, compiler.folder)
    assert not path.stat().st_mode & 0o022 and not compiler.folder.stat().st_mode & 0o022
    assert compiler.load() == (1, path)


def test_a_file_that_others_may_write_is_built_again(compiler: Compiler) -> None:
    _, path = compiler.load()
    path.chmod(0o722)
    assert compiler.load() == (2, path)
    assert compiler.load() == (2, path)


def test_nothing_is_loaded_from_a_folder_that_others_may_write(compiler: Compiler) -> None:
    compiler.load()
    compiler.folder.chmod(0o777)
    built, loaded = compiler.load()
    assert built == 2 and loaded.parent != compiler.folder and not loaded.exists()


def test_a_home_that_cannot_be_written_takes_a_private_folder_for_this_process(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    built, loaded = compiler.load()
    assert built == 1 and not loaded.exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may give files away")
def test_nothing_of_another_user_is_loaded(compiler: Compiler) -> None:
    _, path = compiler.load()
    os.chown(path, 12345, -1)
    assert compiler.load() == (2, path)
    os.chown(compiler.folder, 12345, -1)
    assert compiler.load()[1].parent != compiler.folder
