"""curves.png: the loss and the gradient norm of a run as a picture for the model card (matplotlib)."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from typing import Any, Optional

from lora_practice.console.text import language
from lora_practice.report.figures import BLUE, GREY, ORANGE
from lora_practice.report.loss_curve import FEWEST, smoothed
from lora_practice.report.points import are_means, centres, held_out_points, intervals, logged_points, stairs
from lora_practice.run.file_kinds import REPORT_MARK

# fonts with Chinese characters as Windows, macOS and Linux bring them; of a .ttc matplotlib knows the first face only
CHINESE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN"),
    *("Microsoft YaHei", "SimHei", "DengXian", "PingFang SC", "Hiragino Sans GB", "Heiti SC", "STHeiti"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Arial Unicode MS"),
)
WORDS = {
    "each": ("训练（每一步）", "training, each step"),
    "means": ("训练（每几步的平均）", "training, means of several steps"),
    "smoothed": ("训练（平滑）", "training, smoothed"),
    "validation": ("验证集（没见过的）", "validation (unseen)"),
    "loss": ("loss（nat / token）", "loss (nats per token)"),
    "norm": ("梯度范数", "gradient norm"),
    "step": ("步", "step"),
}


def curves_png(record: Mapping[str, Any]) -> bytes:
    """The curves as a PNG, in the user's language; in English where no font on this machine has the characters."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no word of its font cache, which no reader has to mend
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    font = chinese_font() if language() == "zh" else None
    words = {key: zh if font else en for key, (zh, en) in WORDS.items()}
    picture = io.BytesIO()
    with rc_context({"font.family": [font, "sans-serif"] if font else ["sans-serif"], "axes.unicode_minus": False}):
        figure = Figure(figsize=(8, 5), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _draw_losses(above, record, words)
        norms = logged_points(record, "grad_norm")
        if norms:
            below.plot(*zip(*norms), color=BLUE, linewidth=1.2, marker="." if len(norms) < FEWEST else "")
        below.set_ylabel(words["norm"])
        below.set_xlabel(words["step"])
        below.xaxis.get_major_locator().set_params(integer=True)
        for axes in (above, below):
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(picture, format="png", metadata={"Software": REPORT_MARK})
    return picture.getvalue()


def _draw_losses(axes: Any, record: Mapping[str, Any], words: Mapping[str, str]) -> None:
    losses, held_out = logged_points(record, "loss"), held_out_points(record)
    values, enough = [loss for _, loss in losses], len(losses) >= FEWEST
    looks = {"color": GREY, "linewidth": 0.8, "alpha": 0.6} if enough else {"color": BLUE, "linewidth": 1.6}
    if are_means(losses):  # each over all of its steps
        axes.plot(*zip(*stairs(losses)), drawstyle="steps-pre", label=words["means"], **looks)
    elif losses:
        axes.plot(*zip(*losses), marker=".", markersize=4, label=words["each"], **looks)
    if enough:
        spans = [last - first for first, last in intervals(losses)]
        axes.plot(centres(losses), smoothed(values, spans), color=BLUE, linewidth=2, label=words["smoothed"])
    if held_out:
        axes.plot(*zip(*held_out), color=ORANGE, marker="D", markersize=6, linewidth=1.2, label=words["validation"])
    axes.set_ylabel(words["loss"])
    axes.legend(frameon=False)


def chinese_font() -> Optional[str]:
    """The name of a font on this machine that has every Chinese character of the picture; None if there is none."""
    from matplotlib import font_manager

    known = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    for name in CHINESE_FONTS:
        if name in known and _family_with_our_characters(known[name]):
            return name
    newer = set(font_manager.findSystemFonts()) - set(known.values())  # than matplotlib's own list
    for file in sorted(newer, key=lambda file: ("bold" in file.lower(), file)):
        family = _family_with_our_characters(file)
        if family in CHINESE_FONTS:
            font_manager.fontManager.addfont(file)
            return family
    return None


def _family_with_our_characters(file: str) -> str:
    """The family name of a font file that has every character of WORDS; "" for any other file."""
    from matplotlib.ft2font import FT2Font

    needed = {ord(letter) for zh, _ in WORDS.values() for letter in zh}
    try:
        font = FT2Font(file)
        return str(font.family_name) if needed <= set(font.get_charmap()) else ""
    except (OSError, RuntimeError):  # gone since it was listed, or damaged
        return ""
