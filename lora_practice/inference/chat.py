"""The chat at the terminal: history, several lines, the base to compare with, a file to save the conversation in."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.terminal import aligned
from lora_practice.console.text import tell, text, visible
from lora_practice.inference.chat_model import ChatModel, without_adapter
from lora_practice.inference.samples import piped, print_answer, system_messages
from lora_practice.sources.embedded import cache_dir
from lora_practice.storage.json_files import parse_object

SAVED = "chat.jsonl"  # where /save writes without a name
COMMANDS = (  # each: command (zh), command (en), what it does (zh), what it does (en)
    ("/help", "/help", "显示这些说明", "show these lines"),
    ("/reset", "/reset", "清空对话历史，重新开始", "forget the conversation and start over"),
    (
        "/system 提示词",
        "/system TEXT",
        "换系统提示词并重新开始；不写提示词就是去掉",
        "set the system prompt and start over; without TEXT: none",
    ),
    (
        "/adapter off|on",
        "/adapter off|on",
        "切换：off 由底座回答，on 换回微调后的模型",
        "off: the base answers; on: the fine-tuned model",
    ),
    (
        "/save 文件名",
        "/save FILE",
        f"把对话存为一行训练数据，可以追加；不写文件名就存到 {SAVED}",
        f"save the conversation as training data ({SAVED} if no FILE)",
    ),
    ("/exit", "/exit", "退出，也可以按 Ctrl-D", "leave; so does Ctrl-D"),
)
KEYS = (
    "Enter 发送，Alt-Enter 换行，上下方向键翻看历史，Ctrl-C 中断回答",
    "Enter sends, Alt-Enter breaks the line, Up is history, Ctrl-C stops an answer",
)


class Chat:
    """One conversation, with the fine-tuned model or its base.

    Args:
        options: for `ChatModel.answer`.

    Attributes:
        active: the chat model that answers now, `adapted` or its base.
        echo: print each question before its answer, since a piped one is not seen otherwise.
        messages: the conversation so far, the system prompt included.
    """

    def __init__(self, chat_model: ChatModel, system: str = "", **options: Any) -> None:
        self.adapted, self.active, self.options = chat_model, chat_model, options
        self.base: Optional[ChatModel] = None
        self.echo = False
        self.system = system
        self.messages = system_messages(system)

    def handle(self, line: str) -> bool:
        """Answer a question or run a /command; returns False when the chat is to end."""
        command, _, argument = line.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        actions: dict[str, Callable[[str], None]] = {
            "/help": lambda _: tell(guide()),
            "/reset": lambda _: self._start_over(self.system),
            "/system": self._start_over,
            "/adapter": self._switch,
            "/save": self._save,
        }
        try:
            if command in actions:
                actions[command](argument.strip())
            elif command.startswith("/") and command[1:].isalpha() and not argument:
                tell(text(f"没有 {command} 这个命令，看 /help", f"no such command: {command}; see /help"))
            else:
                self._ask(line)
        except UserError as error:  # costs this line, not the chat
            tell(str(error))
        return True

    def _ask(self, question: str) -> None:
        asked = {"role": "user", "content": question}
        if self.echo:
            print(f"> {visible(question)}", flush=True)
        try:
            answer = print_answer(self.active, [*self.messages, asked], **self.options)
        except KeyboardInterrupt:  # ends this answer, not the chat
            print()
            tell(text("（已中断，这一问不计入历史）", "(stopped; this question does not count)"))
            return
        self.messages += [asked, {"role": "assistant", "content": answer}]

    def _start_over(self, system: str) -> None:
        self.system, self.messages = system, system_messages(system)
        prompt = text(f"，系统提示词：{system}", f"; system prompt: {system}") if system else ""
        tell(text("已重新开始", "started over") + prompt)

    def _switch(self, state: str) -> None:
        if state not in ("on", "off"):
            raise UserError(text("写 /adapter off 或 /adapter on", "write /adapter off or /adapter on"))
        if state == "on":
            self.active = self.adapted
            tell(text("现在由微调后的模型回答", "the fine-tuned model answers now"))
            return
        if self.base is None:
            self.base = without_adapter(self.adapted)
        self.active = self.base
        zh, en = "现在由底座回答", "the base answers now"
        if self.messages != system_messages(self.system):  # earlier answers of the adapter are an example to the base
            zh, en = (
                f"{zh}；它会看到前面的对话，/reset 重新开始",
                f"{en}, and sees the conversation; /reset starts over",
            )
        tell(text(zh, en))

    def _save(self, name: str) -> None:
        if self.messages == system_messages(self.system):
            raise UserError(text("还没有对话", "there is no conversation yet"))
        file = Path(name or SAVED).expanduser()
        is_known_type = file.suffix.lower() in (".jsonl", ".ndjson")  # to --dataset_path
        if not is_known_type and not file.is_dir():
            file = file.with_name(f"{file.name}.jsonl")
        rows = append_conversation(file, self.messages)
        zh, en = f"已存到 {file}（第 {rows} 行", f"saved to {file} (row {rows}"
        tell(text(f"{zh}；可以用作 --dataset_path）", f"{en}; it can serve as --dataset_path)"))


def append_conversation(file: Path, messages: list[dict[str, str]]) -> int:
    """Add a row {"messages": ...} to a JSONL file of such rows; a file that is not there is created.

    Returns:
        The number of rows in the file.

    Raises:
        UserError: the file holds something else, this very row is its last one, or it cannot be written.
    """
    row = json.dumps({"messages": messages}, ensure_ascii=False)
    try:
        before = file.read_bytes() if file.exists() else b""
        rows = [line for line in before.splitlines() if line.strip()]
        if any(not _is_conversation(line) for line in rows):
            what = text("这个文件里有别的内容，没有写入", "this file holds something else: nothing was written")
            raise UserError(what, str(file), text("换个文件名", "choose another name"))
        if rows and parse_object(rows[-1]) == {"messages": messages}:
            raise UserError(text("这段对话已经存过了", "this conversation is saved already"), str(file))
        with open(file, "ab") as opened:
            opened.write(b"\n" if before and not before.endswith(b"\n") else b"")
            opened.write(row.encode("utf-8") + b"\n")
    except OSError as error:
        raise UserError(error.strerror or str(error), str(file)) from error
    return len(rows) + 1


def _is_conversation(line: bytes) -> bool:
    """Whether a line of a file is a row that `append_conversation` may have written."""
    try:
        messages = parse_object(line).get("messages")
    except ValueError:
        return False
    return isinstance(messages, list) and all(isinstance(one, dict) and "role" in one for one in messages)


def chat_loop(name: str, chat_model: ChatModel, system: str = "", **options: Any) -> None:
    """Chat with a model loaded from `name`, until Ctrl-D, /exit or the end of a piped input (one question per line).

    `options` are for `ChatModel.answer`.
    """
    chat = Chat(chat_model, system, **options)
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    chat.echo = not sys.stdin.isatty()
    if is_interactive:
        tell(text(f"和 {name} 聊天", f"a chat with {name}"))
        tell(guide())
    for line in _typed(chat) if is_interactive else piped():
        if line and not chat.handle(line):
            return


def guide() -> str:
    """The commands and keys, in the user's language."""
    rows = ((text(name_zh, name_en), text(zh, en)) for name_zh, name_en, zh, en in COMMANDS)
    return "\n".join([*aligned(rows), text(*KEYS)])


def _typed(chat: Chat) -> Iterator[str]:
    """Lines typed at the terminal, until Ctrl-D."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: Any = PromptSession(history=_history(), multiline=True, key_bindings=keys)
    while True:
        is_base = chat.active is not chat.adapted
        prompt = text("［底座］你> ", "you (base)> ") if is_base else text("你> ", "you> ")
        try:
            yield session.prompt(prompt).strip()
        except KeyboardInterrupt:  # drops a line that was not sent
            continue
        except EOFError:
            return


def _history() -> Any:
    """Earlier questions, in a file that only this user can read; in memory where no file can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    file = cache_dir() / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
        return FileHistory(str(file))
    except OSError:
        return InMemoryHistory()
