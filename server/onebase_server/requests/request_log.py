"""Log of requests: who asked what of which version, with keyed hashes of prompts and answers, or their text.

Each tenant has a folder with segments, files of JSON lines that are only appended to. A request is two lines:
what it asked, when it begins, and what it got, when it ends; whoever finds the first alone knows that its
server was killed, or that it runs. One thread hashes and writes, so that neither the engine's step nor an
answer waits. What it cannot write in time is dropped, counted, and noted in the log itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import math
import os
import secrets
import shutil
import threading
import time
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec

from onebase_adapters.registry import RegistryError, RequestLogRecords
from onebase_edge.background import Threads
from onebase_engine.engine.messages import Sampling
from onebase_protocol.request_log import LoggedAdapter, LoggedAnswer, LoggedRequest
from onebase_server.inference.generation import GenerationRequest
from onebase_server.inference.stream import OutputPiece

LogMode = Literal["off", "hashes", "text"]
MOST_WAITING = 64 << 20
"""Largest size, in bytes, of what waits to be written, of all tenants; each may have an eighth."""
MOST_FOUND = 1000
"""Largest number of requests that one call finds."""
_SHARE = 8
_LINE = 400
"""Bytes that a request counts besides its texts."""
_SEGMENTS = 64
"""A tenant's log has about so many segments; the oldest is deleted when it is full."""
_DAY = 86400.0
_SYNC_SECONDS = 1.0
_AGAIN_SECONDS = 1.0
_CLOCKS = 300.0
"""Largest difference, in seconds, of two servers' clocks that an erasure allows for."""
_ERASED_COUNTS = 64
"""Newest erasures whose numbers of erased requests are kept for whoever asked for them."""
TIDY_SECONDS = 60.0
"""Time, in seconds, between two looks at what is too old or too much, and at the tenants' quotas for that."""
_OPEN_FILES = 64
_TOKENS = 8
"""Bytes of a token that waits."""
_ENDED = {"abort": "cut", "error": "failed"}

_log = logging.getLogger(__name__)


class Begun(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="begun"):
    """Line of a request that begins. boot: of the server process. form: `form_hash`; "" in lines of older
    servers. tokens: those of each prompt, with text."""

    request: LoggedRequest
    boot: str
    form: str = ""
    tokens: list[list[int]] = []
    body: msgspec.Raw = msgspec.Raw(b"")


class RequestEnd(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="ended"):
    """Line of a request that has ended."""

    id: str
    user: str | None = None
    at: float
    state: Literal["done", "cut", "failed"]
    completion_tokens: int = 0
    answers: list[LoggedAnswer] = []
    error: str | None = None


class Dropped(msgspec.Struct, frozen=True, kw_only=True, tag="dropped"):
    """Line that says how many lines before it could not be written."""

    at: float
    lines: int


_Line = Begun | RequestEnd | Dropped
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Line).decode


class _Index(msgspec.Struct, frozen=True):
    """The part of a line that identifies its request. type: its tag."""

    type: str
    id: str = ""
    user: str | None = None
    at: float = 0.0
    request: dict[str, Any] = {}

    @property
    def of(self) -> tuple[str, str | None]:
        """Return the id of the line's request, and the hash of its user."""
        named = self.request
        return (named["id"], named.get("user")) if named else (self.id, self.user)

    def is_due(self, due: Mapping[str | None, float]) -> bool:
        """Return True if the line is to be erased. due: see RequestLog._erase."""
        user, at = self.of[1], float(self.request.get("at", self.at))
        return at <= max(due.get(None, -math.inf), -math.inf if user is None else due.get(user, -math.inf))


