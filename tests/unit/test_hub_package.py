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
from lora_practice.export.hub.redaction import Base, base_names, private_roots, rewrite
from lora_practice.export.hub.secret_scan import SCAN_BYTES, inspect_file

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
        inspect_file(path, path.name, "", ())


def test_a_secret_is_named_by_file_and_line_and_not_shown(tmp_path):
    path = tmp_path / "notes.md"
    path.write_text(f"one\ntwo\nkey = {TOKEN}\n", "utf-8")
    with pytest.raises(UserError, match=r"notes\.md:3: ") as refusal:
        inspect_file(path, "notes.md", "", ())
    assert TOKEN not in str(refusal.value)


def test_the_hashes_are_those_of_git_and_sha256(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"hello\n")
    size, sha256, git_sha1, is_private = inspect_file(path, "a.txt", "", ["/home/me"])
    assert (size, is_private) == (6, False)
    assert sha256 == hashlib.sha256(b"hello\n").hexdigest()
    assert git_sha1 == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_ordinary_words_are_no_secrets(tmp_path):
    folder = make_adapter_folder(tmp_path / "out")
    (folder / "code.txt").write_text("hf_hub_download HF_TOKEN=hf_... hf_xxx sha_ab", "utf-8")
    assert len(pack_folder(folder).items) == len([path for path in folder.rglob("*") if path.is_file()])


def test_an_upload_without_private_paths_changes_nothing(tmp_path):
    folder = make_adapter_folder(tmp_path / "out")
    (folder / "run_record.json").write_text('{"status": "finished", "dataset_path": "data.jsonl"}', "utf-8")
    (folder / "checkpoint-2" / "trainer_state.json").write_text("{}", "utf-8")
    parcel = pack_folder(folder)
    assert parcel.notes == () and all(item.data is None for item in parcel.items)


def test_paths_become_public_names_and_longer_names_stay(tmp_path):
    base = Base(("/home/me/models/smol",), HUB_ID)
    roots = {"/home/me/models/smol": HUB_ID, "/home/me": "~"}
    before = '{"a": "/home/me/models/smol", "b": "/home/me/x", "c": "/home/me2/x", "d": "http://h/home/me"}'
    after = json.loads(rewrite("trainer_state.json", before.encode(), base, roots))
    assert after == {"a": HUB_ID, "b": "~/x", "c": "/home/me2/x", "d": "http://h/home/me"}


def test_windows_paths_inside_json_are_found_too(tmp_path):
    roots = private_roots(tmp_path, Base(("C:\\models\\smol",), "smol", on_hub=False))
    data = json.dumps({"base": "C:\\models\\smol", "as_url": "C:/models/smol"}).encode()
    assert json.loads(rewrite("x.json", data, Base(), roots)) == {"base": "smol", "as_url": "smol"}


def test_the_working_directory_and_its_root_are_not_mistaken_for_each_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/")
    assert "/" not in private_roots(tmp_path, Base())


def test_a_hub_base_model_needs_no_rewriting(tmp_path):
    assert base_names(make_adapter_folder(tmp_path / "out", kind="hub")) == Base()


def test_a_link_inside_the_folder_is_sent_as_a_file_and_a_linked_folder_is_said(tmp_path):
    folder = make_adapter_folder(tmp_path / "out")
    (folder / "copy.json").symlink_to(folder / "adapter_config.json")
    (folder / "latest").symlink_to(folder / "checkpoint-2", target_is_directory=True)
    parcel = pack_folder(folder)
    assert "copy.json" in [item.name for item in parcel.items]
    assert any("latest/" in note for note in parcel.notes)


@pytest.mark.parametrize("kind", ["missing", "empty", "other"])
def test_a_folder_with_nothing_to_upload_says_so(tmp_path, kind):
    folder = tmp_path / kind
    if kind != "missing":
        folder.mkdir()
    if kind == "other":
        (folder / "x.txt").write_text("x", "utf-8")
    with pytest.raises(UserError, match="--local_dir"):
        pack_folder(folder)


def test_merged_models_stay_here_when_asked_and_the_note_names_them(tmp_path):
    folder = make_adapter_folder(tmp_path / "out")
    for name in ("merged/model.safetensors", "gguf/merged-f16.gguf", "gguf/Modelfile"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"FROM ./merged-f16.gguf\n")
    assert "gguf/Modelfile" in {item.name for item in pack_folder(folder).items}
    parcel = pack_folder(folder, exclude_merged=True)
    assert not any(item.name.startswith(("merged/", "gguf/")) for item in parcel.items)
    assert any(item.name.startswith("checkpoint-2/") for item in parcel.items)
    assert any("merged/" in note and "gguf/" in note for note in parcel.notes)
