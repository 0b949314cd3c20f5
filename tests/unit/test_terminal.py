"""What is printed fits a terminal, is broken at words only, and goes through a pipe as it is."""

from __future__ import annotations

import io
import re

import pytest

from lora_practice.console.terminal import StreamPrinter, columns, fit_to_terminal
from lora_practice.console.text import visible

STORY = "I'm sorry for your loss. I'm here to help you with any printer issues you're experiencing, if any.\n\n" * 3
MIXED = "验证集从不参与训练：它变差而训练还在变好，就是过拟合（overfitting）。看 lora-practice report 的曲线，" * 3


class Screen(io.StringIO):
    """A terminal, as far as a writer can tell."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(params=[80, 31])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


@pytest.mark.parametrize("words", [STORY, MIXED, "  - " + STORY, ""])
def test_lines_fit_and_no_word_is_broken_or_lost(words: str, width: int) -> None:
    said = fit_to_terminal(words, Screen())
    assert all(columns(line) <= width for line in said.splitlines())
    assert re.sub(r"\s", "", said) == re.sub(r"\s", "", words)
    assert set(re.findall(r"[a-z']+", said)) == set(re.findall(r"[a-z']+", words))
    assert fit_to_terminal(words, io.StringIO()) == words


def test_a_command_is_never_broken() -> None:
    command = "pip install torch==2.8.0+cu126 --extra-index-url https://download.pytorch.org/whl/cu126"
    for words in (
        f"{STORY[:100]}no kernels for this card -> {command}",
        f"没有这张卡的内核 → {command}",
        f"  {command}",
    ):
        assert fit_to_terminal(words, Screen()).splitlines()[-1].endswith(command)
    assert fit_to_terminal(f"once more:\n  {command}", Screen()) == f"once more:\n  {command}"
    assert fit_to_terminal("no such folder -> python fine.py", Screen()) == "no such folder -> python fine.py"


@pytest.mark.parametrize("words", [STORY, MIXED, "def f():\n    return 1\n", "  ", "", "w" * 200])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_an_answer_is_typed_as_it_comes_and_ends_its_lines_at_words(words: str, size: int, width: int) -> None:
    screen, pipe = Screen(), io.StringIO()
    for stream, column in ((screen, 7), (pipe, 7)):
        typing = StreamPrinter(stream, column)
        for start in range(0, len(words), size):
            typing.add(words[start : start + size])
        typing.end()
    assert pipe.getvalue() == words
    said = screen.getvalue()
    assert re.sub(r"\s", "", said) == re.sub(r"\s", "", words)
    assert set(re.findall(r"[a-z']+", said)) == set(re.findall(r"[a-z']+", words))
    if "w" * 200 not in words:
        assert all(columns(line) <= width for line in ("x" * 7 + said).splitlines())
    if "def" in words:
        assert said == words


def test_of_an_answer_no_more_than_a_word_waits() -> None:
    screen = Screen()
    typing = StreamPrinter(screen)
    typing.add("one two thr")
    assert screen.getvalue() == "one two"
    typing.add("ee ")
    typing.add("four")
    assert screen.getvalue() == "one two three"
    typing.end()
    assert screen.getvalue() == "one two three four"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("a\x1b[31mb\r\x07", "a\\x1b[31mb\\r\\x07"),
        ("ab\u202ecd\u2066", "ab\\u202ecd\\u2066"),
        ("pass\u200bword\ufeff\u00ad", "pass\\u200bword\\ufeff\\xad"),
        ("hi\U000e0041\U000e007f", "hi\\U000e0041\\U000e007f"),  # tags: text that nobody sees
        ("你好\t👩‍👩‍👧 नमस्ते\n", "你好\t👩‍👩‍👧 नमस्ते\n"),  # joiners of emoji, marks of scripts
    ],
)
def test_what_nobody_sees_or_what_steers_a_terminal_is_shown_as_its_code(words: str, shown: str) -> None:
    assert visible(words) == shown
