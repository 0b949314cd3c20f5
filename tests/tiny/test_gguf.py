"""GGUF files of tiny models: llama.cpp reads them as transformers reads the folders they come from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gguf_folders import cut_like, make_folder
from peft import LoraConfig, get_peft_model
from tiny import LLAMA3
from tokenizers.processors import TemplateProcessing

from lora_practice.console.errors import UserError
from lora_practice.export import gguf_tokenizer, gguf_writer, llama_cpp
from lora_practice.model.load import load_base, load_tokenizer
from lora_practice.sources.find import Source

TRICKY = "Hi  there,\n\n\tit's 12345 kg!\r\n 你好，世界😀 naïve <|im_end|> ...don't"
NO_LLAMA = pytest.mark.skipif(bool(llama_cpp.missing()), reason="xllamacpp is not installed")
KINDS = ("llama", "qwen2", "qwen3")


def source(folder: Path) -> Source:
    return Source("folder", str(folder), folder)


def write(folder: Path, kind: str = "f16") -> Path:
    tokenizer, config = load_tokenizer(source(folder)), gguf_writer.writable_config(folder)
    fields = gguf_tokenizer.token_fields(folder, tokenizer, config["vocab_size"], [tokenizer.eos_token_id])
    gguf_writer.write_model(folder, fields, kind, folder / f"{kind}.gguf")
    return folder / f"{kind}.gguf"


def distance(model, llama: llama_cpp.Llama, ids: list[int]) -> float:
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return float((torch.tensor(llama.logprobs(ids, len(wanted))) - wanted).abs().max())


@NO_LLAMA
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_transformers_computes(kind, tmp_path):
    folder = make_folder(tmp_path / "model", kind)
    model, ids = load_base(source(folder), "fp32").eval(), [4, 30, 200, 11, 90, 31, 32, 7]
    assert distance(model, llama_cpp.Llama(write(folder)), ids) < 0.05
    assert distance(model, llama_cpp.Llama(write(folder, "q8_0")), ids) < 0.5


@NO_LLAMA
def test_without_the_interleaving_of_q_and_k_it_would_be_another_model(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "model")
    model, ids = load_base(source(folder), "fp32").eval(), [4, 30, 200, 11, 90, 31, 32, 7]
    monkeypatch.setattr(gguf_writer, "PERMUTED", {})
    assert distance(model, llama_cpp.Llama(write(folder)), ids) > 0.5


@NO_LLAMA
@pytest.mark.parametrize("split", list(gguf_tokenizer.SPLITS.values()))
def test_llama_cpp_cuts_words_as_the_tokenizer_does(split, tmp_path):
    folder = make_folder(tmp_path / "model", split=split)
    llama, tokenizer = llama_cpp.Llama(write(folder)), load_tokenizer(source(folder))
    for chat in ([{"role": "user", "content": TRICKY}], [{"role": "user", "content": word} for word in TRICKY.split()]):
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert llama.prompt_ids(chat) == tokenizer(rendered, add_special_tokens=False)["input_ids"]


@NO_LLAMA
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_bos_of_a_template_is_there_once_whether_or_not_the_tokenizer_adds_one(adds_bos, tmp_path):
    """Llama 3's tokenizer adds it, and llama.cpp then takes it out of what the template has rendered."""
    folder = make_folder(tmp_path / "model", split="llama-bpe")
    tokenizer = load_tokenizer(source(folder))
    tokenizer.chat_template = LLAMA3
    if adds_bos:
        bos = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    tokenizer.save_pretrained(folder)
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) is adds_bos
    chat = [{"role": "user", "content": "hello there"}]
    wanted = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert wanted.count(tokenizer.bos_token_id) == 1
    assert llama_cpp.Llama(write(folder)).prompt_ids(chat) == wanted


