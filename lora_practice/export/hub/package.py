"""Packs the files of an output folder for an upload: no secrets, no private paths, no links that lead outside.

The output folder itself is never changed: a file that must be sent in another form is carried as bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.export.hub.redaction import (
    BaseNames,
    base_names,
    private_paths,
    rewrite_text,
    update_manifest,
    update_record,
    without_first_row,
)
from lora_practice.export.hub.secret_scan import TEXT_SUFFIXES, scan_file
from lora_practice.export.hub.selection import LeftOut, is_skipped, leads_inside, select
from lora_practice.model.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lora_practice.run.file_kinds import CHECKPOINT_MANIFEST
from lora_practice.storage.json_files import RECORD, read_record

LARGEST_TEXT = 16 << 20  # bytes; a longer text is not rewritten
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
class UploadPackage:
    """All files to send, by name, what is left out unless it is named, and notes for the user (one line each)."""

    folder: Path
    files: tuple[FileToSend, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


@dataclass
class _Changes:
    """Names of the files that are not sent as they lie on disk."""

    rewritten: list[str] = field(default_factory=list)  # local paths were taken out
    rowless: list[str] = field(default_factory=list)  # a row of the training data was taken out
    withheld: list[str] = field(default_factory=list)  # local paths cannot be taken out (a pickle)
    leaking: list[str] = field(default_factory=list)  # weights, sent although they name a local path


def pack_folder(
    folder: Path, include: Sequence[str] = (), token: str = "", exclude_checkpoints: bool = False
) -> UploadPackage:
    """Choose, scan and (where they name private paths) rewrite the files of `folder`.

    Args:
        include: names or patterns of what else is sent, such as "merged", "checkpoint-*" or "notes.txt".
        token: a secret that must stand in no file.
        exclude_checkpoints: leave checkpoint-* out even if `include` matches them.

    Raises:
        UserError: no such folder, nothing in it, not a model or adapter, nothing that `include` matches, a link that
            would be sent and leads outside, or a file that looks like a secret (by its name or by its content).
    """
    _check_folder(folder)
    include = [name.rstrip("/\\") for name in include]
    selection = select(folder, include, exclude_checkpoints)
    base = base_names(folder)
    paths = private_paths(folder, base)
    passed_over = list(selection.passed_over)
    changes, files = _Changes(), []
    for path in _walk(folder.resolve(), selection.sent, passed_over):
        name = path.relative_to(folder.resolve()).as_posix()
        file = _file_to_send(name, path, token, base, paths, changes)
        if file:
            files.append(file)
    if changes.rewritten or changes.rowless or changes.withheld:
        files = [_with_updated_manifest(file, files, set(changes.withheld)) for file in files]
        files = [_with_updated_record(file, files) for file in files]
    notes = [text(f"不上传：{_some(passed_over)}", f"left out: {_some(passed_over)}")] if passed_over else []
    notes += _notes(base, changes, str((read_record(folder) or {}).get("status")))
    return UploadPackage(folder, tuple(sorted(files, key=lambda file: file.name)), selection.left_out, tuple(notes))


def _file_to_send(
    name: str, path: Path, token: str, base: BaseNames, paths: dict[str, str], changes: _Changes
) -> FileToSend | None:
    """One file as it is sent, noted in `changes` if that differs from the disk; None if it cannot be sent."""
    before = _small_text(path)
    data = None
    if before is not None:
        rowless = without_first_row(name, before)
        after = rewrite_text(name, rowless, base, paths)
        changes.rowless += [name] if rowless != before else []
        changes.rewritten += [name] if after != rowless else []
        data = after if after != before else None
    scanned = scan_file(path, name, token, paths, data)
    if before is None and scanned.has_private_path:
        if path.suffix.lower() not in WEIGHT_SUFFIXES:
            changes.withheld.append(name)
            return None
        changes.leaking.append(name)
    return FileToSend(name, path, scanned.size, scanned.sha256, scanned.git_sha1, data)


def _small_text(path: Path) -> bytes | None:
    """The content of a text that can be rewritten; None for any other file, and for one that cannot be read."""
    try:
        is_small_text = path.suffix.lower() in TEXT_SUFFIXES and path.stat().st_size <= LARGEST_TEXT
        return path.read_bytes() if is_small_text else None
    except OSError:  # the scan says why
        return None


def _with_updated_manifest(file: FileToSend, files: list[FileToSend], withheld: set[str]) -> FileToSend:
    """The same file; a checkpoint's manifest with the sizes and hashes of the rewritten files."""
    if file.path.name != CHECKPOINT_MANIFEST:
        return file
    rewritten = {one.name: (one.size, one.sha256) for one in files if one.data is not None}
    before = file.path.read_bytes() if file.data is None else file.data
    after = update_manifest(before, Path(file.name).parent.as_posix(), rewritten, withheld)
    return file if after == before else _file_of_bytes(file.name, file.path, after)


