"""Device and precision for machines that are only described: `choose_device` is a pure function of the facts."""

from __future__ import annotations

import dataclasses
from typing import Any

import described as d
import pytest
from described import GB, card, unreached
from hypothesis import given
from hypothesis import strategies as st

from lora_practice.console.errors import UserError
from lora_practice.machine.device import choose_device, load_advice
from lora_practice.machine.facts import Facts
from lora_practice.machine.gpu_problems import gpu_problem
from lora_practice.machine.gpus import runs_on


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")


# facts, what the user asks for, device, precision, a word of the reason or the advice
TABLE = [
    (d.GTX_1060, {}, "cuda", "fp32", "64 times slower"),
    (d.GTX_1060, {"weights": 1 * GB}, "cuda", "fp32", "(sm_61)"),
    (d.GTX_1060, {"weights": 3 * GB}, "cuda", "fp16", "does not fit in fp32"),
    (d.GTX_1060, {"device": "cuda"}, "cuda", "fp32", "so fp32"),
    (d.GTX_1060_NEW_TORCH, {}, "cpu", "fp32", "no kernels for NVIDIA GeForce GTX 1060 6GB (sm_61)"),
    (d.GTX_1060_NEW_TORCH, {}, "cpu", "fp32", "to use the card: pip install torch==2.8.0+cu126"),
    (d.GTX_1060_NEW_TORCH, {"device": "cpu"}, "cpu", "fp32", "using the CPU"),
    (d.GTX_1080_TI, {}, "cuda", "fp32", "GTX 1080 Ti"),
    (card("Tesla P40", 6, 1, "12.6"), {}, "cuda", "fp32", "sm_61"),
    (card("GTX 960M", 5, 0, "12.6"), {}, "cuda", "fp32", "no fp16 arithmetic"),
    (d.GTX_970, {}, "cuda", "fp32", "sm_52"),
    (card("GTX 970", 5, 2, "13.0"), {}, "cpu", "fp32", "sm_75, sm_80"),
    (card("Tesla K80", 3, 7, "12.6"), {}, "cpu", "fp32", "too old: no torch since 2.6"),
    (d.P100, {}, "cuda", "fp16", "sm_60"),
    (d.V100, {}, "cuda", "fp16", "sm_70"),
    (card("Tesla V100", 7, 0, "13.0"), {}, "cpu", "fp32", "torch==2.13.0+cu126"),
    (d.GTX_1650, {}, "cuda", "fp32", "NaN"),
    (card("NVIDIA GeForce GTX 1660 Ti", 7, 5, "12.6"), {}, "cuda", "fp32", "NaN"),
    (card("Quadro T2000", 7, 5, "13.0"), {}, "cuda", "fp32", "NaN"),
    (card("NVIDIA GeForce MX450", 7, 5, "13.0"), {}, "cuda", "fp32", "NaN"),
    (card("Quadro RTX 4000", 7, 5, "13.0"), {}, "cuda", "fp16", "sm_75"),
    (d.T4, {}, "cuda", "fp16", "Tesla T4"),
    (d.T4, {"device": "cuda"}, "cuda", "fp16", "sm_75"),
    (d.T4, {"device": "cpu"}, "cpu", "fp32", "CPU as asked"),
    (d.RTX_2060, {}, "cuda", "fp16", "sm_75"),
    (d.RTX_3060, {}, "cuda", "fp16", "--bf16 is steadier"),
    (d.RTX_3060, {"bf16": True}, "cuda", "bf16", "sm_86"),
    (card("RTX 4060", 8, 9, "12.8"), {}, "cuda", "fp16", "sm_89"),
    (dataclasses.replace(card("H100", 9, 0, ""), kernels=("sm_90a",)), {"bf16": True}, "cuda", "bf16", "sm_90"),
    (card("RTX 5090", 12, 0, "12.8"), {}, "cuda", "fp16", "sm_120"),
    (card("RTX 5090", 12, 0, "12.6"), {}, "cpu", "fp32", "torch==2.13.0+cu130"),
    (card("a later card", 13, 0, "12.8"), {}, "cuda", "fp16", "a later card"),
    (card("a later card", 13, 0, "13.0"), {}, "cpu", "fp32", "no kernels"),
    (card("built by hand", 6, 1, ""), {}, "cuda", "fp32", "built by hand"),
    (Facts(gpu="NVIDIA", driver="535.1", cuda="12.6"), {}, "cpu", "fp32", "cannot be used (driver or torch)"),
    (dataclasses.replace(d.T4, cuda_usable=False), {}, "cpu", "fp32", "cannot be used"),
    (d.CPU_BUILD, {}, "cpu", "fp32", "CPU build"),
    (d.DRIVER_TOO_OLD, {}, "cpu", "fp32", "driver 535.183.01 is too old: a torch for CUDA 13.0 needs 580"),
    (dataclasses.replace(d.CPU_BUILD, card_hidden=True), {}, "cpu", "fp32", "unset CUDA_VISIBLE_DEVICES"),
    (d.NO_DRIVER, {}, "cpu", "fp32", "an NVIDIA card without a working driver: using the CPU"),
    (Facts(driver_trouble="Driver/library version mismatch"), {}, "cpu", "fp32", "version mismatch"),
    (d.WSL_NO_CARD, {}, "cpu", "fp32", "no usable NVIDIA card"),
    (d.OLD_LAPTOP, {}, "cpu", "fp32", "no usable NVIDIA card"),
    (d.LAPTOP, {}, "cpu", "fp32", "no usable NVIDIA card"),
    (d.AVX512_CPU, {}, "cpu", "fp32", "no usable NVIDIA card"),
    (d.MAC, {}, "cpu", "fp32", "no usable NVIDIA card"),
    (d.SMALL_CONTAINER, {}, "cpu", "fp32", "no usable NVIDIA card"),
    (d.BF16_CPU, {}, "cpu", "fp32", "--bf16 is faster"),
    (d.BF16_CPU, {"bf16": True}, "cpu", "bf16", "no usable NVIDIA card"),
    (dataclasses.replace(d.GTX_1060_NEW_TORCH, cpu_bf16=True), {"bf16": True}, "cpu", "bf16", "no kernels"),
]


