"""Row buffers that are reused by every forward and backward pass, and freed memory returned to the system."""

from __future__ import annotations

import contextlib
import ctypes
from typing import Optional

import torch

from lora_practice.fast.matmul import row_pitch


class Buffers:
    """Row buffers by name, allocated once and reused.

    Tensors allocated for each micro-batch have different sizes each time and leave holes that the C library keeps:
    after ten steps a third more memory, and pages to fault in again. Pages that no row has touched take no memory.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity  # rows
        self._buffers: dict[tuple, torch.Tensor] = {}  # (rows, row pitch)
        self._zeroed: dict[tuple, int] = {}  # number of leading rows whose gap to the next row is zero

    def rows(
        self, name: tuple, n: int, width: int, dtype: torch.dtype, device: torch.device, max_rows: Optional[int] = None
    ) -> torch.Tensor:
        """(n, width) laid out as by `matmul.rows_buffer`, values undefined; valid until the name is requested again.

        max_rows: upper bound of n for this name, if smaller than `capacity`.
        """
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[0] < n:
            rows = max(n, max_rows or self.capacity)
            buffer = torch.empty(rows, row_pitch(width, dtype, device), dtype=dtype, device=device)
            self._buffers[name], self._zeroed[name] = buffer, 0
        if n > self._zeroed[name]:
            buffer[self._zeroed[name] : n, width:] = 0  # see `rows_buffer`
            self._zeroed[name] = n
        return buffer[:n, :width]


def return_freed_memory() -> None:
    """Return pages of freed memory to the system: glibc keeps them until asked. Does nothing on other C libraries."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
