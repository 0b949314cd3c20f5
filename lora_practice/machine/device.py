"""The only place that decides device and precision, and says why: pure functions of what `probe.look` found."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.machine import gpus
from lora_practice.machine.facts import Facts
from lora_practice.machine.gpu_problems import gpu_problem, sm_name


@dataclass(frozen=True)
class Machine:
    """A decision: `device` is "cpu" or "cuda", `precision` "fp32", "fp16" or "bf16", `reason` a sentence.

    `advice` is what would do better here, or empty: a flag, or the line that mends the card.
    """

    device: str
    precision: str
    reason: str
    facts: Facts
    advice: str = ""


def decide(facts: Facts, bf16: bool = False, device: str = "auto", weights: int = 0) -> Machine:
    """Choose device and precision: CUDA if this card can run here, else CPU with fp32; MPS never.

    On a card fp16, or fp32 where its fp16 is slow or known for NaN, unless the model does not fit so. bf16 only when
    asked for, and only where the hardware has it: by capability >= 8, since `torch.cuda.is_bf16_supported()` also
    says yes to a T4, which only emulates it.

    Args:
        facts: what the machine is.
        bf16: the user asks for it.
        device: "auto", "cpu" or "cuda".
        weights: bytes of the model's weights in half precision; 0 if unknown.

    Raises:
        UserError: `device="cuda"` is asked for where no card can be used, or bf16 where there is none.
    """
    trouble = gpu_problem(facts)
    if device == "cuda" and trouble:
        other = text("用 --device cpu", "use --device cpu")
        fix = f"{other}{text('，或 ', ', or ')}{trouble.cure}" if trouble.cure else other
        raise UserError(trouble.what, fix=fix)
    if not trouble and device != "cpu":
        return _on_card(facts, bf16, weights)
    if bf16 and not facts.cpu_bf16:
        raise UserError(
            text(
                "这颗 CPU 没有 bf16 指令，用 bf16 会更慢",
                "this CPU has no bf16 instructions; bf16 would only be slower",
            ),
            where="--bf16",
            fix=text("去掉 --bf16", "leave --bf16 out"),
        )
    advice = []
    if trouble and trouble.cure:
        advice.append(text(f"要用显卡：{trouble.cure}", f"to use the card: {trouble.cure}"))
    if facts.cpu_bf16 and not bf16:
        advice.append(
            text("这颗 CPU 有 bf16 指令：加 --bf16 会更快", "this CPU has bf16 instructions: --bf16 is faster")
        )
    reason = text("按要求用 CPU", "CPU as asked")
    if trouble:
        reason = trouble.what
        if facts.gpu or facts.card_on_bus:
            reason += text("，改用 CPU", ": using the CPU")
    return Machine("cpu", "bf16" if bf16 else "fp32", reason, facts, "\n".join(advice))


def _on_card(facts: Facts, bf16: bool, weights: int) -> Machine:
    assert facts.capability is not None  # or card_trouble would have said so
    card, has_bf16 = f"{facts.gpu} ({sm_name(facts)})", facts.capability[0] >= 8
    if bf16 and not has_bf16:
        raise UserError(
            text(
                f"{facts.gpu} 没有真正的 bf16（计算能力 {_dotted(facts)}，需要 8.0）",
                f"{facts.gpu} has no real bf16 (compute capability {_dotted(facts)}, 8.0 is needed)",
            ),
            where="--bf16",
            fix=text("去掉 --bf16", "leave --bf16 out"),
        )
    if bf16:
        return Machine("cuda", "bf16", text(f"{card}：按要求用 bf16", f"{card}: bf16 as asked"), facts)
    if has_bf16:
        advice = text("这张卡支持 bf16：加 --bf16 更稳", "this card has bf16: --bf16 is steadier than fp16")
        return Machine("cuda", "fp16", text(f"{card}：默认用 fp16", f"{card}: fp16 by default"), facts, advice)
    weak = gpus.weak_half(facts.gpu, facts.capability)
    if not weak:
        good = text(f"{card}：用 fp16，它够快；没有 bf16", f"{card}: fp16, which is fast on it; no bf16")
        return Machine("cuda", "fp16", good, facts)
    if fits_in_fp32(weights, facts.gpu_memory):
        return Machine("cuda", "fp32", text(f"{card}：{weak}，用 fp32", f"{card}: {weak}, so fp32"), facts)
    too_large = text("但模型按 fp32 放不下，用 fp16", "but the model does not fit in fp32, so fp16")
    return Machine("cuda", "fp16", text(f"{card}：{weak}，{too_large}", f"{card}: {weak}, {too_large}"), facts)


def fits_in_fp32(weights: int, gpu_memory: int) -> bool:
    """Whether a model of so many bytes in half precision leaves a card 60% of its memory when stored in fp32."""
    return weights * 2 < gpu_memory * 0.4 or not weights


def _dotted(facts: Facts) -> str:
    return ".".join(map(str, facts.capability or "?"))


def peak_memory() -> int:
    """Bytes of memory that this process held at most."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def matmul_gflops(device: str = "cpu", dtype: str = "float32") -> float:
    """Billions of operations a second in the matrix products of a small model, measured for 0.1 s."""
    import torch

    x, w = (torch.rand(shape, device=device).to(getattr(torch, dtype)) for shape in ((128, 576), (576, 1536)))
    float((x @ w)[0, 0])  # reading a value waits for the device
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        float((x @ w)[0, 0])
        rounds += 1
    return rounds * 2 * 128 * 576 * 1536 / (time.perf_counter() - started) / 1e9
