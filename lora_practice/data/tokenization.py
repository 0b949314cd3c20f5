"""Conversation -> Example: token ids, and which of them are trained.

`labels` equal `input_ids` where a token is trained and are -100 elsewhere; they are not shifted (the model shifts
them). The mask is found by rendering prefixes of the conversation with the tokenizer's own chat template, so the
template needs no `{% generation %}` marks.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import counted, text
from lora_practice.data.chat_template import answer_tail, end_of_turn, render, token_ids_of
from lora_practice.data.conversations import Conversation

IGNORE_INDEX = -100  # the label of a token that is not trained: the `ignore_index` of cross-entropy in PyTorch
ROWS_AT_ONCE = 512  # rows tokenised in one call: memory stays flat, the tokenizer's own threads are busy
CHUNK_CHARACTERS = 4_000_000  # in one call; fewer rows when they are long
CHARACTERS_PER_TOKEN = 64  # far above the usual 4: decides how much of a long text is tokenised at first


@dataclass(frozen=True)
class Example:
    """`input_ids` and `labels`, two lists of equal length T; `lengths` are the parts of a packed row."""

    input_ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...] = ()


@dataclass
class LostRows:
    """Rows that do not reach the model whole: the count and the first `shown` origins of each kind."""

    shown: int = 3
    counts: dict[str, int] = field(default_factory=dict)
    origins: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, origin: str) -> None:
        """Count one row under `kind`: "cut", "nothing" or "rewritten"."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        first = self.origins.setdefault(kind, [])
        if len(first) < self.shown:
            first.append(origin)

    def lines(self, max_length: int) -> list[str]:
        """One sentence for each kind of row."""
        sentence = {
            "cut": text(
                f"行超过 max_length={max_length}，结尾被截断（模型学不到在哪里停）",
                f"cut at max_length={max_length}: the ending is lost",
            ),
            "nothing": text("行没有可训练的内容，已跳过", "left out: nothing to train on"),
            "rewritten": text(
                "行的前几轮没有训练：模板会改写历史",
                "trained on the last answer only: the template rewrites history",
            ),
        }
        return [
            f"{text(str(n), counted(n, 'row'))} {sentence[kind]}{text('：', ': ')}"
            + text("、", ", ").join(self.origins[kind][:3])
            for kind, n in self.counts.items()
        ]


class Encoder:
    """Turns conversations into examples. `lost` counts the rows that were cut or left out."""

    def __init__(self, tokenizer: Any, max_length: int, assistant_only_loss: bool = True) -> None:
        self.tokenizer, self.max_length, self.assistant_only = tokenizer, max_length, assistant_only_loss
        self.lost = LostRows()
        self.lengths = array("i")  # tokens of each row before any cut; of a very long row at least 2 * max_length

    def encode(self, conversations: Iterable[Conversation]) -> Iterator[Example]:
        """Yield an example for each row that has a token to train on; the others are counted in `lost`."""
        for chunk in _chunks(conversations):
            rows = [self.segments(self._shortened(one)) for one in chunk]
            ids = iter(self._ids([words for segments in rows for words, _ in segments]))
            for conversation, segments in zip(chunk, rows):
                example = self._join([(next(ids), trained) for _, trained in segments], conversation.origin)
                if example is not None:
                    yield example

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; of a long text at least the first 2 * max_length.

        Only the first max_length tokens are kept in the end. Twice as many are made so that the place where the text
        was cut, around which tokens may differ, lies far behind them.
        """
        reach = self.max_length * CHARACTERS_PER_TOKEN
        found = token_ids_of(self.tokenizer, [words[:reach] for words in texts]) if texts else []
        for number, words in enumerate(texts):
            characters = reach
            while characters < len(words) and len(found[number]) < 2 * self.max_length:
                characters *= 4
                found[number] = token_ids_of(self.tokenizer, words[:characters])
        return found

    def _shortened(self, conversation: Conversation) -> Conversation:
        """The conversation without the messages behind 2 * max_length tokens, which need not be rendered."""
        turns, limit = conversation.messages, 2 * self.max_length
        if len(turns) <= limit and sum(len(turn["content"]) for turn in turns) <= limit * CHARACTERS_PER_TOKEN:
            return conversation
        tokens = 0
        for number, turn in enumerate(turns, 1):
            tokens += len(self._ids([turn["content"]])[0])
            if tokens > limit and turn["role"] == "assistant":
                return Conversation(turns[: number + 2], conversation.origin)  # the last answer is cut off anyway
        return conversation

    def segments(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """The rendered conversation as (text, trained) segments.

        A trained segment is an answer with its end-of-turn token: exactly the text that the model must write after the
        prompt that inference gives it. Each segment is tokenised on its own, as it is at inference.
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
        """The offset at which the last answer in `rendered` ends: after its end-of-turn token, before a line break.

        It is computed from the length of the template's tail, not searched for, since an answer may contain the
        end-of-turn token's text, or be a part of it.
        """
        tail, kept = self._tail
        return len(rendered) - len(tail) + kept if rendered.endswith(tail) else len(rendered)

    @functools.cached_property
    def _tail(self) -> tuple[str, int]:
        """The template's tail, and the number of its characters up to the end of the end-of-turn token."""
        tail, mark = answer_tail(self.tokenizer), end_of_turn(self.tokenizer)
        return tail, tail.find(mark) + len(mark) if mark else len(tail)

    def _render(self, messages: list[dict[str, str]], row: Conversation, add_generation_prompt: bool = False) -> str:
        return render(self.tokenizer, messages, row.origin, prompt=add_generation_prompt)

    def _join(self, parts: list[tuple[list[int], bool]], origin: str) -> Optional[Example]:
        input_ids = [token for ids, _ in parts for token in ids]
        everything = not self.assistant_only
        labels = [token if trained or everything else IGNORE_INDEX for ids, trained in parts for token in ids]
        length = answered = 0  # tokens up to here, and up to the end of the last answer
        for ids, trained in parts:
            length += len(ids)
            answered = length if trained else answered
        self.lengths.append(length)
        if answered > self.max_length:
            self.lost.add("cut", origin)
        input_ids, labels = input_ids[: self.max_length], labels[: self.max_length]
        if count_trained(labels) == 0:
            self.lost.add("nothing", origin)
            return None
        return Example(input_ids, labels)


def _chunks(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    chunk: list[Conversation] = []
    characters = 0
    for one in conversations:
        chunk.append(one)
        characters += len(one.raw_text) + sum(len(turn["content"]) for turn in one.messages)
        if len(chunk) >= ROWS_AT_ONCE or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def count_trained(labels: list[int]) -> int:
    """Number of tokens that have a loss; the first token of a row has none, since none precedes it."""
    return sum(label != IGNORE_INDEX for label in labels[1:])


def _unstable_template(origin: str) -> UserError:
    return UserError(
        text(
            "聊天模板会改写提示的开头，无法确定哪些 token 该训练",
            "the chat template rewrites the prompt: no honest mask",
        ),
        where=origin,
        fix=text("换一个 --chat_template_path", "choose another --chat_template_path"),
    )
