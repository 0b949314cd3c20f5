"""`lora-practice inspect DIR`: the verdict on an output folder in words for people, or as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lora_practice.console.terminal import PAGE_COLUMNS, aligned, columns, wrap
from lora_practice.console.text import text, visible
from lora_practice.report.adapter_stats import AdapterStats, ModuleStats, finite_or_none
from lora_practice.report.checks import USES, FolderVerdict, Use
from lora_practice.report.files import FolderEntry

BAR = 20  # characters of the longest bar
USE_NAMES = {
    "inference": ("推理", "inference"),
    "sharing": ("分享", "sharing"),
    "resuming": ("继续训练", "resuming"),
}


def verdict_lines(verdict: FolderVerdict) -> Iterator[str]:
    """The whole verdict for a person, at most PAGE_COLUMNS wide, in lines that end at words."""
    yield from _hanging("", _about(verdict))
    yield from _base(verdict)
    for finding in verdict.findings:
        yield from _hanging(text("！", "! "), finding)
    yield ""
    yield from _uses(verdict)
    if verdict.adapter is not None and verdict.adapter.modules:
        yield ""
        yield from _adapter(verdict.adapter, verdict.config)
    yield ""
    yield from _files(verdict)


def verdict_as_json(verdict: FolderVerdict) -> str:
    """The same for a program: one JSON object."""
    adapter = verdict.adapter
    layers = [
        {"module": one.module, "rank": one.rank, "shape": one.shape, "parameters": one.parameters}
        | {"scale": finite_or_none(one.scale), "norm": finite_or_none(one.norm), "rms": finite_or_none(one.rms)}
        | {"largest_singular_value": finite_or_none(one.top)}
        for one in (adapter.modules if adapter else ())
    ]
    files = [
        {"name": one.name, "bytes": one.size, "whole": not one.fault, "fault": one.fault, "changed": one.changed}
        | {"what": one.kind.what if one.kind else None, "used": one.kind.when if one.kind else None}
        | {"needed_for": list(one.kind.needed_for) if one.kind else []}
        for one in verdict.entries
    ]
    whole = {
        "folder": str(verdict.folder),
        "status": verdict.record.get("status"),
        "base": verdict.config.get("base_model_name_or_path"),
        "base_at_hand": str(verdict.base) if verdict.base else None,
        "findings": list(verdict.findings),
        "uses": {
            name: {"possible": use.possible, "needed": use.needed, "why": use.why} for name, use in verdict.uses.items()
        },
        "dora": bool(verdict.config.get("use_dora")),  # then `layers` counts directions only
        "parameters": adapter.parameters if adapter else None,
        "layers": layers,
        "files": files,
    }
    return json.dumps(whole, ensure_ascii=False, indent=2, allow_nan=False)


def use_state(use: Use) -> str:
    """The answer in a word: yes, no, or not needed."""
    if not use.needed:
        return text("不需要", "not needed")
    return text("能", "yes") if use.possible else text("不能", "no")


def describe_entry(entry: FolderEntry) -> str:
    """What a file is and when it is used, in one line."""
    if entry.kind is None:
        return text("不是训练写的", "not written by a run")
    return f"{entry.kind.what}{text('：', ': ')}{entry.kind.when}"


def _hanging(head: str, words: str) -> Iterator[str]:
    """`head` and the words in lines of PAGE_COLUMNS; after the first they are indented by the head's width."""
    first, *rest = wrap(words, PAGE_COLUMNS - columns(head))
    yield head + first
    for line in rest:
        yield " " * columns(head) + line


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
    return f"{verdict.folder}{text('：', ': ')}{text('，', ', ').join(parts)}"


def _base(verdict: FolderVerdict) -> Iterable[str]:
    if not verdict.config:
        return
    named = (verdict.record.get("model") or {}).get("hub_id") or verdict.config.get("base_model_name_or_path")
    where = text("本机没有，用时才下载", "not on this disk: fetched when it is used")
    if verdict.base is not None:
        where = text("在本机", "on this disk")
    yield from _hanging("", text(f"底座：{named}（{where}）", f"base: {named} ({where})"))


def _uses(verdict: FolderVerdict) -> Iterator[str]:
    heads = [(text(*USE_NAMES[name]), use_state(verdict.uses[name]), "|") for name in USES]
    for name, head in zip(USES, aligned(heads)):
        why = verdict.uses[name].why
        yield from _hanging(head[:-1], text("见上", "see above") if why in verdict.findings else why)


