"""Signatures of checkpoints and of records, which only this user on this machine can make.

Optimizer and scheduler state are pickles. torch reads them with `weights_only=True` (transformers always asks for it),
which limits what a pickle may do but has had holes (CVE-2025-32434). So a checkpoint that this user did not write on
this machine is not read unless the user says so. The signature is an HMAC-SHA256 over the manifest (path and SHA-256 of
every file), with a key of 32 random bytes in the user's configuration folder. In the manifest it is called "mark".
A record of a run has a "mark", too: over those of its settings that name what lies outside its folder.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import tell, text
from lora_practice.storage import manifest

KEY_BYTES = 32


def key_file() -> Path:
    """Path of `lora-practice/checkpoint.key` in XDG_CONFIG_HOME, APPDATA or ~/.config, the first that is set."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.environ.get("APPDATA") or "~/.config"
    return Path(config).expanduser() / "lora-practice" / "checkpoint.key"


def sign_checkpoint(checkpoint: Path, name: str) -> None:
    """Write the manifest `name` of a checkpoint, signed by this user; unsigned where no key can be stored."""
    manifest.write_manifest(checkpoint, name)
    key = _own_key()
    if key:
        content = _read(checkpoint / name)
        content["mark"] = _signature(key, content["files"])
        (checkpoint / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


def check_signature(checkpoint: Path, name: str, trusted: bool) -> None:
    """Check that a complete checkpoint may be read; `trusted` means that the user vouches for it.

    Raises:
        UserError: its signature is missing or invalid, or it holds a file that its manifest does not name.
    """
    if trusted:
        return
    content, key = _read(checkpoint / name), _existing_key()
    named = {*content["files"], name}
    unnamed = sorted({p.relative_to(checkpoint).as_posix() for p in checkpoint.rglob("*") if not p.is_dir()} - named)
    if unnamed:
        what = text(f"里面有不是训练写出的文件：{unnamed[0]}", f"it holds a file that no training wrote: {unnamed[0]}")
    elif key and _same(_signature(key, content["files"]), content.get("mark")):
        return
    else:
        what = text(
            "这个检查点（checkpoint）不是你在这台机器上保存的；里面有 pickle，可能带恶意代码",
            "not saved by you on this machine, and it holds pickles, which may hide code",
        )
    fix = text("如果信任它的来源，加 --trust_checkpoint", "if you trust where it comes from, add --trust_checkpoint")
    raise UserError(what, str(checkpoint), fix)


def sign_values(values: Mapping[str, Any]) -> str:
    """Signature over values that JSON can hold; "" where no key can be stored."""
    key = _own_key()
    return _signature_of_values(key, values) if key else ""


def signed_here(values: Mapping[str, Any], mark: Any) -> bool:
    """Whether `mark` is this user's signature over `values`, made by `sign_values` on this machine."""
    key = _existing_key()
    return key is not None and _same(_signature_of_values(key, values), mark)


def _same(signature: str, mark: Any) -> bool:
    """Whether a stranger's `mark`, of any type, is the signature."""
    return isinstance(mark, str) and hmac.compare_digest(signature.encode(), mark.encode("utf-8", "surrogatepass"))


def _signature_of_values(key: bytes, values: Mapping[str, Any]) -> str:
    content = "record 1\n" + json.dumps(values, sort_keys=True)
    return hmac.new(key, content.encode(), hashlib.sha256).hexdigest()


def _signature(key: bytes, files: dict[str, Any]) -> str:
    """HMAC-SHA256, in hexadecimal, over path and SHA-256 of every file."""
    sums = sorted((path, str(entry["sha256"])) for path, entry in files.items())
    return hmac.new(key, ("checkpoint 1\n" + json.dumps(sums)).encode(), hashlib.sha256).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def _existing_key() -> Optional[bytes]:
    try:
        key = key_file().read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: no home at all
        return None
    return key if len(key) == KEY_BYTES else None


@functools.lru_cache(maxsize=1)
def _own_key() -> Optional[bytes]:
    """The user's key, created on first use: readable by the user only, never over one that another run just made."""
    try:
        target = key_file()
        if _existing_key() is None:
            target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if target.exists():
                target.unlink()  # its length is wrong: a run was killed while it wrote the key
            handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
    except (OSError, RuntimeError) as error:
        if _existing_key() is None:
            tell(
                text(
                    f"无法保存密钥（{error}）：以后 --resume 要加 --trust_checkpoint",
                    f"no key can be kept ({error}): --resume will ask for --trust_checkpoint",
                )
            )
    return _existing_key()
