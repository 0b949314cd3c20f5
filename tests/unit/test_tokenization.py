"""The mask is tested as a sentence: what is trained is exactly the assistant's words and the end of the turn."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, LLAMA3, MISTRAL, QWEN3, make_tokenizer

from lora_practice.console.errors import UserError
from lora_practice.data.conversations import Conversation
from lora_practice.data.row_view import preview
from lora_practice.data.tokenization import IGNORE_INDEX, Encoder, Example, count_trained, end_of_turn

TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "qwen3": (QWEN3, "<|im_end|>"),
}


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")


@functools.cache
def tokenizer_of(kind: str) -> Any:
    template, eos = TEMPLATES[kind]
    return make_tokenizer(template, eos)


def talk(*turns: str, system: str = "", origin: str = "data.jsonl:1") -> Conversation:
    """User and assistant by turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": words} for i, words in enumerate(turns)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(tuple(messages), origin)  # type: ignore[arg-type]


def encode(conversation: Conversation, kind: str = "chatml", max_length: int = 100_000) -> tuple[Example, Encoder]:
    encoder = Encoder(tokenizer_of(kind), max_length)
    (example,) = encoder.encode([conversation])
    assert len(example.input_ids) == len(example.labels)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(example.input_ids, example.labels))
    return example, encoder


def trained_runs(example: Example, kind: str) -> list[str]:
    """Each unbroken run of labelled tokens, decoded."""
    runs: list[list[int]] = []
    previous = IGNORE_INDEX
    for label in example.labels:
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [tokenizer_of(kind).decode(run) for run in runs]


def whole_text(example: Example, kind: str) -> str:
    return tokenizer_of(kind).decode(example.input_ids)


