"""Builds the trainer of a run: TRL's arguments, the fast engine, what the data asks of memory."""

from __future__ import annotations

import math
from typing import Any, Optional

from transformers import PrinterCallback

from lora_practice import compat, fast
from lora_practice.console.errors import UserError
from lora_practice.console.settings import given_by_user
from lora_practice.console.text import tell, text
from lora_practice.data.collator import Collator, packed_dataset
from lora_practice.data.examples import Examples
from lora_practice.data.prepare import PreparedData
from lora_practice.machine.device import Machine, load_advice
from lora_practice.model.load import torch_dtype
from lora_practice.model.lora import keep_trained_in_fp32
from lora_practice.model.pissa import ranks_saved
from lora_practice.run import record
from lora_practice.run.folder import OutputFolder
from lora_practice.sources.find import Source
from lora_practice.training import messages
from lora_practice.training.callbacks import Progress, SaveOnInterrupt
from lora_practice.training.events import MaxLengthLowered
from lora_practice.training.memory_fit import ComputeConfig, DoesNotFit, MemoryDemand, bytes_per_token
from lora_practice.training.plan import Estimate, steps_per_epoch
from lora_practice.training.plan_text import many_checkpoints, short_of_disk
from lora_practice.training.settings import DEFAULT_LOGGING_STEPS, TrainingSettings
from lora_practice.training.trainer import PracticeTrainer

LOGGED_EACH_BELOW = 200  # optimizer steps: a shorter run logs the loss of each of them


def build_trainer(
    model: Any,
    engine: Optional[fast.Engine],
    tokenizer: Any,
    examples: Examples,
    settings: TrainingSettings,
    machine: Machine,
    folder: OutputFolder,
) -> PracticeTrainer:
    """A trainer that is ready to run; no file is written here."""
    rows = packed_dataset(examples, settings.max_length) if settings.packing else examples.dataset()
    config = ComputeConfig(
        machine.precision,
        settings.per_device_train_batch_size,
        engine.token_budget if engine else 0,
        settings.gradient_checkpointing == "on",
    )
    missing = [place for place in [folder.path, *folder.path.parents] if not place.exists()]
    trainer = PracticeTrainer(
        folder=folder,
        engine=engine,
        demand=memory_demand(settings, examples.longest, examples.tokens, is_fast=engine is not None),
        compute_config=config,
        keep_checkpoints=settings.save_total_limit,
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        model=model,
        args=_training_arguments(settings, machine, folder, is_fast=engine is not None),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=Collator(tokenizer.pad_token_id),
        callbacks=[SaveOnInterrupt()],
    )
    for place in missing:  # transformers has created the output folder, which `OutputFolder.begin` creates later
        place.rmdir()
    keep_trained_in_fp32(model)  # TRL makes them bf16 on a 4-bit base
    show_progress(trainer, settings)
    return trainer


def show_progress(trainer: PracticeTrainer, settings: TrainingSettings) -> None:
    """Log the losses and show the progress: every step of a short run, unless the user chose `logging_steps`."""
    chosen = "logging_steps" in given_by_user(settings, {"logging_steps": DEFAULT_LOGGING_STEPS})
    each = not chosen and steps_of(trainer) < LOGGED_EACH_BELOW
    trainer.args.logging_steps = 1 if each else settings.logging_steps
    logs_per_line = DEFAULT_LOGGING_STEPS if each else 1
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(lambda: trainer.tokens_seen, logs_per_line))


def _training_arguments(settings: TrainingSettings, machine: Machine, folder: OutputFolder, is_fast: bool) -> Any:
    """`trl.SFTConfig` for this run."""
    return compat.sft_config(
        output_dir=str(folder.path),
        per_device_train_batch_size=settings.per_device_train_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        logging_steps=settings.logging_steps,  # see `show_progress`
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
        gradient_checkpointing=settings.gradient_checkpointing == "on" and not is_fast,  # the engine has its own
        seed=settings.seed,
        max_length=settings.max_length,
        report_to=settings.report_to,
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are tokenised and have labels already
        remove_unused_columns=False,
        dataloader_pin_memory=machine.device == "cuda",
        disable_tqdm=True,
        log_level="error",
    )


