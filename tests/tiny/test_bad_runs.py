"""Forged records and checkpoints, bad places to write to, folders that must not be uploaded: one clear line each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from bad_inputs import enter, refusal, snapshot
from bad_inputs.folders import (
    NO_MAP,
    ON_NOTHING,
    RECORD,
    edit,
    grow_tokenizer,
    tokenizer_with,
)
from bad_inputs.runs import BAD_RUNS, BAD_TARGETS, BAD_UPLOADS, CHECKPOINT, Damage, link, noted, stop
from refusals import refusal_of

from fine_tuning_practice import main as train
from inference import main as infer
from lora_practice.cli import main as cli
from lora_practice.model.adapter_config import base_name
from lora_practice.run.folder import OutputFolder

ROW = json.dumps({"prompt": "Hi", "completion": "Hello!"})


@pytest.fixture
def place(no_hub: None, whole: Path, tmp_path: Path) -> Path:
    """The working folder: rows, and a run that was interrupted."""
    (tmp_path / "rows.jsonl").write_text(f"{ROW}\n", "utf-8")
    stop(Path(shutil.copytree(whole / "out", tmp_path / "out")))
    return tmp_path


@pytest.mark.parametrize(("damage", "words"), [case[1:] for case in BAD_RUNS], ids=[case[0] for case in BAD_RUNS])
def test_a_damaged_or_forged_run_is_not_resumed(
    damage: Damage, words: str, place: Path, whole: Path, capsys: pytest.CaptureFixture
) -> None:
    damage(place / "out")
    before = snapshot(place)
    flags = ("--model_name", str(whole / "base"), "--dataset_path", "rows.jsonl", "--output_dir", "out", "--resume")
    flags += ("--lora_r", "6")  # what the user names is compared with the record; the rest comes from there
    assert words in refusal(enter(train, capsys, *flags))
    assert snapshot(place) == before


@pytest.mark.parametrize(("make", "words"), [case[1:] for case in BAD_TARGETS], ids=[case[0] for case in BAD_TARGETS])
@pytest.mark.parametrize("below", ["", "/run"])
def test_a_place_that_cannot_hold_a_run_is_named_before_anything_is_loaded(
    make: Damage, words: str, below: str, no_hub: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if below and "other files" in words:
        pytest.skip("a run may well be written below a folder with other files")
    make(tmp_path)
    before = snapshot(tmp_path)
    assert words in refusal(enter(train, capsys, "--output_dir", f"out{below}"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(("damage", "words"), [case[1:] for case in BAD_UPLOADS], ids=[case[0] for case in BAD_UPLOADS])
def test_a_folder_that_must_not_be_sent_is_refused(
    damage: Damage, words: str, place: Path, capsys: pytest.CaptureFixture
) -> None:
    (place / "outside.txt").write_text("mine", "utf-8")
    damage(place / "out")
    before = snapshot(place)
    # everything is asked for: a stranger's file at the top is not sent by itself
    assert words in refusal(enter(cli, capsys, "upload", "--local-dir", "out", "--dry-run", "--include", "*"))
    assert snapshot(place) == before


@pytest.mark.parametrize("target", [".", "..", "/"], ids=["itself", "above", "the root"])
def test_a_link_to_a_folder_is_refused_only_where_it_would_be_sent(
    target: str, place: Path, capsys: pytest.CaptureFixture
) -> None:
    link("there", target)(place / "out")
    before = snapshot(place)
    said = enter(cli, capsys, "upload", "--local-dir", "out", "--dry-run")
    assert (
        said.code == 0 and "left out: there/" in said.out + said.err and "there/" not in said.out.split("left out")[0]
    )
    told = refusal(enter(cli, capsys, "upload", "--local-dir", "out", "--dry-run", "--include", "there"))
    assert "out/there: this link leads outside the folder, or to itself" in told
    assert snapshot(place) == before


@pytest.mark.parametrize("files", [[], {}, 3, {"README.md": [1]}, {"adapter_config.json": {"size": "x"}}, {"/": None}])
def test_a_strange_manifest_does_not_stop_an_upload(files: object, place: Path, capsys: pytest.CaptureFixture) -> None:
    """Where the checkpoint is to be sent, the manifest goes along as the file that it is."""
    noted(files)(place / "out")
    said = enter(cli, capsys, "upload", "--local-dir", "out", "--dry-run", "--include", CHECKPOINT)
    assert said.code == 0 and f"{CHECKPOINT}/checkpoint.json" in said.out


def test_a_home_of_nobody_is_no_folder(no_hub: None, capsys: pytest.CaptureFixture) -> None:
    nowhere = "~nobody-of-this-name/x"
    assert "no such folder" in refusal(enter(infer, capsys, "--model-dir", nowhere, "--prompt", "Hi"))
    assert "no such folder" in refusal(enter(cli, capsys, "upload", "--local-dir", nowhere, "--dry-run"))
    assert "no adapter here" in refusal(enter(cli, capsys, "merge", nowhere))


def test_a_forged_record_deletes_nothing_when_its_run_is_finished(tmp_path: Path) -> None:
    """`replaces` names the earlier run that is deleted in the end: only one that lies beside the run itself."""
    precious = tmp_path / "precious"
    for number, named in enumerate((str(precious), "../precious", "..", "/", "out.replaced-1", ".")):
        precious.mkdir(exist_ok=True)
        (precious / "work").write_text("years", "utf-8")
        out = tmp_path / str(number) / "out"
        out.mkdir(parents=True)
        (out / RECORD).write_text(json.dumps({"status": "interrupted", "settings": {}, "replaces": named}), "utf-8")
        folder = OutputFolder.claim(str(out), resume=True, overwrite=False, settings={})
        with folder.staging(0) as staging:
            folder.finish(staging, {})
        assert (precious / "work").is_file() and out.is_dir()


def test_an_earlier_run_that_was_kept_aside_is_deleted_by_the_run_that_replaces_it(tmp_path: Path) -> None:
    aside, out = tmp_path / "out.replaced-20260102-030405", tmp_path / "out"
    for one in (aside, out):
        one.mkdir()
        (one / RECORD).write_text(json.dumps({"status": "finished", "settings": {}}), "utf-8")
    (out / RECORD).write_text(json.dumps({"status": "interrupted", "settings": {}, "replaces": str(aside)}), "utf-8")
    folder = OutputFolder.claim(str(out), resume=True, overwrite=False, settings={})
    with folder.staging(0) as staging:
        folder.finish(staging, {})
    assert not aside.exists()


def test_replacing_a_run_through_a_link_replaces_what_the_link_leads_to(tmp_path: Path) -> None:
    real, link = tmp_path / "disk", tmp_path / "out"
    real.mkdir()
    (real / RECORD).write_text(json.dumps({"status": "finished", "settings": {}}), "utf-8")
    (real / "vocab.json").touch()
    link.symlink_to(real)
    folder = OutputFolder.claim(str(link), resume=False, overwrite=True, settings={})
    folder.begin({})
    with folder.staging(0) as staging:
        folder.finish(staging, {})
    assert link.is_symlink() and (link / RECORD).is_file() and not (link / "vocab.json").exists()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["disk", "out"]


def test_a_tokenizer_too_large_for_the_model_is_refused_before_the_first_step(
    no_hub: None, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """An id without a row would end the run in the midst of it, or read memory that is not the model's."""
    base = Path(shutil.copytree(whole / "base", tmp_path / "base"))
    grow_tokenizer(base)
    (tmp_path / "rows.jsonl").write_text(f"{ROW}\n", "utf-8")
    before = snapshot(tmp_path)
    said = enter(train, capsys, "--model_name", "base", "--dataset_path", "rows.jsonl", "--output_dir", "out")
    assert "the tokenizer is not this model's: its ids reach" in refusal(said)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("normalizer", [NO_MAP, ON_NOTHING], ids=["to load it", "to use it"])
