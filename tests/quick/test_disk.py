"""A disk that refuses a write in its midst: one line, nothing left over, and a bug stays a bug."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_practice import disk
from lora_practice.artifacts import OutputFolder
from lora_practice.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(place)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_no_disk_space(tmp_path: Path) -> None:
    disk.free_disk_check(tmp_path / "later", 1)
    with pytest.raises(UserError) as caught:
        disk.free_disk_check(tmp_path / "later", 10**18)
    assert "not enough disk" in str(caught.value)


def folder_on(place: Path) -> OutputFolder:
    folder = OutputFolder.claim(str(place / "run"), False, False, {})
    folder.begin({"settings": {}, "model": {}, "data": {}})
    return folder


@pytest.mark.parametrize("library", ["python", "safetensors", "torch"])
def test_a_write_that_fills_the_disk_is_one_line_and_leaves_the_earlier_files(small_disk: Path, library: str) -> None:
    folder = folder_on(small_disk)
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    with pytest.raises(UserError) as caught, folder.staging(1000) as staging:
        if library == "python":
            (staging / "vocab.json").write_bytes(bytes(3_000_000))
        else:
            import torch
            from safetensors.torch import save_file

            moments = {"moments": torch.zeros(750_000)}
            if library == "torch":
                torch.save(moments, staging / "optimizer.pt")
            else:
                save_file(moments, str(staging / "adapter_model.safetensors"))
    line = str(caught.value)
    reason = "torch.save" if library == "torch" else "No space left on device"
    assert line.startswith(f"{folder.path}: the disk refused a write midway ({reason}): about 0 MB")
    assert "\n" not in line and line.endswith("-> free some, go on with --resume; earlier checkpoints are kept")
    assert before == {path: path.read_bytes() for path in folder.path.iterdir()}


def test_a_record_that_does_not_fit_leaves_the_old_one_and_no_scrap(small_disk: Path) -> None:
    folder = folder_on(small_disk)
    before = (folder.path / "run_record.json").read_bytes()
    with pytest.raises(UserError, match="No space left on device"):
        folder.write_record({"losses": ["x" * 3_000_000]})
    assert [one.name for one in folder.path.iterdir()] == ["run_record.json"]
    assert (folder.path / "run_record.json").read_bytes() == before


def test_only_a_refused_write_is_explained(tmp_path: Path) -> None:
    for error in (ValueError("os error"), OSError(errno.ENOENT, "gone"), RuntimeError("shapes do not fit")):
        with pytest.raises(type(error)) as caught, disk.explained(tmp_path, 1, "kept"):
            raise error
        assert caught.value is error
    with pytest.raises(UserError, match="quota"), disk.explained(tmp_path, 1, "kept"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
