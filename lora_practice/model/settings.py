"""The settings of LoRA and of the base: those fields of fine_tuning_practice.TrainSettings that this wing reads."""

from __future__ import annotations

from typing import Protocol


class LoraSettings(Protocol):
    """Fields of TrainSettings."""

    seed: int
    max_length: int
    packing: bool
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: str
    use_rslora: bool
    use_dora: bool
    init_lora_weights: str
    bf16: bool
    load_in_4bit: bool
