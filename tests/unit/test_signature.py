"""A checkpoint that this user did not write on this machine is not read, unless the user says so."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from refusals import refusal_of

from lora_practice.storage import manifest, signature

NAME = "checkpoint.json"


@pytest.fixture(autouse=True)
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a key, as on a new machine."""
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    signature._own_key.cache_clear()
    yield signature.key_file()
    signature._own_key.cache_clear()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"moments")
    (folder / "scheduler.pt").write_bytes(b"rate")
    signature.sign_checkpoint(folder, NAME)
    return folder


def refusal(folder: Path) -> str:
    line = refusal_of(signature.check_signature, folder, NAME, trusted=False)
    signature.check_signature(folder, NAME, trusted=True)  # the way out that the line names
    assert line.startswith(str(folder)) and "--trust_checkpoint" in line
    return line


def test_what_this_user_saved_here_is_read_also_after_the_folder_was_moved(checkpoint: Path, tmp_path: Path) -> None:
    signature.check_signature(checkpoint, NAME, trusted=False)
    moved = Path(shutil.move(str(checkpoint), tmp_path / "elsewhere"))
    signature.check_signature(moved, NAME, trusted=False)
    assert manifest.folder_fault(moved, NAME, thorough=True) == ""


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")
def test_the_key_is_private_and_made_once(checkpoint: Path, key: Path) -> None:
    assert key.stat().st_mode & 0o777 == 0o600 and key.parent.stat().st_mode & 0o077 == 0
    first = key.read_bytes()
    signature._own_key.cache_clear()
    signature.sign_checkpoint(checkpoint, NAME)
    assert key.read_bytes() == first and len(first) == 32


def test_a_copy_from_another_machine(checkpoint: Path, key: Path) -> None:
    key.write_bytes(b"x" * 32)
    assert "not saved by you on this machine" in refusal(checkpoint)


def test_a_key_that_is_gone_and_the_next_save_makes_a_new_one(checkpoint: Path, key: Path) -> None:
    key.unlink()
    assert "not saved by you on this machine" in refusal(checkpoint)
    assert not key.exists()  # looking makes nothing
    signature._own_key.cache_clear()
    signature.sign_checkpoint(checkpoint, NAME)
    signature.check_signature(checkpoint, NAME, trusted=False)


def test_a_tampered_file_with_a_mended_manifest(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"evil")
    content = json.loads((checkpoint / NAME).read_text("utf-8"))
    manifest.write_manifest(checkpoint, "other.json")
    fresh = json.loads((checkpoint / "other.json").read_text("utf-8"))["files"]
    (checkpoint / "other.json").unlink()
    content["files"] = {name: fresh[name] for name in content["files"]}
    (checkpoint / NAME).write_text(json.dumps(content), "utf-8")
    assert manifest.folder_fault(checkpoint, NAME) == ""
    assert "not saved by you on this machine" in refusal(checkpoint)


def test_a_tampered_file_with_its_old_size_and_time_is_damage(checkpoint: Path) -> None:
    stat = (checkpoint / "optimizer.pt").stat()
    (checkpoint / "optimizer.pt").write_bytes(b"MOMENTS")
    os.utime(checkpoint / "optimizer.pt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert manifest.folder_fault(checkpoint, NAME) == ""  # the quick look does not see it
    assert "optimizer.pt is damaged" in manifest.folder_fault(checkpoint, NAME, thorough=True)


def test_a_file_that_was_added(checkpoint: Path) -> None:
    (checkpoint / "scaler.pt").write_bytes(b"evil")
    assert "it holds a file that no training wrote: scaler.pt" in refusal(checkpoint)


def test_a_checkpoint_of_the_days_before_marks(checkpoint: Path) -> None:
    manifest.write_manifest(checkpoint, "other.json")
    content = json.loads((checkpoint / NAME).read_text("utf-8"))
    (checkpoint / "other.json").unlink()
    for mark in ("", None, 3):
        (checkpoint / NAME).write_text(json.dumps({**content, "mark": mark}), "utf-8")
        assert "not saved by you on this machine" in refusal(checkpoint)
    del content["mark"]
    (checkpoint / NAME).write_text(json.dumps(content), "utf-8")
    assert "not saved by you on this machine" in refusal(checkpoint)


def test_where_no_key_can_be_kept_it_is_said_and_the_checkpoint_is_whole(
    checkpoint: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(key.parent)
    key.parent.write_text("a file in the folder's place")
    signature._own_key.cache_clear()
    for _ in range(2):
        signature.sign_checkpoint(checkpoint, NAME)
    assert capsys.readouterr().err.count("--trust_checkpoint") == 1
    assert manifest.folder_fault(checkpoint, NAME) == ""
    refusal(checkpoint)


def test_half_a_key_is_made_anew(checkpoint: Path, key: Path) -> None:
    key.write_bytes(b"half")
    signature._own_key.cache_clear()
    signature.sign_checkpoint(checkpoint, NAME)
    assert len(key.read_bytes()) == 32
    signature.check_signature(checkpoint, NAME, trusted=False)


def test_a_mark_that_is_no_mark(checkpoint: Path) -> None:
    content = json.loads((checkpoint / NAME).read_text("utf-8"))
    for mark in ("é", "\ud800"):
        (checkpoint / NAME).write_text(json.dumps({**content, "mark": mark}), "utf-8")
        assert "--trust_checkpoint" in refusal(checkpoint)
