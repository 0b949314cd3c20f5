"""The output folder's states: what may be claimed, what is kept, what counts as whole."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import pytest
from refusals import refusal_of
from run_folders import SETTINGS, add_checkpoint, claim, finish, names, refusal, start, status

from lora_practice.console.errors import UserError
from lora_practice.console.settings import given_as_flags, given_by_user, parse
from lora_practice.run import folder as run_folder
from lora_practice.run import own_files
from lora_practice.run.file_kinds import CHECKPOINT_MANIFEST
from lora_practice.run.folder import OutputFolder, checkpoints, record_in
from lora_practice.run.record import starting_record
from lora_practice.run.resume import FREE_ON_RESUME, OUTWARD, check_same_settings, settings_as_begun, sign_outward
from lora_practice.sources.find import SHIPPED, RunSources, Source
from lora_practice.storage import lock as storage_lock
from lora_practice.storage import manifest
from lora_practice.storage.json_files import RECORD

LOST = "the folder now holds another run or other files"


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")


def test_a_new_or_empty_folder_is_free(tmp_path: Path) -> None:
    assert claim(tmp_path / "a" / "b").checkpoint is None
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    assert claim(tmp_path / "empty").path == tmp_path / "empty"


def test_from_beginning_to_end(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    assert status(folder) == "running"
    add_checkpoint(folder, 5)
    finish(folder)
    assert status(folder) == "finished"
    assert names(folder.path) == ["adapter_config.json", "adapter_model.safetensors", "checkpoint-5", RECORD]


def test_a_folder_that_is_deleted_during_the_run_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = start(tmp_path / "run")
    shutil.rmtree(folder.path)
    checkpoint = add_checkpoint(folder, 5)
    assert f"{folder.path} is gone: it is created again" in capsys.readouterr().err
    assert claim(tmp_path / "run", resume=True).checkpoint == checkpoint
    finish(folder)
    assert status(folder) == "finished"


def test_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    assert "this is a file, not a folder" in refusal(tmp_path / "run")
    assert "this is a file, not a folder" in refusal(tmp_path / "run" / "below")
    assert (tmp_path / "run").read_text() == "mine"


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.name == "posix" and os.geteuid() != 0:
        tmp_path.chmod(0o500)
    else:  # root may write everywhere
        monkeypatch.setattr(run_folder.os, "access", lambda *_: False)
    assert f"{tmp_path}: no permission to write" in refusal(tmp_path / "run")
    tmp_path.chmod(0o700)


def test_what_a_killed_write_left_in_an_empty_folder_is_nobodys(tmp_path: Path) -> None:
    """The kill came after the folder was made and before its record was in place."""
    run = tmp_path / "run"
    (run / ".writing-abc" / "checkpoint-1").mkdir(parents=True)
    (run / f".{RECORD}.4711").write_text("{")
    assert "there is no run to resume here" in refusal(run, resume=True)
    start(run)
    assert names(run) == [RECORD]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / f".{RECORD}.mine").touch()
    assert "holds other files" in refusal(tmp_path / "other")


def test_someone_elses_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.doc").write_text("mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        assert "holds other files" in refusal(tmp_path / "run", **options)


def test_a_finished_run_is_named_and_kept(tmp_path: Path) -> None:
    finish(start(tmp_path / "run"))
    for options in ({}, {"resume": True}):
        line = refusal(tmp_path / "run", **options)
        assert "a finished run is here (2024-05-06 07:08, 7 steps)" in line
        assert ("--overwrite" in line) == (not options)  # who wants to go on is not led to delete it
        assert "--output_dir" in line


def test_an_unfinished_run_offers_resume(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    assert "(no checkpoint yet)" in refusal(tmp_path / "run")
    add_checkpoint(folder, 5)
    line = refusal(tmp_path / "run")
    assert "an unfinished run is here (checkpoint-5)" in line
    assert "--resume" in line
    assert claim(tmp_path / "run", resume=True).checkpoint == tmp_path / "run" / "checkpoint-5"


def test_nothing_to_resume(tmp_path: Path) -> None:
    told = refusal(tmp_path / "run", resume=True)
    assert "there is no run to resume here" in told and "--output_dir" in told and "leave out --resume" in told


def test_resume_before_the_first_checkpoint_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    start(tmp_path / "run")
    assert claim(tmp_path / "run", resume=True).checkpoint is None
    assert "starting at the first step" in capsys.readouterr().err


def test_overwrite_keeps_the_earlier_run_until_the_new_one_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    finish(start(tmp_path / "run"), "old")
    folder = claim(tmp_path / "run", overwrite=True)
    assert names(tmp_path) == ["run"]  # nothing happens before begin
    folder.begin({"settings": SETTINGS})
    kept = next(path for path in tmp_path.iterdir() if path.name.startswith("run.replaced-"))
    assert str(kept) in capsys.readouterr().err
    assert (kept / "adapter_model.safetensors").read_text() == "old"
    finish(folder)
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "adapter_model.safetensors").read_text() == "new"


@pytest.mark.parametrize("fault", ["missing file", "other bytes", "no manifest", "manifest is no JSON"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path: Path, fault: str, capsys: pytest.CaptureFixture) -> None:
    folder = start(tmp_path / "run")
    whole, damaged = add_checkpoint(folder, 9), add_checkpoint(folder, 10)
    if fault == "missing file":
        (damaged / "adapter_model.safetensors").unlink()
    elif fault == "other bytes":
        (damaged / "adapter_model.safetensors").write_bytes(b"weights 99")
    elif fault == "no manifest":
        (damaged / CHECKPOINT_MANIFEST).unlink()
    else:
        (damaged / CHECKPOINT_MANIFEST).write_text("{")
    assert claim(tmp_path / "run", resume=True).checkpoint == whole
    assert "checkpoint-10 is not whole" in capsys.readouterr().err


def test_no_whole_checkpoint_is_left(tmp_path: Path) -> None:
    (add_checkpoint(start(tmp_path / "run"), 1) / "adapter_model.safetensors").unlink()
    assert "no whole checkpoint is left" in refusal(tmp_path / "run", resume=True)


def test_a_copied_checkpoint_is_whole(tmp_path: Path) -> None:
    """Other times, the same bytes."""
    checkpoint = add_checkpoint(start(tmp_path / "run"), 1)
    shutil.copytree(checkpoint, tmp_path / "copy", copy_function=shutil.copyfile)
    assert manifest.folder_fault(tmp_path / "copy", CHECKPOINT_MANIFEST) == ""


def test_changed_settings_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_checkpoint(start(tmp_path / "run"), 1)
    line = refusal(tmp_path / "run", resume=True, lora_r=8, seed=7)
    assert "lora_r: 6 -> 8, seed: 42 -> 7" in line
    monkeypatch.setenv("LORA_PRACTICE_LANG", "zh")
    line = refusal(tmp_path / "run", resume=True, lora_r=8, seed=7)
    assert "参数变了，不是同一次训练：lora_r 从 6 改成 8，seed 从 42 改成 7 →" in line
    assert claim(tmp_path / "run", resume=True, logging_steps=1).checkpoint is not None


def test_every_setting_must_stay_as_it_was_but_those_that_cannot_change_the_result(tmp_path: Path) -> None:
    from fine_tuning_practice import TrainSettings

    plain = dataclasses.asdict(TrainSettings())
    assert set(FREE_ON_RESUME) < set(plain)
    for name in plain:
        before = {"settings": {**plain, name: "another"}}
        if name in FREE_ON_RESUME:
            check_same_settings(tmp_path, before, plain)
            continue
        with pytest.raises(UserError, match=f"{name}: another -> "):
            check_same_settings(tmp_path, before, plain)
    check_same_settings(tmp_path, {"settings": {}}, plain)  # of a version that knew fewer settings


def begun(*flags: str, edited: Optional[dict[str, Any]] = None) -> Any:
    """TrainSettings of these flags, with defaults that were edited in the source."""
    from fine_tuning_practice import TrainSettings

    cls = TrainSettings
    if edited:
        fields = [(name, type(value), dataclasses.field(default=value)) for name, value in edited.items()]
        cls = dataclasses.make_dataclass("Edited", fields, bases=(TrainSettings,))
    return parse(cls, flags, "x", "")


def written(settings: Any) -> dict[str, Any]:
    """What the record of a run with these settings holds of them, as it is read again."""
    values = dataclasses.asdict(settings)
    found = {"settings": values, "given": sorted(given_as_flags(settings)), "mark": sign_outward(values)}
    return json.loads(json.dumps(found))


def test_a_resumed_run_needs_no_flag_again() -> None:
    first = begun("--lora_r", "8", "--packing", "--dataset_path", "rows.jsonl", "--output_dir", "here")
    again = settings_as_begun(begun("--resume", "--output_dir", "moved", "--logging_steps", "1"), written(first))
    assert (again.lora_r, again.packing, again.dataset_path, again.logging_steps) == (8, True, "rows.jsonl", 1)
    assert (again.output_dir, again.resume) == ("moved", True)
    check_same_settings(Path("moved"), written(first), dataclasses.asdict(again))
    assert given_as_flags(again) >= {"lora_r", "packing", "dataset_path"}  # for the next time that it is resumed
    named = settings_as_begun(begun("--resume", "--lora_r", "4"), written(first))
    with pytest.raises(UserError, match="lora_r: 8 -> 4"):
        check_same_settings(Path("here"), written(first), dataclasses.asdict(named))


def test_a_default_that_was_edited_since_is_a_difference() -> None:
    again = settings_as_begun(begun("--resume", edited={"learning_rate": 1e-3}), written(begun("--lora_r", "8")))
    with pytest.raises(UserError, match=r"learning_rate: 0.0002 -> 0.001"):
        check_same_settings(Path("here"), written(begun("--lora_r", "8")), dataclasses.asdict(again))


def test_an_older_record_that_does_not_tell_the_flags_is_resumed_without_them() -> None:
    old = written(begun("--lora_r", "8", "--no_assistant_only_loss"))
    del old["given"], old["settings"]["use_dora"]
    again = settings_as_begun(begun("--resume"), old)
    assert (again.lora_r, again.assistant_only_loss, again.use_dora) == (8, False, False)
    assert not given_by_user(again, SHIPPED) & set(SHIPPED)


@pytest.mark.parametrize("value", ["eight", -1, None, [8]])
def test_a_record_with_a_value_that_cannot_be_is_one_line(value: Any) -> None:
    record = {**written(begun("--lora_r", "8")), "settings": {"lora_r": value}}
    with pytest.raises(UserError, match="--lora_r"):
        settings_as_begun(begun("--resume"), record)


ELSEWHERE = ("--model_name", "x/model", "--chat_template_path", "x/template", "--dataset_path", "/rows.jsonl")
ELSEWHERE += ("--dataset_name", "x", "--report_to", "wandb")


@pytest.mark.parametrize("mark", [None, "", "0" * 64, "\ud800", 7, "the record was altered", "the key is another"])
def test_what_a_strangers_record_names_outside_its_folder_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: Any
) -> None:
    record = written(begun("--lora_r", "8", *ELSEWHERE))
    if mark == "the record was altered":
        record["settings"]["dataset_path"] = "/etc/passwd"
    elif mark == "the key is another":
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    else:
        record["mark"] = mark
    told = refusal_of(settings_as_begun, begun("--resume", "--output_dir", "here"), record)
    assert told.startswith("here/run_record.json: ") and "not known to be written by you on this machine" in told
    assert all(f"--{name} {record['settings'][name]}" in told for name in OUTWARD) and "lora_r" not in told
    assert settings_as_begun(begun("--resume", *ELSEWHERE), record).lora_r == 8  # the ways out that the line names
    assert settings_as_begun(begun("--resume", "--trust_checkpoint"), record).report_to == "wandb"


def test_the_record_that_a_run_writes_is_its_users_own(tmp_path: Path) -> None:
    first = begun("--dataset_path", "rows.jsonl", "--report_to", "wandb", "--output_dir", str(tmp_path / "run"))
    facts = SimpleNamespace(cpu="", cores=1, gpu=None)
    machine: Any = SimpleNamespace(device="cpu", precision="fp32", reason="", facts=facts)
    sources: Any = RunSources(Source("hub", "me/tiny"), Source("file", "rows.jsonl"), None, 0)
    record = starting_record(first, machine, sources, SimpleNamespace(facts={}))
    OutputFolder.claim(str(tmp_path / "run"), False, False, record["settings"]).begin(record)
    again = settings_as_begun(begun("--resume"), record_in(str(tmp_path / "run")))
    assert (again.dataset_path, again.report_to) == ("rows.jsonl", "wandb")


def test_a_strangers_record_that_stays_in_its_folder_needs_no_trust() -> None:
    record = {**written(begun("--lora_r", "8", "--model_name", begun().model_name)), "mark": ""}
    assert settings_as_begun(begun("--resume"), record).lora_r == 8
    older = {**record, "settings": {**record["settings"], "report_to": "wandb"}}
    del older["given"]
    assert "--report_to wandb" in refusal_of(settings_as_begun, begun("--resume"), older)


def test_every_setting_that_names_a_path_a_source_or_a_service_is_guarded() -> None:
    words = {field.name for field in dataclasses.fields(begun()) if isinstance(field.default, str)}
    shaping = {"eval_strategy", "lr_scheduler_type", "optim", "target_modules", "init_lora_weights", "fast"}
    shaping |= {"gradient_checkpointing", "save_strategy"}
    assert words == {*OUTWARD, *shaping, "output_dir"}


def test_an_interrupted_finish_is_an_unfinished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = start(tmp_path / "run")
    add_checkpoint(folder, 3)
    moved: list[str] = []

    def replace_once(source: Any, target: Any) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(str(target))
        shutil.move(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder.os, "replace", replace_once)
        finish(folder)
    assert status(folder) == "running"
    assert not list(folder.path.glob(".writing-*"))
    again = claim(tmp_path / "run", resume=True)
    again.begin({"settings": SETTINGS})
    finish(again)
    assert status(again) == "finished"


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    add_checkpoint(folder, 3)
    (folder.path / ".writing-abc" / "checkpoint-6").mkdir(parents=True)
    again = claim(tmp_path / "run", resume=True)
    again.begin({"settings": SETTINGS})
    assert names(folder.path) == ["checkpoint-3", RECORD]


def test_the_oldest_checkpoints_make_room(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    for step in (2, 10, 9, 100):
        add_checkpoint(folder, step)
    (folder.path / "checkpoint-2-best").mkdir()
    (folder.path / "checkpoint-x").mkdir()
    assert [path.name for path in run_folder.checkpoints(folder.path)] == [
        *("checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-100")
    ]
    add_checkpoint(folder, 101, keep=2)
    assert [path.name for path in run_folder.checkpoints(folder.path)] == ["checkpoint-100", "checkpoint-101"]
    assert (folder.path / "checkpoint-2-best").is_dir()


def test_a_damaged_newer_checkpoint_does_not_push_out_whole_ones(tmp_path: Path) -> None:
    """After --resume from step 20 with keep=1, the damaged 30 must not count as the one to keep."""
    folder = start(tmp_path / "run")
    add_checkpoint(folder, 20)
    (add_checkpoint(folder, 30) / "adapter_model.safetensors").unlink()
    again = claim(tmp_path / "run", resume=True)
    new = add_checkpoint(again, 25, keep=1)
    assert run_folder.newest_whole_checkpoint(again.path) == new
    rewritten = add_checkpoint(again, 30, keep=1)
    assert run_folder.checkpoints(again.path) == [rewritten]


def test_a_record_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / RECORD
    manifest.write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        manifest.write_atomically(file, "\ud800")
    assert file.read_text() == "old"


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest.secrets, "randbelow", lambda _: 7)
    (tmp_path / "mine").write_text("precious")
    (tmp_path / f".{RECORD}.7").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        manifest.write_atomically(tmp_path / RECORD, "new")
    assert (tmp_path / "mine").read_text() == "precious" and names(tmp_path) == [f".{RECORD}.7", "mine"]


def test_a_checkpoints_record_is_the_runs(tmp_path: Path) -> None:
    checkpoint = add_checkpoint(start(tmp_path / "run", kind="embedded"), 1)
    record = run_folder.read_record(checkpoint)
    assert record is not None
    assert record["model"]["kind"] == "embedded"
    (tmp_path / "run" / RECORD).write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        run_folder.read_record(checkpoint)


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}, {}], ids=str)
def test_a_checkpoint_is_not_the_folder_of_a_run(tmp_path: Path, options: dict[str, bool]) -> None:
    checkpoint = add_checkpoint(start(tmp_path / "run"), 5)
    line = refusal(checkpoint, **options)
    assert "this is a checkpoint" in line and f"--output_dir {tmp_path / 'run'}" in line


def test_the_folder_that_one_stands_in_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(start(tmp_path / "run"))
    monkeypatch.chdir(tmp_path / "run")
    assert "in use" in refusal(Path("."), overwrite=True)
    assert "in use" in refusal(tmp_path / "run", overwrite=True)


def test_a_card_that_is_rewritten_is_still_known_as_the_runs_own(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    finish(folder)
    card = folder.path / "README.md"
    run_folder.rewrite_card(folder.path, "someone's own words")
    assert "README.md" not in json.loads((folder.path / RECORD).read_text("utf-8"))["files"]
    record = json.loads((folder.path / RECORD).read_text("utf-8"))
    record["files"]["README.md"] = manifest.sha256(card)
    folder.write_record(record)
    run_folder.rewrite_card(folder.path, "with a proof")
    known = json.loads((folder.path / RECORD).read_text("utf-8"))["files"]["README.md"]
    assert known == manifest.sha256(card) and card.read_text("utf-8") == "with a proof"


TOKEN = "hf_" + "kXr7" * 8 + "Qz"
QUOTED = 'odd "token" of a server'  # JSON writes it with escapes inside


@pytest.mark.parametrize("token", [TOKEN, QUOTED])
def test_tokens_are_masked_before_json_can_hide_one_behind_an_escape(
    token: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", QUOTED)
    folder = start(tmp_path / "run")
    row = f"my token:\n{token}\tand\u2028{token}"
    folder.note("said", 1, row, {})
    held = {"settings": SETTINGS, "data": {"first_row": row, "rows": [row, {row: 1}]}, "path": Path(token), "count": 3}
    folder.write_record({**held, "status": "running"})
    written = (folder.path / RECORD).read_text("utf-8")
    hidden = "my token:\n***\tand\u2028***"
    assert token not in written and json.dumps(token)[1:-1] not in written
    record = json.loads(written)
    assert record["data"] == {"first_row": hidden, "rows": [hidden, {hidden: 1}]} and record["count"] == 3
    assert record["path"] == "***" and record["events"][0]["said"] == hidden


def test_a_card_that_is_rewritten_and_the_record_beside_it_hold_no_token(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    finish(folder)
    record = json.loads((folder.path / RECORD).read_text("utf-8"))
    (folder.path / "README.md").write_text("a card", "utf-8")
    record["files"]["README.md"] = manifest.sha256(folder.path / "README.md")
    record["command"] = f"train\n{TOKEN}"
    (folder.path / RECORD).write_text(json.dumps(record), "utf-8")
    run_folder.rewrite_card(folder.path, f"proof\\n{TOKEN}")
    assert (folder.path / "README.md").read_text("utf-8") == "proof\\n***"
    assert json.loads((folder.path / RECORD).read_text("utf-8"))["command"] == "train\n***"


@pytest.fixture
def another_run(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that has begun a run in tmp_path/run and goes on with it."""
    pytest.importorskip("fcntl", reason="Windows has no such lock")
    code = (
        "import sys; from lora_practice.run.folder import OutputFolder\n"
        "folder = OutputFolder.claim(sys.argv[1], False, False, {})\n"
        "folder.begin({'settings': {}}); print('begun', flush=True); sys.stdin.read()"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], **pipes)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_that_another_run_is_writing_to_is_refused_until_that_run_ends_or_is_killed(
    tmp_path: Path, another_run: subprocess.Popen
) -> None:
    for options in ({}, {"resume": True}, {"overwrite": True}):
        line = refusal(tmp_path / "run", **options)
        assert "another run is writing to this folder -> wait until it ends" in line
    claim(tmp_path / "run", overwrite=True, plan=True)  # a plan writes nothing
    another_run.kill()
    another_run.wait()
    assert claim(tmp_path / "run", resume=True).resumed_record["status"] == "running"
    claim(tmp_path / "run", overwrite=True).begin({"settings": SETTINGS})


