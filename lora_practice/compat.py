"""Differences between versions of TRL, transformers, PEFT and huggingface_hub, told by their function parameters."""

from __future__ import annotations

import contextlib
import inspect
import sys
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import text

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface-hub", "tokenizers")


def check_torch_version() -> None:
    """Refuse a torch version in which resuming cannot work.

    Raises:
        UserError: torch < 2.6, where transformers refuses to load optimizer states (CVE-2025-32434).
    """
    import torch

    major, minor = (int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if (major, minor) < (2, 6):
        raise UserError(
            text(
                f"torch {torch.__version__} 太旧，无法从检查点继续训练",
                f"torch {torch.__version__} is too old to resume",
            ),
            fix='pip install "torch>=2.6"',
        )


def check_tracker(name: str) -> None:
    """Refuse a `report_to` whose package is not installed.

    Raises:
        UserError: with the pip command that installs it.
    """
    if name != "none":
        check_installed(name, f"--report_to {name}")


def check_installed(name: str, flag: str) -> None:
    """Refuse a flag whose package is not installed.

    Raises:
        UserError: with the pip command that installs it.
    """
    import importlib.util

    if importlib.util.find_spec(name) is None:
        raise UserError(text(f"没有安装 {name}", f"{name} is not installed"), where=flag, fix=f"pip install {name}")


def sft_config(**wanted: Any) -> Any:
    """`trl.SFTConfig` with these options, for one card at most.

    With several cards transformers would use them all (DataParallel) and multiply the batch size. transformers 5.15
    removed `warmup_ratio`; there `warmup_steps` accepts a share below 1 instead.

    Raises:
        RuntimeError: this version of TRL has no such option.
    """
    from trl import SFTConfig

    known = inspect.signature(SFTConfig.__init__).parameters
    if "warmup_ratio" in wanted and "warmup_ratio" not in known:
        wanted["warmup_steps"] = wanted.pop("warmup_ratio")
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise RuntimeError(f"trl.SFTConfig of this version has no {', '.join(unknown)}")
    arguments = SFTConfig(**wanted)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def network_errors(*others: type[BaseException]) -> tuple[type[BaseException], ...]:
    """Exception types for an `except`: network errors of huggingface_hub's HTTP library, and `others`.

    huggingface_hub uses requests before 1.0, httpx since, and httpx2 lately; only a library that is imported counts.
    """
    kinds: list[type[BaseException]] = [ConnectionError, TimeoutError, *others]
    for module, names in (
        ("httpx2", ("TransportError",)),
        ("httpx", ("TransportError",)),
        ("requests.exceptions", ("ConnectionError", "Timeout", "ChunkedEncodingError")),
    ):
        if module in sys.modules:
            kinds += [getattr(sys.modules[module], name) for name in names]
    return tuple(kinds)


def set_hub_timeout(seconds: float) -> None:
    """Make huggingface_hub give up on a server after `seconds` without a byte; by default it waits for ever.

    It uses a `requests.Session` before 1.0 and an httpx client since.
    """
    import huggingface_hub

    if hasattr(huggingface_hub, "set_client_factory"):
        from huggingface_hub.utils._http import default_client_factory

        def client() -> Any:
            new_client = default_client_factory()
            new_client.timeout = seconds
            return new_client

        huggingface_hub.set_client_factory(client)
        return
    import requests

    class Session(requests.Session):
        def request(self, *args: Any, **kwargs: Any) -> Any:
            kwargs["timeout"] = kwargs.get("timeout") or seconds
            return super().request(*args, **kwargs)

    huggingface_hub.configure_http_backend(Session)


def generation_cache() -> str:
    """The argument name under which `generate` takes and returns the key-value cache.

    A release of transformers 5 renamed `past_key_values` to `cache`, and warns about the old name at each token.
    """
    from transformers.generation import GenerateDecoderOnlyOutput

    return "cache" if "cache" in inspect.signature(GenerateDecoderOnlyOutput).parameters else "past_key_values"


def installed() -> dict[str, str]:
    """Versions of Python and the libraries that a run depends on, for its record; "" if not installed."""
    import platform

    return {"python": platform.python_version(), **{name: version or "" for name, version in libraries().items()}}


def libraries() -> dict[str, Optional[str]]:
    """Version of each library that a run depends on; None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Optional[str]] = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
