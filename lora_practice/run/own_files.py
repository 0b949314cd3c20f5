"""Tells what a run wrote in its output folder from what it did not (notes, a `.git`, a nested run): never deleted."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.run.file_kinds import ADAPTER_GGUF, CARD, GGUF, MERGED, file_kind
from lora_practice.storage import manifest

STATUSES = ("running", "interrupted", "finished")
# written by the desktop, not by a person
DESKTOP_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")
# temporary names of `storage`, left by a process that was killed
TEMPORARY = re.compile(r"\.writing-.*|\..+\.[0-9]+")
GGUF_FILES = (f"{MERGED}-f16.gguf", f"{MERGED}-q8_0.gguf", ADAPTER_GGUF, "Modelfile")
TENSORBOARD_FILE = "*/events.out.tfevents.*"


def is_record_of_a_run(record: Optional[Mapping[str, Any]]) -> bool:
    """Whether this is a record as training writes it, not any other JSON object."""
    return record is not None and record.get("status") in STATUSES and isinstance(record.get("settings"), dict)


def is_runs_own_card(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether DIR/README.md is still the card that the run of this `record` wrote, not edited or replaced since."""
    card, written = folder / CARD, record.get("files") or {}
    return card.is_file() and written.get(CARD) == manifest.sha256(card)


def unknown_files(folder: Path, record: Optional[Mapping[str, Any]] = None) -> list[str]:
    """Names of what no run of ours wrote in `folder`, an output folder or one of its own, with the path below it.

    Names decide, and for the model card the hash in the `record` (an edited card is the user's). A link is the user's,
    and so is a folder without a run's files, which counts as one entry and ends in "/".
    """
    return [name for path in sorted(folder.iterdir()) for name in _unknown(path, record)]


def unknown_in(path: Path) -> list[str]:
    """What no run of ours wrote in merged/, gguf/ or a checkpoint; the path itself where it is no such folder."""
    if not os.path.lexists(path):
        return []
    if path.is_symlink() or not path.is_dir():
        return [path.name]
    return list(_unknown_below(path))


def check_all_known(names: Sequence[str], folder: Path) -> None:
    """Raise UserError, which names the first three, if there are files that no run of ours wrote."""
    if not names:
        return
    first = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    raise UserError(
        text(
            f"里面有不是我们写的文件，--overwrite 不会删它们：{first}",
            f"it holds files that we did not write, which --overwrite does not delete: {first}",
        ),
        where=str(folder),
        fix=text("把它们移到别处，或换一个文件夹", "move them elsewhere, or choose another folder"),
    )


def delete_run(folder: Path, record: Mapping[str, Any]) -> bool:
    """Delete the output folder of the run of this `record`; keep it, and return False, if it holds anything else."""
    return _delete(folder, unknown_files(folder, record))


def delete_checkpoint(folder: Path) -> bool:
    """Delete a checkpoint; keep it, and return False, if it holds anything that no run wrote."""
    return _delete(folder, unknown_in(folder))


def drop_older(folders: list[Path], keep: Optional[int]) -> None:
    """Delete checkpoints from the front of the list (oldest first) until `keep` are left; None keeps all."""
    for old in folders[: -keep if keep else 0]:
        delete_checkpoint(old)


def _delete(folder: Path, unknown: Sequence[str]) -> bool:
    if not unknown:
        shutil.rmtree(folder, ignore_errors=True)
    return not unknown


def _unknown(path: Path, record: Optional[Mapping[str, Any]]) -> Iterator[str]:
    name = path.name
    if name in DESKTOP_FILES or (TEMPORARY.fullmatch(name) and not path.is_symlink()):
        return
    if path.is_symlink() or (path.is_dir() and (file_kind(name + "/") is None and name != "runs")):
        yield name + "/" * path.is_dir()
    elif path.is_dir():
        yield from (f"{name}/{below}" for below in _unknown_below(path))
    elif (name == CARD and record is not None and not _may_replace_card(path, record)) or file_kind(name) is None:
        yield name


def _unknown_below(folder: Path) -> Iterator[str]:
    """What no run wrote in checkpoint-N/, merged/, gguf/ or the tensorboard folder runs/."""
    if folder.name.startswith("checkpoint-") and not re.fullmatch(r"checkpoint-[0-9]+", folder.name):
        yield ""
        return
    for path in sorted(folder.rglob("*") if folder.name == "runs" else folder.iterdir()):
        name = path.relative_to(folder).as_posix()
        if folder.name == "runs":
            known = path.is_dir() or fnmatchcase(name, TENSORBOARD_FILE)
        elif folder.name == GGUF:
            known = name in GGUF_FILES
        else:
            known = path.is_file() and file_kind(name) is not None
        if path.is_symlink() or not (known or name in DESKTOP_FILES or TEMPORARY.fullmatch(name)):
            yield name + "/" * path.is_dir()


def _may_replace_card(card: Path, record: Mapping[str, Any]) -> bool:
    """Whether the card is the run's own; that of a finished run of an older version, which kept no hashes, counts."""
    if not isinstance(record.get("files"), dict):
        return record.get("status") == "finished"
    return is_runs_own_card(card.parent, record)
