"""The folder of a run: fit to be taken, held while the run goes on, with an earlier run kept aside."""

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

_held: set[tuple[int, int]] = set()  # device and inode of the folders that this process holds


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
    network disks).

    Raises:
        UserError: another process holds it.
    """
    if fcntl is None:
        return lambda: None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError as error:  # moved away by a run that replaces it
        raise lost(folder) from error
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
        raise lost(folder)
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
    """What to say of a folder that another run holds."""
    return UserError(
        text("另一次训练正在往这里写", "another run is writing to this folder"),
        where=str(folder),
        fix=text("等它结束，或换一个 --output_dir", "wait for its end, or choose another --output_dir"),
    )


def lost(folder: Path) -> UserError:
    """What to say of a folder that is no more what this run was to write to, whoever has it now."""
    return UserError(
        text(
            "这个文件夹里现在是另一次训练或别的文件，没有动它",
            "another run or other files are in this folder by now; they are left alone",
        ),
        where=str(folder),
        fix=text("看看里面是什么，或换一个 --output_dir", "look at what it is, or choose another --output_dir"),
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


def aside(path: Path) -> Path:
    """A free name for an earlier run; on a machine without a clock of its own the same second comes again."""
    moment = time.time()
    while True:
        name = path.with_name(f"{path.name}.replaced-{time.strftime('%Y%m%d-%H%M%S', time.localtime(moment))}")
        if not name.exists():
            return name
        moment += 1


def move_aside(path: Path, known: Optional[tuple[int, int]]) -> Path:
    """Give an earlier run a name beside its own, which is returned; nobody else may have it meanwhile.

    Whatever gets that name is deleted in the end, so it must be the run that was found: `known` by its `identity`.

    Raises:
        UserError: another run has been quicker, or what is there is no run.
    """
    let_go = hold(path)
    try:
        if identity(path) != known or read_record(path) is None:
            raise lost(path)
        place = aside(path)
        os.replace(path, place)
    except FileNotFoundError as error:
        raise lost(path) from error
    finally:
        let_go()
    return place


def kept_aside(path: Path, named: Optional[str]) -> Optional[Path]:
    """The earlier run that a record says is kept aside: beside `path` only, since it is deleted in the end."""
    name = re.split(r"[\\/]", named or "")[-1]
    is_ours = re.fullmatch(re.escape(path.name) + r"\.replaced-[0-9]{8}-[0-9]{6}", name)
    return path.with_name(name) if is_ours else None
