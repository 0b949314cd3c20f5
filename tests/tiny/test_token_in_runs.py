"""A token shows nowhere in what a run says and writes; files get the rights that the user's umask gives."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_inputs import enter, refusal
from hub_server import HubServer

from fine_tuning_practice import main as train
from lora_practice.cli import main as cli

TOKEN = "hf_" + "kXr7" * 8 + "Qz"
ROW = json.dumps({"prompt": f"my token is {TOKEN}", "completion": f"so it is {TOKEN}"}) + "\n"
posix = pytest.mark.skipif(os.name == "nt", reason="rights of files are those of POSIX")


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--token", TOKEN),
        ("train", f"--hf_token={TOKEN}"),
        ("train", TOKEN),
        ("train", "--lora_r", TOKEN),
        ("train", "--model_name", TOKEN, "--dataset_path", "rows.jsonl"),
        ("train", "--dataset_path", TOKEN),
        ("train", "--output_dir", f"rows.jsonl/{TOKEN}"),
        ("infer", "--model-dir", TOKEN, "--prompt", "Hi"),
        ("infer", "--token", TOKEN),
        ("merge", TOKEN),
        ("merge", "--token", TOKEN),
        (TOKEN,),
        ("upload", "--token", TOKEN),
        ("upload", "--local-dir", TOKEN),
        ("upload", "--repo-id", TOKEN),
    ],
    ids=lambda words: " ".join(words).replace(TOKEN, "TOKEN"),
)
def test_a_token_given_in_the_wrong_place_is_not_repeated(
    words: tuple[str, ...], no_hub: None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "rows.jsonl").write_text(ROW, "utf-8")
    said = enter(cli, capsys, *words)
    refusal(said)
    assert TOKEN not in said.out + said.err


@pytest.mark.parametrize("token", ["令牌令牌令牌令牌", "two words", "x"])
def test_a_token_that_cannot_be_one_is_refused_before_anything_is_fetched(
    token: str,
    hub: HubServer,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "rows.jsonl").write_text(ROW, "utf-8")
    monkeypatch.setenv("HF_TOKEN", token)
    told = refusal(enter(train, capsys, "--model_name", str(base), "--dataset_path", "rows.jsonl"))
    assert "HF_TOKEN: does not look like a token" in told and token not in told.replace("text", "")


@posix
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], indirect=True, ids=oct)
def test_a_run_leaves_files_with_the_rights_of_the_umask_and_without_the_token(
    umask: int, no_hub: None, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A whole run on a tiny model: checkpoints, adapter, card, record, merged model. The data holds the token."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "rows.jsonl").write_text(ROW * 3, "utf-8")
    flags = ("--model_name", str(base), "--dataset_path", "rows.jsonl", "--output_dir", "out", "--skip_login")
    said = enter(train, capsys, *flags, "--save_strategy", "steps", "--save_steps", "1", "--merge_adapter")
    assert said.code == 0, said.err
    assert TOKEN not in said.out + said.err
    found = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert {"checkpoint-1", "merged", "README.md", "run_record.json", "optimizer.pt"} <= {one.name for one in found}
    for one in found:
        wanted = (0o777 if one.is_dir() else 0o666) & ~umask
        assert oct(stat.S_IMODE(one.stat().st_mode)) == oct(wanted), one
        assert one.is_dir() or TOKEN.encode() not in one.read_bytes(), one
    assert "my token is ***" in json.loads((tmp_path / "out/run_record.json").read_text("utf-8"))["data"]["first_row"]


def test_doctor_hides_the_password_of_a_mirror(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "https://me:geheim@127.0.0.1:9")
    for words in (("doctor",), ("doctor", "--json")):
        said = enter(cli, capsys, *words)
        assert "127.0.0.1:9" in said.out and "geheim" not in said.out + said.err
