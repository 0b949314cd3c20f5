"""run_record.json as it is at the start of a run, and the lines that a run prints at its start and its end."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from lora_practice import __version__, compat
from lora_practice.console.settings import as_flags, given_as_flags
from lora_practice.console.text import counted, text
from lora_practice.data.prepare import PreparedData
from lora_practice.machine.device import Machine
from lora_practice.run.folder import DEFAULT_OUTPUT_DIR
from lora_practice.run.resume import sign_outward
from lora_practice.sources.find import RunSources, Source

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def starting_record(
    settings: DataclassInstance, machine: Machine, sources: RunSources, data: PreparedData
) -> dict[str, Any]:
    """The record before the first step. `settings`: TrainSettings."""
    given = given_as_flags(settings)
    values = dataclasses.asdict(settings)
    flags = as_flags(settings, given - {"resume", "overwrite", "trust_checkpoint"})
    return {
        "made_by": f"lora-finetune-practice {__version__}",
        "started_at": time.strftime("%Y-%m-%d %H:%M"),
        "command": shlex.join([*_command("fine_tuning_practice.py", "train"), *flags]),
        "settings": values,
        "given": sorted(given),  # the others had their defaults
        "mark": sign_outward(values),
        "model": sources.model.record(),
        "data": {**sources.data.record(), "subset": sources.subset, **data.facts},
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


def _command(script: str, command: str) -> list[str]:
    """The command line of another entry point, as a script or as `lora-practice COMMAND`: as this run was started."""
    started = Path(sys.argv[0])
    if started.name == "fine_tuning_practice.py":
        return ["python", str(started.with_name(script))]
    return ["lora-practice", command]


def opening_line(
    machine: Machine, base: Source, source: Source, data: PreparedData, steps: int, seconds: Optional[float]
) -> str:
    """The line at the start of a run: device, precision, model, data, steps, expected time (`seconds`, if given)."""
    where = f"{machine.facts.gpu or 'GPU'}" if machine.device == "cuda" else f"CPU x{machine.facts.cores}"
    embedded = text("（内置）", " (embedded)")
    model = base.name.rpartition("/")[2] + (embedded if base.kind == "embedded" else "")
    name = source.name.rpartition("/")[2].partition("==")[0] + (embedded if source.kind == "embedded" else "")
    count = counted(len(data.train), "row")
    time_zh, time_en = ("", "") if seconds is None else (f"，{about(seconds)}", f", {about(seconds)}")
    return text(
        f"{where}，{machine.precision}｜{model}｜{name} {len(data.train)} 行，{data.train.tokens} token"
        f"（训练其中 {data.train.trained_tokens}）｜{steps} 步{time_zh}",
        f"{where}, {machine.precision} | {model} | {name}: {count}, {data.train.tokens} tokens "
        f"({data.train.trained_tokens} trained) | {counted(steps, 'step')}{time_en}",
    )


def about(seconds: float) -> str:
    """A duration rounded for a person: "about 40 s", "about 12 min"."""
    if seconds < 90:
        return text(f"约 {seconds:.0f} 秒", f"about {seconds:.0f} s")
    return text(f"约 {seconds / 60:.0f} 分钟", f"about {seconds / 60:.0f} min")


def how_to_resume(record: dict[str, Any]) -> str:
    """The last lines of an interrupted run: the step that was saved and the command that resumes it."""
    folder = record["settings"]["output_dir"]
    place = [] if folder == DEFAULT_OUTPUT_DIR else ["--output_dir", folder]
    place += ["--skip_login"] if record["settings"].get("skip_login") else []
    command = _runnable(shlex.join([*_command("fine_tuning_practice.py", "train"), *place, "--resume"]))
    return text(
        f"已保存第 {record['steps']} 步的检查点。继续训练：\n  {command}",
        f"saved at step {record['steps']}. To go on:\n  {command}",
    )


def closing_lines(folder: Path, record: dict[str, Any]) -> str:
    """The last lines of a finished run: steps, time, loss, the folder, and the next command."""
    model_dir = "" if str(folder) == DEFAULT_OUTPUT_DIR else f" --model_dir {shlex.quote(str(folder))}"
    loss = last_loss(record["losses"])
    command = _runnable(shlex.join(_command("inference.py", "infer")) + model_dir)
    took, expected = f"{record['seconds']:.0f}", f"{record['estimate']['seconds']:.0f}"
    return text(
        f"完成：{record['steps']} 步，{took} 秒（估计 {expected}），loss {loss}，结果在 {folder}/\n"
        f"下一步，和模型聊聊：\n  {command}",
        f"done: {counted(record['steps'], 'step')} in {took} s ({expected} expected), loss {loss}; "
        f"the results are in {folder}/\nnext, talk to it:\n  {command}",
    )


def last_loss(losses: Sequence[Mapping[str, float]]) -> str:
    """The training loss at the end of a run: the mean of what was logged in its last 10 steps, and how many these are.

    The loss of one step goes up and down with the few rows of that step.
    """
    recent = [one["loss"] for one in losses if one["step"] > losses[-1]["step"] - 10]
    if not recent:
        return "nan"
    mean = f"{sum(recent) / len(recent):.3f}"
    if len(recent) == 1:
        return mean
    return text(f"{mean}（最后 {len(recent)} 次记录的平均）", f"{mean} (mean of the last {len(recent)} logged)")


def _runnable(command: str) -> str:
    """The command with the Python that works in this user's shell, which train.sh names in LORA_PRACTICE_PYTHON."""
    return command.replace("python", os.environ.get("LORA_PRACTICE_PYTHON") or "python", 1)
