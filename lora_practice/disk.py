"""Room on the disk: asked for before a write, and explained when it ran out in the midst of one."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from lora_practice.errors import UserError, text

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def free_disk_check(path: Path, needed: int) -> None:
    """UserError if fewer than `needed` bytes are free where `path` is or will be."""
    free = _free(path)
    if free < needed:
        raise UserError(
            text(
                f"磁盘空间不够：需要约 {needed / 1e6:.0f} MB，只剩 {free / 1e6:.0f} MB",
                f"not enough disk: about {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free",
            ),
            where=str(path),
            fix=text("腾出空间，或换一个 --output_dir", "free some, or choose another --output_dir"),
        )


@contextmanager
def explained(path: Path, needed: int, kept: str) -> Iterator[None]:
    """Around a write of about `needed` bytes below `path`: if the disk refuses it midway, one line says so.

    `kept` tells what is not lost, and how to go on.

    Raises:
        UserError: the disk is full, the quota is used up, a file may not be so large, or the medium fails.
    """
    free = _free(path)
    try:
        yield
    except Exception as error:
        reason = _refusal(error)
        if reason is None:
            raise
        what = text(
            f"写到一半，磁盘不让写了（{reason}）：需要约 {needed / 1e6:.0f} MB，开始时有 {free / 1e6:.0f} MB",
            f"the disk refused a write midway ({reason}): about {needed / 1e6:.0f} MB needed, "
            f"{free / 1e6:.0f} MB were free",
        )
        raise UserError(what, str(path), text("腾出空间；", "free some; ") + kept) from error


def _free(path: Path) -> int:
    """Bytes free for this user where `path` is or will be."""
    return shutil.disk_usage(next(one for one in [path, *path.absolute().parents] if one.exists())).free


def _refusal(error: Exception) -> Optional[str]:
    """The system's words, if this error is a write that the disk refused; each library says it its own way."""
    words = str(error)
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return os.strerror(error.errno)
    found = re.search(r"\(os error (\d+)\)", words)  # safetensors and tokenizers, which are Rust
    if found and int(found.group(1)) in _REFUSED:
        return os.strerror(int(found.group(1)))
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", words):
        return "torch.save"  # which keeps the reason to itself
    return None
