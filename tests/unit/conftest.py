"""tests/unit needs no torch: where only this tier runs, a test that loads it fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

UNIT = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def alone(request: pytest.FixtureRequest) -> bool:
    """Whether only this tier runs; the others, in the same process, may load torch."""
    only_unit = all(UNIT in item.path.parents for item in request.session.items)
    assert not only_unit or "torch" not in sys.modules, "importing a file of tests/unit loaded torch"
    return only_unit


@pytest.fixture(autouse=True)
def no_torch(alone: bool) -> Iterator[None]:
    """Fails a test that loads torch into this process."""
    before = sys.modules.get("torch") is not None
    yield
    assert before or not alone or sys.modules.get("torch") is None, "this test loaded torch: it belongs to tests/tiny"
