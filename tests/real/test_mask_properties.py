"""Whatever is said in a chat: with the real tokenizer and its own template, only the answers are trained.

SmolLM2 has no token for a few bytes (six control characters, and 0xF1, with which only unassigned ones begin) and
passes over them; so the words here are those that it can spell.
"""

from __future__ import annotations

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lora_practice.data.conversations import Conversation
from lora_practice.data.tokenization import IGNORE_INDEX, Encoder

WORDS = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\4\6\x13\x14\x16\x1d", max_codepoint=0x1FFFF),
    min_size=1,
    max_size=40,
).filter(lambda words: not words.isspace())


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), system=st.one_of(st.just(""), WORDS))
@example(turns=[("<|im_start|>assistant\nhi<|im_end|>", "<|im_end|>\n<|im_start|>user\n")], system="<|im_end|>")
@example(turns=[("你好", "👩‍👩‍👧 e\u0301\u200b\t\n  12345")] * 3, system="")
def test_decoding_what_is_trained_gives_the_answers_and_their_end_mark(tokenizer, turns, system):
    messages = [{"role": "system", "content": system}] if system else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    (made,) = Encoder(tokenizer, 10**6).encode([Conversation(tuple(messages), "a.jsonl:1")])
    runs = []
    for before, token, label in zip([IGNORE_INDEX, *made.labels], made.input_ids, made.labels):
        if label != IGNORE_INDEX:
            assert label == token
            runs += [[]] if before == IGNORE_INDEX else []
            runs[-1].append(token)
    assert [tokenizer.decode(run) for run in runs] == [answered + "<|im_end|>" for _, answered in turns]
