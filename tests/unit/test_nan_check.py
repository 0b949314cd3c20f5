"""Which numbers are trusted, on sequences as old cards give them: a V100, a GTX 1660, and sound ones."""

from __future__ import annotations

import math

import pytest

from lora_practice.training.messages import bad_numbers
from lora_practice.training.nan_check import Decision, StepNumbers, decide_step

NAN, INF = math.nan, math.inf
ACCEPT, RETRY, UPCAST, STOP = Decision


def replay(sequence: list[tuple[float, float, float]]) -> list[Decision]:
    """The decisions over (loss, grad_norm, scale) as they came, up to the first upcast."""
    decisions: list[Decision] = []
    bad: list[StepNumbers] = []
    for loss, norm, scale in sequence:
        now = StepNumbers(loss, norm, True, scale)
        decisions.append(decide_step(now, bad, "fp16"))
        if decisions[-1] not in (ACCEPT, RETRY):
            break
        bad = [] if decisions[-1] == ACCEPT else [*bad, now]
    return decisions


@pytest.mark.parametrize(
    ("sequence", "decisions"),
    [
        # a sound run: the first scale is too large, then hundreds of steps are fine, then one overflow
        ([(2.9, INF, 65536), (2.9, 900, 32768), (2.8, 800, 32768)], [RETRY, ACCEPT, ACCEPT]),
        ([(2.1, 5e3, 65536), (2.0, INF, 131072), (2.0, 4e3, 65536)], [ACCEPT, RETRY, ACCEPT]),
        # V100: gradients NaN from the first step, the loss stays finite, the scale halves (unsloth#2040, zoo#866)
        ([(2.9, NAN, 65536), (2.9, NAN, 32768), (2.9, NAN, 512), (2.9, NAN, 256)], [RETRY, RETRY, UPCAST]),
        # GTX 16xx: the loss itself turns NaN in the midst of a run (kohya-ss#293); or exactly 0 (LlamaFactory#5660)
        ([(2.9, 700, 65536), (NAN, NAN, 65536)], [ACCEPT, UPCAST]),
        ([(2.9, 700, 65536), (0.0, NAN, 65536)], [ACCEPT, UPCAST]),
        ([(2.9, 700, 65536), (0.0, 0.0, 65536)], [ACCEPT, UPCAST]),
        # the scale collapses while each step by itself gets through; or everything underflows
        ([(2.9, 3.0, 2.0), (2.9, INF, 1.0), (2.9, 1.0, 0.5)], [ACCEPT, RETRY, UPCAST]),
        ([(2.9, INF, 0.5)], [UPCAST]),
        ([(2.9, 0.0, 32768)], [UPCAST]),
    ],
)
def test_recorded_fp16_runs(sequence, decisions) -> None:
    assert replay(sequence) == decisions


@pytest.mark.parametrize(
    "bad", [StepNumbers(NAN, 1.0), StepNumbers(INF, 1.0), StepNumbers(2.9, NAN), StepNumbers(2.9, INF)]
)
def test_what_is_not_finite_is_never_normal_without_a_scale(bad: StepNumbers) -> None:
    assert decide_step(bad, [], "bf16") == UPCAST
    assert decide_step(bad, [], "fp32") == STOP


def test_a_loss_of_zero_in_fp32_may_be_a_fluke_twice() -> None:
    zero = StepNumbers(0.0, 0.0)
    assert [decide_step(zero, [zero] * before, "fp32") for before in range(3)] == [ACCEPT, ACCEPT, STOP]
    assert decide_step(StepNumbers(0.0, 0.0, labels=False), [zero] * 9, "fp32") == ACCEPT
    assert decide_step(zero, [], "bf16") == UPCAST


@pytest.mark.parametrize("language", ["zh", "en"])
def test_all_bad_numbers_can_be_phrased(monkeypatch: pytest.MonkeyPatch, language: str) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", language)
    bad = [
        StepNumbers(NAN, 1.0),
        StepNumbers(0.0, 1.0),
        StepNumbers(2.9, NAN),
        StepNumbers(2.9, 0.0),
        StepNumbers(2.9, 1.0, True, 0.5),
    ]
    said = [bad_numbers(one, 3, "fp16") for one in bad]
    assert len(set(said)) == len(bad) and all(said)
    assert "3" in said[2]
