"""The two matmuls of a linear layer, y = x M^T and d_x = d_y M, by the faster of torch's two CPU libraries.

float32 on an AMD processor goes to oneDNN, which torch ships beside MKL: 195 to 225 GFLOP/s on two Zen 4 cores at
the shapes of SmolLM2-135M, where MKL reaches 120 to 190 (docs/performance.md). Elsewhere, and for 16-bit dtypes,
torch.mm already uses the faster one. The choice depends on the processor alone, never on a timing: a resumed run must
use the same library to end with the same bits.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Optional

import torch

# Row counts are padded to a multiple of this. oneDNN compiles a kernel for each new row count (1 ms and 0.7 MB each),
# so there must be few of them.
ROW_STEP = 8
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


@functools.cache
def uses_onednn(dtype: torch.dtype, device_type: str) -> bool:
    """Whether the matmuls of this file call oneDNN directly instead of torch.mm."""
    if dtype != torch.float32 or device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and _cpu_vendor() == "AuthenticAMD"


def row_pitch(width: int, dtype: torch.dtype, device: torch.device | None = None) -> int:
    """Elements from one row of a (n, width) buffer to the next, for matmuls at full speed.

    oneDNN needs rows without gaps (a weight with gaps falls back to a loop a hundred times slower). MKL needs a row
    pitch that is a multiple of 16 elements but not of 4 KiB: rows at that distance fall into the same cache sets, and
    float32 matmuls with 3072 or 49152 output columns lose up to half their speed.
    """
    if uses_onednn(dtype, "cpu" if device is None else device.type):
        return width
    pitch = (width + 15) // 16 * 16
    return pitch + 16 if pitch * dtype.itemsize % 1024 == 0 else pitch


def rows_buffer(n: int, width: int, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """(n, width) with row pitch `row_pitch`: values are uninitialised, the gaps between rows are zero.

    The gaps must be finite: oneDNN's AMX kernels read rows in tiles of 32 columns, past the width, and multiply what
    lies there by zeros of the other operand. NaN times zero is NaN.
    """
    buffer = torch.empty(n, row_pitch(width, dtype, device), dtype=dtype, device=device)
    buffer[:, width:] = 0
    return buffer[:, :width]


def matmul_transposed(x: torch.Tensor, matrix: torch.Tensor, out: Optional[torch.Tensor] = None) -> torch.Tensor:
    """y = x M^T: x (n, K), matrix M (N, K) -> (n, N), written to `out` by torch.mm, newly allocated by oneDNN."""
    if uses_onednn(matrix.dtype, matrix.device.type):
        return torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
    if out is None:
        out = rows_buffer(x.shape[0], matrix.shape[0], x.dtype, x.device)
    return torch.mm(x, matrix.t(), out=out)


def matmul(d_y: torch.Tensor, matrix: torch.Tensor, out: Optional[torch.Tensor] = None) -> torch.Tensor:
    """d_x = d_y M: d_y (n, N), matrix M (N, K) -> (n, K), written to `out` by torch.mm, newly allocated by oneDNN."""
    if uses_onednn(matrix.dtype, matrix.device.type):
        return torch.ops.mkldnn._linear_pointwise(d_y, matrix.t(), None, "none", [], "")
    if out is None:
        out = rows_buffer(d_y.shape[0], matrix.shape[1], d_y.dtype, d_y.device)
    return torch.mm(d_y, matrix, out=out)


def _cpu_vendor() -> str:
    """ "GenuineIntel", "AuthenticAMD" or "": from /proc/cpuinfo, elsewhere from the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    except OSError:
        import platform

        return next((name for name in ("GenuineIntel", "AuthenticAMD") if name in platform.processor()), "")
    return ""
