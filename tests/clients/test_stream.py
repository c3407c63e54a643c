"""Streams, over a swapped transport and over real sockets."""

from __future__ import annotations

import queue
import socket
from collections.abc import Callable
from json import dumps
from typing import Any

import anyio
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase import (
    APIConnectionError,
    APITimeoutError,
    AsyncClient,
    Choice,
    Client,
    Generation,
    Logprobs,
    Message,
    Piece,
    RateLimitError,
    Stream,
    StreamError,
    Timing,
    Usage,
)
from onebase._core.requests import messages_body
from onebase._sync.http import Response

Serve = Callable[..., Any]
EVENTS = {"Content-Type": "text/event-stream"}


def body(content: bytes) -> httpx2.MockTransport:
    return httpx2.MockTransport(lambda request: httpx2.Response(200, headers=EVENTS, content=content))


def logprobs(*tokens: str) -> dict[str, Any]:
    count = len(tokens)
    return {
        "tokens": list(tokens),
        "token_ids": list(range(count)),
        "token_logprobs": [-1.0] * count,
        "top_logprobs": [{"x": -2.0}] * count,
        "text_offset": [0] * count,
    }


def test_pieces_come_in_order_and_the_result_is_the_whole(sdk: Any, wire: Any) -> None:
    pieces, result = sdk.stream("x", transport=body(wire.sse(*wire.answer("Hé", "llo 🙂", adapter="a@3f2a"))))
    assert pieces == [Piece(0, "Hé"), Piece(0, "llo 🙂"), Piece(0, "", "stop")]
    assert result == Generation(
        "g1", (Choice(0, "Héllo 🙂", "stop"),), "a@3f2a", Usage(5, 3, 2), Timing(0.0, 0.25, 0.5)
    )


def test_a_thought_comes_before_the_text_and_goes_back_with_it(sdk: Any, wire: Any) -> None:
    events = [wire.piece("", reasoning="I "), wire.piece("", reasoning="see."), wire.piece("Yes.")]
    end = [wire.piece("", finish_reason="stop"), wire.done()]
    pieces, result = sdk.stream("x", transport=body(wire.sse(*events, *end)))
    assert [(piece.reasoning, piece.text) for piece in pieces] == [
        ("I ", ""), ("see.", ""), ("", "Yes."), ("", ""),
    ]  # fmt: skip
    assert (result.reasoning, result.text) == ("I see.", "Yes.")
    assert result.message == Message("assistant", "Yes.", reasoning="I see.")
    assert messages_body([result.message])[0]["reasoning_content"] == "I see."


def test_choices_that_stream_side_by_side_are_kept_apart(sdk: Any, wire: Any) -> None:
    events = [
        wire.piece("a", 1, logprobs=logprobs("a")),
        wire.piece("b", 0, logprobs=logprobs("b")),
        wire.piece("c", 1, logprobs=logprobs("c", "d")),
        wire.piece("", 1, finish_reason="length"),
        wire.piece("", 0, finish_reason="stop"),
        wire.done(),
    ]
    _, result = sdk.stream("x", transport=body(wire.sse(*events)))
    assert [(choice.index, choice.text, choice.finish_reason) for choice in result.choices] == [
        (0, "b", "stop"),
        (1, "ac", "length"),
    ]
    assert result.choices[1].logprobs == Logprobs(
        ("a", "c", "d"), (0, 0, 1), (-1.0,) * 3, ({"x": -2.0},) * 3, (0, 0, 0)
    )


