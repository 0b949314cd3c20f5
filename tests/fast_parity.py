"""The embedded model under PEFT's LoRA, and a step of it by Hugging Face's and PEFT's own autograd."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_practice import fast


def load(folder, dropout=0.0):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=6, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear")
    return get_peft_model(model, config).train()


def trainable(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def plain_step(model, batch):
    """Loss, with gradients in .grad, as TRL accumulates them: token losses summed over the step, divided once."""
    count = fast.step_plan.count_labels(batch)
    total = 0.0
    for ids, labels in batch:
        if all(label == -100 for label in labels[1:]):
            continue
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    return total
