"""The sentence about a curve: known curves, with noise, get the words that a person would give them."""

from __future__ import annotations

import math
import random

import pytest

from lora_practice.console.terminal import columns
from lora_practice.report.loss_curve import FEWEST, CurveVerdict, judge_curve, smoothed
from lora_practice.report.points import intervals, passes_over_data


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
    assert judge_curve(curve(falling, count, noise, seed)).kind == "falling"
    assert judge_curve(curve(rising, count, noise, seed)).kind == "diverges"


def test_a_settled_curve_is_called_flat_nearly_always():
    """Chance alone looks like a fall in a few of a hundred noisy curves (two standard errors: 2.5 %)."""
    for count in (20, 60, 250):
        kinds = [judge_curve(curve(settled, count, 0.15, seed)).kind for seed in range(100)]
        assert kinds.count("flat") >= 88, (count, {one: kinds.count(one) for one in set(kinds)})
        assert kinds.count("diverges") <= 1


def test_a_rise_names_the_step_where_it_began():
    found = judge_curve(curve(rising, 100, 0.05))
    assert found.kind == "diverges" and abs(found.step - 400) <= 60


def test_overfitting_is_seen_on_unseen_data_only_and_names_its_step():
    held_out = [(0, 3.0), (100, 2.2), (200, 2.0), (300, 2.1), (400, 2.3)]
    found = judge_curve(curve(falling), held_out)
    assert (found.kind, found.step) == ("overfits", 200)
    assert judge_curve(curve(falling), held_out[:3]).kind == "falling"
    assert judge_curve(curve(falling), [(0, 3.0), (300, 2.0), (600, 2.01)]).kind == "flat"  # within one percent
    assert judge_curve(curve(rising, every=10), [(0, 3.0), (240, 1.9), (600, 4.0)]).kind == "diverges"


@pytest.mark.parametrize("shape", [settled, rising], ids=["flat", "rising"])
def test_where_held_out_losses_were_measured_they_decide(shape):
    measured = [2.383, 2.301, 2.242, 2.195, 2.158, 2.121, 2.090, 2.061, 2.035, 2.012, 1.991]
    found = judge_curve(curve(shape), [(60 * i, loss) for i, loss in enumerate(measured)])
    assert found.kind == "falling" and "unseen" in found.sentence


@pytest.mark.parametrize(
    ("after", "kind"),
    [(2.4, "worse"), (2.005, "unchanged"), (0.12, "learnt"), (1.6, "falling"), (float("inf"), "broken")],
)
def test_two_held_out_losses_show_whether_it_got_better_and_no_turn(after, kind):
    found = judge_curve(curve(falling), [(0, 2.0), (600, after)])
    assert found.kind == kind and (found.step is None or kind == "broken")
    few = judge_curve(curve(falling, 4), [(0, 2.0), (40, after)])
    assert few.kind == ("better" if kind == "falling" else kind)


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize(("shape", "kind"), [(settled, "flat"), (falling, "falling")])
def test_two_held_out_losses_that_fell_are_not_said_to_have_hardly_fallen(shape, kind, language, monkeypatch):
    """Only the trend at the end is the training loss's: what is said first is that unseen data got better."""
    monkeypatch.setenv("LORA_PRACTICE_LANG", language)
    found = judge_curve(curve(shape), [(0, 2.0), (600, 1.6)])
    better, training = {
        "zh": ("没见过的数据上变好了", "训练 loss"),
        "en": ("It got better on unseen", "training loss"),
    }[language]
    assert found.kind == kind and found.sentence.startswith(better) and training in found.sentence
    assert "hardly" not in found.sentence + judge_curve(curve(shape)).sentence


def test_a_loss_near_zero_is_not_told_to_train_more():
    def nearly_done(x):
        return 0.07 + 2.3 * math.exp(-9 * x)

    seen = judge_curve(curve(nearly_done, noise=0.005))
    assert seen.kind == "learnt" and "by heart" in seen.sentence and "--eval_subset_size" in seen.sentence
    held_out = [(0, 2.38), (300, 0.19), (500, 0.13), (600, 0.12)]
    found = judge_curve(curve(nearly_done, noise=0.005), held_out)
    assert found.kind == "learnt" and "no more training needed" in found.sentence
    assert judge_curve(curve(nearly_done, noise=0.005), [*held_out, (700, 0.125)]).kind == "learnt"  # 4 %, of nothing


