"""Reads adapter_config.json, which may come from anyone, and checks it before PEFT does.

It can name code to import, paths to read, and patterns that take unlimited time to match.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.storage.json_files import read_object

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # the two files of an adapter
LARGEST_RANK = 65_536
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights that change the base
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# PEFT matches these against every layer name, some as patterns, which may take unlimited time
LAYER_LISTS = ("target_modules", "exclude_modules", "layers_pattern", "target_parameters", "modules_to_save")
LAYER_TABLES = ("rank_pattern", "alpha_pattern")
LAYER_NAME = re.compile(r"[\w.-]{1,300}", re.ASCII)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The checked adapter_config.json of a LoRA adapter.

    Raises:
        UserError: it cannot be read, is no LoRA adapter's, has impossible values, or names code to import.
    """
    try:
        config = read_object(folder / ADAPTER_CONFIG)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            text(f"{ADAPTER_CONFIG} 读不了：{reason}", f"{ADAPTER_CONFIG} cannot be read: {reason}"), str(folder)
        ) from error
    kind, rank, alpha = config.get("peft_type"), config.get("r"), config.get("lora_alpha", 8)
    # PEFT imports what these two name
    code = [name for name in ("auto_mapping", "megatron_config") if config.get(name)]
    start, problem = str(config.get("init_lora_weights")).lower(), ""
    if kind != "LORA":
        problem = text(f"不是 LoRA 适配器：{str(kind)[:40]!r}", f"not a LoRA adapter: {str(kind)[:40]!r}")
    elif not isinstance(rank, int) or not 0 < rank <= LARGEST_RANK:
        problem = text(f"秩 r 不对：{str(rank)[:40]!r}", f"no rank can be r = {str(rank)[:40]!r}")
    elif not isinstance(alpha, (int, float)) or not 0 < alpha < 1e9:
        problem = text(f"lora_alpha 不对：{str(alpha)[:40]!r}", f"no lora_alpha: {str(alpha)[:40]!r}")
    elif code:
        problem = text(f"{code[0]} 要运行别的代码", f"{code[0]} asks for other code to be run")
    elif start.startswith(BASE_CHANGING):  # with the unchanged base its answers would be wrong
        problem = text(f"底座被改动过（{start[:20]}）", f"it belongs to a base that was changed ({start[:20]})")
    elif not_names := next((name for name in LAYER_LISTS if not _are_names(config.get(name))), ""):
        problem = text(f"{not_names} 不是层名的列表", f"{not_names} is no list of names of layers")
    elif not_names := next((name for name in LAYER_TABLES if not _is_table(config.get(name))), ""):
        problem = text(f"{not_names} 不是层名和数字的表", f"{not_names} is no table of layers and numbers")
    if problem:
        fix = text("这里只用训练脚本写出的 LoRA 适配器", "use a LoRA adapter such as the training script writes")
        raise UserError(problem, str(folder / ADAPTER_CONFIG), fix)
    return config


def _are_names(value: Any) -> bool:
    """Whether `value` is empty, a layer name, or a list of layer names."""
    values = value if isinstance(value, list) else [value or "none"]
    return all(isinstance(name, str) and LAYER_NAME.fullmatch(name) for name in values)


def _is_table(value: Any) -> bool:
    """Whether `value` is empty, or a dict of layer names with a rank or an alpha each."""
    value = {} if value is None else value
    numbers = list(value.values()) if isinstance(value, dict) and _are_names(list(value)) else [None]
    return all(isinstance(number, (int, float)) and 0 < number <= LARGEST_RANK for number in numbers)


def base_name(folder: Path, trained_on: dict[str, Any], own: str) -> str:
    """The name or path of the adapter's base. `trained_on`: "model" in its run_record.json.

    A path is accepted only if the record of a run on this machine names it too, since a folder from elsewhere must not
    choose what is read here, and never one on another machine (//host/...). A path that ends in `own`, the embedded
    model's folder, stands for that model, which is found in the present cache.

    Raises:
        UserError: the adapter names no base, another base than the record, or a path that is not accepted.
    """
    named = read_adapter_config(folder).get("base_model_name_or_path")
    fix = text("用 --base_model 指定底座", "name the base with --base_model")
    if not isinstance(named, str) or not named:
        raise UserError(text("适配器没有写明底座", "the adapter names no base"), str(folder / ADAPTER_CONFIG), fix)
    known = [name for name in map(trained_on.get, ("name", "path", "hub_id")) if isinstance(name, str) and name]
    shown = repr(named if len(named) < 100 else named[:100] + "...")
    if known and last_part(named) not in map(last_part, known):
        what = text(
            f"底座写的是 {shown}，记录里却是 {known[0][:100]!r}",
            f"the base is {shown} here and {known[0][:100]!r} in run_record.json",
        )
        raise UserError(what, str(folder / ADAPTER_CONFIG), fix)
    is_download = folder.parent.name == "snapshots"  # a folder of the Hub's cache
    is_remote = named.replace("\\", "/").startswith("//")
    trusted = last_part(named) == own or (named in known and not is_download and not is_remote)
    if not HUB_NAME.fullmatch(named) and not trusted:
        what = text(
            f"底座 {shown} 不是 Hub 上的名字，不去读它", f"its base {shown} is no name on the Hub: it is not read"
        )
        raise UserError(what, str(folder / ADAPTER_CONFIG), fix)
    return named


def last_part(name: str) -> str:
    """The last component of a path (POSIX or Windows) or of a Hub name."""
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1]
