"""The machine page: findings on described machines, what this machine really has, and how the page reads."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import described as d
import pytest
from described import around
from fresh_process import in_a_process
from hub_server import FINE_READ_TOKEN, FINE_TOKEN, READ_TOKEN, WRITE_TOKEN, HubServer

from lora_practice.machine.device import choose_device
from lora_practice.machine.doctor import surroundings
from lora_practice.machine.doctor.page import MachineReport, machine_page, report_as_json
from lora_practice.machine.doctor.surroundings import (
    PlannedRun,
    inspect_place,
    read_surroundings,
)
from lora_practice.sources.find import SHIPPED

pytestmark = pytest.mark.usefixtures("no_hub")
PLAN = PlannedRun(SHIPPED["model_name"], SHIPPED["dataset_path"], SHIPPED["dataset_name"], "outputs/mine")
GB = d.GB


def test_the_hub_is_asked_for_sizes_and_for_the_tokens_scope(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {"model.safetensors": 300_000, "pytorch_model.bin": 900_000, "onnx/model.safetensors": 700_000}
    files.update({"data/everyday-conversations/train.parquet": 50_000, "data/all/train.parquet": 800_000})
    for name, size in files.items():
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_bytes(bytes(size))
    hub.add_repo("models", PLAN.model_name, tmp_path / "repo")
    hub.add_repo("datasets", PLAN.dataset_path, tmp_path / "repo")
    for token, scope in (
        (WRITE_TOKEN, "write"),
        (READ_TOKEN, "read"),
        (FINE_TOKEN, "fineGrained"),
        (FINE_READ_TOKEN, "read"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        found = read_surroundings(PLAN, d.LAPTOP)
        assert (found.hub.token, found.hub.user, found.hub.reachable) == (scope, "alice", True)
    model, data = found.wanted
    assert (model.here, model.megabytes) == (False, 0.3)
    assert (data.here, data.megabytes) == (False, 0.05)
    everything = read_surroundings(dataclasses.replace(PLAN, dataset_name=""), d.LAPTOP).wanted[1]
    assert everything.megabytes == pytest.approx(2.75)
    assert "to be fetched, 0.3 MB" in machine_page(MachineReport(choose_device(d.LAPTOP), found, []))
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    report = MachineReport(choose_device(d.LAPTOP), read_surroundings(PLAN, d.LAPTOP), [])
    assert report.around.hub.token == "refused"
    assert "hf_of_nobody" not in machine_page(report) + json.dumps(report_as_json(report))


def test_a_hub_that_answers_once_and_then_hangs_is_not_waited_for(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surroundings, "ANSWER_SECONDS", 0.3)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    hub.hang("whoami", times=9)
    hub.hang("blobs", times=9)
    found = read_surroundings(PLAN, d.LAPTOP)
    assert (found.hub.reachable, found.hub.token) == (True, "unchecked")
    assert [need.megabytes for need in found.wanted] == [None, None]


def test_a_hub_that_breaks_off_is_no_answer(hub: HubServer, monkeypatch: pytest.MonkeyPatch, recwarn: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    hub.drop("whoami", times=9)
    hub.fail(404, "blobs", times=9)
    assert read_surroundings(PLAN, d.LAPTOP).hub.token == "unchecked"
    assert not [warning for warning in recwarn if "Thread" in str(warning.category)]


def test_no_hub_no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_surroundings(PLAN, d.LAPTOP)
    assert (found.hub.reachable, found.hub.offline_wanted, found.hub.token) == (False, False, "none")
    assert [need.here for need in found.wanted] == [False, False]


def test_what_is_on_this_disk_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hf/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"x" * 1000)
    data = tmp_path / "hf/datasets/HuggingFaceTB___smoltalk/everyday-conversations/0.0.0"
    data.mkdir(parents=True)
    (data / "dataset_info.json").write_text("{}")
    found = read_surroundings(PLAN, d.LAPTOP)
    assert [need.here for need in found.wanted] == [True, True]
    assert found.hub_cache.size == 1000
    own = read_surroundings(PlannedRun(str(tmp_path), str(data), "", "out"), d.LAPTOP)
    assert [need.here for need in own.wanted] == [True, True]
    monkeypatch.setenv("LORA_PRACTICE_CACHE", str(tmp_path / "empty"))
    assert [need.here for need in read_surroundings(PLAN, d.LAPTOP).embedded] == [False, False]


def test_after_a_finished_run_the_next_thing_is_to_talk(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, output_dir=str(tmp_path))
    for status, finished in (("running", False), ("finished", True), (7, False)):
        (tmp_path / "run_record.json").write_text(json.dumps({"status": status}), "utf-8")
        assert read_surroundings(plan, d.LAPTOP).finished is finished
    report = MachineReport(choose_device(d.LAPTOP), around(finished=True), [])
    assert report.next_command == "lora-practice chat output"
    assert machine_page(report).endswith("a run is finished already; next:\n  lora-practice chat output")


def test_counting_a_cache_stops_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    os.symlink(tmp_path / "a", tmp_path / "link")
    assert inspect_place(tmp_path).size < 1000
    assert inspect_place(tmp_path).whole
    monkeypatch.setattr(surroundings, "COUNT_SECONDS", -1)
    assert not inspect_place(tmp_path).whole
    assert inspect_place(tmp_path / "not" / "yet").writable
    assert not inspect_place(tmp_path / "a" / "below").writable


def test_this_machine_gets_its_page(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['lora-practice', 'doctor', '--json']\nfrom lora_practice.cli import main\nmain()"
    where = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    told = json.loads(in_a_process(code, tmp_path, **where).stdout)
    assert told["can_train"] is True
    assert told["decision"]["device"] in ("cpu", "cuda") and told["decision"]["reason"]
    assert told["machine"]["cores"] >= 1 and told["machine"]["memory_total"] > GB
    assert told["surroundings"]["hub"]["reachable"] is False
    assert told["next_command"] == "lora-practice train --embedded"
    assert list(tmp_path.iterdir()) == []  # nothing was written
