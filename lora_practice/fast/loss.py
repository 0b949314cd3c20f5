"""The head and the loss, on labelled rows only, a few rows of logits at a time, gradient made on the way.

    loss = sum over labels y of row i of  logsumexp(z_i) - z_iy,      z = x W^T   (W frozen, V rows)
    d_x = scale * (count * softmax(z) - onehots) W

The scale (loss_scale / num_items of the whole optimizer step) is known beforehand, so the forward pass leaves
d_x behind and no logits are kept or computed twice.
"""

from __future__ import annotations

from typing import Optional

import torch

from .ops import Plain
from .plan import Plan
from .products import ROW_STEP, product, product_back

CHUNK_BYTES = 32 << 20  # of logits: 170 rows of 49152 in float32; 16-bit products ask for more rows, and get them


def head_loss(
    x: torch.Tensor, weight: torch.Tensor, plan: Plan, scale: Optional[float], ops: Plain
) -> tuple[float, Optional[torch.Tensor]]:
    """Summed loss in nats, and d_x (None without scale).

    x (L, K): normed hidden states of plan.label_rows.
    """
    total = 0.0
    d_x = torch.empty_like(x) if scale is not None else None
    most = max(CHUNK_BYTES // (weight.shape[0] * weight.element_size()), ROW_STEP)
    chunks = -(-x.shape[0] // most)  # even ones: each reads the whole head, a small one for little
    rows = -(-x.shape[0] // (chunks * ROW_STEP)) * ROW_STEP if chunks else 1
    for first in range(0, x.shape[0], rows):
        last = min(first + rows, x.shape[0])
        logits = product(x[first:last], weight)
        mine = (plan.pair_slots >= first) & (plan.pair_slots < last)
        slots, labels = plan.pair_slots[mine] - first, plan.pair_labels[mine]
        total += ops.cross_entropy(logits, plan.label_counts[first:last], slots, labels, scale)
        if d_x is not None:
            d_x[first:last] = product_back(logits, weight)
        del logits  # before the next ones are made
    return total, d_x


def loss_plainly(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The specification, for one example: logits (T, V), labels (T,) unshifted; the sum in nats."""
    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
