"""Streams that break at one server and go on at another, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase_edge.background import Backoff
from onebase_edge.forwarded import TRANSCRIPT_HEADER
from onebase_route import proxy, resumption
from onebase_route.resumption import DiffersError, SharedBudget, StreamRecord

from .support import Server, Starter, as_route, pace, upload
from .test_route import BASE, counted, wait
from .test_route_faults import Answer, Behind, answer, before, never

WORDS = "one two three four five six seven eight nine ten eleven twelve"
LONG = 60


def words(name: str, times: int = 1) -> str:
    """A prompt that no other request has, so that none of it is in a cache."""
    return " ".join([name, *[WORDS] * times])


def chat(name: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": words(name)}]}


SUM = [{"name": "shop", "weight": 0.5}, {"name": "bank", "weight": 2}]
MANY = [
    {"prompt": words("a"), "max_tokens": LONG, "adapter": "bank"},
    {"prompt": 7},
    {"prompt": words("b"), "max_tokens": 5},
    {"prompt": words("c"), "adapter": "none"},
    {"prompt": words("d"), "max_tokens": LONG - 1, "n": 2},
]
USAGE = {"stream_options": {"include_usage": True}}
COMPLETION = {"model": "shop", "prompt": [words("e"), "one two"], "n": 2, "echo": True, "logprobs": 1}
CHAT = {"model": BASE, **chat("f"), "n": 2, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("/generate", {"prompt": words("g"), "max_tokens": LONG, "logprobs": 1, "n": 2}),
    "held back": ("/generate", {"prompt": words("h", 3), "max_tokens": LONG, "stop": "twelve one two thre "}),
    "stopped": ("/generate", {"prompt": words("i", 3), "max_tokens": LONG, "stop": "twelvei one"}),
    "chat": ("/generate", {**chat("j"), "max_tokens": LONG, "adapter": "shop"}),
    "sum": ("/generate", {"prompt": words("k"), "max_tokens": LONG, "adapter": SUM}),
    "many": ("/generate/many", {"requests": MANY}),
    "completions": ("/v1/completions", {**COMPLETION, **USAGE, "max_tokens": LONG}),
    "chat completions": ("/v1/chat/completions", {**CHAT, **USAGE, "max_tokens": LONG}),
    "responses": ("/v1/responses", {"model": BASE, "input": words("l"), "max_output_tokens": LONG}),
    "messages": ("/v1/messages", {"model": BASE, **chat("m"), "max_tokens": LONG}),
    "tgi": ("/", {"inputs": words("n"), "parameters": {"max_new_tokens": LONG, "details": True}}),
}


DATE = {
    "type": "object",
    "properties": {name: {"type": "integer"} for name in ("year", "month", "day")},
    "required": ["year", "month", "day"],
    "additionalProperties": False,
}


class Reading:
    """A stream that is read in a thread."""

    def __init__(self, http: httpx2.Client, path: str, body: dict[str, Any]) -> None:
        self.text = ""
        self._http, self._path, self._body = http, path, body

    @property
    def has_begun(self) -> bool:
        return self.text.count("\n\n") > 12

    def read(self) -> str:
        stream = {} if "requests" in self._body else {"stream": True}
        with self._http.stream("POST", self._path, json=stream | self._body) as answer:
            assert answer.status_code == 200, answer.read()
            assert TRANSCRIPT_HEADER not in answer.headers
            for piece in answer.iter_text():
                self.text += piece
        return self.text


def plain(text: str) -> str:
    """A stream without what another one has otherwise: ids by number, times as 0."""
    numbers: dict[str, str] = {}
    text = re.sub(
        r"\b(?:gen|cmpl|chatcmpl|resp|msg|fc|rs|call)[-_][0-9a-f]{24}\b",
        lambda found: numbers.setdefault(found[0], f"id{len(numbers)}"),
        text,
    )
    text = re.sub(r'"(created|created_at|completed_at)":\d+', r'"\1":0', text)
    first = r'"output_tokens":\d+,"output_tokens_details":\{[^}]*\},"service'
    text = re.sub(first, '"output_tokens":0,"service', text)  # in the first event
    return re.sub(r'"timing":\{[^}]*\}', '"timing":{}', text)


def by_choice(text: str) -> dict[tuple[int, ...], str]:
    """The events of each choice; in which order those of several come depends on other things."""
    found: dict[tuple[int, ...], str] = {}
    for event in text.split("\n\n"):
        data = event.partition("data: ")[2]
        told = json.loads(data) if data.startswith("{") else {}
        (first, *_) = told.get("choices") or [told]
        number = 0 if "type" in told else first.get("index", -1)
        key = (told.get("request", -1), number)
        found[key] = found.get(key, "") + event + "\n\n"
    return {key: plain(events) for key, events in found.items()}


def name_adapters(*servers: Server) -> None:
    """Have all of them know the same."""
    for server in servers:
        with server.client() as http:
            for name in ("shop", "bank"):
                upload(http, name, name.encode(), query="wait=true&activate=true").raise_for_status()


def test_each_kind_of_stream_goes_on_elsewhere_where_its_server_is_killed(
    routing: Starter, serve_scripted: Starter, tmp_path: Path
) -> None:
    names = tmp_path / "replicas"
    with (
        pace(tmp_path) as (environment, allow_steps),
        serve_scripted("paced", environment=environment) as first,
        serve_scripted("words") as second,
        ThreadPoolExecutor(len(ASKED)) as pool,
        second.client() as direct,
    ):
        name_adapters(first, second)
        known = list(pool.map(lambda one: Reading(direct, *one).read(), ASKED.values()))
        names.write_text(first.url)
        with routing([], tmp_path, "--replicas", str(names)) as route, route.client() as http:
            streams = [Reading(http, *one) for one in ASKED.values()]
            texts = [pool.submit(one.read) for one in streams]
            with first.client() as there:
                assert wait(lambda: there.get("/status").json()["requests"] == len(ASKED) + 2)
            allow_steps(20)
            assert wait(lambda: all(one.has_begun for one in streams))
            names.write_text(f"{first.url}\n{second.url}")
            assert wait(lambda: counted(http, "onebase_route_ready").get(second.url) == 1)
            first.signal(signal.SIGKILL)

            for name, text, undisturbed in zip(ASKED, texts, known, strict=True):
                assert by_choice(text.result()) == by_choice(undisturbed), name
            assert counted(http, "onebase_route_resumed_total") == {"": len(ASKED)}
            assert counted(http, "onebase_route_lost_total") == {"": 0}


def tell(http: httpx2.Client, path: str, body: dict[str, Any], lines: bytes = b"") -> bytes:
    """A stream as the route has it, with its transcript; that of a request which goes on from `lines`."""
    stream = {} if "requests" in body else {"stream": True}
    own = json.dumps(stream | body).encode()
    headers = {"content-type": "application/json", TRANSCRIPT_HEADER: f"{len(own)} 0.5", **as_route(http)}
    answer = http.post(path, content=own + lines, headers=headers)
    if answer.status_code != 200:
        raise RuntimeError(f"{answer.status_code}: {answer.text}")
    assert TRANSCRIPT_HEADER in answer.headers
    return answer.content


def events_of(told: bytes) -> bytes:
    """Without the transcript."""
    return re.sub(rb"(?m)^: onebase .*\n", b"", told)


def cut(told: bytes, part: float) -> tuple[bytes, bytes]:
    """The transcript and the events up to there."""
    kept = StreamRecord(SharedBudget(1 << 30), "acme")
    places = [found.start() for found in re.finditer(rb"^: onebase ", told, re.MULTILINE)][1:]
    events = kept.read(told[: places[int(part * len(places))]])
    return bytes(kept.transcript), events


def said(stream: bytes) -> tuple[dict[int, list[Any]], Any]:
    """Of each choice its text, and its logprobs with their tokens; and the last event."""
    found = [json.loads(one[6:]) for one in plain(stream.decode()).split("\n\n") if one[6:7] == "{"]
    of: dict[int, list[Any]] = {}
    for event in found[:-1]:
        choice = of.setdefault(event["index"], ["", [], []])
        choice[0] += event["text"]
        scores = event.get("logprobs") or {"token_ids": [], "token_logprobs": []}
        choice[1] += scores["token_ids"]
        choice[2] += scores["token_logprobs"]
    return of, found[-1]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "One day a fox", "n": 2, "logprobs": 2},
        {"prompt": "One day a fox", "seed": 7, "adapter": "red", "presence_penalty": 0.7, "echo": True},
        {
            "prompt": "A date:",
            "adapter": [{"name": "red", "weight": 0.3}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "date", "schema": DATE}},
        },
    ],
    ids=["no seed", "seed", "schema"],
)
def test_a_sampled_text_that_goes_on_elsewhere_is_the_undisturbed_one(api: Any, body: dict[str, Any]) -> None:
    asked = {"max_tokens": 24, "temperature": 1, **body}
    told = tell(api.http, "/generate", asked)
    whole = events_of(told)
    for part in (0.0, 0.4, 0.8):
        lines, passed = cut(told, part)
        again = events_of(tell(api.http, "/generate", asked, lines))
        assert again.startswith(passed)
        assert said(again) == said(whole)


# ---- what a server makes of a transcript ------------------------------------------------------------------


def test_a_stream_goes_on_with_the_version_it_began_with_and_not_without_it(scripted: Server) -> None:
    asked = {"prompt": "old words", "max_tokens": 6, "adapter": "moving"}
    with scripted.client() as http:
        upload(http, "moving", b"old", query="wait=true&activate=true").raise_for_status()
        told = tell(http, "/generate", asked)
        lines, passed = cut(told, 0.5)
        upload(http, "moving", b"new", query="wait=true&activate=true").raise_for_status()
        other = tell(http, "/generate", asked)

        again = events_of(tell(http, "/generate", asked, lines))
        assert again.startswith(passed)
        assert said(again) == said(events_of(told))
        assert said(again)[1]["adapter"] != json.loads(other.split(b"data: ")[-2])["adapter"]

        (digest,) = re.findall(rb'"moving@([0-9a-f]{64})"', lines)
        deleted = http.delete(f"/v1/adapters/moving/versions/{digest.decode()}")
        assert deleted.status_code == 200, deleted.text
        with pytest.raises(RuntimeError, match=r"409.*adapter_deleted"):
            tell(http, "/generate", asked, lines)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/generate", {"prompt": "some words", "adapter": "off"}),
        ("/generate", {"prompt": "some words", "adapter": [{"name": "off", "weight": 0.5}]}),
        ("/v1/completions", {"prompt": "some words", "model": "off"}),
        ("/v1/completions", {"prompt": "some words", "model": BASE, "adapter": "off"}),
        ("/v1/chat/completions", {**chat("off"), "model": "off"}),
        ("/v1/responses", {"input": "some words", "model": "off"}),
        ("/v1/messages", {**chat("off"), "model": "off"}),
        ("/generate/many", {"requests": [{"prompt": "some words", "adapter": "off", "max_tokens": 6}]}),
    ],
)
def test_a_stream_goes_on_though_no_version_is_active_any_more(
    scripted: Server, path: str, asked: dict[str, Any]
) -> None:
    name = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    asked = asked if "requests" in asked else {**asked, name: 6}
    with scripted.client() as http:
        upload(http, "off", b"off", query="wait=true&activate=true").raise_for_status()
        told = tell(http, path, asked)
        lines, passed = cut(told, 0.5)
        http.post("/v1/adapters/off/deactivate", json={}).raise_for_status()
        again = events_of(tell(http, path, asked, lines))
    assert again.startswith(passed)
    assert plain(again.decode()) == plain(events_of(told).decode())


def test_a_transcript_disturbs_no_request_whose_id_it_names(scripted: Server) -> None:
    with scripted.client() as http, ThreadPoolExecutor(1) as pool, scripted.client() as other:
        asked = {"prompt": "a b c", "max_tokens": 60}
        own = json.dumps({**asked, "stream": True}).encode()
        headers = {"content-type": "application/json", TRANSCRIPT_HEADER: f"{len(own)} 0", **as_route(http)}
        with http.stream("POST", "/generate", content=own, headers=headers) as stream:
            raw = stream.iter_raw()
            told = next(raw)
            lines, _ = cut(told + b": onebase 0 []\ndata: x\n\n", 0.0)
            again = pool.submit(tell, other, "/generate", asked, lines)
            whole = told + b"".join(raw)
        assert said(events_of(whole)) == said(events_of(again.result()))


OPENING = '{"type":"opening","id":"gen-%s","created":1,"seed":1,"max_tokens":6,"adapters":[]}' % ("0" * 24)
OF_OTHERS = OPENING.replace("[]", '["a@b"]')
ENDED = '{"type":"ended","queue_s":0,"ttft_s":0,"decode_s":0,"at":1}'


@pytest.mark.parametrize(
    "records",
    [
        "7",
        "[" * 5000,
        f"[{ENDED}]",
        f"[{OPENING},{OPENING}]",
        f"[{OPENING},{ENDED},[]]",
        f'[{OPENING.replace("gen-0", "gen 0")}]',
        f'[{OPENING.replace(":6", ":7")}]',
        f"[{OF_OTHERS}]",
        f'[{OPENING},[{{"id":"1","tokens":[1]}}]]',
        f'[{OPENING},[{{"id":"x","tokens":[1]}}]]',
        f'[{OPENING},[{{"id":"{"1" * 5000}","tokens":[1]}}]]',
        f'[{OPENING.replace(":1,", ":" + "1" * 5000 + ",", 1)}]',
        f'[{OPENING},[{{"id":"0","choice":-1,"tokens":[1]}}]]',
        f'[{OPENING},[{{"id":"0","tokens":[-1]}}]]',
        f'[{OPENING},[{{"id":"0","tokens":[99999999]}}]]',
        f'[{OPENING},[{{"id":"0","tokens":[1,1,1,1,1,1]}}]]',
        f'[{OPENING},[{{"id":"0","tokens":[1],"logprobs":[[1,-1,[]]]}}]]',
        f'[{OPENING},[{{"id":"0","tokens":[1],"prompt_logprobs":[[1,-1,[]]]}}]]',
        f'[{OPENING},[{{"id":"0","tokens":[1],"cached_tokens":-5}}]]',
    ],
)  # fmt: skip
def test_a_transcript_that_no_server_has_told_is_refused(scripted: Server, records: str) -> None:
    asked = {"prompt": "a b", "max_tokens": 6}
    with scripted.client() as http, pytest.raises(RuntimeError, match=r"400.*invalid_transcript"):
        tell(http, "/generate", asked, f": onebase 0 {records}\n".encode())


def test_headers_of_the_route_are_as_if_not_sent_from_who_does_not_know_the_secret(scripted: Server) -> None:
    asked = json.dumps({"prompt": "a b", "max_tokens": 2, "stream": True}).encode()
    headers = {
        "content-type": "application/json",
        TRANSCRIPT_HEADER: f"{len(asked)} 0",
        "x-onebase-change": "7",
    }
    with scripted.client() as http:
        (secret,) = as_route(http).values()
        assert http.post("/generate", content=asked + b"[", headers={**headers, **as_route(http)}).is_error
        for wrong in ("", "x", secret[:-1], secret[:-1] + "g", secret.upper(), "é", f"{secret}, {secret}"):
            wrong_secret = {"x-onebase-route": wrong.encode()}
            answer = http.post("/generate", content=asked, headers=headers | wrong_secret)  # type: ignore[operator]
            assert answer.status_code == 200, answer.text
            assert not [name for name in answer.headers if name.startswith("x-onebase")]
            assert b"onebase" not in answer.content
        twice = [*headers.items(), *[("x-onebase-route", secret)] * 2]
        assert TRANSCRIPT_HEADER not in http.post("/generate", content=asked, headers=twice).headers
        known = http.post("/generate", content=asked, headers=headers | as_route(http))
        assert known.headers[TRANSCRIPT_HEADER] == "1"
        assert known.headers["x-onebase-change"].isdigit()


def test_a_header_that_says_nothing_is_passed_over(scripted: Server) -> None:
    with scripted.client() as http:
        for header in ("", "x", "1", "99999 0", "-1 0", "2 nan"):
            told = http.post(
                "/generate",
                json={"prompt": "a b", "max_tokens": 1},
                headers={TRANSCRIPT_HEADER: header, **as_route(http)},
            )
            assert told.status_code == 200, told.text


# ---- servers that answer anything -------------------------------------------------------------------

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
    b"x-onebase-change: 0\r\n"
)
TELLS = HEAD + TRANSCRIPT_HEADER.encode() + b": 1\r\n\r\n"
FIRST = b": onebase 0 [1]\ndata: a\n\n: onebase 0 [2]\ndata: b\n\n"
ASK = {"prompt": "x", "stream": True}


def pieces(*of: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in of)


def says(*bodies: bytes, got: list[bytes]) -> Answer:
    """Whoever is asked first says the first, and hangs up; so goes the second."""
    left = list(bodies)

    async def say(behind: Behind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = int(re.findall(rb"content-length: (\d+)", behind.heads[-1].lower())[0])
        got.append(await reader.readexactly(length))
        writer.write(left.pop(0))
        await writer.drain()

    return say


@pytest.mark.parametrize(
    ("second", "passed", "lost"),
    [
        (TELLS + pieces(b"data: a\n\ndata: b\n\ndata: c\n\n", b""), b"data: c\n\n", False),
        (
            TELLS + pieces(b"da", b"ta: a\n\ndata: b\n", b"\n: onebase 0 [3]\ndata: c\n\n", b""),
            b"data: c\n\n",
            False,
        ),
        (TELLS + pieces(b"data: a\n\ndata: x\n\ndata: c\n\n", b""), b"", True),
        (TELLS + pieces(b"data: a\n\n", b""), b"", True),
        (TELLS + pieces(b"data: a\n\ndata: b\n\ndata: c\n\nda"), b"data: c\n\n", True),
        (HEAD + b"\r\n" + pieces(b"data: a\n\ndata: b\n\n", b""), b"", True),
        (b"HTTP/1.1 400 X\r\ncontent-length: 2\r\n\r\n{}", b"", True),
    ],
    ids=["goes on", "in pieces", "differs", "ends early", "breaks too", "knows no transcripts", "refuses"],
)  # fmt: skip
def test_a_stream_goes_on_only_with_what_follows_the_events_that_were_passed_on(
    second: bytes, passed: bytes, lost: bool
) -> None:
    got: list[bytes] = []
    say = says(TELLS + pieces(FIRST[:20], FIRST[20:] + b": onebase 0 [9]\ndata: cut"), second, got=got)
    refuses = {"/generate": answer(b"{}", status=400)}
    with before({"/generate": say}, {"/generate": say}, refuses, resume=0) as running:
        running.behind[2].answers["/ready"] = answer(b"", status=503)
        assert wait(lambda: len(running.route.placement.replicas) == 2)
        with running.client() as http:
            text = http.post("/generate", json=ASK, headers={TRANSCRIPT_HEADER: "1 0"}).content
            metrics = http.get("/metrics").text

    assert text.startswith(b"data: a\n\ndata: b\n\n" + passed)
    assert (b"replica_lost" in text) == lost
    assert text.count(b"data: a") == text.count(b"data: b") == 1
    assert b"onebase" not in text
    assert b"cut" not in text
    assert got[1] == got[0] + b": onebase 0 [1]\n: onebase 0 [2]\n"
    assert f"onebase_route_lost_total {int(lost)}.0" in metrics
    assert running.route.room.reserved == 0


def takes(*told: bytes | None) -> Answer:
    """Servers that say these things one after the other, whichever is asked, and hang up.

    None: it hangs up without a word.
    """
    return says(*(b"" if one is None else one for one in told), got=[])


REST = TELLS + pieces(b"data: a\n\ndata: b\n\n: onebase 0 [3]\ndata: c\n\n", b"")
BREAKS = TELLS + pieces(FIRST)
BUSY = b"HTTP/1.1 503 X\r\ncontent-length: 2\r\n\r\n{}"
QUOTA = b"HTTP/1.1 429 X\r\ncontent-length: 2\r\nretry-after: 60\r\n\r\n{}"
STILL = TELLS + pieces(b"data: a\n\ndata: b\n\n")


def adds(events: bytes) -> bytes:
    """A server that goes on with these events, each named by a letter, and hangs up."""
    return TELLS + pieces(b"".join(b": onebase 0 []\ndata: %c\n\n" % one for one in events))


@pytest.mark.parametrize(
    "told",
    [
        (BUSY, BREAKS, REST),
        (BREAKS, BUSY, BUSY, REST),
        (BREAKS, QUOTA, REST),
        (BREAKS, None, REST),
        (BREAKS, STILL, STILL, REST),
        (adds(b"a"), adds(b"ab"), STILL, adds(b"ab"), adds(b"abc"), adds(b"abc"), adds(b"abc"), REST),
    ],
    ids=[
        "was full before",
        "full",
        "quota",
        "a second dies",
        "a third dies",
        "seven die, not six in a row that add nothing",
    ],
)
def test_a_stream_goes_on_as_long_as_there_is_a_server_that_takes_it(
    monkeypatch: pytest.MonkeyPatch, told: tuple[bytes | None, ...]
) -> None:
    monkeypatch.setattr(proxy, "_RESUME_BACKOFF", Backoff(0.01, 0.01))
    say = takes(*told)
    with before({"/generate": say}, {"/generate": say}) as running, running.client() as http:
        text = http.post("/generate", json=ASK).content
    assert text == b"data: a\n\ndata: b\n\ndata: c\n\n"


def test_streams_that_go_on_at_one_server_share_a_line_of_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proxy, "_SUMMARY_SECONDS", 0.01)
    route = proxy.Route([], key=None, max_body=1)

    async def resume() -> None:
        for servers in (["a", "a", "b", "a"], ["b"]):
            for server in servers:
                route.note_resumed(server)
            while len(caplog.messages) < (3 if servers == ["b"] else 2):
                await asyncio.sleep(0.01)

    asyncio.run(resume())
    assert caplog.messages == ["a resumed 3 streams", "b resumed 1 stream", "b resumed 1 stream"]


def test_a_stream_waits_for_a_server_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_RESUME_BACKOFF", Backoff(0.01, 0.01))
    say = takes(BREAKS, REST)
    with before({"/generate": say}) as running, running.client() as http:
        server = running.behind[0]

        async def breaks_and_starts(*one: Any) -> None:
            server.answers["/ready"] = answer(b"", status=503)
            while running.route.placement.replicas:
                await asyncio.sleep(0.01)
            await say(*one)
            server.answers["/generate"] = say

        server.answers["/generate"] = breaks_and_starts
        with http.stream("POST", "/generate", json=ASK) as stream:
            raw = stream.iter_raw()
            text = next(raw)
            server.answers["/ready"] = answer(b"{}")
            text += b"".join(raw)
    assert text == b"data: a\n\ndata: b\n\ndata: c\n\n"


def test_a_stream_that_breaks_every_server_ends_with_an_error_after_few_of_them() -> None:
    asked: list[bytes] = []
    say = says(BREAKS, *[STILL] * 20, got=asked)
    with before(*[{"/generate": say}] * 9) as running, running.client() as http:
        text = http.post("/generate", json=ASK).text
    assert "replica_lost" in text
    assert len(asked) == 6


def test_a_stream_that_nobody_may_resume_ends_with_the_servers_own_error() -> None:
    error = (
        b'{"error":{"message":"Adapter \'x\' was deleted.","type":"t","param":null,"code":"adapter_deleted"}}'
    )
    say = takes(BREAKS, answer(error, status=409))
    with before(*[{"/generate": say}] * 3) as running, running.client() as http:
        text = http.post("/generate", json=ASK).text
    assert text.startswith("data: a\n\ndata: b\n\n")
    assert text.count("adapter_deleted") == 1
    assert "replica_lost" not in text


@pytest.mark.parametrize("begun", [True, False])
def test_a_request_leaves_a_server_that_stands_still(monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    monkeypatch.setattr(proxy, "_LOOK_TIMEOUT", 0.3)
    monkeypatch.setattr(proxy, "_SILENT_SECONDS", 1.0)
    say = takes(BREAKS if begun else None, REST)
    standing: list[Behind] = []

    async def stands_still(
        behind: Behind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await say(behind, reader, writer)
        if not standing:
            standing.append(behind)
            behind.answers["/ready"] = behind.answers["/metrics"] = never
            await never(behind, reader, writer)

    with before({"/generate": stands_still}, {"/generate": stands_still}) as running:
        with running.client() as http:
            text = http.post("/generate", json=ASK).content
        assert wait(lambda: running.open_requests() == 0)
    assert text == b"data: a\n\ndata: b\n\ndata: c\n\n"


@pytest.mark.parametrize(
    ("path", "event"), [("/generate", ""), ("/v1/messages", "error"), ("/v1/responses", "error")]
)
def test_a_stream_of_a_server_that_tells_no_transcript_ends_with_an_error_where_it_breaks(
    path: str, event: str
) -> None:
    got: list[bytes] = []
    say = says(HEAD + b"\r\n" + pieces(b"data: a\n\nevent: cut\ndata: o"), got=got)
    with before({path: say}, {path: say}) as running, running.client() as http:
        text = http.post(path, json=ASK).text
    first, cut, error = [one for one in text.split("\n\n") if one and one != "data: [DONE]"]
    assert (first, cut) == ("data: a", "event: cut\ndata: o")
    assert "replica_lost" in error
    assert error.startswith(f"event: {event}\ndata: " if event else "data: ")
    assert len(got) == 1


def test_a_stream_that_a_server_taken_out_meanwhile_refuses_ends_with_an_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    say = takes(BREAKS)

    async def breaks_or_leaves(
        behind: Behind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if sum(len(one.heads) for one in running.behind) == 1:
            await say(behind, reader, writer)
        else:
            running.route.set_replicas([one.url for one in running.behind if one is not behind])
            writer.write(b"HTTP/1.1 400 X\r\ncontent-length: 2\r\n\r\n{}")

    with before(*[{"/generate": breaks_or_leaves}] * 2, resume=0) as running, running.client() as http:
        text = http.post("/generate", json=ASK).text
    assert text.count("replica_lost") == 1
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert not [record for record in errors if record.name != "asyncio"]  # the server's own end in this test


def test_a_client_that_leaves_while_a_stream_moves_leaves_nothing_behind() -> None:
    got: list[bytes] = []
    first = says(TELLS + pieces(FIRST), got=got)

    async def then_waits(behind: Behind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (first if not got else never)(behind, reader, writer)

    with before({"/generate": then_waits}, {"/generate": then_waits}) as running:
        with running.client() as http, http.stream("POST", "/generate", json=ASK) as stream:
            raw = stream.iter_raw()
            assert next(raw).startswith(b"data: a")
            assert wait(lambda: sum(len(one.heads) for one in running.behind) == 2)
        assert wait(lambda: sum(one.gone for one in running.behind) == 1)
        assert wait(lambda: running.open_requests() == 0)
        assert wait(lambda: running.route.room.reserved == 0)


@pytest.mark.parametrize("head", [TELLS, HEAD + b"\r\n"], ids=["resumable", "plain"])
def test_a_stream_that_a_server_cuts_off_since_its_client_does_not_read_is_not_the_servers_failure(
    head: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proxy, "_BEHIND_SECONDS", 0.2)

    async def cuts_off(behind: Behind, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head + pieces(b": onebase 0 [1]\n"))
        with contextlib.suppress(TimeoutError):
            for _ in range(400):  # 100 MB, which no buffers hold
                writer.write(pieces(b"data: " + b"x" * (1 << 18) + b"\n\n"))
                await asyncio.wait_for(writer.drain(), 1)
        writer.transport.abort()
        behind.gone += 1

    with before({"/generate": cuts_off}) as running, running.client() as http:
        with http.stream("POST", "/generate", json=ASK) as stream:
            raw = stream.iter_raw()
            next(raw)
            assert wait(lambda: running.behind[0].gone == 1)
            assert sum(piece.count(b"replica_lost") for piece in raw) == 1
        assert "cut off a client" in caplog.text
        assert "broke in" not in caplog.text


def test_bodies_that_are_held_have_a_bound_in_sum_and_leave_room_for_other_tenants() -> None:
    large, small = ({"prompt": "x" * count} for count in (90_000, 20_000))
    named = answer(b"{}", b"x-onebase-tenant: acme")
    with before({"/generate": never, "/x": named}) as running, running.client() as http:
        key = {"authorization": "Bearer first"}
        assert http.get("/x", headers=key).status_code == 200
        running.route.room.most = 240_000
        body = json.dumps(large).encode()
        head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", running.port)) as first:
            first.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            assert wait(lambda: running.route.room.reserved == len(body))
            refused = http.post("/x", json=large)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_bodies")
            assert refused.headers["retry-after"] == "1"
            assert http.post("/x", json=small).status_code == 200
            assert http.post("/x", json=large, headers=key).status_code == 200
        assert wait(lambda: running.route.room.reserved == 0)
        assert http.post("/x", json=large).status_code == 200


# ---- what is kept of a stream ---------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), max_size=30), st.booleans())
def test_only_whole_events_are_passed_on_however_they_come(sizes: list[int], gives_up: bool) -> None:
    stream = FIRST + b": onebase 0 [3]\nid: 7\ndata: : onebase 0 []\n\ndata: [DONE]\n\n"
    events = b"data: a\n\ndata: b\n\nid: 7\ndata: : onebase 0 []\n\ndata: [DONE]\n\n"
    kept = StreamRecord(room := SharedBudget(1000), "acme")
    passed = b""
    for size in [*sizes, len(stream)]:
        piece, stream = stream[:size], stream[size:]
        passed += kept.read(piece)
        if gives_up:
            kept.give_up()
        else:
            assert passed.endswith(b"\n\n") or not passed
    assert passed + kept.end() == events
    assert bytes(kept.transcript) == (
        b"" if gives_up else b": onebase 0 [1]\n: onebase 0 [2]\n: onebase 0 [3]\n"
    )
    assert room.reserved == len(kept.transcript)


def test_a_stream_whose_transcript_has_no_room_is_passed_on_and_does_not_go_on_elsewhere() -> None:
    kept = StreamRecord(SharedBudget(20), "acme")
    assert kept.read(FIRST) == b"data: a\n\ndata: b\n\n"
    assert not kept.can_resume
    assert not kept.transcript


def test_events_that_differ_are_not_passed_on() -> None:
    kept = StreamRecord(SharedBudget(1000), "acme")
    kept.read(FIRST)
    kept.begin_again()
    with pytest.raises(DiffersError):
        kept.read(FIRST.replace(b"a", b"c") + b"data: d\n\n")


@pytest.mark.parametrize("gives_up", [False, True])
def test_a_server_that_repeats_an_event_without_end_is_given_up(
    gives_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resumption, "MOST_EVENT", 1000)
    kept = StreamRecord(SharedBudget(1000), "acme")
    kept.read(FIRST)
    kept.begin_again()
    if gives_up:
        kept.give_up()
    kept.read(b"x" * 1000)
    with pytest.raises(DiffersError):
        kept.read(b"x")
