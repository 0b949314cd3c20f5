"""What a run will take on this machine: two steps are tried and undone; and how `--plan` says it."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_practice.console.terminal import aligned
from lora_practice.console.text import tell, text
from lora_practice.data.examples import Examples
from lora_practice.machine.device import Machine, bf16_speed_text, peak_memory
from lora_practice.machine.speed import bf16_speed
from lora_practice.model import pissa
from lora_practice.model.load import stored_bytes
from lora_practice.model.pissa import changes_base, ranks_saved
from lora_practice.run.folder import step_of
from lora_practice.run.record import about
from lora_practice.sources.find import Source
from lora_practice.storage import disk
from lora_practice.training.trainer import PracticeTrainer


@dataclass(frozen=True)
class Estimate:
    """Of the whole run, or of what is left of a resumed one. Seconds without loading; memory of this process."""

    steps: int
    step_seconds: float
    seconds: float
    peak_memory_mb: int
    disk_mb: int
    download_mb: int

    def record(self) -> dict[str, Any]:
        """For run_record.json, where `seconds` and `peak_memory_mb` of the run itself stand beside it."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


def estimate(
    trainer: PracticeTrainer, base: Source, steps: int, settings: Any, held_out: Examples, download_mb: float
) -> Estimate:
    """Do one micro-batch of the longest rows and one step of typical ones (on the plain path a quarter of one)."""
    arguments = trainer.args
    lengths = lengths_of(trainer)
    window = min(len(lengths), arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps)
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    longest = arguments.per_device_train_batch_size
    if trainer.engine is not None:
        longest = max(1, min(window, trainer.engine.token_budget // lengths[by_length[-1]]))
    probe(trainer, by_length[-longest:])
    tried = window if trainer.engine is not None else max(longest, window // 4)
    # the middle of each of so many equal shares: together about as long, in as many parts, as rows are on average
    parts = parts_of(trainer)
    by_parts = sorted(by_length, key=parts.__getitem__)
    typical = [by_parts[int((i + 0.5) * len(lengths) / tried)] for i in range(tried)]
    taken = probe(trainer, typical) * window * (sum(lengths) / len(lengths)) / sum(lengths[i] for i in typical)
    rows = steps * window if arguments.max_steps > 0 else len(lengths) * arguments.num_train_epochs
    left = 1.0 - step_of(trainer.folder.checkpoint) / max(1, steps)
    # measuring the held-out rows is the forward half of training on as many tokens
    measured = _measurements(settings, steps) * held_out.tokens / (sum(lengths) / len(lengths)) / 2
    seconds = taken * (rows + measured) / window * left
    peak_mb = round(most_held(arguments.device) / 1e6)
    disk_mb = round(_disk(trainer, base, steps, settings.merge_adapter) / 1e6)
    return Estimate(steps, taken, seconds, peak_mb, disk_mb, round(download_mb))


def short_of_disk(plan: Estimate, trainer: PracticeTrainer) -> str:
    """A line for a run that will fill the disk, "" for any other; a resumed one has written a part of it already."""
    free = round(disk.free_bytes(trainer.folder.path) / 1e6)
    if trainer.folder.resumed or plan.disk_mb <= free:
        return ""
    zh, en = f"磁盘只剩 {free} MB，存盘会停在半路", f"only {free} MB of disk are free: a save will stop the run"
    fewer_would_do = _checkpoints(trainer, plan.steps) > 2  # with --save_total_limit 1 there are two for a moment
    or_fewer = text("，或 --save_total_limit 1", ", or --save_total_limit 1") if fewer_would_do else ""
    return text(f"{zh}：腾出空间", f"{en}; free some") + or_fewer


def probe(trainer: PracticeTrainer, rows: Sequence[int]) -> float:
    """Seconds of one optimizer step on these rows of the training set; forward, backward and the update are real.

    Nothing is changed by it: no weight, no gradient, no random number, no metric. The update is made on a copy.
    """
    dataset: Any = trainer.train_dataset
    tried = [dataset[i] for i in rows]
    with trainer.restoring(), _no_collection():
        started = time.perf_counter()
        trainer.forward_backward(tried)
        _update_copy(trainer)
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python looks for garbage in all that the libraries hold now and then: a quarter of a second, in few steps."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _update_copy(trainer: PracticeTrainer) -> None:
    copies = [one.detach().clone().requires_grad_() for one in trainer.trainable]
    for one, original in zip(copies, trainer.trainable):
        one.grad = original.grad
    torch.nn.utils.clip_grad_norm_(copies, trainer.args.max_grad_norm)
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    kind(copies, **options).step()


def lengths_of(trainer: PracticeTrainer) -> list[int]:
    """Tokens of each row of the training set."""
    import pyarrow.compute

    dataset: Any = trainer.train_dataset
    return pyarrow.compute.list_value_length(dataset.data.column("input_ids")).to_pylist()


def parts_of(trainer: PracticeTrainer) -> list[int]:
    """Examples in each row of the training set: several where rows are packed."""
    import pyarrow.compute

    dataset: Any = trainer.train_dataset
    if "lengths" not in dataset.column_names:
        return [1] * len(dataset)
    return pyarrow.compute.list_value_length(dataset.data.column("lengths")).to_pylist()


def _measurements(settings: Any, steps: int) -> int:
    """How often the held-out rows are measured while training."""
    often = {"no": 0, "steps": math.ceil(steps / settings.eval_steps), "epoch": math.ceil(settings.num_train_epochs)}
    return often[settings.eval_strategy]


def most_held(device: Any) -> int:
    """Bytes that this process held at most: on its card, or in main memory."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def _disk(trainer: PracticeTrainer, base: Source, steps: int, merge: bool) -> int:
    """Bytes: the adapter, its checkpoints (with two moments for each weight), the tokenizers, the merged model."""
    model = trainer.model
    trained = sum(one.numel() * 4 for one in model.parameters() if one.requires_grad)
    adapter = trained * pissa.ranks_saved(model)
    files = [one for one in Path(base.path or "").glob("*.json") if one.is_file()]
    tokenizer = sum(one.stat().st_size for one in files)
    merged = stored_bytes(base.path) if merge else 0
    number = _checkpoints(trainer, steps)
    return adapter + tokenizer + number * (adapter + 2 * trained + tokenizer) + merged


def _checkpoints(trainer: PracticeTrainer, steps: int) -> int:
    """How many lie on the disk at most: the oldest goes when the newest is whole."""
    arguments = trainer.args
    kept = {"no": 0, "epoch": math.ceil(arguments.num_train_epochs), "steps": steps // arguments.save_steps + 1}
    number = kept[str(getattr(arguments.save_strategy, "value", arguments.save_strategy))]
    return int(min(number, (trainer.keep_checkpoints or number) + 1))


def show_plan(plan: Estimate, trainer: PracticeTrainer, settings: Any, machine: Machine) -> int:
    """Print the plan, with --json for a program; the exit code."""
    if settings.json:
        print(plan_as_json(plan, trainer, settings, machine))
    else:
        tell(plan_text(plan, trainer, settings, machine))
    return 0


def plan_text(plan: Estimate, trainer: PracticeTrainer, settings: Any, machine: Machine) -> str:
    """What `--plan` prints: time, memory, disk, download, and what would change them."""
    open_mb, space_mb = _free_mb(trainer, machine)
    step, peak = f"{plan.step_seconds:.2g}", plan.peak_memory_mb
    done_now = text(f"刚下载了 {plan.download_mb} MB", f"{plan.download_mb} MB, done just now")
    facts = [
        (
            text("时间", "time"),
            about(plan.seconds) + text(f"：{plan.steps} 步，每步 {step} 秒", f": {plan.steps} steps of {step} s"),
        ),
        (
            text("内存", "memory"),
            text(f"最多 {peak} MB；现在空闲 {open_mb} MB", f"{peak} MB at most; {open_mb} MB are free now"),
        ),
        (
            text("磁盘", "disk"),
            f"{plan.disk_mb} MB" + text(f"；空闲 {space_mb} MB", f"; {space_mb} MB are free"),
        ),
        (text("下载", "download"), done_now if plan.download_mb else text("不用，都在这里", "none, all is here")),
    ]
    lines = [f"  {line}" for line in aligned(facts)]
    lines.append(text("怎样会变（按实测的一步推算）：", "what would change it, reckoned from the step measured:"))
    lines += [f"  {flag}\n      {effect}" for flag, effect in changes(plan, trainer, settings, machine)]
    return "\n".join([*lines, text("只是计划，什么都没有写。", "Only a plan: nothing was written.")])


def plan_as_json(plan: Estimate, trainer: PracticeTrainer, settings: Any, machine: Machine) -> str:
    """The same for a program: one JSON object."""
    open_mb, space_mb = _free_mb(trainer, machine)
    whole = {
        "device": machine.device,
        "precision": machine.precision,
        "path": trainer.engine.ops.name if trainer.engine else "plain",
        "max_length": settings.max_length,
        **plan.record(),
        "free_memory_mb": open_mb,
        "free_disk_mb": space_mb,
        "changes": [{"flag": flag, "effect": effect} for flag, effect in changes(plan, trainer, settings, machine)],
    }
    return json.dumps(whole, ensure_ascii=False, indent=2)


def _free_mb(trainer: PracticeTrainer, machine: Machine) -> tuple[int, int]:
    """Memory and disk."""
    memory = machine.facts.gpu_memory if machine.device == "cuda" else machine.facts.memory
    return round(memory / 1e6), round(disk.free_bytes(trainer.folder.path) / 1e6)


def changes(plan: Estimate, trainer: PracticeTrainer, settings: Any, machine: Machine) -> list[tuple[str, str]]:
    """(flag, what it would do) for length, rank, batch and precision. Tokens and bytes are counted, time follows."""
    lengths = lengths_of(trainer)
    shorter = 2 ** max(3, (max(lengths) - 1).bit_length() - 1)  # the next power of two below the longest row
    cut = sum(one > shorter for one in lengths)
    saved = plan.seconds * sum(min(one, shorter) for one in lengths) / sum(lengths)
    weights = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
    # a byte of a base in 4 bits holds two weights
    frozen = sum(
        one.numel() * (2 if one.dtype == torch.uint8 else 1)
        for one in trainer.model.parameters()
        if not one.requires_grad
    )
    # forward and backward pass through each frozen weight twice, through a LoRA weight three times
    slower = 3 * weights / (2 * frozen + 3 * weights)
    size, twice = weights * 4 * ranks_saved(trainer.model) / 1e6, 2 * settings.per_device_train_batch_size
    passes = text("一次前向占的激活内存约翻倍，时间不变", "about twice the memory of activations, the same time")
    if trainer.engine is not None:
        passes = text("快速路径自己限制内存：内存和时间都不变", "nothing else: the fast path bounds its own passes")
    larger = text(
        f"适配器 {2 * size:.0f} MB（现在 {size:.0f} MB）", f"an adapter of {2 * size:.0f} MB, not {size:.0f} MB"
    )
    return [
        (f"--max_length {shorter}", text(f"截掉 {cut} 行的结尾，{about(saved)}", f"cuts {cut} rows, {about(saved)}")),
        (f"--lora_r {2 * settings.lora_r}", larger + text(f"，慢约 {slower:.0%}", f", about {slower:.0%} slower")),
        (f"--per_device_train_batch_size {twice}", text("步数减半；", "half the steps; ") + passes),
        ("--bf16", _bf16(machine, settings)),
    ]


def _bf16(machine: Machine, settings: Any) -> str:
    if changes_base(settings):
        return text(f"不能和 {settings.init_lora_weights} 一起用", f"not with {settings.init_lora_weights}")
    if machine.precision == "bf16":
        return text("已经在用", "is used already")
    if not machine.facts.cpu_bf16 and (machine.facts.capability or (0, 0)) < (8, 0):
        return text("这台机器没有 bf16 指令，只会更慢", "this machine has no bf16 instructions: only slower")
    return bf16_speed_text(machine.facts.bf16_speed or bf16_speed(machine.device))
