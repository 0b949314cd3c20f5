"""Scans a file before it is uploaded: its size and hashes, and whether it holds a secret or a private path."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lora_practice.console.errors import UserError
from lora_practice.console.text import text

SCAN_BYTES = 1 << 20  # bytes read at a time
OVERLAP = 512  # bytes kept from the chunk before: a secret may lie across the border of two chunks
TEXT_SUFFIXES = frozenset(
    ("", ".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".jinja", ".html", ".csv", ".log", ".svg")
)
SECRET_NAME = re.compile(
    r"\.env(\..*)?|[._]netrc|id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx|ppk|keystore)"
    r"|\.git-credentials|\.pypirc|\.npmrc",
    re.IGNORECASE,
)
# (plain substring, which is fast over weights; full pattern; name of the kind)
SECRETS = (
    (b"hf_", re.compile(rb"(?<![A-Za-z0-9])hf_([a-z]{3,6}_)?[A-Za-z0-9]{20,}"), "Hugging Face token"),
    (b"api_org_", re.compile(rb"(?<![A-Za-z0-9])api_org_[A-Za-z0-9]{20,}"), "Hugging Face token"),
    (b"PRIVATE KEY", re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY( BLOCK)?-----"), "private key"),
    (b"gh", re.compile(rb"(?<![A-Za-z0-9])gh[pousr]_[A-Za-z0-9]{36}"), "GitHub token"),
    (b"AKIA", re.compile(rb"(?<![A-Za-z0-9])AKIA[0-9A-Z]{16}(?![A-Za-z0-9])"), "AWS key"),
)


@dataclass(frozen=True)
class ScannedFile:
    """What one pass over a file found. `size` is in bytes, `git_sha1` the hash that git gives to such a blob."""

    size: int
    sha256: str
    git_sha1: str
    has_private_path: bool


def scan_file(path: Path, name: str, token: str, private_paths: Iterable[str]) -> ScannedFile:
    """Read one file once, in chunks, however large it is.

    Args:
        name: what errors call the file; it is searched for secrets too.
        token: a secret that no pattern knows; "" for none.
        private_paths: paths that must not be sent. Any letter may stand before one: in a pickle it is its length.

    Raises:
        UserError: the file looks like a secret, by its name or by its content, or it cannot be read.
    """
    if SECRET_NAME.fullmatch(path.name):
        raise _secret(name, text("文件名像密钥文件", "a file of this name holds secrets"))
    patterns = list(SECRETS)
    if len(token) >= 8:
        patterns.insert(0, (token.encode(), re.compile(re.escape(token.encode())), "HF_TOKEN"))
    needles = [one.encode() for one in private_paths]
    try:
        size = path.stat().st_size
        sha256, git_sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        window, read, is_private, is_utf16 = name.encode() + b"\0", 0, False, False
        with open(path, "rb") as file:
            while True:
                chunk = file.read(SCAN_BYTES)
                sha256.update(chunk)
                git_sha1.update(chunk)
                is_utf16 = is_utf16 or (read == 0 and chunk[:2] in (b"\xff\xfe", b"\xfe\xff"))
                window += chunk.replace(b"\0", b"") if is_utf16 else chunk
                for needle, pattern, kind in patterns:
                    found = pattern.search(window) if needle in window else None
                    if found:
                        before = read - (len(window) - len(chunk))
                        raise _secret(_place(path, name, max(0, before + found.start())), kind)
                is_private = is_private or any(needle in window for needle in needles)
                read += len(chunk)
                window = window[-OVERLAP:]
                if not chunk:
                    return ScannedFile(size, sha256.hexdigest(), git_sha1.hexdigest(), is_private)
    except UnicodeEncodeError as error:
        raise UserError(text("文件名不是 UTF-8", "the file name is not UTF-8"), repr(name)) from error
    except OSError as error:
        zh, en = f"读不了：{error.strerror}", f"cannot be read: {error.strerror}"
        raise UserError(text(zh, en), str(path)) from error


def _secret(where: str, kind: str) -> UserError:
    zh, en = f"看起来是密钥（{kind}），拒绝上传", f"looks like a secret ({kind}): refused, nothing was sent"
    fix = text("从文件夹里删掉；如果已经泄露，请把它作废", "take it out of the folder, and revoke it if others saw it")
    return UserError(text(zh, en), where, fix)


def _place(path: Path, name: str, offset: int) -> str:
    """Where in a file the byte at `offset` is: name:line for a text, the name alone otherwise."""
    if path.suffix.lower() not in TEXT_SUFFIXES:
        return name
    with open(path, "rb") as file:
        return f"{name}:{file.read(offset).count(10) + 1}"
