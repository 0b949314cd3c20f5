"""What is trained is fp32 before the first step, whatever the base is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model
from tiny_training import run, trainer_of
from transformers import TrainerCallback

from lora_practice.console.errors import UserError
from lora_practice.model.lora import keep_trained_in_fp32

HALVES = (torch.float16, torch.bfloat16)


def half_adapter(dtype: torch.dtype) -> Any:
    """A model in 16 bits whose LoRA weights are so too, as PEFT leaves them without its own cast."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    return get_peft_model(make_model().to(dtype), lora, autocast_adapter_dtype=False)


@pytest.mark.parametrize("dtype", HALVES)
def test_lora_weights_in_16_bits_become_fp32_with_the_same_values_and_it_is_said(
    dtype: torch.dtype, capsys: Any
) -> None:
    model = half_adapter(dtype)
    before = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    assert {one.dtype for one in before.values()} == {dtype}
    keep_trained_in_fp32(model)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert {one.dtype for one in trained.values()} == {torch.float32}
    assert all(torch.equal(one, before[name].float()) for name, one in trained.items())
    assert {one.dtype for one in model.parameters() if not one.requires_grad} == {dtype}
    assert f"{len(trained)} LoRA tensors put into fp32" in capsys.readouterr().err
    keep_trained_in_fp32(model)
    assert capsys.readouterr().err == ""


def test_another_tensor_that_is_trained_in_16_bits_is_refused_by_name() -> None:
    model = half_adapter(torch.float16)
    model.base_model.model.model.norm.weight.requires_grad_()
    with pytest.raises(UserError, match=r"model\.norm\.weight is to be trained but is float16"):
        keep_trained_in_fp32(model)


class AtStart(TrainerCallback):
    """Notes the dtypes of what is trained when the first step begins."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.seen = trainer, set()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen |= {one.dtype for one in self.trainer.trainable}


@pytest.mark.parametrize("path", ["on", "off"])
def test_before_the_first_step_on_a_16_bit_base_all_that_is_trained_is_fp32(tmp_path: Path, path: str) -> None:
    def to_bf16(base: Any) -> None:
        base.bfloat16()

    trainer = trainer_of(tmp_path / "a", "bf16", change=to_bf16, fast=path, max_steps=1)
    noted = AtStart(trainer)
    trainer.add_callback(noted)
    run(trainer)
    assert noted.seen == {torch.float32}
