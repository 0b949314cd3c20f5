"""Using a tokenizer and its chat template: render a chat, find the end of an answer, tokenise text."""

from __future__ import annotations

from typing import Any, Optional

from lora_practice.console.errors import NOT_LIBRARY_FAILURES, UserError, reason_of
from lora_practice.console.text import text


def end_of_turn(tokenizer: Any) -> Optional[str]:
    """The special token with which the chat template ends an answer; None if it ends with none."""
    tail = answer_tail(tokenizer)
    found = [(tail.find(str(token)), str(token)) for token in tokenizer.added_tokens_decoder.values()]
    present = sorted((place, token) for place, token in found if place >= 0)
    return present[0][1] if present else None


def answer_tail(tokenizer: Any) -> str:
    """The text that the chat template writes after the last answer, such as "<|im_end|>" and a line break.

    Raises:
        UserError: the template fails, or leaves the answer out.
    """
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "marker-of-the-answer"}]
    fix = text("换一个 --chat_template_path", "choose another --chat_template_path")
    _, answer, tail = render(tokenizer, messages, fix=fix).rpartition("marker-of-the-answer")
    if not answer:
        raise UserError(text("聊天模板没有写出回答", "the chat template leaves the answers out"), fix=fix)
    return tail


def render(tokenizer: Any, messages: list[dict[str, str]], where: str = "", fix: str = "", prompt: bool = False) -> str:
    """The chat as the template writes it; as a `prompt` it ends with the opening of the next answer.

    Raises:
        UserError: the template fails on these messages; the error carries `where` and `fix`.
    """
    from lora_practice.data import template_sandbox  # jinja2 is not needed for --help

    template_sandbox.install_sandbox()
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except MemoryError:
        raise
    except template_sandbox.TemplateTooCostly as error:
        other = text("换一个 --chat_template_path", "choose another --chat_template_path")
        raise UserError(str(error), where, fix or other) from error
    except Exception as error:  # a template is a program: it may divide by zero, or nest too deep to be compiled
        zh, en = "聊天模板不接受这段对话", "the chat template refuses this conversation"
        raise UserError(f"{text(zh, en)}{text('：', ': ')}{reason_of(error)}", where, fix) from error


def token_ids_of(tokenizer: Any, words: Any, where: str = "") -> Any:
    """Token ids of a text, or of each text in a list, without added special tokens.

    Raises:
        UserError: the tokenizer's library fails on it; the error carries `where`.
    """
    try:
        return tokenizer(words, add_special_tokens=False)["input_ids"]
    except NOT_LIBRARY_FAILURES:
        raise
    except BaseException as error:
        zh, en = "分词器处理不了这段文字", "the tokenizer cannot split this text"
        fix = text("换一个分词器完好的模型", "choose a model whose tokenizer is whole")
        raise UserError(f"{text(zh, en)}{text('：', ': ')}{reason_of(error)}", where, fix) from error
