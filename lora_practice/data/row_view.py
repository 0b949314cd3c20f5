"""An encoded row as text: what the model sees, which parts of it are trained, and where one token ends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lora_practice.data.tokenization import IGNORE_INDEX, Example

MOST_TOKENS_PER_PIECE = 64  # in one piece: undecodable bytes would otherwise be gathered without end


@dataclass(frozen=True)
class Piece:
    """The text of one token, or of as many as make a whole character; `tokens` is their number."""

    text: str
    trained: bool
    tokens: int


def preview(tokenizer: Any, example: Example) -> str:
    """The row as the model sees it, with 〔trained parts〕 marked."""
    texts = ((_decode(tokenizer, ids), trained) for ids, trained in _runs(example))
    return "".join(f"〔{text}〕" if trained else text for text, trained in texts)


def row_pieces(tokenizer: Any, example: Example) -> Iterator[Piece]:
    """Yield the row that `preview` shows in pieces, in order. Takes linear time.

    The text of the next tokens is what they add to the text of the piece before them, since some tokenizers decode a
    token differently at the start of a text (they drop a leading space).
    """
    for ids, trained in _runs(example):
        previous = start = 0  # ids[previous:start] is the piece before, ids[start:end] the next one
        for end in range(1, len(ids) + 1):
            decoded = _decode(tokenizer, ids[previous:end])
            if decoded.endswith("\ufffd") and end < len(ids) and end - start < MOST_TOKENS_PER_PIECE:
                continue  # the bytes of a character are still incomplete
            before = _decode(tokenizer, ids[previous:start])
            yield Piece(decoded[len(before) :], trained, end - start)
            previous, start = start, end


def _runs(example: Example) -> Iterator[tuple[list[int], bool]]:
    """(token ids, trained) of each longest stretch of tokens that are all trained or all not."""
    labelled = zip(example.input_ids, example.labels)
    for trained, run in itertools.groupby(labelled, lambda pair: pair[1] != IGNORE_INDEX):
        yield [token for token, _ in run], trained


def _decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of a run, whole, since one Chinese character may be several tokens."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
