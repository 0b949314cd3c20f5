"""Flags, their spellings and their limits; a learner's wrong edit of a default is caught too."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from dataclasses import dataclass
from typing import Any, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refusal_of

from fine_tuning_practice import TrainSettings
from inference import InferenceSettings
from lora_practice.console.errors import UserError
from lora_practice.console.settings import (
    as_flags,
    given_as_flags,
    given_by_user,
    markdown_table,
    parse,
    setting,
    validate,
)
from lora_practice.sources.find import SHIPPED


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")


@dataclass
class Small:
    """One field of each kind."""

    count: int = setting(3, "数", "count", minimum=-1, maximum=2**32)
    rate: float = setting(0.5, "率", "rate", above=0, maximum=1)
    name: str = setting("a", "名", "name")
    mode: str = setting("auto", "式", "mode", choices=("auto", "on", "off"), bare="on")
    deep: bool = setting(False, "深", "deep")
    keep: Optional[int] = setting(None, "留", "keep", minimum=1)
    ask: Optional[list[str]] = setting(None, "问", "ask")
    tags: list[str] = setting(["x"], "签", "tags")


def read(*argv: str, cls: Any = Small) -> Any:
    return parse(cls, list(argv), "prog", "what it does")


def refusal(*argv: str, cls: Any = Small) -> str:
    return refusal_of(read, *argv, cls=cls)


def test_nothing_given_leaves_every_default() -> None:
    assert read() == Small()
    assert read(cls=TrainSettings) == TrainSettings()


@pytest.mark.parametrize("flag", ["--per_device_train_batch_size", "--per-device-train-batch-size"])
@pytest.mark.parametrize("joined", [True, False])
def test_both_spellings(flag: str, joined: bool) -> None:
    argv = [f"{flag}=4"] if joined else [flag, "4"]
    assert read(*argv, cls=TrainSettings).per_device_train_batch_size == 4


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--deep"], True),
        (["--no-deep"], False),
        (["--no_deep"], False),
        (["--no-deep", "--deep"], True),
        (["--deep", "--no-deep"], False),
        (["--deep=false"], False),
        (["--deep", "YES"], True),
    ],
)
def test_booleans(argv: list[str], value: bool) -> None:
    assert read(*argv).deep is value


def test_a_bare_flag_stands_for_its_value() -> None:
    assert read("--mode").mode == "on"
    assert read("--no-mode").mode == "off"
    assert read("--mode", "AUTO").mode == "auto"
    assert read("--no_mode").mode == "off"
    assert read("--gradient-checkpointing", cls=TrainSettings).gradient_checkpointing == "on"


def test_a_repeated_flag_gathers_a_list() -> None:
    assert read("--ask", "Hi", "--ask", "Bye").ask == ["Hi", "Bye"]
    assert read("--tags", "y").tags == ["y"]
    assert read("--prompt", "Hi there", cls=InferenceSettings).prompt == ["Hi there"]


def test_all_problems_come_in_one_line() -> None:
    line = refusal("--cuont", "7", "--rate", "2", "--mode", "onn", "--deep=maybe", "--count", "1.5", "--keep")
    for part in (
        "unknown flag --cuont, did you mean --count?",
        "--rate needs a value <= 1, got 2.0",
        "the nearest is on",
        "--deep needs true or false, got 'maybe'",
        "--count needs a whole number, got '1.5'",
        "--keep needs a value",
        "prog --help",
    ):
        assert part in line
    assert "'7'" not in line  # the value of an unknown flag is no second mistake


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("--lora_rank", "--lora_r"),
        ("--learning-rte=1", "--learning_rate"),
        ("--merge", "--merge_adapter"),
        ("--no-merge_adaptor", "--no_merge_adapter"),
        ("--max_seq_length", "--max_length"),
    ],
)
def test_an_unknown_flag_names_the_nearest(wrong: str, near: str) -> None:
    assert f"did you mean {near}?" in refusal(wrong, cls=TrainSettings)


def test_an_abbreviation_is_not_guessed() -> None:
    assert "did you mean --learning_rate?" in refusal("--learning", "1", cls=TrainSettings)


def test_a_stray_word_is_named() -> None:
    assert refusal("hello") == "unexpected argument 'hello' -> see prog --help"


@given(st.integers(-1, 2**32))
def test_whole_numbers_come_back(number: int) -> None:
    assert read("--count", str(number)).count == number


@given(st.floats(0, 1, exclude_min=True))
def test_fractions_come_back(number: float) -> None:
    assert read("--rate", repr(number)).rate == number


@given(st.text().filter(lambda word: not word.startswith("-")))
def test_any_text_comes_back(word: str) -> None:
    assert read("--name", word).name == word
    assert read(f"--ask={word}").ask == [word]


@given(st.lists(st.text(alphabet="0123456789_+-.einaf １é", max_size=40), min_size=1, max_size=2))
def test_any_text_for_numbers_is_read_or_refused(words: list[str]) -> None:
    """Nothing but a UserError may come out, whatever stands after a flag."""
    try:
        got = read(f"--count={words[0]}", f"--rate={words[-1]}")
    except UserError:
        return
    assert type(got.count) is int
    assert math.isfinite(got.rate) and 0 < got.rate <= 1


@given(st.lists(st.text(max_size=12), max_size=6))
def test_any_command_line_is_read_or_refused(argv: list[str]) -> None:
    if "-h" in argv or "--help" in argv:
        return
    try:
        parse(TrainSettings, argv, "prog", "what it does")
    except UserError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("field", "edited", "word"),
    [
        ("lora_r", "8", "--lora_r needs a whole number, got '8'"),
        ("lora_r", True, "--lora_r needs a whole number"),
        ("lora_r", 8.0, "--lora_r needs a whole number"),
        ("lora_r", 0, "--lora_r needs a value >= 1"),
        ("learning_rate", "2e-4", "--learning_rate needs a number"),
        ("learning_rate", float("nan"), "a finite number"),
        ("learning_rate", 10**400, "--learning_rate needs a value <= 1"),
        ("packing", "yes", "--packing needs True or False"),
        ("packing", 1, "--packing needs True or False"),
        ("model_name", None, "--model_name needs text"),
        ("optim", "adamw", "the nearest is adamw_torch"),
        ("save_strategy", "epochs", "the nearest is epoch"),
    ],
)
def test_a_wrongly_edited_default_is_caught(field: str, edited: Any, word: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(dataclasses.replace(TrainSettings(), **{field: edited}))
    assert word in str(caught.value)


def test_a_whole_number_is_a_fine_fraction() -> None:
    validate(dataclasses.replace(TrainSettings(), num_train_epochs=3))


def test_what_the_user_meant() -> None:
    """The same words as the default, given as a flag, are meant; so is an edited default."""
    assert given_by_user(read(cls=TrainSettings), SHIPPED) == set()
    assert given_by_user(read("--model-name", SHIPPED["model_name"], cls=TrainSettings), SHIPPED) == {"model_name"}
    assert given_by_user(dataclasses.replace(TrainSettings(), model_name="me/mine"), SHIPPED) == {"model_name"}


def test_settings_as_flags_give_the_same_settings() -> None:
    words = (
        "--packing",
        "--no_assistant_only_loss",
        "--max_steps",
        "3",
        "--save_total_limit",
        "2",
        "--fast",
        "--seed=7",
    )
    settings = read(*words, cls=TrainSettings)
    flags = as_flags(settings, given_as_flags(settings))
    assert set(flags) == {*words[:-2], "on", "--seed", "7", "--fast"}
    assert read(*flags, cls=TrainSettings) == settings


def test_the_defaults_are_the_shipped_ones() -> None:
    assert {name: getattr(TrainSettings(), name) for name in SHIPPED} == SHIPPED


def test_the_table_shows_every_default(monkeypatch: pytest.MonkeyPatch) -> None:
    table = markdown_table(TrainSettings)
    assert "| `packing` | `False` |" in table
    assert "| `eval_subset_size` | `0` |" in table
    assert "| `save_total_limit` | none |" in table
    assert len(table.splitlines()) == 2 + len(dataclasses.fields(TrainSettings))
    monkeypatch.setenv("LORA_PRACTICE_LANG", "zh")
    assert "| `save_total_limit` | 无 |" in markdown_table(TrainSettings)


def test_the_help_shows_the_common_settings_first_and_each_setting_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for language, common, advanced in (("zh", "常用选项：", "高级选项 · LoRA："), ("en", "common options:", "LoRA:")):
        monkeypatch.setenv("LORA_PRACTICE_LANG", language)
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as page:
            read("--help", cls=TrainSettings)
        lines = page.getvalue().splitlines()
        assert lines[4] == common
        first = lines[lines.index(common) : lines.index("", lines.index(common))]
        shown = [line.split()[0] for line in first if line.startswith("  --")]
        assert shown == [f"--{field.name}" for field in dataclasses.fields(TrainSettings) if field.metadata["common"]]
        assert 10 <= len(shown) <= 15 and any(line.endswith(advanced) for line in lines)
        every = [line.split()[0] for line in lines if line.startswith("  --")]
        assert sorted(every) == sorted(f"--{field.name}" for field in dataclasses.fields(TrainSettings))
