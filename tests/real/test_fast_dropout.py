"""The fast engine's dropout masks differ from PEFT's; its losses agree with PEFT's within the spread over seeds."""

from __future__ import annotations

import torch
from fast_parity import load, plain_step, trainable

from lora_practice import fast


def test_dropout_keeps_the_level_of_the_loss(embedded_model, embedded_examples):
    """With dropout masks shared on the prefix, the mean loss over seeds is that of PEFT's own dropout."""
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
    """Held-out loss after eight steps, four dropout seeds each: both means agree within the spread of the runs."""
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
    assert spread < 0.01  # otherwise the line above would hold for almost any result
