"""What of an output folder may leave this machine: no secrets, no private paths, no links that lead outside.

The folder itself is never changed; a file that must be sent differently is carried as bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.export.hub.redaction import Base, base_names, mend_manifest, private_roots, rewrite
from lora_practice.export.hub.secret_scan import TEXT_SUFFIXES, inspect_file
from lora_practice.model.adapter_config import ADAPTER_WEIGHTS
from lora_practice.run.folder import CHECKPOINT_MANIFEST
from lora_practice.storage.json_files import read_record

LARGEST_TEXT = 16 << 20  # bytes; a longer text is not rewritten
SKIPPED = {".git", ".cache", "__pycache__", ".ipynb_checkpoints", ".DS_Store", "Thumbs.db"}
MERGED_FOLDERS = ("merged", "gguf")  # what merging and exporting wrote: the model once more, each time
WEIGHT_SUFFIXES = {".safetensors", ".gguf"}


@dataclass(frozen=True)
class FileToSend:
    """One file to send: its name in the repository, size in bytes and hashes of what is sent.

    `data` holds the bytes when they differ from those on disk.
    """

    name: str
    path: Path
    size: int
    sha256: str
    git_sha1: str
    data: bytes | None = None


@dataclass(frozen=True)
class Parcel:
    """All files to send, by name, and what the user should know about them (one line each)."""

    folder: Path
    items: tuple[FileToSend, ...]
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(item.size for item in self.items)


def pack_folder(
    folder: Path, exclude_checkpoints: bool = False, token: str = "", exclude_merged: bool = False
) -> Parcel:
    """Choose, inspect and (where they name private paths) rewrite the files of `folder`.

    Raises:
        UserError: no such folder, nothing in it, not a model or adapter, a link that leads outside, or a file
            that looks like a secret (by name, or by what is written in it; `token` itself included).
    """
    _check_folder(folder)
    base = base_names(folder)
    roots = private_roots(folder, base)
    notes: list[str] = []
    items, rewritten, left_out, leaks = [], [], [], []
    excluded = ("checkpoint-*",) * exclude_checkpoints + MERGED_FOLDERS * exclude_merged
    paths = list(_walk(folder.resolve(), excluded, notes))
    for path in paths:
        name = path.relative_to(folder.resolve()).as_posix()
        size, sha256, git_sha1, is_private = inspect_file(path, name, token, roots)
        item = FileToSend(name, path, size, sha256, git_sha1)
        if path.suffix.lower() in TEXT_SUFFIXES and size <= LARGEST_TEXT:
            before = path.read_bytes()
            after = rewrite(name, before, base, roots)
            if after != before:
                item = _item_of_bytes(name, path, after)
                rewritten.append(name)
        elif is_private and path.suffix.lower() not in WEIGHT_SUFFIXES:
            left_out.append(name)
            continue
        elif is_private:
            leaks.append(name)
        items.append(item)
    if rewritten or left_out:
        items = [_mended(item, items, set(left_out)) for item in items]
    notes += _tell_changes(base, rewritten, left_out, leaks, str((read_record(folder) or {}).get("status")))
    return Parcel(folder, tuple(sorted(items, key=lambda item: item.name)), tuple(notes))


def _mended(item: FileToSend, items: list[FileToSend], gone: set[str]) -> FileToSend:
    """The same item, or a checkpoint's manifest that knows of the rewritten files."""
    if item.path.name != CHECKPOINT_MANIFEST:
        return item
    changed = {one.name: (one.size, one.sha256) for one in items if one.data is not None}
    before = item.path.read_bytes() if item.data is None else item.data
    after = mend_manifest(before, Path(item.name).parent.as_posix(), changed, gone)
    return item if after == before else _item_of_bytes(item.name, item.path, after)


def _item_of_bytes(name: str, path: Path, data: bytes) -> FileToSend:
    git_sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return FileToSend(name, path, len(data), hashlib.sha256(data).hexdigest(), git_sha1, data)


