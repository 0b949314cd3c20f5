"""An Ollama Modelfile from a chat template: the jinja is tried out, what it writes around each turn is written in Go.

A template that no such turns can express (one that rewrites earlier turns, say) gets no Modelfile: a TEMPLATE that
is nearly right is the usual reason why a model answers worse in Ollama than here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.data.chat_template import render

TURN_ROLES = ("system", "user", "assistant")
_MARKS = {role: f"marker-of-{role}" for role in TURN_ROLES}


@dataclass(frozen=True)
class Turns:
    """What a chat template writes: `head`, then before + content + after of each turn, then `opening`.

    `system` is the message that it puts first where a chat has none; "" if it puts none.
    """

    head: str
    before: dict[str, str]
    after: dict[str, str]
    opening: str
    system: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """The chat and the opening of the next answer, as Ollama renders `template` (and adds `system`)."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        parts = [self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages]
        return self.head + "".join(parts) + self.opening

    @property
    def template(self) -> str:
        """The same in Go's text/template, as Ollama reads it."""
        words = ["if", *["else if"] * 2]
        turns = "".join(
            f'{{{{ {word} eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}{self.after[role]}'
            for word, role in zip(words, self.before)
        )
        return f"{self.head}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{self.opening}"


def template_turns(tokenizer: Any, adds_bos: bool) -> Optional[Turns]:
    """What the tokenizer's chat template writes around each turn; None where it cannot be told in turns.

    Args:
        adds_bos: the program that reads the prompt puts bos before it by itself, so `head` leaves it out.
    """
    try:
        turns = _guess(tokenizer)
        if not all(turns.render(chat) == _rendered(tokenizer, chat) for chat in _chats(turns)):
            return None
    except (UserError, ValueError, IndexError):  # refuses a chat, or writes a turn in no place where it can be found
        return None
    pieces = [turns.head, turns.opening, turns.system, *turns.before.values(), *turns.after.values()]
    if any(mark in piece for piece in pieces for mark in ("{{", "}}", '"""')):
        return None
    bos = tokenizer.bos_token or ""
    if adds_bos and bos and turns.head.startswith(bos):
        turns = Turns(turns.head[len(bos) :], turns.before, turns.after, turns.opening, turns.system)
    return turns


def modelfile(turns: Turns, stops: list[str], model: str, others: list[str]) -> str:
    """The Modelfile's text; `model` and `others` are files beside it."""
    lines = ["# ollama create my-model -f Modelfile"]
    lines += [f"# FROM ./{name}" for name in others]
    lines += [f"FROM ./{model}", f'TEMPLATE """{turns.template}"""']
    lines += [f'SYSTEM """{turns.system}"""'] if turns.system else []
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join([*lines, "PARAMETER temperature 0", ""])


def _guess(tokenizer: Any) -> Turns:
    """Turns that agree with the template on a few chats; ValueError or IndexError where they cannot be."""
    user, assistant = ({"role": role, "content": _MARKS[role]} for role in ("user", "assistant"))
    again = {"role": "user", "content": "marker-of-more"}
    asked = _rendered(tokenizer, [user], prompt=False)
    whole = _rendered(tokenizer, [user, assistant, again], prompt=False)
    answered = _rendered(tokenizer, [user, assistant], prompt=False)
    start, after_user = asked.split(_MARKS["user"])
    after_assistant = answered.split(_MARKS["assistant"])[1]
    before_assistant = _without(_between(whole, _MARKS["user"], _MARKS["assistant"]), after_user)
    before_user = _without(_between(whole, _MARKS["assistant"], again["content"]), after_assistant)
    before, after = {"user": before_user, "assistant": before_assistant}, {"user": after_user}
    after["assistant"] = after_assistant
    opening = _without(_rendered(tokenizer, [user]), asked)
    if not start.endswith(before_user):
        raise ValueError("the first turn begins otherwise")
    head, system = start[: len(start) - len(before_user)], ""
    try:
        told = _rendered(tokenizer, [{"role": "system", "content": _MARKS["system"]}, user], prompt=False)
    except UserError:  # knows no system messages
        return Turns(head, before, after, opening, system)
    before_system, rest = told.split(_MARKS["system"])
    after_system = rest.split(before_user + _MARKS["user"])[0]
    bos = tokenizer.bos_token or ""
    first = head
    if head.startswith(before_system) and head.endswith(after_system) and head != after_system:
        system = head[len(before_system) : len(head) - len(after_system)]
        # a bos that is also the mark of a turn (SmolLM2's) is the turn's
        first = bos if bos and before_system.startswith(bos) and not before_user.startswith(bos) else ""
    before["system"], after["system"] = _without(before_system, first), after_system
    return Turns(first, before, after, opening, system)


def _chats(turns: Turns) -> list[list[dict[str, str]]]:
    """Chats on which the turns must be the template's own words."""
    said = [
        ("user", "Hi"),
        ("assistant", "Hello.\n\nYes?"),
        ("user", "1 + 1 = ?"),
        ("assistant", "2"),
        ("user", "你好"),
    ]
    chat = [{"role": role, "content": words} for role, words in said]
    system = [{"role": "system", "content": "Be brief. 简短。"}] if "system" in turns.before else []
    return [chat[:1], chat[:3], chat, *([[*system, *chat[:1]], [*system, *chat]] if system else [])]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], prompt: bool = True) -> str:
    return render(tokenizer, messages, prompt=prompt)


def _between(whole: str, left: str, right: str) -> str:
    return whole.split(left)[1].split(right)[0]


def _without(words: str, start: str) -> str:
    if not words.startswith(start):
        raise ValueError("the turns overlap")
    return words[len(start) :]
