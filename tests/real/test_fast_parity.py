"""The fast engine against Hugging Face + PEFT autograd on the embedded SmolLM2-135M and real conversations."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lora_practice import fast

STEPS, WINDOW = 50, 2  # a real step has 8 examples; two of them keep 50 plain steps affordable


def load(folder, dropout=0.0):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", r=6, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear")
    return get_peft_model(model, config).train()


def trainable(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def plain_step(model, batch):
    """Loss and gradients as TRL's accumulation does it: token losses summed over the window, divided once."""
    count = fast.plan.count_labels(batch)
    total = 0.0
    for ids, labels in batch:
        if all(label == -100 for label in labels[1:]):
            continue
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), num_items_in_batch=count).loss
        loss.backward()
        total += loss.item()
    return total


def worst_relative(first, second):
    return max(
        float((p.grad - q.grad).norm() / q.grad.norm().clamp_min(1e-12)) for (_, p), (_, q) in zip(first, second)
    )


def halves(examples):
    """The same examples with labels on the second half only: what training on answers alone looks like."""
    return [(ids, [-100] * (len(ids) // 2) + list(labels[len(ids) // 2 :])) for ids, labels in examples]


@pytest.mark.parametrize("labels", ["all", "answers"])
def test_fifty_steps_of_training_are_the_same(embedded_model, embedded_examples, labels):
    examples = embedded_examples[: STEPS * WINDOW]
    examples = examples if labels == "all" else halves(examples)
    plain, mine = load(embedded_model), load(embedded_model)
    engine = fast.build(mine, compute_dtype=torch.float32)
    pairs = trainable(mine), trainable(plain)
    optimizers = [torch.optim.AdamW([p for _, p in pair], lr=1e-3) for pair in pairs]
    for step in range(STEPS):
        batch = [examples[(step * WINDOW + i) % len(examples)] for i in range(WINDOW)]
        for optimizer in optimizers:
            optimizer.zero_grad()
        # The plain model takes over the trained weights each step: rounding must not pile up in the comparison.
        with torch.no_grad():
            for (_, p), (_, q) in zip(*pairs):
                q.copy_(p)
        expected = plain_step(plain, batch)
        assert engine.step_loss_and_backward(batch) == pytest.approx(expected, abs=1e-4)
        if step:  # at step 0 every B is zero and so is the gradient of every A
            assert worst_relative(*pairs) < 1e-3, step
        optimizers[0].step()


def test_bfloat16_stays_within_half_a_percent(embedded_model, embedded_examples):
    wide, narrow = load(embedded_model), load(embedded_model)
    engines = [fast.build(wide), fast.build(narrow, compute_dtype=torch.bfloat16)]
    pairs = trainable(wide), trainable(narrow)
    optimizers = [torch.optim.AdamW([p for _, p in pair], lr=2e-4) for pair in pairs]
    for step in range(12):
        batch = [embedded_examples[(8 * step + i) % len(embedded_examples)] for i in range(8)]
        losses = []
        for engine, optimizer in zip(engines, optimizers):
            optimizer.zero_grad()
            losses.append(engine.step_loss_and_backward(batch))
            optimizer.step()
        assert losses[1] == pytest.approx(losses[0], rel=5e-3), step


def test_dropout_keeps_the_level_of_the_loss(embedded_model, embedded_examples):
    """Dropout masks shared on the prefix: the mean loss over seeds is that of PEFT's own dropout."""
    batch = embedded_examples[:8]
    plain, mine = load(embedded_model, 0.05), load(embedded_model, 0.05)
    for model in (plain, mine):
        torch.manual_seed(1)
        for name, parameter in trainable(model):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.005)
    losses = [[], []]
    engine = fast.build(mine, seed=3)
    for seed in range(6):
        torch.manual_seed(seed)
        losses[0].append(plain_step(plain, batch))
        losses[1].append(engine.step_loss_and_backward(batch))
    theirs, ours = (torch.tensor(values, dtype=torch.float64) for values in losses)
    spread = float((theirs.var() / 6 + ours.var() / 6).sqrt())
    assert abs(float(theirs.mean() - ours.mean())) < 4 * spread + 1e-3


def test_runs_with_dropout_end_where_plain_runs_end(embedded_model, embedded_examples):
    """Eight steps, four seeds of the dropout each: the held-out loss afterwards is within the runs' own spread."""
    plain, mine = load(embedded_model, 0.05), load(embedded_model, 0.05)
    pairs = trainable(mine), trainable(plain)
    start = [p.detach().clone() for _, p in pairs[0]]
    engine = fast.build(mine)
    held_out, ends = embedded_examples[40:56], {"plain": [], "mine": []}
    for name, seed in [(name, seed) for seed in range(4) for name in ends]:
        torch.manual_seed(seed)
        engine.seed, engine.step = seed, 0
        pair = pairs[0] if name == "mine" else pairs[1]
        for (_, p), first in zip(pair, start):
            p.data.copy_(first)
        optimizer = torch.optim.AdamW([p for _, p in pair], lr=1e-3)
        for step in range(8):
            batch = embedded_examples[3 * step : 3 * step + 3]
            optimizer.zero_grad()
            if name == "mine":
                engine.step_loss_and_backward(batch)
            else:
                plain_step(plain, batch)
            optimizer.step()
        for (_, p), (_, q) in zip(pairs[0], pair):
            p.data.copy_(q)
        ends[name].append(engine.eval_loss(held_out))
    theirs, ours = (torch.tensor(values, dtype=torch.float64) for values in ends.values())
    spread = float((theirs.var() / 4 + ours.var() / 4).sqrt())
    assert abs(float(theirs.mean() - ours.mean())) < 4 * spread
    assert spread < 0.01  # so that the line above says something
