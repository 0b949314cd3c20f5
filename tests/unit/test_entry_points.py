"""The entry points answer at once, in the user's language, and a mistake costs one line and exit code 2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ready_python

from lora_practice.console.terminal import columns

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("fine_tuning_practice.py",)
INFER = ("inference.py",)
UPLOAD = ("scripts/upload_lora_to_hub.py",)
CLI = ("-m", "lora_practice.cli")
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "huggingface_hub", "numpy", "pyarrow")
# the contract: names and defaults are fixed
TRAIN_DEFAULTS: dict[str, Any] = {
    "model_name": "HuggingFaceTB/SmolLM2-135M",
    "chat_template_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "dataset_path": "HuggingFaceTB/smoltalk",
    "dataset_name": "everyday-conversations",
    "output_dir": "outputs/SmolLM2-FT-MyDataset",
    "max_length": 512,
    "train_subset_size": 2000,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "num_train_epochs": 1,
    "learning_rate": 2e-4,
    "merge_adapter": False,
    "run_inference": False,
    "skip_login": False,
    "embedded": False,
    "resume": False,
    "logging_steps": 10,
    "save_strategy": "epoch",
    "optim": "adamw_torch",
    "max_grad_norm": 0.3,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "constant",
    "lora_r": 6,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "bf16": False,
    "gradient_checkpointing": "auto",
    "assistant_only_loss": True,
    "packing": False,
    "seed": 42,
}
INFER_DEFAULTS: dict[str, Any] = {
    "model_dir": "outputs/SmolLM2-FT-MyDataset",
    "prompt": None,
    "base_model": "",
    "max_new_tokens": 128,
    "temperature": 0.0,
    "top_p": 1.0,
    "device": "auto",
    "system": "",
    "seed": 42,
}
UPLOAD_FLAGS = ("repo-id", "local-dir", "include", "exclude-checkpoints", "public", "commit-message", "dry-run")


@dataclass
class Done:
    """What a program printed, and with which code it ended."""

    code: int
    out: str
    err: str


def run(folder: Path, entry: tuple[str, ...], *flags: str, lang: str = "en", **variables: str) -> Done:
    """Run an entry point in an empty folder, as a user does."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    env = {**kept, "PYTHONPATH": str(ROOT), "LORA_PRACTICE_LANG": lang, "PYTHONUTF8": "1", "HOME": str(folder)}
    env = {**env, "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONDONTWRITEBYTECODE": "1", **variables}
    first = [str(ROOT / entry[0])] if entry[0].endswith(".py") else list(entry)
    command = [sys.executable, *first, *flags]
    options: dict[str, Any] = {"capture_output": True, "text": True, "encoding": "utf-8", "timeout": 300}
    done = subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, **options)
    assert "Traceback" not in done.stderr, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("entry", [TRAIN, INFER, UPLOAD, CLI])
@pytest.mark.parametrize(("lang", "word"), [("zh", "选项"), ("en", "options")])
def test_help_answers_without_the_libraries(entry: tuple[str, ...], lang: str, word: str, tmp_path: Path) -> None:
    done = run(tmp_path, entry, "--help", lang=lang, PYTHONPROFILEIMPORTTIME="1")
    assert done.code == 0
    assert word in done.out
    assert all(columns(line) <= 80 for line in done.out.splitlines())
    imported = {line.rpartition("|")[2].strip() for line in done.err.splitlines()}
    assert "lora_practice.console.errors" in imported
    assert not imported & set(HEAVY)
    assert list(tmp_path.iterdir()) == []


WORKER = ("-m", "bench.worker", "{}")


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        *((WORKER, chosen) for chosen in ("", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")),
        (("-m", "bench.generation", "{}"), ""),
        (("-m", "bench.pieces"), ""),
        (("-m", "bench.scale", "--prepare", "rows.jsonl"), ""),
        (("examples/minimal.py",), ""),
        (("examples/minimal.py",), "OMP_WAIT_POLICY"),
    ],
    ids=lambda one: one if isinstance(one, str) else " ".join(one[:2]),
)
def test_waiting_threads_sleep_before_torch_loads_unless_the_user_chose(
    words: tuple[str, ...], chosen: str, tmp_path: Path
) -> None:
    """libgomp reads these variables once, when torch is imported: another torch tells what they are by then."""
    tells = 'import os\nprint([os.environ.get(n) for n in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")])\nos._exit(7)\n'
    (tmp_path / "torch.py").write_text(tells.replace("print(", "print(flush=True, *"), "utf-8")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    env.update({"PYTHONPATH": str(tmp_path), **({chosen: "7"} if chosen else {})})
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    told = {"": "None 1000", "OMP_WAIT_POLICY": "7 None", "GOMP_SPINCOUNT": "None 7"}[chosen]
    assert (done.returncode, done.stdout.split("\n")[0]) == (7, told), done.stderr[-2000:]


def test_the_version(tmp_path: Path) -> None:
    from lora_practice import __version__

    assert run(tmp_path, CLI, "--version").out.strip() == __version__


