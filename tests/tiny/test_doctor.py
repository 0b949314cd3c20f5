"""The passport: what is wrong on machines that are only described, what this one really has, and how it reads."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any, Optional

import described as d
import pytest
from fresh_process import in_a_process
from hub_server import FINE_READ_TOKEN, FINE_TOKEN, READ_TOKEN, WRITE_TOKEN, HubServer

from lora_practice.compat import LIBRARIES
from lora_practice.console.terminal import columns
from lora_practice.machine.device import decide
from lora_practice.machine.doctor import surroundings
from lora_practice.machine.doctor.diagnosis import MEND, NOTE, STOP, diagnose
from lora_practice.machine.doctor.page import MachineReport, machine_page, report_as_json
from lora_practice.machine.doctor.surroundings import (
    Hub,
    Need,
    Place,
    PlannedRun,
    Surroundings,
    inspect_place,
    read_surroundings,
)
from lora_practice.machine.facts import Facts
from lora_practice.sources.find import SHIPPED

pytestmark = pytest.mark.usefixtures("no_hub")
PLAN = PlannedRun(SHIPPED["model_name"], SHIPPED["dataset_path"], SHIPPED["dataset_name"], "outputs/mine")
GB = d.GB


def around(**more: Any) -> Surroundings:
    """Everything in order, but for `more`."""
    fine = {name: Place(name, 50 * GB, True, 0) for name in ("output", "cache", "hub_cache", "datasets_cache")}
    hub = Hub("https://huggingface.co", True, False, "none")
    here = (Need("a model", True, 1.0), Need("chats", True, 1.0))
    versions: dict[str, Optional[str]] = dict.fromkeys(LIBRARIES, "1.0")
    parts: dict[str, Any] = {
        **fine,
        "hub": hub,
        "embedded": here,
        "wanted": here,
        "compiler": "g++",
        "versions": versions,
        "finished": False,
    }
    return Surroundings(**{**parts, **more})


def findings(facts: Facts, **more: Any) -> list[tuple[str, str]]:
    return [(one.level, f"{one.what} -> {one.cure}") for one in diagnose(facts, around(**more))]


UNREACHED = Hub("https://mirror.example", False, False, "none")
ABSENT = (Need("owner/model", False, None), Need("chats", True, None))
NOT_HERE = (Need("wheel", False, 92.9), Need("chats", True, 0.3))
# facts, what differs around them, level, words of the finding
WRONG = [
    (d.GTX_1060_NEW_TORCH, {}, MEND, "no kernels for NVIDIA GeForce GTX 1060 6GB (sm_61)"),
    (d.GTX_1060_NEW_TORCH, {}, MEND, "-> pip install torch==2.8.0+cu126 --extra-index-url"),
    (d.CPU_BUILD, {}, MEND, "the installed torch is a CPU build"),
    (d.DRIVER_TOO_OLD, {}, MEND, "driver 535.183.01 is too old"),
    (d.NO_DRIVER, {}, MEND, "an NVIDIA card without a working driver -> install NVIDIA's driver (580 at most"),
    (dataclasses.replace(d.NO_DRIVER, driver_trouble="Driver/library version mismatch"), {}, MEND, "version mismatch"),
    (d.unreached("Tesla K80", 3, 7, "12.6"), {}, NOTE, "too old: no torch since 2.6"),
    (d.GTX_1080_TI, {}, NOTE, "torch 2.14 is the last for it, and driver 580"),
    (d.V100, {}, NOTE, "do not upgrade to torch 2.15"),
    (d.WSL_NO_CARD, {}, NOTE, "WSL 2, with the driver installed in Windows"),
    (d.SMALL_CONTAINER, {}, NOTE, "64 cores, 2 of them usable here"),
    (d.SMALL_CONTAINER, {}, MEND, "1.6 GB of memory free; short chats take about 1.5 GB -> give the container more"),
    (dataclasses.replace(d.SMALL_CONTAINER, memory_total=GB, memory=GB // 2), {}, STOP, "1.0 GB of memory"),
    (dataclasses.replace(d.LAPTOP, memory_total=8 * GB, memory=GB), {}, MEND, "close other programs"),
    (dataclasses.replace(d.LAPTOP, memory=GB, memory_ulimit=GB), {}, MEND, "-> ulimit -v unlimited, or add"),
    (d.OLD_LAPTOP, {}, NOTE, "no AVX2"),
    (d.LAPTOP, {"compiler": None}, MEND, "no C++ compiler"),
    (d.LAPTOP, {"versions": {"torch": "2.13.0", "peft": None}}, STOP, "not installed: peft -> pip install -e ."),
    (dataclasses.replace(d.LAPTOP, torch="", torch_trouble="DLL load failed"), {}, STOP, "torch does not load: DLL"),
    (dataclasses.replace(d.LAPTOP, torch="2.5.1"), {}, STOP, "torch 2.5.1 is too old to resume"),
    (d.LAPTOP, {"output": Place("/mnt", 50 * GB, False, 0)}, STOP, "/mnt cannot be written"),
    (d.LAPTOP, {"output": Place("/mnt", 10**8, True, 0)}, STOP, "/mnt: 100 MB free, 200 MB needed"),
    (d.LAPTOP, {"cache": Place("/c", 10**8, True, 0), "embedded": NOT_HERE}, STOP, "with LORA_PRACTICE_CACHE"),
    (d.LAPTOP, {"hub": UNREACHED, "wanted": ABSENT}, MEND, "mirror.example cannot be reached, so owner/model"),
    (
        d.LAPTOP,
        {"hub": Hub("x", False, True, "none"), "wanted": ABSENT},
        MEND,
        "-> unset HF_HUB_OFFLINE, or use --embedded",
    ),
    (d.LAPTOP, {"hub": Hub("x", True, False, "refused")}, MEND, "does not accept your token"),
    (d.LAPTOP, {"hub": Hub("x", True, False, "read", "alice")}, NOTE, "read-only: it fetches, but cannot upload"),
]


@pytest.mark.parametrize(("facts", "more", "level", "words"), WRONG)
def test_what_is_wrong_is_found(facts: Facts, more: dict[str, Any], level: str, words: str) -> None:
    assert any(found[0] == level and words in found[1] for found in findings(facts, **more)), findings(facts, **more)


@pytest.mark.parametrize(
    ("facts", "more"),
    [
        (d.LAPTOP, {}),
        (d.BF16_CPU, {}),
        (d.AVX512_CPU, {"cache": Place("/c", 10**8, False, 0)}),  # nothing has to be written there
        (d.RTX_3060, {"compiler": None}),  # the card needs none
        (d.T4, {}),
        (d.GTX_1650, {}),
        (d.LAPTOP, {"hub": UNREACHED}),  # what is wanted is here
    ],
)
def test_a_machine_in_order_has_no_findings(facts: Facts, more: dict[str, Any]) -> None:
    facts = dataclasses.replace(facts, board_cores=facts.cores)
    assert findings(facts, **more) == []


def described() -> list[Facts]:
    return [facts for facts in vars(d).values() if isinstance(facts, Facts)]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_every_page_fits_80_columns_but_for_commands(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", language)
    for facts in described():
        for more in ({}, {"hub": UNREACHED, "wanted": ABSENT, "compiler": None}, {"versions": {"torch": None}}):
            about = around(**more)
            lines = machine_page(MachineReport(decide(facts), about, diagnose(facts, about))).splitlines()
            assert [line for line in lines if columns(line) > 80 and "pip install" not in line] == []


@pytest.mark.parametrize(
    ("facts", "more", "last"),
    [
        (
            d.GTX_1060,
            {},
            "use NVIDIA GeForce GTX 1060 6GB (sm_61): this|64 times slower than fp32, so fp32|lora-practice train",
        ),
        (d.T4, {}, "Tesla T4 (sm_75): fp16, which is fast on it; no bf16|lora-practice train"),
        (d.RTX_3060, {}, "RTX 3060 (sm_86): fp16 by default|--bf16 is steadier|lora-practice train"),
        (d.CPU_BUILD, {}, "CPU, fp32: the card cannot be used, see above; the CPU|lora-practice train"),
        (d.LAPTOP, {}, "CPU, fp32: no usable NVIDIA card; the CPU has no bf16|lora-practice train"),
        (d.BF16_CPU, {"hub": UNREACHED, "wanted": ABSENT}, "--bf16 is faster|lora-practice train --embedded"),
        (d.LAPTOP, {"versions": {"trl": None}}, "No training yet: mend the first ! above"),
    ],
)
def test_the_verdict_comes_last(facts: Facts, more: dict[str, Any], last: str) -> None:
    about = around(**more)
    passport = MachineReport(decide(facts), about, diagnose(facts, about))
    verdict = machine_page(passport).rpartition("\n\n")[2].replace("\n", " ")
    assert all(words in verdict for words in last.split("|")), verdict
    assert verdict.endswith(last.rpartition("|")[2]) or not passport.can_train


# What really is around


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
    assert "to be fetched, 0.3 MB" in machine_page(MachineReport(decide(d.LAPTOP), found, []))
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    passport = MachineReport(decide(d.LAPTOP), read_surroundings(PLAN, d.LAPTOP), [])
    assert passport.around.hub.token == "refused"
    assert "hf_of_nobody" not in machine_page(passport) + json.dumps(report_as_json(passport))


def test_a_hub_that_answers_once_and_then_hangs_is_not_waited_for(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surroundings, "ANSWER_SECONDS", 0.3)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    hub.hang("whoami", times=9)
    hub.hang("blobs", times=9)
    started = time.monotonic()
    found = read_surroundings(PLAN, d.LAPTOP)
    assert time.monotonic() - started < 4
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
    passport = MachineReport(decide(d.LAPTOP), around(finished=True), [])
    assert passport.next_command == "lora-practice chat output"
    assert machine_page(passport).endswith("a run is finished already; next:\n  lora-practice chat output")


def test_counting_a_cache_stops_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    os.symlink(tmp_path / "a", tmp_path / "link")
    assert inspect_place(tmp_path).size < 1000
    assert inspect_place(tmp_path).whole
    monkeypatch.setattr(surroundings, "COUNT_SECONDS", -1)
    assert not inspect_place(tmp_path).whole
    assert inspect_place(tmp_path / "not" / "yet").writable
    assert not inspect_place(tmp_path / "a" / "below").writable


def test_this_machine_gets_its_passport(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['lora-practice', 'doctor', '--json']\nfrom lora_practice.cli import main\nmain()"
    where = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    told = json.loads(in_a_process(code, tmp_path, **where).stdout)
    assert told["can_train"] is True
    assert told["decision"]["device"] in ("cpu", "cuda") and told["decision"]["reason"]
    assert told["machine"]["cores"] >= 1 and told["machine"]["memory_total"] > GB
    assert told["surroundings"]["hub"]["reachable"] is False
    assert told["next_command"] == "lora-practice train --embedded"
    assert list(tmp_path.iterdir()) == []  # nothing was written
