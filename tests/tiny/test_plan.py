"""The two steps tried before a run leave no trace: the run after them is bit for bit the run without them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from datasets import Dataset
from limited_disk import small_disk
from tiny_training import machine_of, rows, run, trainer_of

from lora_practice.console.terminal import columns
from lora_practice.data.examples import Examples
from lora_practice.machine.device import peak_memory
from lora_practice.run import own_files
from lora_practice.run.folder import OutputFolder
from lora_practice.sources.find import Source
from lora_practice.training import plan as training_plan
from lora_practice.training import plan_text

PACE = ("runtime", "per_second", "memory_mb")  # what differs between two runs of the same


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("fast", ["on", "off"])
def test_a_run_is_the_same_bit_for_bit_with_and_without_them(fast: str, packing: bool, tmp_path: Path) -> None:
    left = []
    for probed in (False, True):
        trainer = trainer_of(tmp_path / str(probed), fast=fast, packing=packing, max_steps=4, lora_dropout=0.2)
        if probed:
            before = torch.get_rng_state()
            plan = training_plan.estimate(trainer, Source("folder", "x", tmp_path), 4, trainer.asked, Examples(), 0)
            assert torch.equal(torch.get_rng_state(), before)
            assert plan.steps == 4 and plan.step_seconds > 0 < plan.writing_seconds
            assert plan.seconds == pytest.approx(4 * plan.step_seconds + plan.writing_seconds)
            assert plan.peak_memory_mb == pytest.approx(peak_memory() / 1e6, abs=5)  # the peak so far
            assert all(one.grad is None for one in trainer.model.parameters())
        notes = run(trainer)
        weights = {name: one.detach().clone() for name, one in trainer.model.named_parameters() if one.requires_grad}
        logged = [
            {key: value for key, value in entry.items() if not any(word in key for word in PACE)}
            for entry in trainer.state.log_history
        ]
        left.append((notes["losses"], logged, weights, torch.get_rng_state()))
    (losses, logged, weights, state), (losses_2, logged_2, weights_2, state_2) = left
    assert losses == losses_2 and len(losses) == 4
    assert logged == logged_2
    assert all(torch.equal(weights[name], weights_2[name]) for name in weights)
    assert torch.equal(state, state_2)


def test_a_few_rows_stand_for_all_where_a_row_costs_by_its_tokens_and_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed rows hold one example or several; the rows of the middle lengths may happen to hold one each."""
    trainer = trainer_of(tmp_path / "out", gradient_accumulation_steps=4, max_steps=-1)
    ids = [[7] * length for length in range(40, 56)]
    parts = [[len(one)] if i % 2 == 0 else [8] * 5 + [len(one) - 40] * (len(one) > 40) for i, one in enumerate(ids)]
    packed = [{"input_ids": one, "labels": one, "lengths": lengths} for one, lengths in zip(ids, parts)]
    trainer.train_dataset = Dataset.from_list(packed)

    def cost(rows: Sequence[int]) -> float:
        return sum(len(ids[i]) + 20 * len(parts[i]) for i in rows) / 1000

    monkeypatch.setattr(training_plan, "time_step", lambda trainer, rows: cost(rows))
    told = training_plan.estimate(trainer, Source("folder", "x", tmp_path), 4, trainer.asked, Examples(), 0)
    assert told.seconds == pytest.approx(cost(range(len(ids))), rel=0.05)
    assert told.step_seconds == pytest.approx(cost(range(len(ids))) / 4, rel=0.05)


@pytest.mark.parametrize("kept", [None, 1, 2])
def test_the_disk_of_a_plan_is_the_most_that_the_run_ever_holds(kept: Optional[int], tmp_path: Path) -> None:
    """Just before an old checkpoint is dropped there is one more than are kept."""
    changed = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": kept, "max_steps": 4, "lora_r": 256}
    trainer = trainer_of(tmp_path / "out", **changed)
    told = training_plan.estimate(trainer, Source("folder", "x", tmp_path), 4, trainer.asked, Examples(), 0)
    most, drop_older = 0, own_files.drop_older

    def measured(*args: Any) -> None:
        nonlocal most
        most = max(most, sum(one.stat().st_size for one in (tmp_path / "out").rglob("*") if one.is_file()))
        drop_older(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_files, "drop_older", measured)
        run(trainer)
    adapter = sum(4 * one.numel() for one in trainer.trainable)
    needed = most + adapter  # which is written when the last checkpoint is there
    assert 0.9 * needed < 1e6 * told.disk_mb + 5e5  # it is rounded
    assert 1e6 * told.disk_mb - 5e5 < needed + 3 * adapter  # a checkpoint holds two moments of each weight too


