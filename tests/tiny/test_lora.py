"""LoRA's variants on a tiny model: what is saved fits the base as everybody has it, resumed or not, fast or not."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model
from tiny_training import run, same, settings_of, trainer_of, weights_of
from transformers import GPT2Config, GPT2LMHeadModel

from fine_tuning_practice import TrainSettings
from lora_practice.console.errors import UserError
from lora_practice.inference.load import with_adapter
from lora_practice.model import lora as model_lora
from lora_practice.model import pissa, quantization
from lora_practice.model.lora import add_lora
from lora_practice.run.resume import LATER, check_same_settings
from lora_practice.sources.find import Source

MOVING = ("pissa", "pissa_niter_4", "olora")
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True, "lora_r": 4},
    "dora": {"use_dora": True},
    "targets": {"target_modules": "q_proj, v_proj"},
    "loraplus": {"loraplus_lr_ratio": 16.0},
    **{start: {"init_lora_weights": start} for start in MOVING},
    "all that goes with DoRA": {"use_dora": True, "use_rslora": True, "loraplus_lr_ratio": 4.0},
    "pissa and rslora": {"init_lora_weights": "pissa", "use_rslora": True},
}
IDS = torch.tensor([[5, 40, 200, 11, 90, 31]])


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal but for rounding."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def lora(**changed: Any) -> Any:
    return add_lora(make_model(), settings_of(Path("x"), **changed), Source("folder", "tiny", None))


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_saved_gives_the_trained_models_logits_on_the_untouched_base(name, tmp_path):
    trainer = trainer_of(tmp_path, learning_rate=0.01, max_steps=2, **VARIANTS[name])
    assert (trainer.engine is None) == ("dora" in name.lower())
    run(trainer)
    expected, base = logits(trainer.model), logits(make_model())
    assert float((expected - base).abs().max()) > 1e-3
    saved = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text("utf-8"))
    assert saved["r"] == trainer.asked.lora_r * pissa.ranks_saved(trainer.model)
    again = with_adapter(make_model(), tmp_path / "checkpoint-2")
    close(logits(again), expected)
    with pissa.as_base(trainer.model):
        close(logits(trainer.model), base)
    close(logits(trainer.model), expected)
    close(logits(again.merge_and_unload()), expected)


@pytest.mark.parametrize("name", ["targets", "loraplus", "pissa"])
def test_the_fast_path_learns_a_variant_as_the_plain_path_does(name, tmp_path):
    learnt = []
    for fast in ("on", "off"):
        trainer = trainer_of(tmp_path / fast, fast=fast, max_steps=2, save_strategy="no", **VARIANTS[name])
        run(trainer)
        learnt.append(weights_of(trainer))
    assert same(*learnt, tolerance=1e-3)


@pytest.mark.parametrize("start", ["pissa_niter_4", "olora"])
def test_a_run_that_begins_with_a_part_of_the_base_is_resumed_bit_by_bit(start, tmp_path):
    whole = trainer_of(tmp_path / "whole", init_lora_weights=start)
    run(whole)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "run_record.json", tmp_path / "half")
    half = trainer_of(tmp_path / "half", init_lora_weights=start, resume=True, trust_checkpoint=True)
    run(half)
    assert same(weights_of(half), weights_of(whole))


def test_a_checkpoint_of_another_start_is_not_resumed(tmp_path):
    trainer = trainer_of(tmp_path, init_lora_weights="pissa", max_steps=2)
    run(trainer)
    other = lora(init_lora_weights="olora")
    with pytest.raises(UserError, match="did not begin with such a base"):
        pissa.load_again(other, tmp_path / "checkpoint-2")


def test_a_checkpoint_of_plain_lora_is_not_put_onto_a_base_that_gave_a_part_away(tmp_path):
    lora().save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="did not begin with such a base"):
        pissa.load_again(lora(init_lora_weights="olora"), tmp_path)


def test_a_record_from_before_the_variants_is_one_of_plain_lora():
    old, now = {"settings": {"lora_r": 6}}, {"lora_r": 6, "use_dora": False, "init_lora_weights": "default"}
    check_same_settings(Path("x"), old, now)
    defaults = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
    assert all(defaults[name] == value for name, value in LATER.items())
    for name, value in {"use_dora": True, "init_lora_weights": "pissa", "target_modules": "q_proj"}.items():
        with pytest.raises(UserError, match=f"not the same run any more: {name}"):
            check_same_settings(Path("x"), old, {**now, name: value})


def test_layers_of_the_kind_that_gpt_2_has_are_linear_too():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64))
    assert model_lora.lora_config_arguments(model, settings_of(Path("x"), target_modules="c_attn"))[
        "target_modules"
    ] == ["c_attn"]
    with pytest.raises(UserError, match="pissa does not know this model's layers"):
        model_lora.lora_config_arguments(model, settings_of(Path("x"), init_lora_weights="pissa"))


def test_saving_agrees_with_pefts_own_conversion(tmp_path):
    model = lora(init_lora_weights="pissa", use_rslora=True)
    model.save_pretrained(str(tmp_path / "start"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01
    model.save_pretrained(str(tmp_path / "ours"))
    pissa.save_as_lora(model, tmp_path / "ours")
    model.save_pretrained(str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text("utf-8")) for name in ("ours", "theirs")]
    assert all(configs[0][key] == configs[1][key] for key in ("r", "lora_alpha", "use_rslora", "init_lora_weights"))


def test_a_start_in_the_base_needs_weights_in_fp32():
    with pytest.raises(UserError, match="pissa needs weights in fp32"):
        add_lora(make_model().half(), settings_of(Path("x"), init_lora_weights="pissa"), Source("folder", "tiny", None))


def test_an_adapter_without_its_weights_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}', "utf-8")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        with_adapter(None, tmp_path)


def test_resuming_another_variant_is_refused(tmp_path):
    run(trainer_of(tmp_path, max_steps=2))
    for name, value in {**VARIANTS["all that goes with DoRA"], **VARIANTS["targets"], **VARIANTS["olora"]}.items():
        with pytest.raises(UserError, match=f"not the same run any more: {name}"):
            trainer_of(tmp_path, max_steps=2, resume=True, **{name: value})


@pytest.mark.parametrize("start", MOVING)
def test_a_start_in_the_base_is_refused_with_a_base_in_4_bits(start):
    with pytest.raises(UserError, match="needs weights in fp32"):
        model_lora.check_lora_settings(settings_of(Path("x"), load_in_4bit=True, init_lora_weights=start))


def test_4_bits_without_the_library_or_the_machine_for_it_are_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="bitsandbytes is not installed"):
        model_lora.check_lora_settings(settings_of(Path("x"), load_in_4bit=True))
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())  # as one whose libraries are not found
    with pytest.raises(UserError, match="no 4 bits on this machine"):
        quantization.four_bit("cpu", "fp32")


def test_where_recovery_goes_over_to_fp32_a_4_bit_layer_does_too(tmp_path):
    trainer = trainer_of(tmp_path, fast="off")
    layer = trainer.model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    layer.compute_dtype = torch.float16  # as bitsandbytes' Linear4bit has it
    trainer.upcast_to_fp32()
    assert layer.compute_dtype == torch.float32
