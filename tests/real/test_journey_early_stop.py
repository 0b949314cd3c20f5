"""kill -9 around an early stop: `--resume` ends with the same stop, the same best adapter, and trains no further."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from journey_harness import SMALL
from kill_harness import NEVER, Kill, differences, run_into, steps_safe

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
STOP, BEST = 3, 1  # at this rate the held-out loss falls once and then climbs
WILD = (*SMALL, "--learning_rate", "0.02", "--eval_subset_size", "4", "--eval_steps", "1")
FLAGS = (*WILD, "--early_stopping_patience", "2", "--save_strategy", "steps", "--save_steps")
DECIDED = Kill("right after the evaluation that ends it", "os.mkdir", f"checkpoint-{STOP}")
UNMOVED = Kill("after the last checkpoint, before any result is moved", "os.rename", "README.md")
MOVING = Kill("while the results are moved", "os.rename", "tokenizer.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path, embedded_rows: Path) -> Path:
    """The run that nothing disturbed."""
    place = tmp_path_factory.mktemp("early")
    killed, words = run_into(NEVER, place, "whole", *FLAGS, "1")
    assert not killed and "stopping early" in words
    return place / "whole"


def record(folder: Path) -> dict:
    return json.loads((folder / "run_record.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("name", "kill", "save_steps", "safe"),
    [
        ("decided", DECIDED, "1", STOP - 1),
        ("unmoved", UNMOVED, "1", STOP),
        ("moving", MOVING, "1", STOP),
        ("unsaved", UNMOVED, "2", STOP - 1),
    ],
)
def test_a_run_killed_at_its_early_stop_ends_bit_for_bit_as_the_undisturbed_one(
    whole: Path, name: str, kill: Kill, save_steps: str, safe: int
) -> None:
    out = whole.parent / name
    killed, words = run_into(kill, out.parent, out.name, *FLAGS, save_steps)
    assert killed and "stopping early" in words and record(out)["status"] == "running"
    assert steps_safe(out) == safe
    killed, words = run_into(NEVER, out.parent, out.name, *FLAGS, save_steps, "--resume")
    assert not killed and f"going on from {out.name}/checkpoint-{safe}\n" in words
    trained = [line for line in words.splitlines() if line.startswith("step ")]
    assert {line.split("/")[0] for line in trained} == ({f"step {STOP}"} if safe < STOP else set()), words
    assert ("stopping early" in words) == (safe < STOP)
    assert f"the adapter of step {BEST}, the lowest" in words
    assert not differences(out, whole)
    for key in ("evaluations", "best_step", "held_out_loss", "stopped_early"):
        assert record(out)[key] == record(whole)[key]
    assert record(out)["steps"] == STOP and record(out)["best_step"] == BEST
    assert not (out / "best.safetensors").exists()
