"""Writes a model folder or an adapter as one GGUF file for llama.cpp and Ollama.

Names, types and rounding come from the `gguf` package, which llama.cpp's own converter uses too. A matrix is written
as F16 or Q8_0 (blocks of 32 weights with one fp16 scale), a vector as F32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.export.gguf_tokenizer import no_gguf
from lora_practice.model import adapter_config

PRECISIONS = ("f16", "q8_0")
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # by their "model_type"; GGUF calls them the same
PERMUTED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
LARGEST_F16 = 65504.0


def writable_config(folder: Path) -> dict[str, Any]:
    """config.json of the model in `folder`, if the model can be written as GGUF.

    Raises:
        UserError: another architecture, or a feature that ARCHITECTURES do not have here.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kind, rope = config.get("model_type"), _rope(config)
    problem = ""
    if kind not in ARCHITECTURES:
        problem = text(f"还不支持 {kind} 这种模型", f"{kind} is not one of {', '.join(ARCHITECTURES)}")
    elif config.get("hidden_act") != "silu" or config.get("mlp_bias"):
        problem = text("激活函数或偏置不常见", "an unusual activation or bias")
    elif config.get("attention_bias") and kind != "qwen2":
        problem = text("注意力带偏置", "attention with a bias")
    elif rope.get("rope_type", rope.get("type", "default")) != "default":
        problem = text("位置编码经过缩放", "scaled rotary positions")
    elif config.get("use_sliding_window"):
        problem = text("滑动窗口注意力", "sliding-window attention")
    if problem:
        raise no_gguf(problem, folder / "config.json")
    return config


def write_model(folder: Path, fields: dict[str, Any], precision: str, target: Path) -> None:
    """Write the model in `folder` as the file `target`, with one tensor in memory at a time.

    Args:
        fields: of the tokenizer, from `gguf_tokenizer.token_fields`.
        precision: one of PRECISIONS.

    Raises:
        UserError: see `writable_config`; or a weight is too large for fp16.
    """
    import gguf

    config = writable_config(folder)
    writer = gguf.GGUFWriter(target, config["model_type"])
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if precision == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    if precision != "f16":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    for key, value in fields.items():
        _add(writer, key, value)
    matrix_type = gguf.GGMLQuantizationType.F16 if precision == "f16" else gguf.GGMLQuantizationType.Q8_0
    names = _names(config)
    types: list[tuple[str, Any]] = []
    for name, shape in _shapes(folder):
        tensor_type = _tensor_type(shape, matrix_type)
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
        size = math.prod(shape) // block * block_bytes
        writer.add_tensor_info(names(name), shape, _numpy_dtype(tensor_type), size, raw_dtype=tensor_type)
        types.append((name, tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (name, tensor_type), values in zip(types, _values(folder, config)):
        if tensor_type != gguf.GGMLQuantizationType.F32 and not abs(values).max() <= LARGEST_F16:
            raise UserError(text(f"{name} 里的数超出 fp16", f"a number in {name} is beyond fp16"), str(folder))
        writer.write_tensor_data(gguf.quantize(values, tensor_type))
    writer.close()


def write_adapter(folder: Path, config: dict[str, Any], target: Path) -> None:
    """Write the LoRA adapter in `folder` as the file `target`, in F32.

    llama.cpp scales by alpha / r; with rsLoRA the alpha written is alpha sqrt(r), which gives alpha / sqrt(r).

    Args:
        config: config.json of its base.

    Raises:
        UserError: llama.cpp's adapters cannot hold it (DoRA, whole trained layers, several ranks).
    """
    import gguf
    from safetensors import safe_open

    lora = adapter_config.read_adapter_config(folder)
    problem = adapter_problem(lora)
    if problem:
        raise UserError(problem, str(folder / adapter_config.ADAPTER_CONFIG))
    writer = gguf.GGUFWriter(target, config["model_type"])
    writer.add_type("adapter")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", lora["lora_alpha"] * (lora["r"] ** 0.5 if lora.get("use_rslora") else 1))
    names = _names(config)
    weights = folder / adapter_config.ADAPTER_WEIGHTS
    with safe_open(weights, "pt") as file:  # as torch tensors: numpy has no bfloat16
        for name in file.keys():  # noqa: SIM118
            module, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
            values = file.get_tensor(name).float().numpy()
            if part == "B":
                values = _permuted(module + ".weight", values, config)
            writer.add_tensor(f"{names(module + '.weight')}.lora_{part.lower()}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def adapter_problem(lora: dict[str, Any]) -> str:
    """Why a GGUF adapter cannot hold the one with this adapter_config.json (`lora`); "" if it can."""
    for field in (
        "use_dora",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "trainable_token_indices",
    ):
        if lora.get(field):
            return text(f"GGUF 的适配器装不下 {field}", f"a GGUF adapter cannot hold {field}")
    return ""


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The RoPE settings of config.json: all of them (transformers 5), or only the scaling, if any (transformers 4)."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _head_size(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _names(config: dict[str, Any]) -> Callable[[str], str]:
    """A function from transformers' name of a tensor to GGUF's."""
    import gguf

    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[config["model_type"]]
    known = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])

    def renamed(name: str) -> str:
        found = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UserError(text(f"GGUF 里没有 {name} 的位置", f"a GGUF has no place for {name}"))
        return found

    return renamed


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    from safetensors import safe_open

    for path in _files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_slice(name).get_shape()


def _values(folder: Path, config: dict[str, Any]) -> Iterator[Any]:
    """The tensors in the order of `_shapes`, as float32 arrays."""
    from safetensors import safe_open

    for path in _files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield _permuted(name, file.get_tensor(name).float().numpy(), config)


def _permuted(name: str, values: Any, config: dict[str, Any]) -> Any:
    """Interleave the two RoPE halves of each head's rows, in a Llama's q and k only.

    transformers rotates (x[i], x[i + D/2]), llama.cpp's Llama (x[2i], x[2i + 1]): `LlamaModel.permute` there.
    """
    module = name.split(".")[-2]
    if config["model_type"] != "llama" or module not in PERMUTED:
        return values
    heads = config.get(PERMUTED[module]) or config["num_attention_heads"]
    rows = values.shape[0]
    return values.reshape(heads, 2, rows // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _tensor_type(shape: list[int], matrix_type: Any) -> Any:
    """The GGML type of a tensor: F32 for a vector; `matrix_type`, or F16 where its rows are no whole blocks."""
    import gguf

    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    fits = shape[-1] % gguf.GGML_QUANT_SIZES[matrix_type][0] == 0
    return matrix_type if fits else gguf.GGMLQuantizationType.F16


def _numpy_dtype(tensor_type: Any) -> Any:
    import numpy as np

    return np.dtype({"F32": np.float32, "F16": np.float16}.get(tensor_type.name, np.int8))
