"""Manifests: a folder is complete if its manifest, which is written last, exists and matches its files."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.text import text
from lora_practice.storage.json_files import read_object

BLOCK = 1 << 20


def write_manifest(folder: Path, name: str, extra: Optional[dict[str, Any]] = None) -> None:
    """Write size, time and SHA-256 of every file below `folder` to `folder/name`, together with `extra`."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / name:
            files[path.relative_to(folder).as_posix()] = file_entry(path)
    content = json.dumps({**(extra or {}), "files": files}, indent=1, ensure_ascii=False)
    (folder / name).write_text(content + "\n", "utf-8")


def file_entry(path: Path, most: Optional[int] = None) -> dict[str, Any]:
    """Size, modification time and SHA-256 of a file; for `most` see `sha256`."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256(path, most)}


def flush_to_disk(folder: Path) -> None:
    """Call fsync for every file below `folder`, so that a power failure after a later rename loses no content."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file atomically: a reader sees the old content or the new, never a part.

    The temporary file beside it is new, with a name that nobody can foresee: no link can wait there for the content.
    """
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    scratch = path.with_name(f".{path.name}.{secrets.randbelow(10**12)}")
    try:
        with open(scratch, "xb") as file:
            file.write(data)
        os.replace(scratch, path)
    except FileExistsError:  # a file or link that is not ours
        raise
    except BaseException:  # a full disk, Ctrl-C
        scratch.unlink(missing_ok=True)
        raise


def folder_fault(folder: Path, name: str, thorough: bool = False) -> str:
    """Why `folder` is incomplete or damaged, in a few words; "" if it is complete.

    A file with the recorded size and modification time is trusted unless `thorough`; otherwise its SHA-256 decides.
    """
    try:
        files = read_object(folder / name)["files"]
        if not files or any(Path(one).is_absolute() or ".." in Path(one).parts for one in files):
            raise ValueError("no list of this folder's files")
        for relative, entry in files.items():
            path = folder / relative
            if not path.is_file():
                return text(f"缺少 {relative}", f"{relative} is missing")
            stat, digest = path.stat(), entry["sha256"]
            untouched = stat.st_mtime_ns == entry["mtime_ns"] and not thorough
            if stat.st_size != entry["size"] or not (untouched or sha256(path) == digest):
                return text(f"{relative} 已损坏", f"{relative} is damaged")
    except FileNotFoundError:
        return text("没有写完整", "it was not written to the end")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return text(f"{name} 读不了", f"{name} cannot be read")
    return ""


def sha256(path: Path, most: Optional[int] = None) -> str:
    """SHA-256 of a file in hexadecimal; of a file above `most` bytes only every N-th block is read: "1/N ..."."""
    every = -(-path.stat().st_size // most) if most else 1
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            file.seek((every - 1) * BLOCK, os.SEEK_CUR)
    return digest.hexdigest() if every <= 1 else f"1/{every} {digest.hexdigest()}"
