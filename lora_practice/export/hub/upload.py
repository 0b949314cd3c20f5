"""Upload an output folder to the Hugging Face Hub: token first, private by default, every file verified.

Never loads torch; huggingface_hub is imported only when something is to be sent.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lora_practice.console.errors import UserError, expand_home
from lora_practice.console.settings import parse, setting
from lora_practice.console.text import tell, text
from lora_practice.export.hub.client import Link, open_link, plain_transfer
from lora_practice.export.hub.package import Parcel, pack_folder
from lora_practice.export.hub.permissions import check_connection_settings, check_permission, resolve_repo_id
from lora_practice.run.folder import DEFAULT_OUTPUT_DIR
from lora_practice.sources.environment import check_token, hub_endpoint, prepare_environment

PATHS_AT_ONCE = 100
LOOKS = 2  # a listing may lag a little behind the commit


@dataclass
class UploadSettings:
    """The flags of scripts/upload_lora_to_hub.py."""

    repo_id: str = setting(
        "",
        "仓库名 作者/名字；也可用 HF_REPO_ID，或 HF_USERNAME 加 HF_REPO_NAME",
        "owner/name; or HF_REPO_ID, or HF_USERNAME and HF_REPO_NAME",
    )
    local_dir: str = setting(DEFAULT_OUTPUT_DIR, "要上传的文件夹", "the folder to upload")
    exclude_checkpoints: bool = setting(False, "不上传 checkpoint-*", "leave checkpoint-* out")
    exclude_merged: bool = setting(False, "不上传 merged/ 和 gguf/，只传适配器", "leave merged/ and gguf/ out")
    public: bool = setting(False, "建公开仓库，而不是私有的", "make the repository public instead of private")
    commit_message: str = setting("Upload LoRA fine-tuning output", "提交说明", "what the commit says")
    dry_run: bool = setting(
        False,
        "只列出文件和大小；不需要 token，不联网",
        "only list files and sizes; needs no token and no network",
    )
    timeout: float = setting(
        60.0, "服务器沉默多少秒后重试", "seconds of silence before another try", above=0, maximum=86_400
    )


def main(argv: Sequence[str] | None = None, prog: str = "lora-practice upload") -> int:
    """Read the flags and the environment (`.env` too), then upload; prints the address of the upload."""
    zh, en = "上传训练结果到 Hugging Face Hub", "Upload a training result to the Hugging Face Hub"
    settings = parse(UploadSettings, argv, prog, text(zh, en))
    prepare_environment()
    address = upload_as_asked(settings)
    if address:
        print(address)
    return 0


def upload_as_asked(settings: UploadSettings) -> str:
    """Do what the settings ask. Returns the address of the upload ('' for a dry run).

    Raises:
        UserError: nothing to send, something that must not be sent, no permission, or the upload failed.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    parcel = pack_folder(expand_home(settings.local_dir), settings.exclude_checkpoints, token, settings.exclude_merged)
    for note in parcel.notes:
        tell(note)
    if settings.dry_run:
        print(listing(parcel, settings.public))
        return ""
    repo_id = resolve_repo_id(settings.repo_id, os.environ)
    token = check_token(token)
    if not settings.commit_message.strip() or token in settings.commit_message:
        zh, en = "不能是空的，也不能含 token", "must not be empty, nor hold the token"
        raise UserError(text(zh, en), "--commit_message")
    check_connection_settings()
    return send_folder(parcel, repo_id, token, settings.public, settings.commit_message, settings.timeout)


def send_folder(parcel: Parcel, repo_id: str, token: str, public: bool, message: str, silence: float = 60.0) -> str:
    """Check the token, create the repository, send, verify. Returns its address.

    `silence` is in seconds. Sending again is safe: large files already on the server are not sent twice.

    Raises:
        UserError: any refusal or failure, in one line without the token.
    """
    if urlsplit(hub_endpoint()).hostname not in ("huggingface.co", "hf.co"):
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # Xet's own servers are not behind a mirror
    open_link(token, silence)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub_endpoint(), token=token)
    link = Link(token, repo_id, hub_endpoint())
    who = link.ask(text("检查 token", "checking the token"), api.whoami, tries=3)
    check_permission(who, repo_id)
    creating = text("准备仓库", "preparing the repository")
    link.ask(creating, lambda: api.create_repo(repo_id, private=not public, exist_ok=True))
    info = link.ask(creating, lambda: api.model_info(repo_id, timeout=silence))
    _check_visibility(bool(info.private), public, repo_id)
    size = human_size(parcel.size)
    tell(text(f"上传 {len(parcel.items)} 个文件，{size}", f"sending {len(parcel.items)} files, {size}"))
    send = functools.partial(_commit, api, repo_id, parcel, message)
    oid = link.ask(text("上传", "sending"), send, before_retry=plain_transfer)
    verify(api, link, parcel, oid)
    return f"{hub_endpoint()}/{repo_id}"


