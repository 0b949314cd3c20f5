"""`lora-practice inspect DIR`: the verdict on an output folder in words for people, or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lora_practice.console.terminal import aligned
from lora_practice.console.text import text, visible
from lora_practice.report.adapter_stats import AdapterStats, ModuleStats, number
from lora_practice.report.checks import USES, FolderVerdict
from lora_practice.report.files import FolderEntry

BAR = 20  # characters of the longest bar
USE_NAMES = {
    "inference": ("推理", "inference"),
    "sharing": ("分享", "sharing"),
    "resuming": ("续训", "resuming"),
}


def lines(verdict: FolderVerdict) -> Iterator[str]:
    """The whole verdict for a person, in lines of 80 columns (the user's own paths may be longer)."""
    yield _about(verdict)
    yield from _base(verdict)
    for finding in verdict.findings:
        yield text("！", "! ") + finding
    yield ""
    yield from aligned([_use(name, verdict) for name in USES])
    if verdict.anatomy is not None and verdict.anatomy.layers:
        yield ""
        yield from _adapter(verdict.anatomy, verdict.config)
    yield ""
    yield from _files(verdict)


def verdict_as_json(verdict: FolderVerdict) -> str:
    """The same for a program: one JSON object."""
    numbers = verdict.anatomy
    layers = [
        {"module": one.module, "rank": one.rank, "shape": one.shape, "parameters": one.parameters}
        | {"scale": number(one.scale), "norm": number(one.norm), "rms": number(one.rms)}
        | {"largest_singular_value": number(one.top)}
        for one in (numbers.layers if numbers else ())
    ]
    files = [
        {"name": one.name, "bytes": one.size, "whole": not one.fault, "fault": one.fault, "changed": one.changed}
        | {"what": one.kind.what if one.kind else None, "used": one.kind.when if one.kind else None}
        | {"needed_for": list(one.kind.needed_for) if one.kind else []}
        for one in verdict.items
    ]
    whole = {
        "folder": str(verdict.folder),
        "status": verdict.record.get("status"),
        "base": verdict.config.get("base_model_name_or_path"),
        "base_at_hand": str(verdict.base) if verdict.base else None,
        "findings": list(verdict.findings),
        "uses": {use: {"possible": able, "why": why} for use, (able, why) in verdict.uses.items()},
        "dora": bool(verdict.config.get("use_dora")),  # then `layers` counts directions only
        "parameters": numbers.parameters if numbers else None,
        "layers": layers,
        "files": files,
    }
    return json.dumps(whole, ensure_ascii=False, indent=2, allow_nan=False)


def _about(verdict: FolderVerdict) -> str:
    record = verdict.record
    names = {
        "finished": text("训练完成", "finished run"),
        "running": text("没完成的训练", "unfinished run"),
        "interrupted": text("中断的训练", "interrupted run"),
    }
    status = names.get(str(record.get("status")), text("没有训练记录", "no record of a run"))
    parts = [status]
    if record.get("steps") is not None:
        parts.append(text(f"{record['steps']} 步", f"{record['steps']} steps"))
    parts += [str(record[key]) for key in ("finished_at",) if record.get(key)]
    return f"{verdict.folder}: {text('，', ', ').join(parts)}"


def _base(verdict: FolderVerdict) -> Iterable[str]:
    if not verdict.config:
        return
    named = (verdict.record.get("model") or {}).get("hub_id") or verdict.config.get("base_model_name_or_path")
    where = text("本机没有，用时才下载", "not on this disk: fetched when it is used")
    if verdict.base is not None:
        where = text("在本机", "on this disk")
    yield text(f"底座：{named}（{where}）", f"base: {named} ({where})")


def _use(name: str, verdict: FolderVerdict) -> tuple[str, str, str]:
    able, why = verdict.uses[name]
    why = text("见上", "see above") if why in verdict.findings else why
    return text(*USE_NAMES[name]), text("能", "yes") if able else text("不能", "no"), why


def _adapter(numbers: AdapterStats, config: Mapping[str, Any]) -> Iterator[str]:
    layers = numbers.layers
    ranks, scales = ([f"{value:.4g}" for value in sorted(set(values))] for values in _ranks_and_scales(layers))
    spread, scale = ("-".join(dict.fromkeys((one[0], one[-1]))) for one in (ranks, scales))
    alpha, count, size = config.get("lora_alpha"), len(layers), f"{numbers.parameters:,}"
    zh = f"秩 {spread}，alpha {alpha}（更新乘以 {scale}），{count} 个矩阵，{size} 个参数"
    yield text(zh, f"rank {spread}, alpha {alpha} (the update times {scale}), {count} matrices, {size} parameters")
    if config.get("use_dora"):
        zh = "DoRA：下面只算方向的更新，没算学到的长度"
        yield text(zh, "DoRA: what follows counts the update of directions, not the lengths learnt")
    zh = "每个权重被改了多少（均方根；越长改得越多）："
    yield text(zh, "how far a weight is moved (root mean square; longer is more):")
    groups = [*by_kind(layers), *by_depth(layers)]
    largest = max((rms for _, rms in groups if math.isfinite(rms)), default=0.0) or 1.0
    bars = ["#" * round(BAR * rms / largest) if math.isfinite(rms) else "" for _, rms in groups]
    yield from aligned((f"  {name}", f"{rms:.1e}", bar) for (name, rms), bar in zip(groups, bars))
    known = [layer for layer in layers if math.isfinite(layer.rms)]
    if not known:
        return
    most = max(known, key=lambda layer: layer.rms)
    yield text(f"改得最多：{most.module}（{most.rms:.1e}）", f"moved most: {most.module} ({most.rms:.1e})")
    zh = "范数（Frobenius）"
    yield text(
        f"{zh}：这一层 {most.norm:.3f}，全部 {numbers.norm:.3f}",
        f"norm (Frobenius): {most.norm:.3f} there, {numbers.norm:.3f} of all",
    )


def _ranks_and_scales(layers: Iterable[ModuleStats]) -> tuple[list[float], list[float]]:
    return [layer.rank for layer in layers], [layer.scale for layer in layers]


def by_kind(layers: Iterable[ModuleStats]) -> list[tuple[str, float]]:
    """(module's own name, root mean square of its change over all depths), in the model's order."""
    groups: dict[str, list[ModuleStats]] = {}
    for layer in layers:
        groups.setdefault(layer.kind, []).append(layer)
    return [(name, _mean_change(group)) for name, group in groups.items()]


def by_depth(layers: Iterable[ModuleStats], most: int = 6) -> list[tuple[str, float]]:
    """(range of layers, root mean square of their change), in at most `most` ranges of equal length."""
    groups: dict[int, list[ModuleStats]] = {}
    for layer in layers:
        if layer.depth is not None:
            groups.setdefault(layer.depth, []).append(layer)
    numbers = sorted(groups)
    size = -(-len(numbers) // most) or 1
    found = []
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        name = f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0])
        found.append((text(f"第 {name} 层", f"layer {name}"), _mean_change([x for n in part for x in groups[n]])))
    return found


def _mean_change(layers: list[ModuleStats]) -> float:
    """Root mean square of all entries of these changes together."""
    return (sum(one.norm**2 for one in layers) / sum(one.shape[0] * one.shape[1] for one in layers)) ** 0.5


def _files(verdict: FolderVerdict) -> Iterator[str]:
    rows = [(text("文件", "file"), "MB", text("完整", "whole"), text("哪里需要它", "needed for"))]
    explained = []
    for item in verdict.items:
        state = text("改过", "edited") if item.changed else text("是", "yes")
        state = text("坏了", "no") if item.fault else state
        needs = text("、", ", ").join(text(*USE_NAMES[use]) for use in USES if item.needed_for(use))
        rows.append((visible(item.name), f"{item.size / 1e6:.1f}" if item.size >= 50_000 else "<0.1", state, needs))
        explained.append(explain(item))
    head, *rest = aligned(rows)
    yield head
    for line, words in zip(rest, explained):
        yield line
        yield "    " + words


def explain(item: FolderEntry) -> str:
    """What a file is and when it is used, in one line."""
    if item.kind is None:
        return text("不是训练写的", "not written by a run")
    return f"{item.kind.what}{text('：', ': ')}{item.kind.when}"
