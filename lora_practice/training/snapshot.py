"""States that a run can go back to: of a step's beginning, and the last one whose numbers were sound."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch


class Good(NamedTuple):
    """A state whose loss and gradients were sound: what a checkpoint is made of."""

    weights: list[torch.Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    state: Any
    random: list[torch.Tensor]


class Start(NamedTuple):
    """What a step begins with, beside the weights."""

    random: list[torch.Tensor]
    counters: dict[str, Any]  # TRL's own


def copied(value: Any, into: Any = None) -> Any:
    """A copy of tensors in lists and dicts; those of `into`, an older copy that is not needed any more, are used again.

    For some hundred small tensors copy.deepcopy takes 50 ms, this 9, and never holds two copies.
    """
    if torch.is_tensor(value):
        if torch.is_tensor(into) and (into.shape, into.dtype, into.device) == (value.shape, value.dtype, value.device):
            return into.copy_(value.detach())
        return value.detach().clone()
    if isinstance(value, dict):
        older = into if isinstance(into, dict) else {}
        return {key: copied(one, older.get(key)) for key, one in value.items()}
    if isinstance(value, list):
        same = isinstance(into, list) and len(into) == len(value)
        return [copied(one, old) for one, old in zip(value, into if same else [None] * len(value))]
    return copy.deepcopy(value)


def random_state() -> list[torch.Tensor]:
    """The generators that a step draws from: the CPU's, then those of the cards."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(state: list[torch.Tensor]) -> None:
    """Put the generators back; nothing for an empty list."""
    if state:
        torch.set_rng_state(state[0])
    if state[1:]:
        torch.cuda.set_rng_state_all(state[1:])
