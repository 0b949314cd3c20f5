"""The fast path rejects models that it does not support, with a reason, and leaves them unchanged."""

from __future__ import annotations

import pytest
import torch
import transformers
from fast_models import SMALL, TARGETS, tiny
from peft import LoraConfig, get_peft_model

from lora_practice import fast


@pytest.mark.parametrize(
    "lora, reason",
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "trainable|lm_head|head"),
        ({"bias": "lora_only"}, "trainable"),
        ({"lora_bias": True}, "bias"),
        ({"targets": [*TARGETS, "lm_head"]}, "head"),
    ],
)
def test_an_unsupported_adapter_is_rejected_with_a_reason(lora, reason):
    family = "Qwen2" if "bias" in lora else "Llama"
    model = tiny(family, dtype=torch.float32, **lora)
    before = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    with pytest.raises(fast.NotServed, match=reason):
        fast.build(model)
    assert all(p.is_contiguous() for p in model.parameters())  # views with gaps would be slow on the plain path
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.equal(before)


def test_unknown_architectures_are_not_served():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)
    model = get_peft_model(transformers.GPT2LMHeadModel(config), LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(fast.NotServed, match="GPT2LMHeadModel"):
        fast.build(model)
    config = transformers.LlamaConfig(**SMALL, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    model = get_peft_model(transformers.LlamaForCausalLM(config), LoraConfig(target_modules=TARGETS))
    with pytest.raises(fast.NotServed, match="dynamic"):
        fast.build(model)


def test_two_adapters_are_not_served():
    model = tiny(dtype=torch.float32)
    model.add_adapter("second", LoraConfig(target_modules=TARGETS))
    with pytest.raises(fast.NotServed, match="several adapters"):
        fast.build(model)
