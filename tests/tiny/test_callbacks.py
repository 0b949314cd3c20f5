"""What a person sees while it trains, on a terminal that says little about itself; and a stop asked for in a save."""

from __future__ import annotations

import os
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
        while not shown.endswith("\r\n"):  # the kernel hands it on in pieces
            shown += os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "step 3/3 |" in shown and "loss 2.500" in shown and "tok/s" in shown


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
