"""The settings that this wing reads; fine_tuning_practice.TrainSettings holds them, each with its reason."""

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
