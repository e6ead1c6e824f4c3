"""A Hugging Face hub on 127.0.0.1 for tests: what `huggingface_hub` asks when it downloads a snapshot.

with HubServer({"owner/name": Repository({sha: {"config.json": b"{}"}}, refs={"main": sha})}) as hub:
    ...  # a subprocess with HF_ENDPOINT=hub.url; hub.requests lists what it asked for

As the real one does: a plain file is redirected to a relative address, a large one (weights) to a store under
another host name that takes ranges; a gated repository shows its list and not its files; the reason of a
refusal is in `X-Error-Code`. `Fault`s break single answers.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin")
ADDRESS = re.compile(
    r"/(api/(resolve-cache/)?models/)?([\w.-]+/[\w.-]+)"  # of a repository
    r"(?:/(revision|tree|resolve)/([^/]+))?(?:/(.*))?"
)


@dataclass
class Repository:
    """Files by commit; `token` is asked for with every file where given (gated)."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    token: str | None = None

    def commit(self, revision: str) -> str | None:
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None


@dataclass
class Fault:
    """What goes wrong with the answers to the next `times` requests in which the pattern `at` is found.

    Those that hit the same request add up. `requests` of the server has their form.

    Attributes:
        status, headers: in place of the right ones; a `Content-Length` may lie.
        body: makes the body that is sent of the right one.
        cut: the connection ends after so many bytes of the body; by a reset if `reset`.
        pause, piece: seconds before each piece of the body, of so many bytes; before the answer to a HEAD.
        ignore_range: the whole file is sent, whatever part of it was asked for.
        then: called when the answer is on its way.
    """

    at: str
    times: float = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: Callable[[bytes], bytes] | None = None
    cut: int | None = None
    reset: bool = False
    pause: float = 0.0
    piece: int = 1 << 20
    ignore_range: bool = False
    then: Callable[[], None] | None = None


@dataclass
class HubServer:
    repositories: dict[str, Repository]
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # "GET /path" or "GET /path bytes=5-"

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # a client that gave up breaks the pipe
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.store_url = f"http://localhost:{self._server.server_port}/store"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def broken(self, request: str) -> list[Fault]:
        """The faults of this answer."""
        hit = [fault for fault in self.faults if fault.times > 0 and re.search(fault.at, request)]
        for fault in hit:
            fault.times -= 1
        return hit

    def stored(self, sha256: str) -> bytes:
        for repository in self.repositories.values():
            for files in repository.commits.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == sha256:
                        return content
        raise KeyError(sha256)


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which would hold each body back for 40 ms

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path, asked_range = unquote(urlsplit(self.path).path), self.headers.get("Range")
        request = f"{self.command} {path}" + (f" {asked_range}" if asked_range else "")
        self.server_hub.requests.append(request)
        self.faults = self.server_hub.broken(request)
        if store := re.fullmatch(r"/store/(\w+)", path):
            return self._large(self.server_hub.stored(store[1]))
        if not (known := ADDRESS.fullmatch(path)):
            return self._error(404, "EntryNotFound")
        api, cached, name, what, revision, file = known.groups()
        repository = self.server_hub.repositories.get(name)
        if repository is None:
            return self._error(401, "RepoNotFound")
        if cached:
            commit, _, file = (file or "").partition("/")
            return self._send(200, repository.commits[commit][file], self._headers(commit, repository, file))
        commit = repository.commit(revision or "main")
        if commit is None:
            return self._error(404, "RevisionNotFound")
        if what == "tree":
            return self._json([self._entry(*item) for item in sorted(repository.commits[commit].items())])
        if api:
            siblings = [self._sibling(*item) for item in sorted(repository.commits[commit].items())]
            gated = "manual" if repository.token else False
            return self._json({"id": name, "sha": commit, "gated": gated, "siblings": siblings})
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            return self._error(401 if "Authorization" not in self.headers else 403, "GatedRepo")
        if file not in repository.commits[commit]:
            return self._error(404, "EntryNotFound")
        headers = self._headers(commit, repository, file)
        content = repository.commits[commit][file]
        if file.endswith(LARGE):
            headers["Location"] = f"{self.server_hub.store_url}/{hashlib.sha256(content).hexdigest()}"
            return self._send(302, b"", headers)
        headers["Location"] = f"/api/resolve-cache/models/{name}/{commit}/{file}"
        return self._send(307, b"", headers)

    def _headers(self, commit: str, repository: Repository, file: str) -> dict[str, str]:
        content = repository.commits[commit][file]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob_id(content)}"'}
        if file.endswith(LARGE):
            sha256 = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        return headers

    def _entry(self, path: str, content: bytes) -> dict[str, object]:
        size, sha256 = len(content), hashlib.sha256(content).hexdigest()
        lfs = {"lfs": {"oid": sha256, "size": size, "pointerSize": 134}} if path.endswith(LARGE) else {}
        return {"type": "file", "path": path, "size": size, "oid": _blob_id(content), **lfs}

    def _sibling(self, path: str, content: bytes) -> dict[str, object]:
        if "blobs" not in parse_qs(urlsplit(self.path).query):
            return {"rfilename": path}
        size, sha256 = len(content), hashlib.sha256(content).hexdigest()
        lfs = {"lfs": {"sha256": sha256, "size": size, "pointerSize": 134}} if path.endswith(LARGE) else {}
        return {"rfilename": path, "size": size, "blobId": _blob_id(content), **lfs}

    def _large(self, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and not any(fault.ignore_range for fault in self.faults):
            start, stop = int(asked[1]), int(asked[2] or len(content) - 1) + 1
            where = f"bytes {start}-{stop - 1}/{len(content)}"
            return self._send(206, content[start:stop], {"Content-Range": where})
        return self._send(200, content, {"Accept-Ranges": "bytes"})

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        pause, piece = 0.0, 1 << 20
        for fault in self.faults:
            status, headers = fault.status or status, {**headers, **fault.headers}
            content = fault.body(content) if fault.body else b"{}" if fault.status else content
            pause, piece = max(pause, fault.pause), min(piece, fault.piece)
        headers = {"Content-Length": str(len(content)), **headers}
        cuts = [fault.cut for fault in self.faults if fault.cut is not None]
        if self.command == "HEAD":
            self.server_hub.closing.wait(pause)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for start in range(0, min([len(content), *cuts]), piece):
                self.server_hub.closing.wait(pause)
                self.wfile.write(content[start : min([start + piece, *cuts])])
            self.wfile.flush()
            self.close_connection |= bool(cuts) or headers["Content-Length"] != str(len(content))
        if any(fault.reset for fault in self.faults):
            # A socket that lingers for 0 seconds is closed by a reset, and not by a farewell.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        for fault in self.faults:
            if fault.then:
                fault.then()


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
