"""Bad numbers and short memory in real training steps of a tiny model: undone, computed again, told, recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import rows, run, same, trainer_of, weights_of
from transformers import TrainerCallback

from lora_practice.console.errors import UserError
from lora_practice.training import run as training_run
from lora_practice.training.evaluation import held_out_loss
from lora_practice.training.nan_check import StepNumbers

PATHS = ("on", "off")


class Poison(TrainerCallback):
    """Multiplies a trained tensor by NaN or the like as step `step` begins, as a broken kernel would; once."""

    def __init__(self, trainer: Any, step: int, value: float, often: int = 1) -> None:
        self.trainer, self.step, self.value, self.left = trainer, step, value, often
        compute = trainer.compute

        def computed(*args: Any) -> Any:
            loss = compute(*args)
            if trainer.state.global_step + 1 == step and self.left:
                self.left -= 1
                trainer.trainable[0].grad.mul_(value)
            return loss

        trainer.compute = computed


def events(trainer: Any) -> list[dict[str, Any]]:
    return json.loads((trainer.folder.path / "run_record.json").read_text("utf-8"))["events"]


def losses(result: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in result["losses"]]


@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_that_is_not_finite_in_bf16_is_computed_again_in_fp32_and_training_stays_there(
    tmp_path: Path, path: str, capfd: Any
) -> None:
    trainer = trainer_of(tmp_path / "a", "bf16", fast=path)
    Poison(trainer, 3, float("nan"))
    result = run(trainer)
    told = capfd.readouterr().err
    assert "step 3: a gradient in bf16 is not finite; back to the state before it, and on in fp32" in told
    assert result["steps"] == 6 and len(losses(result)) == 6
    assert all(loss > 1 for loss in losses(result))
    (event,) = events(trainer)
    assert (event["step"], event["kind"], event["compute_config"]["precision"]) == (2, "numbers", "fp32")
    # from step 3 on these are the steps of fp32, not bf16's
    in_fp32 = trainer_of(tmp_path / "b", "fp32", fast=path, max_steps=2)
    loss = run(in_fp32)
    assert losses(result)[2] != losses(loss)[1]


@pytest.mark.parametrize("path", PATHS)
def test_a_run_that_went_over_to_fp32_is_resumed_in_fp32_bit_for_bit(tmp_path: Path, path: str) -> None:
    trainer = trainer_of(tmp_path / "a", "bf16", fast=path)
    Poison(trainer, 3, float("inf"))
    whole = run(trainer)
    record = json.loads((tmp_path / "a" / "run_record.json").read_text("utf-8"))
    (tmp_path / "a" / "run_record.json").write_text(json.dumps({**record, "status": "interrupted"}))
    shutil.rmtree(tmp_path / "a" / "checkpoint-6")
    again = trainer_of(tmp_path / "a", "bf16", fast=path, resume=True)
    assert again.folder.checkpoint.name == "checkpoint-4"
    assert losses(run(again)) == losses(whole)
    assert same(weights_of(trainer), weights_of(again))
    assert again.compute_config.precision == "fp32"


@pytest.mark.parametrize("upcast", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_a_run_killed_after_its_last_checkpoint_is_measured_in_the_precision_that_it_ended_in(
    tmp_path: Path, path: str, upcast: bool
) -> None:
    trainer = trainer_of(tmp_path / "a", "bf16", fast=path)
    if upcast:
        Poison(trainer, 3, float("nan"))
    whole = training_run.train(trainer, rows(3), trainer.asked)
    record = json.loads((tmp_path / "a" / "run_record.json").read_text("utf-8"))
    (tmp_path / "a" / "run_record.json").write_text(json.dumps({**record, "status": "running"}))
    again = trainer_of(tmp_path / "a", "bf16", fast=path, resume=True)
    assert again.folder.checkpoint.name == "checkpoint-6"
    resumed = training_run.train(again, rows(3), again.asked)
    assert held_out_loss(again, rows(3)) == held_out_loss(trainer, rows(3))
    assert resumed["held_out_loss"] == whole["held_out_loss"]
    assert same(weights_of(trainer), weights_of(again))
    assert again.compute_config.precision == trainer.compute_config.precision == ("fp32" if upcast else "bf16")


@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_in_fp32_stops_in_one_line_and_the_last_good_state_is_kept(
    tmp_path: Path, path: str
) -> None:
    trainer = trainer_of(tmp_path / "a", fast=path)
    Poison(trainer, 4, float("nan"))
    with pytest.raises(UserError) as caught:
        run(trainer)
    said = str(caught.value)
    assert "\n" not in said and "step 4" in said and "not finite" in said and "--learning_rate" in said
    assert "the state after step 3 is in" in said
    assert (tmp_path / "a" / "checkpoint-3" / "checkpoint.json").is_file()
    clean = trainer_of(tmp_path / "b", fast=path, max_steps=3)
    run(clean)
    assert same(weights_of(trainer), weights_of(clean))


@pytest.mark.parametrize(("bad", "kept"), [(5, 4), (6, 5)])
def test_a_resumed_run_that_stops_keeps_what_it_learnt_or_names_what_it_began_with(
    tmp_path: Path, bad: int, kept: int
) -> None:
    trainer = trainer_of(tmp_path / "a")
    run(trainer)
    record = json.loads((tmp_path / "a" / "run_record.json").read_text("utf-8"))
    (tmp_path / "a" / "run_record.json").write_text(json.dumps({**record, "status": "interrupted"}))
    shutil.rmtree(tmp_path / "a" / "checkpoint-6")
    again = trainer_of(tmp_path / "a", resume=True)
    assert again.folder.checkpoint.name == "checkpoint-4"
    Poison(again, bad, float("nan"))
    with pytest.raises(UserError, match=f"the state after step {kept} is in .*checkpoint-{kept}"):
        run(again)
    assert (tmp_path / "a" / f"checkpoint-{kept}" / "checkpoint.json").is_file()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_the_last_good_state_has_the_whole_optimizer(tmp_path: Path, optim: str) -> None:
    trainer = trainer_of(tmp_path / "a", optim=optim)
    Poison(trainer, 4, float("nan"))
    with pytest.raises(UserError):
        run(trainer)
    clean = trainer_of(tmp_path / "b", optim=optim, max_steps=3)
    run(clean)
    found, wanted = (one.optimizer.state_dict()["state"] for one in (trainer, clean))
    assert found.keys() == wanted.keys()
    for index, values in wanted.items():
        for name, value in values.items():
            there = found[index][name]
            assert torch.equal(there, value) if torch.is_tensor(value) else there == value, name


def test_weights_that_give_nan_are_not_the_ones_that_are_kept(tmp_path: Path) -> None:
    """A huge learning rate: the step is sound, but the weights that it leaves are not."""
    trainer = trainer_of(tmp_path / "a", learning_rate=1.0, max_grad_norm=1e9)
    trainer.create_optimizer()
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 1e36
    with pytest.raises(UserError) as caught:
        run(trainer)
    assert "step 2: the loss is nan, though in fp32" in str(caught.value)
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(trainer))
    assert not list((tmp_path / "a").glob(".writing-*"))


def test_activations_beyond_fp16_are_computed_again_in_fp32(tmp_path: Path) -> None:
    def enlarge(base: Any) -> None:  # harmless in fp32, beyond 65504 in fp16
        with torch.no_grad():
            for layer in base.model.layers:
                layer.mlp.up_proj.weight *= 1e6
                layer.mlp.down_proj.weight /= 1e6

    trainer = trainer_of(tmp_path / "a", "fp16", change=enlarge, fast="on")
    half = run(trainer)
    assert events(trainer)[0]["step"] == 0 and trainer.compute_config.precision == "fp32"
    in_fp32 = trainer_of(tmp_path / "b", "fp32", change=enlarge, fast="on")
    assert losses(half) == pytest.approx(losses(run(in_fp32)), rel=1e-5)


def test_one_overflow_of_fp16s_scaled_gradients_costs_a_second_try_and_no_row(tmp_path: Path) -> None:
    """With torch's own GradScaler, which would have skipped the step and its rows."""
    trainer = trainer_of(tmp_path / "a", "fp16", fast="on")
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    Poison(trainer, 2, float("inf"))
    seen: list[StepNumbers] = []
    read = trainer.recovery._read_numbers
    trainer.recovery._read_numbers = lambda *args: seen.append(read(*args)) or seen[-1]
    result = run(trainer)
    assert [one.scale for one in seen[:4]] == [65536.0, 65536.0, 32768.0, 32768.0]
    assert len(seen) == 7 and result["steps"] == 6 and trainer.compute_config.precision == "fp16"
    assert scaler.get_scale() == 32768.0 and events(trainer) == []