@pytest.mark.parametrize(
    "losses",
    [
        [3.428, 4.954, 15.092, 130.913, 28.120, 35.726, 19.014, 19.871],
        [3.4, 131.0, 19.9],
        [2.9, 2.4, 2.1, 6.0, 7.5],
        [2.9, 2.4, 2.2, 2.1, 2.0, 2.0, 4.6, 5.1, 4.8],
    ],
    ids=["a rate of 0.1", "three points", "five points", "nine points"],
)
@pytest.mark.parametrize("held_out", [False, True], ids=["", "held out"])
def test_a_run_that_explodes_diverges_however_short_and_noisy_it_is(losses, held_out):
    points = [(i + 1, loss) for i, loss in enumerate(losses)]
    measured = [(0, losses[0]), (len(losses), losses[-1])] if held_out else []
    found = judge_curve(points, measured)
    assert found.kind == "diverges" and found.step == losses.index(min(losses)) + 1


def test_short_noisy_curves_do_not_look_like_explosions():
    for seed in range(200):
        assert judge_curve(curve(settled, 6, 0.3, seed)).kind == "too few"


def test_intervals_are_the_steps_since_the_loss_before():
    assert intervals([(1, 4.3), (10, 2.5), (12, 3.7)]) == [(0, 1), (1, 10), (10, 12)]


def test_smoothing_weighs_a_mean_by_its_steps():
    assert smoothed([4.0, 2.0, 3.0], [1, 9, 2])[1] == pytest.approx((4 + 18 + 6) / 12)


def test_a_loss_that_is_no_number_is_named_first():
    points = curve(falling)
    points[30] = (310, float("nan"))
    assert judge_curve(points) == CurveVerdict("broken", 310)


def test_few_points_are_not_judged():
    assert judge_curve([]).kind == judge_curve(curve(falling, FEWEST - 1)).kind == "too few"


def test_where_each_step_was_logged_nobody_is_told_to_log_more_often():
    each = judge_curve([(step, 3.0 - step / 10) for step in range(1, 5)])
    assert each.kind == "too few" and each.sentence == "Only 4 steps: no trend to see. Train longer."
    assert "--logging_steps 1" in judge_curve([(1, 3.0), (10, 2.0), (20, 1.9)]).sentence


@pytest.mark.parametrize("held_out", [(), [(0, 2.0), (600, 1.6)], [(0, 2.0), (300, 1.6), (600, 1.6)]])
def test_before_the_data_was_passed_over_once_more_training_is_not_said_to_bring_little(held_out):
    assert judge_curve(curve(settled), held_out, passes=1.0).kind == "flat"
    found = judge_curve(curve(settled), held_out, passes=0.21)
    assert found.kind == "unread" and "0.21 passes over the data" in found.sentence and "little" not in found.sentence
    assert found.sentence.startswith("It got better on unseen data" if held_out else "The loss was level")


def test_passes_over_the_data_are_counted_in_whole_steps():
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "packing": False}
    record = {"steps": 24, "settings": settings, "data": {"rows_trained": 900}}
    assert passes_over_data(record) == pytest.approx(24 / 113)
    assert passes_over_data({**record, "steps": 113}) == 1
    for unknown in ({"settings": {**settings, "packing": True}}, {"data": {}}, {"steps": None}, {"settings": {}}):
        assert passes_over_data({**record, **unknown}) is None


def test_smoothing_keeps_a_straight_line_and_its_length():
    line = [float(i) for i in range(50)]
    assert smoothed(line)[10:40] == pytest.approx(line[10:40])
    assert len(smoothed(line)) == 50


ALL = (
    "too few",
    "broken",
    "diverges",
    "overfits",
    "worse",
    "unchanged",
    "better",
    "learnt",
    "falling",
    "flat",
    "unread",
)


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("kind", ALL)
def test_each_judgement_has_a_sentence(kind, language, monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", language)
    for unseen, has_held_out in ((False, False), (False, True), (True, True)):
        sentence = CurveVerdict(kind, 7, unseen, has_held_out).sentence
        assert sentence.endswith("。" if language == "zh" else ".")
        assert ("7" in sentence) == (kind in ("broken", "diverges", "overfits"))
        assert columns(sentence) < 200
