"""Builds the kernels with the machine's own compiler, once, into the user's cache folder.

One small library per compute dtype; its file name carries a hash of the sources, the compiler and the processor,
so that a change of any of them builds anew. torch and the kernels must share one OpenMP runtime (two would fight
over the cores), so the library is linked to the one that torch has loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Optional

import torch

SOURCES = ("kernels.cpp", "lora.cpp", "attention.cpp", "decode.cpp", "blocks.h", "dots.h", "numbers.h")
FLAGS = [
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
]
FLAGS += ["-fassociative-math", "-fopenmp-simd"]  # not -ffast-math: it switches off denormals for the process


@functools.cache
def library(type_name: str) -> ctypes.CDLL:
    """Build if needed, then load. Raises OSError or SubprocessError when that cannot be done."""
    compiler = find_compiler()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-practice" / "kernels"
    here = Path(__file__).parent
    runtime = _openmp_runtime()
    text = "".join((here / name).read_text(encoding="utf-8") for name in SOURCES)
    words = (text, type_name, compiler or "", runtime or "", torch.__version__, _processor(), *FLAGS)
    path = folder / f"kernels-{type_name}-{hashlib.sha256(chr(0).join(words).encode()).hexdigest()[:16]}.so"
    if _only_ours(folder) and path.exists() and _only_ours(path):
        return ctypes.CDLL(str(path))
    if compiler is None:
        raise OSError("no C++ compiler found")
    with contextlib.suppress(OSError):  # a home that cannot be written
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _only_ours(folder) and os.access(folder, os.W_OK):
        _compile(compiler, type_name, runtime, here, path)
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(prefix="lora-practice-") as private:
        path = Path(private, path.name)
        _compile(compiler, type_name, runtime, here, path)
        return ctypes.CDLL(str(path))


def _only_ours(path: Path) -> bool:
    """Whether nobody but this user and root may have written it: what is loaded from there runs as this user."""
    if os.name == "nt" or not path.exists():
        return path.exists()
    found = path.stat()
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & 0o022


def find_compiler() -> Optional[str]:
    """Path of the C++ compiler that would be used: CXX, else the system's; None if there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)


def _compile(compiler: str, type_name: str, runtime: Optional[str], here: Path, path: Path) -> None:
    handle, scratch = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    sources = [str(here / name) for name in SOURCES if name.endswith(".cpp")]
    openmp = ["-fopenmp"] if runtime else []
    command = [
        compiler,
        *FLAGS,
        *openmp,
        f"-DT={type_name}",
        *sources,
        "-o",
        scratch,
        *([runtime] if runtime else []),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise OSError(f"{compiler} failed: {done.stderr.strip().splitlines()[-1:]}")
        os.chmod(scratch, 0o700)  # the linker made it anew, as the umask says
        with open(scratch, "rb+") as written:
            os.fsync(written.fileno())  # else a power cut could leave the name without the contents
        os.replace(scratch, path)  # whole or not at all, also when two processes build at once
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)


def _openmp_runtime() -> Optional[str]:
    """Path of the OpenMP library that torch has loaded; None where it cannot be told (kernels run on one core)."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return next((path for path in sorted(paths) if "libgomp" in path or "libiomp5" in path), None)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
