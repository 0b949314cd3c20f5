"""This very machine, as torch and transformers see it."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import pytest
import torch

from lora_practice import compat
from lora_practice.machine import facts as machine_facts
from lora_practice.machine.device import choose_device, peak_memory
from lora_practice.machine.speed import matmul_gflops


def test_this_machine_can_be_looked_at() -> None:
    facts = machine_facts.read_facts(driver_too=True, measure=True)
    assert 0 <= facts.busy_cores <= facts.cores
    assert bool(facts.bf16_speed) == (facts.cpu_bf16 and not facts.cuda_usable)
    assert 1 <= facts.cores <= facts.board_cores
    assert 0 < facts.memory <= facts.memory_total
    assert facts.torch
    assert choose_device(facts).device in ("cpu", "cuda")
    assert peak_memory() > 10_000_000
    assert matmul_gflops() > 0.1


def test_the_most_memory_is_the_cards_only_where_the_card_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda is awake also where its random numbers were saved, which every step does."""
    from bench.worker import peak_memory_mb
    from lora_practice.training.plan import most_held

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 7_000_000)
    assert most_held(torch.device("cuda")) == 7_000_000 < most_held(torch.device("cpu"))
    assert peak_memory_mb("cuda") == 7.0 < peak_memory_mb("cpu")


def test_the_processor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = "processor: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_bf16\n"
    monkeypatch.setattr(machine_facts, "read_system_file", lambda path: cpuinfo if path == "/proc/cpuinfo" else "")
    facts = machine_facts.read_facts()
    assert (facts.cpu, facts.cpu_bf16, facts.instructions) == ("Some CPU", True, ("avx2", "avx512_bf16"))


@pytest.mark.parametrize(("word", "known"), [("AVX2", ("avx2",)), ("AVX512", ("avx2", "avx512f")), ("DEFAULT", None)])
def test_elsewhere_torch_knows_the_processor(
    monkeypatch: pytest.MonkeyPatch, word: str, known: Optional[tuple[str, ...]]
) -> None:
    monkeypatch.setattr(machine_facts, "read_system_file", lambda path: "")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: word)
    assert machine_facts.read_facts().instructions == known  # None: unknown, which is not the same as none


def test_of_two_cards_one_trains_with_the_rows_that_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would take both by DataParallel, and twice the rows for a step."""
    import trl

    class OnTwoCards(trl.SFTConfig):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 2

    monkeypatch.setattr(trl, "SFTConfig", OnTwoCards)
    options = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 3}
    assert trl.SFTConfig(**options).train_batch_size == 6
    assert compat.sft_config(**options).train_batch_size == 3
