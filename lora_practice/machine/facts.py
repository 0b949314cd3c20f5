"""Facts about this machine, read into one frozen value. Nothing is decided here; what cannot be read is unknown."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from lora_practice.machine.memory import group_folders, memory_state, read_system_file
from lora_practice.machine.speed import bf16_speed

GPU_TOOL_SECONDS = 5
_WSL_TOOLS = "/usr/lib/wsl/lib"  # nvidia-smi's folder inside WSL, not always in PATH


@dataclass(frozen=True)
class Facts:
    """Facts about a machine. Memory in bytes; `capability` like (7, 5); `kernels` like ("sm_75",).

    `memory` is what can still be taken, `memory_total` what this process could ever have, `memory_limit` a container's
    limit or 0, `memory_ulimit` what is left below `ulimit -v` or 0. `instructions` is None where they cannot be read.
    `gpu` is the first NVIDIA card that torch or the driver names; `cuda` the CUDA version that torch was built with,
    empty for a CPU build. `busy_cores` is how much of `cores` other programs use just now; `bf16_speed` the speed of
    the CPU's matmul in bf16 over fp32; both are 0 where they were not measured.
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
    busy_cores: float = 0.0
    bf16_speed: float = 0.0


def read_facts(driver_too: bool = False, measure: bool = False) -> Facts:
    """Read this machine's facts. Imports torch.

    Args:
        driver_too: ask NVIDIA's driver even where torch sees a card.
        measure: also measure `busy_cores` and `bf16_speed`, which takes half a second.
    """
    name, flags = _cpu_flags()
    known = _torch_facts()
    if flags:
        known["instructions"] = _instructions(flags)
    if driver_too or not known.get("cuda_usable"):
        known = {**_driver_facts(), **known}
    memory = memory_state()
    cpu_bf16 = bool(flags & {"avx512_bf16", "amx_bf16"})
    if measure and cpu_bf16 and known.get("torch") and not known.get("cuda_usable"):
        known["bf16_speed"] = bf16_speed()
    return Facts(
        cores=usable_cores(),
        board_cores=os.cpu_count() or 1,
        memory=memory.free,
        memory_total=memory.total,
        memory_limit=memory.limit,
        memory_ulimit=memory.ulimit_left,
        cpu=name,
        cpu_bf16=cpu_bf16,
        busy_cores=busy_cores() if measure else 0.0,
        card_on_bus=_card_on_bus(),
        card_hidden=os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"),
        wsl="microsoft" in read_system_file("/proc/sys/kernel/osrelease").lower(),
        python=sys.version_info[:2],
        **known,
    )


def _torch_facts() -> dict:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library does not load
        return {"torch_trouble": (str(error).strip() or type(error).__name__).splitlines()[0]}
    # only Linux lists the processor's instruction sets in a file
    sets = {"AVX2": ("avx2",), "AVX512": ("avx2", "avx512f")}.get(torch.backends.cpu.get_cpu_capability())
    facts: dict = {"torch": torch.__version__, "cuda": torch.version.cuda or "", "instructions": sets}
    facts["cuda_usable"] = torch.cuda.is_available()
    if facts["cuda_usable"]:
        properties = torch.cuda.get_device_properties(0)
        facts.update(gpu=properties.name, gpu_memory=properties.total_memory)
        facts.update(capability=torch.cuda.get_device_capability(0), kernels=tuple(torch.cuda.get_arch_list()))
    return facts


def usable_cores() -> int:
    """Number of cores that this process may use, by its affinity and the container's quota."""
    count = len(_allowed_cores())
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


def busy_cores(seconds: float = 0.2) -> float:
    """How many of the usable cores other programs use now, as a number of whole cores, watched for a moment.

    Where a container's quota allows fewer cores than the board has, those that are idle elsewhere make up for it.
    """
    cores, own = _allowed_cores(), sum(os.times()[:2])
    busy, started = _busy_seconds(cores), time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - started
    others = _busy_seconds(cores) - busy - (sum(os.times()[:2]) - own)
    usable = usable_cores()
    idle = len(cores) - others / passed
    return min(float(usable), max(0.0, usable - idle))


def _allowed_cores() -> set[int]:
    """Numbers of the cores that this process's affinity allows; all of them where there is no affinity (macOS)."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _busy_seconds(cores: set[int]) -> float:
    """Seconds since the system's start in which these cores were not idle, added up."""
    busy = 0.0
    for line in read_system_file("/proc/stat").splitlines():
        core = re.match(r"cpu(\d+) ", line)
        if core and int(core.group(1)) in cores:
            user, nice, system, _idle, _iowait, *others = map(int, line.split()[1:9])
            busy += (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")
    if busy:
        return busy
    import psutil  # macOS and Windows, where all cores are allowed

    times = psutil.cpu_times()
    return times.user + times.system + getattr(times, "nice", 0.0)


def _driver_facts() -> dict:
    """Name, memory, capability and driver version of the first card as the driver tells them; torch may see none."""
    version = re.search(r"\b(\d{3,}\.\d[\d.]*)", read_system_file("/proc/driver/nvidia/version"))
    found: dict = {"driver": version.group(1), "gpu": "NVIDIA"} if version else {}
    tool = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=_WSL_TOOLS)
    if not tool:
        return found
    # drivers before 510 do not know compute_cap and refuse the whole query
    for fields in ("name,driver_version,memory.total,compute_cap", "name,driver_version,memory.total"):
        command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=GPU_TOOL_SECONDS)
        except (OSError, subprocess.SubprocessError) as error:
            return {**found, "driver_trouble": f"nvidia-smi: {type(error).__name__}"}
        answer = (done.stdout.strip() or done.stderr.strip() or f"nvidia-smi: {done.returncode}").splitlines()[0]
        values = [value.strip() for value in answer.split(",")]
        if done.returncode == 0 and len(values) == len(fields.split(",")):
            return {**found, **_card(values)}
    return {**found, "driver_trouble": answer}


def _card(values: list[str]) -> dict:
    card: dict = {"gpu": values[0], "driver": values[1]}
    if values[2].isdigit():  # MiB
        card["gpu_memory"] = int(values[2]) << 20
    capability = re.fullmatch(r"(\d+)\.(\d)", values[3]) if len(values) > 3 else None
    if capability:
        card["capability"] = (int(capability.group(1)), int(capability.group(2)))
    return card


def _card_on_bus() -> bool:
    """Whether an NVIDIA display controller is on the PCI bus, with or without a driver (Linux only)."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        vendor, kind = read_system_file(f"{device}/vendor").strip(), read_system_file(f"{device}/class")
        if vendor == "0x10de" and kind.startswith("0x03"):
            return True
    return False


def _instructions(flags: set[str]) -> tuple[str, ...]:
    """The instruction sets that matter here, of those that the processor has."""
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
