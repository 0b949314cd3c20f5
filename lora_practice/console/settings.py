"""Turns any dataclass of settings into flags, help and checks. Loads no torch, so `--help` answers at once.

A field is written `lora_r: int = setting(6, "为什么", "why", minimum=1)`; the two sentences become the help
text, the table in docs/settings.md and the report. `parse` turns `--lora_r 8`, `--lora-r 8` or `--lora_r=8` into the
dataclass; booleans are `--merge_adapter` / `--no_merge_adapter`. Underscores are what is shown everywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping, Sequence, Set
from typing import Any, Optional, TypeVar

from lora_practice.console.errors import UserError
from lora_practice.console.help import Section, default_note, help_page, shown_flag
from lora_practice.console.text import text

_Settings = TypeVar("_Settings")
_GIVEN = "_given"
_NO_VALUE: Any = object()  # what argparse stores for a flag whose value was left out
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
LONGEST_SHOWN = 200  # characters of a wrong value in a message


def setting(
    default: Any,
    zh: str,
    en: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: Sequence[str] = (),
    bare: str | None = None,
    common: bool = False,
    section: tuple[str, str] = ("", ""),
) -> Any:
    """A dataclass field with its line of why and its limits.

    `minimum`/`maximum` are inclusive, `above` is exclusive; `bare` is the value that the flag alone stands
    for (`--gradient_checkpointing` means "on"). `--help` shows the `common` fields first, then the others by
    `section` (zh, en): the first field of a section names it.
    """
    metadata: dict[str, Any] = {"zh": zh, "en": en, "minimum": minimum, "maximum": maximum, "above": above}
    metadata.update(choices=tuple(choices), bare=bare, common=common, section=section)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(cls: type[_Settings], argv: Sequence[str] | None, prog: str, description: str) -> _Settings:
    """Read the flags of dataclass `cls`. All problems are gathered and raised once as a UserError."""
    parser = _build_parser(cls, prog, description)
    values, unknown = parser.parse_known_args(argv)
    # the word after an unknown flag is most likely its value
    issues = [_unknown_flag(w, cls) for b, w in zip(["", *unknown], unknown) if w[:1] == "-" or b[:1] != "-"]
    types = typing.get_type_hints(cls)
    chosen: dict[str, Any] = {}
    for field in _fields(cls):
        raw = getattr(values, field.name)
        if raw is None:
            continue
        try:
            if isinstance(raw, list):
                chosen[field.name] = [_convert(one, str, field) for one in raw]
            else:
                chosen[field.name] = _convert(raw, types[field.name], field)
        except ValueError as problem:
            issues.append(str(problem))
    if issues:
        raise UserError(_joined(issues), fix=_see_help(prog))
    result = cls(**chosen)
    validate(result)
    vars(result)[_GIVEN] = frozenset(chosen)
    return result


def _joined(issues: Sequence[str]) -> str:
    """All mistakes in one line; in Chinese a question mark ends its sentence alone."""
    return text("；", "; ").join(issues).replace("？；", "？")


def validate(values: Any) -> None:
    """Check every field against its type and limits (a learner may have edited a default wrongly).

    Raises:
        UserError: naming each wrong field in one line.
    """
    types = typing.get_type_hints(type(values))
    issues = []
    for field in _fields(type(values)):
        try:
            _check(getattr(values, field.name), types[field.name], field)
        except ValueError as problem:
            issues.append(str(problem))
    if issues:
        raise UserError(_joined(issues))


def given_by_user(values: Any, shipped: Mapping[str, Any]) -> frozenset[str]:
    """Names of the settings that the user gave: as a flag, or as a default that is edited, no longer as `shipped`."""
    edited = {name for name, default in shipped.items() if getattr(values, name) != default}
    return frozenset(given_as_flags(values) | edited)


def given_as_flags(values: Any) -> frozenset[str]:
    """Names of the settings that stood on the command line (of a resumed run: on its first one, too)."""
    return vars(values).get(_GIVEN, frozenset())


def with_given(values: _Settings, **changed: Any) -> _Settings:
    """A copy with some values changed, which from then on count as given on the command line, as the others there do.

    Raises:
        UserError: a value that its setting cannot have.
    """
    result = dataclasses.replace(values, **changed)  # type: ignore[type-var]
    validate(result)
    vars(result)[_GIVEN] = given_as_flags(values).union(changed)
    return result


def as_flags(values: Any, names: Set[str]) -> list[str]:
    """Words of a command line that give these settings the values that they have, in the order of the fields."""
    words: list[str] = []
    for field in _fields(type(values)):
        value = getattr(values, field.name)
        if field.name in names and isinstance(value, bool):
            words.append(f"--{'' if value else 'no_'}{field.name}")
        elif field.name in names and value is not None:
            words += [f"--{field.name}", str(value)]
    return words


def markdown_table(cls: Any) -> str:
    """The table in docs/settings.md, made from the same strings as --help."""
    head = text("| 参数 | 默认值 | 为什么 |", "| setting | default | why |")
    rows = [f"| `{f.name}` | `{_shown_default(f)}` | {_why(f)} |" for f in _fields(cls)]
    rows = [row.replace("``", text("无", "none")) for row in rows]
    return "\n".join([head, "|---|---|---|", *rows])


def reasons(cls: Any) -> dict[str, tuple[Any, str]]:
    """For each setting its default and the line of why, in the user's language."""
    return {field.name: (field.default, _why(field)) for field in _fields(cls)}


