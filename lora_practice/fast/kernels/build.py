"""Builds the kernels with the machine's C++ compiler, once, into the user's cache folder.

There is one library per compute dtype. Its file name contains a hash of the sources, the compiler and the processor:
a change of any of them triggers a new build. torch and the kernels must share one OpenMP runtime (two would compete
for the cores), so the library is linked to the one that torch has loaded.
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
    """The loaded kernel library for a type of numbers.h ("float" or "BFloat16"), built first if needed.

    Raises:
        OSError, subprocess.SubprocessError: there is no compiler, or building or loading failed.
    """
    compiler = find_compiler()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-practice" / "kernels"
    source_folder = Path(__file__).parent
    runtime = _openmp_runtime()
    sources = "".join((source_folder / name).read_text(encoding="utf-8") for name in SOURCES)
    hashed = (sources, type_name, compiler or "", runtime or "", torch.__version__, _processor(), *FLAGS)
    path = folder / f"kernels-{type_name}-{hashlib.sha256(chr(0).join(hashed).encode()).hexdigest()[:16]}.so"
    if _is_trusted(folder) and path.exists() and _is_trusted(path):
        return ctypes.CDLL(str(path))
    if compiler is None:
        raise OSError("no C++ compiler found")
    with contextlib.suppress(OSError):  # the home folder may be read-only
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if _is_trusted(folder) and os.access(folder, os.W_OK):
        _compile(compiler, type_name, runtime, source_folder, path)
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(prefix="lora-practice-") as private:
        path = Path(private, path.name)
        _compile(compiler, type_name, runtime, source_folder, path)
        return ctypes.CDLL(str(path))


def _is_trusted(path: Path) -> bool:
    """Whether only this user and root can have written it: code loaded from there runs as this user."""
    if os.name == "nt" or not path.exists():
        return path.exists()
    status = path.stat()
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def find_compiler() -> Optional[str]:
    """Path of the C++ compiler to use: $CXX, else the system's; None if there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)


def _compile(compiler: str, type_name: str, runtime: Optional[str], source_folder: Path, path: Path) -> None:
    """Compile the library into `path`, atomically.

    Raises:
        OSError, subprocess.SubprocessError: the compiler failed, or took longer than two minutes.
    """
    handle, scratch = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    sources = [str(source_folder / name) for name in SOURCES if name.endswith(".cpp")]
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
        os.chmod(scratch, 0o700)  # the linker recreated the file, with the umask's permissions
        with open(scratch, "rb+") as written:
            os.fsync(written.fileno())  # otherwise a power cut could leave the name without the contents
        os.replace(scratch, path)  # atomic, also when two processes build at once
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)


def _openmp_runtime() -> Optional[str]:
    """Path of the OpenMP library that torch has loaded; None where unknown (the kernels then run on one core)."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return next((path for path in sorted(paths) if "libgomp" in path or "libiomp5" in path), None)


def _processor() -> str:
    """Instruction sets of the processor, as its /proc/cpuinfo lists them; elsewhere its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
