"""Both clients against a swapped transport: what they send, what they make of the answer, when they retry."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from onebase import (
    AdapterWeight,
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    Choice,
    Client,
    ConflictError,
    Generation,
    Health,
    InternalServerError,
    InvalidResponseError,
    Logprobs,
    Message,
    Model,
    NotFoundError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    ServerUnavailableError,
    StorageFullError,
    Timeout,
    Timing,
    UnprocessableError,
    Usage,
)
from onebase.errors import ErrorDetail, status_error

Answer = httpx2.Response | Exception


class Script:
    """A transport that gives the answers in turn and keeps the requests."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.transport = httpx2.MockTransport(self._handle)

    def _handle(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def ok(body: Any) -> httpx2.Response:
    return httpx2.Response(200, json=body)


def generate(client: Any) -> Any:
    return client.generate("hi")


def test_an_answer_is_typed(sdk: Any, wire: Any) -> None:
    logprobs = {
        "tokens": ["Hel", "lo"],
        "token_ids": [1, 2],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"lo": -0.5, "p": -2.0}],
        "text_offset": [0, 3],
    }
    choice = {"index": 0, "text": "Hello", "finish_reason": "length", "logprobs": logprobs}
    script = Script(
        ok(wire.generation(choices=[choice], adapter=[{"name": "a", "weight": 0.5}], new_field=1))
    )
    assert sdk.call(generate, script.transport) == Generation(
        id="g1",
        choices=(
            Choice(
                0,
                "Hello",
                "length",
                Logprobs(("Hel", "lo"), (1, 2), (None, -0.5), (None, {"lo": -0.5, "p": -2.0}), (0, 3)),
            ),
        ),
        adapter=(AdapterWeight("a", 0.5),),
        usage=Usage(5, 3, 2),
        timing=Timing(0.0, 0.25, 0.5),
    )


def test_a_result_knows_its_text_its_message_and_its_speed(sdk: Any, wire: Any) -> None:
    result = sdk.call(generate, Script(ok(wire.generation("Hello"))).transport)
    assert result.text == "Hello"
    assert result.message == Message("assistant", "Hello")
    assert result.tokens_per_second == (3 - 1) / 0.5


def test_chat_sends_messages_and_the_key_to_generate(sdk: Any, wire: Any) -> None:
    script = Script(ok(wire.generation()))
    sdk.call(
        lambda client: client.chat("Hello", adapter="acme", temperature=0.5),
        script.transport,
        url="http://example.com/prefix/",
        api_key="secret",
    )
    (request,) = script.requests
    assert (request.method, str(request.url)) == ("POST", "http://example.com/prefix/generate")
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["user-agent"].startswith("onebase-python/")
    assert json.loads(request.content) == {
        "messages": [{"role": "user", "content": "Hello"}],
        "adapter": "acme",
        "temperature": 0.5,
        "stream": False,
    }


def test_models_are_typed(sdk: Any) -> None:
    model = {"id": "tiny", "object": "model", "created": 1, "owned_by": "onebase"}
    models = Script(ok({"object": "list", "data": [model]}), ok(model))
    expected = Model(id="tiny", owned_by="onebase", created=1)
    assert sdk.call(lambda client: client.models.list(), models.transport) == (expected,)
    assert sdk.call(lambda client: client.models.retrieve("tiny"), models.transport) == expected
    assert models.requests[1].url.path == "/v1/models/tiny"


def test_an_unwell_server_is_an_answer_of_health_and_is_not_asked_again(sdk: Any, slept: list[float]) -> None:
    well = Script(ok({"status": "ok", "engine": "ready"}))
    assert sdk.call(lambda client: client.health(), well.transport) == Health(True, "ok", "ready")
    unwell = Script(
        httpx2.Response(503, json={"status": "error", "engine": "stalled"}, headers={"Retry-After": "5"})
    )
    assert sdk.call(lambda client: client.health(), unwell.transport) == Health(False, "error", "stalled")
    proxy = Script(httpx2.Response(503, text="<html>no backend</html>"))
    assert sdk.call(lambda client: client.ready(), proxy.transport) == Health(
        False, "the server answered 503: <html>no backend</html>"
    )
    assert slept == []


