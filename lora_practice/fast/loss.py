"""Output head and cross-entropy on labelled rows only, a chunk of logits at a time, with the gradient.

    loss = sum over labels y of row i of  logsumexp(z_i) - z_iy,      z = x W^T   (W frozen, V rows)
    d_x = scale * (count * softmax(z) - onehots) W

The scale (loss_scale / num_items of the whole optimizer step) is known beforehand, so the forward pass already returns
d_x, and no logits are kept or computed twice.
"""

from __future__ import annotations

from typing import Optional

import torch

from lora_practice.fast.buffers import Buffers
from lora_practice.fast.matmul import ROW_STEP, matmul, matmul_transposed
from lora_practice.fast.ops import TorchOps
from lora_practice.fast.step_plan import MicroBatchPlan

# Bytes of logits in one chunk. On a CPU 24 MiB: 128 rows of 49152 in float32, twice as many in 16 bits, whose matmuls
# gain from more rows. A GPU needs larger matmuls.
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 24 << 20, 96 << 20


def head_loss(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: MicroBatchPlan,
    scale: Optional[float],
    ops: TorchOps,
    buffers: Buffers,
) -> tuple[float, Optional[torch.Tensor]]:
    """(summed loss in nats, d_x (L, K) or None without scale).

    x (L, K): normed hidden states of plan.label_rows; weight (V, K): the output head.
    """
    total = 0.0
    d_x = torch.empty_like(x) if scale is not None else None
    size = weight.element_size() if ops.logits_in_place else 4
    chunk_bytes = CPU_CHUNK_BYTES if weight.device.type == "cpu" else GPU_CHUNK_BYTES
    most = max(chunk_bytes // (weight.shape[0] * size * ROW_STEP), 1) * ROW_STEP
    for first, last in chunks(x.shape[0], most):
        out = buffers.rows(("logits",), last - first, weight.shape[0], weight.dtype, weight.device, most + ROW_STEP)
        logits = matmul_transposed(x[first:last], weight, out)
        in_chunk = (plan.pair_slots >= first) & (plan.pair_slots < last)
        slots, labels = plan.pair_slots[in_chunk] - first, plan.pair_labels[in_chunk]
        total += ops.cross_entropy(logits, plan.label_counts[first:last], slots, labels, scale)
        if d_x is not None:
            d_x[first:last] = matmul(logits, weight)
        del logits  # before the next chunk is allocated
    return total, d_x


def chunks(rows: int, most: int) -> list[tuple[int, int]]:
    """(first, last) of chunks of at most `most` + ROW_STEP rows; all but the last are multiples of ROW_STEP.

    `most` is a multiple of ROW_STEP. Chunks are even, because each reads the whole head, and a small one for little
    work. Only the first is larger: the C library does not reuse a freed block for logits of exactly its size and would
    hold both.
    """
    count = max(-(-rows // most), 1)
    even = max(-(-(rows - ROW_STEP) // (count * ROW_STEP)), 1) * ROW_STEP
    firsts = [0, *range(even + ROW_STEP, rows, even)]
    return list(zip(firsts, [*firsts[1:], rows]))


def loss_reference(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The specification, for one example: summed loss in nats of logits (T, V) and labels (T,), not shifted."""
    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
