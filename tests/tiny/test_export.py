"""Exporting a tiny adapter: every form passes the proof, and each way of breaking one fails it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gguf_folders import make_folder
from limited_disk import small_disk
from peft import LoraConfig, get_peft_model

from lora_practice.cli import main as cli
from lora_practice.console.errors import UserError
from lora_practice.export import gguf, gguf_tokenizer, gguf_writer, llama_cpp, merge, parity
from lora_practice.model.load import load_base
from lora_practice.run.own_files import unknown_in
from lora_practice.sources.find import Source
from lora_practice.storage import disk

NO_LLAMA = pytest.mark.skipif(bool(llama_cpp.missing()), reason="xllamacpp is not installed")


@pytest.fixture(autouse=True)
def two_prompts(monkeypatch):
    monkeypatch.setattr(parity, "PROMPTS", parity.PROMPTS[1:3])
    monkeypatch.setattr(parity, "LONGEST", 24)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An output folder as a run leaves it, of a tiny base."""
    place = tmp_path_factory.mktemp("tiny")
    base, folder = make_folder(place / "base"), place / "out"
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_base(Source("folder", str(base), base), "fp32"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).is_file():
            shutil.copy(base / name, folder)
    record = {"status": "finished", "model": {"kind": "folder", "name": str(base), "path": str(base)}}
    (folder / "run_record.json").write_text(json.dumps(record), "utf-8")
    (folder / "README.md").write_text("# out\n\nWords.\n", "utf-8")
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def results(lines) -> dict[str, str]:
    """Verdicts of the exported forms."""
    return {line.form: line.verdict for line in lines[1:]}


@NO_LLAMA
def test_every_form_passes_and_the_card_says_so_once(run):
    lines = gguf.export_gguf(run)
    forms = ["merged/", "merged-f16.gguf", "merged-q8_0.gguf", "adapter.gguf"]
    assert results(lines) == dict.fromkeys(forms, "PASS"), lines
    assert lines[0].ended == 0 and parity.overall_verdict(lines) == "PASS"  # that no answer ends judges the training
    assert "2 of 2 answers do not end: that judges the training, not the export" in parity.result_table(lines)
    assert "train longer (--max_steps" in (run / "README.md").read_text("utf-8")
    assert {file.name for file in (run / "gguf").iterdir()} == {*forms[1:], "Modelfile"}
    gguf.check_export(run)
    card = (run / "README.md").read_text("utf-8")
    assert (
        card.startswith("# out\n\nWords.\n\n<!-- proof -->")
        and card.count(parity.BEGIN) == card.count("| merged/") == 1
    )
    assert all(len(line) <= 80 for line in parity.result_table(lines).splitlines())
    assert not list(run.glob(".writing-*"))


def test_without_llama_cpp_the_gguf_lines_say_so_and_merged_is_still_proved(run, monkeypatch):
    monkeypatch.setattr(llama_cpp, "missing", lambda: 'not checked: pip install -e ".[gguf]"')
    lines = gguf.export_gguf(run, ["q8_0"])
    assert results(lines) == {"merged/": "PASS", "merged-q8_0.gguf": "-", "adapter.gguf": "-"}
    assert "not checked: pip install" in parity.result_table(lines)
    assert "FROM ./merged-q8_0.gguf" in (run / "gguf" / "Modelfile").read_text("utf-8")


def test_an_earlier_export_is_replaced_only_when_asked(run, monkeypatch):
    monkeypatch.setattr(llama_cpp, "missing", lambda: "not checked")
    (run / "gguf").mkdir()
    (run / "gguf" / "mine").touch()
    with pytest.raises(UserError, match=r"already exported.*--overwrite"):
        gguf.export_gguf(run)
    with pytest.raises(UserError, match="files that we did not write, which --overwrite does not delete: mine"):
        gguf.export_gguf(run, overwrite=True)
    assert [file.name for file in (run / "gguf").iterdir()] == ["mine"] and not (run / "merged").exists()
    (run / "gguf" / "mine").rename(run / "gguf" / "merged-q8_0.gguf")
    gguf.export_gguf(run, ["f16"], overwrite=True)
    assert {file.name for file in (run / "gguf").iterdir()} == {"merged-f16.gguf", "adapter.gguf", "Modelfile"}
    assert unknown_in(run / "gguf") == unknown_in(run / "merged") == []


