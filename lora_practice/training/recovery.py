"""Computes each optimizer step so that neither bad numbers nor short memory can spoil the run.

A step is undone and computed again, from the same weights, rows and random numbers, until it is sound: with a
smaller loss scale, in fp32, or in smaller portions. So no row is skipped and no step is counted twice. When nothing
helps, the last good state becomes a checkpoint, and one line says what happened.
"""

from __future__ import annotations

import copy
import gc
import math
from typing import Any, NoReturn, Optional

import torch

from lora_practice.console.errors import UserError, out_of_memory
from lora_practice.console.text import tell, text
from lora_practice.machine.memory import available_memory, held_memory
from lora_practice.run.folder import step_of
from lora_practice.training.memory_fit import ComputeConfig, Load, described, fit
from lora_practice.training.nan_check import AGAIN, BACKOFF, FINE, STOP, WIDEN, StepNumbers, decide_step, seen
from lora_practice.training.snapshot import Good, Start, copied, random_state, set_random_state

# of the trained weights, as fp32, a run holds its gradients, two moments, and the good state's copy of it all; the
# steps that are tried beforehand hold a copy with moments of its own
WEIGHTS_HELD = 10
LOOP = 80_000_000  # bytes: what TRL's loop, its data loader and our callbacks load when they start
KEPT_FIRST, KEEP_EVERY = (1, 2, 4), 10  # steps after which the good state is copied; a copy takes about 10 ms


