"""A hub on the loopback device with the parts of the real protocol that a download uses.

Listings under /api, files under resolve/; large ones are redirected to another host name, as to a content network.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".bin")
API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree|refs)(?:/(.+))?)?")
FILE = re.compile(r"/(cdn/)?(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
TOKEN = "hf_sesame"


@dataclass
class Repo:
    """Files of each revision; a revision's commit is the SHA-1 of its name. gated: only TOKEN opens it."""

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False

    def find(self, name: str) -> tuple[str, dict[str, bytes]] | None:
        """Return commit and files of a branch or commit."""
        for revision, files in self.revisions.items():
            commit = hashlib.sha1(revision.encode()).hexdigest()
            if name in (revision, commit):
                return commit, files
        return None


@dataclass
class LocalHub:
    """The hub's content, its faults, and a log of the transfers.

    repos: by (type, name). cuts: bytes of a file after which its connections break, one per transfer. down_after_cut:
    then the hub answers 503. ranges: whether requests for a range get one. sent: other content than that listed.
    transfers: name, first byte and Authorization of each.
    """

    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    down_after_cut: bool = False
    ranges: bool = True
    sent: dict[str, bytes] = field(default_factory=dict)
    transfers: list[tuple[str, int, str | None]] = field(default_factory=list)
    url: str = ""

    def add(self, repo_id: str, files: dict[str, bytes], repo_type: str = "model", gated: bool = False) -> Repo:
        """Create a repository with these files on its main branch."""
        repo = self.repos[repo_type, repo_id] = Repo({"main": files}, gated)
        return repo

    @contextmanager
    def serve(self) -> Iterator[LocalHub]:
        """Answer requests at `url` until the end of the block."""
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := API.fullmatch(path):
            self._list(*match.groups())
        elif match := FILE.fullmatch(path):
            self._file(*match.groups())
        else:
            self._fail(404, "")

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, b"{}", x_error_code=code)

    def _list(self, repo_type: str, repo_id: str, what: str | None, revision: str | None) -> None:
        repo = self.hub.repos.get((repo_type, repo_id))
        if repo is None:
            # As the hub answers without a token, also for private repositories.
            return self._fail(401, "RepoNotFound")
        found = repo.find(revision or "main")
        if what == "refs":
            names = [{"name": name, "ref": name, "targetCommit": ""} for name in repo.revisions]
            return self._answer(200, json.dumps({"branches": names, "converts": [], "tags": []}).encode())
        if found is None:
            return self._fail(404, "RevisionNotFound")
        commit, files = found
        if what == "tree":
            return self._answer(200, json.dumps([_entry(*item) for item in files.items()]).encode())
        return self._answer(200, json.dumps({"id": repo_id, "sha": commit, "siblings": []}).encode())

    def _file(self, cdn: str | None, dataset: str | None, repo_id: str, revision: str, name: str) -> None:
        repo = self.hub.repos["dataset" if dataset else "model", repo_id]
        authorization = self.headers["Authorization"]
        if repo.gated and not cdn and authorization != f"Bearer {TOKEN}":
            return self._fail(403 if authorization else 401, "GatedRepo")
        if self.hub.down_after_cut and self.hub.cuts.get(name) == []:
            return self._fail(503, "")
        found = repo.find(revision)
        assert found is not None
        content = self.hub.sent.get(name, found[1][name])
        if name.endswith(LARGE) and not cdn:
            # Another host name, to which no token may go.
            other = self.hub.url.replace("127.0.0.1", "localhost")
            return self._answer(302, b"", location=f"{other}/cdn{self.path}")
        asked = self.headers.get("Range") if self.hub.ranges else None
        start = int(re.findall(r"bytes=(\d+)-", asked or "bytes=0-")[0])
        self.hub.transfers.append((name, start, authorization))
        cuts = self.hub.cuts.get(name)
        end = cuts.pop(0) if cuts else len(content)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:end])
        if end < len(content):
            self.close_connection = True
        return None


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """Return a file as the hub's tree lists it: with git's hash of the blob, and the SHA-256 of a large file."""
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 120}
    return entry
