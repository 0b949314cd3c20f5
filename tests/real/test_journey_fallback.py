"""Without a Hub: the defaults fall back to the embedded ones and say so; what was named is never replaced."""

from __future__ import annotations

import json

import pytest
from hub_server import HubServer
from journey_harness import INFER, refused, succeeded, train

from lora_practice.console.errors import UserError
from lora_practice.sources import embedded, environment
from lora_practice.sources.find import find_dataset, find_model

FEW = ("--train_subset_size", "4", "--max_steps", "1")


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is known yet about the Hub; whatever is found out is forgotten again."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    environment.hub_is_reachable.cache_clear()
    yield monkeypatch
    environment.hub_is_reachable.cache_clear()


def test_an_embedded_run_sends_nothing_to_the_hub(tmp_path, embedded_model, embedded_rows):
    """Neither TRL's telemetry nor huggingface_hub's, though a Hub is there."""
    with HubServer() as hub:
        succeeded(train(tmp_path, "--embedded", *FEW, fresh=True, HF_ENDPOINT=hub.url))
        assert hub.requests == []


def test_default_flags_without_a_hub_train_the_embedded_model_and_say_so(tmp_path, embedded_model, embedded_rows):
    done = succeeded(train(tmp_path, *FEW))
    told = [line for line in done.stderr.splitlines() if "cannot be reached" in line]
    assert len(told) == 2 and len(set(told)) == 2  # one line for the model, one for the data
    assert "embedded SmolLM2-135M-Instruct" in told[0] and "embedded English conversations" in told[1]
    folder = tmp_path / "outputs" / "SmolLM2-FT-MyDataset"
    record = json.loads((folder / "run_record.json").read_text("utf-8"))
    for thing in ("model", "data"):
        assert record[thing]["kind"] == "embedded" and "cannot be reached" in record[thing]["note"]
    assert record["model"]["hub_id"] == embedded.MODEL_HUB_ID
    card = (folder / "README.md").read_text("utf-8")
    assert "It stood in for the default" in card and f"base_model: {embedded.MODEL_HUB_ID}" in card
    assert done.stderr.rstrip().endswith(f"python {INFER}")  # the default folder needs no flag


def test_offline_mode_falls_back_the_same_way_without_asking_anyone(fresh, embedded_model, embedded_rows, capfd):
    with HubServer() as hub:
        fresh.setenv("HF_ENDPOINT", hub.url)
        fresh.setenv("HF_HUB_OFFLINE", "1")
        base = find_model("HuggingFaceTB/SmolLM2-135M", is_default=True)
        data = find_dataset("HuggingFaceTB/smoltalk", is_default=True)
        assert hub.requests == []
    assert (base.kind, base.path, data.kind, data.path) == ("embedded", embedded_model, "embedded", embedded_rows)
    assert base.note and data.note


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model_name", "someone/their-model"), ("someone/their-model", "cannot be reached")),
        (("--dataset_path", "someone/their-data"), ("someone/their-data", "cannot be reached")),
        (("--model_name", "./no/such/folder"), ("no such model folder", "./no/such/folder")),
        (("--model_name", "x/y", "--embedded"), ("--embedded", "x/y")),
    ],
)
def test_what_the_user_named_is_never_replaced_and_nothing_is_written(tmp_path, embedded_model, flags, words):
    refused(train(tmp_path, *FEW, *flags, "--output_dir", "out"), *words)
    assert not (tmp_path / "out").exists()


def test_named_things_are_refused_in_offline_mode_too(tmp_path):
    done = train(tmp_path, *FEW, "--model_name", "someone/their-model", HF_HUB_OFFLINE="1", LORA_PRACTICE_LANG="zh")
    assert refused(done, "someone/their-model").startswith("错误：")


def test_a_hub_that_hangs_is_given_up(fresh):
    with HubServer() as hub:
        hub.hang(times=9)
        fresh.setenv("HF_ENDPOINT", hub.url)
        fresh.setattr(environment, "REACH_SECONDS", 0.3)
        assert not environment.hub_is_reachable()


def test_a_model_that_the_hub_does_not_have_is_one_clear_line(fresh):
    with HubServer() as hub:
        fresh.setenv("HF_ENDPOINT", hub.url)
        fresh.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        with pytest.raises(UserError, match="no such name"):
            find_model("someone/their-model", is_default=False)
