"""The rows that a run held out, made again from its record, and the loss of any model on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.data.prepare import prepare
from lora_practice.data.tokenization import Example
from lora_practice.sources import embedded
from lora_practice.sources.find import Source


def held_out_rows(record: Mapping[str, Any], tokenizer: Any, where: str) -> Sequence[Example]:
    """The held-out rows of the run in the folder `where`; never one that it was trained on.

    Raises:
        UserError: it held none out, or the data is no longer what it was trained on.
    """
    settings, data = record.get("settings") or {}, record.get("data") or {}
    if not data.get("rows_held_out"):
        what = text("这次训练没有留出数据", "this run held no rows out")
        fix = text("训练时加 --eval_subset_size 100", "train with --eval_subset_size 100")
        raise UserError(what, where, fix)
    rows = prepare(_source(data), data.get("subset"), tokenizer, SimpleNamespace(**settings))
    if rows.facts["fingerprint"] != data.get("fingerprint"):
        what = text(
            "数据和训练时不一样了，认不出哪些是留出的", "the data is not what it was: held-out rows cannot be told"
        )
        raise UserError(what, str(data.get("name", "")), text("把数据改回来", "bring the data back"))
    return rows.held_out


def _source(data: Mapping[str, Any]) -> Source:
    kind, name = str(data.get("kind")), str(data.get("name"))
    if kind == "embedded":
        return Source(kind, name, embedded.conversations_file())
    if kind == "hub":
        return Source(kind, name, None, name)
    file = Path(str(data.get("path")))
    if not file.is_file():
        raise UserError(text("没有这个数据文件了", "the data file is no longer there"), str(file))
    return Source(kind, name, file)
