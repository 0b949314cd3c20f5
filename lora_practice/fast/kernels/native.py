"""Optional compiled kernels: never required.

`load` returns a `Native` (ops.Plain with pieces replaced) or the plain pieces; `name` says which, and why.
"""

from __future__ import annotations

import ctypes
import subprocess
from typing import Optional

import torch

from lora_practice.fast.attention import Heads
from lora_practice.fast.dropout import DropoutMask
from lora_practice.fast.kernels.build import library
from lora_practice.fast.ops import Activation, Plain
from lora_practice.fast.step_plan import MicroBatchPlan

TYPES = {torch.float32: "float", torch.bfloat16: "Half"}


def load_kernels(dtype: torch.dtype, device: torch.device) -> Plain:
    """Kernels for this compute dtype, or the torch pieces with the reason in `name`."""
    if device.type != "cpu" or dtype not in TYPES:
        return _plain(f"{dtype} on {device.type}".replace("torch.", ""))
    try:
        return Native(library(TYPES[dtype]), dtype)
    except (OSError, subprocess.SubprocessError) as error:
        return _plain(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)


def _plain(reason: str) -> Plain:
    ops = Plain()
    ops.name = f"torch ({reason})"
    return ops


class _Site(ctypes.Structure):
    _fields_ = (
        ("rank_begin", ctypes.c_int64),
        ("rank_end", ctypes.c_int64),
        ("key0", ctypes.c_uint32),
        ("key1", ctypes.c_uint32),
    )


def _at(x: torch.Tensor, dtype: torch.dtype) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    """(address, row pitch) of a matrix whose rows are contiguous; a kernel would take any other dtype for this one."""
    assert x.stride(-1) == 1 and x.dtype == dtype
    return ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.stride(0))