@given(st.data())
def test_the_answer_is_the_same_however_the_network_cuts_it(data: st.DataObject) -> None:
    texts = data.draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=1, max_size=5)
    )
    end = {"id": "g", "done": True, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    end |= {"timing": {"queue_s": 0, "ttft_s": 0, "decode_s": 0}}
    events = [{"index": 0, "text": text} for text in texts] + [
        {"index": 0, "text": "", "finish_reason": "stop"},
        end,
    ]
    content = (
        "".join(f"data: {dumps(event, ensure_ascii=False)}\n\n" for event in events).encode()
        + b"data: [DONE]\n\n"
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    chunks = [content[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    request = httpx2.Request("POST", "http://example.com")
    answer = httpx2.Response(200, headers=EVENTS, content=iter(chunks), request=request)
    with Stream(lambda: Response(answer)) as stream:
        assert [piece.text for piece in stream] == [*texts, ""]
    assert stream.result.text == "".join(texts)


def test_an_error_event_is_raised_after_the_pieces_before_it(sdk: Any, wire: Any) -> None:
    content = wire.sse(wire.piece("so far"), wire.error("engine died", code="engine_restarted", param="x"))
    seen: list[Any] = []
    with pytest.raises(StreamError, match="engine died") as caught:
        sdk.stream("x", transport=body(content), seen=seen)
    assert (caught.value.code, caught.value.param) == ("engine_restarted", "x")
    assert seen[0].text == "so far"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "connection_lost"),
        (b"data: [DONE]\n\n", "connection_lost"),
        (b'data: {"index": 0, "text": "a"}\n\n', "connection_lost"),
        (b"data: nonsense\n\n", "invalid_stream"),
        (b'data: {"index": 0}\n\n', "invalid_stream"),
        (b'data: {"done": true}\n\n', "invalid_stream"),
    ],
)
def test_a_stream_that_is_not_whole_is_an_error_and_never_a_result(
    sdk: Any, content: bytes, code: str
) -> None:
    seen: list[Any] = []
    with pytest.raises(StreamError) as caught:
        sdk.stream("x", transport=body(content), seen=seen)
    assert caught.value.code == code
    with pytest.raises(RuntimeError, match="has not been read to its end"):
        _ = seen[0].result


def test_an_answer_that_is_no_stream_of_events_is_an_error(sdk: Any) -> None:
    page = httpx2.MockTransport(lambda request: httpx2.Response(200, html="<h1>Welcome</h1>"))
    with pytest.raises(StreamError, match="sent no stream of events") as caught:
        sdk.stream("x", transport=page)
    assert caught.value.code == "invalid_stream"


def test_an_end_without_the_end_of_a_choice_is_an_error(sdk: Any, wire: Any) -> None:
    with pytest.raises(StreamError, match="without the end of choice 0"):
        sdk.stream("x", transport=body(wire.sse(wire.piece("a"), wire.done())))


def test_an_error_before_the_stream_is_raised_on_entering(sdk: Any, wire: Any) -> None:
    refusal = httpx2.MockTransport(lambda request: httpx2.Response(429, json=wire.error("full")))
    with pytest.raises(RateLimitError, match="full"):
        sdk.stream("x", transport=refusal, max_retries=0)


def test_nothing_is_sent_before_the_with_block_and_a_stream_opens_once(wire: Any) -> None:
    sent: list[httpx2.Request] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        sent.append(request)
        return httpx2.Response(200, headers=EVENTS, content=wire.sse(*wire.answer("a")))

    with Client(transport=httpx2.MockTransport(handle)) as client:
        stream = client.stream("x")
        assert sent == []
        with pytest.raises(RuntimeError, match="open the stream first"):
            iter(stream)
        with stream:
            assert stream.read().text == "a"
        with pytest.raises(RuntimeError, match="entered once"):
            stream.__enter__()
    assert len(sent) == 1


def test_read_gives_the_rest_and_the_result(wire: Any) -> None:
    content = wire.sse(*wire.answer("a", "b", "c"))

    async def asynchronous() -> tuple[Piece, Generation]:
        async with AsyncClient(transport=body(content)) as client, client.stream("x") as stream:
            return await anext(aiter(stream)), await stream.read()

    with Client(transport=body(content)) as client, client.stream("x") as stream:
        first, result = next(iter(stream)), stream.read()
    assert (first, result) == anyio.run(asynchronous)
    assert (first.text, result.text) == ("a", "abc")


def unfinished(wire: Any, hung_up: queue.Queue[bool]) -> Callable[[Any], None]:
    """A script that sends one piece, and then only waits for the client to leave."""

    def script(request: Any) -> None:
        request.begin_stream()
        request.send(wire.sse(wire.piece("first"), done=False))
        hung_up.put(request.wait_for_hang_up())

    return script


@pytest.mark.parametrize("pieces", [0, 1])
def test_leaving_early_hangs_up_so_that_the_server_can_stop(
    sdk: Any, serve: Serve, wire: Any, pieces: int
) -> None:
    hung_up: queue.Queue[bool] = queue.Queue()
    left: list[bool] = []
    server = serve(unfinished(wire, hung_up))
    sdk.leave(pieces, server.url, after=lambda: left.append(hung_up.get(timeout=120)))
    assert left == [True]


def test_an_exception_in_the_with_block_hangs_up(serve: Serve, wire: Any) -> None:
    hung_up: queue.Queue[bool] = queue.Queue()
    server = serve(unfinished(wire, hung_up))

    def interrupted(client: Client) -> None:
        with client.stream("x") as stream:
            for _ in stream:
                raise KeyboardInterrupt

    with Client(server.url) as client:
        with pytest.raises(KeyboardInterrupt):
            interrupted(client)
        assert hung_up.get(timeout=120)


def test_cancelling_the_task_hangs_up(serve: Serve, wire: Any) -> None:
    hung_up: queue.Queue[bool] = queue.Queue()
    server = serve(unfinished(wire, hung_up))

    async def run() -> None:
        async with AsyncClient(server.url) as client:
            with anyio.CancelScope() as scope:
                async with client.stream("x") as stream:
                    async for _ in stream:
                        scope.cancel()
            assert scope.cancelled_caught
            assert await anyio.to_thread.run_sync(lambda: hung_up.get(timeout=120))

    anyio.run(run)


def test_a_lost_connection_is_a_stream_error_and_the_request_is_not_repeated(
    sdk: Any, serve: Serve, wire: Any
) -> None:
    def script(request: Any) -> None:
        request.begin_stream()
        request.send(wire.sse(wire.piece("so far"), done=False))
        request.hang_up()

    server = serve(script)
    seen: list[Any] = []
    with pytest.raises(StreamError) as caught:
        sdk.stream("x", url=server.url, seen=seen)
    assert caught.value.code == "connection_lost"
    assert isinstance(caught.value.__cause__, APIConnectionError)
    assert seen[0].text == "so far"
    assert len(server.requests) == 1


def test_silence_in_a_stream_is_a_stream_error(sdk: Any, serve: Serve, wire: Any) -> None:
    def script(request: Any) -> None:
        request.begin_stream()
        request.send(wire.sse(wire.piece("so far"), done=False))
        request.wait_for_hang_up()

    with pytest.raises(StreamError, match="sent nothing for too long") as caught:
        sdk.stream("x", url=serve(script).url, timeout=0.2)
    assert caught.value.code == "timeout"
    assert isinstance(caught.value.__cause__, APITimeoutError)


def test_streams_read_to_the_end_share_one_connection(serve: Serve, wire: Any) -> None:
    def script(request: Any) -> None:
        request.begin_stream()
        request.send(wire.sse(*wire.answer("a")))
        request.end_stream()

    server = serve(script)
    with Client(server.url) as client:
        for _ in range(3):
            with client.stream("x") as stream:
                stream.read()
    assert len(server.requests) == 3
    assert server.connections == 1


def test_a_refused_connection_was_certainly_not_sent(sdk: Any, serve: Serve, slept: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(APIConnectionError, match=f"cannot connect to http://127.0.0.1:{port}") as caught:
            sdk.stream("x", url=f"http://127.0.0.1:{port}")
    assert not caught.value.sent
    assert len(slept) == 2