@pytest.mark.parametrize(
    ("dtype", "difference", "said"), [("float16", 0.0484, True), ("bfloat16", 0.6, False), ("float32", 0.0, False)]
)
def test_a_difference_that_rounding_explains_is_said_to_be_harmless(tmp_path, dtype, difference, said):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2, dtype=getattr(torch, dtype))}, tmp_path / "model.safetensors")
    sentence = merge.merge_sentence(tmp_path, difference)
    assert f"{difference:.4f}" in sentence and ("rounding to 16 bits, as expected" in sentence) == said


def test_an_earlier_merge_is_replaced_only_when_asked_and_only_by_a_whole_one(run, monkeypatch):
    merge.merge_adapter(run)
    before = (run / "merged" / "model.safetensors").read_bytes()
    (run / "merged" / "model.safetensors").write_bytes(b"another")
    with pytest.raises(UserError, match=r"already merged -> merge again: --overwrite; to use it: lora-practice chat"):
        merge.merge_adapter(run)
    with monkeypatch.context() as patch:
        patch.setattr(merge.adapter_files, "save_tokenizer", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge.merge_adapter(run, overwrite=True)
    assert (run / "merged" / "model.safetensors").read_bytes() == b"another"
    (run / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"files that we did not write, which --overwrite does not delete: notes\.txt"):
        merge.merge_adapter(run, overwrite=True)
    (run / "merged" / "notes.txt").unlink()
    merge.merge_adapter(run, overwrite=True)
    assert (run / "merged" / "model.safetensors").read_bytes() == before
    assert not list(run.glob(".writing-*"))


def test_a_merge_removes_what_a_killed_one_left_and_waits_for_no_other(run, monkeypatch):
    (run / ".writing-killed").mkdir()
    (run / ".writing-killed" / "model.safetensors").write_bytes(b"half")
    merge.merge_adapter(run)
    assert not list(run.glob(".writing-*"))
    code = "import sys, time; from pathlib import Path; from lora_practice.storage import lock\n"
    code += "lock.lock_folder(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    other = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, env=env)
    try:
        assert other.stdout and other.stdout.readline().strip() == b"locked"
        (run / ".writing-other").mkdir()
        for write in (merge.merge_adapter, gguf.export_gguf):
            with pytest.raises(UserError, match="another run is writing to this folder"):
                write(run, overwrite=True)
        assert (run / ".writing-other").is_dir()
    finally:
        other.kill()
        other.wait()


def test_what_comes_into_merged_while_it_is_made_again_is_kept(run, monkeypatch, capsys):
    merge.merge_adapter(run)
    assert unknown_in(run / "merged") == []
    save = merge.adapter_files.save_tokenizer

    def note_first(*args):
        (run / "merged" / "notes.txt").write_text("mine")
        save(*args)

    monkeypatch.setattr(merge.adapter_files, "save_tokenizer", note_first)
    merge.merge_adapter(run, overwrite=True)
    (kept,) = run.glob("merged.replaced-*")
    assert (kept / "notes.txt").read_text() == "mine" and not (run / "merged" / "notes.txt").exists()
    assert "it holds files that we did not write: kept in" in capsys.readouterr().err


def test_a_failure_in_the_middle_leaves_the_folder_as_it_was(run, monkeypatch):
    merge.merge_adapter(run)

    def fail(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(gguf_writer, "write_adapter", fail)
    before = sorted(run.iterdir())
    with pytest.raises(RuntimeError, match="a bug"):
        gguf.export_gguf(run)
    assert sorted(run.iterdir()) == before


@pytest.mark.parametrize("step", ["merge", "export"])
def test_a_disk_that_fills_up_is_one_line_and_leaves_the_folder_as_it_was(made, tmp_path, monkeypatch, step):
    """The check before each write is silenced: what fills the disk may come from another program."""
    with small_disk(tmp_path / "small", megabytes=5) as place:
        run = Path(shutil.copytree(made, place / "out"))
        if step == "export":
            merge.merge_adapter(run)
        before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
        filler = place / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(place).free - 300_000))
        monkeypatch.setattr(disk, "check_free_disk", lambda *_: None)
        with pytest.raises(UserError) as caught:
            gguf.export_gguf(run)
        line = str(caught.value)
        assert "the disk refused a write midway (No space left on device)" in line and "\n" not in line
        assert line.endswith("-> free some, then run it again; what was there is untouched")
        assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_a_proof_that_writes_no_gguf_asks_for_no_room(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "missing", lambda: "not checked")
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    with small_disk(tmp_path / "small", megabytes=8) as place:
        run = Path(shutil.copytree(made, place / "out"))
        gguf.export_gguf(run, ["q8_0"])
        (place / "filler").write_bytes(bytes(shutil.disk_usage(place).free - 100_000))
        assert results(gguf.check_export(run))["merged/"] == "PASS"
        card = (run / "README.md").read_bytes()
        (place / "rest").write_bytes(bytes(shutil.disk_usage(place).free))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli(["export", str(run), "--check"])
        told = capsys.readouterr().err
        assert end.value.code == 2 and "Traceback" not in told
        assert told.splitlines()[-1].startswith("Error: No space left on device -> free some space"), told
        assert (run / "README.md").read_bytes() == card and not list(run.glob(".*"))


