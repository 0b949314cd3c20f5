"""The output folder: claimed before anything is computed, written whole or not at all, checked when read.

DIR/                      adapter, tokenizer, card and run_record.json of a finished run
DIR/checkpoint-N/         state after N steps; `checkpoint.json`, written last, means that it is whole
DIR/run_record.json       status "running", "interrupted" or "finished", with settings and losses
"""

from __future__ import annotations

import json
import os
import re
import shutil
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text, without_tokens
from lora_practice.run.resume import check_same_settings
from lora_practice.storage import disk, lock, manifest, signature
from lora_practice.storage.json_files import RECORD, read_record

DEFAULT_OUTPUT_DIR = "outputs/SmolLM2-FT-MyDataset"
CHECKPOINT_MANIFEST, CARD = "checkpoint.json", "README.md"
PROOF = ("<!-- proof -->", "<!-- /proof -->")  # in the card, around what `export` found


class OutputFolder:
    """One run's folder. `claim` decides what may happen to it and touches nothing; `begin` makes it."""

    def __init__(
        self, path: Path, old: Optional[tuple[int, int]] = None, resumed: Optional[dict[str, Any]] = None
    ) -> None:
        self.path, self._old = path, old  # the run that this one replaces: see lock.identity
        self._record: dict[str, Any] = {}  # as last written; below: as it is read
        self._written: dict[str, Any] = {}
        self._held: Optional[tuple[int, int]] = None  # the folder that is ours since `begin`: see lock.identity
        self._let_go: Callable[[], Any] = lambda: None
        self.resumed = resumed or {}
        self.checkpoint = newest_whole_checkpoint(path) if self.resumed else None
        self._replaced = lock.kept_aside(path, self.resumed.get("replaces"))
        # what happened up to the checkpoint that is resumed; what came later will come again, if it must
        at = step_of(self.checkpoint)
        self.events: list[dict[str, Any]] = [one for one in self.resumed.get("events", []) if one["step"] <= at]

    @classmethod
    def claim(cls, output_dir: str, resume: bool, overwrite: bool, settings: dict[str, Any]) -> OutputFolder:
        """Look before training.

        Raises:
            UserError: it is a file, cannot be written, holds a run that is going on, or one that is neither to be
                resumed nor to be replaced, holds someone else's files, or resuming would change the run or read a
                stranger's checkpoint.
        """
        try:
            path = lock.target(Path(output_dir).expanduser())
            lock.check_writable(path)
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, the home of nobody
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(reason, where=f"--output_dir {output_dir}") from error
        if overwrite and resume:
            raise UserError(
                text("--overwrite 和 --resume 只能选一个", "--overwrite and --resume contradict each other"),
                fix=text("继续用 --resume，从头再来用 --overwrite", "--resume goes on, --overwrite begins anew"),
            )
        if path.is_dir() and not settings.get("plan"):
            lock.hold(path)()
        record = read_record(path)
        if record is not None and not (path / RECORD).is_file():
            raise UserError(
                text("这是一个存盘点，不是训练的文件夹", "this is a checkpoint, not the folder of a run"),
                where=str(path),
                fix=f"--output_dir {path.parent}",
            )
        if not path.exists() or not any(one for one in path.iterdir() if one not in disk.scraps(path, RECORD)):
            if resume:
                raise UserError(text("这里没有可以继续的训练", "there is no run to resume here"), where=str(path))
            return cls(path)
        if record is None:
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
            return cls(path, old=lock.identity(path))
        if record.get("status") == "finished":
            raise finished(path, record)
        if not resume:
            raise unfinished(path, checkpoints(path))
        check_same_settings(path, record, settings)
        claimed = cls(path, resumed=record)
        if claimed.checkpoint:
            signature.check_signature(
                claimed.checkpoint, CHECKPOINT_MANIFEST, trusted=bool(settings.get("trust_checkpoint"))
            )
        return claimed

    def began_with(self, thing: str, kind: str) -> bool:
        """Whether the run that is resumed began with "model" or "data" of this kind, and so must go on with it."""
        return (self.resumed.get(thing) or {}).get("kind") == kind

    def begin(self, record: dict[str, Any]) -> None:
        """Make the folder (an earlier run that is replaced is kept aside until this one is finished).

        Raises:
            UserError: another run has begun here since `claim` looked.
        """
        if self._old and self.path.exists():
            self._replaced = lock.move_aside(self.path, self._old)
            tell(
                text(
                    f"原来的结果先留在 {self._replaced}，这次完成后才删",
                    f"the earlier run stays in {self._replaced} until this one is finished",
                )
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._hold(self.resumed)
        for stale in disk.scraps(self.path, RECORD):  # of a run that was killed
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        if self._replaced is not None:
            record["replaces"] = str(self._replaced)
        self.write_record({**record, "status": "running"})

    def note(self, kind: str, step: int, said: str, regime: dict[str, Any]) -> None:
        """Add to the record what happened after `step` whole steps, and the compute config from there on."""
        self.events.append({"step": step, "kind": kind, "said": said, "regime": regime})
        if self._record:
            self.write_record(self._record)

    def write_record(self, record: dict[str, Any]) -> None:
        """Write run_record.json whole, with the events so far, without a token that stands in a command or the data."""
        self._stay()
        self._record = record
        record = {**record, "events": self.events}
        content = without_tokens(json.dumps(record, indent=2, ensure_ascii=False, default=str)) + "\n"
        with disk.explained(self.path, len(content), text("，再运行一次", ", then run it again")):
            manifest.write_whole(self.path / RECORD, content)
        self._written = json.loads(content)

    def finish(self, staged: Path, record: dict[str, Any]) -> None:
        """Move the finished files in place, the record last: "finished" means that everything is there."""
        manifest.flush(staged)
        for file in sorted(staged.iterdir()):
            record.setdefault("files", {})[file.name] = manifest.sha256(file)
            os.replace(file, self.path / file.name)
        record.pop("replaces", None)
        self.write_record({**record, "status": "finished"})
        if self._replaced is not None:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced = None

    def add_checkpoint(self, staged: Path, keep: Optional[int]) -> None:
        """Seal a staged `checkpoint-N`, move it in place, and drop the oldest before it, so that `keep` are left.

        Newer ones than N were passed over as damaged when the run was resumed; they do not count.
        """
        signature.seal(staged, CHECKPOINT_MANIFEST)
        manifest.flush(staged)
        target = self.path / staged.name
        if target.exists():
            shutil.rmtree(target)
        os.replace(staged, target)
        found = checkpoints(self.path)
        disk.drop_older(found[: found.index(target) + 1], keep)

    @contextmanager
    def staging(self, needed: int) -> Iterator[Path]:
        """A hidden folder beside the files, on the same disk; gone afterwards, whatever happened.

        Raises:
            UserError: fewer than `needed` bytes are free, the disk refuses a write midway, or another run is here.
        """
        self._stay()
        kept = text("，用 --resume 继续；已有的存盘点都在", ", go on with --resume; earlier checkpoints are kept")
        with disk.staging(self.path, needed, kept) as place:
            yield place

    def _hold(self, *known: dict[str, Any]) -> None:
        """Take the folder that is at `path` now; UserError if another run has it, or its record is none of these."""
        self._let_go()
        self._let_go = weakref.finalize(self, lock.hold(self.path))
        if (read_record(self.path) or {}) not in known:
            raise lock.lost(self.path)
        self._held = lock.identity(self.path)

    def _stay(self) -> None:
        """Once begun: a folder deleted or moved away is made anew, and one that came in its place is taken first."""
        found = lock.identity(self.path)
        if self._held in (None, found):
            return
        if found is None:
            tell(text(f"{self.path} 不见了，重新建一个", f"{self.path} is gone: made anew"))
            self.path.mkdir(parents=True, exist_ok=True)
        self._hold({}, self._written)
        self.write_record(self._record)


def is_runs_own_card(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether DIR/README.md is still the card that the run of this `record` wrote, not edited or replaced since."""
    card, written = folder / CARD, record.get("files") or {}
    return card.is_file() and written.get(CARD) == manifest.sha256(card)


def rewrite_card(folder: Path, content: str) -> None:
    """Replace DIR/README.md; where it was the run's own card, the record knows the new one as its own."""
    card, record = folder / CARD, read_record(folder) or {}
    own = is_runs_own_card(folder, record)
    manifest.write_whole(card, content)
    if own:
        record["files"] = {**record["files"], CARD: manifest.sha256(card)}
        manifest.write_whole(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")


def checkpoints(folder: Path) -> list[Path]:
    """checkpoint-N folders, by N."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and re.fullmatch(r"checkpoint-[0-9]+", p.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Optional[Path]) -> int:
    """The N of checkpoint-N; 0 for none."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def newest_whole_checkpoint(folder: Path) -> Optional[Path]:
    """The newest checkpoint whose manifest fits; damaged newer ones are named. None if there is none at all.

    Raises:
        UserError: there are checkpoints, and every one is damaged.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        fault = manifest.folder_fault(checkpoint, CHECKPOINT_MANIFEST, thorough=True)
        if not fault:
            return checkpoint
        tell(text(f"{checkpoint} 不完整（{fault}），不用它", f"{checkpoint} is not whole ({fault}), passed over"))
    if found:
        raise UserError(
            text("没有完整的存盘点可以继续", "no whole checkpoint is left to resume from"),
            where=str(folder),
            fix=text("用 --overwrite 重新训练", "train anew with --overwrite"),
        )
    tell(text("还没有存盘点，从头开始", "there is no checkpoint yet: beginning at the first step"))
    return None


def finished(path: Path, record: dict[str, Any]) -> UserError:
    """What to say of a folder with a result that nobody asked to replace."""
    when, steps = record.get("finished_at", "?"), record.get("steps", "?")
    return UserError(
        text(f"这里已有训练完成的结果（{when}，{steps} 步）", f"a finished run is here ({when}, {steps} steps)"),
        where=str(path),
        fix=text(
            "要留着它：换一个 --output_dir；要换掉它：--overwrite",
            "to keep it, choose another --output_dir; to replace it, --overwrite",
        ),
    )


def unfinished(path: Path, checkpoints: list[Path]) -> UserError:
    """What to say of a folder with a run that stopped midway, whose checkpoints these are."""
    at = checkpoints[-1].name if checkpoints else text("还没有存盘点", "no checkpoint yet")
    return UserError(
        text(f"这里有一次没完成的训练（{at}）", f"an unfinished run is here ({at})"),
        where=str(path),
        fix=text("继续：--resume；从头再来：--overwrite", "go on: --resume; begin anew: --overwrite"),
    )
