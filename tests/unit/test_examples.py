"""Examples held compactly read back as they were, and become a data set without a copy."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_practice.data.examples import Examples
from lora_practice.data.tokenization import Example, count_trained

pairs = st.lists(st.tuples(st.integers(0, 200_000), st.booleans()), min_size=1, max_size=9)


def example(tokens: list[tuple[int, bool]]) -> Example:
    return Example([token for token, _ in tokens], [token if trained else -100 for token, trained in tokens])


@settings(deadline=None)  # the first data set imports pyarrow
@given(st.lists(pairs, max_size=9))
def test_they_read_back_as_a_list_and_as_a_data_set(rows):
    wanted = [example(row) for row in rows]
    found = Examples(iter(wanted))
    assert list(found) == wanted and found[:] == wanted and len(found) == len(wanted)
    assert found.tokens == sum(len(one.input_ids) for one in wanted)
    assert found.trained_tokens == sum(count_trained(one.labels) for one in wanted)
    assert found.longest == max((len(one.input_ids) for one in wanted), default=0)
    if wanted:
        columns = found.dataset()[:]
        assert columns["input_ids"] == [one.input_ids for one in wanted]
        assert columns["labels"] == [one.labels for one in wanted]


def test_an_index_past_the_end_is_an_error():
    found = Examples([Example([1, 2], [-100, 2])])
    assert found[-1] == found[0]
    with pytest.raises(IndexError):
        found[1]


def test_a_token_takes_eight_bytes():
    found = Examples(Example([7] * 50, [7] * 50) for _ in range(200))
    held = sum(len(one) * one.itemsize for one in (found.ids, found.labels, found.starts))
    assert held < found.tokens * 8.2
