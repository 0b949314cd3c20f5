"""Machines that are only described: what `read_facts` and `read_surroundings` would find on them."""

from __future__ import annotations

from typing import Any, Optional

from lora_practice.compat import LIBRARIES
from lora_practice.machine.doctor.surroundings import Hub, Need, Place, Surroundings
from lora_practice.machine.facts import Facts

GB = 1 << 30
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU128 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
KERNELS = {"12.6": CU126, "12.8": CU128, "13.0": CU130}


def card(gpu: str, major: int, minor: int, cuda: str, **more: Any) -> Facts:
    """A machine with this card and a torch 2.13 of this CUDA that reaches it."""
    facts: dict[str, Any] = {"cpu": "i5-8400", "cores": 6, "board_cores": 6, "instructions": ("avx2",)}
    facts.update(memory=12 * GB, memory_total=16 * GB, gpu_memory=6 * GB, driver="580.95.05")
    facts.update(torch=f"2.13.0+cu{cuda.replace('.', '')}", cuda=cuda, cuda_usable=True)
    return Facts(gpu=gpu, capability=(major, minor), kernels=KERNELS.get(cuda, ()), **{**facts, **more})


def unreached(gpu: str, major: int, minor: int, cuda: str, **more: Any) -> Facts:
    """The same, but torch does not reach the card."""
    return card(gpu, major, minor, cuda, cuda_usable=False, **more)


GTX_970 = card("NVIDIA GeForce GTX 970", 5, 2, "12.6")
GTX_1060 = card("NVIDIA GeForce GTX 1060 6GB", 6, 1, "12.6")
GTX_1060_NEW_TORCH = card("NVIDIA GeForce GTX 1060 6GB", 6, 1, "12.8", torch="2.8.0+cu128")
GTX_1080_TI = card("NVIDIA GeForce GTX 1080 Ti", 6, 1, "12.6", gpu_memory=11 * GB)
GTX_1650 = card("NVIDIA GeForce GTX 1650", 7, 5, "13.0", gpu_memory=4 * GB)
RTX_2060 = card("NVIDIA GeForce RTX 2060", 7, 5, "13.0")
T4 = card("Tesla T4", 7, 5, "12.8", gpu_memory=15 * GB)
P100 = card("Tesla P100-PCIE-16GB", 6, 0, "12.6", gpu_memory=16 * GB)
V100 = card("Tesla V100-SXM2-16GB", 7, 0, "12.6", gpu_memory=16 * GB)
RTX_3060 = card("NVIDIA GeForce RTX 3060", 8, 6, "13.0", gpu_memory=12 * GB)


def without_card(cpu: str, cores: int, memory: float, *instructions: str, **more: Any) -> Facts:
    """A machine with a CPU build of torch; `memory` in GB, of which a fifth is taken."""
    facts = {"board_cores": cores, "torch": "2.13.0+cpu", "instructions": instructions, **more}
    return Facts(cpu=cpu, cores=cores, memory=int(memory * 0.8 * GB), memory_total=int(memory * GB), **facts)


OLD_LAPTOP = without_card("Celeron N3350", 2, 4)
LAPTOP = without_card("i5-8250U", 4, 8, "avx2")
AVX512_CPU = without_card("i7-1165G7", 8, 16, "avx2", "avx512f")
BF16_CPU = without_card("Xeon 8481C", 16, 32, "avx2", "avx512f", "avx512_bf16", cpu_bf16=True)
MAC = without_card("arm", 8, 16, instructions=None)
SMALL_CONTAINER = without_card("EPYC", 2, 2, "avx2", board_cores=64, memory_limit=2 * GB)
WSL_NO_CARD = without_card("i5-8250U", 8, 8, "avx2", wsl=True)
NO_DRIVER = Facts(cores=8, memory=16 * GB, card_on_bus=True, torch="2.13.0+cu130", cuda="13.0")
CPU_BUILD = unreached("NVIDIA GeForce GTX 1060 6GB", 6, 1, "", torch="2.13.0+cpu")
DRIVER_TOO_OLD = unreached("NVIDIA GeForce RTX 3060", 8, 6, "13.0", driver="535.183.01")


def around(**more: Any) -> Surroundings:
    """Everything in order, but for `more`."""
    fine = {name: Place(name, 50 * GB, True, 0) for name in ("output", "cache", "hub_cache", "datasets_cache")}
    hub = Hub("https://huggingface.co", True, False, "none")
    here = (Need("a model", True, 1.0), Need("chats", True, 1.0))
    versions: dict[str, Optional[str]] = dict.fromkeys(LIBRARIES, "1.0")
    parts: dict[str, Any] = {
        **fine,
        "hub": hub,
        "embedded": here,
        "wanted": here,
        "compiler": "g++",
        "versions": versions,
        "finished": False,
    }
    return Surroundings(**{**parts, **more})
