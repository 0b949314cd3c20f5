"""The upload script, run as a user runs it (own process, empty home), against a Hub on this machine."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hub_server import FINE_TOKEN, HubServer, identity
from upload_harness import REPO, lines, make_adapter_folder, refused, run_upload

from lora_practice.export.hub.package import pack_folder
from lora_practice.report.html import write_report


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def folder(tmp_path):
    return make_adapter_folder(tmp_path / "out")


@pytest.fixture
def upload(hub, folder):
    return functools.partial(run_upload, hub, folder)


def test_a_new_repository_is_private_and_holds_every_file(hub, upload, folder):
    done = upload("--include", "checkpoint-*")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/{REPO}"
    repo = hub.repo(REPO)
    assert repo.private
    assert repo.names() == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    for name in ("adapter_model.safetensors", "checkpoint-2/optimizer.pt", "README.md"):
        assert repo.data(name) == (folder / name).read_bytes()
    assert any(line.startswith("PUT /lfs/") for line in lines(hub))
    assert "verified" in done.stderr


def test_no_file_of_a_real_run_is_taken_for_a_secret(copied, monkeypatch):
    """tokenizer.json and merges.txt hold tens of thousands of strange words, the report megabytes of base64."""
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    write_report(copied, {})
    package = pack_folder(copied, ["checkpoint-*"], token="no-pattern-knows-this-token")
    names = {file.name for file in package.files}
    assert {"tokenizer.json", "vocab.json", "merges.txt", "report.html", "curves.png", "run_record.json"} <= names
    assert [one.name for one in package.left_out] == ["merged"]
    first_row = json.loads((copied / "run_record.json").read_text("utf-8"))["data"]["first_row"]
    sent = {file.name: file.data for file in package.files if file.data}
    assert first_row and "first_row" not in json.loads(sent["run_record.json"])["data"]
    assert "The first row" in (copied / "report.html").read_text("utf-8")
    assert b"The first row" not in sent["report.html"]


def test_public_makes_it_public(hub, upload):
    assert upload("--public").returncode == 0
    assert not hub.repo(REPO).private


@pytest.mark.parametrize("flags", [(), ("--include", "*", "--exclude-checkpoints")])
def test_checkpoints_stay_here_unless_they_are_asked_for(hub, upload, flags):
    done = upload(*flags)
    assert done.returncode == 0
    assert not [name for name in hub.repo(REPO).names() if "checkpoint" in name]
    assert "left out: checkpoint-2/ (--include NAME sends them)" in done.stderr


def test_a_dry_run_lists_files_and_sizes_and_asks_nobody(hub, upload):
    done = upload("--dry-run", HF_TOKEN="", HF_REPO_ID="")
    named = upload("--dry-run", "--repo-id", "somebody/my-lora", HF_TOKEN="")
    assert "private repository somebody/my-lora (nothing was sent)" in named.stdout
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in done.stdout and "kB" in done.stdout and "private" in done.stdout
    assert done.stdout.splitlines()[-1].split()[1:] == ["kB", "checkpoint-2/", "--include", "checkpoint-2"]
    assert hub.requests == []


def test_a_second_upload_sends_no_large_file_again(hub, upload):
    assert upload().returncode == 0
    hub.requests.clear()
    assert upload().returncode == 0
    assert not [line for line in lines(hub) if line.startswith("PUT")]


def test_a_connection_that_breaks_inside_a_large_file_is_resumed(hub, upload, folder):
    hub.drop("PUT /lfs/", skip=1)
    assert upload().returncode == 0
    assert hub.repo(REPO).data("adapter_model.safetensors") == (folder / "adapter_model.safetensors").read_bytes()


def test_a_commit_that_breaks_is_tried_again_without_sending_the_large_files_again(hub, upload):
    hub.drop("/commit/main")
    done = upload()
    assert done.returncode == 0, done.stderr
    assert "try 2/5" in done.stderr
    puts = [line for line in lines(hub) if line.startswith("PUT")]
    assert len(puts) == len(set(puts))


def test_a_server_that_falls_silent_is_tried_again(hub, upload):
    hub.hang("/commit/main")
    done = upload("--timeout", "1")
    assert done.returncode == 0, done.stderr
    assert "try 2/5" in done.stderr


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_tried_again(hub, upload, status):
    hub.fail(status, "/commit/main")
    assert upload().returncode == 0


def test_a_fine_grained_token_with_write_access_is_enough(hub, upload):
    assert upload(HF_TOKEN=FINE_TOKEN).returncode == 0


def test_an_organisation_of_the_user_is_fine(hub, upload):
    assert upload("--repo-id", "school/my-lora").returncode == 0
    assert hub.repo("school/my-lora").private


def test_the_token_may_come_from_a_dotenv_file_and_the_real_environment_wins(hub, upload, folder):
    hub.tokens["hf_" + "D" * 34] = identity("write", user="dora")
    (folder.parent / ".env").write_text("HF_TOKEN=hf_" + "D" * 34 + "\nHF_REPO_ID=dora/from-env\n", "utf-8")
    assert upload().returncode == 0
    assert [name for _, name in hub.store.repos] == [REPO]
    assert upload(HF_TOKEN=None, HF_REPO_ID=None).returncode == 0
    assert [name for _, name in hub.store.repos] == [REPO, "dora/from-env"]


def test_a_file_that_the_server_loses_is_noticed(hub, upload):
    hub.lose("adapter_model.safetensors")
    refused(upload(), "adapter_model.safetensors is missing")


def test_the_parts_of_a_very_large_file_are_put_together(hub, upload, folder):
    hub.multipart_from = 5000
    assert upload("--include", "checkpoint-2").returncode == 0
    name = "checkpoint-2/optimizer.pt"
    assert hub.repo(REPO).data(name) == (folder / name).read_bytes()
    assert any(line.endswith("/complete") for line in lines(hub))


def test_a_server_without_xet_is_served_by_plain_lfs(hub, upload, folder):
    assert upload(HF_HUB_DISABLE_XET="0").returncode == 0
    weights = hub.repo(REPO).data("adapter_model.safetensors")
    assert weights == (folder / "adapter_model.safetensors").read_bytes()


def test_offline_mode_is_named_instead_of_waited_for(hub, upload):
    refused(upload(HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")
    assert hub.requests == []
