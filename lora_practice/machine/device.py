"""Decides device and precision, with the reason: pure functions of the facts that `read_facts` found."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from lora_practice.console.errors import UserError
from lora_practice.console.text import counted, text
from lora_practice.machine import gpus
from lora_practice.machine.facts import Facts
from lora_practice.machine.gpu_problems import gpu_problem, sm_name

SAME_SPEED = (0.95, 1.2)  # bf16 over fp32: between them --bf16 is neither advised nor advised against
BUSY_CORES = 0.5  # cores' worth of other programs' work from which on it is mentioned


@dataclass(frozen=True)
class Machine:
    """The decision: `device` is "cpu" or "cuda", `precision` "fp32", "fp16" or "bf16", `reason` a sentence.

    `advice` has a line for each thing that would make training better here, such as a flag or a command; often empty.
    """

    device: str
    precision: str
    reason: str
    facts: Facts
    advice: str = ""


def choose_device(facts: Facts, bf16: bool = False, device: str = "auto", weights: int = 0) -> Machine:
    """Choose device and precision: CUDA if its card can be used, else CPU with fp32; never MPS.

    A card trains in fp16, or in fp32 where its fp16 is slow or known for NaN and the model fits. bf16 is used only
    when asked for and only where the hardware has it: from compute capability 8.0 on, since
    `torch.cuda.is_bf16_supported()` is also True on a T4, which only emulates bf16.

    Args:
        facts: what is known of the machine.
        bf16: the user asks for bf16.
        device: "auto", "cpu" or "cuda".
        weights: bytes of the model's weights in half precision; 0 if unknown.

    Raises:
        UserError: `device="cuda"` is asked for where no card can be used, or bf16 where there is none.
    """
    problem = gpu_problem(facts)
    if device == "cuda" and problem:
        other = text("用 --device cpu", "use --device cpu")
        fix = f"{other}{text('，或 ', ', or ')}{problem.cure}" if problem.cure else other
        raise UserError(problem.what, fix=fix)
    if not problem and device != "cpu":
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
    card_advice = ""
    if problem and problem.cure:
        card_advice = text(f"要用显卡：{problem.cure}", f"to use the card: {problem.cure}")
    advice = [one for one in (card_advice, _bf16_advice(facts, bf16), load_advice(facts)) if one]
    reason = text("按要求用 CPU", "CPU as asked")
    if problem:
        reason = problem.what
        if facts.gpu or facts.card_on_bus:
            reason += text("，改用 CPU", ": using the CPU")
    return Machine("cpu", "bf16" if bf16 else "fp32", reason, facts, "\n".join(advice))


def _bf16_advice(facts: Facts, asked_for: bool) -> str:
    """What `--bf16` is worth on this CPU by the measured speed of matmul; "" where it hardly matters."""
    speed = facts.bf16_speed
    if not facts.cpu_bf16:
        return ""
    if asked_for:
        return bf16_speed_text(speed) if 0 < speed < SAME_SPEED[0] else ""
    if not speed:
        zh, en = "--plan 会实测 --bf16 快不快", "--plan measures whether --bf16 is faster"
        return text(f"这颗 CPU 有 bf16 指令：{zh}", f"this CPU has bf16 instructions: {en}")
    if speed <= SAME_SPEED[1]:
        return ""
    return text(f"可以加 --bf16：{bf16_speed_text(speed)}", f"--bf16 helps here: {bf16_speed_text(speed)}")


def bf16_speed_text(speed: float) -> str:
    """The speed of matmul in bf16 over fp32, as a sentence that says which is faster."""
    zh = f"矩阵乘法用 bf16 的速度是 fp32 的 {speed:.1f} 倍（实测）"
    en = f"matrix multiplication in bf16 runs at {speed:.1f} times the speed of fp32 (measured)"
    if speed < SAME_SPEED[0]:
        return text(f"{zh}：反而更慢", f"{en}: slower")
    return text(zh, en)


def load_advice(facts: Facts, is_estimated: bool = False) -> str:
    """What other programs' use of the CPU means for training; "" while they leave the usable cores alone.

    Args:
        is_estimated: the time of the training was measured while they ran.
    """
    if facts.busy_cores < BUSY_CORES:
        return ""
    busy = f"{facts.busy_cores:.1f}"
    if is_estimated:
        return text(
            f"其他程序正占用 {busy} 核（可用 {facts.cores} 核）：时间是在这种情况下估计的，关掉它们会更快",
            f"other programs keep {busy} of {counted(facts.cores, 'core')} busy, which the expected time includes: "
            "it is faster without them",
        )
    return text(
        f"其他程序正占用 {busy} 核（可用 {facts.cores} 核）：训练可能要用两倍甚至更长的时间",
        f"other programs keep {busy} of {counted(facts.cores, 'core')} busy: training may take twice as long or more",
    )


def _on_card(facts: Facts, bf16: bool, weights: int) -> Machine:
    assert facts.capability is not None  # otherwise gpu_problem would have found a problem
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
        advice = text("这张卡支持 bf16：加 --bf16 比 fp16 更稳定", "this card has bf16: --bf16 is steadier than fp16")
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
    """Whether a model of `weights` bytes in half precision takes less than 40% of the card's memory in fp32."""
    return weights * 2 < gpu_memory * 0.4 or not weights


def _dotted(facts: Facts) -> str:
    return ".".join(map(str, facts.capability or "?"))


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
