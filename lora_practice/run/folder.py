"""The output folder of a run: checked before anything is computed, each file written whole or not at all.

DIR/                      adapter, tokenizer, model card and run_record.json of a finished run
DIR/checkpoint-N/         state after N steps; its manifest `checkpoint.json` is written last: it means complete
DIR/run_record.json       status "running", "interrupted" or "finished", with settings and losses
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Optional

from lora_practice.console.errors import UserError, expand_home
from lora_practice.console.text import masked, tell, text, without_tokens
from lora_practice.run import own_files
from lora_practice.run.file_kinds import CARD, CHECKPOINT_MANIFEST
from lora_practice.run.resume import check_same_settings
from lora_practice.storage import disk, lock, manifest, signature
from lora_practice.storage.json_files import RECORD, read_record

DEFAULT_OUTPUT_DIR = "outputs/SmolLM2-FT-MyDataset"
PROOF = ("<!-- proof -->", "<!-- /proof -->")  # these marks in the card enclose the result of `export`


class OutputFolder:
    """The folder of one run: `claim` checks it and writes nothing, `begin` creates it, `finish` completes it.

    Attributes:
        resumed_record: record of the run that is resumed; {} for a new run.
        checkpoint: the checkpoint to resume from; None for a new run.
        events: what recovery did, for the record: {"step", "kind", "said", "compute_config"} each.
    """

    def __init__(
        self, path: Path, old: Optional[tuple[int, int]] = None, resumed_record: Optional[dict[str, Any]] = None
    ) -> None:
        self.path, self._old = path, old  # `old`: lock.folder_identity of the run that this one replaces
        self._record: dict[str, Any] = {}  # last given to write_record
        self._written: dict[str, Any] = {}  # the same, as read_record returns it
        self._locked: Optional[tuple[int, int]] = None  # lock.folder_identity of the folder, locked since `begin`
        self._unlock: Callable[[], Any] = lambda: None
        self.resumed_record = resumed_record or {}
        self.checkpoint = newest_whole_checkpoint(path) if self.resumed_record else None
        self._replaced = lock.kept_aside(path, self.resumed_record.get("replaces"))
        # events after the checkpoint that is resumed belong to steps that are computed again
        at = step_of(self.checkpoint)
        recorded = self.resumed_record.get("events", [])
        self.events: list[dict[str, Any]] = [event for event in recorded if event["step"] <= at]

    @classmethod
    def claim(cls, output_dir: str, resume: bool, overwrite: bool, settings: dict[str, Any]) -> OutputFolder:
        """Check that this run may write to `output_dir`, and find the run to resume there; writes nothing.

        Raises:
            UserError: the path is a file or not writable; another run is writing to the folder; it holds an earlier
                run and neither `resume` nor `overwrite` is given; it holds files of no run; resuming would change a
                setting that affects the result, or read a checkpoint that this user did not write here.
        """
        try:
            path = lock.link_target(Path(output_dir).expanduser())
            lock.check_writable(path)
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, the home of nobody
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(reason, where=f"--output_dir {output_dir}") from error
        if overwrite and resume:
            raise UserError(
                text("--overwrite 和 --resume 只能选一个", "--overwrite and --resume contradict each other"),
                fix=text(
                    "继续用 --resume，重新开始用 --overwrite", "--resume continues the run, --overwrite starts again"
                ),
            )
        if path.is_dir() and not settings.get("plan"):
            with _lock_errors():
                lock.lock_folder(path)()
        record = read_record(path)
        if record is not None and not (path / RECORD).is_file():
            raise UserError(
                text("这是一个检查点，不是训练的输出文件夹", "this is a checkpoint, not the folder of a run"),
                where=str(path),
                fix=f"--output_dir {shlex.quote(str(path.parent))}",
            )
        if not path.exists() or all(own_files.is_nobodys(entry) for entry in path.iterdir()):
            if resume:
                raise _nothing_to_resume_error(path)
            return cls(path)
        if record is None or not own_files.is_record_of_a_run(record):
            raise UserError(
                text(
                    "这个文件夹里有别的文件，不会写进去",
                    "this folder holds other files; nothing is written to it",
                ),
                where=str(path),
                fix=text("换一个 --output_dir", "choose another --output_dir"),
            )
        if overwrite:
            lock.check_replaceable(path)
            if not settings.get("plan"):  # which writes nothing
                own_files.check_all_known(own_files.unknown_files(path, record), path)
            return cls(path, old=lock.folder_identity(path))
        if record.get("status") == "finished":
            raise _finished_error(path, record, resume)
        if not resume:
            raise _unfinished_error(path, checkpoints(path))
        check_same_settings(path, record, settings)
        claimed = cls(path, resumed_record=record)
        if claimed.checkpoint:
            signature.check_signature(
                claimed.checkpoint, CHECKPOINT_MANIFEST, trusted=bool(settings.get("trust_checkpoint"))
            )
        return claimed

    def begin(self, record: dict[str, Any]) -> None:
        """Create and lock the folder; an earlier run that is replaced is renamed until this one is finished.

        Raises:
            UserError: another run has begun here since `claim` looked.
        """
        if self._old and self.path.exists():
            with _lock_errors():
                self._replaced = lock.move_aside(self.path, self._old)
            tell(
                text(
                    f"原来的结果先留在 {self._replaced}，这次完成后才删",
                    f"the earlier run stays in {self._replaced} until this one is finished",
                )
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock(self.resumed_record)
        _remove_leftovers(self.path)
        if self._replaced is not None:
            record["replaces"] = str(self._replaced)
        self.write_record({**record, "status": "running"})

    def note(self, kind: str, step: int, message: str, compute_config: dict[str, Any]) -> None:
        """Add an event to the record: what happened after `step` steps, and the compute config from there on."""
        self.events.append({"step": step, "kind": kind, "said": message, "compute_config": compute_config})
        if self._record:
            self.write_record(self._record)

    def last_compute_config(self) -> dict[str, Any]:
        """Fields of the compute config after the newest event; {} where nothing happened."""
        event = self.events[-1] if self.events else {}
        return event.get("compute_config") or event.get("regime") or {}  # "regime": its name up to version 0.1.0

    def write_record(self, record: dict[str, Any]) -> None:
        """Write run_record.json with the events so far; Hub tokens in commands or data are masked."""
        self._keep_lock()
        self._record = record
        content = record_text({**record, "events": self.events})
        with disk.explain_disk_errors(self.path, len(content), text("，再运行一次", ", then run it again")):
            manifest.write_atomically(self.path / RECORD, content)
        self._written = json.loads(content)

    def finish(self, staged: Path, record: dict[str, Any]) -> None:
        """Move the result's files from `staged` into place; status "finished", written last, means complete.

        The record names the files before they are moved, so that a run killed in between knows them as its own.
        """
        manifest.flush_to_disk(staged)
        files = sorted(staged.iterdir())
        hashes = dict(record.get("files") or {})
        record["earlier_card"] = hashes.get(CARD)
        record["files"] = {**hashes, **{file.name: manifest.sha256(file) for file in files}}
        self.write_record({**record, "status": self._written.get("status", "running")})
        for file in files:
            os.replace(file, self.path / file.name)
        for name in ("replaces", "earlier_card"):
            record.pop(name, None)
        self.write_record({**record, "status": "finished"})
        if self._replaced is not None:
            self._delete_replaced(self._replaced)
            self._replaced = None

    def _delete_replaced(self, folder: Path) -> None:
        """Delete the earlier run, unless something else came into it or is there instead."""
        try:
            record = read_record(folder)
        except UserError:
            record = None
        if record is not None and own_files.is_record_of_a_run(record) and own_files.delete_run(folder, record):
            return
        if folder.exists():
            zh, en = "里面有别的文件，没有删除", "it holds files that we did not write: not deleted"
            tell(f"{folder}: {text(zh, en)}")

    def add_checkpoint(self, staged: Path, keep: Optional[int]) -> None:
        """Sign a staged `checkpoint-N`, move it into place, and delete the oldest so that at most `keep` remain.

        Checkpoints after N, which were damaged when the run was resumed, are neither counted nor deleted.
        """
        signature.sign_checkpoint(staged, CHECKPOINT_MANIFEST)
        manifest.flush_to_disk(staged)
        target = self.path / staged.name
        if os.path.lexists(target) and not own_files.delete_checkpoint(target):
            os.replace(target, lock.free_name_beside(target))
        os.replace(staged, target)
        found = checkpoints(self.path)
        own_files.drop_older(found[: found.index(target) + 1], keep)

    @contextmanager
    def staging(self, needed: int) -> Iterator[Path]:
        """A hidden folder inside the output folder, so on the same disk; removed at the end in any case.

        Raises:
            UserError: fewer than `needed` bytes are free, a write fails, or another run has taken the folder.
        """
        self._keep_lock()
        kept = text("，用 --resume 继续；已有的检查点都在", ", go on with --resume; earlier checkpoints are kept")
        with disk.staging(self.path, needed, kept) as place:
            yield place

    def _lock(self, *known: dict[str, Any]) -> None:
        """Lock the folder that is at `path` now; UserError if another run has it, or its record is none of `known`."""
        self._unlock()
        with _lock_errors():
            self._unlock = weakref.finalize(self, lock.lock_folder(self.path))
            if (read_record(self.path) or {}) not in known:
                raise lock.FolderReplaced(self.path)
        self._locked = lock.folder_identity(self.path)

    def _keep_lock(self) -> None:
        """Create the folder again if it was deleted or moved since `begin`; lock whatever is in its place."""
        found = lock.folder_identity(self.path)
        if self._locked in (None, found):
            return
        if found is None:
            tell(text(f"{self.path} 不见了，重新创建", f"{self.path} is gone: it is created again"))
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock({}, self._written)
        self.write_record(self._record)


def record_text(record: Mapping[str, Any]) -> str:
    """The text of run_record.json, without tokens; what JSON does not know, such as a path, is written as text."""
    return json.dumps(masked(record), indent=2, ensure_ascii=False, default=lambda one: without_tokens(str(one))) + "\n"


def record_in(output_dir: str) -> dict[str, Any]:
    """run_record.json of the run in this folder; empty where there is none."""
    try:
        return read_record(lock.link_target(expand_home(output_dir))) or {}
    except (OSError, ValueError):  # a path that cannot be one: `claim` says what is wrong with it
        return {}


def rewrite_card(folder: Path, content: str, record: Optional[dict[str, Any]] = None) -> None:
    """Replace DIR/README.md; where it was the run's own card, the record knows the new one as its own, and the old one.

    The record is written first, so that a process killed in between leaves a card that the record knows.

    Args:
        record: of the run, with what else is to be changed in it; None takes the one on disk.
    """
    record = record if record is not None else read_record(folder) or {}
    content = without_tokens(content)
    if own_files.is_runs_own_card(folder, record):
        earlier = record["files"].get(CARD)
        new = hashlib.sha256(content.encode("utf-8")).hexdigest()
        record.update(files={**record["files"], CARD: new}, earlier_card=earlier)
        manifest.write_atomically(folder / RECORD, record_text(record))
    manifest.write_atomically(folder / CARD, content)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint-N folders in `folder`, in the order of N."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-[0-9]+", p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Optional[Path]) -> int:
    """N of checkpoint-N; 0 for None."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def newest_whole_checkpoint(folder: Path) -> Optional[Path]:
    """The newest checkpoint whose files match its manifest; None if `folder` has no checkpoint.

    Damaged checkpoints are skipped with a message.

    Raises:
        UserError: every checkpoint is damaged.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        fault = manifest.folder_fault(checkpoint, CHECKPOINT_MANIFEST, thorough=True)
        if not fault:
            return checkpoint
        tell(text(f"{checkpoint} 不完整（{fault}），跳过", f"{checkpoint} is not whole ({fault}), passed over"))
    if found:
        raise UserError(
            text("没有完整的检查点可以继续", "no whole checkpoint is left to resume from"),
            where=str(folder),
            fix=text("用 --overwrite 重新训练", "train again with --overwrite"),
        )
    tell(text("还没有检查点，从第一步开始", "there is no checkpoint yet: starting at the first step"))
    return None


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Lock an output folder while `merge` or `export` writes into it, and remove what a killed one left there.

    Within a process that has locked the folder already nothing is done.

    Raises:
        UserError: another process is writing to it.
    """
    if lock.is_locked_here(folder):
        yield
        return
    with _lock_errors():
        unlock = lock.lock_folder(folder)
    try:
        if lock.is_locked_here(folder):  # not where the system has no locks: another process may be writing
            _remove_leftovers(folder)
        yield
    finally:
        unlock()


