"""Replaces local paths by public names in the text files that are uploaded.

A base model in a local folder becomes its Hub name (or, without one, the folder's bare name); the output folder and
the working directory become ".", the home directory "~"; fields that hold a path are dropped from run_record.json.
The row of the training data that the record and the report show is taken out too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.model.adapter_config import ADAPTER_CONFIG
from lora_practice.run.file_kinds import CARD, FIRST_ROW_MARKS, REPORT_MARK, REPORT_PAGE
from lora_practice.storage.json_files import RECORD, parse_object, read_object, read_record

# "base_model: X", "- X" below it, or the tag "- base_model:adapter:X"
CARD_LINE = re.compile(r"(\s*(?:-\s*)?(?:base_model:\s*(?:adapter:|finetune:|merge:)?)?)(['\"]?)(.+?)\2\s*$")

# a row of the training data in report.html: between its marks, or in a page from before there were any
_FIRST_ROW_TITLES = "第一行在模型眼里的样子|第一行，模型看到的样子|The first row as the model sees it"
_FIRST_ROW = re.compile(
    "{}.*?{}\n?".format(*map(re.escape, FIRST_ROW_MARKS)).encode()
    + f'|<p class="soft">(?:{_FIRST_ROW_TITLES})[^\n]*\n<pre>.*?</pre>\n?'.encode(),
    re.DOTALL,
)
LONGEST_CARD_LINE = 2000  # characters; the time of matching CARD_LINE grows with their square


@dataclass(frozen=True)
class BaseNames:
    """The base model's names on this machine (`local`, longest first) and the one that others can use (`public`)."""

    local: tuple[str, ...] = ()
    public: str = ""
    on_hub: bool = True


def base_names(folder: Path) -> BaseNames:
    """Read the base model's names from run_record.json, adapter_config.json and config.json.

    Raises:
        UserError: a config is not JSON.
    """
    model = (read_record(folder) or {}).get("model") or {}
    named = _read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    named = named or _read_object(folder / "config.json").get("_name_or_path")
    hub_id = model.get("hub_id")
    spellings = {name for name in (named, model.get("path")) if isinstance(name, str) and name}
    if model.get("kind") == "folder" and isinstance(model.get("name"), str):
        spellings.add(model["name"])
    local = {name for name in spellings if name != hub_id and (hub_id or _is_local(name))}
    if not local:
        return BaseNames()
    ordered = tuple(sorted(local, key=len, reverse=True))
    public = hub_id or re.split(r"[\\/]", ordered[0].rstrip("\\/"))[-1]
    return BaseNames(ordered, public, on_hub=bool(hub_id))


def private_paths(folder: Path, base: BaseNames) -> dict[str, str]:
    """{absolute path that must not be sent: its replacement}, the longest paths first."""
    found: dict[str, str] = {}
    home = os.path.expanduser("~")
    for path, public in ((home, "~"), (os.getcwd(), "."), (folder.absolute(), "."), (folder.resolve(), ".")):
        found[str(path)] = public
    found.update({name: base.public for name in base.local if is_absolute(name)})
    recorded = read_record(folder) or {}
    named = [(recorded.get("data") or {}).get("path"), *(recorded.get("settings") or {}).values()]
    for path in named:  # data in another folder keeps its name, not its place
        if isinstance(path, str) and is_absolute(path):
            found.setdefault(path, Path(path).name)
    for path in list(found):  # a Windows path is also written with / or, inside JSON, with doubled backslashes
        found.setdefault(path.replace("\\", "\\\\"), found[path])
        found.setdefault(path.replace("\\", "/"), found[path])
    wanted = [path for path in found if len(re.sub(r"[\\/:]", "", path)) > 1]  # "/" and "C:\\" hide nothing
    return {path: found[path] for path in sorted(wanted, key=len, reverse=True)}


def rewrite_text(name: str, data: bytes, base: BaseNames, paths: dict[str, str]) -> bytes:
    """The text file `name` without private paths; the very same bytes when there is nothing to hide.

    Args:
        paths: replacements, from `private_paths`.

    Raises:
        UserError: run_record.json or adapter_config.json is not JSON, or README.md is not UTF-8.
    """
    short = PurePosixPath(name).name
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if short != CARD:
            return data
        raise UserError(text("不是 UTF-8", "is not UTF-8"), name, text("另存为 UTF-8", "save it as UTF-8")) from error
    before = content
    if short == RECORD:
        content = _without_paths(content, name)
    elif short == ADAPTER_CONFIG and base.local:
        content = _with_public_base(content, name, base)
    elif short == CARD and base.local:
        content = _with_public_card(content, base)
    for path, public in paths.items():
        if path in content:
            # the path itself, not a part of a longer name
            pattern = r"(?<![\w.-])" + re.escape(path) + r"(?![\w-])"
            content = re.sub(pattern, lambda _, public=public: public, content)  # type: ignore[misc]
    return data if content == before else content.encode("utf-8")


