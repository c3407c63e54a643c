"""A server that keeps files and jobs in memory and tells their events as OneBase does, on a real port."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.clients.registry_double import BASE, NOW, RefusalError

from onebase._core.training import NO_FILE

Json = dict[str, Any]
REPORT: Json = {
    "name": "acme", "steps": 4, "best_step": 3, "tokens": 4000, "seconds": 8.0, "parameters": 230_400,
    "adapter_bytes": 921_600, "loss_before": 2.5, "loss_after": 1.25, "metrics_before": {"exact_match": 0.25},
    "metrics_after": {"exact_match": 0.75}, "better": True, "peak_memory_bytes": 700_000_000,
}  # fmt: skip
CURVE = "step,train_loss,valid_loss\n0,,2.5\n1,2.25,\n2,1.5,1.25\n"
DIGEST = "3f2a9c41" * 8
FAILURE = {"code": "out_of_memory", "message": "The job needed more memory.", "param": None}


def job_id(number: int) -> str:
    return f"ftjob-{number:024x}"


def job(number: int = 1, status: str = "running", **changes: Any) -> Json:
    """One job as the server sends it."""
    settings = {"r": 16, "alpha": 32.0, "targets": ["all-linear"], "n_epochs": 3}
    body: Json = {"id": job_id(number), "object": "fine_tuning.job", "model": BASE, "created_at": NOW}
    body |= {"finished_at": None, "estimated_finish": None, "fine_tuned_model": None, "seed": 0}
    body |= {"organization_id": "default", "result_files": [], "status": status, "training_file": "file-1"}
    body |= {"validation_file": None, "hyperparameters": {"n_epochs": 3}, "trained_tokens": None}
    body |= {"method": {"type": "supervised", "supervised": {"hyperparameters": settings}}}
    body |= {"integrations": [], "metadata": {}, "error": None, "name": "acme", "activate": "if_better"}
    body |= {"activated": None, "version": None, "progress": None, "estimate": None, "report": None}
    return body | {"resumable": False} | changes


def succeeded() -> Json:
    """What changes in a job that succeeds."""
    model = f"acme@{DIGEST[:12]}"
    body: Json = {"status": "succeeded", "fine_tuned_model": model, "version": DIGEST, "activated": True}
    return body | {"report": REPORT, "result_files": ["file-curve"], "finished_at": NOW + 60}


def event(number: int, message: str = "", **changes: Any) -> Json:
    """One event as the server sends it."""
    body = {"object": "fine_tuning.job.event", "id": f"ftevent-{number:016d}", "created_at": NOW + number}
    return body | {"level": "info", "message": message, "type": "message", "data": None} | changes


def step(number: int, at: int, steps: int = 4, **data: Any) -> Json:
    """The event of one step."""
    figures = {"step": at, "total_steps": steps, "train_loss": 2.0 / at, "tokens_per_second": 1234.5}
    return event(number, f"Step {at}/{steps}", type="metrics", data=figures | data)


@dataclass
class Trainer:
    """Files, jobs and what they tell."""

    jobs: dict[str, Json] = field(default_factory=dict)
    created: list[Json] = field(default_factory=list)
    events: dict[str, list[Json]] = field(default_factory=dict)
    checkpoints: list[Json] = field(default_factory=list)
    files: dict[str, tuple[Json, bytes]] = field(default_factory=dict)
    live: list[tuple[Json | None, Json]] = field(default_factory=list)
    """What happens while somebody follows a job: an event, and what it changes in the job."""
    cuts: list[Callable[[Any, list[Json]], None]] = field(default_factory=list)
    """How connections of followers end before their time, in order; see `cut`."""
    first: list[Callable[[Any], None]] = field(default_factory=list)
    """Answers to the next requests instead of the right ones."""
    refusal: RefusalError | None = None
    """The answer to who wants a job."""
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    """Method, target and JSON body of each request."""
    followed: list[str | None] = field(default_factory=list)
    """The Last-Event-ID of each follower."""
    forms: list[bytes] = field(default_factory=list)

    def add(self, number: int = 1, status: str = "running", *told: Json, **changes: Any) -> str:
        """Put a job there, and what it told; gives its id."""
        made = job(number, status, **changes)
        self.jobs[made["id"]] = made
        self.events[made["id"]] = list(told)
        return str(made["id"])

    def add_file(self, file_id: str, content: bytes, purpose: str = "fine-tune") -> Json:
        made = {"id": file_id, "object": "file", "bytes": len(content), "created_at": NOW}
        made |= {"filename": f"{file_id}.jsonl", "purpose": purpose, "status": "processed"}
        made |= {"sha256": hashlib.sha256(content).hexdigest()}
        self.files[file_id] = made, content
        return made

    # ---- over HTTP -------------------------------------------------------------------------------

    def script(self, request: Any) -> None:
        """For a server on a real port."""
        self.asked.append((request.method, request.path, request.body))
        if self.first:
            self.first.pop(0)(request)
            return
        parts = urlsplit(request.path)
        path = [unquote(part) for part in parts.path.split("/") if part]
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        try:
            if request.method == "POST" and path == ["v1", "files"]:
                request.reply(200, self._upload(request))
            elif request.headers.get("accept") == "text/event-stream":
                self._follow(request, path[3])
            elif path[-1] == "content":
                self._content(request, path[2])
            else:
                request.reply(200, self._route(request.method, path, query, request.body))
        except RefusalError as refusal:
            request.reply(refusal.status, refusal.body)

    def _route(self, method: str, path: list[str], query: dict[str, str], body: Any) -> Json:
        match method, path[1:]:
            case "GET", ["models"]:
                return {"object": "list", "data": [{"id": BASE}, {"id": "orders"}]}
            case "GET", ["files"]:
                digest = query.get("sha256")
                found = [made for made, _ in self.files.values() if digest in (None, made["sha256"])]
                return _page(found, query)
            case "GET", ["files", file_id]:
                return self._file(file_id)[0]
            case "DELETE", ["files", file_id]:
                self._file(file_id)
                del self.files[file_id]
                return {"id": file_id, "object": "file", "deleted": True}
            case "POST", ["fine_tuning", "jobs"]:
                return self._create(body)
            case "GET", ["fine_tuning", "jobs"]:
                labels = {key[9:-1]: value for key, value in query.items() if key.startswith("metadata[")}
                found = [one for one in self.jobs.values() if labels.items() <= one["metadata"].items()]
                return _page(found[::-1], query)
            case "GET", ["fine_tuning", "jobs", wanted]:
                return self._job(wanted)
            case "GET", ["fine_tuning", "jobs", wanted, "events"]:
                self._job(wanted)
                return _page(self.events[wanted][::-1], query)
            case "GET", ["fine_tuning", "jobs", _, "checkpoints"]:
                return _page(self.checkpoints, query)
            case "POST", ["fine_tuning", "jobs", wanted, action]:
                return self._change(self._job(wanted), action)
        raise RefusalError(404, "not_found", f"no such path: {path}")

    def _job(self, wanted: str) -> Json:
        if wanted not in self.jobs:
            raise RefusalError(404, "job_not_found", f"There is no job {wanted!r}.")
        return self.jobs[wanted]

    def _file(self, file_id: str) -> tuple[Json, bytes]:
        if file_id not in self.files:
            raise RefusalError(404, "file_not_found", f"There is no file {file_id!r}.")
        return self.files[file_id]

    def _create(self, body: Json) -> Json:
        if self.refusal is not None:
            raise self.refusal
        if body["training_file"] == NO_FILE:
            raise RefusalError(400, "file_not_found", "There is no file 'file-none'.", param="training_file")
        self.created.append(body)
        number = len(self.jobs) + 1
        kept = ("name", "training_file", "activate", "metadata", "model", "hold")
        made = {key: body[key] for key in kept if key in body}
        return self.jobs[self.add(number, "validating_files", event(1, "The job is created."), **made)]

    def _change(self, made: Json, action: str) -> Json:
        if made["status"] in ("succeeded", "cancelled"):
            raise RefusalError(409, "job_state", f"Job {made['id']} is {made['status']}.")
        made["status"] = {"cancel": "cancelled", "pause": "paused", "resume": "queued", "stop": "running"}[
            action
        ]
        if action == "resume" and made.get("estimate"):
            made["hold"] = False  # as the server, which checks the files first
        if action == "stop":
            made["stopped"] = {"step": None, "steps": 4, "by": "key-1", "at": NOW}
        return made

    def _upload(self, request: Any) -> Json:
        content = b"".join(request.chunks())
        self.forms.append(content)
        kind = request.headers["content-type"]
        message = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {kind}\r\n\r\n".encode() + content)
        parts = {part.get_param("name", header="content-disposition"): part for part in message.iter_parts()}
        assert parts["purpose"].get_payload() == "fine-tune"
        payload = parts["file"].get_payload(decode=True)
        made = self.add_file(f"file-{len(self.forms)}", payload)
        made["filename"] = parts["file"].get_filename()
        return made

    def _content(self, request: Any, file_id: str) -> None:
        content = self._file(file_id)[1]
        request.begin_stream()
        request.send(content)
        request.end_stream()

    # ---- following -------------------------------------------------------------------------------

    def _follow(self, request: Any, wanted: str) -> None:
        made, known = self._job(wanted), request.headers.get("last-event-id")
        self.followed.append(known)
        request.begin_stream()
        new = [one for one in self.events[wanted] if known is None or one["id"] > known]
        if self.cuts:
            self.cuts.pop(0)(request, new)
            return
        for one in new:
            request.send(sse(one))
        while self.live:
            told, changes = self.live.pop(0)
            made |= changes
            if told is not None:
                self.events[wanted].append(told)
                request.send(sse(told))
        if made["status"] in ("succeeded", "failed", "cancelled"):
            request.send(f"event: done\ndata: {json.dumps(made)}\n\n".encode())
            request.end_stream()
        else:
            request.wait_for_hang_up()
            request.hang_up()


def cut(count: int, rest: bytes = b"", *, cleanly: bool = False) -> Callable[[Any, list[Json]], None]:
    """A connection that ends after `count` events and `rest`."""

    def end(request: Any, events: list[Json]) -> None:
        for one in events[:count]:
            request.send(sse(one))
        if rest:
            request.send(rest)
        if cleanly:
            request.end_stream()
        else:
            request.hang_up()

    return end


def sse(told: Json) -> bytes:
    return f"id: {told['id']}\ndata: {json.dumps(told)}\n\n".encode()


def _page(items: list[Json], query: dict[str, str]) -> Json:
    ids = [one["id"] for one in items]
    start = ids.index(query["after"]) + 1 if "after" in query else 0
    limit = int(query.get("limit", 20))
    assert 1 <= limit <= 100
    return {"object": "list", "data": items[start : start + limit], "has_more": len(items) > start + limit}
