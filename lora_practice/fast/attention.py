"""Causal attention of packed rows: each query sees its path (shared prefix) and its own run, nothing else.

Specification (`attend_plainly`): full n x n scores with a mask. Here the same over padded tiles of similar
blocks (see tiles.py), so that no score between strangers is computed. G query heads share a key/value head:
they are stacked as G * m query rows, which avoids repeating keys.

    S = c Q K^T,  P = softmax(S),  O = P V
    d_V = P^T d_O,  d_P = d_O V^T,  d_S = P * (d_P - rowsum(d_O * O)),  d_Q = c d_S K,  d_K = c d_S^T Q

P is made again in the backward pass: saving it would take more memory than everything else on long examples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lora_practice.fast.attention_tiles import Tile


class Heads(NamedTuple):
    """Shape of the attention: `query` heads share `shared` key/value heads of `size` columns."""

    query: int
    shared: int
    size: int
    scale: float

    @property
    def q_width(self) -> int:
        return self.query * self.size

    @property
    def kv_width(self) -> int:
        return self.shared * self.size

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views q, k, v of qkv (n, q_width + 2 kv_width)."""
        return qkv.split((self.q_width, self.kv_width, self.kv_width), dim=1)


def _queries(x: torch.Tensor, rows: torch.Tensor, heads: Heads) -> torch.Tensor:
    """x (n + 1, query * D) -> (B * shared, G * m, D)."""
    many, m = rows.shape
    taken = x[rows.flatten()].view(many, m, heads.shared, -1, heads.size)
    return taken.permute(0, 2, 3, 1, 4).reshape(many * heads.shared, -1, heads.size)


def _unqueries(y: torch.Tensor, rows: torch.Tensor, heads: Heads) -> torch.Tensor:
    """The inverse of `_queries`: (B * shared, G * m, D) -> (B * m, query * D)."""
    many, m = rows.shape
    y = y.view(many, heads.shared, -1, m, heads.size).permute(0, 3, 1, 2, 4)
    return y.reshape(many * m, heads.q_width)


def _keys(x: torch.Tensor, rows: torch.Tensor, heads: Heads) -> torch.Tensor:
    """x (n + 1, shared * D) -> (B * shared, k, D)."""
    many, k = rows.shape
    taken = x[rows.flatten()].view(many, k, heads.shared, heads.size)
    return taken.permute(0, 2, 1, 3).reshape(many * heads.shared, k, heads.size)


def _unkeys(y: torch.Tensor, rows: torch.Tensor, heads: Heads) -> torch.Tensor:
    many, k = rows.shape
    return y.view(many, heads.shared, k, heads.size).permute(0, 2, 1, 3).reshape(many * k, heads.kv_width)


def _probabilities(q: torch.Tensor, k: torch.Tensor, tile: Tile, heads: Heads) -> torch.Tensor:
    """softmax(c Q K^T) under the tile's mask; (B * shared, G * m, k)."""
    many, m = tile.query_rows.shape
    scores = torch.bmm(q * heads.scale, k.transpose(1, 2))
    shaped = scores.view(many, -1, m, k.shape[1])
    shaped.masked_fill_(tile.hidden[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1)


def attend(qkv: torch.Tensor, tiles: list[Tile], heads: Heads, out: torch.Tensor) -> None:
    """out (n, q_width) = attention of qkv (n + 1, q_width + 2 kv_width), wide, rotated; row n is padding."""
    n = out.shape[0]
    q, k, v = heads.split(qkv)
    result = qkv.new_empty(n + 1, heads.q_width)
    for tile in tiles:
        tile_q, tile_k = _queries(q, tile.query_rows, heads), _keys(k, tile.key_rows, heads)
        p = _probabilities(tile_q, tile_k, tile, heads)
        o = torch.bmm(p, _keys(v, tile.key_rows, heads))
        result[tile.query_rows.flatten()] = _unqueries(o, tile.query_rows, heads)
    out.copy_(result[:n])


def attend_backward(
    d_out: torch.Tensor, out: torch.Tensor, qkv: torch.Tensor, tiles: list[Tile], heads: Heads
) -> torch.Tensor:
    """d_qkv (n + 1, ...) wide; row n collects what padding sends and means nothing."""
    q, k, v = heads.split(qkv)
    d_qkv = torch.zeros_like(qkv)
    d_q, d_k, d_v = heads.split(d_qkv)
    pad = torch.zeros(1, heads.q_width, dtype=qkv.dtype, device=qkv.device)
    d_out, out = torch.cat([d_out.to(qkv.dtype), pad]), torch.cat([out.to(qkv.dtype), pad])
    for tile in tiles:
        tile_q, tile_k = _queries(q, tile.query_rows, heads), _keys(k, tile.key_rows, heads)
        tile_v, g = _keys(v, tile.key_rows, heads), _queries(d_out, tile.query_rows, heads)
        p = _probabilities(tile_q, tile_k, tile, heads)
        row = (g * _queries(out, tile.query_rows, heads)).sum(-1, keepdim=True)
        d_s = torch.bmm(g, tile_v.transpose(1, 2)).sub_(row).mul_(p).mul_(heads.scale)
        keys = tile.key_rows.flatten()
        d_v.index_add_(0, keys, _unkeys(torch.bmm(p.transpose(1, 2), g), tile.key_rows, heads))
        d_k.index_add_(0, keys, _unkeys(torch.bmm(d_s.transpose(1, 2), tile_q), tile.key_rows, heads))
        d_q[tile.query_rows.flatten()] = _unqueries(torch.bmm(d_s, tile_k), tile.query_rows, heads)
    return d_qkv


def attend_plainly(qkv: torch.Tensor, visible: torch.Tensor, heads: Heads) -> torch.Tensor:
    """The specification: qkv (n, ...), visible (n, n) bool -> (n, q_width)."""
    n = qkv.shape[0]
    q, k, v = heads.split(qkv)
    q = q.reshape(n, heads.query, heads.size).transpose(0, 1)
    k, v = (x.reshape(n, heads.shared, heads.size).transpose(0, 1) for x in (k, v))
    group = heads.query // heads.shared
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2) * heads.scale).masked_fill(~visible, float("-inf"))
    return (torch.softmax(scores, -1) @ v).transpose(0, 1).reshape(n, heads.q_width)
