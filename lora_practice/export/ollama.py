"""Makes an Ollama Modelfile from a chat template.

The Jinja template is rendered on a few chats; what it writes around each turn becomes a Go template. A chat template
that cannot be expressed turn by turn (one that rewrites earlier turns, for example) gets no Modelfile: a TEMPLATE that
is nearly right is the usual reason why a model answers worse in Ollama than here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.data.chat_template import render

TURN_ROLES = ("system", "user", "assistant")
_MARKERS = {role: f"marker-of-{role}" for role in TURN_ROLES}  # contents that are found again in the rendered text


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the contents of a chat.

    Attributes:
        head: at the very beginning.
        before, after: around the content of each turn, by role.
        opening: the beginning of the next answer.
        system: the system message that it adds where a chat has none; "" if it adds none.
    """

    head: str
    before: dict[str, str]
    after: dict[str, str]
    opening: str
    system: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """A chat and the opening of the next answer, as Ollama renders `template` (with `system` added)."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        parts = [self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages]
        return self.head + "".join(parts) + self.opening

    @property
    def template(self) -> str:
        """The same as a Go text/template, which Ollama reads."""
        conditions = ["if", *["else if"] * 2]
        turns = "".join(
            f'{{{{ {condition} eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}{self.after[role]}'
            for condition, role in zip(conditions, self.before)
        )
        return f"{self.head}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{self.opening}"


def template_turns(tokenizer: Any, adds_bos: bool) -> Optional[Turns]:
    """What the tokenizer's chat template writes around each turn; None if it cannot be expressed turn by turn.

    Args:
        adds_bos: the program that reads the prompt adds the bos token by itself, so `head` leaves it out.
    """
    try:
        turns = _guess(tokenizer)
        if not all(turns.render(chat) == render(tokenizer, chat, prompt=True) for chat in _test_chats(turns)):
            return None
    except (UserError, ValueError, IndexError):  # it refuses a chat, or a marker is not found where it should be
        return None
    parts = [turns.head, turns.opening, turns.system, *turns.before.values(), *turns.after.values()]
    if any(mark in part for part in parts for mark in ("{{", "}}", '"""')):
        return None
    bos = tokenizer.bos_token or ""
    if adds_bos and bos and turns.head.startswith(bos):
        turns = Turns(turns.head[len(bos) :], turns.before, turns.after, turns.opening, turns.system)
    return turns


def modelfile(turns: Turns, stops: list[str], model: str, others: list[str]) -> str:
    """The text of a Modelfile; `model` is the file that it uses, `others` stand in comments."""
    lines = ["# ollama create my-model -f Modelfile"]
    lines += [f"# FROM ./{name}" for name in others]
    lines += [f"FROM ./{model}", f'TEMPLATE """{turns.template}"""']
    lines += [f'SYSTEM """{turns.system}"""'] if turns.system else []
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, "PARAMETER temperature 0", ""])


def _guess(tokenizer: Any) -> Turns:
    """The turns as they seem to be, from three rendered chats.

    Raises:
        ValueError, IndexError: the text around the contents is not the same in each chat.
        UserError: the template refuses a chat.
    """
    user, assistant = ({"role": role, "content": _MARKERS[role]} for role in ("user", "assistant"))
    second_user = {"role": "user", "content": "marker-of-a-second-user"}
    asked = render(tokenizer, [user])
    answered = render(tokenizer, [user, assistant])
    asked_again = render(tokenizer, [user, assistant, second_user])
    start, after_user = asked.split(_MARKERS["user"])
    after_assistant = answered.split(_MARKERS["assistant"])[1]
    before_assistant = _without(_between(asked_again, _MARKERS["user"], _MARKERS["assistant"]), after_user)
    before_user = _without(_between(asked_again, _MARKERS["assistant"], second_user["content"]), after_assistant)
    before = {"user": before_user, "assistant": before_assistant}
    after = {"user": after_user, "assistant": after_assistant}
    opening = _without(render(tokenizer, [user], prompt=True), asked)
    if not start.endswith(before_user):
        raise ValueError("the first turn begins otherwise")
    head, system = start[: len(start) - len(before_user)], ""
    try:
        with_system = render(tokenizer, [{"role": "system", "content": _MARKERS["system"]}, user])
    except UserError:  # it knows no system messages
        return Turns(head, before, after, opening, system)
    before_system, rest = with_system.split(_MARKERS["system"])
    after_system = rest.split(before_user + _MARKERS["user"])[0]
    bos = tokenizer.bos_token or ""
    first = head
    if head.startswith(before_system) and head.endswith(after_system) and head != after_system:
        system = head[len(before_system) : len(head) - len(after_system)]
        # a bos that also begins a turn (SmolLM2's) belongs to the turn
        first = bos if bos and before_system.startswith(bos) and not before_user.startswith(bos) else ""
    before["system"], after["system"] = _without(before_system, first), after_system
    return Turns(first, before, after, opening, system)


def _test_chats(turns: Turns) -> list[list[dict[str, str]]]:
    """Chats that the turns must render as the template does."""
    contents = [
        ("user", "Hi"),
        ("assistant", "Hello.\n\nYes?"),
        ("user", "1 + 1 = ?"),
        ("assistant", "2"),
        ("user", "你好"),
    ]
    chat = [{"role": role, "content": content} for role, content in contents]
    system = [{"role": "system", "content": "Be brief. 简短。"}] if "system" in turns.before else []
    return [chat[:1], chat[:3], chat, *([[*system, *chat[:1]], [*system, *chat]] if system else [])]


def _between(text: str, left: str, right: str) -> str:
    return text.split(left)[1].split(right)[0]


def _without(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError("the turns overlap")
    return text[len(start) :]
