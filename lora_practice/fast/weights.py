"""Reads a PEFT model into layers without holding any weight twice, or raises `NotServed` with the reason.

Where the dtypes agree, a merged matrix replaces the storage of the model's own weights: each weight becomes a view of
it. The model keeps working, in generation and evaluation too, and no weight is stored twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch

from lora_practice.fast.attention import Heads
from lora_practice.fast.buffers import return_freed_memory
from lora_practice.fast.dropout import threshold_of
from lora_practice.fast.layer import Layer, QKNorm
from lora_practice.fast.lora_linear import LinearGroup
from lora_practice.fast.matmul import rows_buffer
from lora_practice.fast.ops import ACTIVATIONS, LoraModule, accumulate_dtype

SERVED = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
)
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies do not depend on the length
Rotary = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class NotServed(Exception):
    """The fast path does not support this model. `reason` names the obstacle, for the user."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Weights:
    """A causal language model in the form that the engine computes with."""

    embedding: torch.Tensor  # (V, K)
    embedding_scale: float
    layers: list[Layer]
    final_norm: torch.Tensor  # (K,) accumulate dtype
    eps: float
    head: torch.Tensor  # (V, K) compute dtype
    rotary: Rotary  # the model's own rotary embedding: (x, position_ids) -> cos, sin
    threshold: int  # dropout probability in 1 / 65536
    parameters: list[torch.nn.Parameter]  # all LoRA parameters
    merged_views: list[tuple[torch.Tensor, torch.Tensor]]  # (weight, its view in a merged matrix)


def read_weights(peft_model: Any, dtype: torch.dtype) -> Weights:
    """Read a PeftModel; its weights become views of merged matrices where they have this compute dtype.

    Raises:
        NotServed: the architecture, the adapter or a trained tensor is not supported; the model is unchanged.
    """
    causal = peft_model.get_base_model() if hasattr(peft_model, "get_base_model") else peft_model
    if type(causal).__name__ not in SERVED:
        raise NotServed(f"{type(causal).__name__} is not one of {', '.join(SERVED)}")
    reader = ModelReader(causal, dtype)
    try:
        return _read(peft_model, causal, reader)
    except NotServed:
        restore_storage(reader.merged_views)  # views with gaps between their rows are slow on the plain path
        raise


