"""The fast engine against Hugging Face + PEFT autograd on the embedded SmolLM2-135M and real conversations."""

from __future__ import annotations

import pytest
import torch
from fast_parity import load, plain_step, trainable

from lora_practice import fast

STEPS, WINDOW = 50, 2  # a real step has 8 examples; two of them keep 50 plain steps affordable


def worst_relative(first, second):
    return max(
        float((p.grad - q.grad).norm() / q.grad.norm().clamp_min(1e-12)) for (_, p), (_, q) in zip(first, second)
    )


def halves(examples):
    """The same examples with labels on the second half only, as in training on answers alone."""
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
        # Copy the trained weights to the plain model before each step, so that rounding errors do not accumulate.
        with torch.no_grad():
            for (_, p), (_, q) in zip(*pairs):
                q.copy_(p)
        expected = plain_step(plain, batch)
        assert engine.step_loss_and_backward(batch) == pytest.approx(expected, abs=1e-4)
        if step:  # at step 0 every B is zero and so is the gradient of every A
            assert worst_relative(*pairs) < 1e-3, step
        optimizers[0].step()


def test_bfloat16_stays_within_half_a_percent(embedded_model, embedded_examples):
    models = load(embedded_model), load(embedded_model)
    engines = [fast.build(models[0]), fast.build(models[1], compute_dtype=torch.bfloat16)]
    pairs = trainable(models[0]), trainable(models[1])
    optimizers = [torch.optim.AdamW([p for _, p in pair], lr=2e-4) for pair in pairs]
    for step in range(12):
        batch = [embedded_examples[(8 * step + i) % len(embedded_examples)] for i in range(8)]
        losses = []
        for engine, optimizer in zip(engines, optimizers):
            optimizer.zero_grad()
            losses.append(engine.step_loss_and_backward(batch))
            optimizer.step()
        assert losses[1] == pytest.approx(losses[0], rel=5e-3), step
