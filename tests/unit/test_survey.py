"""check-data sees what training sees: every row, every problem with its line, and which tokens are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer

from lora_practice.data.bad_row import BadRow
from lora_practice.data.conversations import read_file
from lora_practice.data.row_view import preview, row_pieces
from lora_practice.data.survey import LISTED, histogram, survey_file
from lora_practice.data.tokenization import IGNORE_INDEX, Encoder, Example


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def pair(question: str, answer: str) -> dict[str, str]:
    return {"prompt": question, "completion": answer}


def test_every_kind_of_problem_is_found_where_it_stands(tokenizer: Any, tmp_path: Path) -> None:
    chat = {"messages": [{"role": r, "content": "hello"} for r in ("system", "user", "assistant", "user", "assistant")]}
    path = write(
        tmp_path / "own.jsonl",
        pair("hello", "I am fine"),
        '{"prompt": "broken',
        chat,
        pair("hello", "I am fine"),
        pair("hello", "how are you " * 50),
        pair("how are you " * 100, "fine"),
        {"messages": [{"role": "user", "content": "no answer"}]},
    )
    found = survey_file(path, tokenizer, 128)
    lines = {(one.kind, one.origin) for one in found.problems}
    assert lines == {
        ("bad", "own.jsonl:2"),
        ("bad", "own.jsonl:7"),
        ("duplicate", "own.jsonl:4"),
        ("cut", "own.jsonl:5"),
        ("cut", "own.jsonl:6"),
        ("nothing", "own.jsonl:6"),
    }
    assert all(one.what and one.fix for one in found.problems)
    assert "own.jsonl:1" in next(one.what for one in found.problems if one.kind == "duplicate")
    assert (found.good, found.counts["bad"], found.rows_trained, found.with_system) == (5, 2, 4, 1)
    assert found.shapes == {"prompt + completion": 4, "messages": 1}
    assert found.turns == {2: 4, 4: 1}
    assert not found.trainable


def test_it_counts_what_the_encoder_of_a_run_counts(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", *(pair("hello", "I am fine " * n) for n in range(1, 40)))
    found = survey_file(path, tokenizer, 64)
    encoder = Encoder(tokenizer, 64)
    examples = list(encoder.encode(row for row in read_file(path) if not isinstance(row, BadRow)))
    assert found.tokens == sum(len(one.input_ids) for one in examples)
    assert found.counts["cut"] == encoder.lost.counts["cut"] > 0
    uncut = list(Encoder(tokenizer, 10_000).encode(row for row in read_file(path) if not isinstance(row, BadRow)))
    assert list(found.lengths) == [len(one.input_ids) for one in uncut]
    assert found.trainable


def test_all_problems_are_counted_and_the_first_hundred_of_a_kind_are_listed(tokenizer: Any, tmp_path: Path) -> None:
    few = survey_file(write(tmp_path / "few.jsonl", pair("hello", "fine"), *['{"prompt": '] * 30), tokenizer, 64)
    assert [one.origin for one in few.problems] == [f"few.jsonl:{n}" for n in range(2, 32)]
    many = survey_file(
        write(tmp_path / "many.jsonl", *[pair("hello", "fine")] * 150, *['{"prompt": '] * 130), tokenizer, 64
    )
    assert (many.counts["bad"], many.counts["duplicate"]) == (130, 149)
    assert len(many.problems) == 2 * LISTED


def test_no_row_at_all_is_not_trainable(tokenizer: Any, tmp_path: Path) -> None:
    found = survey_file(write(tmp_path / "blank.jsonl", ""), tokenizer, 64)
    assert (found.good, found.trainable, histogram(found.lengths)) == (0, False, [])


@pytest.mark.parametrize("lengths", [[1], [7, 9, 512], [3] * 10, list(range(1, 2000, 7)), [10, 100, 1000, 10_000]])
def test_a_histogram_has_few_round_bins_and_loses_no_row(lengths: list[int]) -> None:
    bins = histogram(lengths)
    assert len(bins) <= 8
    for low, high, rows in bins:
        assert rows == sum(low <= one <= high for one in lengths)
    assert sum(rows for _, _, rows in bins) == len(lengths)


def test_pieces_are_whole_characters_that_join_to_the_row_the_model_sees(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", pair("你好，鑫 🙂", "我很好 😀 fine\nthere"))
    (row,) = (one for one in read_file(path) if not isinstance(one, BadRow))
    (example,) = Encoder(tokenizer, 512).encode([row])
    found = [(one.text, one.trained, one.tokens) for one in row_pieces(tokenizer, example)]
    assert "".join(words for words, _, _ in found) == tokenizer.decode(example.input_ids)
    assert not any("\ufffd" in words for words, _, _ in found)
    assert sum(tokens for _, _, tokens in found) == len(example.input_ids)
    assert any(tokens > 1 for _, _, tokens in found)  # a character of several tokens is one piece
    trained = "".join(words for words, is_trained, _ in found if is_trained)
    assert trained == "我很好 😀 fine\nthere<|im_end|>"
    assert f"〔{trained}〕" in preview(tokenizer, example)
    first_byte = tokenizer("鑫", add_special_tokens=False)["input_ids"][:1]
    broken = Example(first_byte * 100, [IGNORE_INDEX] * 100)
    assert "".join(one.text for one in row_pieces(tokenizer, broken)) == preview(tokenizer, broken)
