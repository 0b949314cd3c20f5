"""A learner in a small container: doctor tells the container's limits, not the board's, and what follows from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CGROUPS = Path("/sys/fs/cgroup")
GB = 1 << 30


class Container:
    """A cgroup of this test's own, of whichever version the machine has."""

    def __init__(self, name: str) -> None:
        self.old = (CGROUPS / "memory").is_dir()
        kinds = ("memory", "cpu") if self.old else ("",)
        self.folders = [CGROUPS / kind / name for kind in kinds]
        for folder in self.folders:
            folder.mkdir()

    def limit(self, memory: int) -> None:
        """One core and so many bytes."""
        if self.old:
            (self.folders[0] / "memory.limit_in_bytes").write_text(str(memory))
            (self.folders[1] / "cpu.cfs_quota_us").write_text("100000")
        else:
            (self.folders[0] / "memory.max").write_text(str(memory))
            (self.folders[0] / "cpu.max").write_text("100000 100000")

    def doctor(self, folder: Path) -> subprocess.CompletedProcess:
        """`lora-practice doctor --json`, inside."""
        tasks = " ".join(f"'{one}/cgroup.procs'" for one in self.folders)
        enter = f'for tasks in {tasks}; do echo $$ > "$tasks"; done; exec "$0" -m lora_practice.cli doctor --json'
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(["sh", "-c", enter, sys.executable], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def container() -> Iterator[Container]:
    made = None
    try:
        made = Container(f"lora-practice-test-{os.getpid()}")
        made.limit(2 * GB)
        yield made
    except OSError as error:
        pytest.skip(f"no cgroup may be made here: {error}")
    finally:
        for folder in made.folders if made else []:
            folder.rmdir()


def test_a_container_of_2_gb_trains_and_one_of_1_gb_does_not(container: Container, tmp_path: Path) -> None:
    done = container.doctor(tmp_path)
    told = json.loads(done.stdout)
    assert done.returncode == 0 and told["can_train"]
    assert (told["machine"]["cores"], told["machine"]["memory_limit"]) == (1, 2 * GB)
    assert 0 < told["machine"]["memory"] < 2 * GB
    container.limit(GB)
    done = container.doctor(tmp_path)
    told = json.loads(done.stdout)
    assert (done.returncode, told["can_train"], told["next_command"]) == (2, False, "")
    assert told["findings"][0]["level"] == "stop" and "1.0 GB of memory" in told["findings"][0]["what"]
