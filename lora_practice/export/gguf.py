"""Exports a finished adapter as GGUF files with an Ollama Modelfile, and compares each form with the adapter."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_practice import compat
from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.export import gguf_tokenizer, gguf_writer, llama_cpp, parity
from lora_practice.export.merge import check_has_adapter, merge_adapter, merge_sentence, move_into_place
from lora_practice.export.ollama import modelfile, template_turns
from lora_practice.inference.chat_model import stop_ids
from lora_practice.inference.load import find_base, folder_source
from lora_practice.model import adapter_config
from lora_practice.model.load import load_tokenizer, stored_bytes
from lora_practice.run.file_kinds import ADAPTER_GGUF, GGUF, MERGED
from lora_practice.run.folder import writing_into
from lora_practice.run.own_files import check_all_known, unknown_in
from lora_practice.storage.disk import staging


def export_gguf(
    folder: Path, precisions: Sequence[str] = gguf_writer.PRECISIONS, overwrite: bool = False
) -> list[parity.FormResult]:
    """Write DIR/gguf/ (merged-PRECISION.gguf, adapter.gguf, Modelfile), and DIR/merged/ if it is not there; check them.

    Args:
        overwrite: replace an earlier DIR/gguf, once the new one is written.

    Returns:
        The results of the parity check, which are written into DIR/README.md too.

    Raises:
        UserError: see `merge_adapter`; DIR/gguf exists; or the tokenizer or architecture cannot be written as GGUF.
    """
    target = folder / GGUF
    check_has_adapter(folder)
    if os.path.lexists(target) and not overwrite:
        raise UserError(
            text("已经导出过了", "already exported"),
            where=str(target),
            fix=text("重新导出：--overwrite；只重新检查：--check", "replace it: --overwrite; only check it: --check"),
        )
    check_all_known(unknown_in(target), target)
    base = find_base(folder)
    assert base.path is not None
    config = gguf_writer.writable_config(base.path)
    gguf_tokenizer.split_name(folder if (folder / "tokenizer.json").is_file() else base.path)
    with writing_into(folder):
        if not (folder / MERGED).exists():
            tell(merge_sentence(*merge_adapter(folder)))
        tell(text("正在写 GGUF……", "writing GGUF ..."))
        with staging(folder, 3 * stored_bytes(folder / MERGED)) as scratch:
            written = scratch / GGUF
            written.mkdir()
            _write_gguf(folder, written, precisions, config)
            move_into_place(written, target)
        return check_export(folder)


def check_export(folder: Path) -> list[parity.FormResult]:
    """Compare DIR/merged and DIR/gguf as they are with the adapter, and write the results into the card.

    Raises:
        UserError: nothing is exported yet.
    """
    if not (folder / GGUF).is_dir() or not (folder / MERGED).is_dir():
        fix = f"lora-practice export {shlex.quote(str(folder))}"
        raise UserError(text("还没有导出", "nothing is exported here"), where=str(folder), fix=fix)
    base, versions = find_base(folder), compat.installed()
    assert base.path is not None
    tell(text("用同样的提问检查每一种形式，约半分钟……", "asking every form the same prompts, about half a minute ..."))
    needs_base = (folder / GGUF / ADAPTER_GGUF).is_file() and not llama_cpp.missing()
    with staging(folder, stored_bytes(base.path) if needs_base else 0) as scratch:
        base_gguf = scratch / "base.gguf"  # adapter.gguf is checked on top of it
        if needs_base:
            gguf_writer.write_model(base.path, _token_fields(base.path, folder), "f16", base_gguf)
        results = parity.check_forms(folder, folder / GGUF, base_gguf)
    parity.write_to_card(folder, results, f"peft {versions['peft']}, transformers {versions['transformers']}")
    return results


def _write_gguf(folder: Path, target: Path, precisions: Sequence[str], config: dict[str, Any]) -> None:
    merged = folder / MERGED
    fields = _token_fields(merged, merged)
    for precision in precisions:
        gguf_writer.write_model(merged, fields, precision, target / f"{MERGED}-{precision}.gguf")
    problem = gguf_writer.adapter_problem(adapter_config.read_adapter_config(folder))
    if problem:
        tell(text(f"没有写 {ADAPTER_GGUF}：{problem}", f"{ADAPTER_GGUF} is left out: {problem}"))
    else:
        gguf_writer.write_adapter(folder, config, target / ADAPTER_GGUF)
    tokenizer = load_tokenizer(folder_source(merged))
    turns = template_turns(tokenizer, fields["tokenizer.ggml.add_bos_token"])
    if turns is None:
        zh = "没有写 Modelfile：Ollama 的模板语法表达不了这个聊天模板；llama.cpp 用 GGUF 里的模板"
        en = "no Modelfile: Ollama's syntax cannot express this chat template; llama.cpp uses the one in the GGUF"
        tell(text(zh, en))
        return
    stops = [tokenizer.convert_ids_to_tokens(one) for one in _stop_ids(merged, tokenizer)]
    first, *others = [f"{MERGED}-{precision}.gguf" for precision in reversed(precisions)]
    (target / "Modelfile").write_text(modelfile(turns, stops, first, others), "utf-8")


def _token_fields(model: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """GGUF fields of the tokenizer in `tokenizer_folder`, for the model in the folder `model`."""
    tokenizer = load_tokenizer(folder_source(tokenizer_folder))
    rows = json.loads((model / "config.json").read_text("utf-8"))["vocab_size"]
    return gguf_tokenizer.token_fields(tokenizer_folder, tokenizer, rows, _stop_ids(model, tokenizer))


def _stop_ids(model: Path, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer of the model in the folder `model`."""
    path = model / "generation_config.json"
    return stop_ids(tokenizer, json.loads(path.read_text("utf-8")).get("eos_token_id") if path.is_file() else None)
