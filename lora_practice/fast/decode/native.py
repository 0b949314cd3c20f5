"""The compiled forward pass of generation: kernels/decode.cpp on the tensors of a `DecodeWeights`."""

from __future__ import annotations

import ctypes
from typing import Any, Optional

import torch

from lora_practice.fast.decode.weights import DTYPE_CODES, DecodeWeights, Linear

_address, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    """ctypes structure with these fields in this order."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


# Layouts of the structs of the same names in kernels/decode.cpp.
_LINEAR = _struct(
    "Linear",
    **dict.fromkeys(("weight", "bias", "down", "up"), _address),
    **dict.fromkeys(("dtype", "rows", "columns", "pitch", "rank"), _int),
)
_LAYER = _struct(
    "Layer",
    linears=_LINEAR * 7,
    **dict.fromkeys(("norm1", "norm2", "q_norm", "k_norm"), _address),
    window=_int,
)
_ROPE = _struct("Rope", cosines=_address, sines=_address, position=_int, capacity=_int)
_MODEL = _struct(
    "Model",
    **dict.fromkeys(("layers", "head", "norm"), _address),
    **dict.fromkeys(("hidden", "inner", "heads", "kv_heads", "size", "tanh_gelu"), _int),
    **dict.fromkeys(("scale", "eps"), _float),
)


def _at(x: Optional[torch.Tensor]) -> Optional[int]:
    """Address of a tensor, None (null) for None."""
    return None if x is None else x.data_ptr()


class CompiledPass:
    """All layers and the head for a few tokens."""

    def __init__(self, library: ctypes.CDLL, weights: DecodeWeights) -> None:
        self.library, self.weights = library, weights  # `weights` is kept alive: the structs below point into it
        first, heads = weights.layers[0], weights.heads
        self.layers = (_LAYER * len(weights.layers))(*map(self._layer, weights.layers))
        self.head_linear = self._linear(weights.head)
        sizes = (
            weights.embedding.shape[1],
            first.down[0].weight.shape[1],
            heads.query,
            heads.kv,
            heads.size,
        )
        self.model = _MODEL(
            ctypes.addressof(self.layers),
            ctypes.addressof(self.head_linear),
            _at(weights.final_norm),
            *sizes,
            int(first.activation.name != "silu"),
            heads.scale,
            weights.eps,
        )

    @staticmethod
    def _linear(linear: Linear) -> Any:
        weight, down = linear.weight, linear.down
        rank = 0 if down is None else down.shape[0]
        return _LINEAR(*map(_at, linear), DTYPE_CODES[weight.dtype], *weight.shape, weight.stride(0), rank)

    def _layer(self, layer: Any) -> Any:
        linears = [*layer.qkv, *layer.out, *layer.gate_up, *layer.down]
        norms = (layer.norm1, layer.norm2, *(layer.qk_norm or (None, None))[:2])
        return _LAYER((_LINEAR * 7)(*map(self._linear, linears)), *map(_at, norms), layer.window or 0)

    def logits(
        self, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: torch.Tensor, start: int, wanted: bool
    ) -> Optional[torch.Tensor]:
        """Logits (V,) of the last of n tokens if wanted, else None.

        Args:
            h: (n, K) embeddings of the tokens at positions start, start + 1, ...; overwritten.
            cos, sin: (n, D / 2) RoPE tables for these positions.
            cache: (layers, 2, kv heads, capacity, D); keys and values of these tokens are written to it.
            start: position of the first token.
            wanted: whether to compute logits.
        """
        assert all(x.is_contiguous() for x in (h, cos, sin, cache))
        rope = _ROPE(_at(cos), _at(sin), start, cache.shape[3])
        logits = torch.empty(self.weights.head.weight.shape[0]) if wanted else None
        self.library.decode(
            ctypes.byref(self.model),
            _int(len(self.layers)),
            _address(_at(h)),
            _int(len(h)),
            ctypes.byref(rope),
            _address(_at(cache)),
            _address(_at(logits)),
            torch.get_num_threads(),
        )
        return logits
