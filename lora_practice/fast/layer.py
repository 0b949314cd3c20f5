"""One decoder layer (Llama, Mistral, Qwen2, Qwen3, Gemma), forward and backward written by hand.

    x1 = norm1(h)            [q|k|v] = x1 W^T (+ LoRA)     q, k: QK norm (Qwen3), then RoPE
    h2 = h + O W_o^T         O = attention(q, k, v)
    x2 = norm2(h2)           [gate|up] = x2 W^T            h3 = h2 + (act(gate) * up) W_d^T

Saved per row: h, h2, O, q|k|v after RoPE, gate|up and the small u of each LoRA. Norm outputs, activations, softmax and
dropout masks are recomputed in the backward pass, which goes through the same lines in reverse (f' is the backward of
f; that of a group of linears also adds its LoRA gradients, see lora_linear.py):

    d_h2 = d_h3 + norm2'([gate|up]'(gate'(down'(d_h3))))
    d_h  = d_h2 + norm1'([q|k|v]'(qk_norm'(rope'(attention'(out'(d_h2))))))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch

from lora_practice.fast.attention import Heads
from lora_practice.fast.buffers import Buffers
from lora_practice.fast.dropout import DropoutMask
from lora_practice.fast.lora_linear import LinearGroup
from lora_practice.fast.ops import Activation, TorchOps, accumulate_dtype
from lora_practice.fast.step_plan import MicroBatchPlan


class QKNorm(NamedTuple):
    """Qwen3's RMSNorm over each head of q and k, before RoPE."""

    q_weight: torch.Tensor  # (D,)
    k_weight: torch.Tensor  # (D,)
    eps: float


class PassContext(NamedTuple):
    """Inputs common to all layers in the pass of one micro-batch."""

    plan: MicroBatchPlan
    cos: torch.Tensor  # (n, D / 2)
    sin: torch.Tensor
    dropout: Optional[DropoutMask]
    ops: TorchOps
    buffers: Buffers
    keep_activations: bool  # False: layers share buffers; a layer's backward must directly follow its own forward


class SavedActivations(NamedTuple):
    """Tensors of one layer that its backward pass reads; names as in the formulas above."""

    h: torch.Tensor
    rstd1: torch.Tensor
    u_qkv: torch.Tensor
    raw_qk: Optional[torch.Tensor]  # q|k before QK norm
    qkv: torch.Tensor
    o: torch.Tensor
    u_o: torch.Tensor
    h2: torch.Tensor
    rstd2: torch.Tensor
    u_gate_up: torch.Tensor
    gate_up: torch.Tensor
    u_down: torch.Tensor


