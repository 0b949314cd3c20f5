"""A real training of the embedded model in a control group of the kernel, which kills what takes more."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from journey_harness import ROOT, refused, run, succeeded

sys.path.insert(0, str(ROOT / "tests"))
from limited_entry_point import can_limit

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not can_limit(), reason="needs root and a control group of memory"
)
ENTRY_POINT = str(ROOT / "tests" / "limited_entry_point.py")
# One step of two rows of 486 tokens. On the plain path half a row takes 800 MB, with checkpointing 500 MB; before the
# whole row is tried, 2.5 times as much must be free, beside the 920 MB that the process holds. Peaks vary by 60 MB.
STEPS = ("--embedded", "--max_steps", "1", "--gradient_accumulation_steps", "1", "--logging_steps", "1")
STEPS += ("--per_device_train_batch_size", "2", "--lora_dropout", "0", "--save_strategy", "no")
LIMITS = {"one row at once": 3600, "with checkpointing": 2550}  # MB
STORY = "the quick brown fox jumps over a lazy dog and runs into the old wood"


def limited(place: Path, megabytes: int, *flags: str):
    """Train with so much memory and no more; 0: no limit."""
    rows, words = [], STORY.split()
    for index in range(8):
        story = " ".join(words[(index * 3 + word) % len(words)] for word in range(450))
        turns = [("user", f"Tell story {index}"), ("assistant", story)]
        rows.append(json.dumps({"messages": [{"role": role, "content": words} for role, words in turns]}))
    (place / "rows.jsonl").write_text("\n".join(rows), "utf-8")
    data = ("--dataset_path", "rows.jsonl", "--output_dir", "out")
    return run(place, ENTRY_POINT, str(megabytes), *STEPS, *data, *flags, fresh=True)


def record(place: Path) -> dict:
    return json.loads((place / "out" / "run_record.json").read_text("utf-8"))


def losses(place: Path) -> list[float]:
    return [entry["loss"] for entry in record(place)["losses"]]


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path) -> list[float]:
    """The losses on the plain path with all the memory that there is."""
    place = tmp_path_factory.mktemp("unlimited")
    succeeded(limited(place, 0, "--fast", "off"))
    assert record(place)["events"] == []
    return losses(place)


@pytest.mark.parametrize("expected", LIMITS)
def test_a_batch_that_does_not_fit_is_computed_in_portions_with_the_losses_of_an_unlimited_run(
    tmp_path: Path, unlimited: list[float], expected: str
) -> None:
    done = succeeded(limited(tmp_path, LIMITS[expected], "--fast", "off"))
    event = record(tmp_path)["events"][0]
    assert event["step"] == 0 and event["kind"] == "memory" and event["said"] in done.stderr
    assert "now 1 row(s) at once" in event["said"]
    assert ("gradient_checkpointing on" in event["said"]) == (expected == "with checkpointing")
    assert losses(tmp_path) == pytest.approx(unlimited, rel=1e-4)


def test_where_nothing_fits_one_line_says_so_and_nothing_is_written_or_killed(
    tmp_path: Path, embedded_model: Path
) -> None:
    told = refused(limited(tmp_path, 1300, "--fast", "off"), "not enough memory: not even one row", "--max_length")
    assert "MB can be taken" in told
    assert not (tmp_path / "out").exists()
