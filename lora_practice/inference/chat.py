"""The chat at the terminal: history, several lines, the base to compare with, a file to keep it in."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.terminal import aligned
from lora_practice.console.text import tell, text
from lora_practice.inference.chat_model import ChatModel, without_adapter
from lora_practice.inference.samples import piped, say, system_messages
from lora_practice.sources.embedded import cache_dir

COMMANDS = (
    ("/help", "显示这些说明", "show these lines"),
    ("/reset", "忘掉前面的话，重新开始", "forget what was said, begin anew"),
    ("/system TEXT", "换系统提示并重新开始（不写就去掉）", "another system prompt, and begin anew (none: drop it)"),
    ("/adapter off|on", "听听底座怎么说，再换回来", "hear the base, and back again"),
    ("/save FILE", "把对话存成一行训练数据（JSONL）", "keep the conversation as a row of training data"),
    ("/exit", "退出，或按 Ctrl-D", "leave; so does Ctrl-D"),
)
KEYS = (
    "Enter 发送，Alt-Enter 换行，上下键翻历史，Ctrl-C 打断回答",
    "Enter sends, Alt-Enter breaks the line, Up is history, Ctrl-C stops an answer",
)


class Chat:
    """One conversation. `options` go to `Talker.answer`."""

    def __init__(self, talker: ChatModel, system: str = "", **options: Any) -> None:
        self.adapted, self.talker, self.options = talker, talker, options
        self.base: Optional[ChatModel] = None
        self.system = system
        self.messages = system_messages(system)

    def say(self, words: str) -> bool:
        """Answer a question, or do what a /command says; False when the chat is to end."""
        command, _, rest = words.partition(" ")
        if command in ("/exit", "/quit"):
            return False
        actions: dict[str, Callable[[str], None]] = {
            "/help": lambda _: tell(guide()),
            "/reset": lambda _: self._begin(self.system),
            "/system": self._begin,
            "/adapter": self._switch,
            "/save": self._save,
        }
        try:
            if command in actions:
                actions[command](rest.strip())
            elif command.startswith("/") and command[1:].isalpha() and not rest:
                tell(text(f"没有 {command} 这个命令，看 /help", f"no such command: {command}; see /help"))
            else:
                self._ask(words)
        except UserError as error:  # costs this line, not the chat
            tell(str(error))
        return True

    def _ask(self, words: str) -> None:
        asked = {"role": "user", "content": words}
        try:
            answer = say(self.talker, [*self.messages, asked], **self.options)
        except KeyboardInterrupt:  # enough of this answer, not of the chat
            print()
            tell(text("（打断了，这一问不算）", "(stopped; this question does not count)"))
            return
        self.messages += [asked, {"role": "assistant", "content": answer}]

    def _begin(self, system: str) -> None:
        self.system, self.messages = system, system_messages(system)
        tell(
            text("重新开始", "begun anew")
            + (text(f"，系统提示：{system}", f"; system prompt: {system}") if system else "")
        )

    def _switch(self, state: str) -> None:
        if state not in ("on", "off"):
            raise UserError(text("写 /adapter off 或 /adapter on", "write /adapter off or /adapter on"))
        if state == "off" and self.base is None:
            self.base = without_adapter(self.adapted)
        self.talker = self.base if state == "off" and self.base is not None else self.adapted
        zh, en = "现在是底座在回答", "the base answers now"
        if self.messages != system_messages(self.system):  # an adapter's answers above it are an example to the base
            zh, en = f"{zh}，它也看到前面的话：/reset 重新开始", f"{en}, and sees what was said: /reset begins anew"
        said = text(zh, en)
        tell(said if state == "off" else text("现在是微调后的模型在回答", "the fine-tuned model answers now"))

    def _save(self, name: str) -> None:
        if not name:
            raise UserError(text("存到哪里？/save 文件名.jsonl", "where to? /save name.jsonl"))
        if self.messages == system_messages(self.system):
            raise UserError(text("还没有对话", "nothing was said yet"))
        file = Path(name).expanduser()
        try:
            with open(file, "x", encoding="utf-8") as opened:  # "x": never over an earlier file
                opened.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except FileExistsError:
            what = text("已经有这个文件了，没有写", "this file exists: nothing was written")
            raise UserError(what, str(file), text("换个名字", "choose another name")) from None
        except OSError as error:
            raise UserError(error.strerror or str(error), str(file)) from error
        tell(text(f"存好了：{file}（可以直接当 --dataset_path）", f"kept in {file} (it can serve as --dataset_path)"))


def chat_loop(name: str, talker: ChatModel, system: str = "", **options: Any) -> None:
    """Talk to `talker`, loaded from `name`, until Ctrl-D, /exit or the end of a piped input (one question a line)."""
    talking = Chat(talker, system, **options)
    live = sys.stdin.isatty() and sys.stdout.isatty()
    if live:
        tell(text(f"和 {name} 聊天", f"a chat with {name}"))
        tell(guide())
    for words in _typed(talking) if live else piped():
        if words and not talking.say(words):
            return


def guide() -> str:
    """The commands and keys, in the user's language."""
    return "\n".join([*aligned((name, text(zh, en)) for name, zh, en in COMMANDS), text(*KEYS)])


def _typed(talking: Chat) -> Iterator[str]:
    """What a person types at the terminal; ends with Ctrl-D."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: Any = PromptSession(history=_history(), multiline=True, key_bindings=keys)
    while True:
        name = text("你> ", "you> ") if talking.talker is talking.adapted else text("你（底座）> ", "you (base)> ")
        try:
            yield session.prompt(name).strip()
        except KeyboardInterrupt:  # an unsent line is dropped
            continue
        except EOFError:
            return


def _history() -> Any:
    """Earlier questions, in a file that only this user can read; forgotten at the end where none can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    file = cache_dir() / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
        return FileHistory(str(file))
    except OSError:
        return InMemoryHistory()
