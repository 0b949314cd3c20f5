"""What may leave this machine: no secrets, no private paths; without any network."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from upload_harness import HUB_ID, make_adapter_folder

from lora_practice.console.errors import UserError
from lora_practice.export.hub.package import pack_folder
from lora_practice.export.hub.redaction import BaseNames, base_names, private_paths, rewrite_text
from lora_practice.export.hub.secret_scan import SCAN_BYTES, scan_file
from lora_practice.export.hub.upload import human_size, listing

TOKEN = "hf_" + "T" * 34


@pytest.fixture(autouse=True)
def english(monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")


@given(st.integers(0, 3000), st.booleans())
def test_a_token_is_found_wherever_it_lies_even_on_the_border_of_two_reads(tmp_path_factory, offset, wide):
    path = tmp_path_factory.mktemp("scan") / "weights.bin"
    secret = TOKEN.encode("utf-16-le") if wide else TOKEN.encode()
    start = b"\xff\xfe" if wide else b""
    path.write_bytes(start + b"\0" * (SCAN_BYTES - 1500 + offset) + secret + b"\0\0")
    with pytest.raises(UserError, match="Hugging Face token"):
        scan_file(path, path.name, "", ())


def test_a_secret_is_named_by_file_and_line_and_not_shown(tmp_path):
    path = tmp_path / "notes.md"
    path.write_text(f"one\ntwo\nkey = {TOKEN}\n", "utf-8")
    with pytest.raises(UserError, match=r"notes\.md:3: ") as refusal:
        scan_file(path, "notes.md", "", ())
    assert TOKEN not in str(refusal.value)


def test_the_hashes_are_those_of_git_and_sha256(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"hello\n")
    scanned = scan_file(path, "a.txt", "", ["/home/me"])
    assert (scanned.size, scanned.has_private_path) == (6, False)
    assert scanned.sha256 == hashlib.sha256(b"hello\n").hexdigest()
    assert scanned.git_sha1 == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_ordinary_words_are_no_secrets(tmp_path):
    folder = make_adapter_folder(tmp_path / "out")
    (folder / "code.txt").write_text("hf_hub_download HF_TOKEN=hf_... hf_xxx sha_ab", "utf-8")
    assert len(pack_folder(folder, ["*"]).files) == len([path for path in folder.rglob("*") if path.is_file()])


def test_an_upload_without_private_paths_changes_nothing(tmp_path):
    folder = make_adapter_folder(tmp_path / "out")
    (folder / "run_record.json").write_text('{"status": "finished", "dataset_path": "data.jsonl"}', "utf-8")
    (folder / "checkpoint-2" / "trainer_state.json").write_text("{}", "utf-8")
    package = pack_folder(folder, ["checkpoint-2"])
    assert package.notes == () and all(file.data is None for file in package.files)


def test_paths_become_public_names_and_longer_names_stay(tmp_path):
    base = BaseNames(("/home/me/models/smol",), HUB_ID)
    roots = {"/home/me/models/smol": HUB_ID, "/home/me": "~"}
    before = '{"a": "/home/me/models/smol", "b": "/home/me/x", "c": "/home/me2/x", "d": "http://h/home/me"}'
    after = json.loads(rewrite_text("trainer_state.json", before.encode(), base, roots))
    assert after == {"a": HUB_ID, "b": "~/x", "c": "/home/me2/x", "d": "http://h/home/me"}


def test_windows_paths_inside_json_are_found_too(tmp_path):
    roots = private_paths(tmp_path, BaseNames(("C:\\models\\smol",), "smol", on_hub=False))
    data = json.dumps({"base": "C:\\models\\smol", "as_url": "C:/models/smol"}).encode()
    assert json.loads(rewrite_text("x.json", data, BaseNames(), roots)) == {"base": "smol", "as_url": "smol"}


def test_the_working_directory_and_its_root_are_not_mistaken_for_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/")
    assert "/" not in private_paths(tmp_path, BaseNames())


def test_a_hub_base_model_needs_no_rewriting(tmp_path):
    assert base_names(make_adapter_folder(tmp_path / "out", kind="hub")) == BaseNames()


def test_a_link_inside_the_folder_is_sent_as_a_file_and_a_linked_folder_is_said(tmp_path):
    folder = make_adapter_folder(tmp_path / "out")
    (folder / "copy.json").symlink_to(folder / "adapter_config.json")
    (folder / "latest").symlink_to(folder / "checkpoint-2", target_is_directory=True)
    package = pack_folder(folder)
    assert "copy.json" in [file.name for file in package.files]
    assert any("latest/" in note for note in package.notes)


@pytest.mark.parametrize("kind", ["missing", "empty", "other"])
def test_a_folder_with_nothing_to_upload_says_so(tmp_path, kind):
    folder = tmp_path / kind
    if kind != "missing":
        folder.mkdir()
    if kind == "other":
        (folder / "x.txt").write_text("x", "utf-8")
    with pytest.raises(UserError, match="--local_dir"):
        pack_folder(folder)


@pytest.fixture
def exported(tmp_path) -> Path:
    """An output folder with merged/, gguf/, two checkpoints and a folder of the user's own."""
    folder = make_adapter_folder(tmp_path / "out")
    for name in ("merged/model.safetensors", "gguf/merged-f16.gguf", "checkpoint-12/state.bin", "mine/notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"FROM ./merged-f16.gguf\n")
    return folder


def test_what_sharing_needs_is_sent_and_folders_only_where_they_are_named(exported):
    package = pack_folder(exported)
    assert all("/" not in file.name for file in package.files)
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= {file.name for file in package.files}
    assert [one.name for one in package.left_out] == ["checkpoint-12", "checkpoint-2", "gguf", "merged", "mine"]
    assert package.left_out[2].size == 23
    package = pack_folder(exported, ["merged/", "checkpoint-*"])
    folders = {file.name.partition("/")[0] for file in package.files if "/" in file.name}
    assert folders == {"merged", "checkpoint-2", "checkpoint-12"}
    assert [one.name for one in package.left_out] == ["gguf", "mine"]
    package = pack_folder(exported, ["*"], exclude_checkpoints=True)
    assert [one.name for one in package.left_out] == ["checkpoint-12", "checkpoint-2"]


def test_a_folder_to_include_that_is_not_there_is_named_with_those_that_are(exported):
    with pytest.raises(UserError, match=r"--include mergd: no such folder here -> here are: checkpoint-12, .*merged"):
        pack_folder(exported, ["mergd"])
    (exported / ".cache").mkdir()
    with pytest.raises(UserError, match="no such folder here"):
        pack_folder(exported, [".cache"])


def test_a_secret_or_a_link_outside_matters_only_in_a_folder_that_is_sent(exported):
    (exported / "mine" / ".env").write_text("A=1", "utf-8")
    (exported / "gguf" / "above").symlink_to(exported.parent)
    pack_folder(exported, ["merged"])
    with pytest.raises(UserError, match=r"mine/\.env: looks like a secret"):
        pack_folder(exported, ["mine"])
    with pytest.raises(UserError, match="leads outside"):
        pack_folder(exported, ["gguf"])


def test_a_link_outside_matters_only_where_it_would_be_sent(exported, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (exported / "large").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (exported / ".cache").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    package = pack_folder(exported, ["merged"])
    assert "left out: .cache/, large/" in package.notes
    assert not any(file.name.startswith("large") for file in package.files)
    for include in ("large", "*"):
        with pytest.raises(UserError, match="out/large: this link leads outside"):
            pack_folder(exported, [include])
    (exported / "notes.txt").symlink_to(tmp_path / "elsewhere" / "notes.txt")
    (tmp_path / "elsewhere" / "notes.txt").write_text("private", "utf-8")
    with pytest.raises(UserError, match=r"out/notes\.txt: this link leads outside"):
        pack_folder(exported, ["merged"])


def test_the_listing_says_what_is_left_out_how_large_it_is_and_how_to_send_it(exported):
    shown = listing(pack_folder(exported, ["mine"]), public=False).splitlines()
    size = sum(path.stat().st_size for path in exported.rglob("checkpoint-*/*"))  # it holds the folder's own path
    assert shown[shown.index("left out; to send them too, add:") + 1 :] == [
        f"{human_size(size):>10}  checkpoint-*/  --include 'checkpoint-*'",
        "      23 B  gguf/          --include gguf",
        "      23 B  merged/        --include merged",
    ]
