"""`fine_tuning_practice.py` under a memory limit: `limited_entry_point.py MEGABYTES flag...` (0: no limit).

The limit is the kernel's own (cgroup v1 or v2, as root) and holds from the first page on. Beyond it the kernel kills.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


def make_group(name: str) -> tuple[Path, str]:
    """(the group's folder, the name of its limit). OSError where none can be made."""
    root, limit = (V1, "memory.limit_in_bytes") if V1.is_dir() else (V2, "memory.max")
    group = root / name
    group.mkdir()
    if not (group / limit).exists():
        group.rmdir()
        raise OSError("no group of memory can be made here")
    return group, limit


def can_limit() -> bool:
    """Whether this user may make such groups here."""
    with suppress(OSError):
        make_group(f"lora-practice-try-{os.getpid()}")[0].rmdir()
        return True
    return False


def main() -> None:
    """Run the training in a child, so that the group can be removed after it."""
    megabytes, *flags = sys.argv[1:]
    group, limit = make_group(f"lora-practice-{os.getpid()}") if int(megabytes) else (None, "")
    if group is not None:
        (group / limit).write_text(str(int(megabytes) * 1_000_000))
    child = os.fork()
    if not child:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        import fine_tuning_practice

        sys.argv = [fine_tuning_practice.__file__, *flags]
        fine_tuning_practice.main()
    status = os.waitpid(child, 0)[1]
    if group is not None:
        group.rmdir()
    sys.exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


if __name__ == "__main__":
    main()