@pytest.mark.parametrize("kept", [None, 2])
def test_steps_beyond_one_pass_write_a_checkpoint_at_the_end_of_each_epoch(
    kept: Optional[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--max_steps stands for as many passes as it takes; num_train_epochs says nothing of them."""
    changed = {"save_strategy": "epoch", "max_steps": 16, "gradient_accumulation_steps": 8, "save_total_limit": kept}
    trainer = trainer_of(tmp_path / "out", examples=rows(14), **changed)  # two steps each
    told = training_plan.estimate(trainer, Source("folder", "x", tmp_path), 16, trainer.asked, Examples(), 0)
    written, drop_older = [], own_files.drop_older
    monkeypatch.setattr(own_files, "drop_older", lambda *args: (written.append(1), drop_older(*args)))
    run(trainer)
    assert training_plan.checkpoints_written(trainer, 16) == len(written) == 8
    assert training_plan.most_checkpoints(trainer, 16) == (3 if kept else 8)
    assert training_plan.checkpoints_written(trainer, 15) == 8  # the last epoch is cut short
    assert told.writing_seconds == pytest.approx(
        8 * training_plan.checkpoint_bytes(trainer, Source("folder", "x", tmp_path)) / 60e6
    )
    for lang, words in (("zh", "每个 epoch 存一个检查点，共 8 个"), ("en", "a checkpoint each epoch, 8 in all")):
        monkeypatch.setenv("LORA_PRACTICE_LANG", lang)
        line = plan_text.many_checkpoints(told, trainer)
        assert (words in line and "--save_total_limit 2" in line) == (kept is None) == bool(line)
    short = training_plan.Estimate(10, 1.0, 10.0, 1500, 1, 0)  # five checkpoints
    assert plan_text.many_checkpoints(short, trainer) == ""


def test_evaluations_at_the_end_of_epochs_follow_from_the_steps(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "out", max_steps=18, eval_strategy="epoch", eval_subset_size=4)
    held_out = rows(4)
    told = training_plan.estimate(trainer, Source("folder", "x", tmp_path), 18, trainer.asked, held_out, 0)
    tokens = sum(training_plan.row_lengths(trainer))
    evaluated = 3 * held_out.tokens / 2 / (tokens / 6)  # in steps: twelve rows are six of them, and one pass
    assert told.seconds - told.writing_seconds == pytest.approx((18 + evaluated) * told.step_seconds, rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "many"),
    [({"save_strategy": "no"}, False), ({"save_total_limit": 1}, False), ({"save_total_limit": 2}, True), ({}, True)],
)
def test_a_disk_that_the_run_will_fill_is_pointed_out_and_fewer_checkpoints_where_that_helps(
    tmp_path: Path, changed: dict[str, Any], many: bool
) -> None:
    trainer = trainer_of(tmp_path / "out", **{"save_strategy": "steps", "save_steps": 1, **changed})
    with small_disk(tmp_path / "small", megabytes=2) as place:
        trainer.folder = OutputFolder(place / "new" / "out")
        for needed, told in ((1, False), (5, True)):
            line = plan_text.short_of_disk(training_plan.Estimate(4, 1.0, 4.0, 1500, needed, 0), trainer)
            assert ("only 2 MB of disk are free" in line) == told == bool(line)
            assert ("--save_total_limit 1" in line) == (told and many)
        trainer.folder = OutputFolder(place / "out", resumed_record={"status": "running"})  # has written a part already
        assert not plan_text.short_of_disk(training_plan.Estimate(4, 1.0, 4.0, 1500, 5, 0), trainer)


def test_the_plan_counts_what_a_shorter_length_would_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trainer = trainer_of(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    plan = training_plan.estimate(trainer, Source("folder", "x", tmp_path), 4, trainer.asked, Examples(), 93)
    lengths = [len(one.input_ids) for one in rows()]
    shorter, effect = plan_text.changes(plan, trainer, trainer.asked, machine_of())[0]
    assert shorter == "--max_length 32"
    assert f"cuts {sum(length > 32 for length in lengths)} rows" in effect
    for lang, word in (("zh", "刚刚下载了 93 MB"), ("en", "93 MB, done just now")):
        monkeypatch.setenv("LORA_PRACTICE_LANG", lang)
        page = plan_text.plan_text(plan, trainer, trainer.asked, machine_of())
        assert word in page
        assert all(columns(line) <= 80 for line in page.splitlines())
    told = json.loads(plan_text.plan_as_json(plan, trainer, trainer.asked, machine_of()))
    assert told["steps"] == 4 and told["download_mb"] == 93 and told["path"] == trainer.engine.ops.name
    assert told["free_disk_mb"] > 0 and told["changes"][0]["flag"] == shorter
    assert sorted(tmp_path.rglob("*")) == before
    with small_disk(tmp_path / "small", megabytes=2) as place:
        trainer.folder = OutputFolder(place)  # a disk of its own is mounted at the output folder itself
        told = json.loads(plan_text.plan_as_json(plan, trainer, trainer.asked, machine_of()))
        assert told["free_disk_mb"] == 2