@dataclass(eq=False)
class RequestEntry:
    """One request on its way into the log: hears its answer, and ends once. For one event loop.

    body: as it was sent, with the number of the one request of several that this is.
    """

    log: RequestLog
    request: GenerationRequest
    key: str = ""
    request_id: str = ""
    route: str = ""
    stream: bool = False
    body: tuple[bytes, int | None] | None = None
    body_size: int = 0
    """Size, in bytes, of its part of a body of several requests; 0: the body is its own."""
    at: float = field(default_factory=time.time)
    ended_at: float = 0.0
    mode: LogMode = "hashes"
    """Mode in which it is written: hashes alone where its texts are too large."""
    is_left_out: bool = False
    """Whether nothing more of it is written: its beginning was dropped, or it was erased while it ran."""
    error: str | None = None
    finished: Counter[str] | None = None
    _texts: dict[int, list[str]] = field(default_factory=dict)
    _thoughts: dict[int, list[str]] = field(default_factory=dict)
    _finish: dict[int, str | None] = field(default_factory=dict)
    _tokens: int = 0
    _size: int = 0

    def heard(self, piece: OutputPiece) -> None:
        self._texts.setdefault(piece.index, []).append(piece.text)
        if piece.reasoning:
            self._thoughts.setdefault(piece.index, []).append(piece.reasoning)
        if piece.finish_reason is not None:
            self._finish[piece.index] = piece.finish_reason
        self._size += len(piece.text) + len(piece.reasoning)

    def failed(self, code: str | None) -> None:
        self.error = code or "engine_error"

    def ended(self, completion_tokens: int, finished: Counter[str]) -> None:
        """Note that nothing more is generated. finished: see UsageRecorder."""
        if self.ended_at:
            return
        self.ended_at, self.finished, self._tokens = time.time(), finished, completion_tokens
        self.log.put(self, self.end_line, 4 * self._size)

    def not_started(self, code: str | None) -> None:
        self.failed(code)
        self.ended(0, Counter(error=1))

    # ---- in the writer's thread --------------------------------------------------------------------

    def begin_line(self, key: bytes, mode: LogMode) -> Begun:
        request = self.request
        sampling, log = request.sampling, self.log
        names = [use.name for use in request.adapter.uses]
        uses = zip(request.adapter.uses, request.adapter.refs, strict=True)
        logged = LoggedRequest(
            id=request.id,
            state="running",
            at=self.at,
            server=log.server,
            tenant=request.tenant,
            key=self.key,
            request_id=self.request_id,
            route=self.route,
            user=None if request.user is None else user_hash(key, request.user),
            model="+".join(names) or log.base,
            adapters=tuple(
                LoggedAdapter(name=use.name, version=use.digest, weight=ref.weight) for use, ref in uses
            ),
            base=log.base,
            base_id=log.base_id,
            seed=sampling.seed,
            sampling=sampling_settings(sampling),
            n=request.n,
            stream=self.stream,
            prompt_tokens=sum(len(prompt.tokens) for prompt in request.prompts),
            prompts=tuple(prompt_hash(key, prompt.tokens) for prompt in request.prompts),
            has_text=mode == "text",
        )
        form = form_hash(key, request)
        if mode != "text":
            return Begun(request=logged, boot=log.boot, form=form)
        tokens = [list(prompt.tokens) for prompt in request.prompts]
        body = {} if self.body is None else {"body": msgspec.Raw(_one_body(*self.body))}
        return Begun(request=logged, boot=log.boot, form=form, tokens=tokens, **body)

    def end_line(self, key: bytes, mode: LogMode) -> RequestEnd:
        finished = self.finished or Counter()
        state = next((_ENDED[one] for one in ("error", "abort") if finished[one]), "done")
        answers = []
        for index in range(self.request.choices if self._texts or state == "done" else 0):
            text, thought = "".join(self._texts.get(index, ())), "".join(self._thoughts.get(index, ()))
            answers.append(
                LoggedAnswer(
                    finish_reason=self._finish.get(index),
                    length=len(text),
                    reasoning_length=len(thought),
                    hash=answer_hash(key, thought, text),
                    text=text if mode == "text" else None,
                    reasoning=thought if mode == "text" and thought else None,
                )
            )
        user = self.request.user
        return RequestEnd(
            id=self.request.id,
            user=None if user is None else user_hash(key, user),
            completion_tokens=self._tokens,
            at=self.ended_at,
            state=state,  # type: ignore[arg-type]
            answers=answers,
            error=self.error,
        )


def sampling_settings(sampling: Sampling) -> dict[str, Any]:
    """Return a request's sampling settings as the log has them, without the seed and what follows from the
    adapter or the prompt."""
    settings: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(sampling))
    for name in ("seed", "prompt_targets", "end_token_ids", "thought"):
        settings.pop(name)
    return settings


