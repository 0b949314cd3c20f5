"""Wrong input: one clear line, exit code 2, no traceback, and nothing lost or half written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from journey_harness import ROOT, SMALL, refused, run, succeeded, train

from lora_practice.console.errors import UserError
from lora_practice.run import folder

ROW = json.dumps({"prompt": "Hi", "completion": "Hello!"})


def contents(place: Path) -> set[str]:
    return {one.relative_to(place).as_posix() for one in place.rglob("*") if "home" not in one.parts}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dataset_path", "no-such.jsonl"), ("no such data file", "no-such.jsonl")),
        (("--dataset_path", "empty.jsonl"), ("empty.jsonl", "empty")),
        (("--dataset_path", "blank.jsonl"), ("blank.jsonl", "no rows")),
        (("--dataset_path", "picture.png"), ("picture.png", ".jsonl")),
        (("--model_name", "half-model", "--dataset_path", "rows.jsonl"), ("half-model", "*.safetensors")),
        (("--model_name", "empty-folder", "--dataset_path", "rows.jsonl"), ("empty-folder", "config.json")),
        (("--output_dir", "a-file"), ("a-file", "a file, not a folder")),
        (("--output_dir", "a-file/below"), ("a-file", "file")),
        (("--lora_r", "six"), ("--lora_r", "whole number", "six")),
        (("--learning_rate", "fast"), ("--learning_rate", "a number", "fast")),
        (("--lora_r", "0", "--max_length", "x"), ("--lora_r", "--max_length")),
        (("--optim", "adam"), ("--optim", "adamw_torch")),
        (("--lora_rank", "8"), ("--lora_rank", "did you mean")),
        (("--merge_adapter", "perhaps"), ("--merge_adapter", "true or false")),
        (("--resume",), ("no run to resume",)),
        (("--eval_subset_size", "9", "--dataset_path", "rows.jsonl"), ("--eval_subset_size",)),
    ],
)
def test_each_mistake_is_one_clear_line_and_nothing_is_written(tmp_path, embedded_model, embedded_rows, flags, words):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n", "utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "rows.jsonl").write_text(f"{ROW}\n{ROW}\n", "utf-8")
    (tmp_path / "a-file").write_text("mine", "utf-8")
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "half-model").mkdir()
    shutil.copy(embedded_model / "config.json", tmp_path / "half-model")
    before = contents(tmp_path)
    own_model = "--model_name" in flags
    refused(train(tmp_path, *(() if own_model else ("--embedded",)), *flags), *words)
    assert contents(tmp_path) == before
    assert (tmp_path / "a-file").read_text("utf-8") == "mine"


def test_a_truncated_model_file_is_named(tmp_path, embedded_model):
    broken = tmp_path / "broken"
    shutil.copytree(embedded_model, broken)
    with open(broken / "model.safetensors", "r+b") as file:
        file.truncate(1_000_000)
    (tmp_path / "rows.jsonl").write_text(f"{ROW}\n", "utf-8")
    flags = ("--model_name", "broken", "--dataset_path", "rows.jsonl", "--output_dir", "out")
    told = refused(train(tmp_path, *flags), "broken", "cannot be loaded", "fetch it again")
    assert "model" in told and not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_said_first(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    refused(train(tmp_path, *SMALL, "--output_dir", "closed/out"), "no permission to write", "closed")


def test_no_write_permission_is_one_clear_line_whoever_runs_this(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.os, "access", lambda place, mode: not mode & os.W_OK)
    with pytest.raises(UserError, match="no permission to write"):
        folder.OutputFolder.claim(str(tmp_path / "out"), False, False, {})
    assert not (tmp_path / "out").exists()


FULL_DISK = """
import shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
usage = shutil.disk_usage(".")
# there is room until the first checkpoint is written
room = lambda: 1_000_000 if Path("out/checkpoint-2").exists() else 1 << 40
shutil.disk_usage = lambda place: usage._replace(free=room())
from fine_tuning_practice import main
main(sys.argv[1:])
"""


def test_a_disk_that_fills_up_stops_in_one_line_and_the_earlier_checkpoint_is_kept(tmp_path):
    from lora_practice.run.folder import newest_whole_checkpoint

    (tmp_path / "full.py").write_text(FULL_DISK, "utf-8")
    saving = (*SMALL, "--save_strategy", "steps", "--save_steps", "2", "--output_dir", "out")
    refused(run(tmp_path, "full.py", str(ROOT), *saving), "not enough disk", "out")
    out = tmp_path / "out"
    assert newest_whole_checkpoint(out) == out / "checkpoint-2"
    assert {one.name for one in out.iterdir()} == {"checkpoint-2", "run_record.json"}


def test_a_disk_that_is_full_at_the_very_end_loses_nothing_resuming_finishes_the_folder(tmp_path):
    (tmp_path / "full.py").write_text(FULL_DISK, "utf-8")
    few = ("--embedded", "--train_subset_size", "4", "--gradient_accumulation_steps", "2", "--output_dir", "out")
    refused(run(tmp_path, "full.py", str(ROOT), *few), "not enough disk", "out")
    out = tmp_path / "out"
    assert {one.name for one in out.iterdir()} == {"checkpoint-2", "run_record.json"}
    succeeded(train(tmp_path, *few, "--resume"))
    record = json.loads((out / "run_record.json").read_text("utf-8"))
    assert record["status"] == "finished" and record["steps"] == 2 and record["losses"]
    adapter = "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (out / "checkpoint-2" / adapter).read_bytes()


def test_words_for_a_chinese_reader_are_chinese_from_the_first_to_the_last(tmp_path):
    done = train(tmp_path, "--lora_r", "六", LORA_PRACTICE_LANG="zh")
    assert refused(done, "--lora_r", "整数", "六").startswith("错误：")
    done = train(tmp_path, "--lora_r", "six", LORA_PRACTICE_LANG=None, LANG="en_US.UTF-8")
    assert refused(done).startswith("Error: ") and done.stderr.isascii()
