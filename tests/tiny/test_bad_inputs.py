"""Whatever stands in a data file or after a flag: exit code 2, one clear line, and nothing written or changed."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import pytest
from bad_inputs import enter, refusal, snapshot
from bad_inputs.files import BROKEN, UNUSABLE, Body, long_line
from bad_inputs.folders import BAD_ADAPTERS, BAD_MODELS, make_base
from bad_inputs.rows import TABLE, A, U, chat
from bad_inputs.runs import BAD_RECORDS, BAD_RUNS, BAD_TARGETS, BAD_UPLOADS, HOSTILE_PATTERNS
from bad_inputs.settings import BAD_SETTINGS

from fine_tuning_practice import main as train
from lora_practice.data.bad_row import BadRow
from lora_practice.data.conversations import read_file

FILES = [*BROKEN, *UNUSABLE]


def put(path: Path, body: Body) -> None:
    """Make a case's file."""
    if isinstance(body, bytes):
        path.write_bytes(body)
    else:
        body(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in English."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    return tmp_path


def test_the_corpus_is_large_and_docs_reliability_counts_it() -> None:
    """And CHANGELOG.md says how many there are at least."""
    records = len(BAD_RECORDS)  # they are in BAD_RUNS and in BAD_UPLOADS
    counts = {
        "rows of data": len(TABLE),
        "data files": len(FILES),
        "settings": len(BAD_SETTINGS),
        "adapters": len(BAD_ADAPTERS) + len(HOSTILE_PATTERNS),
        "base models": len(BAD_MODELS),
        "records of a run": records,
        "checkpoints and runs to be resumed": len(BAD_RUNS) - records,
        "places to write to": len(BAD_TARGETS),
        "folders that must not be uploaded": len(BAD_UPLOADS) - records,
    }
    total = sum(counts.values())
    assert total >= 450
    page = (Path(__file__).resolve().parents[2] / "docs" / "reliability.en.md").read_text("utf-8")
    assert f"\n{total} kinds, " in page
    for thing, count in counts.items():
        assert re.search(rf"^\| {thing}[^|]* \| {count} \|$", page, re.M), (thing, count)


@pytest.mark.parametrize(("line", "part"), TABLE, ids=[str(number) for number in range(len(TABLE))])
def test_each_bad_row_is_named_with_its_line_cause_and_cure(
    line: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, good = tmp_path / "data.jsonl", json.dumps(chat(U, A))
    path.write_text(f"{good}\n\n{line}\n{good}\n", encoding="utf-8")
    told = {}
    for language in ("en", "zh"):
        monkeypatch.setenv("LORA_PRACTICE_LANG", language)
        outcomes = list(read_file(path))
        origins = [one.origin for one in outcomes]
        assert origins == ["data.jsonl:1", "data.jsonl:3", "data.jsonl:4"]
        bad = outcomes[1]
        assert isinstance(bad, BadRow) and bad.cause and bad.fix
        assert len(str(bad)) < 400 and "\n" not in str(bad)
        told[language] = (str(bad), bad.cause, bad.fix)
    assert part in told["en"][0]
    assert all(zh != en for zh, en in zip(told["zh"], told["en"]))


@pytest.mark.parametrize(("line", "part"), TABLE, ids=[str(number) for number in range(len(TABLE))])
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


def test_a_line_without_end_costs_no_memory(place: Path) -> None:
    """100 MB in one line are passed over in pieces."""
    put(place / "long.jsonl", long_line('{"text": "'))
    tracemalloc.start()
    outcomes = list(read_file(place / "long.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(outcomes) == 1 and isinstance(outcomes[0], BadRow)
    assert peak < 60_000_000


@pytest.mark.parametrize(("words", "part"), BAD_SETTINGS, ids=[" ".join(case[0])[:40] for case in BAD_SETTINGS])
def test_a_bad_setting_is_named(
    words: tuple[str, ...], part: str, place: Path, no_hub: None, capsys: pytest.CaptureFixture
) -> None:
    assert part in refusal(enter(train, capsys, *words))
    assert not list(place.iterdir())
