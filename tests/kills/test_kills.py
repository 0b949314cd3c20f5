"""At least twenty kills of real trainings: `pytest tests/kills -s`. Minutes, so it is not part of `pytest`.

KILLS and KILL_SEED in the environment choose how many and which; the seed is printed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from journey_harness import SMALL, succeeded, train
from kill_harness import Kill, differences, random_kill, resume_flag, run_into, steps_safe

KILLS = int(os.environ.get("KILLS", "24"))
STEPS = 10
RUN = (*SMALL, "--max_steps", str(STEPS), "--num_train_epochs", "2", "--lr_scheduler_type", "cosine")
FLAGS = (*RUN, "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_run_killed_again_and_again_ends_bit_for_bit_as_if_nothing_had_happened(tmp_path: Path, embedded_rows: Path):
    seed = int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(10**6))
    print(f"\nKILL_SEED={seed} KILLS={KILLS}", flush=True)
    chance, started = random.Random(seed), time.perf_counter()
    succeeded(train(tmp_path, *FLAGS, "--output_dir", "whole", timeout=1800))
    seconds = time.perf_counter() - started
    survived: Counter[str] = Counter()
    ended, processes, order = 0, 0, list(range(8))
    while sum(survived.values()) < KILLS or ended == 0:
        out = tmp_path / f"run{ended}"
        finished = False
        while not finished:
            if processes % len(order) == 0:
                chance.shuffle(order)
            kill = random_kill(chance, order[processes % len(order)], seconds)
            if sum(survived.values()) >= KILLS:
                kill = Kill("never", "none")
            safe = steps_safe(out)
            killed, run = run_into(kill, tmp_path, out.name, *FLAGS, *resume_flag(out))
            processes += 1
            assert not safe or f"going on from {out.name}/checkpoint-{safe}\n" in run.words or killed, run.words
            assert steps_safe(out) >= safe, (str(kill), run.words)  # a kill never costs what was saved
            survived.update([kill.words] if killed else [])
            finished = not killed
            print(f"  {'killed' if killed else 'ended '} {kill}, checkpoint {safe} -> {steps_safe(out)}", flush=True)
        assert not differences(out, tmp_path / "whole")
        ended += 1
    print(f"{sum(survived.values())} kills, {ended} runs of {STEPS} steps ended bit for bit as the uninterrupted one;")
    print(f"{processes} processes, {time.perf_counter() - started:.0f} s: {dict(survived)}")
