"""Training runs of a tiny random model in this process: the real trainer, recovery and output folder, in a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Optional

import torch
from tiny import make_model, make_tokenizer

from fine_tuning_practice import TrainSettings
from lora_practice.data.examples import Examples
from lora_practice.data.tokenization import Example
from lora_practice.machine.device import Facts, Machine
from lora_practice.model import lora as model_lora
from lora_practice.run.folder import OutputFolder
from lora_practice.sources.find import Source
from lora_practice.training import build
from lora_practice.training import run as training_run

ROWS, LENGTHS = 12, 18


def settings_of(folder: Path, **changed: Any) -> TrainSettings:
    """Six steps of two rows, logged and saved each step, no dropout."""
    plain = {"output_dir": str(folder), "gradient_accumulation_steps": 2, "logging_steps": 1, "lora_dropout": 0.0}
    plain.update(save_strategy="steps", save_steps=2, max_length=64)
    return TrainSettings(**{**plain, **changed})


def rows(count: int = ROWS, seed: int = 3, longest: int = 40) -> Examples:
    """Random tokens, all but the first four of a row trained; the lengths fall by two from row to row, then repeat."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        ids = torch.randint(3, 300, (longest - 2 * (index % LENGTHS),), generator=draw).tolist()
        made.append(Example(ids, [-100] * 4 + ids[4:]))
    return Examples(made)


def machine_of(precision: str = "fp32") -> Machine:
    """A CPU with 16 GB free."""
    return Machine("cpu", precision, "", Facts(memory=1 << 34))


def trainer_of(
    folder: Path,
    precision: str = "fp32",
    change: Any = None,
    examples: Optional[Examples] = None,
    **changed: Any,
) -> Any:
    """A trainer that is ready to run in `folder`; the run there goes on if `resume=True` is among the settings.

    `change(base)` alters the base model; `changed` are settings other than those of `settings_of`.
    """
    settings = settings_of(folder, **changed)
    machine = machine_of(precision)
    claimed = OutputFolder.claim(str(folder), settings.resume, False, dataclasses.asdict(settings))
    base, examples = make_model(), examples or rows()
    if change is not None:
        change(base)
    lora = model_lora.add_lora(base, settings, Source("folder", "tiny", None))
    engine = build.build_engine(lora, settings, machine)
    # accelerate knows no fp16 on a CPU; the engine does
    told = dataclasses.replace(machine, precision="fp32") if precision == "fp16" else machine
    trainer = build.build_trainer(lora, engine, make_tokenizer(), examples, settings, told, claimed)
    if precision == "fp16":
        trainer.compute_config = dataclasses.replace(trainer.compute_config, precision="fp16")
        trainer.recovery.precision = "fp16"
    claimed.begin({"settings": dataclasses.asdict(settings)})
    trainer.asked = settings
    return trainer


def run(trainer: Any, held_out: Any = ()) -> dict[str, Any]:
    """Train to the end; what goes into the record."""
    return training_run.train(trainer, held_out, trainer.asked)


def weights_of(trainer: Any) -> list[torch.Tensor]:
    """Copies of the trained tensors."""
    return [parameter.detach().clone() for parameter in trainer.trainable]


def same(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float = 0.0) -> bool:
    """Equal bit by bit, or within a relative tolerance."""
    if not tolerance:
        return all(a.equal(b) for a, b in zip(one, other))
    return all(torch.allclose(a, b, rtol=tolerance, atol=1e-6) for a, b in zip(one, other))
