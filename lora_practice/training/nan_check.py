"""Decides whether the numbers of an optimizer step can be trusted. Pure functions: recorded runs can be replayed.

fp16 on old cards fails in a few known ways (unslothai/unsloth#2040 on a V100, hiyouga/LlamaFactory#5660,
huggingface/trl#1173, kohya-ss/sd-scripts#293 on a GTX 1660): the gradients turn NaN while the loss stays finite, the
loss scale halves step after step, or the loss turns NaN or exactly 0.0, and the model learns nothing from there on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Optional

SCALE_TRIES = 3  # gradients that overflow at so many loss scales do not overflow because of the scale
BACKOFF = (1 / 2, 1 / 64)  # factors of the loss scale before the second and the third try


class StepNumbers(NamedTuple):
    """The numbers of one computation of an optimizer step."""

    loss: float  # nats per trained token
    grad_norm: float  # of all trainable tensors together, before clipping; multiplied by `scale`
    labels: bool = True  # at least one token is trained
    scale: Optional[float] = None  # loss scale of fp16; None without loss scaling


class Decision(Enum):
    """What happens to a step that was computed."""

    ACCEPT = "accept"  # the optimizer takes the step
    RETRY_SMALLER_SCALE = "retry with a smaller loss scale"  # fp16 only, where one overflow is normal
    UPCAST = "compute again in fp32"  # and stay in fp32
    STOP = "stop"  # fp32 fails too


class Symptom(Enum):
    """Why a step is not accepted."""

    LOSS_NOT_FINITE = "loss is NaN or infinite"
    LOSS_ZERO = "loss is exactly 0"
    GRADIENT_ZERO = "every gradient is 0"
    SCALE_COLLAPSED = "loss scale is below 1"
    GRADIENT_NOT_FINITE = "a gradient is NaN or infinite"


def decide_step(now: StepNumbers, before: Sequence[StepNumbers], precision: str) -> Decision:
    """The decision about the step that gave `now`.

    Args:
        before: rejected numbers directly before it: earlier tries of this step, and earlier steps with a loss of zero,
            which may be chance.
        precision: "fp32", "fp16" or "bf16".
    """
    if precision != "fp32":
        return _decide_in_half_precision(now, len(before) + 1, precision)
    if not math.isfinite(now.loss):
        return Decision.STOP
    if now.labels and now.loss == 0.0:
        zeros = sum(numbers.loss == 0.0 for numbers in before) + 1
        return Decision.STOP if zeros >= SCALE_TRIES else Decision.ACCEPT
    if not math.isfinite(now.grad_norm):
        return Decision.STOP
    return Decision.UPCAST if now.scale is not None and now.scale < 1 else Decision.ACCEPT


def _decide_in_half_precision(now: StepNumbers, tries: int, precision: str) -> Decision:
    if not math.isfinite(now.loss) or (now.labels and now.loss == 0.0):
        return Decision.UPCAST
    if not math.isfinite(now.grad_norm):
        may_retry = now.scale is not None and now.scale >= 1 and tries < SCALE_TRIES
        return Decision.RETRY_SMALLER_SCALE if may_retry else Decision.UPCAST
    if now.scale is not None and now.scale < 1:
        return Decision.UPCAST
    if precision == "fp16" and now.labels and now.grad_norm == 0.0:  # all gradients underflowed
        return Decision.UPCAST
    return Decision.ACCEPT


def symptom(numbers: StepNumbers) -> Symptom:
    """What is wrong with numbers that were not accepted."""
    if not math.isfinite(numbers.loss):
        return Symptom.LOSS_NOT_FINITE
    if numbers.labels and numbers.loss == 0.0:
        return Symptom.LOSS_ZERO
    if numbers.grad_norm == 0.0:
        return Symptom.GRADIENT_ZERO
    return Symptom.SCALE_COLLAPSED if math.isfinite(numbers.grad_norm) else Symptom.GRADIENT_NOT_FINITE
