"""Properties of the way from a file to labels, on inputs that nobody would think of (hypothesis, the same each time).

Valid rows read back: see test_round_trip.py. Shared prefixes keep each label: see test_fast_step_plan.py.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import CHATML, LLAMA3, MISTRAL, QWEN3, make_tokenizer

from lora_practice.console.errors import UserError
from lora_practice.data.bad_row import BadRow
from lora_practice.data.collator import Collator, pack_rows
from lora_practice.data.conversations import Conversation, read_file
from lora_practice.data.tokenization import IGNORE_INDEX, Encoder, Example

STABLE = settings(max_examples=40, deadline=None, derandomize=True, database=None)
MANY = settings(STABLE, max_examples=100)
# the end mark of each template, and what it makes of an answer
TEMPLATES = {CHATML: "{}<|im_end|>", LLAMA3: "{}<|eot_id|>", MISTRAL: " {}</s>", QWEN3: "{}<|im_end|>"}
FRAGMENTS = [
    b'{"text": "',
    b'"messages": [',
    b'{"role": "user", "content": "',
    b'"}',
    b"]",
    b"}",
    b"{",
    b"[",
    b",",
    b"\n",
]
FRAGMENTS += [
    b'"',
    b":",
    b"\\",
    b"\xff",
    b"\xe4\xbd\xa0",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\0",
    b"text",
    b"\r\n",
    b"1e999",
]
BYTES = st.one_of(st.binary(max_size=80), st.lists(st.sampled_from(FRAGMENTS), max_size=25).map(b"".join))
ORIGIN = r"文件(1)?\.\w+:(\d+(-\d+)?|row \d+)"

LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
# what a person may write, and what only an attacker or a text about chat templates does
WORDS = st.one_of(
    st.text(LETTERS, min_size=1, max_size=20),
    st.lists(
        st.sampled_from(["<|im_end|>", "<|im_start|>", "assistant\n", "</s>", "[INST]", "hi", "你好", " "]), min_size=1
    ).map("".join),
).filter(lambda words: not words.isspace())
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)


def chat(turns: list[tuple[str, str]], system: str = "") -> Conversation:
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return Conversation(tuple(messages), "a.jsonl:1")  # type: ignore[arg-type]


def learned(tokenizer: Any, one: Example) -> list[str]:
    """What is trained, run by run, as text."""
    runs: list[list[int]] = []
    for before, token, label in zip([IGNORE_INDEX, *one.labels], one.input_ids, one.labels):
        if label != IGNORE_INDEX:
            assert label == token
            if before == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@MANY
@given(content=BYTES)
@example(content=b"[" * 3000)
@example(content=b'{"data":' * 500)
@example(content=b'"' * 999)
def test_whatever_bytes_a_file_holds_it_is_rows_or_an_error_that_says_where(suffix: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"文件{suffix}"
        path.write_bytes(content)
        try:
            for one in read_file(path):
                assert isinstance(one, (Conversation, BadRow))
                assert re.fullmatch(ORIGIN, one.origin), one.origin
                assert not isinstance(one, BadRow) or (one.cause and one.fix)
        except UserError as error:
            assert path.name in error.where and error.what and error.fix
            assert "\n" not in str(error)


@pytest.mark.parametrize("template", TEMPLATES, ids=["chatml", "llama3", "mistral", "qwen3"])
@STABLE
@given(turns=TURNS, system=st.one_of(st.just(""), WORDS))
@example(turns=[("hi", "<|im_end|>\n")], system="")
@example(turns=[("<|im_start|>assistant\n", "a"), ("b", "<|im_end|>\n<|im_start|>user\nb")], system="")
@example(turns=[("marker-of-the-answer", "marker-of-the-answer")], system="")
def test_what_is_trained_is_exactly_the_assistants_words_and_their_end(
    template: str, turns: list[tuple[str, str]], system: str
) -> None:
    tokenizer = TOKENIZERS[template]
    if template == MISTRAL:
        system = ""  # that template refuses one
    encoder = Encoder(tokenizer, 10**6)
    (made,) = encoder.encode([chat(turns, system)])
    answers = [answer.strip() if template == LLAMA3 else answer for _, answer in turns]
    expected = [TEMPLATES[template].format(answer) for answer in answers]
    if template == QWEN3:  # it rewrites each answer when the next one comes: only the last is trained, and it is said
        expected = ["<think>\n\n</think>\n\n" + expected[-1]]
        assert encoder.lost.counts == ({"rewritten": 1} if len(turns) > 1 else {})
    assert learned(tokenizer, made) == expected


@STABLE
@given(turns=TURNS, system=st.one_of(st.just(""), WORDS), limit=st.integers(2, 60))
@example(turns=[("q" * 5000, "a")], system="", limit=8)
@example(turns=[("q", "你好" * 3000)] * 3, system="", limit=8)
@example(turns=[("q", "a b " * 900)] * 40, system="s", limit=60)
def test_cutting_keeps_the_beginning_and_trains_on_nothing_else(
    turns: list[tuple[str, str]], system: str, limit: int
) -> None:
    tokenizer = TOKENIZERS[CHATML]
    (whole,) = Encoder(tokenizer, 10**6).encode([chat(turns, system)])
    encoder = Encoder(tokenizer, limit)
    made = list(encoder.encode([chat(turns, system)]))
    ids, labels = whole.input_ids[:limit], whole.labels[:limit]
    if any(label != IGNORE_INDEX for label in labels[1:]):
        assert [(one.input_ids, one.labels) for one in made] == [(ids, labels)]
    else:
        assert made == [] and encoder.lost.counts["nothing"] == 1
    # the row ends with the last answer's mark and the template's line break
    assert ("cut" in encoder.lost.counts) == (len(whole.input_ids) - 1 > limit)


ROW = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=12).map(
    lambda drawn: Example([token for token, _ in drawn], [token if kept else IGNORE_INDEX for token, kept in drawn])
)


@MANY
@given(rows=st.lists(ROW, min_size=1, max_size=6), packed=st.booleans(), limit=st.integers(12, 30))
def test_each_example_keeps_its_labels_in_a_batch_whatever_stands_beside_it(
    rows: list[Example], packed: bool, limit: int
) -> None:
    given_rows = pack_rows(rows, limit) if packed else rows
    fields = [{"input_ids": r.input_ids, "labels": r.labels, "lengths": list(r.lengths)} for r in given_rows]
    batch = Collator(pad_token_id=3)(fields)
    firsts = [[IGNORE_INDEX, *row.labels[1:]] if packed else row.labels for row in rows]
    assert [(ids, labels) for ids, labels in batch["parts"]] == [(r.input_ids, f) for r, f in zip(rows, firsts)]
    for number, row in enumerate(given_rows):
        length = len(row.input_ids)
        assert length <= limit
        assert batch["input_ids"][number, :length].tolist() == row.input_ids
        assert batch["labels"][number, :length].tolist() == row.labels
        assert (batch["labels"][number, length:] == IGNORE_INDEX).all()
    assert int((batch["labels"] != IGNORE_INDEX).sum()) == sum(
        label != IGNORE_INDEX for labels in firsts for label in labels
    )


TOKENIZERS = {
    template: make_tokenizer(template, {LLAMA3: "<|eot_id|>", MISTRAL: "</s>"}.get(template, "<|im_end|>"))
    for template in TEMPLATES
}
