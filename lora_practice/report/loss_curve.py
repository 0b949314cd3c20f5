"""Judges the loss curve of a run in one plain sentence.

Pure functions over (step, loss) points; losses are in nats per token. Held-out losses decide where there are any: they
are measured on the same rows each time, whereas the training loss of a step depends on the few rows of that step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Optional

from lora_practice.console.text import counted, text
from lora_practice.report.points import Point

FEWEST = 8  # logged losses that a trend of the training loss needs
NEAR_ZERO = 0.2  # nats per token, a perplexity of 1.22: next to nothing is left to learn


@dataclass(frozen=True)
class CurveVerdict:
    """The judgement of one curve.

    kind: "too few", "broken", "diverges", "overfits", "worse", "unchanged", "better", "learnt", "falling", "flat", or
        "unread": level at the end, before the data was passed over once.
    step: the optimizer step where it happened ("broken", "diverges", "overfits" only).
    unseen: whether held-out losses decided; has_held_out: whether there were any.
    passes: over the data ("unread" only).
    all_steps: the number of steps, where each of them was logged ("too few" only).
    """

    kind: str
    step: Optional[int] = None
    unseen: bool = False
    has_held_out: bool = False
    passes: Optional[float] = None
    all_steps: Optional[int] = None

    @property
    def sentence(self) -> str:
        """The judgement and what to do about it, in the user's language."""
        n = self.step
        if self.kind == "learnt":
            return self._learnt()
        if self.kind in ("falling", "flat") and self.has_held_out and not self.unseen:
            return self._better_with_trend()
        if self.kind == "too few":
            return self._too_few()
        if self.kind == "unread":
            return self._unread()
        subject = text("没见过的数据上，", "On unseen data ") if self.unseen else ""
        the_loss = subject + text("loss ", "the loss " if self.unseen else "The loss ")
        return {
            "broken": text(
                f"第 {n} 步的 loss 不再是有效的数字，训练失败。把 learning_rate 调到三分之一，或者换一种精度再试。",
                f"At step {n} the loss stopped being a number: the run failed. Divide learning_rate by 3, or change "
                "the precision.",
            ),
            "diverges": text(
                f"从第 {n} 步起 loss 不降反升：学习率太大。把 learning_rate 调到三分之一再试。",
                f"From step {n} on the loss rises: the learning rate is too high. Divide learning_rate by 3.",
            ),
            "overfits": text(
                f"从第 {n} 步起过拟合：训练 loss 还在降，没见过的数据却越来越差。训练到第 {n} 步左右就停，"
                "或者增加数据。",
                f"It overfits from step {n}: the training loss goes on falling, but on unseen data it gets worse. Stop "
                f"near step {n}, or add data.",
            ),
            "worse": text(
                "没见过的数据上，训练后比训练前更差。把 learning_rate 调小、少训练几步，或者增加与实际用途相近的数据。",
                "On unseen data the result is worse than before training. Lower learning_rate, train fewer steps, or "
                "add data closer to what it is for.",
            ),
            "unchanged": text(
                "没见过的数据上几乎没有变化：训练得太少，或者学习率太小。多训练几轮（num_train_epochs），或调大 "
                "learning_rate。",
                "On unseen data hardly anything changed: too little training, or too low a rate. Raise "
                "num_train_epochs or learning_rate.",
            ),
            "better": text(
                "没见过的数据上变好了。想看清趋势，就在训练中多测几次（--eval_steps）。",
                "It got better on unseen data. To see the trend, measure more often during training (--eval_steps).",
            ),
            "falling": the_loss
            + text(
                "到最后还在下降：再多训练一些（num_train_epochs），多半还会更好。",
                "was still falling at the end: more training (num_train_epochs) would likely help.",
            ),
            "flat": the_loss
            + text(
                "到最后基本不再下降：照这样继续训练，收获不大。",
                "was level at the end: more of the same would bring little.",
            ),
        }[self.kind]

    def _better_with_trend(self) -> str:
        """Held-out loss was measured only before and after, and fell; the trend at the end is the training loss's."""
        if self.kind == "falling":
            return text(
                "没见过的数据上变好了，训练 loss 到最后还在下降：再多训练一些（num_train_epochs），多半还会更好。",
                "It got better on unseen data, and the training loss was still falling at the end: more training "
                "(num_train_epochs) would likely help.",
            )
        return text(
            "没见过的数据上变好了，训练 loss 到最后基本持平：照这样继续训练，收获不大。",
            "It got better on unseen data, and the training loss was level at the end: more of the same would bring "
            "little.",
        )

    def _too_few(self) -> str:
        if self.all_steps:
            few = counted(self.all_steps, "step")
            zh, en = (
                f"只有 {self.all_steps} 步，看不出趋势：训练久一些。",
                f"Only {few}: no trend to see. Train longer.",
            )
            return text(zh, en)
        return text(
            "记录的点太少，看不出趋势：加 --logging_steps 1 每一步都记录，或者训练久一些。",
            "Too few points to see a trend: log more often (--logging_steps 1), or train longer.",
        )

    def _unread(self) -> str:
        passes = f"{self.passes or 0.0:.2g}"
        so_far_zh, so_far_en = "loss 到最后基本持平", "The loss was level at the end"
        if self.has_held_out:
            so_far_zh, so_far_en = "没见过的数据上变好了", "It got better on unseen data"
        return text(
            f"{so_far_zh}；数据只过了 {passes} 遍，可以多训练一些。",
            f"{so_far_en} after only {passes} passes over the data: more training may well help.",
        )

    def _learnt(self) -> str:
        if self.unseen:
            return text(
                "没见过的数据也几乎都能预测对（loss 接近 0）：已经学会了，不需要再训练。",
                "Even unseen data is predicted almost perfectly (loss near 0): it is learnt, no more training needed.",
            )
        advice = text(
            "用 --eval_subset_size 划出一些作验证集，看看没见过的数据怎么样。",
            " Add a validation set (--eval_subset_size) to see how it does on unseen ones.",
        )
        return text(
            "训练 loss 已经接近 0：再训练只会把这些数据背下来。",
            "The training loss is near 0: more training would only learn these rows by heart.",
        ) + ("" if self.has_held_out else advice)


