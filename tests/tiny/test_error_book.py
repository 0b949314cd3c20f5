"""docs/errors.md and docs/errors.en.md: each error in them is provoked through its entry point, in both languages."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import enter, refusal
from bad_inputs.book import PROVOKED, Place
from hub_server import HubServer

from lora_practice.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
BOOKS = {"zh": ROOT / "docs" / "errors.md", "en": ROOT / "docs" / "errors.en.md"}
TITLES = {language: re.findall(r"^### `(.+)`$", book.read_text("utf-8"), re.M) for language, book in BOOKS.items()}
BOTH = list(zip(TITLES["en"], TITLES["zh"]))


def pattern(title: str) -> str:
    """A title as it stands in a line: `…` is anything."""
    return ".*?".join(re.escape(part) for part in title.split("…"))


@pytest.fixture
def place(hub: HubServer, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    for name in ("base", "out"):
        shutil.copytree(whole / name, tmp_path / name)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi", "completion": "Hello!"}\n', "utf-8")
    return Place(tmp_path, hub, monkeypatch)


def test_both_books_have_the_same_entries_in_the_same_order_and_each_is_provoked() -> None:
    shapes = []
    for language, book in BOOKS.items():
        content = book.read_text("utf-8")
        if language == "en":  # a Chinese paragraph is one line: a line break would show as a space
            assert all(len(line) <= 130 for line in content.splitlines() if "http" not in line)
        assert content.count("\n- " + ("原因：" if language == "zh" else "Cause: ")) == len(TITLES[language])
        assert f"{len(TITLES[language])} " in content.split("\n## ")[0]  # the number in the opening words
        shapes.append([mark for mark, _ in re.findall(r"^(#+ |- )|(https://[^\s)]+/issues/\d+)", content, re.M)])
    assert shapes[0] == shapes[1]
    assert TITLES["en"] == list(PROVOKED)


@pytest.mark.parametrize("titles", BOTH, ids=[en for en, _ in BOTH])
def test_the_error_in_the_book_is_what_the_entry_point_says(
    titles: Any, place: Place, capsys: pytest.CaptureFixture
) -> None:
    prepare, words = PROVOKED[titles[0]]
    prepare(place)
    for language, title in zip(("en", "zh"), titles):
        place.patch.setenv("LORA_PRACTICE_LANG", language)
        told = refusal(enter(cli, capsys, *words))
        assert re.search(pattern(title), told), told
