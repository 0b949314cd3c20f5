"""Questions and answers at the terminal: read from a pipe, printed while they are generated, base beside adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lora_practice.console.errors import UserError
from lora_practice.console.terminal import StreamPrinter, fit_to_terminal
from lora_practice.console.text import tell, text, visible
from lora_practice.inference.chat_model import ChatModel, as_chat_model, decoder_of
from lora_practice.model.pissa import as_base

SAMPLE_TOKENS = 64  # most tokens in an answer to a sample prompt
SAMPLE_PROMPTS = (
    "What is the capital of France?",
    "My printer is not printing.",
    "Tell me a joke.",
    "Do you have feelings?",
)


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


def answer_side_by_side(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """Answer SAMPLE_PROMPTS with the base and with the adapter of one PEFT model, and print both.

    Returns:
        For the record: {"prompt", "base", "adapter"} for each prompt.
    """
    model.gradient_checkpointing_disable()
    with as_base(model):
        base = as_chat_model(model, tokenizer, decoder_of(model))
        base_answers = [_sample(base, prompt) for prompt in SAMPLE_PROMPTS]
    adapted = as_chat_model(model, tokenizer, decoder_of(model))
    samples = []
    for prompt, from_base in zip(SAMPLE_PROMPTS, base_answers):
        from_adapter = _sample(adapted, prompt)
        samples.append({"prompt": prompt, "base": from_base[0], "adapter": from_adapter[0]})
        print(f"\n{text('问：', 'prompt: ')}{prompt}")
        for name, (answer, note) in (
            (text("底座：", "base: "), from_base),
            (text("微调：", "adapter: "), from_adapter),
        ):
            print(fit_to_terminal(f"  {name}{visible(answer.strip())} {note}".rstrip(), sys.stdout), flush=True)
    return samples


def _sample(chat_model: ChatModel, prompt: str) -> tuple[str, str]:
    """(the answer to a prompt, the note if it was cut off)"""
    answer = chat_model.answer([{"role": "user", "content": prompt}], SAMPLE_TOKENS)
    return answer, cut_note(chat_model, "")