def _tell_changes(base: Base, rewritten: list[str], left_out: list[str], leaks: list[str], status: str) -> list[str]:
    """One line for each thing that is sent otherwise than it lies on disk."""
    notes = []
    if status in ("running", "interrupted"):
        notes.append(text("注意：这次训练没有结束", "note: this training run has not finished"))
    if rewritten:
        names = _some(rewritten)
        base_zh, base_en = (f"底座改为 {base.public}，", f"base model: {base.public}; ") if base.public else ("", "")
        zh = f"上传前去掉了本机路径（{base_zh}磁盘上的文件不变）：{names}"
        en = f"local paths taken out before sending ({base_en}your files stay as they are): {names}"
        notes.append(text(zh, en))
    if left_out:
        names = _some(left_out)
        zh, en = f"不上传（里面有本机路径）：{names}", f"left out (they hold paths of this machine): {names}"
        notes.append(text(zh, en))
    if leaks:
        names = _some(leaks)
        zh, en = (
            f"注意：权重文件里有本机路径：{names}",
            f"note: these weights name a path of this machine: {names}",
        )
        notes.append(text(zh, en))
    if not base.on_hub:
        zh = f"注意：底座模型 {base.public} 只在本机，别人无法加载这个适配器"
        en = f"note: the base model {base.public} is only on this machine; others cannot load this adapter"
        notes.append(text(zh, en))
    return notes


def _check_folder(folder: Path) -> None:
    train = text("先训练：python fine_tuning_practice.py", "train first: python fine_tuning_practice.py")
    fix = text(f"{train}，或用 --local_dir 指定", f"{train}, or name another with --local_dir")
    if not folder.is_dir():
        raise UserError(text("没有这个文件夹", "no such folder"), str(folder), fix)
    if not any(folder.iterdir()):
        raise UserError(text("文件夹是空的", "the folder is empty"), str(folder), fix)
    if (folder / "adapter_config.json").is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
        zh, en = f"缺少 {ADAPTER_WEIGHTS}，适配器不完整", f"{ADAPTER_WEIGHTS} is missing"
        raise UserError(text(zh, en), str(folder), text("重新训练，或找回它", "train again, or bring it back"))
    if not any((folder / name).is_file() for name in ("adapter_config.json", "config.json")):
        zh, en = "里面没有 adapter_config.json 或 config.json", "no adapter_config.json or config.json in it"
        raise UserError(text(zh, en), str(folder), fix)


def _walk(folder: Path, excluded: Sequence[str], notes: list[str]) -> Iterator[Path]:
    """Every file to look at, in the order of names; appends to `notes` what is passed over."""
    passed: list[str] = []
    for here, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = Path(here, name)
            if path.is_symlink() and not _leads_inside(path, folder):
                zh, en = (
                    "链接指向文件夹之外或它自己，拒绝上传",
                    "this link leads outside the folder, or to itself: refused",
                )
                fix = text("删掉它，或换成文件本身", "delete it, or put the file itself there")
                raise UserError(text(zh, en), str(path), fix)
        chosen = []
        for name in sorted(folders):
            is_excluded = any(fnmatch(name, pattern) for pattern in excluded)
            if is_excluded or name in SKIPPED or name.startswith(".writing-") or Path(here, name).is_symlink():
                passed.append(Path(here, name).relative_to(folder).as_posix() + "/")
            else:
                chosen.append(name)
        folders[:] = chosen
        for name in sorted(files):
            path = Path(here, name)
            if name in SKIPPED or not path.is_file():
                passed.append(path.relative_to(folder).as_posix())
            else:
                yield path
    if passed:
        notes.append(text(f"不上传：{_some(passed)}", f"left out: {_some(passed)}"))


def _leads_inside(link: Path, folder: Path) -> bool:
    try:
        target = link.resolve()
    except (OSError, RuntimeError):  # a loop
        return False
    return folder in target.parents and not target.is_symlink()  # Python 3.13 resolves a loop to a link of it


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", … (+{len(names) - most})" if len(names) > most else "")
