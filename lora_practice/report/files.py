"""The files of an output folder, one by one: there, whole, explained. Reads no pickle and loads no torch."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.text import text
from lora_practice.report.file_kinds import KINDS, Kind, file_kind
from lora_practice.run.folder import CHECKPOINT_MANIFEST
from lora_practice.storage import manifest

ZIPPED = (".bin", ".pt", ".pth")  # what torch.save writes


@dataclass(frozen=True)
class FolderEntry:
    """One entry of the folder. `fault` is why it is not whole; "" if it is. A folder's name ends in "/"."""

    name: str
    size: int
    kind: Optional[Kind]
    fault: str = ""
    changed: bool = False  # whole, but no longer what the run wrote

    def needed_for(self, use: str) -> bool:
        """Whether "inference", "sharing" or "resuming" needs it."""
        return self.kind is not None and use in self.kind.needed_for


def take(folder: Path, record: Optional[Mapping[str, Any]] = None) -> list[FolderEntry]:
    """Everything at the top of `folder`, ours first and in the table's order, hidden files left out.

    `record` may hold the SHA-256 of the files that the run wrote. A checkpoint's own manifest knows them too.
    """
    known = dict((record or {}).get("files") or {})
    known.update(_from_manifest(folder))
    items = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            items.append(_folder(path))
            continue
        fault = file_fault(path)
        changed = not fault and path.name in known and manifest.sha256(path) != known[path.name]
        if changed and path.suffix == ".safetensors":  # no one edits weights by hand
            fault = text("和训练写下的不一样", "not what the run wrote")
        items.append(FolderEntry(path.name, path.lstat().st_size, file_kind(path.name), fault, changed and not fault))
    order = {id(kind): number for number, kind in enumerate(KINDS)}
    return sorted(items, key=lambda item: (order.get(id(item.kind), len(KINDS)), _numbered(item.name)))


def file_fault(path: Path) -> str:
    """Why a file cannot be what its name says, in a few words; "" where nothing speaks against it."""
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
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    kind = file_kind(path.name + "/")
    fault = ""
    if path.name.startswith("checkpoint-"):
        fault = manifest.folder_fault(path, CHECKPOINT_MANIFEST)
    elif kind is not None:
        broken = [(file.name, file_fault(file)) for file in sorted(path.iterdir()) if file.is_file()]
        is_gguf = path.name == "gguf"
        wanted = [] if is_gguf else ["config.json", "tokenizer.json"]
        missing = [name for name in wanted if not (path / name).is_file()]
        if not any(path.glob("*.gguf" if is_gguf else "model*.safetensors")):
            missing.append("merged-f16.gguf" if is_gguf else "model.safetensors")
        fault = next((f"{name}: {reason}" for name, reason in broken if reason), "")
        fault = fault or (text(f"缺少 {missing[0]}", f"{missing[0]} is missing") if missing else "")
    return FolderEntry(path.name + "/", size, kind, fault)


def _from_manifest(folder: Path) -> dict[str, str]:
    try:
        noted = json.loads((folder / CHECKPOINT_MANIFEST).read_text("utf-8"))["files"]
        return {name: one["sha256"] for name, one in noted.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _numbered(name: str) -> tuple[str, int]:
    stem, _, number = name.rstrip("/").rpartition("-")
    return (stem, int(number)) if number.isdigit() else (name, 0)
