"""Output folders of runs that train nothing: claimed, begun, with checkpoints, finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refusals import refusal_of

from lora_practice.run.folder import OutputFolder
from lora_practice.storage.json_files import RECORD

SETTINGS: dict[str, Any] = {"lora_r": 6, "learning_rate": 2e-4, "seed": 42, "logging_steps": 10}


def claim(path: Path, resume: bool = False, overwrite: bool = False, **changed: Any) -> OutputFolder:
    return OutputFolder.claim(str(path), resume, overwrite, {**SETTINGS, **changed})


def refusal(path: Path, **options: Any) -> str:
    before = sorted(path.parent.rglob("*"))
    line = refusal_of(claim, path, **options)
    assert sorted(path.parent.rglob("*")) == before  # claiming touches nothing
    return line


def start(path: Path, kind: str = "hub") -> OutputFolder:
    folder = claim(path)
    folder.begin({"settings": SETTINGS, "model": {"kind": kind}, "data": {"kind": "file"}})
    return folder


def begin_again(path: Path) -> OutputFolder:
    """Begin a run that replaces the one in `path`."""
    folder = claim(path, overwrite=True)
    folder.begin({"settings": SETTINGS})
    return folder


def add_checkpoint(folder: OutputFolder, step: int, keep: int | None = None) -> Path:
    with folder.staging(1) as staging:
        staged = staging / f"checkpoint-{step}"
        staged.mkdir()
        (staged / "adapter_model.safetensors").write_bytes(b"weights %d" % step)
        folder.add_checkpoint(staged, keep)
    return folder.path / f"checkpoint-{step}"


def finish(folder: OutputFolder, word: str = "new") -> None:
    with folder.staging(1) as staging:
        (staging / "adapter_config.json").write_text("{}")
        (staging / "adapter_model.safetensors").write_text(word)
        folder.finish(staging, {"settings": SETTINGS, "steps": 7, "finished_at": "2024-05-06 07:08"})


def status(folder: OutputFolder) -> str:
    return json.loads((folder.path / RECORD).read_text("utf-8"))["status"]


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())
