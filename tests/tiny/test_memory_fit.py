"""The memory fallbacks, over a memory of a known size: the first that fits is taken, and nothing larger was tried."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import enter, refusal, snapshot
from bad_inputs.folders import make_base
from hypothesis import given
from hypothesis import strategies as st

from fine_tuning_practice import main as train
from lora_practice.training import memory_fit, recovery
from lora_practice.training.memory_fit import ComputeConfig, DoesNotFit, Fitted, MemoryDemand, fit
from lora_practice.training.messages import row_does_not_fit


class Memory:
    """Holds `room` bytes, 1000 a token, a tenth with checkpointing; answers as this process would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self.largest, self.most, self.before = room, 0, 0, 0
        monkeypatch.setattr(memory_fit, "PeakMemory", lambda: self)
        monkeypatch.setattr(memory_fit, "available_memory", lambda ulimit=True: room)
        monkeypatch.setattr(memory_fit, "held_memory", lambda: 0)
        monkeypatch.setenv("LORA_PRACTICE_LANG", "en")

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def try_out(self, config: ComputeConfig, lengths: Sequence[int]) -> bool:
        self.most = sum(lengths) * (100 if config.checkpointing else 1000)
        self.largest = max(self.largest, self.most)
        return self.most <= self.room


PLAIN, FAST = MemoryDemand(False, 512, 8 * 512), MemoryDemand(True, 512, 8 * 512)


@pytest.mark.parametrize(
    ("demand", "room", "expected"),
    [
        (PLAIN, 10_000_000, ComputeConfig("fp32", 8, 1024)),
        (PLAIN, 3_000_000, ComputeConfig("fp32", 4, 1024)),
        (PLAIN, 700_000, ComputeConfig("fp32", 1, 1024)),
        (PLAIN, 300_000, ComputeConfig("fp32", 1, 1024, True)),
        (FAST, 1_400_000, ComputeConfig("fp32", 8, 1024)),
        (FAST, 700_000, ComputeConfig("fp32", 8, 512)),
        (FAST, 100_000, ComputeConfig("fp32", 8, 512, True)),
    ],
)
@pytest.mark.parametrize("predict", [True, False])
def test_the_first_fallback_that_fits_is_taken(
    monkeypatch, demand: MemoryDemand, room: int, expected: ComputeConfig, predict: bool
) -> None:
    memory = Memory(monkeypatch, room)
    assert fit(ComputeConfig("fp32", 8, 1024), demand, memory.try_out, 1, predict).config == expected
    if predict:
        assert memory.largest <= room  # the kernel would have killed


def test_what_would_fit_is_named_when_nothing_does(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, 35_000)
    with pytest.raises(DoesNotFit) as caught:
        fit(ComputeConfig("fp32", 8, 1024), PLAIN, memory.try_out, 1, True)
    assert caught.value.max_length == 256 and "--max_length 256" in str(row_does_not_fit(caught.value))
    memory = Memory(monkeypatch, 10)
    with pytest.raises(DoesNotFit) as caught:
        fit(ComputeConfig("fp32", 8, 1024), PLAIN, memory.try_out, 1, True)
    assert caught.value.max_length == 0 and "choose a smaller model" in str(row_does_not_fit(caught.value))
    never = MemoryDemand(False, 512, 8 * 512, may_checkpoint=False)
    with pytest.raises(DoesNotFit) as caught:
        fit(ComputeConfig("fp32", 8, 1024), never, Memory(monkeypatch, 300_000).try_out, 1, True)
    assert "--gradient_checkpointing auto" in str(row_does_not_fit(caught.value))


@given(st.booleans(), st.integers(1, 600), st.integers(1, 64), st.integers(1, 64), st.booleans())
def test_each_fallback_takes_no_more_than_the_one_above_and_all_end(fast, longest, rows, batch, may) -> None:
    demand = MemoryDemand(fast, longest, longest * batch, may)
    fallbacks = demand.fallbacks(ComputeConfig("fp32", rows, 1024))
    sizes = [sum(demand.lengths_at_once(config)) for config in fallbacks]
    assert sizes == sorted(sizes, reverse=True) and min(sizes) >= longest
    assert fallbacks[-1].checkpointing == may and len(fallbacks) <= 14


@pytest.mark.parametrize("consent", [False, True])
def test_the_length_is_lowered_with_consent_only_and_the_run_says_so(
    consent: bool, no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A memory that no row of more than 32 tokens fits into; `fit` itself is tried above."""

    def fit_32(config: ComputeConfig, demand: MemoryDemand, *_: Any) -> Fitted:
        if demand.longest > 32:
            raise DoesNotFit(demand.longest, 32, True)
        return Fitted(config, 1)

    monkeypatch.setattr(recovery, "fit", fit_32)
    monkeypatch.setattr(recovery, "available_memory", lambda ulimit=True: 0 if ulimit else 1 << 40)
    make_base(tmp_path / "base")
    row = json.dumps({"prompt": "Why?", "completion": "because " * 20})
    (tmp_path / "rows.jsonl").write_text(f"{row}\n", "utf-8")
    flags = ("--model_name", "base", "--dataset_path", "rows.jsonl", "--output_dir", "out", "--max_steps", "1")
    before = snapshot(tmp_path)
    if not consent:
        told = refusal(enter(train, capsys, *flags))
        assert "not enough memory: not even one row of" in told and "--max_length 32" in told
        assert snapshot(tmp_path) == before
        return
    said = enter(train, capsys, *flags, "--allow_shorter")
    assert said.code == 0, said.err
    assert "no memory for the longest row: max_length 32" in said.err and "cut at max_length=32" in said.err
    record = json.loads((tmp_path / "out" / "run_record.json").read_text("utf-8"))
    assert record["settings"]["max_length"] == 32 and "--max_length 32 " in record["command"]
    assert record["events"][0]["said"] == "no memory for the longest row: max_length 32"
