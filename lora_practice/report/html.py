"""`lora-practice report DIR`: a run on one page that needs nothing else, and its curves as a PNG for the model card.

The page holds everything it shows: plotly's JavaScript is inside, compressed, and no address is asked for anything.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import language, text, visible
from lora_practice.inference.samples import SAMPLE_TOKENS
from lora_practice.machine.gpus import WHEELS
from lora_practice.report import figures, folder_text, loss_curve
from lora_practice.report.checks import USES, FolderVerdict, check_folder
from lora_practice.report.figures import MARK
from lora_practice.run import model_card
from lora_practice.run.folder import CARD, PROOF, RECORD, is_runs_own_card
from lora_practice.run.settings import shown_settings
from lora_practice.storage import manifest

PAGE, PICTURE = "report.html", "curves.png"


def write_report(
    folder: Path, reasons: Mapping[str, tuple[Any, str]], samples: Optional[list[dict[str, str]]] = None
) -> tuple[Path, str]:
    """Write DIR/report.html and DIR/curves.png, and show the curves in the model card that the run wrote.

    Args:
        folder: the output folder of a run.
        reasons: for each setting its default and the line of why.
        samples: answers of base and adapter, kept in the record from now on; None leaves the run's own.

    Returns:
        The page, and what its curve says.

    Raises:
        UserError: there is no run in the folder, or a file of that name which we did not write.
    """
    verdict = check_folder(folder)
    record = dict(verdict.record)
    if not record.get("losses") or not (folder / RECORD).is_file():
        what = text(
            "这里没有训练记录（run_record.json 里没有 loss）", "no run is recorded here (no losses in run_record.json)"
        )
        raise UserError(what, str(folder), text("用训练的输出文件夹", "name the output folder of a run"))
    for name in (PAGE, PICTURE):
        _check_ours(folder / name)
    reading = loss_curve.judge_curve(figures.logged_points(record, "loss"), figures.held_out_points(record))
    record.update({"samples": samples} if samples else {}, curves=PICTURE)
    manifest.write_atomically(folder / PICTURE, figures.curves_png(record))
    manifest.write_atomically(folder / PAGE, report_html(replace(verdict, record=record), reading, reasons))
    if record != verdict.record and record.get("status") == "finished":
        _keep(folder, record)
    return folder / PAGE, reading.sentence


def report_html(
    verdict: FolderVerdict, reading: loss_curve.CurveVerdict, reasons: Mapping[str, tuple[Any, str]]
) -> str:
    """The HTML. Whatever comes from data, names and answers is escaped by jinja2."""
    from jinja2 import Environment, PackageLoader
    from plotly.offline import get_plotlyjs

    record, layers = verdict.record, verdict.adapter.modules if verdict.adapter else ()
    environment = Environment(loader=PackageLoader("lora_practice.report", "."), autoescape=True, trim_blocks=True)
    environment.filters["visible"] = visible
    shown = [("loss", figures.loss_figure(record))]
    small = [(f"small{number}", title, figure) for number, (title, figure) in enumerate(figures.small_figures(record))]
    if layers:
        shown.append(("layers", figures.layers_figure(layers)))
    every = dict([*shown, *((name, figure) for name, _, figure in small)])
    return environment.get_template("html.jinja").render(
        t=text,
        language=language(),
        mark=MARK,
        title=verdict.folder.resolve().name,
        record=record,
        verdict=verdict,
        sentence=reading.sentence,
        tiles=_tiles(record),
        figures=every,
        small=small,
        layers=layers,
        moved=sorted((one for one in layers if math.isfinite(one.rms)), key=lambda layer: -layer.rms)[:5],
        settings=_settings(record, reasons),
        files=[
            (item, folder_text.describe_entry(item)) for item in verdict.entries if item.name not in (PAGE, PICTURE)
        ],
        uses=[(text(*folder_text.USE_NAMES[use]), verdict.uses[use].possible, verdict.uses[use].why) for use in USES],
        use_names={use: text(*names) for use, names in folder_text.USE_NAMES.items()},
        install=_install(record.get("versions") or {}),
        sample_tokens=SAMPLE_TOKENS,
        picture=base64.b64encode(figures.curves_png(record)).decode("ascii"),
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode("utf-8"), mtime=0)).decode("ascii"),
    )


def _tiles(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    losses, held_out = figures.logged_points(record, "loss"), figures.held_out_points(record)
    smooth = loss_curve.smoothed([loss for _, loss in losses])
    tiles = [(text("训练 loss（平滑）", "training loss, smoothed"), f"{smooth[0]:.2f} → {smooth[-1]:.2f}")]
    if held_out:
        before = held_out[0][1]
        after = float((record.get("held_out_loss") or {}).get("after", held_out[-1][1]))
        tiles.append((text("留出数据的 loss", "held-out loss"), f"{before:.3f} → {after:.3f}"))
        if max(before, after) < 700:  # beyond it exp overflows
            zh, en = "留出数据的困惑度", "held-out perplexity"
            tiles.append((text(zh, en), f"{math.exp(before):.1f} → {math.exp(after):.1f}"))
    tiles.append((text("步数", "steps"), str(record.get("steps", losses[-1][0]))))
    for key, name, unit in (
        ("seconds", text("用时", "time"), "s"),
        ("tokens_per_second", text("速度", "speed"), "token/s"),
        ("peak_memory_mb", text("内存峰值", "peak memory"), "MB"),
    ):
        if key in record:
            tiles.append((name, f"{record[key]:,.0f} {unit}"))
    return tiles


def _install(versions: Mapping[str, Any]) -> str:
    """The pip line for these versions. PyPI has no "+cpu": such a torch comes from an index of its own."""
    named = [f"{name}=={str(number).partition('+')[0]}" for name, number in versions.items() if name != "python"]
    build = str(versions.get("torch")).partition("+")[2]
    index = [f"--extra-index-url {WHEELS}{build}"] if re.fullmatch(r"cpu|cu\d+", build) else []
    return " ".join(["pip install", *named, *index])


def _settings(
    record: Mapping[str, Any], reasons: Mapping[str, tuple[Any, str]]
) -> Sequence[tuple[str, Any, bool, str]]:
    """(name, value, whether it is not the default, why) of everything that makes the run what it is."""
    rows = []
    for name, value in shown_settings(record).items():
        default, why = reasons.get(name, (value, ""))
        rows.append((name, value, value != default, why))
    return rows


def _check_ours(file: Path) -> None:
    """UserError if there is a file that no report wrote."""
    try:
        with open(file, "rb") as opened:
            ours = MARK.encode("ascii") in opened.read(4096)
    except FileNotFoundError:
        return
    if not ours:
        raise UserError(
            text("这个文件不是报告写的，不会覆盖它", "this file was not written by a report: it is left alone"),
            str(file),
            text("改个名字，或移走它", "rename it, or move it away"),
        )


def _keep(folder: Path, record: dict[str, Any]) -> None:
    """Write the record anew, and README.md too where it is still the card that the run wrote: an edited one stays."""
    card, written = folder / CARD, record.get("files") or {}
    if is_runs_own_card(folder, record):
        _, begin, proof = card.read_text("utf-8").partition(PROOF[0])
        manifest.write_atomically(card, model_card.card(record) + (f"\n{begin}{proof}" if begin else ""))
        record["files"] = {**written, CARD: manifest.sha256(card)}
    manifest.write_atomically(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n")
