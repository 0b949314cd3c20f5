"""States that a run can go back to: of a step's beginning, and the last one whose numbers were sound."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Good(NamedTuple):
    """A state whose loss and gradients were sound: what a checkpoint is made of."""

    weights: list[torch.Tensor]
    moments: list[torch.Tensor]  # see moments_of
    groups: list[dict[str, Any]]  # the optimizer's param_groups, without parameters
    scheduler: dict[str, Any]
    state: Any
    random: list[torch.Tensor]


class Start(NamedTuple):
    """What a step begins with, beside the weights."""

    random: list[torch.Tensor]
    counters: dict[str, Any]  # TRL's own


def moments_of(optimizer: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of an optimizer's state_dict, in its order."""
    return [value for of_one in optimizer["state"].values() for value in of_one.values() if torch.is_tensor(value)]


def copied(tensors: list[Any], into: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of the tensors, in the memory of an older copy where there is one.

    For some hundred small tensors copy.deepcopy takes 50 ms, this 8, and never holds two copies.
    """
    with torch.no_grad():
        if [one.shape for one in into] != [one.shape for one in tensors]:
            return [one.detach().clone() for one in tensors]
        torch._foreach_copy_(into, [one.detach() for one in tensors])
    return into


def random_state() -> list[torch.Tensor]:
    """The generators that a step draws from: the CPU's, then those of the cards."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def set_random_state(state: list[torch.Tensor]) -> None:
    """Put the generators back; nothing for an empty list."""
    if state:
        torch.set_rng_state(state[0])
    if state[1:]:
        torch.cuda.set_rng_state_all(state[1:])