def _with_updated_record(file: FileToSend, files: list[FileToSend]) -> FileToSend:
    """The same file; a run's record with the hashes of the files beside it as they are sent."""
    if file.path.name != RECORD:
        return file
    beside = Path(file.name).parent
    sent = {Path(one.name).name: one.sha256 for one in files if Path(one.name).parent == beside}
    before = file.path.read_bytes() if file.data is None else file.data
    after = update_record(before, file.name, sent)
    return file if after == before else _file_of_bytes(file.name, file.path, after)


def _file_of_bytes(name: str, path: Path, data: bytes) -> FileToSend:
    git_sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return FileToSend(name, path, len(data), hashlib.sha256(data).hexdigest(), git_sha1, data)


def _notes(base: BaseNames, changes: _Changes, status: str) -> list[str]:
    """One line for each thing that is sent otherwise than it lies on disk."""
    notes = []
    if status in ("running", "interrupted"):
        notes.append(text("注意：这次训练还没有完成", "note: this training run has not finished"))
    if changes.rewritten:
        names = _some(changes.rewritten)
        base_zh, base_en = (f"底座改为 {base.public}，", f"base model: {base.public}; ") if base.public else ("", "")
        zh = f"上传前去掉了本机路径（{base_zh}磁盘上的文件不变）：{names}"
        en = f"local paths taken out before sending ({base_en}your files stay as they are): {names}"
        notes.append(text(zh, en))
    if changes.rowless:
        names = _some(changes.rowless)
        zh = f"上传前去掉了训练数据的第一行（磁盘上的文件不变）：{names}"
        en = f"the first row of the training data taken out before sending (your files stay as they are): {names}"
        notes.append(text(zh, en))
    if changes.withheld:
        names = _some(changes.withheld)
        zh = f"不上传（里面有本机路径或机器名）：{names}"
        en = f"left out (paths of this machine, or its name, are inside): {names}"
        notes.append(text(zh, en))
    if changes.leaking:
        names = _some(changes.leaking)
        zh, en = f"注意：权重文件里有本机路径：{names}", f"note: these weights name a path of this machine: {names}"
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
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
        zh, en = f"缺少 {ADAPTER_WEIGHTS}，适配器不完整", f"{ADAPTER_WEIGHTS} is missing"
        raise UserError(text(zh, en), str(folder), text("重新训练，或找回它", "train again, or bring it back"))
    if not any((folder / name).is_file() for name in (ADAPTER_CONFIG, "config.json")):
        zh, en = f"里面没有 {ADAPTER_CONFIG} 或 config.json", f"no {ADAPTER_CONFIG} or config.json in it"
        raise UserError(text(zh, en), str(folder), fix)


def _walk(folder: Path, sent: frozenset[str], passed_over: list[str]) -> Iterator[Path]:
    """The files to send, in the order of names; appends to `passed_over` what is never sent.

    Args:
        sent: names at the top of `folder`; of its folders everything is sent.

    Raises:
        UserError: a link leads outside.
    """
    for here, folders, files in os.walk(folder):
        if Path(here) == folder:
            folders[:] = [name for name in folders if name in sent]
            files = [name for name in files if name in sent]
        for name in sorted(folders + files):
            path = Path(here, name)
            if path.is_symlink() and not is_skipped(name) and not leads_inside(path, folder):
                what = text(
                    "链接指向文件夹之外或它自己，拒绝上传",
                    "this link leads outside the folder, or to itself: refused",
                )
                fix = text("删掉它，或换成文件本身", "delete it, or put the file itself there")
                raise UserError(what, str(path), fix)
        skipped = {name for name in folders if is_skipped(name) or Path(here, name).is_symlink()}
        passed_over += [Path(here, name).relative_to(folder).as_posix() + "/" for name in sorted(skipped)]
        folders[:] = sorted(set(folders) - skipped)
        for name in sorted(files):
            path = Path(here, name)
            if is_skipped(name) or not path.is_file():
                passed_over.append(path.relative_to(folder).as_posix())
            else:
                yield path


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f", … (+{len(names) - most})" if len(names) > most else "")
