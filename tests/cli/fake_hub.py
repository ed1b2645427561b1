"""A server on this machine that answers as the hub does: what is in a repository, and its files, whole or in part."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SECONDS = 120.0
"""Longer than anything here takes, however busy the machine is."""


@dataclass
class Repository:
    """Files of one commit, and what goes wrong with them."""

    files: dict[str, bytes]
    refusal: tuple[int, dict[str, str]] | None = None
    """Status and headers of every answer."""
    is_listed: bool = False
    """Whether the list of files is answered all the same, as that of a gated repository is."""
    stated_sizes: dict[str, int] = field(default_factory=dict)
    """Where the list of files says something else than the files."""
    cut_at: dict[str, int] = field(default_factory=dict)
    """The first time that a file is asked for, its connection ends after so many bytes."""
    held: threading.Event | None = None
    """Where a file is cut, the connection stays open until this is set."""

    @property
    def commit(self) -> str:
        return hashlib.sha1(b"".join(self.files.values())).hexdigest()


@dataclass
class Hub:
    """Its address, what it has, and what it was asked for."""

    address: str
    repositories: dict[str, Repository]
    requests: list[str] = field(default_factory=list)
    cut: threading.Event = field(default_factory=threading.Event)
    """Set as soon as a file was cut."""

    def asked_for(self, file: str) -> list[str]:
        """Requests for the bytes of a file: the method, the path and the range."""
        return [request for request in self.requests if request.startswith("GET") and f"/{file} " in request]


@contextmanager
def serving(repositories: dict[str, Repository]) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}", repositories)
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_arguments: object) -> None:
        pass

    def _answer(self, with_body: bool) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}")
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = listing or file
        repository = hub.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            # What the hub says to strangers about what it does not have.
            self._send(401, {"X-Error-Code": "RepoNotFound"}, b"", with_body)
        elif repository.refusal is not None and not (listing and repository.is_listed):
            self._send(*repository.refusal, b"", with_body)
        elif match[2] not in ("main", repository.commit):
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"", with_body)
        elif listing:
            self._send(200, {}, _listing(match[1], repository), with_body)
        elif match[3] not in repository.files:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit}, b"", with_body)
        else:
            self._send_file(hub, repository, match[3], with_body)

    def _send_file(self, hub: Hub, repository: Repository, name: str, with_body: bool) -> None:
        data = repository.files[name]
        headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        status = 200
        if start:
            headers["Content-Range"] = f"bytes {start[1]}-{len(data) - 1}/{len(data)}"
            data, status = data[int(start[1]) :], 206
        limit = repository.cut_at.pop(name, None) if with_body else None
        if limit is None:
            self._send(status, headers, data, with_body)
            return
        self._send(status, headers | {"Content-Length": str(len(data))}, data[:limit], with_body)
        self.wfile.flush()
        hub.cut.set()
        if repository.held is not None:
            repository.held.wait(SECONDS)
        self.close_connection = True

    def _send(self, status: int, headers: dict[str, str], body: bytes, with_body: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


def _listing(name: str, repository: Repository) -> bytes:
    siblings = [
        {
            "rfilename": file,
            "size": repository.stated_sizes.get(file, len(data)),
            "blobId": hashlib.sha1(data).hexdigest(),
        }
        for file, data in repository.files.items()
    ]
    return json.dumps({"id": name, "sha": repository.commit, "siblings": siblings}).encode()
