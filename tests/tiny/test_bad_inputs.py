"""Bad data through the whole entry point: exit code 2, one clear line, and nothing written or changed.

A sample: every eighth row and every sixth file, in the order of the lists, which goes through the kinds. All of them
go through the reader in tests/unit/test_bad_rows.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bad_inputs import enter, put, refusal, snapshot
from bad_inputs.files import BROKEN, UNUSABLE, Body
from bad_inputs.rows import TABLE, A, U, chat
from bad_inputs.settings import SEEN_LATER

from fine_tuning_practice import main as train

ROWS = TABLE[::8]
FILES = [case for i, case in enumerate([*BROKEN, *UNUSABLE]) if i % 6 == 0 or len(case[0]) > 255]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in English."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    return tmp_path


@pytest.mark.parametrize(("line", "part"), ROWS, ids=[str(8 * number) for number in range(len(ROWS))])
def test_a_bad_row_stops_the_run_before_anything_is_written(
    line: str, part: str, base: Path, place: Path, no_hub: None, capsys: pytest.CaptureFixture
) -> None:
    good = json.dumps(chat(U, A))
    (place / "data.jsonl").write_text(f"{good}\n\n{line}\n{good}\n", encoding="utf-8")
    before = snapshot(place)
    said = enter(train, capsys, "--model_name", str(base), "--dataset_path", "data.jsonl", "--output_dir", "out")
    told = refusal(said)
    assert "data.jsonl:3: " in told and part in told
    assert snapshot(place) == before


@pytest.mark.parametrize(("name", "body", "part"), FILES, ids=[f"{i} {case[0][:12]!r}" for i, case in enumerate(FILES)])
def test_a_bad_data_file_stops_the_run_before_anything_is_written(
    name: str, body: Body, part: str, base: Path, place: Path, no_hub: None, capsys: pytest.CaptureFixture
) -> None:
    if name != "no/such.jsonl":
        put(place / name, body)
    before = snapshot(place)
    said = enter(train, capsys, "--model_name", str(base), "--dataset_path", name, "--output_dir", "out")
    assert part in refusal(said)
    assert snapshot(place) == before


@pytest.mark.parametrize(("words", "part"), SEEN_LATER)
def test_a_setting_that_the_data_contradicts_is_named(
    words: tuple[str, ...], part: str, base: Path, place: Path, no_hub: None, capsys: pytest.CaptureFixture
) -> None:
    (place / "data.jsonl").write_text(json.dumps(chat(U, A)) + "\n", encoding="utf-8")
    before = snapshot(place)
    where = ("--model_name", str(base), "--dataset_path", "data.jsonl", "--output_dir", "out")
    assert part in refusal(enter(train, capsys, *where, *words))
    assert snapshot(place) == before
