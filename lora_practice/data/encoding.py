"""Detect the encoding of a text file from all of its bytes, read in chunks."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import BinaryIO

from lora_practice.console.errors import UserError
from lora_practice.console.text import text

READ_BYTES = 1 << 20  # bytes per chunk while detecting
BOMS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def detect_encoding(handle: BinaryIO, path: Path) -> str:
    """The encoding of a whole text file: its BOM, else strict UTF-8, else GB18030 (which contains GBK).

    Reads in chunks of 1 MB, each byte once or twice.

    Raises:
        UserError: no encoding fits; it names the offset (from 0) of the first invalid byte, and its line.
    """
    head = handle.read(4)
    named = next((name for mark, name in BOMS if head.startswith(mark)), "")
    if not named and b"\0" in head:
        raise UserError(
            text(
                "看起来是没有 BOM 的 UTF-16，或不是文本文件",
                "this looks like UTF-16 without a BOM, or is no text",
            ),
            str(path),
            text("用编辑器另存为 UTF-8", "save it as UTF-8 in an editor"),
        )
    found = _first_misfit(handle, named or "utf-8")
    if found is None:
        return named or "utf-8"
    if not named and _first_misfit(handle, "gb18030") is None:
        return "gb18030"
    byte, line = found
    if named:
        what = text(f"第 {byte} 个字节不符合 BOM 标明的 {named}", f"byte {byte} is not {named}, which the BOM promises")
    else:
        what = text(f"第 {byte} 个字节既不是 UTF-8 也不是 GB18030", f"byte {byte} fits neither UTF-8 nor GB18030")
    raise UserError(
        what,
        str(path) if named in ("utf-16", "utf-32") else f"{path}:{line}",  # there, a byte 10 may be no line break
        text(
            "用编辑器另存为 UTF-8，或运行 iconv -f 原编码 -t UTF-8 旧文件 > 新文件",
            "save it as UTF-8 in an editor, or run: iconv -f ITS_ENCODING -t UTF-8 OLD > NEW",
        ),
    )


def _first_misfit(handle: BinaryIO, encoding: str) -> tuple[int, int] | None:
    """(offset from 0, line from 1) of the first byte that is invalid in `encoding`; None if all are valid."""
    handle.seek(0)
    decoder = codecs.getincrementaldecoder(encoding)()
    done, line, pending = 0, 1, b""
    while True:
        chunk = handle.read(READ_BYTES)
        if encoding == "utf-8" and not pending and chunk and chunk.isascii():
            done, line = done + len(chunk), line + chunk.count(b"\n")
            continue
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            return done - len(pending) + error.start, line + (pending + chunk)[: error.start].count(b"\n")
        done, line = done + len(chunk), line + chunk.count(b"\n")
        if not chunk:
            return None
        pending = decoder.getstate()[0]
