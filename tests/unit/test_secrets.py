"""A token shows in no traceback, and `.env` should be the user's alone; runs: tests/tiny/test_token_in_runs.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bad_inputs import enter

from lora_practice.console.errors import entry_point
from lora_practice.console.text import without_tokens
from lora_practice.sources.environment import prepare_environment

TOKEN = "hf_" + "kXr7" * 8 + "Qz"
ODD = "no-pattern-knows-this-token"
posix = pytest.mark.skipif(os.name == "nt", reason="rights of files are those of POSIX")


@pytest.mark.parametrize("token", [TOKEN, ODD])
def test_an_unexpected_error_keeps_its_traceback_without_the_token(
    token: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)

    @entry_point
    def main(argv: list[str]) -> int:
        raise ValueError(f"Illegal header value b'Bearer {token}'")  # what HTTP libraries say

    said = enter(main, capsys)
    assert said.code == 1 and "Traceback" in said.err and "Illegal header value b'Bearer ***'" in said.err
    assert token not in said.out + said.err


def test_an_unexpected_error_without_a_token_is_pythons_own() -> None:
    @entry_point
    def main(argv: list[str]) -> int:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        main([])


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            "https://me:Geheim/1@mirror.example/api",
            "https://me:Geheim/1@mirror.example/api",
        ),  # no address: a "/" ends it
        ("https://me:geheim@mirror.example cannot be reached", "https://***@mirror.example cannot be reached"),
        ("proxy http://:geheim@10.0.0.1:8080, socks5://u:p%40ss@h", "proxy http://***@10.0.0.1:8080, socks5://***@h"),
        ("https://mirror.example:8080/a@b:c", "https://mirror.example:8080/a@b:c"),
        ("git://git@example.org/x", "git://git@example.org/x"),  # a name alone is no password
    ],
)
def test_a_password_in_an_address_is_hidden(words: str, shown: str) -> None:
    assert without_tokens(words) == shown


@pytest.mark.parametrize(
    "words", ["hf_transformers_backend", "shf_" + "a" * 40, "hf_short", "HuggingFaceTB/SmolLM2-135M", "checkpoint-100"]
)
def test_what_is_no_token_is_left_as_it_is(words: str) -> None:
    assert without_tokens(words) == words


@posix
@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [
        (f"HF_TOKEN={TOKEN}\n", 0o644, True),
        (f"# mine\nexport HF_TOKEN = '{TOKEN}'\n", 0o640, True),
        (f"HF_TOKEN={TOKEN}\n", 0o600, False),
        ("HF_TOKEN=\nHF_HOME=/tmp\n", 0o644, False),
        ("# HF_TOKEN=hf_...\nHF_HOME=/tmp\n", 0o644, False),
    ],
)
def test_a_token_that_others_may_read_is_said_in_one_line(
    content: str,
    mode: int,
    told: bool,
    no_hub: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for name in ("HF_TOKEN", "HF_HOME"):
        monkeypatch.setenv(name, "")  # brought back afterwards
        monkeypatch.delenv(name)
    (tmp_path / ".env").write_text(content, "utf-8")
    (tmp_path / ".env").chmod(mode)
    prepare_environment()
    line = "note: others on this machine can read the token in .env -> chmod 600 .env\n"
    assert capsys.readouterr().err == (line if told else "")
    assert os.environ.get("HF_TOKEN", "") == (TOKEN if "Qz" in content else "")
