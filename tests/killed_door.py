"""Door 1 in a process that is killed with signal 9 at one of its own changes on the disk.

    python tests/killed_door.py EVENT PART N MILLISECONDS OUT [flags of the door]

The N-th audit event whose name begins with EVENT and whose path, below the folder OUT, holds PART; MILLISECONDS
later, or right before the change if that is 0. Python's own file operations are audited; what Rust and C++ write
(safetensors, torch, tokenizers) is not, and is hit by a delay.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killer:
    """An audit hook; it looks at the file system's changes below `out` and kills at the chosen one."""

    def __init__(self, event: str, part: str, n: int, milliseconds: int, out: Path) -> None:
        self.event, self.part, self.left, self.milliseconds, self.out = event, part, n, milliseconds, str(out)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or not event.startswith(self.event):
            return
        path = args[0]
        if not isinstance(path, (str, os.PathLike)) or (event == "open" and not args[2] & WRITING):
            return
        # rmtree removes by folder descriptor: then the bare name is all there is, and only the run removes so
        inside = (event in ("os.remove", "os.rmdir") and args[1] != -1) or os.path.abspath(path).startswith(self.out)
        if inside and self.part in str(path):
            self.left -= 1
            if self.left == 0:
                self.kill()

    def kill(self) -> None:
        """kill -9, now or soon."""
        if not self.milliseconds:
            os.kill(os.getpid(), signal.SIGKILL)
        subprocess.Popen(["sh", "-c", f"sleep {self.milliseconds / 1000}; kill -9 {os.getpid()}"])


if __name__ == "__main__":
    event, part, n, milliseconds, out = sys.argv[1:6]
    sys.argv = [str(Path(__file__).resolve().parents[1] / "fine_tuning_practice.py"), *sys.argv[6:]]
    sys.addaudithook(Killer(event, part, int(n), int(milliseconds), Path(out).absolute()))
    runpy.run_path(sys.argv[0], run_name="__main__")
