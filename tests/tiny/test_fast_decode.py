"""The decoder against transformers' own generate, on tiny random models of each family."""

from __future__ import annotations

import pytest
import torch
from fast_models import FAMILIES, tiny

from lora_practice.fast.decode.decoder import _sample, build_decoder
from lora_practice.fast.weights import NotServed

PROMPT = [5, 17, 33, 64, 9, 71, 12, 80, 3, 25, 41]


def served(family="Llama", **options):
    return tiny(family, dtype=torch.float32, **options).eval()


def generate_reference(model, prompt, count, **options):
    """transformers' continuation of a prompt by `count` tokens; greedy by default, without a stop token."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, **options}
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, eos_token_id=None, **options
    )
    return made[0, len(prompt) :].tolist()


def reference_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logits_are_those_of_transformers(family, kernels):
    model = served(family)
    decoder = build_decoder(model, kernels=kernels)
    assert decoder.generate(PROMPT, 30, ()) == generate_reference(model, PROMPT, 30)
    for length in (1, len(PROMPT)):
        decoder.ids = []
        ids = PROMPT[:length]
        torch.testing.assert_close(decoder.logits(ids), reference_logits(model, ids), rtol=1e-4, atol=1e-4)
    assert decoder.name.startswith("16-bit kernels" if kernels else "torch float32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_16_bit_weights_are_exact(dtype):
    """Weights that are exact in 16 bits are stored so, and the logits are those of float32 weights."""
    model = served("Qwen3").get_base_model()
    scale = 2.0**-40 if dtype == torch.bfloat16 else 1.0  # below the range of float16
    head = model.lm_head.weight.data
    head.copy_((head * scale).to(dtype).float())
    decoder = build_decoder(model)
    assert decoder.weights.head.weight.dtype == (dtype if decoder.compiled else torch.float32)
    torch.testing.assert_close(decoder.logits(PROMPT), reference_logits(model, PROMPT), rtol=1e-4, atol=1e-4 * scale)


def test_weights_in_16_bits_are_shared_with_the_model():
    model = served(dropout=0.1).get_base_model().half()
    decoder = build_decoder(model)
    if decoder.compiled:
        assert decoder.weights.embedding.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    upcast = served(dropout=0.1).get_base_model().half().float()
    assert decoder.generate(PROMPT, 30, ()) == generate_reference(upcast, PROMPT, 30)


def test_the_base_without_its_adapter_shares_the_16_bit_copy():
    model = served(dropout=0.1).half().float()
    decoder = build_decoder(model)
    with model.disable_adapter():
        base, separate = build_decoder(model, like=decoder), build_decoder(model)
    assert base.generate(PROMPT, 12, ()) == separate.generate(PROMPT, 12, ()) != decoder.generate(PROMPT, 12, ())
    held, shared, own = ({x.data_ptr() for x in d.weights.stored.values()} for d in (decoder, base, separate))
    assert held == shared and (not decoder.compiled or not held & own)


def test_an_adapter_switched_off_or_merged_is_respected():
    model = served()
    with model.disable_adapter():
        base, expected = build_decoder(model), generate_reference(model, PROMPT, 12)
    assert base.generate(PROMPT, 12, ()) == expected != generate_reference(model, PROMPT, 12)
    model.merge_adapter()
    torch.testing.assert_close(
        build_decoder(model).logits(PROMPT), reference_logits(model, PROMPT), rtol=1e-4, atol=1e-4
    )


def test_a_history_is_computed_once():
    model = served()
    decoder, uncached = build_decoder(model), build_decoder(model)
    answer = decoder.generate(PROMPT, 5, ())
    longer = [*PROMPT, *answer, 7, 8]
    forward, computed = decoder._forward, []
    decoder._forward = lambda ids, *rest: computed.append(len(ids)) or forward(ids, *rest)
    assert decoder.generate(longer, 9, ()) == uncached.generate(longer, 9, ())
    assert sum(computed) == 3 + 8  # the answer's last token and two new ones, then all generated tokens but the last
    other = [*PROMPT[:4], 90, 91, *PROMPT]
    assert decoder.generate(other, 9, ()) == build_decoder(model).generate(other, 9, ())


def test_tokens_come_one_by_one_until_a_stop_token():
    model = served()
    decoder = build_decoder(model)
    whole = generate_reference(model, PROMPT, 20)
    wanted = whole[: whole.index(whole[7])]
    received = []
    for token in decoder.tokens(PROMPT, 20, {whole[7]}):
        received.append(token)
        assert len(decoder.ids) == len(PROMPT) + len(received) - 1  # nothing is computed before it is requested
    assert received == decoder.generate(PROMPT, 20, {whole[7]}) == wanted


@pytest.mark.parametrize("temperature, top_p", [(0.7, 0.8), (1.5, 1.0)])
def test_sampling_is_that_of_transformers(temperature, top_p):
    model = served()
    torch.manual_seed(3)
    options = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    expected = generate_reference(model, PROMPT, 20, **options)
    torch.manual_seed(3)
    assert build_decoder(model).generate(PROMPT, 20, (), temperature, top_p) == expected
    drawn = [
        build_decoder(model).generate(PROMPT, 20, (), temperature, top_p, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_tiny_top_p_leaves_the_most_likely_token():
    assert _sample(torch.tensor([0.1, 3.0, 2.9]), 2.0, 1e-6, None) == 1


def test_the_context_ends_where_the_positions_end():
    decoder = build_decoder(served())
    assert len(decoder.generate([5] * 250, 20, ())) == 6
    for ids in ([5] * 257, []):
        with pytest.raises(ValueError, match=f"{len(ids)} tokens of context"):
            decoder.generate(ids, 1, ())


def test_an_unsupported_model_raises_not_served():
    with pytest.raises(NotServed, match="DoRA"):
        build_decoder(served(use_dora=True))
    model = served()
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(NotServed, match="several"):
        build_decoder(model)
    with pytest.raises(NotServed, match="float64"):
        build_decoder(tiny())
    with pytest.raises(NotServed, match="Linear is not one of"):
        build_decoder(torch.nn.Linear(2, 2))


def test_without_a_compiler_torch_computes(monkeypatch, tmp_path):
    from lora_practice.fast.decode import decoder as decode_decoder

    def missing(_):
        raise OSError("no C++ compiler found")

    monkeypatch.setattr(decode_decoder, "library", missing)
    model = served()
    decoder = build_decoder(model)
    assert decoder.name == "torch float32 (no C++ compiler found)"
    assert decoder.generate(PROMPT, 10, ()) == generate_reference(model, PROMPT, 10)
