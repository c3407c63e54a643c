"""What the SDK's tests share: both clients behind one call, and a small HTTP server with a script."""

from __future__ import annotations

import gc
import json
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from tests.clients.golden import Transcript
from tests.clients.real_server import Server, running_server
from tests.clients.registry_double import NOW
from tests.forks import Nursery
from tests.http_server import StandInServer

from onebase import AsyncClient, Client, Generation, Piece

HERE = Path(__file__).parent
Handler = Callable[[httpx2.Request], httpx2.Response]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Here every warning is an error: an unclosed connection, a coroutine never awaited."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("error"))


@pytest.fixture(scope="module", autouse=True)
def _own_garbage() -> None:
    """Collect what tests of other folders left in this process, whose warnings would be errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ONEBASE_URL", "ONEBASE_API_KEY", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces sleeping; the list has what would have been slept, in seconds."""
    delays: list[float] = []

    async def record(delay: float) -> None:
        delays.append(delay)

    monkeypatch.setattr("time.sleep", delays.append)
    monkeypatch.setattr("anyio.sleep", record)
    return delays


@pytest.fixture
def transcript(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[[str], Transcript]]:
    """Begins a transcript, given a server's URL: 100 columns, UTC, two hours after the doubles' now."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.setattr("time.time", lambda: NOW + 7200)
    yield lambda url: Transcript(capsys, (url, "URL"), (str(tmp_path), "TMP"))
    monkeypatch.undo()
    time.tzset()


@dataclass(frozen=True)
class Sdk:
    """One of the two clients, used the same way: what `action` returns is awaited where need be."""

    asynchronous: bool

    def call(
        self, action: Callable[[Any], Any], transport: Any = None, url: str | None = None, **options: Any
    ) -> Any:
        """What `action(client)` gives."""
        if not self.asynchronous:
            with Client(url, transport=transport, **options) as client:
                return action(client)

        async def run() -> Any:
            async with AsyncClient(url, transport=transport, **options) as client:
                value = action(client)
                return await value if isinstance(value, Awaitable) else value

        return anyio.run(run)

    def stream(
        self, prompt: str, *, seen: list[Any] | None = None, **options: Any
    ) -> tuple[list[Piece], Generation]:
        """The pieces of one stream, and its result.

        `seen` gets the stream object, for a look at it after a failure.
        """
        read = _read_async if self.asynchronous else _read
        return self.call(lambda client: read(client, prompt, [] if seen is None else seen), **options)

    def leave(self, pieces: int, url: str, after: Callable[[], None]) -> None:
        """Open a stream, take some pieces, leave it, and call `after` while the client is still open."""
        leave = _leave_async if self.asynchronous else _leave
        self.call(lambda client: leave(client, pieces, after), url=url)


def _read(client: Client, prompt: str, seen: list[Any]) -> tuple[list[Piece], Generation]:
    stream = client.stream(prompt)
    seen.append(stream)
    with stream:
        return list(stream), stream.result


async def _read_async(client: AsyncClient, prompt: str, seen: list[Any]) -> tuple[list[Piece], Generation]:
    stream = client.stream(prompt)
    seen.append(stream)
    async with stream:
        return [piece async for piece in stream], stream.result


def _leave(client: Client, pieces: int, after: Callable[[], None]) -> None:
    with client.stream("x") as stream:
        for _ in range(pieces):
            next(iter(stream))
    after()


async def _leave_async(client: AsyncClient, pieces: int, after: Callable[[], None]) -> None:
    async with client.stream("x") as stream:
        for _ in range(pieces):
            await anext(aiter(stream))
    after()


@pytest.fixture(params=["sync", "async"])
def sdk(request: pytest.FixtureRequest) -> Sdk:
    return Sdk(request.param == "async")


USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "cached_tokens": 2}
TIMING = {"queue_s": 0.0, "ttft_s": 0.25, "decode_s": 0.5}


class Wire:
    """Answers as the server sends them."""

    @staticmethod
    def generation(text: str = "Hello", **changes: Any) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "finish_reason": "stop", "logprobs": None}
        body = {"id": "g1", "object": "generation", "choices": [choice], "adapter": None}
        return body | {"usage": USAGE, "timing": TIMING} | changes

    @staticmethod
    def error(message: str, **changes: Any) -> dict[str, Any]:
        return {
            "error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            | changes
        }

    @staticmethod
    def piece(text: str, index: int = 0, **changes: Any) -> dict[str, Any]:
        return {"id": "g1", "index": index, "text": text} | changes

    @staticmethod
    def done(**changes: Any) -> dict[str, Any]:
        return {"id": "g1", "done": True, "adapter": None, "usage": USAGE, "timing": TIMING} | changes

    @classmethod
    def answer(cls, *texts: str, **changes: Any) -> list[dict[str, Any]]:
        """A whole stream of one choice."""
        return [*map(cls.piece, texts), cls.piece("", finish_reason="stop"), cls.done(**changes)]

    @staticmethod
    def sse(*events: dict[str, Any], done: bool = True) -> bytes:
        data = [json.dumps(event, ensure_ascii=False) for event in events] + ["[DONE]"] * done
        return "".join(f"data: {one}\n\n" for one in data).encode()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[Server]:
    """One real server for all tests that want one; what they bring there has a name of its own."""
    with running_server(tmp_path_factory.mktemp("server"), nursery.popen("forks")) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as PEFT saves one; what is in its files is the server's business."""
    made = tmp_path / "acme-support"
    made.mkdir()
    (made / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (made / "adapter_model.safetensors").write_bytes(b"weights\r\n--\x00" * 1000)
    (made / "README.md").write_text("not to be sent")
    return made


@pytest.fixture
def wire() -> type[Wire]:
    return Wire


@dataclass
class Scripted:
    """A request that came, with the means to answer it piece by piece. `body` is what was sent as JSON."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    _http: BaseHTTPRequestHandler

    def chunks(self) -> Iterator[bytes]:
        """A body that is not JSON, as it arrives."""
        left = int(self.headers.get("content-length", 0))
        while left and (chunk := self._http.rfile.read(min(left, 65536))):
            left -= len(chunk)
            yield chunk

    def reply(self, status: int, body: dict[str, Any], **headers: str) -> None:
        content = json.dumps(body).encode()
        self._http.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self._http.send_header(name, value)
        self._http.end_headers()
        self._http.wfile.write(content)

    def begin_stream(self) -> None:
        self._http.send_response(200)
        self._http.send_header("Content-Type", "text/event-stream")
        self._http.send_header("Transfer-Encoding", "chunked")
        self._http.end_headers()

    def send(self, data: bytes) -> None:
        self._http.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self._http.wfile.flush()

    def end_stream(self) -> None:
        self._http.wfile.write(b"0\r\n\r\n")

    def hang_up(self) -> None:
        """Drop the connection, whatever is missing."""
        self._http.close_connection = True

    def wait_for_hang_up(self) -> bool:
        """Until the client drops the connection; False if it sends something instead.

        One that leaves with bytes unread drops it by a reset, not by an end of what it sends.
        """
        self._http.connection.settimeout(30)
        try:
            return self._http.rfile.read(1) == b""
        except ConnectionError:
            return True


@dataclass
class ScriptedServer:
    """A real HTTP server on a real port, whose answers the test writes."""

    script: Callable[[Scripted], None]
    requests: list[Scripted] = field(default_factory=list)
    connections: int = 0
    url: str = ""


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[Scripted], None]], ScriptedServer]]:
    """Start a ScriptedServer; it ends with the test."""
    running: list[StandInServer] = []

    def start(script: Callable[[Scripted], None]) -> ScriptedServer:
        server = ScriptedServer(script)

        class Http(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                server.connections += 1
                super().setup()

            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                is_json = length and self.headers["Content-Type"] == "application/json"
                body = json.loads(self.rfile.read(length)) if is_json else None
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Scripted(self.command, self.path, headers, body, self)
                server.requests.append(request)
                server.script(request)

            def do_POST(self) -> None:
                self.do_GET()

            def do_DELETE(self) -> None:
                self.do_GET()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        http = StandInServer(("127.0.0.1", 0), Http)
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        running.append(http)
        return server

    yield start
    for http in running:
        http.shutdown()
        http.server_close()
