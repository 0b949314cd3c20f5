"""The sentence about a curve: known curves, with noise, get the words that a person would give them."""

from __future__ import annotations

import math
import random

import pytest

from lora_practice.console.terminal import columns
from lora_practice.report.loss_curve import FEWEST, CurveVerdict, judge_curve, smoothed


def curve(shape, count=60, noise=0.15, seed=0, every=10):
    """(step, loss) points of a function of 0..1, with Gaussian noise."""
    random.seed(seed)
    return [(every * (i + 1), shape(i / (count - 1)) + random.gauss(0, noise)) for i in range(count)]


def falling(x):
    return 3.0 - 1.5 * x


def settled(x):
    return 1.8 + 1.2 * math.exp(-12 * x)


def rising(x):
    return 2.5 - 2 * x if x < 0.4 else 1.7 + 4 * (x - 0.4)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize(("count", "noise"), [(20, 0.01), (20, 0.1), (60, 0.2), (250, 0.2)])
def test_noise_does_not_change_the_judgement(count, noise, seed):
    assert judge_curve(curve(falling, count, noise, seed)).verdict == "falling"
    assert judge_curve(curve(rising, count, noise, seed)).verdict == "diverges"


def test_a_settled_curve_is_called_flat_nearly_always():
    """Chance alone looks like a fall in a few of a hundred noisy curves (two standard errors: 2.5 %)."""
    for count in (20, 60, 250):
        verdicts = [judge_curve(curve(settled, count, 0.15, seed)).verdict for seed in range(100)]
        assert verdicts.count("flat") >= 88, (count, {one: verdicts.count(one) for one in set(verdicts)})
        assert verdicts.count("diverges") <= 1


def test_a_rise_names_the_step_where_it_began():
    found = judge_curve(curve(rising, 100, 0.05))
    assert found.verdict == "diverges" and abs(found.step - 400) <= 60


def test_overfitting_is_seen_on_unseen_data_only_and_names_its_step():
    held_out = [(0, 3.0), (100, 2.2), (200, 2.0), (300, 2.1), (400, 2.3)]
    assert judge_curve(curve(falling), held_out) == CurveVerdict("overfits", 200)
    assert judge_curve(curve(falling), held_out[:3]).verdict == "falling"
    assert judge_curve(curve(falling), [(0, 3.0), (300, 2.0), (600, 2.01)]).verdict == "falling"  # within one percent
    assert judge_curve(curve(rising, every=10), [(0, 3.0), (240, 1.9), (600, 4.0)]).verdict == "diverges"


def test_two_held_out_losses_cannot_show_a_turn():
    assert judge_curve(curve(settled, noise=0.01), [(0, 2.0), (600, 2.4)]).verdict == "flat"


def test_a_loss_that_is_no_number_is_named_first():
    points = curve(falling)
    points[30] = (310, float("nan"))
    assert judge_curve(points) == CurveVerdict("broken", 310)


def test_few_points_are_not_judged():
    assert judge_curve([]).verdict == judge_curve(curve(falling, FEWEST - 1)).verdict == "too few"


def test_smoothing_keeps_a_straight_line_and_its_length():
    line = [float(i) for i in range(50)]
    assert smoothed(line)[10:40] == pytest.approx(line[10:40])
    assert len(smoothed(line)) == 50


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("verdict", ["too few", "broken", "diverges", "overfits", "falling", "flat"])
def test_each_judgement_has_a_sentence(verdict, language, monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", language)
    sentence = CurveVerdict(verdict, 7).sentence
    assert sentence.endswith("。" if language == "zh" else ".")
    assert ("7" in sentence) == (verdict in ("broken", "diverges", "overfits"))
    assert columns(sentence) < 200