def test_what_cannot_be_a_gguf_is_refused_before_anything_is_merged(run):
    whole = json.loads((run / "tokenizer.json").read_text("utf-8"))
    (run / "tokenizer.json").write_text(json.dumps({**whole, "pre_tokenizer": {"type": "Whitespace"}}), "utf-8")
    with pytest.raises(UserError, match="no GGUF can be made"):
        gguf.export_gguf(run)
    assert not (run / "merged").exists()


def test_a_merge_that_lost_the_adapter_fails(run, monkeypatch):
    merge.merge_adapter(run)
    base = Path(json.loads((run / "run_record.json").read_text("utf-8"))["model"]["path"])
    shutil.copy(base / "model.safetensors", run / "merged")
    monkeypatch.setattr(llama_cpp, "missing", lambda: "not checked")
    lines = gguf.export_gguf(run, ["f16"])
    assert results(lines)["merged/"] == parity.overall_verdict(lines) == "FAIL"


@pytest.mark.parametrize(("skipped", "said"), [("", "PASS"), ("not here", "PASS (1 not checked)")])
def test_a_pass_says_how_many_forms_were_not_checked(tmp_path, skipped, said):
    lines = [parity.FormResult("adapter (PEFT)", 0.0, ended=4, same_tokens=4)]
    lines.append(parity.FormResult("merged-f16.gguf", 0.3, ended=4, same_tokens=4, skipped=skipped))
    assert parity.result_table(lines).splitlines()[-1] == ("PASS; 1 GGUF form not here" if skipped else "PASS")
    lines.insert(1, parity.FormResult("merged/", 0.5, ended=4, same_tokens=4))
    last = parity.result_table(lines).splitlines()[-1]
    assert last == ("merged/ PASS; 1 GGUF form not here" if skipped else "PASS")  # no GGUF is said to pass unchecked
    lines[1].faults.append("logits too far off")
    assert parity.result_table(lines).splitlines()[-1].startswith("FAIL")
    del lines[1]
    (tmp_path / "README.md").write_text("# out\n", "utf-8")
    parity.write_to_card(tmp_path, lines, "peft 1")
    assert f"## Exported forms: {said}\n" in (tmp_path / "README.md").read_text("utf-8")


def _wrong_template(monkeypatch) -> None:
    right = gguf_tokenizer.token_fields
    other = {"tokenizer.chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"}
    monkeypatch.setattr(gguf_tokenizer, "token_fields", lambda *args: {**right(*args), **other})


def _no_permutation(monkeypatch) -> None:
    monkeypatch.setattr(gguf_writer, "PERMUTED", {})


def _no_scale(monkeypatch) -> None:
    right = gguf_writer.adapter_config.read_adapter_config
    monkeypatch.setattr(
        gguf_writer.adapter_config, "read_adapter_config", lambda folder: {**right(folder), "lora_alpha": 0.001}
    )


@NO_LLAMA
@pytest.mark.parametrize(
    ("breakage", "broken", "words"),
    [
        (_wrong_template, "merged-f16.gguf", "other template tokens"),
        (_no_permutation, "merged-f16.gguf", "logits too far off"),
        (_no_scale, "adapter.gguf", "logits too far off"),
    ],
)
def test_a_broken_export_fails_the_proof(run, monkeypatch, breakage, broken, words):
    merge.merge_adapter(run)
    breakage(monkeypatch)
    lines = gguf.export_gguf(run, ["f16"])
    line = next(one for one in lines if one.form == broken)
    assert line.verdict == "FAIL" and words in line.faults
