"""A small body costs little: it is refused by size, values or fields before they are looked at."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError, model_validator
from starlette.middleware.base import RequestResponseEndpoint

from onebase_edge.background import Threads, TurnBudget
from onebase_edge.errors import ContextLengthError, InvalidRequestError, SequencesFullError
from onebase_engine.machine import BESIDE_SERVING
from onebase_server.http import app
from onebase_server.http.deps import CALLER, LONG_BODY, VERY_LONG_BODY, StrictRoute, off_loop
from onebase_server.http.routes import generation as generation_routes
from onebase_server.inference.generation import GenerationRun
from onebase_server.inference.tool_format import ToolFormat
from onebase_server.requests.planner import Planner, RequestLimits
from onebase_server.requests.schemas.anthropic import MessagesRequest
from onebase_server.requests.schemas.generation import GenerateRequest
from onebase_server.requests.schemas.openai import ChatRequest, CompletionRequest
from onebase_server.requests.schemas.wire import Wire
from onebase_server.requests.strict_json import MAX_FIELDS, BodyReaders, decode
from onebase_server.tenancy.access import LOCAL, Caller

from ..priorities import assert_behind
from .support import Server

MANY = 100_000
LIMIT = 2_000_000


def refused(body: bytes) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        decode(body, LIMIT)
    return caught.value


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"adapter": "a", "prompt": "p", "adapter": "b"}', "adapter"),
        (b'{"messages": [{"role": "user", "role": "system"}]}', "role"),
        (b'{"a": 1, "\\u0061": 1}', "a"),
        (b'{"a": NaN, "b": {"c": 1, "c": 1}}', "c"),
    ],
)
def test_a_field_that_is_given_twice_is_refused_by_name(body: bytes, name: str) -> None:
    assert refused(body).param == name


def test_no_depth_hides_a_field_that_is_given_twice() -> None:
    """The two readers do not give up at the same depth."""
    for depth in range(700, 1100):
        body = b'{"a": 1, "a": 2, "b": ' + b"[" * depth + b"]" * depth + b"}"
        with pytest.raises((InvalidRequestError, json.JSONDecodeError)):
            decode(body, LIMIT)


def test_a_number_of_any_length_hides_no_field_that_is_given_twice() -> None:
    assert refused(b'{"b": ' + b"9" * 5000 + b', "a": 1, "a": 2}').param == "a"


def test_equal_fields_of_different_objects_are_taken() -> None:
    body = b'{"a": [{"a": 1}, {"a": 2}], "b": {"a": "a"}}'

    assert decode(body, LIMIT) == json.loads(body)


@pytest.mark.parametrize(
    "body",
    [b"NaN", b"[1e999]", b"[" * 1000, b'{"a": "\\ud800"}', b"{'a': 1}", b"\xff", b"", b"9" * 5000 + b"x"],
)
def test_what_is_no_json_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(json.JSONDecodeError):
        decode(body, LIMIT)


@pytest.mark.parametrize("unit", [b"1,", b"[],", b"{},", b"["])
def test_more_values_than_a_body_has_room_for_are_not_read(unit: bytes) -> None:
    body = b"[" + unit * (LIMIT // len(unit))

    assert refused(body).code == "too_many_values"
    assert "--max-body" in str(refused(body))


def test_more_fields_than_any_request_has_are_not_kept() -> None:
    fields = b",".join(b'"%d":1' % number for number in range(MAX_FIELDS))
    objects = b"[" + b",".join([b"{}"] * (MAX_FIELDS + 1)) + b"]"

    assert refused(b"{" + fields + b"}").code == "too_many_values"
    assert refused(objects).code == "too_many_values"


def test_the_token_ids_of_a_long_context_and_the_largest_bias_are_read() -> None:
    body = {
        "prompt": [100_000 + number for number in range(131_072)],
        "logit_bias": {str(number): -100.0 for number in range(1024)},
    }

    assert decode(json.dumps(body, separators=(",", ":")).encode(), LIMIT) == body


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": [-1] * MANY}),
        (CompletionRequest, {"prompt": [1.5] * MANY}),
        (CompletionRequest, {"prompt": [1, "a"] * MANY}),
        (CompletionRequest, {"prompt": [[-1] * MANY] * 10}),
        (CompletionRequest, {"prompt": ["a", 1] * 30}),
        (CompletionRequest, {"prompt": "a", **{f"field{number}": 1 for number in range(MANY)}}),
        (GenerateRequest, {"prompt": "a", **{f"field{number}": 1 for number in range(MANY)}}),
        (GenerateRequest, {"prompt": "a", "logit_bias": {str(number): "x" for number in range(MANY)}}),
        (GenerateRequest, {"prompt": "a", "stop": [1] * MANY}),
        (GenerateRequest, {"prompt": "a", "stop_token_ids": [-1] * MANY}),
        (GenerateRequest, {"prompt": "a", "adapter": [{}] * MANY}),
        (ChatRequest, {"messages": [{"role": 1, "content": [1]}] * 1000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "image"}] * 1000}]}),
        (ChatRequest, {"messages": [{"role": "user", **{f"field{number}": 1 for number in range(MANY)}}]}),
    ],
)
def test_validation_ends_at_the_first_wrong_item(model: type[Wire], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body if model is GenerateRequest else {"model": "m", **body})

    assert caught.value.error_count() <= 3


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ('{"prompt": "a", "adapter": "a", "adapter": "b"}', "invalid_value", "adapter"),
        ('{"prompt": "a", "stop": [' + "1," * 600_000 + "1]}", "too_many_values", None),
        ('{"prompt": "' + "word " * 390_000 + '"}', "context_length_exceeded", "prompt"),
    ],
    ids=["twice", "values", "text"],
)
def test_the_server_refuses_such_bodies_and_says_why(
    scripted: Server, body: str, code: str, param: str | None
) -> None:
    with scripted.client() as http:
        answer = http.post("/generate", content=body, headers={"Content-Type": "application/json"})

    assert answer.status_code == 400
    assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)


# ---- long texts ---------------------------------------------------------------------------------


class SlowTokenizer:
    """A tokenizer that makes no ids until it may, and counts who waits."""

    longest_token = 10
    words = 0
    end_tokens = ()

    def __init__(self) -> None:
        self.may = threading.Event()
        self.running: list[int] = []
        self.where: list[str] = []
        """Names of the threads in which it was called."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        self.running.append(len(text))
        self.where.append(threading.current_thread().name)
        if len(text) > 100_000:
            self.may.wait(60)
        return [1]


