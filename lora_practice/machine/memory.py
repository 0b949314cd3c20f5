"""How much memory this process holds and may still take: read, never guessed. Loads no torch before it must."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Optional

CGROUPS = "/sys/fs/cgroup"
# (kind, limit, used, the key in memory.stat of cached files, which count as used but give way) of cgroup v2 and v1
_FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class MemoryState(NamedTuple):
    """Bytes: `total` installed or allowed by the container, `free` for this process, the container's `limit` or 0.

    `ulimit_left` is what remains below `ulimit -v`, or 0 without such a limit; `free` counts it already.
    """

    total: int
    free: int
    limit: int = 0
    ulimit_left: int = 0


def available_memory(ulimit: bool = True) -> int:
    """Bytes this process can still take: what is free, and what a container or `ulimit -v` leaves; 0 if unknown.

    ulimit=False: only what the kernel kills for; beyond a ulimit an allocation fails, which a program can survive,
    and address space once freed may stay mapped, to be used again.
    """
    limits = [*(left for _, left in group_limits()), *(_ulimit_leaves() if ulimit else ())]
    free = _free()
    return max(0, min([free, *limits] if free else limits or [0]))


def memory_state() -> MemoryState:
    """Read how much memory there is, is free, and is allowed."""
    import psutil

    installed = psutil.virtual_memory().total
    limits = [limit for limit, _ in group_limits() if limit < installed]
    total = min([installed, *limits])
    return MemoryState(total, available_memory(), total if limits else 0, min(_ulimit_leaves(), default=0))


def held_memory() -> int:
    """Bytes of memory that this process holds now (resident set)."""
    return _own_pages()[1] or _psutil().rss


def group_folders(kind: str) -> Iterator[str]:
    """This process's control group and those above it: version 2's for "", else those of version 1's hierarchy `kind`.

    Inside a container the path may be one of the host's, which is not there: then only the root is.
    """
    parts: list[str] = []
    for line in read_system_file("/proc/self/cgroup").splitlines():
        _, kinds, path = [*line.split(":", 2), "", ""][:3]
        if kind in kinds.split(","):
            parts = [part for part in path.split("/") if part]
    for root in [f"{CGROUPS}/{kind}"] if kind else [CGROUPS, f"{CGROUPS}/unified"]:
        for depth in range(len(parts) + 1):
            yield "/".join([root, *parts[:depth]])


def group_limits() -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) in bytes, of each control group around this process that has a limit of memory."""
    for kind, limit_name, used_name, cached_key in _FILES:
        for folder in group_folders(kind):
            limit, used = (
                read_system_file(f"{folder}/{limit_name}").strip(),
                read_system_file(f"{folder}/{used_name}").strip(),
            )
            if not (limit.isdigit() and used.isdigit()) or int(limit) >= 1 << 60:  # v1's "no limit": a huge number
                continue
            cached = re.search(rf"^{cached_key} (\d+)$", read_system_file(f"{folder}/memory.stat"), re.MULTILINE)
            yield int(limit), int(limit) - int(used) + (int(cached.group(1)) if cached else 0)


class PeakMemory:
    """Notes the most memory held within a `with` block, looking every millisecond: `most`, in bytes.

    The process's own high-water mark would not do: loading the model may have stood above what comes now.
    """

    def __enter__(self) -> PeakMemory:
        self.before = self.most = held_memory()
        self._done = threading.Event()
        self._thread: Optional[threading.Thread] = threading.Thread(target=self._look, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # not even memory for a thread
            self._thread = None
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.most = max(self.most, held_memory())


def read_system_file(path: str) -> str:
    """A file of /proc or /sys; empty if it is not there."""
    try:
        return Path(path).read_text("utf-8", "replace")
    except OSError:
        return ""


def _free() -> int:
    for line in read_system_file("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    with suppress(ImportError):
        import psutil

        return int(psutil.virtual_memory().available)
    return 0


def _ulimit_leaves() -> Iterator[int]:
    """Bytes left below `ulimit -v`, if there is one."""
    try:
        import resource
    except ImportError:  # Windows
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        yield limit - (_own_pages()[0] or _psutil().vms)


def _own_pages() -> tuple[int, int]:
    """(address space, resident set) of this process in bytes; zeros where there is no /proc."""
    pages = read_system_file("/proc/self/statm").split()
    size = os.sysconf("SC_PAGE_SIZE") if pages else 0
    return (int(pages[0]) * size, int(pages[1]) * size) if pages else (0, 0)


def _psutil() -> Any:
    import psutil  # accelerate brings it

    return psutil.Process().memory_info()
