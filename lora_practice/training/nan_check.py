"""Can the numbers of a step be trusted? A pure function of what was read, so that recorded runs can be replayed.

What fp16 does on old cards (unslothai/unsloth#2040 on a V100, hiyouga/LlamaFactory#5660, huggingface/trl#1173,
kohya-ss/sd-scripts#293 on a GTX 1660): the gradients turn NaN while the loss stays finite, the loss scale halves
step after step, or the loss turns NaN or exactly 0.0, and nothing is learnt from there on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Optional

from lora_practice.console.text import text

FINE, AGAIN, WIDEN, STOP = "fine", "again", "widen", "stop"
SCALE_TRIES = 3  # a gradient that overflows at each of so many scales is no matter of the scale
BACKOFF = (1 / 2, 1 / 64)  # of the loss scale, before the second and the third try


class StepNumbers(NamedTuple):
    """One computation of one optimizer step."""

    loss: float  # nats per trained token
    grad_norm: float  # of all trainable tensors together, before clipping; with `scale` still in it
    labels: bool = True  # there is something to train on
    scale: Optional[float] = None  # fp16's loss scale


def decide_step(now: StepNumbers, before: Sequence[StepNumbers], precision: str) -> str:
    """What to do about the step that gave `now`.

    Args:
        before: the readings directly before it that were not fine: earlier tries of this step, and, since a loss
            of zero may be a fluke, such steps.
        precision: "fp32", "fp16" or "bf16".

    Returns:
        FINE: take the step. AGAIN: compute it once more with a smaller loss scale (fp16 only; one overflow is
        normal there). WIDEN: compute it once more in fp32, and stay there. STOP: nothing can help.
    """
    narrow = precision != "fp32"
    if not math.isfinite(now.loss):
        return WIDEN if narrow else STOP
    if now.labels and now.loss == 0.0:
        if narrow:
            return WIDEN
        return STOP if sum(one.loss == 0.0 for one in before) + 1 >= SCALE_TRIES else FINE
    if not math.isfinite(now.grad_norm):
        if not narrow:
            return STOP
        return AGAIN if now.scale is not None and now.scale >= 1 and len(before) + 1 < SCALE_TRIES else WIDEN
    if now.scale is not None and now.scale < 1:
        return WIDEN
    if precision == "fp16" and now.labels and now.grad_norm == 0.0:  # all of it underflowed
        return WIDEN
    return FINE


def seen(now: StepNumbers, tries: int, precision: str) -> str:
    """What was wrong with a reading, in a few words for a person."""
    if not math.isfinite(now.loss):
        return text(f"loss 是 {now.loss}", f"the loss is {now.loss}")
    if now.labels and now.loss == 0.0:
        return text("loss 正好是 0", "the loss is exactly 0")
    if now.grad_norm == 0.0:
        return text("梯度全是 0", "every gradient is 0")
    if math.isfinite(now.grad_norm):
        return text(f"loss scale 降到 {now.scale:g}", f"the loss scale fell to {now.scale:g}")
    times = text(f"（连续 {tries} 次）", f" ({tries} times in a row)") if tries > 1 else ""
    return text(f"{precision} 的梯度不是有限的数{times}", f"a gradient in {precision} is not finite{times}")
