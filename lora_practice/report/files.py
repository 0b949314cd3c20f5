"""Lists the files of an output folder: each with its size, its kind, and whether it is whole.

Reads no pickle and loads no torch.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.text import text
from lora_practice.run.file_kinds import CHECKPOINT_MANIFEST, FILE_KINDS, GGUF, FileKind, file_kind
from lora_practice.storage import manifest

ZIPPED = (".bin", ".pt", ".pth")  # what torch.save writes


@dataclass(frozen=True)
class FolderEntry:
    """One file or folder of an output folder; a folder's name ends in "/".

    size: in bytes; kind: None for what no run writes; fault: why it is not whole, "" if it is.
    changed: whole, but no longer what the run wrote.
    """

    name: str
    size: int
    kind: Optional[FileKind]
    fault: str = ""
    changed: bool = False

    def needed_for(self, use: str) -> bool:
        """Whether "inference", "sharing" or "resuming" needs it."""
        return self.kind is not None and use in self.kind.needed_for


def list_entries(folder: Path, record: Optional[Mapping[str, Any]] = None) -> list[FolderEntry]:
    """Everything at the top of `folder` but hidden files: what a run writes first, in the order of FILE_KINDS.

    `record` may hold the SHA-256 of the files that the run wrote; a checkpoint's own manifest has them too.
    """
    known = dict((record or {}).get("files") or {})
    known.update(_checkpoint_hashes(folder))
    entries = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            entries.append(_folder(path))
            continue
        fault = file_fault(path)
        changed = not fault and path.name in known and manifest.sha256(path) != known[path.name]
        if changed and path.suffix == ".safetensors":  # no one edits weights by hand
            fault = text("和训练写下的不一样", "not what the run wrote")
        changed = changed and not fault
        entries.append(FolderEntry(path.name, path.lstat().st_size, file_kind(path.name), fault, changed))
    order = {id(kind): number for number, kind in enumerate(FILE_KINDS)}
    return sorted(entries, key=lambda one: (order.get(id(one.kind), len(FILE_KINDS)), _numbered(one.name)))


def file_fault(path: Path) -> str:
    """Why a file cannot be of the type that its name says, in a few words; "" where nothing speaks against it."""
    try:
        if not path.stat().st_size:
            return text("是空的", "it is empty")
        if path.suffix == ".json":
            if not isinstance(json.loads(path.read_text("utf-8")), dict):
                return text("不是 JSON 对象", "not a JSON object")
        elif path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), "np") as file:  # the header must fit the file's length
                file.keys()
        elif path.suffix in ZIPPED:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    return text("已损坏", "it is damaged")
        elif path.suffix in (".txt", ".jinja", ".md", ".html"):
            path.read_text("utf-8")
    except Exception as error:  # a damaged file makes each library raise something of its own
        return getattr(error, "strerror", None) or text("已损坏", "it is damaged")
    return ""


def _folder(path: Path) -> FolderEntry:
    """The entry of a subfolder: a checkpoint by its manifest, merged/ and gguf/ by the files that they need."""
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    kind = file_kind(path.name + "/")
    fault = ""
    if path.name.startswith("checkpoint-"):
        fault = manifest.folder_fault(path, CHECKPOINT_MANIFEST)
    elif kind is not None:
        faults = [(file.name, file_fault(file)) for file in sorted(path.iterdir()) if file.is_file()]
        is_gguf = path.name == GGUF
        wanted = [] if is_gguf else ["config.json", "tokenizer.json"]
        missing = [name for name in wanted if not (path / name).is_file()]
        if not any(path.glob("*.gguf" if is_gguf else "model*.safetensors")):
            missing.append("merged-f16.gguf" if is_gguf else "model.safetensors")
        fault = next((f"{name}: {reason}" for name, reason in faults if reason), "")
        fault = fault or (text(f"缺少 {missing[0]}", f"{missing[0]} is missing") if missing else "")
    return FolderEntry(path.name + "/", size, kind, fault)


def _checkpoint_hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of a checkpoint's files by its manifest; {} where there is none that can be read."""
    try:
        listed = json.loads((folder / CHECKPOINT_MANIFEST).read_text("utf-8"))["files"]
        return {name: one["sha256"] for name, one in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _numbered(name: str) -> tuple[str, int]:
    """A sort key that puts checkpoint-2/ before checkpoint-10/."""
    stem, _, number = name.rstrip("/").rpartition("-")
    return (stem, int(number)) if number.isdigit() else (name, 0)
