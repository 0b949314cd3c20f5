"""Generation on a CPU, token by token. Reading the weights takes most of a token's time, so they are kept in 16 bits.

A weight whose values are all exact in float16 (or bfloat16) is stored in that dtype and upcast on the fly to float32:
half the bytes, and the answer is the same to the last bit. LoRA stays next to its weight in float32,
y = W x + c B (A x), because a merged weight would need float32. `Decoder._layers` is the specification, in torch, and
is used where there is no compiler; kernels/decode.cpp computes all layers in one call.
"""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F

from lora_practice.fast.decode.native import CompiledPass
from lora_practice.fast.decode.weights import DecodeWeights, read_for_decoding
from lora_practice.fast.kernels.build import library

PROMPT_ROWS = 64  # tokens of a prompt computed at once: few enough for the processor's cache


def build_decoder(model: Any, kernels: bool = True, like: Optional[Decoder] = None) -> Decoder:
    """Decoder for a PeftModel as it is now (adapter unmerged, merged or switched off) or for a plain causal LM.

    16-bit weights are shared with the model, so load it in the dtype of its files; float32 weights are copied to 16
    bits where that is exact. Without a compiler all weights are upcast to float32, so load the model in float32.

    Args:
        model: in eval or train mode; the decoder does not follow later changes of its adapter.
        kernels: use compiled kernels where there is a compiler.
        like: a decoder of the same model in another state (adapter on or off), whose 16-bit copies are shared.

    Raises:
        NotServed: the architecture, device or adapter is not supported; use the model's own `generate`.
    """
    kernel_library, reason = None, ""
    if kernels:
        try:
            kernel_library = library("float")
        except (OSError, subprocess.SubprocessError) as error:
            reason = f" ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    weights = read_for_decoding(model, kernel_library is not None, like.weights.stored if like else {})
    if kernel_library is None:
        return Decoder(weights, None, f"torch float32{reason}")
    return Decoder(weights, CompiledPass(kernel_library, weights), "16-bit kernels")


