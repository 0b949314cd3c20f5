"""The files of one adapter: what PEFT writes, and a tokenizer that old readers understand too.

An adapter may come from anyone: what is read is checked before PEFT sees it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from lora_practice.errors import UserError, text

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LARGEST_RANK = 65_536
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


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
    if _read_json(folder / "tokenizer.json").get("model", {}).get("type") == "BPE":
        vocab, merges = _tokens(folder)
        _write_json(folder / "vocab.json", vocab, indent=None)
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    config = _read_json(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if config.get("tokenizer_class") == "PreTrainedTokenizerFast":
        # transformers 4 would add BERT's token_type_ids, which no `generate` of a causal model takes
        config["model_input_names"] = ["input_ids", "attention_mask"]
    # transformers 5 has a list here, which transformers 4 refuses; that has {} and the list under its own name
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
    """safetensors makes its files private; a folder to be shared should follow the user's umask."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~mask)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def _write_json(path: Path, value: Any, indent: Any = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", "utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter.

    Raises:
        UserError: it cannot be read, is of another kind of adapter, or asks for code of its own.
    """
    try:
        config = _read_json(folder / CONFIG)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(text(f"{CONFIG} 读不了", f"{CONFIG} cannot be read"), str(folder)) from error
    if not isinstance(config, dict):
        raise UserError(text(f"{CONFIG} 读不了：不是对象", f"{CONFIG} cannot be read: not an object"), str(folder))
    kind, rank, saved = config.get("peft_type"), config.get("r"), config.get("modules_to_save") or []
    # PEFT would import what these two name
    code = [name for name in ("auto_mapping", "megatron_config") if config.get(name)]
    problem = ""
    if kind != "LORA":
        problem = text(f"不是 LoRA 适配器：{str(kind)[:40]!r}", f"not a LoRA adapter: {str(kind)[:40]!r}")
    elif not isinstance(rank, int) or not 0 < rank <= LARGEST_RANK:
        problem = text(f"秩 r 不对：{str(rank)[:40]!r}", f"no rank can be r = {str(rank)[:40]!r}")
    elif code:
        problem = text(f"{code[0]} 要运行别的代码", f"{code[0]} asks for other code to be run")
    elif not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        problem = text("modules_to_save 不是名字的列表", "modules_to_save is no list of names")
    if problem:
        fix = text("这里只用训练脚本写出的 LoRA 适配器", "use a LoRA adapter such as the training script writes")
        raise UserError(problem, str(folder / CONFIG), fix)
    return config


def base_name(folder: Path, trained_on: dict[str, Any], own: str) -> str:
    """The base that the adapter names; `trained_on` is the "model" of its run_record.json.

    A path counts only where the record of a run on this machine names it too: a folder from elsewhere must not
    choose what is read here. One that ends in `own`, the embedded model's folder, is a name: that model is found in
    today's cache, wherever the cache was then.

    Raises:
        UserError: it names no base, another one than the record, or a place outside.
    """
    named = read_config(folder).get("base_model_name_or_path")
    fix = text("用 --base-model 指定底座", "name the base with --base-model")
    if not isinstance(named, str) or not named:
        raise UserError(text("适配器没写底座是谁", "the adapter names no base"), str(folder / CONFIG), fix)
    known = [one for one in map(trained_on.get, ("name", "path", "hub_id")) if isinstance(one, str) and one]
    shown = repr(named if len(named) < 100 else named[:100] + "...")
    if known and last_part(named) not in map(last_part, known):
        what = text(
            f"底座写的是 {shown}，记录里却是 {known[0][:100]!r}",
            f"the base is {shown} here and {known[0][:100]!r} in run_record.json",
        )
        raise UserError(what, str(folder / CONFIG), fix)
    is_download = folder.parent.name == "snapshots"  # of the Hub's cache
    trusted = last_part(named) == own or (named in known and not is_download)
    if not HUB_NAME.fullmatch(named) and not trusted:
        what = text(
            f"底座 {shown} 不是 Hub 上的名字，不去读它", f"its base {shown} is no name on the Hub: it is not read"
        )
        raise UserError(what, str(folder / CONFIG), fix)
    return named


def last_part(name: str) -> str:
    """The last part of a path of any system, or of a Hub name."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def check_modules(model: Any, config: dict[str, Any], folder: Path) -> None:
    """UserError where `modules_to_save` names what `model` does not have."""
    names = [name for name, _ in model.named_modules()]
    for wanted in config.get("modules_to_save") or []:
        if not any(name == wanted or name.endswith("." + wanted) for name in names):
            what = text(
                f"modules_to_save 里的 {wanted[:60]!r} 在底座里没有",
                f"modules_to_save names {wanted[:60]!r}, which the base lacks",
            )
            raise UserError(what, str(folder / CONFIG))


def misfit(model: Any, folder: Path) -> str:
    """Why the weights in `folder` are not those of the adapter of `model` (a PEFT model); "" if they are.

    PEFT itself passes over tensors that are missing or left over: the answers would be the base's.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    with safe_open(folder / WEIGHTS, "pt") as file:
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
    """UserError if the tokenizer in `folder` gives the base's tokens other ids, or splits words otherwise."""
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
    """(token -> id, merges in order) of a tokenizer.json; kinds without merges have an empty list."""
    whole = _read_json(folder / "tokenizer.json")
    vocab = whole["model"]["vocab"]
    if not isinstance(vocab, dict):  # a Unigram model: [token, score] by id
        vocab = {pair[0]: number for number, pair in enumerate(vocab)}
    added = {one["content"]: one["id"] for one in whole.get("added_tokens") or []}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"].get("merges") or []]
    return {**vocab, **added}, merges
