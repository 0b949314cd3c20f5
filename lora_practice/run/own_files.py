"""Tells what a run wrote in its output folder from what it did not (notes, a `.git`, a nested run): never deleted."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.model.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lora_practice.run.file_kinds import (
    ADAPTER_GGUF,
    BEST,
    CARD,
    CHECKPOINT_MANIFEST,
    CURVES,
    GGUF,
    MERGED,
    REPORT_MARK,
    REPORT_PAGE,
    file_kind,
)
from lora_practice.storage import manifest
from lora_practice.storage.json_files import RECORD, read_object

STATUSES = ("running", "interrupted", "finished")
# written by the desktop, not by a person; macOS puts a ._NAME beside each file on a foreign disk
DESKTOP_FILES = (".DS_Store", "Thumbs.db", "desktop.ini", "._*")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
)
ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, "training_args.bin", *TOKENIZER_FILES)
TRAINER_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "trainer_state.json")
MERGED_FILES = (
    *("config.json", "generation_config.json"),
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
)
GGUF_FILES = (f"{MERGED}-f16.gguf", f"{MERGED}-q8_0.gguf", ADAPTER_GGUF, "Modelfile")
# what a run and the commands after it write, by folder; the card and the report's files are looked into
AT_THE_TOP = (*ADAPTER_FILES, RECORD, BEST)
IN_A_FOLDER = {
    "checkpoint": (*ADAPTER_FILES, *TRAINER_FILES, CHECKPOINT_MANIFEST),
    MERGED: (*MERGED_FILES, *TOKENIZER_FILES),
    GGUF: GGUF_FILES,
    "runs": ("events.out.tfevents.*",),  # tensorboard's, in a folder for each start
}


def is_record_of_a_run(record: Optional[Mapping[str, Any]]) -> bool:
    """Whether this is a record as training writes it, not any other JSON object."""
    return record is not None and record.get("status") in STATUSES and isinstance(record.get("settings"), dict)


def is_runs_own_card(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether DIR/README.md is still the card that the run of this `record` wrote, not edited or replaced since."""
    card, written = folder / CARD, record.get("files") or {}
    return card.is_file() and manifest.sha256(card) in (written.get(CARD), record.get("earlier_card"))


def is_reports_own(file: Path) -> bool:
    """Whether report.html or curves.png was written by `report`, which puts its mark near the beginning."""
    with open(file, "rb") as opened:
        return REPORT_MARK.encode("ascii") in opened.read(4096)


def is_nobodys(path: Path) -> bool:
    """Whether an entry at the top of an output folder may be ignored: a process of ours or the desktop left it."""
    return is_temporary(path) or (_matches(path.name, DESKTOP_FILES) and path.is_file() and not path.is_symlink())


def is_temporary(path: Path) -> bool:
    """Whether this was left by a process of ours that was killed: a folder of `staging`, or a file half written."""
    name, _, process = path.name.rpartition(".")
    if path.is_symlink():
        return False
    if path.is_dir():
        return path.name.startswith(".writing-")
    return name.startswith(".") and process.isdigit() and file_kind(name[1:]) is not None


def unknown_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """Names of what no run of ours wrote in an output folder, below it: "notes.txt", "gguf/mine.gguf", ".git/".

    Names decide; for the model card its hash in the `record` of the run (an edited card is the user's), for the files
    of a report the mark in them. A link is the user's. A folder that no run makes counts as one entry.
    """
    return [name for path in sorted(folder.iterdir()) for name in _unknown_at_the_top(path, record)]


def unknown_in(path: Path) -> list[str]:
    """What no run of ours wrote in checkpoint-N/, merged/, gguf/ or runs/; its name where it is no such folder."""
    if not os.path.lexists(path):
        return []
    kind = "checkpoint" if re.fullmatch(r"checkpoint-[0-9]+", path.name) else path.name
    if path.is_symlink() or not path.is_dir() or kind not in IN_A_FOLDER:
        return [path.name + "/" * path.is_dir()]
    written = set(_listed(path)) if kind == "checkpoint" else set()
    unknown = []
    for below in sorted(path.rglob("*") if kind == "runs" else path.iterdir()):
        known = below.is_file() and (
            below.name in written or _matches(below.name, (*IN_A_FOLDER[kind], *DESKTOP_FILES))
        )
        known = known or (kind == "runs" and below.is_dir()) or is_temporary(below)
        if below.is_symlink() or not known:
            unknown.append(below.relative_to(path).as_posix() + "/" * below.is_dir())
    return unknown


def check_all_known(names: Sequence[str], folder: Path) -> None:
    """Raise UserError, which names the first three, if there are files that no run of ours wrote."""
    if not names:
        return
    first = text("、", ", ").join(names[:3]) + (" ..." if len(names) > 3 else "")
    raise UserError(
        text(
            f"里面有别的文件，--overwrite 不会删除：{first}",
            f"it holds files that we did not write, which --overwrite does not delete: {first}",
        ),
        where=str(folder),
        fix=text("移到别处，或换一个文件夹", "move them elsewhere, or choose another folder"),
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


def _unknown_at_the_top(path: Path, record: Mapping[str, Any]) -> list[str]:
    name, written = path.name, record.get("files")
    if is_temporary(path):
        return []
    if path.is_dir() and not path.is_symlink() and (name in IN_A_FOLDER or name.startswith("checkpoint-")):
        unknown = unknown_in(path)
        return unknown if unknown == [name + "/"] else [f"{name}/{one}" for one in unknown]
    if path.is_symlink() or not path.is_file():
        return [name + "/" * path.is_dir()]
    if name == CARD:
        known = _may_replace_card(path, record)
    elif name in (REPORT_PAGE, CURVES):
        known = is_reports_own(path)
    else:
        known = _matches(name, (*AT_THE_TOP, *DESKTOP_FILES))
        known = known or (isinstance(written, dict) and name in written and written[name] == manifest.sha256(path))
    return [] if known else [name]


def _listed(checkpoint: Path) -> list[str]:
    """Names in a checkpoint's own manifest; none where it is missing or damaged."""
    try:
        return list(read_object(checkpoint / CHECKPOINT_MANIFEST)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _may_replace_card(card: Path, record: Mapping[str, Any]) -> bool:
    """Whether the card is the run's own; that of a finished run of an older version, which kept no hashes, counts."""
    if not isinstance(record.get("files"), dict):
        return record.get("status") == "finished"
    return is_runs_own_card(card.parent, record)
