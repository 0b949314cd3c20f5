"""Reads `.env` of the current folder, and keeps the user's keys from servers that the user did not choose.

A folder from elsewhere may bring a `.env`. It may choose a mirror, but not who gets the user's keys: a server that is
named there gets only a key that stands there too. No Hub token goes over plain HTTP, but to this machine itself.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text

# huggingface_hub reads the first two; the third is older
TOKEN_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
# services that a run can report to: variables that name a server or a place there, and the keys that it would get
SERVICES = {
    ("WANDB_BASE_URL",): ("WANDB_API_KEY",),
    ("SWANLAB_WEB_HOST", "SWANLAB_API_HOST"): ("SWANLAB_API_KEY",),
    ("TRACKIO_SERVER_URL",): ("TRACKIO_WRITE_TOKEN",),
    ("TRACKIO_SPACE_ID",): TOKEN_NAMES,
}
# not among them: what chooses a compiler, runs code of a data set, or says where keys and kernels lie
ALLOWED = {
    *TOKEN_NAMES,
    *(name for servers, keys in SERVICES.items() for name in (*servers, *keys)),
    *("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "TRANSFORMERS_CACHE"),
    *("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_SYMLINKS_WARNING"),
    *("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DISABLE_PROGRESS_BARS"),
    *("HF_REPO_ID", "HF_USERNAME", "HF_REPO_NAME", "LORA_PRACTICE_CACHE", "LORA_PRACTICE_LANG"),
    *("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_TAGS", "WANDB_NOTES", "WANDB_MODE"),
    *("WANDB_DISABLED", "WANDB_SILENT", "WANDB_WATCH", "WANDB_LOG_MODEL"),
    *("SWANLAB_PROJECT", "SWANLAB_PROJ_NAME", "SWANLAB_WORKSPACE", "SWANLAB_EXP_NAME", "SWANLAB_MODE"),
    *("TRACKIO_PROJECT_NAME",),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
}


def load_dotenv_file() -> None:
    """Set those variables of `.env` that it may set (existing ones win), and withhold the token where it must not go.

    Raises:
        UserError: the file is not UTF-8.
    """
    file = Path.cwd() / ".env"
    found = {name: value for name, value in _values(file).items() if name in ALLOWED}
    for servers, keys in SERVICES.items():
        _follow_service(servers, keys, found)
    for name, value in found.items():
        os.environ.setdefault(name, value)
    token = next((os.environ[name] for name in TOKEN_NAMES if os.environ.get(name, "").strip()), "")
    if token and not os.environ.get("HF_TOKEN", "").strip():
        os.environ["HF_TOKEN"] = token
    _choose_token(found)
    _suggest_private(file)


def is_plain_http(endpoint: str) -> bool:
    """Whether what is sent there can be read on the way: http:// to another machine."""
    try:
        address = urlsplit(endpoint)
        host = address.hostname or ""
    except ValueError:  # http://[
        return True
    if address.scheme.lower() != "http":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


def _values(file: Path) -> Mapping[str, str]:
    """The variables of the file that are not blank. "${HF_TOKEN}" stays as it is: it could name any secret."""
    from dotenv import dotenv_values

    try:
        values = dotenv_values(file, encoding="utf-8-sig", interpolate=False)
    except UnicodeDecodeError as error:
        raise UserError(
            text(".env 不是 UTF-8", ".env is not UTF-8"),
            where=str(file),
            fix=text("用 UTF-8 编码另存", "save it in UTF-8"),
        ) from error
    return {name: value for name, value in values.items() if value is not None and value.strip()}


def _follow_service(servers: tuple[str, ...], keys: tuple[str, ...], found: dict[str, str]) -> None:
    """Let a server that `.env` names have the key that stands there, and no other; without one, do not follow it."""
    named = [name for name in servers if name in found and name not in os.environ]
    own = [name for name in keys if name in found]
    for name in named:
        if not own:
            del found[name]
            service = name.partition("_")[0]
            zh = f".env 里的 {name} 不起作用：{service} 的密钥不在 .env 里，不会发给那里指定的服务器"
            en = f"{name} in .env is not followed: no key for {service} stands there, and yours is not for that server"
            tell(text(zh, en))
    if named and own:
        for name in keys:
            os.environ.pop(name, None)


def _choose_token(found: Mapping[str, str]) -> None:
    """Leave huggingface_hub only a token that the server in HF_ENDPOINT may see: none, or the one in `.env`."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    plain_http = is_plain_http(endpoint)
    own = next((found[name] for name in TOKEN_NAMES if found.get(name)), "")
    if not plain_http and (not endpoint or endpoint != found.get("HF_ENDPOINT")):
        return
    if own and not plain_http:  # another one of the environment is not for a server that `.env` chose
        for name in TOKEN_NAMES:
            os.environ.pop(name, None)
        os.environ["HF_TOKEN"] = own
        return
    withheld = [os.environ.pop(name, "") for name in TOKEN_NAMES]
    had_one = any(withheld)
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # nosec B105 # no password; the token of `hf auth login` stays too
    if had_one and plain_http:
        zh = f"HF_ENDPOINT={endpoint} 没有加密：不发送 token → 用 https:// 的地址"
        en = f"HF_ENDPOINT={endpoint} is not encrypted: no token is sent there -> use an https:// address"
        tell(text(zh, en))
    elif had_one:
        zh = f".env 指定了服务器 {endpoint}，里面却没有 token：你的 token 不会发给它"
        zh += " → 把 HF_TOKEN 也写进 .env，或用环境变量设 HF_ENDPOINT"
        en = f".env names the server {endpoint} but holds no token: yours is not sent there"
        en += " -> put HF_TOKEN in .env too, or set HF_ENDPOINT in the environment"
        tell(text(zh, en))


def _suggest_private(file: Path) -> None:
    """Print a line if other users of this machine can read the token in `.env`."""
    if os.name == "nt" or not file.is_file() or not file.stat().st_mode & 0o044:
        return
    names = b"|".join(name.encode() for name in TOKEN_NAMES)
    if re.search(rb"^[ \t]*(export[ \t]+)?(" + names + rb")[ \t]*=[ \t]*[\"']?\w", file.read_bytes(), re.MULTILINE):
        zh = "注意：这台机器上的其他用户能读取 .env 里的 token"
        en = "note: others on this machine can read the token in .env"
        tell(f"{text(zh, en)} {text('→', '->')} chmod 600 .env")
