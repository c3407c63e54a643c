"""A server that keeps adapters in memory and speaks HTTP as OneBase does: a double for the SDK's tests."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from email.message import Message
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import httpx2

NOW = 1_790_000_000.0
BASE = "SmolLM2-135M-Instruct"
COMMIT = "a1b2c3d4" * 5
LAYERS = 30
ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Json = dict[str, Any]


def digest(text: str | bytes) -> str:
    """The digest of some content."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def module(name: str, rank: int = 8, norm: float = 1.0, **changes: Any) -> Json:
    """One module of a report."""
    made = {"name": name, "kind": "lora", "rank": rank, "alpha": 2.0 * rank}
    made |= {"parameters": 1000 * rank, "norm": norm, "spectral_norm": None, "relative_norm": None}
    return made | changes


def report(
    targets: Sequence[str] = ("q_proj", "v_proj"),
    layers: Sequence[int] = range(LAYERS),
    rank: int = 8,
    scale: float = 1.0,
    extra: Sequence[Json] = (),
) -> Json:
    """The report of a version whose norms rise and fall over the layers."""
    modules = [
        module(f"model.layers.{layer}.self_attn.{target}", rank, scale * _wave(layer, place))
        for layer in layers
        for place, target in enumerate(targets)
    ] + list(extra)
    proof = {"modules_compared": len(modules), "modules_changed": len(modules), "rows": 32, "exact": True}
    proof |= {"largest_difference": 0.0, "texts": 4, "tokens_compared": 64, "texts_changed": 3}
    proof |= {"kernels": "torch", "modules_exact": len(modules), "error_ratio": 0.0, "shown": ""}
    return {
        "kinds": sorted({one["kind"] for one in modules}),
        "rank": rank,
        "alpha": 2.0 * rank,
        "rslora": False,
        "targets": [*targets, *(one["name"].rpartition(".")[2] for one in extra)],
        "parameters": sum(one["parameters"] for one in modules),
        "bytes": 4 * sum(one["parameters"] for one in modules),
        "base_name": f"HuggingFaceTB/{BASE}",
        "dropped": [],
        "warnings": [],
        "task": "CAUSAL_LM",
        "labels": 0,
        "label_names": [],
        "modules": modules,
        "proof": proof | {"base_unchanged": True, "seconds": 3.25},
    }


def _wave(layer: int, place: int) -> float:
    return 0.4 + 0.3 * math.sin(layer / 6 + place) + layer / LAYERS


def version(name: str, content: str | bytes, state: str = "ready", **changes: Any) -> Json:
    """One version as the server sends it."""
    made = digest(content)
    body = {"object": "adapter.version", "id": f"{name}@{made[:12]}", "name": name, "version": made}
    body |= {"state": state, "active": False, "error": None, "base": BASE, "source": {"kind": "upload"}}
    body |= {"created_at": NOW, "created_by": "", "tenant": "default", "progress": None}
    return body | {"report": report() if state == "ready" else None} | changes


