"""`lora-practice report DIR`: a run on one page that needs nothing else, and its curves as a PNG for the model card.

The page holds everything it shows: plotly's JavaScript is inside, compressed, and no address is asked for anything.
"""

from __future__ import annotations

import base64
import gzip
import math
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import language, masked, text, visible, without_tokens
from lora_practice.inference.samples import SAMPLE_TOKENS
from lora_practice.report import figures, folder_text, page_content
from lora_practice.report.base_weights import relative_changes
from lora_practice.report.checks import USES, FolderVerdict, check_folder
from lora_practice.report.glossary import glossary
from lora_practice.report.loss_curve import CurveVerdict, judge_curve
from lora_practice.report.picture import curves_png
from lora_practice.report.points import held_out_points, logged_points, passes_over_data
from lora_practice.run import model_card
from lora_practice.run.file_kinds import CARD, CURVES, FIRST_ROW_MARKS, REPORT_MARK, REPORT_PAGE
from lora_practice.run.folder import PROOF, record_text, rewrite_card
from lora_practice.run.own_files import is_reports_own, is_runs_own_card
from lora_practice.storage import manifest
from lora_practice.storage.json_files import RECORD


def write_report(
    folder: Path, reasons: Mapping[str, tuple[Any, str]], samples: Optional[list[dict[str, str]]] = None
) -> tuple[Path, str]:
    """Write DIR/report.html and DIR/curves.png, and show the curves in the model card that the run wrote.

    Args:
        folder: the output folder of a run.
        reasons: for each setting its default and the line of why.
        samples: answers of base and adapter, kept in the record from now on; None leaves the run's own.

    Returns:
        The page, and the lines for the user: what the curve says, what was written, how to open it.

    Raises:
        UserError: there is no run in the folder, or a file of that name which we did not write.
    """
    verdict = check_folder(folder)
    record = dict(verdict.record)
    if not record.get("losses") or not (folder / RECORD).is_file():
        what = text(f"这里没有训练记录（{RECORD} 里没有 loss）", f"no run is recorded here (no losses in {RECORD})")
        raise UserError(what, str(folder), text("用训练的输出文件夹", "name the output folder of a run"))
    for name in (REPORT_PAGE, CURVES):
        _check_written_by_report(folder / name)
    curve = judge_curve(logged_points(record, "loss"), held_out_points(record), passes_over_data(record))
    record.update({"samples": samples} if samples else {}, curves=CURVES)
    picture = curves_png(record)
    manifest.write_atomically(folder / CURVES, picture)
    manifest.write_atomically(
        folder / REPORT_PAGE, report_html(replace(verdict, record=record), curve, reasons, picture)
    )
    in_card = record.get("status") == "finished" and is_runs_own_card(folder, record)
    in_card = in_card and model_card.is_enough_for_a_card(record)
    if record != verdict.record and record.get("status") == "finished":
        _update_record_and_card(folder, record, in_card)
    return folder / REPORT_PAGE, "\n".join([curve.sentence, *_written(folder, in_card)])


def _written(folder: Path, in_card: bool) -> list[str]:
    """The lines that say what was written and how to open the page."""
    where = text(f"曲线图：{folder / CURVES}", f"the curves alone: {folder / CURVES}")
    where += text("（也放进了模型卡 README.md）", " (in the model card README.md too)") if in_card else ""
    opener = {"darwin": "open", "win32": "start"}.get(sys.platform, "xdg-open")
    how = text(
        "用浏览器打开报告（不联网、不需要别的文件，可以拷到别的电脑上看）：",
        "open the report in a browser (it needs no network and no other file: copy it anywhere):",
    )
    return [where, how, f"  {opener} {shlex.quote(str(folder / REPORT_PAGE))}"]


def report_html(
    verdict: FolderVerdict, curve: CurveVerdict, reasons: Mapping[str, tuple[Any, str]], picture: bytes
) -> str:
    """The HTML, without tokens. Whatever comes from data, names and answers is escaped by jinja2."""
    from jinja2 import Environment, PackageLoader
    from plotly.offline import get_plotlyjs

    verdict = replace(verdict, record=masked(verdict.record))
    record, modules = verdict.record, verdict.adapter.modules if verdict.adapter else ()
    environment = Environment(loader=PackageLoader("lora_practice.report", "."), autoescape=True, trim_blocks=True)
    environment.filters["visible"] = visible
    small = [(f"small{number}", title, figure) for number, (title, figure) in enumerate(figures.small_figures(record))]
    shown = {"loss": figures.loss_figure(record), **{name: figure for name, _, figure in small}}
    changes = {one.module: one.rms for one in modules if math.isfinite(one.rms)}
    percent = relative_changes(changes, verdict.base)
    if modules:
        shown["modules"] = figures.modules_figure(modules, percent)
    settings = page_content.settings_rows(record, reasons)
    asked = [one for one in record.get("samples") or () if {"prompt", "base", "adapter"} <= set(one)]
    page = environment.get_template("html.jinja").render(
        t=text,
        language=language(),
        mark=REPORT_MARK,
        title=page_content.title(record),
        headline=page_content.headline(record),
        facts=page_content.facts(record),
        record={**record, "samples": asked, **{name: record.get(name) or {} for name in ("data", "machine")}},
        verdict=verdict,
        sentence=curve.sentence,
        figures=shown,
        small=small,
        modules=modules,
        percent=percent,
        moved=sorted((one for one in modules if one.module in changes), key=lambda one: -_size(one, percent))[:5],
        changed=[row for row in settings if row.changed],
        unchanged=[row for row in settings if not row.changed],
        first_row_marks=FIRST_ROW_MARKS,
        first_row=page_content.first_row_parts(record),
        data_name=page_content.data_name(record),
        lost=page_content.lost_rows(record),
        files=[
            (one, folder_text.describe_entry(one)) for one in verdict.entries if one.name not in (REPORT_PAGE, CURVES)
        ],
        uses=[(text(*folder_text.USE_NAMES[use]), verdict.uses[use]) for use in USES],
        use_names={use: text(*names) for use, names in folder_text.USE_NAMES.items()},
        use_state=folder_text.use_state,
        next_steps=page_content.next_steps(verdict, curve),
        glossary=glossary(),
        command=page_content.training_command(record),
        install=page_content.install_command(record.get("versions") or {}),
        sample_tokens=SAMPLE_TOKENS,
        picture=base64.b64encode(picture).decode("ascii"),
        plotly=base64.b64encode(gzip.compress(get_plotlyjs().encode("utf-8"), mtime=0)).decode("ascii"),
    )
    return without_tokens(page)


def _size(module: Any, percent: Mapping[str, float]) -> float:
    return percent.get(module.module, 0.0) if percent else module.rms


def _check_written_by_report(file: Path) -> None:
    """UserError if the file exists and no report wrote it."""
    if file.exists() and not is_reports_own(file):
        raise UserError(
            text("这个文件不是报告写的，不会覆盖它", "this file was not written by a report: it is left alone"),
            str(file),
            text("改个名字，或移走它", "rename it, or move it away"),
        )


def _update_record_and_card(folder: Path, record: dict[str, Any], in_card: bool) -> None:
    """Replace the record, and README.md too if `in_card`: it is still the card that the run wrote."""
    card = folder / CARD
    if in_card:
        _, begin, proof = card.read_text("utf-8").partition(PROOF[0])
        rewrite_card(folder, model_card.card(record) + (f"\n{begin}{proof}" if begin else ""), record)
    else:
        manifest.write_atomically(folder / RECORD, record_text(record))
