"""Environment variables of the Hub's libraries and of OpenMP, and whether the Hub can be reached.

`prepare_environment` must run before those libraries are imported, since they read their variables once, on import.
"""

from __future__ import annotations

import functools
import http.client
import logging
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from pathlib import Path

from lora_practice import compat
from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.sources.dotenv_file import load_dotenv_file

REACH_SECONDS = 4.0
TOKEN_PAGE = "https://huggingface.co/settings/tokens"


def prepare_environment() -> None:
    """Load the variables that `.env` may set (existing ones win), and correct those of the libraries."""
    load_dotenv_file()
    old = os.environ.get("TRANSFORMERS_CACHE")
    if old and not os.environ.get("HF_HUB_CACHE"):
        os.environ["HF_HUB_CACHE"] = old
        tell(
            text(
                f"TRANSFORMERS_CACHE 已被 transformers 5 忽略：按 HF_HUB_CACHE={old} 使用",
                f"transformers 5 ignores TRANSFORMERS_CACHE: using it as HF_HUB_CACHE={old}",
            )
        )
    os.environ.pop("TRANSFORMERS_CACHE", None)
    # TRL and huggingface_hub would tell the Hub about each run, --embedded ones too
    os.environ.update(HF_HUB_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    let_waiting_threads_sleep()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # a learner cannot do anything about renames in the libraries' next major version
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about optional kernels from the Hub


def let_waiting_threads_sleep() -> None:
    """Let OpenMP threads that wait for each other spin only shortly; what the user has set for it stays.

    libgomp, which torch and the kernels share on Linux, reads it once, when torch is imported. By default its threads
    spin for milliseconds. Beside another busy program they burn the very time that the thread they wait for needs:
    training takes two to nine times longer. A short spin, some tens of microseconds, loses little on a quiet machine
    (1 to 13 % in the runs measured) and most of the harm on a busy one (`python -m bench.busy`, docs/performance.md).
    """
    if not any(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def ensure_single_process() -> None:
    """Remove the variables of torchrun and accelerate launch, so that this process trains alone as configured here.

    Raises:
        UserError: several processes were started, which would all write to one folder.
    """
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        started = os.environ.get(name, "").strip()
        if started not in ("", "0", "1"):
            raise UserError(
                text(f"训练只用一个进程，却启动了 {started} 个", f"one process trains, but {started} were started"),
                where=name,
                fix=text(
                    "不用 torchrun 或 accelerate launch，直接运行；有几张显卡也只用第一张",
                    "start it without torchrun or accelerate launch; of several cards it takes the first",
                ),
            )
    os.environ.pop("LOCAL_RANK", None)
    found = {name: os.environ.pop(name) for name in sorted(os.environ) if name.startswith("ACCELERATE_")}
    asking = [f"{name}={value}" for name, value in found.items() if value.lower() not in ("", "no", "0", "false")]
    if asking:  # such as a precision other than the recorded one
        tell(text(f"这些变量不起作用：{' '.join(asking)}", f"not followed here: {' '.join(asking)}"))


def hub_endpoint() -> str:
    """URL of the Hub, or of the mirror in HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def offline_wanted() -> bool:
    """Whether HF_HUB_OFFLINE is set, in any spelling that huggingface_hub accepts."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@functools.lru_cache(maxsize=1)
def hub_is_reachable() -> bool:
    """Whether the Hub answers within REACH_SECONDS, DNS included. If not, the process goes offline.

    An answer such as HTTP 503, which may pass, is asked for again within that time.
    """
    _last_status.clear()
    if offline_wanted():
        return False
    if not hub_endpoint().lower().startswith(("http://", "https://")):  # file:// would be answered by this disk
        go_offline()
        return False
    answered = threading.Event()
    asking = threading.Thread(target=_ask_hub, args=(hub_endpoint(), time.monotonic() + REACH_SECONDS, answered))
    asking.daemon = True
    asking.start()
    asking.join(REACH_SECONDS)
    if not answered.is_set():
        go_offline()
    return answered.is_set()


def hub_trouble(name_zh: str = "Hub", name_en: str = "the Hub") -> str:
    """What is wrong with a Hub that is not reachable, for a message: no answer, or the status that it answers with."""
    if _last_status:
        return text(f"{name_zh} 出错（HTTP {_last_status[-1]}）", f"{name_en} answers with HTTP {_last_status[-1]}")
    return text(f"连不上 {name_zh}", f"{name_en} cannot be reached")


_last_status: list[int] = []  # of the answers that `hub_is_reachable` did not count as one


def _ask_hub(endpoint: str, until: float, answered: threading.Event) -> None:
    """Set `answered` once the Hub answers with a status below 500 before the time `until` (time.monotonic)."""
    request = urllib.request.Request(endpoint + "/api/models?limit=1", method="GET")
    while (left := until - time.monotonic()) > 0:
        try:
            with urllib.request.urlopen(request, timeout=left):  # nosec B310 # http or https, see above
                answered.set()
                return
        except urllib.error.HTTPError as error:
            if error.code < 500:  # even a refusal is an answer
                answered.set()
                return
            _last_status.append(error.code)
        except (OSError, ValueError, http.client.HTTPException):
            return
        time.sleep(REACH_SECONDS / 8)


def go_offline() -> None:
    """Keep all libraries from contacting the Hub from now on; they would wait through their retries."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True


def hub_cache() -> Path:
    """Folder in which huggingface_hub keeps its downloads: HF_HUB_CACHE, else `hub` in HF_HOME."""
    return Path(os.environ.get("HF_HUB_CACHE") or _home() / "hub").expanduser()


def datasets_cache() -> Path:
    """Folder in which `datasets` keeps what it has loaded: HF_DATASETS_CACHE, else `datasets` in HF_HOME."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or _home() / "datasets").expanduser()


def _home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface").expanduser()


def dataset_is_cached(name: str) -> bool:
    """Whether this Hub data set is in the cache of `datasets`, in any configuration."""
    folder = name.replace("/", "___")
    return any(any(datasets_cache().glob(one + "/**/dataset_info.json")) for one in (folder, folder.lower()))


def check_token(token: str) -> str:
    """The token, if it has the form of one. Raises UserError, which does not show it."""
    fix = text(f"在 {TOKEN_PAGE} 新建，写进环境变量或 .env", f"make one at {TOKEN_PAGE}; set it, or put it in .env")
    if not token:
        raise UserError(text("没有设置 HF_TOKEN", "HF_TOKEN is not set"), fix=fix)
    if not re.fullmatch(r"[!-~]{8,}", token):
        zh, en = (
            "不像 token（太短，或有空格、中文等字符）",
            "does not look like a token (too short, or odd characters)",
        )
        raise UserError(text(zh, en), "HF_TOKEN", fix)
    return token


def check_login(skip: bool) -> None:
    """Print whose token is used. Raises UserError if the Hub refuses the token."""
    if skip:
        os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
        return
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token or not hub_is_reachable():
        return
    check_token(token)
    from huggingface_hub import HfApi

    try:
        name = HfApi().whoami()["name"]
    except compat.network_errors(OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status not in (401, 403):
            tell(
                text("Hub 没有确认 HF_TOKEN 是否有效，继续", "the Hub did not say whether HF_TOKEN is right: going on")
            )
            return
        raise UserError(
            text("Hub 不接受 HF_TOKEN", "the Hub does not accept HF_TOKEN"),
            fix=text("换一个 token，或加 --skip_login 不登录", "use another token, or --skip_login to go without"),
        ) from error
    tell(text(f"已登录 Hugging Face：{name}", f"logged in to Hugging Face as {name}"))
