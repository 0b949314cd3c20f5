"""Each hand-written backward against autograd in float64, and each compiled kernel against its torch version."""

from __future__ import annotations

import pytest
import torch

from lora_practice.fast import matmul
from lora_practice.fast.attention import Heads, attend, attend_backward, attention_reference
from lora_practice.fast.attention_tiles import tiles
from lora_practice.fast.buffers import Buffers
from lora_practice.fast.dropout import DropoutMask, keep_mask
from lora_practice.fast.kernels import native
from lora_practice.fast.lora_linear import LinearGroup, LoraWeights
from lora_practice.fast.loss import chunks, head_loss, loss_reference
from lora_practice.fast.ops import ACTIVATIONS, LoraModule, TorchOps
from lora_practice.fast.step_plan import plan_step

DOUBLE = torch.float64
HEADS = Heads(query=6, kv=2, size=32, scale=0.2)


def random(*shape, dtype=DOUBLE, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def shared_plan(lengths=(9, 3, 140, 1), seed=1):
    generator = torch.Generator().manual_seed(seed)
    tails = [torch.randint(0, 50, (length,), generator=generator).tolist() for length in lengths]
    return plan_step([([51, 52, 53, *tail], [-100, 52, 53, *tail]) for tail in tails])[0]


def gradients(value, inputs, upstream):
    return torch.autograd.grad((value * upstream).sum(), inputs)


def test_norm_backward():
    h, weight, d_out = random(5, 8).requires_grad_(), random(8, seed=1), random(5, 8, seed=2)
    value = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * weight
    out, d_h = torch.empty(5, 8, dtype=DOUBLE), torch.zeros(5, 8, dtype=DOUBLE)
    rstd = TorchOps().norm(h.detach(), weight, 1e-5, out)
    TorchOps().norm_backward(d_out, h.detach(), weight, rstd, d_h)
    torch.testing.assert_close(out, value.detach())
    torch.testing.assert_close(d_h, gradients(value, h, d_out)[0])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gate_backward(name):
    gate_up, d_out = random(5, 12).requires_grad_(), random(5, 6, seed=1)
    gate, up = gate_up.chunk(2, 1)
    act = torch.nn.functional.silu if name == "silu" else lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    mine = torch.empty(5, 12, dtype=DOUBLE)
    TorchOps().gate_backward(d_out, gate_up.detach(), ACTIVATIONS[name], mine)
    torch.testing.assert_close(mine, gradients(act(gate) * up, gate_up, d_out)[0])


def test_rope_backward_is_its_transpose():
    x, y, cos, sin = random(5, 24), random(5, 24, seed=1), random(5, 4, seed=2), random(5, 4, seed=3)
    forward, backward = x.clone(), y.clone()
    TorchOps().rope(forward, 3, cos, sin, 1)
    TorchOps().rope(backward, 3, cos, sin, -1)
    torch.testing.assert_close((forward * y).sum(), (x * backward).sum())


def visible(plan, window):
    """(n, n) bool: rows that each row attends to, from the definition of a run."""
    seen = torch.zeros(plan.rows, plan.rows, dtype=torch.bool)
    for path, first, last in plan.runs:
        for row in range(first, last):
            line = [*path, *range(first, row + 1)]
            seen[row, line[-window:] if window else line] = True
    return seen


@pytest.mark.parametrize("window", [None, 5])
def test_attention(window):
    plan = shared_plan()
    qkv = random(plan.rows + 1, HEADS.q_width + 2 * HEADS.kv_width)
    qkv[-1] = 0
    rows = qkv[:-1].clone().requires_grad_()
    value = attention_reference(rows, visible(plan, window), HEADS)
    out, d_out = torch.empty_like(value), random(*value.shape, seed=2)
    attend(qkv, tiles(plan, window), HEADS, out)
    torch.testing.assert_close(out, value.detach())
    mine = attend_backward(d_out, out, qkv, tiles(plan, window), HEADS)[:-1]
    torch.testing.assert_close(mine, gradients(value, rows, d_out)[0])


@pytest.mark.parametrize("dropout", [None, DropoutMask(seed=1, step=2, threshold=20000, row0=7)])
def test_linear_group(dropout):
    sizes, ranks, width, n = (6, 4), (3, 2), 10, 7
    a = [random(r, width, seed=r).requires_grad_() for r in ranks]
    b = [random(size, r, seed=size).requires_grad_() for size, r in zip(sizes, ranks)]
    matrix = random(10, width + 5, seed=3)
    weight, bias, d_y = matrix[:, :width].clone(), random(10, seed=4), random(n, 10, seed=5)
    x = random(n, width, seed=6).requires_grad_()
    modules = [
        LoraModule(a[0], b[0], 1.5, slice(0, 6), slice(0, 3), 1),
        LoraModule(a[1], b[1], 0.5, slice(6, 10), slice(3, 5), 2),
    ]
    group = LinearGroup(matrix, width, bias, modules)
    lora, keep_rate = LoraWeights([group], TorchOps()), 1.0 if dropout is None else dropout.keep_rate
    lora.load_from_peft(keep_rate)
    parts = []
    for module in modules:
        dropped = x
        if dropout is not None:
            keep = keep_mask(dropout.key(module.number), dropout.threshold, dropout.row0, (n, width))
            dropped = x * keep / dropout.keep_rate
        parts.append(module.scale * dropped @ module.a.t() @ module.b.t())
    value = x @ weight.t() + bias + torch.cat(parts, 1)
    expected = gradients(value, (x, *a, *b), d_y)
    with torch.no_grad():
        xu = torch.empty(n, width + 5, dtype=DOUBLE)
        xu[:, :width] = x
        y, u = group.forward(xu, dropout, TorchOps())
        d_x = group.backward(d_y, x.detach(), u, dropout, TorchOps())
        lora.add_gradients_to_peft(keep_rate)
    torch.testing.assert_close(y, value.detach())
    for mine, theirs in zip((d_x, *(p.grad for p in (*a, *b))), expected):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_bias_does_not_hide_lora(dtype):
    """Some of Qwen2's key biases are about 100; at that size neighbouring bf16 values are 0.5 apart."""
    matrix, bias, x = random(6, 12).to(dtype), torch.full((6,), 300.0), random(5, 12, seed=1).to(dtype)
    y, _ = LinearGroup(matrix.clone(), 12, bias, []).forward(x, None, TorchOps())
    true = x.to(DOUBLE) @ matrix.to(DOUBLE).t()
    assert float((y.to(DOUBLE) - bias - true).abs().max()) < 0.05


def test_head_loss_with_several_labels_on_a_row():
    plan = plan_step([([1, 2, 3, 4], [1, 2, 3, 4]), ([1, 2, 9], [1, 2, 9]), ([1, 2, 3], [1, -100, 3])])[0]
    assert plan.label_counts.max() == 3
    weight, x = random(12, 6), random(plan.label_rows.numel(), 6, seed=1).requires_grad_()
    logits = x @ weight.t()
    value = torch.nn.functional.cross_entropy(logits[plan.pair_slots], plan.pair_labels, reduction="sum")
    loss, d_x = head_loss(x.detach(), weight, plan, 0.25, TorchOps(), Buffers(8))
    assert loss == pytest.approx(value.item())
    torch.testing.assert_close(d_x, gradients(value, x, torch.tensor(0.25))[0])


def test_loss_of_one_example_is_the_plain_one():
    ids = [3, 1, 4, 1, 5]
    plan = plan_step([(ids, [-100, -100, 4, 1, -100])])[0]
    x, weight = random(5, 6), random(12, 6, seed=1)
    loss, _ = head_loss(x[plan.label_rows], weight, plan, None, TorchOps(), Buffers(8))
    plain = loss_reference(x @ weight.t(), torch.tensor([-100, -100, 4, 1, -100]))
    assert loss == pytest.approx(plain.item())


@pytest.mark.parametrize("most", [8, 40, 128])
@pytest.mark.parametrize("rows", [0, 3, 8, 120, 128, 136, 232, 240, 480, 1000])
def test_chunks_of_logits_are_even_and_the_first_is_the_largest(rows, most):
    cut = chunks(rows, most)
    sizes = [last - first for first, last in cut]
    assert [last for _, last in cut] == [*(first for first, _ in cut[1:]), rows] and cut[0][0] == 0
    assert max(sizes[1:], default=-8) + 8 <= sizes[0] <= most + 8 and all(size % 8 == 0 for size in sizes[:-1])
    assert len(sizes) <= max(-(-rows // most), 1)


def compiled(dtype):
    ops = native.load_kernels(dtype, torch.device("cpu"))
    if not isinstance(ops, native.CompiledOps):
        pytest.skip(ops.name)
    return ops


def same(mine, theirs, dtype):
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    assert float((mine - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


KERNEL_TYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", KERNEL_TYPES)
def test_compiled_rowwise(dtype):
    ops, plain, n, width = compiled(dtype), TorchOps(), 37, 64
    h, weight = random(n, width, dtype=torch.float32), random(width, dtype=torch.float32, seed=1)
    gate_up, d_out = random(n, 2 * width, seed=2).to(dtype), random(n, width, seed=3).to(dtype)
    outs = [torch.empty(n, width, dtype=dtype) for _ in range(4)]
    rstd = ops.norm(h, weight, 1e-5, outs[0])
    same(rstd, plain.norm(h, weight, 1e-5, outs[1]), torch.float32)
    same(outs[0], outs[1], dtype)
    sums = [h.clone(), h.clone()]
    for piece, total in zip((ops, plain), sums):
        piece.norm_backward(d_out, h, weight, rstd, total)
        piece.rope(total, 1, h[:, :32].contiguous(), h[:, 32:].contiguous(), -1)
    same(*sums, torch.float32)
    silu = ACTIVATIONS["silu"]
    ops.gate(gate_up, silu, outs[2])
    plain.gate(gate_up, silu, outs[3])
    same(outs[2], outs[3], dtype)
    gradients_out = [torch.empty(n, 2 * width, dtype=dtype) for _ in range(2)]
    ops.gate_backward(d_out, gate_up, silu, gradients_out[0])
    plain.gate_backward(d_out, gate_up, silu, gradients_out[1])
    same(*gradients_out, dtype)


@pytest.mark.parametrize("dropout", [None, DropoutMask(seed=1, step=2, threshold=6000, row0=7)])
@pytest.mark.parametrize(("n", "width"), [(37, 64), (1, 2), (3, 10), (5, 390), (2, 1536)])
@pytest.mark.parametrize("dtype", KERNEL_TYPES)
def test_compiled_lora(dtype, dropout, n, width):
    ops, plain = compiled(dtype), TorchOps()
    modules = [
        LoraModule(None, None, 1.0, slice(0, 9), slice(0, 3), 5),
        LoraModule(None, None, 1.0, slice(9, 19), slice(3, 7), 6),
    ]
    x, d_u = random(n, width).to(dtype), random(n, 7, seed=1).to(dtype)
    down = random(7, width, dtype=torch.float32, seed=2)
    results = []
    for piece in (ops, plain):
        u, d_x = torch.empty(n, 7, dtype=dtype), random(n, width, seed=3).to(dtype)
        piece.lora_down(x, down, modules, dropout, u)
        results.append((u, piece.lora_down_backward(x, d_u, down, modules, dropout, d_x), d_x))
    for mine, theirs in zip(*results):
        same(mine, theirs, dtype)


@pytest.mark.parametrize("dtype", KERNEL_TYPES)
def test_compiled_lora_up_has_the_block_of_each_module(dtype):
    n, ranks, outputs = 37, (6, 3), (200, 19)
    modules = [
        LoraModule(None, None, 1.0, slice(0, outputs[0]), slice(0, ranks[0]), 5),
        LoraModule(None, None, 1.0, slice(outputs[0], sum(outputs)), slice(ranks[0], sum(ranks)), 6),
    ]
    u, d_y = random(n, sum(ranks)).to(dtype), random(n, sum(outputs), seed=1).to(dtype)
    mine, theirs = (piece.lora_up_backward(u, d_y, modules) for piece in (compiled(dtype), TorchOps()))
    for module in modules:
        same(mine[module.ranks, module.outputs], theirs[module.ranks, module.outputs], dtype)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", KERNEL_TYPES)
def test_compiled_copies_of_many_matrices(dtype, add):
    sources = [random(7, 5, dtype=torch.float32), random(3, 9, dtype=torch.float32, seed=1).t()]
    places = [[torch.ones(7, 5), torch.ones(9, 8, dtype=dtype)[:, 2:5]] for _ in range(2)]
    for piece, targets in zip((compiled(dtype), TorchOps()), places):
        piece.copy_matrices(sources, targets, [2.0, -0.5], add)
    for mine, theirs in zip(*places):
        same(mine, theirs, dtype)


def test_compiled_copies_leave_other_dtypes_and_strides_to_torch():
    source = random(6, 4, dtype=torch.float32)
    places = [source.to(torch.bfloat16), torch.ones(4, 6).t(), torch.ones(6, 4, dtype=torch.bfloat16)]
    compiled(torch.float32).copy_matrices(
        [source.to(torch.bfloat16)] + [source] * 2, places, [1.0, 2.0, 3.0], accumulate=False
    )
    for place, factor in zip(places, (1.0, 2.0, 3.0)):
        same(place.float(), factor * source, torch.bfloat16)


@pytest.mark.parametrize(
    "heads", [HEADS, Heads(2, 2, 64, 0.1), Heads(9, 3, 96, 0.1), Heads(7, 1, 128, 0.1)], ids="{0.query}:{0.size}".format
)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", KERNEL_TYPES)
def test_compiled_attention(dtype, window, heads):
    ops, plain, plan = compiled(dtype), TorchOps(), shared_plan((9, 3, 300, 1)).padded(8)
    qkv = random(plan.rows + 1, heads.q_width + 2 * heads.kv_width, dtype=torch.float32)
    qkv[-1] = 0
    outs = [torch.empty(plan.rows, heads.q_width, dtype=dtype) for _ in range(2)]
    ops.attend(qkv, plan, window, heads, outs[0])
    plain.attend(qkv, plan, window, heads, outs[1])
    same(*outs, dtype)
    d_out = random(*outs[0].shape, seed=2).to(dtype)
    mine, theirs = (piece.attend_backward(d_out, outs[1], qkv, plan, window, heads)[:-1] for piece in (ops, plain))
    same(mine, theirs, torch.float32)


@pytest.mark.parametrize("dtype", KERNEL_TYPES)
def test_compiled_loss(dtype):
    ops, plan = compiled(dtype), shared_plan()
    logits = (random(plan.label_rows.numel(), 60) * 5).to(dtype)
    copies = [logits.clone(), logits.clone()]
    losses = [
        piece.cross_entropy(copy, plan.label_counts, plan.pair_slots, plan.pair_labels, 0.01)
        for piece, copy in zip((ops, TorchOps()), copies)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    same(*copies, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE], ids=str)
@pytest.mark.parametrize("onednn", [False, True], ids=["mm", "onednn"])
def test_matmuls_of_either_library_are_the_same(dtype, onednn, monkeypatch):
    if onednn and (dtype != torch.float32 or not hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("oneDNN is used for float32 only, where torch has it")
    monkeypatch.setattr(matmul, "uses_onednn", lambda *_: onednn)
    x, matrix = matmul.rows_buffer(7, 50, dtype), matmul.rows_buffer(64, 50, dtype)
    x.copy_(random(7, 50)), matrix.copy_(random(64, 50, seed=1))
    y = matmul.matmul_transposed(x, matrix)
    d_x = matmul.matmul(y, matrix)
    close = {"rtol": 2e-2, "atol": 0.5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(y.to(DOUBLE), x.to(DOUBLE) @ matrix.to(DOUBLE).t(), **close)
    torch.testing.assert_close(d_x.to(DOUBLE), y.to(DOUBLE) @ matrix.to(DOUBLE), **close)


def test_only_float32_on_an_amd_processor_goes_to_onednn(monkeypatch):
    monkeypatch.setattr(matmul, "_cpu_vendor", lambda: "AuthenticAMD")
    chosen = matmul.uses_onednn.__wrapped__
    assert chosen(torch.float32, "cpu") == torch.backends.mkldnn.is_available()
    assert not chosen(torch.bfloat16, "cpu") and not chosen(torch.float32, "cuda")
    monkeypatch.setattr(matmul, "_cpu_vendor", lambda: "GenuineIntel")
    assert not chosen(torch.float32, "cpu")