def _fields(cls: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if "zh" in field.metadata]


def _why(field: dataclasses.Field) -> str:
    return text(field.metadata["zh"], field.metadata["en"])


def _shown_default(field: dataclasses.Field) -> Any:
    return "" if field.default in (dataclasses.MISSING, None) else field.default


class _Parser(argparse.ArgumentParser):
    """argparse's reading with this project's errors and help page."""

    page = ""

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message, fix=_see_help(self.prog))

    def format_help(self) -> str:
        return self.page


def _see_help(prog: str) -> str:
    return text(f"用 {prog} --help 看全部选项", f"see {prog} --help")


def _build_parser(cls: Any, prog: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, allow_abbrev=False, add_help=False)
    parser.page = _page(cls, prog, description)
    parser.add_argument("-h", "--help", action="help")
    types = typing.get_type_hints(cls)
    for field in _fields(cls):
        options: dict[str, Any] = {"dest": field.name, "default": None}
        flags, negated = _spellings(field.name), _spellings("no_" + field.name)
        if types[field.name] is bool:
            parser.add_argument(*flags, nargs="?", const="true", **options)
            parser.add_argument(*negated, action="store_const", const="false", **options)
        elif typing.get_origin(_plain(types[field.name])) is list:
            parser.add_argument(*flags, action="append", nargs="?", const=_NO_VALUE, **options)
        else:
            parser.add_argument(*flags, nargs="?", const=field.metadata["bare"] or _NO_VALUE, **options)
            if field.metadata["bare"]:
                parser.add_argument(*negated, action="store_const", const="off", **options)
    return parser


def _page(cls: Any, prog: str, description: str) -> str:
    """The text of `--help`: common settings first where the class marks some, then the others by section."""
    types = typing.get_type_hints(cls)
    common: list[tuple[str, str]] = [("-h, --help", text("显示这份说明", "show this help"))]
    sections = [Section(text("选项", "options"), common)]
    marked = any(field.metadata["common"] for field in _fields(cls))
    if marked:
        sections = [Section(text("常用选项", "common options"), common)]
    rows = common
    for field in _fields(cls):
        if marked and any(field.metadata["section"]):
            rows = []
            sections.append(Section(text("高级选项 · ", "advanced options, ") + text(*field.metadata["section"]), rows))
        name = f"--{field.name} {_metavar(types[field.name], field)}".rstrip()
        row = (name, _why(field) + default_note(_shown_default(field)))
        (common if field.metadata["common"] else rows).append(row)
    on = [f"--no_{field.name}" for field in _fields(cls) if field.default is True]
    ends = text("默认打开的选项这样关闭：", "what is on by default is turned off so: ") + ", ".join(on) if on else ""
    return help_page(f"{prog} [{text('选项', 'options')}]", description, sections, ends)