def judge_curve(
    losses: Sequence[Point], held_out: Sequence[Point] = (), passes: Optional[float] = None
) -> CurveVerdict:
    """Judge a curve.

    Args:
        losses: (step, training loss), each the mean over the steps since the point before.
        held_out: (step, loss on rows never trained on), measured on the same rows each time.
        passes: over the data in these steps; None where it is not known.
    """
    verdict = _judge(losses, held_out)
    if verdict.kind == "flat" and passes is not None and round(passes, 2) < 1:
        return replace(verdict, kind="unread", passes=passes)
    return verdict


def _judge(losses: Sequence[Point], held_out: Sequence[Point]) -> CurveVerdict:
    broken = [step for step, loss in [*losses, *held_out] if not math.isfinite(loss)]
    if broken:
        return CurveVerdict("broken", min(broken))
    if len(held_out) >= 2:
        verdict = _judge_held_out(held_out, losses)
        if verdict is not None:
            return verdict
    return _judge_training(losses, has_held_out=len(held_out) >= 2)


def smoothed(losses: Sequence[float], weights: Sequence[float] = ()) -> list[float]:
    """Centred moving mean over about an eighth of the curve; `weights` may be the steps that each loss stands for."""
    half = _window(len(losses)) // 2
    weights = weights or [1.0] * len(losses)
    means = []
    for i in range(len(losses)):
        near = slice(max(0, i - half), i + half + 1)
        means.append(sum(w * loss for w, loss in zip(weights[near], losses[near])) / sum(weights[near]))
    return means


