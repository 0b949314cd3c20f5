"""The entry points, run as a user runs them: in their own process, in an empty folder, with an empty home."""

from __future__ import annotations

import atexit
import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Optional

from ready_python import SERVED, ReadyPython

ROOT = Path(__file__).resolve().parents[1]
TRAIN, INFER = str(ROOT / "fine_tuning_practice.py"), str(ROOT / "inference.py")
# Eight steps of two rows: a whole run in seconds, with the embedded model and conversations.
SMALL = ("--embedded", "--train_subset_size", "16", "--gradient_accumulation_steps", "2", "--logging_steps", "1")


def environment(home: Path, **variables: Optional[str]) -> dict[str, str]:
    """Variables of a fresh machine without a Hub; `variables` are added, None takes one away."""
    home.mkdir(exist_ok=True)
    _share_kernels(home)
    kept = ("PATH", "SYSTEMROOT", "TEMP", "LD_LIBRARY_PATH", "LORA_PRACTICE_CACHE", "HF_ENDPOINT")
    env: dict[str, Optional[str]] = {name: os.environ[name] for name in kept if name in os.environ}
    env.update({name: value for name, value in os.environ.items() if name.startswith("COV")})
    env.update(HOME=str(home), USERPROFILE=str(home), PYTHONPATH=str(ROOT), PYTHONUTF8="1", NO_PROXY="*")
    # one thread: the same sums in each run, and no threads that wait for each other on a busy machine
    env.update(LORA_PRACTICE_LANG="en", OMP_NUM_THREADS="1", HF_HUB_DISABLE_XET="1")
    return {name: value for name, value in {**env, **variables}.items() if value is not None}


def _share_kernels(home: Path) -> None:
    """Compiling them takes longer than a small run; their names tell what they were built from and for."""
    own, shared = (Path(one) / ".cache" / "lora-practice" / "kernels" for one in (home, Path.home()))
    if os.name == "nt" or own.exists():
        return
    for folder in (own.parent, shared.parent):
        folder.mkdir(parents=True, exist_ok=True)
    shared.mkdir(mode=0o700, exist_ok=True)
    own.symlink_to(shared)


@functools.lru_cache(maxsize=1)
def ready_python() -> ReadyPython:
    """The one of this session, with a home of its own."""
    home = tempfile.TemporaryDirectory(prefix="lora-practice-home-")
    python = ReadyPython(environment(Path(home.name)))
    atexit.register(home.cleanup)
    atexit.register(python.close)
    return python


def run(
    place: Path, *command: str, timeout: float = 900, fresh: bool = False, **variables: Optional[str]
) -> subprocess.CompletedProcess:
    """`python *command` in the folder `place`, to its end. Whatever happens, no traceback may show.

    fresh: in a new interpreter, not in a fork of one that has the libraries already.
    """
    env = environment(place / "home", **variables)
    if SERVED and not fresh and ready_python().serves(env):
        done = ready_python().run([*command], place, env, timeout)
    else:
        options: dict = {"capture_output": True, "text": True, "encoding": "utf-8", "stdin": subprocess.DEVNULL}
        done = subprocess.run([sys.executable, *command], cwd=place, env=env, timeout=timeout, **options)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def train(place: Path, *flags: str, **variables: Any) -> subprocess.CompletedProcess:
    """fine_tuning_practice.py in `place`; `variables` may hold what `run` takes."""
    return run(place, TRAIN, *flags, **variables)


def infer(place: Path, *flags: str, **variables: Any) -> subprocess.CompletedProcess:
    """inference.py in `place`."""
    return run(place, INFER, *flags, **variables)


def succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    """Exit code 0."""
    assert done.returncode == 0, (done.args, done.returncode, done.stderr)
    return done


def refused(done: subprocess.CompletedProcess, *words: str) -> str:
    """Exit code 2 and exactly one error line, which holds these words and is returned."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    errors = [line for line in done.stderr.splitlines() if line.startswith(("Error: ", "错误："))]
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in done.stderr[done.stderr.index(errors[0]) :], done.stderr
    return errors[0]


class Running:
    """An entry point that is still running; its words are read as they come."""

    def __init__(self, place: Path, *command: str, **variables: Optional[str]) -> None:
        env = environment(place / "home", **variables)
        options: dict = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        options.update(text=True, encoding="utf-8", cwd=place, env=env)
        self.process = subprocess.Popen([sys.executable, *command], **options)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def words(self) -> str:
        """Everything on stderr so far."""
        return "".join(self.lines)

    def wait_for(self, wanted: str, seconds: float = 600) -> None:
        """Until `wanted` stands on stderr."""
        self.wait_until(lambda: wanted in self.words, seconds, repr(wanted))

    def wait_until(self, true: Callable[[], bool], seconds: float = 600, what: str = "a change on the disk") -> None:
        """Until `true()`; fails, naming `what` was waited for, when the process ends before or the time is over."""
        deadline = time.monotonic() + seconds
        while not true():
            ended = self.process.poll()
            assert ended is None, f"waited for {what}, but it ended with {ended}:\n{self.words}"
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what} in vain:\n{self.words}"
            time.sleep(0.01)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self, seconds: float = 600) -> int:
        """Wait for the end; the exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired as late:
            raise AssertionError(f"waited {seconds:.0f} s for its end in vain:\n{self.words}") from late
        finally:
            self.process.kill()
        self.reader.join(10)
        assert "Traceback" not in self.words, self.words
        return code
