"""Merge: base + adapter -> one plain model that needs neither. Then, if asked, GGUF files of it, with their proof.

The model goes to DIR/merged/, not into DIR itself: from a folder that holds both, transformers reads the merged weights
and then adds the adapter to them once more, without a word (huggingface/peft#1381). docs/merge.md shows it.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_practice import adapter, adapter_config, gguf_tokens, gguf_write, llama_cpp, proof, versions
from lora_practice.disk import staging
from lora_practice.errors import UserError, tell, text
from lora_practice.generate import find_base, tokenizer_for, with_adapter
from lora_practice.model import load_base, load_tokenizer
from lora_practice.modelfile import modelfile, read_turns
from lora_practice.sources import Source
from lora_practice.talker import stop_ids

MERGED, GGUF = "merged", "gguf"


def merge(folder: Path) -> tuple[Path, float]:
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
    tokenizer = tokenizer_for(model, Source("folder", str(folder), folder), base)
    stored = stored_dtype(base)  # after loading, which finds a damaged file
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
        adapter.save_tokenizer(tokenizer, whole)
        adapter.give_umask_rights(whole)
        again = load_base(Source("folder", str(whole), whole), "fp32").eval()
        with torch.no_grad():
            difference = float((again(probe).logits - expected).abs().max())
        os.replace(whole, target)
    return target, difference


def said(target: Path, difference: float) -> str:
    """What `merge` returned, in a sentence."""
    return text(
        f"合并好的模型在 {target}/（与适配器的 logits 最多差 {difference:.4f}）",
        f"the merged model is in {target}/ (its logits differ from the adapter's by {difference:.4f} at most)",
    )


def to_gguf(folder: Path, kinds: Sequence[str] = gguf_write.KINDS, replace: bool = False) -> list[proof.Line]:
    """Write DIR/gguf/ (merged-KIND.gguf, adapter.gguf, Modelfile), and DIR/merged/ if it is not there; prove them.

    The proof stands in DIR/README.md too. `replace` lets an earlier DIR/gguf go, once the new one is written.

    Raises:
        UserError: see `merge`; DIR/gguf exists; or the tokenizer or architecture has no GGUF here.
    """
    target = folder / GGUF
    if not (folder / adapter.CONFIG).is_file():
        raise UserError(text("这里没有适配器", "no adapter here"), where=str(folder))
    if target.exists() and not replace:
        raise UserError(
            text("已经导出过了", "already exported"),
            where=str(target),
            fix=text("换掉它：--overwrite；只重做证明：--check", "replace it: --overwrite; only prove again: --check"),
        )
    base = find_base(folder)
    assert base.path is not None
    config = gguf_write.read_config(base.path)
    gguf_tokens.split_name(folder if (folder / "tokenizer.json").is_file() else base.path)
    if not (folder / MERGED).exists():
        tell(said(*merge(folder)))
    tell(text("正在写 GGUF……", "writing GGUF ..."))
    with staging(folder, 3 * _weights(folder / MERGED)) as scratch:
        whole, old = scratch / GGUF, scratch / "old"
        whole.mkdir()
        _write_gguf(folder, whole, kinds, config)
        if target.exists():
            os.replace(target, old)
        os.replace(whole, target)
    return prove_gguf(folder)


def prove_gguf(folder: Path) -> list[proof.Line]:
    """Prove DIR/merged and DIR/gguf as they are, and write the result into the card.

    Raises:
        UserError: there is nothing exported.
    """
    if not (folder / GGUF).is_dir() or not (folder / MERGED).is_dir():
        fix = f"lora-practice export {folder}"
        raise UserError(text("还没有导出", "nothing is exported here"), where=str(folder), fix=fix)
    base, done = find_base(folder), versions.installed()
    assert base.path is not None
    tell(
        text("用同样的问题检查每一种形式，约半分钟……", "asking every form the same questions, about half a minute ...")
    )
    on_base = (folder / GGUF / "adapter.gguf").is_file() and not llama_cpp.missing()
    with staging(folder, _weights(base.path) if on_base else 0) as scratch:
        base_gguf = scratch / "base.gguf"  # adapter.gguf is proved on top of it
        if on_base:
            gguf_write.write_model(base.path, _token_fields(base.path, folder), "f16", base_gguf)
        lines = proof.prove(folder, folder / GGUF, base_gguf)
    proof.write_card(folder, lines, f"peft {done['peft']}, transformers {done['transformers']}")
    return lines


def _write_gguf(folder: Path, target: Path, kinds: Sequence[str], config: dict[str, Any]) -> None:
    merged = folder / MERGED
    fields = _token_fields(merged, merged)
    for kind in kinds:
        gguf_write.write_model(merged, fields, kind, target / f"{MERGED}-{kind}.gguf")
    problem = gguf_write.adapter_problem(adapter_config.read_config(folder))
    if problem:
        tell(text(f"没有写 adapter.gguf：{problem}", f"adapter.gguf is left out: {problem}"))
    else:
        gguf_write.write_adapter(folder, config, target / "adapter.gguf")
    tokenizer = load_tokenizer(Source("folder", str(merged), merged))
    turns = read_turns(tokenizer, fields["tokenizer.ggml.add_bos_token"])
    if turns is None:
        zh = "没有写 Modelfile：这个聊天模板用 Ollama 的语法写不出来；llama.cpp 用 GGUF 里的模板"
        en = "no Modelfile: Ollama's syntax cannot express this chat template; llama.cpp uses the one in the GGUF"
        tell(text(zh, en))
        return
    stops = [tokenizer.convert_ids_to_tokens(one) for one in _ends(merged, tokenizer)]
    first, *others = [f"{MERGED}-{kind}.gguf" for kind in reversed(kinds)]
    (target / "Modelfile").write_text(modelfile(turns, stops, first, others), "utf-8")


def _weights(model: Path) -> int:
    """Bytes of a model's weights on disk."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def _token_fields(model: Path, tokens: Path) -> dict[str, Any]:
    """GGUF fields of the tokenizer in `tokens` for the model in `model`."""
    tokenizer = load_tokenizer(Source("folder", str(tokens), tokens))
    rows = json.loads((model / "config.json").read_text("utf-8"))["vocab_size"]
    return gguf_tokens.token_fields(tokens, tokenizer, rows, _ends(model, tokenizer))


def _ends(model: Path, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the tokenizer's end of turn, then the model's own."""
    path = model / "generation_config.json"
    named = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.is_file() else None
    more = named if isinstance(named, list) else [named]
    return list(dict.fromkeys([tokenizer.eos_token_id, *(one for one in more if isinstance(one, int))]))


def stored_dtype(base: Source) -> str:
    """The torch dtype in which the base's weights lie on disk, such as "float16"."""
    assert base.path is not None
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    for file in sorted(base.path.glob("*.safetensors")):
        with open(file, "rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        kinds = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
        if kinds:
            return names.get(kinds[0], "float32")
    return "float32"


def _set_ends(model: Any, tokenizer: Any) -> None:
    """The merged model stops where the adapter's chats end, in any program."""
    stop = stop_ids(model, tokenizer)
    model.generation_config.eos_token_id = stop if len(stop) > 1 else stop[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
