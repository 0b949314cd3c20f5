"""The header of a safetensors file: names, dtypes and shapes of its tensors, read without their values.

The file begins with the header's length (8 bytes, little-endian), then the header itself, a JSON object
`{name: {"dtype": "F16", "shape": [...], "data_offsets": [...]}}`, which may also hold `__metadata__`.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from lora_practice.console.text import text
from lora_practice.storage.json_files import parse_object

LARGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses more
# safetensors' names of the dtypes in which model weights are usually stored -> torch's
TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's entry in a header; `dtype` in safetensors' spelling, such as "BF16".

    start: where its values begin, in bytes from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int = field(default=0, compare=False)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Name -> dtype and shape of every tensor in a safetensors file, in the header's order.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no valid header; the reason, in the user's language.
    """
    damaged = text(f"{file.name} 已损坏", f"{file.name} is damaged")
    with open(file, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 0 < length <= min(LARGEST_HEADER, file.stat().st_size - 8):
            raise ValueError(damaged)
        content = handle.read(length)
    try:
        entries = {name: entry for name, entry in parse_object(content).items() if name != "__metadata__"}
        return {
            name: TensorInfo(str(one["dtype"]), tuple(map(int, one["shape"])), 8 + length + int(one["data_offsets"][0]))
            for name, one in entries.items()
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(damaged) from error


def stored_dtype(folder: Path) -> str:
    """torch's name of the dtype of a model's first stored tensor, such as "float16"; "float32" for any unusual one.

    Raises:
        OSError, ValueError: see `read_header`.
    """
    for file in sorted(folder.glob("*.safetensors")):
        for tensor in read_header(file).values():
            return TORCH_DTYPES.get(tensor.dtype, "float32")
    return "float32"
