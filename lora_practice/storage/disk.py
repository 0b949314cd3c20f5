"""Disk space: checked before a write, explained when a write fails, released afterwards."""

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
    """Raise UserError if fewer than `needed` bytes are free at `path`; `cure` follows "free some" in its fix."""
    free = free_bytes(path)
    if free < needed:
        raise UserError(
            text(
                f"磁盘空间不够：需要约 {needed / 1e6:.0f} MB，只剩 {free / 1e6:.0f} MB",
                f"not enough disk: about {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free",
            ),
            where=str(path),
            fix=text("腾出磁盘空间", "free some") + cure,
        )


@contextmanager
def explain_disk_errors(path: Path, needed: int, kept: str) -> Iterator[None]:
    """Context for a write of about `needed` bytes below `path`: a disk error within it becomes a UserError.

    `kept` says what is not lost and how to go on; it follows "free some" in the fix.

    Raises:
        UserError: the disk is full, the quota is exceeded, a file is too large for it, or the medium fails.
    """
    free = free_bytes(path)
    try:
        yield
    except Exception as error:
        reason = disk_refusal(error)
        if reason is None:
            raise
        what = text(
            f"写入中途磁盘出错（{reason}）：需要约 {needed / 1e6:.0f} MB，开始时有 {free / 1e6:.0f} MB",
            f"the disk refused a write midway ({reason}): about {needed / 1e6:.0f} MB needed, "
            f"{free / 1e6:.0f} MB were free",
        )
        raise UserError(what, str(path), text("腾出磁盘空间", "free some") + kept) from error


@contextmanager
def staging(folder: Path, needed: int, kept: str = "") -> Iterator[Path]:
    """A temporary hidden folder for about `needed` bytes inside `folder`, on the same disk; deleted in any case.

    Raises:
        UserError: too little space, or a disk error within the context; `kept` follows "free some" in the fix.
    """
    kept = kept or text("，再运行一次；原有文件没有改动", ", then run it again; what was there is untouched")
    check_free_disk(folder, needed, kept)
    with explain_disk_errors(folder, needed, kept), tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as name:
        yield Path(name)


def leftovers(folder: Path, name: str) -> list[Path]:
    """Files that a killed process leaves: folders of `staging`, and temporary files of `write_atomically(name)`."""
    return [*folder.glob(".writing-*"), *folder.glob(f".{name}.[0-9]*")]


def free_bytes(path: Path) -> int:
    """Bytes free for this user where `path` is or will be; 0 on a drive that does not exist."""
    there = nearest_existing(path)
    return shutil.disk_usage(there).free if there else 0


def nearest_existing(path: Path) -> Optional[Path]:
    """`path` itself or the closest folder above it that exists; None where not even the drive does (Windows)."""
    return next((one for one in [path.absolute(), *path.absolute().parents] if os.path.exists(one)), None)


def disk_refusal(error: BaseException) -> Optional[str]:
    """The system's message if this error is a failed write to disk, in the form of any library; else None."""
    words = str(error)
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return os.strerror(error.errno)
    # safetensors and tokenizers are Rust; the second form is from an older safetensors
    found = re.search(r"(?:\(os error |Os \{ code: )(\d+)", words)
    if found and int(found.group(1)) in _REFUSED:
        return os.strerror(int(found.group(1)))
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", words):
        return "torch.save"  # its error does not tell the reason
    return None
