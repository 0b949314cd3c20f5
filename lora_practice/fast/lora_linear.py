"""Linears that read the same input, as one matmul that includes their LoRA.

Specification, for each linear s of a group (q, k, v | o | gate, up | down), PEFT's own arithmetic:

    y_s = x W_s^T + b_s + scale_s * dropout_s(x) A_s^T B_s^T          W (N_s, K), A (r, K), B (N_s, r)

Here u_s = (x * keep_s) A_s^T, and the whole group is one matmul over the concatenated inner dimension

    y = [x | u] M^T + b,     M = | W_q  cB_q   0    0  |              c = scale / (1 - p)
                                 | W_k   0    cB_k  0  |
                                 | W_v   0     0   cB_v|

so the sum is rounded once, after the accumulation in float32. (A small delta added to a y that is already rounded to
bfloat16 is lost: half an ulp of y is more than early LoRA updates. Autocast does that.)
Backward, with the same matrix:

    [d_x | d_u] = d_y M,   d_B_s = c_s d_y_s^T u_s,   d_A_s = d_u_s^T (x * keep_s),   d_x += sum_s (d_u_s A_s) * keep_s
"""

from __future__ import annotations

from typing import Optional

import torch

from lora_practice.fast.dropout import DropoutMask
from lora_practice.fast.matmul import matmul, matmul_transposed
from lora_practice.fast.ops import LoraModule, TorchOps, accumulate_dtype


class LinearGroup:
    """Merged frozen linears with their LoRA modules.

    Args:
        matrix: M (N, K + R), with W already in its first K columns.
        width: K.
        bias: (N,) in the accumulate dtype, or None.
        modules: LoRA modules of the group; may be empty.
    """

    def __init__(
        self, matrix: torch.Tensor, width: int, bias: Optional[torch.Tensor], modules: list[LoraModule]
    ) -> None:
        self.matrix, self.width, self.bias, self.modules = matrix, width, bias, modules
        self.rank = matrix.shape[1] - width  # R
        self.down = torch.empty(self.rank, width, dtype=accumulate_dtype(matrix.dtype), device=matrix.device)
        # Sums over the micro-batches of this step: d_A (R, K), and u^T d_y (R, N), in which each module's own block is
        # the transpose of d_B / c.
        self.gradients: Optional[tuple[torch.Tensor, torch.Tensor]] = None
        matrix[:, width:] = 0

    def up(self, module: LoraModule) -> torch.Tensor:
        """View of a module's c B in the matrix: (N_s, r)."""
        return self.matrix[module.outputs, self.width + module.ranks.start : self.width + module.ranks.stop]

    def forward(
        self, xu: torch.Tensor, dropout: Optional[DropoutMask], ops: TorchOps, out: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(y (n, N), u (n, R)) from xu (n, K + R), whose first K columns hold x; its last R are overwritten by u.

        y may lie in `out` (see `matmul_transposed`); u is a copy for the backward pass. With a bias, y is in the
        accumulate dtype: some biases of Qwen2 are about 100, and next to them a 16-bit sum would lose LoRA's share.
        """
        x, u = xu[:, : self.width], xu[:, self.width :]
        if self.modules:
            ops.lora_down(x, self.down, self.modules, dropout, u)
        y = matmul_transposed(xu, self.matrix, out)
        if self.bias is not None:
            y = y.to(self.bias.dtype).add_(self.bias)
        return y, u.clone()

    def backward(
        self,
        d_y: torch.Tensor,
        x: torch.Tensor,
        u: torch.Tensor,
        dropout: Optional[DropoutMask],
        ops: TorchOps,
        out: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """d_x (n, K) from d_y (n, N); may lie in `out` (n, K + R). LoRA's gradients are added to `gradients`."""
        d_xu = matmul(d_y, self.matrix, out)
        d_x = d_xu[:, : self.width]
        self._add_gradients(d_y, x, u, d_xu[:, self.width :], dropout, ops, d_x)
        return d_x

    def backward_lora_only(
        self, d_y: torch.Tensor, x: torch.Tensor, u: torch.Tensor, dropout: Optional[DropoutMask], ops: TorchOps
    ) -> None:
        """`backward` without d_x, for the first layer of the model: nothing below it is trained."""
        self._add_gradients(d_y, x, u, d_y @ self.matrix[:, self.width :], dropout, ops, None)

    def _add_gradients(
        self,
        d_y: torch.Tensor,
        x: torch.Tensor,
        u: torch.Tensor,
        d_u: torch.Tensor,
        dropout: Optional[DropoutMask],
        ops: TorchOps,
        d_x: Optional[torch.Tensor],
    ) -> None:
        """Add LoRA's gradients of one micro-batch to `gradients`, and LoRA's part of d_x to d_x unless it is None."""
        if not self.modules:
            return
        d_down = ops.lora_down_backward(x, d_u, self.down, self.modules, dropout, d_x)
        d_up = ops.lora_up_backward(u, d_y, self.modules)
        if self.gradients is None:
            self.gradients = (d_down, d_up)
        else:
            self.gradients[0].add_(d_down)
            self.gradients[1].add_(d_up)


class LoraWeights:
    """All LoRA parameters of a model: copied from PEFT into the merged groups, their gradients back to PEFT."""

    def __init__(self, groups: list[LinearGroup], ops: TorchOps) -> None:
        self.pairs = [(group, module) for group in groups for module in group.modules]
        self.groups, self.ops = groups, ops
        self.parameters = [m.a for _, m in self.pairs] + [m.b for _, m in self.pairs]
        self.targets = [g.down[m.ranks] for g, m in self.pairs] + [g.up(m) for g, m in self.pairs]

    def load_from_peft(self, keep_rate: float) -> None:
        """Copy the current A and c B of PEFT's parameters into the groups; keep_rate = 1 - p of this step."""
        for group in self.groups:
            group.gradients = None  # left over from an interrupted step
        sources = [parameter.detach() for parameter in self.parameters]
        self.ops.copy_matrices(sources, self.targets, self._factors(keep_rate), accumulate=False)

    def add_gradients_to_peft(self, keep_rate: float) -> None:
        """Add the groups' gradients to .grad of PEFT's parameters and clear them."""
        for parameter in self.parameters:  # also in a step without labels: optimizer and loss scaler need a .grad
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        found = [(module, group.gradients) for group, module in self.pairs if group.gradients is not None]
        if not found:
            return
        assert len(found) == len(self.pairs)  # a pass goes through every layer
        d_a = [d_down[module.ranks] for module, (d_down, _) in found]
        d_b = [d_up[module.ranks, module.outputs].t() for module, (_, d_up) in found]
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        self.ops.copy_matrices(d_a + d_b, grads, self._factors(keep_rate), accumulate=True)
        for group in self.groups:
            group.gradients = None

    def _factors(self, keep_rate: float) -> list[float]:
        """1 for every A, c for every B; the same for weights and gradients, because the matrix holds c B."""
        return [1.0] * len(self.pairs) + [module.scale / keep_rate for _, module in self.pairs]
