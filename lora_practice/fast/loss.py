"""The head and the loss, on labelled rows only, a few rows of logits at a time, gradient made on the way.

    loss = sum over labels y of row i of  logsumexp(z_i) - z_iy,      z = x W^T   (W frozen, V rows)
    d_x = scale * (count * softmax(z) - onehots) W

The scale (loss_scale / num_items of the whole optimizer step) is known beforehand, so the forward pass leaves
d_x behind and no logits are kept or computed twice.
"""

from __future__ import annotations

from typing import Optional

import torch

from lora_practice.fast.buffers import Buffers
from lora_practice.fast.matmul import ROW_STEP, matmul, matmul_transposed
from lora_practice.fast.ops import Plain
from lora_practice.fast.step_plan import MicroBatchPlan

# Of logits: 128 rows of 49152 in float32. In 16 bits, whose products gain from more rows, twice as many. A card waits.
CHUNK_BYTES, CARD_CHUNK_BYTES = 24 << 20, 96 << 20


def head_loss(
    x: torch.Tensor, weight: torch.Tensor, plan: MicroBatchPlan, scale: Optional[float], ops: Plain, space: Buffers
) -> tuple[float, Optional[torch.Tensor]]:
    """Summed loss in nats, and d_x (None without scale).

    x (L, K): normed hidden states of plan.label_rows.
    """
    total = 0.0
    d_x = torch.empty_like(x) if scale is not None else None
    size = weight.element_size() if ops.logits_in_place else 4
    held = CHUNK_BYTES if weight.device.type == "cpu" else CARD_CHUNK_BYTES
    most = max(held // (weight.shape[0] * size * ROW_STEP), 1) * ROW_STEP
    for first, last in chunks(x.shape[0], most):
        out = space.rows(("logits",), last - first, weight.shape[0], weight.dtype, weight.device, most + ROW_STEP)
        logits = matmul_transposed(x[first:last], weight, out)
        mine = (plan.pair_slots >= first) & (plan.pair_slots < last)
        slots, labels = plan.pair_slots[mine] - first, plan.pair_labels[mine]
        total += ops.cross_entropy(logits, plan.label_counts[first:last], slots, labels, scale)
        if d_x is not None:
            d_x[first:last] = matmul(logits, weight)
        del logits  # before the next ones are made
    return total, d_x


def chunks(rows: int, most: int) -> list[tuple[int, int]]:
    """Rows in chunks of `most` + ROW_STEP at most, multiples of ROW_STEP, as `most` is, but for the last.

    Even ones: each reads the whole head, a small one for little. But the first is the largest: the C library finds no
    place for logits in a freed block of just their size, and would hold both.
    """
    count = max(-(-rows // most), 1)
    even = max(-(-(rows - ROW_STEP) // (count * ROW_STEP)), 1) * ROW_STEP
    firsts = [0, *range(even + ROW_STEP, rows, even)]
    return list(zip(firsts, [*firsts[1:], rows]))


def loss_plainly(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The specification, for one example: logits (T, V), labels (T,) unshifted; the sum in nats."""
    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