def without_first_row(name: str, data: bytes) -> bytes:
    """run_record.json or report.html without the row of the training data in it; any other file as it is."""
    short = PurePosixPath(name).name
    if short == REPORT_PAGE and REPORT_MARK.encode() in data[:4096]:
        return _FIRST_ROW.sub(b"", data)
    if short != RECORD:
        return data
    record = _parse_object(_decode(data, name), name)
    rows = record.get("data")
    if not isinstance(rows, dict) or "first_row" not in rows:
        return data
    return _dump({**record, "data": {key: one for key, one in rows.items() if key != "first_row"}}).encode("utf-8")


def update_record(data: bytes, name: str, sent: Mapping[str, str]) -> bytes:
    """run_record.json with the hashes of its files as they are sent. `sent`: {name: sha256} of all beside it."""
    record = _parse_object(_decode(data, name), name)
    files = record.get("files")
    if not isinstance(files, dict):
        return data
    record["files"] = {one: sent[one] for one in files if one in sent}
    return data if record["files"] == files else _dump(record).encode("utf-8")


def update_manifest(data: bytes, folder: str, rewritten: dict[str, tuple[int, str]], withheld: set[str]) -> bytes:
    """A checkpoint's manifest that fits the files as they are sent.

    Args:
        folder: of the manifest, in the repository ("." at the top).
        rewritten: {name in the repository: (bytes, sha256)}.
        withheld: names of files that are not sent.
    """
    manifest = _parse_object(data.decode("utf-8"), folder)
    files = manifest.get("files")
    if not isinstance(files, dict):
        return data
    for relative in list(files):
        name = (PurePosixPath(folder) / relative).as_posix()
        if name in withheld:
            del files[relative]
        elif name in rewritten and isinstance(files[relative], dict):
            size, sha256 = rewritten[name]
            files[relative] = {**files[relative], "size": size, "sha256": sha256}
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


def is_absolute(path: str) -> bool:
    """Whether this is an absolute path, on Windows or elsewhere."""
    return path.startswith(("/", "~/")) or PureWindowsPath(path).is_absolute()


def _is_local(name: str) -> bool:
    """Whether this base model name is a path here rather than a name on the Hub."""
    looks = is_absolute(name) or name.startswith((".", "~")) or "\\" in name or name.count("/") > 1
    return looks or Path(name).is_dir()


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), error) from error


def _parse_object(content: str, where: str) -> dict[str, Any]:
    try:
        return parse_object(content.encode("utf-8"))
    except ValueError as error:
        raise _unreadable(where, error) from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(where, ValueError(text("不是 UTF-8", "not UTF-8"))) from error


def _unreadable(where: str, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)
    return UserError(text(f"读不了：{reason}", f"cannot be read: {reason}"), where)


def _dump(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _without_paths(content: str, where: str) -> str:
    """run_record.json without the fields whose value is an absolute path."""
    record = _parse_object(content, where)
    cleaned = _drop_paths(record)
    return content if cleaned == record else _dump(cleaned)


def _drop_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_paths(one) for key, one in value.items() if not _is_path(one)}
    if isinstance(value, list):
        return [_drop_paths(one) for one in value if not _is_path(one)]
    return value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and is_absolute(value) and "\n" not in value


def _with_public_base(content: str, where: str, base: BaseNames) -> str:
    config = _parse_object(content, where)
    if config.get("base_model_name_or_path") not in base.local:
        return content
    config["base_model_name_or_path"] = base.public
    return _dump(config)


def _with_public_card(content: str, base: BaseNames) -> str:
    """README.md with the base's Hub name in its metadata, or with no base: the Hub refuses a path there."""
    front = re.match(r"\ufeff?---\r?\n.*?\r?\n---", content, re.DOTALL)
    if not front:
        return content
    lines = []
    for line in front.group().splitlines(keepends=True):
        found = CARD_LINE.match(line) if len(line) < LONGEST_CARD_LINE else None
        if not found or found.group(3) not in base.local:
            lines.append(line)
        elif base.on_hub:
            lines.append(f"{found.group(1)}{base.public}\n")
    return "".join(lines) + content[front.end() :]
