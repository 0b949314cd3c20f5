"""Compiled versions of the methods of `TorchOps`: optional, never required.

`load_kernels` returns a `CompiledOps`, or a `TorchOps` whose `name` says why there are no compiled kernels.
"""

from __future__ import annotations

import ctypes
import subprocess
from typing import Optional

import torch

from lora_practice.fast.attention import Heads
from lora_practice.fast.dropout import DropoutMask
from lora_practice.fast.kernels.build import library
from lora_practice.fast.ops import Activation, LoraModule, TorchOps
from lora_practice.fast.step_plan import MicroBatchPlan

TYPES = {torch.float32: "float", torch.bfloat16: "BFloat16"}  # torch dtype -> type name in numbers.h

Pointer = ctypes.c_void_p
Int = ctypes.c_int64
Float = ctypes.c_float


def load_kernels(dtype: torch.dtype, device: torch.device) -> TorchOps:
    """Compiled kernels for this compute dtype, or the torch versions with the reason in `name`."""
    if device.type != "cpu" or dtype not in TYPES:
        return _torch_ops(f"{dtype} on {device.type}".replace("torch.", ""))
    try:
        return CompiledOps(library(TYPES[dtype]), dtype)
    except (OSError, subprocess.SubprocessError) as error:
        return _torch_ops(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)


def _torch_ops(reason: str) -> TorchOps:
    ops = TorchOps()
    ops.name = f"torch ({reason})"
    return ops


class _LoraModule(ctypes.Structure):
    """`LoraModule` of numbers.h."""

    _fields_ = (
        ("rank_begin", ctypes.c_int64),
        ("rank_end", ctypes.c_int64),
        ("key0", ctypes.c_uint32),
        ("key1", ctypes.c_uint32),
    )


def _matrix(x: torch.Tensor, dtype: torch.dtype) -> tuple[Pointer, Int]:
    """(address, row pitch) of a matrix with contiguous rows. Kernels do not check dtypes, so this does."""
    assert x.stride(-1) == 1 and x.dtype == dtype
    return Pointer(x.data_ptr()), Int(x.stride(0))


def _fp32_matrix(x: torch.Tensor) -> tuple[Pointer, Int]:
    return _matrix(x, torch.float32)


def _array(x: Optional[torch.Tensor]) -> Pointer:
    """Address of a contiguous tensor; null for None."""
    assert x is None or x.is_contiguous()
    return Pointer(None if x is None else x.data_ptr())