@pytest.mark.parametrize(("facts", "asked", "device", "precision", "word"), TABLE)
def test_decisions(facts: Facts, asked: dict[str, Any], device: str, precision: str, word: str) -> None:
    chosen = choose_device(facts, **asked)
    assert (chosen.device, chosen.precision) == (device, precision)
    assert word in f"{chosen.reason} {chosen.advice}"
    assert "\n" not in chosen.reason


@pytest.mark.parametrize("asked", [{"device": "cpu"}, {"device": "cpu", "bf16": True}])
def test_a_good_card_does_not_change_what_the_cpu_is_asked_for(asked: dict[str, Any]) -> None:
    chosen = choose_device(dataclasses.replace(d.RTX_3060, cpu_bf16=True), **asked)
    assert (chosen.device, chosen.reason) == ("cpu", "CPU as asked")


@pytest.mark.parametrize(
    ("facts", "asked", "word"),
    [
        (d.T4, {"bf16": True}, "no real bf16 (compute capability 7.5"),
        (d.GTX_1060, {"bf16": True}, "no real bf16 (compute capability 6.1"),
        (d.V100, {"bf16": True}, "no real bf16 (compute capability 7.0"),
        (d.LAPTOP, {"bf16": True}, "no bf16 instructions"),
        (d.GTX_1060_NEW_TORCH, {"bf16": True}, "no bf16 instructions"),
        (d.LAPTOP, {"device": "cuda"}, "no usable NVIDIA card"),
        (d.GTX_1060_NEW_TORCH, {"device": "cuda"}, "or pip install torch==2.8.0+cu126"),
        (Facts(gpu="NVIDIA"), {"device": "cuda"}, "cannot be used"),
    ],
)
def test_refusals(facts: Facts, asked: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError) as caught:
        choose_device(facts, **asked)
    assert word in str(caught.value)
    assert caught.value.fix


