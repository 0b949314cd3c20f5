"""The rungs down, over a memory of a known size: the first that fits is taken, and nothing larger was tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_practice import ladder
from lora_practice.ladder import Load, Regime, TooLong, fit


class Memory:
    """Holds `room` bytes, 1000 a token, a tenth with checkpointing; answers as this process would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self.largest, self.most, self.before = room, 0, 0, 0
        monkeypatch.setattr(ladder, "Watch", lambda: self)
        monkeypatch.setattr(ladder, "available_memory", lambda ulimit=True: room)
        monkeypatch.setattr(ladder, "held_memory", lambda: 0)
        monkeypatch.setenv("LORA_PRACTICE_LANG", "en")

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def try_out(self, regime: Regime, lengths: Sequence[int]) -> bool:
        self.most = sum(lengths) * (100 if regime.checkpointing else 1000)
        self.largest = max(self.largest, self.most)
        return self.most <= self.room


PLAIN, FAST = Load(False, 512, 8 * 512), Load(True, 512, 8 * 512)


@pytest.mark.parametrize(
    ("load", "room", "expected"),
    [
        (PLAIN, 10_000_000, Regime("fp32", 8, 1024)),
        (PLAIN, 3_000_000, Regime("fp32", 4, 1024)),
        (PLAIN, 700_000, Regime("fp32", 1, 1024)),
        (PLAIN, 300_000, Regime("fp32", 1, 1024, True)),
        (FAST, 1_400_000, Regime("fp32", 8, 1024)),
        (FAST, 700_000, Regime("fp32", 8, 512)),
        (FAST, 100_000, Regime("fp32", 8, 512, True)),
    ],
)
@pytest.mark.parametrize("predict", [True, False])
def test_the_first_rung_that_fits_is_taken(monkeypatch, load: Load, room: int, expected: Regime, predict: bool) -> None:
    memory = Memory(monkeypatch, room)
    assert fit(Regime("fp32", 8, 1024), load, memory.try_out, 1, predict).regime == expected
    if predict:
        assert memory.largest <= room  # the kernel would have killed


def test_what_would_fit_is_named_when_nothing_does(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch, 35_000)
    with pytest.raises(TooLong) as caught:
        fit(Regime("fp32", 8, 1024), PLAIN, memory.try_out, 1, True)
    assert caught.value.max_length == 256 and "--max_length 256" in str(caught.value)
    memory = Memory(monkeypatch, 10)
    with pytest.raises(TooLong, match="choose a smaller model") as caught:
        fit(Regime("fp32", 8, 1024), PLAIN, memory.try_out, 1, True)
    assert caught.value.max_length == 0
    never = Load(False, 512, 8 * 512, may_checkpoint=False)
    with pytest.raises(TooLong, match="--gradient_checkpointing auto"):
        fit(Regime("fp32", 8, 1024), never, Memory(monkeypatch, 300_000).try_out, 1, True)


@given(st.booleans(), st.integers(1, 600), st.integers(1, 64), st.integers(1, 64), st.booleans())
def test_each_rung_takes_no_more_than_the_one_above_and_all_end(fast, longest, rows, batch, may) -> None:
    load = Load(fast, longest, longest * batch, may)
    rungs = load.rungs(Regime("fp32", rows, 1024))
    sizes = [sum(load.at_once(rung)) for rung in rungs]
    assert sizes == sorted(sizes, reverse=True) and min(sizes) >= longest
    assert rungs[-1].checkpointing == may and len(rungs) <= 14
