"""What can be wrong with the record of a run, its checkpoints, the place it is to be written to, and its upload."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable

from bad_inputs.folders import ADAPTER, CONFIG, DEEP, RECORD, edit, link_loop, remove, write
from lora_practice.storage import manifest

CHECKPOINT, MANIFEST = "checkpoint-1", "checkpoint.json"
Damage = Callable[[Path], None]
Case = tuple[str, Damage, str]
SLOW = "(((a+)+)+)+$|(.*.*.*.*.*.*)*x"  # matching it against a layer's name would take longer than anybody lives


def nested(levels: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def stop(folder: Path) -> Path:
    """Make a finished run one that was interrupted after its first checkpoint."""
    edit(RECORD, status="interrupted")(folder)
    checkpoint = folder / CHECKPOINT
    checkpoint.mkdir()
    for file in [one for one in folder.iterdir() if one.is_file() and one.name != RECORD]:
        shutil.copy(file, checkpoint)
    manifest.write_manifest(checkpoint, MANIFEST)
    return folder


def link(name: str, target: str) -> Damage:
    """Put a link in the folder."""

    def damage(folder: Path) -> None:
        (folder / name).symlink_to(target)

    return damage


def noted(files: Any) -> Damage:
    """A checkpoint's manifest that says this of its files."""
    return write(f"{CHECKPOINT}/{MANIFEST}", json.dumps({"files": files}).encode())


def without_digests(folder: Path) -> None:
    """A checkpoint's manifest that knows sizes and times only."""
    files = json.loads((folder / CHECKPOINT / MANIFEST).read_text("utf-8"))["files"]
    noted({name: {"size": one["size"], "mtime_ns": one["mtime_ns"]} for name, one in files.items()})(folder)