def _adapter(adapter: AdapterStats, config: Mapping[str, Any]) -> Iterator[str]:
    modules = adapter.modules
    rank, scale = _range(one.rank for one in modules), _range(one.scale for one in modules)
    alpha, count, size = config.get("lora_alpha"), len(modules), f"{adapter.parameters:,}"
    zh = f"秩 {rank}，alpha {alpha}（更新乘以 {scale}），{count} 个矩阵，{size} 个参数"
    yield text(zh, f"rank {rank}, alpha {alpha} (the update times {scale}), {count} matrices, {size} parameters")
    if config.get("use_dora"):
        zh = "DoRA：下面只算方向的更新，不算学到的幅度"
        yield text(zh, "DoRA: what follows counts the update of directions, not the magnitudes learnt")
    zh = "每个权重平均改了多少（均方根；条越长改得越多）："
    yield text(zh, "how far a weight is moved (root mean square; a longer bar is more):")
    groups = [*by_target(modules), *by_depth(modules)]
    largest = max((rms for _, rms in groups if math.isfinite(rms)), default=0.0) or 1.0
    bars = ["#" * round(BAR * rms / largest) if math.isfinite(rms) else "" for _, rms in groups]
    yield from aligned((f"  {name}", f"{rms:.1e}", bar) for (name, rms), bar in zip(groups, bars))
    finite = [one for one in modules if math.isfinite(one.rms)]
    if not finite:
        return
    most = max(finite, key=lambda one: one.rms)
    yield text(f"改得最多：{most.module}（{most.rms:.1e}）", f"moved most: {most.module} ({most.rms:.1e})")
    yield text(
        f"范数（Frobenius）：该矩阵 {most.norm:.3f}，全部 {adapter.norm:.3f}",
        f"norm (Frobenius): {most.norm:.3f} there, {adapter.norm:.3f} of all",
    )


def _range(values: Iterable[float]) -> str:
    """The least and the largest value, "4-8", or the only one."""
    found = sorted(set(values))
    return "-".join(dict.fromkeys(f"{value:.4g}" for value in (found[0], found[-1])))


def by_target(modules: Iterable[ModuleStats]) -> list[tuple[str, float]]:
    """(module's own name, root mean square of its change over all depths), in the model's order."""
    groups: dict[str, list[ModuleStats]] = {}
    for one in modules:
        groups.setdefault(one.target, []).append(one)
    return [(name, _mean_change(group)) for name, group in groups.items()]


def by_depth(modules: Iterable[ModuleStats], most: int = 6) -> list[tuple[str, float]]:
    """(range of layers, root mean square of their change), in at most `most` ranges of equal length."""
    groups: dict[int, list[ModuleStats]] = {}
    for one in modules:
        if one.depth is not None:
            groups.setdefault(one.depth, []).append(one)
    numbers = sorted(groups)
    size = -(-len(numbers) // most) or 1
    found = []
    for start in range(0, len(numbers), size):
        part = numbers[start : start + size]
        name = f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0])
        found.append((text(f"第 {name} 层", f"layer {name}"), _mean_change([x for n in part for x in groups[n]])))
    return found


def _mean_change(modules: list[ModuleStats]) -> float:
    """Root mean square of all entries of these changes together."""
    return (sum(one.norm**2 for one in modules) / sum(one.shape[0] * one.shape[1] for one in modules)) ** 0.5


def _files(verdict: FolderVerdict) -> Iterator[str]:
    rows = [(text("文件", "file"), "MB", text("完整", "whole"), text("哪里需要它", "needed for"))]
    for entry in verdict.entries:
        state = text("改过", "edited") if entry.changed else text("是", "yes")
        state = text("已损坏", "no") if entry.fault else state
        needs = text("、", ", ").join(text(*USE_NAMES[use]) for use in USES if entry.needed_for(use))
        rows.append((visible(entry.name), f"{entry.size / 1e6:.1f}" if entry.size >= 50_000 else "<0.1", state, needs))
    head, *rest = aligned(rows)
    yield head
    for line, entry in zip(rest, verdict.entries):
        yield line
        yield "    " + describe_entry(entry)
