"""TRL's trainer with three changes: the fast engine may compute a step, checkpoints are whole, no Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import torch
from trl import SFTTrainer

from lora_practice import adapter
from lora_practice.artifacts import OutputFolder
from lora_practice.fast import Engine


class PracticeTrainer(SFTTrainer):
    """Without `engine` a step is TRL's and PEFT's own: that is the specification of the fast path."""

    model: Any
    processing_class: Any
    folder: OutputFolder
    engine: Optional[Engine] = None
    keep_checkpoints: Optional[int] = None
    tokens_seen = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._window: list[tuple[list[int], list[int]]] = []
        self._staging: Optional[Path] = None
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch, plain; or, on the last one of an optimizer step, all of them at once by the engine.

        The loss of a step is a sum over its tokens divided once by their number, so computing its micro-batches
        together changes nothing but rounding and the dropout masks' random numbers.
        """
        parts = inputs.pop("parts")
        self.tokens_seen += sum(len(ids) for ids, _ in parts)
        if self.engine is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if not model.training:  # walks thousands of modules, so not on every micro-batch
            model.train()
        self._window += parts
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, []
        self.engine.step = self.state.global_step  # dropout masks are a function of it: a resumed run goes on exactly
        scaler = self.accelerator.scaler
        one = torch.ones((), device=self.args.device)
        scale = 1.0 if scaler is None else float(scaler.scale(one))
        items = None if num_items_in_batch is None else int(num_items_in_batch)
        return one * self.engine.step_loss_and_backward(window, items, scale)

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
        adapter.save(self.model, self.processing_class, self.args, Path(output_dir or self.folder.path))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: TRL would write one per checkpoint; ours is written once, when the run is finished."""
