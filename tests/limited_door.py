"""Door 1 with so much memory and no more: `limited_door.py MEGABYTES flag...` sets the limit once the model is loaded.

The limit is the kernel's own: a control group's where one can be made (v1, as root), else `ulimit -v`.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup/memory")


def by_ulimit(megabytes: int) -> None:
    """No more address space than now, and so much above it."""
    from lora_practice.memory import _own_pages

    limit = _own_pages()[0] + megabytes * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def by_group(megabytes: int) -> None:
    """A control group of our own: its limit counts what is taken from now on (the pages held stay the parent's)."""
    group = GROUPS / f"lora-practice-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(megabytes * 1_000_000))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def main() -> None:
    """Set the limit just before the dry run, then train as usual."""
    kind, megabytes, *flags = sys.argv[1:]
    from lora_practice import train

    find_room = train.find_room

    def limited(*args: object, **kwargs: object) -> int:
        if not resource.getrlimit(resource.RLIMIT_AS)[0] < resource.RLIM_INFINITY and int(megabytes):
            {"ulimit": by_ulimit, "group": by_group}[kind](int(megabytes))
        return find_room(*args, **kwargs)

    train.find_room = limited
    import fine_tuning_practice

    sys.argv = [fine_tuning_practice.__file__, *flags]
    fine_tuning_practice.main()


if __name__ == "__main__":
    main()
