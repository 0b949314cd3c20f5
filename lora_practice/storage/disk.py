"""The disk: room asked for before a write, explained when it ran out in one, given back."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from lora_practice.console.errors import DISK_FULL_ERRNOS, UserError
from lora_practice.console.text import text

_REFUSED = (*DISK_FULL_ERRNOS, errno.EFBIG, errno.EIO, errno.EROFS)


def check_free_disk(path: Path, needed: int, cure: str) -> None:
    """UserError if fewer than `needed` bytes are free where `path` is or will be; `cure` is what helps besides room."""
    free = free_bytes(path)
    if free < needed:
        raise UserError(
            text(
                f"磁盘空间不够：需要约 {needed / 1e6:.0f} MB，只剩 {free / 1e6:.0f} MB",
                f"not enough disk: about {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free",
            ),
            where=str(path),
            fix=text("腾出空间", "free some") + cure,
        )


@contextmanager
def explain_disk_errors(path: Path, needed: int, kept: str) -> Iterator[None]:
    """Around a write of about `needed` bytes below `path`: if the disk refuses it midway, one line says so.

    `kept` tells what is not lost, and how to go on; it follows "free some".

    Raises:
        UserError: the disk is full, the quota is used up, a file may not be so large, or the medium fails.
    """
    free = free_bytes(path)
    try:
        yield
    except Exception as error:
        reason = disk_refusal(error)
        if reason is None:
            raise
        what = text(
            f"写到一半，磁盘不让写了（{reason}）：需要约 {needed / 1e6:.0f} MB，开始时有 {free / 1e6:.0f} MB",
            f"the disk refused a write midway ({reason}): about {needed / 1e6:.0f} MB needed, "
            f"{free / 1e6:.0f} MB were free",
        )
        raise UserError(what, str(path), text("腾出空间", "free some") + kept) from error


@contextmanager
def staging(folder: Path, needed: int, kept: str = "") -> Iterator[Path]:
    """A hidden place for about `needed` bytes inside `folder`, so on its disk; gone afterwards, whatever happened.

    Raises:
        UserError: there is no room, or the disk refuses a write midway; `kept` follows "free some" in the cure.
    """
    kept = kept or text("，再运行一次；原有的都没有动", ", then run it again; what was there is untouched")
    check_free_disk(folder, needed, kept)
    with explain_disk_errors(folder, needed, kept), tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as name:
        yield Path(name)


def leftovers(folder: Path, name: str) -> list[Path]:
    """What a kill in the midst of a write leaves: of `staging`, and of `write_whole` of the file `name`."""
    return [*folder.glob(".writing-*"), *folder.glob(f".{name}.[0-9]*")]


def free_bytes(path: Path) -> int:
    """Bytes free for this user where `path` is or will be; 0 on a drive that does not exist."""
    there = nearest_existing(path)
    return shutil.disk_usage(there).free if there else 0


def nearest_existing(path: Path) -> Optional[Path]:
    """`path` itself or the closest folder above it that exists; None where not even the drive does (Windows)."""
    return next((one for one in [path.absolute(), *path.absolute().parents] if os.path.exists(one)), None)


def disk_refusal(error: Exception) -> Optional[str]:
    """The system's words, if this error is a write that the disk refused; each library says it its own way."""
    words = str(error)
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return os.strerror(error.errno)
    # safetensors and tokenizers are Rust; the second form is an old safetensors'
    found = re.search(r"(?:\(os error |Os \{ code: )(\d+)", words)
    if found and int(found.group(1)) in _REFUSED:
        return os.strerror(int(found.group(1)))
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", words):
        return "torch.save"  # which keeps the reason to itself
    return None


def drop_older(folders: list[Path], keep: Optional[int]) -> None:
    """Remove the first of these, oldest first, so that `keep` are left (None: all)."""
    for old in folders[: -keep if keep else 0]:
        shutil.rmtree(old)