@dataclass
class Layer:
    """Frozen weights and LoRA of one decoder layer."""

    qkv: LinearGroup
    out: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup
    norm1: torch.Tensor  # (K,) accumulate dtype
    norm2: torch.Tensor
    eps: float
    heads: Heads
    activation: Activation
    qk_norm: Optional[QKNorm] = None
    window: Optional[int] = None  # sliding window in tokens; None: full attention
    index: int = 0

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return (self.qkv, self.out, self.gate_up, self.down)

    def forward(self, h: torch.Tensor, context: PassContext) -> tuple[torch.Tensor, SavedActivations]:
        """(h3, saved activations) from h; h and h3 (n, K) in the accumulate dtype."""
        ops = context.ops
        xu = self._input_buffer(self.qkv, context)
        rstd1 = ops.norm(h, self.norm1, self.eps, xu[:, : self.qkv.width])
        qkv, u_qkv, raw_qk = self._project_qkv(xu, context)
        ou = self._saved_buffer("o", self.out.width + self.out.rank, self.out.matrix.dtype, context)
        o = ou[:, : self.out.width]
        ops.attend(qkv, context.plan, self.window, self.heads, o)
        h2, u_o = self._add_to_residual("h2", h, self.out, ou, context)
        xu = self._input_buffer(self.gate_up, context)
        rstd2 = ops.norm(h2, self.norm2, self.eps, xu[:, : self.gate_up.width])
        gate_up = self._saved_buffer("gate_up", self.gate_up.matrix.shape[0], xu.dtype, context)
        y, u_gate_up = self.gate_up.forward(xu, context.dropout, ops, gate_up)
        if y is not gate_up:
            gate_up.copy_(y)
        au = self._input_buffer(self.down, context)
        ops.gate(gate_up, self.activation, au[:, : self.down.width])
        h3, u_down = self._add_to_residual("h3", h2, self.down, au, context)
        saved = SavedActivations(h, rstd1, u_qkv, raw_qk, qkv, o, u_o, h2, rstd2, u_gate_up, gate_up, u_down)
        return h3, saved

    def _saved_buffer(
        self, name: str, width: int, dtype: torch.dtype, context: PassContext, extra_rows: int = 0
    ) -> torch.Tensor:
        """(n + extra_rows, width), owned by this layer until its backward pass is done."""
        owner = self.index if context.keep_activations else -1
        return context.buffers.rows((name, owner), context.plan.rows + extra_rows, width, dtype, context.cos.device)

    @staticmethod
    def _shared_buffer(name: str, width: int, dtype: torch.dtype, context: PassContext) -> torch.Tensor:
        """(n, width), valid until the same name and width are requested again, by this layer or another one."""
        return context.buffers.rows((name, width), context.plan.rows, width, dtype, context.cos.device)

    def _input_buffer(self, group: LinearGroup, context: PassContext) -> torch.Tensor:
        """(n, K + R) input of a group: x goes into the first K columns."""
        return self._shared_buffer("xu", group.width + group.rank, group.matrix.dtype, context)

    def _group_backward(
        self, group: LinearGroup, d_y: torch.Tensor, x: torch.Tensor, u: torch.Tensor, context: PassContext
    ) -> torch.Tensor:
        """d_x (n, K), valid until the backward of the next group of this width."""
        out = self._shared_buffer("d_xu", group.width + group.rank, d_y.dtype, context)
        return group.backward(d_y, x, u, context.dropout, context.ops, out)

    def _add_to_residual(
        self, name: str, h: torch.Tensor, group: LinearGroup, xu: torch.Tensor, context: PassContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(h + group(x), u), summed in the accumulate dtype."""
        out = self._shared_buffer("y", h.shape[1], xu.dtype, context)
        y, u = group.forward(xu, context.dropout, context.ops, out)
        return torch.add(h, y, out=self._saved_buffer(name, h.shape[1], h.dtype, context)), u

    def _project_qkv(
        self, xu: torch.Tensor, context: PassContext
    ) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
        """(q|k|v (n + 1, ...) after RoPE in the accumulate dtype with a last row of zeros, u, q|k before QK norm)."""
        n, ops = xu.shape[0], context.ops
        width = self.qkv.matrix.shape[0]
        qkv = self._saved_buffer("qkv", width, accumulate_dtype(xu.dtype), context, extra_rows=1)
        qkv[n] = 0
        rows = qkv[:n]
        y, u = self.qkv.forward(xu, context.dropout, ops, self._shared_buffer("y", width, xu.dtype, context))
        rows.copy_(y)
        raw_qk = None
        if self.qk_norm is not None:
            raw_qk = rows[:, : self.heads.q_width + self.heads.kv_width].clone()
            for part, weight in self._qk_parts(rows):
                values = part.reshape(-1, self.heads.size)
                normed = torch.empty_like(values)
                ops.norm(values, weight, self.qk_norm.eps, normed)
                part.copy_(normed.view(part.shape))
        ops.rope(rows, self.heads.query + self.heads.kv, context.cos, context.sin, 1)
        return qkv, u, raw_qk

    def _qk_parts(self, qk: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(view of q, its QK norm's weight) and the same for k; qk starts with q | k."""
        assert self.qk_norm is not None
        q_width, kv_width = self.heads.q_width, self.heads.kv_width
        return [
            (qk[:, :q_width], self.qk_norm.q_weight),
            (qk[:, q_width : q_width + kv_width], self.qk_norm.k_weight),
        ]

    def backward(
        self, d_h3: torch.Tensor, saved: SavedActivations, context: PassContext, need_d_h: bool = True
    ) -> torch.Tensor:
        """d_h from d_h3 (n, K) in the accumulate dtype, in place; LoRA gradients are added to the groups.

        need_d_h=False (first layer: nothing below it is trained) skips the matmul that leads to d_h.
        """
        d_h2 = self._mlp_backward(d_h3, saved, context)
        return self._attention_backward(d_h2, saved, context, need_d_h)

    def _mlp_backward(self, d_h: torch.Tensor, saved: SavedActivations, context: PassContext) -> torch.Tensor:
        """d_h2 from d_h3, in place."""
        ops, gate_up = context.ops, saved.gate_up
        a = self._input_buffer(self.down, context)[:, : self.down.width]
        ops.gate(gate_up, self.activation, a)
        d_a = self._group_backward(self.down, d_h.to(gate_up.dtype), a, saved.u_down, context)
        d_gate_up = self._shared_buffer("d_gate_up", gate_up.shape[1], gate_up.dtype, context)
        ops.gate_backward(d_a, gate_up, self.activation, d_gate_up)
        x2 = self._input_buffer(self.gate_up, context)[:, : self.gate_up.width]
        ops.norm_from_rstd(saved.h2, self.norm2, saved.rstd2, x2)
        d_x2 = self._group_backward(self.gate_up, d_gate_up, x2, saved.u_gate_up, context)
        ops.norm_backward(d_x2, saved.h2, self.norm2, saved.rstd2, d_h)
        return d_h

    def _attention_backward(
        self, d_h: torch.Tensor, saved: SavedActivations, context: PassContext, need_d_h: bool
    ) -> torch.Tensor:
        """d_h from d_h2, in place."""
        ops, dtype = context.ops, saved.o.dtype
        n = saved.o.shape[0]
        d_o = self._group_backward(self.out, d_h.to(dtype), saved.o, saved.u_o, context)
        d_qkv = ops.attend_backward(d_o, saved.o, saved.qkv, context.plan, self.window, self.heads)[:n]
        ops.rope(d_qkv, self.heads.query + self.heads.kv, context.cos, context.sin, -1)
        if saved.raw_qk is not None:
            self._qk_norm_backward(d_qkv, saved.raw_qk, ops)
        x1 = self._input_buffer(self.qkv, context)[:, : self.qkv.width]
        ops.norm_from_rstd(saved.h, self.norm1, saved.rstd1, x1)
        if need_d_h:
            d_x1 = self._group_backward(self.qkv, d_qkv.to(dtype), x1, saved.u_qkv, context)
            ops.norm_backward(d_x1, saved.h, self.norm1, saved.rstd1, d_h)
        else:
            self.qkv.backward_lora_only(d_qkv.to(dtype), x1, saved.u_qkv, context.dropout, ops)
        return d_h

    def _qk_norm_backward(self, d_qkv: torch.Tensor, raw_qk: torch.Tensor, ops: TorchOps) -> None:
        """Gradient of the normed q and k -> gradient of the raw ones, in place."""
        assert self.qk_norm is not None
        for (d_part, weight), (raw, _) in zip(self._qk_parts(d_qkv), self._qk_parts(raw_qk)):
            d_out, values = d_part.reshape(-1, self.heads.size), raw.reshape(-1, self.heads.size)
            rstd = torch.rsqrt(values.square().mean(-1, keepdim=True) + self.qk_norm.eps)
            d_values = torch.zeros_like(values)
            ops.norm_backward(d_out, values, weight, rstd, d_values)
            d_part.copy_(d_values.view(d_part.shape))
