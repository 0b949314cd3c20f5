"""Estimates what a run will take on this machine, from two steps that are computed and undone."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_practice.data.examples import Examples
from lora_practice.machine.device import peak_memory
from lora_practice.model.load import stored_bytes
from lora_practice.model.pissa import ranks_saved
from lora_practice.run.folder import step_of
from lora_practice.sources.find import Source
from lora_practice.training.settings import TrainingSettings
from lora_practice.training.trainer import PracticeTrainer

CHECKPOINT_BYTES_PER_SECOND = 60e6  # roughly, on two cores: serialized, hashed, flushed to the disk


@dataclass(frozen=True)
class Estimate:
    """What a run takes, or what is left of a resumed one. `seconds` without loading; memory of this process."""

    steps: int
    step_seconds: float
    seconds: float
    peak_memory_mb: int
    disk_mb: int
    download_mb: int
    checkpoint_mb: int = 0  # each one
    writing_seconds: float = 0.0  # of `seconds`, for all checkpoints

    def record(self) -> dict[str, Any]:
        """For run_record.json, beside the `seconds` and `peak_memory_mb` that the run itself took."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


def estimate(
    trainer: PracticeTrainer,
    base: Source,
    steps: int,
    settings: TrainingSettings,
    held_out: Examples,
    download_mb: float,
) -> Estimate:
    """Compute one micro-batch of the longest rows, for the memory, and one step of typical rows, for the time."""
    lengths = row_lengths(trainer)
    time_step(trainer, longest_rows(trainer, lengths))
    typical = typical_rows(trainer, lengths)
    typical_seconds = time_step(trainer, typical)

    mean_length = sum(lengths) / len(lengths)
    rows_per_step = _rows_per_step(trainer, lengths)
    step_seconds = typical_seconds * rows_per_step * mean_length / sum(lengths[i] for i in typical)
    by_steps = trainer.args.max_steps > 0
    rows_trained = steps * rows_per_step if by_steps else len(lengths) * trainer.args.num_train_epochs
    # an evaluation is a forward pass, half of training on as many tokens
    rows_evaluated = _evaluations(trainer, settings, steps) * held_out.tokens / mean_length / 2
    share_left = 1.0 - step_of(trainer.folder.checkpoint) / max(1, steps)
    checkpoint_size = checkpoint_bytes(trainer, base)
    writing_seconds = share_left * checkpoints_written(trainer, steps) * checkpoint_size / CHECKPOINT_BYTES_PER_SECOND
    return Estimate(
        steps=steps,
        step_seconds=step_seconds,
        seconds=step_seconds * (rows_trained + rows_evaluated) / rows_per_step * share_left + writing_seconds,
        peak_memory_mb=round(most_held(trainer.args.device) / 1e6),
        disk_mb=round(disk_bytes(trainer, base, steps, settings.merge_adapter) / 1e6),
        checkpoint_mb=round(checkpoint_size / 1e6),
        writing_seconds=writing_seconds,
        download_mb=round(download_mb),
    )


# Which rows are tried


def row_lengths(trainer: PracticeTrainer) -> list[int]:
    """Tokens in each row of the training set."""
    import pyarrow.compute

    dataset: Any = trainer.train_dataset
    return pyarrow.compute.list_value_length(dataset.data.column("input_ids")).to_pylist()


def row_parts(trainer: PracticeTrainer) -> list[int]:
    """Number of examples in each row of the training set: more than one where rows are packed."""
    import pyarrow.compute

    dataset: Any = trainer.train_dataset
    if "lengths" not in dataset.column_names:
        return [1] * len(dataset)
    return pyarrow.compute.list_value_length(dataset.data.column("lengths")).to_pylist()


