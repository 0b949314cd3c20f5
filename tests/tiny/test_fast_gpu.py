"""A step on a simulated GPU: torch's fake tensors run every operation and reject operands on two devices.

No values are computed. The GPU's device is "meta", the only one besides "cpu" in a torch build without CUDA.
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

GPU = torch.device("meta")
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="older fake tensors follow fewer operations"
)


@contextlib.contextmanager
def simulated_gpu(monkeypatch):
    """Fake tensors, without contents; numbers read from the GPU are 0."""
    monkeypatch.setattr(ops, "float", lambda _: 0.0, raising=False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not support "meta"
    shapes = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=shapes):
        yield


def on_gpu(model):
    """The same model with its weights and buffers on the GPU; call it within `simulated_gpu`."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    placed = torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(placed, tensor.requires_grad) if is_weight else placed
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_and_an_evaluation_stay_on_the_gpu(family, monkeypatch):
    model, batch = tiny(family, dropout=0.1, dtype=torch.float32, shape={"num_hidden_layers": 2}), examples(count=2)
    with simulated_gpu(monkeypatch):
        engine = fast.build(on_gpu(model), torch.float16)
        engine.step_loss_and_backward(batch, loss_scale=65536.0)
        engine.limit_memory(0, checkpointing=True)
        engine.step_loss_and_backward(batch, loss_scale=65536.0)
        engine.eval_loss(batch)
    assert {(p.grad.device, p.grad.dtype) for p in engine.weights.parameters} == {(GPU, torch.float32)}


def test_a_tensor_left_on_the_cpu_is_noticed(monkeypatch):
    """Shows that the test above can fail."""
    monkeypatch.setattr(step_plan.MicroBatchPlan, "to", lambda self, device: self)
    model, batch = tiny(dtype=torch.float32), examples()
    with simulated_gpu(monkeypatch), pytest.raises(RuntimeError, match=r"meta.*cpu|cpu.*meta"):
        fast.build(on_gpu(model)).step_loss_and_backward(batch)
