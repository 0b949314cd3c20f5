"""Words for people: pick a language, and end a program on a user's mistake in one clear line.

Imports nothing of ours but `terminal`, so that every other file may use it.
"""

from __future__ import annotations

import atexit
import errno
import functools
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Callable

from lora_practice.console.text import tell, text, visible, without_tokens

EXIT_USER_ERROR = 2
_UNREACHABLE = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS)
# what no library's failure is; all else may be one, since a panic of Rust (tokenizers, safetensors) is no Exception
NOT_LIBRARY_FAILURES = (KeyboardInterrupt, SystemExit, MemoryError)
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake that the user can mend. Shown as one line, without a traceback, exit code 2.

    Args:
        what: what is wrong, already in the user's language (use `text`).
        where: file, line or field; may be empty.
        fix: what to do about it; may be empty.
        details: instances of it, each on its own line below; mostly none.
    """

    def __init__(self, what: str, where: str = "", fix: str = "", details: Sequence[str] = ()) -> None:
        # what comes from other libraries or from a file may have lines of its own
        self.what, self.where, self.fix = " ".join(what.splitlines()), visible(where).replace("\n", "\\n"), fix
        self.details = [" ".join(one.splitlines()) for one in details]
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        cure = f" {text('→', '->')} {self.fix}" if self.fix else ""
        below = "".join(f"\n  {one}" for one in self.details) + "\n" if self.details else ""
        return f"{place}{self.what}{below}{cure}"


def reason_of(error: BaseException) -> str:
    """What an exception of another library says, in one line of at most 200 characters."""
    words = str(error).strip() or type(error).__name__
    return words.splitlines()[0][:200]


def expand_home(path: str) -> Path:
    """The path with `~` spelt out; as it is where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a card or on the CPU, whichever library says so. Loads no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch.cuda's
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("not enough memory", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc")
    return isinstance(error, (RuntimeError, ImportError)) and any(word in str(error) for word in words)


def _users_error(error: BaseException) -> UserError | None:
    """An error of the system that a user can mend, as one; None for any other."""
    if out_of_memory(error):
        return UserError(text("内存不够", "out of memory"), fix=text("关掉别的程序", "close other programs"))
    if isinstance(error, OSError) and error.errno in _UNREACHABLE and error.filename is not None:
        return UserError(error.strerror or "", str(error.filename)[:200])
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        again = text("腾出空间，再运行一次", "free some space, then run it again")
        return UserError(error.strerror or "", str(error.filename or "")[:200], again)
    return None


def entry_point(main: Callable[..., int | None]) -> Callable[..., None]:
    """Wrap a script's `main`: user errors become one line and exit code 2, Ctrl-C exit code 130.

    A path that may not be entered or is no path at all (a link to itself, a name too long) is a user's error too, and
    so is a full disk.
    Any other error keeps its traceback, but for a token in it.
    """

    @functools.wraps(main)
    def guarded(*args: object, **kwargs: object) -> None:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a Chinese Windows console is GBK: never die on a character
                stream.reconfigure(errors="replace")
        try:
            code = main(*args, **kwargs)
        except UserError as error:
            tell(f"{text('错误：', 'Error: ')}{error}")
            code = EXIT_USER_ERROR
        except Exception as error:
            told = _users_error(error)
            if told is not None:
                tell(f"{text('错误：', 'Error: ')}{told}")
            code = EXIT_USER_ERROR if told is not None else _unexpected(error)
        except KeyboardInterrupt:
            tell(text("已中断。", "Interrupted."))
            code = 130
        # all is written; libraries take a moment to leave, and a Ctrl-C in it would show their tracebacks
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
        sys.exit(code or 0)

    return guarded


def _unexpected(error: Exception) -> int:
    """Raise it again, for Python to show; with a token in its traceback, show that without it. The exit code."""
    told = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if without_tokens(told) == told:
        raise error
    print(without_tokens(told), file=sys.stderr, end="")
    return 1
