"""A safetensors header gives names, dtypes and shapes; what is no header is a ValueError, never a crash."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_practice.storage.safetensors_header import TensorInfo, read_header, stored_dtype


def write(file: Path, header: dict, values: bytes = b"", length: int = -1) -> Path:
    content = json.dumps(header).encode()
    file.write_bytes((len(content) if length < 0 else length).to_bytes(8, "little") + content + values)
    return file


A = {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}


def test_names_dtypes_and_shapes(tmp_path: Path) -> None:
    write(tmp_path / "model-1.safetensors", {"__metadata__": {"format": "pt"}, "a": A}, bytes(12))
    write(tmp_path / "model-2.safetensors", {"b": {**A, "dtype": "F32", "shape": [3]}}, bytes(12))
    assert read_header(tmp_path / "model-1.safetensors") == {"a": TensorInfo("BF16", (2, 3))}
    assert read_header(tmp_path / "model-2.safetensors") == {"b": TensorInfo("F32", (3,))}
    assert stored_dtype(tmp_path) == "bfloat16"


@pytest.mark.parametrize(("dtype", "name"), [("F64", "float64"), ("F32", "float32"), ("F16", "float16")])
def test_the_library_writes_headers_that_are_read_here(tmp_path: Path, dtype: str, name: str) -> None:
    save_file({"a": np.zeros((2, 3), name)}, tmp_path / "model.safetensors")
    header = read_header(tmp_path / "model.safetensors")
    assert header == {"a": TensorInfo(dtype, (2, 3))}
    assert header["a"].start == (tmp_path / "model.safetensors").stat().st_size - 6 * np.dtype(name).itemsize
    assert stored_dtype(tmp_path) == name


def test_an_unusual_dtype_and_no_file_at_all_count_as_float32(tmp_path: Path) -> None:
    assert stored_dtype(tmp_path) == "float32"
    write(tmp_path / "model.safetensors", {"a": {**A, "dtype": "I8"}}, bytes(12))
    assert stored_dtype(tmp_path) == "float32"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 269060552\n",  # the first 8 bytes: 10**18
        (1 << 62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (5).to_bytes(8, "little") + b'{"a":',
        (9).to_bytes(8, "little") + b'{"a":{}}\n',
        (8).to_bytes(8, "little") + b'{"a": 1}',
        (2).to_bytes(8, "little") + b"\xff\xfe",
        (30).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":1}}'[:30],
    ],
)
def test_what_is_no_header_is_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        read_header(tmp_path / "model.safetensors")
