"""What a loss curve says, in one plain sentence. Pure functions over (step, loss) pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from lora_practice.console.text import text

FEWEST = 8  # logged losses that a judgement needs
POINT = tuple[int, float]


@dataclass(frozen=True)
class CurveVerdict:
    """`verdict` is "too few", "broken", "diverges", "overfits", "falling" or "flat"; `step` is where it happened."""

    verdict: str
    step: Optional[int] = None

    @property
    def sentence(self) -> str:
        """What it is and what to do about it, for the reader."""
        n = self.step
        return {
            "too few": text(
                "记录的点太少，还看不出趋势：用 --logging_steps 1 多记几个，或者多训练一会儿。",
                "Too few points to see a trend: log more often (--logging_steps 1), or train longer.",
            ),
            "broken": text(
                f"第 {n} 步 loss 不再是数字：训练坏了。把 learning_rate 调小（除以 3），或换一种精度。",
                f"At step {n} the loss is no number any more: the run broke. Divide learning_rate by 3, or change "
                "the precision.",
            ),
            "diverges": text(
                f"从第 {n} 步起 loss 往上走：学习率太大。把 learning_rate 除以 3 再试。",
                f"From step {n} on the loss rises: the learning rate is too high. Divide learning_rate by 3.",
            ),
            "overfits": text(
                f"从第 {n} 步起过拟合：训练的 loss 还在降，没见过的数据却变差了。训练到第 {n} 步左右就停，或者加数据。",
                f"It overfits from step {n}: the training loss goes on falling, but on unseen data it gets worse. Stop "
                f"near step {n}, or add data.",
            ),
            "falling": text(
                "到最后 loss 还在下降：再多训练一些（num_train_epochs）多半还会变好。",
                "The loss was still falling at the end: more training (num_train_epochs) would likely help.",
            ),
            "flat": text(
                "最后一段 loss 基本不再下降：照这样继续训练，收获不大。",
                "At the end the loss hardly fell any more: more of the same would bring little.",
            ),
        }[self.verdict]


def judge_curve(losses: Sequence[POINT], held_out: Sequence[POINT] = ()) -> CurveVerdict:
    """Judge a curve.

    Args:
        losses: (step, training loss), each the mean since the point before; noisy.
        held_out: (step, loss on rows never trained on), measured on the same rows each time; not noisy.

    What counts as a change must be larger than chance (several standard errors of the noise, which is what neighbours
    differ by) and than a few percent of the loss.
    """
    broken = [step for step, loss in [*losses, *held_out] if not math.isfinite(loss)]
    if broken:
        return CurveVerdict("broken", min(broken))
    turn = _turning_point(held_out)
    if turn is not None:
        last_before = [loss for step, loss in losses if step <= turn]
        last_after = [loss for step, loss in losses if step > turn]
        worse_on_training_rows_too = last_before and last_after and _mean(last_after) > _mean(last_before) * 1.05
        return CurveVerdict("diverges" if worse_on_training_rows_too else "overfits", turn)
    if len(losses) < FEWEST:
        return CurveVerdict("too few")
    values = [loss for _, loss in losses]
    noise, window = _noise(values), _window(len(values))
    means = [_mean(values[i : i + window]) for i in range(len(values) - window + 1)]
    lowest = min(range(len(means)), key=lambda i: means[i])
    error = noise * math.sqrt(2 / window)  # of a difference of two such means
    if means[-1] - means[lowest] > max(4 * error, 0.1 * means[lowest]):
        return CurveVerdict("diverges", losses[lowest + window // 2][0])
    return CurveVerdict("falling" if _falls(losses, noise) else "flat")


def smoothed(losses: Sequence[float]) -> list[float]:
    """Centred moving mean over about an eighth of the curve."""
    half = _window(len(losses)) // 2
    return [_mean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


def _window(count: int) -> int:
    return max(3, count // 8 | 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _noise(losses: Sequence[float]) -> float:
    """Standard deviation of the noise from differences of neighbours, which a slow trend hardly touches."""
    steps = [after - before for before, after in zip(losses[1:], losses[2:])]  # the first loss falls by far the most
    return math.sqrt(sum(step**2 for step in steps) / len(steps) / 2)


def _falls(losses: Sequence[POINT], noise: float) -> bool:
    """Whether the straight line through the last half falls by more than chance and by more than one percent."""
    half = losses[len(losses) // 2 :]
    steps, values = [float(step) for step, _ in half], [loss for _, loss in half]
    middle, mean = _mean(steps), _mean(values)
    spread = sum((step - middle) ** 2 for step in steps)
    slope = sum((step - middle) * (loss - mean) for step, loss in zip(steps, values)) / spread
    fall = -slope * (steps[-1] - steps[0])
    return fall > 0.01 * mean and -slope > 2 * noise / math.sqrt(spread)


def _turning_point(held_out: Sequence[POINT]) -> Optional[int]:
    """The step of the lowest held-out loss, if the last one is more than one percent above it."""
    if len(held_out) < 3:
        return None
    step, lowest = min(held_out, key=lambda point: point[1])
    return step if step != held_out[0][0] and held_out[-1][1] > lowest * 1.01 else None
