"""Attention blocks of a micro-batch as padded tiles, for torch's batched matmuls.

Compiled kernels need no padding: they read `MicroBatchPlan.flat_runs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_practice.fast.step_plan import BLOCK_ROWS, MicroBatchPlan

TILE_SCORES = 1 << 20  # scores per head in one tile, at most; a longer run makes more tiles, not larger ones


@dataclass
class Tile:
    """B attention blocks of similar size, padded to m queries and k keys; padding refers to row n."""

    query_rows: torch.Tensor  # (B, m) int64
    key_rows: torch.Tensor  # (B, k) int64
    masked: torch.Tensor  # (B, m, k) bool: True where the query must not see the key


def tiles(plan: MicroBatchPlan, window: int | None) -> list[Tile]:
    """Attention tiles for a sliding `window` (None: full attention), cached in the plan."""
    if window not in plan.tiles:
        plan.tiles[window] = _cut(plan, window)
    return plan.tiles[window]


def _cut(plan: MicroBatchPlan, window: int | None) -> list[Tile]:
    """Cut each run into blocks of BLOCK_ROWS queries and pad blocks of similar size together.

    The keys of a block are its path, then its run up to the block's end. Blocks join a tile, from long to short,
    while the padded area stays below 1.3 times the true one (or 32 x 64 per block, where the overhead of a call
    dominates) and below TILE_SCORES, which a single block may exceed.
    """
    blocks = []
    for path, first, last in plan.runs:
        for start in range(first, last, BLOCK_ROWS):
            end = min(start + BLOCK_ROWS, last)
            blocks.append((list(range(start, end)), path + list(range(first, end))))
    blocks.sort(key=lambda block: (len(block[1]), len(block[0])), reverse=True)
    groups: list[list[tuple[list[int], list[int]]]] = []
    area = 0
    for block in blocks:
        size = len(block[0]) * len(block[1])
        if groups:
            candidate = [*groups[-1], block]
            padded = len(candidate) * max(len(b[0]) for b in candidate) * max(len(b[1]) for b in candidate)
            if padded <= min(max(1.3 * (area + size), 32 * 64 * len(candidate)), TILE_SCORES):
                groups[-1].append(block)
                area += size
                continue
        groups.append([block])
        area = size
    return [_tile(group, plan, window) for group in groups]


def _tile(blocks: list[tuple[list[int], list[int]]], plan: MicroBatchPlan, window: int | None) -> Tile:
    """One tile of blocks (query rows, key rows)."""
    n, device = plan.rows, plan.ids.device
    m, k = max(len(b[0]) for b in blocks), max(len(b[1]) for b in blocks)
    queries = torch.tensor([b[0] + [n] * (m - len(b[0])) for b in blocks], device=device)
    keys = torch.tensor([b[1] + [n] * (k - len(b[1])) for b in blocks], device=device)
    # A padded query has position 0 and a padded key a position beyond all others, so padded keys are never visible.
    position_q = torch.cat([plan.positions, plan.positions.new_zeros(1)])[queries]
    position_k = torch.cat([plan.positions, plan.positions.new_full((1,), 1 << 40)])[keys]
    distance = position_q[:, :, None] - position_k[:, None, :]
    masked = distance < 0
    if window is not None:
        masked |= distance >= window
    return Tile(queries, keys, masked)
