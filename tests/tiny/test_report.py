"""The report is one safe file that shows what the record holds, and replaces nothing that it did not write."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from bad_inputs.folders import edit, make_base, make_output, tensors, write
from fresh_process import in_a_process

from fine_tuning_practice import TrainSettings
from lora_practice.console.errors import UserError
from lora_practice.console.settings import reasons
from lora_practice.report import figures
from lora_practice.report import html as reports
from lora_practice.run import model_card
from lora_practice.storage import manifest

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


def test_words_from_data_never_become_html_or_steer_anything(folder):
    page = report(folder)
    assert "<script>alert" not in page and "\x1b" not in page and "\u202e" not in page
    assert "&lt;script&gt;alert" in page
    assert page.count("<script") == 3


def test_nothing_is_asked_of_any_address(folder):
    page = report(folder)
    assert not re.search(r"""(src|href|url|@import)\s*[=(:]\s*["']?\s*(https?:)?//""", page)
    assert "default-src 'none'" in page


def test_the_page_shows_what_the_record_holds(folder):
    page = report(folder)
    for words in ("2.900 → 2.100", "61 s", "950 MB", "0.001", "ten times that of full", "pip install torch==2.13.0"):
        assert words in page, words
    assert "An answer has 64 tokens at most" in page
    drawn = json.loads(re.search(r'<script id="figures"[^>]*>(.*?)</script>', page, flags=re.S).group(1))
    assert set(drawn) == {"loss", "layers", "small0", "small1", "small2", "small3"}
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
        'lang="zh-CN"' in chinese and "前后的回答" in chinese and "怎样重现" in chinese and "LoRA 的学习率" in chinese
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

    found = re.search(r'<script id="figures"[^>]*>(.*?)</script>', page, flags=re.S)
    drawn = json.loads(found.group(1), parse_constant=refuse)
    depths, rows = drawn["layers"]["data"][0]["x"], drawn["layers"]["data"][0]["z"]
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
    code = "from lora_practice.report import figures; figures.curves_png({'losses': [{'step': 1, 'loss': 2.0}]})"
    assert in_a_process(code, tmp_path, MPLCONFIGDIR=str(tmp_path / "no-folder")).stderr == ""


def test_a_card_that_someone_edited_stays_as_it_is(folder):
    write("README.md", b"# mine\n")(folder)
    report(folder)
    assert (folder / "README.md").read_text("utf-8") == "# mine\n"


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
    assert figures.held_out_points(record) == [(0, 3.01), (10, 2.5), (20, 2.0)]
    assert figures.held_out_points({**record, "best_step": 10}) == [(0, 3.01), (10, 2.5)]
    assert figures.logged_points(record, "loss") == [(10, 2.2)]
