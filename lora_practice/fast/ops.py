"""The small pieces between the matrix products: RMSNorm, rotation, gated activation, LoRA's down projection, loss.

`Plain` spells each in torch and is the specification; `native.Native` overrides some with compiled kernels.
Every piece has a forward and a hand-written backward; there is no autograd. Names: d_x is the gradient of the
loss with respect to x. n rows, K input width, R stacked LoRA ranks of a group of linears that read the same input.
Residual stream, norms, softmax and loss are `wide` (float32; float64 in tests); matrix operands are in the
compute dtype (`narrow`: bfloat16, float16 or the wide one).
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F

from lora_practice.fast.attention import Heads, attend, attend_backward
from lora_practice.fast.attention_tiles import tiles
from lora_practice.fast.dropout import DropoutMask, keep_mask
from lora_practice.fast.step_plan import MicroBatchPlan


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


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where everything is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Plain:
    """Torch spelling of every piece."""

    name = "torch"
    logits_in_place = False  # cross_entropy makes wide copies of 16-bit logits

    def norm(self, h: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
        """RMSNorm: out = h * rstd * weight, rstd = 1 / sqrt(mean(h^2) + eps).

        Args: h (n, K) wide; weight (K,) wide; out (n, K) narrow, written. Returns rstd (n, 1).
        """
        rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        out.copy_(h * rstd * weight)
        return rstd

    def norm_again(self, h: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, out: torch.Tensor) -> None:
        """The norm's output once more from the saved rstd, for the backward pass."""
        out.copy_(h * rstd * weight)

    def norm_backward(
        self,
        d_out: torch.Tensor,
        h: torch.Tensor,
        weight: torch.Tensor,
        rstd: torch.Tensor,
        d_h: torch.Tensor,
    ) -> None:
        """d_h += rstd * (g - x * mean(g * x)) with x = h * rstd, g = d_out * weight (in place)."""
        x = h * rstd
        g = d_out.to(h.dtype) * weight
        d_h += rstd * (g - x * (g * x).mean(-1, keepdim=True))

    def rotate(self, x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> None:
        """Rotary embedding on the first `heads` heads of x (n, heads * D or more), in place, wide.

        With halves (a, b) of a head: (a cos - b sin, b cos + a sin). The backward is the transpose: sign = -1.
        cos, sin (n, D / 2).
        """
        half = cos.shape[1]
        pairs = x[:, : heads * 2 * half].unflatten(1, (heads, 2, half))
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        c, s = cos[:, None], sin[:, None] * sign
        rotated = torch.stack((a * c - b * s, b * c + a * s), dim=2)
        pairs.copy_(rotated)

    def attend(
        self, qkv: torch.Tensor, plan: MicroBatchPlan, window: Optional[int], heads: Heads, out: torch.Tensor
    ) -> None:
        """See attention.attend."""
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
        """See attention.attend_backward."""
        return attend_backward(d_out, out, qkv, tiles(plan, window), heads)

    def gate(self, gate_up: torch.Tensor, activation: Activation, out: torch.Tensor) -> None:
        """out = act(gate) * up; gate_up (n, 2F) narrow, out (n, F) narrow, computed wide."""
        gate, up = gate_up.to(wide_of(out.dtype)).chunk(2, dim=1)
        out.copy_(activation.value(gate) * up)

    def gate_backward(
        self, d_out: torch.Tensor, gate_up: torch.Tensor, activation: Activation, d_gate_up: torch.Tensor
    ) -> None:
        """d_gate = act'(gate) * up * d_out, d_up = act(gate) * d_out; written side by side into d_gate_up (n, 2F)."""
        wide = wide_of(d_out.dtype)
        gate, up = gate_up.to(wide).chunk(2, dim=1)
        d_out = d_out.to(wide)
        width = gate.shape[1]
        d_gate_up[:, width:] = activation.value(gate) * d_out
        d_gate_up[:, :width] = activation.gradient(d_out * up, gate)

    def lora_down(
        self, x: torch.Tensor, down: torch.Tensor, sites: list, noise: DropoutMask | None, out: torch.Tensor
    ) -> None:
        """u_s = (x * keep_s) A_s^T for each site s: x (n, K), down = stacked A (R, K), out (n, R).

        The factor 1 / (1 - p) of dropout sits in the up matrix, so masks are plain zeros and ones.
        """
        if noise is None:
            torch.mm(x, down.t().to(x.dtype), out=out)
            return
        for site in sites:
            keep = keep_mask(noise.key(site.number), noise.threshold, noise.row0, (x.shape[0], x.shape[1]), x.device)
            out[:, site.ranks] = (x * keep) @ down[site.ranks].t().to(x.dtype)

    def lora_down_backward(
        self,
        x: torch.Tensor,
        d_u: torch.Tensor,
        down: torch.Tensor,
        sites: list,
        noise: DropoutMask | None,
        d_x: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns d_A = d_u^T (x * keep), stacked (R, K) wide; d_x += (d_u A) * keep in place unless it is None."""
        narrow = x.dtype
        if noise is None:
            if d_x is not None:
                d_x.addmm_(d_u, down.to(narrow))
            return (d_u.t() @ x).to(wide_of(narrow))
        d_down = torch.empty_like(down, dtype=wide_of(narrow))
        for site in sites:
            keep = keep_mask(noise.key(site.number), noise.threshold, noise.row0, (x.shape[0], x.shape[1]), x.device)
            d_down[site.ranks] = (d_u[:, site.ranks].t() @ (x * keep)).to(d_down.dtype)
            if d_x is not None:
                d_x += (d_u[:, site.ranks] @ down[site.ranks].to(narrow)) * keep
        return d_down

    def lora_up_backward(self, u: torch.Tensor, d_y: torch.Tensor, sites: list) -> torch.Tensor:
        """d_y_s^T u_s of each site s, at its ranks and outputs in (R, N) wide; the rest is undefined.

        Args: u (n, R); d_y (n, N).
        """
        # the blocks between two sites are computed too: cheaper than many small products
        return (u.t() @ d_y).to(wide_of(u.dtype))

    def move(self, sources: list[torch.Tensor], targets: list[torch.Tensor], factors: list[float], add: bool) -> None:
        """targets[i] = factors[i] * sources[i], or += with `add`: matrices of equal shapes; wide, strided sources."""
        scaled = torch._foreach_mul(sources, factors)
        if add:
            torch._foreach_add_(targets, scaled)
        else:
            torch._foreach_copy_(targets, scaled)

    def cross_entropy(
        self,
        logits: torch.Tensor,
        counts: torch.Tensor,
        slots: torch.Tensor,
        labels: torch.Tensor,
        scale: float | None,
    ) -> float:
        """Sum over pairs (slot i, label y) of logsumexp(logits_i) - logits_iy, in nats.

        With a scale, logits (L, V) become their own gradient in place:
        d_logits_i = scale * (count_i * softmax(logits_i) - sum of the one-hots of its labels).
        """
        log_p = torch.log_softmax(logits.to(wide_of(logits.dtype)), dim=-1)
        loss = -float(log_p[slots, labels].sum())
        if scale is not None:
            log_p.exp_().mul_(counts.to(log_p.dtype)[:, None])
            log_p.index_put_((slots, labels), log_p.new_tensor(-1.0), accumulate=True)
            torch.mul(log_p, scale, out=log_p)
            logits.copy_(log_p)
        return loss
