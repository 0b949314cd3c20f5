"""The fast engine against Hugging Face + PEFT autograd, on tiny random models of each family."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from lora_practice import fast
from lora_practice.fast.loss import loss_plainly
from lora_practice.fast.noise import Noise, keep_mask

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


def tiny(family="Llama", dropout=0.0, dtype=torch.float64, targets=TARGETS, **lora):
    """A random PeftModel whose B is not zero."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES[family]})
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
    """transformers computes its norms in float32 whatever the model's dtype: too coarse for a float64 check."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            gemma = type(module).__name__.startswith("Gemma")
            eps = module.eps if gemma else module.variance_epsilon

            def forward(x, module=module, gemma=gemma, eps=eps):
                return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (module.weight + gemma)

            module.forward = forward


def examples(seed=0, count=5, prefix=4):
    """Chats that share a beginning; labels on everything, on a part, on several parts."""
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
        loss = loss_plainly(logits, torch.tensor(labels)) / count
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def fast_step(model, batch, **options):
    model.zero_grad()
    engine = fast.build(model, **options)
    loss = engine.step_loss_and_backward(batch)
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def worst(mine, theirs):
    return max(float((mine[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_float64_is_autograd(family, share):
    model, batch = tiny(family), examples()
    loss, gradients = plain_step(model, batch)
    mine, my_gradients = fast_step(model, batch, compute_dtype=torch.float64, share_prefix=share)
    assert mine == pytest.approx(loss, rel=1e-8)
    assert worst(my_gradients, gradients) < 1e-7


@pytest.mark.parametrize(
    "dtype, loss_error, gradient_error", [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 0.01, 0.1)]
)
@pytest.mark.parametrize("kernels", [True, False])
def test_narrow_types(kernels, dtype, loss_error, gradient_error):
    model, batch = tiny(dtype=torch.float32), examples()
    loss, gradients = plain_step(model, batch)
    mine, my_gradients = fast_step(model, batch, compute_dtype=dtype, kernels=kernels)
    assert mine == pytest.approx(loss, rel=loss_error)
    assert worst(my_gradients, gradients) < gradient_error
    assert all(gradient.dtype == torch.float32 for gradient in my_gradients.values())


class NamedDropout(torch.nn.Module):
    """Dropout in PEFT's place with the engine's own masks (examples not shared, so rows count up)."""

    def __init__(self, number, state):
        super().__init__()
        self.number, self.state = number, state

    def forward(self, x):
        noise = self.state["noise"]
        keep = keep_mask(noise.key(self.number), noise.threshold, self.state["row"], tuple(x.shape[1:]))
        return x * keep / noise.keep_rate


def test_dropout_is_peft_dropout_with_named_masks():
    model, batch = tiny(dropout=0.2), examples()
    engine = fast.build(model, compute_dtype=torch.float64, seed=5, share_prefix=False)
    engine.step = 3
    mine = engine.step_loss_and_backward(batch)
    my_gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    state = {"noise": Noise(5, 3, engine.weights.threshold), "row": 0}
    numbers = {id(site.a): site.number for layer in engine.weights.layers for g in layer.groups for site in g.sites}
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            number = numbers[id(module.lora_A["default"].weight)]
            module.lora_dropout["default"] = NamedDropout(number, state)
    model.zero_grad()
    count, total = fast.plan.count_labels(batch), 0.0
    for ids, labels in batch:
        needed, _ = fast.plan.needed((ids, labels))
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
    whole, gradients = fast_step(model, batch, seed=1, share_prefix=False, token_budget=None, kernels=False)
    for options in ({"token_budget": 20, "kernels": False}, {"token_budget": None}, {"token_budget": 20}):
        loss, mine = fast_step(model, batch, seed=1, share_prefix=False, **options)
        assert loss == pytest.approx(whole, rel=1e-6)
        assert worst(mine, gradients) < 1e-5


def test_gradients_add_up_and_scale():
    model, batch = tiny(), examples()
    loss, gradients = fast_step(model, batch, compute_dtype=torch.float64)
    engine = fast.build(model, compute_dtype=torch.float64)
    model.zero_grad()
    count = fast.plan.count_labels(batch)
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


def test_eval_loss_is_the_plain_one_and_leaves_nothing():
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


def test_the_base_is_held_once_and_given_back():
    model, batch = tiny(dtype=torch.float32), examples()
    before = model.eval()(input_ids=torch.tensor([batch[0][0]])).logits
    engine = fast.build(model)
    layer = model.get_base_model().model.layers[0]
    q, k = (getattr(layer.self_attn, name).base_layer.weight for name in ("q_proj", "k_proj"))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    torch.testing.assert_close(model(input_ids=torch.tensor([batch[0][0]])).logits, before)
    engine.close()
    assert q.is_contiguous() and q.untyped_storage().nbytes() == q.numel() * 4
    torch.testing.assert_close(model(input_ids=torch.tensor([batch[0][0]])).logits, before)


@pytest.mark.parametrize(
    "lora, reason",
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "trainable|lm_head|head"),
        ({"bias": "lora_only"}, "trainable"),
        ({"lora_bias": True}, "bias"),
        ({"targets": [*TARGETS, "lm_head"]}, "head"),
    ],
)
def test_what_is_not_served_says_why(lora, reason):
    family = "Qwen2" if "bias" in lora else "Llama"
    with pytest.raises(fast.NotServed, match=reason):
        fast.build(tiny(family, dtype=torch.float32, **lora))


def test_unknown_architectures_are_not_served():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20)
    model = get_peft_model(transformers.GPT2LMHeadModel(config), LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(fast.NotServed, match="GPT2LMHeadModel"):
        fast.build(model)
    config = transformers.LlamaConfig(**SMALL, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    model = get_peft_model(transformers.LlamaForCausalLM(config), LoraConfig(target_modules=TARGETS))
    with pytest.raises(fast.NotServed, match="dynamic"):
        fast.build(model)


def test_two_adapters_are_not_served():
    model = tiny(dtype=torch.float32)
    model.add_adapter("second", LoraConfig(target_modules=TARGETS))
    with pytest.raises(fast.NotServed, match="several adapters"):
        fast.build(model)
