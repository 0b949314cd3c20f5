"""The base under an adapter is the one that it was begun on: what a run notes of it, refuses, and points out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import enter, refusal, snapshot
from bad_inputs.folders import RECORD, edit, make_base, remove, tensors
from bad_inputs.runs import Damage

from fine_tuning_practice import main as train
from inference import main as infer
from lora_practice.cli import main as cli
from lora_practice.report.checks import check_folder
from lora_practice.run.resume import check_same_base, with_file_digests
from lora_practice.sources.find import Source, cached_as_before
from lora_practice.storage import manifest

FLAGS = ("--model_name", "base", "--dataset_path", "rows.jsonl", "--output_dir", "out", "--max_steps", "1")
RESUME = (*FLAGS, "--resume", "--trust_checkpoint")
stopped = edit(RECORD, status="interrupted")


def one_weight(found: dict[str, Any]) -> dict[str, Any]:
    """The same tensors but for one number."""
    next(iter(found.values())).view(-1)[0] += 1
    return found


CHANGES: list[tuple[Damage, str]] = [
    (tensors(one_weight, "model.safetensors"), "model.safetensors"),
    (edit("config.json", rope_theta=12345.0), "config.json"),
    (lambda base: (base / "more.safetensors").write_bytes(b"") and None, "more.safetensors"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, rows.jsonl, and out/ with a run that the entry point itself has made."""
    place = tmp_path_factory.mktemp("trained")
    make_base(place / "base")
    (place / "rows.jsonl").write_text('{"prompt": "Hi", "completion": "Hello!"}\n', "utf-8")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(place)
        train(list(FLAGS))
    assert ended.value.code == 0
    return place


@pytest.fixture
def place(no_hub: None, trained: Path, tmp_path: Path) -> Path:
    """The working folder: a copy of it all, and in its record the base that it was trained on."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def model_of(out: Path) -> dict[str, Any]:
    return json.loads((out / RECORD).read_text("utf-8"))["model"]


def as_if_trained_here(place: Path) -> None:
    """The record and the adapter name the base in this very folder."""
    edit(RECORD, model={**model_of(place / "out"), "path": str(place / "base")})(place / "out")
    edit("adapter_config.json", base_model_name_or_path=str(place / "base"))(place / "out")


@pytest.mark.parametrize(("change", "name"), CHANGES, ids=[name for _, name in CHANGES])
def test_a_run_goes_on_over_its_own_base_only_and_names_the_file_that_changed(
    change: Damage, name: str, place: Path, capsys: pytest.CaptureFixture
) -> None:
    stopped(place / "out")
    (place / "base").rename(place / "own")
    shutil.copytree(place / "own", place / "base")
    change(place / "base")
    before = snapshot(place)
    told = refusal(enter(train, capsys, *RESUME))
    assert f"base: the base model is not what this run began with: {name} ->" in told
    assert snapshot(place) == before
    shutil.rmtree(place / "base")
    shutil.copytree(place / "own", place / "base", copy_function=shutil.copy)  # at another time
    assert enter(train, capsys, *RESUME).code == 0


def test_the_same_base_in_other_files_is_the_same(place: Path) -> None:
    """Copied, its times are others; what is in the files decides."""
    record = json.loads((place / "out" / RECORD).read_text("utf-8"))
    base = with_file_digests(Source("folder", "base", place / "base"))
    check_same_base(record, base)
    assert set(record["model"]["files"]) == {"config.json", "model.safetensors"}
    assert record["model"]["files"]["model.safetensors"]["sha256"] == manifest.sha256(base.path / "model.safetensors")
    (base.path / "README.md").write_text("# new words", "utf-8")
    check_same_base(record, with_file_digests(base))
    del record["model"]["files"]  # of a version that did not note them
    edit("config.json", rope_theta=1.0)(base.path)
    check_same_base(record, with_file_digests(base))
    check_same_base({}, with_file_digests(base))


@pytest.mark.parametrize("files", [{"config.json": {}}, {"config.json": {"size": []}}, {"../x": {"sha256": [1]}}])
def test_a_forged_note_of_the_base_is_one_clear_line(files: Any, place: Path, capsys: pytest.CaptureFixture) -> None:
    stopped(place / "out")
    edit(RECORD, model={**model_of(place / "out"), "files": files})(place / "out")
    told = refusal(enter(train, capsys, *RESUME))
    assert "the base model is not what this run began with: " in told


@pytest.mark.parametrize(("change", "name"), CHANGES[:2], ids=[name for _, name in CHANGES[:2]])
def test_chat_merge_and_inspect_say_that_the_base_is_another_one_by_now(
    change: Damage, name: str, place: Path, capsys: pytest.CaptureFixture
) -> None:
    as_if_trained_here(place)
    asking = ("--model-dir", "out", "--prompt", "Hi", "--max-new-tokens", "1")
    words = f"this is not the base that it was trained on: {name}"
    assert words not in enter(infer, capsys, *asking).err
    assert not any(words in one for one in check_folder(place / "out").findings)
    change(place / "base")
    for said in (enter(infer, capsys, *asking), enter(cli, capsys, "merge", "out")):
        assert said.code == 0 and said.err.count(words) == 1
    assert [one for one in check_folder(place / "out").findings if words in one]


def test_files_beyond_the_limit_are_told_apart_by_parts_of_them(tmp_path: Path) -> None:
    file, block = tmp_path / "large", 1 << 20
    file.write_bytes(bytes(6 * block + 5))
    whole, parts = manifest.sha256(file), manifest.sha256(file, most=2 * block)
    assert parts.startswith("1/4 ") and not whole.startswith("1/")
    assert manifest.sha256(file, most=7 * block) == whole
    for place, seen in ((0, True), (4 * block, True), (6 * block, False)):
        with open(file, "r+b") as handle:
            handle.seek(place)
            handle.write(b"x")
        changed = manifest.sha256(file, most=2 * block)
        assert (changed != parts) is seen
        assert manifest.sha256(file) != whole
        parts, whole = changed, manifest.sha256(file)


def test_a_resumed_run_goes_on_with_the_very_files_of_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository may have newer weights by now."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    kept = make_base(tmp_path / "models--me--tiny" / "snapshots" / "abc")
    model = {"kind": "hub", "name": "me/tiny", "path": str(kept), "revision": "abc"}
    assert cached_as_before({"model": model}, "me/tiny") == Source("hub", "me/tiny", kept, "me/tiny", "abc")
    assert cached_as_before({"model": model}, "me/other") is None
    assert cached_as_before({"model": {**model, "kind": "folder"}}, "me/tiny") is None
    assert cached_as_before({"model": {**model, "name": "me/other"}}, "me/other") is None  # another's files
    assert cached_as_before({"model": {**model, "path": str(tmp_path / "gone")}}, "me/tiny") is None
    remove("model.safetensors")(kept)
    assert cached_as_before({"model": model}, "me/tiny") is None
    outside = make_base(tmp_path.parent / "outside")
    assert (
        cached_as_before({"model": {**model, "path": f"{tmp_path}/../outside"}}, "me/tiny") is None and outside.is_dir()
    )
