"""Who may write where, and what is said when the Hub refuses: without any network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hub_server import identity
from upload_harness import ROOT, make_adapter_folder

from lora_practice.console.errors import UserError
from lora_practice.export.hub.client import HubClient, redact
from lora_practice.export.hub.package import pack_folder
from lora_practice.export.hub.permissions import check_permission, planned_repo_id, resolve_repo_id
from lora_practice.export.hub.upload import differences, human_size, listing
from lora_practice.sources.environment import check_token

TOKEN = "hf_" + "T" * 34


@pytest.fixture(autouse=True)
def english(monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")


def failure(status: int, said: str = "") -> Exception:
    error = RuntimeError("Error while uploading")
    error.__cause__ = OSError(said)
    error.__cause__.response = SimpleNamespace(status_code=status, headers={"X-Error-Message": said})
    return error


def test_the_repository_comes_from_the_flag_then_the_id_then_user_and_name():
    env = {"HF_REPO_ID": "a/id", "HF_USERNAME": "ann", "HF_REPO_NAME": "name"}
    assert resolve_repo_id("x/flag", env) == "x/flag"
    assert resolve_repo_id("flag", env) == "ann/flag"
    assert resolve_repo_id("", env) == "a/id"
    del env["HF_REPO_ID"]
    assert resolve_repo_id("", env) == "ann/name"


@pytest.mark.parametrize(
    "name", ["", "justname", "a/b/c", "a b/c", "a/-b", "a/b--c", "a/b.git", "中/文", "a/" + "b" * 99]
)
def test_a_name_that_the_hub_would_refuse_is_refused_here(name):
    with pytest.raises(UserError, match="--repo_id"):
        resolve_repo_id(name, {})
    if name:
        with pytest.raises(UserError, match="--repo_id"):
            planned_repo_id(name, {})  # the dry run says so already


def test_a_dry_run_needs_no_repository():
    assert planned_repo_id("", {}) == ""
    assert planned_repo_id("", {"HF_USERNAME": "ann", "HF_REPO_NAME": "name"}) == "ann/name"


@pytest.mark.parametrize(
    ("lang", "words"), [("zh", "只能用英文字母、数字和 - _ ."), ("en", "letters of English, digits")]
)
def test_a_name_in_chinese_is_not_said_to_lack_its_owner(lang, words, monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", lang)
    with pytest.raises(UserError) as refused:
        resolve_repo_id("你的名字/仓库名", {})
    assert words in refused.value.what and "作者/名字" not in str(refused.value)


@pytest.mark.parametrize("token", ["", "sh0rt", TOKEN + "\n" + TOKEN, "令牌" * 9])
def test_what_cannot_be_a_token_is_refused_without_being_shown(token):
    with pytest.raises(UserError) as refusal:
        check_token(token)
    assert not token or token not in str(refusal.value)


def test_write_access_is_needed_where_the_repository_is():
    check_permission(identity("write"), "alice/x")
    check_permission(identity("write"), "Alice/x")
    check_permission(identity("write"), "school/x")
    check_permission(identity("fineGrained", ["repo.write"]), "alice/x")
    check_permission({"name": "alice"}, "alice/x")
    for who, where in (
        (identity("read"), "alice/x"),
        (identity("write"), "bob/x"),
        (identity("fineGrained", ["repo.content.read"]), "alice/x"),
        (identity("fineGrained", ["repo.write"]), "school/x"),
    ):
        with pytest.raises(UserError):
            check_permission(who, where)


def test_a_fine_grained_token_for_one_repository_serves_that_one_only():
    who = identity("fineGrained", ["repo.write"])
    who["auth"]["accessToken"]["fineGrained"]["scoped"][0]["entity"] = {"type": "model", "name": "alice/x"}
    check_permission(who, "alice/x")
    with pytest.raises(UserError, match="read-only for alice/y"):
        check_permission(who, "alice/y")


def test_no_token_and_no_signed_address_survives_redaction():
    line = f"PUT https://store/x?X-Amz-Signature=abc failed for {TOKEN} and odd-token"
    assert redact(line, "odd-token") == "PUT https://store/x?… failed for *** and ***"


def test_a_listing_that_lacks_or_changes_a_file_is_noticed(tmp_path):
    package = pack_folder(make_adapter_folder(tmp_path / "out"))
    listed = {file.name: SimpleNamespace(size=file.size, blob_id=file.git_sha1, lfs=None) for file in package.files}
    assert differences(package, listed) == []
    listed["README.md"].blob_id = "0" * 40
    listed["adapter_config.json"].size += 1
    listed["adapter_model.safetensors"].lfs = SimpleNamespace(sha256="0" * 64)
    del listed["run_record.json"]
    assert len(differences(package, listed)) == 4
    assert "run_record.json" in listing(package, public=False)


def test_sizes_are_shown_in_the_unit_that_fits():
    assert [human_size(n) for n in (0, 999, 1500, 2_500_000, 3e9)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "3.0 GB",
    ]


def test_a_broken_connection_is_tried_five_times_with_growing_pauses(capsys):
    pauses: list[float] = []
    client = HubClient(TOKEN, "alice/x", "http://hub", pauses.append)

    def call():
        raise ConnectionError(f"reset, {TOKEN}")

    with pytest.raises(UserError, match="http://hub: the connection broke") as failed:
        client.call("sending", call)
    assert pauses == [1, 2, 4, 8]
    assert TOKEN not in str(failed.value) + capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "words", "tries"),
    [
        (401, "token is not accepted", 1),
        (403, "may not write to alice", 1),
        (404, "no such repository", 1),
        (409, "in conflict", 1),
        (418, "refused the request: tea", 1),
        (429, "too many requests", 5),
        (500, "in trouble", 5),
    ],
)
def test_each_status_has_its_words_and_only_passing_ones_are_tried_again(status, words, tries):
    pauses: list[float] = []
    client = HubClient(TOKEN, "alice/x", "http://hub", pauses.append)

    def call():
        raise failure(status, "tea")

    with pytest.raises(UserError, match=f"alice/x: HTTP {status}: .*{words}"):
        client.call("sending", call)
    assert len(pauses) == tries - 1


def test_a_mistake_of_ours_is_not_dressed_up_as_the_users():
    with pytest.raises(ZeroDivisionError):
        HubClient(TOKEN, "alice/x", "http://hub").call("sending", lambda: 1 // 0)


def test_help_loads_neither_torch_nor_the_hub_client_and_flags_are_never_guessed(tmp_path):
    script = ROOT / "scripts" / "upload_lora_to_hub.py"
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['upload', '--help']\ntry: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "finally: print(sorted({'torch', 'huggingface_hub'} & set(sys.modules)), file=sys.stderr)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0 and "--repo_id" in shown.stdout and shown.stderr.strip() == "[]"
    command = [sys.executable, str(script), "--exclude-checkpoint"]
    wrong = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 2 and "exclude" in wrong.stderr.splitlines()[0]
    assert len(wrong.stderr.splitlines()) == 1