@pytest.mark.parametrize("resume", [False, True])
def test_of_two_runs_that_looked_at_a_folder_at_once_only_one_begins(tmp_path: Path, resume: bool) -> None:
    if resume:
        start(tmp_path / "run")
    first, second = (claim(tmp_path / "run", resume) for _ in range(2))
    first.begin({"settings": SETTINGS, "started_at": "now"})
    before = (tmp_path / "run" / RECORD).read_bytes()
    with pytest.raises(UserError, match=LOST):
        second.begin({"settings": SETTINGS})
    assert (tmp_path / "run" / RECORD).read_bytes() == before


def test_a_run_whose_folder_another_run_has_by_now_writes_nothing_into_it(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = start(tmp_path / "run")
    shutil.rmtree(folder.path)
    another = request.getfixturevalue("another_run")
    before = {path: path.read_bytes() for path in folder.path.iterdir()}
    writes = (lambda: add_checkpoint(folder, 5), lambda: folder.note("memory", 1, "less", {}), lambda: finish(folder))
    for ended in (False, True):  # the record of a run that has ended is not ours either
        if ended:
            another.kill()
            another.wait()
        for write in writes:
            with pytest.raises(UserError, match=LOST if ended else "another run is writing to this folder"):
                write()
        assert {path: path.read_bytes() for path in folder.path.iterdir()} == before


@pytest.mark.parametrize("name", ["compute_config", "regime"])
def test_the_compute_config_of_the_last_event_is_read_under_its_new_name_and_its_old_one(
    tmp_path: Path, name: str
) -> None:
    folder = start(tmp_path / "run")
    assert folder.last_compute_config() == {}
    folder.note("memory", 0, "less", {"precision": "bf16"})
    folder.note("numbers", 0, "on in fp32", {"precision": "fp32"})
    record = (folder.path / RECORD).read_text("utf-8")
    assert record.count('"compute_config"') == 2 and "regime" not in record
    (folder.path / RECORD).write_text(record.replace('"compute_config"', f'"{name}"'), "utf-8")
    assert claim(folder.path, resume=True).last_compute_config() == {"precision": "fp32"}
    (folder.path / RECORD).write_text(record.replace('"compute_config"', '"something"'), "utf-8")
    with pytest.raises(UserError, match=r"events\.compute_config is of the wrong kind"):
        claim(folder.path, resume=True)


def test_a_folder_that_is_made_anew_is_held_like_the_one_before(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="Windows has no such lock")
    folder = start(tmp_path / "run")
    look = "import sys; from lora_practice.run.folder import OutputFolder; OutputFolder.claim(sys.argv[1], 0, 1, {})"
    for step in (5, 6):
        add_checkpoint(folder, step)
        done = subprocess.run([sys.executable, "-c", look, str(folder.path)], capture_output=True, text=True)
        assert "another run is writing to this folder" in done.stderr
        shutil.rmtree(folder.path)
        folder.path.mkdir()  # by hand, or by a tool that brings it back


def test_a_folder_that_was_moved_away_meanwhile_is_taken_and_the_one_in_its_place_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs with --overwrite: the slower has opened the folder when the quicker moves it and makes its own."""
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such lock")
    finish(start(tmp_path / "run"))
    slow, late = (claim(tmp_path / "run", overwrite=True) for _ in range(2))
    lock = fcntl.flock

    def quicker(handle: int, how: int) -> None:
        (tmp_path / "run").rename(tmp_path / "run.replaced")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "new").touch()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", quicker)
    with pytest.raises(UserError, match=LOST):
        slow.begin({"settings": SETTINGS})
    monkeypatch.setattr(fcntl, "flock", lock)
    for _ in ("another's folder", "and one that is not even a run's"):
        with pytest.raises(UserError, match=LOST):
            late.begin({"settings": SETTINGS})
        assert names(tmp_path / "run") == ["new"] and names(tmp_path) == ["run", "run.replaced"]
    shutil.rmtree(tmp_path / "run")  # nothing is left to be replaced
    late.begin({"settings": SETTINGS})
    assert status(late) == "running" and names(tmp_path) == ["run", "run.replaced"]


def test_of_two_runs_that_replace_one_at_once_the_first_does_and_what_it_replaces_stays_until_its_end(
    tmp_path: Path,
) -> None:
    """The second comes when the first has made its folder and does not hold it yet."""
    finish(start(tmp_path / "run"), "old")
    first, second = (claim(tmp_path / "run", overwrite=True) for _ in range(2))
    lock_folder = first._lock

    def lock_late(*known: dict[str, Any]) -> None:
        with pytest.raises(UserError, match=LOST):
            second.begin({"settings": SETTINGS})
        lock_folder(*known)

    first._lock = lock_late  # type: ignore[method-assign]
    first.begin({"settings": SETTINGS})
    aside, *others = tmp_path.glob("run.*")
    assert (aside / "adapter_model.safetensors").read_text() == "old" and not others
    finish(first)
    assert names(tmp_path) == ["run"]


def test_what_came_in_the_place_of_a_run_that_is_to_be_replaced_is_left_alone(tmp_path: Path) -> None:
    finish(start(tmp_path / "run"))
    folder = claim(tmp_path / "run", overwrite=True)
    for file in (tmp_path / "run").iterdir():  # the same folder, but for what is in it
        file.unlink()
    (tmp_path / "run" / "thesis.doc").write_text("mine")
    with pytest.raises(UserError, match=LOST):
        folder.begin({"settings": SETTINGS})
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == ["thesis.doc"]


def test_an_earlier_run_is_kept_aside_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        storage_lock.time, "time", lambda: 1e9
    )  # without a clock of its own a board begins there each time
    for word in ("first", "second", "third"):
        folder = claim(tmp_path / "run", overwrite=word != "first")
        folder.begin({"settings": SETTINGS})
        (folder.path / "adapter_config.json").write_text(word)
    kept = [one / "adapter_config.json" for one in tmp_path.glob("run.replaced-*")]
    assert sorted(one.read_text() for one in kept) == ["first", "second"]
    finish(folder)
    assert [one.parent.name for one in kept if one.exists()] == [min(one.parent.name for one in kept)]


@pytest.mark.parametrize(("keep", "left"), [(None, 5), (2, 2), (9, 5)])
def test_the_newest_checkpoints_are_left_of_those_that_kills_had_spared(tmp_path, keep, left):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    own_files.drop_older(checkpoints(tmp_path), keep)
    assert [one.name for one in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (2, 4, 6, 8, 10)[-left:]]