def test_the_servers_version_comes_with_all_it_said(sdk: Any) -> None:
    said = {"name": "onebase", "version": "9.9", "python": "3.13"}
    version = sdk.call(lambda client: client.version(), Script(ok(said)).transport)
    assert (version.version, version.details) == ("9.9", said)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, APIStatusError),
        (400, BadRequestError),
        (401, AuthenticationError),
        (403, PermissionDeniedError),
        (404, NotFoundError),
        (409, ConflictError),
        (413, PayloadTooLargeError),
        (418, APIStatusError),
        (422, UnprocessableError),
        (429, RateLimitError),
        (500, InternalServerError),
        (502, ServerUnavailableError),
        (503, ServerUnavailableError),
        (504, InternalServerError),
        (507, StorageFullError),
    ],
)
def test_each_status_raises_its_own_error(sdk: Any, wire: Any, status: int, kind: type[Exception]) -> None:
    body = wire.error("top_k is below 0", param="top_k", code="invalid_value")
    script = Script(httpx2.Response(status, json=body, headers={"Retry-After": "3"}))
    with pytest.raises(APIStatusError) as caught:
        sdk.call(generate, script.transport, max_retries=0)
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.param, error.code, error.type) == (
        status,
        "top_k",
        "invalid_value",
        "invalid_request_error",
    )
    assert error.message == "top_k is below 0"
    assert error.retry_after == 3.0
    assert str(error) == f"top_k is below 0 (HTTP {status})"


def test_an_error_names_its_field_once() -> None:
    assert str(status_error(400, ErrorDetail("too low", param="top_k"))) == "too low (HTTP 400, top_k)"
    assert str(status_error(400, ErrorDetail("top_k: too low", param="top_k"))) == "top_k: too low (HTTP 400)"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>bad gateway</html>", "the server answered 500: <html>bad gateway</html>"),
        (b"", "the server answered 500 with no body"),
        (b'{"error": "plain"}', "the server reports an error of unknown shape: plain"),
        (b'{"detail": "x"}', 'the server answered 500: {"detail": "x"}'),
        (b"\xff\xfe", "the server answered 500: \ufffd\ufffd"),
    ],
)
def test_an_error_of_another_shape_is_quoted(sdk: Any, body: bytes, message: str) -> None:
    with pytest.raises(InternalServerError) as caught:
        sdk.call(generate, Script(httpx2.Response(500, content=body)).transport)
    assert caught.value.message == message


NO_CHOICES = {
    "id": "g",
    "choices": [],
    "usage": {"prompt_tokens": 1, "completion_tokens": 0},
    "timing": {"queue_s": 0.0, "ttft_s": 0.0, "decode_s": 0.0},
}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"<html>", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"id": "g"}', "no field 'choices'"),
        (json.dumps(NO_CHOICES).encode(), "choices is empty"),
        (b'{"choices": 7}', "wrong type"),
        (b'{"choices": [7]}', "wrong type"),
    ],
)
def test_an_answer_that_is_no_generation_is_refused(sdk: Any, body: bytes, says: str) -> None:
    with pytest.raises(InvalidResponseError, match=says):
        sdk.call(generate, Script(httpx2.Response(200, content=body)).transport)


def test_a_busy_server_is_asked_again_when_it_says(sdk: Any, wire: Any, slept: list[float]) -> None:
    busy = httpx2.Response(429, json=wire.error("full"), headers={"Retry-After": "7"})
    script = Script(busy, ok(wire.generation("at last")))
    assert sdk.call(generate, script.transport).text == "at last"
    assert len(script.requests) == 2
    assert script.requests[0].content == script.requests[1].content
    assert len(slept) == 1
    assert 7 <= slept[0] <= 7.7


def test_a_starting_server_is_waited_for_longer_each_time(sdk: Any, wire: Any, slept: list[float]) -> None:
    starting = [httpx2.Response(503, json=wire.error("starting")) for _ in range(3)]
    script = Script(*starting, ok(wire.generation("at last")))
    assert sdk.call(generate, script.transport, max_retries=3).text == "at last"
    assert [0.25 <= slept[0] <= 0.5, 0.5 <= slept[1] <= 1.0, 1.0 <= slept[2] <= 2.0] == [True] * 3


