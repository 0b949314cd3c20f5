"""The files of one adapter: what PEFT writes, and a tokenizer that old readers understand too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def save(model: Any, tokenizer: Any, training_args: Any, folder: Path) -> None:
    """Write adapter, tokenizer group and training_args.bin into `folder`. Never asks the Hub anything."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    # save_embedding_layers="auto" would look the base's config up on the Hub (huggingface/peft#1452)
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink()  # PEFT's empty template; ours is written when the run is finished
    save_tokenizer(tokenizer, folder)
    torch.save(training_args, folder / "training_args.bin")
    give_umask_rights(folder)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer group: also the files that transformers 5 no longer writes and older readers need.

    `vocab.json` and `merges.txt` come from `tokenizer.json` (byte-level BPE only); the template stands in
    `chat_template.jinja` and in `tokenizer_config.json`; the class is one that transformers 4 knows.
    """
    tokenizer.save_pretrained(str(folder))
    whole = _read_json(folder / "tokenizer.json")
    if whole.get("model", {}).get("type") == "BPE":
        model = whole["model"]
        added = {one["content"]: one["id"] for one in whole.get("added_tokens", [])}
        _write_json(folder / "vocab.json", {**model["vocab"], **added}, indent=None)
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    config = _read_json(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.pop("extra_special_tokens", None)  # a list here is refused by transformers 4
    if extra:
        config["additional_special_tokens"] = list(extra)
    if tokenizer.chat_template:
        config["chat_template"] = tokenizer.chat_template
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, "utf-8")
    _write_json(folder / "tokenizer_config.json", config)
    named: dict[str, Any] = {
        name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
    }
    if extra:
        named["additional_special_tokens"] = list(extra)
    _write_json(folder / "special_tokens_map.json", named)


def give_umask_rights(folder: Path) -> None:
    """safetensors makes its files private; a folder to be shared should follow the user's umask."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~mask)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def _write_json(path: Path, value: Any, indent: Any = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", "utf-8")
