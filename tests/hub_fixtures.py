"""A Hub for a test: a server on this machine, an empty cache, and libraries that know of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer
from hypothesis import HealthCheck, settings

from lora_practice.sources import environment

settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")
CLOSED = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """English, no Hub, an empty cache, and nothing remembered from the test before."""
    for name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LORA_PRACTICE_LANG", "en")
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.chdir(tmp_path)
    from huggingface_hub import constants, utils

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    environment.hub_is_reachable.cache_clear()
    # huggingface_hub 0.x keeps a session for each thread, and one that was made offline stays offline
    reset = getattr(utils, "reset_sessions", lambda: None)
    reset()
    yield
    reset()
    environment.hub_is_reachable.cache_clear()


@pytest.fixture
def hub(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        use_endpoint(monkeypatch, server.url)
        yield server


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """huggingface_hub read its variables when it was imported, long before this test."""
    from huggingface_hub import constants, file_download

    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # before 1.0
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path(os.environ["HF_HOME"]) / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