def _commit(api: Any, repo_id: str, parcel: Parcel, message: str) -> str:
    """Send everything as one commit; returns its 40 hex digits."""
    from huggingface_hub import CommitOperationAdd

    additions = [CommitOperationAdd(item.name, item.path if item.data is None else item.data) for item in parcel.items]
    return api.create_commit(repo_id, additions, commit_message=message).oid


def verify(api: Any, link: Link, parcel: Parcel, oid: str) -> None:
    """Compare what the server lists at commit `oid` with what was sent: names, sizes, sha256 or git sha1.

    Raises:
        UserError: a file is missing there, or is another.
    """
    step = text("核对", "verifying")
    for look in range(LOOKS):
        listed: dict[str, Any] = {}
        for start in range(0, len(parcel.items), PATHS_AT_ONCE):
            names = [item.name for item in parcel.items[start : start + PATHS_AT_ONCE]]
            found = link.ask(step, functools.partial(api.get_paths_info, link.repo_id, names, revision=oid))
            listed.update({entry.path: entry for entry in found})
        problems = differences(parcel, listed)
        if not problems:
            count = len(parcel.items)
            tell(text(f"已核对 {count} 个文件，与本机一致", f"verified: {count} files, the same as here"))
            return
        if look + 1 < LOOKS:
            link.pause(2.0)
    raise UserError(
        text("上传后核对不符：", "the server does not hold what was sent: ") + "; ".join(problems[:6]),
        link.repo_id,
        text(
            "再运行一次；仍不行就看仓库里的 .gitignore",
            "run again; if it stays so, look for a .gitignore there",
        ),
    )


def differences(parcel: Parcel, listed: Mapping[str, Any]) -> list[str]:
    """Each file that the server's listing (name -> RepoFile) lacks or holds with another size or hash."""
    problems = []
    for item in parcel.items:
        entry = listed.get(item.name)
        lfs = getattr(entry, "lfs", None)
        if entry is None:
            problems.append(text(f"缺 {item.name}", f"{item.name} is missing"))
        elif entry.size != item.size:
            zh, en = f"{item.name} 大小不符", f"{item.name} has {entry.size} bytes, not {item.size}"
            problems.append(text(zh, en))
        elif (lfs.sha256 != item.sha256) if lfs else (entry.blob_id != item.git_sha1):
            problems.append(text(f"{item.name} 内容不符", f"{item.name} has other content"))
    return problems


def listing(parcel: Parcel, public: bool) -> str:
    """The dry run's table: size, name, and the sum."""
    rows = [f"{human_size(item.size):>10}  {item.name}" for item in parcel.items]
    kind = text("公开", "public") if public else text("私有", "private")
    count, size = len(rows), human_size(parcel.size)
    zh, en = f"共 {count} 个文件，{size}，{kind}仓库", f"{count} files, {size}, {kind} repository"
    return "\n".join([*rows, f"{text(zh, en)} ({text('未发送', 'nothing was sent')})"])


def human_size(size: float) -> str:
    """Bytes in the unit that fits: 12 B, 3.4 MB (powers of 1000, as the Hub shows them)."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _check_visibility(is_private: bool, public: bool, repo_id: str) -> None:
    if not is_private and not public:
        zh, en = "这个仓库已存在，而且是公开的", "this repository exists and is public"
        raise UserError(text(zh, en), repo_id, text("加 --public，或换个名字", "add --public, or choose another name"))
    if is_private and public:
        tell(text(f"{repo_id} 已存在且私有，保持私有", f"{repo_id} exists and is private: it stays private"))
