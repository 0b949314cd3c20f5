"""Talking at the terminal: one answer as it is written, base and adapter one after the other."""

from __future__ import annotations

import sys
from typing import Any

from lora_practice.errors import text
from lora_practice.talker import decoder_of, talker
from lora_practice.variants import as_base

SAMPLE_PROMPTS = (
    "What is the capital of France?",
    "My printer is not printing.",
    "Tell me a joke.",
    "Do you have feelings?",
)


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
    with as_base(model):
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
