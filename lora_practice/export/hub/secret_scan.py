"""Scans a file before it is uploaded: its size and hashes, and whether it holds a secret or a private path."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.export.hub.secret_patterns import HOST_FOLDER, SECRET_NAME, find_secret

SCAN_BYTES = 1 << 20  # bytes read at a time
OVERLAP = 512  # bytes kept from the chunk before: a secret may lie across the border of two chunks
TEXT_SUFFIXES = frozenset(
    ("", ".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".jinja", ".html", ".csv", ".log", ".svg")
)


@dataclass(frozen=True)
class ScannedFile:
    """What one pass over a file found. `size` is in bytes, `git_sha1` the hash that git gives to such a blob."""

    size: int
    sha256: str
    git_sha1: str
    has_private_path: bool


def scan_file(
    path: Path, name: str, token: str, private_paths: Iterable[str], data: Optional[bytes] = None
) -> ScannedFile:
    """Read one file once, in chunks, however large it is.

    Args:
        name: what errors call the file; it is searched for secrets too.
        token: a secret that no pattern knows; "" for none.
        private_paths: paths that must not be sent. Any letter may stand before one: in a pickle it is its length.
            TensorBoard's folder, which is named after this machine, counts as one.
        data: what is sent instead of the bytes on the disk.

    Raises:
        UserError: the file looks like a secret, by its name or by its content, or it cannot be read.
    """
    if SECRET_NAME.fullmatch(path.name):
        raise _secret(name, text("文件名像密钥文件", "a file of this name holds secrets"))
    needles = [one.encode() for one in private_paths]
    try:
        size = path.stat().st_size if data is None else len(data)
        sha256, git_sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        window, read, lines, is_private, is_utf16 = name.encode() + b"\0", 0, 0, False, False
        with open(path, "rb") if data is None else io.BytesIO(data) as file:
            while True:
                chunk = file.read(SCAN_BYTES)
                sha256.update(chunk)
                git_sha1.update(chunk)
                is_utf16 = is_utf16 or (read == 0 and chunk[:2] in (b"\xff\xfe", b"\xfe\xff"))
                read += len(chunk)
                window += chunk.replace(b"\0", b"") if is_utf16 else chunk
                kind = find_secret(window, token)
                if kind:
                    is_text = path.suffix.lower() in TEXT_SUFFIXES
                    raise _secret(f"{name}:{lines + _line_of(window, token)}" if is_text else name, kind)
                is_private = is_private or any(needle in window for needle in needles)
                is_private = is_private or bool(HOST_FOLDER.search(window))
                lines += window[:-OVERLAP].count(b"\n")
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


def _line_of(content: bytes, token: str) -> int:
    """The number of the first line at whose end a secret has been seen: by bisection, since lines only add some."""
    ends = [found.end() for found in re.finditer(b"\n", content)] + [len(content)]
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if find_secret(content[: ends[middle]], token) else (middle + 1, high)
    return low + 1
