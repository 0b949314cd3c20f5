"""LoRA's family, by PEFT's own options: which layers, how it is scaled, where it begins; see docs/lora-family.md.

PiSSA and OLoRA begin with a part of the base, W = W' + c B0 A0, and train A and B beside the rest W', which stands in
the model then. Saved is what the run has changed, c (B A - B0 A0): a LoRA of twice the rank, for the base as everybody
has it. The arithmetic is that of PEFT's `LoraModel.subtract_mutated_init`; PEFT's own way there asks the Hub each time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_practice import compat
from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.model.adapter_config import ADAPTER_WEIGHTS

STARTS = ("default", "pissa", "pissa_niter_4", "olora")  # of init_lora_weights
_START = "_practice_start"


def moves_base(settings: Any) -> bool:
    """Whether the run begins by taking a part out of the base's weights: with every start but the default one."""
    return settings.init_lora_weights != STARTS[0]


def check_lora_settings(settings: Any) -> None:
    """Before anything is loaded.

    Raises:
        UserError: two settings that cannot be right together.
    """
    start = settings.init_lora_weights
    if moves_base(settings) and settings.use_dora:  # PEFT's conversion would leave DoRA's lengths out
        raise UserError(
            text(
                f"{start} 和 DoRA 不能一起用：存不成普通的 LoRA", f"{start} with DoRA cannot be saved as a plain LoRA"
            ),
            where="--use_dora",
            fix=text("两个去掉一个", "leave one of the two out"),
        )
    if settings.load_in_4bit and moves_base(settings):
        raise UserError(
            text(f"{start} 要 fp32 的权重", f"{start} needs weights in fp32"),
            where="--load_in_4bit",
            fix=text("两个去掉一个", "leave one of the two out"),
        )
    if settings.load_in_4bit:
        compat.check_installed("bitsandbytes", "--load_in_4bit")


def remember_start(model: Any) -> None:
    """Keep A0 and B0 of a PEFT model whose base has just given them away; nothing for any other."""
    if model.peft_config["default"].init_lora_weights is not True:
        vars(model)[_START] = {name: value.clone() for name, value in _trained(model).items()}


def ranks_saved(model: Any) -> int:
    """How many times its rank a PEFT model's adapter has on disk."""
    return 2 if _START in vars(model) else 1


def save_as_lora(model: Any, folder: Path) -> None:
    """Turn what PEFT has just written into `folder` into a LoRA for the untouched base, if the base was touched."""
    from safetensors.torch import load, save_file

    start = vars(model).get(_START)
    if start is None:
        return
    found = load((folder / ADAPTER_WEIGHTS).read_bytes())  # not mapped: Windows writes over no file that is
    both = {name: _beside(name, value, start[name].to(value)) for name, value in found.items()}
    save_file(both, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # the same scale with twice the rank
    config.r, config.init_lora_weights, config.inference_mode = 2 * config.r, True, True
    config.save_pretrained(str(folder))


def load_again(model: Any, folder: Path) -> bool:
    """Put A and B of a checkpoint that `save_as_lora` wrote back into `model`; False if its base is untouched.

    Raises:
        UserError: this run took another part out of the base than the run that wrote the checkpoint.
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    start = vars(model).get(_START)
    if start is None:
        return False
    both, rank = load_file(folder / ADAPTER_WEIGHTS), model.peft_config["default"].r
    for name in both:
        if "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            then = -both[other][:, rank:] @ both[name][rank:]  # zero in a checkpoint of plain LoRA
            now = (start[other] @ start[name]).to(then)
            same_rank = len(both[name]) == 2 * rank
            if not same_rank or not torch.allclose(then, now, rtol=0, atol=1e-4 * float(now.abs().max())):
                raise UserError(
                    text("存盘点不是从这样的底座开始的", "the checkpoint did not begin with such a base"),
                    where=str(folder),
                    fix=text("在原来的机器和版本上继续", "go on where it began, with the same torch"),
                )
    mine = {name: value[:rank] if "lora_A" in name else value[:, :rank] for name, value in both.items()}
    set_peft_model_state_dict(model, mine)
    return True


@contextmanager
def as_base(model: Any) -> Iterator[None]:
    """Within it the PEFT model answers as the untouched base."""
    from peft import set_peft_model_state_dict

    start = vars(model).get(_START)
    if start is None:
        with model.disable_adapter():
            yield
        return
    now = {name: value.clone() for name, value in _trained(model).items()}
    set_peft_model_state_dict(model, start)
    try:
        yield
    finally:
        set_peft_model_state_dict(model, now)


def _trained(model: Any) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    # save_embedding_layers="auto" would look the base's config up on the Hub (huggingface/peft#1452)
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _beside(name: str, value: Any, first: Any) -> Any:
    """[A; A0], or [B, -B0]: their product is B A - B0 A0."""
    import torch

    return torch.cat([value, first], 0) if "lora_A" in name else torch.cat([value, -first], 1)
