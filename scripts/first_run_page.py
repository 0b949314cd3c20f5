"""把一次训练的记录写成 docs/first-run.md 和 README 的图。 / Writes docs/first-run.md and README's picture from a run.

    python fine_tuning_practice.py --embedded --eval_subset_size 90 --logging_steps 5 --run_inference \
        --output_dir outputs/first-run
    python scripts/first_run_page.py outputs/first-run
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lora_practice.console.errors import UserError, entry_point
from lora_practice.inference.samples import SAMPLE_TOKENS
from lora_practice.run.folder import read_record

DOCS = Path(__file__).resolve().parent.parent / "docs"
WINDOW = "960,880"  # as much of the report as the picture shows
CHINESE = """# 第一次完整训练

[English](first-run.en.md)

```bash
{command}
python scripts/first_run_page.py {folder}
```

内置模型，全部 {read} 段不重复的内置对话，其中 {held_out} 段作验证集，不参与训练：\
{trained} 行、{tokens} token（训练其中 {trained_tokens} 个），{steps} 步，\
{seconds} 秒，{speed} token/s，内存峰值 {memory} MB（{cpu}，{cores} 核，{precision}）。

![这次训练的报告](images/first-run.png)

## 损失

验证损失：训练前 {before}，训练后 {after}（每个参与训练的 token，单位 nat）。

{curve}

{table}

## 前后的回答

问的是验证集里的四段对话，训练没有用到它们；“参考”是数据里原来的回答。微调后的回答更像数据里的：短，语气相近。\
135M 的模型只训练了几分钟：学到的是说话的方式，不是知识，所以仍会答错。每个回答最多 {limit} 个 token，更长的在那里截断。

{answers}
"""
ENGLISH = """# A first full run

[中文](first-run.md)

```bash
{command}
python scripts/first_run_page.py {folder}
```

The embedded model on all {read} distinct embedded conversations, {held_out} of them the validation set:
{trained} rows, {tokens} tokens ({trained_tokens} trained), {steps} steps in {seconds} s, {speed} tokens/s, peak memory
{memory} MB ({cpu}, {cores} cores, {precision}).

![the report of this run](images/first-run.en.png)

## Loss

Validation loss: {before} before, {after} after (nats per trained token).

{curve}

{table}

## Answers before and after

The questions are from four conversations of the validation set; the reference is the answer in the data.
The adapter answers more like the data: briefly, in its tone. A 135M model that trained for minutes has learned a manner
of speaking, not knowledge, and is still often wrong. An answer has {limit} tokens at most: a longer one is cut there.

{answers}
"""


def pages(record: dict[str, Any]) -> dict[str, str]:
    """The page in each language, by the name of its file; every number comes from the record."""
    data, machine, held_out = record["data"], record["machine"], record["held_out_loss"]
    facts = {
        "command": record["command"],
        "folder": record["settings"]["output_dir"],
        "read": data["rows_read"],
        "held_out": data["rows_held_out"],
        "trained": data["rows_trained"],
        "tokens": data["tokens"],
        "trained_tokens": data["trained_tokens"],
        "steps": record["steps"],
        "seconds": f"{record['seconds']:.0f}",
        "speed": f"{record['tokens_per_second']:.0f}",
        "memory": record["peak_memory_mb"],
        "cpu": machine["cpu"],
        "cores": machine["cores"],
        "precision": machine["precision"],
        "before": f"{held_out['before']:.3f}",
        "after": f"{held_out['after']:.3f}",
        "limit": SAMPLE_TOKENS,
        **_losses([(entry["step"], entry["loss"]) for entry in record["losses"]]),
    }
    return {
        "first-run.md": CHINESE.format(
            **facts, answers=_answers(record["samples"], {"reference": "参考", "base": "底座", "adapter": "微调后"})
        ),
        "first-run.en.md": ENGLISH.format(
            **facts, answers=_answers(record["samples"], {name: name for name in ("reference", "base", "adapter")})
        ),
    }


def _losses(losses: list[tuple[int, float]]) -> dict[str, str]:
    """The training losses as a Mermaid chart and as a table."""
    low, high = min(loss for _, loss in losses), max(loss for _, loss in losses)
    chart = [
        "```mermaid",
        "xychart-beta",
        f'  x-axis "step" {losses[0][0]} --> {losses[-1][0]}',
        f'  y-axis "loss" {int(low * 2) / 2} --> {int(high * 2 + 1) / 2}',
        f"  line [{', '.join(f'{loss:.3f}' for _, loss in losses)}]",
        "```",
    ]
    table = ["| step | loss |", "|---|---|", *(f"| {step} | {loss:.3f} |" for step, loss in losses)]
    return {"curve": "\n".join(chart), "table": "\n".join(table)}


def _answers(samples: list[dict[str, Any]], names: dict[str, str]) -> str:
    """A question and the answers to it, each on one line; `names` says how each kind of answer is called."""
    parts = []
    for sample in samples:
        lines = [f"- {names[kind]}: {' '.join(sample[kind].split())}" for kind in names if sample.get(kind)]
        parts.append(f"**{sample['prompt']}**\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def draw(folder: Path) -> None:
    """Photograph the top of the run's report with Chromium into docs/images, once in Chinese and once in English.

    Raises:
        UserError: no Chromium is installed.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        raise UserError("the picture of the report needs Chromium", fix="apt-get install chromium fonts-noto-cjk")
    (DOCS / "images").mkdir(exist_ok=True)
    for language, name in (("en", "first-run.en.png"), ("zh", "first-run.png")):
        report = [sys.executable, "-m", "lora_practice.cli", "report", str(folder)]
        subprocess.run(report, env={**os.environ, "LORA_PRACTICE_LANG": language}, check=True)
        with tempfile.TemporaryDirectory() as profile:
            page = (folder / "report.html").resolve().as_uri()
            looks = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
            wait = ["--virtual-time-budget=15000", f"--window-size={WINDOW}", f"--screenshot={DOCS / 'images' / name}"]
            subprocess.run([browser, *looks, *wait, page], check=True, capture_output=True)


@entry_point
def main() -> int:
    """Write the pages and the pictures for the run in the folder that is named."""
    record = read_record(Path(sys.argv[1])) if len(sys.argv) == 2 else None
    if not record or "held_out_loss" not in record or "samples" not in record:
        raise UserError("this needs the folder of a finished run with --eval_subset_size and --run_inference")
    for name, page in pages(record).items():
        (DOCS / name).write_text(page, "utf-8")
    draw(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    main()
