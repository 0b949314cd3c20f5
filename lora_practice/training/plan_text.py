"""Shows an estimate: what `--plan` prints, as text or JSON, and a warning where the disk is too small."""

from __future__ import annotations

import json

import torch

from lora_practice.console.terminal import aligned
from lora_practice.console.text import counted, tell, text
from lora_practice.machine.device import Machine, bf16_speed_text
from lora_practice.machine.speed import bf16_speed
from lora_practice.model.pissa import changes_base, ranks_saved
from lora_practice.run.record import about
from lora_practice.storage import disk
from lora_practice.training.plan import Estimate, checkpoints_written, most_checkpoints, row_lengths
from lora_practice.training.settings import TrainingSettings
from lora_practice.training.trainer import PracticeTrainer

MANY = 5  # checkpoints that are kept without a word


def show_plan(plan: Estimate, trainer: PracticeTrainer, settings: TrainingSettings, machine: Machine) -> int:
    """Print the plan, with --json as JSON on stdout; returns the exit code 0."""
    if settings.json:
        print(plan_as_json(plan, trainer, settings, machine))
    else:
        tell(plan_text(plan, trainer, settings, machine))
    return 0


def plan_text(plan: Estimate, trainer: PracticeTrainer, settings: TrainingSettings, machine: Machine) -> str:
    """The plan for a person: time, memory, disk, download, and settings that would change them."""
    free_memory_mb, free_disk_mb = _free_mb(trainer, machine)
    step, peak = f"{plan.step_seconds:.2g}", plan.peak_memory_mb
    just_now = text(f"刚刚下载了 {plan.download_mb} MB", f"{plan.download_mb} MB, done just now")
    facts = [
        (
            text("时间", "time"),
            about(plan.seconds) + text(f"：{plan.steps} 步，每步 {step} 秒", f": {plan.steps} steps of {step} s"),
        ),
        (
            text("内存", "memory"),
            text(
                f"最多 {peak} MB；现在空闲 {free_memory_mb} MB",
                f"{peak} MB at most; {free_memory_mb} MB are free now",
            ),
        ),
        (
            text("磁盘", "disk"),
            f"{plan.disk_mb} MB" + text(f"；空闲 {free_disk_mb} MB", f"; {free_disk_mb} MB are free"),
        ),
        (
            text("下载", "download"),
            just_now if plan.download_mb else text("不需要，都已在本机", "none, everything is on this machine"),
        ),
    ]
    lines = [f"  {line}" for line in aligned(facts)]
    lines.append(
        text("哪些参数会改变它（按实测的一步推算）：", "what would change it, derived from the measured step:")
    )
    lines += [f"  {flag}\n      {effect}" for flag, effect in changes(plan, trainer, settings, machine)]
    without_plan = text("去掉 --plan 就开始训练。", "Leave out --plan to train.")
    return "\n".join([*lines, text("这只是计划，什么都没有写。", "Only a plan: nothing was written."), without_plan])


def plan_as_json(plan: Estimate, trainer: PracticeTrainer, settings: TrainingSettings, machine: Machine) -> str:
    """The plan for a program: one JSON object."""
    free_memory_mb, free_disk_mb = _free_mb(trainer, machine)
    whole = {
        "device": machine.device,
        "precision": machine.precision,
        "path": trainer.engine.ops.name if trainer.engine else "plain",
        "max_length": settings.max_length,
        **plan.record(),
        "free_memory_mb": free_memory_mb,
        "free_disk_mb": free_disk_mb,
        "changes": [{"flag": flag, "effect": effect} for flag, effect in changes(plan, trainer, settings, machine)],
    }
    return json.dumps(whole, ensure_ascii=False, indent=2)


def short_of_disk(plan: Estimate, trainer: PracticeTrainer) -> str:
    """A warning for a run that will fill the disk, else ""; a resumed run has written a part of it already."""
    free = round(disk.free_bytes(trainer.folder.path) / 1e6)
    if trainer.folder.resumed_record or plan.disk_mb <= free:
        return ""
    fewer_would_do = most_checkpoints(trainer, plan.steps) > 2  # with --save_total_limit 1 there are two for a moment
    or_fewer = text("，或 --save_total_limit 1", ", or --save_total_limit 1") if fewer_would_do else ""
    line = text(
        f"磁盘只剩 {free} MB，保存时会因空间不足而停止：请腾出空间",
        f"only {free} MB of disk are free: a save will stop the run; free some",
    )
    return line + or_fewer


