"""The commands of the README, run as a reader runs them: in a fresh folder, on the embedded data, with few steps."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import site
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from journey_harness import TRAIN, Running, environment
from readme_commands import COMMANDS, ROOT, Real

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="bash")
REAL = [command for command, run in COMMANDS.items() if isinstance(run, Real)]
ROWS = [{"prompt": f"Is {n} even?", "completion": "Yes." if n % 2 == 0 else "No."} for n in range(12)]


def walkthrough() -> Any:
    """scripts/walkthrough.py, which makes such folders for docs/walkthrough.md."""
    spec = importlib.util.spec_from_file_location("walkthrough", ROOT / "scripts" / "walkthrough.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Reader:
    """Someone who types commands in one folder; a command that was typed is not typed again."""

    def __init__(self, place: Path) -> None:
        self.place = walkthrough().fresh_folder(place)
        rows = "\n".join(json.dumps(row) for row in ROWS)
        (place / "my_data.jsonl").write_text(rows, "utf-8")
        self.env = environment(place / "home", HF_TOKEN=None)
        self.env.update(PATH=os.pathsep.join([str(place / "bin"), self.env["PATH"]]))
        self.ended: dict[str, subprocess.CompletedProcess] = {}

    def type(self, command: str) -> subprocess.CompletedProcess:
        """Run a command of the table after what it needs; its end."""
        run = COMMANDS[command]
        assert isinstance(run, Real)
        for need in run.needs:
            self.type(need)
        if command not in self.ended:
            words = ["bash", "-ec", f"{command} {run.extra}"]
            options: dict = {"cwd": self.place, "env": self.env, "capture_output": True, "timeout": 900}
            self.ended[command] = subprocess.run(words, input=run.typed, text=True, encoding="utf-8", **options)
        done = self.ended[command]
        assert done.returncode == 0 and "Traceback" not in done.stderr, (command, done.stdout, done.stderr)
        return done


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path, embedded_rows: Path) -> Reader:
    return Reader(tmp_path_factory.mktemp("reader"))


@pytest.mark.parametrize("command", REAL)
def test_a_command_of_the_readme_runs_as_written(command: str, reader: Reader) -> None:
    done, run = reader.type(command), COMMANDS[command]
    assert isinstance(run, Real) and (reader.place / run.makes).exists()
    assert re.search(run.shows, (done.stdout + done.stderr).strip())


def test_an_interrupted_run_is_resumed_as_the_readme_writes_it(
    tmp_path: Path, embedded_model: Path, embedded_rows: Path
) -> None:
    reader = Reader(tmp_path)
    flags = ("--max_steps", "4", "--train_subset_size", "24", "--save_strategy", "steps", "--save_steps", "1")
    running = Running(tmp_path, TRAIN, "--embedded", *flags)
    folder = tmp_path / "outputs" / "SmolLM2-FT-MyDataset"
    running.wait_until((folder / "checkpoint-1" / "checkpoint.json").exists)
    running.interrupt()
    assert running.end() == 130
    words = "python fine_tuning_practice.py --resume"
    assert words in COMMANDS
    done = subprocess.run(["bash", "-ec", words], cwd=tmp_path, env=reader.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "run_record.json").read_text("utf-8"))
    assert record["steps"] == 4 and [entry["step"] for entry in record["losses"]][-1] == 4


def test_a_clone_is_installed_and_trained_by_the_script(
    tmp_path: Path, embedded_model: Path, embedded_rows: Path
) -> None:
    """In an environment that has the libraries already, so that nothing is downloaded: clone, train.sh, activate."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone itself")
    libraries = tmp_path / "libraries"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(libraries)], check=True)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    paths = [*site.getsitepackages(), *[path for path in sys.path if path.endswith("-packages")]]
    (libraries / "lib" / version / "site-packages" / "all.pth").write_text(
        "\n".join(dict.fromkeys(paths)) + "\n", "utf-8"
    )
    env = environment(tmp_path / "home", PYTHONPATH=None, PIP_NO_INDEX="1", PIP_NO_BUILD_ISOLATION="0")
    env.update(PATH=os.pathsep.join([str(libraries / "bin"), env["PATH"]]), VIRTUAL_ENV=str(libraries))
    script = f"""
        git clone -q {ROOT} lora-finetune-practice
        cd lora-finetune-practice
        ./scripts/train.sh --embedded --max_steps 1 --train_subset_size 8
        ln -s {libraries} .venv
        source .venv/bin/activate
        lora-practice --version
    """
    options: dict = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "encoding": "utf-8"}
    done = subprocess.run(["bash", "-ec", script], timeout=900, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "lora-finetune-practice" / "outputs" / "SmolLM2-FT-MyDataset"
    assert (folder / "adapter_model.safetensors").is_file()
    assert "next, talk to it" in done.stderr and done.stdout.split()[-1].count(".") == 2
