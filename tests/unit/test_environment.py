"""Whether the Hub is there is decided at once, variables work wherever they are set, and a token is checked first."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fresh_process import in_a_process
from hub_server import WRITE_TOKEN, HubServer
from refusals import refusal_of

from lora_practice.sources import environment
from lora_practice.sources.dotenv_file import TOKEN_NAMES, load_dotenv_file

ROOT = Path(__file__).resolve().parents[2]
CLOSED = "http://127.0.0.1:9"
pytestmark = pytest.mark.usefixtures("no_hub")


# Is the Hub there?


@pytest.fixture
def deaf_hub() -> Iterator[str]:
    """URL of a server that begins an answer that takes 20 seconds: a byte now and then, so that no read times out."""
    closing = threading.Event()

    def begin_answers(server: socket.socket) -> None:
        try:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                for _ in range(100):  # an end, so that a test that waits for it fails instead of hanging
                    connection.sendall(b".")
                    if closing.wait(0.2):
                        break
        except OSError:  # the client, or this test, is gone
            pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        answering = threading.Thread(target=begin_answers, args=(server,), daemon=True)
        answering.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        closing.set()
    answering.join(10)


def test_a_hub_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
        assert environment.hub_endpoint() == hub.url
        assert environment.hub_is_reachable()
        assert environment.hub_is_reachable()
        assert len(hub.requests) == 1  # asked once
    assert os.environ["HF_HUB_OFFLINE"] == ""


def test_a_hub_that_is_down_or_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.fail(403)
        assert environment.hub_is_reachable()  # a refusal is an answer
        environment.hub_is_reachable.cache_clear()
        # by a clock that only our own pauses move: all of that time is over at once, also on a busy machine
        clock = [0.0]
        pauses = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda wait: clock.append(clock.pop() + wait))
        monkeypatch.setattr(environment, "time", pauses)
        monkeypatch.setattr(environment, "REACH_SECONDS", 60)
        hub.fail(503, times=100)
        assert not environment.hub_is_reachable()
        assert len(hub.requests) == 1 + 8
        assert environment.hub_trouble() == "the Hub answers with HTTP 503"
    environment.hub_is_reachable.cache_clear()
    assert not environment.hub_is_reachable()
    assert environment.hub_trouble() == "the Hub cannot be reached"  # nobody listens there any more


def test_a_hub_that_fails_once_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.fail(503, times=2)
        assert environment.hub_is_reachable()
        assert len(hub.requests) == 3


@pytest.mark.parametrize("endpoint", [CLOSED, "hf-mirror.com", "http://127.0.0.1:port", "http://nowhere.invalid"])
def test_no_hub_is_decided_at_once(endpoint: str, monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert not environment.hub_is_reachable()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert not [warning for warning in recwarn if "Thread" in str(warning.category)]


def test_a_hub_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "REACH_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not environment.hub_is_reachable()


def test_a_deaf_hub_costs_as_long_as_the_pages_say(deaf_hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in ("README.md", "README.en.md", "docs/training.md", "docs/training.en.md"):
        told = re.findall(r"(\d+) 秒内连不上|answer within (\d+) seconds", (ROOT / page).read_text("utf-8"))
        assert told and {float(zh or en) for zh, en in told} == {environment.REACH_SECONDS}, page
    monkeypatch.setattr(environment, "REACH_SECONDS", 0.5)
    monkeypatch.setenv("HF_ENDPOINT", deaf_hub)
    started = time.monotonic()
    assert not environment.hub_is_reachable()
    assert time.monotonic() - started < 1.5
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("word", ["1", "true", "ON", "yes"])
def test_offline_on_request_asks_nobody(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", word)
        assert not environment.hub_is_reachable()
        assert hub.requests == []


# Variables


def test_transformers_cache_still_works(tmp_path: Path) -> None:
    code = "from lora_practice.sources.environment import prepare_environment as p; p()\n"
    code += "import huggingface_hub.constants as c; print(c.HF_HUB_CACHE)"
    done = in_a_process(code, tmp_path, TRANSFORMERS_CACHE=str(tmp_path / "old"))
    assert done.stdout.strip() == str(tmp_path / "old")
    assert done.stderr.strip() == (
        f"transformers 5 ignores TRANSFORMERS_CACHE: using it as HF_HUB_CACHE={tmp_path / 'old'}"
    )
    done = in_a_process(code, tmp_path, TRANSFORMERS_CACHE=str(tmp_path / "old"), HF_HUB_CACHE=str(tmp_path / "new"))
    assert done.stdout.strip() == str(tmp_path / "new")
    assert done.stderr == ""


TOKEN_OF = "from lora_practice.sources.environment import prepare_environment as p, hub_endpoint as e; p()\n"
TOKEN_OF += "import os, huggingface_hub.constants as c\nfrom huggingface_hub.utils import build_hf_headers\n"
TOKEN_OF += "sent = build_hf_headers().get('authorization', 'Bearer none').split()[-1]\n"
TOKEN_OF += "print(e(), c.HF_HOME, os.environ.get('HF_TOKEN', 'none'), sent)"


def test_the_env_file_is_read_and_the_real_environment_wins(tmp_path: Path) -> None:
    lines = [f"HF_HOME={tmp_path / 'home'}", "HF_TOKEN=from_file", "HF_ENDPOINT=https://of.file", "PATH=/nowhere"]
    (tmp_path / ".env").write_text("\n".join(lines), "utf-8-sig")  # as Windows' Notepad saves it
    mine = {"HF_TOKEN": "from_environment", "HF_ENDPOINT": "https://mirror.example/"}
    done = in_a_process(TOKEN_OF, tmp_path, **mine)
    assert done.stdout.split() == [
        "https://mirror.example",
        str(tmp_path / "home"),
        "from_environment",
        "from_environment",
    ]


def test_what_is_withheld_is_not_sent_by_the_library(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("HF_ENDPOINT=https://evil.example", "utf-8")
    (tmp_path / "token").write_text("logged_in")  # as `hf auth login` leaves it
    done = in_a_process(TOKEN_OF, tmp_path, HF_TOKEN_PATH=str(tmp_path / "token"), HF_TOKEN="mine")
    assert done.stdout.split()[-2:] == ["none", "none"]
    assert ".env names the server https://evil.example but holds no token" in done.stderr


@pytest.fixture
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of this test alone, without a token."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in list(os.environ):
        if name.endswith("_TOKEN") or name.startswith(("HF_", "WANDB", "SWANLAB")):
            del os.environ[name]


def token_that_is_sent() -> str:
    """By huggingface_hub's rule, which the test above holds: a login's token is "logged_in" here."""
    implicit = os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN") != "1"
    return (os.environ.get("HF_TOKEN") or "logged_in") if implicit else "none"


@pytest.mark.parametrize("name", TOKEN_NAMES)
def test_a_token_may_have_its_older_names(name: str, own_environment: None) -> None:
    os.environ[name] = "mine"
    load_dotenv_file()
    assert os.environ["HF_TOKEN"] == token_that_is_sent() == "mine"


@pytest.mark.parametrize(
    ("file", "environment_has", "token"),
    [
        # a server that .env names gets only a token that stands there too
        ("HF_ENDPOINT=https://evil.example", {"HF_TOKEN": "mine"}, "none"),
        ("HF_ENDPOINT=https://evil.example", {"HUGGING_FACE_HUB_TOKEN": "mine"}, "none"),
        ("HF_ENDPOINT=https://evil.example", {}, "none"),  # nor the one of `hf auth login`
        ("HF_ENDPOINT=https://evil.example\nHF_TOKEN=theirs", {"HF_TOKEN": "mine"}, "theirs"),
        ("HF_ENDPOINT=https://evil.example\nHF_TOKEN=theirs", {}, "theirs"),
        ("HF_TOKEN=theirs", {}, "theirs"),
        # nor by a name that stands for the user's, or by a blank one
        ("HF_ENDPOINT=https://evil.example\nHF_TOKEN=${HF_TOKEN}", {"HF_TOKEN": "mine"}, "${HF_TOKEN}"),
        ("HF_ENDPOINT=https://evil.example\nHF_TOKEN=' '", {"HF_TOKEN": "mine"}, "none"),
        ("HF_ENDPOINT=https://evil.example\nHF_TOKEN=' '", {}, "none"),
        ("", {"HF_ENDPOINT": "http://[", "HF_TOKEN": "mine"}, "none"),
        # one that the user named gets the user's
        ("HF_ENDPOINT=https://evil.example", {"HF_ENDPOINT": "https://mirror.example", "HF_TOKEN": "mine"}, "mine"),
        ("", {"HF_TOKEN": "mine"}, "mine"),
        ("", {}, "logged_in"),
        # and nothing goes over plain HTTP but to this machine
        ("", {"HF_ENDPOINT": "http://mirror.example", "HF_TOKEN": "mine"}, "none"),
        ("", {"HF_ENDPOINT": "http://mirror.example"}, "none"),
        ("HF_ENDPOINT=http://mirror.example\nHF_TOKEN=theirs", {}, "none"),
        ("", {"HF_ENDPOINT": "http://127.0.0.1:8000", "HF_TOKEN": "mine"}, "mine"),
        ("", {"HF_ENDPOINT": "http://[::1]:8000", "HF_TOKEN": "mine"}, "mine"),
        ("", {"HF_ENDPOINT": "http://127.0.0.1.evil.example", "HF_TOKEN": "mine"}, "none"),
    ],
)
def test_which_server_gets_which_token(
    file: str, environment_has: dict[str, str], token: str, tmp_path: Path, own_environment: None, capsys: Any
) -> None:
    (tmp_path / ".env").write_text(file, "utf-8")
    os.environ.update(environment_has)
    load_dotenv_file()
    assert token_that_is_sent() == token
    assert token != "none" or not any(os.environ.get(name) for name in TOKEN_NAMES)
    told = capsys.readouterr().err
    withheld = token == "none" and ("theirs" in file or any("TOKEN" in name for name in environment_has))
    assert ("is not sent there" in told or "no token is sent there" in told) is withheld
    assert "mine" not in told and "theirs" not in told


@pytest.mark.parametrize(
    ("file", "name", "key"),
    [
        ("WANDB_BASE_URL=https://evil.example", "WANDB_BASE_URL", "WANDB_API_KEY"),
        ("WANDB_BASE_URL=https://evil.example\nWANDB_API_KEY=", "WANDB_BASE_URL", "WANDB_API_KEY"),
        ("WANDB_BASE_URL=https://evil.example\nWANDB_X_KEY=1", "WANDB_BASE_URL", "WANDB_API_KEY"),
        ("SWANLAB_WEB_HOST=https://evil.example\nWANDB_API_KEY=theirs", "SWANLAB_WEB_HOST", "SWANLAB_API_KEY"),
        ("TRACKIO_SPACE_ID=evil/space", "TRACKIO_SPACE_ID", "HF_TOKEN"),
    ],
)
def test_a_service_that_the_env_file_names_without_its_key_is_not_followed(
    file: str, name: str, key: str, tmp_path: Path, own_environment: None, capsys: Any
) -> None:
    (tmp_path / ".env").write_text(file, "utf-8")
    os.environ[key] = "mine"
    load_dotenv_file()
    assert name not in os.environ and os.environ[key] == "mine"
    assert f"{name} in .env is not followed" in capsys.readouterr().err


def test_a_service_that_the_env_file_names_gets_the_key_from_there(
    tmp_path: Path, own_environment: None, capsys: Any
) -> None:
    (tmp_path / ".env").write_text("WANDB_BASE_URL=https://own.example\nWANDB_API_KEY=theirs", "utf-8")
    os.environ["WANDB_API_KEY"] = "mine"
    load_dotenv_file()
    assert (os.environ["WANDB_BASE_URL"], os.environ["WANDB_API_KEY"]) == ("https://own.example", "theirs")


@pytest.mark.parametrize("name", ["PATH", "CXX", "HF_TOKEN_PATH", "HF_DATASETS_TRUST_REMOTE_CODE", "WANDB_CONFIG_DIR"])
def test_the_env_file_sets_only_what_is_listed(name: str, tmp_path: Path, own_environment: None) -> None:
    (tmp_path / ".env").write_text(f"{name}=/theirs\nHF_HOME=/home", "utf-8")
    load_dotenv_file()
    assert os.environ.get(name) != "/theirs" and os.environ["HF_HOME"] == "/home"


def test_an_env_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes("# 我的密钥\nX=1\n".encode("gbk"))
    assert ".env is not UTF-8" in refusal_of(environment.prepare_environment)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize(("started", "refused"), [("", False), ("1", False), ("2", True), ("many", True)])
def test_several_processes_of_a_launcher_do_not_train(
    name: str, started: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from fine_tuning_practice import main

    monkeypatch.setenv(name, started)
    with pytest.raises(SystemExit):  # or the next thing that is wrong is said
        main(["--embedded", "--dataset_path", "nothing.jsonl", "--output_dir", "out"])
    said = capsys.readouterr().err
    assert (f"one process trains, but {started} were started" in said) is refused
    assert ("no such data file" in said) is not refused
    assert list(tmp_path.iterdir()) == []


def test_what_a_launcher_set_for_accelerate_does_not_change_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """accelerate would compute in bf16 what the record calls fp32."""
    said = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "no", "LOCAL_RANK": "0"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    environment.ensure_single_process()
    assert not set(said) & set(os.environ)
    assert capsys.readouterr().err == "not followed here: ACCELERATE_MIXED_PRECISION=bf16\n"
    environment.ensure_single_process()
    assert capsys.readouterr().err == ""


def test_where_data_sets_are_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert environment.datasets_cache() == tmp_path / "hf" / "datasets"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "own"))
    assert environment.datasets_cache() == tmp_path / "own"


# Logging in


def test_a_token_is_checked_first(hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    environment.check_login(skip=False)
    shown = capsys.readouterr().err
    assert "logged in to Hugging Face as alice" in shown
    assert WRITE_TOKEN not in shown


def test_a_token_that_is_refused(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_someone_else")
    line = refusal_of(environment.check_login, skip=False)
    assert "the Hub does not accept HF_TOKEN" in line
    assert "hf_of" not in line


def test_a_hub_that_cannot_say_stops_nobody(hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    hub.fail(500, "whoami", times=20)
    environment.check_login(skip=False)
    assert "did not say" in capsys.readouterr().err
    hub.faults.clear()
    hub.drop("whoami", times=20)
    environment.check_login(skip=False)
    assert "did not say" in capsys.readouterr().err


def test_skipping_the_login_sends_no_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    environment.check_login(skip=True)
    assert os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] == "1"
    assert hub.requests == []


def test_an_endpoint_that_is_a_place_on_this_disk_is_no_hub(
    no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "api").mkdir()
    (tmp_path / "api" / "models?limit=1").touch()
    (tmp_path / "api" / "models").touch()
    monkeypatch.setenv("HF_ENDPOINT", tmp_path.as_uri())
    assert not environment.hub_is_reachable()


def test_a_dot_env_chooses_neither_a_compiler_nor_where_keys_and_kernels_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that was downloaded may hold a `.env`, and a command may be run in it."""
    for name in ("CXX", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "LD_PRELOAD", "HF_REPO_ID"):
        monkeypatch.delenv(name, raising=False)
    lines = ["CXX=./evil.sh", "XDG_CONFIG_HOME=./evil", "XDG_CACHE_HOME=./evil", "LD_PRELOAD=x.so", "HF_REPO_ID=a/b"]
    (tmp_path / ".env").write_text("\n".join(lines), "utf-8")
    monkeypatch.chdir(tmp_path)
    environment.prepare_environment()
    assert os.environ.pop("HF_REPO_ID") == "a/b"
    assert not {"CXX", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "LD_PRELOAD"} & set(os.environ)
