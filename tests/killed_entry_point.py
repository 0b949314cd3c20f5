"""fine_tuning_practice.py in a process that is killed with signal 9 at one of its own changes on the disk.

    python tests/killed_entry_point.py EVENT PART N MILLISECONDS OUT [flags of the entry point]

The N-th audit event whose name begins with EVENT and whose path, below the folder OUT, holds PART (a path counts
once); MILLISECONDS later, or right before the change if that is 0. Python's own file operations are audited; what Rust
and C++ write (safetensors, torch, tokenizers) is not, and is hit by a delay.

    python tests/killed_entry_point.py serve

Loads the libraries once and forks a process for each line of JSON on stdin, [[EVENT, PART, N, MILLISECONDS, OUT],
seconds, flags, log]: with `seconds` above 0 it is killed then. Answers with its exit code, negative for a signal.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
TRAIN = str(Path(__file__).resolve().parents[1] / "fine_tuning_practice.py")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killer:
    """An audit hook; it looks at the file system's changes below `out` and kills at the chosen one."""

    def __init__(self, event: str, part: str, n: int, milliseconds: int, out: Path) -> None:
        self.event, self.part, self.left, self.milliseconds, self.out = event, part, n, milliseconds, str(out)
        self.seen: set[str] = set()  # makedirs asks for a folder again and again

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or not event.startswith(self.event):
            return
        path = args[0]
        if not isinstance(path, (str, os.PathLike)) or (event == "open" and not args[2] & WRITING):
            return
        # rmtree removes by folder descriptor: then the bare name is all there is, and only the run removes so
        by_name = event in ("os.remove", "os.rmdir") and args[1] != -1
        inside = by_name or (str(path) not in self.seen and os.path.abspath(path).startswith(self.out))
        if inside and self.part in str(path):
            self.seen.add(str(path))
            self.left -= 1
            if self.left == 0:
                self.kill()

    def kill(self) -> None:
        """kill -9, now or soon."""
        if not self.milliseconds:
            os.kill(os.getpid(), signal.SIGKILL)
        subprocess.Popen(["sh", "-c", f"sleep {self.milliseconds / 1000}; kill -9 {os.getpid()}"])


def run_until(moment: list[str], flags: list[str]) -> None:
    """The entry point in this process, which does not come back alive from that moment."""
    event, part, n, milliseconds, out = moment
    sys.addaudithook(Killer(event, part, int(n), int(milliseconds), Path(out).absolute()))
    sys.argv = [TRAIN, *flags]
    runpy.run_path(TRAIN, run_name="__main__")


def wait(pid: int, seconds: float) -> int:
    """The end of a process, its status as `waitpid` gives it; killed after `seconds`, if that is above 0."""
    deadline = time.monotonic() + (seconds or float("inf"))
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)


def serve() -> None:
    """One forked process after another, until stdin ends."""
    sys.path.insert(0, str(Path(TRAIN).parent))
    from lora_practice.sources.environment import prepare_environment

    prepare_environment()
    import trl

    import lora_practice.data.prepare
    import lora_practice.training.build  # noqa: F401

    assert trl.SFTTrainer and trl.SFTConfig  # loaded when they are asked for
    print("ready", flush=True)
    for line in sys.stdin:
        moment, seconds, flags, log = json.loads(line)
        pid = os.fork()
        if not pid:
            with open(log, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = 1
            try:
                run_until(moment, flags)
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        status = wait(pid, seconds)
        print(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status), flush=True)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else run_until(sys.argv[1:6], sys.argv[6:])
