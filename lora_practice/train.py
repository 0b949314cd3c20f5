"""The training itself: TRL's trainer with our examples, our checkpoints, and words for the person watching."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Optional

import torch
from transformers import PrinterCallback

from lora_practice import disk, fast, record, versions
from lora_practice.artifacts import OutputFolder, checkpoints
from lora_practice.data.batches import Collator, packed_dataset
from lora_practice.data.examples import Examples
from lora_practice.data.prepare import Rows
from lora_practice.data.tokens import Example
from lora_practice.errors import UserError, tell, text
from lora_practice.evaluate import BEST, attach, evaluations, held_out_loss, perplexity, take_best, was_over
from lora_practice.guard import Guard
from lora_practice.ladder import Load, Regime, TooLong, bytes_per_token
from lora_practice.machine import Machine
from lora_practice.model import keep_trained_in_fp32
from lora_practice.preflight import Estimate, most_held, short_of_disk
from lora_practice.sources import Source
from lora_practice.trainer import PracticeTrainer
from lora_practice.variants import ranks_saved
from lora_practice.watch import Interrupt, Progress

PACE = ("step", "tokens_per_second", "memory_mb")  # apart from the losses, which the same run has again


def build_trainer(
    model: Any,
    engine: Optional[fast.Engine],
    tokenizer: Any,
    examples: Examples,
    settings: Any,
    machine: Machine,
    folder: OutputFolder,
) -> PracticeTrainer:
    """A trainer that is ready to run. `settings` holds TrainSettings' fields; no file is written here."""
    checkpointing = settings.gradient_checkpointing == "on"
    rows = packed_dataset(examples, settings.max_length) if settings.packing else examples.dataset()
    arguments = versions.sft_config(
        output_dir=str(folder.path),
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        save_strategy=settings.save_strategy,
        save_steps=settings.save_steps,
        optim=settings.optim,
        max_grad_norm=settings.max_grad_norm,
        warmup_ratio=settings.warmup_ratio,
        lr_scheduler_type=settings.lr_scheduler_type,
        bf16=machine.precision == "bf16",
        fp16=machine.precision == "fp16",
        use_cpu=machine.device == "cpu",  # never MPS
        gradient_checkpointing=checkpointing and engine is None,
        seed=settings.seed,
        max_length=settings.max_length,
        report_to=settings.report_to,
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are tokenised, with their labels, already
        remove_unused_columns=False,
        dataloader_pin_memory=machine.device == "cuda",
        disable_tqdm=True,
        log_level="error",
    )
    made = [place for place in [folder.path, *folder.path.parents] if not place.exists()]
    trainer = PracticeTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=[Interrupt()],
    )
    keep_trained_in_fp32(model)  # TRL makes them bf16 on a 4-bit base
    for place in made:  # transformers makes the folder here; ours is made when the run begins
        place.rmdir()
    trainer.folder, trainer.keep_checkpoints = folder, settings.save_total_limit
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(lambda: trainer.tokens_seen))
    trainer.engine, trainer.loraplus_lr_ratio = engine, settings.loraplus_lr_ratio
    set_guard(trainer, examples, settings, machine.precision)
    return trainer


def set_guard(trainer: PracticeTrainer, examples: Examples, settings: Any, precision: str) -> None:
    """Begin as planned, or as the run that is resumed went on."""
    fast_path, checkpointing = trainer.engine is not None, settings.gradient_checkpointing
    batch = settings.per_device_train_batch_size
    tokens = trainer.engine.token_budget if trainer.engine else 0
    trainer.regime = Regime(precision, batch, tokens, checkpointing == "on" and not fast_path)
    longest = settings.max_length if settings.packing and not fast_path else examples.longest
    window = (settings.max_length if settings.packing else longest) * batch * settings.gradient_accumulation_steps
    load = Load(fast_path, longest, min(window, max(longest, examples.tokens)), checkpointing != "off")
    trainer.guard = Guard(trainer, load)
    before = trainer.folder.events[-1]["regime"] if trainer.folder.events else {}
    planned = {**vars(trainer.regime), "checkpointing": checkpointing == "on"}
    wanted = Regime(**{name: before.get(name) or value for name, value in planned.items()})
    trainer.guard.precision = wanted.precision  # taken with the first step
    trainer.take(replace(wanted, precision=precision))


