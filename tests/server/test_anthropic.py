"""Anthropic's Messages API: what its bodies mean, how answers and errors look, and the official client."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
from pydantic import ValidationError

from onebase_edge.errors import InvalidRequestError
from onebase_server.inference.thoughts import Switch, ThoughtFormat
from onebase_server.requests.schemas.anthropic import ConversationRequest, MessagesRequest
from onebase_server.requests.schemas.openai import ChatRequest
from onebase_server.requests.schemas.wire import validation_error

from .support import Server, Starter, one_server, pace

BASE = "smollm2-135m-instruct"
USER = {"role": "user", "content": "hi"}
CALL = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}
CALLED = [USER, {"role": "assistant", "content": [CALL]}]
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "done"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL = {"name": "f", "description": "Does it.", "input_schema": SCHEMA}
IMAGE = {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}}


def chat(format: ThoughtFormat | None = None, /, **fields: Any) -> ChatRequest:
    body = {"model": "m", "max_tokens": 5, "messages": [USER], **fields}
    return MessagesRequest.model_validate(body).chat(format)


def refusal(fields: dict[str, Any]) -> tuple[str, str | None]:
    try:
        chat(**fields)
    except ValidationError as error:
        return validation_error(error.errors())
    except InvalidRequestError as error:
        return error.message, error.param
    raise AssertionError(f"{fields} is taken")


def test_a_thread_is_refused_by_the_code_on_which_the_client_goes_on_without_one() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(thread={"type": "create"})
    assert caught.value.code == "thread_unsupported_request"
    assert caught.value.details == {"unsupported": ["thread"]}


# ---- what a body means ---------------------------------------------------------------------------


def test_a_conversation_with_tools_is_the_chat_that_openais_clients_would_send() -> None:
    hint = {"cache_control": {"type": "ephemeral"}}
    said = [
        {"type": "text", "text": "Let me ", "citations": None, **hint},
        {"type": "text", "text": "see."},
        {**CALL, "caller": {"type": "direct"}},
    ]
    results = [
        {**RESULT, "content": [{"type": "text", "text": "no", **hint}], "is_error": True},
        {"type": "text", "text": "Well?"},
    ]
    made = chat(
        system=[{"type": "text", "text": "Be ", **hint}, {"type": "text", "text": "brief."}],
        messages=[USER, USER, {"role": "assistant", "content": said}, {"role": "user", "content": results}],
        tools=[{**TOOL, "strict": True, "type": "custom", **hint}],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        stop_sequences=["END"],
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        metadata={"user_id": "u"},
        service_tier="auto",
        thinking={"type": "disabled"},
        seed=3,
    )

    assert [message.rendered() for message in made.messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi\n\nhi"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
            ],
        },
        {"role": "tool", "content": "Error: no", "name": "f", "tool_call_id": "c1"},
        {"role": "user", "content": "Well?"},
    ]
    assert made.functions == [{"name": "f", "description": "Does it.", "parameters": SCHEMA, "strict": True}]
    assert (made.must_call, made.parallel_tool_calls, made.stops) == (True, False, ("END",))
    assert (made.temperature, made.top_p, made.top_k, made.seed, made.token_limit) == (0.5, 0.9, 40, 3, 5)
    assert not made.continue_final_message


def test_an_answer_that_is_begun_goes_on_and_each_choice_of_tools_has_its_name() -> None:
    assert chat(messages=[USER, {"role": "assistant", "content": "It is"}]).continue_final_message
    for choice, said in (
        ({"type": "auto"}, ("auto", None)),
        ({"type": "none"}, ("none", None)),
        ({"type": "tool", "name": "f"}, (None, "f")),
    ):
        made = chat(tools=[TOOL], tool_choice=choice)
        found = made.tool_choice if isinstance(made.tool_choice, str) else None
        assert (found, made.named_tool) == said


def test_thinking_is_switched_on_and_off_where_the_template_has_a_switch() -> None:
    on, off = {"type": "enabled", "budget_tokens": 2000}, {"type": "disabled"}
    for default in (True, False):
        switch = Switch("enable_thinking", True, False, default)
        format = ThoughtFormat("<think>", "</think>", {}, switch=switch)
        for thinking, value in ((None, False), (off, False), ({"type": "adaptive"}, True), (on, True)):
            options = chat(format, thinking=thinking).chat_template_kwargs
            assert options == ({} if value == default else {"enable_thinking": value})
            assert chat(thinking=thinking).chat_template_kwargs == {}
        own = chat(format, chat_template_kwargs={"enable_thinking": 5})
        assert own.chat_template_kwargs == {"enable_thinking": 5}


def test_a_budget_goes_to_a_template_that_asks_for_it() -> None:
    switch = Switch("thinking_budget", -1, 0, True)
    format = ThoughtFormat("<think>", "</think>", {}, switch=switch, budget="thinking_budget")
    for thinking, value in (({"type": "enabled", "budget_tokens": 2000}, 2000), ({"type": "disabled"}, 0)):
        assert chat(format, thinking=thinking).chat_template_kwargs == {"thinking_budget": value}


def test_a_budget_bounds_the_thought_where_a_token_ends_it() -> None:
    on, adaptive = {"type": "enabled", "budget_tokens": 2000}, {"type": "adaptive"}
    tokens = ThoughtFormat("<think>", "</think>", {"<think>": 7, "</think>": 8})
    assert chat(tokens, thinking=on).thinking_token_budget == 2000
    opened = ThoughtFormat("[begins]", "</think>", {"</think>": 8})
    assert chat(opened, thinking=on).thinking_token_budget == 2000, "the prompt may open it"
    assert chat(tokens, thinking=adaptive).thinking_token_budget is None
    assert chat(ThoughtFormat("<think>", "</think>", {}), thinking=on).thinking_token_budget is None


def test_thoughts_stand_anywhere_in_what_the_assistant_said() -> None:
    said = [
        {"type": "thinking", "thinking": "One.", "signature": "x"},
        {"type": "text", "text": "Well."},
        {"type": "thinking", "thinking": "Two."},
        {"type": "redacted_thinking", "data": "x"},
        CALL,
    ]
    made = chat(
        messages=[USER, {"role": "assistant", "content": said}, {"role": "user", "content": [RESULT]}]
    )
    assert (made.messages[1].content, made.messages[1].reasoning_content) == ("Well.", "One.\n\nTwo.")


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_a_schema_of_the_answer_is_named_by_the_field_that_it_came_in(field: str) -> None:
    wanted = {"type": "json_schema", "schema": SCHEMA}
    made = chat(**{field: {"format": wanted} if field == "output_config" else wanted})
    assert made.grammar is not None
    assert json.loads(made.grammar.grammar.text) == SCHEMA | {"additionalProperties": False}
    assert made.grammar.param == (
        "output_config.format.schema" if field == "output_config" else "output_format.schema"
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": 3}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": ["a"]}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [None]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages[0].content[0].tool_use_id"),
        (
            {"messages": [*CALLED, {"role": "user", "content": [{**RESULT, "content": [IMAGE]}]}]},
            "messages[2].content[0].content[0].type",
        ),
        (
            {"messages": [*CALLED, {"role": "user", "content": [{"type": "text", "text": "x"}, RESULT]}]},
            "messages[2].content[1]",
        ),
        ({"messages": CALLED}, "messages[1]"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages[1]"),
        ({"system": [IMAGE]}, "system[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{**TOOL, "input_schema": {"type": "string"}}]}, "tools[0].input_schema"),
        ({"tools": [{**TOOL, "input_examples": [{"a": 1}]}]}, "tools[0].input_examples"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"context_management": {"edits": [{"type": "compact"}]}}, "context_management.edits[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]},
            "messages[0].content[0].type",
        ),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop": "x"}, "stop"),
        ({"n": 2}, "n"),
        ({"speed": "fast"}, "speed"),
        ({"container": "c"}, "container"),
        ({"temprature": 1}, "temprature"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_by_its_path(fields: dict[str, Any], param: str) -> None:
    message, found = refusal(fields)
    assert found == param, message


def test_counting_takes_what_a_message_is_made_of_and_nothing_else() -> None:
    body = {"model": "m", "messages": [USER], "tools": [TOOL], "speed": "standard"}
    assert len(ConversationRequest.model_validate(body).chat(None).messages) == 1
    with pytest.raises(ValidationError):
        ConversationRequest.model_validate(body | {"max_tokens": 3})


# ---- answers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(serve_scripted: Starter) -> Iterator[Server]:
    """Its engine says the prompt again and again."""
    with serve_scripted("words") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


ASK: Any = {"model": BASE, "messages": [{"role": "user", "content": "one two three four"}]}


def test_a_message_ends_for_a_reason_that_the_client_knows(client: anthropic.Anthropic) -> None:
    cut = client.messages.create(**ASK, max_tokens=3)
    assert (cut.stop_reason, cut.stop_sequence, cut.usage.output_tokens) == ("max_tokens", None, 3)
    count = client.messages.count_tokens(**ASK)
    assert count.input_tokens == cut.usage.input_tokens

    stopped = client.messages.create(**ASK, max_tokens=200, stop_sequences=["never", " three"])
    (block,) = stopped.content
    assert block.type == "text"
    assert block.text.endswith("one two")
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " three")

    paused = client.messages.create(**ASK, max_tokens=5000, extra_body={"timeout_s": 0.2})
    assert paused.stop_reason == "pause_turn"


def test_a_stream_adds_up_to_the_message(client: anthropic.Anthropic) -> None:
    fields: Any = {**ASK, "max_tokens": 200, "stop_sequences": [" three"]}
    whole = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        kinds = [event.type for event in stream if event.type not in ("text", "content_block_delta")]
        made = stream.get_final_message()
    assert kinds == [
        "message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert [block.to_dict() for block in made.content] == [block.to_dict() for block in whole.content]
    assert (made.stop_reason, made.stop_sequence) == (whole.stop_reason, whole.stop_sequence)
    assert made.usage == whole.usage
    assert made.model == BASE


def test_a_stream_is_made_of_named_events_and_has_no_mark_at_its_end(server: Server) -> None:
    body = {**ASK, "max_tokens": 2, "stream": True}
    with server.client() as http:
        lines = http.post("/v1/messages", json=body).text.strip().split("\n\n")
    for line in lines:
        kind, data = line.split("\n")
        assert kind == f"event: {json.loads(data.removeprefix('data: '))['type']}"
    assert lines[-1].startswith("event: message_stop\n")


@one_server
def test_an_error_has_the_clients_type_and_comes_in_a_stream_as_an_event(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with (
        pace(tmp_path, 1) as (environment, _),  # only the first engine gets ready
        serve_scripted("gated-words", environment=environment) as server,
        anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(anthropic.NotFoundError) as unknown:
            client.messages.create(**ASK | {"model": "gpt"}, max_tokens=3)
        assert (unknown.value.type, unknown.value.error_code) == ("not_found_error", "model_not_found")
        with pytest.raises(anthropic.BadRequestError) as wrong:
            client.messages.create(**ASK, max_tokens=3, extra_body={"temperature": 3})
        assert wrong.value.body == {
            "type": "error",
            "request_id": wrong.value.request_id,
            "error": {
                "type": "invalid_request_error",
                "message": "temperature: must be at most 2 (it is 3).",
                "details": {"error_code": "invalid_value", "param": "temperature"},
            },
        }
        too_large = httpx2.post(f"{server.url}/v1/messages", content=b"x" * 9_000_000, timeout=60)
        assert (too_large.status_code, too_large.json()["error"]["type"]) == (413, "request_too_large")
        lost = httpx2.get(f"{server.url}/v1/messages/batches", timeout=60)
        assert (lost.status_code, lost.json()["error"]["type"]) == (404, "not_found_error")
        with client.messages.stream(**ASK, max_tokens=5000) as stream:
            next(iter(stream.text_stream))
            os.kill(server.engine_pid(), signal.SIGKILL)
            with pytest.raises(anthropic.APIStatusError) as died:
                stream.until_done()
        assert (died.value.type, died.value.error_code) == ("overloaded_error", "engine_restarted")
        with pytest.raises(anthropic.InternalServerError) as away:
            client.messages.create(**ASK, max_tokens=3)
        assert (away.value.status_code, away.value.type) == (503, "overloaded_error")


def test_where_the_base_does_not_think_a_budget_is_refused_but_anthropics_changes_nothing(
    server: Server,
) -> None:
    asked = {"model": BASE, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2000}
    with server.client() as http:
        refused = http.post("/v1/chat/completions", json=asked | {"thinking_token_budget": 5})
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            400,
            "thinking_budget_not_supported",
        )
        more = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "stop_sequences": ["hello"]}
        assert http.post("/v1/messages", json=asked | more).status_code == 200
