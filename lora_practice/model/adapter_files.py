"""The files of one adapter: written so that old versions can read them too, and checked against the base when read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.model import pissa
from lora_practice.model.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def save(model: Any, tokenizer: Any, training_args: Any, folder: Path) -> None:
    """Write adapter, tokenizer files and training_args.bin into `folder`, without access to the Hub."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    # save_embedding_layers="auto" would fetch the base's config from the Hub (huggingface/peft#1452)
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    pissa.save_as_lora(model, folder)
    (folder / "README.md").unlink()  # PEFT's empty template; the model card is written when the run is finished
    config = _read_json(folder / ADAPTER_CONFIG)
    if isinstance(config.get("target_modules"), list):  # PEFT writes a set, in another order each time
        _write_json(folder / ADAPTER_CONFIG, {**config, "target_modules": sorted(config["target_modules"])})
    save_tokenizer(tokenizer, folder)
    torch.save(training_args, folder / "training_args.bin")
    give_umask_rights(folder)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer files, also those that transformers 5 no longer writes and older versions need.

    `vocab.json` and `merges.txt` are made from `tokenizer.json` (byte-level BPE only); the chat template goes into
    `chat_template.jinja` and `tokenizer_config.json`; the tokenizer class is one that transformers 4 knows.
    """
    tokenizer.save_pretrained(str(folder))
    if _read_json(folder / "tokenizer.json").get("model", {}).get("type") == "BPE":
        vocab, merges = _tokens(folder)
        _write_json(folder / "vocab.json", vocab, indent=None)
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    config = _read_json(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if config.get("tokenizer_class") == "PreTrainedTokenizerFast":
        # else transformers 4 adds BERT's token_type_ids, which `generate` of a causal model refuses
        config["model_input_names"] = ["input_ids", "attention_mask"]
    # transformers 5 writes a list here, which transformers 4 refuses; both read it under the older name
    extra = config.pop("extra_special_tokens", None) or config.get("additional_special_tokens")
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
    """Set the permissions of .safetensors files by the user's umask; safetensors makes them private."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~mask)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def _write_json(path: Path, value: Any, indent: Any = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", "utf-8")


def check_modules(model: Any, config: dict[str, Any], folder: Path) -> None:
    """UserError if `modules_to_save` names a module that `model` does not have, or the rank is not the weights'."""
    _check_rank(config, folder)
    names = [name for name, _ in model.named_modules()]
    for wanted in config.get("modules_to_save") or []:
        if not any(name == wanted or name.endswith("." + wanted) for name in names):
            what = text(
                f"modules_to_save 里的 {wanted[:60]!r} 在底座里没有",
                f"modules_to_save names {wanted[:60]!r}, which the base lacks",
            )
            raise UserError(what, str(folder / ADAPTER_CONFIG))


def _check_rank(config: dict[str, Any], folder: Path) -> None:
    """UserError if the config's rank exceeds the weights': PEFT allocates what a forged rank asks for."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            ranks = [file.get_slice(name).get_shape()[0] for name in file.keys() if "lora_A" in name]  # noqa: SIM118
    except (SafetensorError, OSError, IndexError):  # damaged weights are reported where they are loaded
        return
    wanted = max(config["r"], *(config.get("rank_pattern") or {0: 0}).values())
    if ranks and wanted > max(ranks):
        what = text(
            f"秩 r 写的是 {wanted}，权重的秩却是 {max(ranks)}", f"r is {wanted}, but its weights have rank {max(ranks)}"
        )
        raise UserError(what, str(folder / ADAPTER_CONFIG))


def misfit(model: Any, folder: Path) -> str:
    """Why the weights in `folder` do not fit the adapter of the PEFT model `model`; "" if they fit.

    PEFT ignores missing and superfluous tensors, so the answers would silently be the base's.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        found = set(file.keys())
    missing = sorted(set(wanted) - found)
    if missing:
        return text(
            f"缺 {len(missing)} 个张量，如 {missing[0]}", f"{len(missing)} tensors missing, such as {missing[0]}"
        )
    left_over = sorted(name for name in found - set(wanted) if "lora_" in name)
    if left_over:
        zh, en = f"多出 {len(left_over)} 个张量", f"{len(left_over)} tensors have no place in this base"
        return text(f"{zh}，如 {left_over[0][:100]}", f"{en}, such as {left_over[0][:100]}")
    if not all(bool(weight.isfinite().all()) for weight in wanted.values()):
        return text("权重里有 NaN 或无穷大", "its weights are not finite numbers")
    return ""


def check_same_tokens(folder: Path, base: Path) -> None:
    """UserError if the tokenizer in `folder` has other ids for the base's tokens, or other merges."""
    if not (folder / "tokenizer.json").is_file() or not (base / "tokenizer.json").is_file():
        return
    try:
        (ours, our_merges), (theirs, their_merges) = _tokens(folder), _tokens(base)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(text("分词器读不了", "the tokenizer cannot be read"), str(folder / "tokenizer.json")) from error
    other = next((token for token, number in theirs.items() if ours.get(token) != number), None)
    if other is None and our_merges == their_merges:
        return
    zh, en = "分词器不是训练时用的那个", "the tokenizer is not the one that the base was trained with"
    example = "" if other is None else f" ({other[:40]!r}: {theirs[other]}, {ours.get(other)})"
    fix = text("把底座的分词器文件放回来", "bring the base's tokenizer files back")
    raise UserError(text(zh, en) + example, str(folder / "tokenizer.json"), fix)


def _tokens(folder: Path) -> tuple[dict[str, int], list[str]]:
    """(token -> id, merges in order) of a tokenizer.json; tokenizers without merges have an empty list."""
    whole = _read_json(folder / "tokenizer.json")
    vocab = whole["model"]["vocab"]
    if not isinstance(vocab, dict):  # a Unigram model: [token, score] by id
        vocab = {pair[0]: number for number, pair in enumerate(vocab)}
    added = {one["content"]: one["id"] for one in whole.get("added_tokens") or []}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"].get("merges") or []]
    return {**vocab, **added}, merges
