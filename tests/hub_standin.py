"""A local server that speaks the Hub's HTTP API to huggingface_hub, with faults to switch on.

    with HubStandIn() as hub:
        commit = hub.add_repo("acme/support", {"adapter_config.json": b"...", ...})
        environment = hub.environment(hf_home)       # HF_ENDPOINT, HF_HOME...: for the process that pulls
        hub.faults.cut_after = 100_000
        ...
        assert hub.requests("GET", "/cdn/")

huggingface_hub reads its environment at import: use it in a process that starts with `environment`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.http_server import StandInServer

_LARGE = 10_000
"""Files of so many bytes lie on the "CDN", as those in git-lfs do; smaller ones are answered at once."""

_PIECE = 16_384


@dataclass
class Faults:
    """What goes wrong, until it is set back."""

    status: int | None = None
    """Every answer has this status, say 500."""
    status_of: tuple[str, int] | None = None
    """Answers about files whose paths end so have this status."""
    cut_after: int | None = None
    """A transfer ends after so many bytes, without notice."""
    cuts: int = 1_000_000
    """How many transfers are cut."""
    extra_size: int = 0
    """What is announced beyond the real size."""
    endless: bool = False
    """A transfer does not end by itself."""
    corrupt: int = 0
    """In how many transfers one byte is another."""
    pause: float = 0.0
    """Seconds between two pieces."""
    piece: int = _PIECE
    """Bytes of a piece."""
    hang: bool = False
    """Nothing is answered at all until the server closes."""
    held: frozenset[str] = frozenset()
    """Repositories about which nothing is answered until the server closes."""
    no_commit_header: bool = False
    commit: str | None = None
    """What the Hub calls every commit, in a header and in JSON."""
    etag: str | None = None
    """Of every file."""
    size: str | None = None
    """Of a large file."""


@dataclass
class Repo:
    """Files by commit, and what branches and tags point at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


