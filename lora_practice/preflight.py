"""What a run will take on this machine, found by really doing two steps of it and taking them back."""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_practice import embedded
from lora_practice.data.batches import split
from lora_practice.data.examples import Examples
from lora_practice.errors import text
from lora_practice.helping import columns
from lora_practice.machine import Machine, matmul_gflops, peak_memory
from lora_practice.record import about
from lora_practice.sources import Source
from lora_practice.trainer import PracticeTrainer

BUDGET = 1024  # rows that the fast engine computes at once, when it is given no other number


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
    lengths = _lengths(trainer)
    window = min(len(lengths), arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps)
    by_length = sorted(range(len(lengths)), key=lengths.__getitem__)
    longest = arguments.per_device_train_batch_size
    if trainer.engine is not None:
        longest = max(1, min(window, (trainer.engine.token_budget or BUDGET) // lengths[by_length[-1]]))
    probe(trainer, by_length[-longest:])
    tried = window if trainer.engine is not None else max(longest, window // 4)
    # the middle of each of so many equal shares: together about as long as rows are on average
    typical = [by_length[int((i + 0.5) * len(lengths) / tried)] for i in range(tried)]
    taken = probe(trainer, typical) * window * (sum(lengths) / len(lengths)) / sum(lengths[i] for i in typical)
    rows = steps * window if arguments.max_steps > 0 else len(lengths) * arguments.num_train_epochs
    left = 1.0 - _steps_done(trainer) / max(1, steps)
    # measuring the held-out rows is the forward half of training on as many tokens
    measured = _measurements(settings, steps) * held_out.tokens / (sum(lengths) / len(lengths)) / 2
    seconds = taken * (rows + measured) / window * left
    disk = _disk(trainer, base, steps, settings.merge_adapter)
    return Estimate(steps, taken, seconds, round(_peak(arguments.device) / 1e6), round(disk / 1e6), round(download_mb))


def probe(trainer: PracticeTrainer, rows: Sequence[int]) -> float:
    """Seconds of one optimizer step on these rows of the training set; forward, backward and the update are real.

    Nothing is changed by it: no weight, no gradient, no random number, no metric. The update is made on a copy.
    """
    dataset: Any = trainer.train_dataset
    size = trainer.args.per_device_train_batch_size
    batches = [
        trainer.data_collator([dataset[i] for i in rows[start : start + size]]) for start in range(0, len(rows), size)
    ]
    parameters = [one for one in trainer.model.parameters() if one.requires_grad]
    with _untouched(trainer, parameters):
        started = time.perf_counter()
        if trainer.engine is not None:
            trainer.engine.step_loss_and_backward([part for batch in batches for part in batch["parts"]])
        else:
            for batch in (
                portion for whole in batches for portion in split(_without_parts(whole), trainer.regime.rows)
            ):
                with trainer.accelerator.autocast():
                    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=1)
                loss.backward()
        _update_copy(trainer, parameters)
        if trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def fetched_mb(source: Source, since: float) -> float:
    """Megabytes that were downloaded for this source after the time `since` (a Hub data set has no path: 0)."""
    if source.path is None or source.kind not in ("hub", "embedded"):
        return 0.0
    if source.kind == "embedded":
        folder, wheel = source.path, embedded.MODEL
        if not folder.is_dir():
            folder, wheel = folder.parent, embedded.CONVERSATIONS
        return wheel.megabytes if (folder / embedded.MANIFEST).stat().st_mtime >= since else 0.0
    found = [one.stat() for one in source.path.iterdir()]
    return sum(one.st_size for one in found if one.st_mtime >= since) / 1e6


def said(plan: Estimate, trainer: PracticeTrainer, settings: Any, machine: Machine) -> str:
    """What `--plan` prints: time, memory, disk, download, and what would change them."""
    free = machine.facts.gpu_memory if machine.device == "cuda" else machine.facts.memory
    space = shutil.disk_usage(next(one for one in trainer.folder.path.absolute().parents if one.exists())).free
    step, peak, open_mb = f"{plan.step_seconds:.2g}", plan.peak_memory_mb, round(free / 1e6)
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
            f"{plan.disk_mb} MB" + text(f"；空闲 {space / 1e6:.0f} MB", f"; {space / 1e6:.0f} MB are free"),
        ),
        (text("下载", "download"), done_now if plan.download_mb else text("不用，都在这里", "none, all is here")),
    ]
    wide = max(columns(name) for name, _ in facts)
    lines = [f"  {name}{' ' * (wide - columns(name))}  {value}" for name, value in facts]
    lines.append(text("怎样会变（按实测的一步推算）：", "what would change it, reckoned from the step measured:"))
    lines += [f"  {flag}\n      {effect}" for flag, effect in changes(plan, trainer, settings, machine)]
    return "\n".join([*lines, text("只是计划，什么都没有写。", "Only a plan: nothing was written.")])


