"""Every bad row, data file and setting through its reader: a clear complaint with the place, the cause and the cure."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from bad_inputs import enter, put, refusal
from bad_inputs.files import BROKEN, UNUSABLE, Body, long_line
from bad_inputs.rows import TABLE, A, U, chat
from bad_inputs.settings import BAD_SETTINGS, SEEN_LATER
from count_bad_inputs import COUNTS, PAGES, with_counts

from fine_tuning_practice import main as train
from lora_practice.console.errors import UserError
from lora_practice.data.bad_row import BadRow
from lora_practice.data.conversations import read_file
from lora_practice.data.good_rows import collect
from lora_practice.sources.find import find_dataset

FILES = [case for case in (*BROKEN, *UNUSABLE) if len(case[0]) < 256]  # longer names: tests/tiny/test_bad_inputs.py
SETTINGS = [case for case in BAD_SETTINGS if case not in SEEN_LATER]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in English."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    return tmp_path


def test_the_corpus_holds_450_kinds_or_more() -> None:
    assert COUNTS[-1][1] == "all" and COUNTS[-1][2] == sum(count for *_, count in COUNTS[:-1]) >= 450


@pytest.mark.parametrize("language", PAGES)
def test_the_pages_count_the_corpus(language: str) -> None:
    page = PAGES[language].read_text("utf-8")
    assert "<!-- bad inputs -->" in page and page == with_counts(page, language)  # else: count_bad_inputs.py


@pytest.mark.parametrize(("line", "part"), TABLE, ids=[str(number) for number in range(len(TABLE))])
def test_each_bad_row_is_named_with_its_line_cause_and_cure(
    line: str, part: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, good = place / "data.jsonl", json.dumps(chat(U, A))
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


@pytest.mark.parametrize(("name", "body", "part"), FILES, ids=[f"{i} {case[0][:12]!r}" for i, case in enumerate(FILES)])
def test_each_bad_file_is_refused_with_a_reason(name: str, body: Body, part: str, no_hub: None, place: Path) -> None:
    if name != "no/such.jsonl":
        put(place / name, body)
    with pytest.raises(UserError) as caught:
        found = find_dataset(name, is_default=False)
        assert found.path is not None
        collect(read_file(found.path), None, False, found.name)
    assert part in str(caught.value)


def test_a_line_without_end_costs_no_memory(place: Path) -> None:
    """100 MB in one line are passed over in pieces."""
    put(place / "long.jsonl", long_line('{"text": "', 100))
    tracemalloc.start()
    outcomes = list(read_file(place / "long.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(outcomes) == 1 and isinstance(outcomes[0], BadRow)
    assert peak < 60_000_000


@pytest.mark.parametrize(("words", "part"), SETTINGS, ids=[" ".join(case[0])[:40] for case in SETTINGS])
def test_a_bad_setting_is_named(
    words: tuple[str, ...], part: str, place: Path, no_hub: None, capsys: pytest.CaptureFixture
) -> None:
    assert part in refusal(enter(train, capsys, *words))
    assert not list(place.iterdir())
