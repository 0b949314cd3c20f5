"""The operations between the matmuls: RMSNorm, RoPE, gated activation, LoRA's small matmuls, cross-entropy.

`TorchOps` implements each in torch and is the specification; `kernels.native.CompiledOps` overrides some of them with
compiled kernels. Every operation has a forward and a hand-written backward; there is no autograd.

Notation: d_x is the gradient of the loss with respect to x. n rows, K input width, N output width, R stacked LoRA
ranks of a group of linears that read the same input, D head size, F intermediate size, V vocabulary size.
Dtypes: matmul operands are in the compute dtype (bfloat16, float16, float32; float64 in tests). Residual stream,
norms, softmax, loss and gradients of LoRA weights are in the accumulate dtype (float32; float64 where the compute
dtype is float64).
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F

from lora_practice.fast.attention import Heads, attend, attend_backward
from lora_practice.fast.attention_tiles import tiles
from lora_practice.fast.dropout import DropoutMask, keep_mask
from lora_practice.fast.step_plan import MicroBatchPlan


class LoraModule(NamedTuple):
    """One LoRA pair A, B within a group of linears: PEFT's own parameters and their place in the merged matrix M."""

    a: torch.Tensor  # (r, K) parameter
    b: torch.Tensor  # (N_s, r) parameter
    scale: float  # alpha / r
    outputs: slice  # rows of M
    ranks: slice  # columns of M after the first K
    number: int  # selects the dropout mask; unique in the model


