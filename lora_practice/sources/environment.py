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
import urllib.error
import urllib.request
import warnings
from pathlib import Path

from lora_practice import compat
from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text

REACH_SECONDS = 4.0
# variables that `.env` may set: a folder from elsewhere must not choose a compiler, or where keys and kernels lie
_FROM_DOTENV = re.compile(
    r"(HF|HUGGING_FACE|LORA_PRACTICE|WANDB|SWANLAB|TRACKIO)_\w+|TRANSFORMERS_CACHE|\w+_(proxy|PROXY)"
)
TOKEN_PAGE = "https://huggingface.co/settings/tokens"


def prepare_environment() -> None:
    """Load the variables that `.env` may set (existing ones win), and correct those of the libraries."""
    from dotenv import dotenv_values

    file = Path.cwd() / ".env"
    try:
        variables = dotenv_values(file, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            text(".env 不是 UTF-8", ".env is not UTF-8"),
            where=str(file),
            fix=text("用 UTF-8 编码另存", "save it in UTF-8"),
        ) from error
    for name, value in variables.items():
        if value is not None and _FROM_DOTENV.fullmatch(name):
            os.environ.setdefault(name, value)
    _suggest_private(file)
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


def _suggest_private(file: Path) -> None:
    """Print a line if other users of this machine can read the token in `.env`."""
    if os.name == "nt" or not file.is_file() or not file.stat().st_mode & 0o044:
        return
    if re.search(rb"^[ \t]*(export[ \t]+)?HF_TOKEN[ \t]*=[ \t]*[\"']?\w", file.read_bytes(), re.MULTILINE):
        zh, en = (
            "注意：这台机器上的其他用户能读取 .env 里的 token",
            "note: others on this machine can read the token in .env",
        )
        tell(f"{text(zh, en)} {text('→', '->')} chmod 600 .env")


def hub_endpoint() -> str:
    """URL of the Hub, or of the mirror in HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def offline_wanted() -> bool:
    """Whether HF_HUB_OFFLINE is set, in any spelling that huggingface_hub accepts."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@functools.lru_cache(maxsize=1)
def hub_is_reachable() -> bool:
    """Whether the Hub answers within REACH_SECONDS, DNS included. If not, the process goes offline."""
    if offline_wanted():
        return False
    if not hub_endpoint().lower().startswith(("http://", "https://")):  # file:// would be answered by this disk
        go_offline()
        return False
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(hub_endpoint() + "/api/models?limit=1", method="GET")
        try:
            with urllib.request.urlopen(request, timeout=REACH_SECONDS):  # nosec B310 # http or https, see below
                answered.set()
        except urllib.error.HTTPError as error:
            if error.code < 500:  # even a refusal is an answer
                answered.set()
        except (OSError, ValueError, http.client.HTTPException):
            pass

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(REACH_SECONDS)
    if not answered.is_set():
        go_offline()
    return answered.is_set()


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
        raise UserError(text("没有设置 HF_TOKEN", "HF_TOKEN is not set"), "HF_TOKEN", fix)
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
            where="HF_TOKEN",
            fix=text("换一个 token，或加 --skip_login 不登录", "use another token, or --skip_login to go without"),
        ) from error
    tell(text(f"已登录 Hugging Face：{name}", f"logged in to Hugging Face as {name}"))