def restore_storage(merged_views: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give weights that are still views of a merged matrix contiguous storage of their own; empties the list."""
    for weight, view in merged_views:
        if weight.data_ptr() == view.data_ptr():
            weight.data = view.clone(memory_format=torch.contiguous_format)
    merged_views.clear()


def _read(peft_model: Any, causal: Any, reader: ModelReader) -> Weights:
    """Weights of the whole model; checks that nothing else is trained."""
    layers = [reader.layer(layer, index) for index, layer in enumerate(causal.model.layers)]
    known = {id(p) for p in reader.parameters}
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise NotServed(f"{name} is trainable but is not a LoRA weight of a known linear layer")
    if not reader.parameters:
        raise NotServed("the model has no trainable LoRA weights")
    if len(reader.dropouts) > 1:
        raise NotServed(f"LoRA layers differ in dropout: {sorted(reader.dropouts)}")
    scale = causal.config.hidden_size**0.5 if reader.gemma else 1.0
    embedding, head = causal.get_input_embeddings().weight, reader.head()
    return_freed_memory()
    return Weights(
        embedding=embedding.detach(),
        embedding_scale=float(torch.tensor(scale)),  # rounded to float32 as in transformers
        layers=layers,
        final_norm=reader.norm(causal.model.norm),
        eps=reader.eps(causal.model.norm),
        head=head,
        rotary=causal.model.rotary_emb,
        threshold=threshold_of(next(iter(reader.dropouts))),
        parameters=reader.parameters,
        merged_views=reader.merged_views,
    )


class ModelReader:
    """Reads the modules of one model in order, and numbers its LoRA modules."""

    def __init__(self, causal: Any, dtype: torch.dtype) -> None:
        self.config, self.causal, self.dtype = causal.config, causal, dtype
        self.gemma = type(causal).__name__ == "GemmaForCausalLM"
        self.parameters: list[torch.nn.Parameter] = []
        self.dropouts: set[float] = set()
        self.merged_views: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.lora_modules = 0  # number of LoRA modules read so far
        self.check_config()

    def check_config(self) -> None:
        """Raise NotServed for a setting that the layers do not implement."""
        config = self.config
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise NotServed(f"rotary embedding of type {rope_type!r}")
        if rope.get("partial_rotary_factor", 1.0) != 1.0 or getattr(config, "partial_rotary_factor", 1.0) != 1.0:
            raise NotServed("rotary embedding on part of each head")
        if getattr(config, "attention_dropout", 0.0):
            raise NotServed("attention dropout")
        if self.activation_name() not in ACTIVATIONS:
            raise NotServed(f"activation {self.activation_name()!r}")

    def activation_name(self) -> str:
        """Key of ACTIVATIONS; Gemma's "gelu" means the tanh approximation."""
        name = getattr(self.config, "hidden_activation", None) or self.config.hidden_act
        return "gelu_pytorch_tanh" if self.gemma and name == "gelu" else name

    def norm(self, module: Any) -> torch.Tensor:
        """Weight of an RMSNorm in the accumulate dtype; Gemma stores it minus one."""
        weight = module.weight.detach().to(accumulate_dtype(self.dtype))
        return weight + 1 if self.gemma else weight

    @staticmethod
    def eps(module: Any) -> float:
        return module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps

    def head(self) -> torch.Tensor:
        """Output head (V, K) in the compute dtype; the model's own tensor if it has that dtype already."""
        head = self.causal.get_output_embeddings()
        if type(head) is not torch.nn.Linear or head.bias is not None:
            raise NotServed("the output head is wrapped, quantized or has a bias")
        return head.weight.detach().to(self.dtype)

    def layer(self, module: Any, index: int) -> Layer:
        """One decoder layer of transformers."""
        attention, mlp, config = module.self_attn, module.mlp, self.config
        types = getattr(config, "layer_types", None)
        sliding = types is None or types[index] == "sliding_attention"
        window = getattr(config, "sliding_window", None) if sliding else None
        if types is None and not getattr(config, "use_sliding_window", True):
            window = None
        qk_norm = None
        if hasattr(attention, "q_norm"):
            q_norm, k_norm = attention.q_norm, attention.k_norm
            qk_norm = QKNorm(self.norm(q_norm), self.norm(k_norm), self.eps(q_norm))
        query, size = config.num_attention_heads, attention.head_dim
        return Layer(
            qkv=self.group(attention.q_proj, attention.k_proj, attention.v_proj),
            out=self.group(attention.o_proj),
            gate_up=self.group(mlp.gate_proj, mlp.up_proj),
            down=self.group(mlp.down_proj),
            norm1=self.norm(module.input_layernorm),
            norm2=self.norm(module.post_attention_layernorm),
            eps=self.eps(module.input_layernorm),
            heads=Heads(query, config.num_key_value_heads, size, attention.scaling),
            activation=ACTIVATIONS[self.activation_name()],
            qk_norm=qk_norm,
            window=window,
            index=index,
        )

    def group(self, *modules: Any) -> LinearGroup:
        """Merge linears that read the same input; their weights become views of the merged matrix."""
        bases = [_base_linear(module) for module in modules]
        width = bases[0].in_features
        if width % 2:
            raise NotServed(f"odd layer width {width}")
        lora_modules: list[LoraModule] = []
        row = rank = 0
        for module, base in zip(modules, bases):
            lora_module = self.lora_module(module, row, rank)
            row += base.out_features
            if lora_module is not None:
                lora_modules.append(lora_module)
                rank = lora_module.ranks.stop
        weight = bases[0].weight
        matrix = rows_buffer(row, width + rank, self.dtype, weight.device)
        row = 0
        for base in bases:
            view = matrix[row : row + base.out_features, :width]
            view.copy_(base.weight.detach())
            if base.weight.dtype == self.dtype:
                base.weight.data = view
                self.merged_views.append((base.weight, view))
            row += base.out_features
        return LinearGroup(matrix, width, self.bias(bases), lora_modules)

    def bias(self, bases: list[torch.nn.Linear]) -> Optional[torch.Tensor]:
        """Concatenated biases (N,) in the accumulate dtype, zeros for a linear without one; None if none has one."""
        if all(base.bias is None for base in bases):
            return None
        parts = [base.weight.new_zeros(base.out_features) if base.bias is None else base.bias for base in bases]
        return torch.cat([part.detach() for part in parts]).to(accumulate_dtype(self.dtype))

    def lora_module(self, module: Any, row: int, rank: int) -> Optional[LoraModule]:
        """The LoRA pair of a PEFT linear whose outputs start at `row` and ranks at `rank`; None without LoRA."""
        if type(module) is torch.nn.Linear:
            return None
        adapter = _only_adapter(module)
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        dropout = module.lora_dropout[adapter]
        self.dropouts.add(float(getattr(dropout, "p", 0.0)))
        self.parameters += [a, b]
        self.lora_modules += 1
        outputs, ranks = slice(row, row + b.shape[0]), slice(rank, rank + a.shape[0])
        return LoraModule(a, b, float(module.scaling[adapter]), outputs, ranks, number=self.lora_modules)


def _base_linear(module: Any) -> torch.nn.Linear:
    """The frozen linear inside a PEFT linear, or the module itself."""
    base = module.base_layer if hasattr(module, "base_layer") else module
    if type(base) is not torch.nn.Linear:
        raise NotServed(f"{type(base).__name__} instead of torch.nn.Linear (quantized?)")
    return base


def _only_adapter(module: Any) -> str:
    """Name of the only adapter of a PEFT linear, which must be plain trainable LoRA."""
    if not hasattr(module, "lora_A"):
        raise NotServed(f"adapter layer {type(module).__name__}")
    active = list(module.active_adapters)
    if len(active) != 1 or len(module.lora_A) != 1 or active[0] not in module.lora_A:
        raise NotServed("several adapters, or none active")
    if module.merged or module.disable_adapters:
        raise NotServed("the adapter is merged or switched off")
    if getattr(module, "use_dora", {}).get(active[0], False):
        raise NotServed("DoRA")
    if active[0] in getattr(module, "lora_variant", {}):
        raise NotServed("a LoRA variant")
    if module.lora_B[active[0]].bias is not None:
        raise NotServed("LoRA with a bias")
    if not (module.lora_A[active[0]].weight.requires_grad and module.lora_B[active[0]].weight.requires_grad):
        raise NotServed("frozen LoRA weights")
    return active[0]