def _one_body(body: bytes, number: int | None) -> bytes:
    """Return a request's JSON on one line; of several requests, with this one alone. Its values are not read,
    which would hold up the event loop."""
    body = body.replace(b"\n", b" ").replace(b"\r", b" ")  # in texts they are escaped
    if number is None:
        return body
    parts = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    requests = msgspec.json.decode(parts["requests"], type=list[msgspec.Raw])
    return msgspec.json.encode(parts | {"requests": [requests[number]]})


def part_sizes(body: bytes) -> list[int]:
    """Return the size, in bytes, of each of a body's several requests, with its part of what they share."""
    parts = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    requests = msgspec.json.decode(parts["requests"], type=list[msgspec.Raw])
    sizes = [len(bytes(one)) for one in requests]
    shared = (len(body) - sum(sizes)) // max(1, len(sizes))
    return [shared + size for size in sizes]


def _keyed(key: bytes, kind: str, *parts: bytes) -> str:
    found = hmac.new(key, kind.encode(), hashlib.sha256)
    for part in parts:
        found.update(len(part).to_bytes(8, "big") + part)
    return found.hexdigest()


def prompt_hash(key: bytes, tokens: Sequence[int]) -> str:
    """Return the hash of a prompt, which nobody without the tenant's key can make or compare."""
    return _keyed(key, "prompt", array("q", tokens).tobytes())


def form_hash(key: bytes, request: GenerationRequest) -> str:
    """Return the hash of what ends or shapes a text and is no sampling setting: stop strings, grammar, the
    length of the thought, and whether special tokens are shown."""
    thought = request.sampling.thought
    parts = (request.stops, request.grammar, thought and thought.tokens, request.special_tokens)
    return _keyed(key, "form", msgspec.json.encode(parts))


def answer_hash(key: bytes, reasoning: str, text: str) -> str:
    return _keyed(key, "answer", *(part.encode("utf-8", "surrogatepass") for part in (reasoning, text)))


def user_hash(key: bytes, user: str) -> str:
    return _keyed(key, "user", user.encode("utf-8", "surrogatepass"))


@dataclass(eq=False)
class _Waiting:
    """Lines of one tenant that wait to be written. size: in bytes. again_at: monotonic; after a failure."""

    lines: deque[tuple[RequestEntry, Callable[[bytes, LogMode], _Line], int]] = field(default_factory=deque)
    size: int = 0
    dropped: int = 0
    again_at: float = 0.0


@dataclass(frozen=True)
class _Waiter:
    """Somebody who waits for an erasure. done: called with the number of requests that were erased."""

    tenant: str
    user: str | None
    done: Callable[[int | Exception], object]