def test_gradients_that_overflow_at_every_scale_send_fp16_to_fp32(tmp_path: Path, capfd: Any) -> None:
    trainer = trainer_of(tmp_path / "a", "fp16", fast="on")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    Poison(trainer, 2, float("nan"), often=3)
    assert run(trainer)["steps"] == 6
    assert "step 2: a gradient in fp16 is not finite (3 times in a row)" in capfd.readouterr().err
    assert trainer.accelerator.scaler.get_scale() == 1.0 and trainer.compute_config.precision == "fp32"


def as_on_a_card(trainer: Any) -> Any:
    """accelerate refuses fp16 on a CPU, so it is told afterwards: loss scaling and autocast are there."""
    trainer.accelerator.scaler, trainer.accelerator.native_amp = torch.amp.GradScaler("cpu"), True
    trainer.accelerator.state._mixed_precision = "fp16"
    return trainer


def test_fp16_with_loss_scaling_and_dropout_is_tried_beforehand_and_resumed_bit_for_bit(tmp_path: Path) -> None:
    def half(name: str, **changed: Any) -> Any:
        return as_on_a_card(trainer_of(tmp_path / name, "fp16", fast="on", lora_dropout=0.3, **changed))

    trainer = half("a")
    assert trainer.dry_run(trainer.compute_config, [40, 40])
    whole = run(trainer)
    record = json.loads((tmp_path / "a" / "run_record.json").read_text("utf-8"))
    (tmp_path / "a" / "run_record.json").write_text(json.dumps({**record, "status": "interrupted"}))
    shutil.rmtree(tmp_path / "a" / "checkpoint-6")
    again = half("a", resume=True)
    assert losses(run(again)) == losses(whole) and same(weights_of(again), weights_of(trainer))
    assert again.compute_config.precision == "fp16" and again.accelerator.scaler.get_scale() == 65536.0
    in_fp32 = run(trainer_of(tmp_path / "b", fast="on", lora_dropout=0.3))
    assert losses(whole) == pytest.approx(losses(in_fp32), rel=1e-4)


