"""What an output folder is good for, and what is wrong with it. Loads no torch, fetches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import counted, text
from lora_practice.model import adapter_config, adapter_files
from lora_practice.report import adapter_stats, files
from lora_practice.report.adapter_stats import AdapterStats
from lora_practice.report.files import FolderEntry
from lora_practice.run.folder import checkpoints
from lora_practice.run.resume import another_base
from lora_practice.sources import embedded
from lora_practice.sources.find import Source
from lora_practice.storage import manifest, signature
from lora_practice.storage.json_files import read_record
from lora_practice.storage.safetensors_header import read_headers

USES = ("inference", "sharing", "resuming")


@dataclass(frozen=True)
class FolderVerdict:
    """Everything that `inspect` says. `uses` has (yes or no, why) for each of USES; `findings` are what is wrong."""

    folder: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    items: Sequence[FolderEntry]
    anatomy: Optional[AdapterStats]
    base: Optional[Path]
    findings: Sequence[str]
    uses: Mapping[str, tuple[bool, str]]


def check_folder(folder: Path) -> FolderVerdict:
    """Look at an output folder, a checkpoint, a merged folder, or an adapter from anywhere.

    Raises:
        UserError: there is no such folder, or nothing that a run leaves is in it.
    """
    if not folder.is_dir():
        raise UserError(text("没有这个文件夹", "no such folder"), str(folder))
    record = read_record(folder) or {}
    items = files.take(folder, record if not folder.name.startswith("checkpoint-") else None)
    if not any(item.kind for item in items):
        raise UserError(text("这里没有训练写出的文件", "nothing that a run writes is here"), str(folder))
    findings = [f"{item.name}: {item.fault}" for item in items if item.fault]
    config: dict[str, Any] = {}
    numbers: Optional[AdapterStats] = None
    try:
        if any(item.name in (adapter_config.CONFIG, adapter_config.ADAPTER_WEIGHTS) for item in items):
            config = adapter_config.read_adapter_config(folder)
            numbers = adapter_stats.measure(folder, config)
            findings += numbers.faults
    except UserError as error:
        if str(error.what) not in " ".join(findings):
            findings.append(str(error))
    base = base_at_hand(folder, record) if config else None
    foreign = _of_another_base(folder, record, config, numbers, base)
    other = another_base(record, Source("folder", str(base), base)) if base else ""
    findings += foreign + [other] * bool(other) + _on_nothing(record, numbers)
    names = {item.name for item in items}
    if adapter_config.CONFIG in names and any(n.startswith("model") and n.endswith(".safetensors") for n in names):
        zh = "适配器和合并的权重在一层：transformers 5 会把适配器加两遍"
        findings.append(text(zh, "adapter and merged weights lie together: transformers 5 adds the adapter twice"))
    refused = [*(numbers.faults if numbers is not None else ()), *foreign]  # each of them stops `chat`
    uses = _uses(folder, record, config, items, refused, numbers)
    return FolderVerdict(folder, record, config, items, numbers, base, findings, uses)


def base_at_hand(folder: Path, record: Mapping[str, Any]) -> Optional[Path]:
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


def _of_another_base(
    folder: Path,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    numbers: Optional[AdapterStats],
    base: Optional[Path],
) -> list[str]:
    """Where the adapter's words or shapes do not fit the base that it names."""
    if not config:
        return []
    try:
        adapter_config.base_name(folder, record.get("model") or {}, own=embedded.MODEL.folder)
    except UserError as error:
        return [str(error)]
    if base is None or numbers is None:
        return []
    try:
        headers = read_headers(base)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return [text(f"底座读不了：{reason}", f"the base cannot be read: {reason}")]
    shapes = {name: tensor.shape for name, tensor in headers.items() if len(tensor.shape) == 2}
    for layer in numbers.layers if shapes else ():
        found = [shape for name, shape in shapes.items() if f".{name}".endswith(f".{layer.module}.weight")]
        if not found:
            zh, en = f"底座里没有 {layer.module}", f"the base has no {layer.module}"
        elif layer.shape not in (found[0], found[0][::-1]):  # GPT-2 keeps its weights transposed
            (out, width), wanted = layer.shape, found[0]
            zh = f"{layer.module} 是 {out}x{width}，底座是 {wanted[0]}x{wanted[1]}"
            en = f"{layer.module} is {out}x{width}, the base's {wanted[0]}x{wanted[1]}"
        else:
            continue
        return [text(f"适配器是别的底座的：{zh}", f"the adapter is of another base: {en}")]
    try:
        adapter_files.check_same_tokens(folder, base)
    except UserError as error:
        return [str(error)]
    return []