class CompiledOps(TorchOps):
    """`TorchOps` with compiled kernels on a CPU; arguments, shapes and results are documented there.

    Args:
        library: the kernels built for `dtype` (see `kernels.build.library`).
        dtype: compute dtype, float32 or bfloat16.
    """

    logits_in_place = True

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.library, self.dtype = library, dtype
        self.name = "compiled kernels"
        # Both by id() of a list of LoRA modules, and both hold that list, so that no other list gets its id.
        self._module_arrays: dict[int, tuple[Optional[tuple[int, int]], ctypes.Array, list[LoraModule]]] = {}
        self._gradient_blocks: dict[int, tuple[list[LoraModule], torch.Tensor]] = {}

    def _compute_matrix(self, x: torch.Tensor) -> tuple[Pointer, Int]:
        return _matrix(x, self.dtype)

    def norm(self, h: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
        """RMSNorm in one pass; QK norm, whose output is not in the compute dtype, falls back to torch."""
        if out.dtype != self.dtype:
            return super().norm(h, weight, eps, out)
        rstd = torch.empty(h.shape[0], 1, dtype=torch.float32)
        self._norm(h, weight, eps, rstd, out, rstd_given=0)
        return rstd

    def norm_from_rstd(self, h: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, out: torch.Tensor) -> None:
        """RMSNorm output from the saved rstd."""
        self._norm(h, weight, 0.0, rstd, out, rstd_given=1)

    def _norm(
        self,
        h: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        rstd: torch.Tensor,
        out: torch.Tensor,
        rstd_given: int,
    ) -> None:
        """Kernel `norm`: computes rstd, or reads it if rstd_given = 1."""
        n, width = map(Int, h.shape)
        self.library.norm(
            *_fp32_matrix(h),
            _array(weight),
            n,
            width,
            Float(eps),
            _array(rstd),
            *self._compute_matrix(out),
            rstd_given,
            torch.get_num_threads(),
        )

    def norm_backward(
        self,
        d_out: torch.Tensor,
        h: torch.Tensor,
        weight: torch.Tensor,
        rstd: torch.Tensor,
        d_h: torch.Tensor,
    ) -> None:
        """RMSNorm gradient, added to d_h; QK norm falls back to torch."""
        if d_out.dtype != self.dtype:
            super().norm_backward(d_out, h, weight, rstd, d_h)
            return
        n, width = map(Int, h.shape)
        self.library.norm_backward(
            *self._compute_matrix(d_out),
            *_fp32_matrix(h),
            _array(weight),
            _array(rstd),
            n,
            width,
            *_fp32_matrix(d_h),
            torch.get_num_threads(),
        )

    def rope(self, x: torch.Tensor, heads: int, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> None:
        """RoPE in place."""
        n, half = map(Int, cos.shape)
        self.library.rope(
            *_fp32_matrix(x), n, Int(heads), half, _array(cos), _array(sin), Float(sign), torch.get_num_threads()
        )

    def gate(self, gate_up: torch.Tensor, activation: Activation, out: torch.Tensor) -> None:
        """SwiGLU; other activations fall back to torch."""
        if activation.name != "silu":
            super().gate(gate_up, activation, out)
            return
        n, width = map(Int, out.shape)
        self.library.gate(*self._compute_matrix(gate_up), n, width, *self._compute_matrix(out), torch.get_num_threads())

    def gate_backward(
        self, d_out: torch.Tensor, gate_up: torch.Tensor, activation: Activation, d_gate_up: torch.Tensor
    ) -> None:
        """SwiGLU gradient; other activations fall back to torch."""
        if activation.name != "silu":
            super().gate_backward(d_out, gate_up, activation, d_gate_up)
            return
        n, width = map(Int, d_out.shape)
        self.library.gate_backward(
            *self._compute_matrix(d_out),
            *self._compute_matrix(gate_up),
            n,
            width,
            *self._compute_matrix(d_gate_up),
            torch.get_num_threads(),
        )

    def _lora_arguments(
        self, modules: list[LoraModule], dropout: Optional[DropoutMask]
    ) -> tuple[ctypes.Array, Int, ctypes.c_uint32, Int]:
        """(array of modules, their number, dropout threshold, first row) for a kernel; keys are cached for a step."""
        step = None if dropout is None else (dropout.seed, dropout.step)
        cached = self._module_arrays.get(id(modules))
        if cached is None or cached[0] != step:
            keys = [(0, 0) if dropout is None else dropout.key(module.number) for module in modules]
            array = (_LoraModule * len(modules))(
                *(
                    _LoraModule(m.ranks.start, m.ranks.stop, word0 & 0xFFFFFFFF, word1 & 0xFFFFFFFF)
                    for m, (word0, word1) in zip(modules, keys)
                )
            )
            cached = self._module_arrays[id(modules)] = (step, array, modules)
        threshold, row0 = (0, 0) if dropout is None else (dropout.threshold, dropout.row0)
        return cached[1], Int(len(modules)), ctypes.c_uint32(threshold), Int(row0)

    def lora_down(
        self,
        x: torch.Tensor,
        down: torch.Tensor,
        modules: list[LoraModule],
        dropout: Optional[DropoutMask],
        out: torch.Tensor,
    ) -> None:
        """u = (x * keep) A^T; masks are computed inside the kernel."""
        n, width = map(Int, x.shape)
        self.library.lora_down(
            *self._compute_matrix(x),
            n,
            width,
            _array(down),
            *self._lora_arguments(modules, dropout),
            *self._compute_matrix(out),
            torch.get_num_threads(),
        )

    def lora_down_backward(
        self,
        x: torch.Tensor,
        d_u: torch.Tensor,
        down: torch.Tensor,
        modules: list[LoraModule],
        dropout: Optional[DropoutMask],
        d_x: Optional[torch.Tensor],
    ) -> torch.Tensor:
        """d_A, and the addition to d_x in the same pass."""
        n, width = map(Int, x.shape)
        d_down = torch.empty_like(down)
        target = (_array(None), Int(0)) if d_x is None else self._compute_matrix(d_x)
        self.library.lora_down_backward(
            *self._compute_matrix(x),
            *self._compute_matrix(d_u),
            n,
            width,
            _array(down),
            *self._lora_arguments(modules, dropout),
            *target,
            _array(d_down),
            torch.get_num_threads(),
        )
        return d_down

    def lora_up_backward(self, u: torch.Tensor, d_y: torch.Tensor, modules: list[LoraModule]) -> torch.Tensor:
        """u^T d_y (R, N), computed only in each module's own block; the rest is uninitialised."""
        n, width = map(Int, d_y.shape)
        if id(modules) not in self._gradient_blocks:
            ends = [(m.ranks.start, m.ranks.stop, m.outputs.start, m.outputs.stop) for m in modules]
            self._gradient_blocks[id(modules)] = (modules, torch.tensor(ends, dtype=torch.int64))
        blocks = self._gradient_blocks[id(modules)][1]
        d_up = torch.empty(u.shape[1], d_y.shape[1], dtype=torch.float32)
        self.library.lora_up_backward(
            *self._compute_matrix(u),
            *self._compute_matrix(d_y),
            n,
            width,
            _array(blocks),
            Int(len(modules)),
            _array(d_up),
            torch.get_num_threads(),
        )
        return d_up

    def copy_matrices(
        self, sources: list[torch.Tensor], targets: list[torch.Tensor], factors: list[float], accumulate: bool
    ) -> None:
        """Scaled copies of all matrices in one call; dtypes or strides that the kernel lacks fall back to torch."""
        known = all(y.dtype in (torch.float32, self.dtype) and y.stride(1) == 1 for y in targets)
        if not known or any(x.dtype != torch.float32 for x in sources):
            super().copy_matrices(sources, targets, factors, accumulate)
            return
        entries = [
            (x.data_ptr(), y.data_ptr(), *x.shape, *x.stride(), y.stride(0), y.dtype == torch.float32)
            for x, y in zip(sources, targets)
        ]
        table, scales = torch.tensor(entries, dtype=torch.int64), torch.tensor(factors, dtype=torch.float32)
        self.library.copy_matrices(
            _array(table), _array(scales), Int(len(entries)), int(accumulate), torch.get_num_threads()
        )

    def cross_entropy(
        self,
        logits: torch.Tensor,
        counts: torch.Tensor,
        slots: torch.Tensor,
        labels: torch.Tensor,
        scale: Optional[float],
    ) -> float:
        """Summed loss; with a scale, logits become their gradient without a float32 copy."""
        n, width = map(Int, logits.shape)
        first = torch.zeros(logits.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(counts.to(torch.int64), 0, out=first[1:])
        loss = torch.empty(logits.shape[0], dtype=torch.float64)
        self.library.cross_entropy(
            *self._compute_matrix(logits),
            n,
            width,
            _array(first),
            _array(labels),
            Float(0.0 if scale is None else scale),
            _array(loss),
            torch.get_num_threads(),
        )
        return float(loss.sum())

    def attend(
        self, qkv: torch.Tensor, plan: MicroBatchPlan, window: Optional[int], heads: Heads, out: torch.Tensor
    ) -> None:
        """Attention over the plan's runs; head sizes that are no multiple of 32 fall back to torch."""
        if heads.size % 32:
            super().attend(qkv, plan, window, heads, out)
            return
        self.library.attend(
            *_fp32_matrix(qkv),
            *_run_arguments(plan),
            *_head_arguments(heads, window),
            *self._compute_matrix(out),
            torch.get_num_threads(),
        )

    def attend_backward(
        self,
        d_out: torch.Tensor,
        out: torch.Tensor,
        qkv: torch.Tensor,
        plan: MicroBatchPlan,
        window: Optional[int],
        heads: Heads,
    ) -> torch.Tensor:
        """Attention gradient d_qkv; head sizes that are no multiple of 32 fall back to torch."""
        if heads.size % 32:
            return super().attend_backward(d_out, out, qkv, plan, window, heads)
        d_qkv = torch.zeros_like(qkv)
        self.library.attend_backward(
            *self._compute_matrix(d_out),
            *self._compute_matrix(out),
            *_fp32_matrix(qkv),
            *_run_arguments(plan),
            *_head_arguments(heads, window),
            *_fp32_matrix(d_qkv),
            torch.get_num_threads(),
        )
        return d_qkv


def _run_arguments(plan: MicroBatchPlan) -> tuple[Int, Pointer, Pointer, Pointer]:
    """(number of runs, their starts, path lengths, key rows)."""
    starts, paths, keys = plan.flat_runs()
    return Int(len(paths)), _array(starts), _array(paths), _array(keys)


def _head_arguments(heads: Heads, window: Optional[int]) -> tuple[Int, Int, Int, Float, Int]:
    """(query heads, kv heads, head size, softmax scale, sliding window or 0)."""
    return Int(heads.query), Int(heads.kv), Int(heads.size), Float(heads.scale), Int(window or 0)
