"""A Python that has loaded the heavy libraries and forks for each command: a process of its own, without the wait.

    python tests/ready_python.py

Reads a line of JSON for each command, {"command", "cwd", "env", "out", "err", "timeout"}, on stdin, and answers with
its exit code, negative for a signal, when it has ended; "late" if it had to be killed after the timeout. What the
libraries read when they are imported (HF_*, and HOME for the Hub's cache) is that of this process; so whoever needs
another value starts a fresh Python.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Optional

LATE = "late"
SERVED = sys.platform == "linux"  # where forking after these imports is safe


class ReadyPython:
    """The process above. `serves` says which variables a command may have besides those that it began with."""

    AT_RUN_TIME = frozenset({"HOME", "USERPROFILE", "LORA_PRACTICE_LANG", "LORA_PRACTICE_CACHE"})

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        pipes: dict = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], env=env, **pipes)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def serves(self, env: dict[str, str]) -> bool:
        """Whether a command with these variables would see no difference to a fresh Python."""
        changed = {name for name in {*env, *self.env} if env.get(name) != self.env.get(name)}
        return changed <= self.AT_RUN_TIME

    def run(self, command: list[str], cwd: Path, env: dict[str, str], timeout: float) -> subprocess.CompletedProcess:
        """As subprocess.run with captured text and this timeout."""
        files = {name: str(cwd / "home" / f".{name}") for name in ("out", "err")}
        request = {"command": command, "cwd": str(cwd), "env": env, "timeout": timeout, **files}
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        said = {name: Path(file).read_text("utf-8") for name, file in files.items()}
        for file in files.values():
            os.remove(file)
        if answer == LATE:
            raise subprocess.TimeoutExpired(command, timeout, said["out"], said["err"])
        return subprocess.CompletedProcess(command, int(answer), said["out"], said["err"])

    def close(self) -> None:
        """End it."""
        self.process.communicate()


def wait(pid: int, seconds: float) -> int | str:
    """The exit code of a process; LATE for one that had to be killed after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done and deadline == float("inf"):
            return LATE
        if done:
            return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.01)


def next_command() -> Optional[dict[str, Any]]:
    """In a new process: what it is to run. In the first one, when stdin has ended: None."""
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            return request
        print(wait(pid, request["timeout"]), flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """Run the command in this process, as `python *command` would."""
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        file = os.open(name, flags, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    is_module = request["command"][0] == "-m"
    sys.argv = request["command"][is_module:]
    sys.path[0] = request["cwd"] if is_module else str(Path(sys.argv[0]).absolute().parent)
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


def load() -> None:
    """Import what takes seconds."""
    from lora_practice.sources.environment import prepare_environment

    prepare_environment()
    import peft
    import transformers
    import trl

    import lora_practice.data.prepare
    import lora_practice.export.merge
    import lora_practice.training.build  # noqa: F401

    # loaded when they are asked for
    assert trl.SFTTrainer and trl.SFTConfig and peft.PeftModel and transformers.AutoModelForCausalLM


if __name__ == "__main__":
    load()
    print("ready", flush=True)
    request = next_command()
    if request is not None:
        become(request)
