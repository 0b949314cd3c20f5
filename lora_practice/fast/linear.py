"""Linears that read the same input, as one matrix product with their LoRA inside it.

Specification, for each linear s of a group (q, k, v | o | gate, up | down), PEFT's own arithmetic:

    y_s = x W_s^T + b_s + scale_s * dropout_s(x) A_s^T B_s^T          W (N_s, K), A (r, K), B (N_s, r)

Here u_s = (x * keep_s) A_s^T and the whole group is one product over the concatenated inner dimension

    y = [x | u] M^T + b,     M = | W_q  cB_q   0    0  |              c = scale / (1 - p)
                                 | W_k   0    cB_k  0  |
                                 | W_v   0     0   cB_v|

so the sum is rounded once, after the accumulation in float32. (Adding a small delta to a y already rounded to
bfloat16 loses the delta: half an ulp of y is more than early LoRA updates. Autocast does that.)
Backward, with the same matrix:

    [d_x | d_u] = d_y M,   d_B_s = c_s d_y_s^T u_s,   d_A_s = d_u_s^T (x * keep_s),   d_x += sum_s (d_u_s A_s) * keep_s
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

from .noise import Noise
from .ops import Plain, rows_buffer, wide_of


class Site(NamedTuple):
    """One LoRA pair within a group: PEFT's own parameters and where they sit."""

    a: torch.Tensor  # (r, K) parameter
    b: torch.Tensor  # (N_s, r) parameter
    scale: float
    outputs: slice  # rows of M
    ranks: slice  # columns of M after K
    number: int  # names the dropout mask, unique in the model


class LinearGroup:
    """Merged frozen linears with their LoRA sites.

    Args:
        matrix: (N, K + R), W already in its first K columns.
        bias: (N,) or None.
        sites: LoRA pairs; may be empty.
    """

    def __init__(self, matrix: torch.Tensor, width: int, bias: Optional[torch.Tensor], sites: list[Site]) -> None:
        self.matrix, self.width, self.bias, self.sites = matrix, width, bias, sites
        self.rank = matrix.shape[1] - width
        wide = wide_of(matrix.dtype)
        self.down = torch.empty(self.rank, width, dtype=wide, device=matrix.device)
        self.d_down: Optional[torch.Tensor] = None  # (R, K): gradients of this step so far
        self.d_up: Optional[torch.Tensor] = None  # (R, N); only the sites' own blocks mean something
        matrix[:, width:] = 0

    def up(self, site: Site) -> torch.Tensor:
        """Where the site's c B sits in the matrix: (N_s, r)."""
        return self.matrix[site.outputs, self.width + site.ranks.start : self.width + site.ranks.stop]

    def input_buffer(self, n: int) -> torch.Tensor:
        """(n, K + R) to be filled: x in the first K columns."""
        return rows_buffer(n, self.width + self.rank, self.matrix.dtype, self.matrix.device)

    def forward(
        self, xu: torch.Tensor, noise: Optional[Noise], ops: Plain, out: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """xu (n, K + R) with x in place; u is filled in. Returns y (n, N) and a copy of u (n, R) for the backward."""
        x, u = xu[:, : self.width], xu[:, self.width :]
        if self.sites:
            ops.lora_down(x, self.down, self.sites, noise, u)
        if out is None:
            out = rows_buffer(x.shape[0], self.matrix.shape[0], x.dtype, x.device)
        torch.mm(xu, self.matrix.t(), out=out)
        if self.bias is not None:
            out += self.bias
        return out, u.clone()

    def backward(
        self,
        d_y: torch.Tensor,
        x: torch.Tensor,
        u: torch.Tensor,
        noise: Optional[Noise],
        ops: Plain,
        need_d_x: bool = True,
    ) -> Optional[torch.Tensor]:
        """Adds to the group's d_down and d_up; returns d_x (n, K), or None when it is not needed."""
        if need_d_x:
            d_xu = rows_buffer(x.shape[0], self.width + self.rank, x.dtype, x.device)
            torch.mm(d_y, self.matrix, out=d_xu)
            d_x, d_u = d_xu[:, : self.width], d_xu[:, self.width :]
        else:
            d_x, d_u = None, d_y @ self.matrix[:, self.width :]
        if self.sites:
            d_down = ops.lora_down_backward(x, d_u, self.down, self.sites, noise, d_x)
            d_up = u.t() @ d_y  # the off-diagonal blocks are computed too: cheaper than many small products
            self.d_down = d_down if self.d_down is None else self.d_down.add_(d_down)
            self.d_up = d_up.to(d_down.dtype) if self.d_up is None else self.d_up.add_(d_up)
        return d_x


class LoraWeights:
    """All LoRA parameters of a model, moved to and from the merged groups a few calls at a time."""

    def __init__(self, groups: list[LinearGroup]) -> None:
        self.pairs = [(group, site) for group in groups for site in group.sites]
        self.groups = groups

    def take(self, keep_rate: float) -> None:
        """Copy the present A and c B of PEFT's parameters into the groups; keep_rate = 1 - p of this step."""
        torch._foreach_copy_([g.down[s.ranks] for g, s in self.pairs], [s.a.detach() for _, s in self.pairs])
        scaled = torch._foreach_mul([s.b.detach() for _, s in self.pairs], self._factors(keep_rate))
        torch._foreach_copy_([g.up(s) for g, s in self.pairs], scaled)

    def give(self, keep_rate: float) -> None:
        """Add the gathered gradients to .grad of PEFT's parameters (d_B still lacks its c) and forget them."""
        pairs = [(g, s) for g, s in self.pairs if g.d_down is not None and g.d_up is not None]
        for _, site in pairs:
            for parameter in (site.a, site.b):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        factors = self._factors(keep_rate) if pairs else []
        d_up = [g.d_up[s.ranks, s.outputs].t() for g, s in pairs]
        torch._foreach_add_([s.a.grad for _, s in pairs], [g.d_down[s.ranks] for g, s in pairs])
        torch._foreach_add_([s.b.grad for _, s in pairs], torch._foreach_mul(d_up, factors))
        for group in self.groups:
            group.d_down = group.d_up = None

    def _factors(self, keep_rate: float) -> list[float]:
        return [site.scale / keep_rate for _, site in self.pairs]
