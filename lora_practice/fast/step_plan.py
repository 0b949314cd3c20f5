"""Micro-batches of one optimizer step: no token position is computed twice, next to none is padding.

Terms: a *row* is a row of the matrices (n, K): one token position that the model computes, not a row of the data. An
*example* is what a row of the data became: a pair (input_ids, labels) of equal length T, labels not shifted, -100 = not
trained (the Hugging Face convention).

1. Causal shift: row t predicts token t + 1, so an example needs only the rows before its last label.
2. Shared prefix: examples that begin with the same tokens (the system prompt, the user header) share those rows.
   The rows form a trie; each example adds one *run* of new rows [first, last) below a *path* of existing rows.
   A row's result depends on its path only, so loss and gradients are those of the separate examples
   (exactly at dropout 0; above it the examples of a micro-batch also share the dropout masks of shared rows).
3. A row may therefore have several labels: `label_rows[i]` has `label_counts[i]` of them, listed as pairs
   (`pair_slots`, `pair_labels`), where a slot is an index into `label_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

import torch

IdsAndLabels = tuple[Sequence[int], Sequence[int]]
_IGNORE_INDEX = -100  # label of a token that is not trained; of its own, since this wing imports no other
BLOCK_ROWS = 128  # query rows of one attention block
MAX_PIECES = 8  # of one run, see `flat_runs`


class Run(NamedTuple):
    """New rows [first, last) of one example after `path`, the rows of its shared prefix."""

    path: list[int]
    first: int
    last: int


@dataclass
class MicroBatchPlan:
    """The rows of one micro-batch."""

    ids: torch.Tensor  # (n,) int64
    positions: torch.Tensor  # (n,) int64
    runs: list[Run]
    label_rows: torch.Tensor  # (L,) int64, ascending
    label_counts: torch.Tensor  # (L,) float32
    pair_slots: torch.Tensor  # (number of labels,) int64
    pair_labels: torch.Tensor  # (number of labels,) int64
    tiles: dict[Optional[int], list] = field(default_factory=dict)  # cache of attention_tiles.tiles, by window
    flat: Optional[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = None  # cache of flat_runs

    @property
    def rows(self) -> int:
        """n."""
        return int(self.ids.numel())

    def flat_runs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(starts (runs + 1,), path lengths (runs,), key rows): the runs as arrays, for compiled kernels.

        A long run is cut into even pieces, each with everything before it as its path, and the longest piece comes
        first, so that no core idles while another one works through 500 rows. A run has at most MAX_PIECES of them,
        because each piece sums a gradient of all its keys.
        """
        if self.flat is None:
            pieces = []
            for path, first, last in self.runs:
                parts = min(-(-(last - first) // BLOCK_ROWS), MAX_PIECES)
                ends = [first + (last - first) * part // parts for part in range(parts + 1)]
                pieces += [
                    (len(path) + start - first, [*path, *range(first, end)]) for start, end in zip(ends, ends[1:])
                ]
            pieces.sort(key=lambda piece: (len(piece[1]) - piece[0]) * len(piece[1]), reverse=True)
            starts = torch.zeros(len(pieces) + 1, dtype=torch.int64)
            torch.cumsum(torch.tensor([len(keys) for _, keys in pieces]), 0, out=starts[1:])
            paths = torch.tensor([path for path, _ in pieces])
            self.flat = (starts, paths, torch.tensor([row for _, keys in pieces for row in keys]))
        return self.flat

    def padded(self, step: int) -> MicroBatchPlan:
        """The same plan with `rows` and the number of label rows padded to multiples of `step`.

        The added rows belong to no example and have no label, so neither loss nor gradients depend on them.
        """
        n, labelled = self.rows, self.label_rows.numel()
        more_labelled = -labelled % step
        more = -n % step or (step if more_labelled else 0)  # added label rows need an added row to refer to
        if not more:
            return self
        return MicroBatchPlan(
            ids=torch.cat([self.ids, self.ids.new_zeros(more)]),
            positions=torch.cat([self.positions, torch.arange(more)]),
            runs=[*self.runs, Run([], n, n + more)],
            label_rows=torch.cat([self.label_rows, self.label_rows.new_full((more_labelled,), n)]),
            label_counts=torch.cat([self.label_counts, self.label_counts.new_zeros(more_labelled)]),
            pair_slots=self.pair_slots,
            pair_labels=self.pair_labels,
        )

    def to(self, device: torch.device) -> MicroBatchPlan:
        """The plan with its tensors on `device`."""
        return MicroBatchPlan(runs=self.runs, **{name: getattr(self, name).to(device) for name in _TENSORS})


_TENSORS = ("ids", "positions", "label_rows", "label_counts", "pair_slots", "pair_labels")


class _Trie:
    """Trie of rows for one micro-batch: child[(row, token)] -> row; the root is row -1."""

    def __init__(self, share: bool) -> None:
        self.share = share
        self.child: dict[tuple[int, int], int] = {}
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.runs: list[Run] = []
        self.labels: list[tuple[int, int]] = []  # (row, label)

    def known_prefix(self, ids: Sequence[int]) -> list[int]:
        """Existing rows for the longest known beginning of `ids`."""
        path: list[int] = []
        row = -1
        for token in ids if self.share else ():
            found = self.child.get((row, token))
            if found is None:
                break
            path.append(found)
            row = found
        return path

    def add(self, ids: Sequence[int], labels: Sequence[int]) -> None:
        """Add one example: `ids` of its needed rows and their `labels`, already shifted."""
        path = self.known_prefix(ids)
        first = len(self.ids)
        rows = path + list(range(first, first + len(ids) - len(path)))
        for position in range(len(path), len(ids)):
            parent = rows[position - 1] if position else -1
            self.child[(parent, ids[position])] = rows[position]
            self.ids.append(ids[position])
            self.positions.append(position)
        if len(self.ids) > first:
            self.runs.append(Run(path, first, len(self.ids)))
        self.labels += [(row, label) for row, label in zip(rows, labels) if label != _IGNORE_INDEX]

    def plan(self) -> MicroBatchPlan:
        """The micro-batch of all examples added so far."""
        self.labels.sort()
        used = sorted({row for row, _ in self.labels})
        slot = {row: index for index, row in enumerate(used)}
        slots = torch.tensor([slot[row] for row, _ in self.labels], dtype=torch.int64)
        return MicroBatchPlan(
            ids=torch.tensor(self.ids, dtype=torch.int64),
            positions=torch.tensor(self.positions, dtype=torch.int64),
            runs=self.runs,
            label_rows=torch.tensor(used, dtype=torch.int64),
            label_counts=torch.bincount(slots, minlength=len(used)).float(),
            pair_slots=slots,
            pair_labels=torch.tensor([label for _, label in self.labels], dtype=torch.int64),
        )


def count_labels(examples: Sequence[IdsAndLabels]) -> int:
    """Number of trained tokens after the causal shift: the first label of an example has no row before it."""
    return sum(sum(label != _IGNORE_INDEX for label in labels[1:]) for _, labels in examples)


def rows_and_targets(example: IdsAndLabels) -> tuple[list[int], list[int]]:
    """(ids, targets) of the rows before the example's last label; empty when nothing is trained.

    Raises:
        ValueError: ids and labels differ in length.
    """
    ids, labels = list(example[0]), list(example[1])
    if len(ids) != len(labels):
        raise ValueError(f"input_ids has {len(ids)} tokens, labels has {len(labels)}")
    targets = labels[1:]
    while targets and targets[-1] == _IGNORE_INDEX:
        targets.pop()
    return ids[: len(targets)], targets


def plan_step(
    examples: Sequence[IdsAndLabels], token_budget: int | None = None, share: bool = True
) -> list[MicroBatchPlan]:
    """Micro-batches of one optimizer step, in the given order, each of at most `token_budget` token positions.

    There are as few as the budget allows, and they are as even as their number allows, because the largest one
    determines the memory. An example longer than the budget is a micro-batch of its own. Examples without labels are
    left out.
    """
    plans = _cut(examples, token_budget, share)
    if token_budget is not None and len(plans) > 1:
        even = sum(plan.rows for plan in plans) // len(plans)
        candidates = (_cut(examples, budget, share) for budget in range(even, token_budget, 16))
        return next((candidate for candidate in candidates if len(candidate) == len(plans)), plans)
    return plans


def _cut(examples: Sequence[IdsAndLabels], token_budget: int | None, share: bool) -> list[MicroBatchPlan]:
    """Micro-batches filled greedily up to the budget."""
    plans: list[MicroBatchPlan] = []
    trie = _Trie(share)
    for example in examples:
        ids, targets = rows_and_targets(example)
        if not ids:
            continue
        grown = len(trie.ids) + len(ids) - len(trie.known_prefix(ids))
        if token_budget is not None and trie.ids and grown > token_budget:
            plans.append(trie.plan())
            trie = _Trie(share)
        trie.add(ids, targets)
    if trie.ids:
        plans.append(trie.plan())
    return plans
