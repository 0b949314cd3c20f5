"""Locks on a run's folder, checks before it is used, and names for an earlier run that is replaced."""

from __future__ import annotations

import errno
import os
import re
import time
from pathlib import Path
from typing import Callable, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.storage import disk
from lora_practice.storage.json_files import read_record

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: set[tuple[int, int]] = set()  # device and inode of the folders that this process has locked


class FolderInUse(Exception):
    """Another process has locked the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder} is locked by another process")
        self.folder = folder


class FolderReplaced(Exception):
    """The folder is gone, or another folder or run is in its place."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder} is no longer the folder that was found")
        self.folder = folder


def link_target(path: Path) -> Path:
    """The path that a link points to; `path` itself where it is no link. UserError for a dangling link."""
    for place in [path, *path.absolute().parents]:
        if place.is_symlink() and not place.exists():
            raise UserError(
                text("这个链接指向的位置不存在", "this link leads nowhere"),
                where=str(place),
                fix=text("删掉它，或换一个 --output_dir", "delete it, or choose another --output_dir"),
            )
    return path.resolve() if path.is_symlink() else path


def lock_folder(folder: Path) -> Callable[[], None]:
    """Lock a run's folder against other processes until this process ends; returns a function that unlocks it.

    The lock is `flock` on the folder itself, so no file is left behind. Where the system has no such lock (Windows,
    some network disks) nothing is locked.

    Raises:
        FolderInUse: another process has locked it.
        FolderReplaced: it was moved away before it could be locked.
    """
    if fcntl is None:
        return lambda: None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError as error:  # moved away by a run that replaces it
        raise FolderReplaced(folder) from error
    key = (os.fstat(handle).st_dev, os.fstat(handle).st_ino)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES) or key in _held:
            return lambda: None
        raise FolderInUse(folder) from error
    if folder_identity(folder) != key:  # moved away before the lock was ours
        os.close(handle)
        raise FolderReplaced(folder)
    _held.add(key)

    def unlock() -> None:
        _held.discard(key)
        os.close(handle)

    return unlock


def is_locked_here(folder: Path) -> bool:
    """Whether this process has locked the folder."""
    return folder_identity(folder) in _held


def folder_identity(folder: Path) -> Optional[tuple[int, int]]:
    """(device, inode) of the folder; None if it does not exist."""
    try:
        found = os.stat(folder)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def check_replaceable(path: Path) -> None:
    """UserError for a folder that cannot be renamed: the working directory, a folder above it, a mount point."""
    whole = path.resolve()
    if whole in [Path.cwd(), *Path.cwd().parents] or os.path.ismount(whole):
        raise UserError(
            text("这个文件夹正在使用，不能覆盖", "this folder is in use and cannot be replaced"),
            where=str(path),
            fix=text("换一个 --output_dir", "choose another --output_dir"),
        )


def check_writable(path: Path) -> None:
    """UserError if `path` is a file, or no folder can be created or written there."""
    place = disk.nearest_existing(path)
    if place is None or not place.is_dir():
        raise UserError(
            text("这是一个文件，不是文件夹", "this is a file, not a folder"),
            where=str(place or path),
            fix=text("换一个 --output_dir", "choose another --output_dir"),
        )
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(
            text("没有写权限", "no permission to write"),
            where=str(place),
            fix=text("换一个 --output_dir，或改权限", "choose another --output_dir, or change its rights"),
        )


def free_name_beside(path: Path) -> Path:
    """An unused name beside `path` for an earlier run; a clock that was reset may give the same second again."""
    moment = time.time()
    while True:
        name = path.with_name(f"{path.name}.replaced-{time.strftime('%Y%m%d-%H%M%S', time.localtime(moment))}")
        if not name.exists():
            return name
        moment += 1


def move_aside(path: Path, known: Optional[tuple[int, int]]) -> Path:
    """Rename an earlier run while it is locked; returns its new path.

    The renamed folder is deleted later, so it must be the run that was found before: `known` is its `folder_identity`.

    Raises:
        FolderInUse, FolderReplaced: another run was quicker, or the folder holds no run.
    """
    unlock = lock_folder(path)
    try:
        if folder_identity(path) != known or read_record(path) is None:
            raise FolderReplaced(path)
        place = free_name_beside(path)
        os.replace(path, place)
    except FileNotFoundError as error:
        raise FolderReplaced(path) from error
    finally:
        unlock()
    return place


def kept_aside(path: Path, named: Optional[str]) -> Optional[Path]:
    """Path of the renamed earlier run that a record names; only names beside `path` count, since it is deleted."""
    name = re.split(r"[\\/]", named or "")[-1]
    is_ours = re.fullmatch(re.escape(path.name) + r"\.replaced-[0-9]{8}-[0-9]{6}", name)
    return path.with_name(name) if is_ours else None
