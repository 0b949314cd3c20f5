"""Padding and packing change nothing that a row's own tokens can see."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model

from lora_practice.console.errors import UserError
from lora_practice.data.collator import Collator, pack_rows
from lora_practice.data.tokenization import IGNORE_INDEX, Example
from lora_practice.model.lora import add_lora
from lora_practice.sources.find import Source

PAD = 2


def example(*tokens: int, prompt: int = 1) -> Example:
    return Example(list(tokens), [IGNORE_INDEX] * prompt + list(tokens[prompt:]))


def row(one: Example) -> dict[str, Any]:
    return {"input_ids": one.input_ids, "labels": one.labels, "lengths": list(one.lengths)}


A, B, C = example(11, 12, 13, prompt=2), example(21, 22, 23, 24, 25), example(31, 32)


def test_padding() -> None:
    batch = Collator(PAD)([row(A), row(B)])
    assert batch["input_ids"].tolist() == [[11, 12, 13, PAD, PAD], [21, 22, 23, 24, 25]]
    assert batch["labels"].tolist() == [
        [IGNORE_INDEX, IGNORE_INDEX, 13, IGNORE_INDEX, IGNORE_INDEX],
        [IGNORE_INDEX, 22, 23, 24, 25],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["attention_mask"].dtype == torch.int64
    assert "position_ids" not in batch


def test_packing_fills_rows_in_order() -> None:
    first, second = pack_rows([A, B, C], max_length=8)
    assert first.input_ids == [11, 12, 13, 21, 22, 23, 24, 25]
    assert first.lengths == (3, 5)
    assert second.input_ids == [31, 32]
    assert second.lengths == (2,)


def test_the_first_token_of_a_part_is_no_label() -> None:
    everything = [Example(one.input_ids, list(one.input_ids)) for one in (A, C)]
    (packed,) = pack_rows(everything, max_length=8)
    assert packed.labels == [IGNORE_INDEX, 12, 13, IGNORE_INDEX, 32]


@given(st.lists(st.integers(1, 16), max_size=30), st.integers(16, 40))
def test_packing_loses_nothing(lengths: list[int], max_length: int) -> None:
    examples = [example(*range(100 * n, 100 * n + length)) for n, length in enumerate(lengths)]
    rows = pack_rows(examples, max_length)
    assert [token for one in rows for token in one.input_ids] == [t for one in examples for t in one.input_ids]
    assert [length for one in rows for length in one.lengths] == lengths
    assert all(sum(one.lengths) == len(one.input_ids) == len(one.labels) <= max_length for one in rows)


def test_a_packed_batch_keeps_the_parts_apart() -> None:
    (packed,) = pack_rows([A, C], max_length=8)
    batch = Collator(PAD)([row(packed), row(B)])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]
    mask = batch["attention_mask"]
    assert mask.shape == (2, 1, 5, 5)
    assert mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_packing_is_refused_where_the_mask_would_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "eager" attention adds the mask to the scores: True would be +1, and each part would see the others."""
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    model = make_model(vocab_size=64, attn_implementation="eager")
    with pytest.raises(UserError) as caught:
        add_lora(model, SimpleNamespace(packing=True), Source("folder", "x"))
    assert "--no_packing" in str(caught.value)


def test_a_model_sees_packed_and_padded_rows_as_if_each_stood_alone() -> None:
    model = make_model(vocab_size=64)
    packed = pack_rows([A, B, C], max_length=10)
    batch = Collator(PAD)([row(packed[0]), row(A)])
    batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    labels = batch.pop("labels")
    with torch.no_grad():
        together = model(**batch).logits
        start = 0
        for one in (A, B, C):
            alone = model(input_ids=torch.tensor([one.input_ids])).logits[0]
            length = len(one.input_ids)
            torch.testing.assert_close(together[0, start : start + length], alone, atol=1e-5, rtol=1e-4)
            start += length
        alone = model(input_ids=torch.tensor([A.input_ids])).logits[0]
        torch.testing.assert_close(together[1, :3], alone, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(together).all()
    assert labels[1, 3:].eq(IGNORE_INDEX).all()