def _judge_held_out(held_out: Sequence[Point], losses: Sequence[Point]) -> Optional[CurveVerdict]:
    """What held-out losses alone say; None where two of them got better: then nothing is known of the trend."""
    (_, before), (_, last) = held_out[0], held_out[-1]
    turn, lowest = min(held_out, key=lambda point: point[1])
    margin = max(0.01 * lowest, 0.01)  # a change smaller than one percent says nothing
    if last - lowest > margin:
        if turn == held_out[0][0]:
            rises_from = _blow_up(losses)
            return CurveVerdict("worse" if rises_from is None else "diverges", rises_from, True, True)
        training_before = [loss for step, loss in losses if step <= turn]
        training_after = [loss for step, loss in losses if step > turn]
        rises = training_before and training_after and _mean(training_after) > 1.05 * _mean(training_before)
        return CurveVerdict("diverges" if rises else "overfits", turn, True, True)
    if last < NEAR_ZERO:
        return CurveVerdict("learnt", None, True, True)
    if before - last <= margin:
        return CurveVerdict("unchanged", None, True, True)
    if len(held_out) == 2:
        return None
    middle = (held_out[0][0] + held_out[-1][0]) / 2
    halfway = next(loss for step, loss in reversed(held_out[:-1]) if step <= middle)
    return CurveVerdict("falling" if halfway - last > margin / 2 else "flat", None, True, True)


def _judge_training(losses: Sequence[Point], has_held_out: bool) -> CurveVerdict:
    """Judge by the training loss.

    What counts as a change must be larger than chance (several standard errors, estimated from what neighbours differ
    by) and than a few percent of the loss.
    """
    rises_from = _blow_up(losses)
    if rises_from is not None:
        return CurveVerdict("diverges", rises_from, has_held_out=has_held_out)
    if len(losses) < FEWEST:
        if has_held_out:
            return CurveVerdict("better", None, True, True)
        is_each_logged = bool(losses) and len(losses) == losses[-1][0]
        return CurveVerdict("too few", all_steps=len(losses) if is_each_logged else None)
    values = [loss for _, loss in losses]
    deviation, window = _deviation(values), _window(len(values))
    means = [_mean(values[i : i + window]) for i in range(len(values) - window + 1)]
    lowest = min(range(len(means)), key=lambda i: means[i])
    error = deviation * math.sqrt(2 / window)  # of a difference of two such means
    if means[-1] - means[lowest] > max(4 * error, 0.1 * means[lowest], 0.02):
        return CurveVerdict("diverges", losses[lowest + window // 2][0], has_held_out=has_held_out)
    if means[-1] < NEAR_ZERO:
        return CurveVerdict("learnt", has_held_out=has_held_out)
    return CurveVerdict("falling" if _falls(losses, deviation) else "flat", has_held_out=has_held_out)


def _blow_up(losses: Sequence[Point]) -> Optional[int]:
    """The step of the lowest loss before the last third, if all of that third is twice as high and above the first.

    A run that explodes is noisy, so that a test against its own noise never sees it: this one compares extremes.
    """
    count = max(2, len(losses) // 3)
    if len(losses) <= count:
        return None
    step, lowest = min(losses[:-count], key=lambda point: point[1])
    least = min(loss for _, loss in losses[-count:])
    return step if least > max(2 * lowest, 1.2 * losses[0][1], lowest + 0.5) else None


def _window(count: int) -> int:
    return max(3, count // 8 | 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _deviation(losses: Sequence[float]) -> float:
    """Standard deviation of the noise from differences of neighbours, which a slow trend hardly touches."""
    steps = [after - before for before, after in zip(losses[1:], losses[2:])]  # the first loss falls by far the most
    return math.sqrt(sum(step**2 for step in steps) / len(steps) / 2)


def _falls(losses: Sequence[Point], deviation: float) -> bool:
    """Whether the straight line through the last half falls by more than chance and by more than one percent."""
    half = losses[len(losses) // 2 :]
    steps, values = [float(step) for step, _ in half], [loss for _, loss in half]
    middle, mean = _mean(steps), _mean(values)
    spread = sum((step - middle) ** 2 for step in steps)
    slope = sum((step - middle) * (loss - mean) for step, loss in zip(steps, values)) / spread
    fall = -slope * (steps[-1] - steps[0])
    return fall > 0.01 * mean and -slope > 2 * deviation / math.sqrt(spread)
