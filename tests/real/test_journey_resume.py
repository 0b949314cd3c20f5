"""Stopping loses nothing: Ctrl-C, kill -9, a damaged checkpoint; and nothing finished is overwritten."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from journey_harness import SMALL, TRAIN, Running, refused, succeeded, train
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
SAVING = (*SMALL, "--save_strategy", "steps", "--save_steps", "2", "--output_dir", "out")


def copied_to(place: Path, killed: Path) -> Path:
    """A copy of a killed run, and of the home that it was started from."""
    shutil.copytree(killed.parent / "home", place / "home")
    return Path(shutil.copytree(killed, place / "out"))


def record(folder: Path) -> dict:
    return json.loads((folder / "run_record.json").read_text("utf-8"))


def same_run(folder: Path, other: Path) -> bool:
    """Bit for bit the same adapter, and the same loss at each step."""
    one, two = (load_file(place / "adapter_model.safetensors") for place in (folder, other))
    same = one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    return same and record(folder)["losses"] == record(other)["losses"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, embedded_model, embedded_rows) -> Path:
    place = tmp_path_factory.mktemp("uninterrupted")
    succeeded(train(place, *SAVING))
    return place / "out"


@pytest.fixture(scope="module")
def killed(tmp_path_factory, embedded_model, embedded_rows) -> Path:
    """A run that kill -9 ended after its second checkpoint. To be copied."""
    place = tmp_path_factory.mktemp("killed")
    run = Running(place, TRAIN, *SAVING)
    run.wait_for("step 5/8")
    run.process.kill()
    assert run.end() == -signal.SIGKILL
    return place / "out"


def test_ctrl_c_saves_says_how_to_resume_and_the_resumed_run_ends_bit_for_bit_the_same(tmp_path, uninterrupted):
    run = Running(tmp_path, TRAIN, *SAVING)
    run.wait_for("step 3/8")
    run.interrupt()
    assert run.end() == 130
    out = tmp_path / "out"
    steps = record(out)["steps"]
    assert record(out)["status"] == "interrupted" and 3 <= steps < 8
    assert f"saved at step {steps}" in run.words and (out / f"checkpoint-{steps}").is_dir()
    assert run.words.rstrip().endswith("--resume")
    assert not (out / "adapter_model.safetensors").exists() and not list(out.glob(".*"))

    told = refused(train(tmp_path, *SAVING), "unfinished run", f"checkpoint-{steps}", "--resume")
    assert "--overwrite" in told
    command = run.words.rstrip().splitlines()[-1].split()
    assert command[:2] == ["python", TRAIN]
    done = succeeded(train(tmp_path, *command[2:]))
    assert f"going on from out/checkpoint-{steps}" in done.stderr
    assert record(out)["status"] == "finished" and record(out)["steps"] == 8
    assert same_run(out, uninterrupted)


def test_a_killed_run_is_resumed_from_its_last_checkpoint_bit_for_bit(tmp_path, killed, uninterrupted):
    copied_to(tmp_path, killed)
    assert record(killed)["status"] == "running"
    done = succeeded(train(tmp_path, *SAVING, "--resume"))
    assert "going on from out/checkpoint-4" in done.stderr
    assert same_run(tmp_path / "out", uninterrupted)
    assert not list((tmp_path / "out").glob(".writing-*"))


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(tmp_path, killed, uninterrupted):
    out = copied_to(tmp_path, killed)
    with open(out / "checkpoint-4" / "optimizer.pt", "r+b") as file:
        file.truncate(1000)
    done = succeeded(train(tmp_path, *SAVING, "--resume"))
    assert "checkpoint-4 is not whole (optimizer.pt is damaged), passed over" in done.stderr
    assert "going on from out/checkpoint-2" in done.stderr
    assert same_run(out, uninterrupted)


def test_without_a_whole_checkpoint_resuming_is_refused_and_nothing_is_lost(tmp_path, killed):
    out = copied_to(tmp_path, killed)
    for checkpoint in out.glob("checkpoint-*"):
        (checkpoint / "checkpoint.json").unlink()
    before = sorted(path for path in out.rglob("*"))
    refused(train(tmp_path, *SAVING, "--resume"), "no whole checkpoint", "--overwrite")
    assert sorted(path for path in out.rglob("*")) == before


def test_a_checkpoint_from_another_machine_is_refused_until_the_user_trusts_it(tmp_path, killed, uninterrupted):
    out = Path(shutil.copytree(killed, tmp_path / "out"))  # but not the home with the key
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    told = refused(train(tmp_path, *SAVING, "--resume"), "not saved by you on this machine", "--trust_checkpoint")
    assert "out/checkpoint-4" in told
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    done = succeeded(train(tmp_path, *SAVING, "--resume", "--trust_checkpoint"))
    assert "going on from out/checkpoint-4" in done.stderr and same_run(out, uninterrupted)


def test_resuming_with_other_settings_is_refused_and_names_them(tmp_path, killed):
    copied_to(tmp_path, killed)
    told = refused(train(tmp_path, *SAVING, "--resume", "--lora_r", "8"))
    assert "lora_r: 6 -> 8" in told


def test_resuming_with_other_data_is_refused_and_named(tmp_path, embedded_rows):
    rows = embedded_rows.read_text("utf-8").splitlines()[:16]
    data, saving = tmp_path / "data.jsonl", ("--save_strategy", "steps", "--save_steps", "1", "--output_dir", "out")
    data.write_text("\n".join(rows), "utf-8")
    flags = (*SMALL, "--dataset_path", "data.jsonl", *saving)
    run = Running(tmp_path, TRAIN, *flags)
    run.wait_until((tmp_path / "out" / "checkpoint-1").is_dir)
    run.process.kill()
    run.end()
    files = sorted((tmp_path / "out").rglob("*"))
    data.write_text("\n".join(rows[:-1]), "utf-8")
    told = refused(train(tmp_path, *flags, "--resume"), "the data is not what this run began with", "--output_dir")
    assert "16 rows" in told and "15 rows" in told
    data.write_text("\n".join([rows[1], rows[0], *rows[2:]]), "utf-8")
    refused(train(tmp_path, *flags, "--resume"), "16 rows, but not the same ones")
    assert sorted((tmp_path / "out").rglob("*")) == files
    data.write_text("\n".join(rows), "utf-8")
    succeeded(train(tmp_path, *flags, "--resume"))


def test_a_second_ctrl_c_leaves_at_once_and_what_was_saved_stays(tmp_path):
    # one step of 24 rows takes long enough to be left in its midst
    rows = ("--train_subset_size", "24", "--gradient_accumulation_steps", "24", "--num_train_epochs", "2")
    run = Running(tmp_path, TRAIN, "--embedded", *rows, "--logging_steps", "1", "--output_dir", "out")
    run.wait_until((tmp_path / "out" / "checkpoint-1").is_dir)
    run.interrupt()
    run.wait_for("once more leaves at once")
    run.interrupt()
    assert run.end(30) == 130
    assert "Interrupted" in run.words and "saved at step" not in run.words
    assert record(tmp_path / "out")["status"] == "running"
    assert [one.name for one in (tmp_path / "out").iterdir() if one.name != "run_record.json"] == ["checkpoint-1"]


def test_a_finished_folder_is_not_overwritten_by_accident_but_on_request(tmp_path, copied):
    flags = (
        "--embedded",
        "--train_subset_size",
        "4",
        "--max_steps",
        "1",
        "--output_dir",
        "copy",
        "--save_strategy",
        "no",
    )
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    told = refused(train(tmp_path, *flags), "a finished run is here", "8 steps", "--overwrite")
    assert "copy" in told
    refused(train(tmp_path, *flags, "--resume"), "a finished run is here")
    assert before == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}

    succeeded(train(tmp_path, *flags, "--overwrite"))
    assert record(copied)["steps"] == 1
    assert not (copied / "checkpoint-8").exists() and not (copied / "merged").exists()
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith("copy")] == ["copy"]


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"x")
    for extra in ((), ("--overwrite",), ("--resume",)):
        refused(train(tmp_path, *SMALL, "--output_dir", "photos", *extra), "photos")
    assert [one.name for one in (tmp_path / "photos").iterdir()] == ["me.jpg"]
