"""Talking at the terminal: a chat, one answer as it is written, base and adapter side by side."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from lora_practice.errors import tell, text
from lora_practice.generate import Talker, decoder_of, talker

SAMPLE_PROMPTS = (
    "What is the capital of France?",
    "My printer is not printing.",
    "Tell me a joke.",
    "Do you have feelings?",
)


def chat(talk: Talker, system: str, **options: Any) -> None:
    """A conversation at the terminal, until Ctrl-D or /exit; /reset begins anew."""
    with contextlib.suppress(ImportError):  # arrow keys, and deleting a whole Chinese character; not on Windows
        import readline  # noqa: F401
    tell(
        text(
            "开始聊天：Ctrl-C 打断回答，/reset 重来，/exit 或 Ctrl-D 退出",
            "chat: Ctrl-C stops an answer, /reset begins anew, /exit or Ctrl-D ends",
        )
    )
    messages = opening(system)
    while True:
        try:
            line = input(text("你> ", "you> ")).strip()
        except EOFError:
            print()
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages = opening(system)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        try:
            words = talk.answer(messages, on_text=show, **options)
        except KeyboardInterrupt:  # enough of this answer, not of the chat
            messages.pop()
            print()
            continue
        print()
        messages.append({"role": "assistant", "content": words})


def opening(system: str) -> list[dict[str, str]]:
    """The messages before the first question."""
    return [{"role": "system", "content": system}] if system else []


def show(piece: str) -> None:
    """Print a piece of an answer at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def compare(model: Any, tokenizer: Any, max_new_tokens: int = 64) -> list[dict[str, str]]:
    """Four prompts answered by the base and by the adapter of one PEFT model, shown side by side.

    Returns:
        For the record: one {"prompt", "base", "adapter"} each.
    """
    model.gradient_checkpointing_disable()
    with model.disable_adapter():
        base = talker(model, tokenizer, decoder_of(model))
        before = [base.answer([_asked(prompt)], max_new_tokens) for prompt in SAMPLE_PROMPTS]
    adapted = talker(model, tokenizer, decoder_of(model))
    samples = []
    for prompt, old in zip(SAMPLE_PROMPTS, before):
        new = adapted.answer([_asked(prompt)], max_new_tokens)
        samples.append({"prompt": prompt, "base": old, "adapter": new})
        print(f"\n{text('问', 'prompt')}: {prompt}")
        print(f"  {text('底座', 'base')}: {old.strip()}")
        print(f"  {text('微调', 'adapter')}: {new.strip()}", flush=True)
    return samples


def _asked(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt}
