"""Held-out rows are measured while training, change nothing, choose the adapter, and may end the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tiny_training import rows, run, same, trainer_of, weights_of
from transformers import TrainerCallback

from fine_tuning_practice import TrainSettings
from lora_practice.data.conversations import Conversation
from lora_practice.data.prepare import hold_out
from lora_practice.run.file_kinds import BEST
from lora_practice.run.own_files import unknown_files
from lora_practice.storage.json_files import read_record
from lora_practice.training.evaluation import held_out_loss, load_best

HELD_OUT = rows(6, seed=1)
# a rate at which the held-out loss falls at first and then climbs
WILD: dict[str, Any] = {"eval_steps": 2, "max_steps": 12, "learning_rate": 0.3, "max_grad_norm": 100.0}


def trainer_for(place: Path, is_fast: bool, **changed: Any) -> Any:
    """A trainer of four steps of three rows, eight steps an epoch."""
    defaults = {"max_steps": 4, "gradient_accumulation_steps": 3, "save_strategy": "no", "lora_r": 2}
    fast = "on" if is_fast else "off"
    return trainer_of(place, examples=rows(24), fast=fast, **{**defaults, "lora_dropout": 0.2, **changed})


def go(place: Path, is_fast: bool, held_out: Any = HELD_OUT, callback: Any = None, **changed: Any) -> Any:
    """The trainer after its run, and what goes into the record."""
    trainer = trainer_for(place, is_fast, **changed)
    if callback is not None:
        trainer.add_callback(callback)
    return trainer, run(trainer, held_out)


@pytest.mark.parametrize("is_fast", [True, False])
def test_measuring_changes_nothing_of_the_training(is_fast: bool, tmp_path: Path) -> None:
    keep_last = {"load_best_model_at_end": False}
    plain, without = go(tmp_path / "a", is_fast, [], max_steps=5)
    watched, measured = go(tmp_path / "b", is_fast, max_steps=5, eval_steps=2, **keep_last)
    assert measured["losses"] == without["losses"] and len(without["losses"]) == 5
    assert same(weights_of(plain), weights_of(watched))
    found = measured["evaluations"]
    assert [one["step"] for one in found] == [0, 2, 4, 5]
    assert all(one["perplexity"] == pytest.approx(math.exp(one["loss"])) for one in found)
    assert found[-1]["loss"] == held_out_loss(watched, HELD_OUT)
    assert measured["held_out_loss"]["after"] == round(found[-1]["loss"], 4)
    by_two, _ = go(tmp_path / "c", is_fast, max_steps=2, **keep_last)
    assert held_out_loss(by_two, HELD_OUT) == found[1]["loss"]


def test_the_fast_path_measures_what_the_plain_one_measures(tmp_path: Path) -> None:
    quick, plain = (trainer_for(tmp_path / str(is_fast), is_fast) for is_fast in (True, False))
    many = rows(150, seed=2)
    expected = held_out_loss(plain, many)
    assert held_out_loss(quick, many) == pytest.approx(expected, rel=1e-5)
    pairs = [(one.input_ids, one.labels) for one in many]
    assert held_out_loss(quick, many) == pytest.approx(quick.engine.eval_loss(pairs), rel=1e-6)


@pytest.mark.parametrize("is_fast", [True, False])
def test_the_run_ends_with_the_adapter_whose_held_out_loss_was_the_lowest(is_fast: bool, tmp_path: Path) -> None:
    trainer, notes = go(tmp_path / "a", is_fast, **WILD)
    measured = {one["step"]: one["loss"] for one in notes["evaluations"] if one["step"]}
    best = min(measured, key=measured.__getitem__)
    assert notes["best_step"] == best < 12
    stopped_there, _ = go(tmp_path / "b", is_fast, [], **{**WILD, "max_steps": best})
    assert same(weights_of(trainer), weights_of(stopped_there))
    assert notes["held_out_loss"]["after"] == round(measured[best], 4)
    assert notes["steps"] == 12 and not notes["interrupted"]
    assert (tmp_path / "a" / BEST).exists()  # until the finished adapter is written


def test_a_best_adapter_that_was_lost_is_told_and_the_last_one_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trainer, _ = go(tmp_path / "a", True, **WILD)
    (tmp_path / "a" / BEST).unlink()  # as where checkpoints and record alone were copied
    before = weights_of(trainer)
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    assert load_best(trainer) is None and same(before, weights_of(trainer))
    assert "best.safetensors is gone: the adapter of the last step is taken" in capsys.readouterr().err


def test_patience_ends_the_run_early_and_it_counts_as_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _, whole = go(tmp_path / "a", True, **WILD)
    _, notes = go(tmp_path / "b", True, **WILD, early_stopping_patience=2)
    losses = [one["loss"] for one in notes["evaluations"] if one["step"]]
    assert notes["stopped_early"] and not notes["interrupted"]
    assert losses.index(min(losses)) == len(losses) - 3 and notes["steps"] < 12
    assert notes["evaluations"] == whole["evaluations"][: len(losses) + 1]
    assert "stopping early" in capsys.readouterr().err


def test_by_epochs_it_is_measured_at_the_end_of_each(tmp_path: Path) -> None:
    _, notes = go(tmp_path / "a", True, max_steps=-1, num_train_epochs=2, eval_strategy="epoch")
    assert [one["step"] for one in notes["evaluations"]] == [0, 8, 16]
    _, notes = go(tmp_path / "b", True, eval_strategy="no")
    assert [one["step"] for one in notes["evaluations"]] == [0] and notes["best_step"] is None


class Stop(TrainerCallback):
    """What Ctrl-C during step 5 does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_resumed_run_measures_and_chooses_as_if_it_had_never_stopped(is_fast: bool, tmp_path: Path) -> None:
    whole, expected = go(tmp_path / "a", is_fast, **WILD)
    _, first = go(tmp_path / "b", is_fast, callback=Stop(), **WILD)
    assert first["interrupted"] and first["best_step"] is None
    assert (tmp_path / "b" / BEST).is_file()
    assert unknown_files(tmp_path / "b", read_record(tmp_path / "b") or {}) == []  # --overwrite may replace it
    second, notes = go(tmp_path / "b", is_fast, resume=True, **WILD)
    assert second.folder.checkpoint.name == "checkpoint-5"
    assert notes["evaluations"] == expected["evaluations"]
    assert (notes["best_step"], notes["losses"]) == (expected["best_step"], expected["losses"])
    assert same(weights_of(whole), weights_of(second))


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches a kill."""


class Kill(TrainerCallback):
    """Ends the run as soon as the checkpoint of this step is there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


