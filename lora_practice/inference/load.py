"""Loads a chat model, to talk to it: from an output folder, a checkpoint, merged/, a model folder or a Hub name."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.errors import UserError, expand_home, reason_of
from lora_practice.console.text import tell, text
from lora_practice.inference.chat_model import ChatModel, as_chat_model, decoder_of
from lora_practice.machine.device import Machine, fits_in_fp32
from lora_practice.model import adapter_config, adapter_files
from lora_practice.model.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lora_practice.model.load import check_vocabulary, load_base, load_tokenizer, stored_bytes
from lora_practice.run.folder import checkpoints
from lora_practice.run.resume import another_base
from lora_practice.sources import embedded
from lora_practice.sources.find import Source, cached_as_before, fetch_repository, find_model
from lora_practice.storage.json_files import read_record


def load_chat_model(
    model_dir: str,
    machine: Machine,
    base_model: Optional[str] = None,
    keep_base: bool = False,
    shared_bases: Optional[dict[Path, Any]] = None,
) -> ChatModel:
    """Load an adapter folder, checkpoint, merged or plain model folder, or a Hub name.

    Args:
        base_model: folder or Hub name of the base, instead of the one that the adapter names.
        keep_base: do not merge the adapter in memory, so that `without_adapter` can answer too.
        shared_bases: a dict, empty at first, that several calls share: bases by folder, each in memory once (the
            16-bit copy that a decoder makes of a base in fp32 belongs to that decoder).

    Raises:
        UserError: no such folder, neither adapter nor model in it, or its base cannot be found.
    """
    folder = _local_folder(model_dir)
    base = find_base(folder, base_model) if (folder / ADAPTER_CONFIG).is_file() else None  # None: a whole model
    source = base or folder_source(folder)
    is_cpu = machine.device == "cpu"
    dtype = "stored" if is_cpu else machine.precision
    if dtype == "fp32" and not fits_in_fp32(stored_bytes(source.path), machine.facts.gpu_memory):
        dtype = "fp16"
    model = load_base(source, dtype) if shared_bases is None else _shared_base(shared_bases, source, dtype)
    if base:
        model = with_adapter(model, folder)
    tokenizer = tokenizer_for(model, folder, base, base_model)
    decoder = decoder_of(model)
    if decoder is None:
        model = model.float() if is_cpu else model
        if base and not keep_base:  # merged in memory it answers the same, faster
            model = model.merge_and_unload()
    return as_chat_model(model.to(machine.device), tokenizer, decoder)


def folder_source(folder: Path) -> Source:
    """A folder on this machine as the source of a model or a tokenizer."""
    return Source("folder", str(folder), folder)


def _shared_base(shared_bases: dict[Path, Any], source: Source, dtype: str) -> Any:
    """A model with its own modules, for an adapter to change, around weights that `shared_bases` keeps."""
    assert source.path is not None
    place = source.path.resolve()
    if place not in shared_bases:
        shared_bases[place] = load_base(source, dtype)
    kept = shared_bases[place]
    return copy.deepcopy(kept, {id(one): one for one in (*kept.parameters(), *kept.buffers())})


def tokenizer_for(model: Any, folder: Path, base: Optional[Source], base_model: Optional[str] = None) -> Any:
    """The tokenizer in `folder`; where it has none, that of the base, or of `base_model` for a whole model.

    Args:
        base: the base of the adapter in `folder`; None if `folder` holds a whole model.

    Raises:
        UserError: it is not the one that the base was trained with, or too large for the model.
    """
    source = folder_source(folder)
    if not (folder / "tokenizer_config.json").is_file() and (base or base_model):
        source = base or find_model(str(base_model), is_default=False, flag="--base_model")
        zh, en = f"文件夹里没有分词器，改用 {source.name} 的", f"no tokenizer in the folder: using {source.name}'s"
        tell(text(zh, en))
    elif base:
        assert base.path is not None
        adapter_files.check_same_tokens(folder, base.path)
    if base and (difference := another_base(read_record(folder) or {}, base)):
        tell(text("注意：", "note: ") + difference)
    tokenizer = load_tokenizer(source)
    check_vocabulary(model, tokenizer, source.name)
    return tokenizer


def find_base(folder: Path, base_model: Optional[str] = None) -> Source:
    """Find the base model of the adapter in `folder` on this machine.

    What the adapter names comes first; the embedded base is found in the cache wherever that is now.

    Raises:
        UserError: it cannot be found.
    """
    if base_model:
        return find_model(base_model, is_default=False, flag="--base_model")
    trained_on = (read_record(folder) or {}).get("model") or {}
    named = adapter_config.base_name(folder, trained_on, own=embedded.MODEL.folder)
    if trained_on.get("kind") == "embedded" or adapter_config.last_part(named) == embedded.MODEL.folder:
        return find_model("", is_default=True, want_embedded=True)
    if kept := cached_as_before({"model": trained_on}, named):
        return kept
    found = find_model(named, is_default=False, flag="--base_model")
    if found.kind == "folder":  # named by a file that may have come from elsewhere
        tell(text(f"底座：{found.path}", f"base: {found.path}"))
    return found


def _local_folder(model_dir: str) -> Path:
    folder = expand_home(model_dir)
    if folder.is_dir():
        if not (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
            zh, en = f"里面没有训练好的模型（没有 {ADAPTER_CONFIG}）", f"no trained model here (no {ADAPTER_CONFIG})"
            fix = text("先训练：python fine_tuning_practice.py", "train first: python fine_tuning_practice.py")
            if saved := checkpoints(folder):
                fix = text(f"训练还没完成，可以先用 {saved[-1]}", f"the run is unfinished; try {saved[-1]}")
            raise UserError(text(zh, en), model_dir, fix)
        return folder
    if folder.exists() or model_dir.count("/") != 1 or model_dir.startswith((".", "/", "~", "outputs/")):
        raise UserError(
            text("没有这个文件夹", "no such folder"),
            where=model_dir,
            fix=text(
                "检查路径；还没训练过就先训练：python fine_tuning_practice.py",
                "check the path, or train first: python fine_tuning_practice.py",
            ),
        )
    return fetch_repository(model_dir)


def with_adapter(base: Any, folder: Path) -> Any:
    """The PEFT model of `base` with the adapter in `folder`.

    Raises:
        UserError: the adapter is damaged, or was trained on another base.
    """
    from peft import PeftModel

    if not (folder / ADAPTER_WEIGHTS).is_file():  # PEFT would look for it on the Hub
        what = text(f"缺少 {ADAPTER_WEIGHTS}，适配器不完整", f"{ADAPTER_WEIGHTS} is missing: the adapter is not whole")
        fix = text("重新训练，或从备份里找回它", "train again, or bring it back from a copy")
        raise UserError(what, str(folder), fix)
    adapter_files.check_modules(base, adapter_config.read_adapter_config(folder), folder)
    try:
        with warnings.catch_warnings():  # `misfit` says it in one line
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(base, str(folder))
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes PEFT raise nearly anything
        raise _damaged(reason_of(error), folder) from error
    if reason := adapter_files.misfit(model, folder):
        raise _damaged(reason, folder)
    largest = [float(weight.abs().max()) for name, weight in model.named_parameters() if "lora_B" in name]
    if largest and max(largest) == 0:
        tell(text("注意：这个适配器全是零，回答与底座相同", "note: this adapter is all zero: answers are the base's"))
    return model


def _damaged(reason: str, folder: Path) -> UserError:
    what = text(f"适配器与底座不配或已损坏：{reason}", f"the adapter is damaged or of another base: {reason}")
    return UserError(what, where=str(folder))
