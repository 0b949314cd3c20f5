"""What `train --plan` says: time, memory, disk and download, and what would change them; in words, or as JSON."""

from __future__ import annotations

import json
import shutil
from typing import Any

import torch

from lora_practice.errors import text
from lora_practice.machine import Machine, matmul_gflops
from lora_practice.preflight import Estimate, lengths_of
from lora_practice.record import about
from lora_practice.terminal import aligned
from lora_practice.trainer import PracticeTrainer
from lora_practice.variants import moves_base, ranks_saved


def said(plan: Estimate, trainer: PracticeTrainer, settings: Any, machine: Machine) -> str:
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


def as_json(plan: Estimate, trainer: PracticeTrainer, settings: Any, machine: Machine) -> str:
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
    there = next(one for one in trainer.folder.path.absolute().parents if one.exists())
    return round(memory / 1e6), round(shutil.disk_usage(there).free / 1e6)


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
    if moves_base(settings):
        return text(f"不能和 {settings.init_lora_weights} 一起用", f"not with {settings.init_lora_weights}")
    if machine.precision == "bf16":
        return text("已经在用", "is used already")
    if not machine.facts.cpu_bf16 and (machine.facts.capability or (0, 0)) < (8, 0):
        return text("这台机器没有 bf16 指令，只会更慢", "this machine has no bf16 instructions: only slower")
    ratio = matmul_gflops(machine.device, "bfloat16") / matmul_gflops(machine.device)
    return text(
        f"矩阵乘法在这台机器上快 {ratio:.1f} 倍（刚测的）",
        f"matrix products are {ratio:.1f} times as fast here (measured now)",
    )
