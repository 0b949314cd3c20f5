"""Runs the training to its end, measures the held-out rows, and writes the results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lora_practice.console.text import tell, text
from lora_practice.data.tokenization import Example
from lora_practice.run import model_card
from lora_practice.run.folder import CARD, OutputFolder, checkpoints
from lora_practice.storage import disk
from lora_practice.training.evaluation import BEST, attach, evaluations, held_out_loss, perplexity, take_best, was_over
from lora_practice.training.plan import most_held
from lora_practice.training.trainer import PracticeTrainer

PACE = ("step", "tokens_per_second", "memory_mb")  # apart from the losses, which the same run has again


def train(trainer: PracticeTrainer, held_out: Sequence[Example], settings: Any) -> dict[str, Any]:
    """Train to the end, to an early stop, or to the user's Ctrl-C. `settings` holds TrainSettings' fields.

    Returns:
        For the record: "steps", "interrupted", "losses" (one dict per logged step; `loss` in nats per trained
        token), "seconds", "tokens_per_second", "peak_memory_mb"; with held-out rows also what `_judged` returns.
    """
    before = held_out_loss(trainer, held_out) if held_out else None
    evaluation = attach(trainer, held_out, settings)
    checkpoint = trainer.folder.checkpoint
    if checkpoint:
        tell(text(f"从 {checkpoint} 继续", f"going on from {checkpoint}"))
    started = time.perf_counter()
    if not (checkpoint and was_over(trainer, checkpoint, evaluation)):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started
    state = trainer.state
    stopped_early = evaluation is not None and evaluation.is_over(state)
    keys = ("step", "loss", "grad_norm", "learning_rate")
    losses = [{key: entry[key] for key in keys if key in entry} for entry in state.log_history if "loss" in entry]
    result = {
        "steps": state.global_step,
        "interrupted": state.global_step < state.max_steps and not stopped_early,
        "losses": losses,
        "pace": [{key: entry[key] for key in PACE if key in entry} for entry in state.log_history if "loss" in entry],
        "seconds": round(seconds, 1),
        "tokens_per_second": round(trainer.tokens_seen / seconds, 1),
        "peak_memory_mb": round(most_held(trainer.args.device) / 1e6),
    }
    if before is not None:
        result["stopped_early"] = stopped_early
        keeps_best = evaluation is not None and evaluation.keep_best and not result["interrupted"]
        result.update(_judged(trainer, held_out, before, keeps_best))
    return result


def _judged(trainer: PracticeTrainer, held_out: Sequence[Example], before: float, keeps_best: bool) -> dict[str, Any]:
    """Take the best adapter, if one was to be kept, and measure it.

    Returns: "held_out_loss" before and after, "evaluations" (step, loss, perplexity), "best_step".
    """
    best = take_best(trainer) if keeps_best else None
    after = held_out_loss(trainer, held_out)
    chosen = text(f"，取第 {best} 步的适配器（最低）", f"; the adapter of step {best}, the lowest") if best else ""
    first, last = perplexity(before), perplexity(after)
    zh = f"留出数据的损失：{before:.3f} → {after:.3f}，困惑度 {first:.2f} → {last:.2f}"
    tell(text(zh, f"held-out loss: {before:.3f} -> {after:.3f}, perplexity {first:.2f} -> {last:.2f}") + chosen)
    start = {"step": 0, "loss": before, "perplexity": first}
    return {
        "held_out_loss": {"before": round(before, 4), "after": round(after, 4)},
        "evaluations": [start, *evaluations(trainer.state.log_history)],
        "best_step": best,
    }


def finish(trainer: PracticeTrainer, notes: dict[str, Any]) -> None:
    """Write the adapter, the tokenizer, the card and the record into the output folder.

    Kills before an old checkpoint was removed may have left more of them than were to be kept.
    """
    disk.drop_older(checkpoints(trainer.folder.path), trainer.keep_checkpoints)
    notes["finished_at"] = time.strftime("%Y-%m-%d %H:%M")
    with trainer.folder.staging(30_000_000) as staging:
        trainer.save_model(str(staging))
        (staging / CARD).write_text(model_card.card(notes), "utf-8")
        trainer.folder.finish(staging, notes)
    (trainer.folder.path / BEST).unlink(missing_ok=True)


def write_card(folder: OutputFolder, notes: dict[str, Any]) -> None:
    """Write card and record of a finished run anew, when something was added to them."""
    with folder.staging(100_000) as staging:
        (staging / CARD).write_text(model_card.card(notes), "utf-8")
        folder.finish(staging, notes)
