"""No matmul reads uninitialised memory, neither in the gaps between padded rows nor anywhere else.

oneDNN's AMX kernels read bf16 rows in tiles of 32 columns, past their width, and NaN times zero is NaN. Other
processors hide this fault, so here all newly allocated memory is NaN, and every gap is checked.
"""

from __future__ import annotations

import pytest
import torch
from fast_models import examples, tiny

from lora_practice import fast
from lora_practice.fast import matmul
from lora_practice.fast.buffers import Buffers


@pytest.fixture
def new_memory_is_nan(monkeypatch):
    def poisoned(make):
        def run(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return run

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def requested_buffers(monkeypatch):
    """Every buffer that the engine requests, including repeated requests."""
    views, rows = [], Buffers.rows

    def recorded(self, *args, **kwargs):
        views.append(rows(self, *args, **kwargs))
        return views[-1]

    monkeypatch.setattr(Buffers, "rows", recorded)
    return views


def gap(view: torch.Tensor) -> torch.Tensor:
    """Elements between the end of each row and the start of the next, the last row included: (n, pitch - width)."""
    n, width = view.shape
    return view.as_strided((n, view.stride(0) - width), view.stride(), view.storage_offset() + width)


@pytest.mark.parametrize("pitched", [True, False])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma"])
def test_every_gap_is_zero(monkeypatch, new_memory_is_nan, requested_buffers, family, dtype, kernels, pitched):
    if pitched:  # as on an Intel processor, where fp32 rows have gaps too
        monkeypatch.setattr(matmul, "uses_onednn", lambda dtype, device_type: False)
    model = tiny(family, dropout=0.1, dtype=torch.float32, shape={"head_dim": 32})
    engine = fast.build(model, dtype, token_budget=40, kernels=kernels)
    groups = [group for layer in engine.weights.layers for group in layer.groups]
    losses = []
    for batch in (
        examples(0),
        examples(1, count=2),
        examples(2, count=7),
    ):  # one of them a smaller step after a larger one
        losses.append(engine.step_loss_and_backward(batch))
        assert all(gap(view).eq(0).all() for view in [*requested_buffers, *(group.matrix for group in groups)])
    losses.append(engine.eval_loss(examples(3)))
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert torch.tensor(losses).isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    assert not pitched or any(gap(view).numel() for view in requested_buffers)


def test_a_buffer_that_grows_has_zero_gaps(new_memory_is_nan):
    buffers = Buffers(8)
    for n in (3, 8, 5, 20):
        assert gap(buffers.rows(("x",), n, 30, torch.bfloat16, torch.device("cpu"))).eq(0).all()
