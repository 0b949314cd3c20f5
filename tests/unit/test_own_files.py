"""What no run of ours wrote is never deleted: not by --overwrite, not with an old checkpoint, not at a run's end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable

import pytest
from refusals import refusal_of
from run_folders import SETTINGS, add_checkpoint, begin_again, claim, finish, names, refusal, start

from lora_practice.export import gguf, gguf_writer
from lora_practice.run import own_files
from lora_practice.run.file_kinds import CARD, FILE_KINDS


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


def test_everything_that_a_run_and_the_commands_after_it_write_is_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(start(run), "old")
    files = [name.replace("*", "1") for kind in FILE_KINDS for name in kind.names if not name.endswith("/")]
    for name in sorted({*files, *(f"checkpoint-8/{one}" for one in files), *(f"merged/{one}" for one in files)}):
        if name not in (CARD, "run_record.json"):
            note(run / name)
    for name in (*own_files.GGUF_FILES, ".DS_Store"):
        note(run / "gguf" / name)
    note(run / "runs" / "Nov30_host" / "events.out.tfevents.1.host.2.0")
    note(run / ".writing-abc" / "part")
    note(run / ".run_record.json.123")
    finish(begin_again(run))
    assert names(tmp_path) == ["run"]
    assert names(run) == ["adapter_config.json", "adapter_model.safetensors", "run_record.json"]


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"])
def test_vocabulary_files_of_every_kind_of_tokenizer_are_a_runs(name: str, tmp_path: Path) -> None:
    folder = start(tmp_path / "run")
    for place in (folder.path, add_checkpoint(folder, 8)):
        (place / name).write_bytes(b"a vocabulary")
    assert own_files.unknown_files(folder.path) == []


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


@pytest.mark.parametrize("place", ["merged", "gguf"])
def test_a_link_or_a_file_in_the_place_of_a_result_is_the_users(tmp_path: Path, place: str) -> None:
    note(tmp_path / place)
    assert own_files.unknown_in(tmp_path / place) == [place]
    assert own_files.unknown_in(tmp_path / "nothing") == []
    (tmp_path / place).unlink()
    link(tmp_path / place)
    assert place in refusal_of(own_files.check_all_known, own_files.unknown_in(tmp_path / place), tmp_path / place)
