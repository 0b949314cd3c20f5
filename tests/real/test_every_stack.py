"""What must work with any allowed versions: every module imports; a run is killed, resumed, merged, and answers."""

from __future__ import annotations

import importlib
import json
import pkgutil
import signal
from pathlib import Path

import pytest
from journey_harness import SMALL, TRAIN, Running, infer, run, succeeded, train
from safetensors.torch import load_file

import lora_practice

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
MODULES = [one.name for one in pkgutil.walk_packages(lora_practice.__path__, "lora_practice.")]
SAVING = (*SMALL, "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4", "--output_dir", "out")
ASKED = ("--prompt", "My printer is not printing.", "--max-new-tokens", "8")


def losses(folder: Path) -> list[float]:
    """Nats per trained token, one a step, of a run that ended well."""
    record = json.loads((folder / "run_record.json").read_text("utf-8"))
    assert record["status"] == "finished"
    return [one["loss"] for one in record["losses"]]


def test_every_module_imports():
    assert len(MODULES) > 40
    for name in (*MODULES, "fine_tuning_practice", "inference"):
        importlib.import_module(name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, embedded_model, embedded_rows) -> Path:
    """A run that kill -9 ended after its first checkpoint and that was resumed and merged."""
    place = tmp_path_factory.mktemp("finished")
    begun = Running(place, TRAIN, *SAVING)
    begun.wait_until((place / "out" / "checkpoint-2").is_dir, 300)
    begun.process.kill()
    assert begun.end() == -signal.SIGKILL
    done = succeeded(train(place, *SAVING, "--resume", "--merge_adapter"))
    assert "going on from out/checkpoint-" in done.stderr
    return place / "out"


def test_a_killed_run_is_resumed_and_ends_whole(finished):
    assert len(losses(finished)) == 4
    adapter = load_file(finished / "adapter_model.safetensors")
    assert all(bool(one.isfinite().all() and one.any()) for one in adapter.values())


def test_adapter_and_merged_model_answer_alike(finished, tmp_path):
    folders = (str(finished), str(finished / "merged"))
    answers = [succeeded(infer(tmp_path, "--model-dir", folder, *ASKED)).stdout for folder in folders]
    assert len(answers[0].split()) > 2
    assert answers[0][:10] == answers[1][:10]  # merging rounds to fp16 once: a late word may differ


def test_the_plain_path_trains_and_agrees_with_the_fast_one(finished, tmp_path):
    flags = ("--max_steps", "2", "--save_strategy", "no", "--output_dir", "plain", "--fast", "off")
    succeeded(train(tmp_path, *SMALL, *flags))
    plain = losses(tmp_path / "plain")
    assert len(plain) == 2
    assert plain[0] == pytest.approx(losses(finished)[0], rel=1e-3)  # before the first update LoRA adds nothing


@pytest.mark.parametrize(
    "launcher",
    [
        ("accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--cpu"),
        ("torch.distributed.run", "--standalone", "--nproc_per_node", "1"),
    ],
)
def test_a_launcher_of_one_process_starts_the_same_run(finished, tmp_path, launcher):
    flags = ("--max_steps", "2", "--save_strategy", "no", "--output_dir", "launched")
    done = succeeded(run(tmp_path, "-m", *launcher, TRAIN, *SMALL, *flags, fresh=True))
    assert "fast path:" in done.stderr
    assert losses(tmp_path / "launched") == losses(finished)[:2]