def test_every_training_flag_of_the_contract() -> None:
    from fine_tuning_practice import TrainSettings
    from lora_practice.console.settings import parse

    defaults = parse(TrainSettings, [], "prog", "")
    assert {name: getattr(defaults, name) for name in TRAIN_DEFAULTS} == TRAIN_DEFAULTS
    check_both_spellings(TrainSettings, TRAIN_DEFAULTS)


def test_every_inference_flag_of_the_contract() -> None:
    from inference import InferenceSettings
    from lora_practice.console.settings import parse

    assert vars(InferenceSettings()) == INFER_DEFAULTS
    check_both_spellings(InferenceSettings, INFER_DEFAULTS)
    assert parse(InferenceSettings, ["--prompt", "a", "--prompt", "b"], "prog", "").prompt == ["a", "b"]


def check_both_spellings(cls: Any, defaults: dict[str, Any]) -> None:
    from lora_practice.console.settings import parse

    for name, default in defaults.items():
        for flag in (f"--{name}", "--" + name.replace("_", "-")):
            if isinstance(default, bool):
                assert getattr(parse(cls, [flag], "prog", ""), name) is True
                off = flag.replace("--", "--no-", 1)
                assert getattr(parse(cls, [off], "prog", ""), name) is False
            else:
                given = "x" if default is None else str(default)
                expected = ["x"] if default is None else default
                assert getattr(parse(cls, [flag, given], "prog", ""), name) == expected


def test_every_flag_has_its_why_in_both_languages(tmp_path: Path) -> None:
    chinese, english = (run(tmp_path, TRAIN, "--help", lang=lang).out for lang in ("zh", "en"))
    for name in TRAIN_DEFAULTS:
        assert f"--{name}" in chinese
        assert f"--{name}" in english
    assert not any("\u4e00" <= letter <= "\u9fff" for letter in english)


def test_every_upload_flag_of_the_contract(tmp_path: Path) -> None:
    shown = run(tmp_path, UPLOAD, "--help").out.replace("_", "-")
    for flag in UPLOAD_FLAGS:
        assert f"--{flag}" in shown


@pytest.mark.parametrize("entry", [TRAIN, INFER, UPLOAD, (*CLI, "train"), (*CLI, "infer"), (*CLI, "upload")])
def test_a_wrong_flag_costs_one_line(entry: tuple[str, ...], tmp_path: Path) -> None:
    flags = {"train": "--lora-rnk=3", "infer": "--max-new-token=3", "upload": "--repo_idd=x"}
    command = entry[-1] if entry[:2] == CLI else {TRAIN: "train", INFER: "infer", UPLOAD: "upload"}[entry]
    done = run(tmp_path, entry, flags[command])
    assert done.code == 2
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("Error: unknown flag")
    assert "did you mean --" in line
    assert list(tmp_path.iterdir()) == []


def test_wrong_values_gather_into_one_line_and_write_nothing(tmp_path: Path) -> None:
    wrong = ("--lora_r", "zero", "--learning-rate=-1", "--bf16=perhaps", "--optim", "adam", "--sedd", "1")
    done = run(tmp_path, TRAIN, *wrong, lang="zh")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert line.startswith("错误：")
    for name in ("--lora_r", "--learning_rate", "--bf16", "--optim", "--sedd"):
        assert name in line
    assert "是不是 --seed？" in line and "？；" not in line and "; " not in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entry", "flags", "word"),
    [
        (CLI, ("tain",), "no such command: tain"),
        ((*CLI, "check-data"), (), "FILE is missing -> lora-practice check-data --help"),
        (INFER, (), "no --prompt, and no question on stdin"),
        (TRAIN, ("--dataset_path", "missing.jsonl", "--embedded"), "missing.jsonl: no such data file"),
        (
            TRAIN,
            ("--dataset_path=own.jsonl", "--embedded", "--model_name", "me/mine"),
            "--embedded contradicts --model_name me/mine",
        ),
        (TRAIN, ("--dataset_path=own.jsonl", "--model_name", "./nowhere"), "./nowhere: no such model folder"),
        (TRAIN, ("--dataset_path=own.jsonl", "--embedded", "--json"), "--json goes with --plan -> --plan --json"),
    ],
)
def test_other_mistakes_end_early(entry: tuple[str, ...], flags: tuple[str, ...], word: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"  # nothing may be fetched before the mistake is found
    (tmp_path / "own.jsonl").write_text("{}")
    done = run(tmp_path, entry, *flags, LORA_PRACTICE_CACHE=str(cache), PIP_NO_INDEX="1")
    assert done.code == 2
    assert word in done.out + done.err
    assert not (tmp_path / "outputs").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="forks are used on Linux only")
def test_a_process_that_hangs_is_not_taken_for_one_that_was_killed() -> None:
    for command, seconds, expected in (("exec sleep 600", 0.1, ready_python.LATE), ("kill -9 $$", 600, -9)):
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", command], {"PATH": os.environ["PATH"]})
        assert ready_python.wait(pid, seconds) == expected


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_ctrl_c_while_an_entry_point_ends_shows_no_traceback(tmp_path):
    """torch's own leaving takes a moment."""
    (tmp_path / "one.py").write_text(
        "import atexit, os, signal\n"
        "from lora_practice.console.errors import entry_point\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "entry_point(lambda: 0)()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "one.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stderr == "" and done.returncode == -signal.SIGINT
