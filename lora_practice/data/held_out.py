"""The validation set of a finished run (the rows that it held out), prepared once more from its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.data.prepare import PreparedData, prepare
from lora_practice.data.tokenization import Example
from lora_practice.sources import embedded
from lora_practice.sources.find import SHIPPED, Source, is_hub_id
from lora_practice.storage.json_files import RECORD


@dataclass(frozen=True)
class RecordedDataSettings:
    """`DataSettings` as run_record.json has them."""

    train_subset_size: int
    eval_subset_size: int
    seed: int
    max_length: int
    assistant_only_loss: bool
    skip_bad_rows: bool


def held_out_rows(record: Mapping[str, Any], tokenizer: Any, where: str) -> Sequence[Example]:
    """The held-out rows of the run in the folder `where`; never one that it was trained on.

    Raises:
        UserError: the run has no validation set, its record lacks a setting, or its data has changed since.
    """
    return prepare_again(record, tokenizer, where).held_out


def prepare_again(record: Mapping[str, Any], tokenizer: Any, where: str) -> PreparedData:
    """The data of the run in the folder `where`, as it was prepared for that run.

    Raises:
        UserError: the run has no validation set, its record lacks a setting, or its data has changed since.
    """
    settings, data = record.get("settings") or {}, record.get("data") or {}
    if not data.get("rows_held_out"):
        what = text("这次训练没有验证集", "this run has no validation set")
        fix = text("训练时加 --eval_subset_size 100", "train with --eval_subset_size 100")
        raise UserError(what, where, fix)
    prepared = prepare(_source(data), _subset(settings, data), tokenizer, _recorded(settings, where))
    if prepared.facts["fingerprint"] != data.get("fingerprint"):
        what = text("数据和训练时不一样了，分不出验证集", "the data is not what it was: validation rows are unknown")
        raise UserError(what, str(data.get("name", "")), text("恢复训练时的数据", "bring the data back"))
    return prepared


def _subset(settings: Mapping[str, Any], data: Mapping[str, Any]) -> Optional[str]:
    """The Hub data set's configuration; of a record that is too old to tell, the default one with its own data set."""
    if "subset" in data:
        return data["subset"]
    name = settings.get("dataset_name")
    return name if name != SHIPPED["dataset_name"] or data.get("name") == SHIPPED["dataset_path"] else None


def _recorded(settings: Mapping[str, Any], where: str) -> RecordedDataSettings:
    names = [field.name for field in fields(RecordedDataSettings)]
    missing = [name for name in names if name not in settings]
    if missing:
        what = text(f"{RECORD} 里没有 {missing[0]}", f"{RECORD} has no {missing[0]}")
        raise UserError(what, where)
    return RecordedDataSettings(**{name: settings[name] for name in names})


def _source(data: Mapping[str, Any]) -> Source:
    kind, name = str(data.get("kind")), str(data.get("name"))
    if kind == "embedded":
        return Source(kind, name, embedded.conversations_file())
    if kind == "hub" and is_hub_id(name) and not Path(name).exists():  # `datasets` prefers a folder here
        return Source(kind, name, None, name)
    file = Path(str(data.get("path")))
    if str(file).replace("\\", "/").startswith("//"):  # a record may be a stranger's: it names no other machine
        what = text("数据在另一台机器上，不去读它", "its data is on another machine: it is not read")
        raise UserError(what, str(file))
    if kind != "file" or not file.is_file():
        raise UserError(text("找不到训练用的数据文件", "the data file is no longer there"), str(file))
    return Source(kind, name, file)
