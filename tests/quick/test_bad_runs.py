"""Forged records delete nothing, and a tokenizer that is not the model's trains nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bad_inputs import enter, refusal, snapshot
from bad_inputs.folders import RECORD, grow_tokenizer, make_base

from fine_tuning_practice import main as train
from lora_practice.artifacts import OutputFolder

ROW = json.dumps({"prompt": "Hi", "completion": "Hello!"})


def test_a_forged_record_deletes_nothing_when_its_run_is_finished(tmp_path: Path) -> None:
    """`replaces` names the earlier run that is deleted in the end: only one that lies beside the run itself."""
    precious = tmp_path / "precious"
    for number, named in enumerate((str(precious), "../precious", "..", "/", "out.replaced-1", ".")):
        precious.mkdir(exist_ok=True)
        (precious / "work").write_text("years", "utf-8")
        out = tmp_path / str(number) / "out"
        out.mkdir(parents=True)
        (out / RECORD).write_text(json.dumps({"status": "interrupted", "replaces": named}), "utf-8")
        folder = OutputFolder.claim(str(out), resume=True, overwrite=False, settings={})
        with folder.staging(0) as staging:
            folder.finish(staging, {})
        assert (precious / "work").is_file() and out.is_dir()


def test_an_earlier_run_that_was_kept_aside_is_deleted_by_the_run_that_replaces_it(tmp_path: Path) -> None:
    aside, out = tmp_path / "out.replaced-20260102-030405", tmp_path / "out"
    for one in (aside, out):
        one.mkdir()
    (out / RECORD).write_text(json.dumps({"status": "interrupted", "replaces": str(aside)}), "utf-8")
    folder = OutputFolder.claim(str(out), resume=True, overwrite=False, settings={})
    with folder.staging(0) as staging:
        folder.finish(staging, {})
    assert not aside.exists()


def test_a_tokenizer_too_large_for_the_model_is_refused_before_the_first_step(
    no_hub: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """An id without a row would end the run in the midst of it, or read memory that is not the model's."""
    grow_tokenizer(make_base(tmp_path / "base"))
    (tmp_path / "rows.jsonl").write_text(f"{ROW}\n", "utf-8")
    before = snapshot(tmp_path)
    said = enter(train, capsys, "--model_name", "base", "--dataset_path", "rows.jsonl", "--output_dir", "out")
    assert "the tokenizer is not this model's: its ids reach" in refusal(said)
    assert snapshot(tmp_path) == before