class Activation(NamedTuple):
    """The gate's non-linearity: value(gate) and gradient(d_value, gate)."""

    name: str
    value: Callable[[torch.Tensor], torch.Tensor]
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _gelu_tanh(gate: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh")


def _gelu_tanh_gradient(d_value: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu_backward(d_value, gate, approximate="tanh")


ACTIVATIONS = {
    "silu": Activation("silu", F.silu, torch.ops.aten.silu_backward),
    "gelu_pytorch_tanh": Activation("gelu_pytorch_tanh", _gelu_tanh, _gelu_tanh_gradient),
}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulate dtype for a compute dtype: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class TorchOps:
    """Every operation in torch. `name` is shown to the user."""

    name = "torch"
    logits_in_place = False  # True: cross_entropy needs no float32 copy of 16-bit logits

    def norm(self, h: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
        """RMSNorm: out = h * rstd * weight, rstd = 1 / sqrt(mean(h^2) + eps).

        Args: h (n, K) and weight (K,) in the accumulate dtype; out (n, K), written in its own dtype.
        Returns: rstd (n, 1).
        """
        rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        out.copy_(h * rstd * weight)
        return rstd

    def norm_from_rstd(self, h: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, out: torch.Tensor) -> None:
        """Output of `norm` recomputed from the saved rstd, for the backward pass."""
        out.copy_(h * rstd * weight)

    def norm_backward(
        self,
        d_out: torch.Tensor,
        h: torch.Tensor,
        weight: torch.Tensor,
        rstd: torch.Tensor,
        d_h: torch.Tensor,
    ) -> None:
        """d_h += rstd * (g - x * mean(g * x)) with x = h * rstd, g = d_out * weight; in place."""
        x = h * rstd
        g = d_out.to(h.dtype) * weight
        d_h += rstd * (g - x * (g * x).mean(-1, keepdim=True))

    def rope(self, x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> None:
        """RoPE on the first `heads` heads of x (n, heads * D or more), in place, in the accumulate dtype.

        The halves (a, b) of a head become (a cos - b sin, b cos + a sin). sign = 1 is the forward, sign = -1 the
        backward (the transpose). cos, sin (n, D / 2).
        """
        half = cos.shape[1]
        pairs = x[:, : heads * 2 * half].unflatten(1, (heads, 2, half))
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        c, s = cos[:, None], sin[:, None] * sign
        pairs.copy_(torch.stack((a * c - b * s, b * c + a * s), dim=2))

    def attend(
        self, qkv: torch.Tensor, plan: MicroBatchPlan, window: Optional[int], heads: Heads, out: torch.Tensor
    ) -> None:
        """out = attention of qkv within the plan's runs; see `attention.attend`."""
        attend(qkv, tiles(plan, window), heads, out)

    def attend_backward(
        self,
        d_out: torch.Tensor,
        out: torch.Tensor,
        qkv: torch.Tensor,
        plan: MicroBatchPlan,
        window: Optional[int],
        heads: Heads,
    ) -> torch.Tensor:
        """d_qkv from d_out; see `attention.attend_backward`."""
        return attend_backward(d_out, out, qkv, tiles(plan, window), heads)

    def gate(self, gate_up: torch.Tensor, activation: Activation, out: torch.Tensor) -> None:
        """out = act(gate) * up, computed in the accumulate dtype.

        Args: gate_up (n, 2F) and out (n, F), in the compute dtype.
        """
        gate, up = gate_up.to(accumulate_dtype(out.dtype)).chunk(2, dim=1)
        out.copy_(activation.value(gate) * up)

    def gate_backward(
        self, d_out: torch.Tensor, gate_up: torch.Tensor, activation: Activation, d_gate_up: torch.Tensor
    ) -> None:
        """d_gate = act'(gate) * up * d_out, d_up = act(gate) * d_out; written side by side into d_gate_up (n, 2F)."""
        dtype = accumulate_dtype(d_out.dtype)
        gate, up = gate_up.to(dtype).chunk(2, dim=1)
        d_out = d_out.to(dtype)
        width = gate.shape[1]
        d_gate_up[:, width:] = activation.value(gate) * d_out
        d_gate_up[:, :width] = activation.gradient(d_out * up, gate)

    def lora_down(
        self,
        x: torch.Tensor,
        down: torch.Tensor,
        modules: list[LoraModule],
        dropout: Optional[DropoutMask],
        out: torch.Tensor,
    ) -> None:
        """u_s = (x * keep_s) A_s^T for each LoRA module s: x (n, K), down = stacked A (R, K), out (n, R).

        The factor 1 / (1 - p) of dropout is part of c B in the merged matrix, so masks are zeros and ones.
        """
        if dropout is None:
            torch.mm(x, down.t().to(x.dtype), out=out)
            return
        for module in modules:
            keep = _keep(dropout, module, x)
            out[:, module.ranks] = (x * keep) @ down[module.ranks].t().to(x.dtype)

    def lora_down_backward(
        self,
        x: torch.Tensor,
        d_u: torch.Tensor,
        down: torch.Tensor,
        modules: list[LoraModule],
        dropout: Optional[DropoutMask],
        d_x: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """Returns d_A = d_u^T (x * keep), stacked (R, K), accumulate dtype; d_x += (d_u A) * keep unless it is None."""
        dtype = x.dtype
        if dropout is None:
            if d_x is not None:
                d_x.addmm_(d_u, down.to(dtype))
            return (d_u.t() @ x).to(accumulate_dtype(dtype))
        d_down = torch.empty_like(down, dtype=accumulate_dtype(dtype))
        for module in modules:
            keep = _keep(dropout, module, x)
            d_down[module.ranks] = (d_u[:, module.ranks].t() @ (x * keep)).to(d_down.dtype)
            if d_x is not None:
                d_x += (d_u[:, module.ranks] @ down[module.ranks].to(dtype)) * keep
        return d_down

    def lora_up_backward(self, u: torch.Tensor, d_y: torch.Tensor, modules: list[LoraModule]) -> torch.Tensor:
        """u_s^T d_y_s of each LoRA module s in its own block (ranks, outputs) of (R, N); the rest is undefined.

        Args: u (n, R); d_y (n, N). Returns: accumulate dtype.
        """
        # One matmul computes the unused blocks too: cheaper than many small matmuls.
        return (u.t() @ d_y).to(accumulate_dtype(u.dtype))

    def copy_matrices(
        self, sources: list[torch.Tensor], targets: list[torch.Tensor], factors: list[float], accumulate: bool
    ) -> None:
        """targets[i] = factors[i] * sources[i], or += with `accumulate`: A, B and their gradients to and from PEFT.

        Source and target have equal shapes; sources are in the accumulate dtype and may be strided.
        """
        scaled = torch._foreach_mul(sources, factors)
        if accumulate:
            torch._foreach_add_(targets, scaled)
        else:
            torch._foreach_copy_(targets, scaled)

    def cross_entropy(
        self,
        logits: torch.Tensor,
        counts: torch.Tensor,
        slots: torch.Tensor,
        labels: torch.Tensor,
        scale: Optional[float],
    ) -> float:
        """Sum over pairs (slot i, label y) of logsumexp(logits_i) - logits_iy, in nats.

        With a scale, logits (L, V) are replaced by their gradient:
        d_logits_i = scale * (count_i * softmax(logits_i) - sum of the one-hots of its labels).
        """
        log_p = torch.log_softmax(logits.to(accumulate_dtype(logits.dtype)), dim=-1)
        loss = -float(log_p[slots, labels].sum())
        if scale is not None:
            log_p.exp_().mul_(counts.to(log_p.dtype)[:, None])
            log_p.index_put_((slots, labels), log_p.new_tensor(-1.0), accumulate=True)
            torch.mul(log_p, scale, out=log_p)
            logits.copy_(log_p)
        return loss


def _keep(dropout: DropoutMask, module: LoraModule, x: torch.Tensor) -> torch.Tensor:
    """Dropout mask of a LoRA module for x (n, K)."""
    key = dropout.key(module.number)
    return keep_mask(key, dropout.threshold, dropout.row0, (x.shape[0], x.shape[1]), x.device)
