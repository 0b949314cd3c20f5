"""`train --plan` tells what a run would take and writes nothing; a run keeps its estimate beside what it took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from journey_harness import SMALL, TRAIN, run, succeeded


def test_a_plan_says_time_memory_disk_and_writes_nothing(tmp_path: Path, embedded_model: Path) -> None:
    flags = (*SMALL, "--plan", "--output_dir", "out")
    chinese = succeeded(run(tmp_path, TRAIN, *flags, LORA_PRACTICE_LANG="zh")).stderr
    for word in ("时间", "内存", "磁盘", "下载", "--max_length", "--lora_r 12", "--bf16", "什么都没有写"):
        assert word in chinese
    assert chinese.count("步，") == 1 and "预计最多占用" not in chinese  # time and memory are said once
    assert chinese.rstrip().endswith("去掉 --plan 就开始训练。")
    assert not (tmp_path / "out").exists()


def test_a_plan_for_a_program_is_one_json_object_and_nothing_else_on_stdout(
    tmp_path: Path, embedded_model: Path, trained
) -> None:
    flags = (*SMALL, "--max_length", "64", "--plan", "--json", "--output_dir", "out")
    told = json.loads(succeeded(run(tmp_path, TRAIN, *flags)).stdout)
    asked = {"device": "cpu", "precision": "fp32", "max_length": 64, "steps": 8, "download_mb": 0}
    assert {name: told[name] for name in asked} == asked
    assert told["step_seconds"] > 0 and told["writing_seconds"] > 0
    assert told["seconds"] == pytest.approx(8 * told["step_seconds"] + told["writing_seconds"], rel=0.01)
    changed = {one["flag"]: one["effect"] for one in told["changes"]}
    assert list(changed) == ["--max_length 32", "--lora_r 12", "--per_device_train_batch_size 2", "--bf16"]
    assert changed["--max_length 32"].startswith("cuts 16 rows, ")  # all: the system message alone takes 21 tokens
    assert "an adapter of 15 MB, not 7 MB" in changed["--lora_r 12"]
    # shorter rows than those of the trained run; what the process holds beside them varies from start to start
    assert 0.2 < told["peak_memory_mb"] / trained.record["peak_memory_mb"] < 2.5
    assert not (tmp_path / "out").exists()


def test_a_plan_may_name_a_folder_that_holds_a_finished_run(trained, tmp_path: Path) -> None:
    before = {one: one.stat().st_mtime_ns for one in trained.folder.rglob("*")}
    done = succeeded(run(tmp_path, TRAIN, *SMALL, "--plan", "--fast", "off", "--output_dir", str(trained.folder)))
    assert "Only a plan: nothing was written." in done.stderr
    assert {one: one.stat().st_mtime_ns for one in trained.folder.rglob("*")} == before


def test_the_estimate_stands_in_the_record_beside_what_the_run_took(trained) -> None:
    told, took = trained.record["estimate"], trained.record
    assert told["steps"] == took["steps"] == 8 and told["download_mb"] == 0
    assert 0.8 < told["peak_memory_mb"] / took["peak_memory_mb"] < 1.2
    # eight steps, and four rows evaluated once, which is a step of two rows if they are as long as the others
    assert 8 < (told["seconds"] - told["writing_seconds"]) / told["step_seconds"] < 10
    assert 1 / 20 < told["seconds"] / took["seconds"] < 20  # they are near only where the machine does nothing else
    written = sum(one.stat().st_size for one in trained.folder.rglob("*") if one.is_file()) / 1e6
    assert 0.8 < told["disk_mb"] / written < 1.2
