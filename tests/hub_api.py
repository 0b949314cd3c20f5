"""The Hub's HTTP routes, each in a few lines, answering from a `Store`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from hub_store import Answer, Repo, StoreError, git_blob_sha1, is_lfs

if TYPE_CHECKING:
    from hub_server import HubServer

KIND = r"/api/(?P<kind>models|datasets)"
REPO = KIND + r"/(?P<id>[^/]+/[^/]+)"
HOME = r"(?:/(?P<kind>datasets))?/(?P<id>[^/]+/[^/]+)"
REV = r"(?P<rev>refs/[^/]+/[^/]+|[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", REPO + r"/preupload/(?P<rev>.+)", "preupload"),
    ("POST", REPO + r"/commit/(?P<rev>.+)", "commit"),
    ("POST", REPO + r"/paths-info/(?P<rev>.+)", "paths_info"),
    ("GET", REPO + r"/refs", "refs"),
    ("GET", REPO + r"/tree/" + REV + r"(?:/(?P<path>.*))?", "tree"),
    ("GET", REPO + r"(?:/revision/(?P<rev>.+))?", "info"),
    ("POST", HOME + r"\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
    ("PUT", r"/lfs/(?P<oid>\w+)/(?P<part>\d+)", "lfs_part"),
    ("POST", r"/lfs/(?P<oid>\w+)/complete", "lfs_complete"),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", "lfs_verify"),
    ("GET|HEAD", HOME + r"/resolve/" + REV + r"/(?P<path>.+)", "resolve"),
]


class HubApi:
    """One request, answered. Raises StoreError for what the Hub refuses."""

    def __init__(self, hub: HubServer, headers: Mapping[str, str], query: str, body: bytes) -> None:
        self.hub, self.store, self.headers, self.body = hub, hub.store, headers, body
        self.query = parse_qs(query)

    def answer(self, method: str, path: str) -> Answer:
        """The reply of the first route that fits."""
        for methods, pattern, name in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method in methods.split("|"):
                fields = {key: value for key, value in found.groupdict().items() if value is not None}
                if "id" in fields:
                    fields.setdefault("kind", "models")
                return getattr(self, name)(**fields)
        raise StoreError(404, f"no such route: {method} {path}")

    # Who is asking

    def user(self) -> dict | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.hub.tokens:
            raise StoreError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def known_user(self) -> dict:
        user = self.user()
        if user is None:
            raise StoreError(401, "Invalid username or password.")
        return user

    def readable(self, kind: str, repo_id: str, rev: str = "main") -> Repo:
        user, repo = self.user(), self.store.get(kind, repo_id, rev)
        if repo.private and (user is None or not self.owns(user, repo_id)):
            raise StoreError(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def owns(self, user: dict, repo_id: str) -> bool:
        return repo_id.split("/")[0] in [user["name"], *(org["name"] for org in user["orgs"])]

    def check_write(self, repo_id: str) -> None:
        user = self.known_user()
        access = user["auth"]["accessToken"]
        scopes = access.get("fineGrained", {}).get("scoped", [])
        fine = any("repo.write" in scope["permissions"] for scope in scopes)
        if not self.owns(user, repo_id) or not (access["role"] == "write" or fine):
            raise StoreError(403, "You don't have the rights to write to this namespace")

    def whoami(self) -> Answer:
        return Answer(self.known_user())

    # Uploading

    def create(self) -> Answer:
        asked = json.loads(self.body)
        kind = f"{asked.get('type') or 'model'}s"
        user = self.user()
        owner = asked.get("organization") or (user["name"] if user else "")
        repo_id = f"{owner}/{asked['name']}"
        self.check_write(repo_id)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if (kind, repo_id) in self.store.repos:
            return Answer({"error": f"You already created this {kind[:-1]} repo", "url": url}, 409)
        self.store.create(kind, repo_id, private)
        return Answer({"url": url, "name": repo_id, "id": "1"})

    def validate_yaml(self) -> Answer:
        front = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        base = re.search(r"^base_model: *['\"]?([^'\"\n]+)", front.group(1), re.MULTILINE) if front else None
        if base and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base.group(1)):
            message = f'"base_model" with value "{base.group(1)}" is not valid. Use a model id from the Hub.'
            return Answer({"errors": [{"message": message}], "warnings": []}, 400)
        return Answer({"errors": [], "warnings": []})

    def preupload(self, kind: str, id: str, rev: str) -> Answer:
        repo = self.store.get(kind, id, rev)
        self.check_write(id)
        files = []
        for asked in json.loads(self.body)["files"]:
            name, oid = asked["path"], None
            if name in repo.names():
                entry = repo.entry(name)
                oid = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            mode = "lfs" if is_lfs(name, asked["size"]) else "regular"
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return Answer({"files": files})

    def lfs_batch(self, kind: str, id: str) -> Answer:
        self.store.get(kind, id)
        self.check_write(id)
        return Answer({"transfer": "basic", "objects": list(map(self._lfs_object, json.loads(self.body)["objects"]))})

    def _lfs_object(self, asked: dict) -> dict:
        oid, size = asked["oid"], asked["size"]
        if self.store.lfs_path(oid).exists():
            return {"oid": oid, "size": size}
        href = f"{self.hub.url}/lfs/{oid}"
        upload: dict = {"href": href, "header": {}}
        if self.hub.multipart_from is not None and size >= self.hub.multipart_from:
            chunk = max(1, (size + 2) // 3)
            parts = {str(n + 1): f"{href}/{n + 1}" for n in range(-(-size // chunk))}
            upload = {"href": f"{href}/complete", "header": {"chunk_size": str(chunk), **parts}}
        verify = {"href": f"{href}/verify", "header": {}}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def lfs_put(self, oid: str) -> Answer:
        self.store.put_lfs(oid, self.body)
        return Answer({})

    def lfs_part(self, oid: str, part: str) -> Answer:
        (self.store.root / f"part-{oid}-{part}").write_bytes(self.body)
        return Answer({}, headers={"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> Answer:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        parts = [(self.store.root / f"part-{oid}-{n}").read_bytes() for n in numbers]
        self.store.put_lfs(oid, b"".join(parts))
        return Answer({})

    def lfs_verify(self, oid: str) -> Answer:
        path, asked = self.store.lfs_path(oid), json.loads(self.body)
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise StoreError(404, "Object not found")
        return Answer({})

    def commit(self, kind: str, id: str, rev: str) -> Answer:
        repo = self.store.get(kind, id, rev)
        self.check_write(id)
        message = ""
        for line in filter(None, self.body.split(b"\n")):
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                self.store.write(repo, value["path"], base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not self.store.lfs_path(value["oid"]).exists():
                    raise StoreError(400, f"LFS object {value['oid']} was not uploaded")
                self.store.write(repo, value["path"], self.store.lfs_path(value["oid"]).read_bytes())
            elif key == "deletedFile":
                (repo.folder / value["path"]).unlink()
        repo.lost |= self.hub.lose_after_commit & set(repo.names())
        sha = repo.stamp(message)
        return Answer({"success": True, "commitUrl": f"{self.hub.url}/{id}/commit/{sha}", "commitOid": sha})

    # Listing and downloading

    def info(self, kind: str, id: str, rev: str = "main") -> Answer:
        repo = self.readable(kind, id, rev)
        files = []
        for name in repo.names():
            entry = repo.entry(name)
            lfs = {"lfs": {**entry["lfs"], "sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {}
            blobs = {"size": entry["size"], "blobId": entry["oid"], **lfs} if "blobs" in self.query else {}
            files.append({"rfilename": name, **blobs})
        facts = {"_id": git_blob_sha1(id.encode())[:24], "id": id, "sha": repo.commits[-1], "siblings": files}
        dates = {"lastModified": "2024-01-01T00:00:00.000Z", "createdAt": "2024-01-01T00:00:00.000Z"}
        flags = {
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
        }
        return Answer({**facts, **dates, **flags, "author": id.split("/")[0]})

    def tree(self, kind: str, id: str, rev: str, path: str = "") -> Answer:
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        return Answer(self.readable(kind, id, rev).tree(path, recursive))

    def paths_info(self, kind: str, id: str, rev: str) -> Answer:
        repo = self.readable(kind, id, rev)
        is_json = "json" in (self.headers.get("Content-Type") or "")
        paths = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode())["paths"]
        entries = {entry["path"]: entry for entry in repo.tree(recursive=True)}
        return Answer([entries[path] for path in paths if path in entries])

    def refs(self, kind: str, id: str) -> Answer:
        repo = self.readable(kind, id)
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commits[-1]}
        return Answer({"branches": [main], "converts": [], "tags": []})

    def resolve(self, kind: str, id: str, rev: str, path: str) -> Answer:
        repo = self.readable(kind, id, rev)
        data, entry = repo.data(path), repo.entry(path)
        oid = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers = {"ETag": f'"{oid}"', "X-Repo-Commit": repo.commits[-1], "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return Answer(data, headers=headers)
        start, end = int(asked.group(1)), min(int(asked.group(2) or len(data) - 1), len(data) - 1)
        if start >= len(data):
            return Answer(b"", 416, headers | {"Content-Range": f"bytes */{len(data)}"})
        return Answer(data[start : end + 1], 206, headers | {"Content-Range": f"bytes {start}-{end}/{len(data)}"})