def test_a_tokenizer_whose_library_panics_ends_a_training_in_one_line(
    normalizer: dict[str, str], no_hub: None, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A panic of Rust is no Exception."""
    base = Path(shutil.copytree(whole / "base", tmp_path / "base"))
    tokenizer_with(normalizer=normalizer)(base)
    (tmp_path / "rows.jsonl").write_text(f"{ROW}\n", "utf-8")
    before = snapshot(tmp_path)
    said = enter(train, capsys, "--model_name", "base", "--dataset_path", "rows.jsonl", "--output_dir", "out")
    assert "the tokenizer " in refusal(said)
    assert snapshot(tmp_path) == before


def test_a_base_outside_is_not_read_without_a_word(
    no_hub: None, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A folder from elsewhere can name a place here in its config and its record alike: the place is shown."""
    shutil.copytree(whole / "out", tmp_path / "out")
    said = enter(infer, capsys, "--model-dir", "out", "--prompt", "Hi", "--max-new-tokens", "1")
    assert said.code == 0 and f"base: {whole / 'base'}" in said.err


@pytest.mark.parametrize("named", ["//host/share/base", "\\\\host\\share\\base"])
def test_a_base_on_another_machine_is_not_read(whole: Path, tmp_path: Path, named: str) -> None:
    """Windows would give the user's login to whichever machine a folder from elsewhere names."""
    out = Path(shutil.copytree(whole / "out", tmp_path / "out"))
    edit("adapter_config.json", base_model_name_or_path=named)(out)
    assert "it is not read -> name the base" in refusal_of(base_name, out, {"name": named, "path": named}, own="x")


def test_a_record_cannot_climb_out_of_the_hubs_cache(
    no_hub: None, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A record that names a Hub model may bring its place in the cache, but no other place."""
    from huggingface_hub import constants

    out = Path(shutil.copytree(whole / "out", tmp_path / "out"))
    climbing = f"{constants.HF_HUB_CACHE}/../" + "../" * 30 + str(whole / "base")[1:]
    edit(RECORD, model={"kind": "hub", "name": "me/base", "hub_id": "me/base", "path": climbing})(out)
    edit("adapter_config.json", base_model_name_or_path="me/base")(out)
    told = refusal(enter(infer, capsys, "--model-dir", "out", "--prompt", "Hi"))
    assert "--base_model me/base" in told and "cannot be reached" in told
