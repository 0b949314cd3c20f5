"""Training and generation on a busy machine. Run: python -m bench.busy [--rounds 3] [--waits NAME=VALUE ...]

OpenMP threads wait for each other after every operation. By default they spin, which is fast while each has a core of
its own. With another program running, the thread they wait for may have no core, and the spinning threads use up the
time that it needs. Every line of the table is a wait policy, given as an environment variable that libgomp reads when
torch loads it ("-": none). The runs alternate, each in its own process: on a quiet machine and beside an endless loop.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAITS = ("-", "GOMP_SPINCOUNT=20000", "OMP_WAIT_POLICY=PASSIVE")
STEPS, TOKENS = 5, 48


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.busy", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--waits", nargs="+", default=WAITS, metavar="NAME=VALUE")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("RESULT " + json.dumps(measure(options.dtype)))
        return
    results: dict[tuple[str, bool], list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for wait in options.waits:
            for busy in (False, True):
                results.setdefault((wait, busy), []).append(run(wait, busy, options.dtype))
    print("| wait policy | training, tok/s: quiet | busy | generation, tok/s: quiet | busy |\n|---|---|---|---|---|")
    for wait in options.waits:
        cells = [
            ", ".join(f"{speed:.0f}" for speed in sorted(result[name] for result in results[wait, busy]))
            for name in ("training", "generation")
            for busy in (False, True)
        ]
        print(f"| {wait} | {' | '.join(cells)} |")


def run(wait: str, busy: bool, dtype: str) -> dict[str, float]:
    """Result of one process with this wait policy, alone or beside an endless loop."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment.update([wait.split("=", 1)] if "=" in wait else [])
    command = [sys.executable, "-m", "bench.busy", "--one", "--dtype", dtype]
    with another_program() if busy else _nothing():
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=Path(__file__).resolve().parent.parent
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{wait} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1][len("RESULT ") :])


@contextmanager
def another_program() -> Iterator[None]:
    """An endless loop that keeps one core busy."""
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def measure(dtype: str) -> dict[str, float]:
    """Tokens per second of training on short chats and of generation, after a warm-up."""
    from bench.pieces import build
    from lora_practice.fast.decode.decoder import build_decoder

    engine, steps, model = build(dtype, "short", STEPS + 1)
    engine.step_loss_and_backward(steps[0])
    started = time.perf_counter()
    for step in steps[1:]:
        engine.step_loss_and_backward(step)
    training = sum(len(ids) for step in steps[1:] for ids, _ in step) / (time.perf_counter() - started)
    decoder = build_decoder(model.eval())
    prompt = steps[0][0][0][:24]
    decoder.generate(prompt, 8, ())
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        decoder.generate(prompt, TOKENS, ())
        seconds.append(time.perf_counter() - started)
    return {"training": training, "generation": TOKENS / statistics.median(seconds)}


if __name__ == "__main__":
    main()
