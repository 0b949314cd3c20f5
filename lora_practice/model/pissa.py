"""PiSSA and OLoRA: LoRA whose A and B start as a part of the base's weights; see docs/lora-family.md.

They split W = W' + c B0 A0, put W' into the model, and train A and B from A0 and B0 (PiSSA: Meng et al. 2024, arXiv
2404.02948; OLoRA: Buyukakyuz 2024, arXiv 2406.01775). What is saved is the change, c (B A - B0 A0): a LoRA of twice the
rank for the unchanged base. The arithmetic is that of PEFT's `LoraModel.subtract_mutated_init`, which asks the Hub on
every save.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_practice.console.errors import UserError
from lora_practice.console.text import text
from lora_practice.model.adapter_config import ADAPTER_WEIGHTS
from lora_practice.model.settings import LoraSettings

PLAIN_INIT = "default"
LORA_INITS = (PLAIN_INIT, "pissa", "pissa_niter_4", "olora")  # choices of --init_lora_weights
_START = "_practice_start"  # attribute of a PEFT model: A0 and B0 by name


def changes_base(settings: LoraSettings) -> bool:
    """Whether the initialisation takes a part out of the base's weights, as PiSSA and OLoRA do."""
    return settings.init_lora_weights != PLAIN_INIT


def remember_start(model: Any) -> None:
    """Keep A0 and B0 of a PEFT model that was just initialised by PiSSA or OLoRA; keeps nothing of plain LoRA."""
    if model.peft_config["default"].init_lora_weights is not True:
        vars(model)[_START] = {name: value.clone() for name, value in _trained(model).items()}


def ranks_saved(model: Any) -> int:
    """Rank of the saved adapter divided by the trained rank: 2 for PiSSA and OLoRA, else 1."""
    return 2 if _START in vars(model) else 1


def save_as_lora(model: Any, folder: Path) -> None:
    """Rewrite the adapter that PEFT has just saved in `folder` as a LoRA for the unchanged base; plain LoRA stays."""
    from safetensors.torch import load, save_file

    start = vars(model).get(_START)
    if start is None:
        return
    saved = load((folder / ADAPTER_WEIGHTS).read_bytes())  # not memory-mapped, since Windows cannot replace such a file
    difference = {name: _joined(name, value, start[name].to(value)) for name, value in saved.items()}
    save_file(difference, folder / ADAPTER_WEIGHTS, {"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # the same scale with twice the rank
    config.r, config.init_lora_weights, config.inference_mode = 2 * config.r, True, True
    config.save_pretrained(str(folder))


def load_again(model: Any, folder: Path) -> bool:
    """Load A and B of a checkpoint that `save_as_lora` wrote into `model`; False, and nothing loaded, for plain LoRA.

    Raises:
        UserError: A0 and B0 of this run are not those of the run that wrote the checkpoint.
    """
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    start = vars(model).get(_START)
    if start is None:
        return False
    saved, rank = load_file(folder / ADAPTER_WEIGHTS), model.peft_config["default"].r
    for name in saved:
        if "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            then = -saved[other][:, rank:] @ saved[name][rank:]  # B0 A0; zero in a checkpoint of plain LoRA
            now = (start[other] @ start[name]).to(then)
            same_rank = len(saved[name]) == 2 * rank
            if not same_rank or not torch.allclose(then, now, rtol=0, atol=1e-4 * float(now.abs().max())):
                raise UserError(
                    text("检查点不是从这样的底座开始训练的", "the checkpoint did not begin with such a base"),
                    where=str(folder),
                    fix=text("在原来的机器和版本上继续", "go on where it began, with the same torch"),
                )
    trained = {name: value[:rank] if "lora_A" in name else value[:, :rank] for name, value in saved.items()}
    set_peft_model_state_dict(model, trained)
    return True


@contextmanager
def as_base(model: Any) -> Iterator[None]:
    """Context in which the PEFT model computes as the unchanged base."""
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


def _joined(name: str, value: Any, start: Any) -> Any:
    """[A; A0] (2r, in) for A, [B, -B0] (out, 2r) for B: their product is B A - B0 A0."""
    import torch

    return torch.cat([value, start], 0) if "lora_A" in name else torch.cat([value, -start], 1)
