"""POST /generate/many: several requests in one stream of events, each as if it had been sent alone."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from .access import Keys, bearer, client_with
from .scripted_engine import POISON
from .support import PATIENCE, Server, Starter, one_server, pace
from .test_slow_readers import is_cut_off

FRANCE = "The capital of France is"


def many(http: httpx2.Client, *bodies: Any) -> list[list[dict[str, Any]]]:
    """The events of each request; of all together the last is [DONE]."""
    found: list[list[dict[str, Any]]] = [[] for _ in bodies]
    with http.stream("POST", "/generate/many", json={"requests": bodies}) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    for event in map(json.loads, lines):
        found[event.pop("request")].append(event)
    return found


def text_of(events: list[dict[str, Any]], choice: int = 0) -> str:
    return "".join(event["text"] for event in events if event.get("index") == choice)


def test_each_request_is_answered_as_it_is_alone(api: Any) -> None:
    mix = [{"name": "red", "weight": 0.5}, {"name": "blue", "weight": 0.5}]
    asked = {"prompt": FRANCE, "temperature": 0, "max_tokens": 6}
    bodies = [
        asked,
        {**asked, "adapter": "red", "logprobs": 2},
        {**asked, "adapter": mix, "stream": False},
        {**asked, "temperature": 1, "seed": 3, "n": 2},
    ]

    together = many(api.http, *bodies)

    for events, body in zip(together, bodies, strict=True):
        alone = api.http.post("/generate", json={**body, "stream": False}).json()
        for choice in alone["choices"]:
            assert text_of(events, choice["index"]) == choice["text"]
        assert events[-1]["done"] is True
        assert events[-1]["adapter"] == alone["adapter"]
        assert events[-1]["usage"]["completion_tokens"] == alone["usage"]["completion_tokens"]
        assert len({event["id"] for event in events}) == 1
    told = [token for event in together[1] for token in event.get("logprobs", {}).get("token_ids", ())]
    assert len(told) == 6


def test_without_an_engine_they_are_refused_together_so_that_another_server_is_asked(
    serve_scripted: Starter,
) -> None:
    with serve_scripted("sleep-early", ready=False) as server, server.client() as http:
        server.wait_for(lambda: server.status_of("/health") == 200)
        refused = http.post("/generate/many", json={"requests": [{"prompt": "a"}, {"prompt": "b"}]})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_starting")


def test_one_that_is_refused_says_why_as_alone_and_the_others_go_on(scripted: Server) -> None:
    good = {"prompt": "word", "max_tokens": 3}
    bad: list[Any] = [
        {**good, "temperature": 9},
        {**good, "adapter": "nobody"},
        {**good, "colour": "red"},
        {"prompt": "x", "messages": []},
        {**good, "max_tokens": 200_000},
        7,
    ]
    with scripted.client() as http:
        refused = [http.post("/generate", json=body) for body in bad]
        together = many(http, good, *bad, good)

    for (event,), alone in zip(together[1:-1], refused, strict=True):
        assert event["status"] == alone.status_code >= 400
        if isinstance(alone.json(), dict):
            assert event["error"]["code"] == alone.json()["error"]["code"]
    assert [event["error"] for (event,) in together[1:-2]] == [
        alone.json()["error"] for alone in refused[:-1]
    ]
    assert [text_of(together[0]), text_of(together[-1])] == ["wordwordword"] * 2


def test_requests_share_a_conversation_and_each_has_its_own_instruction(api: Any) -> None:
    talk = [{"role": "user", "content": FRANCE}, {"role": "assistant", "content": "Paris. " * 40}]
    judges = [
        {"instruction": "Is it true?", "guided_choice": ["yes", "no"], "adapter": "red"},
        {"instruction": "Is it polite?", "guided_choice": ["yes", "no"], "logprobs": 2},
        {"instruction": "How many cities?", "guided_regex": "[0-9]{1,2}", "adapter": "blue"},
        {"instruction": "Is it short?", "adapter": [{"name": "red", "weight": 0.5}, {"name": "blue"}]},
        {},
    ]
    judges = [{**judge, "temperature": 0, "max_tokens": 6} for judge in judges]
    shared = {"messages": talk, "requests": judges, "stream": False}

    answered = api.http.post("/generate/many", json=shared).json()["data"]
    streamed = [[] for _ in judges]
    with api.http.stream("POST", "/generate/many", json={**shared, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    for event in map(json.loads, lines[:-1]):
        streamed[event["request"]].append(event)

    assert [one["request"] for one in answered] == list(range(len(judges)))
    for one, events, judge in zip(answered, streamed, judges, strict=True):
        asked = {key: value for key, value in judge.items() if key != "instruction"}
        said = [{"role": "user", "content": judge["instruction"]}] if "instruction" in judge else []
        alone = api.http.post("/generate", json={**asked, "messages": [*talk, *said]}).json()
        assert (one["status"], one["answer"]["choices"]) == (200, alone["choices"])
        assert one["answer"]["adapter"] == alone["adapter"]
        assert text_of(events) == alone["choices"][0]["text"]


def test_a_conversation_that_judges_share_is_computed_once(api: Any) -> None:
    talk = [{"role": "user", "content": "A story of seven ships. " * 30}]
    judges = [{"instruction": f"Number {number}?", "max_tokens": 2} for number in range(6)]

    body = {"messages": talk, "requests": judges, "stream": False}
    answered = api.http.post("/generate/many", json=body).json()["data"]

    used = [one["answer"]["usage"] for one in answered]
    computed = sorted(one["prompt_tokens"] - one["cached_tokens"] for one in used)
    assert computed[-1] > 150  # of one judge, which computes what all of them have
    assert computed[-2] < 50


def test_judges_that_fail_have_their_errors_in_a_whole_answer(scripted: Server) -> None:
    good = {"instruction": " word", "max_tokens": 3}
    bad: list[Any] = [{**good, "adapter": "nobody"}, {**good, "temperature": 9}, {**good, "prompt": "x"}, 7]
    with scripted.client() as http:
        body = {"prompt": "a", "requests": [good, *bad, good], "stream": False}
        first, *failed, last = http.post("/generate/many", json=body).json()["data"]
        both = http.post("/generate/many", json={**body, "messages": [{"role": "user", "content": "a"}]})
        lonely = http.post("/generate", json={"prompt": "a", "instruction": "b"})

    assert [one["status"] for one in failed] == [404, 400, 400, 400]
    assert [one["error"]["param"] for one in failed] == ["adapter", "temperature", "prompt", None]
    assert first["answer"]["choices"] == last["answer"]["choices"]
    assert first["answer"]["choices"][0]["text"] == "a worda"  # the engine repeats its prompt
    assert (both.status_code, both.json()["error"]["param"]) == (400, "prompt")
    assert (lonely.status_code, lonely.json()["error"]["param"]) == (400, "instruction")


@pytest.mark.parametrize("bodies", [[], [{"prompt": "word", "max_tokens": 1}] * 65, None, "x"])
def test_it_takes_1_to_64_requests(scripted: Server, bodies: Any) -> None:
    with scripted.client() as http:
        refused = http.post("/generate/many", json={"requests": bodies})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "requests"
        assert len(many(http, *[{"prompt": "word", "max_tokens": 1}] * 64)) == 64


@pytest.fixture(scope="module")
def keyed(serve_scripted: Starter, keys: Keys) -> Iterator[Server]:
    keys.make("admin")
    with serve_scripted("words", data_dir=keys.file.parent) as server:
        yield server


def caller(server: Server, keys: Keys, tenant: str, **limits: Any) -> httpx2.Client:
    key = keys.make("generate", tenant=tenant, **limits)
    server.wait_for(
        lambda: httpx2.get(f"{server.url}/version", headers=bearer(key), timeout=60).status_code == 200
    )
    return client_with(server, key)


@one_server
def test_each_counts_as_a_request_and_what_is_over_a_quota_alone_is_refused(
    keyed: Server, keys: Keys
) -> None:
    body = {"prompt": "word", "max_tokens": 2}
    with caller(keyed, keys, "counted", quotas={"requests": 3}) as http:
        together = many(http, body, {**body, "adapter": "nobody"}, body, body, body)
        one_more = http.post("/generate", json=body)
        (used,) = http.get("/v1/usage").json()["data"]

    assert [events[-1].get("status", 200) for events in together] == [200, 404, 200, 429, 429]
    assert "3 requests in any 60 seconds" in together[3][0]["error"]["message"]
    assert one_more.status_code == 429
    assert (used["requests"], used["completion_tokens"]) == (2, 4)


@one_server
def test_a_quota_refuses_the_judges_that_exceed_it_in_a_whole_answer_too(keyed: Server, keys: Keys) -> None:
    body = {"prompt": "word", "requests": [{"max_tokens": 2}] * 3, "stream": False}
    with caller(keyed, keys, "whole", quotas={"requests": 2}) as http:
        answered = http.post("/generate/many", json=body).json()["data"]
        (used,) = http.get("/v1/usage").json()["data"]

    assert sorted(one["status"] for one in answered) == [200, 200, 429]
    (refused,) = (one["error"] for one in answered if one["status"] == 429)
    assert refused["code"] == "rate_limit_exceeded"
    assert (used["requests"], used["completion_tokens"]) == (2, 4)


def test_leaving_ends_all_and_gives_back_what_they_had(keyed: Server, keys: Keys) -> None:
    body = {"prompt": "word", "max_tokens": 10_000}
    with caller(keyed, keys, "leaves", quotas={"sequences": 4}) as http:
        sent = {"requests": [body] * 4}
        with http.stream("POST", "/generate/many", json=sent) as answer:
            lines = (line for line in answer.iter_lines() if line)
            seen = {json.loads(next(lines).removeprefix("data: "))["request"] for _ in range(40)}
        keyed.wait_for(lambda: http.post("/generate", json={**body, "max_tokens": 1, "n": 4}).is_success)
        keyed.wait_for(lambda: bool(http.get("/v1/usage").json()["data"]))
        (used,) = http.get("/v1/usage").json()["data"]

    assert seen == {0, 1, 2, 3}
    assert used["requests"] == 5
    assert used["completion_tokens"] < 20_000


def test_one_is_cancelled_and_the_others_go_on(tmp_path: Path, serve_scripted: Starter) -> None:
    bodies = [{"prompt": "a b", "max_tokens": 60}, {"prompt": "c d", "max_tokens": 60}]
    with (
        pace(tmp_path) as (environment, allow_steps),
        serve_scripted("paced", environment=environment) as server,
        server.client() as http,
        server.client() as other,
    ):
        allow_steps(8)
        with http.stream("POST", "/generate/many", json={"requests": bodies}) as answer:
            lines = (json.loads(line[6:]) for line in answer.iter_lines() if line[6:7] == "{")
            first = next(event for event in lines if event["request"] == 0)
            cancelled = other.post(f"/generate/{first['id']}/cancel")
            allow_steps(200)
            events = [first, *lines]
        again = other.post(f"/generate/{first['id']}/cancel")
    assert cancelled.json() == {"id": first["id"], "object": "generation", "cancelled": True}
    assert (again.status_code, again.json()["error"]["code"]) == (404, "generation_not_found")
    ends = {event["request"]: event["finish_reason"] for event in events if event.get("finish_reason")}
    assert ends == {0: "cancelled", 1: "length"}
    used = {event["request"]: event["usage"]["completion_tokens"] for event in events if event.get("done")}
    assert used[0] < used[1] == 60


def test_a_text_of_another_tenant_cannot_be_cancelled(tmp_path: Path, serve_scripted: Starter) -> None:
    body = {"prompt": "word", "max_tokens": 99, "stream": True}
    keys = Keys(tmp_path / "data")
    keys.make("generate", tenant="one")  # before the start: without a key the server is open at first
    with (
        closing(keys),
        pace(tmp_path) as (environment, allow_steps),
        serve_scripted("paced", data_dir=keys.file.parent, environment=environment) as server,
        caller(server, keys, "one") as http,
        caller(server, keys, "another") as other,
    ):
        allow_steps(8)
        with http.stream("POST", "/generate", json=body) as answer:
            lines = (json.loads(line[6:]) for line in answer.iter_lines() if line[6:7] == "{")
            path = f"/generate/{next(lines)['id']}/cancel"
            statuses = other.post(path).status_code, http.post(path).status_code
            allow_steps(8)
            ends = [event["finish_reason"] for event in lines if event.get("finish_reason")]
    assert statuses == (404, 200)
    assert ends == ["cancelled"]


def test_one_that_ends_the_engine_ends_all_with_an_error_each(serve_scripted: Starter) -> None:
    body = {"prompt": "word", "max_tokens": 5000}
    with serve_scripted("poison") as server, server.client() as http:
        together = many(http, body, {**body, "max_tokens": POISON})

    assert {events[-1]["error"]["code"] for events in together} == {"engine_restarted"}
    assert {events[-1]["status"] for events in together} == {503}


@one_server
def test_a_reader_that_does_not_read_is_cut_off(serve_scripted: Starter) -> None:
    body = json.dumps({"requests": [{"prompt": "word " * 50, "max_tokens": 90_000}] * 3}).encode()
    with serve_scripted("flood", "--stream-buffer", "50") as server, socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", server.port))
        head = "POST /generate/many HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        lazy.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        server.wait_for(lambda: "not read fast enough" in server.log)
        with server.client() as http:
            server.wait_for(lambda: http.get("/status").json()["requests"] == 0)
        lazy.settimeout(PATIENCE)
        assert is_cut_off(lazy)
        assert "Traceback" not in server.log
