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

from lora_practice.fast.dropout import DropoutMask
from lora_practice.fast.matmul import matmul, matmul_transposed
from lora_practice.fast.ops import Plain, wide_of


class LoraModule(NamedTuple):
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
        bias: (N,) wide, or None.
        sites: LoRA pairs; may be empty.
    """

    def __init__(self, matrix: torch.Tensor, width: int, bias: Optional[torch.Tensor], sites: list[LoraModule]) -> None:
        self.matrix, self.width, self.bias, self.sites = matrix, width, bias, sites
        self.rank = matrix.shape[1] - width
        wide = wide_of(matrix.dtype)
        self.down = torch.empty(self.rank, width, dtype=wide, device=matrix.device)
        # Of this step so far: d_A (R, K), and d_y^T u as (R, N), of which the sites' own blocks are d_B / c.
        self.gradients: Optional[tuple[torch.Tensor, torch.Tensor]] = None
        matrix[:, width:] = 0

    def up(self, site: LoraModule) -> torch.Tensor:
        """Where the site's c B sits in the matrix: (N_s, r)."""
        return self.matrix[site.outputs, self.width + site.ranks.start : self.width + site.ranks.stop]

    def forward(
        self, xu: torch.Tensor, noise: Optional[DropoutMask], ops: Plain, out: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """xu (n, K + R) with x in place; u is filled in. Returns y (n, N) and a copy of u (n, R) for the backward.

        y may lie in `out`: see `product`. With a bias y is wide: Qwen2 has some of a hundred, and a sum in 16 bits
        would lose beside them what LoRA adds.
        """
        x, u = xu[:, : self.width], xu[:, self.width :]
        if self.sites:
            ops.lora_down(x, self.down, self.sites, noise, u)
        y = matmul_transposed(xu, self.matrix, out)
        if self.bias is not None:
            y = y.to(self.bias.dtype).add_(self.bias)
        return y, u.clone()

    def backward(
        self,
        d_y: torch.Tensor,
        x: torch.Tensor,
        u: torch.Tensor,
        noise: Optional[DropoutMask],
        ops: Plain,
        out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """d_y (n, N) -> d_x (n, K), which may lie in `out` (n, K + R); LoRA's gradients are gathered in `gradients`."""
        d_xu = matmul(d_y, self.matrix, out)
        d_x = d_xu[:, : self.width]
        self._gather(d_y, x, u, d_xu[:, self.width :], noise, ops, d_x)
        return d_x

    def backward_last(
        self, d_y: torch.Tensor, x: torch.Tensor, u: torch.Tensor, noise: Optional[DropoutMask], ops: Plain
    ) -> None:
        """As `backward`, for the first layer of the model: nothing below it trains, so d_x is not made."""
        self._gather(d_y, x, u, d_y @ self.matrix[:, self.width :], noise, ops, None)

    def _gather(
        self,
        d_y: torch.Tensor,
        x: torch.Tensor,
        u: torch.Tensor,
        d_u: torch.Tensor,
        noise: Optional[DropoutMask],
        ops: Plain,
        d_x: Optional[torch.Tensor],
    ) -> None:
        if not self.sites:
            return
        d_down = ops.lora_down_backward(x, d_u, self.down, self.sites, noise, d_x)
        d_up = ops.lora_up_backward(u, d_y, self.sites)
        if self.gradients is None:
            self.gradients = (d_down, d_up)
        else:
            self.gradients[0].add_(d_down)
            self.gradients[1].add_(d_up)


class LoraWeights:
    """All LoRA parameters of a model, moved to and from the merged groups a few calls at a time."""

    def __init__(self, groups: list[LinearGroup], ops: Plain) -> None:
        self.pairs = [(group, site) for group in groups for site in group.sites]
        self.groups, self.ops = groups, ops
        self.places = [g.down[s.ranks] for g, s in self.pairs] + [g.up(s) for g, s in self.pairs]

    def take(self, keep_rate: float) -> None:
        """Copy the present A and c B of PEFT's parameters into the groups; keep_rate = 1 - p of this step."""
        for group in self.groups:
            group.gradients = None  # of a step that was broken off
        parameters = [s.a.detach() for _, s in self.pairs] + [s.b.detach() for _, s in self.pairs]
        self.ops.move(parameters, self.places, self._factors(keep_rate), add=False)

    def give(self, keep_rate: float) -> None:
        """Add the gathered gradients to .grad of PEFT's parameters and forget them."""
        parameters = [site.a for _, site in self.pairs] + [site.b for _, site in self.pairs]
        for parameter in parameters:  # also where nothing was trained: an optimizer and a loss scaler ask for them
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gathered = [(site, group.gradients) for group, site in self.pairs if group.gradients is not None]
        if not gathered:
            return
        assert len(gathered) == len(self.pairs)  # a pass goes through every layer
        d_a = [d_down[site.ranks] for site, (d_down, _) in gathered]
        d_b = [d_up[site.ranks, site.outputs].t() for site, (_, d_up) in gathered]
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self.ops.move(d_a + d_b, grads, self._factors(keep_rate), add=True)
        for group in self.groups:
            group.gradients = None

    def _factors(self, keep_rate: float) -> list[float]:
        """Of all A, then of all B, whose matrix holds c B: the same on the way there and back."""
        return [1.0] * len(self.pairs) + [site.scale / keep_rate for _, site in self.pairs]
