"""Causal attention of packed rows: each query attends to its path (shared prefix) and to its own run, nothing else.

Specification: `attention_reference`, full n x n scores with a mask. `attend` computes the same over padded tiles of
blocks of similar size (attention_tiles.py), so that scores between unrelated examples are not computed. G query heads
share one kv head: they are stacked as G * m query rows, which avoids repeating keys.

    S = c Q K^T,  P = softmax(S),  O = P V
    d_V = P^T d_O,  d_P = d_O V^T,  d_S = P * (d_P - rowsum(d_O * O)),  d_Q = c d_S K,  d_K = c d_S^T Q

The backward pass recomputes P: saving it would take more memory than everything else on long examples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lora_practice.fast.attention_tiles import Tile


class Heads(NamedTuple):
    """Shape of the attention: `query` heads and `kv` key/value heads of `size` columns each; `scale` is c above."""

    query: int
    kv: int
    size: int
    scale: float

    @property
    def q_width(self) -> int:
        return self.query * self.size

    @property
    def kv_width(self) -> int:
        return self.kv * self.size

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views q, k, v of qkv (n, q_width + 2 kv_width)."""
        return qkv.split((self.q_width, self.kv_width, self.kv_width), dim=1)


def _gather_queries(x: torch.Tensor, rows: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Rows (B, m) of x (n + 1, query * D) -> (B * kv, G * m, D)."""
    blocks, m = rows.shape
    gathered = x[rows.flatten()].view(blocks, m, heads.kv, -1, heads.size)
    return gathered.permute(0, 2, 3, 1, 4).reshape(blocks * heads.kv, -1, heads.size)


def _ungroup_queries(y: torch.Tensor, rows: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Inverse layout of `_gather_queries`: (B * kv, G * m, D) -> (B * m, query * D)."""
    blocks, m = rows.shape
    y = y.view(blocks, heads.kv, -1, m, heads.size).permute(0, 3, 1, 2, 4)
    return y.reshape(blocks * m, heads.q_width)


def _gather_keys(x: torch.Tensor, rows: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Rows (B, k) of keys or values x (n + 1, kv * D) -> (B * kv, k, D)."""
    blocks, k = rows.shape
    gathered = x[rows.flatten()].view(blocks, k, heads.kv, heads.size)
    return gathered.permute(0, 2, 1, 3).reshape(blocks * heads.kv, k, heads.size)


def _ungroup_keys(y: torch.Tensor, rows: torch.Tensor, heads: Heads) -> torch.Tensor:
    """Inverse layout of `_gather_keys`: (B * kv, k, D) -> (B * k, kv * D)."""
    blocks, k = rows.shape
    return y.view(blocks, heads.kv, k, heads.size).permute(0, 2, 1, 3).reshape(blocks * k, heads.kv_width)


def _probabilities(q: torch.Tensor, k: torch.Tensor, tile: Tile, heads: Heads) -> torch.Tensor:
    """softmax(c Q K^T) under the tile's mask: (B * kv, G * m, k)."""
    blocks, m = tile.query_rows.shape
    scores = torch.bmm(q * heads.scale, k.transpose(1, 2))
    scores.view(blocks, -1, m, k.shape[1]).masked_fill_(tile.masked[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1)


def attend(qkv: torch.Tensor, tiles: list[Tile], heads: Heads, out: torch.Tensor) -> None:
    """out (n, q_width) = attention of qkv (n + 1, q_width + 2 kv_width), accumulate dtype, after RoPE.

    Row n of qkv is padding.
    """
    n = out.shape[0]
    q, k, v = heads.split(qkv)
    result = qkv.new_empty(n + 1, heads.q_width)
    for tile in tiles:
        tile_q, tile_k = _gather_queries(q, tile.query_rows, heads), _gather_keys(k, tile.key_rows, heads)
        p = _probabilities(tile_q, tile_k, tile, heads)
        o = torch.bmm(p, _gather_keys(v, tile.key_rows, heads))
        result[tile.query_rows.flatten()] = _ungroup_queries(o, tile.query_rows, heads)
    out.copy_(result[:n])


def attend_backward(
    d_out: torch.Tensor, out: torch.Tensor, qkv: torch.Tensor, tiles: list[Tile], heads: Heads
) -> torch.Tensor:
    """d_qkv (n + 1, q_width + 2 kv_width), accumulate dtype; row n holds gradients of padding, to be ignored."""
    q, k, v = heads.split(qkv)
    d_qkv = torch.zeros_like(qkv)
    d_q, d_k, d_v = heads.split(d_qkv)
    pad = torch.zeros(1, heads.q_width, dtype=qkv.dtype, device=qkv.device)
    d_out, out = torch.cat([d_out.to(qkv.dtype), pad]), torch.cat([out.to(qkv.dtype), pad])
    for tile in tiles:
        tile_q, tile_k = _gather_queries(q, tile.query_rows, heads), _gather_keys(k, tile.key_rows, heads)
        tile_v, g = _gather_keys(v, tile.key_rows, heads), _gather_queries(d_out, tile.query_rows, heads)
        p = _probabilities(tile_q, tile_k, tile, heads)
        row_sum = (g * _gather_queries(out, tile.query_rows, heads)).sum(-1, keepdim=True)
        d_s = torch.bmm(g, tile_v.transpose(1, 2)).sub_(row_sum).mul_(p).mul_(heads.scale)
        keys = tile.key_rows.flatten()
        d_v.index_add_(0, keys, _ungroup_keys(torch.bmm(p.transpose(1, 2), g), tile.key_rows, heads))
        d_k.index_add_(0, keys, _ungroup_keys(torch.bmm(d_s.transpose(1, 2), tile_q), tile.key_rows, heads))
        d_q[tile.query_rows.flatten()] = _ungroup_queries(torch.bmm(d_s, tile_k), tile.query_rows, heads)
    return d_qkv


def attention_reference(qkv: torch.Tensor, visible: torch.Tensor, heads: Heads) -> torch.Tensor:
    """The specification: qkv (n, q_width + 2 kv_width), visible (n, n) bool -> (n, q_width)."""
    n = qkv.shape[0]
    q, k, v = heads.split(qkv)
    q = q.reshape(n, heads.query, heads.size).transpose(0, 1)
    k, v = (x.reshape(n, heads.kv, heads.size).transpose(0, 1) for x in (k, v))
    group = heads.query // heads.kv
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2) * heads.scale).masked_fill(~visible, float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(0, 1).reshape(n, heads.q_width)
