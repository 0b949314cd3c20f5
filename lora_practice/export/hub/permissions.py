"""Checks before anything is sent: the repository's name, whether the token may write to it, the connection."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.sources.environment import TOKEN_PAGE, hub_endpoint, offline_wanted


def resolve_repo_id(given: str, env: Mapping[str, str]) -> str:
    """The repository's owner/name: from the flag `given`, HF_REPO_ID, or HF_USERNAME and HF_REPO_NAME.

    Raises:
        UserError: none is set, or the Hub takes no such name.
    """
    chosen = _chosen_repo(given, env)
    example = text("例如 --repo_id 你的用户名/my-lora", "for example --repo_id your-name/my-lora")
    if not chosen:
        zh, en = "没有指定上传到哪个仓库", "no repository to upload to"
        raise UserError(text(zh, en), "--repo_id", example)
    part = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?"
    good = re.fullmatch(rf"{part}/(?:{part}|_[\w.-]*)", chosen, re.ASCII) and len(chosen) <= 96
    if not good or "--" in chosen or ".." in chosen or chosen.endswith(".git"):
        zh, en = f"不是 作者/名字 的形式：{chosen!r}", f"not of the form owner/name: {chosen!r}"
        if re.fullmatch(r"[^/\s]+/[^/\s]+", chosen):
            zh = f"仓库名只能用英文字母、数字和 - _ . ，不能有 -- 或 ..，最多 96 个字符：{chosen!r}"
            en = f"the Hub takes letters of English, digits and - _ . (no -- or ..), 96 at most: {chosen!r}"
        raise UserError(text(zh, en), "--repo_id", example)
    return chosen


def planned_repo_id(given: str, env: Mapping[str, str]) -> str:
    """`resolve_repo_id`, but "" where no repository is named: a dry run needs none."""
    return resolve_repo_id(given, env) if _chosen_repo(given, env) else ""


def _chosen_repo(given: str, env: Mapping[str, str]) -> str:
    user, name = env.get("HF_USERNAME", "").strip(), env.get("HF_REPO_NAME", "").strip()
    chosen = given.strip() or env.get("HF_REPO_ID", "").strip() or name
    return f"{user}/{chosen}" if chosen and "/" not in chosen and user else chosen


def check_permission(identity: Mapping[str, Any], repo_id: str) -> None:
    """Refuse a token that cannot write to `repo_id`.

    Args:
        identity: the Hub's answer to whoami.

    Raises:
        UserError: a read-only token, a fine-grained one without `repo.write` there, or someone else's namespace.
    """
    owner = repo_id.split("/")[0].casefold()
    access = (identity.get("auth") or {}).get("accessToken") or {}
    role, me = access.get("role"), str(identity.get("name", ""))
    fix = text(f"在 {TOKEN_PAGE} 新建 write token", f"make a write token at {TOKEN_PAGE}")
    if role == "read":
        raise UserError(text("这个 token 是只读的", "this token is read-only"), "HF_TOKEN", fix)
    scopes = (access.get("fineGrained") or {}).get("scoped")
    if role == "fineGrained" and scopes is not None:
        places = {str((one.get("entity") or {}).get("name", "")).casefold(): one for one in scopes}
        granted = [places[name] for name in (owner, repo_id.casefold()) if name in places]
        if not any("repo.write" in (one.get("permissions") or []) for one in granted):
            zh = f"这个细粒度 token 是只读的：没有 {repo_id} 的写权限（repo.write）"
            en = f"this fine-grained token is read-only for {repo_id}: it lacks repo.write"
            raise UserError(text(zh, en), "HF_TOKEN", fix)
        return
    names = {me.casefold(), *(str(org.get("name", "")).casefold() for org in identity.get("orgs") or [])}
    if me and owner not in names:
        zh, en = f"token 属于 {me}，不能写入 {repo_id}", f"the token is {me}'s and cannot write to {repo_id}"
        raise UserError(text(zh, en), "--repo_id", text(f"改成 {me}/…", f"use {me}/..."))


def check_connection_settings() -> None:
    """Refuse offline mode and an HF_ENDPOINT that is no address; warn if the token is sent unencrypted.

    Raises:
        UserError: nothing can be sent with these settings.
    """
    if offline_wanted():
        zh, en = "开启了离线模式，不能上传", "offline mode is on, so nothing can be uploaded"
        raise UserError(text(zh, en), "HF_HUB_OFFLINE", text("取消这个变量", "unset it"))
    address = urlsplit(hub_endpoint())
    if address.scheme not in ("http", "https") or not address.hostname:
        zh, en = f"不是网址：{hub_endpoint()!r}", f"not an address: {hub_endpoint()!r}"
        raise UserError(text(zh, en), "HF_ENDPOINT")
    if address.scheme == "http" and address.hostname not in ("localhost", "127.0.0.1", "::1"):
        zh, en = (
            "注意：HF_ENDPOINT 没有加密，token 会以明文传输",
            "note: HF_ENDPOINT is not encrypted, nor is the token",
        )
        tell(text(zh, en))
