"""What a run says about itself: run_record.json for programs, README.md (the model card) for people."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_practice import __version__, compat
from lora_practice.console.text import text
from lora_practice.data.prepare import Rows
from lora_practice.machine.device import Machine
from lora_practice.run.folder import DEFAULT_OUTPUT_DIR
from lora_practice.sources.find import Source


def starting_record(
    settings: Any, machine: Machine, base: Source, data: Source, rows: Rows, argv: Sequence[str]
) -> dict[str, Any]:
    """The record as it stands before the first step; `argv` are the flags that were given."""
    once = ("--resume", "--overwrite", "--trust_checkpoint", "--trust-checkpoint")
    repeatable = [word for word in argv if word not in once]
    return {
        "made_by": f"lora-finetune-practice {__version__}",
        "started_at": time.strftime("%Y-%m-%d %H:%M"),
        "command": shlex.join([*_door("fine_tuning_practice.py", "train"), *repeatable]),
        "settings": dataclasses.asdict(settings),
        "model": base.record(),
        "data": {**data.record(), **rows.facts},
        "machine": {
            "device": machine.device,
            "precision": machine.precision,
            "reason": machine.reason,
            "cpu": machine.facts.cpu,
            "cores": machine.facts.cores,
            "gpu": machine.facts.gpu,
            "system": platform.platform(),
        },
        "versions": compat.installed(),
    }


def _door(script: str, verb: str) -> list[str]:
    """The words that open a door the way this run was started: beside the same script, or by the same command."""
    started = Path(sys.argv[0])
    if started.name == "fine_tuning_practice.py":
        return ["python", str(started.with_name(script))]
    return ["lora-practice", verb]


def announcement(machine: Machine, base: Source, data: Source, rows: Rows, steps: int, seconds: float) -> str:
    """The first line: device, precision, model, data, steps, time."""
    where = f"{machine.facts.gpu or 'GPU'}" if machine.device == "cuda" else f"CPU x{machine.facts.cores}"
    embedded = text("（内置）", " (embedded)")
    model = base.name.rpartition("/")[2] + (embedded if base.kind == "embedded" else "")
    source = data.name.rpartition("/")[2].partition("==")[0] + (embedded if data.kind == "embedded" else "")
    return text(
        f"{where}，{machine.precision}｜{model}｜{source} {len(rows.train)} 行 {rows.train.tokens} token"
        f"（训练其中 {rows.train.trained_tokens}）｜{steps} 步，{about(seconds)}",
        f"{where}, {machine.precision} | {model} | {source}: {len(rows.train)} rows, {rows.train.tokens} tokens "
        f"({rows.train.trained_tokens} trained) | {steps} steps, {about(seconds)}",
    )


def about(seconds: float) -> str:
    """An estimate in words: "about 40 s", "about 12 min"."""
    if seconds < 90:
        return text(f"约 {seconds:.0f} 秒", f"about {seconds:.0f} s")
    return text(f"约 {seconds / 60:.0f} 分钟", f"about {seconds / 60:.0f} min")


def how_to_resume(record: dict[str, Any]) -> str:
    """What an interrupted run says last."""
    command = _runnable(record["command"]) + " --resume"
    return text(
        f"已在第 {record['steps']} 步存盘。继续：\n  {command}",
        f"saved at step {record['steps']}. To go on:\n  {command}",
    )


def farewell(folder: Path, record: dict[str, Any]) -> str:
    """The last lines: where things are, and the exact next command."""
    model_dir = "" if str(folder) == DEFAULT_OUTPUT_DIR else f" --model-dir {shlex.quote(str(folder))}"
    loss = record["losses"][-1]["loss"] if record["losses"] else float("nan")
    command = _runnable(shlex.join(_door("inference.py", "infer")) + model_dir)
    took, expected = f"{record['seconds']:.0f}", f"{record['estimate']['seconds']:.0f}"
    return text(
        f"完成：{record['steps']} 步，{took} 秒（估计 {expected}），loss {loss:.3f}，结果在 {folder}/\n"
        f"下一步，和它聊聊：\n  {command}",
        f"done: {record['steps']} steps in {took} s ({expected} expected), loss {loss:.3f}; "
        f"the results are in {folder}/\nnext, talk to it:\n  {command}",
    )


def _runnable(command: str) -> str:
    """The command as this user can type it: train.sh says how, if its environment is not an activated one."""
    return command.replace("python", os.environ.get("LORA_PRACTICE_PYTHON") or "python", 1)
