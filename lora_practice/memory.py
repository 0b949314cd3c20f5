"""How much memory this process holds and may still take: read, never guessed. Loads no torch before it must."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

CGROUPS = "/sys/fs/cgroup"
# (limit, used, the key in memory.stat of cached files, which count as used but give way) of cgroup v2 and v1
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory(ulimit: bool = True) -> int:
    """Bytes this process can still take: what is free, and what a container or `ulimit -v` leaves; 0 if unknown.

    ulimit=False: only what the kernel kills for; beyond a ulimit an allocation fails, which a program can survive,
    and address space once freed may stay mapped, to be used again.
    """
    limits = [*_cgroups_leave(), *(_ulimit_leaves() if ulimit else ())]
    free = _free()
    return max(0, min([free, *limits] if free else limits or [0]))


def held_memory() -> int:
    """Bytes of memory that this process holds now (resident set)."""
    return _own_pages()[1] or _psutil().rss


class Watch:
    """Notes the most memory held within a `with` block, looking every millisecond: `most`, in bytes.

    The process's own high-water mark would not do: loading the model may have stood above what comes now.
    """

    def __enter__(self) -> Watch:
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


def _free() -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    with suppress(ImportError):
        import psutil

        return int(psutil.virtual_memory().available)
    return 0


def _cgroups_leave() -> Iterator[int]:
    """For this process's control group and each one above it that has a limit: bytes left."""
    for line in ["0::/", "0:memory:/", *_read("/proc/self/cgroup").splitlines()]:
        _, kinds, path = [*line.split(":", 2), "", ""][:3]
        parts = [part for part in path.split("/") if part]
        roots = [(CGROUPS, _V2), (f"{CGROUPS}/unified", _V2)] if kinds == "" else []
        if "memory" in kinds.split(","):
            roots = [(f"{CGROUPS}/memory", _V1)]
        for root, names in roots:
            for depth in range(len(parts) + 1):
                left = _left("/".join([root, *parts[:depth]]), *names)
                if left is not None:
                    yield left


def _left(folder: str, limit_name: str, used_name: str, cached_key: str) -> Optional[int]:
    limit, used = _read(f"{folder}/{limit_name}").strip(), _read(f"{folder}/{used_name}").strip()
    if not (limit.isdigit() and used.isdigit()) or int(limit) >= 1 << 60:  # v1 writes "no limit" as a huge number
        return None
    cached = re.search(rf"^{cached_key} (\d+)$", _read(f"{folder}/memory.stat"), re.MULTILINE)
    return int(limit) - int(used) + (int(cached.group(1)) if cached else 0)


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
    pages = _read("/proc/self/statm").split()
    size = os.sysconf("SC_PAGE_SIZE") if pages else 0
    return (int(pages[0]) * size, int(pages[1]) * size) if pages else (0, 0)


def _psutil() -> Any:
    import psutil  # accelerate brings it

    return psutil.Process().memory_info()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
