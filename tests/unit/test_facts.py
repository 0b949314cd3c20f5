"""The machine is read as it is: containers of both kinds, drivers of all ages, and this very machine."""

from __future__ import annotations

import os
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lora_practice.machine import facts as machine_facts
from lora_practice.machine import memory

GB = 1 << 30
ROOT = "/sys/fs/cgroup"
CPUINFO = "processor: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_bf16\n"


def pretend(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """Give the machine these files of /proc and /sys and no others, 8 cores, and 16 GB of which 8 are free."""
    for module in (machine_facts, memory):
        monkeypatch.setattr(module, "read_system_file", lambda path: {"/proc/cpuinfo": CPUINFO, **files}.get(path, ""))
    monkeypatch.setattr(machine_facts.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GB, available=8 * GB))


def test_without_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    assert machine_facts.usable_cores() == 8
    assert memory.memory_state() == (16 * GB, 8 * GB, 0, 0)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("", 8)],
)
def test_a_containers_cores(monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    pretend(monkeypatch, {f"{ROOT}/cpu.max": quota})
    assert machine_facts.usable_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("200000", 2), ("50000", 1), ("", 8)])
def test_an_old_containers_cores(monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    files = {f"{ROOT}/cpu/cpu.cfs_quota_us": f"{quota}\n", f"{ROOT}/cpu/cpu.cfs_period_us": "100000\n"}
    pretend(monkeypatch, files)
    assert machine_facts.usable_cores() == cores


@pytest.mark.parametrize(
    ("most", "used", "more", "expected"),
    [
        (f"{4 * GB}\n", f"{GB}\n", {}, (4 * GB, 3 * GB, 4 * GB)),
        # cached files give way
        (f"{4 * GB}", f"{4 * GB}", {"memory.stat": f"anon 1\ninactive_file {2 * GB}\n"}, (4 * GB, 2 * GB, 4 * GB)),
        # those read twice too, as after a download, but not mapped libraries
        (
            f"{4 * GB}",
            f"{4 * GB}",
            {"memory.stat": f"inactive_file {GB}\nactive_file {3 * GB}\nfile_mapped {GB}\n"},
            (4 * GB, 3 * GB, 4 * GB),
        ),
        ("max", f"{GB}", {}, (16 * GB, 8 * GB, 0)),
        (f"{100 * GB}", "0", {}, (16 * GB, 8 * GB, 0)),
        (f"{GB}", f"{2 * GB}", {}, (GB, 0, GB)),
    ],
)
def test_a_containers_memory(
    monkeypatch: pytest.MonkeyPatch, most: str, used: str, more: dict[str, str], expected: tuple[int, int, int]
) -> None:
    files = {"memory.max": most, "memory.current": used, **more}
    pretend(monkeypatch, {f"{ROOT}/{name}": content for name, content in files.items()})
    assert memory.memory_state() == (*expected, 0)


def test_an_old_containers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"limit_in_bytes": f"{2 * GB}", "usage_in_bytes": f"{GB}", "stat": f"total_inactive_file {GB // 2}\n"}
    pretend(monkeypatch, {f"{ROOT}/memory/memory.{name}": content for name, content in files.items()})
    assert memory.memory_state() == (2 * GB, 3 * GB // 2, 2 * GB, 0)
    files["stat"] += f"total_active_file {GB // 4}\ntotal_mapped_file {GB // 8}\n"
    pretend(monkeypatch, {f"{ROOT}/memory/memory.{name}": content for name, content in files.items()})
    assert memory.memory_state() == (2 * GB, GB + GB // 2 + GB // 8, 2 * GB, 0)
    pretend(monkeypatch, {f"{ROOT}/memory/memory.limit_in_bytes": "9223372036854771712"})
    assert memory.memory_state() == (16 * GB, 8 * GB, 0, 0)


def test_the_limit_of_a_group_above_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/self/cgroup": "0::/user.slice/job.scope\n", f"{ROOT}/user.slice/cpu.max": "300000 100000"}
    files.update({f"{ROOT}/user.slice/memory.max": f"{6 * GB}", f"{ROOT}/user.slice/memory.current": f"{2 * GB}"})
    job = f"{ROOT}/user.slice/job.scope/memory"
    pretend(monkeypatch, {**files, f"{job}.max": f"{5 * GB}", f"{job}.current": "0"})
    assert memory.memory_state() == (5 * GB, 4 * GB, 5 * GB, 0)
    assert machine_facts.usable_cores() == 3


def fake_tool(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An nvidia-smi that answers with this shell script."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setattr(machine_facts, "read_system_file", lambda path: "")


needs_sh = pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")


@needs_sh
def test_the_driver_names_a_card_that_torch_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(
        tmp_path, monkeypatch, 'echo "NVIDIA GeForce GTX 1060 6GB, 535.183.01, 6144, 6.1"; echo "second, 1, 1, 1"'
    )
    told = machine_facts._driver_facts()
    assert (told["gpu"], told["driver"]) == ("NVIDIA GeForce GTX 1060 6GB", "535.183.01")
    assert (told["gpu_memory"], told["capability"]) == (6 * GB, (6, 1))


@needs_sh
def test_an_old_driver_does_not_know_the_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        'case "$*" in *compute_cap*) echo "Field \\"compute_cap\\" is not a valid field to query."; exit 2;; esac\n'
    )
    fake_tool(tmp_path, monkeypatch, script + 'echo "Quadro K620, 390.157, [N/A]"')
    told = machine_facts._driver_facts()
    assert (told["gpu"], told["driver"]) == ("Quadro K620", "390.157")
    assert "capability" not in told and "gpu_memory" not in told  # unknown, which is not 0


@needs_sh
def test_what_the_driver_complains_of_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path, monkeypatch, 'echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18')
    told = machine_facts._driver_facts()
    assert told["driver_trouble"] == "Failed to initialize NVML: Driver/library version mismatch" and "gpu" not in told
    fake_tool(tmp_path, monkeypatch, "exit 9")
    assert machine_facts._driver_facts()["driver_trouble"] == "nvidia-smi: 9"
    module = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.256.02  Thu May  2 14:37:44 UTC 2024\n"
    monkeypatch.setattr(machine_facts, "read_system_file", lambda path: module)
    told = machine_facts._driver_facts()
    assert (told["driver_trouble"], told["gpu"], told["driver"]) == ("nvidia-smi: 9", "NVIDIA", "470.256.02")


@needs_sh
def test_a_driver_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_facts, "GPU_TOOL_SECONDS", 0.2)
    fake_tool(tmp_path, monkeypatch, "exec sleep 30")
    started = time.monotonic()
    assert machine_facts._driver_facts()["driver_trouble"] == "nvidia-smi: TimeoutExpired"
    assert time.monotonic() - started < 25  # also on a busy machine


