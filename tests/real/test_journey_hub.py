"""The whole default path with a Hub, which here is a loopback server that the real client talks to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import HubServer
from journey_harness import TRAIN, Running, infer, succeeded

BASE, INSTRUCT, DATA = "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/smoltalk"
CONFIG = """---
configs:
- config_name: everyday-conversations
  data_files:
  - split: train
    path: data/everyday-conversations/train-*
- config_name: another
  data_files:
  - split: train
    path: data/another/train-*
---
"""
TURNS = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello! How can I help you?"}]


def seed(hub: HubServer, embedded_model: Path, place: Path) -> None:
    """A base without a chat template, an Instruct with one, and a data set with two configurations."""
    base = Path(shutil.copytree(embedded_model, place / "base"))
    for name in ("manifest.json", "LICENSE", "chat_template.jinja"):
        (base / name).unlink(missing_ok=True)
    config = json.loads((base / "tokenizer_config.json").read_text("utf-8"))
    config.pop("chat_template", None)
    config["eos_token"] = "<|endoftext|>"
    (base / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    hub.add_repo("models", BASE, base)

    instruct = place / "instruct"
    instruct.mkdir()
    for file in embedded_model.iterdir():
        if "token" in file.name or file.name in ("config.json", "chat_template.jinja", "vocab.json", "merges.txt"):
            shutil.copy(file, instruct)
    hub.add_repo("models", INSTRUCT, instruct)

    data = place / "data"
    for config_name, rows in (("everyday-conversations", 12), ("another", 1)):
        folder = data / "data" / config_name
        folder.mkdir(parents=True)
        table = pyarrow.table({"messages": [TURNS] * rows})
        pyarrow.parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    (data / "README.md").write_text(CONFIG, "utf-8")
    hub.add_repo("datasets", DATA, data)


@pytest.fixture(scope="module")
def journey(tmp_path_factory, embedded_model):
    """(folder, words, requests until the first line, requests in all) of a default run with a Hub."""
    place = tmp_path_factory.mktemp("hub")
    with HubServer() as hub:
        seed(hub, embedded_model, place)
        flags = ("--train_subset_size", "8", "--max_steps", "2", "--merge_adapter")
        run = Running(place, TRAIN, *flags, HF_ENDPOINT=hub.url)
        run.wait_for("2 steps, about")
        before = len(hub.requests)
        assert run.end() == 0, run.words
        requests = [f"{one.method} {one.path}" for one in hub.requests]
    return place / "outputs" / "SmolLM2-FT-MyDataset", run.words, before, requests


def test_the_defaults_come_from_the_hub(journey):
    folder, words, _, _ = journey
    record = json.loads((folder / "run_record.json").read_text("utf-8"))
    assert record["status"] == "finished" and "embedded" not in words
    model, data = record["model"], record["data"]
    assert (model["kind"], model["name"], model["hub_id"]) == ("hub", BASE, BASE)
    assert len(model["revision"]) == 40
    assert (data["kind"], data["name"], data["hub_id"], data["rows_trained"]) == ("hub", DATA, DATA, 8)
    assert "〔Hello! How can I help you?<|im_end|>〕" in data["first_row"]  # the template came from Instruct
    card = (folder / "README.md").read_text("utf-8")
    assert f"base_model: {BASE}\n" in card and f"- {DATA}\n" in card and model["revision"] in card
    for place in (folder, folder / "checkpoint-2"):
        config = json.loads((place / "adapter_config.json").read_text("utf-8"))
        assert config["base_model_name_or_path"] == BASE
    assert (folder / "merged" / "model.safetensors").is_file()


def test_training_and_saving_and_merging_ask_the_hub_nothing(journey):
    _, _, before, requests = journey
    assert before > 0 and requests[before:] == []


def test_the_hub_is_only_read(journey):
    assert {request.split()[0] for request in journey[3]} <= {"GET", "HEAD", "POST"}
    assert all("paths-info" in request for request in journey[3] if request.startswith("POST"))


def test_the_answer_comes_from_the_cache_when_the_hub_is_gone(journey):
    folder = journey[0]
    place = folder.parents[1]
    flags = ("--model-dir", str(folder), "--prompt", "Hi there", "--max-new-tokens", "5")
    # fresh: where the Hub's cache lies is read from HOME when the libraries are imported
    assert succeeded(infer(place, *flags, fresh=True, HF_ENDPOINT="http://127.0.0.1:9")).stdout.strip()