def _wide(x: torch.Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    return _at(x, torch.float32)


def _flat(x: Optional[torch.Tensor]) -> ctypes.c_void_p:
    assert x is None or x.is_contiguous()
    return ctypes.c_void_p(None if x is None else x.data_ptr())


_int, _float = ctypes.c_int64, ctypes.c_float


class Native(Plain):
    """ops.Plain with compiled pieces; shapes and meanings are documented there."""

    logits_in_place = True

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.library, self.dtype = library, dtype
        self.name = "compiled kernels"
        self._site_arrays: dict[int, tuple] = {}
        self._blocks: dict[int, tuple] = {}  # both hold their list of sites, so that its id stays its own

    def _narrow(self, x: torch.Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
        return _at(x, self.dtype)

    def norm(self, h, weight, eps, out):
        if out.dtype != self.dtype:  # of a wide head (Qwen3)
            return super().norm(h, weight, eps, out)
        rstd = torch.empty(h.shape[0], 1, dtype=torch.float32)
        self._norm(h, weight, eps, rstd, out, again=0)
        return rstd

    def norm_again(self, h, weight, rstd, out):
        self._norm(h, weight, 0.0, rstd, out, again=1)

    def _norm(self, h, weight, eps, rstd, out, again):
        n, width = map(_int, h.shape)
        self.library.norm(
            *_wide(h),
            _flat(weight),
            n,
            width,
            _float(eps),
            _flat(rstd),
            *self._narrow(out),
            again,
            torch.get_num_threads(),
        )

    def norm_backward(self, d_out, h, weight, rstd, d_h):
        if d_out.dtype != self.dtype:
            return super().norm_backward(d_out, h, weight, rstd, d_h)
        n, width = map(_int, h.shape)
        self.library.norm_backward(
            *self._narrow(d_out), *_wide(h), _flat(weight), _flat(rstd), n, width, *_wide(d_h), torch.get_num_threads()
        )

    def rotate(self, x, heads, cos, sin, sign):
        n, half = map(_int, cos.shape)
        self.library.rotate(
            *_wide(x), n, _int(heads), half, _flat(cos), _flat(sin), _float(sign), torch.get_num_threads()
        )

    def gate(self, gate_up, activation: Activation, out):
        if activation.name != "silu":
            return super().gate(gate_up, activation, out)
        n, width = map(_int, out.shape)
        self.library.gate(*self._narrow(gate_up), n, width, *self._narrow(out), torch.get_num_threads())

    def gate_backward(self, d_out, gate_up, activation: Activation, d_gate_up):
        if activation.name != "silu":
            return super().gate_backward(d_out, gate_up, activation, d_gate_up)
        n, width = map(_int, d_out.shape)
        self.library.gate_backward(
            *self._narrow(d_out), *self._narrow(gate_up), n, width, *self._narrow(d_gate_up), torch.get_num_threads()
        )

    def _sites(self, sites: list, noise: Optional[DropoutMask]) -> tuple:
        """(array of sites, their number, threshold, first row) for a kernel; keys are made once per step."""
        step = None if noise is None else (noise.seed, noise.step)
        known = self._site_arrays.get(id(sites))
        if known is None or known[0] != step:
            keys = [(0, 0) if noise is None else noise.key(site.number) for site in sites]
            array = (_Site * len(sites))(
                *(_Site(s.ranks.start, s.ranks.stop, a & 0xFFFFFFFF, b & 0xFFFFFFFF) for s, (a, b) in zip(sites, keys))
            )
            known = self._site_arrays[id(sites)] = (step, array, sites)
        threshold, row0 = (0, 0) if noise is None else (noise.threshold, noise.row0)
        return known[1], _int(len(sites)), ctypes.c_uint32(threshold), _int(row0)

    def lora_down(self, x, down, sites, noise, out):
        n, width = map(_int, x.shape)
        self.library.lora_down(
            *self._narrow(x),
            n,
            width,
            _flat(down),
            *self._sites(sites, noise),
            *self._narrow(out),
            torch.get_num_threads(),
        )

    def lora_down_backward(self, x, d_u, down, sites, noise, d_x):
        n, width = map(_int, x.shape)
        d_down = torch.empty_like(down)
        target = (_flat(None), _int(0)) if d_x is None else self._narrow(d_x)
        self.library.lora_down_backward(
            *self._narrow(x),
            *self._narrow(d_u),
            n,
            width,
            _flat(down),
            *self._sites(sites, noise),
            *target,
            _flat(d_down),
            torch.get_num_threads(),
        )
        return d_down

    def lora_up_backward(self, u, d_y, sites):
        n, width = map(_int, d_y.shape)
        if id(sites) not in self._blocks:
            ends = [(s.ranks.start, s.ranks.stop, s.outputs.start, s.outputs.stop) for s in sites]
            self._blocks[id(sites)] = (sites, torch.tensor(ends, dtype=torch.int64))
        blocks = self._blocks[id(sites)][1]
        d_up = torch.empty(u.shape[1], d_y.shape[1], dtype=torch.float32)
        self.library.lora_up_backward(
            *self._narrow(u),
            *self._narrow(d_y),
            n,
            width,
            _flat(blocks),
            _int(len(sites)),
            _flat(d_up),
            torch.get_num_threads(),
        )
        return d_up

    def move(self, sources, targets, factors, add):
        known = all(y.dtype in (torch.float32, self.dtype) and y.stride(1) == 1 for y in targets)
        if not known or any(x.dtype != torch.float32 for x in sources):
            return super().move(sources, targets, factors, add)
        places = [
            (x.data_ptr(), y.data_ptr(), *x.shape, *x.stride(), y.stride(0), y.dtype == torch.float32)
            for x, y in zip(sources, targets)
        ]
        table, scales = torch.tensor(places, dtype=torch.int64), torch.tensor(factors, dtype=torch.float32)
        self.library.move(_flat(table), _flat(scales), _int(len(places)), int(add), torch.get_num_threads())

    def cross_entropy(self, logits, counts, slots, labels, scale):
        n, width = map(_int, logits.shape)
        first = torch.zeros(logits.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(counts.to(torch.int64), 0, out=first[1:])
        loss = torch.empty(logits.shape[0], dtype=torch.float64)
        factor = _float(0.0 if scale is None else scale)
        self.library.cross_entropy(
            *self._narrow(logits), n, width, _flat(first), _flat(labels), factor, _flat(loss), torch.get_num_threads()
        )
        return float(loss.sum())

    def attend(self, qkv, plan: MicroBatchPlan, window, heads: Heads, out):
        if heads.size % 32:
            return super().attend(qkv, plan, window, heads, out)
        self.library.attend(
            *_wide(qkv), *self._runs(plan), *_shape(heads, window), *self._narrow(out), torch.get_num_threads()
        )

    def attend_backward(self, d_out, out, qkv, plan: MicroBatchPlan, window, heads: Heads):
        if heads.size % 32:
            return super().attend_backward(d_out, out, qkv, plan, window, heads)
        d_qkv = torch.zeros_like(qkv)
        self.library.attend_backward(
            *self._narrow(d_out),
            *self._narrow(out),
            *_wide(qkv),
            *self._runs(plan),
            *_shape(heads, window),
            *_wide(d_qkv),
            torch.get_num_threads(),
        )
        return d_qkv

    @staticmethod
    def _runs(plan: MicroBatchPlan) -> tuple:
        starts, paths, keys = plan.flat_runs()
        return _int(len(paths)), _flat(starts), _flat(paths), _flat(keys)


def _shape(heads: Heads, window: Optional[int]) -> tuple:
    return _int(heads.query), _int(heads.shared), _int(heads.size), _float(heads.scale), _int(window or 0)
