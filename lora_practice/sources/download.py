"""Downloads from the Hub: tried again when the connection breaks, with errors in the user's words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any, Optional, TypeVar

from lora_practice import compat
from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.storage import disk

Result = TypeVar("Result")
RETRY_WAITS = (1.0, 2.0, 4.0)  # seconds before each further try


def snapshot(name: str, patterns: list[str], local_only: bool) -> Optional[Path]:
    """Folder with the files at the top of a Hub repository; None if they are not cached and `local_only`.

    Raises:
        UserError: the Hub has no such repository or refuses it, the disk is full, or the download broke off each time.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch() -> Path:
        return _fetch_once(name, patterns, local_only)

    try:
        # with a Hub that answered before, an entry that "is not found" is a connection that broke
        return fetch() if local_only else try_again(name, fetch, LocalEntryNotFoundError, OSError)
    except compat.network_errors(LocalEntryNotFoundError, OSError) as error:
        if local_only and isinstance(error, LocalEntryNotFoundError):
            return None
        raise _broke_off(name, error) from error


def try_again(name: str, fetch: Callable[[], Result], *others: type[BaseException]) -> Result:
    """The result of `fetch()`, called again with growing pauses after network errors and `others`.

    Not called again: where the disk is full, or the Hub answers with a status that will not pass (below 500, not 429).
    """
    for wait in (*RETRY_WAITS, None):
        try:
            return fetch()
        except compat.network_errors(*others) as error:
            status = _status(error)
            if wait is None or disk.disk_refusal(error) or (status and status < 500 and status != 429):
                raise
        zh, en = (
            f"下载 {name} 中断，{wait:.0f} 秒后再试",
            f"the download of {name} broke off: trying again in {wait:.0f} s",
        )
        tell(text(zh, en))
        sleep(wait)
    raise AssertionError("the last try returns or raises")


def _status(error: BaseException) -> int:
    """The HTTP status that an error is about, or the one that it was raised from; 0 if there is none."""
    at: Optional[BaseException] = error
    while at is not None:  # a refusal of the repository arrives as the cause of LocalEntryNotFoundError
        status = getattr(getattr(at, "response", None), "status_code", None)
        if status:
            return int(status)
        at = at.__cause__
    return 0


def _fetch_once(name: str, patterns: list[str], local_only: bool) -> Path:
    """`snapshot_download` of the files at the top; what another name or token would cure becomes a UserError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        options: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": ["*/*"]}
        return Path(snapshot_download(name, local_files_only=local_only, **options))  # nosec B615 # the record keeps it
    except GatedRepoError as error:
        raise UserError(
            text("这个模型要先在网页上同意条款", "this model asks you to accept its terms on its page first"),
            where=name,
            fix=text("同意后设置 HF_TOKEN", "then set HF_TOKEN"),
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            text("Hub 上没有这个名字（或没有权限）", "the Hub has no such name (or it is private)"),
            where=name,
            fix=text("检查拼写；私有的要设置 HF_TOKEN", "check the spelling; a private one needs HF_TOKEN"),
        ) from error
    except HFValidationError as error:
        raise UserError(
            text("这不是 Hub 上的名字", "this is no name on the Hub"),
            where=name,
            fix=text("写 作者/模型，或一个存在的文件夹", "write owner/model, or a folder that exists"),
        ) from error


def _broke_off(name: str, error: BaseException) -> UserError:
    """The error for a download that did not end well: the disk, an HTTP status, or the connection."""
    full = disk.disk_refusal(error)
    if full:
        fix = text("腾出磁盘空间，或用 HF_HOME 换个地方", "free some, or name another place in HF_HOME")
        return UserError(text(f"下载时写不进磁盘：{full}", f"the disk refused the download: {full}"), name, fix)
    status = _status(error)
    reason = f"HTTP {status}" if status else type(error.__cause__ or error).__name__
    return UserError(
        text(f"下载中断：{reason}", f"the download broke off: {reason}"),
        where=name,
        fix=text("再运行一次，已下完的文件不会重来", "run again: files that arrived whole are kept"),
    )
