"""What happens during a training, as facts: events to show, and errors that end a run. messages.py phrases them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Optional, Union

from lora_practice.training.memory_fit import ComputeConfig
from lora_practice.training.nan_check import StepNumbers


@dataclass(frozen=True)
class ConfigChange:
    """An event after which steps are computed with `config`. The record keeps it under its `kind`."""

    kind: ClassVar[str]
    config: ComputeConfig


@dataclass(frozen=True)
class MemoryFallback(ConfigChange):
    """Before the first step: `planned` does not fit into memory, `config` does."""

    kind = "memory"
    planned: ComputeConfig
    fast: bool


@dataclass(frozen=True)
class MaxLengthLowered(ConfigChange):
    """Before the first step: the longest row does not fit; the data is prepared again with this `max_length`."""

    kind = "memory"
    max_length: int


@dataclass(frozen=True)
class StepInSmallerPortions(ConfigChange):
    """Memory ran out at `step`, which is computed again with `config`."""

    kind = "memory"
    step: int
    fast: bool


@dataclass(frozen=True)
class StepUpcast(ConfigChange):
    """The numbers of `step` were bad in `precision`, `tries` times; it is computed again in fp32."""

    kind = "numbers"
    step: int
    numbers: StepNumbers
    tries: int
    precision: str


@dataclass(frozen=True)
class Resuming:
    """The run continues from this checkpoint."""

    checkpoint: Path


@dataclass(frozen=True)
class StoppedEarly:
    """So many evaluations in a row brought no lower held-out loss."""

    evaluations: int


@dataclass(frozen=True)
class BestAdapterMissing:
    """The file of the best adapter is gone."""

    file: Path


@dataclass(frozen=True)
class HeldOutMeasured:
    """Held-out loss before and after the training, in nats per trained token; `best_step`: see `load_best`."""

    before: float
    after: float
    best_step: Optional[int]


Event = Union[ConfigChange, Resuming, StoppedEarly, BestAdapterMissing, HeldOutMeasured]


class StepFailed(Exception):
    """No way to compute `step` is left; `checkpoint` holds the last sound state (None: nothing was learnt yet)."""

    def __init__(self, step: int, folder: Path, checkpoint: Optional[Path]) -> None:
        super().__init__(f"step {step} in {folder}")
        self.step, self.folder, self.checkpoint = step, folder, checkpoint


class StepDoesNotFit(StepFailed):
    """Memory ran out, and no memory fallback is left."""


class NumbersNotSound(StepFailed):
    """The `numbers` are bad in fp32 too; `longest_row` is the beginning of the step's longest example."""

    def __init__(
        self,
        step: int,
        folder: Path,
        checkpoint: Optional[Path],
        numbers: StepNumbers,
        learning_rate: float,
        longest_row: str,
    ) -> None:
        super().__init__(step, folder, checkpoint)
        self.numbers, self.learning_rate, self.longest_row = numbers, learning_rate, longest_row
