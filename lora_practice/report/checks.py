"""What an output folder is good for, and what is wrong with it. Loads no torch, fetches nothing."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import counted, text
from lora_practice.model import adapter_config, adapter_files
from lora_practice.report import adapter_stats, files
from lora_practice.report.adapter_stats import AdapterStats
from lora_practice.report.base_weights import base_matrices, matrix_of
from lora_practice.report.files import FolderEntry
from lora_practice.run.file_kinds import CARD, CHECKPOINT_MANIFEST
from lora_practice.run.folder import DEFAULT_OUTPUT_DIR, checkpoints
from lora_practice.run.resume import another_base
from lora_practice.sources import embedded
from lora_practice.sources.find import Source
from lora_practice.storage import manifest, signature
from lora_practice.storage.json_files import RECORD, read_record

USES = ("inference", "sharing", "resuming")


@dataclass(frozen=True)
class Use:
    """Whether a folder can be used for one of USES, and why or how; `needed` is False where nobody would want it."""

    possible: bool
    why: str
    needed: bool = True


@dataclass(frozen=True)
class FolderVerdict:
    """Everything that `inspect` says of a folder.

    record, config: run_record.json and adapter_config.json, {} where there is none.
    base: the folder of the adapter's base on this disk, None where it is not at hand.
    findings: what is wrong, in the user's language; uses: one Use for each of USES.
    """

    folder: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    entries: Sequence[FolderEntry]
    adapter: Optional[AdapterStats]
    base: Optional[Path]
    findings: Sequence[str]
    uses: Mapping[str, Use]


def check_folder(folder: Path) -> FolderVerdict:
    """Look at an output folder, a checkpoint, a merged folder, or an adapter from anywhere.

    Raises:
        UserError: there is no such folder, or nothing that a run leaves is in it.
    """
    fix = text("检查路径；训练结果默认在 ", "check the path; by default a run is in ") + DEFAULT_OUTPUT_DIR
    if not folder.is_dir():
        raise UserError(text("没有这个文件夹", "no such folder"), str(folder), fix)
    record = read_record(folder) or {}
    entries = files.list_entries(folder, record if not folder.name.startswith("checkpoint-") else None)
    if not any(entry.kind for entry in entries):
        raise UserError(text("这里没有训练写出的文件", "nothing that a run writes is here"), str(folder), fix)
    findings = [f"{entry.name}: {entry.fault}" for entry in entries if entry.fault]
    config: dict[str, Any] = {}
    adapter: Optional[AdapterStats] = None
    refused: list[str] = []
    try:
        if any(entry.name in (adapter_config.ADAPTER_CONFIG, adapter_config.ADAPTER_WEIGHTS) for entry in entries):
            config = adapter_config.read_adapter_config(folder)
            adapter = adapter_stats.measure_adapter(folder, config)
            findings += adapter.faults
    except UserError as error:
        refused = [str(error)]
        if str(error.what) not in " ".join(findings):
            findings.append(str(error))
    base = local_base(folder, record) if config else None
    misfits = _misfits(folder, record, config, adapter, base)
    other = another_base(record, Source("folder", str(base), base)) if base else ""
    findings += misfits + [other] * bool(other) + _nothing_learnt(record, adapter)
    names = {entry.name for entry in entries}
    if adapter_config.ADAPTER_CONFIG in names and _has_model_weights(names):
        zh = "适配器和合并的权重在同一个文件夹里：transformers 5 会把适配器加两遍"
        findings.append(text(zh, "adapter and merged weights lie together: transformers 5 adds the adapter twice"))
    blocking = [*refused, *(adapter.faults if adapter is not None else ()), *misfits]  # each of them stops `chat`
    inference = _inference_use(folder, record, config, entries, blocking, adapter)
    uses = {
        "inference": inference,
        "sharing": _sharing_use(folder, record, config, entries, inference, adapter),
        "resuming": _resuming_use(folder, record),
    }
    return FolderVerdict(folder, record, config, entries, adapter, base, findings, uses)


def local_base(folder: Path, record: Mapping[str, Any]) -> Optional[Path]:
    """The folder of this adapter's base where it lies on this disk already; nothing is fetched."""
    trained_on = record.get("model") or {}
    try:
        named = adapter_config.base_name(folder, trained_on, own=embedded.MODEL.folder)
    except UserError:
        return None
    if trained_on.get("kind") == "embedded" or adapter_config.last_part(named) == embedded.MODEL.folder:
        place = embedded.cache_dir() / embedded.MODEL.folder
        return None if manifest.folder_fault(place, embedded.MANIFEST) else place
    if not adapter_config.HUB_NAME.fullmatch(named) or Path(named).is_dir():
        return Path(named) if (Path(named) / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(named, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def _misfits(
    folder: Path,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    adapter: Optional[AdapterStats],
    base: Optional[Path],
) -> list[str]:
    """The first way in which the adapter's config, shapes or tokens do not fit the base that it names; [] if none."""
    if not config:
        return []
    try:
        adapter_config.base_name(folder, record.get("model") or {}, own=embedded.MODEL.folder)
    except UserError as error:
        return [str(error)]
    if base is None or adapter is None:
        return []
    try:
        matrices = base_matrices(base)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return [text(f"底座读不了：{reason}", f"the base cannot be read: {reason}")]
    for one in adapter.modules if matrices else ():
        matrix = matrix_of(one.module, matrices)
        if matrix is None:
            zh, en = f"底座里没有 {one.module}", f"the base has no {one.module}"
        elif one.shape not in (matrix.shape, matrix.shape[::-1]):  # GPT-2 keeps its weights transposed
            (rows, columns), (base_rows, base_columns) = one.shape, matrix.shape
            zh = f"{one.module} 是 {rows}x{columns}，底座是 {base_rows}x{base_columns}"
            en = f"{one.module} is {rows}x{columns}, the base's {base_rows}x{base_columns}"
        else:
            continue
        return [text(f"适配器属于另一个底座：{zh}", f"the adapter is of another base: {en}")]
    try:
        adapter_files.check_same_tokens(folder, base)
    except UserError as error:
        return [str(error)]
    return []


def _nothing_learnt(record: Mapping[str, Any], adapter: Optional[AdapterStats]) -> list[str]:
    """The signs that a run trained nothing, or that a part of the adapter stayed zero."""
    found = []
    if adapter is not None and adapter.is_zero:
        zh = "所有的 B 都是零：什么都没学到，回答和底座一样"
        found.append(text(zh, "every B is zero: nothing was learnt, answers are the base's"))
    elif adapter is not None and any(one.norm == 0 for one in adapter.modules):
        still = [one.module for one in adapter.modules if one.norm == 0]
        zh, en = f"{len(still)} 个 LoRA 模块的 B 是零", f"B is zero in {counted(len(still), 'LoRA module')}"
        found.append(text(f"{zh}，如 {still[0]}", f"{en}, such as {still[0]}"))
    if record.get("status") == "finished" and record.get("steps") == 0:
        found.append(text("一步都没有训练", "not one step was trained"))
    if (record.get("data") or {}).get("trained_tokens") == 0:
        found.append(text("没有一个 token 参与训练", "not one token was trained"))
    return found


def _inference_use(
    folder: Path,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    entries: Sequence[FolderEntry],
    blocking: Sequence[str],
    adapter: Optional[AdapterStats],
) -> Use:
    """Whether `chat` would answer from this folder; `blocking` are findings that stop it."""
    missing = _missing(config, entries)
    damaged = [entry.name for entry in entries if entry.fault and entry.name in missing]
    is_run = not folder.name.startswith("checkpoint-") and record.get("status") in ("running", "interrupted")
    if missing and not damaged and is_run:
        return Use(False, _unfinished(folder))
    if missing:
        lacking = [name for name in missing if name not in damaged]
        parts = [text("缺少 ", "missing: ") + text("、", ", ").join(lacking)] * bool(lacking)
        parts += [text("已损坏：", "damaged: ") + text("、", ", ").join(damaged)] * bool(damaged)
        return Use(False, text("；", "; ").join(parts))
    if blocking:
        return Use(False, blocking[0])
    if adapter is not None and adapter.is_zero:
        return Use(True, text("能用，但回答和底座一样", "it works, but answers as the base does"))
    return Use(True, f"lora-practice chat {shlex.quote(str(folder))}")


def _missing(config: Mapping[str, Any], entries: Sequence[FolderEntry]) -> list[str]:
    """The files without which a folder cannot answer, and that are not there whole."""
    whole = {entry.name for entry in entries if not entry.fault}
    merged = not config and "config.json" in whole
    wanted = ["config.json"] if merged else [adapter_config.ADAPTER_CONFIG, adapter_config.ADAPTER_WEIGHTS]
    missing = [name for name in ("tokenizer.json", "tokenizer_config.json", *wanted) if name not in whole]
    if merged and not _has_model_weights(whole):
        missing.append("model.safetensors")
    return missing


def _has_model_weights(names: set[str]) -> bool:
    return any(name.startswith("model") and name.endswith(".safetensors") for name in names)


def _unfinished(folder: Path) -> str:
    """Why a run that is not finished cannot answer yet, and what of it can."""
    whole = _whole_checkpoints(folder)
    if not whole:
        return text("训练还没完成，完成时才写适配器", "the run is not finished: the adapter is written at its end")
    command = f"lora-practice chat {shlex.quote(str(whole[-1]))}"
    return text(f"训练还没完成，可以先用检查点：{command}", f"the run is not finished; a checkpoint answers: {command}")


def _sharing_use(
    folder: Path,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    entries: Sequence[FolderEntry],
    inference: Use,
    adapter: Optional[AdapterStats],
) -> Use:
    """Whether others could use this folder from the Hub: what cannot answer here cannot answer there."""
    if not inference.possible:
        return Use(False, text("不能推理，就没有可分享的", "what cannot answer is not to be shared"))
    if not any(entry.name == CARD and not entry.fault for entry in entries):
        return Use(False, text(f"没有模型卡 {CARD}", f"no model card, {CARD}"))
    if adapter is not None and adapter.is_zero:
        return Use(False, text("没有可分享的：它什么都没改", "nothing to share: it changes nothing"))
    named = str(config.get("base_model_name_or_path", ""))
    on_hub = adapter_config.HUB_NAME.fullmatch(named) or (record.get("model") or {}).get("hub_id")
    if config and not on_hub:
        return Use(False, text("底座不在 Hub 上，别人没有", "its base is not on the Hub: nobody else has it"))
    is_default = str(folder) == DEFAULT_OUTPUT_DIR  # which `upload` takes by itself
    place = "" if is_default else f"--local_dir {shlex.quote(str(folder))} "
    return Use(True, f"lora-practice upload {place}--repo_id …")


def _resuming_use(folder: Path, record: Mapping[str, Any]) -> Use:
    """Whether --resume would go on from here."""
    if not record:
        return Use(False, text(f"没有 {RECORD}", f"there is no {RECORD}"))
    if record.get("status") == "finished":
        return Use(False, text("这次训练已经完成", "the run is finished"), needed=False)
    whole = _whole_checkpoints(folder)
    if not whole:
        return Use(False, text("没有完整的检查点（checkpoint）", "there is no whole checkpoint"))
    try:
        signature.check_signature(whole[-1], CHECKPOINT_MANIFEST, trusted=False)
    except UserError as error:
        return Use(False, error.what)
    return Use(True, text(f"从 {whole[-1].name} 继续：--resume", f"from {whole[-1].name}: --resume"))


def _whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder whose files fit their manifest; the folder itself where it is a checkpoint."""
    found = [folder] if folder.name.startswith("checkpoint-") else checkpoints(folder)
    return [one for one in found if not manifest.folder_fault(one, CHECKPOINT_MANIFEST)]
