"""Promises about rows: every usual shape is read, and what is left out is counted and told."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_practice.console.errors import UserError
from lora_practice.data.bad_row import BadRow
from lora_practice.data.conversations import Conversation, from_row, read_dataset
from lora_practice.data.good_rows import collect

U, A, S = ({"role": role, "content": "你好 👋"} for role in ("user", "assistant", "system"))


def turn(role: object, content: object = "x") -> dict[str, object]:
    return {"role": role, "content": content}


def chat(*turns: object) -> dict[str, object]:
    return {"messages": list(turns)}


SHAPES = [
    chat({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}),
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"conversations": [{"role": "User ", "content": "q"}, {"role": "model", "content": "a"}]},
    {"messages": json.dumps([{"from": "用户", "value": "q"}, {"from": "助手", "value": "a"}])},
    {
        "messages": None,
        "instruction": "q",
        "input": "",
        "output": "a",
        "text": "the whole, as in tatsu-lab/alpaca",
    },
    {"instruction": "q", "context": " ", "response": "a", "system": "", "history": []},
    {"prompt": "q", "completion": "a"},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    {"prompt": "q", "response": "a"},
    {"question": "q", "answer": "a"},
    {"query": "q", "response": "a"},
    chat({"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "bot", "content": "a"}),
]


@pytest.mark.parametrize("row", SHAPES, ids=lambda row: "+".join(row))
def test_every_usual_shape_reads_as_the_same_two_turns(row: dict) -> None:
    conversation = from_row(row, "x:1")
    assert conversation.as_dicts() == [turn("user", "q"), turn("assistant", "a")]
    assert (conversation.origin, conversation.raw_text) == ("x:1", "")


def test_input_system_and_history_all_reach_the_conversation() -> None:
    row = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    said = [(m["role"], m["content"]) for m in from_row(row, "").messages]
    assert said == [
        ("system", "s"),
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "q\ni"),
        ("assistant", "a"),
    ]


def test_plain_text_is_kept_exactly_and_has_no_turns() -> None:
    assert from_row({"text": " 你好\n👋 "}, "a:1") == Conversation((), "a:1", " 你好\n👋 ")


def test_a_last_question_without_an_answer_stays() -> None:
    assert [m["role"] for m in from_row(chat(U, A, U), "").messages] == ["user", "assistant", "user"]


def test_a_system_said_twice_is_not_doubled() -> None:
    assert len(from_row({**chat(S, U, A), "system": S["content"]}, "").messages) == 3


def test_bad_rows_are_told_together_with_a_count_and_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    rows = [chat(U, A) if number % 3 == 0 else chat(U) for number in range(12)]
    with pytest.raises(UserError) as caught:
        collect(read_dataset(rows, "hub/set"), None, skip_bad_rows=False, where="hub/set")
    said = str(caught.value)
    assert said.count("\n  hub/set:row ") == 5 and "hub/set:row 1: nothing to learn from" in said
    assert "8 bad rows among the 12 read" in said and "and 3 more" in said and "--skip_bad_rows" in said
    assert said.splitlines()[-1] == "mend these rows, or leave them out with --skip_bad_rows"  # each has its own arrow


def test_skipped_rows_are_counted_by_cause_never_dropped_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    rows = [chat(U, A), chat(U), {"text": ""}, chat(U), chat(U, A)]
    good, tally = collect(read_dataset(rows, "s"), None, skip_bad_rows=True)
    assert [one.origin for one in good] == ["s:row 0", "s:row 4"]
    assert (tally.good, tally.bad) == (2, 3)
    assert tally.causes == {"nothing to learn from": 2, "content is empty": 1}
    expected = "3 bad rows left out: nothing to learn from x2 (s:row 1, s:row 3); content is empty x1 (s:row 2)"
    assert str(tally) == expected
    monkeypatch.setenv("LORA_PRACTICE_LANG", "zh")
    said = str(collect(read_dataset(rows, "s"), None, skip_bad_rows=True)[1])
    assert said.startswith("跳过 3 行坏数据：") and "x2（s:row 1、s:row 3）；" in said
    assert str(collect(read_dataset(rows[:1], "s"), None, skip_bad_rows=True)[1]) == ""


def test_collect_reads_no_further_than_the_limit() -> None:
    def rows() -> Iterator[dict]:
        yield from (chat(U, A), chat(U, A), chat(U, A))
        raise AssertionError("read past the limit")

    assert len(collect(read_dataset(rows(), "s"), 3, skip_bad_rows=False)[0]) == 3


@pytest.mark.parametrize("rows", [[], [chat(U)] * 3], ids=["empty", "all bad"])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_no_usable_row_at_all_is_an_error_even_when_skipping(
    rows: list, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", language)
    with pytest.raises(UserError) as caught:
        collect(read_dataset(rows, "s"), None, skip_bad_rows=True, where="s")
    assert caught.value.fix and caught.value.where == "s"


PLACES = (
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
    "text",
    "history",
)
KEYS = st.sampled_from((*PLACES, "role", "content", "from", "value", "system", "type", "user", "assistant"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, JSON, max_size=5))
def test_any_row_is_a_conversation_or_a_bad_row(row: dict) -> None:
    (outcome,) = read_dataset([row], "s")
    assert outcome.origin == "s:row 0"
    if isinstance(outcome, Conversation):
        assert outcome.raw_text or outcome.messages
    else:
        assert isinstance(outcome, BadRow)
