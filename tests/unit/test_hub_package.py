"""What may leave this machine: no secrets, no private paths; without any network."""

from __future__ import annotations

import hashlib
import json
import os
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
    package = pack_folder(folder, ["copy.json"])
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
    with pytest.raises(UserError, match=r"mergd: no such file or folder here -> here are: checkpoint-12, .*merged"):
        pack_folder(exported, ["mergd"])
    (exported / ".cache").mkdir()
    with pytest.raises(UserError, match="no such file or folder here"):
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
    assert "notes.txt" not in [file.name for file in pack_folder(exported, ["merged"]).files]
    with pytest.raises(UserError, match=r"out/notes\.txt: this link leads outside"):
        pack_folder(exported, ["notes.*"])
    (exported / "README.md").unlink()
    (exported / "README.md").symlink_to(tmp_path / "elsewhere" / "notes.txt")  # a name that is sent by default
    with pytest.raises(UserError, match=r"out/README\.md: this link leads outside"):
        pack_folder(exported)


def test_the_listing_says_what_is_left_out_how_large_it_is_and_how_to_send_it(exported):
    shown = listing(pack_folder(exported, ["mine"]), public=False).splitlines()
    size = sum(path.stat().st_size for path in exported.rglob("checkpoint-*/*"))  # it holds the folder's own path
    assert shown[shown.index("left out; to send them too, add:") + 1 :] == [
        f"{human_size(size):>10}  checkpoint-*/  --include 'checkpoint-*'",
        "      23 B  gguf/          --include gguf",
        "      23 B  merged/        --include merged",
    ]


OWN = ("LICENSE", "NOTICE.txt", "report.html", "curves.png", "tokenizer.model", "vocab.txt", "chat_template.jinja")
NOT_OURS = ("notes.txt", "rows.jsonl", "my.ipynb", "backup.zip", "adapter_model.safetensors.bak", "credentials.txt")


def test_what_no_run_writes_is_sent_only_where_it_is_named(exported):
    for name in (*OWN, *NOT_OURS):
        (exported / name).write_bytes(b"some\n")
    package = pack_folder(exported)
    names = {file.name for file in package.files}
    assert names >= set(OWN) and not names & set(NOT_OURS)
    files = [(one.name, one.size) for one in package.left_out if not one.is_folder]
    assert files == [(name, 5) for name in sorted(NOT_OURS)]
    shown = listing(package, public=False)
    assert all(f"--include {name}" in shown for name in NOT_OURS)
    package = pack_folder(exported, ["notes.txt", "*.jsonl"])
    assert {file.name for file in package.files} - names == {"notes.txt", "rows.jsonl"}
    assert [one.name for one in package.left_out if one.name in NOT_OURS] == sorted(
        {*NOT_OURS} - {"notes.txt", "rows.jsonl"}
    )


def test_a_file_that_the_run_itself_wrote_is_sent_under_any_name_unless_it_was_changed(tmp_path):
    folder = make_adapter_folder(tmp_path / "out", kind="hub")
    (folder / "byte_maps.json").write_bytes(b"of the run")
    (folder / "emoji.json").write_bytes(b"changed since")
    files = {"byte_maps.json": hashlib.sha256(b"of the run").hexdigest(), "emoji.json": "0" * 64}
    (folder / "run_record.json").write_text(json.dumps({"status": "finished", "files": files}), "utf-8")
    package = pack_folder(folder)
    assert "byte_maps.json" in [file.name for file in package.files]
    assert "emoji.json" in [one.name for one in package.left_out]


@pytest.mark.parametrize("name", [".run_record.json.4711", ".writing-x", "desktop.ini"])
@pytest.mark.parametrize("place", ["", "merged/"])
def test_what_a_killed_process_or_the_desktop_left_is_not_sent(exported, name, place):
    (exported / place / name).write_text("half", "utf-8")
    package = pack_folder(exported, ["*"])
    assert f"{place}{name}" not in [file.name for file in package.files]
    assert f"left out: {place}{name}" in package.notes


def test_a_file_of_secrets_is_said_not_offered_and_refused_where_it_is_named(exported):
    (exported / ".env").write_text("A=1", "utf-8")
    (exported / "notes.txt").write_text(f"key {TOKEN}", "utf-8")
    package = pack_folder(exported)
    assert "left out: .env" in package.notes and ".env" not in listing(package, public=False)
    assert "notes.txt" in [one.name for one in package.left_out]
    for include in (".env", "*"):
        with pytest.raises(UserError, match=r"\.env: looks like a secret"):
            pack_folder(exported, [include])
    with pytest.raises(UserError, match=r"notes\.txt:1: looks like a secret"):
        pack_folder(exported, ["notes.txt"])


