"""TRL's trainer with three changes: the fast engine may compute steps, Recovery watches them, checkpoints are whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, cast

import torch
from trl import SFTTrainer

from lora_practice import fast
from lora_practice.console.errors import out_of_memory
from lora_practice.console.text import tell
from lora_practice.data.collator import split_batch
from lora_practice.fast.buffers import return_freed_memory
from lora_practice.model import adapter_files, pissa
from lora_practice.run.folder import OutputFolder
from lora_practice.training import messages
from lora_practice.training.events import ConfigChange, Event, StepFailed
from lora_practice.training.memory_fit import ComputeConfig, MemoryDemand
from lora_practice.training.recovery import Recovery
from lora_practice.training.snapshot import random_state, set_random_state
from lora_practice.training.window import MicroBatch, Window, window_lengths, window_parts

_TRL_COUNTERS = ("_metrics", "_total_train_tokens")


class PracticeTrainer(SFTTrainer):
    """SFTTrainer for one run. Without `engine` a step is TRL's and PEFT's own: the reference for the fast path.

    Attributes:
        tokens_seen: tokens trained on so far in this process.
        compute_config: how steps are computed now; `recovery` changes it where memory or numbers require it.
    """

    model: Any
    processing_class: Any

    def __init__(
        self,
        *,
        folder: OutputFolder,
        engine: Optional[fast.Engine],
        demand: MemoryDemand,
        compute_config: ComputeConfig,
        keep_checkpoints: Optional[int] = None,
        loraplus_lr_ratio: float = 1.0,
        **trl: Any,
    ) -> None:
        """The trainer of a new run, or of a resumed one, which continues as its events say.

        Args:
            folder: where checkpoints and the record go.
            engine: the fast path for `model`; None for the plain path.
            demand: the most that the data asks of memory.
            compute_config: how to compute the steps of a new run.
            keep_checkpoints: the newest checkpoints that are kept; None keeps all.
            loraplus_lr_ratio: learning rate of B divided by that of A (LoRA+).
            trl: keyword arguments of SFTTrainer.
        """
        self.folder, self.engine = folder, engine
        self.keep_checkpoints, self.loraplus_lr_ratio = keep_checkpoints, loraplus_lr_ratio
        self.tokens_seen = 0
        self._window: list[MicroBatch] = []
        self._trainable: Optional[list[torch.nn.Parameter]] = None
        self._staging: Optional[Path] = None
        super().__init__(**trl)
        # what is in force already: transformers enables checkpointing by its own arguments
        self.compute_config = replace(compute_config, checkpointing=bool(self.args.gradient_checkpointing))
        wanted = _as_before(compute_config, folder.last_compute_config())
        self.recovery = Recovery(self, demand, wanted.precision)  # which upcasts with the first step
        self.use_compute_config(replace(wanted, precision=compute_config.precision))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Buffers micro-batches; computes them together on the last one of an optimizer step.

        The loss of a step is a sum over its tokens divided once by their number, so computing its micro-batches
        together, or in other portions, changes nothing but rounding and the random numbers of dropout.

        Raises:
            UserError: the step cannot be computed; the last sound state is kept as a checkpoint.
        """
        micro_batch = MicroBatch(inputs, inputs.pop("parts"))
        self.tokens_seen += sum(window_lengths([micro_batch]))
        self._window.append(micro_batch)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, []
        try:
            return self.recovery.step(model, window, num_items_in_batch)
        except StepFailed as error:
            raise messages.step_failed(error) from error

    def compute(self, model: Any, window: Window, items: Any) -> torch.Tensor:
        """The loss of a window under the present compute config; its gradients are added to `.grad`.

        items: trained tokens of the window; None if transformers has not counted them.
        """
        total = torch.zeros((), device=self.args.device)
        if self.engine is None:
            for inputs, _ in window:
                # without `items` the loss is a mean of means, which depends on the portions
                portions = [inputs] if items is None else split_batch(inputs, self.compute_config.rows)
                for portion in portions:
                    total = total + super().training_step(model, dict(portion), items)
            return total
        if not model.training:  # `train` visits thousands of modules
            model.train()
        self.engine.step = self.state.global_step  # dropout masks depend on it alone, so a resumed run draws the same
        scaler = self.accelerator.scaler
        one = torch.ones((), device=self.args.device)
        scale = 1.0 if scaler is None else float(scaler.scale(one))
        return one * self.engine.step_loss_and_backward(
            window_parts(window), None if items is None else int(items), scale
        )

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """The tensors that are trained, in the model's order."""
        if self._trainable is None:
            self._trainable = [p for p in self.model.parameters() if p.requires_grad]
        return self._trainable

    def use_compute_config(self, config: ComputeConfig) -> None:
        """Compute with `config` from here on, in the present precision; `upcast_to_fp32` changes that."""
        if self.engine is not None:
            self.engine.limit_memory(config.tokens, config.checkpointing)
        elif config.checkpointing and not self.compute_config.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        elif self.compute_config.checkpointing and not config.checkpointing:
            self.model.gradient_checkpointing_disable()
        self.compute_config = config

    def upcast_to_fp32(self) -> None:
        """Compute in fp32 from here on. The trained tensors are fp32 already and stay those of the optimizer."""
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
            for module in self.model.modules():  # a 4-bit layer has a compute dtype of its own
                if hasattr(module, "compute_dtype"):
                    module.compute_dtype = torch.float32
        scaler = self.accelerator.scaler
        if scaler is not None:  # a scale of 1 that never grows is no loss scaling
            scaler.scale(torch.ones((), device=self.args.device))  # the scale does not exist before its first use
            scaler.update(1.0)
            scaler.set_growth_interval(1 << 30)
        self.compute_config = replace(self.compute_config, precision="fp32")

    def report(self, event: Event) -> None:
        """Show an event; write it into the record if it changes the compute config."""
        message = messages.phrase(event)
        tell(message)
        if isinstance(event, ConfigChange):
            self.folder.note(event.kind, self.state.global_step, message, vars(event.config))

    def end_progress(self) -> None:
        """Close the progress display of a run that ends with an error."""
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the present state."""
        self._save_checkpoint(self.model, None)

    def trl_counters(self) -> dict[str, Any]:
        """A copy of what TRL has counted so far: metrics and tokens."""
        return {name: copy.deepcopy(vars(self)[name]) for name in _TRL_COUNTERS if name in vars(self)}

    def restore_trl_counters(self, counters: dict[str, Any]) -> None:
        """Put back what `trl_counters` returned."""
        vars(self).update(counters)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Restores gradients, counters, random numbers and the engine's state at the end; weights must not change."""
        counters, before, training = self.trl_counters(), random_state(), self.model.training
        engine_state = self.engine.state_dict() if self.engine is not None else {}
        if self.args.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)  # as the loop does
        try:
            yield
        finally:
            for parameter in self.trainable:
                parameter.grad = None
            if self.engine is not None:
                self.engine.load_state_dict(engine_state)
            self.restore_trl_counters(counters)
            set_random_state(before)
            self.model.train(training)
            return_freed_memory()

    def forward_backward(self, rows: list[dict[str, Any]]) -> None:
        """Forward and backward of rows of the training set as one step, before the loop has prepared the model.

        Call it within `restoring`; the gradients stay until its end.
        """
        size = self.args.per_device_train_batch_size
        batches = [self.data_collator(rows[first : first + size]) for first in range(0, len(rows), size)]
        window = [MicroBatch(batch, batch.pop("parts")) for batch in batches]
        self.current_gradient_accumulation_steps = 1
        with self.accelerator.autocast():
            self.compute(self.model, window, torch.tensor(sum(window_lengths(window))))

    def dry_run(self, config: ComputeConfig, lengths: Sequence[int]) -> bool:
        """Compute rows of these lengths at once, with `config`, and discard the result; False if memory ran out."""
        self.use_compute_config(config)
        sample = cast(Any, self.train_dataset)[0]["input_ids"]
        rows = [(sample * (n // len(sample) + 1))[:n] for n in lengths]
        with self.restoring():
            try:
                with self._all_at_once(sum(lengths)):
                    self.forward_backward([{"input_ids": ids, "labels": ids, "lengths": [len(ids)]} for ids in rows])
            except Exception as error:
                if not out_of_memory(error):
                    raise
                return False
        return True

    @contextmanager
    def _all_at_once(self, tokens: int) -> Iterator[None]:
        """The fast engine neither splits these rows nor shares their common prefix."""
        if self.engine is None:
            yield
            return
        share, self.engine.share_prefix = self.engine.share_prefix, False
        self.engine.limit_memory(tokens, self.compute_config.checkpointing)
        try:
            yield
        finally:
            self.engine.share_prefix = share

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer; with a LoRA+ ratio above 1 PEFT's, where B's learning rate is so many times A's.

        LoRA+: Hayou et al. 2024, arXiv 2402.12354.
        """
        if self.loraplus_lr_ratio == 1 or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        from peft.optimizers import create_loraplus_optimizer

        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        ratio = self.loraplus_lr_ratio
        self.optimizer = create_loraplus_optimizer(self.model, kind, loraplus_lr_ratio=ratio, **options)
        return self.optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero, since TRL counts as for full fine-tuning, and counting takes time."""
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
        """Writes nothing: TRL would write one per checkpoint, this repository writes its own after the run."""


def _as_before(planned: ComputeConfig, recorded: Mapping[str, Any]) -> ComputeConfig:
    """The compute config that a resumed run ended with, as its record has it; `planned` where a field is missing."""
    return ComputeConfig(**{name: recorded.get(name) or value for name, value in vars(planned).items()})
