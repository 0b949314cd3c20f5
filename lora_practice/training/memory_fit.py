"""Finds a way to compute a step that fits into memory: fewer rows or tokens at once, then gradient checkpointing.

A memory fallback changes what is held at once, never what is computed: the same rows make the same optimizer step,
summed in other portions. (Dropout: the plain path draws its masks for each portion; on the fast path examples in
different portions no longer share a prefix and its masks.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Optional, Protocol

from lora_practice.machine.memory import PeakMemory, available_memory, held_memory

SHORTEST_ROW = 16  # tokens; shorter rows are not worth training on
HEADROOM = 1.25  # a dry run misses short-lived allocations between two looks, and sizes do not grow evenly


@dataclass(frozen=True)
class ComputeConfig:
    """How a step is computed: at most `rows` at once on the plain path, at most `tokens` on the fast path.

    run_record.json holds these fields as "compute_config" of an event; before, the name was "regime".
    """

    precision: str
    rows: int
    tokens: int
    checkpointing: bool = False


@dataclass(frozen=True)
class MemoryDemand:
    """What the data asks of memory at most: the `longest` row and the `window` of one optimizer step, in tokens."""

    fast: bool
    longest: int
    window: int
    may_checkpoint: bool = True

    def lengths_at_once(self, config: ComputeConfig) -> list[int]:
        """Lengths of the rows that are computed at once, at most."""
        if not self.fast:
            return [self.longest] * config.rows
        tokens = min(max(config.tokens, self.longest), self.window)
        whole, rest = divmod(tokens, self.longest)
        return [self.longest] * whole + [rest] * (rest > 0)

    def next_fallback(self, config: ComputeConfig) -> Optional[ComputeConfig]:
        """The config that needs less memory than `config`, in the same precision; None if nothing is left."""
        if self.fast and min(config.tokens, self.window) > self.longest:
            return replace(config, tokens=min(config.tokens, self.window) // 2)
        if not self.fast and config.rows > 1:
            return replace(config, rows=config.rows // 2)
        if self.may_checkpoint and not config.checkpointing:
            return replace(config, checkpointing=True)
        return None

    def fallbacks(self, config: ComputeConfig) -> list[ComputeConfig]:
        """`config` and every fallback after it, each with less memory than the one before."""
        found = [config]
        while (less := self.next_fallback(found[-1])) is not None:
            found.append(less)
        return found


class ModelShape(Protocol):
    """Fields of a transformers config."""

    num_hidden_layers: int
    hidden_size: int
    vocab_size: int


def bytes_per_token(shape: ModelShape, precision: str) -> int:
    """An estimate of the bytes that one token takes on the plain path; the fast path takes a third.

    Each layer keeps about 30 times its hidden size for the backward, the head three fp32 copies of the logits
    (measured on SmolLM2-135M with PEFT: 2 MB per token in fp32).
    """
    value_bytes = 4 if precision == "fp32" else 2
    return shape.num_hidden_layers * shape.hidden_size * 30 * value_bytes + shape.vocab_size * 3 * 4


TryOut = Callable[[ComputeConfig, Sequence[int]], bool]


class DoesNotFit(Exception):
    """Not even one row of `longest` tokens fits; `max_length` is the longest row that was tried and fits, or 0."""

    def __init__(self, longest: int, max_length: int, may_checkpoint: bool) -> None:
        super().__init__(f"one row of {longest} tokens does not fit; {max_length} tokens do")
        self.longest, self.max_length, self.may_checkpoint = longest, max_length, may_checkpoint


class Fitted(NamedTuple):
    """The config that fits, and the bytes that a step with it takes above what the process holds between steps."""

    config: ComputeConfig
    step_bytes: int


def fit(
    config: ComputeConfig, demand: MemoryDemand, try_out: TryOut, per_token: int, predict: bool, reserve: int = 0
) -> Fitted:
    """The first of `config` and its fallbacks that fits a dry run.

    Sizes are tried in ascending order, so that no try takes much more memory than one that succeeded.

    Args:
        try_out: computes rows of these lengths and discards the result; False if memory ran out.
        per_token: estimated bytes of one token, used until a try has measured it.
        predict: skip sizes that the tries before predict not to fit (on a CPU, where the kernel kills the process).
        reserve: bytes that training will hold in addition, once it runs.

    Raises:
        DoesNotFit: not even one row of the longest fits.
    """
    fallbacks = demand.fallbacks(config)
    longest = demand.longest
    short_rows = [[n] for n in sorted({longest // 16, longest // 4, longest // 2}) if n >= SHORTEST_ROW]
    longest_fitting = 0
    for checkpointing in (False, True):
        ascending = [option for option in reversed(fallbacks) if option.checkpointing == checkpointing]
        if not ascending:
            continue
        sizes = [*short_rows, *(demand.lengths_at_once(option) for option in ascending)]
        fitting, step_bytes = _try_ascending(ascending[0], sizes, try_out, per_token, reserve if predict else None)
        if fitting > len(short_rows):
            return Fitted(ascending[fitting - len(short_rows) - 1], step_bytes)
        longest_fitting = max([longest_fitting, *(lengths[0] for lengths in short_rows[:fitting])])
    raise DoesNotFit(longest, longest_fitting, demand.may_checkpoint)


def _try_ascending(
    config: ComputeConfig, sizes: Sequence[Sequence[int]], try_out: TryOut, per_token: int, reserve: Optional[int]
) -> tuple[int, int]:
    """(how many of the ascending sizes fit, bytes that the largest of them took above what is held now).

    reserve: None where running out of memory is an error that can be caught.
    """
    held, step_bytes, tokens = held_memory(), per_token, 1
    for fitting, lengths in enumerate(sizes):
        expected = step_bytes * sum(lengths) / tokens * HEADROOM
        # bytes above `held`; a ulimit is left out, since beyond it an allocation fails, which can be caught
        limit = held_memory() - held + available_memory(ulimit=False)
        with PeakMemory() as watch:
            too_large = reserve is not None and expected + reserve > limit
            if too_large or not try_out(config, lengths):
                return fitting, step_bytes
        used = watch.most - held
        if reserve is not None and used * HEADROOM + reserve > limit:
            return fitting, step_bytes
        step_bytes, tokens = max(step_bytes, used), sum(lengths)
    return len(sizes), step_bytes
