"""Computes each optimizer step so that neither bad numbers nor short memory can spoil the run.

A step is undone and computed again, from the same weights, rows and random numbers, until its numbers are sound: with a
smaller loss scale, in fp32, or in smaller portions. So no row is skipped and no step is counted twice. If nothing
helps, the last sound state becomes a checkpoint, and the run ends with a `StepFailed`.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Optional, Protocol

import torch

from lora_practice.console.errors import out_of_memory
from lora_practice.machine.memory import available_memory, held_memory
from lora_practice.run.folder import OutputFolder, step_of
from lora_practice.training import events
from lora_practice.training.memory_fit import ComputeConfig, MemoryDemand, fit
from lora_practice.training.nan_check import BACKOFF, Decision, StepNumbers, decide_step
from lora_practice.training.snapshot import SoundState, StepStart, copied, random_state, set_random_state
from lora_practice.training.window import Window, has_labels, window_lengths, window_parts

# times the bytes of the trained weights in fp32: gradients, two moments, the copy of a sound state with its moments,
# and the weights with moments that plan.py updates on trial
WEIGHTS_HELD = 10
LOOP_BYTES = 80_000_000  # what TRL's loop, its data loader and our callbacks load when they start
KEPT_FIRST, KEEP_EVERY = (1, 2, 4), 10  # steps after which the sound state is copied; a copy takes about 10 ms


class RecoverableTrainer(Protocol):
    """The part of PracticeTrainer that Recovery uses; the attributes that are `Any` are transformers' own."""

    args: Any
    state: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    processing_class: Any
    folder: OutputFolder
    compute_config: ComputeConfig

    @property
    def trainable(self) -> list[torch.nn.Parameter]: ...

    def compute(self, model: Any, window: Window, items: Any) -> torch.Tensor: ...
    def dry_run(self, config: ComputeConfig, lengths: Sequence[int]) -> bool: ...
    def use_compute_config(self, config: ComputeConfig) -> None: ...
    def upcast_to_fp32(self) -> None: ...
    def trl_counters(self) -> dict[str, Any]: ...
    def restore_trl_counters(self, counters: dict[str, Any]) -> None: ...
    def report(self, event: events.Event) -> None: ...
    def end_progress(self) -> None: ...
    def save_checkpoint(self) -> None: ...


