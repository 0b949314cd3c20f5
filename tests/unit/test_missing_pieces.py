"""What is missing is said before anything is loaded, fetched or sent."""

from __future__ import annotations

import json

import pytest

from lora_practice import compat
from lora_practice.console.errors import UserError
from lora_practice.export.hub.package import pack_folder
from lora_practice.export.hub.redaction import base_names, private_paths
from lora_practice.inference import load as load_chat


def adapter_folder(path, **record):
    path.mkdir()
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "me/base"}', "utf-8")
    (path / "run_record.json").write_text(json.dumps(record), "utf-8")
    return path


def test_an_adapter_without_its_weights_is_not_packed(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        pack_folder(adapter_folder(tmp_path / "out"))


def test_an_unfinished_run_names_its_newest_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    for number in (3, 12):
        (tmp_path / "out" / f"checkpoint-{number}").mkdir(parents=True)
    with pytest.raises(UserError, match=r"unfinished; try .*checkpoint-12"):
        load_chat._local_folder(str(tmp_path / "out"))


def test_a_tracker_that_is_not_installed_comes_with_its_pip_line(monkeypatch):
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    compat.check_tracker("none")
    with pytest.raises(UserError, match="no_such_tracker is not installed -> pip install no_such_tracker"):
        compat.check_tracker("no_such_tracker")


def test_the_place_of_the_data_is_private_wherever_it_is(tmp_path):
    data = "/data/someone/chats.jsonl"
    folder = adapter_folder(tmp_path / "out", data={"path": data}, settings={"dataset_path": data, "seed": 1})
    assert private_paths(folder, base_names(folder))[data] == "chats.jsonl"
