"""The whole step: examples in, loss out, gradients added to PEFT's own LoRA parameters. No autograd."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Callable, Optional, TypeVar, cast

import torch

from lora_practice.fast.buffers import Buffers, return_freed_memory
from lora_practice.fast.dropout import DropoutMask
from lora_practice.fast.kernels import native
from lora_practice.fast.layer import Pass
from lora_practice.fast.lora_linear import LoraWeights
from lora_practice.fast.loss import head_loss
from lora_practice.fast.matmul import ROW_STEP
from lora_practice.fast.ops import Plain, wide_of
from lora_practice.fast.step_plan import IdsAndLabels, MicroBatchPlan, count_labels, plan_step
from lora_practice.fast.weights import Weights, give_back, read_weights

# A processor is busy with 300 rows, and in fp32 takes about plain TRL's memory with them; 16-bit rows take two thirds,
# and each more micro-batch reads all weights once more. A card waits for work: more at once.
WIDE_ROWS, NARROW_ROWS, CARD_ROWS = 288, 512, 2048


def build(
    peft_model: Any,
    compute_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    token_budget: Optional[int] = None,
    share_prefix: bool = True,
    kernels: bool = True,
) -> Engine:
    """An engine for a PeftModel.

    Args:
        peft_model: its weights stay where they are; see `weights`.
        compute_dtype: of the matrix products. A base in the same dtype is shared, else copied once.
        seed: of the dropout masks.
        token_budget: rows computed at once, at most; bounds memory. None: as above; 0: a whole step at once.
        share_prefix: compute a beginning that several examples of a step share only once.
        kernels: use the compiled kernels where a compiler is at hand.

    Raises:
        NotServed: the model, adapter or setting is not known here; train on the plain path.
    """
    weights = read_weights(peft_model, compute_dtype)
    device = weights.embedding.device
    ops = native.load_kernels(compute_dtype, device) if kernels else Plain()
    if token_budget is None:
        on_cpu = WIDE_ROWS if compute_dtype == wide_of(compute_dtype) else NARROW_ROWS
        token_budget = on_cpu if device.type == "cpu" else CARD_ROWS
    return Engine(weights, compute_dtype, seed, token_budget, share_prefix, ops)


Method = TypeVar("Method", bound=Callable[..., Any])


def _by_hand(method: Method) -> Method:
    """Without autograd and without autocast, whoever calls: what is kept, and in which dtype, is written here."""

    @functools.wraps(method)
    def run(self: Engine, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch.autocast(self.weights.embedding.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast(Method, run)


class Engine:
    """Forward and backward of one model. `step` counts optimizer steps and names the dropout masks."""

    def __init__(
        self,
        weights: Weights,
        dtype: torch.dtype,
        seed: int,
        token_budget: int,
        share_prefix: bool,
        ops: Plain,
    ) -> None:
        self.weights, self.dtype, self.ops = weights, dtype, ops
        self.seed, self.step = seed, 0
        self.share_prefix = share_prefix
        self.bound(token_budget)
        self.lora = LoraWeights([group for layer in weights.layers for group in layer.groups], ops)

    def bound(self, token_budget: int, checkpointing: bool = False) -> None:
        """Between steps: rows computed at once; with `checkpointing` layers keep a tenth and compute forward twice."""
        self.token_budget, self.checkpointing = token_budget, checkpointing
        self.space = Buffers(token_budget + ROW_STEP)

    @_by_hand
    def step_loss_and_backward(
        self, examples: Sequence[IdsAndLabels], num_items: Optional[int] = None, loss_scale: float = 1.0
    ) -> float:
        """Add the gradients of loss_scale * (sum of token losses) / num_items to .grad of every LoRA parameter.

        Args:
            examples: (input_ids, labels) pairs of one optimizer step, labels unshifted, -100 = not trained.
            num_items: divisor; None: the number of trained tokens of these examples.
            loss_scale: for fp16 gradient scaling.

        Returns: sum of token losses / num_items, in nats, without loss_scale.
        """
        num_items = count_labels(examples) if num_items is None else num_items
        threshold = self.weights.threshold
        noise = DropoutMask(self.seed, self.step, threshold) if threshold else None
        keep_rate = noise.keep_rate if noise else 1.0
        self.lora.take(keep_rate)
        total = 0.0
        for plan in plan_step(examples, self.token_budget or None, self.share_prefix):
            total += self._forward_backward(plan, noise, loss_scale / num_items)
            noise = noise and noise._replace(row0=noise.row0 + plan.rows)
        self.lora.give(keep_rate)
        return_freed_memory()
        self.step += 1
        return total / max(num_items, 1)

    @_by_hand
    def eval_loss(self, examples: Sequence[IdsAndLabels]) -> float:
        """Mean loss per trained token, in nats, without dropout and without gradients."""
        self.lora.take(1.0)
        total = 0.0
        for plan in plan_step(examples, self.token_budget or None, self.share_prefix):
            now = self._pass(plan, None, backward=False)
            h = self._embed(now.plan)
            for layer in self.weights.layers:
                h, _ = layer.forward(h, now)
            total += self._loss(h, now, None)[0]
        return total / max(count_labels(examples), 1)

    def state_dict(self) -> dict[str, int]:
        """The place in the stream of dropout masks."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.step = state["seed"], state["step"]

    def close(self) -> None:
        """Give the model's weights storage of their own again, for saving or merging the base."""
        give_back(self.weights.moved)

    def _pass(self, plan: MicroBatchPlan, noise: Optional[DropoutMask], backward: bool = True) -> Pass:
        device = self.weights.embedding.device
        plan = plan.padded(ROW_STEP)
        plan = plan if device.type == "cpu" else plan.to(device)
        wide = torch.empty(0, dtype=wide_of(self.dtype), device=device)
        cos, sin = self.weights.rotary(wide, plan.positions[None])
        half = cos.shape[-1] // 2
        cos, sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return Pass(plan, cos, sin, noise, self.ops, self.space, backward)

    def _embed(self, plan: MicroBatchPlan) -> torch.Tensor:
        h = self.weights.embedding[plan.ids].to(wide_of(self.dtype))
        return h * self.weights.embedding_scale if self.weights.embedding_scale != 1.0 else h

    def _loss(self, h: torch.Tensor, now: Pass, scale: Optional[float]) -> tuple[float, Optional[torch.Tensor]]:
        """(summed loss, d_h (n, K) wide or None)."""
        weights, rows = self.weights, now.plan.label_rows
        labelled = h[rows]
        x = torch.empty(labelled.shape, dtype=self.dtype, device=h.device)
        rstd = now.ops.norm(labelled, weights.final_norm, weights.eps, x)
        total, d_x = head_loss(x, weights.head, now.plan, scale, now.ops, now.space)
        if d_x is None:
            return total, None
        d_labelled = torch.zeros_like(labelled)
        now.ops.norm_backward(d_x, labelled, weights.final_norm, rstd, d_labelled)
        d_h = torch.zeros_like(h)
        d_h[rows] = d_labelled
        return total, d_h

    def _forward_backward(self, plan: MicroBatchPlan, noise: Optional[DropoutMask], scale: float) -> float:
        now = self._pass(plan, noise, backward=not self.checkpointing)  # checkpointing: layers share their buffers
        saved: list[Any] = []  # a Saved for each layer; with checkpointing only its input, (n, K) wide
        h = self._embed(now.plan)
        for layer in self.weights.layers:
            below = h.clone() if self.checkpointing else None
            h, kept = layer.forward(h, now)
            saved.append(kept if below is None else below)
        total, d_h = self._loss(h, now, scale)
        assert d_h is not None
        for index in range(len(saved) - 1, -1, -1):
            layer, kept = self.weights.layers[index], saved.pop()
            if self.checkpointing:  # bit for bit the same: masks are functions, not streams
                kept = layer.forward(kept, now)[1]
            d_h = layer.backward(d_h, kept, now, need_d_h=index > 0)
        return total
