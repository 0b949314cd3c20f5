"""User errors: a mistake of the user's ends the program with one clear line instead of a traceback."""

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
# exceptions that are never the failure of a library; any other may be, since a panic in Rust (tokenizers, safetensors)
# is no Exception
NOT_LIBRARY_FAILURES = (KeyboardInterrupt, SystemExit, MemoryError)
DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake that the user can correct: shown as one line without a traceback, with exit code 2.

    Args:
        what: what is wrong, in the user's language (use `text`).
        where: file, line or field; may be empty.
        fix: what to do about it; may be empty.
        details: instances of the mistake, each shown on its own line below; usually none.
    """

    def __init__(self, what: str, where: str = "", fix: str = "", details: Sequence[str] = ()) -> None:
        # text from a library or a file may contain line breaks
        self.what, self.where, self.fix = " ".join(what.splitlines()), visible(where).replace("\n", "\\n"), fix
        self.details = [" ".join(one.splitlines()) for one in details]
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        if self.details:  # each with a cure of its own: that of the whole is the last line
            return "\n".join([f"{place}{self.what}", *(f"  {one}" for one in self.details), *filter(None, [self.fix])])
        cure = f" {text('→', '->')} {self.fix}" if self.fix else ""
        return f"{place}{self.what}{cure}"


def reason_of(error: BaseException) -> str:
    """The message of another library's exception, in one line of at most 200 characters."""
    words = str(error).strip() or type(error).__name__
    return words.splitlines()[0][:200]


def expand_home(path: str) -> Path:
    """The path with `~` expanded; unchanged if there is no such home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of any library means that memory ran out, on a card or the CPU. Does not import torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch.cuda's
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    words = ("not enough memory", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc")
    return isinstance(error, (RuntimeError, ImportError)) and any(word in str(error) for word in words)


def _users_error(error: BaseException) -> UserError | None:
    """The UserError for a system error that the user can correct; None for any other error."""
    if out_of_memory(error):
        return UserError(text("内存不够", "out of memory"), fix=text("关掉其他程序", "close other programs"))
    if isinstance(error, OSError) and error.errno in _UNREACHABLE and error.filename is not None:
        return UserError(error.strerror or "", str(error.filename)[:200])
    if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        again = text("腾出磁盘空间，再运行一次", "free some space, then run it again")
        return UserError(error.strerror or "", str(error.filename or "")[:200], again)
    return None


def entry_point(main: Callable[..., int | None]) -> Callable[..., None]:
    """Wrap a script's `main`: a user error becomes one line and exit code 2, Ctrl-C exit code 130.

    A path without permission or that is invalid (a link to itself, a name too long), a full disk and too little memory
    are user errors too. Any other error keeps its traceback, with tokens removed.
    """

    @functools.wraps(main)
    def guarded(*args: object, **kwargs: object) -> None:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a Chinese Windows console is GBK and lacks some characters
                stream.reconfigure(errors="replace")
        try:
            code = main(*args, **kwargs)
        except UserError as error:
            tell(f"{text('错误：', 'Error: ')}{error}")
            code = EXIT_USER_ERROR
        except Exception as error:
            user_error = _users_error(error)
            if user_error is not None:
                tell(f"{text('错误：', 'Error: ')}{user_error}")
            code = EXIT_USER_ERROR if user_error is not None else _unexpected(error)
        except KeyboardInterrupt:
            tell(text("已中断。", "Interrupted."))
            code = 130
        # everything is written; Ctrl-C while libraries shut down would show their tracebacks
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
        sys.exit(code or 0)

    return guarded


def _unexpected(error: Exception) -> int:
    """Raise the error again; if its traceback contains a token, print it without the token and return exit code 1."""
    shown = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    if without_tokens(shown) == shown:
        raise error
    print(without_tokens(shown), file=sys.stderr, end="")
    return 1