class Recovery:
    """Computes the steps of one trainer. `demand` is the most that its data asks of memory.

    Attributes:
        precision: the precision that the run continues in; "fp32" after an upcast, also when it is resumed.
    """

    def __init__(self, trainer: RecoverableTrainer, demand: MemoryDemand, precision: str) -> None:
        self.trainer, self.demand, self.precision = trainer, demand, precision
        # bytes that the process holds between steps, and that the largest step takes above them; 0: not known
        self.resting_bytes, self.step_bytes, self.measured = 0, 0, False
        self.sound_state: Optional[SoundState] = None
        self.zero_losses: list[StepNumbers] = []  # of the steps directly before with a loss of 0
        self.random_after_step: Optional[list[torch.Tensor]] = None

    def fit_memory(self, per_token: int) -> None:
        """Dry-run the longest rows and use the compute config that fits; skipped where memory is plentiful.

        per_token: estimated bytes of one token; on a CPU nothing is tried if twice the estimate is free.

        Raises:
            DoesNotFit: not even one row fits.
        """
        trainer = self.trainer
        planned = trainer.compute_config
        weights = sum(parameter.numel() * 4 for parameter in trainer.trainable)
        reserve = WEIGHTS_HELD * weights + LOOP_BYTES
        self.resting_bytes = held_memory() + reserve
        self.step_bytes = per_token * sum(self.demand.lengths_at_once(planned))
        on_cpu = trainer.args.device.type == "cpu"
        if on_cpu and 2 * self.step_bytes + reserve < available_memory():
            return
        try:
            fitted = fit(planned, self.demand, trainer.dry_run, per_token, on_cpu, reserve)
        finally:
            trainer.use_compute_config(planned)
        self.step_bytes, self.measured = fitted.step_bytes, True
        if fitted.config != planned:
            trainer.use_compute_config(fitted.config)
            trainer.report(events.MemoryFallback(fitted.config, planned, self.demand.fast))

    def resume_precision(self) -> None:
        """Upcast a resumed run that had gone over to fp32."""
        if self.precision == "fp32" != self.trainer.compute_config.precision:
            self.trainer.upcast_to_fp32()

    def step(self, model: Any, window: Window, items: Any) -> torch.Tensor:
        """The loss of one optimizer step, with its gradients in `.grad`.

        items: trained tokens of the window, as transformers counts them.

        Raises:
            NumbersNotSound: the numbers are bad in fp32 too.
            StepDoesNotFit: the smallest portion does not fit into memory.
        """
        trainer = self.trainer
        self.resume_precision()
        start, rejected = StepStart(random_state(), trainer.trl_counters()), list(self.zero_losses)
        while True:
            loss = self._compute(model, window, items)
            if loss is None:
                self._undo(start)
                self._use_fallback(window)
                continue
            numbers = self._read_numbers(loss, window)
            decision = decide_step(numbers, rejected, trainer.compute_config.precision)
            if decision is Decision.ACCEPT:
                break
            rejected.append(numbers)
            self._undo(start)
            if decision is Decision.RETRY_SMALLER_SCALE:
                trainer.accelerator.scaler.update((numbers.scale or 1.0) * BACKOFF[len(rejected) - 1])
            elif decision is Decision.UPCAST:
                self._upcast(numbers, len(rejected))
                rejected = []
            else:
                self._stop(numbers, window)
        self.zero_losses = [*self.zero_losses, numbers] if numbers.loss == 0.0 else []
        steps_done = trainer.state.global_step
        if steps_done and (self.sound_state is None or steps_done in KEPT_FIRST or steps_done % KEEP_EVERY == 0):
            self._copy_sound_state(self.random_after_step or start.random)
        self.random_after_step = random_state()
        return loss

    def _compute(self, model: Any, window: Window, items: Any) -> Optional[torch.Tensor]:
        """The loss; None if memory ran out, or would have."""
        if self._memory_is_short(window):
            return None
        try:
            return self.trainer.compute(model, window, items)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None

    def _memory_is_short(self, window: Window) -> bool:
        """Whether this step will not fit; checked on a CPU only, where the kernel kills and nothing raises."""
        if self.trainer.args.device.type != "cpu" or not self.step_bytes:
            return False
        demand, config = self._demand_of(window), self.trainer.compute_config
        has_fallback = demand.next_fallback(config) is not None
        share = min(1.0, sum(demand.lengths_at_once(config)) / sum(self.demand.lengths_at_once(config)))
        wanted = self.resting_bytes + self.step_bytes * share - held_memory()
        return wanted > available_memory(ulimit=False) and (self.measured or has_fallback)

    def _demand_of(self, window: Window) -> MemoryDemand:
        lengths = window_lengths(window)
        return replace(self.demand, longest=max(lengths), window=sum(lengths))

    def _read_numbers(self, loss: torch.Tensor, window: Window) -> StepNumbers:
        scaler = self.trainer.accelerator.scaler
        gradients = [parameter.grad for parameter in self.trainer.trainable if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        is_scaled = self.trainer.compute_config.precision == "fp16" and scaler is not None
        return StepNumbers(float(loss), norm, has_labels(window), float(scaler.get_scale()) if is_scaled else None)

    def _undo(self, start: StepStart) -> None:
        """Discard gradients and activations of a step; restore random numbers and counters."""
        for parameter in self.trainer.trainable:
            parameter.grad = None
        self.trainer.use_compute_config(self.trainer.compute_config)  # frees what an interrupted step still holds
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        set_random_state(start.random)
        self.trainer.restore_trl_counters(copy.deepcopy(start.counters))

    def _use_fallback(self, window: Window) -> None:
        trainer = self.trainer
        step = trainer.state.global_step + 1
        fallback = self._demand_of(window).next_fallback(trainer.compute_config)
        if fallback is None:
            raise events.StepDoesNotFit(step, trainer.folder.path, self._keep_state())
        self.step_bytes //= 2
        trainer.use_compute_config(fallback)
        trainer.report(events.StepInSmallerPortions(fallback, step, self.demand.fast))

    def _upcast(self, numbers: StepNumbers, tries: int) -> None:
        trainer = self.trainer
        precision = trainer.compute_config.precision
        trainer.upcast_to_fp32()
        self.precision = "fp32"
        step = trainer.state.global_step + 1
        trainer.report(events.StepUpcast(trainer.compute_config, step, numbers, tries, precision))

    def _stop(self, numbers: StepNumbers, window: Window) -> NoReturn:
        trainer, step = self.trainer, self.trainer.state.global_step + 1
        if not math.isfinite(numbers.loss):
            self._restore_sound_state()  # the present weights gave that loss, so they are not sound
        longest = max((input_ids for input_ids, _ in window_parts(window)), key=len)
        row = trainer.processing_class.decode(longest, skip_special_tokens=True).strip()[:40]
        checkpoint = self._keep_state()
        raise events.NumbersNotSound(step, trainer.folder.path, checkpoint, numbers, trainer.args.learning_rate, row)

    def _copy_sound_state(self, random: list[torch.Tensor]) -> None:
        """Copy the state at the start of this step: its loss and gradients have just proved sound."""
        trainer = self.trainer
        trainer_state = copy.copy(trainer.state)
        trainer_state.log_history = list(trainer_state.log_history)
        older = self.sound_state or SoundState([], {}, {}, None, [])
        weights = copied(trainer.trainable, older.weights)
        optimizer = copied(trainer.optimizer.state_dict(), older.optimizer)
        scheduler = copied(trainer.lr_scheduler.state_dict())
        self.sound_state = SoundState(weights, optimizer, scheduler, trainer_state, random)

    def _restore_sound_state(self) -> None:
        trainer, sound = self.trainer, self.sound_state
        if sound is None:
            trainer.state.global_step = step_of(trainer.folder.checkpoint)  # nothing after it is worth keeping
            return
        with torch.no_grad():
            for parameter, value in zip(trainer.trainable, sound.weights):
                parameter.copy_(value)
        trainer.optimizer.load_state_dict(sound.optimizer)
        trainer.lr_scheduler.load_state_dict(sound.scheduler)
        trainer.state, self.random_after_step = sound.trainer_state, sound.random

    def _keep_state(self) -> Optional[Path]:
        """End the progress display and make a checkpoint of the present state; None before the first step."""
        trainer = self.trainer
        step = trainer.state.global_step
        trainer.end_progress()
        if not step:
            return None
        checkpoint = trainer.folder.path / f"checkpoint-{step}"
        if not checkpoint.is_dir():
            set_random_state(self.random_after_step or [])
            trainer.save_checkpoint()
        return checkpoint
