"""Conversation -> Example: token ids, and which of them are trained.

`labels` equal `input_ids` where a token is trained and -100 elsewhere; they are not shifted (the model shifts
them). The mask is found by rendering prefixes of the conversation with the tokenizer's own chat template, so
it needs no `{% generation %}` marks in the template.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Optional

from lora_practice.data.conversations import Conversation
from lora_practice.errors import UserError, text

IGNORED = -100
CHUNK = 512  # rows tokenised in one call: flat memory, and the tokenizer's own threads have work


@dataclass(frozen=True)
class Example:
    """`input_ids` and `labels`, two lists of equal length T; `lengths` are the parts of a packed row."""

    input_ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...] = ()


@dataclass
class Lost:
    """What did not reach the model, each kind with its count and the first few origins."""

    counts: dict[str, int] = field(default_factory=dict)
    origins: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, origin: str) -> None:
        """Count one row under `kind`."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        first = self.origins.setdefault(kind, [])
        if len(first) < 3:
            first.append(origin)

    def lines(self, max_length: int) -> list[str]:
        """One sentence for each kind of loss."""
        sentence = {
            "cut": text(
                f"行超过 max_length={max_length}，结尾被截掉（学不到何时停）",
                f"rows cut at max_length={max_length}: they lose their ending",
            ),
            "nothing": text("行没有可学的内容，已跳过", "rows have nothing to train on and are left out"),
            "rewritten": text(
                "行的前几轮没有训练：模板会改写历史",
                "rows train on their last answer only: the template rewrites history",
            ),
        }
        return [f"{n} {sentence[kind]}: {', '.join(self.origins[kind])}" for kind, n in self.counts.items()]


class Encoder:
    """Turns conversations into examples with one tokenizer, one `max_length`, one choice of labels."""

    def __init__(self, tokenizer: Any, max_length: int, assistant_only_loss: bool = True) -> None:
        self.tokenizer, self.max_length, self.assistant_only = tokenizer, max_length, assistant_only_loss
        self.lost = Lost()

    def encode(self, conversations: Iterable[Conversation]) -> Iterator[Example]:
        """Yield an example for each row that has something to train on; the rest is counted in `lost`."""
        rows = iter(conversations)
        while True:
            chunk = list(islice(rows, CHUNK))
            if not chunk:
                return
            pieces = [self.segments(one) for one in chunk]
            flat = [words for row in pieces for words, _ in row]
            ids = iter(self.tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
            for conversation, row in zip(chunk, pieces):
                example = self._join([(next(ids), trained) for _, trained in row], conversation.origin)
                if example is not None:
                    yield example

    def segments(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """The rendered conversation cut into (text, trained) parts.

        A trained part is an answer with its end-of-turn token: what the model must write after the prompt
        that `inference.py` gives it, and no more. Each part is tokenised on its own, as it is at inference.
        """
        if conversation.raw_text:
            bos, eos = self.tokenizer.bos_token or "", self.tokenizer.eos_token or ""
            starts_with_bos = bool(self.tokenizer("")["input_ids"])
            return [(bos if starts_with_bos else "", False), (conversation.raw_text + eos, True)]
        messages = conversation.as_dicts()
        whole = self._render(messages, conversation)
        parts: list[tuple[str, bool]] = []
        done, rewritten = 0, False
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            is_last = index == len(messages) - 1
            before = self._render(messages[:index], conversation, add_generation_prompt=True)
            after = whole if is_last else self._render(messages[: index + 1], conversation)
            start = len(before)
            end = self._end_of_answer(after)
            if not after.startswith(before) or whole[:end] != after[:end] or start < done:
                if is_last:
                    raise _unstable_template(conversation.origin)
                rewritten = True
                continue
            parts += [(whole[done:start], False), (whole[start:end], True)]
            done = end
        if rewritten:
            self.lost.add("rewritten", conversation.origin)
        parts.append((whole[done:], False))
        return [part for part in parts if part[0]]

    def _end_of_answer(self, rendered: str) -> int:
        """Where the answer that `rendered` ends with ends itself: after its end-of-turn token, before a line break.

        The template's own tail is measured, not searched for: an answer may hold or be a piece of the mark.
        """
        tail, kept = self._tail
        return len(rendered) - len(tail) + kept if rendered.endswith(tail) else len(rendered)

    @functools.cached_property
    def _tail(self) -> tuple[str, int]:
        """The template's tail, and how many characters of it reach to the end of its end-of-turn token."""
        tail, mark = answer_tail(self.tokenizer), end_of_turn(self.tokenizer)
        return tail, tail.find(mark) + len(mark) if mark else len(tail)

    def _render(self, messages: list[dict[str, str]], row: Conversation, add_generation_prompt: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError) as error:
            raise UserError(
                text(
                    f"聊天模板不接受这段对话：{error}",
                    f"the chat template refuses this conversation: {error}",
                ),
                where=row.origin,
            ) from error

    def _join(self, parts: list[tuple[list[int], bool]], origin: str) -> Optional[Example]:
        input_ids = [token for ids, _ in parts for token in ids]
        everything = not self.assistant_only
        labels = [token if trained or everything else IGNORED for ids, trained in parts for token in ids]
        length = answered = 0  # tokens up to here, and up to the end of the last answer
        for ids, trained in parts:
            length += len(ids)
            answered = length if trained else answered
        if answered > self.max_length:
            self.lost.add("cut", origin)
        input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        if count_trained(labels) == 0:
            self.lost.add("nothing", origin)
            return None
        return Example(input_ids, labels)


def count_trained(labels: list[int]) -> int:
    """Tokens that have a loss: the first of a row never has one, nothing stands before it."""
    return sum(label != IGNORED for label in labels[1:])


def end_of_turn(tokenizer: Any) -> Optional[str]:
    """The special token with which the chat template ends an answer; None if it ends with none."""
    tail = answer_tail(tokenizer)
    found = [(tail.find(str(token)), str(token)) for token in tokenizer.added_tokens_decoder.values()]
    present = sorted((place, token) for place, token in found if place >= 0)
    return present[0][1] if present else None


def answer_tail(tokenizer: Any) -> str:
    """What the chat template writes after the last answer, such as "<|im_end|>" and a line break."""
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "marker-of-the-answer"}]
    return tokenizer.apply_chat_template(messages, tokenize=False).rpartition("marker-of-the-answer")[2]


def preview(tokenizer: Any, example: Example, colour: bool = False) -> str:
    """The row as the model sees it, trained parts marked 〔so〕, or in green on a terminal.

    Runs are decoded whole, since one Chinese character may be several tokens.
    """
    opened, closed = ("\033[32m", "\033[0m") if colour else ("〔", "〕")
    pieces: list[str] = []
    run: list[int] = []
    trained = False

    def flush() -> None:
        words = tokenizer.decode(run)
        pieces.append(f"{opened}{words}{closed}" if trained else words)

    for token, label in zip(example.input_ids, example.labels):
        if run and (label != IGNORED) != trained:
            flush()
            run = []
        trained = label != IGNORED
        run.append(token)
    flush()
    return "".join(pieces)


def _unstable_template(origin: str) -> UserError:
    return UserError(
        text(
            "聊天模板会改写提示的开头，无法确定哪些 token 该训练",
            "the chat template rewrites the prompt: no honest mask",
        ),
        where=origin,
        fix=text("换一个 --chat_template_path", "choose another --chat_template_path"),
    )
