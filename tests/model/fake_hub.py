"""A model hub on a loopback port: as much of the hub's HTTP interface as its client and our download use.

Small files come from the hub's own address. Large ones are redirected to another host name, as the real hub does with
its storage, and announce the hub's chunked storage too, so that a test fails if anything but plain HTTP is used.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPO = "LiquidAI/LFM2-Test"


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class FakeHub:
    """What the hub holds and how it misbehaves. Change the fields at any time; `requests` is the log.

    `commits` maps a commit to its files, `revisions` a branch or tag to a commit. `cuts` says after how many bytes each
    of the next downloads of a large file is cut off (None: not). `statuses` answers a path that contains the key with
    (status, error code). `ignores_range` makes it send whole files whatever is asked. `listing` replaces the list of
    files.
    """

    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    cuts: list[int | None] = field(default_factory=list)
    statuses: dict[str, tuple[int, str]] = field(default_factory=dict)
    ignores_range: bool = False
    listing: bytes | None = None
    requests: list[Request] = field(default_factory=list)
    endpoint: str = ""

    def commit(self, files: Mapping[str, bytes], *names: str) -> str:
        """Add a commit, under the branch or tag `names`."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode(), usedforsecurity=False).hexdigest()
        self.commits[commit] = files
        self.revisions |= dict.fromkeys(names, commit)
        return commit

    def storage_requests(self) -> list[Request]:
        """The downloads of large files."""
        return [request for request in self.requests if request.path.startswith("/storage/")]

    def resolve(self, revision: str) -> str | None:
        commit = self.revisions.get(revision, revision)
        return commit if commit in self.commits else None


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Routes of the hub; `hub` is set on the class that `serve` makes."""

    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(Request(self.command, path, self.headers["Range"], self.headers["Authorization"]))
        for part, (status, code) in list(self.hub.statuses.items()):
            if part in path:
                return self.answer(status, b"", {"X-Error-Code": code})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.list_repo(match[1], match[2] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve_file(match[1], match[2], match[3])
        if match := re.fullmatch(r"/storage/(\w+)", path):
            return self.send_large(match[1])
        return self.answer(404, b"not a route")

    do_HEAD = do_GET

    def list_repo(self, repo: str, revision: str) -> None:
        if repo != REPO:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.resolve(revision)
        if commit is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if self.hub.listing is not None:
            return self.answer(200, self.hub.listing)
        siblings = []
        for name, content in self.hub.commits[commit].items():
            sibling = {"rfilename": name, "size": len(content), "blobId": git_id(content)}
            if is_large(name):
                sibling["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        return self.answer(200, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())

    def resolve_file(self, repo: str, revision: str, name: str) -> None:
        commit = self.hub.resolve(revision)
        content = self.hub.commits[commit].get(name) if commit else None
        if repo != REPO or commit is None or content is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": commit}
        if not is_large(name):
            return self.answer(200, content, headers | {"ETag": f'"{git_id(content)}"'})
        port = self.server.server_address[1]
        headers |= {
            "Location": f"http://localhost:{port}/storage/{sha256(content)}?signature=x",
            "X-Linked-ETag": f'"{sha256(content)}"',
            "X-Linked-Size": str(len(content)),
            "X-Xet-Hash": sha256(content),
            "X-Xet-Refresh-Route": f"/api/models/{repo}/xet-read-token/{commit}",
        }
        return self.answer(302, b"", headers)

    def send_large(self, blob: str) -> None:
        contents = {sha256(c): c for files in self.hub.commits.values() for c in files.values()}
        content, start, headers = contents[blob], 0, {}
        if (asked := self.headers["Range"]) and not self.hub.ignores_range:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        cut = self.hub.cuts.pop(0) if self.hub.cuts else None
        self.answer(206 if headers else 200, content[start:], headers, cut)

    def answer(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, cut: int | None = None
    ) -> None:
        """Send a response; with `cut`, close the connection after that many bytes of the body."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection = self.close_connection or cut is not None

    def log_message(self, format: str, *args: object) -> None:
        """The log is `hub.requests`."""


@contextmanager
def serve(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve `hub` on a free port while the context is open."""
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True  # a client keeps its connection open after the test
        hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
