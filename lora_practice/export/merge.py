"""Merges an adapter into its base: one plain model, in DIR/merged/, that needs neither the base nor PEFT.

It is not written into DIR itself: from a folder that holds both, transformers reads the merged weights and then adds
the adapter to them once more, without any warning (huggingface/peft#1381). docs/merge.md shows it.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.inference.chat_model import stop_ids
from lora_practice.inference.load import find_base, folder_source, tokenizer_for, with_adapter
from lora_practice.model import adapter_files
from lora_practice.model.adapter_config import ADAPTER_CONFIG
from lora_practice.model.load import load_base
from lora_practice.run.file_kinds import MERGED
from lora_practice.run.folder import writing_into
from lora_practice.run.own_files import check_all_known, unknown_in
from lora_practice.storage.disk import staging
from lora_practice.storage.lock import free_name_beside
from lora_practice.storage.safetensors_header import stored_dtype

ROUNDING = 0.5  # the largest difference of a logit that rounding to 16 bits explains; measured: docs/export.md


def merge_adapter(folder: Path, overwrite: bool = False) -> tuple[Path, float]:
    """Write DIR/merged/ from the finished adapter in DIR; no training is needed.

    The sum W + (alpha/r) B A is computed in fp32 and rounded once, to the dtype that the base is stored in.

    Args:
        overwrite: replace an earlier DIR/merged, once the new one is written.

    Returns:
        The merged folder, and the largest difference of a logit between adapter and merged model.

    Raises:
        UserError: DIR holds no adapter or a damaged one, its base cannot be found, DIR/merged exists, or another
            process is writing into DIR.
    """
    target = folder / MERGED
    check_has_adapter(folder)
    if os.path.lexists(target) and not overwrite:
        use_it = f"lora-practice chat {shlex.quote(str(target))}"
        raise UserError(
            text("已经合并过了", "already merged"),
            where=str(target),
            fix=text(f"重新合并：--overwrite；直接用它：{use_it}", f"merge again: --overwrite; to use it: {use_it}"),
        )
    check_all_known(unknown_in(target), target)
    with writing_into(folder):
        return _merge(folder, target)


def _merge(folder: Path, target: Path) -> tuple[Path, float]:
    import torch

    base = find_base(folder)
    model = with_adapter(load_base(base, "fp32"), folder).eval()
    tokenizer = tokenizer_for(model, folder, base)
    assert base.path is not None
    dtype = stored_dtype(base.path)  # after loading, which finds a damaged file
    needed = sum(p.numel() for p in model.parameters()) * 4
    probe = tokenizer("The quick brown fox", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(probe).logits
    merged = model.merge_and_unload().to(getattr(torch, dtype))
    merged.config.use_cache = True
    _set_stop_tokens(merged, tokenizer)
    with staging(folder, needed) as scratch:
        written = scratch / MERGED
        merged.save_pretrained(str(written), safe_serialization=True)
        adapter_files.save_tokenizer(tokenizer, written)
        adapter_files.give_umask_rights(written)
        reloaded = load_base(folder_source(written), "fp32").eval()
        with torch.no_grad():
            difference = float((reloaded(probe).logits - expected).abs().max())
        move_into_place(written, target)
    return target, difference


def merge_sentence(target: Path, difference: float) -> str:
    """The result of `merge_adapter` in a sentence, with the reason for the difference where there is a harmless one."""
    why_zh, why_en = "", ""
    if difference <= ROUNDING and stored_dtype(target) in ("float16", "bfloat16"):
        why_zh, why_en = "：权重舍入到 16 位造成的，正常", ": rounding to 16 bits, as expected"
    return text(
        f"合并好的模型在 {target}/（与适配器的 logits 最多差 {difference:.4f}{why_zh}）",
        f"the merged model is in {target}/ (its logits differ from the adapter's by {difference:.4f} at most{why_en})",
    )


def merged_next(target: Path) -> str:
    """The next command after a merge."""
    return text("下一步，和它聊聊：", "next, talk to it:") + f"\n  lora-practice chat {shlex.quote(str(target))}"


def check_has_adapter(folder: Path) -> None:
    """UserError if there is no adapter in `folder`."""
    if not (folder / ADAPTER_CONFIG).is_file():
        fix = text("检查路径，或先训练：lora-practice train", "check the path, or train first: lora-practice train")
        raise UserError(text("这里没有适配器", "no adapter here"), where=str(folder), fix=fix)


def move_into_place(written: Path, target: Path) -> None:
    """Move a folder out of `staging`; an earlier `target` goes into its place there, and so away with it.

    Where something that we did not write came into `target` meanwhile, it is kept beside it.
    """
    if unknown_in(target):
        kept = free_name_beside(target)
        os.replace(target, kept)
        zh, en = f"里面有别的文件，留在 {kept}", f"it holds files that we did not write: kept in {kept}"
        tell(f"{target}: {text(zh, en)}")
    elif target.exists():
        os.replace(target, written.with_name("old"))
    os.replace(written, target)


def _set_stop_tokens(model: Any, tokenizer: Any) -> None:
    """Write into the merged model's configs where its answers end, for other programs too."""
    ids = sorted(stop_ids(tokenizer, model.generation_config.eos_token_id))
    model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
