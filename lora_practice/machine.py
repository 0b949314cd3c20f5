"""The only place that decides device and precision, and says why.

`look()` reads the facts of this machine; `decide()` is a pure function of those facts.
"""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from lora_practice.errors import UserError, text


@dataclass(frozen=True)
class Facts:
    """What is true of a machine. Memory in bytes; `capability` like (7, 5); `kernels` like ("sm_75",)."""

    cores: int = 1
    memory: int = 0
    cpu: str = ""
    cpu_bf16: bool = False
    cuda_usable: bool = False
    gpu: str = ""
    gpu_memory: int = 0
    capability: Optional[tuple[int, int]] = None
    kernels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """A decision: `device` is "cpu" or "cuda", `precision` "fp32", "fp16" or "bf16", `reason` a sentence."""

    device: str
    precision: str
    reason: str
    facts: Facts
    advice: str = ""


def decide(facts: Facts, bf16: bool = False, device: str = "auto") -> Machine:
    """Choose device and precision: CUDA with fp16 if this card can run here, else CPU with fp32; MPS never.

    bf16 only when asked for, and only where the hardware has it: by capability >= 8, since
    `torch.cuda.is_bf16_supported()` also says yes to a T4, which only emulates it.

    Raises:
        UserError: `device="cuda"` is asked for where no card can be used.
    """
    on_card, why_not = _card_is_usable(facts)
    if device == "cuda" and not on_card:
        raise UserError(
            why_not,
            fix=text("用 --device cpu，或换一个支持这张卡的 torch", "use --device cpu, or another torch build"),
        )
    if on_card and device != "cpu":
        return _on_card(facts, bf16)
    reason = why_not or text("按要求用 CPU", "CPU as asked")
    if bf16 and not facts.cpu_bf16:
        raise UserError(
            text(
                "这颗 CPU 没有 bf16 指令，用 bf16 会更慢",
                "this CPU has no bf16 instructions; bf16 would only be slower",
            ),
            where="--bf16",
            fix=text("去掉 --bf16", "leave --bf16 out"),
        )
    advice = ""
    if facts.cpu_bf16 and not bf16:
        advice = text("这颗 CPU 有 bf16 指令：加 --bf16 会更快", "this CPU has bf16 instructions: --bf16 is faster")
    return Machine("cpu", "bf16" if bf16 else "fp32", reason, facts, advice)


def _on_card(facts: Facts, bf16: bool) -> Machine:
    major = facts.capability[0] if facts.capability else 0
    if bf16 and major < 8:
        raise UserError(
            text(
                f"{facts.gpu} 没有真正的 bf16（计算能力 {_dotted(facts)}，需要 8.0）",
                f"{facts.gpu} has no real bf16 (compute capability {_dotted(facts)}, 8.0 is needed)",
            ),
            where="--bf16",
            fix=text("去掉 --bf16，用 fp16", "leave --bf16 out: fp16 is used"),
        )
    advice = ""
    if major >= 8 and not bf16:
        advice = text("这张卡支持 bf16：加 --bf16 更稳", "this card has bf16: --bf16 is steadier than fp16")
    return Machine("cuda", "bf16" if bf16 else "fp16", f"{facts.gpu} (sm_{_sm(facts)})", facts, advice)


def _card_is_usable(facts: Facts) -> tuple[bool, str]:
    if not facts.gpu:
        return False, text("没有可用的 NVIDIA 显卡", "no usable NVIDIA card")
    if not facts.cuda_usable or facts.capability is None:
        return False, text(f"{facts.gpu} 不能用（驱动或 torch 不配）", f"{facts.gpu} cannot be used (driver or torch)")
    if facts.kernels and not runs_on(facts.capability, facts.kernels):
        return False, text(
            f"装的 torch 没有 {facts.gpu}（sm_{_sm(facts)}）的内核（只有 {'、'.join(facts.kernels)}），改用 CPU",
            f"the installed torch has no kernels for {facts.gpu} (sm_{_sm(facts)}), only for "
            f"{', '.join(facts.kernels)}: using the CPU",
        )
    return True, ""


def runs_on(capability: tuple[int, int], kernels: tuple[str, ...]) -> bool:
    """True if a torch built for `kernels` runs on a card of this compute capability.

    Binary code (sm_XY) runs on the same major version and an equal or higher minor; PTX (compute_XY) on
    anything newer (CUDA C Programming Guide, "Binary Compatibility" and "PTX Compatibility").
    """
    major, minor = capability
    for kernel in kernels:
        named = re.fullmatch(r"(sm|compute)_([0-9]+)([0-9])[af]?", kernel)
        if not named:
            continue
        built_major, built_minor = int(named.group(2)), int(named.group(3))
        if named.group(1) == "sm" and built_major == major and built_minor <= minor:
            return True
        if named.group(1) == "compute" and (built_major, built_minor) <= (major, minor):
            return True
    return False


def _sm(facts: Facts) -> str:
    return "".join(map(str, facts.capability or "?"))


def _dotted(facts: Facts) -> str:
    return ".".join(map(str, facts.capability or "?"))


def look() -> Facts:
    """Read this machine's facts (imports torch)."""
    import torch

    gpu, gpu_memory, capability = "", 0, None
    kernels: tuple[str, ...] = ()
    usable = torch.cuda.is_available()
    if usable:
        capability = torch.cuda.get_device_capability(0)
        properties = torch.cuda.get_device_properties(0)
        gpu, gpu_memory = properties.name, properties.total_memory
        kernels = tuple(torch.cuda.get_arch_list())
    elif Path("/proc/driver/nvidia/version").exists():
        gpu = "NVIDIA"
    name, flags = _cpu_flags()
    return Facts(
        cores=usable_cores(),
        memory=available_memory(),
        cpu=name,
        cpu_bf16=bool(flags & {"avx512_bf16", "amx_bf16"}),
        cuda_usable=usable,
        gpu=gpu,
        gpu_memory=gpu_memory,
        capability=capability,
        kernels=kernels,
    )


def usable_cores() -> int:
    """Cores this process may use: affinity and the cgroup's quota, not what the board carries."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        count = min(count, max(1, int(quota[0]) // int(quota[1])))
    return count


def available_memory() -> int:
    """Bytes this process can still take: what is free, and what a container's limit leaves."""
    free = 0
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    if not free and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2  # macOS: no figure for "available"
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        left = int(limit) - int(used)
        for line in _read("/sys/fs/cgroup/memory.stat").splitlines():
            if line.startswith("inactive_file "):  # cached files count as used, but give way
                left += int(line.split()[1])
        free = min(free, left) if free else left
    return max(0, free)


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


def _cpu_flags() -> tuple[str, set[str]]:
    name, flags = platform.processor() or platform.machine(), set()
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    return name, flags


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
