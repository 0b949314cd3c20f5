"""The two steps tried before a run leave no trace: the run after them is bit for bit the run without them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_model, make_tokenizer

from fine_tuning_practice import TrainSettings
from lora_practice import fast, preflight, train
from lora_practice.artifacts import OutputFolder
from lora_practice.data.examples import Examples
from lora_practice.data.tokens import Example
from lora_practice.helping import columns
from lora_practice.machine import Facts, decide
from lora_practice.sources import Source

MACHINE = decide(Facts(memory=8 << 30))


def rows(count: int = 24) -> Examples:
    draw = random.Random(0)
    lengths = [draw.randint(4, 40) for _ in range(count)]
    ids = [[draw.randrange(20, 300) for _ in range(length)] for length in lengths]
    return Examples(Example(one, [-100, -100, *one[2:]]) for one in ids)


def trainer_for(place: Path, is_fast: bool, **changed: Any) -> Any:
    defaults = {"max_steps": 4, "gradient_accumulation_steps": 3, "logging_steps": 1, "save_strategy": "no"}
    settings = TrainSettings(output_dir=str(place), **{**defaults, **changed})
    torch.manual_seed(7)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.2, target_modules="all-linear")
    model = get_peft_model(make_model(), lora)
    engine = fast.build(model, seed=settings.seed, kernels=False) if is_fast else None
    folder = OutputFolder(place)
    return train.build_trainer(model, engine, make_tokenizer(), rows(), settings, MACHINE, folder), settings


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("is_fast", [True, False])
def test_a_run_is_the_same_bit_for_bit_with_and_without_them(is_fast: bool, packing: bool, tmp_path: Path) -> None:
    left = []
    for probed in (False, True):
        trainer, _ = trainer_for(tmp_path / str(probed), is_fast, packing=packing, max_length=64)
        if probed:
            before = torch.get_rng_state()
            plan = preflight.estimate(trainer, Source("folder", "x", tmp_path), 4, False, 0)
            assert torch.equal(torch.get_rng_state(), before)
            assert plan.seconds > 0 and plan.peak_memory_mb > 0
            assert all(one.grad is None for one in trainer.model.parameters())
        notes = train.run(trainer, [])
        weights = {name: one.detach().clone() for name, one in trainer.model.named_parameters() if one.requires_grad}
        logged = [
            {key: value for key, value in entry.items() if "runtime" not in key and "per_second" not in key}
            for entry in trainer.state.log_history
        ]
        left.append((notes["losses"], logged, weights, torch.get_rng_state()))
    (losses, logged, weights, state), (losses_2, logged_2, weights_2, state_2) = left
    assert losses == losses_2 and len(losses) == 4
    assert logged == logged_2
    assert all(torch.equal(weights[name], weights_2[name]) for name in weights)
    assert torch.equal(state, state_2)


def test_the_plan_counts_what_a_shorter_length_would_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trainer, settings = trainer_for(tmp_path / "out", True)
    plan = preflight.estimate(trainer, Source("folder", "x", tmp_path), 4, False, 93)
    lengths = [len(one.input_ids) for one in rows()]
    shorter, effect = preflight.changes(plan, trainer, settings, MACHINE)[0]
    assert shorter == "--max_length 32"
    assert f"cuts {sum(length > 32 for length in lengths)} rows" in effect
    for lang, word in (("zh", "刚下载了 93 MB"), ("en", "93 MB, done just now")):
        monkeypatch.setenv("LORA_PRACTICE_LANG", lang)
        page = preflight.said(plan, trainer, settings, MACHINE)
        assert word in page
        assert all(columns(line) <= 80 for line in page.splitlines())
    assert not (tmp_path / "out").exists()