class Decoder:
    """Generates with one model and keeps the KV cache of the last context. `name` tells the user what computes."""

    def __init__(self, weights: DecodeWeights, compiled: Optional[CompiledPass], name: str) -> None:
        self.weights, self.compiled, self.name = weights, compiled, name
        self.heads = weights.heads
        self.ids: list[int] = []  # tokens whose keys and values are in the cache
        self.cache = torch.empty(len(weights.layers), 2, self.heads.kv, 0, self.heads.size)

    def generate(self, *args: Any, **options: Any) -> list[int]:
        """List of the tokens that `tokens` yields; same arguments."""
        return list(self.tokens(*args, **options))

    def tokens(
        self,
        input_ids: Sequence[int],
        max_new_tokens: int,
        stop_ids: Collection[int],
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: Optional[torch.Generator] = None,
    ) -> Iterator[int]:
        """Yield new tokens, without the stop token, each computed when requested.

        Generation ends at a token of stop_ids, after max_new_tokens, or at the model's last position. Temperature 0
        is greedy; otherwise tokens are sampled from softmax(logits / temperature), restricted to the smallest set of
        most likely tokens whose probabilities reach top_p. The beginning that a context has in common with the
        previous one is not recomputed.

        Raises:
            ValueError: no input, or more tokens than the model has positions.
        """
        if not input_ids or len(input_ids) > self.weights.positions:
            raise ValueError(f"{len(input_ids)} tokens of context; this model takes 1 to {self.weights.positions}")
        budget = min(max_new_tokens, self.weights.positions - len(input_ids))
        self._grow_cache(len(input_ids) + budget)
        generated: list[int] = []
        while len(generated) < budget:
            token = _sample(self.logits([*input_ids, *generated]), temperature, top_p, generator)
            if token in stop_ids:
                break
            generated.append(token)
            yield token

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """Logits (V,) float32 of the token after `ids`; computes only tokens that are not in the cache."""
        known = next((i for i, (a, b) in enumerate(zip(ids, self.ids)) if a != b), min(len(ids), len(self.ids)))
        known = min(known, len(ids) - 1)
        self._grow_cache(len(ids))
        self.ids = self.ids[:known]  # so that the cache stays valid if an interruption follows
        logits = None
        for start in range(known, len(ids), PROMPT_ROWS):
            logits = self._forward(ids[start : start + PROMPT_ROWS], start, start + PROMPT_ROWS >= len(ids))
        assert logits is not None
        self.ids = list(ids)
        return logits

    def _forward(self, ids: list[int], start: int, wanted: bool) -> Optional[torch.Tensor]:
        """Forward pass of tokens at positions start, start + 1, ...; logits (V,) of the last one if wanted."""
        weights, positions = self.weights, slice(start, start + len(ids))
        h = weights.embedding[torch.tensor(ids)].float() * weights.embedding_scale
        if self.compiled is not None:
            return self.compiled.logits(h, self.cos[positions], self.sin[positions], self.cache, start, wanted)
        last = self._layers(h, start)[-1:]
        return weights.head.rows(_norm(last, weights.final_norm, weights.eps))[0] if wanted else None

    def _layers(self, h: torch.Tensor, start: int) -> torch.Tensor:
        """Final h (n, K) from embeddings h at positions start, start + 1, ...; fills the cache with their k and v."""
        n, stop = len(h), start + len(h)
        distance = torch.arange(start, stop)[:, None] - torch.arange(stop)
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        for layer, (keys, values) in zip(self.weights.layers, self.cache):
            x = _norm(h, layer.norm1, layer.eps)
            q, k, v = (linear.rows(x).view(n, -1, self.heads.size) for linear in layer.qkv)
            if layer.qk_norm is not None:
                q = _norm(q, layer.qk_norm.q_weight, layer.qk_norm.eps)
                k = _norm(k, layer.qk_norm.k_weight, layer.qk_norm.eps)
            qk = _rope(torch.cat((q, k), 1).transpose(0, 1), cos, sin)
            keys[:, start:stop], values[:, start:stop] = qk[self.heads.query :], v.transpose(0, 1)
            o = F.scaled_dot_product_attention(
                qk[None, : self.heads.query],
                keys[None, :, :stop],
                values[None, :, :stop],
                attn_mask=None if n == 1 and layer.window is None else _visible_keys(distance, layer.window),
                scale=self.heads.scale,
                enable_gqa=True,
            )
            h = h + layer.out[0].rows(o[0].transpose(0, 1).reshape(n, -1))
            x = _norm(h, layer.norm2, layer.eps)
            gate, up = (linear.rows(x) for linear in layer.gate_up)
            h = h + layer.down[0].rows(layer.activation.value(gate) * up)
        return h

    def _grow_cache(self, length: int) -> None:
        """Grow the KV cache and the RoPE tables to at least `length` positions; the cache keeps its contents."""
        old = self.cache.shape[3]
        if length <= old:
            return
        capacity = min(self.weights.positions, (length + 255) // 256 * 256)
        cache = self.cache.new_empty(*self.cache.shape[:3], capacity, self.heads.size)
        cache[:, :, :, :old] = self.cache
        self.cache = cache
        cos, sin = self.weights.rotary(torch.empty(0), torch.arange(capacity)[None])
        half = self.heads.size // 2
        self.cos, self.sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm."""
    return F.rms_norm(x, weight.shape, weight, eps)


def _visible_keys(distance: torch.Tensor, window: Optional[int]) -> torch.Tensor:
    """Causal mask (n, k), True = visible; distance (n, k): position of the query minus position of the key."""
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of x (heads, n, D) with cos, sin (n, D / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _sample(logits: torch.Tensor, temperature: float, top_p: float, generator: Optional[torch.Generator]) -> int:
    """Next token from logits (V,), which may be modified; top-p as in transformers' TopPLogitsWarper."""
    if temperature <= 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_p < 1:
        ordered, order = logits.sort()
        cut = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        cut[-1] = False
        logits[order[cut]] = float("-inf")
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
