"""The variables that steer the Hub's libraries, and whether the Hub can be reached at all.

The only reader of the HF_* variables that they read (HF_TOKEN and the repository's name are also read by the
upload). `prepare_environment` comes before those libraries are imported, since they
read their variables once, then.
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
# what `.env` may say: a folder that came from elsewhere must not choose a compiler, or where keys and kernels lie
_FROM_DOTENV = re.compile(
    r"(HF|HUGGING_FACE|LORA_PRACTICE|WANDB|SWANLAB|TRACKIO)_\w+|TRANSFORMERS_CACHE|\w+_(proxy|PROXY)"
)
TOKEN_PAGE = "https://huggingface.co/settings/tokens"


def prepare_environment() -> None:
    """Read what `.env` may say (real variables win) and mend HF_* variables, before the libraries are imported."""
    from dotenv import dotenv_values

    file = Path.cwd() / ".env"
    try:
        said = dotenv_values(file, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            text(".env 不是 UTF-8", ".env is not UTF-8"),
            where=str(file),
            fix=text("用 UTF-8 编码另存", "save it in UTF-8"),
        ) from error
    for name, value in said.items():
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
    # renames announced for the libraries' next major version say nothing to a learner
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # kernels from the Hub, which it can do without


def let_waiting_threads_sleep() -> None:
    """Let OpenMP threads that wait for each other spin only shortly; what the user has set for it stays.

    libgomp, which torch and the kernels share on Linux, reads it once, when torch is imported. By default its threads
    spin for milliseconds. Beside another busy program they burn the very time that the thread they wait for needs:
    training takes two to nine times longer. A spin of about a microsecond keeps the speed of a quiet machine;
    OMP_WAIT_POLICY=PASSIVE, no spin at all, costs it a tenth (`python -m bench.busy`, docs/performance.md).
    """
    if not any(os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def leave_launcher() -> None:
    """Be one process that decides for itself, whatever torchrun or accelerate launch left for accelerate to find.

    Raises:
        UserError: they started several, which would all write to one folder.
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
    if asking:  # such as another precision than the one that the record will name
        tell(text(f"不按这些变量：{' '.join(asking)}", f"not followed here: {' '.join(asking)}"))


def _suggest_private(file: Path) -> None:
    """One line where others on this machine may read the token in `.env`."""
    if os.name == "nt" or not file.is_file() or not file.stat().st_mode & 0o044:
        return
    if re.search(rb"^[ \t]*(export[ \t]+)?HF_TOKEN[ \t]*=[ \t]*[\"']?\w", file.read_bytes(), re.MULTILINE):
        zh, en = (
            "注意：这台机器上的其他人能读 .env 里的 token",
            "note: others on this machine can read the token in .env",
        )
        tell(f"{text(zh, en)} {text('→', '->')} chmod 600 .env")


def hub_endpoint() -> str:
    """HF_ENDPOINT (a mirror), else the Hub itself."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def offline_wanted() -> bool:
    """HF_HUB_OFFLINE, in the spellings that huggingface_hub takes."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@functools.lru_cache(maxsize=1)
def hub_is_reachable() -> bool:
    """Whether the Hub answers within 4 seconds, name look-up included. Otherwise the process goes offline."""
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
    """No library may try the Hub from here on (they would wait through their retries)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "huggingface_hub" in sys.modules:
        from huggingface_hub import constants

        constants.HF_HUB_OFFLINE = True


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it has fetched: HF_HUB_CACHE, else a folder in HF_HOME."""
    return Path(os.environ.get("HF_HUB_CACHE") or _home() / "hub").expanduser()


def datasets_cache() -> Path:
    """Where `datasets` keeps what it has loaded: HF_DATASETS_CACHE, else a folder in HF_HOME."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or _home() / "datasets").expanduser()


def _home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(cache) / "huggingface").expanduser()


def dataset_is_cached(name: str) -> bool:
    """Whether `datasets` has this Hub data set on disk, in any configuration."""
    folder = name.replace("/", "___")
    return any(any(datasets_cache().glob(one + "/**/dataset_info.json")) for one in (folder, folder.lower()))


def check_token(token: str) -> str:
    """The token, if it can be one. Raises UserError without showing it."""
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
    """Say whose token is used, before anything is fetched; a token that the Hub refuses stops the run here."""
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
            tell(text("Hub 没说 HF_TOKEN 对不对，先用着", "the Hub did not say whether HF_TOKEN is right: going on"))
            return
        raise UserError(
            text("Hub 不接受 HF_TOKEN", "the Hub does not accept HF_TOKEN"),
            where="HF_TOKEN",
            fix=text("换一个 token，或加 --skip_login 不登录", "use another token, or --skip_login to go without"),
        ) from error
    tell(text(f"已登录 Hugging Face：{name}", f"logged in to Hugging Face as {name}"))