def memory_demand(settings: TrainingSettings, longest: int, tokens: int, is_fast: bool) -> MemoryDemand:
    """What data of `tokens` tokens, whose longest example has `longest`, asks of memory at most."""
    longest_row = settings.max_length if settings.packing and not is_fast else longest
    rows = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    window = (settings.max_length if settings.packing else longest_row) * rows
    return MemoryDemand(
        is_fast, longest_row, min(window, max(longest_row, tokens)), settings.gradient_checkpointing != "off"
    )


def build_engine(model: Any, settings: TrainingSettings, machine: Machine) -> Optional[fast.Engine]:
    """The fast engine for this model; None for the plain path, with one line that says why.

    Raises:
        UserError: `--fast on`, and the fast path does not serve this model.
    """
    if settings.fast == "off" or (settings.fast == "auto" and machine.device != "cpu"):
        return None
    try:
        return fast.build(model.to(machine.device), torch_dtype(machine.precision), seed=settings.seed)
    except fast.NotServed as missing:
        what = messages.not_served(missing.reason)
        if settings.fast == "on":
            raise UserError(what, where="--fast on", fix="--fast auto") from missing
        tell(messages.uses_plain_path(what))
        if machine.device == "cpu":
            model.float()  # autocast expects fp32 weights
        return None


def opening_lines(
    machine: Machine,
    base: Source,
    source: Source,
    data: PreparedData,
    trainer: PracticeTrainer,
    plan: Estimate,
    is_plan: bool,
) -> str:
    """The first lines of a run: device, precision, model, data, steps, expected time, memory and disk; and advice.

    Args:
        is_plan: the plan follows, and tells time, memory and disk.
    """
    path = text("普通路径（TRL）", "plain path (TRL)")
    if trainer.engine is not None:
        name = trainer.engine.ops.name
        path = text(f"快速路径：{name.replace('compiled kernels', '编译好的内核')}", f"fast path: {name}")
    has_card = machine.facts.gpu or machine.facts.card_on_bus
    reason = machine.reason if has_card else ""  # that a machine without a card uses its CPU needs no reason
    # PiSSA and OLoRA need weights in fp32
    advice = [line for line in machine.advice.splitlines() if ranks_saved(trainer.model) == 1 or "--bf16" not in line]
    advice = [load_advice(machine.facts, True) if line == load_advice(machine.facts) else line for line in advice]
    needs = text(
        f"预计最多占用内存 {plan.peak_memory_mb} MB，磁盘 {plan.disk_mb} MB",
        f"expected: {plan.peak_memory_mb} MB of memory at most, {plan.disk_mb} MB of disk",
    )
    first_line = record.opening_line(machine, base, source, data, plan.steps, None if is_plan else plan.seconds)
    disk = short_of_disk(plan, trainer) or many_checkpoints(plan, trainer)
    lines = [first_line, reason, path, *advice, "" if is_plan else needs, disk]
    return "\n".join(line for line in lines if line)


def steps_of(trainer: PracticeTrainer) -> int:
    """Optimizer steps of the whole run."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    return math.ceil(steps_per_epoch(trainer) * trainer.args.num_train_epochs)


def fit_memory(trainer: PracticeTrainer, settings: TrainingSettings) -> int:
    """Choose a compute config whose steps fit into memory.

    Returns:
        The `max_length` that fits: the one of the `settings`, or a lower one, where not even one row fits and
        `allow_shorter` is set; then the data must be prepared again. A resumed run keeps its `max_length`.

    Raises:
        UserError: not even one row fits, and `max_length` may not be lowered.
    """
    try:
        trainer.recovery.fit_memory(bytes_per_token(trainer.model.config, trainer.compute_config.precision))
    except DoesNotFit as error:
        if not settings.allow_shorter or settings.resume or not error.max_length:
            raise messages.row_does_not_fit(error) from error
        trainer.report(MaxLengthLowered(trainer.compute_config, error.max_length))
        return error.max_length
    return settings.max_length