def test_what_tensorboard_wrote_is_never_sent_since_it_is_named_after_the_machine(exported):
    for name in (
        "runs/Dec01_10-20-30_host/events.out.tfevents.1.host.2.0",
        "events.out.tfevents.3.host",
        "merged/runs/x",
    ):
        (exported / name).parent.mkdir(parents=True, exist_ok=True)
        (exported / name).write_bytes(b"curves")
    pickled = b"\x80\x04X\x08\0\0\0out/runs/Dec01_10-20-30_host"  # of older versions: TrainingArguments.logging_dir
    (exported / "training_args.bin").write_bytes(pickled)
    for include in ([], ["*"]):
        package = pack_folder(exported, include)
        assert not [file.name for file in package.files if "runs" in file.name or "tfevents" in file.name]
        assert any("runs/" in note and "events.out.tfevents.3.host" in note for note in package.notes)
        assert "training_args.bin" not in [file.name for file in package.files]
        assert any("training_args.bin" in note and "or its name" in note for note in package.notes)
    with pytest.raises(UserError, match="--include runs: never sent: its files are named after this machine"):
        pack_folder(exported, ["runs"])


ROW = "<|im_start|>user\nmy private question<|im_end|>\n〔my private answer〕"
PAGE = """<!doctype html><meta name="generator" content="lora-finetune-practice report">
<p>3 rows</p>
{before}<p class="soft">The first row as the model sees it; <mark>the coloured part</mark> is what it is trained on:</p>
<pre>ask
<mark>my private answer</mark></pre>
{after}<h2>Settings</h2><pre>pip install</pre>
"""
MARKS = {"before": "<!-- first row -->\n", "after": "<!-- /first row -->\n"}


@pytest.mark.parametrize("marks", [MARKS, {"before": "", "after": ""}], ids=["marked", "from before the marks"])
def test_no_row_of_the_training_data_is_sent_and_the_folder_stays_as_it_is(tmp_path, marks):
    folder = make_adapter_folder(tmp_path / "out", kind="hub")
    card, config = (folder / name for name in ("README.md", "adapter_config.json"))
    files = {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in (card, config)}
    record = {"status": "finished", "data": {"rows_trained": 3, "first_row": ROW}, "files": files}
    (folder / "run_record.json").write_text(json.dumps(record), "utf-8")
    (folder / "report.html").write_text(PAGE.format(**marks), "utf-8")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    package = pack_folder(folder)
    sent = {file.name: file.data for file in package.files if file.data is not None}
    assert json.loads(sent.pop("run_record.json")) == {**record, "data": {"rows_trained": 3}}
    page = sent.pop("report.html").decode()
    assert "<h2>Settings</h2><pre>pip install</pre>" in page and "<p>3 rows</p>" in page and "first row" not in page
    assert not any(b"my private" in (file.data or file.path.read_bytes()) for file in package.files)
    note = "the first row of the training data taken out before sending (your files stay as they are): "
    assert package.notes == (note + "report.html, run_record.json",) and sent == {}
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_page_that_no_report_wrote_and_that_is_named_is_sent_as_it_is(exported):
    (exported / "report.html").write_text(PAGE.format(**MARKS).replace('report"', 'page"'), "utf-8")
    assert [file.data for file in pack_folder(exported).files if file.name == "report.html"] == [None]


def test_the_record_that_is_sent_holds_the_hashes_of_the_files_as_they_are_sent(tmp_path):
    base = tmp_path / "models" / "smol"
    folder = make_adapter_folder(tmp_path / "out", base=str(base))
    (folder / "training_args.bin").write_bytes(str(folder).encode())  # withheld
    record = json.loads((folder / "run_record.json").read_text("utf-8"))
    names = ("README.md", "adapter_config.json", "adapter_model.safetensors", "training_args.bin")
    record["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / "run_record.json").write_text(json.dumps(record), "utf-8")
    files = {file.name: file for file in pack_folder(folder).files}
    sent = json.loads(files["run_record.json"].data)
    assert sent["files"] == {name: files[name].sha256 for name in names[:-1]}
    assert sent["files"]["adapter_config.json"] != record["files"]["adapter_config.json"]


def test_a_secret_in_the_row_that_is_not_sent_stops_nothing(tmp_path):
    folder = make_adapter_folder(tmp_path / "out", kind="hub")
    record = {"status": "finished", "data": {"first_row": f"key {TOKEN}"}}
    (folder / "run_record.json").write_text(json.dumps(record), "utf-8")
    assert "run_record.json" in [file.name for file in pack_folder(folder).files]
    (folder / "run_record.json").write_text(json.dumps({**record, "command": f"x\n{TOKEN}"}), "utf-8")
    with pytest.raises(UserError, match=r"run_record\.json:\d+: looks like a secret"):
        pack_folder(folder)


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such names")
def test_names_that_could_steer_a_terminal_or_are_not_utf8_are_listed_with_escapes(exported):
    (exported / "a\x1b[2Jb\nc.txt").write_text("x", "utf-8")
    Path(os.fsdecode(os.fsencode(exported) + b"/\xff.txt")).write_text("x", "utf-8")
    (exported / "merged" / "\x1b]0;x.txt").write_text("x", "utf-8")
    shown = listing(pack_folder(exported, ["merged"]), public=False)
    assert "\x1b" not in shown and "  a\\x1b[2Jb\\nc.txt  " in shown and "merged/\\x1b]0;x.txt" in shown
    assert shown.encode("utf-8") and "\\udcff.txt" in shown
