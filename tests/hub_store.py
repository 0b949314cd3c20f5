"""Repositories of a Hub stand-in, kept as plain folders so that a test can seed one and look at an upload.

Layout under the root: `models/owner/name/...`, `datasets/owner/name/...`, `lfs/<sha256>`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

# What the Hub's default .gitattributes sends through LFS, plus anything of 10 MB and more.
LFS_SUFFIXES = (
    *(".7z", ".arrow", ".bin", ".bz2", ".ckpt", ".gguf", ".gz", ".h5", ".model", ".msgpack", ".npy", ".npz"),
    *(".onnx", ".parquet", ".pb", ".pickle", ".pkl", ".png", ".pt", ".pth", ".rar", ".safetensors", ".tar"),
    *(".tflite", ".tgz", ".wasm", ".xz", ".zip", ".zst"),
)
LFS_SIZE = 10 * 1024 * 1024


class StoreError(Exception):
    """What the real Hub would refuse: an HTTP status, its X-Error-Code, and a message."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Answer:
    """A reply: bytes as they are, anything else as JSON."""

    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def content_type(self) -> str:
        return "application/octet-stream" if isinstance(self.content, bytes) else "application/json"

    def body(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else json.dumps(self.content).encode()


def git_blob_sha1(data: bytes) -> str:
    """The name git gives these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_lfs(name: str, size: int) -> bool:
    """Whether the Hub keeps such a file in LFS; empty files never are."""
    return size > 0 and (size >= LFS_SIZE or PurePosixPath(name).suffix.lower() in LFS_SUFFIXES)


@dataclass
class Repo:
    """One repository; `lost` names files that the server forgot after the commit."""

    folder: Path
    private: bool = False
    commits: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)

    def names(self) -> list[str]:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted({path.relative_to(self.folder).as_posix() for path in files} - self.lost)

    def data(self, name: str) -> bytes:
        if name not in self.names():
            raise StoreError(404, f"Entry not found: {name}", "EntryNotFound")
        return (self.folder / name).read_bytes()

    def entry(self, name: str) -> dict:
        """One line of the tree listing, as the Hub's API spells it."""
        data = self.data(name)
        entry: dict = {"type": "file", "path": name, "size": len(data), "oid": git_blob_sha1(data)}
        if is_lfs(name, len(data)):
            sha256 = hashlib.sha256(data).hexdigest()
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n"
            entry["oid"] = git_blob_sha1(pointer.encode())
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}
        return entry

    def tree(self, under: str = "", recursive: bool = False) -> list[dict]:
        """Files and folders below `under`, folders first seen first."""
        prefix = f"{under.strip('/')}/" if under.strip("/") else ""
        entries: list[dict] = []
        folders: set[str] = set()
        for name in self.names():
            if not name.startswith(prefix):
                continue
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                folder = prefix + "/".join(parts[:depth])
                if folder not in folders:
                    folders.add(folder)
                    oid = git_blob_sha1(folder.encode())
                    entries.append({"type": "directory", "path": folder, "size": 0, "oid": oid})
            if recursive or len(parts) == 1:
                entries.append(self.entry(name))
        if prefix and not entries:
            raise StoreError(404, f"Entry not found: {under}", "EntryNotFound")
        return entries

    def stamp(self, message: str) -> str:
        """Give the present content a commit name of 40 hex digits."""
        text = "".join(f"{entry['path']} {entry['oid']}\n" for entry in map(self.entry, self.names()))
        sha = hashlib.sha1(f"{len(self.commits)}\n{message}\n{text}".encode()).hexdigest()
        self.commits.append(sha)
        self.messages.append(message)
        return sha


class Store:
    """All repositories below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.repos: dict[tuple[str, str], Repo] = {}
        (root / "lfs").mkdir(parents=True, exist_ok=True)

    def create(self, kind: str, repo_id: str, private: bool) -> Repo:
        if (kind, repo_id) in self.repos:
            raise StoreError(409, f"You already created this {kind[:-1]} repo")
        folder = self.root / kind / repo_id
        folder.mkdir(parents=True, exist_ok=True)
        repo = self.repos[kind, repo_id] = Repo(folder, private)
        repo.stamp("initial commit")
        return repo

    def seed(self, kind: str, repo_id: str, source: Path | None, private: bool) -> Repo:
        """A repository that holds a copy of `source`."""
        repo = self.create(kind, repo_id, private)
        if source is not None:
            shutil.copytree(source, repo.folder, dirs_exist_ok=True)
            repo.stamp("seed")
        return repo

    def get(self, kind: str, repo_id: str, revision: str = "main") -> Repo:
        repo = self.repos.get((kind, repo_id))
        if repo is None:
            raise StoreError(404, f"Repository not found: {repo_id}", "RepoNotFound")
        if revision not in ("main", "refs/heads/main", *repo.commits):
            raise StoreError(404, f"Revision not found: {revision}", "RevisionNotFound")
        return repo

    def lfs_path(self, sha256: str) -> Path:
        if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
            raise StoreError(422, "not a sha256")
        return self.root / "lfs" / sha256

    def put_lfs(self, sha256: str, data: bytes) -> None:
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StoreError(400, "the content does not have the promised sha256")
        self.lfs_path(sha256).write_bytes(data)

    def write(self, repo: Repo, name: str, data: bytes) -> None:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or ".git" in parts:
            raise StoreError(400, f"not a path in a repository: {name}")
        path = repo.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
