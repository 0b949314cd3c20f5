"""Talking at the terminal: questions from a pipe, an answer as it is written, base and adapter one after the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lora_practice.console.errors import UserError
from lora_practice.console.terminal import StreamPrinter, fit_to_terminal
from lora_practice.console.text import tell, text, visible
from lora_practice.inference.chat_model import ChatModel, decoder_of, talker
from lora_practice.model.pissa import as_base

SAMPLE_TOKENS = 64  # in an answer to a sample prompt at most
SAMPLE_PROMPTS = (
    "What is the capital of France?",
    "My printer is not printing.",
    "Tell me a joke.",
    "Do you have feelings?",
)


def system_messages(system: str) -> list[dict[str, str]]:
    """The messages before the first question."""
    return [{"role": "system", "content": system}] if system else []


def piped() -> Iterator[str]:
    """The questions on stdin, one a line.

    Raises:
        UserError: they are not UTF-8.
    """
    try:
        for line in sys.stdin:
            line.encode("utf-8")  # what is none comes through as surrogates where the locale is C
            if line.strip():
                yield line.strip()
    except UnicodeError as error:
        fix = text("先转换：iconv -f gbk -t utf-8", "convert it first: iconv -f gbk -t utf-8")
        raise UserError(text("不是 UTF-8", "not UTF-8"), text("管道", "the pipe"), fix) from error


def say(talker: ChatModel, messages: Sequence[dict[str, str]], column: int = 0, **options: Any) -> str:
    """Print an answer as it is written, from `column` of the line on, and below it whether it was cut.

    Returns:
        The answer. `options` go to `Talker.answer`.
    """
    typing = StreamPrinter(sys.stdout, column)
    answer = talker.answer(messages, on_text=lambda piece: typing.add(visible(piece)), **options)
    typing.end()
    print(flush=True)
    if talker.cut:
        tell(cut(talker))
    return answer


def cut(talker: ChatModel, flag: str = "--max_new_tokens N") -> str:
    """That its last answer goes on, and the flag to hear more of it; empty if the answer ended by itself."""
    if not talker.cut:
        return ""
    more = text("：", ": ") + flag if flag else ""
    return text(f"（满 {talker.cut} 个 token，已截断{more}）", f"(cut at {talker.cut} tokens{more})")


def answer_side_by_side(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """Four prompts answered by the base and by the adapter of one PEFT model, shown side by side.

    Returns:
        For the record: one {"prompt", "base", "adapter"} each.
    """
    model.gradient_checkpointing_disable()
    with as_base(model):
        base = talker(model, tokenizer, decoder_of(model))
        before = [_sample(base, prompt) for prompt in SAMPLE_PROMPTS]
    adapted = talker(model, tokenizer, decoder_of(model))
    samples = []
    for prompt, old in zip(SAMPLE_PROMPTS, before):
        new = _sample(adapted, prompt)
        samples.append({"prompt": prompt, "base": old[0], "adapter": new[0]})
        print(f"\n{text('问：', 'prompt: ')}{prompt}")
        for name, (words, mark) in ((text("底座：", "base: "), old), (text("微调：", "adapter: "), new)):
            print(fit_to_terminal(f"  {name}{visible(words.strip())} {mark}".rstrip(), sys.stdout), flush=True)
    return samples


def _sample(talker: ChatModel, prompt: str) -> tuple[str, str]:
    """The answer to a prompt, and that it was cut if it was."""
    answer = talker.answer([{"role": "user", "content": prompt}], SAMPLE_TOKENS)
    return answer, cut(talker, "")
