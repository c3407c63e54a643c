"""The events in a response, read by the HTTP library: as servers send them and networks cut them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase import InvalidResponseError
from onebase._sync.http import Response

LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), min_size=1, max_size=12)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """The bytes of an event stream, with noise that must be skipped, and the data it carries."""
    text, expected = "", []
    for data in draw(st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=5)):
        end = draw(LINE_ENDS)
        text += "".join(f"data: {line}{end}" for line in data)
        text += draw(st.sampled_from(["", f": ping{end}", f"event: piece{end}id: 7{end}"])) + end
        expected.append("\n".join(data))
    return text.encode(), expected


def response(chunks: Iterable[bytes], kind: str = "text/event-stream") -> Response:
    """An open response whose body arrives in these chunks."""
    request = httpx2.Request("GET", "http://example.com")
    headers = {"Content-Type": kind}
    return Response(httpx2.Response(200, headers=headers, content=iter(chunks), request=request))


def data(*chunks: bytes) -> list[str]:
    return [event.data for event in response(chunks).events()]


@given(streams(), st.data())
def test_events_are_the_same_however_the_network_cuts_the_bytes(
    stream: tuple[bytes, list[str]], draw: st.DataObject
) -> None:
    content, expected = stream
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    chunks = [content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    assert data(*chunks) == expected


def test_an_event_is_given_as_soon_as_its_blank_line_is_there() -> None:
    asked: list[bytes] = []

    def body() -> Iterator[bytes]:
        for chunk in (b"data: a\n", b"\ndata: b\n\n", b"data: c\n\n"):
            asked.append(chunk)
            yield chunk

    events = response(body()).events()
    assert (next(events).data, len(asked)) == ("a", 2)
    assert (next(events).data, len(asked)) == ("b", 2)
    assert (next(events).data, len(asked)) == ("c", 3)
    events.close()


def test_an_event_that_the_end_of_the_stream_cuts_off_is_dropped() -> None:
    assert data(b"data: whole\n\ndata: cut") == ["whole"]


def test_comments_and_other_fields_alone_make_no_event() -> None:
    assert data(b": keep-alive\n\nevent: x\n\nid: 1\n\nretry: 10\n\n") == []


def test_an_event_has_its_name_and_the_newest_id_that_came() -> None:
    content = b"id: 7\nevent: done\ndata: a\n\ndata: b\n\nid: 8\n\nid: 9\0\ndata: c\n\n"
    found = [(event.data, event.event, event.id) for event in response([content]).events()]
    assert found == [("a", "done", "7"), ("b", "message", "7"), ("c", "message", "8")]


@pytest.mark.parametrize("chunk", [b"data: " + b"x" * 9, b"data: x\n" * 9])
def test_an_event_without_end_is_refused_at_the_limit(chunk: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase._http.MAX_EVENT_BYTES", 50)
    with pytest.raises(InvalidResponseError, match="exceeded the 50 byte limit"):
        data(*[chunk] * 10)


def test_many_small_events_do_not_add_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onebase._http.MAX_EVENT_BYTES", 50)
    assert len(data(*[b"data: 0123456789\n\n: comment\n\n"] * 100)) == 100


def test_an_answer_of_another_kind_is_no_stream_of_events() -> None:
    with pytest.raises(InvalidResponseError, match=r"http://example\.com sent no stream of events"):
        list(response([b"<html>"], "text/html").events())
