"""Which questions base and adapter are asked after a run, and what the record keeps of them."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import make_model, make_tokenizer

from lora_practice.data.conversations import Conversation
from lora_practice.inference.samples import SAMPLE_PROMPTS, answer_side_by_side, sample_questions
from lora_practice.run.model_card import _samples as samples_on_the_card


def row(*turns: str, system: str = "") -> Conversation:
    """User and assistant by turns."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": words} for i, words in enumerate(turns)]
    return Conversation(tuple(messages), "test")  # type: ignore[arg-type]


def test_without_held_out_rows_the_questions_are_the_fixed_ones() -> None:
    for held_out in ([], [Conversation((), "test", raw_text="plain text")], [row("long", "x" * 2000)], [row("open")]):
        questions = sample_questions(held_out)
        assert [one.messages for one in questions] == [[{"role": "user", "content": words}] for words in SAMPLE_PROMPTS]
        assert {one.reference for one in questions} == {""}


def test_held_out_rows_are_asked_for_their_longest_answer_with_what_stands_before_it() -> None:
    greeting = row(
        "Hi", "Hello!", "How do I boil an egg?", "Eight minutes in hot water.", "Thanks", "Bye", system="Be kind"
    )
    (question,) = sample_questions([greeting])
    assert [turn["content"] for turn in question.messages] == ["Be kind", "Hi", "Hello!", "How do I boil an egg?"]
    assert question.reference == "Eight minutes in hot water."
    sample = question.as_sample("b", "a")
    assert (sample["prompt"], sample["reference"]) == ("How do I boil an egg?", "Eight minutes in hot water.")
    assert [turn["content"] for turn in sample["earlier"]] == ["Be kind", "Hi", "Hello!"]
    assert "cut" not in sample and question.as_sample("b", "a", ["adapter"])["cut"] == ["adapter"]


@pytest.mark.parametrize(("rows", "asked"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (90, [0, 22, 45, 67])])
def test_four_rows_are_chosen_from_the_whole_held_out_part(rows: int, asked: list[int]) -> None:
    held_out = [row(f"question {number}", f"answer {number}") for number in range(rows)]
    assert [one.reference for one in sample_questions(held_out)] == [f"answer {number}" for number in asked]


def test_references_stand_beside_the_answers_on_the_terminal_in_the_record_and_on_the_card(capsys, monkeypatch) -> None:
    from peft import LoraConfig, get_peft_model

    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    model, tokenizer = get_peft_model(make_model(), lora), make_tokenizer()
    held_out = [row("Hi", "Hello!", "And you?", "I am well, thank you."), row("Who?", "Me.")]
    samples = answer_side_by_side(model, tokenizer, held_out)
    assert [[key for key in one if key != "cut"] for one in samples] == [
        ["prompt", "base", "adapter", "reference", "earlier"],
        ["prompt", "base", "adapter", "reference"],
    ]
    shown = capsys.readouterr().out
    sides = [line for line in shown.splitlines() if line.startswith(("  base: ", "  adapter: "))]
    noted = [line.split(":")[0].strip() for line in sides if line.endswith("(cut at 64 tokens)")]
    assert [side for one in samples for side in one.get("cut", [])] == noted
    assert "prompt: And you? (after 2 messages)" in shown and "  reference: I am well, thank you.\n" in shown
    assert '- reference: "I am well, thank you."\n- base: ' in samples_on_the_card({"samples": samples})
    fixed = answer_side_by_side(model, tokenizer)
    assert [[key for key in one if key != "cut"] for one in fixed] == [["prompt", "base", "adapter"]] * 4
    assert "reference" not in capsys.readouterr().out
