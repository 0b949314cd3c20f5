"""JSON files, ours or a stranger's: read within limits of size and depth, and checked for their shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import text

RECORD = "run_record.json"
LARGEST, DEEPEST = 64 << 20, 50  # bytes; nested levels (our own files have five)
_TEXTS, _OBJECTS = (
    ("status", "command", "finished_at", "replaces"),
    ("model", "data", "settings", "machine", "versions"),
)
_LISTS, _NAMES = ("losses", "samples", "events"), ("kind", "name", "path", "hub_id", "revision", "note")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no JSON object within the limits; the reason, in the user's language.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(text(f"超过 {LARGEST >> 20} MB", f"more than {LARGEST >> 20} MB"))
    return parse_object(path.read_bytes())


def parse_object(content: bytes) -> dict[str, Any]:
    """The JSON object in UTF-8 bytes. Raises ValueError with the reason in the user's language."""
    too_deep = text("嵌套太深", "nested too deep")
    try:
        value = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(text("不是 UTF-8", "not UTF-8")) from error
    except ValueError as error:
        raise ValueError(text(f"不是有效的 JSON：{error}", f"not valid JSON: {error}")) from error
    except RecursionError as error:
        raise ValueError(too_deep) from error
    if not isinstance(value, dict):
        raise ValueError(text("不是 JSON 对象", "not a JSON object"))
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        level = [below for one in level for below in (one.values() if isinstance(one, dict) else one)]
        level = [one for one in level if isinstance(one, (dict, list))]
        if not level:
            return value
    raise ValueError(too_deep)


def read_record(folder: Path) -> Optional[dict[str, Any]]:
    """run_record.json of an output folder, or of the folder that holds a checkpoint; None if there is none.

    Raises:
        UserError: the file is damaged, or is no record of a run.
    """
    for place in (folder, folder.parent) if folder.name.startswith("checkpoint-") else (folder,):
        if not (place / RECORD).is_file():
            continue
        try:
            record = read_object(place / RECORD)
            fault = _wrong_field(record)
        except (OSError, ValueError) as error:
            fault = getattr(error, "strerror", None) or str(error)
        if fault:
            raise UserError(
                text(f"无法读取训练记录：{fault}", f"the record of the run cannot be read: {fault}"),
                where=str(place / RECORD),
                fix=text(
                    "从备份恢复它；如果只用来聊天、合并、上传，也可以删掉它",
                    "bring it back from a copy; to chat, merge or upload it may also be deleted",
                ),
            )
        return record
    return None


def _wrong_field(record: dict[str, Any]) -> str:
    """A message about the first field of a record that has the wrong type; "" if none. Fields may be missing."""
    wanted: list[tuple[str, Any, type]] = [(name, record.get(name), str) for name in _TEXTS]
    wanted += [(name, record.get(name), dict) for name in _OBJECTS]
    wanted += [(name, record.get(name), list) for name in _LISTS]
    wanted += [
        (f"{part}.{name}", one.get(name), str)
        for part, one in record.items()
        if part in ("model", "data") and isinstance(one, dict)
        for name in _NAMES
    ]
    model = record.get("model")
    files = model.get("files") if isinstance(model, dict) else None
    wanted += [("model.files", one, dict) for one in (files, *(files.values() if isinstance(files, dict) else ()))]
    events = record.get("events")
    for one in events if isinstance(events, list) else []:
        event = one if isinstance(one, dict) else {}
        wanted.append(("events.step", event.get("step", ""), int))
        wanted.append(("events.compute_config", event.get("compute_config", event.get("regime", "")), dict))
    for name, value, kind in wanted:
        if value is not None and not isinstance(value, kind):
            return text(f"{name} 的类型不对", f"{name} is of the wrong kind")
    return ""
