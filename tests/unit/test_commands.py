"""`lora-practice`: every verb has help in both languages, a mistake costs one line, and shells complete it."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_entry_points import CLI, HEAVY, run

from lora_practice.cli import app
from lora_practice.console.terminal import columns

VERBS = [info.callback.__name__.replace("_", "-") for info in app.registered_commands if info.callback]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_explains_itself_in_both_languages_without_the_libraries(verb: str, tmp_path: Path) -> None:
    chinese = run(tmp_path, (*CLI, verb), "--help", lang="zh")
    english = run(tmp_path, (*CLI, verb), "--help", PYTHONPROFILEIMPORTTIME="1")
    assert chinese.code == english.code == 0
    assert "选项" in chinese.out
    assert not any("\u4e00" <= letter <= "\u9fff" for letter in english.out)
    assert all(columns(line) <= 80 for line in (chinese.out + english.out).splitlines())
    assert not {line.rpartition("|")[2].strip() for line in english.err.splitlines()} & set(HEAVY)
    assert list(tmp_path.iterdir()) == []


def test_the_help_names_every_verb(tmp_path: Path) -> None:
    assert run(tmp_path, CLI).out == run(tmp_path, CLI, "-h").out
    listed = run(tmp_path, CLI, "--help").out
    assert all(f"  {verb} " in listed for verb in VERBS)


def test_a_door_is_the_same_door_behind_its_verb(tmp_path: Path) -> None:
    for verb, door in (("train", "fine_tuning_practice.py"), ("infer", "inference.py")):
        assert run(tmp_path, (*CLI, verb), "--help").out == run(tmp_path, (door,), "--help").out


@pytest.mark.parametrize(
    ("words", "zh", "en"),
    [
        (["mrge"], "没有 mrge 这个命令，是不是 merge？", "no such command: mrge, did you mean merge?"),
        (["--versio"], "没有 --versio 这个选项，是不是 --version？", "unknown flag --versio, did you mean --version?"),
        (["merge"], "缺少 文件夹", "FOLDER is missing"),
        (["merge", "a", "b"], "多余的参数：b", "unexpected argument: b"),
        (["merge", "a", "--x"], "没有 --x 这个选项", "unknown flag --x"),
    ],
)
def test_a_mistake_in_the_words_costs_one_line(words: list[str], zh: str, en: str, tmp_path: Path) -> None:
    for lang, expected in (("zh", zh), ("en", en)):
        done = run(tmp_path, CLI, *words, lang=lang)
        assert (done.code, done.out) == (2, "")
        (line,) = done.err.splitlines()
        assert expected in line


def test_a_shell_completes_verbs_and_the_flags_of_a_door(tmp_path: Path) -> None:
    from fine_tuning_practice import TrainSettings

    def completed(words: str, index: int) -> list[str]:
        asked = {"_LORA_PRACTICE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(index)}
        return run(tmp_path, CLI, **asked).out.split()

    assert completed("lora-practice mer", 1) == ["merge"]
    assert completed("lora-practice train --lora-", 2) == ["--lora_r", "--lora_alpha", "--lora_dropout"]
    assert len(completed("lora-practice train --", 2)) == len(dataclasses.fields(TrainSettings))
    assert completed("lora-practice train --lora_r 8 --see", 4) == ["--seed"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_completion_is_installed_for_the_shell_that_asks(tmp_path: Path) -> None:
    command = f"{sys.executable} -m lora_practice.cli --install-completion; true"
    root = Path(__file__).resolve().parents[2]
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(root)}
    done = subprocess.run(["bash", "-c", command], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "bash completion installed" in done.stdout, done.stderr
    (script,) = tmp_path.rglob("lora-practice.sh")
    assert "_LORA_PRACTICE_COMPLETE=complete_bash" in script.read_text("utf-8")
