"""Questions and answers at the terminal: read from a pipe, printed while they are generated, base beside adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.terminal import StreamPrinter, fit_to_terminal
from lora_practice.console.text import counted, tell, text, visible
from lora_practice.data.conversations import Conversation
from lora_practice.inference.chat_model import ChatModel, as_chat_model, decoder_of
from lora_practice.model.pissa import as_base

SAMPLE_TOKENS = 64  # most tokens in an answer to a sample prompt
SAMPLE_PROMPTS = (
    "What is the capital of France?",
    "My printer is not printing.",
    "Tell me a joke.",
    "Do you have feelings?",
)
SAMPLES = len(SAMPLE_PROMPTS)
LONGEST_SAMPLE = 1000  # characters of a held-out conversation that a person is shown


@dataclass(frozen=True)
class SampleQuestion:
    """What base and adapter are asked: messages that end with the user's, and the answer in the data ("" if none)."""

    messages: Sequence[Mapping[str, str]]
    reference: str = ""

    def as_sample(self, base: str, adapter: str, cut: Sequence[str] = ()) -> dict[str, Any]:
        """An entry of "samples" in run_record.json: "prompt", "base", "adapter".

        With a held-out row also its "reference" and, if the prompt is not its first message, the "earlier" ones. `cut`
        names the answers ("base", "adapter") that were cut off at SAMPLE_TOKENS.
        """
        *earlier, last = self.messages
        sample: dict[str, Any] = {"prompt": last["content"], "base": base, "adapter": adapter}
        sample.update({"reference": self.reference} if self.reference else {})
        sample.update({"earlier": [dict(message) for message in earlier]} if earlier else {})
        sample.update({"cut": list(cut)} if cut else {})
        return sample


def sample_questions(held_out: Sequence[Conversation]) -> list[SampleQuestion]:
    """Four questions spread over the held-out rows, each with its reference; SAMPLE_PROMPTS where no row serves.

    A row asks for its longest answer, which tells most about what was learnt: the first one is often a greeting.
    """
    found = [question for row in held_out if (question := _question_of(row))]
    if not found:
        return [SampleQuestion([{"role": "user", "content": prompt}]) for prompt in SAMPLE_PROMPTS]
    return [found[i] for i in sorted({number * len(found) // SAMPLES for number in range(SAMPLES)})]


def _question_of(row: Conversation) -> Optional[SampleQuestion]:
    """The row up to its longest answer; None if it has none after a question, or is too long to be shown."""
    turns = row.as_dicts()
    ends = [
        end for end in range(1, len(turns)) if (turns[end - 1]["role"], turns[end]["role"]) == ("user", "assistant")
    ]
    if not ends or sum(len(turn["content"]) for turn in turns) > LONGEST_SAMPLE:
        return None
    end = max(ends, key=lambda end: len(turns[end]["content"]))
    return SampleQuestion(turns[:end], turns[end]["content"])


def system_messages(system: str) -> list[dict[str, str]]:
    """The messages that a chat begins with: the system prompt, or none if it is empty."""
    return [{"role": "system", "content": system}] if system else []


def piped() -> Iterator[str]:
    """The questions on stdin, one per line; empty lines are skipped.

    Raises:
        UserError: stdin is not UTF-8.
    """
    try:
        for line in sys.stdin:
            line.encode("utf-8")  # in a C locale other bytes come as surrogates, and fail here
            if line.strip():
                yield line.strip()
    except UnicodeError as error:
        fix = text("先转换：iconv -f gbk -t utf-8", "convert it first: iconv -f gbk -t utf-8")
        raise UserError(text("不是 UTF-8", "not UTF-8"), text("管道", "the pipe"), fix) from error


def print_answer(chat_model: ChatModel, messages: Sequence[dict[str, str]], column: int = 0, **options: Any) -> str:
    """Print an answer while it is generated, and a note below it if it was cut off.

    Args:
        column: where in its line the answer begins.
        options: for `ChatModel.answer`.

    Returns:
        The answer.
    """
    typing = StreamPrinter(sys.stdout, column)
    answer = chat_model.answer(messages, on_text=lambda piece: typing.add(visible(piece)), **options)
    typing.end()
    print(flush=True)
    if chat_model.cut_at:
        tell(cut_note(chat_model))
    return answer


def cut_note(chat_model: ChatModel, flag: str = "--max_new_tokens N") -> str:
    """A note that the last answer was cut off, with the flag that allows a longer one; "" if it ended by itself."""
    if not chat_model.cut_at:
        return ""
    longer_zh, longer_en = (f"，想更长加 {flag}", f": {flag}") if flag else ("", "")
    return text(
        f"（已到 {chat_model.cut_at} 个 token 的上限，回答被截断{longer_zh}）",
        f"(cut at {chat_model.cut_at} tokens{longer_en})",
    )


def answer_side_by_side(model: Any, tokenizer: Any, held_out: Sequence[Conversation] = ()) -> list[dict[str, Any]]:
    """Ask the base and the adapter of one PEFT model the questions of `sample_questions`, and print both answers.

    Returns:
        For the record: see `SampleQuestion.as_sample`.
    """
    model.gradient_checkpointing_disable()
    questions = sample_questions(held_out)
    with as_base(model):
        base = as_chat_model(model, tokenizer, decoder_of(model))
        base_answers = [_sample(base, question) for question in questions]
    adapted = as_chat_model(model, tokenizer, decoder_of(model))
    samples = []
    for question, from_base in zip(questions, base_answers):
        from_adapter = _sample(adapted, question)
        cut = [side for side, (_, note) in (("base", from_base), ("adapter", from_adapter)) if note]
        samples.append(question.as_sample(from_base[0], from_adapter[0], cut))
        _print_sample(question, from_base, from_adapter)
    return samples


def _print_sample(question: SampleQuestion, from_base: tuple[str, str], from_adapter: tuple[str, str]) -> None:
    """Print a question, its reference and the two (answer, note)s, each from a line of its own on."""
    earlier = len(question.messages) - 1
    after = text(f"（前面还有 {earlier} 条消息）", f" (after {counted(earlier, 'message')})") if earlier else ""
    prompt = visible(question.messages[-1]["content"])
    print(fit_to_terminal(f"\n{text('问：', 'prompt: ')}{prompt}{after}", sys.stdout))
    rows = [
        (text("参考：", "reference: "), (question.reference, "")),
        (text("底座：", "base: "), from_base),
        (text("微调：", "adapter: "), from_adapter),
    ]
    for name, (answer, note) in rows if question.reference else rows[1:]:
        print(fit_to_terminal(f"  {name}{visible(answer.strip())} {note}".rstrip(), sys.stdout), flush=True)


def _sample(chat_model: ChatModel, question: SampleQuestion) -> tuple[str, str]:
    """(the answer to a question, the note if it was cut off)"""
    answer = chat_model.answer([dict(message) for message in question.messages], SAMPLE_TOKENS)
    return answer, cut_note(chat_model, "")