def planner_of(
    tokenizer: SlowTokenizer,
    max_length: int,
    check_room: Callable[[str, int], None] = lambda tenant, sequences: None,
) -> Planner:
    base = SimpleNamespace(max_length=max_length, vocab_size=10, kv_longest=16_000)
    supervisor: Any = SimpleNamespace(unavailable=lambda: None, check_room=check_room, base=base)
    nothing: Any = None
    catalog: Any = SimpleNamespace(base_name="base", means_base=lambda tenant, model: model == "base")
    tokenizers: Any = SimpleNamespace(base=tokenizer)
    return Planner(supervisor, tokenizers, catalog, nothing, nothing, RequestLimits(128, 60.0))


def test_no_text_is_tokenized_for_a_full_queue() -> None:
    tokenizer = SlowTokenizer()

    def refuse(tenant: str, sequences: int) -> None:
        assert sequences == 128
        raise SequencesFullError(128, 512, 512, 1.0)

    planner = planner_of(tokenizer, 1_000, refuse)
    body = CompletionRequest(model="base", prompt=["a word"] * 64, n=2)
    with pytest.raises(SequencesFullError):
        asyncio.run(planner.completion(body, LOCAL))
    assert not tokenizer.running


def test_refusals_that_cost_the_api_most_are_answered_after_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(app.asyncio, "sleep", pause)  # type: ignore[attr-defined]
    full, many = SequencesFullError(128, 512, 512, 1.0), refused(b"[" + b"1," * 10 * MANY + b"1]")
    for error, expected in ((full, 1), (many, 2), (InvalidRequestError("n: is 0", param="n"), 2)):
        asyncio.run(app._refuse(error))
        assert len(pauses) == expected


def test_long_texts_wait_for_each_other_and_short_ones_do_not_wait_for_them() -> None:
    tokenizer = SlowTokenizer()

    async def play() -> None:
        planner = planner_of(tokenizer, 1_000_000)
        long = [asyncio.create_task(planner.generate(request(200_000), LOCAL)) for _ in range(3)]
        while not tokenizer.running:
            await asyncio.sleep(0.01)
        for size in (10, 20_000, 90_000):
            await planner.generate(request(size), LOCAL)
        assert tokenizer.running.count(200_000) == 1
        tokenizer.may.set()
        await asyncio.gather(*long)

    asyncio.run(asyncio.wait_for(play(), 60))