def build_engine(model: Any, settings: Any, machine: Machine) -> Optional[fast.Engine]:
    """The fast engine for this model, or None for the plain path, with one line that says why.

    Raises:
        UserError: `--fast on`, and the fast path does not serve this model.
    """
    if settings.fast == "off" or (settings.fast == "auto" and machine.device != "cpu"):
        return None
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[machine.precision]
    try:
        return fast.build(model.to(machine.device), dtype, seed=settings.seed)
    except fast.NotServed as missing:
        what = text(f"快速路径不支持：{missing.reason}", f"not served by the fast path: {missing.reason}")
        if settings.fast == "on":
            raise UserError(what, where="--fast on", fix="--fast auto") from missing
        tell(text(f"{what}，用普通路径", f"{what}; taking the plain path"))
        if machine.device == "cpu":
            model.float()  # autocast wants float32 weights under it
        return None


def announce(machine: Machine, base: Source, data: Source, rows: Rows, trainer: PracticeTrainer, plan: Estimate) -> str:
    """The first lines that a user reads: device, precision, model, data, steps, expected time; and advice."""
    path = text("普通路径（TRL）", "plain path (TRL)")
    if trainer.engine is not None:
        path = text(f"快速路径：{trainer.engine.ops.name}", f"fast path: {trainer.engine.ops.name}")
    seen = machine.facts.gpu or machine.facts.card_on_bus
    why = machine.reason if seen else ""  # "no card" goes without saying
    # a run that begins with PiSSA or OLoRA needs fp32
    advice = [one for one in machine.advice.splitlines() if ranks_saved(trainer.model) == 1 or "--bf16" not in one]
    lines = [record.announcement(machine, base, data, rows, plan.steps, plan.seconds), why, path, *advice]
    lines.append(
        text(
            f"预计内存最多 {plan.peak_memory_mb} MB，磁盘 {plan.disk_mb} MB",
            f"expected: {plan.peak_memory_mb} MB of memory at most, {plan.disk_mb} MB of disk",
        )
    )
    lines.append(short_of_disk(plan, trainer))
    return "\n".join(line for line in lines if line)


def run(trainer: PracticeTrainer, held_out: Sequence[Example], settings: Any) -> dict[str, Any]:
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
        (staging / "README.md").write_text(record.card(notes), "utf-8")
        trainer.folder.finish(staging, notes)
    (trainer.folder.path / BEST).unlink(missing_ok=True)


def write_card(folder: OutputFolder, notes: dict[str, Any]) -> None:
    """Write card and record of a finished run anew, when something was added to them."""
    with folder.staging(100_000) as staging:
        (staging / "README.md").write_text(record.card(notes), "utf-8")
        folder.finish(staging, notes)


def steps_of(trainer: PracticeTrainer) -> int:
    """Optimizer steps of the whole run."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    an_epoch = math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)
    return math.ceil(an_epoch * trainer.args.num_train_epochs)


def find_room(trainer: PracticeTrainer, may_shorten: bool = False) -> int:
    """The guard's dry run. Returns 0, or with `may_shorten` the `max_length` to begin anew with, instead of TooLong."""
    try:
        trainer.guard.find_room(bytes_per_token(trainer.model.config, trainer.regime.precision))
    except TooLong as error:
        if not (may_shorten and error.max_length):
            raise
        tell(said := text("内存放不下最长的一行", "no memory for the longest row") + f": max_length {error.max_length}")
        trainer.folder.note("memory", 0, said, vars(trainer.regime))
        return error.max_length
    return 0
