"""One finished run that many tests only look at."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from journey_harness import SMALL, succeeded, train


@dataclass(frozen=True)
class Finished:
    """A run that ended well: its folder, and what it said."""

    folder: Path
    done: subprocess.CompletedProcess

    @property
    def record(self) -> dict[str, Any]:
        """run_record.json."""
        return json.loads((self.folder / "run_record.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, embedded_model: Path, embedded_rows: Path) -> Finished:
    """Eight steps on embedded rows, four rows held out, sample answers, merged. Only to be looked at."""
    place = tmp_path_factory.mktemp("trained")
    flags = ("--eval_subset_size", "4", "--run_inference", "--merge_adapter", "--output_dir", "out")
    return Finished(place / "out", succeeded(train(place, *SMALL, *flags, fresh=True)))


@pytest.fixture
def copied(trained: Finished, tmp_path: Path) -> Path:
    """A copy of the trained folder that a test may change."""
    return Path(shutil.copytree(trained.folder, tmp_path / "copy"))