class HubStandIn:
    """The server; `url` is for HF_ENDPOINT. `token`: the only one that it accepts."""

    def __init__(self, token: str = "hf_standin") -> None:
        self.token = token
        self.faults = Faults()
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}
        """Old names of repositories, which are redirected to the new ones."""
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.closing = threading.Event()
        self._server = StandInServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def cdn_url(self) -> str:
        """The same server by another name, so that huggingface_hub takes it for another host."""
        return f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> HubStandIn:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port: from now on connections are refused."""
        if not self.closing.is_set():
            self.closing.set()
            self._server.shutdown()
            self._server.server_close()

    def environment(self, hf_home: Path, **more: str) -> dict[str, str]:
        """What a process needs to take this for the Hub and `hf_home` for its cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(hf_home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **more,
        }

    def add_repo(
        self,
        repo: str,
        files: Mapping[str, bytes],
        revisions: tuple[str, ...] = ("main",),
        *,
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Commit these files (and no others); the revisions point at it from now on. Returns the commit."""
        held = self.repos.setdefault(repo, Repo())
        held.gated, held.private = gated, private
        total = hashlib.sha1(f"{repo} {len(held.commits)}".encode())
        for name, content in sorted(files.items()):
            total.update(name.encode() + content)
        commit = total.hexdigest()
        held.commits[commit] = dict(files)
        held.refs.update(dict.fromkeys(revisions, commit))
        return commit

    def requests(self, method: str | None = None, beginning: str = "") -> list[str]:
        """The paths that were asked for, in order."""
        return [
            path
            for asked, path, _ in list(self.log)
            if method in (None, asked) and path.startswith(beginning)
        ]


class _RefusedError(Exception):
    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = headers or {}


_RESOLVE = re.compile(r"/(?:datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_INFO = re.compile(r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/(?:models|datasets)/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")
_CDN = re.compile(r"/cdn/(?P<sha256>[0-9a-f]{64})")


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        standin = hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    standin: HubStandIn

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        hub = self.standin
        hub.log.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
        if hub.faults.hang or any(f"/{repo}/" in f"{self.path}/" for repo in hub.faults.held):
            hub.closing.wait()
            self.close_connection = True
            return
        try:
            if hub.faults.status is not None:
                raise _RefusedError(hub.faults.status, "", "The Hub has a fault")
            path = urlsplit(self.path).path
            if hub.faults.status_of is not None and path.endswith(hub.faults.status_of[0]):
                raise _RefusedError(hub.faults.status_of[1], "", "The Hub has a fault")
            for old, new in hub.moved.items():
                if f"/{old}/" in f"{path}/":
                    self._redirect(307, {"Location": path.replace(old, new)})
                    return
            self._route(path)
        except _RefusedError as refused:
            self._refuse(refused)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _route(self, path: str) -> None:
        if found := _CDN.fullmatch(path):
            self._cdn(found["sha256"])
        elif found := _INFO.fullmatch(path):
            self._info(found["repo"], unquote(found["revision"] or "main"))
        elif found := _TREE.fullmatch(path):
            self._tree(found["repo"], unquote(found["revision"]))
        elif found := _RESOLVE.fullmatch(path):
            self._resolve(found["repo"], unquote(found["revision"]), unquote(found["file"]))
        else:
            raise _RefusedError(404, "", "Not found")

    def _repo(self, name: str) -> Repo:
        held = self.standin.repos.get(name)
        sent = self.headers.get("Authorization")
        known = sent == f"Bearer {self.standin.token}"
        if sent is not None and not known:
            raise _RefusedError(401, "", "Invalid credentials in Authorization header")
        if held is None or (held.private and not known):
            raise _RefusedError(404 if known else 401, "RepoNotFound", "Repository not found")
        return held

    def _commit(self, held: Repo, revision: str) -> str:
        commit = revision if revision in held.commits else held.refs.get(revision)
        if commit is None:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _info(self, name: str, revision: str) -> None:
        held = self._repo(name)
        commit = self._commit(held, revision)
        siblings = [{"rfilename": file, "size": len(data)} for file, data in held.commits[commit].items()]
        said = self.standin.faults.commit or commit
        body = {"_id": name, "id": name, "modelId": name, "sha": said, "siblings": siblings}
        self._send(json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _tree(self, name: str, revision: str) -> None:
        held = self._repo(name)
        files = held.commits[self._commit(held, revision)]
        tree = [
            {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for file, data in files.items()
        ]
        self._send(json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        held = self._repo(name)
        if held.gated and self.headers.get("Authorization") is None:
            raise _RefusedError(401, "GatedRepo", "Access to this model is restricted")
        if held.gated and self.standin.token == "hf_without_access":
            raise _RefusedError(403, "GatedRepo", "Access to this model is restricted")
        commit = self._commit(held, revision)
        faults = self.standin.faults
        headers = {} if faults.no_commit_header else {"X-Repo-Commit": faults.commit or commit}
        content = held.commits[commit].get(file)
        if content is None:
            raise _RefusedError(404, "EntryNotFound", "Entry not found", headers)
        if len(content) < _LARGE:
            git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            self._send(content, {**headers, "ETag": f'"{faults.etag or git}"'})
            return
        digest = hashlib.sha256(content).hexdigest()
        size = faults.size or len(content) + faults.extra_size
        self._redirect(
            302,
            {
                **headers,
                "Location": f"{self.standin.cdn_url}/cdn/{digest}?Signature=s3cr3t",
                "X-Linked-Etag": f'"{faults.etag or digest}"',
                "X-Linked-Size": str(size),
            },
        )

    def _cdn(self, digest: str) -> None:
        if self.headers.get("Authorization") is not None:
            raise _RefusedError(400, "", "The CDN must not see the Hub's token")
        for content in _contents(self.standin):
            if hashlib.sha256(content).hexdigest() == digest:
                self._send(content, {"ETag": f'"{digest}"'})
                return
        raise _RefusedError(404, "", "Not found")

    def _redirect(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, refused: _RefusedError) -> None:
        body = json.dumps({"error": str(refused)}).encode()
        self.send_response(refused.status)
        if refused.code:
            self.send_header("X-Error-Code", refused.code)
        for name, value in refused.headers.items():
            self.send_header(name, value)
        self.send_header("X-Error-Message", str(refused))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send(self, content: bytes, headers: Mapping[str, str]) -> None:
        faults = self.standin.faults
        size = len(content) + faults.extra_size
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        self.send_response(206 if asked else 200)
        if asked:
            start = int(asked[1])
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        if not faults.endless or self.command == "HEAD":
            self.send_header("Content-Length", str(size - start))
        else:
            self.send_header("Connection", "close")
        self.send_header("Accept-Ranges", "bytes")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._transfer(content[start:])

    def _transfer(self, content: bytes) -> None:
        faults = self.standin.faults
        if faults.corrupt and content:
            faults.corrupt -= 1
            content = bytes([content[0] ^ 1]) + content[1:]
        if faults.cut_after is not None and faults.cuts and len(content) > faults.cut_after:
            faults.cuts -= 1
            self.wfile.write(content[: faults.cut_after])
            self.close_connection = True
            return
        for begin in range(0, len(content), faults.piece):
            self.wfile.write(content[begin : begin + faults.piece])
            self.wfile.flush()
            if faults.pause:
                self.standin.closing.wait(faults.pause)
        while faults.endless and not self.standin.closing.is_set():
            self.wfile.write(b"x" * _PIECE)
            self.close_connection = True
        if faults.extra_size:
            self.close_connection = True


def _contents(hub: HubStandIn) -> Iterator[bytes]:
    for repo in list(hub.repos.values()):
        for files in list(repo.commits.values()):
            yield from files.values()