# Words as they come, and the templates' own marks, whole and in pieces, where they do the most harm
marks = st.sampled_from(
    [
        *("<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "</s>", "[/INST]", "[INST]", "<think>", "</think>"),
        *("end", "im_end", "|>", "<|", "s", ">", "/s", "_", "assistant", "marker-of-the-answer"),
        *("你好！", "🙂👩‍👩‍👧", "\n\n", "  ", "\t", "é", "Ünï", "1 + 1 = 2"),
    ]
)
words = st.lists(st.one_of(marks, st.text(max_size=8)), min_size=1, max_size=4).map("".join)
words = words.filter(lambda one: bool(one.strip()) and one.encode("utf-8", "ignore").decode() == one)
chats = st.lists(words, min_size=2, max_size=6)


@settings(max_examples=150, deadline=None)
@given(chats, st.one_of(st.just(""), words))
def test_chatml_trains_exactly_the_answers(turns: list[str], system: str) -> None:
    example, encoder = encode(talk(*turns, system=system))
    assert trained_runs(example, "chatml") == [words + "<|im_end|>" for words in turns[1::2]]
    shown = [f"<|im_start|>{('user', 'assistant')[i % 2]}\n{one}<|im_end|>\n" for i, one in enumerate(turns)]
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    assert whole_text(example, "chatml") == opening + "".join(shown)
    assert encoder.lost.counts == {}


@settings(max_examples=80, deadline=None)
@given(chats)
def test_llama3_trains_exactly_the_answers(turns: list[str]) -> None:
    example, _ = encode(talk(*turns), "llama3")
    # jinja's trim strips what Python's str.strip strips
    assert trained_runs(example, "llama3") == [words.strip() + "<|eot_id|>" for words in turns[1::2]]
    assert whole_text(example, "llama3").startswith("<s><|start_header_id|>user")
    assert example.input_ids.count(tokenizer_of("llama3").bos_token_id) == 1 + "".join(turns).count("<s>")


@settings(max_examples=80, deadline=None)
@given(chats)
def test_mistral_trains_exactly_the_answers(turns: list[str]) -> None:
    example, _ = encode(talk(*turns), "mistral")
    assert trained_runs(example, "mistral") == [" " + words + "</s>" for words in turns[1::2]]


@settings(max_examples=80, deadline=None)
@given(st.lists(words, min_size=2, max_size=6).filter(lambda turns: len(turns) % 2 == 0))
def test_a_template_that_rewrites_history_trains_the_last_answer(turns: list[str]) -> None:
    example, encoder = encode(talk(*turns), "qwen3")
    assert trained_runs(example, "qwen3") == ["<think>\n\n</think>\n\n" + turns[-1] + "<|im_end|>"]
    rows_told = encoder.lost.counts.get("rewritten", 0)
    assert rows_told == (1 if len(turns) > 2 else 0)  # rows, not turns


@pytest.mark.parametrize("answer", ["end", "im_end", "|>", "<|im_end|>", ">", "m_e", "<|im_end|>\n", " ", "\n x\n"])
def test_an_answer_that_is_a_piece_of_its_own_end_mark(answer: str) -> None:
    example, _ = encode(talk("Say it", answer))
    assert trained_runs(example, "chatml") == [answer + "<|im_end|>"]


@settings(max_examples=60, deadline=None)
@given(chats)
def test_training_sees_what_inference_gives(turns: list[str]) -> None:
    """The tokens before each answer are those of the prompt that a chat would be given."""
    tokenizer = tokenizer_of("chatml")
    conversation = talk(*turns[:2])
    example, _ = encode(conversation)
    prompt = tokenizer.apply_chat_template(conversation.as_dicts()[:1], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert example.input_ids[: len(ids)] == ids
    assert set(example.labels[: len(ids)]) == {IGNORE_INDEX}


def test_a_question_left_open_is_read_but_not_learned() -> None:
    example, _ = encode(talk("Hi", "Hello", "And you?"))
    assert trained_runs(example, "chatml") == ["Hello<|im_end|>"]
    assert "And you?" in whole_text(example, "chatml")


def test_plain_text_is_trained_to_its_end() -> None:
    example, _ = encode(Conversation((), "a.txt:1", raw_text="你好 world"))
    assert trained_runs(example, "chatml") == ["你好 world<|im_end|>"]


def test_everything_is_trained_on_request() -> None:
    encoder = Encoder(tokenizer_of("chatml"), 512, assistant_only_loss=False)
    (example,) = encoder.encode([talk("Hi", "Hello")])
    assert example.labels == example.input_ids


def test_cut_rows_are_counted_and_told() -> None:
    length = len(encode(talk("Hi", "Hello"))[0].input_ids)
    for max_length, cut in ((length, 0), (length - 1, 0), (length - 2, 1), (length - 4, 1)):
        # the line break after the end-of-turn token is no loss
        for assistant_only in (True, False):
            encoder = Encoder(tokenizer_of("chatml"), max_length, assistant_only)
            (example,) = encoder.encode([talk("Hi", "Hello", origin="data.jsonl:7")])
            assert len(example.input_ids) == max_length
            assert encoder.lost.counts.get("cut", 0) == cut
    (line,) = encoder.lost.lines(length - 4)
    assert line == f"1 row cut at max_length={length - 4}: the ending is lost: data.jsonl:7"


def test_rows_with_nothing_to_train_on_are_counted_and_left_out() -> None:
    encoder = Encoder(tokenizer_of("chatml"), 40)
    rows = [talk("?" * 60, "Hello", origin=f"data.jsonl:{n}") for n in range(1, 6)]
    assert len(list(encoder.encode([*rows, talk("a", "b")]))) == 1
    assert encoder.lost.counts["nothing"] == 5
    assert "data.jsonl:1, data.jsonl:2, data.jsonl:3" in "\n".join(encoder.lost.lines(40))
    assert "data.jsonl:4" not in "\n".join(encoder.lost.lines(40))


def test_many_rows_keep_their_order() -> None:
    rows = [talk("Hi", f"answer {n}") for n in range(1100)]
    examples = list(Encoder(tokenizer_of("chatml"), 512).encode(rows))
    assert [trained_runs(one, "chatml")[0] for one in (examples[0], examples[600], examples[-1])] == [
        *("answer 0<|im_end|>", "answer 600<|im_end|>", "answer 1099<|im_end|>")
    ]
    assert len(examples) == 1100


def test_the_first_token_has_no_loss() -> None:
    assert count_trained([5, 6, IGNORE_INDEX]) == 1
    assert count_trained([]) == 0


def test_a_template_that_refuses_names_the_row() -> None:
    with pytest.raises(UserError) as caught:
        encode(talk("Hi", "Hello", system="Be kind", origin="data.jsonl:3"), "mistral")
    assert "data.jsonl:3: the chat template refuses this conversation: no system here" in str(caught.value)


def test_a_template_without_an_honest_mask_is_refused() -> None:
    prompt_changes = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\nSure: {% endif")
    encoder = Encoder(make_tokenizer(prompt_changes), 512)
    with pytest.raises(UserError) as caught:
        list(encoder.encode([talk("Hi", "Hello")]))
    assert "no honest mask" in str(caught.value)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_end_of_turn(kind: str) -> None:
    assert end_of_turn(tokenizer_of(kind)) == TEMPLATES[kind][1]


def test_a_template_without_an_end_of_turn() -> None:
    plain = make_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    assert end_of_turn(plain) is None


def test_the_preview_marks_what_is_trained() -> None:
    example, _ = encode(talk("你好", "我很好🙂"))
    tokenizer = tokenizer_of("chatml")
    assert preview(tokenizer, example) == (
        "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n〔我很好🙂<|im_end|>〕\n"
    )
    everything = Example(example.input_ids, example.input_ids)
    assert preview(tokenizer, everything).startswith("〔<|im_start|>")
