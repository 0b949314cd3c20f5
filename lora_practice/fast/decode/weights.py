"""A model read for generation: separate linears, weights in 16 bits where that is exact, LoRA in float32."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F

from lora_practice.fast.attention import Heads
from lora_practice.fast.weights import SERVED, ModelReader, NotServed, Rotary

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # as in kernels/decode.cpp


class Linear(NamedTuple):
    """One linear with its LoRA pair: y = x W^T + b + (x A^T) (c B^T), c = alpha / r."""

    weight: torch.Tensor  # (N, K) float16, bfloat16 or float32
    bias: Optional[torch.Tensor]  # (N,)
    down: Optional[torch.Tensor]  # A (r, K)
    up: Optional[torch.Tensor]  # c B^T (r, N)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """y (n, N) from x (n, K), float32; a 16-bit weight is upcast temporarily."""
        y = F.linear(x, self.weight.float(), self.bias)
        return y if self.down is None or self.up is None else y.addmm_(x @ self.down.t(), self.up)


class DecodeWeights(NamedTuple):
    """A causal language model for generation; norms and biases are float32."""

    embedding: torch.Tensor  # (V, K), in 16 bits or float32
    embedding_scale: float
    layers: list[Any]  # layer.Layer whose groups are lists of Linear in place of LinearGroup
    final_norm: torch.Tensor
    eps: float
    head: Linear
    heads: Heads
    rotary: Rotary  # the model's own rotary embedding: (x, position_ids) -> cos, sin
    positions: int  # longest context in tokens
    stored: dict[int, torch.Tensor]  # by id() of the model's parameter: the tensor that holds it here


def read_for_decoding(model: Any, use_16_bits: bool, stored: dict[int, torch.Tensor]) -> DecodeWeights:
    """Read a PeftModel or a plain causal LM.

    Args:
        model: left unchanged.
        use_16_bits: store weights in 16 bits where that is exact; else in float32.
        stored: tensors of an earlier reading of the same model, which are reused; missing ones are added to it.

    Raises:
        NotServed: the architecture, device or adapter is not supported.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(causal).__name__ not in SERVED:
        raise NotServed(f"{type(causal).__name__} is not one of {', '.join(SERVED)}")
    embedding, head = causal.get_input_embeddings(), causal.get_output_embeddings()
    if not isinstance(embedding, torch.nn.Embedding) or embedding.weight.device.type != "cpu":
        raise NotServed("the embedding is wrapped, or not on the CPU")
    if type(head) is not torch.nn.Linear or head.bias is not None:
        raise NotServed("the output head is wrapped, quantized or has a bias")
    reader = _DecodeReader(causal, use_16_bits, stored)
    layers: list[Any] = [reader.layer(layer, index) for index, layer in enumerate(causal.model.layers)]
    hidden = causal.config.hidden_size
    return DecodeWeights(
        embedding=reader.store(embedding.weight),
        embedding_scale=float(torch.tensor(hidden**0.5)) if reader.gemma else 1.0,  # float32 as in transformers
        layers=layers,
        final_norm=reader.norm(causal.model.norm),
        eps=reader.eps(causal.model.norm),
        head=reader.linear(head),
        heads=layers[0].heads,
        rotary=causal.model.rotary_emb,
        positions=causal.config.max_position_embeddings,
        stored=reader.stored,
    )


class _DecodeReader(ModelReader):
    """Reads layers for generation: linears are not merged, LoRA may be frozen, the model is not changed."""

    def __init__(self, causal: Any, use_16_bits: bool, stored: dict[int, torch.Tensor]) -> None:
        super().__init__(causal, torch.float32)
        self.use_16_bits, self.stored = use_16_bits, stored

    def group(self, *modules: Any) -> Any:
        """A list of Linear in place of a merged LinearGroup."""
        return [self.linear(module) for module in modules]

    def linear(self, module: Any) -> Linear:
        """One linear of transformers or PEFT."""
        base = getattr(module, "base_layer", module)
        if type(base) is not torch.nn.Linear:
            raise NotServed(f"{type(base).__name__} instead of torch.nn.Linear (quantized?)")
        bias = None if base.bias is None else base.bias.detach().float()
        return Linear(self.store(base.weight), bias, *_lora_pair(module))

    def store(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight in the dtype to compute from; a tied weight is stored once."""
        if weight.dtype not in DTYPE_CODES:
            raise NotServed(f"weights in {weight.dtype}")
        if id(weight) not in self.stored:
            self.stored[id(weight)] = _in_16_bits(weight.detach()) if self.use_16_bits else weight.detach().float()
        return self.stored[id(weight)]


def _in_16_bits(weight: torch.Tensor) -> torch.Tensor:
    """A float16 or bfloat16 copy if exact (checked some rows at a time), else the weight; with contiguous rows."""
    if weight.dtype != torch.float32:
        return weight.contiguous()
    for dtype in (torch.float16, torch.bfloat16):
        half = torch.empty(weight.shape, dtype=dtype)
        if all(torch.equal(h.copy_(w).float(), w) for h, w in zip(half.split(1024), weight.split(1024))):
            return half
    return weight if weight.stride(1) == 1 else weight.contiguous()


def _lora_pair(module: Any) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
    """Float32 copies of (A (r, K), c B^T (r, N)), or (None, None) where no adapter is active or it is merged."""
    if type(module) is torch.nn.Linear:
        return None, None
    if not hasattr(module, "lora_A"):
        raise NotServed(f"adapter layer {type(module).__name__}")
    active = (
        [] if module.disable_adapters or module.merged else [n for n in module.active_adapters if n in module.lora_A]
    )
    if not active:
        return None, None
    if len(active) > 1:
        raise NotServed("several active adapters")
    name = active[0]
    if name in getattr(module, "lora_variant", {}) or getattr(module, "use_dora", {}).get(name, False):
        raise NotServed("a LoRA variant such as DoRA")
    if module.lora_B[name].bias is not None:
        raise NotServed("LoRA with a bias")
    down, up = (part[name].weight.detach().to(torch.float32, copy=True) for part in (module.lora_A, module.lora_B))
    return down.contiguous(), (up * float(module.scaling[name])).t().contiguous()
