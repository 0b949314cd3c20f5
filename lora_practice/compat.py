"""The only file that knows how the libraries' versions differ; asked by signature, each with its reason."""

from __future__ import annotations

import contextlib
import inspect
import sys
from typing import Any, Optional

from lora_practice.console.errors import UserError
from lora_practice.console.text import text

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface-hub", "tokenizers")


def check_stack() -> None:
    """Refuse a torch in which resuming cannot work, before anything is trained.

    Raises:
        UserError: torch < 2.6, where transformers refuses to load optimizer states (CVE-2025-32434).
    """
    import torch

    major, minor = (int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if (major, minor) < (2, 6):
        raise UserError(
            text(
                f"torch {torch.__version__} 太旧，存盘后无法续训",
                f"torch {torch.__version__} is too old to resume",
            ),
            fix='pip install "torch>=2.6"',
        )


def check_tracker(name: str) -> None:
    """Refuse a `report_to` whose package is not installed, before anything is trained.

    Raises:
        UserError: with the pip line that installs it.
    """
    if name != "none":
        check_installed(name, f"--report_to {name}")


def check_installed(name: str, flag: str) -> None:
    """Refuse a flag whose package is not installed.

    Raises:
        UserError: with the pip line that installs it.
    """
    import importlib.util

    if importlib.util.find_spec(name) is None:
        raise UserError(text(f"没有装 {name}", f"{name} is not installed"), where=flag, fix=f"pip install {name}")


def sft_config(**wanted: Any) -> Any:
    """`trl.SFTConfig` with these options, for one card; an option that this version does not know is an error.

    On several, transformers would take all of them (DataParallel), and so many times the rows that were asked for.
    `warmup_ratio` left transformers in 5.15; there `warmup_steps` takes a share below 1 instead.
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
    """The network errors of whichever HTTP library huggingface_hub has loaded, and `others`, for an `except`.

    Before 1.0 that is requests; since then httpx, lately httpx2.
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
    """Have huggingface_hub give up a server after `seconds` without a byte; by itself it waits for ever.

    Before 1.0 it speaks through a `requests.Session`; since then through an httpx client.
    """
    import huggingface_hub

    if hasattr(huggingface_hub, "set_client_factory"):
        from huggingface_hub.utils._http import default_client_factory

        def client() -> Any:
            made = default_client_factory()
            made.timeout = seconds
            return made

        huggingface_hub.set_client_factory(client)
        return
    import requests

    class Session(requests.Session):
        def request(self, *args: Any, **kwargs: Any) -> Any:
            kwargs["timeout"] = kwargs.get("timeout") or seconds
            return super().request(*args, **kwargs)

    huggingface_hub.configure_http_backend(Session)


def generation_cache() -> str:
    """The name under which `generate` takes and returns keys and values.

    transformers 5 has renamed `past_key_values` to `cache` on the way, and warns of the old name at each token.
    """
    from transformers.generation import GenerateDecoderOnlyOutput

    return "cache" if "cache" in inspect.signature(GenerateDecoderOnlyOutput).parameters else "past_key_values"


def installed() -> dict[str, str]:
    """Versions of the libraries that a run depends on."""
    import platform

    return {"python": platform.python_version(), **{name: version or "" for name, version in libraries().items()}}


def libraries() -> dict[str, Optional[str]]:
    """The version of each library that a run depends on; None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Optional[str]] = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
