"""The speed of matrix multiplication (matmul) on this machine, measured for a moment. Imports torch only when asked."""

from __future__ import annotations

import time


def matmul_gflops(device: str = "cpu", dtype: str = "float32", seconds: float = 0.1) -> float:
    """Billions of operations per second in matrix multiplications of a small model's sizes."""
    import torch

    x, w = (torch.ones(shape, device=device).to(getattr(torch, dtype)) for shape in ((128, 576), (576, 1536)))
    float((x @ w)[0, 0])  # reading a value waits for the device
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        float((x @ w)[0, 0])
        rounds += 1
    return rounds * 2 * 128 * 576 * 1536 / (time.perf_counter() - started) / 1e9


def bf16_speed(device: str = "cpu") -> float:
    """The speed of matmul in bf16 over fp32; below 1 bf16 is slower.

    Both are measured three times in turn and the best of each counts, so that another program's moment of work does
    not decide.
    """
    rounds = [(matmul_gflops(device, "bfloat16", 0.05), matmul_gflops(device, "float32", 0.05)) for _ in range(3)]
    return max(bf16 for bf16, _ in rounds) / max(fp32 for _, fp32 in rounds)
