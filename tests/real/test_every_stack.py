"""What must work with any allowed versions: every room opens; a run is killed, resumed, merged, and answers."""

from __future__ import annotations

import importlib
import json
import pkgutil
import signal
from pathlib import Path

import pytest
from journey_harness import SMALL, TRAIN, Running, infer, succeeded, train
from safetensors.torch import load_file

import lora_practice

ROOMS = [one.name for one in pkgutil.walk_packages(lora_practice.__path__, "lora_practice.")]
SAVING = (*SMALL, "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4", "--output_dir", "out")
ASKED = ("--prompt", "My printer is not printing.", "--max-new-tokens", "8")


def losses(folder: Path) -> list[float]:
    """Nats per trained token, one a step, of a run that ended well."""
    record = json.loads((folder / "run_record.json").read_text("utf-8"))
    assert record["status"] == "finished"
    return [one["loss"] for one in record["losses"]]


def test_every_room_opens():
    assert len(ROOMS) > 40
    for name in (*ROOMS, "fine_tuning_practice", "inference"):
        importlib.import_module(name)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_run_is_killed_resumed_merged_and_answers(tmp_path, embedded_model, embedded_rows):
    run = Running(tmp_path, TRAIN, *SAVING)
    run.wait_until((tmp_path / "out" / "checkpoint-2").is_dir, 300)
    run.process.kill()
    assert run.end() == -signal.SIGKILL
    done = succeeded(train(tmp_path, *SAVING, "--resume", "--merge_adapter"))
    assert "going on from out/checkpoint-" in done.stderr
    assert len(losses(tmp_path / "out")) == 4
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(bool(one.isfinite().all() and one.any()) for one in adapter.values())

    answers = [succeeded(infer(tmp_path, "--model-dir", place, *ASKED)).stdout for place in ("out", "out/merged")]
    assert len(answers[0].split()) > 2
    assert answers[0][:10] == answers[1][:10]  # merging rounds to fp16 once: a late word may differ


def test_the_plain_path_trains_and_agrees_with_the_fast_one(trained, tmp_path):
    flags = ("--max_steps", "2", "--save_strategy", "no", "--eval_subset_size", "4", "--output_dir", "plain")
    succeeded(train(tmp_path, *SMALL, *flags, "--fast", "off"))
    plain, fast = losses(tmp_path / "plain"), losses(trained.folder)
    assert len(plain) == 2
    assert plain[0] == pytest.approx(fast[0], rel=1e-3)  # before the first update dropout has nothing to drop