def many_checkpoints(plan: Estimate, trainer: PracticeTrainer) -> str:
    """A line where a run keeps more than MANY checkpoints, with the flag that keeps fewer; else ""."""
    number = checkpoints_written(trainer, plan.steps)
    if trainer.keep_checkpoints or number <= MANY:
        return ""
    by_epoch = str(getattr(trainer.args.save_strategy, "value", trainer.args.save_strategy)) == "epoch"
    steps, size = int(trainer.args.save_steps), number * plan.checkpoint_mb
    often = text("每个 epoch ", "each epoch") if by_epoch else text(f"每 {steps} 步", f"every {counted(steps, 'step')}")
    return text(
        f"{often}存一个检查点，共 {number} 个，约 {size} MB；可以加 --save_total_limit 2",
        f"a checkpoint {often}, {number} in all, about {size} MB; --save_total_limit 2 keeps fewer",
    )


def changes(
    plan: Estimate, trainer: PracticeTrainer, settings: TrainingSettings, machine: Machine
) -> list[tuple[str, str]]:
    """(flag, its effect) for length, rank, batch and precision. Tokens and bytes are counted, times are derived."""
    larger_batch = f"--per_device_train_batch_size {2 * settings.per_device_train_batch_size}"
    passes = text("一次前向占的激活内存约翻倍，时间不变", "about twice the memory of activations, the same time")
    if trainer.engine is not None:
        passes = text("快速路径自己限制内存：内存和时间都不变", "nothing else: the fast path bounds its own passes")
    return [
        _shorter_rows(plan, trainer),
        _higher_rank(trainer, settings),
        (larger_batch, text("步数减半；", "half the steps; ") + passes),
        ("--bf16", _bf16(machine, settings)),
    ]


def _shorter_rows(plan: Estimate, trainer: PracticeTrainer) -> tuple[str, str]:
    lengths = row_lengths(trainer)
    shorter = 2 ** max(3, (max(lengths) - 1).bit_length() - 1)  # the next power of two below the longest row
    cut = sum(length > shorter for length in lengths)
    seconds = plan.seconds * sum(min(length, shorter) for length in lengths) / sum(lengths)
    effect = text(f"截掉 {cut} 行的结尾，{about(seconds)}", f"cuts {cut} rows, {about(seconds)}")
    return f"--max_length {shorter}", effect


def _higher_rank(trainer: PracticeTrainer, settings: TrainingSettings) -> tuple[str, str]:
    parameters = list(trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    # a byte of a base in 4 bits holds two weights
    frozen = sum(
        parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)
        for parameter in parameters
        if not parameter.requires_grad
    )
    # forward and backward use each frozen weight twice, a LoRA weight three times
    slower = 3 * trained / (2 * frozen + 3 * trained)
    size = trained * 4 * ranks_saved(trainer.model) / 1e6
    effect = text(
        f"适配器 {2 * size:.0f} MB（现在 {size:.0f} MB），慢约 {slower:.0%}",
        f"an adapter of {2 * size:.0f} MB, not {size:.0f} MB, about {slower:.0%} slower",
    )
    return f"--lora_r {2 * settings.lora_r}", effect


def _bf16(machine: Machine, settings: TrainingSettings) -> str:
    if changes_base(settings):
        return text(f"不能和 {settings.init_lora_weights} 一起用", f"not with {settings.init_lora_weights}")
    if machine.precision == "bf16":
        return text("已经在用", "is used already")
    if not machine.facts.cpu_bf16 and (machine.facts.capability or (0, 0)) < (8, 0):
        return text("这台机器没有 bf16 指令，只会更慢", "this machine has no bf16 instructions: only slower")
    return bf16_speed_text(machine.facts.bf16_speed or bf16_speed(machine.device))


def _free_mb(trainer: PracticeTrainer, machine: Machine) -> tuple[int, int]:
    """Free memory and free disk in MB."""
    memory = machine.facts.gpu_memory if machine.device == "cuda" else machine.facts.memory
    return round(memory / 1e6), round(disk.free_bytes(trainer.folder.path) / 1e6)
