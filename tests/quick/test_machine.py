"""Device and precision for machines that are only described: `decide` is a pure function of the facts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_practice import machine
from lora_practice.errors import UserError
from lora_practice.machine import Facts, decide, runs_on

CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU128 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
GB = 1 << 30


@pytest.fixture(autouse=True)
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")


def card(gpu: str, major: int, minor: int, kernels: tuple[str, ...], **more: Any) -> Facts:
    facts = {"cores": 8, "memory": 16 * GB, "gpu_memory": 6 * GB, "cuda_usable": True, **more}
    return Facts(gpu=gpu, capability=(major, minor), kernels=kernels, **facts)


GTX_1060 = card("GTX 1060", 6, 1, CU126)
GTX_1060_NEW_TORCH = card("GTX 1060", 6, 1, CU128)
T4 = card("Tesla T4", 7, 5, CU128)
RTX_3060 = card("RTX 3060", 8, 6, CU128)
PLAIN_CPU = Facts(cores=4, memory=8 * GB, cpu="i5-8250U")
BF16_CPU = Facts(cores=16, memory=32 * GB, cpu="Xeon 8481C", cpu_bf16=True)

# facts, what the user asks for, device, precision, a word of the reason or the advice
TABLE = [
    (GTX_1060, {}, "cuda", "fp16", "GTX 1060 (sm_61)"),
    (GTX_1060_NEW_TORCH, {}, "cpu", "fp32", "no kernels for GTX 1060 (sm_61)"),
    (GTX_1060_NEW_TORCH, {"device": "cpu"}, "cpu", "fp32", "using the CPU"),
    (card("GTX 960M", 5, 0, CU126), {}, "cuda", "fp16", "sm_50"),
    (card("GTX 970", 5, 2, CU126), {}, "cuda", "fp16", "sm_52"),
    (card("GTX 970", 5, 2, CU130), {}, "cpu", "fp32", "sm_75, sm_80"),
    (card("Tesla K80", 3, 7, CU126), {}, "cpu", "fp32", "sm_37"),
    (card("Tesla V100", 7, 0, CU126), {}, "cuda", "fp16", "sm_70"),
    (card("Tesla V100", 7, 0, CU130), {}, "cpu", "fp32", "no kernels"),
    (card("GTX 1650", 7, 5, CU130), {}, "cuda", "fp16", "sm_75"),
    (T4, {}, "cuda", "fp16", "Tesla T4"),
    (T4, {"device": "cuda"}, "cuda", "fp16", "sm_75"),
    (T4, {"device": "cpu"}, "cpu", "fp32", "CPU as asked"),
    (card("RTX 2060", 7, 5, CU128), {}, "cuda", "fp16", "sm_75"),
    (RTX_3060, {}, "cuda", "fp16", "--bf16 is steadier"),
    (RTX_3060, {"bf16": True}, "cuda", "bf16", "sm_86"),
    (card("RTX 4060", 8, 9, CU128), {}, "cuda", "fp16", "sm_89"),
    (card("H100", 9, 0, ("sm_90a",)), {"bf16": True}, "cuda", "bf16", "sm_90"),
    (card("RTX 5090", 12, 0, CU128), {}, "cuda", "fp16", "sm_120"),
    (card("RTX 5090", 12, 0, CU126), {}, "cpu", "fp32", "no kernels"),
    (card("a later card", 13, 0, CU128), {}, "cuda", "fp16", "a later card"),
    (card("a later card", 13, 0, CU130), {}, "cpu", "fp32", "no kernels"),
    (card("built by hand", 6, 1, ()), {}, "cuda", "fp16", "built by hand"),
    (Facts(gpu="NVIDIA", cores=4), {}, "cpu", "fp32", "cannot be used (driver or torch)"),
    (dataclasses.replace(T4, cuda_usable=False), {}, "cpu", "fp32", "cannot be used"),
    (PLAIN_CPU, {}, "cpu", "fp32", "no usable NVIDIA card"),
    (BF16_CPU, {}, "cpu", "fp32", "--bf16 is faster"),
    (BF16_CPU, {"bf16": True}, "cpu", "bf16", "no usable NVIDIA card"),
    (dataclasses.replace(GTX_1060_NEW_TORCH, cpu_bf16=True), {"bf16": True}, "cpu", "bf16", "no kernels"),
]


@pytest.mark.parametrize(("facts", "asked", "device", "precision", "word"), TABLE)
def test_decisions(facts: Facts, asked: dict[str, Any], device: str, precision: str, word: str) -> None:
    chosen = decide(facts, **asked)
    assert (chosen.device, chosen.precision) == (device, precision)
    assert word in f"{chosen.reason} {chosen.advice}"
    assert "\n" not in chosen.reason + chosen.advice


@pytest.mark.parametrize(
    ("facts", "asked", "word"),
    [
        (T4, {"bf16": True}, "no real bf16 (compute capability 7.5"),
        (GTX_1060, {"bf16": True}, "no real bf16 (compute capability 6.1"),
        (PLAIN_CPU, {"bf16": True}, "no bf16 instructions"),
        (GTX_1060_NEW_TORCH, {"bf16": True}, "no bf16 instructions"),
        (PLAIN_CPU, {"device": "cuda"}, "no usable NVIDIA card"),
        (GTX_1060_NEW_TORCH, {"device": "cuda"}, "no kernels for GTX 1060"),
        (Facts(gpu="NVIDIA"), {"device": "cuda"}, "cannot be used"),
    ],
)
def test_refusals(facts: Facts, asked: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError) as caught:
        decide(facts, **asked)
    assert word in str(caught.value)
    assert caught.value.fix


def test_the_fallback_is_said_in_chinese_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PRACTICE_LANG", "zh")
    assert "改用 CPU" in decide(GTX_1060_NEW_TORCH).reason


@given(st.tuples(st.integers(3, 13), st.integers(0, 9)), st.tuples(st.integers(3, 13), st.integers(0, 9)))
def test_binary_code_runs_within_its_major_version(here: tuple[int, int], built: tuple[int, int]) -> None:
    code = f"{built[0]}{built[1]}"
    assert runs_on(here, (f"sm_{code}",)) == (here[0] == built[0] and here[1] >= built[1])
    assert runs_on(here, (f"compute_{code}",)) == (here >= built)


@given(st.text(max_size=10))
def test_an_odd_name_of_a_kernel_is_no_kernel(name: str) -> None:
    assert not runs_on((2, 0), (name,))


FILES = {
    "/proc/meminfo": "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\n",
    "/proc/cpuinfo": "processor: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_bf16\n",
}


def pretend(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    """Give the machine these files of /proc and /sys, and no others."""
    files = {**FILES, **{f"/sys/fs/cgroup/{name.replace('_', '.')}": content for name, content in more.items()}}
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def test_without_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert machine.usable_cores() == 8
    assert machine.available_memory() == 8_000_000 * 1024


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("", 8)],
)
def test_a_containers_cores(monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    pretend(monkeypatch, cpu_max=quota)
    assert machine.usable_cores() == cores


def test_a_containers_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, memory_max=f"{4 * GB}\n", memory_current=f"{GB}\n")
    assert machine.available_memory() == 3 * GB
    pretend(monkeypatch, memory_max=f"{4 * GB}", memory_current=f"{4 * GB}", memory_stat=f"inactive_file {2 * GB}\n")
    assert machine.available_memory() == 2 * GB  # cached files give way
    pretend(monkeypatch, memory_max="max", memory_current=f"{GB}")
    assert machine.available_memory() == 8_000_000 * 1024
    pretend(monkeypatch, memory_max=f"{100 * GB}", memory_current="0")
    assert machine.available_memory() == 8_000_000 * 1024
    pretend(monkeypatch, memory_max=f"{GB}", memory_current=f"{2 * GB}")
    assert machine.available_memory() == 0


def test_this_machine_can_be_looked_at() -> None:
    facts = machine.look()
    assert facts.cores >= 1
    assert facts.memory > 0
    assert decide(facts).device in ("cpu", "cuda")
    assert machine.peak_memory() > 10_000_000
    assert machine.matmul_gflops() > 0.1


def test_the_processor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    name, flags = machine._cpu_flags()
    assert name == "Some CPU"
    assert "avx512_bf16" in flags


def test_an_unreadable_file_says_nothing(tmp_path: Path) -> None:
    assert machine._read(str(tmp_path / "missing")) == ""