class RefusalError(Exception):
    """Becomes an error of the server."""

    def __init__(self, status: int, code: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.status = status
        kind = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
        self.body = {"error": kind | details}


class Registry:
    """Versions by name, the newest last. Whoever asks for one that is on its way sees it take a step."""

    def __init__(
        self,
        *,
        steps: Sequence[tuple[str, float]] = (("validating", 0.25), ("proving", 0.5)),
        failure: tuple[str, str] | None = None,
        activates: bool = True,
    ) -> None:
        self.steps = steps
        self.failure = failure
        self.activates = activates
        """Whether a version is activated once it is ready, if that was asked for."""
        self.versions: dict[str, list[Json]] = {}
        self.history: dict[str, list[Json]] = {}
        self.pinned: set[str] = set()
        self.shared: set[str] = set()
        self.busy: set[str] = set()
        """Names that requests run on."""
        self.uploads: list[tuple[dict[str, str], dict[str, bytes]]] = []
        self.asked: list[tuple[str, str, Any]] = []
        """Method, path and JSON body of each request."""
        self._left: dict[str, list[tuple[str, float]]] = {}
        self._activates_version: dict[str, bool] = {}

    # ---- over HTTP -------------------------------------------------------------------------------

    @property
    def transport(self) -> httpx2.MockTransport:
        def handle(request: httpx2.Request) -> httpx2.Response:
            kind = request.headers.get("content-type", "")
            target = request.url.raw_path.decode()
            status, body = self.answer(request.method, target, kind, request.content)
            return httpx2.Response(status, json=body)

        return httpx2.MockTransport(handle)

    def script(self, request: Any) -> None:
        """For a server on a real port."""
        content = b"".join(request.chunks()) if request.body is None else json.dumps(request.body).encode()
        kind = request.headers.get("content-type", "")
        request.reply(*self.answer(request.method, request.path, kind, content))

    def answer(self, method: str, target: str, kind: str, content: bytes) -> tuple[int, Any]:
        parts = urlsplit(target)
        is_json = kind == "application/json"
        self.asked.append((method, target, json.loads(content) if is_json else None))
        path = [unquote(part) for part in parts.path.removeprefix("/v1/adapters").split("/") if part]
        try:
            if method == "POST" and not path:
                return 202, self._pull(json.loads(content)) if is_json else self._upload(kind, content)
            body = json.loads(content) if content else {}
            return 200, self._route(method, path, body, "force" in parse_qs(parts.query))
        except RefusalError as refusal:
            return refusal.status, refusal.body

    def _route(self, method: str, path: list[str], body: Json, force: bool) -> Json:
        match method, path:
            case "GET", []:
                return {"object": "list", "data": [self.adapter(name) for name in self.versions]}
            case "GET", [name]:
                return self.adapter(name)
            case "GET", [name, "versions"]:
                return {"object": "list", "data": self._known(name)[::-1]}
            case "GET", [name, "versions", wanted]:
                return self._step(self._find(name, wanted))
            case "GET", [name, "history"]:
                return {"data": self.history.get(name, [])[::-1]}
            case "POST", [name, "activate"]:
                self._expect(name, body)
                return self.activate(name, self._find(name, body["version"]))
            case "POST", [name, "rollback"]:
                self._expect(name, body)
                return self._roll_back(name)
            case "POST", [name, "deactivate"]:
                return self._switch(name, None, "deactivate")
            case "POST", [name, "pin"]:
                (self.pinned.add if body["pinned"] else self.pinned.discard)(name)
                return self.adapter(name)
            case "POST", [name, "share"]:
                (self.shared.add if body["shared"] else self.shared.discard)(name)
                return self.adapter(name)
            case "DELETE", [name, *rest]:
                return self._delete(name, rest[1] if rest else None, force)
        raise RefusalError(404, "not_found", f"no such path: {path}")

    # ---- what it knows ---------------------------------------------------------------------------

    def add(self, name: str, content: str | bytes, state: str = "ready", **changes: Any) -> Json:
        """Put a version there, as if it had been sent before."""
        made = version(name, content, state, **changes)
        self.versions.setdefault(name, []).append(made)
        return made

    def adapter(self, name: str) -> Json:
        versions = self._known(name)
        active = next((one for one in versions if one["active"]), None)
        told = active["report"] if active else {}
        facts = {key: told.get(key) for key in ("rank", "alpha", "parameters", "bytes")}
        lists = {key: told.get(key, []) for key in ("kinds", "targets")}
        body = {"object": "adapter", "id": name, "name": name, "active": active is not None}
        body |= {"version": active["version"] if active else None, "base": BASE, "tenant": "default"}
        body |= {"state": (active or versions[-1])["state"], "pinned": name in self.pinned}
        body |= {"shared": name in self.shared}
        body |= {"tier": "slot" if active else None, "versions": len(versions)}
        return body | {"created_at": NOW, "updated_at": NOW} | facts | lists

    def activate(self, name: str, wanted: Json) -> Json:
        if wanted["state"] != "ready":
            raise RefusalError(409, "version_not_ready", f"version {wanted['version']} is {wanted['state']}")
        return self._switch(name, wanted, "activate")

    def _known(self, name: str) -> list[Json]:
        if name not in self.versions:
            raise RefusalError(404, "adapter_not_found", f"there is no adapter {name!r}", param="name")
        return self.versions[name]

    def _find(self, name: str, wanted: str) -> Json:
        for one in self._known(name):
            if wanted in (one["version"], one.get("pull")) or one["version"].startswith(wanted):
                return one
        raise RefusalError(404, "version_not_found", f"{name!r} has no version {wanted!r}", param="version")

    def _active(self, name: str) -> str | None:
        return next((str(one["version"]) for one in self._known(name) if one["active"]), None)

    def _expect(self, name: str, body: Json) -> None:
        current = self._active(name)
        if "expected" in body and body["expected"] != current:
            raise RefusalError(409, "stale_activation", f"version {current} is active", current=current)

    def _switch(self, name: str, wanted: Json | None, action: str) -> Json:
        entry = {"action": action, "version": wanted and wanted["version"], "previous": self._active(name)}
        for one in self._known(name):
            one["active"] = one is wanted
        self.history.setdefault(name, []).append(entry | {"actor": "", "at": NOW})
        return self.adapter(name)

    def _roll_back(self, name: str) -> Json:
        previous = [one["previous"] for one in self.history.get(name, []) if one["previous"]]
        if not previous:
            raise RefusalError(409, "nothing_to_roll_back", f"{name!r} has no earlier version")
        return self._switch(name, self._find(name, previous[-1]), "rollback")

    def _delete(self, name: str, wanted: str | None, force: bool) -> Json:
        doomed = self._known(name) if wanted is None else [self._find(name, wanted)]
        if not force and (name in self.busy or (wanted and doomed[0]["active"])):
            raise RefusalError(409, "adapter_in_use", f"{name!r} is in use")
        self.versions[name] = [one for one in self._known(name) if one not in doomed]
        if not self.versions[name]:
            del self.versions[name]
        return {"id": name, "object": "adapter.deleted", "deleted": True}

    # ---- coming in -------------------------------------------------------------------------------

    def _upload(self, kind: str, content: bytes) -> Json:
        message = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + content)
        fields: dict[str, str] = {}
        files: dict[str, bytes] = {}
        for part in message.iter_parts():
            self._take_part(part, fields, files)
        self.uploads.append((fields, files))
        return self._come(fields["name"], b"".join(files.values()), bool(fields.get("activate")))

    @staticmethod
    def _take_part(part: Message, fields: dict[str, str], files: dict[str, bytes]) -> None:
        value = part.get_payload(decode=True)
        assert isinstance(value, bytes)
        name = part.get_param("name", header="content-disposition")
        filename = part.get_filename()
        if filename is None:
            fields[str(name)] = value.decode()
        else:
            assert name == "files"
            files[filename] = value

    def _pull(self, body: Json) -> Json:
        source = {"kind": "hub", "commit": None, "revision": None, "subfolder": None} | body["hub"]
        made = self._come(body["name"], body["hub"]["repo"], body.get("activate", False), source=source)
        self._find(body["name"], made["version"])["pull"] = "pull-1"
        return made | {"version": "pull-1", "id": f"{body['name']}@pull-1", "state": "pulling"}

    def _come(self, name: str, content: str | bytes, activate: bool, **changes: Any) -> Json:
        known = [one for one in self.versions.get(name, []) if one["version"] == digest(content)]
        made = known[0] if known else self.add(name, content, "validating", **changes)
        self._left[made["version"]] = list(self.steps)
        self._activates_version[made["version"]] = activate
        return dict(made)

    def _step(self, one: Json) -> Json:
        left = self._left.get(one["version"])
        if left:
            stage, fraction = left.pop(0)
            one |= {"state": stage, "progress": {"stage": stage, "fraction": fraction}}
            if stage == "pulling":
                return one | {"version": one["pull"]}
        elif left is not None:
            del self._left[one["version"]]
            self._finish(one)
        return one

    def _finish(self, one: Json) -> None:
        one["progress"] = None
        if one["source"]["kind"] == "hub":
            one["source"]["commit"] = COMMIT
        if self.failure is not None:
            code, message = self.failure
            one |= {"state": "failed", "error": {"code": code, "message": message}}
            return
        one |= {"state": "ready", "report": report()}
        if self._activates_version[one["version"]] and self.activates:
            self.activate(one["name"], one)


class Flaky:
    """A registry whose first answers are others."""

    def __init__(self, registry: Registry, *first: httpx2.Response | Exception) -> None:
        self._first = list(first)
        self._registry = registry.transport
        self.requests: list[httpx2.Request] = []
        self.transport = httpx2.MockTransport(self._handle)

    def _handle(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if not self._first:
            return self._registry.handle_request(request)
        answer = self._first.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def refusal(status: int, code: str, message: str = "no", **details: Any) -> httpx2.Response:
    return httpx2.Response(status, json=RefusalError(status, code, message, **details).body)
