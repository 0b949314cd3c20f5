"""A tiny base model and a finished run on it, made once; a test works on a copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_inputs.folders import make_base, make_output


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    return make_base(tmp_path_factory.mktemp("whole") / "base")


@pytest.fixture(scope="session")
def whole(base: Path) -> Path:
    """A folder with base/, and out/ with a finished run on it."""
    make_output(base.parent / "out", base)
    return base.parent
