"""One decoder layer (Llama, Mistral, Qwen2, Qwen3, Gemma), forward and backward written by hand.

    x1 = norm1(h)            [q|k|v] = x1 W^T (+ LoRA)     q, k: head norm (Qwen3), then rotation
    h2 = h + O W_o^T         O = attention(q, k, v)
    x2 = norm2(h2)           [gate|up] = x2 W^T            h3 = h2 + (act(gate) * up) W_d^T

Saved per row: h, h2, O, rotated q|k|v, gate|up and the small u of each LoRA; norms, activation, softmax and
dropout masks are made again in the backward pass, which walks the same lines upwards (f' stands for the backward of
f; each group's also leaves its LoRA gradients, see linear.py):

    d_h2 = d_h3 + norm2'([gate|up]'(gate'(down'(d_h3))))
    d_h  = d_h2 + norm1'([q|k|v]'(head_norm'(rotation'(attention'(out'(d_h2))))))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch

from lora_practice.fast.attention import Heads
from lora_practice.fast.buffers import Buffers
from lora_practice.fast.dropout import DropoutMask
from lora_practice.fast.lora_linear import LinearGroup
from lora_practice.fast.ops import Activation, Plain, wide_of
from lora_practice.fast.step_plan import MicroBatchPlan


class QKNorm(NamedTuple):
    """Qwen3's RMSNorm over each head of q and k, before the rotation."""

    q_weight: torch.Tensor  # (D,)
    k_weight: torch.Tensor  # (D,)
    eps: float


class Pass(NamedTuple):
    """What every layer of one forward or backward pass shares."""

    plan: MicroBatchPlan
    cos: torch.Tensor  # (n, D / 2)
    sin: torch.Tensor
    noise: Optional[DropoutMask]
    ops: Plain
    space: Buffers
    backward: bool  # False: layers may forget what only their backward pass reads


