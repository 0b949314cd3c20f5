"""kill -9 at chosen and at random moments of a real training, and what must hold after each."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

from journey_harness import ROOT, environment, run

KILLED_TRAIN = str(ROOT / "tests" / "killed_entry_point.py")


@dataclass(frozen=True)
class Kill:
    """A moment: the `n`-th change on the disk of this kind, or so many seconds after the start."""

    words: str
    event: str = ""
    part: str = ""
    n: int = 1
    milliseconds: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.seconds:
            return f"{self.words} ({self.seconds:.1f} s after the start)"
        return f"{self.words} (number {self.n}{f', {self.milliseconds} ms later' if self.milliseconds else ''})"


NEVER, KINDS = Kill("never", "none"), 8


def random_kill(random: Random, kind: int, seconds: float) -> Kill:
    """One of eight kinds; `seconds` is how long an uninterrupted run takes."""
    n = random.randint(1, 4)
    kinds = (
        Kill("in the midst of a save", "os.mkdir", ".writing-", n, random.randint(1, 400)),
        Kill("before a checkpoint's manifest", "open", "checkpoint.json", n),
        Kill("before a checkpoint's rename", "os.rename", "checkpoint-", n),
        Kill("before an old checkpoint is removed", "shutil.rmtree", "checkpoint-", n),
        Kill("while an old checkpoint is removed", "os.remove", "", random.randint(2, 60)),
        Kill("before any change of a file", "os.", "", random.randint(1, 100)),
        Kill("while the results are moved in place", "os.rename", "tokenizer", random.randint(1, 2)),
        Kill("at any time", seconds=random.uniform(0.1, 1.0) * seconds),
    )
    return kinds[kind]


def run_into(kill: Kill, place: Path, out: str, *flags: str) -> tuple[bool, str]:
    """The entry point in its own process; whether the kill came before the end, and what was said."""
    done = run(place, KILLED_TRAIN, *_moment(kill, place / out), "--output_dir", out, *flags)
    assert done.returncode in (0, -signal.SIGKILL), (done.returncode, done.stderr)
    return done.returncode != 0, done.stderr


class Server:
    """The entry point again and again in forks of one process, which has loaded the libraries once: cheap."""

    def __init__(self, place: Path) -> None:
        self.place = place
        pipes: dict = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        env = environment(place / "home")
        self.process = subprocess.Popen([sys.executable, KILLED_TRAIN, "serve"], cwd=place, env=env, **pipes)
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def run_into(self, kill: Kill, out: str, *flags: str) -> tuple[bool, str]:
        """As the function above."""
        assert self.process.stdin is not None and self.process.stdout is not None
        log = self.place / "log"
        request = [_moment(kill, self.place / out), kill.seconds, ["--output_dir", out, *flags], str(log)]
        print(json.dumps(request), file=self.process.stdin, flush=True)
        code, words = int(self.process.stdout.readline()), log.read_text("utf-8")
        assert code in (0, -signal.SIGKILL) and "Traceback" not in words, (code, words)
        return code != 0, words

    def close(self) -> None:
        """End the server."""
        self.process.communicate()


def _moment(kill: Kill, out: Path) -> list[str]:
    return [kill.event, kill.part, str(0 if kill.seconds else kill.n), str(kill.milliseconds), str(out)]


def resume_flag(out: Path) -> tuple[str, ...]:
    """`--resume`, if the run got as far as its first record."""
    return ("--resume",) if (out / "run_record.json").is_file() else ()


def steps_safe(out: Path) -> int:
    """N of the newest whole checkpoint, judged by its manifest; 0 if there is none."""
    from lora_practice.run.file_kinds import CHECKPOINT_MANIFEST
    from lora_practice.run.folder import checkpoints
    from lora_practice.storage import manifest

    whole = [one for one in checkpoints(out) if not manifest.folder_fault(one, CHECKPOINT_MANIFEST)]
    return int(whole[-1].name.rpartition("-")[2]) if whole else 0


def differences(out: Path, other: Path) -> list[str]:
    """What two finished runs do not share, bit for bit: adapter, tokenizer, losses; and leftovers in the first."""
    names = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
    found = [name for name in names if (out / name).read_bytes() != (other / name).read_bytes()]
    records = [json.loads((folder / "run_record.json").read_text("utf-8")) for folder in (out, other)]
    found += [key for key in ("losses", "steps", "status") if records[0][key] != records[1][key]]
    return found + [str(left) for left in out.glob(".*")]
