"""`lora-practice selftest resume`: the proof a user sees, and that it can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from journey_harness import run, succeeded

from lora_practice.console.errors import UserError
from lora_practice.run import selftest

CLI = ("-m", "lora_practice.cli")


def test_the_proof_passes_and_leaves_nothing_behind(tmp_path: Path, embedded_rows: Path) -> None:
    (tmp_path / "tmp").mkdir()
    done = succeeded(run(tmp_path, *CLI, "selftest", "resume", TMPDIR=str(tmp_path / "tmp")))
    assert done.stdout.startswith("PASS: adapter, losses of 8 steps, optimizer")
    said = done.stderr.splitlines()
    assert [line[:3] for line in said] == ["1/3", "2/3", "3/3"]
    assert "with step" in said[2]
    assert not list((tmp_path / "tmp").glob("lora-practice-*"))  # torch leaves an empty folder of its own


def test_a_training_that_fails_shows_its_words_and_the_cure_is_the_selftests_own(tmp_path, capsys) -> None:
    words = "Error: out/run: not enough disk -> free some, go on with --resume"
    (tmp_path / "run.log").write_text(words, "utf-8")
    failed = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"], text=True)
    with pytest.raises(UserError) as caught:
        selftest._end(failed, tmp_path / "run")
    assert words in capsys.readouterr().err
    assert "selftest" in str(caught.value) and str(caught.value).endswith("for more room, name another place in TMPDIR")


@pytest.mark.parametrize("spoiled", [*selftest.COMPARED_FILES, "losses"])
def test_the_proof_fails_where_one_bit_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoiled: str
) -> None:
    """With runs made here, since the true ones do not differ: the comparison is what is tested."""

    def train(folder: Path, *flags: str) -> None:
        for name in selftest.COMPARED_FILES:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x" if flags and name == spoiled else b"y")
        loss = 1.0 if flags and spoiled == "losses" else 1.5
        (folder / "run_record.json").write_text(json.dumps({"steps": 8, "losses": [{"step": 1, "loss": loss}]}))

    monkeypatch.setenv("LORA_PRACTICE_LANG", "zh")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(selftest, "_start", train)
    monkeypatch.setattr(selftest, "_end", lambda *_: None)
    monkeypatch.setattr(selftest, "_kill_midway", lambda _: 2)
    assert selftest.run_selftest("resume") == 1
    assert capsys.readouterr().out == f"不通过：不一样的有 {spoiled}\n"