class Saved(NamedTuple):
    """What a layer keeps for its backward pass."""

    h: torch.Tensor
    rstd1: torch.Tensor
    u_qkv: torch.Tensor
    raw_qk: Optional[torch.Tensor]
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
    norm1: torch.Tensor  # (K,) wide
    norm2: torch.Tensor
    eps: float
    heads: Heads
    activation: Activation
    head_norm: Optional[QKNorm] = None
    window: Optional[int] = None
    index: int = 0

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return (self.qkv, self.out, self.gate_up, self.down)

    def forward(self, h: torch.Tensor, now: Pass) -> tuple[torch.Tensor, Saved]:
        """h (n, K) wide -> (h3, saved)."""
        xu = self._input(self.qkv, now)
        rstd1 = now.ops.norm(h, self.norm1, self.eps, xu[:, : self.qkv.width])
        qkv, u_qkv, raw_qk = self._project(xu, now)
        ou = self._kept("o", self.out.width + self.out.rank, self.out.matrix.dtype, now)
        o = ou[:, : self.out.width]
        now.ops.attend(qkv, now.plan, self.window, self.heads, o)
        h2, u_o = self._add_product("h2", h, self.out, ou, now)
        xu = self._input(self.gate_up, now)
        rstd2 = now.ops.norm(h2, self.norm2, self.eps, xu[:, : self.gate_up.width])
        gate_up = self._kept("gate_up", self.gate_up.matrix.shape[0], xu.dtype, now)
        y, u_gate_up = self.gate_up.forward(xu, now.noise, now.ops, gate_up)
        if y is not gate_up:
            gate_up.copy_(y)
        au = self._input(self.down, now)
        now.ops.gate(gate_up, self.activation, au[:, : self.down.width])
        h3, u_down = self._add_product("h3", h2, self.down, au, now)
        saved = Saved(h, rstd1, u_qkv, raw_qk, qkv, o, u_o, h2, rstd2, u_gate_up, gate_up, u_down)
        return h3, saved

    def _kept(self, name: str, width: int, dtype: torch.dtype, now: Pass, more: int = 0) -> torch.Tensor:
        """(n + more, width) of this layer, untouched until its backward pass is done."""
        place = self.index if now.backward else -1
        return now.space.rows((name, place), now.plan.rows + more, width, dtype, now.cos.device)

    @staticmethod
    def _passing(name: str, width: int, dtype: torch.dtype, now: Pass) -> torch.Tensor:
        """(n, width), good until this name and width are asked for again, in this layer or the next."""
        return now.space.rows((name, width), now.plan.rows, width, dtype, now.cos.device)

    def _input(self, group: LinearGroup, now: Pass) -> torch.Tensor:
        """(n, K + R) to be filled: x in the first K columns."""
        return self._passing("xu", group.width + group.rank, group.matrix.dtype, now)

    def _back(self, group: LinearGroup, d_y: torch.Tensor, x: torch.Tensor, u: torch.Tensor, now: Pass) -> torch.Tensor:
        """d_x (n, K), good until the next group of this width goes back."""
        out = self._passing("d_xu", group.width + group.rank, d_y.dtype, now)
        return group.backward(d_y, x, u, now.noise, now.ops, out)

    def _add_product(
        self, name: str, h: torch.Tensor, group: LinearGroup, xu: torch.Tensor, now: Pass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(h + group(x), u): the residual sum is wide."""
        y, u = group.forward(xu, now.noise, now.ops, self._passing("y", h.shape[1], xu.dtype, now))
        return torch.add(h, y, out=self._kept(name, h.shape[1], h.dtype, now)), u

    def _project(self, xu: torch.Tensor, now: Pass) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
        """(rotated q|k|v (n + 1, ...) wide with a zero row at the end, u, q|k before the head norm if any)."""
        n = xu.shape[0]
        qkv = self._kept("qkv", self.qkv.matrix.shape[0], wide_of(xu.dtype), now, more=1)
        qkv[n] = 0
        rows = qkv[:n]
        y, u = self.qkv.forward(xu, now.noise, now.ops, self._passing("y", rows.shape[1], xu.dtype, now))
        rows.copy_(y)
        raw_qk = None
        if self.head_norm is not None:
            raw_qk = rows[:, : self.heads.q_width + self.heads.kv_width].clone()
            for part, weight in self._head_parts(rows):
                values = part.reshape(-1, self.heads.size)
                normed = torch.empty_like(values)
                now.ops.norm(values, weight, self.head_norm.eps, normed)
                part.copy_(normed.view(part.shape))
        now.ops.rotate(rows, self.heads.query + self.heads.shared, now.cos, now.sin, 1)
        return qkv, u, raw_qk

    def _head_parts(self, qk: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(view of q or k, its head norm's weight); qk starts with q | k."""
        assert self.head_norm is not None
        q_width, kv_width = self.heads.q_width, self.heads.kv_width
        return [
            (qk[:, :q_width], self.head_norm.q_weight),
            (qk[:, q_width : q_width + kv_width], self.head_norm.k_weight),
        ]

    def backward(self, d_h3: torch.Tensor, saved: Saved, now: Pass, need_d_h: bool = True) -> torch.Tensor:
        """d_h3 (n, K) wide, used up and returned as d_h; LoRA gradients are added on the way.

        need_d_h=False (first layer: nothing below it trains) saves the product that leads to d_h.
        """
        d_h2 = self._mlp_backward(d_h3, saved, now)
        return self._attention_backward(d_h2, saved, now, need_d_h)

    def _mlp_backward(self, d_h: torch.Tensor, saved: Saved, now: Pass) -> torch.Tensor:
        ops, gate_up = now.ops, saved.gate_up
        narrow = gate_up.dtype
        a = self._input(self.down, now)[:, : self.down.width]
        ops.gate(gate_up, self.activation, a)
        d_a = self._back(self.down, d_h.to(narrow), a, saved.u_down, now)
        d_gate_up = self._passing("d_gate_up", gate_up.shape[1], narrow, now)
        ops.gate_backward(d_a, gate_up, self.activation, d_gate_up)
        x2 = self._input(self.gate_up, now)[:, : self.gate_up.width]
        ops.norm_again(saved.h2, self.norm2, saved.rstd2, x2)
        d_x2 = self._back(self.gate_up, d_gate_up, x2, saved.u_gate_up, now)
        ops.norm_backward(d_x2, saved.h2, self.norm2, saved.rstd2, d_h)
        return d_h

    def _attention_backward(self, d_h: torch.Tensor, saved: Saved, now: Pass, need_d_h: bool) -> torch.Tensor:
        ops, noise = now.ops, now.noise
        n, narrow = saved.o.shape[0], saved.o.dtype
        d_o = self._back(self.out, d_h.to(narrow), saved.o, saved.u_o, now)
        d_qkv = ops.attend_backward(d_o, saved.o, saved.qkv, now.plan, self.window, self.heads)[:n]
        ops.rotate(d_qkv, self.heads.query + self.heads.shared, now.cos, now.sin, -1)
        if saved.raw_qk is not None:
            self._head_norm_backward(d_qkv, saved.raw_qk, ops)
        x1 = self._input(self.qkv, now)[:, : self.qkv.width]
        ops.norm_again(saved.h, self.norm1, saved.rstd1, x1)
        if need_d_h:
            d_x1 = self._back(self.qkv, d_qkv.to(narrow), x1, saved.u_qkv, now)
            ops.norm_backward(d_x1, saved.h, self.norm1, saved.rstd1, d_h)
        else:
            self.qkv.backward_last(d_qkv.to(narrow), x1, saved.u_qkv, noise, ops)
        return d_h

    def _head_norm_backward(self, d_qkv: torch.Tensor, raw_qk: torch.Tensor, ops: Plain) -> None:
        """d of the normed heads -> d of the raw heads, in place."""
        assert self.head_norm is not None
        for (d_part, weight), (raw, _) in zip(self._head_parts(d_qkv), self._head_parts(raw_qk)):
            d_out, values = d_part.reshape(-1, self.heads.size), raw.reshape(-1, self.heads.size)
            rstd = torch.rsqrt(values.square().mean(-1, keepdim=True) + self.head_norm.eps)
            d_values = torch.zeros_like(values)
            ops.norm_backward(d_out, values, weight, rstd, d_values)
            d_part.copy_(d_values.view(d_part.shape))