def _remove_leftovers(folder: Path) -> None:
    for stale in disk.leftovers(folder, RECORD):
        shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink()


@contextmanager
def _lock_errors() -> Iterator[None]:
    """Turn the exceptions of `lock` into a UserError that says what is in the folder."""
    try:
        yield
    except lock.FolderInUse as error:
        raise UserError(
            text("另一次训练正在写这个文件夹", "another run is writing to this folder"),
            where=str(error.folder),
            fix=text("等它结束，或换一个 --output_dir", "wait until it ends, or choose another --output_dir"),
        ) from error
    except lock.FolderReplaced as error:
        raise UserError(
            text(
                "这个文件夹里现在是另一次训练或别的文件，没有动它",
                "the folder now holds another run or other files; they are left alone",
            ),
            where=str(error.folder),
            fix=text("看看里面是什么，或换一个 --output_dir", "look at what it holds, or choose another --output_dir"),
        ) from error


def _nothing_to_resume_error(path: Path) -> UserError:
    """The error for --resume where nothing is."""
    return UserError(
        text("这里没有可以继续的训练", "there is no run to resume here"),
        where=str(path),
        fix=text(
            "训练在别的文件夹，就用 --output_dir 指定；还没训练过，就去掉 --resume",
            "if the run is in another folder, name it with --output_dir; to start one, leave out --resume",
        ),
    )


