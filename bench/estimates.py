"""Accuracy of a run's own estimate. Run: python -m bench.estimates [--only NAME ...] [--steps N]

One run for each of these settings; the estimate before its first step and the measured values come from its record.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUNS: dict[str, tuple[str, ...]] = {
    "defaults": (),
    "bf16": ("--bf16",),
    "rows of at most 128 tokens": ("--max_length", "128"),
    "packed rows": ("--packing", "--max_steps", "4"),
    "batches of 4": ("--per_device_train_batch_size", "4", "--max_steps", "8"),
    "rank 32": ("--lora_r", "32"),
    "labels on all tokens": ("--no_assistant_only_loss",),
    "40 chats measured twice": ("--eval_subset_size", "40", "--eval_steps", "12"),
    "plain path": ("--fast", "off", "--max_steps", "6"),
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.estimates", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*RUNS], choices=[*RUNS], metavar="NAME")
    parser.add_argument("--steps", type=int, default=24, help="steps of a run whose settings do not set them")
    options = parser.parse_args()
    print("| run | s expected | s taken | ratio | MB expected | MB taken | ratio |\n|---|---|---|---|---|---|---|")
    for name in options.only:
        record = recorded("--max_steps", str(options.steps), *RUNS[name])
        cells = [name]
        for what, unit in (("seconds", "{:.1f}"), ("peak_memory_mb", "{:.0f}")):
            expected, taken = record["estimate"][what], record[what]
            cells += [unit.format(expected), unit.format(taken), f"{expected / taken:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def recorded(*flags: str) -> dict[str, Any]:
    """run_record.json of a run with the embedded model and conversations."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "fine_tuning_practice.py", "--embedded", "--output_dir", f"{scratch}/out", *flags]
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads((Path(scratch) / "out" / "run_record.json").read_text("utf-8"))


if __name__ == "__main__":
    main()