# (what is done, a part of the English complaint) of each reader of the record: resume, infer, merge, upload
BAD_RECORDS: list[Case] = [
    ("no JSON", write(RECORD, b"{"), "not valid JSON"),
    ("empty", write(RECORD, b""), "not valid JSON"),
    ("a page", write(RECORD, b"<html>\nnot\nfound</html>"), "not valid JSON"),
    ("a list", write(RECORD, b"[1]"), "not a JSON object"),
    ("a text", write(RECORD, b'"finished"'), "not a JSON object"),
    ("GBK", write(RECORD, '{"底座": 1}'.encode("gbk")), "not UTF-8"),
    ("nests very deep", write(RECORD, DEEP), "nested too deep"),
    ("an object that nests very deep", write(RECORD, b'{"settings": ' + DEEP), "nested too deep"),
    ("nests deeper than its readers", edit(RECORD, settings={"lora_r": nested(300)}), "nested too deep"),
    ("model is a list", edit(RECORD, model=["me/one"]), "model is of the wrong kind"),
    ("model is a name", edit(RECORD, model="me/one"), "model is of the wrong kind"),
    ("model's name is a list", edit(RECORD, model={"name": ["me/one"]}), "model.name is of the wrong kind"),
    ("model's path is a number", edit(RECORD, model={"path": 3}), "model.path is of the wrong kind"),
    ("model's Hub name is an object", edit(RECORD, model={"hub_id": {"a": 1}}), "model.hub_id is of the wrong kind"),
    ("model's files are a list", edit(RECORD, model={"files": ["config.json"]}), "model.files is of the wrong kind"),
    ("model's file is a number", edit(RECORD, model={"files": {"a": 3}}), "model.files is of the wrong kind"),
    ("data is a list", edit(RECORD, data=[{"kind": "hub"}]), "data is of the wrong kind"),
    ("data's path is a list", edit(RECORD, data={"path": ["a"]}), "data.path is of the wrong kind"),
    ("settings are a list", edit(RECORD, settings=["lora_r", 6]), "settings is of the wrong kind"),
    ("status is a number", edit(RECORD, status=1), "status is of the wrong kind"),
    ("losses are a text", edit(RECORD, losses="low"), "losses is of the wrong kind"),
]
# of a run that is to be resumed
BAD_RUNS: list[Case] = [
    *BAD_RECORDS,
    ("given flags that are a number", edit(RECORD, given=5, settings={"lora_r": "x"}), "lora_r: x -> 6"),
    ("given flags that are objects", edit(RECORD, given=[{"a": 1}], settings={"lora_r": "x"}), "lora_r: x -> 6"),
    ("other settings", edit(RECORD, settings={"lora_r": 7}), "lora_r: 7 -> 6"),
    ("a setting as text", edit(RECORD, settings={"max_length": "512"}), "max_length"),
    (
        "a setting of lines",
        edit(RECORD, settings={"optim": "a\nError: all is well\x1b[2J" * 99}),
        "got 'a\\nError: all",
    ),
    ("a setting as an object", edit(RECORD, settings={"seed": {"a": [1]}}), "seed"),
    ("finished", edit(RECORD, status="finished", finished_at="2\nError: x", steps=["\x1b[2J"]), "a finished run"),
    ("manifest is no JSON", write(f"{CHECKPOINT}/{MANIFEST}", b"{"), "no whole checkpoint"),
    ("manifest is a list", write(f"{CHECKPOINT}/{MANIFEST}", b"[1]"), "no whole checkpoint"),
    ("manifest nests deep", write(f"{CHECKPOINT}/{MANIFEST}", b'{"files": ' + DEEP), "no whole checkpoint"),
    ("manifest is a link to itself", link_loop(f"{CHECKPOINT}/{MANIFEST}"), "no whole checkpoint"),
    ("manifest lists nothing", noted({}), "no whole checkpoint"),
    ("manifest has a list of names", noted([ADAPTER]), "no whole checkpoint"),
    ("manifest's notes are lists", noted({ADAPTER: [1, 2]}), "no whole checkpoint"),
    ("manifest has no digests", without_digests, "no whole checkpoint"),
    ("manifest's notes are empty", noted({ADAPTER: {}}), "no whole checkpoint"),
    ("manifest's sizes are text", noted({ADAPTER: {"size": "9", "mtime_ns": "9", "sha256": 9}}), "no whole checkpoint"),
    ("manifest names what lies outside", noted({"../run_record.json": {"size": 1}}), "no whole checkpoint"),
    ("manifest names a place", noted({"/etc/hostname": {"size": 1}}), "no whole checkpoint"),
    ("manifest names what is missing", noted({"optimizer.pt": {"size": 1}}), "no whole checkpoint"),
    ("weights cut", lambda folder: os.truncate(folder / CHECKPOINT / ADAPTER, 100), "no whole checkpoint"),
    ("weights gone", remove(f"{CHECKPOINT}/{ADAPTER}"), "no whole checkpoint"),
    ("weights are a link to themselves", link_loop(f"{CHECKPOINT}/{ADAPTER}"), "no whole checkpoint"),
]
# of a folder that is to be uploaded
BAD_UPLOADS: list[Case] = [
    *BAD_RECORDS,
    ("config nests deep", write(CONFIG, b'{"a": ' + DEEP), "nested too deep"),
    ("config nests deeper than its readers", edit(CONFIG, r=nested(300)), "nested too deep"),
    ("config is a list", write(CONFIG, b"[1]"), "not a JSON object"),
    ("weights gone", remove(ADAPTER), f"{ADAPTER} is missing"),
    ("config and weights gone", remove(CONFIG, ADAPTER), "no adapter_config.json"),
    ("a link to itself", link("notes.txt", "notes.txt"), "this link leads outside the folder, or to itself"),
    ("links to each other", lambda f: (link("a", "b")(f), link("b", "a")(f)), "this link leads outside"),  # type: ignore[func-returns-value]
    ("a link to a file outside", link("notes.txt", "../outside.txt"), "this link leads outside"),
    ("a dangling link that leads outside", link("notes.txt", "../nowhere"), "this link leads outside"),
    ("a link to a link outside", lambda f: (link("x", "../outside.txt")(f), link("y", "x")(f)), "leads outside"),  # type: ignore[func-returns-value]
    ("a secret's name", write(".env", b"A=1"), "looks like a secret"),
    ("a key", write("notes.md", b"-----BEGIN PRIVATE KEY-----\n"), "notes.md:1: looks like a secret"),
    ("a token in the config", edit(CONFIG, revision="hf_" + "Q" * 34), "looks like a secret (Hugging Face token)"),
    ("a card that is GBK", write("README.md", "模型".encode("gbk")), "not UTF-8"),
]
# what lies at "out" before a run is to be written there (made in an empty folder)
BAD_TARGETS: list[Case] = [
    ("a file", lambda place: (place / "out").write_text("mine") and None, "a file, not a folder"),
    ("a dangling link", link("out", "nowhere"), "this link leads nowhere"),
    ("a link to itself", link("out", "out"), "this link leads nowhere"),
    ("links to each other", lambda f: (link("out", "b")(f), link("b", "out")(f)), "this link leads nowhere"),  # type: ignore[func-returns-value]
    ("a link to a file", lambda f: ((f / "x").touch(), link("out", "x")(f)), "a file, not a folder"),  # type: ignore[func-returns-value]
    ("a folder with other files", lambda f: ((f / "out").mkdir(), (f / "out/x").touch()), "holds other files"),
    (
        "a record that is a folder",
        lambda f: (f / "out" / RECORD).mkdir(parents=True),
        "holds other files",
    ),
]
# adapter_config.json against whoever matches its patterns
HOSTILE_PATTERNS: list[Case] = [
    ("targets are a slow pattern", edit(CONFIG, target_modules=SLOW), "target_modules is no list of names"),
    ("targets list a slow pattern", edit(CONFIG, target_modules=["q_proj", SLOW]), "target_modules"),
    ("targets are an object", edit(CONFIG, target_modules={"q_proj": 1}), "target_modules"),
    ("a target of a million letters", edit(CONFIG, target_modules=["q" * 10**6]), "target_modules"),
    ("exclusions are a slow pattern", edit(CONFIG, exclude_modules=SLOW), "exclude_modules"),
    ("layers by a slow pattern", edit(CONFIG, layers_pattern=[SLOW], layers_to_transform=[0]), "layers_pattern"),
    ("saved by a slow pattern", edit(CONFIG, modules_to_save=[SLOW]), "modules_to_save"),
    ("parameters by number", edit(CONFIG, target_parameters=[1]), "target_parameters"),
    ("ranks by a slow pattern", edit(CONFIG, rank_pattern={SLOW: 4}), "rank_pattern is no table"),
    ("a huge rank for one layer", edit(CONFIG, rank_pattern={"q_proj": 10**9}), "rank_pattern"),
    ("a rank of text", edit(CONFIG, rank_pattern={"q_proj": "6"}), "rank_pattern"),
    ("alphas in a list", edit(CONFIG, alpha_pattern=[8]), "alpha_pattern"),
    ("a rank beyond the weights", edit(CONFIG, r=60_000), "but its weights have rank 6"),
]
