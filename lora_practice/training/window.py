"""The window: all micro-batches of one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

Part = tuple[list[int], list[int]]  # (input_ids, labels) of one example, without padding


class MicroBatch(NamedTuple):
    """One batch of the data loader: the tensors that TRL takes, and its examples for the fast path."""

    inputs: dict[str, torch.Tensor]
    parts: list[Part]


Window = Sequence[MicroBatch]


def window_parts(window: Window) -> list[Part]:
    """All examples of a window, in their order."""
    return [part for micro_batch in window for part in micro_batch.parts]


def window_lengths(window: Window) -> list[int]:
    """Tokens of each example of a window."""
    return [len(input_ids) for input_ids, _ in window_parts(window)]


def has_labels(window: Window) -> bool:
    """Whether any token of a window is trained; the first token of an example never is."""
    return any(label >= 0 for _, labels in window_parts(window) for label in labels[1:])