@NO_LLAMA
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_acts_on_the_bases_gguf_as_it_does_in_peft(kind, rslora, tmp_path):
    folder, adapted = make_folder(tmp_path / "model", kind), tmp_path / "adapter"
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=rslora, task_type="CAUSAL_LM")
    model = get_peft_model(load_base(source(folder), "fp32"), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(adapted), save_embedding_layers=False)
    gguf_writer.write_adapter(adapted, gguf_writer.writable_config(folder), tmp_path / "adapter.gguf")
    ids = [4, 30, 200, 11, 90, 31, 32, 7]
    base_gguf = write(folder)
    assert distance(model, llama_cpp.Llama(base_gguf, tmp_path / "adapter.gguf"), ids) < 0.1
    assert distance(model, llama_cpp.Llama(base_gguf), ids) > 0.5


def test_an_adapter_in_bfloat16_as_other_tools_save_it_is_written_too(tmp_path):
    folder, adapted = make_folder(tmp_path / "model"), tmp_path / "adapter"
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_base(source(folder), "fp32").to(torch.bfloat16), config, autocast_adapter_dtype=False)
    model.save_pretrained(str(adapted), save_embedding_layers=False)
    gguf_writer.write_adapter(adapted, gguf_writer.writable_config(folder), tmp_path / "adapter.gguf")
    written = {one.name: np.array(one.data) for one in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors}
    assert len(written) == 2 * 2 * 2
    a = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj.lora_A.default").weight
    assert a.dtype == torch.bfloat16
    assert np.array_equal(written["blk.1.ffn_down.weight.lora_a"], a.detach().float().numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_holds_every_weight_within_its_rounding(kind, tmp_path):
    folder = make_folder(tmp_path / "model", kind)
    model = dict(load_base(source(folder), "fp32").named_parameters())
    names = gguf_writer._names(gguf_writer.writable_config(folder))
    for precision, rounding in (("f16", 1e-3), ("q8_0", 0.01)):
        found = {one.name: one for one in gguf.GGUFReader(write(folder, precision)).tensors}
        assert len(found) == len(model)
        for name, parameter in model.items():
            one = found[names(name)]
            values = gguf.dequantize(one.data, one.tensor_type).astype(np.float32)
            wanted = gguf_writer._permuted(name, parameter.detach().numpy(), gguf_writer.writable_config(folder))
            assert np.abs(values - wanted).max() <= rounding * np.abs(wanted).max()


def test_a_tokenizer_that_llama_cpp_would_cut_otherwise_is_refused(tmp_path):
    folder = make_folder(tmp_path / "model")
    whole = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    others = {"pre_tokenizer": {"type": "Whitespace"}, "normalizer": {"type": "Lowercase"}}
    for field, value in others.items():
        (folder / "tokenizer.json").write_text(json.dumps({**whole, field: value}), "utf-8")
        with pytest.raises(UserError, match=r"tokenizer\.json: no GGUF can be made: its way of splitting words"):
            gguf_tokenizer.split_name(folder)
    (folder / "tokenizer.json").write_text(json.dumps({**whole, "model": {"type": "Unigram", "vocab": []}}), "utf-8")
    with pytest.raises(UserError, match="Unigram is no byte-level BPE"):
        gguf_tokenizer.split_name(folder)
    (folder / "tokenizer.json").write_text(json.dumps(whole), "utf-8")
    for name in gguf_tokenizer.SPLITS.values():
        cut_like(name, folder)
        assert gguf_tokenizer.split_name(folder) == name


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "gemma"},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"rope_scaling": {"rope_type": "yarn"}},
    ],
    ids=str,
)
def test_an_architecture_that_would_come_out_wrong_is_refused(changed, tmp_path):
    folder = make_folder(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps({**config, **changed}), "utf-8")
    with pytest.raises(UserError, match=r"config\.json: no GGUF can be made"):
        gguf_writer.writable_config(folder)


def test_a_weight_beyond_fp16_is_refused_and_not_written_as_infinity(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for kind in gguf_writer.PRECISIONS:
        with pytest.raises(UserError, match="beyond fp16"):
            write(folder, kind)


@pytest.mark.parametrize("field", ["use_dora", "modules_to_save", "rank_pattern"])
def test_what_a_gguf_adapter_cannot_hold_is_named(field):
    assert field in gguf_writer.adapter_problem({"r": 4, field: {"lm_head": 1}})
    assert gguf_writer.adapter_problem({"r": 4, field: None}) == ""
