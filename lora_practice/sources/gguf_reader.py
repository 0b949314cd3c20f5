"""A Llama-style GGUF -> a model folder that every version of transformers loads and saves.

transformers reads GGUF itself, but version 5 cannot save the result. The values are the file's (`gguf.dequantize`),
rounded once to fp16, which old cards support; the error of Q4_1 is hundreds of times larger than that rounding.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def dequantize(gguf_file: Path, folder: Path) -> None:
    """Write config, fp16 `model.safetensors` and tokenizer of `gguf_file` into `folder`."""
    import gguf
    import numpy as np
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(gguf_file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        module = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else ""
        if module in heads:
            values = _unpermute(values, heads[module])
        tensors[_hf_name(tensor.name)] = np.ascontiguousarray(values.astype(np.float16))
    _write_json(folder / "config.json", _config(meta, tied="lm_head.weight" not in tensors))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes files private
    stop = meta["tokenizer.ggml.eos_token_id"]
    ends = {"bos_token_id": meta["tokenizer.ggml.bos_token_id"], "eos_token_id": stop}
    _write_json(folder / "generation_config.json", {**ends, "pad_token_id": stop})
    _write_tokenizer(meta, folder)


def _hf_name(name: str) -> str:
    plain = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    plain["output.weight"] = "lm_head.weight"
    if name in plain:
        return plain[name]
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[module]}.{kind}"


def _unpermute(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's interleaving of the two RoPE halves (`LlamaModel.permute` in its converter)."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, rows // heads // 2, 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def _config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    theta = meta["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
        "hidden_act": "silu",
        "hidden_size": meta["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "torch_dtype": "float16",
        "vocab_size": meta["llama.vocab_size"],
    }


def _write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """Write the byte-level BPE that llama.cpp calls "smollm": GPT-2's splitting rules, digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if meta["tokenizer.ggml.model"] != "gpt2" or meta["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"unknown tokenizer in GGUF: {meta['tokenizer.ggml.model']}/{meta['tokenizer.ggml.pre']}")
    words = meta["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in meta["tokenizer.ggml.merges"]]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"]
    special = [word for word, kind in zip(words, kinds) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    def word(role: str) -> str:
        return words[meta[f"tokenizer.ggml.{role}_token_id"]]

    named = {"bos_token": word("bos"), "eos_token": word("eos"), "unk_token": word("unknown")}
    named["pad_token"] = word("padding")
    extra = [one for one in special if one in ("<|im_start|>", "<|im_end|>")]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(vocab[one]): {"content": one, **flags} for one in special},
        "additional_special_tokens": extra,
        **named,
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
