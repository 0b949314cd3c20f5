"""How much memory is left: by the machine, by a container of either kind, by ulimit; and what a block took."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_practice.machine import memory

GB = 1 << 30
V1 = "/sys/fs/cgroup/memory"
MEMINFO = {"/proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n", "/proc/self/statm": "9 9 9 9"}


def pretend(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    """Give the machine these files of /proc and /sys, and no others; `memory_max` is that of the outermost group."""
    files = {**MEMINFO, **{f"/sys/fs/cgroup/{name.replace('_', '.')}": content for name, content in more.items()}}
    monkeypatch.setattr(memory, "read_system_file", lambda path: files.get(path, ""))


def test_without_a_container_it_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert memory.available_memory() == 8_000_000 * 1024


def test_a_container_leaves_its_limit_less_what_is_used_and_cannot_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, memory_max=f"{4 * GB}\n", memory_current=f"{GB}\n")
    assert memory.available_memory() == 3 * GB
    pretend(monkeypatch, memory_max=f"{4 * GB}", memory_current=f"{4 * GB}", memory_stat=f"inactive_file {2 * GB}\n")
    assert memory.available_memory() == 2 * GB  # cached files give way
    pretend(monkeypatch, memory_max="max", memory_current=f"{GB}")
    assert memory.available_memory() == 8_000_000 * 1024
    pretend(monkeypatch, memory_max=f"{100 * GB}", memory_current="0")
    assert memory.available_memory() == 8_000_000 * 1024
    pretend(monkeypatch, memory_max=f"{GB}", memory_current=f"{2 * GB}")
    assert memory.available_memory() == 0


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        (  # cgroup v2, the limit two levels up, as systemd-run sets it
            "0::/user.slice/run.scope/inner\n",
            {
                "/sys/fs/cgroup/user.slice/run.scope/memory.max": f"{3 * GB}",
                "/sys/fs/cgroup/user.slice/run.scope/memory.current": f"{GB}",
                "/sys/fs/cgroup/user.slice/run.scope/inner/memory.max": "max",
            },
        ),
        (  # cgroup v1, the whole tree without a limit
            "5:cpu:/a\n4:memory:/job\n0::/\n",
            {
                f"{V1}/memory.limit_in_bytes": "9223372036854771712",
                f"{V1}/memory.usage_in_bytes": "77",
                f"{V1}/job/memory.limit_in_bytes": f"{3 * GB}",
                f"{V1}/job/memory.usage_in_bytes": f"{2 * GB}",
                f"{V1}/job/memory.stat": f"inactive_file 5\ntotal_inactive_file {GB}\n",
            },
        ),
    ],
    ids=["v2", "v1"],
)
def test_the_tightest_group_above_this_process_counts(monkeypatch, cgroup: str, files: dict[str, str]) -> None:
    files = {**MEMINFO, "/proc/self/cgroup": cgroup, **files}
    monkeypatch.setattr(memory, "read_system_file", lambda path: files.get(path, ""))
    assert memory.available_memory() == 2 * GB


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the address space from /proc")
def test_ulimit_v_counts() -> None:
    script = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({GB}, {GB}))\n"
        "from lora_practice.machine import memory\n"
        f"assert 0 < memory.available_memory() < {GB}, memory.available_memory()\n"
        f"assert memory.available_memory(ulimit=False) != memory.available_memory()\n"
        f"state = memory.memory_state(); assert 0 < state.free <= state.ulimit_left < {GB} < state.total, state"
    )
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": root})


def test_a_watched_block_knows_the_most_it_held_though_it_gave_it_back() -> None:
    with memory.PeakMemory() as watch:
        block = bytearray(200_000_000)
        block[::4096] = b"x" * len(block[::4096])
        watch._done.wait(0.02)
        del block
    assert watch.most - watch.before > 150_000_000
    assert memory.held_memory() < watch.most
