"""Runs the training to its end, measures the held-out rows, and writes the results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lora_practice.data.tokenization import Example
from lora_practice.model.loss import perplexity
from lora_practice.run import model_card, own_files
from lora_practice.run.file_kinds import BEST, CARD
from lora_practice.run.folder import OutputFolder, checkpoints
from lora_practice.training.evaluation import (
    add_evaluation,
    evaluations,
    held_out_loss,
    load_best,
    load_if_complete,
)
from lora_practice.training.events import HeldOutMeasured, Resuming
from lora_practice.training.plan import most_held
from lora_practice.training.settings import TrainingSettings
from lora_practice.training.trainer import PracticeTrainer

LOSSES = ("step", "loss", "grad_norm", "learning_rate")  # equal in each repetition of the same run
PACE = ("step", "tokens_per_second", "memory_mb")  # these are not


def train(trainer: PracticeTrainer, held_out: Sequence[Example], settings: TrainingSettings) -> dict[str, Any]:
    """Train to the end, to an early stop, or until the user interrupts.

    Returns:
        For the record: "steps", "interrupted", "logging_steps" (as used), "losses" and "pace" (one dict per logged
        step, see LOSSES and PACE; `loss` in nats per trained token), "seconds", "tokens_per_second", "peak_memory_mb";
        with held-out rows also "stopped_early" and what `_measure_after` returns.
    """
    before = held_out_loss(trainer, held_out) if held_out else None
    evaluation = add_evaluation(trainer, held_out, settings)
    checkpoint = trainer.folder.checkpoint
    if checkpoint:
        trainer.report(Resuming(checkpoint))
    started = time.perf_counter()
    if not (checkpoint and load_if_complete(trainer, checkpoint, evaluation)):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started
    state = trainer.state
    stopped_early = evaluation is not None and evaluation.stops_early(state)
    logged = [entry for entry in state.log_history if "loss" in entry]
    result = {
        "steps": state.global_step,
        "interrupted": state.global_step < state.max_steps and not stopped_early,
        "logging_steps": trainer.args.logging_steps,
        "losses": [{key: entry[key] for key in LOSSES if key in entry} for entry in logged],
        "pace": [{key: entry[key] for key in PACE if key in entry} for entry in logged],
        "seconds": round(seconds, 1),
        "tokens_per_second": round(trainer.tokens_seen / seconds, 1),
        "peak_memory_mb": round(most_held(trainer.args.device) / 1e6),
    }
    if before is not None:
        result["stopped_early"] = stopped_early
        keeps_best = evaluation is not None and evaluation.keep_best and not result["interrupted"]
        result.update(_measure_after(trainer, held_out, before, keeps_best))
    return result


def _measure_after(
    trainer: PracticeTrainer, held_out: Sequence[Example], before: float, keeps_best: bool
) -> dict[str, Any]:
    """Load the best adapter, if one was kept, and measure its held-out loss.

    Returns: "held_out_loss" before and after, "evaluations" (step, loss, perplexity), "best_step".
    """
    best = load_best(trainer) if keeps_best else None
    after = held_out_loss(trainer, held_out)
    trainer.report(HeldOutMeasured(before, after, best))
    start = {"step": 0, "loss": before, "perplexity": perplexity(before)}
    return {
        "held_out_loss": {"before": round(before, 4), "after": round(after, 4)},
        "evaluations": [start, *evaluations(trainer.state.log_history)],
        "best_step": best,
    }


def finish(trainer: PracticeTrainer, record: dict[str, Any]) -> None:
    """Write the adapter, the tokenizer, the model card and the record into the output folder."""
    # a run that was killed while it removed old checkpoints left too many
    own_files.drop_older(checkpoints(trainer.folder.path), trainer.keep_checkpoints)
    record["finished_at"] = time.strftime("%Y-%m-%d %H:%M")
    with trainer.folder.staging(30_000_000) as staging:
        trainer.save_model(str(staging))
        (staging / CARD).write_text(model_card.card(record), "utf-8")
        trainer.folder.finish(staging, record)
    (trainer.folder.path / BEST).unlink(missing_ok=True)


def write_card(folder: OutputFolder, record: dict[str, Any]) -> None:
    """Write the model card and the record of a finished run again, with what was added to them."""
    with folder.staging(100_000) as staging:
        (staging / CARD).write_text(model_card.card(record), "utf-8")
        folder.finish(staging, record)