def changes(plan: Estimate, trainer: PracticeTrainer, settings: Any, machine: Machine) -> list[tuple[str, str]]:
    """(flag, what it would do) for length, rank, batch and precision. Tokens and bytes are counted, time follows."""
    lengths = _lengths(trainer)
    shorter = 2 ** max(3, (max(lengths) - 1).bit_length() - 1)  # the next power of two below the longest row
    cut = sum(one > shorter for one in lengths)
    saved = plan.seconds * sum(min(one, shorter) for one in lengths) / sum(lengths)
    weights = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
    frozen = sum(one.numel() for one in trainer.model.parameters() if not one.requires_grad)
    # forward and backward pass through each frozen weight twice, through a LoRA weight three times
    slower = 3 * weights / (2 * frozen + 3 * weights)
    size, twice = weights * 4 / 1e6, 2 * settings.per_device_train_batch_size
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
        ("--bf16", _bf16(plan, machine)),
    ]


def _bf16(plan: Estimate, machine: Machine) -> str:
    if machine.precision == "bf16":
        return text("已经在用", "is used already")
    if not machine.facts.cpu_bf16 and (machine.facts.capability or (0, 0)) < (8, 0):
        return text("这台机器没有 bf16 指令，只会更慢", "this machine has no bf16 instructions: only slower")
    ratio = matmul_gflops(machine.device, "bfloat16") / matmul_gflops(machine.device)
    return text(
        f"矩阵乘法在这台机器上快 {ratio:.1f} 倍（刚测的）",
        f"matrix products are {ratio:.1f} times as fast here (measured now)",
    )


def _without_parts(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: values for name, values in batch.items() if name != "parts"}


def _update_copy(trainer: PracticeTrainer, parameters: Sequence[Any]) -> None:
    copies = [one.detach().clone().requires_grad_() for one in parameters]
    for one, original in zip(copies, parameters):
        one.grad = original.grad
    torch.nn.utils.clip_grad_norm_(copies, trainer.args.max_grad_norm)
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    kind(copies, **options).step()


@contextlib.contextmanager
def _untouched(trainer: PracticeTrainer, parameters: Sequence[Any]) -> Iterator[None]:
    """Put everything back that a step changes beside the weights."""
    model, engine = trainer.model, trainer.engine
    training = model.training
    metrics = copy.deepcopy(trainer._metrics), trainer._total_train_tokens
    place = engine.state_dict() if engine is not None else {}
    if trainer.args.gradient_checkpointing and engine is None:
        model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    devices = [trainer.args.device] if trainer.args.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model.train()
        try:
            yield
        finally:
            for one in parameters:
                one.grad = None
            if engine is not None:
                engine.load_state_dict(place)
            trainer._metrics, trainer._total_train_tokens = metrics
            model.train(training)


def _lengths(trainer: PracticeTrainer) -> list[int]:
    """Tokens of each row of the training set."""
    import pyarrow.compute

    dataset: Any = trainer.train_dataset
    return pyarrow.compute.list_value_length(dataset.data.column("input_ids")).to_pylist()


def _steps_done(trainer: PracticeTrainer) -> int:
    checkpoint = trainer.folder.checkpoint
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def _measurements(settings: Any, steps: int) -> int:
    """How often the held-out rows are measured while training."""
    often = {"no": 0, "steps": math.ceil(steps / settings.eval_steps), "epoch": math.ceil(settings.num_train_epochs)}
    return often[settings.eval_strategy]


def _peak(device: Any) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def _disk(trainer: PracticeTrainer, base: Source, steps: int, merge: bool) -> int:
    """Bytes: the adapter, its checkpoints (with two moments for each weight), the tokenizers, the merged model."""
    arguments, model = trainer.args, trainer.model
    adapter = sum(one.numel() * 4 for one in model.parameters() if one.requires_grad)
    files = [one for one in Path(base.path or "").glob("*.json") if one.is_file()]
    tokenizer = sum(one.stat().st_size for one in files)
    kept = {"no": 0, "epoch": math.ceil(arguments.num_train_epochs), "steps": steps // arguments.save_steps + 1}
    number = kept[str(getattr(arguments.save_strategy, "value", arguments.save_strategy))]
    number = min(number, trainer.keep_checkpoints or number)
    merged = sum(one.stat().st_size for one in Path(base.path or "").glob("*.safetensors")) if merge else 0
    return adapter + tokenizer + number * (3 * adapter + tokenizer) + merged
