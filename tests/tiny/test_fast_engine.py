"""The fast engine against Hugging Face + PEFT autograd, on tiny random models of each family."""

from __future__ import annotations

import pytest
import torch
from fast_models import FAMILIES, TARGETS, examples, fast_step, plain_step, tiny, worst

from lora_practice import fast
from lora_practice.fast.dropout import DropoutMask, keep_mask


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_float64_is_autograd(family, share):
    model, batch = tiny(family), examples()
    loss, gradients = plain_step(model, batch)
    mine, my_gradients = fast_step(model, batch, compute_dtype=torch.float64, share_prefix=share)
    assert mine == pytest.approx(loss, rel=1e-7)
    assert (
        worst(my_gradients, gradients) < 1e-6
    )  # Gemma's sqrt(hidden_size) is float32 or float64, depending on the version


UNUSUAL_SHAPES = [
    ("Llama", {}, {"r": 1}),
    ("Llama", {"num_key_value_heads": 4, "vocab_size": 101}, {"r": 256}),
    ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 80}, {"r": 7}),
    ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}, {}),
    ("Llama", {"num_hidden_layers": 1, "hidden_act": "gelu_pytorch_tanh"}, {"targets": ["v_proj"]}),
    ("Llama", {}, {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"q_proj": 3}, "layers_to_transform": [1]}),
    ("Mistral", {"sliding_window": 16, "head_dim": 32, "num_key_value_heads": 4}, {}),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, {}),
    ("Qwen3", {"head_dim": 32, "attention_bias": True}, {}),
    ("Gemma", {"head_dim": 64, "num_key_value_heads": 1}, {}),
]


@pytest.mark.parametrize("family, shape, lora", UNUSUAL_SHAPES)
def test_unusual_shapes_are_autograd(family, shape, lora):
    """Ranks, heads, windows, biases; rows of one token or one label, alone and together with others."""
    rows = [([7, 8], [7, 8]), ([9, 10, 11], [9, -100, -100]), ([3] * 140, [3] * 140)]
    batch, model = [*examples(), *rows], tiny(family, shape=shape, **lora)
    loss, gradients = plain_step(model, batch)
    mine, my_gradients = fast_step(model, [([5], [5]), *batch], compute_dtype=torch.float64)
    assert mine == pytest.approx(loss, rel=1e-7)
    assert worst(my_gradients, gradients) < 1e-6
    mine, my_gradients = fast_step(model.float(), batch, token_budget=100)
    assert mine == pytest.approx(loss, rel=1e-6)
    assert worst(my_gradients, gradients) < 1e-4


@pytest.mark.parametrize(
    "dtype, loss_error, gradient_error", [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 0.01, 0.1)]
)
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_and_bf16_are_autograd_within_rounding(family, kernels, dtype, loss_error, gradient_error):
    model, batch = tiny(family, dtype=torch.float32, shape={"head_dim": 32}), examples()
    loss, gradients = plain_step(model, batch)
    mine, my_gradients = fast_step(model, batch, compute_dtype=dtype, kernels=kernels)
    assert mine == pytest.approx(loss, rel=loss_error)
    assert worst(my_gradients, gradients) < gradient_error
    assert all(gradient.dtype == torch.float32 for gradient in my_gradients.values())


@pytest.mark.parametrize("kernels", [True, False])
def test_autocast_around_a_step_changes_no_bit(kernels):
    model, batch = tiny(dropout=0.2, dtype=torch.float32), examples()
    loss, gradients = fast_step(model, batch, compute_dtype=torch.bfloat16, kernels=kernels)
    with torch.autocast("cpu", torch.bfloat16):
        mine, my_gradients = fast_step(model, batch, compute_dtype=torch.bfloat16, kernels=kernels)
    assert mine == loss and all(my_gradients[name].equal(one) for name, one in gradients.items())


def test_a_step_without_labels_has_gradients_of_zero():
    """A GradScaler rejects a step without any gradient."""
    model, scaler = tiny(dtype=torch.float32), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])
    scale = float(scaler.scale(torch.ones(())))
    assert fast.build(model).step_loss_and_backward([([5, 6], [5, -100])], loss_scale=scale) == 0.0
    scaler.step(optimizer)
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


class NamedDropout(torch.nn.Module):
    """Replaces PEFT's dropout by the engine's masks; without prefix sharing, rows are numbered consecutively."""

    def __init__(self, number, state):
        super().__init__()
        self.number, self.state = number, state

    def forward(self, x):
        dropout = self.state["dropout"]
        keep = keep_mask(dropout.key(self.number), dropout.threshold, self.state["row"], tuple(x.shape[1:]))
        return x * keep / dropout.keep_rate


