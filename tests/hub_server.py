"""A Hugging Face Hub on 127.0.0.1 that the real `huggingface_hub` client talks to through HF_ENDPOINT.

It speaks what uploading and downloading need (whoami, create, preupload, LFS basic and multipart, commit,
listings, resolve with ETag and Range) and can misbehave on demand. It knows no Xet: set HF_HUB_DISABLE_XET=1.

    with HubServer() as hub:
        hub.add_repo("models", "alice/tiny", folder)
        os.environ["HF_ENDPOINT"] = hub.url
"""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from hub_api import HubApi
from hub_store import Answer, Repo, Store, StoreError

# Made of one letter each, so that nobody takes them for real ones.
WRITE_TOKEN, READ_TOKEN = "hf_" + "W" * 34, "hf_" + "R" * 34
FINE_TOKEN, FINE_READ_TOKEN = "hf_" + "F" * 34, "hf_" + "G" * 34


def identity(role: str, permissions: list[str] | None = None, user: str = "alice") -> dict:
    """What /api/whoami-v2 says of a token: role 'write', 'read' or 'fineGrained'."""
    access: dict = {"displayName": "test", "role": role, "createdAt": "2024-01-01T00:00:00.000Z"}
    if role == "fineGrained":
        scope = {"entity": {"_id": "1", "type": "user", "name": user}, "permissions": permissions or []}
        access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": [scope]}
    auth = {"type": "access_token", "accessToken": access}
    orgs = [{"type": "org", "id": "2", "name": "school", "roleInOrg": "contributor"}]
    return {
        "type": "user",
        "id": "1",
        "name": user,
        "fullname": user,
        "isPro": False,
        "orgs": orgs,
        "auth": auth,
    }


@dataclass
class Request:
    """One request as the server saw it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Fault:
    """Misbehave for `times` requests whose 'METHOD path' contains `match`, after `skip` good ones."""

    kind: str  # "status", "drop" (close after half the body), "hang" (never answer)
    match: str
    times: int
    skip: int = 0
    status: int = 503


class HubServer:
    """The server and its switches; use it as a context manager.

    Attributes:
        url: what HF_ENDPOINT should say.
        requests: every request so far, oldest first.
        tokens: token -> identity; add your own with `identity(...)`.
        multipart_from: LFS files of this many bytes and more are sent in parts (None: never).
        store: the repositories, see `Store`.
    """

    def __init__(self) -> None:
        self._temp = tempfile.TemporaryDirectory(prefix="hub-")
        self.root = Path(self._temp.name)
        self.store = Store(self.root)
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.tokens = {
            WRITE_TOKEN: identity("write"),
            READ_TOKEN: identity("read"),
            FINE_TOKEN: identity("fineGrained", ["repo.content.read", "repo.write"]),
            FINE_READ_TOKEN: identity("fineGrained", ["repo.content.read"]),
        }
        self.multipart_from: int | None = None
        self.lose_after_commit: set[str] = set()
        self.closing = threading.Event()
        self.lock = threading.RLock()

    def __enter__(self) -> HubServer:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._temp.cleanup()

    def add_repo(self, kind: str, repo_id: str, folder: Path | None = None, private: bool = False) -> Repo:
        """A repository ('models' or 'datasets') holding a copy of `folder`."""
        with self.lock:
            return self.store.seed(kind, repo_id, folder, private)

    def repo(self, repo_id: str, kind: str = "models") -> Repo:
        """The repository, to look at; StoreError when there is none."""
        return self.store.get(kind, repo_id)

    def drop(self, match: str, times: int = 1, skip: int = 0) -> None:
        """Cut the connection in the middle of requests that match, e.g. drop("PUT /lfs/", skip=1)."""
        self.faults.append(Fault("drop", match, times, skip))

    def fail(self, status: int, match: str = "", times: int = 1, skip: int = 0) -> None:
        """Answer the next requests that match with this HTTP status."""
        self.faults.append(Fault("status", match, times, skip, status))

    def hang(self, match: str = "", times: int = 1) -> None:
        """Accept the next requests that match and never answer them."""
        self.faults.append(Fault("hang", match, times))

    def lose(self, name: str) -> None:
        """Forget this file right after the next commit that brings it."""
        self.lose_after_commit.add(name)

    def fault_for(self, line: str) -> Fault | None:
        """The switch that this request trips, if any; counts it."""
        with self.lock:
            for fault in self.faults:
                if fault.match in line and fault.times:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, records it, trips faults, and hands the rest to `HubApi`."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *_: object) -> None:
        return

    def _read_body(self, half: bool = False) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if half:
                    return body
            self.rfile.readline()
            return body
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length // 2 if half else length)

    def _serve(self) -> None:
        fault = self.hub.fault_for(f"{self.command} {self.path}")
        body = self._read_body(half=fault is not None and fault.kind == "drop")
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, dict(self.headers), body))
        if fault is not None and fault.kind == "drop":
            self.close_connection = True
            return
        if fault is not None and fault.kind == "hang":
            self.hub.closing.wait()
            self.close_connection = True
            return
        if fault is not None:
            return self._send(Answer({"error": f"as told: {fault.status}"}, fault.status))
        url = urlsplit(self.path)
        try:
            with self.hub.lock:
                api = HubApi(self.hub, self.headers, url.query, body)
                answer = api.answer(self.command, unquote(url.path))
        except StoreError as error:
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
            answer = Answer({"error": error.message}, error.status, headers)
        self._send(answer)

    def _send(self, answer: Answer) -> None:
        body = answer.body()
        self.send_response(answer.status)
        for name, value in {"Content-Type": answer.content_type, **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve


def main() -> None:
    """Serve until Ctrl-C, for trying things by hand."""
    with HubServer() as hub:
        print(hub.url, hub.root, flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
