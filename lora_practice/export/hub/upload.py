"""Uploads an output folder to the Hugging Face Hub: token checked first, private by default, every file verified.

torch is never loaded, and huggingface_hub only when something is sent.
"""

from __future__ import annotations

import functools
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Optional
from urllib.parse import urlsplit

from lora_practice.console.errors import UserError, expand_home
from lora_practice.console.settings import parse, setting
from lora_practice.console.terminal import aligned
from lora_practice.console.text import tell, text, visible
from lora_practice.export.hub.client import HubClient, configure_hub_library, plain_transfer
from lora_practice.export.hub.package import UploadPackage, pack_folder
from lora_practice.export.hub.permissions import (
    check_connection_settings,
    check_permission,
    planned_repo_id,
    resolve_repo_id,
)
from lora_practice.export.hub.selection import LeftOut
from lora_practice.run.folder import DEFAULT_OUTPUT_DIR
from lora_practice.sources.environment import check_token, hub_endpoint, prepare_environment

PATHS_AT_ONCE = 100
LISTINGS = 2  # the server's listing may lag a little behind the commit


@dataclass
class UploadSettings:
    """The flags of `lora-practice upload` and scripts/upload_lora_to_hub.py."""

    repo_id: str = setting(
        "",
        "仓库名 作者/名字；也可用 HF_REPO_ID，或 HF_USERNAME 加 HF_REPO_NAME",
        "owner/name; or HF_REPO_ID, or HF_USERNAME and HF_REPO_NAME",
    )
    local_dir: str = setting(DEFAULT_OUTPUT_DIR, "要上传的文件夹", "the folder to upload")
    include: Optional[list[str]] = setting(
        None,
        "另外上传其中的哪个文件或文件夹：merged、gguf、checkpoint-*、notes.txt；可以写多次",
        "a file or folder in it to send too: merged, gguf, checkpoint-*, notes.txt; repeatable",
    )
    exclude_checkpoints: bool = setting(
        False, "不上传 checkpoint-*，即使 --include 写到了它们", "leave checkpoint-* out even if --include names them"
    )
    public: bool = setting(False, "建公开仓库，而不是私有的", "make the repository public instead of private")
    commit_message: str = setting("Upload LoRA fine-tuning output", "提交说明", "the commit's message")
    dry_run: bool = setting(
        False,
        "只列出文件和大小；不需要 token，不联网",
        "only list files and sizes; needs no token and no network",
    )
    timeout: float = setting(
        60.0,
        "服务器多少秒没有响应就重试",
        "seconds without an answer before another try",
        above=0,
        maximum=86_400,
    )


def main(argv: Sequence[str] | None = None, prog: str = "lora-practice upload") -> int:
    """Read the flags and the environment (`.env` too), upload, and print the address."""
    zh, en = "上传训练结果到 Hugging Face Hub", "Upload a training result to the Hugging Face Hub"
    settings = parse(UploadSettings, argv, prog, text(zh, en))
    prepare_environment()
    address = upload_folder(settings)
    if address:
        print(address)
    return 0


