"""A model folder or an adapter -> one GGUF file, as llama.cpp and Ollama read it.

Names, types and rounding are those of the `gguf` package, which llama.cpp's own converter uses; what is ours is the
walk over the files. A matrix is F16 or Q8_0 (blocks of 32 weights with one fp16 scale), a vector F32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.model import adapter_config

PRECISIONS = ("f16", "q8_0")
ARCHITECTURES = ("llama", "qwen2", "qwen3")  # by their "model_type"; GGUF calls them the same
PERMUTED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
LARGEST_F16 = 65504.0


def writable_config(folder: Path) -> dict[str, Any]:
    """config.json of a model that can be written.

    Raises:
        UserError: another architecture, or a shape that the three here do not have.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kind, rope = config.get("model_type"), _rope(config)
    problem = ""
    if kind not in ARCHITECTURES:
        problem = text(f"还不会写 {kind} 这种模型", f"{kind} is not one of {', '.join(ARCHITECTURES)}")
    elif config.get("hidden_act") != "silu" or config.get("mlp_bias"):
        problem = text("激活函数或偏置不常见", "an unusual activation or bias")
    elif config.get("attention_bias") and kind != "qwen2":
        problem = text("注意力带偏置", "attention with a bias")
    elif rope.get("rope_type", rope.get("type", "default")) != "default":
        problem = text("位置编码经过缩放", "scaled rotary positions")
    elif config.get("use_sliding_window"):
        problem = text("滑动窗口注意力", "sliding-window attention")
    if problem:
        fix = text("用 lora-practice merge 的结果，或 llama.cpp 的转换程序", "use merged/, or llama.cpp's converter")
        what = text(f"写不成 GGUF：{problem}", f"no GGUF can be made: {problem}")
        raise UserError(what, str(folder / "config.json"), fix)
    return config


def write_model(folder: Path, fields: dict[str, Any], kind: str, target: Path) -> None:
    """Write the model in `folder` as `target`, one tensor in memory at a time; `kind` is one of KINDS.

    Args:
        fields: the tokenizer's, from `gguf_tokens.token_fields`.

    Raises:
        UserError: see `read_config`; or a weight is too large for fp16.
    """
    import gguf

    config = writable_config(folder)
    writer = gguf.GGUFWriter(target, config["model_type"])
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    if kind != "f16":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    for key, value in fields.items():
        _add(writer, key, value)
    matrix = gguf.GGMLQuantizationType.F16 if kind == "f16" else gguf.GGMLQuantizationType.Q8_0
    names = _names(config)
    chosen: list[tuple[str, Any]] = []
    for name, shape in _shapes(folder):
        kept = _kind_of(shape, matrix)
        block, width = gguf.GGML_QUANT_SIZES[kept]
        size = _count(shape) // block * width
        writer.add_tensor_info(names(name), shape, _numpy_dtype(kept), size, raw_dtype=kept)
        chosen.append((name, kept))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (name, kept), values in zip(chosen, _values(folder, config)):
        if kept != gguf.GGMLQuantizationType.F32 and not abs(values).max() <= LARGEST_F16:
            raise UserError(text(f"{name} 里的数超出 fp16", f"a number in {name} is beyond fp16"), str(folder))
        writer.write_tensor_data(gguf.quantize(values, kept))
    writer.close()


def write_adapter(folder: Path, config: dict[str, Any], target: Path) -> None:
    """Write the LoRA adapter in `folder` as `target`, in F32; `config` is its base's.

    llama.cpp scales by alpha / r; with rsLoRA the alpha written is alpha sqrt(r), which gives alpha / sqrt(r).

    Raises:
        UserError: llama.cpp's adapters cannot hold it (DoRA, whole trained layers, several ranks).
    """
    import gguf
    from safetensors import safe_open

    lora = adapter_config.read_adapter_config(folder)
    problem = adapter_problem(lora)
    if problem:
        raise UserError(problem, str(folder / adapter_config.CONFIG))
    writer = gguf.GGUFWriter(target, config["model_type"])
    writer.add_type("adapter")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", lora["lora_alpha"] * (lora["r"] ** 0.5 if lora.get("use_rslora") else 1))
    names = _names(config)
    with safe_open(
        folder / adapter_config.ADAPTER_WEIGHTS, "pt"
    ) as file:  # numpy, which has no bfloat16, could not read every one
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
    """Why llama.cpp's adapters cannot hold the one with this adapter_config.json; "" if they can."""
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
    """transformers 5 has everything about positions in one place; 4 only the scaling, if any."""
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


def _names(config: dict[str, Any]) -> Any:
    """transformers' name of a tensor -> GGUF's."""
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
    """float32 arrays, in the order of `_shapes`."""
    from safetensors import safe_open

    for path in _files(folder):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield _permuted(name, file.get_tensor(name).float().numpy(), config)


def _permuted(name: str, values: Any, config: dict[str, Any]) -> Any:
    """Interleave the two rope halves of each head's rows, as llama.cpp wants them of a Llama only.

    transformers rotates (x[i], x[i + D/2]), llama.cpp's Llama (x[2i], x[2i + 1]): `LlamaModel.permute` there.
    """
    site = name.split(".")[-2]
    if config["model_type"] != "llama" or site not in PERMUTED:
        return values
    heads = config.get(PERMUTED[site]) or config["num_attention_heads"]
    rows = values.shape[0]
    return values.reshape(heads, 2, rows // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _kind_of(shape: list[int], matrix: Any) -> Any:
    import gguf

    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    fits = shape[-1] % gguf.GGML_QUANT_SIZES[matrix][0] == 0
    return matrix if fits else gguf.GGMLQuantizationType.F16


def _numpy_dtype(kind: Any) -> Any:
    import numpy as np

    return np.dtype({"F32": np.float32, "F16": np.float16}.get(kind.name, np.int8))


def _count(shape: list[int]) -> int:
    product = 1
    for one in shape:
        product *= one
    return product