def test_a_torch_that_does_not_load_is_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    facts = machine_facts.read_facts()
    assert "torch" in facts.torch_trouble
    assert (facts.torch, facts.cuda_usable) == ("", False)


def test_an_unreadable_file_says_nothing(tmp_path: Path) -> None:
    assert machine_facts.read_system_file(str(tmp_path / "missing")) == ""


def stat_lines(*cores: tuple[int, int, int]) -> str:
    """/proc/stat with (user, idle, steal) ticks for each core."""
    rows = [f"cpu{n} {user} 0 0 {idle} 0 0 0 {steal} 0 0" for n, (user, idle, steal) in enumerate(cores)]
    return "\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *rows, "intr 5"])


@pytest.mark.parametrize(
    ("allowed", "quota", "own", "after", "busy"),
    [
        (2, "", 0.0, ((0, 100, 0), (0, 100, 0)), 0.0),
        (2, "", 0.0, ((100, 0, 0), (0, 100, 0)), 1.0),
        (2, "", 0.0, ((50, 50, 0), (0, 50, 50)), 1.0),  # stolen by a virtual machine beside this one
        (2, "", 0.0, ((100, 0, 0), (100, 0, 0)), 2.0),
        (2, "", 1.5, ((100, 0, 0), (100, 0, 0)), 0.5),  # the rest of the time is this process's own
        (1, "", 0.0, ((0, 100, 0), (100, 0, 0)), 0.0),  # a core that this process may not use
        (2, "100000 100000", 0.0, ((100, 0, 0), (0, 100, 0)), 0.0),  # one core is all it may have, and one is idle
        (2, "100000 100000", 0.0, ((100, 0, 0), (100, 0, 0)), 1.0),
    ],
)
def test_busy_cores_are_those_that_other_programs_keep_from_this_one(
    monkeypatch: pytest.MonkeyPatch,
    allowed: int,
    quota: str,
    own: float,
    after: tuple[tuple[int, int, int], ...],
    busy: float,
) -> None:
    """One second passes, in which a core has 100 ticks."""
    seconds = [0.0]
    monkeypatch.setattr(machine_facts.os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    monkeypatch.setattr(machine_facts.os, "sysconf", lambda _: 100, raising=False)
    monkeypatch.setattr(machine_facts.os, "times", lambda: (own * seconds[0], 0.0))
    monkeypatch.setattr(machine_facts.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(machine_facts.time, "sleep", lambda _: seconds.__setitem__(0, 1.0))
    stats = ((7, 7, 7),) * len(after), tuple((7 + u, 7 + i, 7 + s) for u, i, s in after)

    def read(path: str) -> str:
        if path == "/proc/stat":
            return stat_lines(*stats[int(seconds[0])])
        return quota if path.endswith("cpu.max") else ""

    monkeypatch.setattr(machine_facts, "read_system_file", read)
    assert machine_facts.busy_cores() == pytest.approx(busy)
