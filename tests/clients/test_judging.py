"""Several judges on one conversation: `client.judge`, `judge_as_ended` and `onebase judge`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.clients.conftest import Sdk, Wire
from tests.clients.golden import Transcript

from onebase import AsyncClient, Judge, Judgement, Message, NotFoundError, StreamError

JUDGES = [
    Judge(adapter="polite", instruction="Is it polite?", choices=["yes", "no"]),
    Judge(name="second", adapter={"a": 0.5, "b": 0.5}, temperature=0),
    Judge(),
]
TALK = [Message("user", "Where is it?"), Message("assistant", "In Paris.")]
MISSING = Wire.error("there is no adapter 'polite'", param="adapter", code="adapter_not_found")["error"]
WHOLE = {
    "object": "list",
    "data": [
        {"request": 0, "status": 404, "error": MISSING},
        {"request": 1, "status": 200, "answer": Wire.generation("yes")},
        {"request": 2, "status": 200, "answer": Wire.generation("so\nso")},
    ],
}


def _check(judgements: tuple[Judgement, ...]) -> None:
    assert [(one.name, one.index) for one in judgements] == [("polite", 0), ("second", 1), ("base", 2)]
    assert isinstance(judgements[0].error, NotFoundError)
    with pytest.raises(NotFoundError, match="no adapter"):
        _ = judgements[0].text
    assert [one.text for one in judgements[1:]] == ["yes", "so\nso"]
    assert judgements[1].result.usage.cached_tokens == 2


def test_each_judge_has_its_answer_or_its_error(sdk: Sdk) -> None:
    sent: list[Any] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        sent.append((request.url.path, json.loads(request.content)))
        return httpx2.Response(200, json=WHOLE)

    _check(sdk.call(lambda client: client.judge(JUDGES, messages=TALK), httpx2.MockTransport(answer)))
    ((path, body),) = sent
    assert (path, body["stream"], body["messages"][1]["content"]) == ("/generate/many", False, "In Paris.")
    assert body["requests"] == [
        {"adapter": "polite", "instruction": "Is it polite?", "guided_choice": ["yes", "no"]},
        {"adapter": [{"name": "a", "weight": 0.5}, {"name": "b", "weight": 0.5}], "temperature": 0},
        {"adapter": None},
    ]


def _as_ended(sdk: Sdk, *events: dict[str, Any], done: bool = True) -> list[Judgement]:
    def answer(request: httpx2.Request) -> httpx2.Response:
        head = {"content-type": "text/event-stream"}
        return httpx2.Response(200, headers=head, content=Wire.sse(*events, done=done))

    async def collect(client: AsyncClient) -> list[Judgement]:
        return [one async for one in client.judge_as_ended(JUDGES, prompt="x")]

    def judge(client: Any) -> Any:
        return collect(client) if sdk.asynchronous else list(client.judge_as_ended(JUDGES, prompt="x"))

    return sdk.call(judge, httpx2.MockTransport(answer))


def test_judgements_come_as_they_end(sdk: Sdk) -> None:
    def of(number: int, *events: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**event, "request": number} for event in events]

    first, second = of(2, *Wire.answer("so\n", "so")), of(1, *Wire.answer("yes"))
    failed = of(0, {"status": 404, "error": MISSING})
    mixed = [first[0], *second, *failed, *first[1:]]

    judgements = _as_ended(sdk, *mixed)

    assert [one.index for one in judgements] == [1, 0, 2]
    _check(tuple(sorted(judgements, key=lambda one: one.index)))
    for broken in (mixed[:-1], [*mixed, {"request": 9, "done": True}], [{"text": "x"}]):
        with pytest.raises(StreamError):
            _as_ended(sdk, *broken)


@pytest.mark.parametrize(
    ("judges", "given", "error"),
    [
        ([], {"prompt": "x"}, ValueError),
        (JUDGES, {}, ValueError),
        (JUDGES, {"prompt": "x", "messages": TALK}, ValueError),
        ([{"adapter": "a", "instructions": "?"}], {"prompt": "x"}, TypeError),
    ],
)
def test_what_cannot_be_asked_is_refused_before_it_is_sent(
    sdk: Sdk, judges: Any, given: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        sdk.call(lambda client: client.judge(judges, **given), httpx2.MockTransport(lambda request: 1 / 0))


def test_the_command_shows_a_table_and_fails_if_one_judge_does(
    serve: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    transcript: Callable[[str], Transcript],
    tmp_path: Path,
) -> None:
    bodies: list[Any] = []

    def script(request: Any) -> None:
        bodies.append(request.body)
        request.reply(200, WHOLE if len(bodies[-1]["requests"]) == 3 else {**WHOLE, "data": []})

    server = serve(script)
    monkeypatch.setenv("ONEBASE_URL", server.url)
    talk, judges, text = tmp_path / "talk.json", tmp_path / "judges.json", tmp_path / "mail.txt"
    talk.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    judges.write_text(json.dumps([{"adapter": "b", "max_tokens": 3}, {"instruction": "So?", "regex": "."}]))
    text.write_text("A mail")
    shell = transcript(server.url)
    shell.run("judge", str(talk), "--judge", "a=Is it?", "--judges", str(judges), "--choice", "yes")
    shell.run("judge", str(text), "--judge", "a", "--judge", "base=b=c", "--judge", "x", "--json")
    shell.run("judge", str(text), "--judge", "a")
    shell.run("judge", str(text))
    shell.run("judge", "missing.json", "--judge", "a")
    shell.run("judge", str(text), "--judges", str(text))
    judges.write_text(json.dumps([{"adaptr": "b"}]))
    shell.run("judge", str(text), "--judges", str(judges))
    shell.run("judge", "--help")
    shell.check("judge")

    first, second, _ = bodies
    yes = {"guided_choice": ["yes"]}
    assert first["messages"] == [{"role": "user", "content": "Hi"}]
    assert first["requests"] == [
        {"adapter": "a", "instruction": "Is it?", **yes},
        {"adapter": "b", "max_tokens": 3, **yes},
        {"adapter": None, "instruction": "So?", "guided_regex": "."},
    ]
    assert second["messages"] == [{"role": "user", "content": "A mail"}]
    assert second["requests"][:2] == [{"adapter": "a"}, {"adapter": None, "instruction": "b=c"}]
