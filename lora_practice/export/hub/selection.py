"""Selects what at the top of an output folder is sent: what a run writes, and whatever else `--include` names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.export.hub.secret_patterns import SECRET_NAME
from lora_practice.run.file_kinds import BEST, file_kind
from lora_practice.run.own_files import DESKTOP_FILES
from lora_practice.storage.json_files import read_record
from lora_practice.storage.manifest import sha256

SKIPPED = (".git", ".cache", "__pycache__", ".ipynb_checkpoints", ".writing-*", *DESKTOP_FILES)
HALF_WRITTEN = re.compile(r"\..+\.[0-9]+")  # by a process that was killed
TENSORBOARD = ("runs", "events.out.tfevents.*")  # what is in it is named after this machine
SENT_TOO = ("LICENSE*", "LICENCE*", "NOTICE*")  # beside what a run writes


@dataclass(frozen=True)
class LeftOut:
    """A file or folder at the top of the output folder that is not sent, because `--include` does not name it."""

    name: str
    size: int  # bytes; of a folder those of all its files
    is_folder: bool = True


@dataclass(frozen=True)
class Selection:
    """Names at the top of the output folder: of what is sent, of what could be, and of what is passed over."""

    sent: frozenset[str]
    left_out: tuple[LeftOut, ...]
    passed_over: tuple[str, ...]


def select(folder: Path, include: Sequence[str], exclude_checkpoints: bool) -> Selection:
    """Divide what lies at the top of `folder`.

    Raises:
        UserError: a name or pattern in `include` matches nothing, or only what is never sent.
    """
    known = (read_record(folder) or {}).get("files")
    written = known if isinstance(known, dict) else {}
    sent, left_out, passed_over, offered = set(), [], [], []
    for path in sorted(folder.iterdir()):
        name = path.name
        is_default = _is_sent_by_default(path, written)
        is_checkpoint = exclude_checkpoints and path.is_dir() and fnmatchcase(name, "checkpoint-*")
        if is_skipped(name):
            passed_over.append(name + "/" * path.is_dir())
            continue
        if not is_default:
            offered.append(name)
        if is_default or (_matches(name, include) and not is_checkpoint):
            sent.add(name)
        elif not _can_be_sent(path, folder):
            passed_over.append(name + "/" * path.is_dir())
        else:
            left_out.append(LeftOut(name, _bytes_of(path), path.is_dir()))
    for pattern in include:
        _check_matches_something(pattern, folder, offered)
    return Selection(frozenset(sent), tuple(left_out), tuple(passed_over))


def is_skipped(name: str) -> bool:
    """Whether a file or folder of this name is never sent."""
    return _matches(name, SKIPPED) or bool(HALF_WRITTEN.fullmatch(name)) or _is_tensorboards(name)


def leads_inside(link: Path, folder: Path) -> bool:
    """Whether a link leads to something below `folder`, a resolved path, and not to itself."""
    try:
        target = link.resolve()
    except (OSError, RuntimeError):  # a loop
        return False
    return folder in target.parents and not target.is_symlink()  # Python 3.13 resolves a loop to a link of it


def _is_tensorboards(name: str) -> bool:
    return _matches(name, TENSORBOARD)


def _is_sent_by_default(path: Path, written: Mapping[str, object]) -> bool:
    """Whether a run writes a file of this name, or wrote this very one: {name: sha256} in its record."""
    if path.is_dir():
        return False
    if (path.name != BEST and file_kind(path.name) is not None) or _matches(path.name, SENT_TOO):
        return True
    return path.name in written and path.is_file() and written[path.name] == sha256(path)


def _can_be_sent(path: Path, folder: Path) -> bool:
    """Whether it would be sent if it were named: no link to a folder or to elsewhere, no pipe, no file of secrets."""
    if path.is_symlink() and (path.is_dir() or not leads_inside(path, folder.resolve())):
        return False
    return path.is_dir() or (path.is_file() and not SECRET_NAME.fullmatch(path.name))


def _check_matches_something(pattern: str, folder: Path, offered: Sequence[str]) -> None:
    here = [path.name for path in folder.iterdir()]
    if any(fnmatchcase(name, pattern) for name in here if not is_skipped(name)):
        return
    if any(fnmatchcase(name, pattern) for name in here if _is_tensorboards(name)):
        what = text("从不上传：里面的文件名带着这台机器的名字", "never sent: its files are named after this machine")
        raise UserError(what, f"--include {pattern}", text("去掉这个选项", "leave this flag out"))
    what = text("没有这个文件或文件夹", "no such file or folder here")
    there = text("这里有：", "here are: ") + text("、", ", ").join(offered) if offered else ""
    raise UserError(what, f"--include {pattern}", there)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _bytes_of(path: Path) -> int:
    found = path.rglob("*") if path.is_dir() else [path]
    return sum(one.stat().st_size for one in found if one.is_file())
