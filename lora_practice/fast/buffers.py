"""Memory that every pass uses again, and memory given back."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Optional

import torch

from lora_practice.fast.matmul import row_pitch


class Buffers:
    """Row buffers by name.

    Tensors made anew for each micro-batch have other sizes each time and leave holes that the C library keeps: after
    ten steps a third more memory, and pages to fault in again. Pages that no row has touched take no memory.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity  # rows
        self._held: dict[tuple, torch.Tensor] = {}  # (rows, row pitch)
        self._zeroed: dict[tuple, int] = {}  # rows whose gap to the next one is zero

    def rows(
        self, name: tuple, n: int, width: int, dtype: torch.dtype, device: torch.device, most: Optional[int] = None
    ) -> torch.Tensor:
        """(n, width), values undefined, laid out as by `rows_buffer`; good until the name is asked for again.

        most: rows that this name will ever want, if fewer than a micro-batch has.
        """
        held = self._held.get(name)
        if held is None or held.shape[0] < n:
            rows = max(n, most or self.capacity)
            held = self._held[name] = torch.empty(rows, row_pitch(width, dtype, device), dtype=dtype, device=device)
            self._zeroed[name] = 0
        if n > self._zeroed[name]:
            held[self._zeroed[name] : n, width:] = 0  # see `rows_buffer`
            self._zeroed[name] = n
        return held[:n, :width]


def return_freed_memory() -> None:
    """glibc keeps the pages of freed memory for itself until asked; elsewhere there is nothing to ask."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