def _finished_error(path: Path, record: dict[str, Any], resume: bool) -> UserError:
    """The error for a folder that holds a finished run, without --overwrite."""
    when, steps = record.get("finished_at", "?"), record.get("steps", "?")
    fix = text(
        "要保留它：换一个 --output_dir；要覆盖它：--overwrite",
        "to keep it, choose another --output_dir; to replace it, --overwrite",
    )
    if resume:
        fix = text(
            "它不用继续；要继续别的训练，用 --output_dir 指定它的文件夹",
            "nothing is left to go on with; to resume another run, name its folder with --output_dir",
        )
    what = text(f"这里已有训练完成的结果（{when}，{steps} 步）", f"a finished run is here ({when}, {steps} steps)")
    return UserError(what, where=str(path), fix=fix)


def _unfinished_error(path: Path, checkpoints: list[Path]) -> UserError:
    """The error for a folder that holds an unfinished run with these checkpoints, without --resume or --overwrite."""
    at = checkpoints[-1].name if checkpoints else text("还没有检查点", "no checkpoint yet")
    return UserError(
        text(f"这里有一次没完成的训练（{at}）", f"an unfinished run is here ({at})"),
        where=str(path),
        fix=text("继续：--resume；重新开始：--overwrite", "go on: --resume; start again: --overwrite"),
    )
