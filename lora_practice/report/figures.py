"""The curves of a run: interactive ones for the report (plotly), one PNG for the model card (matplotlib).

A figure is plotly's JSON; its colours work on light and dark, the rest of its look is the page's CSS.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_practice.console.text import text
from lora_practice.report.adapter_stats import ModuleStats, finite_or_none
from lora_practice.report.loss_curve import Point, smoothed

BLUE, ORANGE, GREY = "#3b82c4", "#d9822b", "#8a94a0"
MARK = "lora-finetune-practice report"  # stands in what we wrote, so that we may replace it


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


def loss_figure(record: Mapping[str, Any]) -> dict[str, Any]:
    """Training loss as logged, its moving mean, and the held-out loss."""
    losses, held_out = logged_points(record, "loss"), held_out_points(record)
    steps = [step for step, _ in losses]
    logged, mean, unseen = (
        text("训练", "training"),
        text("训练（平滑）", "training, smoothed"),
        text("留出", "held out"),
    )
    traces = [
        _trace(logged, losses, GREY, mode="lines+markers", opacity=0.55, marker={"size": 4}, line={"width": 1}),
        _trace(mean, list(zip(steps, smoothed([loss for _, loss in losses]))), BLUE, line={"width": 3}),
    ]
    if held_out:
        traces.append(_trace(unseen, held_out, ORANGE, mode="lines+markers", marker={"size": 9, "symbol": "diamond"}))
    return _figure(traces, text("loss（nat / token）", "loss (nats per token)"), height=340)


def small_figures(record: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(title, figure) of gradient norm, learning rate, speed and memory, as far as they were logged."""
    wanted = (
        ("grad_norm", text("梯度范数（裁剪前）", "gradient norm, before clipping"), ""),
        ("learning_rate", text("学习率", "learning rate"), ""),
        ("tokens_per_second", text("速度", "speed"), "token/s"),
        ("memory_mb", text("内存", "memory"), "MB"),
    )
    found = []
    for key, title, unit in wanted:
        points = logged_points(record, key)
        if points:
            figure = _figure([_trace(title, points, BLUE)], unit, height=190, legend=False)
            largest = max((value for _, value in points if math.isfinite(value)), default=0.0)
            figure["layout"]["yaxis"]["range"] = [0, 1.15 * largest or 1]
            found.append((title, figure))
    return found


def layers_figure(layers: Sequence[ModuleStats]) -> dict[str, Any]:
    """A map of the model: a row for each kind of matrix, a column for each layer, stronger where it was moved more."""
    kinds = list(dict.fromkeys(layer.target for layer in layers))[::-1]
    depths = sorted({layer.depth or 0 for layer in layers})
    moved = {(layer.target, layer.depth or 0): finite_or_none(layer.rms) for layer in layers}
    heat = {
        "type": "heatmap",
        "x": depths,
        "y": kinds,
        "z": [[moved.get((kind, depth)) for depth in depths] for kind in kinds],
        "colorscale": [[0, "rgba(59,130,196,0.06)"], [1, "rgba(59,130,196,1)"]],  # stronger on light and on dark paper
        "xgap": 1,
        "ygap": 1,
        "showscale": False,
        "hovertemplate": text("第 %{x} 层", "layer %{x}") + " %{y}: %{z:.2e}<extra></extra>",
    }
    figure = _figure([heat], "", height=60 + 26 * len(kinds), legend=False)
    figure["layout"]["xaxis"]["title"] = {"text": text("层", "layer")}
    figure["layout"]["margin"]["l"] = 82
    figure["layout"]["hovermode"] = "closest"
    return figure


def curves_png(record: Mapping[str, Any]) -> bytes:
    """The loss and the gradient norm as a picture for the model card, in English as cards are."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no word of its font cache, which no reader has to mend
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses, held_out, norms = logged_points(record, "loss"), held_out_points(record), logged_points(record, "grad_norm")
    figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    above.plot(steps, values, color=GREY, linewidth=0.8, marker=".", markersize=4, alpha=0.6, label="training")
    above.plot(steps, smoothed(values), color=BLUE, linewidth=2, label="training, smoothed")
    if held_out:
        above.plot(*zip(*held_out), color=ORANGE, marker="D", markersize=6, linewidth=1.2, label="held out")
    above.set_ylabel("loss (nats per token)")
    above.legend(frameon=False)
    if norms:
        below.plot(*zip(*norms), color=BLUE, linewidth=1.2)
    below.set_ylabel("gradient norm")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": MARK})
    return picture.getvalue()


def _trace(name: str, points: Sequence[Point], colour: str, mode: str = "lines", **looks: Any) -> dict[str, Any]:
    line = {"color": colour, "width": 2, **looks.pop("line", {})}
    shown = [finite_or_none(value) for _, value in points]  # None is a gap in the line
    steps = [step for step, _ in points]
    return {"type": "scatter", "name": name, "x": steps, "y": shown, "mode": mode, "line": line, **looks}


def _figure(traces: Sequence[dict[str, Any]], unit: str, height: int, legend: bool = True) -> dict[str, Any]:
    axis = {"automargin": True, "fixedrange": True, "zeroline": False}
    layout = {
        "height": height,
        "margin": {"l": 52, "r": 12, "t": 8, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified",
        "dragmode": False,
        "showlegend": legend,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "font": {"size": 12},
        "xaxis": {**axis, "title": {"text": text("步", "step")}},
        "yaxis": {**axis, "title": {"text": unit}, "exponentformat": "e"},
    }
    return {"data": list(traces), "layout": layout}
