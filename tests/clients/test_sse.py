from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase._core.streams import ServerEvent, SSEParser

LINE_ENDS = st.sampled_from(["\n", "\r\n", "\r"])
LINES = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[str]]:
    """The bytes of an event stream, with noise that must be skipped, and the data it carries."""
    text, expected = draw(st.sampled_from(["", "\ufeff"])), []
    for data in draw(st.lists(st.lists(LINES, min_size=1, max_size=3), max_size=5)):
        end = draw(LINE_ENDS)
        text += "".join(f"data: {line}{end}" for line in data)
        text += draw(st.sampled_from(["", f": ping{end}", f"event: piece{end}id: 7{end}"])) + end
        expected.append("\n".join(data))
    return text.encode(), expected


def feed(chunks: list[bytes]) -> list[str]:
    parser = SSEParser()
    return [event.data for chunk in chunks for event in parser.feed(chunk)]


@given(streams(), st.data())
def test_events_are_the_same_however_the_network_cuts_the_bytes(
    stream: tuple[bytes, list[str]], data: st.DataObject
) -> None:
    content, expected = stream
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    chunks = [content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    assert feed(chunks) == expected


@given(streams())
def test_events_survive_arriving_byte_by_byte(stream: tuple[bytes, list[str]]) -> None:
    content, expected = stream
    assert feed([bytes([byte]) for byte in content]) == expected


def test_an_event_is_given_as_soon_as_its_blank_line_is_there() -> None:
    parser = SSEParser()
    assert parser.feed(b"data: a\r\n") == []
    assert parser.feed(b"\r") == [ServerEvent("a")]
    assert parser.feed(b"\ndata: b\n\n") == [ServerEvent("b")]


def test_an_event_that_the_end_of_the_stream_cuts_off_is_dropped() -> None:
    assert feed([b"data: whole\n\ndata: cut"]) == ["whole"]


def test_only_one_space_after_the_colon_belongs_to_the_format() -> None:
    assert feed([b"data:x\n\ndata: x\n\ndata:  x\n\ndata\n\n"]) == ["x", "x", " x", ""]


def test_comments_and_other_fields_alone_make_no_event() -> None:
    assert feed([b": keep-alive\n\nevent: x\n\nid: 1\n\nretry: 10\n\n"]) == []


def test_an_event_has_its_name_and_the_newest_id_that_came() -> None:
    content = (
        b"id: 7\nevent: done\ndata: a\n\ndata: b\n\nid: 8\n\nid: 9\0\ndata: c\n\nid\nevent: x\n\ndata: d\n\n"
    )
    expected = [
        ServerEvent("a", "done", "7"),
        ServerEvent("b", "message", "7"),
        ServerEvent("c", "message", "8"),
        ServerEvent("d", "message", ""),
    ]
    parser = SSEParser()
    assert parser.feed(content) == expected
    parser = SSEParser()
    assert [event for byte in content for event in parser.feed(bytes([byte]))] == expected


@pytest.mark.parametrize("chunk", [b"data: " + b"x" * 9, b"data: x\n" * 9])
def test_an_event_without_end_is_refused_at_the_limit(chunk: bytes) -> None:
    parser = SSEParser(max_event_bytes=50)
    with pytest.raises(ValueError, match="over 50 bytes"):
        [parser.feed(chunk) for _ in range(10)]


def test_many_small_events_do_not_add_up_to_the_limit() -> None:
    parser = SSEParser(max_event_bytes=50)
    assert sum(len(parser.feed(b"data: 0123456789\n\n: comment\n\n")) for _ in range(100)) == 100