class Recovery:
    """Watches the steps of one PracticeTrainer. `load` is the most that its data asks of memory."""

    def __init__(self, trainer: Any, load: Load) -> None:
        self.trainer, self.load = trainer, load
        self.precision = trainer.regime.precision  # what it goes on with when the run is resumed
        self.at_rest, self.growth, self.measured = 0, 0, False  # bytes; growth: of the largest step, above rest
        self.good: Optional[Good] = None
        self.zeros: list[StepNumbers] = []  # of the steps just before, if their loss was 0
        self.random: Optional[list[torch.Tensor]] = None  # after the last step

    def find_room(self, per_token: int) -> None:
        """Dry-run the longest rows, unless twice what a formula wants is free, and take the rung that fits.

        Raises:
            TooLong: not even one row fits.
        """
        trainer = self.trainer
        tokens = sum(self.load.at_once(trainer.regime))
        weights = sum(one.numel() * 4 for one in trainer.trainable)
        reserve = WEIGHTS_HELD * weights + LOOP
        self.at_rest, self.growth = held_memory() + reserve, per_token * tokens
        on_cpu = trainer.args.device.type == "cpu"
        if on_cpu and 2 * self.growth + reserve < available_memory():
            return
        planned = trainer.regime
        try:
            fitted = fit(planned, self.load, trainer.dry_run, per_token, on_cpu, reserve)
        finally:
            trainer.take(planned)
        self.growth, self.measured = fitted.growth, True
        if fitted.regime != planned:
            before, now = described(planned, self.load.fast), described(fitted.regime, self.load.fast)
            said = text(
                f"内存放不下{before}：改为{now}（行和步不变）",
                f"no memory for {before}: now {now} (the same rows and steps)",
            )
            self._tell("memory", said, fitted.regime)

    def go_on(self) -> None:
        """A run that is resumed and had gone over to fp32 goes on in it."""
        if self.precision == "fp32" != self.trainer.regime.precision:
            self.trainer.widen()

    def step(self, model: Any, window: list[Any], items: Any) -> torch.Tensor:
        """Loss of one optimizer step, its gradients in .grad. `window`: its micro-batches, as (inputs, parts).

        Raises:
            UserError: the numbers are bad in fp32 too, or the smallest portion does not fit; a checkpoint is kept.
        """
        trainer = self.trainer
        self.go_on()
        start, bad = Start(random_state(), trainer.counters()), list(self.zeros)
        while True:
            loss = self._compute(model, window, items)
            if loss is None:
                self._undo(start)
                self._less_at_once(window)
                continue
            now = self._read(loss, window)
            verdict = decide_step(now, bad, trainer.regime.precision)
            if verdict == FINE:
                break
            bad.append(now)
            self._undo(start)
            if verdict == AGAIN:
                trainer.accelerator.scaler.update((now.scale or 1.0) * BACKOFF[len(bad) - 1])
            elif verdict == WIDEN:
                self._widen(now, bad)
                bad = []
            elif verdict == STOP:
                self._stop_for_numbers(now, window)
        self.zeros = [*self.zeros, now] if now.loss == 0.0 else []
        done = trainer.state.global_step
        if done and (self.good is None or done in KEPT_FIRST or done % KEEP_EVERY == 0):
            self._remember(self.random or start.random)
        self.random = random_state()
        return loss

    def _compute(self, model: Any, window: list[Any], items: Any) -> Optional[torch.Tensor]:
        """None when memory ran out, or would have."""
        if self._memory_is_short(window):
            return None
        try:
            return self.trainer.compute(model, window, items)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return None

    def _memory_is_short(self, window: list[Any]) -> bool:
        """On a CPU nothing raises when memory runs out: the kernel kills. So look before each step."""
        if self.trainer.args.device.type != "cpu" or not self.growth:
            return False
        load, regime = self._load_of(window), self.trainer.regime
        lowest = load.lower(regime) is None
        share = min(1.0, sum(load.at_once(regime)) / sum(self.load.at_once(regime)))
        wanted = self.at_rest + self.growth * share - held_memory()
        return wanted > available_memory(ulimit=False) and (self.measured or not lowest)

    def _load_of(self, window: list[Any]) -> Load:
        lengths = [len(ids) for _, parts in window for ids, _ in parts]
        return Load(self.load.fast, max(lengths), sum(lengths), self.load.may_checkpoint)

    def _read(self, loss: torch.Tensor, window: list[Any]) -> StepNumbers:
        scaler = self.trainer.accelerator.scaler
        gradients = [p.grad for p in self.trainer.trainable if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        labels = any(label >= 0 for _, parts in window for _, row in parts for label in row[1:])
        narrow = self.trainer.regime.precision == "fp16" and scaler is not None
        return StepNumbers(float(loss), norm, labels, float(scaler.get_scale()) if narrow else None)

    def _undo(self, start: Start) -> None:
        for parameter in self.trainer.trainable:
            parameter.grad = None
        self.trainer.take(self.trainer.regime)  # drops what the broken-off step still held
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        set_random_state(start.random)
        vars(self.trainer).update(copy.deepcopy(start.counters))

    def _less_at_once(self, window: list[Any]) -> None:
        regime, fast = self.trainer.regime, self.load.fast
        below, step = self._load_of(window).lower(regime), self.trainer.state.global_step + 1
        if below is None:
            raise UserError(
                text(
                    f"第 {step} 步内存不够，已经不能再少", f"step {step}: out of memory, and nothing is left to shrink"
                ),
                where=str(self.trainer.folder.path),
                fix=text("关掉别的程序，再加 --resume 继续；", "close other programs, then go on with --resume; ")
                + self._keep(self.random),
            )
        self.growth //= 2
        words = described(below, fast)
        said = f"第 {step} 步内存不够：重算这一步，{words}（行和步不变）"
        self._tell(
            "memory",
            text(said, f"step {step}: out of memory; computed again, {words} (the same rows and steps)"),
            below,
        )

    def _widen(self, now: StepNumbers, bad: list[StepNumbers]) -> None:
        step, regime = self.trainer.state.global_step + 1, self.trainer.regime
        what = seen(now, len(bad), regime.precision)
        self.trainer.widen()
        self.precision = "fp32"
        said = f"第 {step} 步：{what}；退回这一步之前，改用 fp32 继续"
        self._tell(
            "numbers",
            text(said, f"step {step}: {what}; back to the state before it, and on in fp32"),
            self.trainer.regime,
        )

    def _stop_for_numbers(self, now: StepNumbers, window: list[Any]) -> NoReturn:
        trainer, step = self.trainer, self.trainer.state.global_step + 1
        what = seen(now, 1, "fp32")
        if not math.isfinite(now.loss):
            self._go_back()  # the present weights gave that loss: they are not good
        longest = max((ids for _, parts in window for ids, _ in parts), key=len)
        words = trainer.processing_class.decode(longest, skip_special_tokens=True).strip()[:40]
        rate = trainer.args.learning_rate
        raise UserError(
            text(f"第 {step} 步：{what}，用的已是 fp32", f"step {step}: {what}, though in fp32"),
            where=str(trainer.folder.path),
            fix=text(
                f"多半是学习率太大（--learning_rate {rate:g}），或这一步的数据有问题（{words!r}）；",
                f"most likely --learning_rate {rate:g} is too large, or a row of this step is odd ({words!r}); ",
            )
            + self._keep(self.random),
        )

    def _tell(self, kind: str, said: str, regime: ComputeConfig) -> None:
        """Say it, take the regime, and write both into the record."""
        tell(said)
        self.trainer.take(regime)
        self.trainer.folder.note(kind, self.trainer.state.global_step, said, vars(regime))

    def _remember(self, random: list[torch.Tensor]) -> None:
        """Copy the state that this step began with: its loss and gradients have just proved good."""
        trainer = self.trainer
        state = copy.copy(trainer.state)
        state.log_history = list(state.log_history)
        older = self.good or Good([], {}, {}, None, [])
        weights = copied(trainer.trainable, older.weights)
        optimizer = copied(trainer.optimizer.state_dict(), older.optimizer)
        self.good = Good(weights, optimizer, copied(trainer.lr_scheduler.state_dict()), state, random)

    def _go_back(self) -> None:
        trainer, good = self.trainer, self.good
        if good is None:
            trainer.state.global_step = step_of(trainer.folder.checkpoint)  # nothing learnt since is worth keeping
            return
        with torch.no_grad():
            for parameter, value in zip(trainer.trainable, good.weights):
                parameter.copy_(value)
        trainer.optimizer.load_state_dict(good.optimizer)
        trainer.lr_scheduler.load_state_dict(good.scheduler)
        trainer.state, self.random = good.state, good.random

    def _keep(self, random: Optional[list[torch.Tensor]]) -> str:
        """Make a checkpoint of the present state, end the run's display, and say where it is."""
        trainer = self.trainer
        step = trainer.state.global_step
        trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
        if not step:
            return text("还没学到值得留的东西", "nothing was learnt yet that is worth keeping")
        checkpoint = trainer.folder.path / f"checkpoint-{step}"
        if not checkpoint.is_dir():
            set_random_state(random or [])
            trainer._save_checkpoint(trainer.model, None)
        return text(f"第 {step} 步的状态在 {checkpoint}", f"the state after step {step} is in {checkpoint}")
