"""What no run of ours wrote is never deleted: not by --overwrite, not with an old checkpoint, not at a run's end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Callable

import pytest
from refusals import refusal_of
from run_folders import SETTINGS, add_checkpoint, begin_again, claim, finish, names, refusal, start

from lora_practice.export import gguf, gguf_writer
from lora_practice.run import folder as run_folder
from lora_practice.run import own_files
from lora_practice.run.file_kinds import CARD, REPORT_MARK, file_kind
from lora_practice.storage import manifest
from lora_practice.storage.json_files import RECORD

CHECKPOINT = own_files.IN_A_FOLDER["checkpoint"]


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")


def note(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine", "utf-8")


def link(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/")


STRANGE: dict[str, Callable[[Path], None]] = {
    "notes.txt": lambda run: note(run / "notes.txt"),
    ".git/": lambda run: note(run / ".git" / "HEAD"),
    ".envrc": lambda run: note(run / ".envrc"),
    "nested/": lambda run: note(run / "nested" / "run_record.json"),
    "checkpoint-best/": lambda run: note(run / "checkpoint-best" / "adapter_model.safetensors"),
    "checkpoint-8/thesis.md": lambda run: note(run / "checkpoint-8" / "thesis.md"),
    "gguf/merged-q4_k_m.gguf": lambda run: note(run / "gguf" / "merged-q4_k_m.gguf"),
    "merged/onnx/": lambda run: note(run / "merged" / "onnx" / "model.onnx"),
    "runs/mine.txt": lambda run: note(run / "runs" / "mine.txt"),
    "README.md": lambda run: note(run / CARD),  # the card, edited
    ".venv3.11/": lambda run: note(run / ".venv3.11" / "bin" / "python"),
    ".notes.1": lambda run: note(run / ".notes.1"),
    "merged/README.md": lambda run: note(run / "merged" / CARD),
    "checkpoint-8/README.md": lambda run: note(run / "checkpoint-8" / CARD),
    "checkpoint-8/run_record.json": lambda run: note(run / "checkpoint-8" / "run_record.json"),
    "curves.png": lambda run: note(run / "curves.png"),  # not by `report`
    "report.html": lambda run: note(run / "report.html"),
    "model-old-thesis.safetensors": lambda run: note(run / "model-old-thesis.safetensors"),
    "link/": lambda run: link(run / "link"),
    "merged/": lambda run: link(run / "merged"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_overwrite_refuses_what_no_run_wrote_and_names_it(tmp_path: Path, name: str) -> None:
    finish(start(tmp_path / "run"), "old")
    STRANGE[name](tmp_path / "run")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    told = refusal(tmp_path / "run", overwrite=True)
    assert "files that we did not write, which --overwrite does not delete: " + name in told
    assert "move them elsewhere" in told
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_the_first_three_are_named(tmp_path: Path) -> None:
    finish(start(tmp_path / "run"), "old")
    for name in "dcba":
        note(tmp_path / "run" / f"{name}.txt")
    assert "delete: a.txt, b.txt, c.txt ..." in refusal(tmp_path / "run", overwrite=True)


def by_report(path: Path) -> None:
    path.write_text(f"<!-- {REPORT_MARK} -->", "utf-8")


def test_everything_that_a_run_and_the_commands_after_it_write_is_replaced(tmp_path: Path) -> None:
    """The real commands write it in tests/tiny/test_own_files_of_runs.py and in the journeys; here every name."""
    run = tmp_path / "run"
    finish(start(run), "old")
    for folder, patterns in {".": own_files.AT_THE_TOP, "checkpoint-8": CHECKPOINT, **own_files.IN_A_FOLDER}.items():
        for pattern in patterns:
            if folder not in ("checkpoint", "runs") and pattern != RECORD:
                note(run / folder / pattern.replace("*", "1"))
        note(run / folder / "._adapter_model.safetensors")
    shutil.rmtree(run / "checkpoint")
    note(run / "runs" / "Nov30_host" / "events.out.tfevents.1.host.2.0")
    for place in (run, run / "gguf", run / "runs" / "Nov30_host"):
        note(place / ".DS_Store")
    for name in ("report.html", "curves.png"):
        by_report(run / name)
    note(run / ".writing-abc" / "part")
    note(run / ".run_record.json.123")
    assert own_files.unknown_files(run, {}) == []
    finish(begin_again(run))
    assert names(tmp_path) == ["run"]
    assert names(run) == ["adapter_config.json", "adapter_model.safetensors", "run_record.json"]


def test_a_file_of_another_kind_of_tokenizer_is_known_by_its_hash(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    with folder.staging(1) as staging:
        note(staging / "emoji.json")
        folder.finish(staging, {"settings": SETTINGS})
    record = json.loads((folder.path / RECORD).read_text())
    assert own_files.unknown_files(folder.path, record) == []
    (folder.path / "emoji.json").write_text("edited")
    assert own_files.unknown_files(folder.path, record) == ["emoji.json"]
    checkpoint = add_checkpoint(start(tmp_path / "other"), 8)
    assert own_files.unknown_in(checkpoint) == []
    note(checkpoint / "emoji.json")
    assert own_files.unknown_in(checkpoint) == ["emoji.json"]


def test_a_plan_writes_nothing_and_is_not_refused(tmp_path: Path) -> None:
    finish(start(tmp_path / "run"), "old")
    note(tmp_path / "run" / "notes.txt")
    claim(tmp_path / "run", overwrite=True, plan=True)


def test_a_run_killed_while_its_results_are_moved_knows_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, replace = start(tmp_path / "run"), os.replace

    def killed(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).name == CARD:
            raise KeyboardInterrupt

    with folder.staging(1) as staging:
        note(staging / CARD)
        note(staging / "adapter_config.json")
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.finish(staging, {"settings": SETTINGS})
        monkeypatch.undo()
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    record = json.loads((folder.path / RECORD).read_text())
    assert (folder.path / CARD).is_file() and record["status"] == "running"
    assert own_files.unknown_files(folder.path, record) == []


@pytest.mark.parametrize("kill_at", ["record", "card"])
def test_a_card_that_was_being_rewritten_when_the_process_was_killed_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: str
) -> None:
    folder = start(tmp_path / "run")
    with folder.staging(1) as staging:
        note(staging / CARD)
        folder.finish(staging, {"settings": SETTINGS})
    write, written = manifest.write_atomically, []

    def killed(path: Path, content: str) -> None:
        if len(written) == ("record", "card").index(kill_at):
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, content)

    monkeypatch.setattr(manifest, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        run_folder.rewrite_card(folder.path, "a new card")
    assert written == ["run_record.json"][: len(written)]
    record = json.loads((folder.path / RECORD).read_text())
    assert own_files.unknown_files(folder.path, record) == []


def test_every_name_that_a_run_writes_is_explained_too() -> None:
    """By file_kinds, which inspect, the report and the upload go by: the two lists do not part."""
    places = {name: patterns for name, patterns in own_files.IN_A_FOLDER.items() if name not in ("gguf", "runs")}
    names = {one.replace("*", "1") for patterns in (own_files.AT_THE_TOP, *places.values()) for one in patterns}
    assert {name for name in names if file_kind(name) is None} == set()


def test_the_gguf_files_of_every_precision_are_known() -> None:
    written = {f"merged-{precision}.gguf" for precision in gguf_writer.PRECISIONS} | {gguf.ADAPTER_GGUF, "Modelfile"}
    assert written == set(own_files.GGUF_FILES)


@pytest.mark.parametrize(
    "content", ['{"any": "object"}', '{"status": "done", "settings": {}}', '{"status": "finished"}']
)
def test_any_json_object_is_no_record_of_a_run(tmp_path: Path, content: str) -> None:
    note(tmp_path / "run" / "thesis.md")
    (tmp_path / "run" / "run_record.json").write_text(content)
    for options in ({"overwrite": True}, {"resume": True}, {}):
        assert "this folder holds other files; nothing is written to it" in refusal(tmp_path / "run", **options)
    assert names(tmp_path / "run") == ["run_record.json", "thesis.md"]


def test_what_came_into_the_earlier_run_while_the_new_one_trained_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    finish(start(tmp_path / "run"), "old")
    folder = begin_again(tmp_path / "run")
    kept = next(tmp_path.glob("run.replaced-*"))
    note(kept / "notes.txt")
    finish(folder)
    assert (kept / "notes.txt").read_text() == "mine"
    assert f"{kept}: it holds files that we did not write: not deleted" in capsys.readouterr().err


def test_a_folder_that_a_forged_record_names_is_kept(tmp_path: Path) -> None:
    """`replaces` in a record is only text: what lies there must be a run."""
    aside = tmp_path / "run.replaced-20260101-000000"
    note(aside / "thesis.md")
    folder = start(tmp_path / "run")
    record = json.loads((folder.path / "run_record.json").read_text())
    (folder.path / "run_record.json").write_text(json.dumps({**record, "replaces": str(aside)}))
    folder._unlock()
    resumed = claim(tmp_path / "run", resume=True)
    resumed.begin({"settings": SETTINGS})
    finish(resumed)
    assert (aside / "thesis.md").read_text() == "mine"


def test_an_old_checkpoint_with_the_users_notes_stays(tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    note(add_checkpoint(folder, 1, keep=2) / "notes.txt")
    for step in (2, 3, 4):
        add_checkpoint(folder, step, keep=2)
    assert [one for one in names(folder.path) if "-" in one] == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    # and one that is saved again is put beside it
    (folder.path / "checkpoint-5").mkdir()
    note(folder.path / "checkpoint-5" / "notes.txt")
    add_checkpoint(folder, 5, keep=2)
    (kept,) = folder.path.glob("checkpoint-5.replaced-*")
    assert (kept / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_what_stands_in_the_place_of_a_checkpoint_is_put_beside_it(tmp_path: Path, kind: str) -> None:
    folder = start(tmp_path / "run")
    whole, place = add_checkpoint(folder, 9), folder.path / "checkpoint-12"
    if kind == "file":
        note(place)
    else:
        place.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
        note(tmp_path / "elsewhere" / "mine.txt")
    folder._unlock()
    resumed = claim(tmp_path / "run", resume=True)
    assert resumed.checkpoint == whole
    resumed.begin({"settings": SETTINGS})
    assert (add_checkpoint(resumed, 12, keep=1) / "adapter_model.safetensors").is_file()
    (kept,) = folder.path.glob("checkpoint-12.replaced-*")
    assert kept.is_symlink() or kept.read_text() == "mine"
    assert kind != "link" or (kept / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("place", ["merged", "gguf"])
def test_a_link_or_a_file_in_the_place_of_a_result_is_the_users(tmp_path: Path, place: str) -> None:
    note(tmp_path / place)
    assert own_files.unknown_in(tmp_path / place) == [place]
    assert own_files.unknown_in(tmp_path / "nothing") == []
    (tmp_path / place).unlink()
    link(tmp_path / place)
    assert place in refusal_of(own_files.check_all_known, own_files.unknown_in(tmp_path / place), tmp_path / place)
