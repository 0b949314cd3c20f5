"""A real run in seconds: TRL's trainer, as the door builds it, on a tiny random model and random rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Optional

import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer

from fine_tuning_practice import TrainSettings
from lora_practice import fast
from lora_practice.data.examples import Examples
from lora_practice.data.tokenization import Example
from lora_practice.machine.device import Facts, decide
from lora_practice.run.folder import OutputFolder
from lora_practice.training import build

MACHINE = decide(Facts(memory=8 << 30))


def rows(count: int = 24, seed: int = 0) -> Examples:
    """Random tokens; all but the first two of a row are trained."""
    draw = random.Random(seed)
    lengths = [draw.randint(4, 40) for _ in range(count)]
    ids = [[draw.randrange(20, 300) for _ in range(length)] for length in lengths]
    return Examples(Example(one, [-100, -100, *one[2:]]) for one in ids)


def trainer_for(place: Path, is_fast: bool, resumed: Optional[dict[str, Any]] = None, **changed: Any) -> Any:
    """(trainer, settings) of a run of four steps of three rows; `resumed` is the record of the run to go on with."""
    defaults = {"max_steps": 4, "gradient_accumulation_steps": 3, "logging_steps": 1, "save_strategy": "no"}
    settings = TrainSettings(output_dir=str(place), **{**defaults, **changed})
    torch.manual_seed(7)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.2, target_modules="all-linear")
    model = get_peft_model(make_model(), lora)
    engine = fast.build(model, seed=settings.seed, kernels=False) if is_fast else None
    folder = OutputFolder(place, resumed=resumed)
    return build.build_trainer(model, engine, make_tokenizer(), rows(), settings, MACHINE, folder), settings
