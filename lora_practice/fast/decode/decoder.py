"""Generation on a CPU, token by token: the weights are read once per token, in 16 bits, and that is the whole cost.

A weight whose every value is a float16 (or a bfloat16) is stored so and widened on its way into float32 sums: half
the bytes, and not a bit of the answer changes. LoRA stays beside its weight in float32, y = W x + c B (A x):
merging it would need float32 weights. Specification: `_rows`, in torch, which also serves where there is no
compiler; decode.cpp is all layers of it in one call.
"""

from __future__ import annotations

import subprocess
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F

from lora_practice.fast.decode.native import NativePass
from lora_practice.fast.decode.weights import DecodeWeights, read_for_decoding
from lora_practice.fast.kernels.build import library

ROWS = 64  # rows of a prompt computed at once: they stay in the processor's cache


def build_decoder(model: Any, kernels: bool = True, like: Optional[Decoder] = None) -> Decoder:
    """A snapshot of a PeftModel (unmerged LoRA; switched off or merged is respected) or a plain causal LM.

    Weights that lie in 16 bits already are shared with the model, so load it in the dtype of its files; float32
    weights are copied to 16 bits where that is exact; the copies of `like`, a decoder of the same model in another
    state (its adapter on or off), serve here too. Without a compiler, load the model in float32.

    Raises:
        NotServed: another architecture, device or adapter than this path knows; use the model's own `generate`.
    """
    native, reason = None, ""
    if kernels:
        try:
            native = library("float")
        except (OSError, subprocess.SubprocessError) as error:
            reason = f" ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    weights = read_for_decoding(model, native is not None, like.weights.stored if like else {})
    if native is None:
        return Decoder(weights, None, f"torch float32{reason}")
    return Decoder(weights, NativePass(native, weights), "16-bit kernels")


class Decoder:
    """Generates with one model, keeping keys and values of the last context. `name` says what computes."""

    def __init__(self, weights: DecodeWeights, native: Optional[NativePass], name: str) -> None:
        self.weights, self.native, self.name = weights, native, name
        self.heads = weights.heads
        self.ids: list[int] = []  # whose keys and values the cache holds
        self.cache = torch.empty(len(weights.layers), 2, self.heads.shared, 0, self.heads.size)

    def generate(self, *args: Any, **options: Any) -> list[int]:
        """All of `tokens`, with the same arguments."""
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
        """New tokens, without the stop token, each computed when it is asked for; fewer when the positions end.

        Temperature 0 takes the likeliest token. Otherwise draws from softmax(logits / temperature), cut to the
        smallest set of likeliest tokens whose probabilities reach top_p. A context that begins like the last one is
        not computed again.

        Raises:
            ValueError: no input, or more of it than the model has positions.
        """
        if not input_ids or len(input_ids) > self.weights.positions:
            raise ValueError(f"{len(input_ids)} tokens of context; this model takes 1 to {self.weights.positions}")
        budget = min(max_new_tokens, self.weights.positions - len(input_ids))
        self._make_room(len(input_ids) + budget)
        written: list[int] = []
        while len(written) < budget:
            token = _choose(self.logits([*input_ids, *written]), temperature, top_p, generator)
            if token in stop_ids:
                break
            written.append(token)
            yield token

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """(V,) float32, of the token after `ids`; computes only what the cache does not hold."""
        known = next((i for i, (a, b) in enumerate(zip(ids, self.ids)) if a != b), min(len(ids), len(self.ids)))
        known = min(known, len(ids) - 1)
        self._make_room(len(ids))
        self.ids = self.ids[:known]  # an interruption leaves a cache that is right as far as it goes
        logits = None
        for start in range(known, len(ids), ROWS):
            logits = self._pass(ids[start : start + ROWS], start, start + ROWS >= len(ids))
        assert logits is not None
        self.ids = list(ids)
        return logits

    def _pass(self, ids: list[int], start: int, wanted: bool) -> Optional[torch.Tensor]:
        """Some tokens at positions start, start + 1, ...; logits (V,) of the last one if wanted."""
        weights, places = self.weights, slice(start, start + len(ids))
        h = weights.embedding[torch.tensor(ids)].float() * weights.embedding_scale
        if self.native is not None:
            return self.native.logits(h, self.cos[places], self.sin[places], self.cache, start, wanted)
        last = self._rows(h, start)[-1:]
        return weights.head.rows(_norm(last, weights.final_norm, weights.eps))[0] if wanted else None

    def _rows(self, h: torch.Tensor, start: int) -> torch.Tensor:
        """Embeddings h (n, K) at positions start, start + 1, ... -> final h; keys and values go to the cache."""
        n, stop = len(h), start + len(h)
        behind = torch.arange(start, stop)[:, None] - torch.arange(stop)
        cos, sin = self.cos[start:stop], self.sin[start:stop]
        for layer, (keys, values) in zip(self.weights.layers, self.cache):
            x = _norm(h, layer.norm1, layer.eps)
            q, k, v = (linear.rows(x).view(n, -1, self.heads.size) for linear in layer.qkv)
            if layer.head_norm is not None:
                q = _norm(q, layer.head_norm.q_weight, layer.head_norm.eps)
                k = _norm(k, layer.head_norm.k_weight, layer.head_norm.eps)
            qk = _rotated(torch.cat((q, k), 1).transpose(0, 1), cos, sin)
            keys[:, start:stop], values[:, start:stop] = qk[self.heads.query :], v.transpose(0, 1)
            o = F.scaled_dot_product_attention(
                qk[None, : self.heads.query],
                keys[None, :, :stop],
                values[None, :, :stop],
                attn_mask=None if n == 1 and layer.window is None else _visible(behind, layer.window),
                scale=self.heads.scale,
                enable_gqa=True,
            )
            h = h + layer.out[0].rows(o[0].transpose(0, 1).reshape(n, -1))
            x = _norm(h, layer.norm2, layer.eps)
            gate, up = (linear.rows(x) for linear in layer.gate_up)
            h = h + layer.down[0].rows(layer.activation.value(gate) * up)
        return h

    def _make_room(self, length: int) -> None:
        """Grow the cache and the rotation tables to `length` positions, keeping what they hold."""
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
    return F.rms_norm(x, weight.shape, weight, eps)


def _visible(behind: torch.Tensor, window: Optional[int]) -> torch.Tensor:
    """Which keys each query sees; behind (n, k): how far the key lies before the query."""
    return behind >= 0 if window is None else (behind >= 0) & (behind < window)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (heads, n, D) by cos, sin (n, D / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _choose(logits: torch.Tensor, temperature: float, top_p: float, generator: Optional[torch.Generator]) -> int:
    """The next token from logits (V,); the cut is that of transformers' TopPLogitsWarper."""
    if temperature <= 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_p < 1:
        ordered, order = logits.sort()
        cut = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        cut[-1] = False
        logits[order[cut]] = float("-inf")
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