class Full:
    """Memory for so many tokens at once and no more: a real computation, broken off where an allocation would be."""

    def __init__(self, trainer: Any, rows: int, from_step: int) -> None:
        self.refused = 0
        compute = trainer.compute

        def computed(model: Any, window: Any, items: Any) -> Any:
            at_once = trainer.compute_config.tokens if trainer.engine else trainer.compute_config.rows
            if trainer.state.global_step + 1 >= from_step and at_once > rows:
                compute(model, window[:1], items)  # some gradients are there already
                self.refused += 1
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory")
            return compute(model, window, items)

        trainer.compute = computed


@pytest.mark.parametrize(("path", "limit", "batch"), [("on", 40, 1), ("off", 1, 4)])
def test_out_of_memory_at_a_step_computes_it_again_in_portions_with_the_same_results(
    tmp_path: Path, path: str, limit: int, batch: int, capfd: Any
) -> None:
    shape = {"fast": path, "per_device_train_batch_size": batch}
    trainer = trainer_of(tmp_path / "a", **shape)
    full = Full(trainer, limit, from_step=2)
    result = run(trainer)
    assert full.refused >= 1 and "step 2: out of memory; computed again" in capfd.readouterr().err
    assert {event["kind"] for event in events(trainer)} == {"memory"}
    unlimited = trainer_of(tmp_path / "b", **shape)
    assert losses(result) == pytest.approx(losses(run(unlimited)), rel=1e-5)
    assert same(weights_of(trainer), weights_of(unlimited), 1e-3)


def test_when_nothing_smaller_is_left_the_run_stops_in_one_line_and_goes_on_when_resumed(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "a", fast="off")
    full = Full(trainer, 0, from_step=4)
    with pytest.raises(UserError) as caught:
        run(trainer)
    assert "step 4: out of memory" in str(caught.value) and "checkpoint-3" in str(caught.value)
    assert full.refused == 2  # without and with checkpointing
    again = trainer_of(tmp_path / "a", fast="off", resume=True)
    result = run(again)
    clean = trainer_of(tmp_path / "b", fast="off")
    assert losses(result) == losses(run(clean))
    assert same(weights_of(again), weights_of(clean))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("path", PATHS)
def test_a_dry_run_leaves_no_trace(tmp_path: Path, path: str, precision: str) -> None:
    tried = trainer_of(tmp_path / "a", precision, fast=path, lora_dropout=0.3)
    random = torch.get_rng_state()
    assert tried.dry_run(tried.compute_config, [40, 40])
    assert torch.get_rng_state().equal(random)
    assert all(parameter.grad is None for parameter in tried.trainable)
    after = losses(run(tried))
    untried = trainer_of(tmp_path / "b", precision, fast=path, lora_dropout=0.3)  # which seeds the generators again
    assert after == losses(run(untried))
    assert same(weights_of(tried), weights_of(untried))