def upload_folder(settings: UploadSettings) -> str:
    """Upload a folder, or list it for a dry run. Returns the address ("" for a dry run).

    Raises:
        UserError: nothing to send, something that must not be sent, no permission, or the upload failed.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    folder = expand_home(settings.local_dir)
    package = pack_folder(folder, settings.include or (), token, settings.exclude_checkpoints)
    for note in package.notes:
        tell(note)
    if settings.dry_run:
        print(listing(package, settings.public, planned_repo_id(settings.repo_id, os.environ)))
        return ""
    if package.left_out:
        names = ", ".join(_one_line(name) for name, _ in _grouped(package.left_out))
        tell(text(f"不上传：{names}（要上传就加 --include 名字）", f"left out: {names} (--include NAME sends them)"))
    repo_id = resolve_repo_id(settings.repo_id, os.environ)
    token = check_token(token)
    if not settings.commit_message.strip() or token in settings.commit_message:
        zh, en = "不能是空的，也不能含 token", "must not be empty, nor hold the token"
        raise UserError(text(zh, en), "--commit_message")
    check_connection_settings()
    return send_package(package, repo_id, token, settings.public, settings.commit_message, settings.timeout)


def send_package(
    package: UploadPackage, repo_id: str, token: str, public: bool, message: str, timeout: float = 60.0
) -> str:
    """Check the token, create the repository, send, verify. Returns the repository's address.

    Sending again is safe: large files that are on the server already are not sent twice.

    Args:
        timeout: seconds without a byte from the server, before another try.

    Raises:
        UserError: any refusal or failure, in one line without the token.
    """
    if urlsplit(hub_endpoint()).hostname not in ("huggingface.co", "hf.co"):
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # Xet's own servers are not behind a mirror
    configure_hub_library(token, timeout)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub_endpoint(), token=token)
    client = HubClient(token, repo_id, hub_endpoint())
    identity = client.call(text("检查 token", "checking the token"), api.whoami, tries=3)
    check_permission(identity, repo_id)
    creating = text("准备仓库", "preparing the repository")
    client.call(creating, lambda: api.create_repo(repo_id, private=not public, exist_ok=True))
    info = client.call(creating, lambda: api.model_info(repo_id, timeout=timeout))
    _check_visibility(bool(info.private), public, repo_id)
    count, size = len(package.files), human_size(package.size)
    tell(text(f"上传 {count} 个文件，共 {size}", f"sending {count} files, {size}"))
    send = functools.partial(_commit, api, repo_id, package, message)
    oid = client.call(text("上传", "sending"), send, before_retry=plain_transfer)
    verify(api, client, package, oid)
    return f"{hub_endpoint()}/{repo_id}"


def _commit(api: Any, repo_id: str, package: UploadPackage, message: str) -> str:
    """Send all files as one commit. Returns its id, 40 hex digits."""
    from huggingface_hub import CommitOperationAdd

    additions = [CommitOperationAdd(file.name, file.path if file.data is None else file.data) for file in package.files]
    return api.create_commit(repo_id, additions, commit_message=message).oid


def verify(api: Any, client: HubClient, package: UploadPackage, oid: str) -> None:
    """Compare the server's listing at commit `oid` with what was sent: names, sizes, sha256 or git sha1.

    Raises:
        UserError: a file is missing there, or differs.
    """
    step = text("核对", "verifying")
    for attempt in range(1, LISTINGS + 1):
        listed: dict[str, Any] = {}
        for start in range(0, len(package.files), PATHS_AT_ONCE):
            names = [file.name for file in package.files[start : start + PATHS_AT_ONCE]]
            found = client.call(step, functools.partial(api.get_paths_info, client.repo_id, names, revision=oid))
            listed.update({entry.path: entry for entry in found})
        problems = differences(package, listed)
        if not problems:
            count = len(package.files)
            tell(text(f"已核对 {count} 个文件，与本机一致", f"verified: {count} files, the same as here"))
            return
        if attempt < LISTINGS:
            client.pause(2.0)
    raise UserError(
        text("上传后核对不符：", "the server does not hold what was sent: ") + text("；", "; ").join(problems[:6]),
        client.repo_id,
        text(
            "再运行一次；如果还是不符，看看仓库里有没有 .gitignore",
            "run again; if it stays so, look for a .gitignore there",
        ),
    )


def differences(package: UploadPackage, listed: Mapping[str, Any]) -> list[str]:
    """One sentence for each file that the server lacks or holds with another size or hash.

    Args:
        listed: the server's listing, {name: RepoFile}.
    """
    problems = []
    for file in package.files:
        entry = listed.get(file.name)
        lfs = getattr(entry, "lfs", None)
        if entry is None:
            problems.append(text(f"缺少 {file.name}", f"{file.name} is missing"))
        elif entry.size != file.size:
            zh, en = f"{file.name} 大小不符", f"{file.name} has {entry.size} bytes, not {file.size}"
            problems.append(text(zh, en))
        elif (lfs.sha256 != file.sha256) if lfs else (entry.blob_id != file.git_sha1):
            problems.append(text(f"{file.name} 内容不符", f"{file.name} has other content"))
    return problems


def listing(package: UploadPackage, public: bool, repo_id: str = "") -> str:
    """The dry run's table: sizes and names, their sum and where they would go, what is left out and how to send it."""
    rows = [f"{human_size(file.size):>10}  {_one_line(file.name)}" for file in package.files]
    kind = text("公开", "public") if public else text("私有", "private")
    count, size = len(rows), human_size(package.size)
    place = repo_id and f" {repo_id}"
    zh = f"共 {count} 个文件，{size}，{kind}仓库{place}（只是列出，没有上传）"
    rows.append(text(zh, f"{count} files, {size}, {kind} repository{place} (nothing was sent)"))
    if package.left_out:
        rows += ["", text("默认不上传；要上传就加上右边的选项：", "left out; to send them too, add:")]
        rows += aligned(
            (f"{human_size(size):>10}", _one_line(name), f"--include {_one_line(shlex.quote(name.rstrip('/')))}")
            for name, size in _grouped(package.left_out)
        )
    return "\n".join(rows)


def _grouped(left_out: Sequence[LeftOut]) -> list[tuple[str, int]]:
    """(name, bytes) of each folder (with a "/"), then of each file; several checkpoints as one "checkpoint-*/"."""
    sizes: dict[str, int] = {}
    checkpoints = [one for one in left_out if one.is_folder and fnmatchcase(one.name, "checkpoint-*")]
    for one in sorted(left_out, key=lambda one: not one.is_folder):
        name = "checkpoint-*" if one in checkpoints and len(checkpoints) > 1 else one.name
        name += "/" * one.is_folder
        sizes[name] = sizes.get(name, 0) + one.size
    return list(sizes.items())


def _one_line(name: str) -> str:
    """A file's name with its control characters and line breaks escaped."""
    return visible(name).replace("\n", "\\n").replace("\t", "\\t")


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
