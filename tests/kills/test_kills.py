"""At least twenty kills of real trainings: `pytest tests/kills -s`. Minutes, so it is not part of `pytest`.

KILLS and KILL_SEED in the environment choose how many and which; the seed is printed.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest
from journey_harness import SMALL
from kill_harness import KINDS, NEVER, Server, differences, random_kill, resume_flag, steps_safe

from lora_practice.run.folder import checkpoints

KILLS = int(os.environ.get("KILLS", "24"))
STEPS = 8
RUN = (*SMALL, "--max_steps", str(STEPS), "--num_train_epochs", "2", "--lr_scheduler_type", "cosine")
FLAGS = (*RUN, "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX")
def test_a_run_killed_again_and_again_ends_bit_for_bit_as_if_nothing_had_happened(tmp_path: Path, embedded_rows: Path):
    seed = int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(10**6))
    print(f"\nKILL_SEED={seed} KILLS={KILLS}", flush=True)
    chance, server = random.Random(seed), Server(tmp_path)
    started = time.perf_counter()
    killed, _ = server.run_into(NEVER, "whole", *FLAGS)
    assert not killed
    seconds = time.perf_counter() - started
    survived: Counter[str] = Counter()
    ended, processes, order = 0, 0, list(range(KINDS))
    while sum(survived.values()) < KILLS:
        out, killed = tmp_path / f"run{ended}", True
        while killed:
            if processes % KINDS == 0:
                chance.shuffle(order)
            kill = random_kill(chance, order[processes % KINDS], seconds)
            kill = NEVER if sum(survived.values()) >= KILLS else kill
            safe = steps_safe(out)
            killed, words = server.run_into(kill, out.name, *FLAGS, *resume_flag(out))
            processes += 1
            assert not safe or f"going on from {out.name}/checkpoint-{safe}\n" in words or killed, words
            assert steps_safe(out) >= safe, (str(kill), words)  # a kill never costs what was saved
            survived.update([kill.words] if killed else [])
            print(f"  {'killed' if killed else 'ended: not'} {kill}: {safe} -> {steps_safe(out)} steps", flush=True)
        assert not differences(out, tmp_path / "whole")
        kept = [one.name for one in checkpoints(out)]
        assert kept[-2:] == [f"checkpoint-{n}" for n in (STEPS - 1, STEPS)]
        assert len(kept) <= 3  # one more, if the last kill came before the oldest was removed
        ended += 1
    server.close()
    print(f"{sum(survived.values())} kills; {ended} runs of {STEPS} steps ended bit for bit as the uninterrupted one")
    print(f"{processes} processes, {time.perf_counter() - started:.0f} s: {dict(survived)}")
