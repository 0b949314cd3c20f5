"""A step on a pretended card: every operation is followed by torch's fake tensors, which refuse two devices in one.

No number is computed. The processor of the card is "meta": the one device beside "cpu" that a build without CUDA knows.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from fast_models import FAMILIES, examples, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lora_practice import fast
from lora_practice.fast import ops, step_plan

CARD = torch.device("meta")
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="older fake tensors follow fewer operations"
)


@contextlib.contextmanager
def pretended(monkeypatch):
    """Tensors without contents; numbers that are read from the card are 0."""
    monkeypatch.setattr(ops, "float", lambda _: 0.0, raising=False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no "meta"
    shapes = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes):
        yield


def on_card(model):
    """The same model with its weights and tables on the card; to be called within `pretended`."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    placed = torch.empty(tensor.shape, dtype=tensor.dtype, device=CARD)
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(placed, tensor.requires_grad) if is_weight else placed
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_and_an_evaluation_stay_on_the_card(family, monkeypatch):
    model, batch = tiny(family, dropout=0.1, dtype=torch.float32, shape={"num_hidden_layers": 2}), examples(count=2)
    with pretended(monkeypatch):
        engine = fast.build(on_card(model), torch.float16)
        assert engine.ops.name == "torch (float16 on meta)" and engine.token_budget == 2048
        engine.step_loss_and_backward(batch, loss_scale=65536.0)
        engine.limit_memory(0, checkpointing=True)
        engine.step_loss_and_backward(batch, loss_scale=65536.0)
        engine.eval_loss(batch)
    assert {(p.grad.device, p.grad.dtype) for p in engine.weights.parameters} == {(CARD, torch.float32)}


def test_what_is_left_behind_is_noticed(monkeypatch):
    """Else the test above would say nothing."""
    monkeypatch.setattr(step_plan.MicroBatchPlan, "to", lambda self, device: self)
    model, batch = tiny(dtype=torch.float32), examples()
    with pretended(monkeypatch), pytest.raises(RuntimeError, match=r"meta.*cpu|cpu.*meta"):
        fast.build(on_card(model)).step_loss_and_backward(batch)
