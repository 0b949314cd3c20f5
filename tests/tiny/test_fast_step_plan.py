"""Rows of one optimizer step (shared prefixes once, nothing after the last label) and its dropout masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_practice.fast.attention_tiles import tiles
from lora_practice.fast.dropout import DropoutMask, keep_mask, threshold_of
from lora_practice.fast.step_plan import count_labels, plan_step

EXAMPLE = st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=12)


def as_pair(example):
    return [token for token, _ in example], [token if kept else -100 for token, kept in example]


@settings(max_examples=150, deadline=None)
@given(st.lists(EXAMPLE, min_size=1, max_size=6), st.booleans(), st.sampled_from([None, 1, 7]))
def test_every_label_has_a_row_that_sees_the_tokens_before_it(drawn, share, budget):
    examples = [as_pair(example) for example in drawn]
    plans = plan_step(examples, budget, share)
    found = []
    for plan in plans:
        history = {}
        for path, first, last in plan.runs:
            for row in range(first, last):
                rows = [*path, *range(first, row + 1)]
                history[row] = tuple(plan.ids[rows].tolist())
                assert plan.positions[rows].tolist() == list(range(len(rows)))
        assert sorted(history) == list(range(plan.rows))
        if share:
            assert len(set(history.values())) == plan.rows
        rows = plan.label_rows[plan.pair_slots].tolist()
        found += [(history[row], label) for row, label in zip(rows, plan.pair_labels.tolist())]
        assert plan.label_counts.sum() == len(rows)
        assert budget is None or plan.rows <= budget or len(plan.runs) == 1
    wanted = [(tuple(ids[:t]), labels[t]) for ids, labels in examples for t in range(1, len(ids)) if labels[t] != -100]
    assert sorted(found) == sorted(wanted)
    assert count_labels(examples) == len(wanted)


def test_a_common_prefix_is_computed_once():
    prefix = list(range(20))
    examples = [([*prefix, 30 + i, 40], [*prefix, 30 + i, 40]) for i in range(8)]
    assert plan_step(examples)[0].rows == 20 + 8  # the last token of each is only a target
    assert plan_step(examples, share=False)[0].rows == 8 * 21


def test_micro_batches_are_few_and_then_even():
    examples = [([*range(50 * i, 50 * i + 50)], [1] * 50) for i in range(8)]  # 49 rows each
    assert [plan.rows for plan in plan_step(examples, 320)] == [4 * 49, 4 * 49]
    assert [plan.rows for plan in plan_step(examples, 392)] == [8 * 49]
    assert [plan.rows for plan in plan_step(examples, 40)] == [49] * 8


def test_tiles_hold_each_row_once():
    examples = [(list(range(i, i + length)), list(range(i, i + length))) for i, length in enumerate((300, 20, 140, 9))]
    plan = plan_step(examples)[0]
    rows = torch.cat([tile.query_rows.flatten() for tile in tiles(plan, None)])
    assert sorted(rows[rows < plan.rows].tolist()) == list(range(plan.rows))


@pytest.mark.parametrize(("rows", "count"), [(500, 1), (500, 20), (6000, 1)])
def test_the_size_of_a_tile_does_not_grow_with_the_rows(rows, count):
    examples = [([i, *range(rows)], [i, *range(rows)]) for i in range(count)]
    cut = tiles(plan_step(examples)[0], None)
    assert max(tile.masked.numel() for tile in cut) <= 1 << 20
    assert sum(tile.masked.numel() for tile in cut) <= 1.3 * sum(
        count * 128 * min(end, rows) for end in range(128, rows + 128, 128)
    )


@pytest.mark.parametrize("length", [1, 128, 129, 500, 5000])
def test_pieces_of_a_run_hold_each_query_once_and_their_keys_grow_with_its_length(length):
    first, second = list(range(length + 1)), [0, 1, *range(9000, 9000 + length)]
    plan = plan_step([(first, first), (second, second)])[0]
    starts, paths, keys = plan.flat_runs()
    queries = []
    for start, end, path in zip(starts.tolist(), starts[1:].tolist(), paths.tolist()):
        run = keys[start:end].tolist()
        assert plan.positions[run].tolist() == list(range(len(run)))  # all positions before it, in order
        queries += run[path:]
    assert sorted(queries) == list(range(plan.rows))
    assert len(keys) <= 5 * (plan.rows + 2) and len(paths) <= 2 * 8


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="3 tokens, labels has 2"):
        plan_step([([1, 2, 3], [1, 2])])


def test_masks_are_a_function_of_seed_step_module_and_row():
    dropout = DropoutMask(seed=1, step=2, threshold=threshold_of(0.05))
    whole = keep_mask(dropout.key(9), dropout.threshold, 0, (64, 96))
    part = keep_mask(dropout.key(9), dropout.threshold, 40, (24, 96))
    assert torch.equal(whole[40:], part)
    for other in (
        DropoutMask(1, 3, dropout.threshold).key(9),
        DropoutMask(2, 2, dropout.threshold).key(9),
        dropout.key(8),
    ):
        assert not torch.equal(whole, keep_mask(other, dropout.threshold, 0, (64, 96)))


def test_masks_have_the_right_rate_and_are_independent():
    threshold = threshold_of(0.05)
    dropout = DropoutMask(seed=7, step=0, threshold=threshold)
    masks = torch.stack([keep_mask(dropout.key(module), threshold, 0, (512, 576)) for module in range(1, 9)])
    dropped = (~masks).double().reshape(8, -1)
    rate, count = threshold / 65536, dropped.shape[1]
    spread = (rate * (1 - rate) / count) ** 0.5
    assert (dropped.mean(1) - rate).abs().max() < 5 * spread
    together = torch.corrcoef(dropped) - torch.eye(8, dtype=torch.float64)
    assert together.abs().max() < 5 / count**0.5
    for shift in (1, 287, 288, 575, 576, 577):
        moved = torch.corrcoef(torch.stack([dropped[0, shift:], dropped[0, :-shift]]))[0, 1]
        assert abs(moved) < 5 / count**0.5
    per_row = dropped.reshape(8, 512, 576).mean(2).flatten()
    assert per_row.var() == pytest.approx(rate * (1 - rate) / 576, rel=0.1)


def test_padding_adds_rows_that_belong_to_no_example():
    plan = plan_step([([1, 2, 3, 4], [-100, 2, 3, 4]), ([1, 2, 9, 8, 7], [-100, -100, 9, 8, 7])])[0]
    padded = plan.padded(8)
    assert padded.rows % 8 == 0 and padded.label_rows.numel() % 8 == 0
    assert padded.ids[: plan.rows].equal(plan.ids) and padded.runs[: len(plan.runs)] == plan.runs
    assert padded.runs[len(plan.runs) :] == [([], plan.rows, padded.rows)]
    added = padded.label_rows[plan.label_rows.numel() :]
    assert (added >= plan.rows).all() and padded.label_counts.sum() == plan.label_counts.sum()
    assert padded.padded(8) is padded