def _spellings(name: str) -> list[str]:
    """All accepted spellings of a flag, the shown one first: `--lora_r`, `--lora-r`; `--no_bf16`, `--no-bf16`."""
    dashed = name.replace("_", "-")
    mixed = "no-" + name[len("no_") :] if name.startswith("no_") else name
    return list(dict.fromkeys([f"--{name}", f"--{dashed}", f"--{mixed}"]))


def _metavar(kind: Any, field: dataclasses.Field) -> str:
    if field.metadata["choices"]:
        return "|".join(field.metadata["choices"])
    if kind is bool:
        return ""
    return {"int": "N", "float": "X"}.get(getattr(_plain(kind), "__name__", ""), "…")


def _plain(kind: Any) -> Any:
    """Optional[X] -> X."""
    inner = [one for one in typing.get_args(kind) if one is not type(None)]
    return inner[0] if typing.get_origin(kind) is typing.Union and inner else kind


def _unknown_flag(word: str, cls: Any) -> str:
    if not word.startswith("-"):
        return text(f"多余的参数 {word!r}", f"unexpected argument {word!r}")
    names = [field.name for field in _fields(cls)]
    if word.startswith("--no"):
        kinds = typing.get_type_hints(cls)
        names += ["no_" + field.name for field in _fields(cls) if kinds[field.name] is bool or field.metadata["bare"]]
    wanted = word.split("=")[0]
    near = difflib.get_close_matches(shown_flag(wanted), [f"--{name}" for name in names], n=1, cutoff=0.5)
    hint = text(f"，是不是 {near[0]}？", f", did you mean {near[0]}?") if near else ""
    return text(f"没有 {wanted} 这个选项{hint}", f"unknown flag {wanted}{hint}")


def _convert(raw: str, kind: Any, field: dataclasses.Field) -> Any:
    """One flag's text -> its value; ValueError with a sentence for the user."""
    kind = _plain(kind)
    value: Any = raw
    if raw is _NO_VALUE:
        raise ValueError(text(f"--{field.name} 后面要有一个值", f"--{field.name} needs a value"))
    if kind is bool:
        if raw.lower() not in TRUE + FALSE:
            raise ValueError(_expected(field, text("true 或 false", "true or false"), raw))
        value = raw.lower() in TRUE
    elif kind is int:
        if not re.fullmatch(r"[+-]?\d(_?\d){0,30}", raw.strip()):
            raise ValueError(_expected(field, text("整数", "a whole number"), raw))
        value = int(raw)
    elif kind is float:
        try:
            value = float(raw)
        except ValueError:
            raise ValueError(_expected(field, text("数字", "a number"), raw)) from None
    elif field.metadata["choices"]:
        value = raw.lower()
    _check(value, kind, field)
    return value


def _expected(field: dataclasses.Field, wanted: str, got: Any) -> str:
    shown = repr(got) if len(repr(got)) <= LONGEST_SHOWN else repr(got)[:LONGEST_SHOWN] + "..."
    return text(f"--{field.name} 应是{wanted}，写的是 {shown}", f"--{field.name} needs {wanted}, got {shown}")


def _check(value: Any, kind: Any, field: dataclasses.Field) -> None:
    if value is None and type(None) in typing.get_args(kind):
        return
    kind, limits = _plain(kind), field.metadata
    if typing.get_origin(kind) is list:
        return
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        names = {int: ("整数", "a whole number"), float: ("数字", "a number"), bool: ("True 或 False", "True or False")}
        raise ValueError(_expected(field, text(*names.get(kind, ("文字", "text"))), value))
    choices: Optional[tuple] = limits["choices"]
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.3)
        hint = text(f"，最接近的是 {near[0]}", f", the nearest is {near[0]}") if near else ""
        raise ValueError(_expected(field, text(" ", "one of ") + ", ".join(choices), value) + hint)
    if kind not in (int, float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(_expected(field, text("有限的数", "a finite number"), value))
    for bound, bad, zh, en in (
        (limits["minimum"], lambda b: value < b, "不小于", ">="),
        (limits["maximum"], lambda b: value > b, "不大于", "<="),
        (limits["above"], lambda b: value <= b, "大于", ">"),
    ):
        if bound is not None and bad(bound):
            raise ValueError(_expected(field, text(f"{zh} {bound} 的数", f"a value {en} {bound}"), value))
