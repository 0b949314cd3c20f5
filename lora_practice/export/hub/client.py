"""Calls to the Hub: with a time limit, repeated when a connection breaks, with errors in the user's words, no token."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from lora_practice import compat
from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text, without_tokens
from lora_practice.sources.environment import TOKEN_PAGE

_Result = TypeVar("_Result")
NETWORK_TRIES = 5
LONGEST_WAIT = 30.0  # seconds


def redact(message: str, token: str = "") -> str:
    """The message without tokens, and without the query of an address (storage addresses are signed there)."""
    if token:
        message = message.replace(token, "***")
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1?…", without_tokens(message))


@dataclass(frozen=True)
class HubProblem:
    """A failed call.

    Attributes:
        retry: another try may help.
        wait: seconds until then, if the Hub named them.
    """

    error: UserError
    retry: bool = False
    wait: float | None = None


@dataclass(frozen=True)
class HubClient:
    """Makes calls to the Hub about one repository.

    Args:
        token: a secret that is kept out of every message.
        repo_id: owner/name, named in every error.
        endpoint: the Hub's address.
        pause: waits for a number of seconds.
    """

    token: str
    repo_id: str
    endpoint: str
    pause: Callable[[float], None] = time.sleep

    def call(
        self,
        step: str,
        request: Callable[[], _Result],
        tries: int = NETWORK_TRIES,
        before_retry: Callable[[], None] | None = None,
    ) -> _Result:
        """The result of `request()`, repeated at most `tries` times with growing pauses.

        Repeated are broken connections and the statuses 429 and 5xx.

        Args:
            step: what is being done, for the messages.

        Raises:
            UserError: what went wrong, in one line; other errors pass as they are unless they show the token.
        """
        for attempt in range(1, tries + 1):
            try:
                return request()
            except Exception as error:
                problem = self.explain(error)
                if problem is None:
                    if redact(str(error), self.token) == str(error):
                        raise
                    problem = HubProblem(UserError(redact(f"{type(error).__name__}: {error}", self.token)))
                if not problem.retry or attempt == tries:
                    raise problem.error from None
                wait = min(problem.wait or 2.0 ** (attempt - 1), LONGEST_WAIT)
            again = text(f"{wait:.0f} 秒后第 {attempt + 1}/{tries} 次", f"try {attempt + 1}/{tries} in {wait:.0f} s")
            tell(f"{step}: {problem.error.what} {text('→', '->')} {again}")
            if before_retry is not None:
                before_retry()
            self.pause(wait)
        raise AssertionError("the last try returns or raises")

    def explain(self, error: BaseException) -> HubProblem | None:
        """The problem behind an exception; None if it is neither the Hub's nor the network's."""
        chain = list(_causes(error))
        if isinstance(error, ValueError) and "metadata in README.md" in str(error):
            reason = redact(" ".join(str(error).split()), self.token)
            return HubProblem(UserError(text(f"Hub 不接受：{reason}", f"the Hub refuses this: {reason}"), self.repo_id))
        for one in chain:
            response = getattr(one, "response", None)
            if getattr(response, "status_code", None) is not None:
                return self._explain_status(response, one)
        for one in chain:
            if isinstance(one, json.JSONDecodeError):
                zh, en = (
                    "这个地址不像 Hub（回答不是 JSON）",
                    "this address does not answer like a Hub (no JSON)",
                )
                fix = text("检查 HF_ENDPOINT", "check HF_ENDPOINT")
                return HubProblem(UserError(text(zh, en), self.endpoint, fix))
            if isinstance(one, compat.network_errors()) or type(one).__module__.startswith("hf_xet"):
                return self._explain_connection(one)
        return None

    def _explain_status(self, response: Any, error: BaseException) -> HubProblem:
        status = int(response.status_code)
        message = response.headers.get("X-Error-Message") or getattr(error, "server_message", None) or ""
        message = redact(" ".join(str(message).split())[:300], self.token)
        what, fix = _status_message(status, self.repo_id, message)
        wait = response.headers.get("Retry-After") or ""
        seconds = float(wait) if re.fullmatch(r"\d+", wait) else None
        user_error = UserError(f"HTTP {status}: {what}", self.repo_id, fix)
        return HubProblem(user_error, status == 429 or status >= 500, seconds)

    def _explain_connection(self, error: BaseException) -> HubProblem:
        reason = redact(" ".join(str(error).split())[:200] or type(error).__name__, self.token)
        if "CERTIFICATE" in reason.upper():
            zh, en = f"不信任服务器的证书：{reason}", f"the server's certificate is not trusted: {reason}"
            fix = text("检查代理、系统时间与 SSL_CERT_FILE", "check the proxy, the clock and SSL_CERT_FILE")
            return HubProblem(UserError(text(zh, en), self.endpoint, fix))
        zh, en = f"连接中断或无应答（{reason}）", f"the connection broke or nobody answered ({reason})"
        fix = text(
            "检查网络、代理和 HF_ENDPOINT 后再运行一次，已传完的大文件不会重传",
            "check the network, the proxy and HF_ENDPOINT, then run again: large files that arrived are kept",
        )
        return HubProblem(UserError(text(zh, en), self.endpoint, fix), retry=True)


def configure_hub_library(token: str, timeout: float) -> None:
    """Set up huggingface_hub: its log shows no token, and it gives a silent server up after `timeout` seconds.

    Without that it waits for ever.
    """
    compat.set_hub_timeout(timeout)

    class RedactedLog(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(f"huggingface_hub: {redact(record.getMessage(), token)}")

    logging.getLogger("huggingface_hub").handlers = [RedactedLog()]


def plain_transfer() -> None:
    """Send large files by plain LFS from now on: some proxies and mirrors do not let Xet through."""
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_DISABLE_XET = True


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status_message(status: int, repo_id: str, message: str) -> tuple[str, str]:
    """(what is wrong, what to do) for an HTTP status; `message` is the Hub's own sentence, "" if it sent none."""
    more = f": {message}" if message else ""
    owner = repo_id.split("/")[0]
    new_token = text(f"在 {TOKEN_PAGE} 新建 write token", f"make a write token at {TOKEN_PAGE}")
    known = {
        401: (
            text("token 不被接受（错、过期或已作废）", "the token is not accepted (wrong, expired or revoked)"),
            new_token,
        ),
        403: (
            text(f"这个 token 不能写入 {owner}{more}", f"this token may not write to {owner}{more}"),
            new_token,
        ),
        404: (
            text(f"没有这个仓库或地址{more}", f"no such repository or address{more}"),
            text("检查 --repo_id 与 HF_ENDPOINT", "check --repo_id and HF_ENDPOINT"),
        ),
        409: (
            text(f"与另一次修改冲突{more}", f"in conflict with another change{more}"),
            text("等另一次上传结束，再运行一次", "let the other upload end, then run again"),
        ),
        413: (
            text(f"文件太大{more}", f"a file is too large{more}"),
            text("去掉大文件", "leave the largest out"),
        ),
        429: (
            text(f"请求太频繁{more}", f"too many requests{more}"),
            text("等几分钟再运行一次", "wait some minutes, then run again"),
        ),
    }
    if status in known:
        return known[status]
    if status >= 500:
        fix = text("稍后再运行一次", "run again later")
        return text(f"Hub 暂时出错{more}", f"the Hub is in trouble{more}"), fix
    return text(f"Hub 拒绝了请求{more}", f"the Hub refused the request{more}"), ""
