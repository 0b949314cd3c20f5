"""Stopping loses nothing: Ctrl-C, kill -9, a damaged checkpoint; and nothing finished is overwritten."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from journey_harness import SMALL, TRAIN, Running, environment, refused, succeeded, train
from kill_harness import NEVER, Kill, differences, resume_flag, run_into, steps_safe
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
MEASURED = ("--eval_subset_size", "4", "--eval_steps", "2", "--early_stopping_patience", "3")
SAVING = (*SMALL, *MEASURED, "--save_strategy", "steps", "--save_steps", "2", "--output_dir", "out")
LONG = ("--num_train_epochs", "20")  # 160 steps, for a run that is stopped


def copied_to(place: Path, killed: Path) -> Path:
    """A copy of a killed run, and of the home that it was started from."""
    shutil.copytree(killed.parent / "home", place / "home")
    return Path(shutil.copytree(killed, place / "out"))


def record(folder: Path) -> dict:
    return json.loads((folder / "run_record.json").read_text("utf-8"))


def same_run(folder: Path, other: Path) -> bool:
    """Bit for bit the same adapter, and the same loss at each step and of each measurement."""
    one, two = (load_file(place / "adapter_model.safetensors") for place in (folder, other))
    same = one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    return same and all(
        record(folder)[key] == record(other)[key] for key in ("losses", "evaluations", "best_step", "held_out_loss")
    )


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
    # steps of 24 rows, each long enough to be left in its midst, and more of them than a fast machine ends in time
    rows = ("--train_subset_size", "24", "--gradient_accumulation_steps", "24", "--num_train_epochs", "40")
    run = Running(tmp_path, TRAIN, "--embedded", *rows, "--logging_steps", "1", "--output_dir", "out")
    run.wait_until((tmp_path / "out" / "checkpoint-1").is_dir)
    time.sleep(0.5)  # a step is under way
    run.interrupt()
    run.wait_for("once more leaves at once")
    run.interrupt()
    assert run.end(30) == 130
    assert "Interrupted" in run.words and "saved at step" not in run.words
    assert record(tmp_path / "out")["status"] == "running"
    left = {one.name for one in (tmp_path / "out").iterdir()}
    assert left == {"run_record.json", *(f"checkpoint-{step}" for step in range(1, len(left)))}


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


def test_kills_in_the_midst_of_saves_and_before_a_rename_cost_nothing_that_was_saved(tmp_path, uninterrupted):
    out, seen = tmp_path / "out", []
    milliseconds = random.randint(1, 150)
    for kill in (
        Kill("in the midst of a save", "os.mkdir", ".writing-", 5, milliseconds),  # a new best makes one, a save two
        Kill("before a checkpoint's rename", "os.rename", "checkpoint-", 1),
        Kill("before a checkpoint's manifest", "open", "checkpoint.json", 2),
        NEVER,
    ):
        killed, words = run_into(kill, tmp_path, "out", *SAVING[:-2], *resume_flag(out))
        assert killed == (kill is not NEVER), (str(kill), words)
        seen.append(steps_safe(out))
    # the first one may come just before or just after the rename of checkpoint-4
    assert seen[0] in (2, 4) and seen == sorted(seen) and seen[-1] == 8, (milliseconds, seen)
    assert not differences(out, uninterrupted)


def test_sigterm_saves_as_ctrl_c_does_and_the_newest_checkpoints_are_kept(tmp_path):
    run = Running(tmp_path, TRAIN, *SAVING, *LONG, "--save_steps", "1", "--save_total_limit", "2")
    run.wait_for("step 3/160", 300)
    run.process.terminate()
    assert run.end(300) == 130
    out = tmp_path / "out"
    steps = record(out)["steps"]
    assert record(out)["status"] == "interrupted" and steps_safe(out) == steps >= 3
    assert f"saved at step {steps}" in run.words
    assert {one.name for one in out.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (steps - 1, steps)}


def test_a_closed_terminal_saves_too(tmp_path):
    pty, termios, fcntl = (pytest.importorskip(name) for name in ("pty", "termios", "fcntl"))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # tqdm shows no bar on one without size

    def in_the_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "preexec_fn": in_the_terminal}
    command = [sys.executable, TRAIN, *SAVING, *LONG]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path / "home"), **streams)
    os.close(theirs)
    said = b""
    try:
        while b"loss" not in said:  # the bar of the first step
            assert select.select([ours], [], [], 300)[0], said
            said += os.read(ours, 1000)
        os.close(ours)
        assert process.wait(300) == 130
    finally:
        process.kill()
    out = tmp_path / "out"
    assert record(out)["status"] == "interrupted" and steps_safe(out) == record(out)["steps"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_a_disk_that_refuses_a_checkpoint_midway_keeps_the_earlier_one_and_the_run_goes_on(tmp_path, uninterrupted):
    import resource

    run = Running(tmp_path, TRAIN, *SAVING)
    out = tmp_path / "out"
    run.wait_until((out / "checkpoint-2").is_dir, 300)
    # the adapter's 7 MB still fit into one file, the optimizer's 15 MB no more
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
    assert run.end() == 2
    line = run.words.rstrip().splitlines()[-1]
    assert line.startswith("Error: out: the disk refused a write midway") and line.endswith(
        "go on with --resume; earlier checkpoints are kept"
    )
    assert "MB needed" in line and not list(out.glob(".*"))
    safe = steps_safe(out)
    done = succeeded(train(tmp_path, *SAVING, "--resume"))
    assert f"going on from out/checkpoint-{safe}" in done.stderr
    assert same_run(out, uninterrupted)


def test_a_disk_without_room_for_a_checkpoint_says_how_much_it_takes(tmp_path, uninterrupted):
    out = tmp_path / "out"
    out.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=70m", "none", str(out)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        told = refused(train(tmp_path, *SAVING), "not enough disk", "MB needed", "MB free", "--resume")
        assert told.startswith("Error: out: ") and [one.name for one in out.glob("check*")] == ["checkpoint-2"]
        subprocess.run(["mount", "-o", "remount,size=300m", str(out)], check=True)
        succeeded(train(tmp_path, *SAVING, "--resume"))
        assert same_run(out, uninterrupted)
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)