def test_prompts_that_are_short_each_but_long_together_are_tokenized_in_a_thread() -> None:
    tokenizer = SlowTokenizer()

    async def play() -> None:
        planner = planner_of(tokenizer, 1_000_000)
        for count in (1, 64):
            body = CompletionRequest(model="base", prompt=["x" * 1000] * count, max_tokens=1)
            await planner.completion(body, LOCAL)

    asyncio.run(play())

    assert tokenizer.where == ["MainThread"] + ["tokenize"] * 64


def test_requests_that_are_ready_together_share_what_one_turn_of_the_event_loop_tokenizes() -> None:
    tokenizer = SlowTokenizer()

    async def play() -> None:
        planner = planner_of(tokenizer, 1_000_000)
        await asyncio.gather(*(planner.generate(request(3000), LOCAL) for _ in range(20)))
        assert tokenizer.where.count("MainThread") == 2
        await planner.generate(request(3000), LOCAL)

    asyncio.run(play())

    assert tokenizer.where.count("MainThread") == 3
    assert tokenizer.where.count("tokenize") == 18


def test_long_texts_of_many_requests_wait_and_those_of_another_tenant_do_not_wait_behind_them() -> None:
    tokenizer = SlowTokenizer()

    async def play() -> None:
        planner = planner_of(tokenizer, 1_000_000)
        other = Caller("ob-1", "acme", frozenset({"generate"}))
        flood = [asyncio.create_task(planner.generate(request(200_000), LOCAL)) for _ in range(5)]
        while not tokenizer.running:
            await asyncio.sleep(0.01)
        another = asyncio.create_task(planner.generate(request(300_000), other))
        await asyncio.sleep(0)
        tokenizer.may.set()
        await asyncio.gather(another, *flood)

    asyncio.run(asyncio.wait_for(play(), 60))

    assert tokenizer.running == [200_000, 300_000] + [200_000] * 4


def test_a_text_that_no_number_of_tokens_could_hold_is_not_tokenized() -> None:
    tokenizer = SlowTokenizer()

    async def play() -> None:
        with pytest.raises(InvalidRequestError, match="--max-length") as caught:
            await planner_of(tokenizer, 100).generate(request(1001), LOCAL)
        assert caught.value.code == "context_length_exceeded"

    asyncio.run(play())

    assert not tokenizer.running


def request(characters: int) -> GenerateRequest:
    return GenerateRequest(prompt="x" * characters, max_tokens=1)


def test_a_job_is_for_its_callers_tenant_at_its_callers_priority() -> None:
    async def play() -> None:
        caller = Caller("ob-1", "acme", frozenset({"generate"}), priority=3)
        job = await planner_of(SlowTokenizer(), 100).generate(request(5), caller)
        nobody: Any = SimpleNamespace(token_gap=len, pieces=list)
        generation = GenerationRun(nobody, nobody, Threads("reading", 1), job, recorder=nobody)
        (submit,) = generation._inflight.submits
        assert (submit.tenant, submit.priority) == ("acme", 3)

    asyncio.run(play())


# ---- off the event loop ---------------------------------------------------------------------------


WHERE: list[str] = []
"""The threads in which a body was looked at, in order."""


class Watched(MessagesRequest):
    """Notes where its fields are validated, and where it becomes a chat."""

    @model_validator(mode="before")
    @classmethod
    def _note(cls, value: Any) -> Any:
        WHERE.append(threading.current_thread().name)
        return value

    def chat(self, variables: frozenset[str]) -> ChatRequest:
        WHERE.append(threading.current_thread().name)
        return super().chat(variables)


