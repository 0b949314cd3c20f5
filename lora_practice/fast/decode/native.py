"""The compiled spelling of a few tokens: decode.cpp over the tensors of a DecodeWeights."""

from __future__ import annotations

import ctypes
from typing import Any, Optional

import torch

from lora_practice.fast.decode.weights import DTYPE_CODES, DecodeWeights, Linear

_address, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


# The layouts of decode.cpp.
_LINEAR = _struct(
    "Linear",
    **dict.fromkeys(("weight", "bias", "down", "up"), _address),
    **dict.fromkeys(("kind", "rows", "columns", "pitch", "rank"), _int),
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
    **dict.fromkeys(("hidden", "inner", "heads", "shared", "size", "tanh_gelu"), _int),
    **dict.fromkeys(("scale", "eps"), _float),
)


def _at(x: Optional[torch.Tensor]) -> Optional[int]:
    return None if x is None else x.data_ptr()


class NativePass:
    """A few tokens through all layers and the head."""

    def __init__(self, native: ctypes.CDLL, weights: DecodeWeights) -> None:
        self.native, self.weights = native, weights  # the pointers below point into `weights`
        first, heads = weights.layers[0], weights.heads
        self.layers = (_LAYER * len(weights.layers))(*map(self._layer, weights.layers))
        self.head_linear = self._linear(weights.head)
        sizes = (
            weights.embedding.shape[1],
            first.down[0].weight.shape[1],
            heads.query,
            heads.shared,
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
        norms = (layer.norm1, layer.norm2, *(layer.head_norm or (None, None))[:2])
        return _LAYER((_LINEAR * 7)(*map(self._linear, linears)), *map(_at, norms), layer.window or 0)

    def logits(
        self, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: torch.Tensor, start: int, wanted: bool
    ) -> Optional[torch.Tensor]:
        """Logits (V,) of the last of n tokens, if wanted.

        Args: h (n, K) embeddings of the tokens at start, start + 1, ..., used up; cos, sin (n, D / 2) of their
        places; cache (layers, 2, shared, capacity, D), in which their keys and values are written.
        """
        assert all(x.is_contiguous() for x in (h, cos, sin, cache))
        rope = _ROPE(_at(cos), _at(sin), start, cache.shape[3])
        logits = torch.empty(self.weights.head.weight.shape[0]) if wanted else None
        self.native.decode(
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