class RequestLog:
    """A server's log, written by one thread. `begin`, `find` and the like are called on the event loop or in
    threads; files are changed by the writer alone.

    Args:
        folder: its own, for one registry.
        most_bytes: of each tenant; its oldest requests are deleted first.
        days: for which requests are kept, unless the tenant's quota `log_days` is less.
    """

    def __init__(
        self,
        folder: Path,
        records: RequestLogRecords,
        *,
        mode: LogMode,
        days: float,
        most_bytes: int,
        base: str,
        base_id: str,
        server: str,
        sync_seconds: float = 1.0,
    ) -> None:
        self.mode = mode
        self.base = base
        self.base_id = base_id
        self.server = server
        self.boot = secrets.token_hex(8)
        self.written = 0
        """Lines written since the start."""
        self.dropped = 0
        """Lines dropped since the start."""
        self.threads = Threads("read-log", 1)
        """Thread in which the log is read, where tenants take turns."""
        self._folder = folder
        self._records = records
        self._seconds = days * _DAY
        self._days: Mapping[str, int] | None = None
        """The quota `log_days` of each tenant that has it, as it was last known; None before it was read."""
        self._most_bytes = most_bytes
        self._sync_seconds = sync_seconds
        self._lock = threading.Condition()
        self._waiting: dict[str, _Waiting] = {}
        self._size = 0
        self._erasing: dict[int, _Waiter] = {}
        """Waiters for erasures, by number. The next look answers all of them."""
        self._erased_counts: OrderedDict[int, int] = OrderedDict()
        """Requests that the newest erasures have erased here before anybody waited for them, by number."""
        self._closing = False
        self._running: dict[str, dict[str, RequestEntry]] = {}
        """Entries of requests that run, by tenant and id."""
        self._erased_at: dict[str, float] = {}
        """Time of each tenant's last erasure (monotonic), of all its requests or some."""
        self._erased_now: str | None = None
        """Tenant whose requests are erased at this moment."""
        self._keys: dict[str, bytes] = {}
        self._generation = 0
        """Number of keys that were dropped so far."""
        self._files: OrderedDict[str, _Segment] = OrderedDict()
        self._newest: dict[str, tuple[Path, float]] = {}
        """Newest segment of each tenant, and when it was begun (monotonic): it may be closed."""
        self._thread: threading.Thread | None = None
        self._look_at = 0.0
        self._tidy_at = 0.0
        self._sync_at = 0.0
        self._said = False

    def start(self) -> None:
        """Begin to write, and to apply what other servers have erased, unless nothing was ever logged."""
        if self.mode == "off" and not self._folder.exists():
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self._folder.glob("*/*.new"):  # of a server that was killed while it erased
            left.unlink()
        self._thread = threading.Thread(target=self._write_on, name="request-log", daemon=True)
        self._thread.start()

    def close(self, seconds: float = 10.0) -> None:
        """Write what waits, for so long at most."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join(seconds)
        if self._size:
            _log.error("the request log could not be written to the end: %d bytes are not in it", self._size)

    def begin(
        self, request: GenerationRequest, *, since: float = math.inf, **about: Any
    ) -> RequestEntry | None:
        """Return the entry of a request that is about to begin; None if none is kept.

        Args:
            since: time (monotonic) since when the server has the request's texts, be it from another request
                or from the log: none is kept if its tenant has erased anything after that.
            about: see RequestEntry.
        """
        if self.mode == "off" or self._thread is None or self._erased_at.get(request.tenant, 0.0) >= since:
            return None
        entry = RequestEntry(self, request, mode=self.mode, **about)
        size = _TOKENS * sum(len(prompt.tokens) for prompt in request.prompts)
        size += 0 if entry.body is None else entry.body_size or len(entry.body[0])
        self.put(entry, entry.begin_line, size)
        return entry

    def reads_since(self, tenant: str) -> float:
        """Return the `since` of a request whose texts are read from the tenant's log from now on: what is
        read while an erasure runs may be gone at its end."""
        now = time.monotonic()  # first: an erasure that begins after the comparison is later
        return 0.0 if tenant == self._erased_now else now

    def put(self, entry: RequestEntry, line: Callable[[bytes, LogMode], _Line], size: int) -> None:
        """Have a line written, unless too much waits: then it is dropped, and that is counted.

        size: of its texts, in bytes. Those that could never wait are left out of the line.
        """
        if size + _LINE > MOST_WAITING // _SHARE:
            entry.mode = "hashes"
        if entry.mode != "text":
            entry.body, size = None, 0
        tenant, size = entry.request.tenant, size + _LINE
        with self._lock:
            self._running.setdefault(tenant, {})[entry.request.id] = entry
            waiting = self._waiting.setdefault(tenant, _Waiting())
            if waiting.size + size > MOST_WAITING // _SHARE or self._size + size > MOST_WAITING:
                waiting.dropped += 1
                self.dropped += 1
                entry.is_left_out = True
                self._left(entry)
                return
            waiting.lines.append((entry, line, size))
            waiting.size += size
            self._size += size
            self._lock.notify()

    def _left(self, entry: RequestEntry) -> None:
        """Forget an entry that has ended, with the lock."""
        tenant, running = entry.request.tenant, self._running.get(entry.request.tenant, {})
        if entry.ended_at and running.pop(entry.request.id, None) is not None and not running:
            del self._running[tenant]

    async def erase(self, tenant: str, user: str | None) -> int:
        """Erase what the log has of a tenant, or of one of its users, here and on all servers of the
        registry. Return the number of requests erased here. Raises RegistryError, ErasuresError, OSError."""
        hashed = None if user is None else partial(user_hash, user=user)
        erasure = await asyncio.to_thread(self._records.erase, tenant, hashed, self._seconds)
        if self._thread is None or self._closing:
            return 0  # the next start applies it
        loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def finish(result: int | Exception) -> None:
            if done.done():
                return
            if isinstance(result, Exception):
                done.set_exception(result)
            else:
                done.set_result(result)

        with self._lock:
            self._erasing[erasure.number] = _Waiter(
                erasure.tenant, erasure.user, lambda result: loop.call_soon_threadsafe(finish, result)
            )
            self._lock.notify()
        erased: int = await done
        return erased

    async def key_of(self, tenant: str) -> bytes:
        """Return the key of a tenant's hashes. Raises RegistryError."""
        found = self._keys.get(tenant)
        return await asyncio.to_thread(self.key, tenant) if found is None else found

    async def user_hash(self, tenant: str, user: str) -> str:
        """Return the hash by which the log knows one of a tenant's users. Raises RegistryError."""
        return user_hash(await self.key_of(tenant), user)

    def key(self, tenant: str) -> bytes:
        """Return the key of a tenant's hashes. Blocks. Raises RegistryError."""
        with self._lock:
            found, generation = self._keys.get(tenant), self._generation
        if found is None:
            found = self._records.key(tenant)
            with self._lock:
                if generation == self._generation:  # else it may be the key that went with an erasure
                    self._keys[tenant] = found
        return found

    # ---- reading, in threads -----------------------------------------------------------------------

    def find(
        self,
        tenant: str,
        matches: Callable[[LoggedRequest], bool],
        *,
        since: float | None = None,
        after: str | None = None,
        limit: int = 100,
        answered: bool = False,
    ) -> list[LoggedRequest]:
        """Return requests of a tenant, the last that began first, without their texts. after: the id of the
        last one of the page before. answered: only those that have ended with an answer."""
        found: list[LoggedRequest] = []
        is_past = after is None
        for line, end in self._requests(tenant, since):
            request = line.request
            if is_past and matches(request) and (since is None or request.at >= since):
                told = self._told(line, end, with_text=False)
                if not answered or has_answer(told):
                    found.append(told)
                if len(found) >= limit:
                    break
            is_past = is_past or request.id == after
        return found

    def get(self, tenant: str, request_id: str) -> tuple[LoggedRequest, Begun] | None:
        """Return a request of a tenant with its texts, and its first line; None if the log has none."""
        wanted = request_id.encode()
        for line, end in self._requests(tenant, None, wanted):
            if line.request.id == request_id:
                return self._told(line, end, with_text=True), line
        return None

    def tenants(self) -> list[str]:
        """Return the tenants of whom there is a log."""
        names = []
        for place in self._folder.glob("*/tenant"):
            with contextlib.suppress(OSError):
                names.append(place.read_text(encoding="utf-8"))
        return sorted(names)

    def _requests(
        self, tenant: str, since: float | None, containing: bytes = b""
    ) -> Iterator[tuple[Begun, RequestEnd | None]]:
        """Yield the first and the last line of each request, the last that began first. containing: of lines
        without it none is yielded."""
        ends: dict[str, RequestEnd] = {}
        for segment in sorted(self._place(tenant).glob("*.jsonl"), reverse=True):
            try:
                if since is not None and segment.stat().st_mtime < since:
                    return
                lines = segment.read_bytes().split(b"\n")
            except FileNotFoundError:
                continue  # its time is over just now
            for data in reversed(lines):
                if not data or containing not in data:
                    continue
                try:
                    line = _decode(data)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    continue  # a line that a crash of the machine has cut
                if isinstance(line, RequestEnd):
                    ends[line.id] = line
                elif isinstance(line, Begun):
                    yield line, ends.pop(line.request.id, None)

    def _told(self, line: Begun, end: RequestEnd | None, *, with_text: bool) -> LoggedRequest:
        request = line.request
        if with_text and line.body:
            request = msgspec.structs.replace(request, body=line.body)
        if end is None:
            is_running = line.boot == self.boot and request.id in self._running.get(request.tenant, {})
            return msgspec.structs.replace(request, state="running" if is_running else "interrupted")
        answers = tuple(end.answers)
        if any(answer.text is None for answer in answers):
            request = msgspec.structs.replace(request, has_text=False)
        if not with_text:
            answers = tuple(msgspec.structs.replace(answer, text=None, reasoning=None) for answer in answers)
        return msgspec.structs.replace(
            request,
            state=end.state,
            ended_at=end.at,
            completion_tokens=end.completion_tokens,
            answers=answers,
            error=end.error,
        )

    # ---- the writer --------------------------------------------------------------------------------

    def _place(self, tenant: str) -> Path:
        return self._folder / hashlib.sha256(tenant.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def _write_on(self) -> None:
        for step in (self._apply_erasures, self._learn_days):  # before anything new is there
            with contextlib.suppress(Exception):  # the next look says why
                step()
        while True:
            with self._lock:
                if not self._ready() and not self._erasing:
                    if self._closing and not self._waiting:
                        break
                    self._lock.wait(min(_SYNC_SECONDS, self._sync_seconds))
            try:
                self._write_ready()
                self._upkeep()
            except Exception:
                _log.exception("the request log failed; it goes on")
                time.sleep(_AGAIN_SECONDS)
        for segment in self._files.values():
            segment.close()

    def _ready(self) -> list[str]:
        """Return the tenants whose lines can be written now."""
        now = time.monotonic()
        with self._lock:
            return [name for name, one in self._waiting.items() if one.again_at <= now]

    def _write_ready(self, but: str | None = None) -> None:
        """Write what waits, of all tenants but one; once a second, have it survive a power cut."""
        for tenant in self._ready():
            if tenant != but:
                self._write_tenant(tenant)
        now = time.monotonic()
        if now >= self._sync_at:
            self._sync_at = now + _SYNC_SECONDS
            for segment in self._files.values():
                segment.sync()

    def _write_tenant(self, tenant: str) -> None:
        """Write what waits of one tenant; what cannot be written now waits for another second."""
        waiting = self._waiting[tenant]
        with self._lock:
            lines, dropped = list(waiting.lines), waiting.dropped
        try:
            key = self.key(tenant)
            data, kept = bytearray(), 0
            if self._kept_seconds(tenant):
                if dropped:
                    data += _encode(Dropped(at=time.time(), lines=dropped)) + b"\n"
                for entry, make, _ in lines:
                    if not entry.is_left_out:
                        data += self._line(entry, make, key)
                        kept += not entry.is_left_out
            if data:
                self._segment(tenant, len(data)).append(data)
        except (OSError, RegistryError) as error:
            if not self._said:
                _log.warning("the request log waits in memory until it can be written: %s", error)
            self._said, waiting.again_at = True, time.monotonic() + _AGAIN_SECONDS
            return
        self._said = False
        self.written += kept
        with self._lock:
            waiting.dropped -= dropped
            for entry, make, size in lines:
                waiting.lines.popleft()
                waiting.size -= size
                self._size -= size
                if make == entry.end_line:
                    self._left(entry)
            if not waiting.lines and not waiting.dropped:
                del self._waiting[tenant]

    def _line(self, entry: RequestEntry, make: Callable[[bytes, LogMode], _Line], key: bytes) -> bytes:
        try:
            return _encode(make(key, entry.mode)) + b"\n"
        except Exception:
            _log.exception("a line of the request log cannot be made")
            self.dropped += 1
            entry.is_left_out = True
            return _encode(Dropped(at=time.time(), lines=1)) + b"\n"

    def _segment(self, tenant: str, size: int) -> _Segment:
        """Return the tenant's newest segment, a new one if it is full or a day old."""
        segment = self._files.get(tenant)
        largest = max(1 << 16, self._most_bytes // _SEGMENTS)
        newest = self._newest.get(tenant)
        if segment is None and newest is not None and newest[0].exists():
            segment = self._files[tenant] = _Segment(*newest)
        if segment is not None and segment.size and (segment.size + size > largest or segment.age > _DAY):
            self._files.pop(tenant).close()
            segment = None
            self._tidy(tenant)
        if segment is None:
            place = self._place(tenant)
            place.mkdir(mode=0o700, exist_ok=True)
            if not (place / "tenant").exists():
                if not (self._folder / "erased").exists() and not self.tenants():
                    self._note_applied(0)
                (place / "tenant").write_text(tenant, encoding="utf-8", errors="surrogatepass")
            numbers = [int(path.stem) for path in place.glob("*.jsonl") if path.stem.isdecimal()]
            path = place / f"{max(numbers, default=0) + 1:012d}.jsonl"
            self._newest[tenant] = path, time.monotonic()
            segment = self._files[tenant] = _Segment(*self._newest[tenant])
        self._files.move_to_end(tenant)
        if len(self._files) > _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return segment

    def _upkeep(self) -> None:
        now = time.monotonic()
        if now >= self._look_at or self._erasing:
            self._look_at = now + self._sync_seconds
            self._apply_erasures()
        if now >= self._tidy_at:
            self._tidy_at = now + TIDY_SECONDS
            self._learn_days()
            for tenant in self.tenants() if self._days is not None else ():
                self._tidy(tenant)

    def _learn_days(self) -> None:
        """Learn for how many days tenants' requests are kept: what was known, while the registry is away."""
        with contextlib.suppress(RegistryError):
            self._days = self._records.days()

    def _kept_seconds(self, tenant: str) -> float:
        """Return for how long a tenant's requests are kept, in seconds. Raises RegistryError if the quotas
        were never read, and cannot be now."""
        if self._days is None:
            self._days = self._records.days()
        return min(self._seconds, self._days.get(tenant, math.inf) * _DAY)

    def _tidy(self, tenant: str) -> None:
        """Delete the tenant's oldest segments: those whose time is over, and those that are too much."""
        own = self._files.get(tenant)
        left, now = self._most_bytes, time.time()
        for path in sorted(self._place(tenant).glob("*.jsonl"), reverse=True):
            state = path.stat()
            left -= state.st_size
            is_open = own is not None and own.path == path
            if now - state.st_mtime >= self._kept_seconds(tenant) or (left < 0 and not is_open):
                if is_open:
                    self._files.pop(tenant).close()
                if tenant in self._newest and self._newest[tenant][0] == path:
                    del self._newest[tenant]
                path.unlink()

    # ---- erasing -----------------------------------------------------------------------------------

    @property
    def _applied(self) -> int | None:
        """Return the number of the last erasure that was applied; None if the file is lost or damaged."""
        try:
            return int((self._folder / "erased").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _note_applied(self, number: int) -> None:
        made = self._folder / "erased.new"
        with made.open("w") as file:
            file.write(str(number))
            file.flush()
            os.fsync(file.fileno())
        made.rename(self._folder / "erased")
        _sync_folder(self._folder)

    def _apply_erasures(self) -> None:
        """Apply what was erased, here or on another server, tenant by tenant, and answer all who wait.

        Another erasure of the same requests may have replaced the one that somebody waits for, or applied it
        already; in a restored registry its number may be below those applied. So all are answered whose
        erasures were committed before this look.
        """
        with self._lock:
            waiters, self._erasing = self._erasing, {}
        try:
            applied = self._applied
            first = min([applied or 0, *(number - 1 for number in waiters)])
            erasures = self._records.erasures(first)
            due: dict[str, dict[str | None, float]] = {}
            begins: dict[str, int] = {}
            for one in erasures:
                is_new = one.number in waiters or (applied is not None and one.number > applied)
                until = math.inf if is_new else one.at + _CLOCKS
                due.setdefault(one.tenant, {})[one.user] = until
                begins.setdefault(one.tenant, one.number)
            for tenant in due:
                counts = self._erase(tenant, due[tenant])
                for one in erasures:
                    if one.tenant == tenant:  # a look may come between its commit and its waiter
                        count = counts.total() if one.user is None else counts[one.user]
                        self._erased_counts[one.number] = self._erased_counts.pop(one.number, 0) + count
                del begins[tenant]
                self._note_applied(min(begins.values(), default=erasures[-1].number + 1) - 1)
                for number in [number for number, one in waiters.items() if one.tenant == tenant]:
                    waiters.pop(number).done(self._erased_counts.pop(number, 0))
            for number, waiter in waiters.items():
                waiter.done(self._erased_counts.pop(number, 0))
            while len(self._erased_counts) > _ERASED_COUNTS:
                self._erased_counts.popitem(last=False)
        except Exception as error:
            for waiter in waiters.values():
                waiter.done(error)
            if not isinstance(error, OSError | RegistryError):
                raise
            if isinstance(error, OSError):
                _log.warning("what was erased stays until the request log can be written: %s", error)

    def _erase(self, tenant: str, due: Mapping[str | None, float]) -> Counter[str | None]:
        """Erase requests of a tenant from memory and from every file, and return their numbers by user.
        Between files the lines of other tenants are written. Raises OSError, RegistryError.

        due: time (Unix) until which requests are erased, by the user's hash; None: those of all.
        """
        self._erased_now = tenant
        try:
            if None in due:
                with self._lock:
                    self._keys.pop(tenant, None)
                    self._generation += 1
            self._forget(tenant, due)
            self._newest.pop(tenant, None)
            if (own := self._files.pop(tenant, None)) is not None:
                own.close()
            return self._erase_files(self._place(tenant), tenant, due)
        finally:
            self._erased_now = None

    def _erase_files(self, place: Path, tenant: str, due: Mapping[str | None, float]) -> Counter[str | None]:
        gone: set[str] = set()
        counts: Counter[str | None] = Counter()
        paths = sorted(place.glob("*.jsonl"))
        for path in paths:
            for line in map(_index, path.read_bytes().split(b"\n")):
                if line is not None and line.type == "begun" and line.is_due(due):
                    gone.add(line.of[0])
                    counts[line.of[1]] += 1
            self._write_ready(but=tenant)
        if due.get(None) == math.inf:
            shutil.rmtree(place, ignore_errors=not place.exists())
            return counts
        for path in paths:
            lines = path.read_bytes().split(b"\n")
            kept = [data for data in lines if _stays(data, gone, due)]
            if len(kept) == sum(map(bool, lines)):
                continue
            if kept:
                made, at = path.with_suffix(".new"), path.stat().st_mtime
                with made.open("wb") as file:
                    file.write(b"".join(data + b"\n" for data in kept))
                    file.flush()
                    os.fsync(file.fileno())
                os.utime(made, (at, at))
                made.rename(path)
            else:
                path.unlink()
            self._write_ready(but=tenant)
        if paths:
            _sync_folder(place)
        return counts

    def _forget(self, tenant: str, due: Mapping[str | None, float]) -> None:
        """Keep the requests that run now, or wait to be written, out of the log. Raises RegistryError."""
        with self._lock:
            self._erased_at[tenant] = time.monotonic()
            entries = list(self._running.get(tenant, {}).values())
            waiting = self._waiting.get(tenant)
            entries += [] if waiting is None else [entry for entry, *_ in waiting.lines]
        names_users = any(user is not None for user in due)
        for entry in entries:
            named, until = entry.request.user, due.get(None, -math.inf)
            if names_users and named is not None:
                until = max(until, due.get(user_hash(self.key(tenant), named), -math.inf))
            if entry.at <= until:
                entry.is_left_out = True


def has_answer(request: LoggedRequest) -> bool:
    """Return True if a request has ended, and a replay's answer can be compared with its own."""
    return request.state in ("done", "cut") and bool(request.answers)


def _index(data: bytes) -> _Index | None:
    try:
        return msgspec.json.decode(data, type=_Index) if data else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _stays(data: bytes, gone: set[str], due: Mapping[str | None, float]) -> bool:
    """Return True unless a line is of one of these requests or is due, or cannot be read."""
    line = _index(data)
    return line is not None and line.of[0] not in gone and not line.is_due(due)


def _sync_folder(folder: Path) -> None:
    """Have the names of a folder's files survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Segment:
    """The newest file of a tenant's log. A line is either written whole, or not at all."""

    def __init__(self, path: Path, began: float) -> None:
        self.path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.size = os.fstat(self._handle).st_size
        self._began = began
        self._is_dirty = False

    @property
    def age(self) -> float:
        return time.monotonic() - self._began

    def append(self, data: bytes | bytearray) -> None:
        """Write lines. Raises OSError: then nothing of them is there."""
        written = 0
        try:
            while written < len(data):
                written += os.write(self._handle, memoryview(data)[written:])
        except OSError:
            os.ftruncate(self._handle, self.size)
            raise
        self.size += len(data)
        self._is_dirty = True

    def sync(self) -> None:
        if self._is_dirty:
            os.fdatasync(self._handle)
            self._is_dirty = False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sync()
        os.close(self._handle)
