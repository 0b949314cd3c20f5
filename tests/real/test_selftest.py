"""`lora-practice selftest resume`: the proof a user sees, and that it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from bad_inputs import enter

from lora_practice.cli import main as cli
from lora_practice.console.errors import UserError
from lora_practice.model.adapter_config import ADAPTER_WEIGHTS
from lora_practice.run import selftest
from lora_practice.storage.json_files import RECORD

ROOT = Path(__file__).resolve().parents[2]


# found by each Python that the selftest starts, and seen by it before anything else
FORGETFUL = """
import sys
if "--resume" in sys.argv:
    import torch
    torch.optim.Optimizer.load_state_dict = lambda self, state: None
"""


def test_the_proof_passes_leaves_nothing_behind_and_would_see_one_other_bit(
    tmp_path: Path, embedded_rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three real trainings; before they are compared, one bit is changed in each file in turn, and one loss."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    (tmp_path / "data").mkdir()
    for name in ("typer.py", "torch.py", "pip.py"):  # beside a data set, say: none of our processes runs them
        (tmp_path / "data" / name).write_text("raise SystemExit('a module of the current folder was run')")
    monkeypatch.chdir(tmp_path / "data")
    compare, seen = selftest._differences, {}

    def compare_spoiled(first: Path, second: Path) -> list[str]:
        for name in (*selftest.COMPARED_FILES, RECORD):
            whole = (second / name).read_bytes()
            spoiled = bytearray(whole)
            spoiled[len(whole) // 2] ^= 1
            if name == RECORD:
                record = json.loads(whole)
                record["losses"][-1]["loss"] += 1e-4
                spoiled = bytearray(json.dumps(record).encode())
            (second / name).write_bytes(spoiled)
            seen[name] = compare(first, second)
            (second / name).write_bytes(whole)
        return compare(first, second)

    monkeypatch.setattr(selftest, "_differences", compare_spoiled)
    done = enter(cli, capsys, "selftest", "resume")
    assert done.code == 0 and done.out.startswith("PASS: adapter, losses of 8 steps, optimizer")
    said = [line for line in done.err.splitlines() if line[1:3] == "/3"]
    assert [line[:3] for line in said] == ["1/3", "2/3", "3/3"] and "with step" in said[2]
    assert seen == {**{name: [name] for name in selftest.COMPARED_FILES}, RECORD: ["losses"]}
    assert not list((tmp_path / "tmp").glob("lora-practice-*"))  # torch leaves an empty folder of its own


def test_a_resume_that_forgets_the_optimizer_does_not_pass(
    tmp_path: Path, embedded_rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three real trainings again; the one that resumes keeps the moments of a new AdamW."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "sitecustomize.py").write_text(FORGETFUL, "utf-8")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("LORA_PRACTICE_LANG", "zh")
    done = enter(cli, capsys, "selftest", "resume")
    assert done.code == 1 and done.out.startswith("不通过：不一样的有 ")
    named = done.out.strip().partition(" ")[2].split(", ")
    assert named == [ADAPTER_WEIGHTS, f"checkpoint-{selftest.STEPS}/optimizer.pt", "losses"]  # not the rate, nor RNG
    assert not list((tmp_path / "tmp").glob("lora-practice-*"))


def test_a_training_that_fails_shows_its_words_and_the_cure_is_the_selftests_own(tmp_path, capsys) -> None:
    words = "Error: out/run: not enough disk -> free some, go on with --resume"
    (tmp_path / "run.log").write_text(words, "utf-8")
    failed = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"], text=True)
    with pytest.raises(UserError) as caught:
        selftest._end(failed, tmp_path / "run")
    assert words in capsys.readouterr().err
    assert "selftest" in str(caught.value) and str(caught.value).endswith("name another place in TMPDIR")
