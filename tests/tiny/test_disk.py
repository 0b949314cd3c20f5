"""A disk that refuses a write in its midst: one line, nothing left over, and a bug stays a bug."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
from limited_disk import small_disk

from lora_practice.console.errors import UserError
from lora_practice.run.folder import OutputFolder
from lora_practice.storage import disk


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")


@pytest.fixture
def two_megabytes(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small", megabytes=2) as place:
        yield place


def test_no_disk_space(tmp_path: Path) -> None:
    disk.check_free_disk(tmp_path / "later", 1, ", or wait")
    with pytest.raises(UserError) as caught:
        disk.check_free_disk(tmp_path / "later", 10**18, ", or wait")
    assert "not enough disk" in str(caught.value) and str(caught.value).endswith("-> free some, or wait")


def folder_on(place: Path) -> OutputFolder:
    folder = OutputFolder.claim(str(place / "run"), False, False, {})
    folder.begin({"settings": {}, "model": {}, "data": {}})
    return folder


@pytest.mark.parametrize("library", ["python", "safetensors", "torch"])
def test_a_write_that_fills_the_disk_is_one_line_and_leaves_the_earlier_files(
    two_megabytes: Path, library: str
) -> None:
    folder = folder_on(two_megabytes)
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


def test_a_record_that_does_not_fit_leaves_the_old_one_and_no_scrap(two_megabytes: Path) -> None:
    folder = folder_on(two_megabytes)
    before = (folder.path / "run_record.json").read_bytes()
    with pytest.raises(UserError, match="No space left on device"):
        folder.write_record({"losses": ["x" * 3_000_000]})
    assert [one.name for one in folder.path.iterdir()] == ["run_record.json"]
    assert (folder.path / "run_record.json").read_bytes() == before


def test_only_a_refused_write_is_explained(tmp_path: Path) -> None:
    for error in (ValueError("os error"), OSError(errno.ENOENT, "gone"), RuntimeError("shapes do not fit")):
        with pytest.raises(type(error)) as caught, disk.explain_disk_errors(tmp_path, 1, "kept"):
            raise error
        assert caught.value is error
    with pytest.raises(UserError, match="quota"), disk.explain_disk_errors(tmp_path, 1, "kept"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
