"""Merge: base + adapter -> one plain model that needs neither. Then, if asked, GGUF files of it, with their proof.

The model goes to DIR/merged/, not into DIR itself: from a folder that holds both, transformers reads the merged weights
and then adds the adapter to them once more, without a word (huggingface/peft#1381). docs/merge.md shows it.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.inference.chat_model import stop_ids
from lora_practice.inference.load import find_base, tokenizer_for, with_adapter
from lora_practice.model import adapter_files
from lora_practice.model.load import load_base
from lora_practice.sources.find import Source
from lora_practice.storage.disk import staging
from lora_practice.storage.safetensors_header import stored_dtype

MERGED = "merged"


def merge_adapter(folder: Path) -> tuple[Path, float]:
    """Write DIR/merged/ from the finished adapter in DIR; no training is needed.

    The sum W + (alpha/r) B A is taken in fp32 and rounded once to the precision that the base is stored in.

    Returns:
        The merged folder, and the largest difference of a logit between adapter and merged model.

    Raises:
        UserError: DIR holds no adapter or a damaged one, its base cannot be found, or DIR/merged exists.
    """
    target = folder / MERGED
    if not (folder / "adapter_config.json").is_file():
        raise UserError(text("这里没有适配器", "no adapter here"), where=str(folder))
    if target.exists():
        raise UserError(
            text("已经合并过了", "already merged"),
            where=str(target),
            fix=text("要重做就先删掉它；直接用：", "to merge again, delete it first; to use it: ")
            + f"lora-practice chat {shlex.quote(str(target))}",
        )
    import torch

    base = find_base(folder)
    model = with_adapter(load_base(base, "fp32"), folder).eval()
    tokenizer = tokenizer_for(model, folder, base)
    assert base.path is not None
    stored = stored_dtype(base.path)  # after loading, which finds a damaged file
    needed = sum(p.numel() for p in model.parameters()) * 4
    probe = tokenizer("The quick brown fox", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(probe).logits
    merged = model.merge_and_unload().to(getattr(torch, stored))
    merged.config.use_cache = True
    _set_ends(merged, tokenizer)
    with staging(folder, needed) as scratch:
        whole = scratch / MERGED
        merged.save_pretrained(str(whole), safe_serialization=True)
        adapter_files.save_tokenizer(tokenizer, whole)
        adapter_files.give_umask_rights(whole)
        again = load_base(Source("folder", str(whole), whole), "fp32").eval()
        with torch.no_grad():
            difference = float((again(probe).logits - expected).abs().max())
        os.replace(whole, target)
    return target, difference


def merge_sentence(target: Path, difference: float) -> str:
    """What `merge` returned, in a sentence."""
    return text(
        f"合并好的模型在 {target}/（与适配器的 logits 最多差 {difference:.4f}）",
        f"the merged model is in {target}/ (its logits differ from the adapter's by {difference:.4f} at most)",
    )


def _set_ends(model: Any, tokenizer: Any) -> None:
    """The merged model stops where the adapter's chats end, in any program."""
    stop = sorted(stop_ids(tokenizer, model.generation_config.eos_token_id))
    model.generation_config.eos_token_id = stop if len(stop) > 1 else stop[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