def longest_rows(trainer: PracticeTrainer, lengths: Sequence[int]) -> list[int]:
    """Indices of the longest rows, as many as one micro-batch holds."""
    count = trainer.args.per_device_train_batch_size
    if trainer.engine is not None:
        count = max(1, min(_rows_per_step(trainer, lengths), trainer.engine.token_budget // max(lengths)))
    return _by_length(lengths)[-count:]


def typical_rows(trainer: PracticeTrainer, lengths: Sequence[int]) -> list[int]:
    """Indices of rows that are together about as long, and in as many parts, as a step's rows are on average.

    As many as a step has, on the plain path a quarter of them: the rows are sorted by parts and length and divided into
    equal shares, and the middle of each share is taken.
    """
    count = _rows_per_step(trainer, lengths)
    if trainer.engine is None:
        count = max(trainer.args.per_device_train_batch_size, count // 4)
    in_order = sorted(_by_length(lengths), key=row_parts(trainer).__getitem__)
    return [in_order[int((i + 0.5) * len(lengths) / count)] for i in range(count)]


def _by_length(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lengths.__getitem__)


def _rows_per_step(trainer: PracticeTrainer, lengths: Sequence[int]) -> int:
    arguments = trainer.args
    return min(len(lengths), arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps)


# A step that leaves no trace


def time_step(trainer: PracticeTrainer, rows: Sequence[int]) -> float:
    """Seconds of one optimizer step on these rows of the training set: forward, backward and update.

    The update is made on a copy of the weights, and gradients, random numbers and metrics are restored.
    """
    dataset: Any = trainer.train_dataset
    batch = [dataset[i] for i in rows]
    with trainer.restoring(), _no_collection():
        started = time.perf_counter()
        trainer.forward_backward(batch)
        _update_copy(trainer)
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection: it takes a quarter of a second in a few steps, and would distort a single one."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _update_copy(trainer: PracticeTrainer) -> None:
    copies = [parameter.detach().clone().requires_grad_() for parameter in trainer.trainable]
    for copied, original in zip(copies, trainer.trainable):
        copied.grad = original.grad
    torch.nn.utils.clip_grad_norm_(copies, trainer.args.max_grad_norm)
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    kind(copies, **options).step()


# Memory, evaluations, disk


def most_held(device: torch.device) -> int:
    """Peak memory of this process so far in bytes: on its GPU, or in main memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def steps_per_epoch(trainer: PracticeTrainer) -> int:
    """Optimizer steps of one pass over the data."""
    rows_per_step = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    dataset: Any = trainer.train_dataset
    return math.ceil(len(dataset) / rows_per_step)


def _epochs_ended(trainer: PracticeTrainer, steps: int) -> int:
    """Epochs that end in `steps` steps; the last step ends one too."""
    return math.ceil(steps / steps_per_epoch(trainer))


def _evaluations(trainer: PracticeTrainer, settings: TrainingSettings, steps: int) -> int:
    """How often the held-out rows are evaluated while training."""
    often = {"no": 0, "steps": math.ceil(steps / settings.eval_steps), "epoch": _epochs_ended(trainer, steps)}
    return often[settings.eval_strategy]


def disk_bytes(trainer: PracticeTrainer, base: Source, steps: int, merge: bool) -> int:
    """Bytes on disk: adapter and tokenizer, checkpoints, and merged model."""
    merged = stored_bytes(base.path) if merge else 0
    checkpoint = checkpoint_bytes(trainer, base)
    return _result_bytes(trainer, base) + most_checkpoints(trainer, steps) * checkpoint + merged


def checkpoint_bytes(trainer: PracticeTrainer, base: Source) -> int:
    """Bytes of one checkpoint: adapter and tokenizer, and two moments for each trained weight."""
    return _result_bytes(trainer, base) + 2 * _trained_bytes(trainer)


def _result_bytes(trainer: PracticeTrainer, base: Source) -> int:
    tokenizer = sum(file.stat().st_size for file in Path(base.path or "").glob("*.json") if file.is_file())
    return _trained_bytes(trainer) * ranks_saved(trainer.model) + tokenizer


def _trained_bytes(trainer: PracticeTrainer) -> int:
    return sum(parameter.numel() * 4 for parameter in trainer.model.parameters() if parameter.requires_grad)


def most_checkpoints(trainer: PracticeTrainer, steps: int) -> int:
    """The most checkpoints on the disk at one time: the oldest is deleted after the newest is written."""
    number = checkpoints_written(trainer, steps)
    return min(number, (trainer.keep_checkpoints or number) + 1)


def checkpoints_written(trainer: PracticeTrainer, steps: int) -> int:
    """Checkpoints that a whole run writes; one of them after its last step."""
    arguments = trainer.args
    often = {"no": 0, "epoch": _epochs_ended(trainer, steps), "steps": math.ceil(steps / arguments.save_steps)}
    return often[str(getattr(arguments.save_strategy, "value", arguments.save_strategy))]