def _on_nothing(record: Mapping[str, Any], numbers: Optional[AdapterStats]) -> list[str]:
    found = []
    if numbers is not None and numbers.is_zero:
        zh, en = (
            "所有的 B 都是零：什么都没学到，回答和底座一样",
            "every B is zero: nothing was learnt, answers are the base's",
        )
        found.append(text(zh, en))
    elif numbers is not None and any(layer.norm == 0 for layer in numbers.layers):
        still = [layer.module for layer in numbers.layers if layer.norm == 0]
        zh, en = f"{len(still)} 层的 B 是零", f"B is zero in {counted(len(still), 'layer')}"
        found.append(text(f"{zh}，如 {still[0]}", f"{en}, such as {still[0]}"))
    if record.get("status") == "finished" and record.get("steps") == 0:
        found.append(text("一步都没有训练", "not one step was trained"))
    if (record.get("data") or {}).get("trained_tokens") == 0:
        found.append(text("没有一个 token 参与训练", "not one token was trained"))
    return found


def _uses(
    folder: Path,
    record: Mapping[str, Any],
    config: Mapping[str, Any],
    items: Sequence[FolderEntry],
    refused: Sequence[str],
    numbers: Optional[AdapterStats],
) -> dict[str, tuple[bool, str]]:
    good = {item.name for item in items if not item.fault}
    merged = not config and "config.json" in good
    wanted = ["tokenizer.json", "tokenizer_config.json"]
    wanted += ["config.json"] if merged else [adapter_config.CONFIG, adapter_config.ADAPTER_WEIGHTS]
    missing = [name for name in wanted if name not in good]
    if merged and not any(name.startswith("model") and name.endswith(".safetensors") for name in good):
        missing.append("model.safetensors")
    lacking = text("缺少或坏了：", "missing or damaged: ") + ", ".join(missing)
    if missing:
        answers = False, lacking
    elif refused:
        answers = False, refused[0]
    elif numbers is not None and numbers.is_zero:
        answers = True, text("能用，但回答和底座一样", "it works, but answers as the base does")
    else:
        answers = True, f"lora-practice chat {folder}"
    sharing = answers
    named = str(config.get("base_model_name_or_path", ""))
    known = adapter_config.HUB_NAME.fullmatch(named) or (record.get("model") or {}).get("hub_id")
    if answers[0] and "README.md" not in good:
        sharing = False, text("没有模型卡 README.md", "no model card, README.md")
    elif answers[0] and numbers is not None and numbers.is_zero:
        sharing = False, text("没有可分享的：它什么都没改", "nothing to share: it changes nothing")
    elif answers[0] and config and not known:
        sharing = False, text("底座不在 Hub 上，别人没有", "its base is not on the Hub: nobody else has it")
    elif answers[0]:
        sharing = True, f"lora-practice upload --local-dir {folder} --repo-id …"
    return {"inference": answers, "sharing": sharing, "resuming": _resuming(folder, record)}


def _resuming(folder: Path, record: Mapping[str, Any]) -> tuple[bool, str]:
    is_checkpoint = folder.name.startswith("checkpoint-")
    if not record:
        return False, text("没有 run_record.json", "there is no run_record.json")
    if record.get("status") == "finished":
        return False, text("这次训练已经完成", "the run is finished")
    whole = [folder] if is_checkpoint else checkpoints(folder)
    whole = [one for one in whole if not manifest.folder_fault(one, "checkpoint.json")]
    if not whole:
        return False, text("没有完整的存盘点", "there is no whole checkpoint")
    try:
        signature.check_signature(whole[-1], "checkpoint.json", trusted=False)
    except UserError as error:
        return False, error.what
    zh, en = f"从 {whole[-1].name} 继续：--resume", f"from {whole[-1].name}: --resume"
    return True, text(zh, en)
