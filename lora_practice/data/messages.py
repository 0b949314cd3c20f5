"""The messages of a conversation, from user, assistant and system: roles, text and order are checked.

The functions raise BadRow with an empty origin, which the caller fills in.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypedDict

from lora_practice.console.text import counted, text
from lora_practice.data.bad_row import MAX_ROW, BadRow
from lora_practice.data.json_reader import explain_json_error, parse_json

ROLES = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "用户"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "bot", "model", "ai", "bard", "bing", "claude", "llm", "助手"),
        "assistant",
    ),
}
TOOL_CALLS = ("tool_calls", "function_call")  # an answer without its tool call would be half an answer


class Message(TypedDict):
    """One message, as a chat template reads it; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


def bad_row(cause: str, fix: str, detail: str = "") -> BadRow:
    """A BadRow without an origin; the caller fills it in."""
    return BadRow("", cause, fix, detail)


def json_type_name(value: Any) -> str:
    """The type of a JSON value, in the user's language."""
    if value is None:
        return text("空值 null", "null")
    if isinstance(value, bool):
        return text("真假值", "true/false")
    if isinstance(value, (int, float)):
        return text("数字", "a number")
    if isinstance(value, str):
        return text("文字", "text")
    if isinstance(value, Mapping):
        return text("对象 {...}", "an object {...}")
    return text("列表 [...]", "a list [...]") if isinstance(value, (list, tuple)) else type(value).__name__


def as_list(value: Any, key: str) -> list[Any]:
    """The value as a list; a table's cell may hold it as JSON text."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except RecursionError:
            value = None
        except ValueError as error:
            detail, fix = explain_json_error(error)
            raise bad_row(
                text("单元格里的 JSON 格式有误", "broken JSON inside a column"), fix, f"{key}: {detail}"
            ) from error
    if not isinstance(value, (list, tuple)):
        raise bad_row(
            text("对话不是列表", "the turns are not a list"),
            text(
                '写成 [{"role": "user", "content": "..."}, ...]',
                'write [{"role": "user", "content": "..."}, ...]',
            ),
            f"{key}: {json_type_name(value)}",
        )
    return list(value)


def read_messages(value: Any, key: str) -> list[Message]:
    """The list under `key` as messages. Raises BadRow for the first element that is no message."""
    turns: list[Message] = []
    for number, turn in enumerate(as_list(value, key), 1):
        where = f"{key} {number}"
        if not isinstance(turn, Mapping):
            raise bad_row(
                text("一条消息不是对象", "a message is not an object"),
                text('写成 {"role": "user", "content": "..."}', 'write {"role": "user", "content": "..."}'),
                f"{where}: {json_type_name(turn)}",
            )
        role = turn.get("role")
        role = _role(turn.get("from") if role is None else role, where, turn)
        if any(turn.get(name) for name in TOOL_CALLS):
            raise bad_row(
                text("消息里有工具调用", "a message calls a tool"),
                text("这里只训练文字回答：删掉这一行", "only answers in text are taught here: leave this row out"),
                where,
            )
        content = turn.get("content")
        turns.append({"role": role, "content": content_of(turn.get("value") if content is None else content, where)})
    return turns


def _role(name: Any, where: str, turn: Mapping[str, Any]) -> str:
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None and isinstance(name, str):
        role = ROLES.get(name.strip().lower())
    if role is not None:
        return role
    if name is None:
        raise bad_row(
            text("消息没有 role", "a message has no role"),
            text(
                "每条消息写 role 和 content（或 from 和 value）",
                "give each message role and content (or from and value)",
            ),
            f"{where}: " + ", ".join(repr(str(key)[:30]) for key in list(turn)[:8]),
        )
    near = get_close_matches(str(name)[:20].lower(), [role for role in ROLES if role.isascii() and len(role) > 3], 1)
    nearest = ROLES[near[0]] if near else ""
    raise bad_row(
        text("未知的 role", "unknown role"),
        text(f"改成 {nearest}", f"write {nearest}")
        if nearest
        else text(
            "只能是 system、user、assistant；工具消息请删掉这一行",
            "use system, user or assistant; leave rows with tool messages out",
        ),
        f"{where}: {str(name)[:40]!r}",
    )


def content_of(value: Any, where: str) -> str:
    """The text of one message, unchanged; a list of {"type": "text", "text": ...} parts is joined."""
    if isinstance(value, (list, tuple)) and value:
        for part in value:
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise bad_row(
                    text("内容里有文字以外的部分", "content has a part that is not text"),
                    text('只能用 {"type": "text", "text": "..."}', 'use only {"type": "text", "text": "..."}'),
                    where,
                )
        value = "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise bad_row(
            text("内容不是文字", "content is not text"),
            text('给它加上双引号，如 "42"', 'put it in double quotes, as in "42"'),
            f"{where}: {json_type_name(value)}",
        )
    if not value or value.isspace():
        raise bad_row(
            text("内容是空的", "content is empty"),
            text("补上内容，或删掉这一行", "write the content, or delete the row"),
            where,
        )
    if "\0" in value or not (value.isascii() or _encodable(value)):
        raise bad_row(
            text("内容里有无效字符", "content holds a broken character"),
            text(
                "删掉 NUL 字符和 \\ud800 到 \\udfff 之间不成对的转义",
                "remove NUL characters and unpaired escapes from \\ud800 to \\udfff",
            ),
            where,
        )
    if len(value) > MAX_ROW:
        raise bad_row(
            text("内容太长", "content is too long"),
            text(f"每行不超过 {MAX_ROW:,} 个字符", f"keep a row under {MAX_ROW:,} characters"),
            f"{where}: {len(value):,}",
        )
    return value


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def check_order(turns: list[Message]) -> None:
    """Check that a system message comes first if at all, user and assistant alternate, and one assistant answers.

    The last user message may lack an answer: it is read but not trained.

    Raises:
        BadRow: the order is another.
    """
    roles = [turn["role"] for turn in turns]
    first = 1 if roles[:1] == ["system"] else 0
    if "system" in roles[first:]:
        raise bad_row(
            text("system 不在开头", "system is not the first message"),
            text("只在最前面放一条 system", "put one system message, at the front"),
            text(f"第 {roles.index('system', first) + 1} 条", f"message {roles.index('system', first) + 1}"),
        )
    if "assistant" not in roles:
        raise bad_row(
            text("没有可训练的内容", "nothing to learn from"),
            text("至少要有一条 assistant 回答", "it takes at least one assistant message"),
            text(f"共 {len(roles)} 条消息", counted(len(roles), "message")),
        )
    if roles[first] != "user":
        raise bad_row(
            text("对话不是由 user 开头", "the conversation does not begin with user"),
            text(
                "删掉开头的 assistant，或在前面补一条 user",
                "delete the first assistant message or put a user one before it",
            ),
        )
    for index in range(first + 1, len(roles)):
        if roles[index] == roles[index - 1]:
            raise bad_row(
                text("同一角色连续出现两条消息", "two messages in a row with the same role"),
                text("合并成一条，或补上中间缺的一条", "join them, or put the missing one between"),
                text(
                    f"第 {index}、{index + 1} 条都是 {roles[index]}",
                    f"{index} and {index + 1} are {roles[index]}",
                ),
            )
