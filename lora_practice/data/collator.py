"""Examples -> batch, the tensors that a model takes.

B is the number of rows, T the number of tokens in the longest:

- `input_ids (B, T) int64`; `labels (B, T) int64`, -100 where a token is not trained.
- `attention_mask (B, T) int64`: 1 on tokens, 0 on padding.
- In a packed batch `position_ids (B, T) int64`, from 0 in each part, and `attention_mask (B, 1, T, T) bool`, causal
  within each part and False between parts.
- `parts`: the examples as (input_ids, labels) lists without padding, for the fast path.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lora_practice.data.tokenization import IGNORE_INDEX, Example


def pack_rows(examples: Iterable[Example], max_length: int) -> list[Example]:
    """Join whole examples, in order, into rows of at most `max_length` tokens; nothing is cut.

    The first token of each part gets no label, since the token before it belongs to another example.
    """
    rows: list[Example] = []
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for example in examples:
        if ids and len(ids) + len(example.input_ids) > max_length:
            rows.append(Example(ids, labels, tuple(lengths)))
            ids, labels, lengths = [], [], []
        ids = ids + example.input_ids
        labels = [*labels, IGNORE_INDEX, *example.labels[1:]]
        lengths.append(len(example.input_ids))
    if ids:
        rows.append(Example(ids, labels, tuple(lengths)))
    return rows


def packed_dataset(examples: Iterable[Example], max_length: int) -> Any:
    """A `datasets.Dataset` of packed rows, with the lengths of their parts."""
    from datasets import Dataset

    rows = pack_rows(examples, max_length)
    return Dataset.from_list([{**vars(row), "lengths": list(row.lengths)} for row in rows])


class Collator:
    """Pads the rows of a batch to one length; the DataLoader calls it with rows of the training set."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        shape = (len(rows), longest)
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        mask = torch.zeros(shape, dtype=torch.long)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[i, :length] = torch.tensor(row["input_ids"])
            labels[i, :length] = torch.tensor(row["labels"])
            mask[i, :length] = 1
        batch: dict[str, Any] = {"input_ids": input_ids, "labels": labels, "attention_mask": mask}
        batch["parts"] = [part for row in rows for part in _parts(row)]
        if any(len(row.get("lengths") or ()) > 1 for row in rows):
            batch.update(_packed_view(rows, mask))
        return batch


def split_batch(inputs: dict[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    """Split a batch into batches of at most `rows` rows, each padded to its own longest row."""
    count = len(inputs["input_ids"])
    if count <= rows:
        return [inputs]
    portions = []
    for first in range(0, count, rows):
        portion = {name: values[first : first + rows] for name, values in inputs.items()}
        if portion["attention_mask"].dim() == 2:
            longest = int(portion["attention_mask"].sum(1).max())
            portion = {name: values[:, :longest] for name, values in portion.items()}
        portions.append(portion)
    return portions


def _parts(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    ids, labels, start, parts = row["input_ids"], row["labels"], 0, []
    for length in row.get("lengths") or [len(ids)]:
        parts.append((ids[start : start + length], labels[start : start + length]))
        start += length
    return parts


def _packed_view(rows: Sequence[dict[str, Any]], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """`position_ids` that restart at 0 in each part, and a causal mask that separates the parts."""
    part = torch.zeros_like(mask)
    position_ids = torch.zeros_like(mask)
    for i, row in enumerate(rows):
        start = 0
        for number, length in enumerate(row["lengths"] or [len(row["input_ids"])]):
            part[i, start : start + length] = number + 1
            position_ids[i, start : start + length] = torch.arange(length)
            start += length
    same_part = part[:, None, :, None] == part[:, None, None, :]
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return {"position_ids": position_ids, "attention_mask": same_part & causal}
