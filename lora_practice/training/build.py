"""The training itself: TRL's trainer with our examples, our checkpoints, and words for the person watching."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Optional

from transformers import PrinterCallback

from lora_practice import compat, fast
from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.data.collator import Collator, packed_dataset
from lora_practice.data.examples import Examples
from lora_practice.data.prepare import PreparedData
from lora_practice.machine.device import Machine
from lora_practice.model.load import torch_dtype
from lora_practice.model.lora import keep_trained_in_fp32
from lora_practice.model.pissa import ranks_saved
from lora_practice.run import record
from lora_practice.run.folder import OutputFolder
from lora_practice.sources.find import Source
from lora_practice.training.callbacks import Interrupt, Progress
from lora_practice.training.memory_fit import ComputeConfig, DoesNotFit, Load, bytes_per_token
from lora_practice.training.plan import Estimate, short_of_disk
from lora_practice.training.recovery import Recovery
from lora_practice.training.trainer import PracticeTrainer


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
    arguments = compat.sft_config(
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
    trainer.regime = ComputeConfig(precision, batch, tokens, checkpointing == "on" and not fast_path)
    longest = settings.max_length if settings.packing and not fast_path else examples.longest
    window = (settings.max_length if settings.packing else longest) * batch * settings.gradient_accumulation_steps
    load = Load(fast_path, longest, min(window, max(longest, examples.tokens)), checkpointing != "off")
    trainer.guard = Recovery(trainer, load)
    before = trainer.folder.events[-1]["regime"] if trainer.folder.events else {}
    planned = {**vars(trainer.regime), "checkpointing": checkpointing == "on"}
    wanted = ComputeConfig(**{name: before.get(name) or value for name, value in planned.items()})
    trainer.guard.precision = wanted.precision  # taken with the first step
    trainer.take(replace(wanted, precision=precision))


def build_engine(model: Any, settings: Any, machine: Machine) -> Optional[fast.Engine]:
    """The fast engine for this model, or None for the plain path, with one line that says why.

    Raises:
        UserError: `--fast on`, and the fast path does not serve this model.
    """
    if settings.fast == "off" or (settings.fast == "auto" and machine.device != "cpu"):
        return None
    dtype = torch_dtype(machine.precision)
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


def announce(
    machine: Machine, base: Source, data: Source, rows: PreparedData, trainer: PracticeTrainer, plan: Estimate
) -> str:
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
    except DoesNotFit as error:
        if not (may_shorten and error.max_length):
            raise
        tell(said := text("内存放不下最长的一行", "no memory for the longest row") + f": max_length {error.max_length}")
        trainer.folder.note("memory", 0, said, vars(trainer.regime))
        return error.max_length
    return 0
