"""The decoder against transformers' own generate on the embedded SmolLM2-135M with an adapter, unmerged."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_practice.fast.decode.decoder import build_decoder

QUESTIONS = ["Tell me a long story about a printer.", "What is the capital of France?", "List three fruits.", "你好！"]
COUNT = 64


def load(folder, dtype):
    """The embedded model and a small random adapter, the same each time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = 0.03 if "lora_A" in name else 0.003
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model


@pytest.fixture(scope="module")
def plain(embedded_model):
    return load(embedded_model, torch.float32)


@pytest.fixture(scope="module")
def answers(tokenizer, plain):
    """(prompt, logits of the next token, 64 greedy tokens) of the unmerged PEFT model."""
    made = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        words = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        tensor = torch.tensor([ids])
        options = {"do_sample": False, "max_new_tokens": COUNT, "eos_token_id": None, "use_cache": True}
        written = plain.generate(input_ids=tensor, attention_mask=torch.ones_like(tensor), **options)
        with torch.no_grad():
            logits = plain(input_ids=tensor, logits_to_keep=1).logits[0, -1]
        made.append((ids, logits, written[0, len(ids) :].tolist()))
    return made


@pytest.mark.parametrize("dtype, kernels", [("auto", True), (torch.float32, True), (torch.float32, False)])
def test_greedy_tokens_are_those_of_the_unmerged_model(embedded_model, answers, dtype, kernels):
    decoder = build_decoder(load(embedded_model, dtype), kernels)
    if decoder.compiled:
        assert decoder.weights.head.weight.dtype == torch.float16
    for ids, logits, written in answers:
        assert decoder.generate(ids, COUNT, ()) == written
        decoder.ids = []
        torch.testing.assert_close(decoder.logits(ids), logits, rtol=1e-3, atol=1e-3)


def test_the_adapter_matters(embedded_model, plain):
    """Shows that the comparison above would fail without LoRA."""
    ids = list(range(100, 120))
    adapted = build_decoder(plain).logits(ids)
    with plain.disable_adapter():
        base = build_decoder(plain).logits(ids)
    assert float((adapted - base).abs().max()) > 0.1
