"""The two matrix products of a linear layer, y = x M^T and d_x = d_y M, by the quicker of torch's two libraries.

float32 on an AMD processor goes to oneDNN, which torch carries beside MKL: 195 to 225 GFLOP/s on two Zen 4 cores at
our shapes, where MKL reaches 120 to 190 (docs/performance.md). Elsewhere, and for 16-bit types, torch.mm already
takes the right one. The choice follows from the processor alone, never from a timing: a run that is resumed must take
the same products to end with the same bits.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Optional

import torch

# oneDNN compiles a kernel for each number of rows that it meets, a millisecond and 0.7 MB each: there must be few.
ROW_STEP = 8
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


@functools.cache
def by_onednn(dtype: torch.dtype, device_type: str) -> bool:
    """True where these products go to oneDNN by hand."""
    if dtype != torch.float32 or device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and _vendor() == "AuthenticAMD"


def row_pitch(width: int, dtype: torch.dtype, device: torch.device | None = None) -> int:
    """Elements from one row of a (n, width) buffer to the next, for products at full speed.

    oneDNN asks for rows without gaps (a weight with gaps falls back to a loop a hundred times slower). MKL asks for a
    row pitch that is a multiple of 16 elements but never of 4 KiB: rows whose addresses differ by that fall into the
    same cache sets, and float32 products that write 3072 or 49152 columns lose up to half their speed.
    """
    if by_onednn(dtype, "cpu" if device is None else device.type):
        return width
    pitch = (width + 15) // 16 * 16
    return pitch + 16 if pitch * dtype.itemsize % 1024 == 0 else pitch


def rows_buffer(n: int, width: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """(n, width) with uninitialised values at that pitch; what lies between the rows is zero.

    It must be finite: oneDNN's AMX kernels read rows in tiles of 32 columns, past the width, and multiply what they
    find there by zeros of the other operand. NaN times zero is NaN.
    """
    buffer = torch.empty(n, row_pitch(width, dtype, device), dtype=dtype, device=device)
    buffer[:, width:] = 0
    return buffer[:, :width]


def matmul_transposed(x: torch.Tensor, matrix: torch.Tensor, out: Optional[torch.Tensor] = None) -> torch.Tensor:
    """x (n, K) times matrix (N, K) transposed: (n, N). In `out` where the library can write there, else new."""
    if by_onednn(matrix.dtype, matrix.device.type):
        return torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
    if out is None:
        out = rows_buffer(x.shape[0], matrix.shape[0], x.dtype, x.device)
    return torch.mm(x, matrix.t(), out=out)


def matmul(d_y: torch.Tensor, matrix: torch.Tensor, out: Optional[torch.Tensor] = None) -> torch.Tensor:
    """d_y (n, N) times matrix (N, K): (n, K). In `out` where the library can write there, else new."""
    if by_onednn(matrix.dtype, matrix.device.type):
        return torch.ops.mkldnn._linear_pointwise(d_y, matrix.t(), None, "none", [], "")
    if out is None:
        out = rows_buffer(d_y.shape[0], matrix.shape[1], d_y.dtype, d_y.device)
    return torch.mm(d_y, matrix, out=out)


def _vendor() -> str:
    """ "GenuineIntel", "AuthenticAMD" or "": as Linux tells it, else by the name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    except OSError:
        import platform

        return next((name for name in ("GenuineIntel", "AuthenticAMD") if name in platform.processor()), "")
    return ""
