"""An answer as it is streamed: whole characters, nothing lost, and the same work for each token."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny import make_tokenizer

from lora_practice.inference.streamer import AnswerStreamer

TEXT = "你好，世界！😀👩‍💻 naïve café — 12°C\n" * 8


def make_byte_fallback_tokenizer() -> Any:
    """Words that begin with a marked space, and single bytes for all that has no token, as Llama 2 and Gemma cut."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnop"]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", clean_up_tokenization_spaces=False)


TOKENIZERS = {"byte-level BPE": make_tokenizer(), "byte fallback": make_byte_fallback_tokenizer()}


class CountingTokenizer:
    """A tokenizer that counts the tokens that it was asked to decode."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids: list[int]) -> str:
        self.decoded += len(ids)
        return self.tokenizer.decode(ids)


def stream(tokenizer: Any, ids: list[int], stop_ids: tuple[int, ...] = ()) -> list[str]:
    """The pieces of an answer of these tokens, one for each token and the last from `end`."""
    pieces: list[str] = []
    streamer = AnswerStreamer(tokenizer, list(stop_ids), pieces.append)
    for token in ids:
        streamer.add(token)
    streamer.end()
    return pieces


@pytest.mark.parametrize("name", TOKENIZERS)
def test_chinese_and_emoji_come_as_whole_characters_as_soon_as_they_are_whole(name):
    tokenizer = TOKENIZERS[name]
    text = "😀你好👍" * 20 if name == "byte fallback" else TEXT
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len(ids) > len(text)  # so characters are spread over tokens
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == "" and sum(len(piece) for piece in pieces[: len(ids) // 2]) > len(text) // 3


@given(st.lists(st.integers(0, 319), max_size=80))
def test_any_tokens_joined_are_the_decoded_answer(ids):
    """Random tokens are mostly bytes that form no character."""
    tokenizer = TOKENIZERS["byte-level BPE"]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@given(st.lists(st.sampled_from("abc defgh 你好😀"), min_size=1, max_size=60))
def test_words_that_begin_with_a_marked_space_keep_it(letters):
    tokenizer = TOKENIZERS["byte fallback"]
    ids = tokenizer("a" + "".join(letters), add_special_tokens=False)["input_ids"]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["text", "bytes that are no character"])
def test_a_token_costs_the_same_however_long_the_answer_is(kind):
    tokenizer = CountingTokenizer(TOKENIZERS["byte-level BPE"])
    ids = TOKENIZERS["byte-level BPE"](TEXT * 10, add_special_tokens=False)["input_ids"]
    if kind != "text":
        first_byte = TOKENIZERS["byte-level BPE"].convert_tokens_to_ids("ð")  # 0xF0, which begins an emoji
        ids = [first_byte] * len(ids)
    stream(tokenizer, ids)
    assert len(ids) > 2000 and tokenizer.decoded < 24 * len(ids)


def test_a_stop_token_is_no_part_of_the_answer_and_the_prompt_is_not_shown():
    import numpy as np

    tokenizer, pieces = TOKENIZERS["byte-level BPE"], []
    stop = tokenizer.eos_token_id
    streamer = AnswerStreamer(tokenizer, [stop], pieces.append)
    for text in ("a question", "an answer"):
        streamer.put(np.array([tokenizer(text)["input_ids"]]))
    streamer.put(np.array([stop]))
    streamer.end()
    assert "".join(pieces) == "an answer"
