"""The machine page: what is wrong on machines that are only described, with its cure, and how it reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import described as d
import pytest
from described import around

from lora_practice.console.terminal import columns
from lora_practice.machine.device import choose_device
from lora_practice.machine.doctor.diagnosis import MEND, NOTE, STOP, diagnose
from lora_practice.machine.doctor.page import MachineReport, machine_page
from lora_practice.machine.doctor.surroundings import (
    Hub,
    Need,
    Place,
    PlannedRun,
)
from lora_practice.machine.facts import Facts
from lora_practice.sources.find import SHIPPED

PLAN = PlannedRun(SHIPPED["model_name"], SHIPPED["dataset_path"], SHIPPED["dataset_name"], "outputs/mine")
GB = d.GB


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
            lines = machine_page(MachineReport(choose_device(facts), about, diagnose(facts, about))).splitlines()
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
        (d.LAPTOP, {"versions": {"trl": None}}, "No training yet: mend the first ! above."),
    ],
)
def test_the_verdict_comes_last(facts: Facts, more: dict[str, Any], last: str) -> None:
    about = around(**more)
    report = MachineReport(choose_device(facts), about, diagnose(facts, about))
    verdict = machine_page(report).rpartition("\n\n")[2].replace("\n", " ")
    assert all(words in verdict for words in last.split("|")), verdict
    assert verdict.endswith(last.rpartition("|")[2]) and report.can_train == ("next:" in verdict)
