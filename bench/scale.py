"""Start-up time, and time and memory of preparing large data sets. Run: python -m bench.scale [--rows N ...]

Seconds from the command to the first optimizer step with the embedded defaults; then, for each N, seconds and peak
resident memory of preparing N short rows from a JSONL file, in its own process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lora_practice.sources.environment import let_waiting_threads_sleep

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.scale", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[200_000, 1_000_000], metavar="N")
    parser.add_argument(
        "--prepare", metavar="FILE", help=argparse.SUPPRESS
    )  # what the processes below are started with
    options = parser.parse_args()
    let_waiting_threads_sleep()
    if options.prepare:
        print(json.dumps(prepared(Path(options.prepare))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        begun, done = first_step(Path(scratch) / "out")
        print(f"first step begun after {begun:.1f} s, its loss on the screen after {done:.1f} s", flush=True)
        for count in options.rows:
            path = Path(scratch) / f"{count}.jsonl"
            write_rows(path, count)
            command = [sys.executable, "-m", "bench.scale", "--prepare", str(path)]
            done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout)
            print(
                f"{found['rows']} rows, {found['tokens']} tokens: {found['seconds']:.0f} s, "
                f"{found['peak_mb']:.0f} MB at most, {found['base_mb']:.0f} MB of them before reading",
                flush=True,
            )
            path.unlink()


def first_step(output_dir: Path) -> tuple[float, float]:
    """Seconds until the last line of output before the first step, and until the first step's loss is shown."""
    flags = ["--embedded", "--max_steps", "2", "--logging_steps", "1", "--output_dir", str(output_dir)]
    started, begun, lines = time.perf_counter(), 0.0, []
    command = [sys.executable, "fine_tuning_practice.py", *flags]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
        assert run.stderr is not None
        for line in run.stderr:
            seconds = time.perf_counter() - started
            if " 1/2 " in line:
                run.communicate()
                return begun, seconds
            begun = seconds
            lines.append(line)
    raise SystemExit("the run ended before its first step:\n" + "".join(lines[-10:]))


def write_rows(path: Path, count: int) -> None:
    """Write a JSONL file of `count` different short conversations."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            question, answer = f"What is {i} plus {i % 7}?", f"It is {i + i % 7}, of course."
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def prepared(path: Path) -> dict[str, float]:
    """Seconds and peak memory of preparing the rows as a run does."""
    from fine_tuning_practice import TrainSettings
    from lora_practice.data.prepare import prepare
    from lora_practice.machine.device import peak_memory
    from lora_practice.model.load import load_tokenizer
    from lora_practice.sources import embedded
    from lora_practice.sources.find import Source

    folder = embedded.model_dir()
    tokenizer = load_tokenizer(Source("folder", str(folder), folder))
    base, started = peak_memory(), time.perf_counter()
    rows = prepare(Source("file", str(path), path), None, tokenizer, TrainSettings(train_subset_size=0))
    rows.train.dataset()
    seconds = time.perf_counter() - started
    found = {"rows": len(rows.train), "tokens": rows.train.tokens, "seconds": seconds}
    return {**found, "peak_mb": peak_memory() / 1e6, "base_mb": base / 1e6}


if __name__ == "__main__":
    main()
