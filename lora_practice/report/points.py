"""The points of a run's curves, taken from its record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Optional

Point = tuple[int, float]  # (optimizer step, value)


def held_out_points(record: Mapping[str, Any]) -> list[Point]:
    """(step, loss) of the rows never trained on: before, during and after the run, as far as it was measured."""
    points = {int(one["step"]): float(one["loss"]) for one in record.get("evaluations") or ()}
    ends: Mapping[str, Any] = record.get("held_out_loss") or {}
    if "before" in ends:
        points.setdefault(0, float(ends["before"]))
    if "after" in ends and record.get("steps"):  # with a best adapter kept, it was the one measured
        points.setdefault(int(record.get("best_step") or record["steps"]), float(ends["after"]))
    return sorted(points.items())


def logged_points(record: Mapping[str, Any], key: str) -> list[Point]:
    """(step, value) of everything that was logged under `key`, among the losses or the pace."""
    logged = [*(record.get("losses") or ()), *(record.get("pace") or ())]
    return [(int(one["step"]), float(one[key])) for one in logged if one.get(key) is not None]


def passes_over_data(record: Mapping[str, Any]) -> Optional[float]:
    """How often a run passed over its data; None where the record does not tell (packed rows are fewer than it has)."""
    settings = record.get("settings") or {}
    found = [settings.get("per_device_train_batch_size"), settings.get("gradient_accumulation_steps")]
    found += [record.get("steps"), (record.get("data") or {}).get("rows_trained")]
    counts = [one for one in found if isinstance(one, int) and one > 0]
    if settings.get("packing") or len(counts) < len(found):
        return None
    batch, micro_batches, steps, rows = counts
    return steps / math.ceil(rows / (batch * micro_batches))


def intervals(points: Sequence[Point]) -> list[tuple[int, int]]:
    """The steps (from, to] that each logged training loss is the mean of: those since the point before."""
    ends = [step for step, _ in points]
    return list(zip([0, *ends], ends))


def are_means(points: Sequence[Point]) -> bool:
    """Whether some point stands for more than one step."""
    return any(last - first > 1 for first, last in intervals(points))


def centres(points: Sequence[Point]) -> list[float]:
    """The middle of the steps that each point is the mean of; the step itself where it is only one."""
    return [(first + 1 + last) / 2 for first, last in intervals(points)]


def stairs(points: Sequence[Point]) -> list[Point]:
    """The points with the beginning of the first interval before them: corners of a line of horizontal pieces."""
    if not points:
        return []
    return [(intervals(points)[0][0], points[0][1]), *points]