EARLY: dict[str, Any] = {**WILD, "early_stopping_patience": 2}
BY_EPOCH: dict[str, Any] = {**WILD, "eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 3}
MOMENTS = {
    "the early stop": (EARLY, 0),
    "a step with an evaluation": (EARLY, -2),
    "the last step": (WILD, 0),
    "the end of an epoch": (BY_EPOCH, -16),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_right_after_its_checkpoint_ends_as_if_it_had_not_been(moment: str, tmp_path: Path) -> None:
    settings, from_end = MOMENTS[moment]
    whole, expected = go(tmp_path / "a", True, **settings)
    step = expected["steps"] + from_end
    saving = {**settings, "save_strategy": "steps", "save_steps": step}
    with pytest.raises(Killed):
        go(tmp_path / "b", True, callback=Kill(step), **saving)
    second, notes = go(tmp_path / "b", True, resume=True, **saving)
    assert second.folder.checkpoint.name == f"checkpoint-{step}"
    for name in ("steps", "interrupted", "stopped_early", "losses", "evaluations", "held_out_loss", "best_step"):
        assert notes[name] == expected[name]
    assert same(weights_of(whole), weights_of(second))


def test_no_copy_of_a_held_out_conversation_stays_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def talk(number: int, line: int) -> Conversation:
        turns = ({"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": "answer"})
        return Conversation(turns, f"own.jsonl:{line}")  # type: ignore[arg-type]

    found = [talk(line % 20, line) for line in range(60)]  # each conversation stands there three times
    kept, held_out = hold_out(found, 5, 42)
    assert len(held_out) == 5
    assert not {one.content for one in kept} & {one.content for one in held_out}


def test_a_tracker_gets_both_curves(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, notes = go(tmp_path / "a", True, report_to="tensorboard", eval_steps=2)
    (events,) = (tmp_path / "a").rglob("events.out.tfevents.*")
    read = accumulator.EventAccumulator(str(events.parent))
    read.Reload()
    for tag, expected in (
        ("train/loss", {one["step"]: one["loss"] for one in notes["losses"]}),
        ("eval/loss", {one["step"]: one["loss"] for one in notes["evaluations"] if one["step"]}),
        ("eval/perplexity", {one["step"]: one["perplexity"] for one in notes["evaluations"] if one["step"]}),
    ):
        assert {one.step: one.value for one in read.Scalars(tag)} == pytest.approx(expected, rel=1e-5)


def test_every_tracker_that_can_be_named_is_one_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    names = TrainSettings.__dataclass_fields__["report_to"].metadata["choices"]
    assert set(names) - {"none"} <= set(INTEGRATION_TO_CALLBACK)
