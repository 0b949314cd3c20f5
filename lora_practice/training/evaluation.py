"""Evaluation on held-out conversations while training: loss and perplexity, the best adapter, early stopping."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from lora_practice.data.tokenization import Example, count_trained
from lora_practice.model.loss import mean_loss, perplexity
from lora_practice.run.file_kinds import BEST
from lora_practice.storage import manifest
from lora_practice.training.events import BestAdapterMissing, StoppedEarly
from lora_practice.training.settings import TrainingSettings
from lora_practice.training.trainer import PracticeTrainer

ROWS_PER_PASS = 64  # rows given to the fast engine at once, which splits them into micro-batches


def held_out_loss(trainer: PracticeTrainer, examples: Sequence[Example]) -> float:
    """Mean loss in nats per trained token over `examples`, without dropout or gradients, in bounded memory.

    Computes in the precision of the training, also before and after it, when the loop has not prepared the model.
    """
    if trainer.engine is None:
        with nullcontext() if trainer.compute_config.precision == "fp32" else trainer.accelerator.autocast():
            return mean_loss(trainer.model, examples)
    total, count = 0.0, 0
    for start in range(0, len(examples), ROWS_PER_PASS):
        parts = [(example.input_ids, example.labels) for example in examples[start : start + ROWS_PER_PASS]]
        trained = sum(count_trained(labels) for _, labels in parts)
        total, count = total + trainer.engine.eval_loss(parts) * trained, count + trained
    return total / count


def add_evaluation(
    trainer: PracticeTrainer, examples: Sequence[Example], settings: TrainingSettings
) -> Optional[Evaluation]:
    """Add the callback that evaluates while the trainer runs; None if the settings ask for none."""
    if not examples or settings.eval_strategy == "no":
        return None
    steps = settings.eval_steps if settings.eval_strategy == "steps" else 0
    patience = settings.early_stopping_patience
    evaluation = Evaluation(trainer, examples, steps, settings.load_best_model_at_end, patience)
    trainer.add_callback(evaluation)
    return evaluation


class Evaluation(TrainerCallback):
    """Measures the held-out loss every `steps` steps (0: at the end of each epoch).

    Results go into the trainer's log, and so into its checkpoints: a resumed run continues with them. With `keep_best`
    the best adapter is kept in BEST until `load_best`; with a `patience` above 0 the run ends after so many
    evaluations in a row without a lower loss.
    """

    def __init__(
        self, trainer: PracticeTrainer, examples: Sequence[Example], steps: int, keep_best: bool, patience: int
    ) -> None:
        self.trainer, self.examples, self.steps = trainer, examples, steps
        self.keep_best, self.patience = keep_best, patience

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before the checkpoint of this step is written, so that it contains the result."""
        due = state.global_step % self.steps == 0 if self.steps else state.epoch == round(state.epoch)
        if not due and state.global_step != state.max_steps:
            return
        loss = held_out_loss(self.trainer, self.examples)
        should_log = control.should_log
        self.trainer.model.eval()  # TRL takes a log entry of a model in eval mode for an evaluation
        self.trainer.log({"eval_loss": loss, "eval_perplexity": perplexity(loss)})
        self.trainer.model.train()
        control.should_log = should_log  # the training loss of this step is logged afterwards
        evaluations_since_best = since_best(state.log_history)
        if self.keep_best and not evaluations_since_best:
            save_best(self.trainer, state.global_step, loss)
        if self.stops_early(state):
            control.should_training_stop = True
            self.trainer.report(StoppedEarly(evaluations_since_best))

    def stops_early(self, state: TrainerState) -> bool:
        """Whether the run stops at this state, before its last step."""
        return 0 < self.patience <= since_best(state.log_history) and state.global_step < state.max_steps


def since_best(log_history: Sequence[dict[str, Any]]) -> int:
    """Number of evaluations after the one with the lowest loss."""
    losses = [entry["loss"] if math.isfinite(entry["loss"]) else math.inf for entry in evaluations(log_history)]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def load_if_complete(trainer: PracticeTrainer, checkpoint: Path, evaluation: Optional[Evaluation]) -> bool:
    """Load `checkpoint` and return True if no step is left after it; `trainer.train` would compute one more."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if state.global_step < state.max_steps and not (evaluation and evaluation.stops_early(state)):
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.recovery.resume_precision()
    trainer.state = state
    return True


def evaluations(log_history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """{"step", "loss", "perplexity"} of each evaluation in a trainer's log; loss in nats per trained token."""
    return [
        {"step": entry["step"], "loss": entry["eval_loss"], "perplexity": entry["eval_perplexity"]}
        for entry in log_history
        if "eval_loss" in entry
    ]


def save_best(trainer: PracticeTrainer, step: int, loss: float) -> None:
    """Write the present adapter to BEST, through a temporary file."""
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in _trainable(trainer)}
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) + 1_000_000
    with trainer.folder.staging(needed) as staging:
        save_file(tensors, staging / BEST, {"step": str(step), "loss": repr(loss)})
        manifest.flush_to_disk(staging)
        os.replace(staging / BEST, trainer.folder.path / BEST)


def load_best(trainer: PracticeTrainer) -> Optional[int]:
    """Load the best adapter into the model; returns its step, None if no best adapter was saved."""
    path = trainer.folder.path / BEST
    if not path.exists():
        if evaluations(trainer.state.log_history):
            trainer.report(BestAdapterMissing(path))
        return None
    with torch.no_grad(), safe_open(path, "pt") as saved:
        step = int(saved.metadata()["step"])
        if step != trainer.state.global_step:
            for name, parameter in _trainable(trainer):
                parameter.copy_(saved.get_tensor(name))
    return step


def _trainable(trainer: PracticeTrainer) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
