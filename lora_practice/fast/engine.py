"""One optimizer step: examples in, loss out, gradients added to PEFT's own LoRA parameters, without autograd."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Callable, Optional, TypeVar, cast

import torch

from lora_practice.fast.buffers import Buffers, return_freed_memory
from lora_practice.fast.dropout import DropoutMask
from lora_practice.fast.kernels import native
from lora_practice.fast.layer import PassContext, SavedActivations
from lora_practice.fast.lora_linear import LoraWeights
from lora_practice.fast.loss import head_loss
from lora_practice.fast.matmul import ROW_STEP
from lora_practice.fast.ops import TorchOps, accumulate_dtype
from lora_practice.fast.step_plan import IdsAndLabels, MicroBatchPlan, count_labels, plan_step
from lora_practice.fast.weights import Weights, read_weights, restore_storage

# Default token budgets. 300 positions keep a CPU busy, and in fp32 take about as much memory as plain TRL. In 16 bits
# they take two thirds of that, and each further micro-batch reads all weights once more. A GPU needs larger matmuls.
CPU_BUDGET_FP32, CPU_BUDGET_16_BIT, GPU_BUDGET = 288, 512, 2048


def build(
    peft_model: Any,
    compute_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    token_budget: Optional[int] = None,
    share_prefix: bool = True,
    kernels: bool = True,
) -> Engine:
    """Engine for a PeftModel.

    Args:
        peft_model: read by `weights.read_weights`, which shares its tensors.
        compute_dtype: dtype of the matmuls. Base weights in the same dtype are shared, others are copied once.
        seed: seed of the dropout masks.
        token_budget: token positions computed at once, at most. None: the defaults above; 0: a whole step at once.
        share_prefix: compute a beginning that several examples of a step share only once.
        kernels: use compiled kernels where there is a compiler.

    Raises:
        NotServed: the fast path does not support the model, adapter or setting; train on the plain path.
    """
    weights = read_weights(peft_model, compute_dtype)
    device = weights.embedding.device
    ops = native.load_kernels(compute_dtype, device) if kernels else TorchOps()
    if token_budget is None:
        is_16_bit = compute_dtype != accumulate_dtype(compute_dtype)
        token_budget = GPU_BUDGET if device.type != "cpu" else CPU_BUDGET_16_BIT if is_16_bit else CPU_BUDGET_FP32
    return Engine(weights, compute_dtype, seed, token_budget, share_prefix, ops)


Method = TypeVar("Method", bound=Callable[..., Any])


def _without_autograd(method: Method) -> Method:
    """Run an Engine method without autograd and autocast, whatever its caller has switched on."""

    @functools.wraps(method)
    def run(self: Engine, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), torch.autocast(self.weights.embedding.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast(Method, run)


class Engine:
    """Forward and backward of one model. `step` counts optimizer steps and selects the dropout masks."""

    def __init__(
        self,
        weights: Weights,
        dtype: torch.dtype,
        seed: int,
        token_budget: int,
        share_prefix: bool,
        ops: TorchOps,
    ) -> None:
        self.weights, self.dtype, self.ops = weights, dtype, ops
        self.seed, self.step = seed, 0
        self.share_prefix = share_prefix
        self.limit_memory(token_budget)
        self.lora = LoraWeights([group for layer in weights.layers for group in layer.groups], ops)

    def limit_memory(self, token_budget: int, checkpointing: bool = False) -> None:
        """Set the token positions computed at once, between steps. Buffers are reallocated.

        checkpointing: save only each layer's input, a tenth of its activations, and compute its forward pass twice.
        """
        self.token_budget, self.checkpointing = token_budget, checkpointing
        self.buffers = Buffers(token_budget + ROW_STEP)

    @_without_autograd
    def step_loss_and_backward(
        self, examples: Sequence[IdsAndLabels], num_items: Optional[int] = None, loss_scale: float = 1.0
    ) -> float:
        """Add the gradients of loss_scale * (sum of token losses) / num_items to .grad of every LoRA parameter.

        Args:
            examples: (input_ids, labels) pairs of one optimizer step, labels not shifted, -100 = not trained.
            num_items: divisor; None: the number of trained tokens of these examples.
            loss_scale: for fp16 gradient scaling.

        Returns: sum of token losses / num_items, in nats, without loss_scale.
        """
        num_items = count_labels(examples) if num_items is None else num_items
        threshold = self.weights.threshold
        dropout = DropoutMask(self.seed, self.step, threshold) if threshold else None
        keep_rate = dropout.keep_rate if dropout else 1.0
        self.lora.load_from_peft(keep_rate)
        total = 0.0
        for plan in plan_step(examples, self.token_budget or None, self.share_prefix):
            total += self._forward_backward(plan, dropout, loss_scale / num_items)
            dropout = dropout and dropout._replace(row0=dropout.row0 + plan.rows)
        self.lora.add_gradients_to_peft(keep_rate)
        return_freed_memory()
        self.step += 1
        return total / max(num_items, 1)

    @_without_autograd
    def eval_loss(self, examples: Sequence[IdsAndLabels]) -> float:
        """Mean loss per trained token, in nats, without dropout and without gradients."""
        self.lora.load_from_peft(1.0)
        total = 0.0
        for plan in plan_step(examples, self.token_budget or None, self.share_prefix):
            context = self._context(plan, None, keep_activations=False)
            h = self._embed(context.plan)
            for layer in self.weights.layers:
                h, _ = layer.forward(h, context)
            total += self._loss(h, context, None)[0]
        return total / max(count_labels(examples), 1)

    def state_dict(self) -> dict[str, int]:
        """Seed and step, which determine the dropout masks of all further steps."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.step = state["seed"], state["step"]

    def close(self) -> None:
        """Give the model's weights contiguous storage of their own again, to save or merge the base."""
        restore_storage(self.weights.merged_views)

    def _context(self, plan: MicroBatchPlan, dropout: Optional[DropoutMask], keep_activations: bool) -> PassContext:
        """Inputs of the layers for one micro-batch: its padded plan on the device, RoPE tables, dropout, buffers."""
        device = self.weights.embedding.device
        plan = plan.padded(ROW_STEP)
        plan = plan if device.type == "cpu" else plan.to(device)
        like = torch.empty(0, dtype=accumulate_dtype(self.dtype), device=device)  # the rotary module reads its dtype
        cos, sin = self.weights.rotary(like, plan.positions[None])
        half = cos.shape[-1] // 2
        cos, sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return PassContext(plan, cos, sin, dropout, self.ops, self.buffers, keep_activations)

    def _embed(self, plan: MicroBatchPlan) -> torch.Tensor:
        """Embeddings (n, K) in the accumulate dtype."""
        h = self.weights.embedding[plan.ids].to(accumulate_dtype(self.dtype))
        return h * self.weights.embedding_scale if self.weights.embedding_scale != 1.0 else h

    def _loss(
        self, h: torch.Tensor, context: PassContext, scale: Optional[float]
    ) -> tuple[float, Optional[torch.Tensor]]:
        """(summed loss, d_h (n, K) in the accumulate dtype, or None without scale)."""
        weights, rows, ops = self.weights, context.plan.label_rows, context.ops
        labelled = h[rows]
        x = torch.empty(labelled.shape, dtype=self.dtype, device=h.device)
        rstd = ops.norm(labelled, weights.final_norm, weights.eps, x)
        total, d_x = head_loss(x, weights.head, context.plan, scale, ops, context.buffers)
        if d_x is None:
            return total, None
        d_labelled = torch.zeros_like(labelled)
        ops.norm_backward(d_x, labelled, weights.final_norm, rstd, d_labelled)
        d_h = torch.zeros_like(h)
        d_h[rows] = d_labelled
        return total, d_h

    def _forward_backward(self, plan: MicroBatchPlan, dropout: Optional[DropoutMask], scale: float) -> float:
        """Summed loss of one micro-batch; scaled gradients are added to the groups."""
        context = self._context(plan, dropout, keep_activations=not self.checkpointing)
        layers = self.weights.layers
        saved: list[SavedActivations] = []
        inputs: list[torch.Tensor] = []  # of each layer (n, K), kept in place of `saved` with checkpointing
        h = self._embed(context.plan)
        for layer in layers:
            if self.checkpointing:
                inputs.append(h.clone())
            h, activations = layer.forward(h, context)
            if not self.checkpointing:
                saved.append(activations)
        total, d_h = self._loss(h, context, scale)
        assert d_h is not None
        for index in range(len(layers) - 1, -1, -1):
            if self.checkpointing:  # bit for bit the same activations: dropout masks are functions, not streams
                saved.append(layers[index].forward(inputs.pop(), context)[1])
            d_h = layers[index].backward(d_h, saved.pop(), context, need_d_h=index > 0)
        return total
