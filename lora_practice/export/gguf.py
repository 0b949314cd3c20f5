"""Writes a finished adapter as GGUF files with an Ollama Modelfile, and proves each form equal to the adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_practice import compat
from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.export import gguf_tokenizer, gguf_writer, llama_cpp, parity
from lora_practice.export.merge import MERGED, merge_adapter, merge_sentence
from lora_practice.export.ollama import modelfile, template_turns
from lora_practice.inference.chat_model import stop_ids
from lora_practice.inference.load import find_base
from lora_practice.model import adapter_config, adapter_files
from lora_practice.model.load import load_tokenizer, stored_bytes
from lora_practice.sources.find import Source
from lora_practice.storage.disk import staging

GGUF = "gguf"


def to_gguf(folder: Path, kinds: Sequence[str] = gguf_writer.PRECISIONS, replace: bool = False) -> list[parity.Line]:
    """Write DIR/gguf/ (merged-KIND.gguf, adapter.gguf, Modelfile), and DIR/merged/ if it is not there; prove them.

    The proof stands in DIR/README.md too. `replace` lets an earlier DIR/gguf go, once the new one is written.

    Raises:
        UserError: see `merge`; DIR/gguf exists; or the tokenizer or architecture has no GGUF here.
    """
    target = folder / GGUF
    if not (folder / adapter_files.CONFIG).is_file():
        raise UserError(text("这里没有适配器", "no adapter here"), where=str(folder))
    if target.exists() and not replace:
        raise UserError(
            text("已经导出过了", "already exported"),
            where=str(target),
            fix=text("换掉它：--overwrite；只重做证明：--check", "replace it: --overwrite; only prove again: --check"),
        )
    base = find_base(folder)
    assert base.path is not None
    config = gguf_writer.writable_config(base.path)
    gguf_tokenizer.split_name(folder if (folder / "tokenizer.json").is_file() else base.path)
    if not (folder / MERGED).exists():
        tell(merge_sentence(*merge_adapter(folder)))
    tell(text("正在写 GGUF……", "writing GGUF ..."))
    with staging(folder, 3 * stored_bytes(folder / MERGED)) as scratch:
        whole, old = scratch / GGUF, scratch / "old"
        whole.mkdir()
        _write_gguf(folder, whole, kinds, config)
        if target.exists():
            os.replace(target, old)
        os.replace(whole, target)
    return prove_gguf(folder)


def prove_gguf(folder: Path) -> list[parity.Line]:
    """Prove DIR/merged and DIR/gguf as they are, and write the result into the card.

    Raises:
        UserError: there is nothing exported.
    """
    if not (folder / GGUF).is_dir() or not (folder / MERGED).is_dir():
        fix = f"lora-practice export {folder}"
        raise UserError(text("还没有导出", "nothing is exported here"), where=str(folder), fix=fix)
    base, done = find_base(folder), compat.installed()
    assert base.path is not None
    tell(
        text("用同样的问题检查每一种形式，约半分钟……", "asking every form the same questions, about half a minute ...")
    )
    on_base = (folder / GGUF / "adapter.gguf").is_file() and not llama_cpp.missing()
    with staging(folder, stored_bytes(base.path) if on_base else 0) as scratch:
        base_gguf = scratch / "base.gguf"  # adapter.gguf is proved on top of it
        if on_base:
            gguf_writer.write_model(base.path, _token_fields(base.path, folder), "f16", base_gguf)
        lines = parity.prove(folder, folder / GGUF, base_gguf)
    parity.write_proof(folder, lines, f"peft {done['peft']}, transformers {done['transformers']}")
    return lines


def _write_gguf(folder: Path, target: Path, kinds: Sequence[str], config: dict[str, Any]) -> None:
    merged = folder / MERGED
    fields = _token_fields(merged, merged)
    for kind in kinds:
        gguf_writer.write_model(merged, fields, kind, target / f"{MERGED}-{kind}.gguf")
    problem = gguf_writer.adapter_problem(adapter_config.read_adapter_config(folder))
    if problem:
        tell(text(f"没有写 adapter.gguf：{problem}", f"adapter.gguf is left out: {problem}"))
    else:
        gguf_writer.write_adapter(folder, config, target / "adapter.gguf")
    tokenizer = load_tokenizer(Source("folder", str(merged), merged))
    turns = template_turns(tokenizer, fields["tokenizer.ggml.add_bos_token"])
    if turns is None:
        zh = "没有写 Modelfile：这个聊天模板用 Ollama 的语法写不出来；llama.cpp 用 GGUF 里的模板"
        en = "no Modelfile: Ollama's syntax cannot express this chat template; llama.cpp uses the one in the GGUF"
        tell(text(zh, en))
        return
    stops = [tokenizer.convert_ids_to_tokens(one) for one in _stop_ids(merged, tokenizer)]
    first, *others = [f"{MERGED}-{kind}.gguf" for kind in reversed(kinds)]
    (target / "Modelfile").write_text(modelfile(turns, stops, first, others), "utf-8")


def _token_fields(model: Path, tokens: Path) -> dict[str, Any]:
    """GGUF fields of the tokenizer in `tokens` for the model in `model`."""
    tokenizer = load_tokenizer(Source("folder", str(tokens), tokens))
    rows = json.loads((model / "config.json").read_text("utf-8"))["vocab_size"]
    return gguf_tokenizer.token_fields(tokens, tokenizer, rows, _stop_ids(model, tokenizer))


def _stop_ids(model: Path, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer of the model in the folder `model`."""
    path = model / "generation_config.json"
    return stop_ids(tokenizer, json.loads(path.read_text("utf-8")).get("eos_token_id") if path.is_file() else None)
