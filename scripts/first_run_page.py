"""把一次训练的记录写成 docs/first-run.md。 / Writes docs/first-run.md from the record of a run.

    python fine_tuning_practice.py --embedded --eval_subset_size 90 --logging_steps 5 --run_inference \
        --output_dir outputs/first-run
    python scripts/first_run_page.py outputs/first-run
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lora_practice.console.errors import UserError, entry_point
from lora_practice.inference.samples import SAMPLE_TOKENS
from lora_practice.run.folder import read_record

PAGE = Path(__file__).resolve().parent.parent / "docs" / "first-run.md"


def page(record: dict[str, Any]) -> str:
    """The page, Chinese first; every number comes from the record."""
    data, machine, held = record["data"], record["machine"], record["held_out_loss"]
    losses = [(entry["step"], entry["loss"]) for entry in record["losses"]]
    low, high = min(loss for _, loss in losses), max(loss for _, loss in losses)
    curve = "\n".join(
        [
            "```mermaid",
            "xychart-beta",
            f'  x-axis "step" {losses[0][0]} --> {losses[-1][0]}',
            f'  y-axis "loss" {int(low * 2) / 2} --> {int(high * 2 + 1) / 2}',
            f"  line [{', '.join(f'{loss:.3f}' for _, loss in losses)}]",
            "```",
        ]
    )
    table = "\n".join(["| step | loss |", "|---|---|", *(f"| {step} | {loss:.3f} |" for step, loss in losses)])
    answers = "\n\n".join(
        f"**{one['prompt']}**\n\n- 底座 / base: {_one_line(one['base'])}\n- 微调 / adapter: {_one_line(one['adapter'])}"
        for one in record["samples"]
    )
    return f"""# 第一次完整训练 / A first full run

```bash
{record["command"]}
python scripts/first_run_page.py {record["settings"]["output_dir"]}
```

内置模型，全部 {data["rows_read"]} 段不重复的内置对话，其中 {data["rows_held_out"]} 段留出不训练：
{data["rows_trained"]} 行、{data["tokens"]} token（训练其中 {data["trained_tokens"]} 个），{record["steps"]} 步，
{record["seconds"]:.0f} 秒，{record["tokens_per_second"]:.0f} token/s，内存峰值 {record["peak_memory_mb"]} MB
（{machine["cpu"]}，{machine["cores"]} 核，{machine["precision"]}）。

The embedded model on all {data["rows_read"]} distinct embedded conversations, {data["rows_held_out"]} of them held out:
{data["rows_trained"]} rows, {data["tokens"]} tokens ({data["trained_tokens"]} trained), {record["steps"]} steps in
{record["seconds"]:.0f} s, {record["tokens_per_second"]:.0f} tokens/s, peak memory {record["peak_memory_mb"]} MB
({machine["cpu"]}, {machine["cores"]} cores, {machine["precision"]}).

## 损失 / Loss

留出对话的损失：训练前 {held["before"]:.3f}，训练后 {held["after"]:.3f}（每个训练的 token，单位 nat）。
Held-out loss: {held["before"]:.3f} before, {held["after"]:.3f} after (nats per trained token).

{curve}

{table}

## 前后的回答 / Answers before and after

底座答得长、自说自话；微调后像数据里那样短短一句。135M 的模型只学了几分钟：学到的是说话的样子，不是知识。
每个回答最多 {SAMPLE_TOKENS} 个 token，长的在那里截断。
The base rambles; the adapter answers in one short line, as the data does. A 135M model that learnt for minutes has
learnt a manner of speaking, not knowledge. An answer has {SAMPLE_TOKENS} tokens at most: a longer one is cut there.

{answers}
"""


def _one_line(words: str) -> str:
    return " ".join(words.split())


@entry_point
def main() -> int:
    """Write the page for the run in the folder that is named."""
    record = read_record(Path(sys.argv[1])) if len(sys.argv) == 2 else None
    if not record or "held_out_loss" not in record or "samples" not in record:
        raise UserError("this needs the folder of a finished run with --eval_subset_size and --run_inference")
    PAGE.write_text(page(record), "utf-8")
    return 0


if __name__ == "__main__":
    main()
