"""The base model's matrices as its safetensors files hold them: shapes, and how large the weights are.

numpy only, no torch: headers are read whole, of the weights a sample of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from lora_practice.report.adapter_stats import NUMPY_TYPES, as_float
from lora_practice.storage.safetensors_header import read_header

SAMPLED_MATRIX_ROWS = 256  # of a matrix, evenly spaced: its root mean square within about a percent


@dataclass(frozen=True)
class BaseMatrix:
    """Where one matrix lies: `offset` in bytes from the start of `file`; `dtype` as safetensors spells it ("BF16")."""

    file: Path
    dtype: str
    shape: tuple[int, int]
    offset: int

    @property
    def rms(self) -> Optional[float]:
        """Root mean square of its entries, estimated from SAMPLED_MATRIX_ROWS; None for a type that is no float."""
        import numpy as np

        if self.dtype not in NUMPY_TYPES:
            return None
        whole = np.memmap(self.file, NUMPY_TYPES[self.dtype], "r", self.offset, self.shape)
        sample = np.asarray(whole[:: -(-self.shape[0] // SAMPLED_MATRIX_ROWS)])
        values = as_float(sample, self.dtype).astype("f8")
        return float(np.sqrt((values**2).mean()))


def base_matrices(base: Path) -> dict[str, BaseMatrix]:
    """Every matrix of a model by the name of its tensor, from the headers of its files.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged; the reason, in the user's language.
    """
    found = {}
    for file in sorted(base.glob("*.safetensors")):
        for name, tensor in read_header(file).items():
            if len(tensor.shape) == 2:
                found[name] = BaseMatrix(file, tensor.dtype, (tensor.shape[0], tensor.shape[1]), tensor.start)
    return found


def matrix_of(module: str, matrices: Mapping[str, BaseMatrix]) -> Optional[BaseMatrix]:
    """The matrix of a LoRA module's full name; either name may have a prefix more ("model.", "transformer.")."""
    wanted = f".{module}.weight"
    for name, matrix in matrices.items():
        if f".{name}".endswith(wanted) or wanted.endswith(f".{name}"):
            return matrix
    return None


def relative_changes(changes: Mapping[str, float], base: Optional[Path]) -> dict[str, float]:
    """The root mean square of each change (by module name) in percent of that of the base's own weights.

    Modules whose base weights cannot be read here, or are all zero, are left out.
    """
    found: dict[str, float] = {}
    try:
        matrices = base_matrices(base) if base is not None else {}
        for module, change in changes.items():
            matrix = matrix_of(module, matrices)
            rms = matrix.rms if matrix else None
            if rms:
                found[module] = 100 * change / rms
    except (OSError, ValueError):  # a damaged file, which `check_folder` finds and tells
        return {}
    return found
