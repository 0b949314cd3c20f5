"""The disk: room asked for before a write, explained when it ran out in one; folders held, kept aside, refused."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Optional

from lora_practice.errors import UserError, text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: set[tuple[int, int]] = set()  # device and inode of the folders that this process holds
_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def free_disk_check(path: Path, needed: int, cure: str) -> None:
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
def explained(path: Path, needed: int, kept: str) -> Iterator[None]:
    """Around a write of about `needed` bytes below `path`: if the disk refuses it midway, one line says so.

    `kept` tells what is not lost, and how to go on; it follows "free some".

    Raises:
        UserError: the disk is full, the quota is used up, a file may not be so large, or the medium fails.
    """
    free = free_bytes(path)
    try:
        yield
    except Exception as error:
        reason = refusal(error)
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
    free_disk_check(folder, needed, kept)
    with explained(folder, needed, kept), tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as name:
        yield Path(name)


def scraps(folder: Path, name: str) -> list[Path]:
    """What a kill in the midst of a write leaves: of `staging`, and of `write_whole` of the file `name`."""
    return [*folder.glob(".writing-*"), *folder.glob(f".{name}.[0-9]*")]


def free_bytes(path: Path) -> int:
    """Bytes free for this user where `path` is or will be."""
    return shutil.disk_usage(next(one for one in [path, *path.absolute().parents] if one.exists())).free


def refusal(error: Exception) -> Optional[str]:
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


def target(path: Path) -> Path:
    """Where a link leads to; the path itself otherwise. UserError for a link that leads nowhere."""
    for place in [path, *path.absolute().parents]:
        if place.is_symlink() and not place.exists():
            raise UserError(
                text("这个链接指向不存在的地方", "this link leads nowhere"),
                where=str(place),
                fix=text("删掉它，或换一个 --output_dir", "delete it, or choose another --output_dir"),
            )
    return path.resolve() if path.is_symlink() else path


def hold(folder: Path) -> Callable[[], None]:
    """Keep other processes from a run's folder until this one ends, however it ends, or calls what is returned.

    A lock on the folder itself, so no file is left behind. None where the system has no such lock (Windows, some
    network disks), and none among the processes of one torchrun.

    Raises:
        UserError: another process holds it.
    """
    if fcntl is None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return lambda: None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError as error:  # moved away by a run that replaces it
        raise taken(folder) from error
    key = (os.fstat(handle).st_dev, os.fstat(handle).st_ino)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) or key in _held:
            return lambda: None
        raise taken(folder) from error
    if identity(folder) != key:  # moved away before the lock was ours
        os.close(handle)
        raise taken(folder)
    _held.add(key)

    def let_go() -> None:
        _held.discard(key)
        os.close(handle)

    return let_go


def identity(folder: Path) -> Optional[tuple[int, int]]:
    """Device and inode of what is there now; None if nothing is."""
    try:
        found = os.stat(folder)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def taken(folder: Path) -> UserError:
    """What to say of a folder that another run has been quicker to take."""
    return UserError(
        text("另一次训练正在往这里写", "another run is writing to this folder"),
        where=str(folder),
        fix=text("等它结束，或换一个 --output_dir", "wait for its end, or choose another --output_dir"),
    )


def finished(path: Path, record: dict[str, Any]) -> UserError:
    """What to say of a folder with a result that nobody asked to replace."""
    when, steps = record.get("finished_at", "?"), record.get("steps", "?")
    return UserError(
        text(f"这里已有训练完成的结果（{when}，{steps} 步）", f"a finished run is here ({when}, {steps} steps)"),
        where=str(path),
        fix=text(
            "要留着它：换一个 --output_dir；要换掉它：--overwrite",
            "to keep it, choose another --output_dir; to replace it, --overwrite",
        ),
    )


def check_replaceable(path: Path) -> None:
    """UserError for a folder that cannot be renamed and made anew: the current one, one above it, a mount point."""
    whole = path.resolve()
    if whole in [Path.cwd(), *Path.cwd().parents] or os.path.ismount(whole):
        raise UserError(
            text("这个文件夹正在用着，换不掉", "this folder is in use and cannot be replaced"),
            where=str(path),
            fix=text("换一个 --output_dir", "choose another --output_dir"),
        )


def check_writable(path: Path) -> None:
    """UserError where no folder can be made or written."""
    place = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    if not place.is_dir():
        raise UserError(
            text("这是一个文件，不是文件夹", "this is a file, not a folder"),
            where=str(place),
            fix=text("换一个 --output_dir", "choose another --output_dir"),
        )
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(
            text("没有写权限", "no permission to write"),
            where=str(place),
            fix=text("换一个 --output_dir，或改权限", "choose another --output_dir, or change its rights"),
        )


def aside(path: Path) -> Path:
    """A free name for an earlier run; on a machine without a clock of its own the same second comes again."""
    moment = time.time()
    while True:
        name = path.with_name(f"{path.name}.replaced-{time.strftime('%Y%m%d-%H%M%S', time.localtime(moment))}")
        if not name.exists():
            return name
        moment += 1


def move_aside(path: Path) -> Path:
    """Give an earlier run a name beside its own, which is returned; nobody else may have it meanwhile.

    Raises:
        UserError: another run has been quicker.
    """
    let_go = hold(path)
    try:
        place = aside(path)
        os.replace(path, place)
    except FileNotFoundError as error:
        raise taken(path) from error
    finally:
        let_go()
    return place


def kept_aside(path: Path, named: Optional[str]) -> Optional[Path]:
    """The earlier run that a record says is kept aside: beside `path` only, since it is deleted in the end."""
    name = re.split(r"[\\/]", named or "")[-1]
    is_ours = re.fullmatch(re.escape(path.name) + r"\.replaced-[0-9]{8}-[0-9]{6}", name)
    return path.with_name(name) if is_ours else None


def drop_older(folders: list[Path], keep: Optional[int]) -> None:
    """Remove the first of these, oldest first, so that `keep` are left (None: all)."""
    for old in folders[: -keep if keep else 0]:
        shutil.rmtree(old)
