"""QLoRA: a base whose linear layers are quantized to 4 bits, through bitsandbytes."""

from __future__ import annotations

from typing import Any

from lora_practice.console.errors import UserError, reason_of
from lora_practice.console.text import text


def four_bit(device: str, precision: str) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` that load the linear layers in 4 bits.

    NF4 with double quantization, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

    Raises:
        UserError: bitsandbytes cannot compute on this machine, which is tried with a small layer.
    """
    import torch
    from transformers import BitsAndBytesConfig

    from lora_practice.model.load import torch_dtype

    dtype = torch_dtype(precision)
    try:
        import bitsandbytes

        tried = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=dtype, quant_type="nf4").to(device)
        tried(torch.ones(2, 64, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # an old card, a torch that it was not built for, a missing library: anything
        raise UserError(
            text(f"这台机器用不了 4 位：{reason_of(error)}", f"no 4 bits on this machine: {reason_of(error)}"),
            where="--load_in_4bit",
            fix=text("去掉它", "leave it out"),
        ) from error
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}
