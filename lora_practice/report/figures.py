"""The report's interactive charts, as plotly's JSON. Their colours suit light and dark; page.css does the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_practice.console.text import text
from lora_practice.report.adapter_stats import ModuleStats, finite_or_none
from lora_practice.report.loss_curve import FEWEST, smoothed
from lora_practice.report.points import Point, are_means, centres, held_out_points, intervals, logged_points, stairs

BLUE, ORANGE, GREY = "#3b82c4", "#d9822b", "#8a94a0"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as data goes through a layer

Figure = dict[str, Any]  # {"data": [...], "layout": {...}} of plotly


def loss_figure(record: Mapping[str, Any]) -> Figure:
    """Training loss as logged, its moving mean, and the validation loss.

    A logged loss that is the mean of several steps is drawn over all of them, as a horizontal piece.
    """
    losses, held_out = logged_points(record, "loss"), held_out_points(record)
    traces = [_training_trace(losses)]
    if len(losses) >= FEWEST:
        spans = [last - first for first, last in intervals(losses)]
        mean = smoothed([loss for _, loss in losses], spans)
        trace = _trace(text("训练（平滑）", "training, smoothed"), [], BLUE, line={"width": 3})
        traces.append({**trace, "x": centres(losses), "y": [finite_or_none(loss) for loss in mean]})
    else:
        traces[0].update(opacity=1.0, line={**traces[0]["line"], "color": BLUE, "width": 2})
    if held_out:
        unseen = text("验证集（没见过的）", "validation (unseen)")
        traces.append(_trace(unseen, held_out, ORANGE, mode="lines+markers", marker={"size": 8, "symbol": "diamond"}))
    last = max((step for step, _ in [*losses, *held_out]), default=1)
    return _figure(traces, text("loss（nat / token）", "loss (nats per token)"), height=340, last_step=last)


def _training_trace(losses: Sequence[Point]) -> dict[str, Any]:
    line = {"width": 1}
    if not are_means(losses):
        name = text("训练（每一步）", "training, each step")
        return _trace(name, losses, GREY, mode="lines+markers", opacity=0.55, marker={"size": 4}, line=line)
    name = text("训练（每几步的平均）", "training, means of several steps")
    trace = _trace(name, stairs(losses), GREY, opacity=0.7, line={**line, "shape": "vh", "width": 1.5})
    of = [text(f"第 {first + 1}–{last} 步", f"steps {first + 1}–{last}") for first, last in intervals(losses)]
    return {**trace, "text": [of[0], *of], "hovertemplate": "%{text}: %{y:.3f}"}


def small_figures(record: Mapping[str, Any]) -> list[tuple[str, Figure]]:
    """(title, figure) of gradient norm, learning rate, speed and memory, as far as they were logged."""
    wanted = (
        ("grad_norm", text("梯度范数（裁剪前）", "gradient norm, before clipping"), ""),
        ("learning_rate", text("学习率", "learning rate"), ""),
        ("tokens_per_second", text("速度（token/秒）", "speed (token/s)"), ""),
        ("memory_mb", text("内存（MB）", "memory (MB)"), ""),
    )
    found = []
    for key, title, unit in wanted:
        points = logged_points(record, key)
        if points:
            mode = "lines+markers" if len(points) < FEWEST else "lines"
            trace = _trace(title, points, BLUE, mode=mode, marker={"size": 5})
            figure = _figure([trace], unit, height=180, legend=False, last_step=points[-1][0])
            largest = max((value for _, value in points if math.isfinite(value)), default=0.0)
            figure["layout"]["yaxis"].update(range=[0, 1.15 * largest or 1], **_small_ticks(largest))
            found.append((title, figure))
    return found


def modules_figure(modules: Sequence[ModuleStats], percent: Mapping[str, float]) -> Figure:
    """A map of the model: a row for each target module, a column for each layer, stronger where it was moved more.

    percent: each change in percent of the base's weights, by module name; without it the change's own size is shown.
    """
    found = list(dict.fromkeys(one.target for one in modules))
    targets = sorted(found, key=lambda name: TARGETS.index(name) if name in TARGETS else len(TARGETS))
    depths = sorted({one.depth or 0 for one in modules})
    shown = {one.module: percent.get(one.module) if percent else finite_or_none(one.rms) for one in modules}
    cells = {(one.target, one.depth or 0): finite_or_none(shown[one.module] or math.nan) for one in modules}
    value = "%{z:.2g}%" if percent else "%{z:.1e}"
    heat = {
        "type": "heatmap",
        "x": depths,
        "y": targets,
        "z": [[cells.get((target, depth)) for depth in depths] for target in targets],
        "zmin": 0,
        # on light and on dark paper; one matrix far above the others must not leave them all alike
        "colorscale": [[at, f"rgba(59,130,196,{round(0.04 + 0.96 * at**0.6, 3)})"] for at in (0, 0.1, 0.25, 0.5, 1)],
        "colorbar": {
            "orientation": "h",
            "thickness": 10,
            "outlinewidth": 0,
            "y": 1,
            "yanchor": "bottom",
            "ticksuffix": "%" if percent else "",
            "exponentformat": "e",
            "nticks": 5,
        },
        "hovertemplate": text("第 %{x} 层", "layer %{x}") + " %{y}: " + value + "<extra></extra>",
    }
    figure = _figure([heat], "", height=120 + 26 * len(targets), legend=False, last_step=depths[-1] if depths else 1)
    layout = figure["layout"]
    layout["xaxis"].update(title={"text": text("层", "layer")}, showgrid=False, ticks="")
    layout["yaxis"].update(showgrid=False, ticks="", autorange="reversed")
    layout["margin"].update(l=82, t=44)
    layout["hovermode"] = "closest"
    return figure


def _trace(name: str, points: Sequence[Point], colour: str, mode: str = "lines", **looks: Any) -> dict[str, Any]:
    line = {"color": colour, "width": 2, **looks.pop("line", {})}
    shown = [finite_or_none(value) for _, value in points]  # None is a gap in the line
    steps = [step for step, _ in points]
    return {"type": "scatter", "name": name, "x": steps, "y": shown, "mode": mode, "line": line, **looks}


def _figure(
    traces: Sequence[dict[str, Any]], unit: str, height: int, legend: bool = True, last_step: int = 1
) -> Figure:
    axis = {"automargin": True, "fixedrange": True, "zeroline": False}
    steps = {"tick0": 0, "dtick": _step_between_ticks(last_step)}
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
        "xaxis": {**axis, **steps, "title": {"text": text("步", "step")}},
        "yaxis": {**axis, "title": {"text": unit}, "exponentformat": "e"},
    }
    return {"data": list(traces), "layout": layout}


def _step_between_ticks(last: int) -> int:
    """A round number of steps between two labels, so that about six fit."""
    return next(size for power in range(12) for size in (10**power, 2 * 10**power, 5 * 10**power) if 6 * size >= last)


def _small_ticks(largest: float) -> dict[str, Any]:
    """Labels such as 5e-5 for an axis of small numbers; {} where plotly's own will do."""
    if not 0 < largest < 0.01:
        return {}
    size = 10.0 ** math.floor(math.log10(largest))
    between = next(step * size for step in (0.2, 0.5, 1, 2, 5) if largest <= 3.5 * step * size)
    values = [count * between for count in range(1, int(largest / between * 1.1) + 1)]
    return {"tickvals": [0, *values], "ticktext": ["0", *(scientific(value) for value in values)]}


def scientific(value: float) -> str:
    """A small number as it is written in a command: 5e-5, 1.5e-4."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}"
