"""What a person sees while it trains, on a terminal that says little about itself; and a stop asked for in a save."""

from __future__ import annotations

import os
import select
import signal
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals here")
@pytest.mark.parametrize("size", [(0, 0), (24, 80)], ids=["0x0", "80x24"])
def test_the_progress_line_shows_on_a_terminal_of_any_size_it_reports(size, monkeypatch):
    import fcntl
    import termios

    from lora_practice.training.callbacks import Progress

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        progress, state = Progress(lambda: 100), SimpleNamespace(global_step=0, max_steps=3, log_history=[{}])
        progress.on_train_begin(None, state, None)
        for step in (1, 2, 3):
            state.global_step = step
            time.sleep(0.11)  # the bar draws ten times a second at most
            progress.on_log(None, state, None, {"loss": 2.5})
            progress.on_step_end(None, state, SimpleNamespace())
        progress.on_train_end(None, state, None)
        terminal.flush()
        shown = ""
        # the kernel hands it on in pieces; a line that does not end fails the test instead of blocking it
        while not shown.endswith("\r\n") and select.select([ours], [], [], 30)[0]:
            shown += os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert shown.endswith("\r\n") and "step 3/3 |" in shown and "loss 2.500" in shown and "tok/s" in shown


@pytest.mark.skipif(sys.platform == "win32", reason="raises SIGTERM")
def test_asked_in_the_midst_of_a_save_the_run_stops_with_it_and_not_a_step_later(tmp_path: Path) -> None:
    from tiny_training import run, trainer_of

    trainer = trainer_of(tmp_path / "run", save_steps=2)
    save = trainer._save_checkpoint

    def interrupted(*args):
        signal.raise_signal(signal.SIGTERM)
        save(*args)

    trainer._save_checkpoint = interrupted
    notes = run(trainer)
    assert notes["interrupted"] and notes["steps"] == 2
    assert (tmp_path / "run" / "checkpoint-2" / "checkpoint.json").is_file()


def test_a_short_run_logs_each_step_and_prints_a_line_for_ten_of_them(tmp_path: Path, capsys, monkeypatch) -> None:
    """The same losses as with `--logging_steps 1`, and the same weights."""
    from tiny_training import run, same, trainer_of, weights_of

    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    automatic, each = (
        trainer_of(tmp_path / str(n), logging_steps=n, max_steps=24, save_strategy="no") for n in (10, 1)
    )
    notes = run(automatic)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/24", "10/24", "20/24", "24/24"]
    losses = [one["loss"] for one in notes["losses"]]
    for line, last in zip(lines, (1, 10, 20, 24)):
        recent = losses[max(0, last - 10) : last]
        assert f" loss {sum(recent) / len(recent):.3f}," in line
    assert [one["step"] for one in notes["losses"]] == list(range(1, 25)) and notes["logging_steps"] == 1
    assert run(each)["losses"] == notes["losses"] and same(weights_of(automatic), weights_of(each))
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(printed) == 24  # what was asked for


@pytest.mark.parametrize(
    ("asked", "changed", "used"),
    [(10, {"max_steps": 199}, 1), (10, {"max_steps": 200}, 10), (10, {"num_train_epochs": 40}, 10), (7, {}, 7)],
)
def test_how_many_steps_apart_losses_are_logged(asked: int, changed: dict, used: int, tmp_path: Path) -> None:
    """A run of 12 rows, two a step: 6 steps an epoch."""
    from tiny_training import trainer_of

    assert trainer_of(tmp_path / "run", logging_steps=asked, **changed).args.logging_steps == used


def test_the_last_line_of_a_run_tells_the_mean_of_the_last_ten_steps(monkeypatch) -> None:
    from lora_practice.run.record import last_loss

    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    each = [{"step": step, "loss": float(step)} for step in range(1, 25)]
    assert last_loss(each) == "19.500 (mean of the last 10 logged)"
    assert last_loss(each[9::10]) == "20.000"
    assert last_loss([]) == "nan"
