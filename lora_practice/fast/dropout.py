"""Dropout masks as a pure function of (seed, step, LoRA module, row, column): nothing is saved for the backward pass.

PEFT draws an independent mask for each LoRA module (q, k, v, o, gate, up, down of each layer) on the input of A; so
does this file: every module has its own key. Because a mask is a function and not a stream, the backward pass
recomputes it, and a resumed run continues with the same masks. Rows are counted through the whole optimizer step, so
how the step is cut into micro-batches changes no mask. The exception are rows of a shared prefix: each micro-batch
counts them once, and all examples that share them there share their masks.

    bits(row, j) = mix32(row * K/2 + j + key0, key1)            j in [0, K/2)
    keep(row, j) = low 16 bits >= p * 65536,  keep(row, j + K/2) = high 16 bits >= p * 65536

mix32 is C. Wellons' `lowbias32` (https://nullprogram.com/blog/2018/07/31/) with a second key word between its
two multiplications, so that two modules' masks are not shifted copies of one stream. p is rounded to 1/65536.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import torch

_MASK64 = (1 << 64) - 1
_MULTIPLY_1, _MULTIPLY_2 = 0x7FEB352D, 0x846CA68B - (1 << 32)


class MaskKey(NamedTuple):
    """Two signed 32-bit words that select one LoRA module's mask at one step."""

    word0: int
    word1: int


class DropoutMask(NamedTuple):
    """Dropout of one optimizer step: probability `threshold` / 65536; rows start at `row0` within the step."""

    seed: int
    step: int
    threshold: int
    row0: int = 0

    @property
    def keep_rate(self) -> float:
        """1 - p."""
        return 1.0 - self.threshold / 65536.0

    def key(self, module: int) -> MaskKey:
        """Key of LoRA module number `module`: splitmix64 over seed, step and number."""
        state = 0
        for word in (self.seed, self.step, module):
            state = _splitmix(state ^ (word & _MASK64))
        return MaskKey(_signed(state & 0xFFFFFFFF), _signed(state >> 32))


def threshold_of(probability: float) -> int:
    """Dropout probability in units of 1/65536."""
    return round(probability * 65536)


def keep_mask(
    key: MaskKey, threshold: int, row0: int, shape: tuple[int, int], device: Optional[torch.device] = None
) -> torch.Tensor:
    """(n, K) bool, True = kept; K is even. `keep_row` in kernels/lora.cpp computes the same."""
    n, width = shape
    half = width // 2
    rows = torch.arange(row0, row0 + n, dtype=torch.int64, device=device)[:, None] * half
    counter = rows + torch.arange(half, device=device) + key.word0
    bits = counter.to(torch.int32)  # wraps: arithmetic is modulo 2^32
    bits ^= (bits >> 16) & 0xFFFF
    bits *= _MULTIPLY_1
    bits ^= (bits >> 15) & 0x1FFFF
    bits += key.word1
    bits *= _MULTIPLY_2
    bits ^= (bits >> 16) & 0xFFFF
    low = bits & 0xFFFF
    high = (bits >> 16) & 0xFFFF
    return torch.cat([low, high], dim=1) >= threshold


def _splitmix(state: int) -> int:
    """One round of splitmix64."""
    state = (state + 0x9E3779B97F4A7C15) & _MASK64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
    return state ^ (state >> 31)


def _signed(word: int) -> int:
    """Unsigned 32-bit word as a signed one."""
    return word - (1 << 32) if word >= 1 << 31 else word
