"""A fresh interpreter: the Hub's libraries read their variables once, when they are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def in_a_process(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run Python code in `folder` with few variables and these; it must end well."""
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    env = {**kept, "PYTHONPATH": str(ROOT), "LORA_PRACTICE_LANG": "en", "HOME": str(folder), **variables}
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 300, "cwd": folder, "env": env}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.returncode == 0, done.stderr
    return done