def reader() -> FastAPI:
    """An app of one route, which reads bodies as all routes do."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/")
    async def read(body: Watched, request: Request) -> dict[str, Any]:
        chat = await off_loop(request, body.chat, None)
        return {"messages": len(chat.messages)}

    app = FastAPI()

    @app.middleware("http")
    async def let_in(request: Request, call_next: RequestResponseEndpoint) -> Response:
        request.scope[CALLER] = LOCAL
        return await call_next(request)

    app.state.services = SimpleNamespace(
        settings=SimpleNamespace(max_body=LIMIT),
        reading=Threads("read", 1),
        read_inline=TurnBudget(LONG_BODY),
        body_readers=BodyReaders(),
        planner=SimpleNamespace(max_length=8192),
    )
    app.include_router(router)
    return app


def conversation(messages: int, **more: Any) -> bytes:
    text = [{"type": "text", "text": "word"}] * 15
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n in range(messages)]
    return json.dumps({"model": "m", "max_tokens": 1, "messages": turns, **more}).encode()


def sent(body: bytes) -> httpx2.Response:
    async def play() -> httpx2.Response:
        transport = httpx2.ASGITransport(reader())
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.post("/", content=body, headers={"Content-Type": "application/json"})

    return asyncio.run(play())


@pytest.fixture
def where() -> Iterator[list[str]]:
    WHERE.clear()
    yield WHERE
    WHERE.clear()


@pytest.mark.parametrize(("messages", "thread"), [(1, "MainThread"), (60, "read"), (1023, "read")])
def test_a_long_body_is_looked_at_off_the_event_loop_and_once(
    where: list[str], messages: int, thread: str
) -> None:
    body = conversation(messages)
    assert (len(body) > LONG_BODY) == (thread == "read")
    assert (len(body) > VERY_LONG_BODY) == (messages > 1000)

    assert sent(body).json() == {"messages": messages}
    assert where == [thread, thread]


def test_bodies_that_are_ready_together_share_what_one_turn_of_the_event_loop_reads(where: list[str]) -> None:
    body = conversation(13)
    assert LONG_BODY / 3 < len(body) < LONG_BODY / 2
    app = reader()

    async def play() -> None:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost")
        async with http:
            head = {"Content-Type": "application/json"}
            answers = await asyncio.gather(*(http.post("/", content=body, headers=head) for _ in range(10)))
        assert [answer.json() for answer in answers] == [{"messages": 13}] * 10

    asyncio.run(play())

    assert where.count("read") >= 5


def test_what_is_wrong_with_a_body_is_said_alike_whatever_its_length(scripted: Server) -> None:
    with scripted.client() as http:
        http.headers["Content-Type"] = "application/json"
        for temperature, nonsense in ((3, b""), (1, b"{"), (1, b'"n": 1, "n": 2}')):
            bodies = [conversation(messages, temperature=temperature) for messages in (1, 1023)]
            short, long = (
                http.post("/v1/messages", content=body[:-1] + b", " * bool(nonsense) + (nonsense or b"}"))
                for body in bodies
            )
            assert short.status_code == long.status_code == 400
            said = short.json()["error"]
            assert said["details"] == long.json()["error"]["details"]
            assert said["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def readers() -> Iterator[BodyReaders]:
    readers = BodyReaders()
    yield readers
    readers.close()


def read_apart(
    readers: BodyReaders, body: bytes, tenant: str = "one", max_length: int = 10, max_body: int = LIMIT
) -> Any:
    async def play() -> Any:
        own = BodyReaders(readers.helpers)  # threads are of one event loop
        return await own.decode(tenant, body, max_body, max_length)

    return asyncio.run(play())


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
)


@settings(max_examples=60, deadline=None)
@given(value=values, end=st.sampled_from(["", "}", ', "n": 1, "n": 2}', "\\", "NaN"]))
def test_a_process_apart_reads_what_a_thread_reads_and_refuses_alike(
    readers: BodyReaders, value: Any, end: str
) -> None:
    body = json.dumps(value).encode() + end.encode()

    def said(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except InvalidRequestError as error:
            return error.message, error.param, error.code
        except json.JSONDecodeError as error:
            return error.msg

    assert said(lambda: read_apart(readers, body)) == said(lambda: decode(body, LIMIT))


def test_a_process_apart_refuses_what_is_nested_too_deeply(readers: BodyReaders) -> None:
    for depth in range(700, 1100, 20):  # a process apart and this one do not give up at the same depth
        with suppress(json.JSONDecodeError):
            read_apart(readers, b"[" * depth + b"]" * depth)
    with pytest.raises(json.JSONDecodeError):
        read_apart(readers, b"[" * 100_000 + b"]" * 100_000)


def test_more_token_ids_than_the_context_has_are_refused_before_they_are_validated(
    readers: BodyReaders,
) -> None:
    many = list(range(11))
    for field, ids, named in (("prompt", many, "prompt"), ("input", [[1], many], "input[1]")):
        with pytest.raises(ContextLengthError) as caught:
            read_apart(readers, json.dumps({field: ids}).encode())
        assert (caught.value.param, "has 11 tokens" in caught.value.message) == (named, True)
    for taken in (
        {"prompt": many[1:]},
        {"input": many, "truncate_prompt_tokens": 10},
        {"prompt": ["a"] * 11},
        {"scores": [0.5] * 11},
        {"tokens": many},
    ):
        assert read_apart(readers, json.dumps(taken).encode()) == taken


def test_a_process_apart_reads_what_grows_when_it_is_passed_on(readers: BodyReaders) -> None:
    body = b'{"values": [' + b"0.5," * 300_000 + b"5, 1" + b"0" * 4000 + b"]}"
    assert read_apart(readers, body) == decode(body, LIMIT)


def test_a_process_that_was_killed_is_replaced(readers: BodyReaders) -> None:
    assert read_apart(readers, b"[1]") == [1]
    for helper in readers.helpers:
        if helper.process is not None:
            helper.process.kill()
            helper.process.wait()
    assert read_apart(readers, b"[2]") == [2]


def test_a_tenants_long_bodies_wait_for_each_other_and_another_tenants_do_not() -> None:
    async def play() -> None:
        readers = BodyReaders()
        try:
            assert await readers.decode("evil", b"[0]", LIMIT, 10) == [0]
            busy = next(helper.process for helper in readers.helpers if helper.process is not None)
            os.kill(busy.pid, signal.SIGSTOP)
            waiting = [asyncio.create_task(readers.decode("evil", b"[1]", LIMIT, 10)) for _ in range(3)]
            await asyncio.sleep(0)
            assert await readers.decode("good", b"[2]", LIMIT, 10) == [2]
            assert not any(task.done() for task in waiting)
            os.kill(busy.pid, signal.SIGCONT)
            assert await asyncio.gather(*waiting) == [[1]] * 3
            assert_behind(busy.pid, BESIDE_SERVING)
        finally:
            readers.close()

    asyncio.run(play())


class WatchedFormat(ToolFormat):
    def grammar(self, *tools: Any, **how: Any) -> Any:
        WHERE.append(threading.current_thread().name)
        return super().grammar(*tools, **how)


class ToolTokenizer(SlowTokenizer):
    own_templates = None
    chat_template = "tools tool_calls"
    template_options: frozenset[str] = frozenset()
    longest_token = 1000
    thought_format = thinking_switch = None
    tool_format = WatchedFormat("<", ">", ",", "</>", "<", None, {})

    def encode_chat(self, chat: Any) -> list[int]:
        WHERE.append(threading.current_thread().name)
        return [1]


@pytest.mark.parametrize(("properties", "thread"), [(1, "MainThread"), (2000, "tokenize")])
def test_long_tools_are_laid_out_and_made_a_grammar_of_off_the_event_loop(
    where: list[str], properties: int, thread: str
) -> None:
    schema = {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(properties)}}
    tool = {"type": "function", "function": {"name": "now", "parameters": schema}}
    said = [{"role": "user", "content": "word"}]
    body = GenerateRequest.model_validate({"messages": said, "tools": [tool], "max_tokens": 1})

    job = asyncio.run(_planned(body))

    assert job.calls is not None
    assert f'"p{properties - 1}"' in job.calls.grammar.text
    assert where == [thread, thread]


async def _planned(body: GenerateRequest) -> Any:
    return await planner_of(ToolTokenizer(), 1_000_000).generate(body, LOCAL)


@pytest.mark.parametrize(("tokens", "thread"), [(10, "MainThread"), (500, "read")])
def test_an_answer_with_many_log_probabilities_is_written_off_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, tokens: int, thread: str
) -> None:
    where: list[str] = []

    def answer(generation: Any, choices: Any) -> dict[str, int]:
        where.append(threading.current_thread().name)
        return {"choices": len(choices)}

    async def play() -> bytes:
        async def collect() -> list[Any]:
            return [SimpleNamespace(tokens=[None] * tokens)]

        async def begin(*arguments: Any, **options: Any) -> Any:
            return SimpleNamespace(collect=collect, cancel=lambda: None)

        monkeypatch.setattr(generation_routes, "begin", begin)
        sampling = SimpleNamespace(logprobs=20, prompt_logprobs=None)
        adapter = SimpleNamespace(version_label=None)
        job: Any = SimpleNamespace(tenant="acme", sampling=sampling, prompts=(), adapter=adapter)
        services: Any = SimpleNamespace(reading=Threads("read", 1))
        view: Any = SimpleNamespace(answer=answer)
        receive = asyncio.Event().wait
        request: Any = SimpleNamespace(receive=receive, scope={})
        answered = await generation_routes.answer_generation(request, services, None, job, view, False, None)  # type: ignore[arg-type]
        return bytes(answered.body)

    assert asyncio.run(play()) == b'{"choices":1}'
    assert where == [thread]
