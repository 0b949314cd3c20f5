"""Tiny model folders that can be written as GGUF, and a Modelfile read the way Ollama reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tiny import make_tokenizer

from lora_practice.export.gguf_tokenizer import SPLITS

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def cut_like(name: str, folder: Path) -> None:
    """Make the tokenizer in `folder` cut words as llama.cpp's `name` does."""
    steps = {split: steps for steps, split in SPLITS.items()}[name]
    spelt = {"digits": "Digits", "split": "Split", "bytes": "ByteLevel"}
    parts: list[dict[str, Any]] = []
    for kind, *more in steps:
        part: dict[str, Any] = {"type": spelt[kind]}
        if kind == "digits":
            part["individual_digits"] = True
        elif kind == "split":
            part.update(pattern={"Regex": more[0]}, behavior="Isolated", invert=False)
        else:
            part.update(add_prefix_space=False, trim_offsets=True, use_regex=more[0])
        parts.append(part)
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text("utf-8"))
    whole["pre_tokenizer"] = parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}
    whole["normalizer"] = {"type": "NFC"} if name == "qwen2" else None
    whole["model"]["ignore_merges"] = name == "llama-bpe"
    path.write_text(json.dumps(whole, ensure_ascii=False), "utf-8")


def make_folder(folder: Path, kind: str = "llama", split: str = "smollm") -> Path:
    """A tiny model of `kind` with weights large enough to tell one token from another, and its tokenizer."""
    import torch
    import transformers

    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    config = getattr(transformers, name + "Config")(
        vocab_size=352, num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=512, **SHAPE
    )
    config.tie_word_embeddings = kind != "qwen2"
    torch.manual_seed(0)
    model = getattr(transformers, name + "ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    cut_like(split, folder)
    return folder


def ollama_prompt(modelfile: str, messages: list[dict[str, str]]) -> str:
    """What Ollama would send to the model: SYSTEM put first, TEMPLATE run as the small part of Go it uses."""
    found = {name: re.search(rf'^{name} """(.*?)"""', modelfile, flags=re.S | re.M) for name in ("TEMPLATE", "SYSTEM")}
    if found["SYSTEM"] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": found["SYSTEM"].group(1)}, *messages]
    assert found["TEMPLATE"]
    words = re.split(r"\{\{ (.*?) \}\}", found["TEMPLATE"].group(1))  # text, action, text, action, ...
    start, end = words.index("range .Messages"), len(words) - 1 - words[::-1].index("end")
    return words[0] + "".join(_turn(words[start + 1 : end], one) for one in messages) + "".join(words[end + 1 :])


def _turn(words: list[str], message: dict[str, str]) -> str:
    said, taken, done = "", False, False
    for position, word in enumerate(words):
        condition = re.fullmatch(r'(?:else )?if eq \.Role "(\w+)"', word) if position % 2 else None
        if condition:
            taken = not done and condition.group(1) == message["role"]
            done = done or taken
        elif word == "end" and position % 2:
            taken = True
        elif taken:
            said += message["content"] if position % 2 and word == ".Content" else word
    return said
