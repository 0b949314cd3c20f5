"""Trainer callbacks for the user: progress lines, and a checkpoint on Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections import deque
from typing import Any, Callable

import psutil
import torch
from tqdm import tqdm
from transformers import TrainerCallback

from lora_practice.console.text import tell, text
from lora_practice.machine.device import peak_memory


class Progress(TrainerCallback):
    """A bar with step, loss, tokens/s, time left and peak memory; plain lines where stderr is no terminal.

    `tokens_seen()`: tokens trained on so far in this process. Above 1, `logs_per_line` keeps a run readable that logs
    each step: the loss shown is the mean of so many logged ones, and lines are printed for the first step, each
    `logs_per_line`-th and the last.
    """

    def __init__(self, tokens_seen: Callable[[], int], logs_per_line: int = 1) -> None:
        self.tokens_seen, self.logs_per_line = tokens_seen, logs_per_line
        self.recent: deque[float] = deque(maxlen=logs_per_line)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self.started = state.global_step, time.perf_counter()
        self.loss, self.live = "", sys.stderr.isatty()
        self.last = (self.started, self.tokens_seen())
        words = text("步", "step")
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            disable=not self.live,
            ncols=min(100, shutil.get_terminal_size().columns - 1),
            nrows=shutil.get_terminal_size().lines,  # tqdm shows nothing where the terminal says 0
            bar_format=words + " {n_fmt}/{total_fmt} |{bar}| {desc}",
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.set_description_str(self._words(state), refresh=False)
        self.bar.update(state.global_step - self.bar.n)
        if state.global_step == state.max_steps:
            control.should_log = True  # the last loss belongs to the record

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "eval_loss" in logs:
            loss, perplexity = f"{logs['eval_loss']:.3f}", f"{logs['eval_perplexity']:.2f}"
            words = text(f"验证损失 {loss}，困惑度 {perplexity}", f"validation loss {loss}, perplexity {perplexity}")
            self.bar.clear()
            tell(f"{text('步', 'step')} {state.global_step}/{state.max_steps}  {words}")
        if not logs or "loss" not in logs:
            return
        self.recent.append(logs["loss"])
        self.loss = f"loss {sum(self.recent) / len(self.recent):.3f}"
        self._measure(state)
        if self.live:
            self.bar.set_description_str(self._words(state))
        elif state.global_step in (1, state.max_steps) or state.global_step % self.logs_per_line == 0:
            tell(f"{text('步', 'step')} {state.global_step}/{state.max_steps}  {self._words(state)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()

    def _measure(self, state: Any) -> None:
        """Add the speed since the last logged step and the present memory to the log, which checkpoints contain."""
        now, tokens = time.perf_counter(), self.tokens_seen()
        (then, before), self.last = self.last, (now, tokens)
        speed = round((tokens - before) / max(now - then, 1e-9), 1)
        state.log_history[-1].update(tokens_per_second=speed, memory_mb=round(_memory() / 1e6))

    def _words(self, state: Any) -> str:
        done, elapsed = state.global_step - self.first_step, time.perf_counter() - self.started
        if not done:
            return self.loss
        left = elapsed / done * (state.max_steps - state.global_step)
        speed = f"{self.tokens_seen() / elapsed:.0f} tok/s"
        memory = f"{peak_memory() / 1e9:.1f} GB"
        parts = (self.loss, speed, text("剩 ", "") + clock(left) + text("", " left"), memory)
        return text("，", ", ").join(part for part in parts if part)


class SaveOnInterrupt(TrainerCallback):
    """Saves after the running step and stops on Ctrl-C, SIGTERM or a closed terminal; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.requested = False
        self.previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)  # Windows has none, and nohup ignores it
        for number in numbers:
            self.previous[number] = signal.signal(number, self._request)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.requested and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after a save during which the stop was requested: another step may take minutes."""
        control.should_training_stop |= self.requested

    def _request(self, number: int, frame: Any) -> None:
        if number == getattr(signal, "SIGHUP", None):
            _leave_the_terminal()
            self.requested = True  # a shell passes SIGHUP on, so a second one is not the user's
            return
        if self.requested:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.requested = True
        tell(
            text(
                "\n收到中断：这一步完成后保存检查点并退出（再按一次立即退出）",
                "\ninterrupted: saving after this step (once more leaves at once)",
            )
        )


def _leave_the_terminal() -> None:
    """Redirect stdout and stderr to the null device if their terminal is gone: writing to it would raise an error."""
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream)
            os.close(nowhere)


def _memory() -> int:
    """Bytes that this process holds now: on its GPU if it uses one, else in main memory."""
    on_card = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return int(on_card or psutil.Process().memory_info().rss)


def clock(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