CU126_INDEX = " --extra-index-url https://download.pytorch.org/whl/cu126"
# a machine whose card does not run, and the cure
CURES = [
    (d.GTX_1060_NEW_TORCH, "pip install torch==2.8.0+cu126" + CU126_INDEX),
    (d.CPU_BUILD, "pip install torch==2.13.0+cu126" + CU126_INDEX),
    # the last torch with kernels for it is 2.14
    (card("Tesla V100", 7, 0, "13.0", torch="2.15.0+cu130"), "pip install torch==2.13.0+cu126" + CU126_INDEX),
    (
        card("Tesla V100", 7, 0, "13.0", torch="2.15.0+cu130", python=(3, 9)),
        "pip install torch==2.8.0+cu126" + CU126_INDEX,
    ),
    (d.DRIVER_TOO_OLD, "pip install torch==2.13.0+cu126" + CU126_INDEX),
    (
        unreached("RTX 3060", 8, 6, "", torch="2.13.0", driver="581.29"),
        "pip install torch==2.13.0+cu130 --extra-index-url https://download.pytorch.org/whl/cu130",
    ),
    (
        unreached("RTX 5070", 12, 0, "", torch="2.13.0+cpu", driver="572.16"),
        "pip install torch==2.10.0+cu128 --extra-index-url https://download.pytorch.org/whl/cu128",
    ),
    (
        unreached("GTX 1060", 6, 1, "12.6", driver="470.256.02"),
        "install version 580 of NVIDIA's driver, then pip install torch==2.13.0+cu126" + CU126_INDEX,
    ),
    (
        unreached("RTX 5070", 12, 0, "12.8", driver="560.94"),
        "update NVIDIA's driver, then pip install torch==2.13.0+cu130"
        " --extra-index-url https://download.pytorch.org/whl/cu130",
    ),
    (Facts(gpu="GTX 1060", torch="2.13.0", cuda="12.6", driver="470.256.02"), "update NVIDIA's driver"),
    (unreached("T4", 7, 5, "12.8"), "restart, or install the driver again"),
    (unreached("Tesla K80", 3, 7, "12.6", driver="470.256.02"), ""),
    (d.LAPTOP, ""),
]


@pytest.mark.parametrize(("facts", "cure"), CURES)
def test_what_is_wrong_comes_with_the_exact_line_that_mends_it(facts: Facts, cure: str) -> None:
    trouble = gpu_problem(facts)
    assert trouble is not None
    assert trouble.cure == cure


def test_a_card_that_runs_has_no_trouble() -> None:
    for facts in (d.GTX_970, d.GTX_1060, d.GTX_1650, d.T4, d.P100, d.V100, d.RTX_2060, d.RTX_3060):
        assert gpu_problem(facts) is None


def test_the_fallback_is_said_in_chinese_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "zh")
    chosen = choose_device(d.GTX_1060_NEW_TORCH)
    assert "改用 CPU" in chosen.reason
    assert "要用显卡：pip install" in chosen.advice
    assert "慢 64 倍，用 fp32" in choose_device(d.GTX_1060).reason


@given(st.tuples(st.integers(3, 13), st.integers(0, 9)), st.tuples(st.integers(3, 13), st.integers(0, 9)))
def test_binary_code_runs_within_its_major_version(here: tuple[int, int], built: tuple[int, int]) -> None:
    code = f"{built[0]}{built[1]}"
    assert runs_on(here, (f"sm_{code}",)) == (here[0] == built[0] and here[1] >= built[1])
    assert runs_on(here, (f"compute_{code}",)) == (here >= built)


@given(st.text(max_size=10))
def test_an_odd_name_of_a_kernel_is_no_kernel(name: str) -> None:
    assert not runs_on((2, 0), (name,))


@pytest.mark.parametrize(
    ("speed", "asked", "advice"),
    [
        (0.0, False, "--plan measures whether --bf16 is faster"),
        (0.9, False, ""),
        (1.0, False, ""),
        (3.14, False, "--bf16 helps here: matrix multiplication in bf16 runs at 3.1 times the speed of fp32"),
        (0.9, True, "runs at 0.9 times the speed of fp32 (measured): slower"),
        (1.0, True, ""),
        (3.14, True, ""),
        (0.0, True, ""),
    ],
)
def test_bf16_is_advised_only_where_it_was_measured_to_be_faster(speed: float, asked: bool, advice: str) -> None:
    said = choose_device(dataclasses.replace(d.BF16_CPU, bf16_speed=speed), bf16=asked).advice
    assert advice in said and bool(advice) == bool(said)


def test_other_programs_are_mentioned_from_half_a_core_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device(dataclasses.replace(d.LAPTOP, busy_cores=0.4)).advice == ""
    busy = dataclasses.replace(d.LAPTOP, cores=2, busy_cores=1.0)
    assert (
        choose_device(busy).advice == "other programs keep 1.0 of 2 cores busy: training may take twice as long or more"
    )
    monkeypatch.setenv("LORA_PRACTICE_LANG", "zh")
    assert "其他程序正占用 1.0 核（可用 2 核）" in choose_device(busy).advice


@pytest.mark.parametrize(("lang", "word"), [("zh", "关掉它们会更快"), ("en", "faster without them")])
def test_an_estimate_measured_beside_other_programs_is_not_doubled_once_more(
    lang: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", lang)
    busy = dataclasses.replace(d.LAPTOP, cores=2, busy_cores=1.0)
    told = load_advice(busy, is_estimated=True)
    assert word in told and "两倍" not in told and "twice" not in told
    assert load_advice(dataclasses.replace(busy, busy_cores=0.4), is_estimated=True) == ""
