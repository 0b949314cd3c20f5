"""A real training of the embedded model under the kernel's own limit, set once the model is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from journey_harness import ROOT, refused, run, succeeded

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits are set with Linux's means")
DOOR = str(ROOT / "tests" / "limited_door.py")
GROUPS = Path("/sys/fs/cgroup/memory")
# two steps of four rows of about 126 tokens, which on the plain path take about 300 MB each
STEPS = ("--embedded", "--max_steps", "2", "--gradient_accumulation_steps", "1", "--logging_steps", "1")
STEPS += ("--per_device_train_batch_size", "4", "--lora_dropout", "0", "--save_strategy", "no")
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "runs",
    "into",
    "the",
    "old",
    "wood",
)


def limited(place: Path, kind: str, megabytes: int, *flags: str):
    rows = []
    for index in range(8):
        story = " ".join(WORDS[(index * 3 + word) % len(WORDS)] for word in range(90))
        turns = [("user", f"Tell story {index}"), ("assistant", story)]
        rows.append(json.dumps({"messages": [{"role": role, "content": words} for role, words in turns]}))
    (place / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    data = ("--dataset_path", "rows.jsonl", "--output_dir", "out")
    return run(place, DOOR, kind, str(megabytes), *STEPS, *data, *flags, timeout=900)


def record(place: Path) -> dict:
    return json.loads((place / "out" / "run_record.json").read_text("utf-8"))


def losses(place: Path) -> list[float]:
    return [entry["loss"] for entry in record(place)["losses"]]


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory, embedded_model) -> list[float]:
    """The losses on the plain path with all the memory that there is."""
    place = tmp_path_factory.mktemp("unlimited")
    succeeded(limited(place, "ulimit", 0, "--fast", "off"))
    assert record(place)["events"] == []
    return losses(place)


@pytest.mark.parametrize(
    ("megabytes", "flags", "now"),
    [
        (500, ("--fast", "off"), "now 1 row(s) at once (the same rows and steps)"),
        (200, ("--fast", "off"), "now 1 row(s) at once, gradient_checkpointing on (the same rows and steps)"),
        (170, ("--fast", "on"), "tokens at once (the same rows and steps)"),
    ],
    ids=["fewer rows", "only checkpointing survives", "fast path"],
)
def test_what_does_not_fit_is_computed_in_portions_with_the_losses_of_an_unlimited_run(
    tmp_path: Path, unlimited: list[float], megabytes: int, flags: tuple[str, ...], now: str
) -> None:
    done = succeeded(limited(tmp_path, "ulimit", megabytes, *flags))
    assert now in done.stderr
    event = record(tmp_path)["events"][0]
    assert event["step"] == 0 and event["kind"] == "memory" and event["said"] in done.stderr
    assert losses(tmp_path) == pytest.approx(unlimited, rel=1e-4)


@pytest.mark.parametrize("kind", ["ulimit", "group"])
def test_where_nothing_fits_one_line_says_so_and_nothing_is_written_or_killed(
    tmp_path: Path, embedded_model: Path, kind: str
) -> None:
    if kind == "group" and not os.access(GROUPS / "memory.limit_in_bytes", os.W_OK):
        pytest.skip("needs root and a cgroup v1 of memory")
    told = refused(limited(tmp_path, kind, 60), "not enough memory: not even one row", "close other programs")
    assert "MB can be taken" in told
    assert not (tmp_path / "out").exists()
