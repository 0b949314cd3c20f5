"""TRL's trainer with four changes: the fast engine may compute a step, under a guard; checkpoints are whole; no Hub."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, cast

import torch
from trl import SFTTrainer

from lora_practice import fast
from lora_practice.console.errors import out_of_memory
from lora_practice.data.collator import split_batch
from lora_practice.fast.buffers import return_freed_memory
from lora_practice.model import adapter_files, pissa
from lora_practice.run.folder import OutputFolder
from lora_practice.training.memory_fit import ComputeConfig
from lora_practice.training.recovery import Recovery
from lora_practice.training.snapshot import random_state, set_random_state

_TRL_COUNTERS = ("_metrics", "_total_train_tokens")


class PracticeTrainer(SFTTrainer):
    """Without `engine` a step is TRL's and PEFT's own: that is the specification of the fast path."""

    model: Any
    processing_class: Any
    folder: OutputFolder
    regime: ComputeConfig
    guard: Recovery
    engine: Optional[fast.Engine] = None
    keep_checkpoints: Optional[int] = None
    loraplus_lr_ratio = 1.0
    tokens_seen = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._window: list[tuple[Any, list[tuple[list[int], list[int]]]]] = []
        self._trainable: Optional[list[torch.nn.Parameter]] = None
        self._staging: Optional[Path] = None
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Nothing on a micro-batch; on the last one of an optimizer step all of them, under the guard's eyes.

        The loss of a step is a sum over its tokens divided once by their number, so computing its micro-batches
        together, or in other portions, changes nothing but rounding and the dropout masks' random numbers.
        """
        parts = inputs.pop("parts")
        self.tokens_seen += sum(len(ids) for ids, _ in parts)
        self._window.append((inputs, parts))
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, []
        return self.guard.step(model, window, num_items_in_batch)

    def compute(self, model: Any, window: Sequence[Any], items: Any) -> torch.Tensor:
        """The loss of these micro-batches, (inputs, parts) each, its gradients added to .grad, in this regime."""
        total = torch.zeros((), device=self.args.device)
        if self.engine is None:
            for inputs, _ in window:
                # without the window's number of tokens the loss is a mean of means: in other portions another one
                portions = [inputs] if items is None else split_batch(inputs, self.regime.rows)
                for portion in portions:
                    total = total + super().training_step(model, dict(portion), items)
            return total
        if not model.training:  # walks thousands of modules, so not on every micro-batch
            model.train()
        self.engine.step = self.state.global_step  # dropout masks are a function of it: a resumed run goes on exactly
        scaler = self.accelerator.scaler
        one = torch.ones((), device=self.args.device)
        scale = 1.0 if scaler is None else float(scaler.scale(one))
        examples = [part for _, parts in window for part in parts]
        return one * self.engine.step_loss_and_backward(examples, None if items is None else int(items), scale)

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """The tensors that are trained, in the model's order."""
        if self._trainable is None:
            self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        return self._trainable

    def take(self, regime: ComputeConfig) -> None:
        """Compute in this regime from here on (its precision: see `widen`)."""
        if self.engine is not None:
            self.engine.limit_memory(regime.tokens, regime.checkpointing)
        elif regime.checkpointing and not self.regime.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif self.regime.checkpointing and not regime.checkpointing:
            self.model.gradient_checkpointing_disable()
        self.regime = regime

    def widen(self) -> None:
        """Compute in fp32 from here on. The trained tensors are fp32 already and stay the optimizer's own."""
        if self.engine is not None:
            old, self.engine = self.engine, None
            old.close()
            self.model.float()
            self.engine = fast.build(self.model, torch.float32, old.seed, old.token_budget, old.share_prefix)
            self.engine.limit_memory(old.token_budget, old.checkpointing)
        else:
            self.model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # no autocast any more
            self.use_cpu_amp = False  # transformers 4 has one more of its own, on a CPU
            self.model.float()
            for module in self.model.modules():  # a 4-bit layer computes in a type of its own
                if hasattr(module, "compute_dtype"):
                    module.compute_dtype = torch.float32
        scaler = self.accelerator.scaler
        if scaler is not None:  # fp32 needs none; a scale of 1 that never grows is none
            scaler.scale(torch.ones((), device=self.args.device))  # it begins to exist with its first use
            scaler.update(1.0)
            scaler.set_growth_interval(1 << 30)
        self.regime = replace(self.regime, precision="fp32")

    def counters(self) -> dict[str, Any]:
        """What TRL has counted so far, as a copy."""
        return {name: copy.deepcopy(vars(self)[name]) for name in _TRL_COUNTERS if name in vars(self)}

    @contextmanager
    def trying(self) -> Iterator[None]:
        """What a step changes beside the weights is put back in the end: gradients, counters, random numbers."""
        counters, before, training = self.counters(), random_state(), self.model.training
        place = self.engine.state_dict() if self.engine is not None else {}
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)  # as the loop will do
        try:
            yield
        finally:
            for parameter in self.trainable:
                parameter.grad = None
            if self.engine is not None:
                self.engine.load_state_dict(place)
            vars(self).update(counters)
            set_random_state(before)
            self.model.train(training)
            return_freed_memory()

    def try_step(self, rows: list[dict[str, Any]]) -> None:
        """Forward and backward of these rows of the training set as one step, before the loop has prepared the model.

        Within `trying`; the gradients stay until its end.
        """
        size = self.args.per_device_train_batch_size
        batches = [self.data_collator(rows[first : first + size]) for first in range(0, len(rows), size)]
        window = [(batch, batch.pop("parts")) for batch in batches]
        self.current_gradient_accumulation_steps = 1
        with self.accelerator.autocast():
            self.compute(self.model, window, torch.tensor(sum(len(ids) for _, parts in window for ids, _ in parts)))

    def dry_run(self, regime: ComputeConfig, lengths: Sequence[int]) -> bool:
        """Try a step of rows of these lengths, all at once; False if memory ran out."""
        self.take(regime)
        some = cast(Any, self.train_dataset)[0]["input_ids"]
        rows = [(some * (n // len(some) + 1))[:n] for n in lengths]
        with self.trying():
            try:
                with self._all_at_once(sum(lengths)):
                    self.try_step([{"input_ids": ids, "labels": ids, "lengths": [len(ids)]} for ids in rows])
            except Exception as error:
                if not out_of_memory(error):
                    raise
                return False
        return True

    @contextmanager
    def _all_at_once(self, tokens: int) -> Iterator[None]:
        """The fast engine neither cuts these rows nor finds that they begin alike."""
        if self.engine is None:
            yield
            return
        share, self.engine.share_prefix = self.engine.share_prefix, False
        self.engine.limit_memory(tokens, self.regime.checkpointing)
        try:
            yield
        finally:
            self.engine.share_prefix = share

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """With a LoRA+ ratio above 1, PEFT's: B learns so many times faster than A (arXiv 2402.12354)."""
        if self.loraplus_lr_ratio == 1 or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        from peft.optimizers import create_loraplus_optimizer

        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        ratio = self.loraplus_lr_ratio
        self.optimizer = create_loraplus_optimizer(self.model, kind, loraplus_lr_ratio=ratio, **options)
        return self.optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero: counting them takes longer than it tells, and TRL's count is that of full fine-tuning."""
        return 0

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        needed = 4 * weights + 20_000_000  # adapter, two Adam moments, tokenizer
        with self.folder.staging(needed) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            for checkpoint in staging.glob("checkpoint-*"):
                self.folder.add_checkpoint(checkpoint, self.keep_checkpoints)

    def _save(self, output_dir: Optional[str] = None, state_dict: Any = None) -> None:
        adapter_files.save(self.model, self.processing_class, self.args, Path(output_dir or self.folder.path))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not pissa.load_again(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL would write one per checkpoint; ours is written once, when the run is finished."""
