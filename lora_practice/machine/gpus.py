"""NVIDIA's card families: the speed of their fp16, and the drivers and torch builds that support them.

Sources: CUDA C Programming Guide, "Throughput of Native Arithmetic Instructions" (fp16); NVIDIA's CUDA Compatibility
guide and Unix driver deprecation schedule (drivers); PyTorch's RELEASE.md and pytorch/pytorch#157517, #172352, #190385
(which build holds kernels for what). No torch is imported here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional

from lora_practice.console.text import text

Capability = tuple[int, int]
WHEELS = "https://download.pytorch.org/whl/"
# Turing without tensor cores (TU116, TU117): GeForce GTX 16xx and MX450/550, Quadro and NVIDIA T400 to T2000
_SMALL_TURING = re.compile(r"GTX 16\d\d|\bMX[45]50\b|\bT(400|500|550|600|1000|1200|2000)\b")


@dataclass(frozen=True)
class Build:
    """torch wheels for one CUDA version: their torch versions, the cards they have kernels for, the oldest driver."""

    name: str
    first: tuple[int, int]
    last: tuple[int, int]
    oldest_card: Capability
    newest_card: Capability
    driver: int


ANY = (99, 0)
# Best first. cu128 (torch 2.7 to 2.10) is listed for the only case that needs it: RTX 50xx with a driver before 580.
BUILDS = (
    Build("cu130", (2, 9), ANY, (7, 5), (12, 9), 580),
    Build("cu128", (2, 7), (2, 10), (10, 0), (12, 9), 570),
    Build("cu126", (2, 6), (2, 14), (5, 0), (9, 0), 525),
)
# torch versions tried in this order when the installed one has no such build; Python 3.9 has none after 2.8
TRIED = ("2.13.0", "2.10.0", "2.8.0")


def weak_half(gpu: str, capability: Capability) -> str:
    """Why this card should train in fp32, as a sentence; empty where its fp16 is fast and sound."""
    if capability[0] == 5:
        return text("这张卡没有 fp16 运算单元", "this card has no fp16 arithmetic")
    if capability == (6, 1):
        return text("这张卡的 fp16 运算比 fp32 慢 64 倍", "this card's fp16 arithmetic is 64 times slower than fp32")
    if capability == (7, 5) and _SMALL_TURING.search(gpu):
        return text("这类卡的 fp16 容易算出 NaN", "fp16 is known to give NaN on these cards")
    return ""


def pip_line(capability: Capability, driver: Optional[int], torch: str, python: tuple[int, int]) -> str:
    """The pip command that installs a torch for this card and driver; empty if there is none.

    The installed torch version is kept if it exists in the build that is needed, so that nothing else changes.

    Args:
        driver: branch of the installed driver, like 535; None if it is unknown.
        torch: installed version, like "2.13.0+cpu".
        python: like (3, 11).
    """
    candidates = (torch.partition("+")[0], *(one for one in TRIED if python >= (3, 10) or one == "2.8.0"))
    for build in BUILDS:
        if not build.oldest_card <= capability <= build.newest_card or (driver or build.driver) < build.driver:
            continue
        for version in candidates:
            if build.first <= release(version) <= build.last:
                wheel = f"torch=={version}+{build.name}"
                return f"pip install {wheel} --extra-index-url {WHEELS}{build.name}"
    return ""


def oldest_driver(cuda: str, capability: Capability) -> int:
    """The oldest driver branch for this card and a torch of this CUDA, like "12.6" (minor versions are compatible)."""
    for_card = 570 if capability >= (10, 0) else 0
    return max(for_card, {11: 450, 12: 525}.get(release(cuda)[0], 580))


def release(version: str) -> tuple[int, int]:
    """Major and minor of a version: (2, 13) for "2.13.0+cu126"; (0, 0) for anything else."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def runs_on(capability: Capability, kernels: tuple[str, ...]) -> bool:
    """Whether a torch built for `kernels` runs on a card of this compute capability.

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
