"""Tiny random models of each family, and a step by autograd and by the engine, for the tests of the fast path."""

from __future__ import annotations

import torch
import transformers
from peft import LoraConfig, get_peft_model

from lora_practice import fast
from lora_practice.fast.loss import loss_reference

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 7},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma": {"hidden_activation": "gelu_pytorch_tanh"},
}


def tiny(family="Llama", dropout=0.0, dtype=torch.float64, targets=TARGETS, shape=None, **lora):
    """A random PeftModel with B not zero. `shape` overrides the model configuration, `lora` that of LoRA."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES[family], **(shape or {})})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    options = {"r": 3, "lora_alpha": 8, "lora_dropout": dropout, "target_modules": targets, **lora}
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if dtype == torch.float64:
        norms_in_float64(peft_model)
    return peft_model.to(dtype).train()


def norms_in_float64(model):
    """Make the norms compute in float64: those of transformers use float32, too coarse for a float64 check."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            gemma = type(module).__name__.startswith("Gemma")
            eps = module.eps if gemma else module.variance_epsilon

            def forward(x, module=module, gemma=gemma, eps=eps):
                return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (module.weight + gemma)

            module.forward = forward


def examples(seed=0, count=5, prefix=4):
    """(input_ids, labels) pairs that share a prefix; labels on all tokens, on the answer, or in the middle only."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, 97, (prefix,), generator=generator).tolist()
    made = []
    for index in range(count):
        tail = torch.randint(3, 97, (5 + 4 * index,), generator=generator).tolist()
        ids = start + tail
        labels = list(ids)
        if index % 3 == 1:
            labels[: prefix + 2] = [-100] * (prefix + 2)
        if index % 3 == 2:
            labels[:3] = [-100] * 3
            labels[-2:] = [-100] * 2
        made.append((ids, labels))
    return [*made, made[0]]


def plain_step(model, batch):
    """Loss and LoRA gradients by autograd, one example at a time."""
    model.zero_grad()
    count = sum(sum(label != -100 for label in labels[1:]) for _, labels in batch)
    total = 0.0
    for ids, labels in batch:
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        loss = loss_reference(logits, torch.tensor(labels)) / count
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def fast_step(model, batch, **options):
    """Loss and LoRA gradients by the fast engine; `options` of fast.build."""
    model.zero_grad()
    engine = fast.build(model, **options)
    loss = engine.step_loss_and_backward(batch)
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def worst(mine, theirs):
    """Largest relative error of any gradient, by name."""
    return max(float((mine[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)
