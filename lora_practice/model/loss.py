"""Mean loss of a causal language model on prepared rows, and its perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lora_practice.data.tokenization import IGNORE_INDEX, Example


def mean_loss(model: Any, rows: Sequence[Example]) -> float:
    """Nats per trained token over all rows, one row at a time, without dropout."""
    import torch

    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.input_ids], device=model.device)
            labels = torch.tensor(row.labels[1:])
            logits = model(input_ids=ids).logits[0, :-1].float().cpu()
            total += float(
                torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
            )
            count += int((labels != IGNORE_INDEX).sum())
    return total / count


def perplexity(loss: float) -> float:
    """e to the loss: among how many equally likely tokens the model seems to choose."""
    return math.exp(min(loss, 700.0))
