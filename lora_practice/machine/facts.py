"""What is true of this machine, read into one frozen value. Decides nothing; what cannot be read stays unknown."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from lora_practice.machine.memory import group_folders, memory_state, read_system_file

GPU_TOOL_SECONDS = 5
_WSL_TOOLS = "/usr/lib/wsl/lib"  # not in every PATH


@dataclass(frozen=True)
class Facts:
    """What is true of a machine. Memory in bytes; `capability` like (7, 5); `kernels` like ("sm_75",).

    `memory` is what can still be taken, `memory_total` what this process could ever have, `memory_limit` a container's
    limit or 0, `memory_ulimit` what is left below `ulimit -v` or 0. `instructions` is None where they cannot be read.
    `gpu` is the first NVIDIA card that torch or the driver names; `cuda` the CUDA version that torch was built with,
    empty for a CPU build.
    """

    cores: int = 1
    board_cores: int = 1
    memory: int = 0
    memory_total: int = 0
    memory_limit: int = 0
    memory_ulimit: int = 0
    cpu: str = ""
    cpu_bf16: bool = False
    instructions: Optional[tuple[str, ...]] = None
    cuda_usable: bool = False
    gpu: str = ""
    gpu_memory: int = 0
    capability: Optional[tuple[int, int]] = None
    kernels: tuple[str, ...] = ()
    driver: str = ""
    driver_trouble: str = ""
    card_on_bus: bool = False
    card_hidden: bool = False
    wsl: bool = False
    torch: str = ""
    cuda: str = ""
    torch_trouble: str = ""
    python: tuple[int, int] = (3, 11)


def read_facts(driver_too: bool = False) -> Facts:
    """Read this machine's facts (imports torch). The driver is asked if torch sees no card, or if told to."""
    name, flags = _cpu_flags()
    known = _torch_facts()
    if flags:
        known["instructions"] = _instructions(flags)
    if driver_too or not known.get("cuda_usable"):
        known = {**_driver_facts(), **known}
    memory = memory_state()
    return Facts(
        cores=usable_cores(),
        board_cores=os.cpu_count() or 1,
        memory=memory.free,
        memory_total=memory.total,
        memory_limit=memory.limit,
        memory_ulimit=memory.ulimit_left,
        cpu=name,
        cpu_bf16=bool(flags & {"avx512_bf16", "amx_bf16"}),
        card_on_bus=_card_on_bus(),
        card_hidden=os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"),
        wsl="microsoft" in read_system_file("/proc/sys/kernel/osrelease").lower(),
        python=sys.version_info[:2],
        **known,
    )


def _torch_facts() -> dict:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a library that it needs does not load
        return {"torch_trouble": (str(error).strip() or type(error).__name__).splitlines()[0]}
    # only Linux lists the processor's sets in a file
    sets = {"AVX2": ("avx2",), "AVX512": ("avx2", "avx512f")}.get(torch.backends.cpu.get_cpu_capability())
    facts: dict = {"torch": torch.__version__, "cuda": torch.version.cuda or "", "instructions": sets}
    facts["cuda_usable"] = torch.cuda.is_available()
    if facts["cuda_usable"]:
        properties = torch.cuda.get_device_properties(0)
        facts.update(gpu=properties.name, gpu_memory=properties.total_memory)
        facts.update(capability=torch.cuda.get_device_capability(0), kernels=tuple(torch.cuda.get_arch_list()))
    return facts


def usable_cores() -> int:
    """Cores this process may use: affinity and the container's quota, not what the board carries."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    for folder in group_folders(""):
        quota = read_system_file(f"{folder}/cpu.max").split()
        if len(quota) == 2 and quota[0].isdigit():
            count = min(count, max(1, int(quota[0]) // int(quota[1])))
    for folder in group_folders("cpu"):
        quota = [
            read_system_file(f"{folder}/cpu.cfs_quota_us").strip(),
            read_system_file(f"{folder}/cpu.cfs_period_us").strip(),
        ]
        if all(one.isdigit() for one in quota):  # -1: no quota
            count = min(count, max(1, int(quota[0]) // int(quota[1])))
    return count


def _driver_facts() -> dict:
    """What the driver itself says of the first card, where torch may see none: name, memory, capability, version."""
    version = re.search(r"\b(\d{3,}\.\d[\d.]*)", read_system_file("/proc/driver/nvidia/version"))
    found: dict = {"driver": version.group(1), "gpu": "NVIDIA"} if version else {}
    tool = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=_WSL_TOOLS)
    if not tool:
        return found
    # drivers before 510 do not know compute_cap, and refuse the whole question
    for fields in ("name,driver_version,memory.total,compute_cap", "name,driver_version,memory.total"):
        command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=GPU_TOOL_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            return {**found, "driver_trouble": f"nvidia-smi: {type(error).__name__}"}
        said = (done.stdout.strip() or done.stderr.strip() or f"nvidia-smi: {done.returncode}").splitlines()[0]
        values = [value.strip() for value in said.split(",")]
        if done.returncode == 0 and len(values) == len(fields.split(",")):
            return {**found, **_card(values)}
    return {**found, "driver_trouble": said}


def _card(values: list[str]) -> dict:
    card: dict = {"gpu": values[0], "driver": values[1]}
    if values[2].isdigit():  # MiB
        card["gpu_memory"] = int(values[2]) << 20
    capability = re.fullmatch(r"(\d+)\.(\d)", values[3]) if len(values) > 3 else None
    if capability:
        card["capability"] = (int(capability.group(1)), int(capability.group(2)))
    return card


def _card_on_bus() -> bool:
    """Whether an NVIDIA display controller is plugged in, driver or not (Linux)."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        if read_system_file(f"{device}/vendor").strip() == "0x10de" and read_system_file(f"{device}/class").startswith(
            "0x03"
        ):
            return True
    return False


def _instructions(flags: set[str]) -> tuple[str, ...]:
    """The sets that matter here, of all that the processor has."""
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
    return tuple(one for one in wanted if one in flags)


def _cpu_flags() -> tuple[str, set[str]]:
    name, flags = platform.processor() or platform.machine(), set()
    for line in read_system_file("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    return name, flags
