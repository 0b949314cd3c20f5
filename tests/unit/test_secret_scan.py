"""Secrets inside what is sent are found, behind escapes, in base64, over two lines; ordinary words are none."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from urllib.parse import quote

import pytest

from lora_practice.console.errors import UserError
from lora_practice.console.text import without_tokens
from lora_practice.export.hub.secret_scan import SCAN_BYTES, scan_file

TOKEN = "hf_" + "kXr7" * 8 + "Qz"
ODD = "no-pattern-knows-this-token"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
LONG = "".join(random.Random(7).choices(LETTERS, k=120))

# how a token may stand in a file: directly behind the last letter of an escape, or with an escape inside
ESCAPED = {
    "a line break in JSON": json.dumps({"note": f"token:\n{TOKEN}"}),
    "a tab in JSON": json.dumps({"note": f"token:\t{TOKEN}"}),
    "JSON inside JSON": json.dumps(json.dumps({"note": f"token:\n{TOKEN}"})),
    "a quoted URL": quote(f"token={TOKEN}", safe=""),
    "a URL quoted twice": quote(quote(f"token={TOKEN}", safe=""), safe=""),
    "unicode": f"token\\u003d{TOKEN}",
    "long unicode": f"token\\U0000003d{TOKEN}",
    "hexadecimal": f"token\\x3d{TOKEN}",
    "octal": f"token\\075{TOKEN}",
    "a mail": f"token=3D{TOKEN}",
}
ESCAPED_INSIDE = {
    "unicode": TOKEN.replace("_", "\\u005f"),
    "its first letter": "\\u0068" + TOKEN[1:],
    "a URL": TOKEN.replace("_", "%5F"),
    "HTML": TOKEN.replace("_", "&#95;"),
    "hexadecimal HTML": TOKEN.replace("h", "&#x68;", 1),
}


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    monkeypatch.delenv("HF_TOKEN", raising=False)


def scan(folder: Path, content: str | bytes, name: str = "notes.md", token: str = "") -> None:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    scan_file(path, name, token, ())


@pytest.mark.parametrize("content", ESCAPED.values(), ids=ESCAPED)
def test_an_escape_before_a_token_hides_it_neither_from_the_scan_nor_from_redaction(
    content: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"notes\.md:1: .*Hugging Face token"):
        scan(tmp_path, content)
    assert TOKEN not in without_tokens(content) and "***" in without_tokens(content)


@pytest.mark.parametrize("content", ESCAPED_INSIDE.values(), ids=ESCAPED_INSIDE)
def test_an_escape_inside_a_token_does_not_hide_it_from_the_scan(content: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Hugging Face token"):
        scan(tmp_path, f"key: {content}\n")


@pytest.mark.parametrize("before", ["", "x", "xy", "Bearer ", "user:" * 20, "user:" * 20 + "a", "user:" * 20 + "ab"])
@pytest.mark.parametrize("token", [TOKEN, ODD])
@pytest.mark.parametrize("broken", [False, True], ids=["one line", "lines"])
def test_a_token_in_base64_is_found_whatever_stands_before_it(
    before: str, token: str, broken: bool, tmp_path: Path
) -> None:
    content = f"{before}{token} and more".encode()
    encoded = base64.encodebytes(content) if broken else base64.b64encode(content)
    with pytest.raises(UserError, match="base64"):
        scan(tmp_path, b"data: " + encoded, token=ODD)


@pytest.mark.parametrize("at", [3, 4, 10, 36])
@pytest.mark.parametrize("between", ["\n", "\r\n", " \\\n    ", "\n> ", "\n# "])
def test_a_token_over_two_lines_is_found(at: int, between: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Hugging Face token"):
        scan(tmp_path, f"first\nkey {TOKEN[:at]}{between}{TOKEN[at:]} is mine\n")
    with pytest.raises(UserError, match="Hugging Face token"):
        scan(tmp_path, json.dumps({"cell": f"key {TOKEN[:at]}\n{TOKEN[at:]}\n"}), "notes.json")


def test_the_users_own_token_is_found_over_two_lines(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="HF_TOKEN"):
        scan(tmp_path, f"key {ODD[:9]}\n  {ODD[9:]}\n", token=ODD)


SECRETS = {
    "sk-" + LONG[:48]: "API key",
    "sk-" + LONG[:32].lower(): "API key",
    "sk-ant-api03-" + LONG[:60]: "API key",
    "sk-proj-" + LONG[:60]: "API key",
    "github_pat_" + LONG[:22] + "_" + LONG[:59]: "GitHub token",
    "ghp_" + LONG[:36]: "GitHub token",
    "gho_" + LONG[:36]: "GitHub token",
    "glpat-" + LONG[:20]: "GitLab token",
    "AIza" + LONG[:35]: "Google API key",
    "pypi-AgEIcHlwaS5vcmc" + LONG[:80]: "PyPI token",
    "AKIA" + "Q7" * 8: "AWS key",
    "ASIA" + "Q7" * 8: "AWS key",
    f"aws_secret_access_key = {LONG[:40]}": "AWS key",
    f'"AWS_SECRET_ACCESS_KEY": "{LONG[:40]}"': "AWS key",
    "xoxb-123456789012-" + LONG[:24]: "Slack token",
    "machine huggingface.co\n  login me\n  password s3cret-word\n": "netrc",
    "https://me:s3cret-word@example.com/simple": "password in a URL",
    "git+ssh://me:s3cret@[::1]/x.git": "password in a URL",
    "postgresql://me:p%40ss1@db:5432/x": "password in a URL",
    "-----BEGIN RSA PRIVATE KEY-----": "private key",
    json.dumps({"private_key": "-----BEGIN PRIVATE KEY-----\nMIIE"}): "private key",
    "PuTTY-User-Key-File-3: ssh-ed25519": "private key",
}


@pytest.mark.parametrize(("secret", "kind"), SECRETS.items(), ids=[one[:24] for one in SECRETS])
@pytest.mark.parametrize("around", ["a line\n{}\n", '{{"text": "{}"}}', "token%3D{}", "one\\n{}"])
def test_each_kind_of_secret_is_named(secret: str, kind: str, around: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="looks like a secret") as refusal:
        scan(tmp_path, around.format(secret), "notes.txt")
    assert f"({kind})" in str(refusal.value) and LONG[:20] not in str(refusal.value)


NAMES = ".env .env.local .envrc .netrc _netrc .pypirc .npmrc .git-credentials .htpasswd id_rsa id_ed25519 x.pem x.KEY"
NAMES += " credentials credentials.json client_secret_12.apps.json kaggle.json token stored_tokens"


@pytest.mark.parametrize("name", NAMES.split())
def test_a_file_that_holds_secrets_by_its_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a file of this name holds secrets"):
        scan(tmp_path, "A=1", name)


WORDS = (
    "sk-learn, sk-learn-contrib, task-specific and risk-averse; a disk-0123456789abcdefghijklmnop",
    "pypi-mirror and pypi-mirror-of-tsinghua-university; pypi-AgE",
    "HF_TOKEN=hf_... hf_xxx hf_hub_download hf_transfer\nadministration_of_tokens hf_hub\nOtherwiseSomething",
    "shf_" + "a" * 40 + " hf_transformers_backend %20hf_short \\nhf_short",
    "github_pat_... ghp_xxx glpat-xxx AIza... AKIA... sk-ant-... sk-proj-my-own-project-and-its-name",
    "https://user:password@example.com http://user:pass@proxy:8080 http://me:${TOKEN}@host https://u:<token>@h",
    "http://127.0.0.1:8000/a@b https://huggingface.co:443/x git@github.com:a/b.git http://[::1]:80/",
    "a machine to login with; machine HOST login NAME password <yours>",
    "PRIVATE KEY; -----BEGIN CERTIFICATE-----; -----BEGIN PUBLIC KEY-----",
    "aGZf and oZl8 are base64 for a few letters: " + base64.b64encode(b"hf_hub_download").decode(),
    base64.b64encode(random.Random(3).randbytes(60_000)).decode(),
    base64.encodebytes(random.Random(4).randbytes(60_000)).decode(),
)


@pytest.mark.parametrize("words", WORDS, ids=[one[:20] for one in WORDS])
def test_words_about_tokens_are_none(words: str, tmp_path: Path) -> None:
    scan(tmp_path, words)


def test_random_weights_are_no_secret(tmp_path: Path) -> None:
    scan(tmp_path, random.Random(5).randbytes(3 << 20), "x.safetensors", ODD)


def test_the_line_is_right_in_a_long_file(tmp_path: Path) -> None:
    filler = "a line of a file that is long\n"
    count = 3 * SCAN_BYTES // len(filler)
    with pytest.raises(UserError, match=rf"notes\.md:{count + 1}: "):
        scan(tmp_path, filler * count + f"one\\n{TOKEN}\nthe end\n")