def test_dropout_is_peft_dropout_with_the_same_masks():
    model, batch = tiny(dropout=0.2), examples()
    engine = fast.build(model, compute_dtype=torch.float64, seed=5, share_prefix=False)
    engine.step = 3
    mine = engine.step_loss_and_backward(batch)
    my_gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    state = {"dropout": DropoutMask(5, 3, engine.weights.threshold), "row": 0}
    groups = [group for layer in engine.weights.layers for group in layer.groups]
    numbers = {id(lora.a): lora.number for group in groups for lora in group.modules}
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            number = numbers[id(module.lora_A["default"].weight)]
            module.lora_dropout["default"] = NamedDropout(number, state)
    model.zero_grad()
    count, total = fast.step_plan.count_labels(batch), 0.0
    for ids, labels in batch:
        needed, _ = fast.step_plan.rows_and_targets((ids, labels))
        logits = model(input_ids=torch.tensor([needed])).logits[0]
        targets = torch.tensor(labels[1 : len(needed) + 1])
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count
        loss.backward()
        total += loss.item()
        state["row"] += len(needed)
    assert mine == pytest.approx(total, rel=1e-8)
    assert worst(my_gradients, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}) < 1e-7


def test_micro_batches_and_kernels_change_nothing():
    model, batch = tiny(dropout=0.2, dtype=torch.float32), examples()
    whole, gradients = fast_step(model, batch, seed=1, share_prefix=False, token_budget=0, kernels=False)
    for options in ({"token_budget": 20, "kernels": False}, {"token_budget": 0}, {"token_budget": 20}):
        loss, mine = fast_step(model, batch, seed=1, share_prefix=False, **options)
        assert loss == pytest.approx(whole, rel=1e-6)
        assert worst(mine, gradients) < 1e-5


def test_gradients_add_up_and_scale():
    model, batch = tiny(), examples()
    loss, gradients = fast_step(model, batch, compute_dtype=torch.float64)
    engine = fast.build(model, compute_dtype=torch.float64)
    model.zero_grad()
    count = fast.step_plan.count_labels(batch)
    parts = [engine.step_loss_and_backward(part, num_items=count, loss_scale=4.0) for part in (batch[:2], batch[2:])]
    assert sum(parts) == pytest.approx(loss)
    mine = {n: p.grad / 4 for n, p in model.named_parameters() if p.requires_grad}
    assert worst(mine, gradients) < 1e-9


def test_resume_continues_the_masks():
    model, batch = tiny(dropout=0.3, dtype=torch.float32), examples()
    engine = fast.build(model, seed=4)
    engine.step_loss_and_backward(batch)
    state = engine.state_dict()
    expected = engine.step_loss_and_backward(batch)
    again = fast.build(model, seed=0)
    again.load_state_dict(state)
    assert again.step_loss_and_backward(batch) == expected
    assert again.step_loss_and_backward(batch) != expected


def test_eval_loss_is_the_plain_one_and_leaves_no_gradients():
    model, batch = tiny(dropout=0.3), examples()
    engine = fast.build(model, compute_dtype=torch.float64, token_budget=30)
    mine = engine.eval_loss(batch)
    assert all(p.grad is None for p in model.parameters())
    assert mine == pytest.approx(plain_step(model.eval(), batch)[0], rel=1e-8)
    assert engine.eval_loss([([1, 2], [-100, -100])]) == 0.0


def test_some_linears_without_lora():
    model, batch = tiny(targets=["q_proj", "v_proj", "down_proj"]), examples()
    loss, gradients = plain_step(model, batch)
    mine, my_gradients = fast_step(model, batch, compute_dtype=torch.float64)
    assert mine == pytest.approx(loss, rel=1e-8)
    assert worst(my_gradients, gradients) < 1e-7


def test_rank_stabilised_scaling_is_read_from_peft():
    model, batch = tiny(use_rslora=True), examples()
    _, gradients = plain_step(model, batch)
    assert worst(fast_step(model, batch, compute_dtype=torch.float64)[1], gradients) < 1e-7


@pytest.mark.parametrize("targets", [TARGETS, ["o_proj"]])
def test_the_base_is_stored_once_and_restored_by_close(targets):
    model, batch = tiny(dtype=torch.float32, targets=targets), examples()
    before = model.eval()(input_ids=torch.tensor([batch[0][0]])).logits
    engine = fast.build(model)
    layer = model.get_base_model().model.layers[0]
    q, k = (getattr(module, "base_layer", module).weight for module in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    torch.testing.assert_close(model(input_ids=torch.tensor([batch[0][0]])).logits, before)
    engine.close()
    assert q.is_contiguous() and q.untyped_storage().nbytes() == q.numel() * 4
    torch.testing.assert_close(model(input_ids=torch.tensor([batch[0][0]])).logits, before)


def test_checkpointing_changes_no_bit_and_an_interrupted_step_leaves_no_gradients():
    model, batch = tiny("Qwen3", dropout=0.2, dtype=torch.float32), examples()
    loss, gradients = fast_step(model, batch, seed=1)
    model.zero_grad()
    engine = fast.build(model, seed=1)
    engine.limit_memory(320, checkpointing=True)
    backward = engine.weights.layers[0].backward
    engine.weights.layers[0].backward = lambda *_, **__: (_ for _ in ()).throw(MemoryError)
    with pytest.raises(MemoryError):
        engine.step_loss_and_backward(batch)
    assert all(p.grad is None for p in model.parameters())
    engine.weights.layers[0].backward = backward
    assert engine.step_loss_and_backward(batch) == loss
    assert all(p.grad.equal(gradients[n]) for n, p in model.named_parameters() if p.requires_grad)