def test_the_last_failure_is_raised_when_the_retries_are_used_up(
    sdk: Any, wire: Any, slept: list[float]
) -> None:
    script = Script(*(httpx2.Response(503, json=wire.error(f"try {n}")) for n in range(3)))
    with pytest.raises(ServerUnavailableError, match="try 2"):
        sdk.call(generate, script.transport)
    assert len(slept) == 2


def test_a_generation_that_may_have_run_is_not_sent_again(sdk: Any, slept: list[float]) -> None:
    for failure, kind in (
        (httpx2.ReadError("reset"), APIConnectionError),
        (httpx2.ReadError(""), APIConnectionError),
        (httpx2.RemoteProtocolError("gone"), APIConnectionError),
        (httpx2.ReadTimeout("slow"), APITimeoutError),
    ):
        script = Script(failure)
        with pytest.raises(kind) as caught:
            sdk.call(generate, script.transport)
        assert caught.value.__cause__ is failure
        assert str(caught.value)[-1] not in ": "
    assert slept == []


def test_a_read_that_failed_is_sent_again(sdk: Any, slept: list[float]) -> None:
    script = Script(httpx2.ReadError("reset"), httpx2.ReadTimeout("slow"), ok({"object": "list", "data": []}))
    assert sdk.call(lambda client: client.models.list(), script.transport) == ()
    assert len(slept) == 2


def test_a_stream_is_opened_again_while_nothing_has_come(sdk: Any, wire: Any, slept: list[float]) -> None:
    busy = httpx2.Response(429, json=wire.error("full"), headers={"Retry-After": "1"})
    headers = {"Content-Type": "text/event-stream"}
    answer = httpx2.Response(200, headers=headers, content=wire.sse(*wire.answer("hi")))
    script = Script(httpx2.ConnectError("refused"), busy, answer)
    _, result = sdk.stream("x", transport=script.transport)
    assert result.text == "hi"
    assert len(slept) == 2


def test_with_options_changes_only_what_is_given_and_leaves_the_original(
    wire: Any, slept: list[float]
) -> None:
    script = Script(*(httpx2.Response(503, json=wire.error("no")) for _ in range(4)))
    with Client(api_key="first", transport=script.transport, max_retries=2, timeout=9) as client:
        once = client.with_options(max_retries=0, api_key=None, timeout=Timeout(read=1))
        with pytest.raises(ServerUnavailableError):
            once.generate("x")
        assert len(script.requests) == 1
        assert "authorization" not in script.requests[0].headers
        assert script.requests[0].extensions["timeout"]["read"] == 1
        with pytest.raises(ServerUnavailableError):
            client.generate("x")
    assert len(script.requests) == 4
    assert script.requests[1].headers["authorization"] == "Bearer first"
    assert script.requests[1].extensions["timeout"] == {"connect": 5.0, "read": 9, "write": 9, "pool": None}


def test_no_timeout_still_limits_connecting(sdk: Any, wire: Any) -> None:
    script = Script(ok(wire.generation()))
    sdk.call(generate, script.transport, timeout=None)
    assert script.requests[0].extensions["timeout"] == {
        "connect": 5.0,
        "read": None,
        "write": None,
        "pool": None,
    }


def test_the_environment_gives_url_and_key(sdk: Any, wire: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEBASE_URL", "http://elsewhere:9000/")
    monkeypatch.setenv("ONEBASE_API_KEY", "from-env")
    script = Script(ok(wire.generation()))
    sdk.call(generate, script.transport)
    assert str(script.requests[0].url) == "http://elsewhere:9000/generate"
    assert script.requests[0].headers["authorization"] == "Bearer from-env"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"url": "localhost:8000"}, "url must look like http://127.0.0.1:8000, not 'localhost:8000'"),
        ({"url": "ftp://x"}, "url must look like"),
        ({"url": "http://"}, "url must look like"),
        ({"url": "http://[::1"}, "url .* is not valid"),
        ({"timeout": 0}, "timeout: connect must be more than 0"),
        ({"max_retries": -1}, "max_retries must be"),
        ({"max_retries": None}, "max_retries must be"),
    ],
)
def test_wrong_options_are_named_at_once(sdk: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sdk.call(generate, **options)


def test_a_server_on_this_machine_is_never_asked_through_a_proxy(
    sdk: Any, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = serve(lambda request: request.reply(200, {"status": "ok"}))
    assert sdk.call(lambda client: client.health(), url=server.url).ok
