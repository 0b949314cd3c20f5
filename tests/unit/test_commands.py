"""`lora-practice`: every command has help in both languages, a mistake costs one line, and shells complete it."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
from test_entry_points import CLI, HEAVY, run

from lora_practice.cli import app, main
from lora_practice.console.terminal import columns

COMMANDS = [info.callback.__name__.replace("_", "-") for info in app.registered_commands if info.callback]


@pytest.fixture(scope="module")
def help_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """`lora-practice COMMAND --help` in a language, run once; the English one with its imports on stderr."""

    @functools.cache
    def ask(command: str, lang: str) -> Any:
        place = tmp_path_factory.mktemp("help")
        imports = {"PYTHONPROFILEIMPORTTIME": "1"} if lang == "en" else {}
        done = run(place, (*CLI, command), "--help", lang=lang, **imports)
        assert done.code == 0 and list(place.iterdir()) == []
        return done

    return ask


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_explains_itself_in_both_languages_without_the_libraries(command: str, help_of: Any) -> None:
    chinese, english = help_of(command, "zh"), help_of(command, "en")
    assert "选项" in chinese.out
    assert not any("\u4e00" <= letter <= "\u9fff" for letter in english.out)
    assert all(columns(line) <= 80 for line in (chinese.out + english.out).splitlines())
    assert not {line.rpartition("|")[2].strip() for line in english.err.splitlines()} & set(HEAVY)


def test_the_help_names_every_command(tmp_path: Path) -> None:
    assert run(tmp_path, CLI).out == run(tmp_path, CLI, "-h").out
    listed = run(tmp_path, CLI, "--help").out
    assert all(f"  {name} " in listed for name in COMMANDS)


def test_an_entry_point_calls_itself_as_it_was_started(tmp_path: Path, help_of: Any) -> None:
    """The page is the same but for the name in it, and so is the remedy of a mistake."""
    for command, script in (("train", "fine_tuning_practice.py"), ("infer", "inference.py")):
        page = help_of(command, "en").out
        assert page.startswith(f"usage: lora-practice {command} [options]\n")
        assert page.replace(f"lora-practice {command} [", f"{script} [") == run(tmp_path, (script,), "--help").out
        mistake = run(tmp_path, (*CLI, command), "--no-such-flag").err
        assert mistake.endswith(f"-> see lora-practice {command} --help\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_are_shown_with_underscores_and_sentences_begin_in_one_column(command: str, help_of: Any) -> None:
    page = help_of(command, "zh").out
    flags = {word.strip(",.，") for word in page.split() if word.startswith("--")}
    assert flags and not {flag for flag in flags if "-" in flag[2:]}
    rows = [re.match(r"  (-h, --help|\S+(?: \S+)??)  +(?=\S)", line) for line in page.splitlines()]
    assert len({columns(row.group()) for row in rows if row}) == 1


@pytest.mark.parametrize("command", ["merge", "inspect", "report", "chat", "compare", "export"])
def test_without_a_folder_a_command_takes_the_default_one(command: str, tmp_path: Path, help_of: Any) -> None:
    said = run(tmp_path, (*CLI, command)).err
    where = "Error: outputs/SmolLM2-FT-MyDataset: no such folder: nothing has been trained yet"
    assert said == f"{where} -> train first: lora-practice train, or name a folder\n"
    page = help_of(command, "en").out
    assert "(default outputs/SmolLM2-FT-MyDataset" in re.sub(r"\s+", " ", page)


@pytest.mark.parametrize("command", ["chat", "compare", "merge", "export", "inspect", "report"])
def test_a_folder_given_with_the_flag_of_another_command_is_answered_with_the_right_form(
    command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lang, said in (("en", "the folder goes without a flag: "), ("zh", "文件夹直接写在命令后面：")):
        monkeypatch.setenv("LORA_PRACTICE_LANG", lang)
        with pytest.raises(SystemExit) as ended:
            main([command, "--model-dir", "outputs/mine"])
        assert ended.value.code == 2
        assert f"{said}lora-practice {command} outputs/mine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "zh", "en"),
    [
        (["mrge"], "没有 mrge 这个命令，是不是 merge？", "no such command: mrge, did you mean merge?"),
        (["--versio"], "没有 --versio 这个选项，是不是 --version？", "unknown flag --versio, did you mean --version?"),
        (["check-data"], "缺少 文件", "FILE is missing"),
        (["compare", "a", "--max-new-token=3"], "是不是 --max_new_tokens？", "did you mean --max_new_tokens?"),
        (["compare", "a", "--max-new-tokens=0"], "--max_new_tokens 应是不小于 1 的整数", "a whole number >= 1"),
        (
            ["chat", "a", "--system"],
            "--system 后面要有一个值 → lora-practice",
            "--system needs a value -> lora-practice",
        ),
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


def test_a_shell_completes_commands_and_the_flags_of_an_entry_point(tmp_path: Path) -> None:
    from fine_tuning_practice import TrainSettings

    def completed(words: str, index: int) -> list[str]:
        asked = {"_LORA_PRACTICE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(index)}
        return run(tmp_path, CLI, **asked).out.split()

    assert completed("lora-practice mer", 1) == ["merge"]
    assert completed("lora-practice train --lora-", 2) == ["--lora_r", "--lora_alpha", "--lora_dropout"]
    assert len(completed("lora-practice train --", 2)) == len(dataclasses.fields(TrainSettings))
    assert completed("lora-practice compare --max_", 2) == ["--max_new_tokens"]
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
