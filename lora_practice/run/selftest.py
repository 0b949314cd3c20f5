"""`lora-practice selftest`: proofs by real trainings of the embedded model, in a temporary folder."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lora_practice
from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.model.adapter_config import ADAPTER_WEIGHTS
from lora_practice.run.folder import checkpoints, step_of
from lora_practice.sources import embedded
from lora_practice.storage.disk import check_free_disk
from lora_practice.storage.json_files import RECORD

STEPS, SAVE_STEPS = 8, 2
TRAINING = (
    *("--embedded", "--train_subset_size", "16", "--gradient_accumulation_steps", "2", "--max_steps", str(STEPS)),
    *("--logging_steps", "1", "--save_strategy", "steps", "--save_steps", str(SAVE_STEPS), "--skip_login"),
)
# the result of a run, and the state that it would be resumed from
COMPARED_FILES = (
    ADAPTER_WEIGHTS,
    *(f"checkpoint-{STEPS}/{name}" for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")),
)
DISK_BYTES = 300_000_000


def resume() -> bool:
    """Compare a training run to its end with one that is killed and resumed; True if both are equal bit for bit.

    Runs on the CPU in fp32, where the order of additions is fixed (on a GPU it is not).

    Raises:
        UserError: the disk has too little space, or a training ended with an error.
    """
    embedded.model_dir()  # downloads here, so that its messages are shown
    embedded.conversations_file()
    elsewhere = text("，或用 TMPDIR 换个地方", ", or name another place in TMPDIR")
    check_free_disk(Path(tempfile.gettempdir()), DISK_BYTES, elsewhere)
    with tempfile.TemporaryDirectory(prefix="lora-practice-selftest-") as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        tell(text(f"1/3 训练 {STEPS} 步，中途不打断", f"1/3 training {STEPS} steps, undisturbed"))
        _end(_start(whole), whole)
        tell(text("2/3 同样的训练，中途强行杀掉（kill -9）", "2/3 the same training, killed midway (kill -9)"))
        step = _kill_midway(killed)
        tell(
            text(
                f"3/3 杀掉时已存到第 {step} 步；用 --resume 继续到底",
                f"3/3 it was killed with step {step} saved; going on with --resume",
            )
        )
        _end(_start(killed, "--resume"), killed)
        different = _differences(whole, killed)
    if different:
        print(text(f"不通过：不一样的有 {', '.join(different)}", f"FAIL: not the same: {', '.join(different)}"))
        return False
    print(
        text(
            f"通过：适配器、{STEPS} 步的 loss、优化器、学习率、随机数，与没打断的训练每一位都相同",
            f"PASS: adapter, losses of {STEPS} steps, optimizer, rate and random numbers\n"
            "      are those of the undisturbed training, bit for bit",
        )
    )
    return True


PROOFS: dict[str, Callable[[], bool]] = {"resume": resume}


def run_selftest(name: str) -> int:
    """Run the proof `name`; exit code 0 if it passed, 1 if it failed.

    Raises:
        UserError: there is no proof of this name.
    """
    if name not in PROOFS:
        raise UserError(text(f"没有 {name} 这项自检", f"no such selftest: {name}"), fix=", ".join(PROOFS))
    return 0 if PROOFS[name]() else 1


def _start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    """Start `lora-practice train` in a process of its own, without a GPU; its output goes to FOLDER.log.

    It starts in our own folder, and this package is looked for last: no module that lies beside a data set is run.
    """
    root = Path(lora_practice.__file__).resolve().parents[1]
    start = f"import sys; sys.path.append({str(root)!r}); from lora_practice.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "train", *TRAINING, "--output_dir", str(folder), *flags]
    cache = str(embedded.cache_dir().absolute())
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "LORA_PRACTICE_CACHE": cache}
    with open(f"{folder}.log", "w", encoding="utf-8") as log:
        nothing = subprocess.DEVNULL
        return subprocess.Popen(command, env=env, cwd=folder.parent, stdin=nothing, stdout=log, stderr=log, text=True)


def _end(process: subprocess.Popen[str], folder: Path) -> None:
    """Wait for a training to end; if it failed, show its output and raise UserError."""
    try:
        code = process.wait()
    finally:
        process.kill()
    if code:
        tell(Path(f"{folder}.log").read_text("utf-8", errors="replace"))
        raise UserError(
            text("自检的训练没有正常结束", "a training of the selftest did not end well"),
            fix=text(
                "原因见上面的输出；磁盘空间不够时，用 TMPDIR 指定别的位置",
                "its output is above; if the disk is full, name another place in TMPDIR",
            ),
        )


def _kill_midway(folder: Path) -> int:
    """Kill a training at a random moment after one of its first checkpoints; returns the newest checkpoint's step."""
    process = _start(folder)
    try:
        awaited = folder / f"checkpoint-{random.choice((1, 2)) * SAVE_STEPS}"
        while process.poll() is None and not awaited.is_dir():
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.1))
    finally:
        process.kill()
    if process.wait() == 0 or not awaited.is_dir():
        _end(process, folder)  # shows what went wrong
        raise UserError(text("训练在被杀掉之前就结束了", "the training ended before it could be killed"))
    return step_of(checkpoints(folder)[-1])


def _differences(first: Path, second: Path) -> list[str]:
    """Files, and fields of the record, in which two runs differ."""
    found = [name for name in COMPARED_FILES if (first / name).read_bytes() != (second / name).read_bytes()]
    records = [json.loads((folder / RECORD).read_text("utf-8")) for folder in (first, second)]
    return found + [key for key in ("losses", "steps") if records[0][key] != records[1][key]]
