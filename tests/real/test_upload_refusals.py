"""What the upload script refuses to send, or sends otherwise than it lies on this disk."""

from __future__ import annotations

import functools
import json
import pickle
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hub_server import FINE_READ_TOKEN, READ_TOKEN, HubServer
from upload_harness import HUB_ID, REPO, lines, make_adapter_folder, refused, run_upload

from lora_practice.storage import manifest


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


def uploaded_text(hub: HubServer) -> str:
    repo = hub.repo(REPO)
    return "\n".join(repo.data(name).decode("utf-8", "replace") for name in repo.names())


def test_an_existing_public_repository_is_not_used_by_surprise(hub, upload):
    hub.add_repo("models", REPO, private=False)
    refused(upload(), REPO, "public")
    assert hub.repo(REPO).names() == []
    assert upload("--public").returncode == 0


@pytest.mark.parametrize(
    ("status", "where", "word"),
    [
        (401, "whoami", "not accepted"),
        (403, "/repos/create", "may not write to alice"),
        (404, "/preupload/", "no such repository"),
        (409, "/commit/main", "conflict"),
        (413, "/commit/main", "too large"),
    ],
)
def test_every_refusal_is_one_clear_line(hub, upload, status, where, word):
    hub.fail(status, where, times=9)
    refused(upload(), f"HTTP {status}", word, REPO)


def test_nobody_at_the_address_is_one_clear_line(upload):
    refused(upload(HF_ENDPOINT="http://127.0.0.1:9"), "127.0.0.1:9", "HF_ENDPOINT")


@pytest.mark.parametrize("token", [READ_TOKEN, FINE_READ_TOKEN])
def test_a_read_only_token_is_refused_before_anything_is_sent(hub, upload, token):
    refused(upload(HF_TOKEN=token), "read-only")
    assert lines(hub) == ["GET /api/whoami-v2"]


def test_a_wrong_token_is_refused_and_not_shown(hub, upload):
    wrong = "hf_" + "x" * 34
    done = upload(HF_TOKEN=wrong)
    refused(done, "not accepted")
    assert wrong not in done.stderr + done.stdout
    assert not hub.store.repos


def test_another_owners_name_is_refused_before_anything_is_sent(hub, upload):
    refused(upload("--repo-id", "bob/my-lora"), "alice", "bob/my-lora")
    assert lines(hub) == ["GET /api/whoami-v2"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".env", "A=1"),
        (".env.local", "A=1"),
        ("checkpoint-2/.netrc", "machine x"),
        ("notes.txt", "first line\nmy token: hf_" + "Q" * 34),
        ("key.txt", "-----BEGIN OPENSSH PRIVATE KEY-----\n"),
    ],
)
def test_a_file_that_looks_like_a_secret_stops_everything(hub, upload, folder, name, content):
    (folder / name).write_text(content, "utf-8")
    done = upload("--include", "*")
    refused(done, name, "secret")
    assert "Q" * 34 not in done.stderr
    assert hub.requests == []


def test_what_no_run_wrote_stays_here_and_is_said(hub, upload, folder):
    (folder / "notes.txt").write_text("private notes, my token: hf_" + "Q" * 34, "utf-8")
    (folder / "rows.jsonl").write_text("private rows", "utf-8")
    done = upload()
    assert done.returncode == 0, done.stderr
    assert "left out: checkpoint-2/, notes.txt, rows.jsonl (--include NAME sends them)" in done.stderr
    assert "private" not in uploaded_text(hub)
    assert upload("--include", "rows.jsonl").returncode == 0
    assert "private rows" in uploaded_text(hub)


def test_the_token_itself_is_found_in_a_binary_file_whatever_its_shape(hub, upload, folder):
    (folder / "state.bin").write_bytes(b"\0" * (1 << 20) + b"oddly-shaped-token" + b"\0" * 99)
    refused(upload("--include", "state.bin", HF_TOKEN="oddly-shaped-token"), "state.bin", "HF_TOKEN")
    assert hub.requests == []


def test_a_link_that_leads_outside_is_refused(hub, upload, folder, tmp_path):
    (tmp_path / "private.txt").write_text("mine", "utf-8")
    (folder / "LICENSE").symlink_to(tmp_path / "private.txt")
    refused(upload(), "LICENSE", "outside")
    assert hub.requests == []


def test_a_local_base_model_is_sent_under_its_hub_name_everywhere(hub, tmp_path):
    base = tmp_path / "home" / "models" / "smol"
    folder = make_adapter_folder(tmp_path / "local", base=str(base))
    (folder / "training_args.bin").write_bytes(pickle.dumps({"output_dir": str(folder)}))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = run_upload(hub, folder, "--include", "checkpoint-2")
    assert done.returncode == 0, done.stderr
    repo = hub.repo(REPO)
    for name in ("adapter_config.json", "checkpoint-2/adapter_config.json"):
        assert json.loads(repo.data(name))["base_model_name_or_path"] == HUB_ID
    assert f"base_model: {HUB_ID}\n" in repo.data("README.md").decode()
    record = json.loads(repo.data("run_record.json"))
    assert record["model"] == {"kind": "embedded", "name": HUB_ID, "hub_id": HUB_ID}
    assert record["settings"] == {"max_steps": 2, "dataset_path": "data.jsonl"}
    assert str(tmp_path) not in uploaded_text(hub)
    assert "training_args.bin" not in repo.names() and "checkpoint-2/training_args.bin" in repo.names()
    assert len([line for line in done.stderr.splitlines() if "local paths taken out" in line]) == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert manifest.folder_fault(repo.folder / "checkpoint-2", "checkpoint.json") == ""


def test_a_base_model_that_others_cannot_have_is_said_in_one_line(hub, tmp_path):
    base = tmp_path / "home" / "my-base"
    folder = make_adapter_folder(tmp_path / "own", base=str(base), hub_id=None, kind="folder")
    done = run_upload(hub, folder)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stderr.splitlines() if "others cannot load" in line]) == 1
    assert str(tmp_path) not in uploaded_text(hub)


def test_a_card_that_the_hub_does_not_accept_is_named_with_its_reason(hub, upload, folder):
    (folder / "README.md").write_text("---\nbase_model: /srv/elsewhere/x\n---\n", "utf-8")
    refused(upload(), "README.md", "base_model", "/srv/elsewhere/x")
    assert not [line for line in lines(hub) if line.startswith("PUT")]
