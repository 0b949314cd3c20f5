"""Memory that this process holds and may still take, read from the system. Does not import torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Optional

CGROUPS = "/sys/fs/cgroup"
# of cgroup v2 and v1: hierarchy, files of limit and usage, and the keys in memory.stat of cached files (on two lists)
# and of those that are mapped
_FILES = (
    ("", "memory.max", "memory.current", ("inactive_file", "active_file", "file_mapped")),
    (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file", "total_mapped_file"),
    ),
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
    """Bytes that this process can still take: the least that the system, a container and `ulimit -v` leave.

    Args:
        ulimit: count `ulimit -v` too. Beyond it an allocation fails, which a program can survive (beyond the others the
            kernel kills it), and freed address space may stay mapped and be used again.

    Returns:
        0 if nothing is known.
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
    """Resident memory of this process in bytes."""
    return _own_pages()[1] or _psutil().rss


def group_folders(kind: str) -> Iterator[str]:
    """Folders of this process's control group and its parents: of cgroup v2 for "", else of v1's hierarchy `kind`.

    Inside a container the path may be the host's and not exist; then only the root's folder does.
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
    """(memory limit, what is left of it) in bytes for each control group around this process that has one."""
    for kind, limit_name, used_name, keys in _FILES:
        for folder in group_folders(kind):
            limit, used = (
                read_system_file(f"{folder}/{limit_name}").strip(),
                read_system_file(f"{folder}/{used_name}").strip(),
            )
            if not (limit.isdigit() and used.isdigit()) or int(limit) >= 1 << 60:  # v1's "no limit": a huge number
                continue
            yield int(limit), int(limit) - int(used) + _cached_files(read_system_file(f"{folder}/memory.stat"), *keys)


def _cached_files(stat: str, inactive_key: str, active_key: str, mapped_key: str) -> int:
    """Bytes of cached files, which count as used but are given up when memory is needed.

    A file just downloaded or converted lies on the active list. Mapped ones (libraries) are needed again at once.
    """
    values = dict(line.split()[:2] for line in stat.splitlines() if len(line.split()) > 1)
    inactive, active, mapped = (int(values.get(key, 0)) for key in (inactive_key, active_key, mapped_key))
    return max(inactive, inactive + active - mapped)


class PeakMemory:
    """Samples resident memory every millisecond within a `with` block: `most` is the peak, `before` the start (bytes).

    The process's own peak would not do, since loading the model may have taken more than the block does.
    """

    def __enter__(self) -> PeakMemory:
        self.before = self.most = held_memory()
        self._done = threading.Event()
        self._thread: Optional[threading.Thread] = threading.Thread(target=self._sample, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # too little memory for a thread
            self._thread = None
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self.most = max(self.most, held_memory())


def read_system_file(path: str) -> str:
    """The content of a file in /proc or /sys; empty if it cannot be read."""
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
