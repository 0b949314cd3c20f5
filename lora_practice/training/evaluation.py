"""Loss on conversations that are never trained on, while training: shown, the best adapter kept, an early stop."""

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

from lora_practice.console.text import tell, text
from lora_practice.data.tokenization import Example, count_trained
from lora_practice.model.loss import mean_loss
from lora_practice.storage import manifest
from lora_practice.training.trainer import PracticeTrainer

BEST = "best.safetensors"  # the adapter with the lowest held-out loss so far; gone when the run is finished
ROWS_PER_PASS = 64  # rows handed to the fast engine at once, which then cuts them as it cuts a step


def held_out_loss(trainer: PracticeTrainer, examples: Sequence[Example]) -> float:
    """Mean loss in nats per trained token over `examples`, without dropout or gradients, in flat memory.

    In the precision of the training, also before and after it, when the loop has not prepared the model for it.
    """
    if trainer.engine is None:
        with nullcontext() if trainer.regime.precision == "fp32" else trainer.accelerator.autocast():
            return mean_loss(trainer.model, examples)
    total, count = 0.0, 0
    for start in range(0, len(examples), ROWS_PER_PASS):
        part = [(one.input_ids, one.labels) for one in examples[start : start + ROWS_PER_PASS]]
        trained = sum(count_trained(labels) for _, labels in part)
        total, count = total + trainer.engine.eval_loss(part) * trained, count + trained
    return total / count


def perplexity(loss: float) -> float:
    """e to the loss: among how many equally likely tokens the model seems to choose."""
    return math.exp(min(loss, 700.0))


def attach(trainer: PracticeTrainer, examples: Sequence[Example], settings: Any) -> Optional[Evaluation]:
    """Evaluate while this trainer runs, as TrainSettings' fields say; None if they say not to."""
    if not examples or settings.eval_strategy == "no":
        return None
    steps = settings.eval_steps if settings.eval_strategy == "steps" else 0
    patience = settings.early_stopping_patience
    evaluation = Evaluation(trainer, examples, steps, settings.load_best_model_at_end, patience)
    trainer.add_callback(evaluation)
    return evaluation


class Evaluation(TrainerCallback):
    """Measures the held-out loss every `steps` steps (0: at the end of each epoch).

    What was measured stands in the trainer's log, and so in its checkpoints: a resumed run goes on with it.
    With `keep_best`, the best adapter lies in BEST until `take_best`; with a `patience` above 0, so many
    evaluations in a row without a new best end the run.
    """

    def __init__(
        self, trainer: PracticeTrainer, examples: Sequence[Example], steps: int, keep_best: bool, patience: int
    ) -> None:
        self.trainer, self.examples, self.steps = trainer, examples, steps
        self.keep_best, self.patience = keep_best, patience

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before this step's checkpoint is made, so that it holds the result."""
        due = state.global_step % self.steps == 0 if self.steps else state.epoch == round(state.epoch)
        if not due and state.global_step != state.max_steps:
            return
        loss = held_out_loss(self.trainer, self.examples)
        should_log = control.should_log
        self.trainer.model.eval()  # by this TRL tells the log of an evaluation from that of training
        self.trainer.log({"eval_loss": loss, "eval_perplexity": perplexity(loss)})
        self.trainer.model.train()
        control.should_log = should_log  # the loss of this step is still to be logged
        waited = since_best(state.log_history)
        if self.keep_best and not waited:
            keep(self.trainer, state.global_step, loss)
        if self.is_over(state):
            control.should_training_stop = True
            tell(
                text(
                    f"留出损失连续 {waited} 次没有更低，提前停止",
                    f"the held-out loss has not fallen in {waited} evaluations: stopping early",
                )
            )

    def is_over(self, state: Any) -> bool:
        """Whether the run that came to this state was stopped early by it."""
        return 0 < self.patience <= since_best(state.log_history) and state.global_step < state.max_steps


def since_best(log_history: Sequence[dict[str, Any]]) -> int:
    """How many evaluations came after the one with the lowest loss."""
    losses = [one["loss"] if math.isfinite(one["loss"]) else math.inf for one in evaluations(log_history)]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def was_over(trainer: PracticeTrainer, checkpoint: Path, evaluation: Optional[Evaluation]) -> bool:
    """Whether nothing is left to train after this checkpoint, which then is loaded; `train` would take a step more."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if state.global_step < state.max_steps and not (evaluation and evaluation.is_over(state)):
        return False
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.guard.go_on()
    trainer.state = state
    return True


def evaluations(log_history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """{"step", "loss", "perplexity"} of each evaluation in a trainer's log; loss in nats per trained token."""
    found = [entry for entry in log_history if "eval_loss" in entry]
    return [{"step": one["step"], "loss": one["eval_loss"], "perplexity": one["eval_perplexity"]} for one in found]


def keep(trainer: PracticeTrainer, step: int, loss: float) -> None:
    """Write the adapter as it is now to BEST, whole or not at all."""
    tensors = {name: one.detach().cpu().contiguous() for name, one in _trainable(trainer)}
    needed = sum(one.numel() * one.element_size() for one in tensors.values()) + 1_000_000
    with trainer.folder.staging(needed) as staging:
        save_file(tensors, staging / BEST, {"step": str(step), "loss": repr(loss)})
        manifest.flush_to_disk(staging)
        os.replace(staging / BEST, trainer.folder.path / BEST)


def take_best(trainer: PracticeTrainer) -> Optional[int]:
    """Put the best adapter into the model.

    Returns: the step that it is of; None if none was kept.
    """
    path = trainer.folder.path / BEST
    if not path.exists():
        lost = text(f"{path} 不见了：用最后一步的适配器", f"{path} is gone: the adapter of the last step is taken")
        if evaluations(trainer.state.log_history):
            tell(lost)
        return None
    with torch.no_grad(), safe_open(path, "pt") as kept:
        step = int(kept.metadata()["step"])
        if step != trainer.state.global_step:
            for name, one in _trainable(trainer):
                one.copy_(kept.get_tensor(name))
    return step


def _trainable(trainer: PracticeTrainer) -> list[tuple[str, Any]]:
    return [(name, one) for name, one in trainer.model.named_parameters() if one.requires_grad]
