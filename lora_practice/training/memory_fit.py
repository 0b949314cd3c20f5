"""How a step is computed, and the rungs down when memory is short: less at once, then checkpointing.

A rung changes what is held at once, never what is computed: the same rows make the same optimizer step, summed in
other portions. (Dropout: on the plain path its masks are drawn for each portion; on the fast path examples in
different portions no longer share a prefix, and so its masks.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.machine.memory import PeakMemory, available_memory, held_memory

SHORTEST = 16  # tokens; a row cut shorter than this is nothing to train on
SPARE = 1.25  # what is seen of a dry run is not all: short-lived pieces fall between two looks, and sizes grow unevenly


@dataclass(frozen=True)
class ComputeConfig:
    """How a step is computed. `rows` at once on the plain path, `tokens` at once on the fast path."""

    precision: str
    rows: int
    tokens: int
    checkpointing: bool = False


@dataclass(frozen=True)
class Load:
    """What a run asks of memory at most: the `longest` row, and the `window` of one optimizer step, in tokens."""

    fast: bool
    longest: int
    window: int
    may_checkpoint: bool = True

    def at_once(self, regime: ComputeConfig) -> list[int]:
        """Lengths of the rows that are computed at once, at most."""
        if not self.fast:
            return [self.longest] * regime.rows
        tokens = min(max(regime.tokens, self.longest), self.window)
        whole, rest = divmod(tokens, self.longest)
        return [self.longest] * whole + [rest] * (rest > 0)

    def lower(self, regime: ComputeConfig) -> Optional[ComputeConfig]:
        """The next rung down; None at the lowest. The precision stays."""
        if self.fast and min(regime.tokens, self.window) > self.longest:
            return replace(regime, tokens=min(regime.tokens, self.window) // 2)
        if not self.fast and regime.rows > 1:
            return replace(regime, rows=regime.rows // 2)
        if self.may_checkpoint and not regime.checkpointing:
            return replace(regime, checkpointing=True)
        return None

    def rungs(self, regime: ComputeConfig) -> list[ComputeConfig]:
        """`regime` and every rung below it."""
        found = [regime]
        while (below := self.lower(found[-1])) is not None:
            found.append(below)
        return found


def bytes_per_token(config: Any, precision: str) -> int:
    """A formula for what a token takes on the plain path, until it is measured; the fast path takes a third.

    A layer keeps about 30 times its hidden size for the backward, the head three copies of the logits (measured on
    SmolLM2-135M with PEFT: 2 MB a token in fp32).
    """
    width = 4 if precision == "fp32" else 2
    return config.num_hidden_layers * config.hidden_size * 30 * width + config.vocab_size * 3 * 4


def described(regime: ComputeConfig, fast: bool) -> str:
    """A rung in a few words."""
    portion = text(f"一次 {regime.rows} 行", f"{regime.rows} row(s) at once")
    if fast:
        portion = text(f"一次最多 {regime.tokens} token", f"{regime.tokens} tokens at once")
    checkpointing = text("，打开 gradient_checkpointing", ", gradient_checkpointing on")
    return portion + (checkpointing if regime.checkpointing else "")


TryOut = Callable[[ComputeConfig, Sequence[int]], bool]


class DoesNotFit(UserError):
    """Not even one whole row fits. `max_length` is the longest that was tried and fitted, 0 if none did."""

    def __init__(self, longest: int, max_length: int, may_checkpoint: bool) -> None:
        self.max_length = max_length
        flags = [] if may_checkpoint else ["--gradient_checkpointing auto"]
        flags += [f"--max_length {max_length}"] if max_length else []
        free = available_memory() / 1e6
        super().__init__(
            text(
                f"内存不够：一行 {longest} token 也放不下（还能用 {free:.0f} MB）",
                f"not enough memory: not even one row of {longest} tokens fits ({free:.0f} MB can be taken)",
            ),
            fix=text("关掉别的程序，或 ", "close other programs, or ")
            + (text(" 或 ", " or ").join(flags) or text("换一个更小的模型", "choose a smaller model")),
        )


class Fitted(NamedTuple):
    """The rung where the ladder was left, and the bytes that a step there takes above what is held at rest."""

    regime: ComputeConfig
    growth: int


def fit(regime: ComputeConfig, load: Load, try_out: TryOut, per_token: int, predict: bool, reserve: int = 0) -> Fitted:
    """Find the first rung at which a dry run fits, climbing to it from what is small, so as to pass no limit.

    Args:
        try_out: computes rows of these lengths and forgets them; False when memory ran out.
        per_token: bytes that a token takes, by a formula, until it is measured.
        reserve: bytes that training will hold beside its rows, once it runs.
        predict: do not even try what the sizes before say will not fit (on a CPU nobody says no: the kernel kills).

    Raises:
        TooLong: not even one row of the longest fits.
    """
    rungs = load.rungs(regime)
    short = [[n] for n in sorted({load.longest // 16, load.longest // 4, load.longest // 2}) if n >= SHORTEST]
    longest_fitting = 0
    for checkpointing in (False, True):
        group = [one for one in reversed(rungs) if one.checkpointing == checkpointing]
        if not group:
            continue
        sizes = [*short, *(load.at_once(one) for one in group)]
        fitting, growth = _climb(group[0], sizes, try_out, per_token, reserve if predict else None)
        if fitting > len(short):
            return Fitted(group[fitting - len(short) - 1], growth)
        longest_fitting = max([longest_fitting, *(lengths[0] for lengths in short[:fitting])])
    raise DoesNotFit(load.longest, longest_fitting, load.may_checkpoint)


def _climb(
    regime: ComputeConfig, sizes: Sequence[Sequence[int]], try_out: TryOut, per_token: int, reserve: Optional[int]
) -> tuple[int, int]:
    """(how many of the ascending sizes fit, bytes that the largest of them took above what is held now).

    reserve: None where memory that ran out is an error that can be caught.
    """
    held, growth, tokens = held_memory(), per_token, 1
    for done, lengths in enumerate(sizes):
        expected = growth * sum(lengths) / tokens * SPARE
        room = held_memory() - held + available_memory(ulimit=False)  # above `held`; a ulimit says no by itself
        with PeakMemory() as watch:
            short = reserve is not None and expected + reserve > room
            if short or not try_out(regime, lengths):
                return done, growth
        taken = watch.most - held
        if reserve is not None and taken * SPARE + reserve > room:
            return done, growth
        growth, tokens = max(growth, taken), sum(lengths)
    return len(sizes), growth
