"""/v1/responses: what is taken and refused, the events of a stream, and what is kept for whom."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import ValidationError

from onebase_edge.errors import InvalidRequestError, UnknownResponseError
from onebase_engine.engine.messages import Grammar, Sampling
from onebase_server.http.views.responses import ResponseView
from onebase_server.inference.generation import GenerationRequest, Prompt
from onebase_server.inference.stream import OutputPiece
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.inference.tool_call_parser import CallFormat
from onebase_server.inference.tool_format import ToolDefinition, ToolFormat
from onebase_server.requests.schemas.items import conversation, items_again, kept_items
from onebase_server.requests.schemas.responses import ResponsesRequest
from onebase_server.requests.schemas.wire import validation_error
from onebase_server.requests.stored_responses import OVERHEAD, StoredResponse, StoredResponses

from .access import Keys, client_with
from .support import PATIENCE, Server, Starter

BASE = "smollm2-135m-instruct"
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"city": "Paris"}'}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}


# ---- what is taken ------------------------------------------------------------------------------


def request(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": BASE, "input": "hi", **fields})


def test_items_become_the_messages_of_a_chat_with_the_calls_of_a_turn_in_one_of_them() -> None:
    said = {"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}
    body = request(
        input=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "input_text", "text": t} for t in ("What", " now?")]},
            {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [said]},
            {"id": "fc_1", "status": "completed", **CALL},
            CALL | {"call_id": "call_2"},
            RESULT,
            RESULT | {"call_id": "call_2", "output": [{"type": "input_text", "text": "rain"}]},
            CALL | {"call_id": "call_3", "arguments": "{}"},
        ]
    )
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": "weather", "arguments": values}}
        for n, values in ((1, {"city": "Paris"}), (2, {"city": "Paris"}), (3, {}))
    ]
    assert [message.rendered() for message in conversation("Use tools.", body.items)] == [
        {"role": "system", "content": "Use tools."},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What now?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls[:2]},
        {"role": "tool", "content": "sunny", "tool_call_id": "call_1"},
        {"role": "tool", "content": "rain", "tool_call_id": "call_2"},
        {"role": "assistant", "content": "", "tool_calls": calls[2:]},
    ]
    kept = kept_items(body.items)
    assert conversation(None, items_again(kept)) == conversation(None, body.items)


def test_items_that_come_with_one_id_are_kept_under_two() -> None:
    items = request(input=[{"role": "user", "content": "a", "id": "msg_1"}] * 2).items
    assert len({item["id"] for item in kept_items(items)}) == 2


def test_a_choice_of_tools_says_which_may_and_which_must_be_called() -> None:
    tools = [WEATHER, WEATHER | {"name": "time", "strict": None, "defer_loading": False}]
    some = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "time"}]}
    found = []
    for choice in ("auto", "required", "none", {"type": "function", "name": "time"}, some):
        body = request(tools=tools, tool_choice=choice)
        found.append((body.calls_tools, body.must_call, body.named_tool, body.callable_names))
    both = ["weather", "time"]
    assert found == [
        (True, False, None, both),
        (True, True, None, both),
        (False, False, None, both),
        (True, True, "time", ["time"]),
        (True, False, None, ["time"]),
    ]
    assert request(tools=tools, tool_choice=some | {"mode": "required"}).must_call


NAMESPACE = {"type": "namespace", "name": "crm", "description": "Customers.", "tools": [WEATHER]}


def test_functions_of_namespaces_are_called_with_it_and_what_openai_runs_is_left_out() -> None:
    body = request(
        tools=[WEATHER, NAMESPACE, {"type": "web_search", "external_web_access": False}],
        input=[{"role": "user", "content": "Who?"}, CALL | {"namespace": "crm"}, RESULT],
    )
    assert [function["name"] for function in body.functions] == ["weather", "crm.weather"]
    assert body.namespaces == {"crm.weather": "crm"}
    assert all(tool.keys() == {"type", "function"} for tool in body.tools or ())  # as templates know tools
    turns = [message.rendered() for message in conversation(None, body.items)]
    assert turns[1]["tool_calls"][0]["function"]["name"] == "crm.weather"
    assert conversation(None, items_again(kept_items(body.items))) == conversation(None, body.items)


PATCH = {"type": "custom", "name": "apply_patch", "description": "Changes files."}
PATCHED = {"type": "custom_tool_call", "call_id": "call_2", "name": "apply_patch", "input": 'say "hi"\n'}


def test_a_custom_tool_is_for_the_model_a_function_with_a_text() -> None:
    inner = {"type": "namespace", "name": "files", "tools": [PATCH | {"format": {"type": "text"}}]}
    body = request(
        tools=[WEATHER, PATCH, inner],
        tool_choice={"type": "custom", "name": "apply_patch"},
        input=[
            {"role": "user", "content": "Greet."},
            PATCHED,
            {"type": "custom_tool_call_output", "call_id": "call_2", "output": "done"},
        ],
    )
    assert body.customs == {"apply_patch", "files.apply_patch"}
    assert [list(tool) for tool in body.tools or ()] == [["type", "function"]] * 3
    assert body.functions[1]["parameters"]["required"] == ["input"]
    assert body.tool_choice is not None
    turns = [message.rendered() for message in conversation(None, body.items)]
    assert turns[1]["tool_calls"][0]["function"] == {
        "name": "apply_patch", "arguments": {"input": 'say "hi"\n'}
    }  # fmt: skip
    assert turns[2]["content"] == "done"
    kept = kept_items(body.items)
    assert [one["type"] for one in kept[1:]] == ["custom_tool_call", "custom_tool_call_output"]
    assert conversation(None, items_again(kept)) == conversation(None, body.items)


GRAMMAR = {"type": "grammar", "syntax": "lark", "definition": "start: /a/"}


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ([{"type": "web_search"}], "tools[0].type"),
        ([PATCH | {"format": GRAMMAR}], "tools[0].format: only free text is served"),
        ([PATCH | {"parameters": {"type": "object"}}], "tools[0].parameters"),
        (
            [{"type": "local_shell"}],
            "'local_shell' is not served: only tools of type 'function'",
        ),
        ([PATCH | {"name": None}], "tools[0].name"),
        ([NAMESPACE, WEATHER | {"name": "crm.weather"}], "tools: 'crm.weather' is there twice"),
        ([NAMESPACE | {"tools": [{"type": "mcp", "name": "patch"}]}], "tools[0].type"),
        ([NAMESPACE | {"name": None}, WEATHER], "tools: 'weather' is there twice"),
        ([NAMESPACE | {"name": 3}], "tools[0].namespace: must be a text"),
        ([NAMESPACE | {"name": "a b"}], "tools[0].name: must be"),
    ],
)
def test_tools_that_cannot_be_called_are_refused(tools: list[Any], says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        request(tools=tools)
    assert says in validation_error(refused.value.errors())[0]


def test_what_changes_nothing_is_taken() -> None:
    body = request(
        client_metadata={"session": "s"},
        user="u", safety_identifier="s", service_tier="auto", prompt_cache_key="k", max_tool_calls=3,
        truncation="disabled", background=False, text={"verbosity": "low"}, conversation=None, n=1,
        include=["reasoning.encrypted_content"], reasoning={"effort": "max", "summary": "auto"},
        stream=True, stream_options={"include_obfuscation": False},
    )  # fmt: skip
    assert (body.grammar, body.logprob_count, body.reasoning_effort) == (None, None, "max")


def test_the_text_is_held_to_a_format_and_to_the_extensions_of_the_other_routes() -> None:
    schema = {"type": "object", "properties": {}}
    for fields, param in (
        ({"text": {"format": {"type": "json_object"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}}, "text.format.schema"),
        ({"guided_regex": "a+"}, "guided_regex"),
    ):
        wanted = request(**fields).grammar
        assert wanted is not None
        assert wanted.param == param


def parts(*kinds: str) -> list[Any]:
    return [{"role": "user", "content": [{"type": kind, "text": "x"} for kind in kinds]}]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": parts("input_text", "input_image")}, "input[0].content[1].type", "'input_image'"),
        ({"input": parts("input_file")}, "input[0].content[0].type", "'input_file'"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type", "'computer_call'"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "'item_reference'"),
        ({"input": [{"type": ["x"]}]}, "input[0].type", "not served"),
        ({"input": []}, "input", "at least 1"),
        ({"input": [CALL | {"arguments": "[1"}]}, "input[0].arguments", "no JSON object"),
        ({"input": [CALL | {"space": "x"}]}, "input[0].space", "does not know"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search'"),
        ({"tools": [WEATHER | {"name": "a b"}]}, "tools[0].name", "letters"),
        ({"tools": [WEATHER | {"defer_loading": True}]}, "tools[0].defer_loading", "does not know"),
        ({"tools": [{"type": "function", "function": WEATHER}]}, "tools[0].function", "does not know"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "twice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "mcp"}}, "tool_choice.type", "'mcp'"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}},
            "tool_choice",
            "none of the tools",
        ),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "goes with"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity", "'low', 'medium' or 'high'"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex", "leave one out"),
        ({"reasoning": {"summary": "short"}}, "reasoning.summary", "auto"),
        ({"include": ["everything"]}, "include[0]", "must be"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata", "at most 16"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"background": True}, "background", "stream"),
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "conversation", "leave one out"),
        ({"conversation": {"name": "conv_1"}}, "conversation.name", "does not know"),
        ({"prompt": {"id": "p"}}, "prompt", "instructions"),
        ({"max_tokens": 3}, "max_tokens", "max_output_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text.format"),
        ({"n": 2}, "n", "one answer"),
        ({"messages": []}, "messages", "does not know"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
    ],
)
def test_what_would_change_the_answer_and_is_not_served_is_refused_by_name(
    fields: dict[str, Any], param: str, says: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        request(**fields)
    message, named = validation_error(caught.value.errors())
    assert named is not None
    assert (named.removesuffix(".str"), says in message) == (param, True), message


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([RESULT], "'call_1' of a function_call_output belongs to no function_call"),
        ([{**CALL, "call_id": f"call_{n}"} for n in range(129)], "128"),
        ([{"role": "user", "content": "x"}] * 1025, "1024"),
    ],
)
def test_items_that_make_no_conversation_are_refused(items: list[Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as caught:
        conversation(None, items_again(items))
    assert caught.value.param == "input"


def test_a_call_that_was_cut_is_gone_on_from_as_far_as_it_goes() -> None:
    (message,) = conversation(None, items_again([CALL | {"arguments": '{"city": "Par'}]))
    (call,) = message.rendered()["tool_calls"]
    assert call["function"]["arguments"] == {"city": "Par"}


def test_a_thought_stands_before_what_came_of_it() -> None:
    thoughts = [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": one}]} for one in "AB"]
    said = {"type": "message", "role": "assistant", "content": "M"}
    messages = conversation(None, items_again([thoughts[0], said, thoughts[1], CALL]))
    assert [(one.reasoning_content, bool(one.tool_calls)) for one in messages] == [("A", False), ("B", True)]


def test_thoughts_alone_cannot_be_answered() -> None:
    with pytest.raises(InvalidRequestError, match="nothing to answer"):
        conversation(None, items_again([{"type": "reasoning", "summary": []}]))


def test_nothing_can_follow_a_call_that_no_template_could_write() -> None:
    with pytest.raises(InvalidRequestError, match="nothing can follow") as caught:
        items_again([CALL | {"arguments": '{"a":' * 70 + "1" + "}" * 70}])
    assert caught.value.param == "previous_response_id"


# ---- the events of a stream -----------------------------------------------------------------------


def told(tokenizer: BaseTokenizer, pieces: list[str], reason: Any) -> tuple[list[str], list[Any]]:
    """The events of an answer that may call tools, and its items."""
    opening, closing = '<call>{"name": "', "}</call>"
    format = ToolFormat(opening, '", "arguments": ', closing + opening, closing, "<call>", None, {})
    names = ("weather", "crm.weather", "apply_patch")
    tools = {name: ToolDefinition(name, {"type": "object"}) for name in names}
    calls = CallFormat(format, tools, Grammar("regex", "x"))
    job = GenerationRequest("resp_1", "default", (Prompt([1]),), Sampling(), calls=calls)
    view = ResponseView(tokenizer, request(tools=[WEATHER, NAMESPACE, PATCH]), lambda _: None)
    view._begin(job)
    events = []
    for place, text in enumerate(pieces):
        last = place == len(pieces) - 1
        events += view._output.feed(OutputPiece(0, text, finish_reason=reason if last else None))
    return [event["type"].removeprefix("response.") for event in events], view._output.items


MESSAGE = ["output_item.added", "content_part.added", "output_text.delta"]
MESSAGE_DONE = ["output_text.done", "content_part.done", "output_item.done"]
CALLED = ["output_item.added", "function_call_arguments.delta"]
CALL_DONE = ["function_call_arguments.done", "output_item.done"]


def test_text_and_calls_are_items_one_after_the_other(tokenizer: BaseTokenizer) -> None:
    one = '<call>{"name": "weather", "arguments": {"city": "Paris"}}</call>'
    events, items = told(tokenizer, ["Well", "." + one + one], "stop")
    assert events == [*MESSAGE, "output_text.delta", *MESSAGE_DONE, *(CALLED + CALL_DONE) * 2]
    assert [(item["type"], item["status"]) for item in items] == [
        ("message", "completed"),
        ("function_call", "completed"),
        ("function_call", "completed"),
    ]
    assert items[0]["content"][0]["text"] == "Well."
    assert [json.loads(item["arguments"]) for item in items[1:]] == [{"city": "Paris"}] * 2
    assert len({item["call_id"] for item in items[1:]} | {item["id"] for item in items}) == 5


def test_a_call_names_the_namespace_of_its_function(tokenizer: BaseTokenizer) -> None:
    _, items = told(tokenizer, ['<call>{"name": "crm.weather", "arguments": {}}</call>'], "stop")
    assert (items[0]["namespace"], items[0]["name"]) == ("crm", "weather")


def test_a_call_of_a_custom_tool_has_its_text(tokenizer: BaseTokenizer) -> None:
    called = '<call>{"name": "apply_patch", "arguments": {"input": "say \\"hi\\"\\n"}}</call>'
    events, items = told(tokenizer, [called], "stop")
    begun, *_, ended = events
    assert (begun, ended) == ("output_item.added", "output_item.done")
    assert events[1:-1] == ["custom_tool_call_input.delta", "custom_tool_call_input.done"]
    assert {key: items[0][key] for key in ("type", "name", "input", "status")} == {
        "type": "custom_tool_call", "name": "apply_patch", "input": 'say "hi"\n', "status": "completed",
    }  # fmt: skip
    events, items = told(tokenizer, [called[:-14]], "length")
    assert (items[0]["input"], items[0]["status"]) == ('say "hi', "incomplete")


def test_what_is_cut_says_so_and_an_answer_of_nothing_is_an_empty_message(tokenizer: BaseTokenizer) -> None:
    events, items = told(tokenizer, ['<call>{"name": "weather", "arguments": {"ci'], "length")
    assert events == CALLED + CALL_DONE
    assert (items[0]["arguments"], items[0]["status"]) == ('{"ci', "incomplete")
    events, items = told(tokenizer, [""], "stop")
    assert events == MESSAGE[:2] + MESSAGE_DONE
    assert items[0]["content"][0]["text"] == ""


# ---- served ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def key(keys: Keys) -> str:
    return keys.make("generate", tenant="acme")


@pytest.fixture(scope="module")
def limited_key(keys: Keys) -> str:
    return keys.make("generate", tenant="acme", quotas={"requests": 1})


@pytest.fixture(scope="module")
def other_key(keys: Keys) -> str:
    return keys.make("generate", tenant="other")


@pytest.fixture(scope="module")
def server(
    serve_scripted: Starter, keys: Keys, key: str, limited_key: str, other_key: str
) -> Iterator[Server]:
    with serve_scripted("words", "--response-memory", "1MB", data_dir=keys.file.parent) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        yield client


def test_a_streamed_response_tells_its_events_in_order(client: openai.OpenAI) -> None:
    with client.responses.create(model=BASE, input="hi", max_output_tokens=3, stream=True) as stream:
        events = list(stream)
    names = ["created", "in_progress", *MESSAGE, "output_text.delta", *MESSAGE_DONE, "incomplete"]
    assert [event.type for event in events] == [f"response.{name}" for name in names]
    assert [event.sequence_number for event in events] == list(range(len(names)))
    last: Any = events[-1]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert last.response.output_text == deltas
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.usage.output_tokens == 3
    assert client.responses.retrieve(last.response.id) == last.response


def test_a_stream_whose_engine_dies_ends_with_a_response_that_failed(
    client: openai.OpenAI, server: Server
) -> None:
    events: list[Any] = []
    begun = threading.Event()

    def read() -> None:
        with client.responses.create(model=BASE, input="x", max_output_tokens=9000, stream=True) as stream:
            for event in stream:
                events.append(event)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    begun.wait(PATIENCE)
    os.kill(server.engine_pid(), signal.SIGKILL)
    reader.join(PATIENCE)
    server.wait_ready()
    failed = events[-1]
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert failed.response.error.code == "engine_restarted"
    assert failed.response.output[0].status == "incomplete"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(failed.response.id)


def test_a_response_goes_on_from_one_before_it_like_the_whole_conversation(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": BASE, "max_output_tokens": 4, "instructions": "Be brief."}
    first = client.responses.create(**fields, input="One?")
    second = client.responses.create(**fields, input="Two?", previous_response_id=first.id)
    whole: Any = [
        {"role": "user", "content": "One?"},
        *(item.model_dump() for item in first.output),
        {"role": "user", "content": "Two?"},
    ]
    alike = client.responses.create(**fields, input=whole, store=False)

    assert first.usage is not None
    assert second.usage is not None
    assert alike.usage is not None
    assert second.usage.input_tokens == alike.usage.input_tokens > first.usage.input_tokens
    items: Any = list(client.responses.input_items.list(second.id, order="asc", limit=2))
    assert [item.role for item in items] == ["user", "assistant", "user"]
    assert [item.content[0].text for item in items] == ["One?", first.output_text, "Two?"]
    newest: Any = client.responses.input_items.list(second.id, limit=1)
    assert newest.data == items[-1:]
    assert newest.has_more
    client.responses.delete(first.id)
    assert client.responses.create(**fields, input="Three?", previous_response_id=second.id).output_text
    for gone in (first.id, alike.id):
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.create(**fields, input="?", previous_response_id=gone)
        assert (caught.value.code, caught.value.param) == ("response_not_found", "previous_response_id")


def test_a_response_continues_a_conversation_and_adds_to_it(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": BASE, "max_output_tokens": 4, "instructions": "Be brief."}
    made = client.conversations.create(
        items=[{"role": "user", "content": "One?", "type": "message"}], metadata={"topic": "numbers"}
    )
    assert (made.object, made.metadata) == ("conversation", {"topic": "numbers"})
    assert made.id.startswith("conv_")
    first = client.responses.create(**fields, input="Two?", conversation=made.id)
    assert first.conversation is not None
    assert first.conversation.id == made.id
    whole: Any = [{"role": "user", "content": text} for text in ("One?", "Two?")]
    alike = client.responses.create(**fields, input=whole, store=False)
    assert first.usage is not None
    assert alike.usage is not None
    assert first.usage.input_tokens == alike.usage.input_tokens
    with client.responses.create(
        **fields, input="Three?", conversation={"id": made.id}, store=False, stream=True
    ) as stream:
        second = list(stream)[-1].response  # type: ignore[union-attr]
    counted = client.responses.input_tokens.count(
        model=BASE, instructions="Be brief.", input="Four?", conversation=made.id
    )
    assert counted.input_tokens > second.usage.input_tokens
    items: Any = list(client.conversations.items.list(made.id, order="asc", limit=2))
    said = [item.content[0].text for item in items]
    assert said == ["One?", "Two?", first.output_text, "Three?", second.output_text]
    assert client.conversations.items.list(made.id, limit=1).data == items[-1:]

    added: Any = client.conversations.items.create(
        made.id, items=[{"role": "user", "content": "Five?", "id": items[0].id, "type": "message"}]
    )
    (fifth,) = added.data
    assert fifth.id not in {item.id for item in items}
    assert client.conversations.items.retrieve(fifth.id, conversation_id=made.id) == fifth
    assert client.conversations.items.delete(items[1].id, conversation_id=made.id).id == made.id
    left = [item.id for item in client.conversations.items.list(made.id, order="asc")]
    assert left == [item.id for item in [items[0], *items[2:], fifth]]
    with pytest.raises(openai.NotFoundError, match="no item"):
        client.conversations.items.retrieve(items[1].id, conversation_id=made.id)

    assert client.conversations.update(made.id, metadata={"topic": "none"}).metadata == {"topic": "none"}
    assert client.conversations.retrieve(made.id).metadata == {"topic": "none"}
    assert client.conversations.delete(made.id).object == "conversation.deleted"
    assert client.responses.retrieve(first.id).output_text == first.output_text
    for call in (
        lambda: client.conversations.retrieve(made.id),
        lambda: client.conversations.items.list(made.id),
        lambda: client.responses.create(**fields, input="?", conversation=made.id),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call()
        assert caught.value.code == "conversation_not_found"


def test_a_conversation_is_its_tenants_and_no_response(server: Server, key: str, other_key: str) -> None:
    with client_with(server, key) as http:
        bodies: list[dict[str, Any]] = [{}, {"items": []}]
        for empty in bodies:
            talk = http.post("/v1/conversations", json=empty).json()["id"]
            assert http.get(f"/v1/conversations/{talk}/items").json()["data"] == []
        assert http.get(f"/v1/responses/{talk}").status_code == 404
        assert http.post("/v1/conversations", json={"items": [{"role": "user"}]}).status_code == 400
    with client_with(server, other_key) as http:
        assert http.get(f"/v1/conversations/{talk}").json()["error"]["code"] == "conversation_not_found"
        body = {"model": BASE, "input": "hi", "conversation": talk}
        assert http.post("/v1/responses", json=body).status_code == 404


def test_a_request_that_would_make_a_conversation_too_large_is_refused(server: Server, key: str) -> None:
    with client_with(server, key) as http:
        half = {"items": [{"role": "user", "content": "x" * 600_000}]}
        path = f"/v1/conversations/{http.post('/v1/conversations', json=half).json()['id']}"
        asked = {"model": BASE, "input": half["items"], "conversation": path.rpartition("/")[2]}
        for route, body, param in (
            ("/v1/conversations", {"items": [*half["items"], *half["items"]]}, "items"),
            (f"{path}/items", half, "items"),
            ("/v1/responses", asked, "input"),
        ):
            error = http.post(route, json=body).json()["error"]
            assert (error["code"], error["param"]) == ("conversation_too_large", param)
        assert len(http.get(f"{path}/items").json()["data"]) == 1


def test_what_a_response_adds_to_a_deleted_conversation_is_dropped() -> None:
    store = StoredResponses(10_000)
    store.store_conversation("one", "conv_1", StoredResponse(b"{}", b"[]"), "items")
    for item_id in ("1", "2"):
        store.append_items("one", "conv_1", item(item_id))
    store.append_items("one", "conv_1", {})
    assert [found["id"] for found in items_of(store)] == ["1", "2"]
    store.delete_conversation("one", "conv_1", "conversation")
    store.append_items("one", "conv_1", item("3"))
    assert (store.size, store._shelves) == (0, {})


def item(item_id: str, text: str = "") -> dict[str, bytes]:
    return {item_id: json.dumps({"id": item_id, "text": text}).encode()}


def items_of(store: StoredResponses) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(store.find_conversation("one", "conv_1", "conversation").input)
    return found


def test_what_two_responses_add_at_once_under_one_id_gets_two() -> None:
    store = StoredResponses(10_000)
    store.store_conversation("one", "conv_1", StoredResponse(b"{}", b"[]"), "items")
    for text in ("first", "second", "third"):
        store.append_items("one", "conv_1", item("msg_1", text))
    assert [found["text"] for found in items_of(store)] == ["first", "second", "third"]
    assert len({found["id"] for found in items_of(store)}) == 3


def test_a_conversation_that_would_be_over_the_limit_stays_as_it_was() -> None:
    store = StoredResponses(10_000)
    store.store_response("one", "0", kept(2000))
    store.store_conversation("one", "conv_1", StoredResponse(b"{}", b"[]"), "items")
    store.append_items("one", "conv_1", item("1", "x" * 5000))
    conversation = store.find_conversation("one", "conv_1", "conversation")
    store.check_growth(conversation, 1000)
    with pytest.raises(InvalidRequestError, match="--response-memory"):
        store.check_growth(conversation, 5000)
    with pytest.raises(InvalidRequestError, match="--response-memory"):
        store.store_conversation("one", "conv_1", StoredResponse(b"{}", b"x" * 10_000), "items")
    store.append_items("one", "conv_1", item("2", "x" * 5000))
    assert store.find_conversation("one", "conv_1", "conversation") is conversation
    assert names(store, "one", 1) == [0]


def test_compaction_is_refused_with_what_to_do_instead(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="Ask for a summary") as caught:
        client.responses.compact(model=BASE, input="x")
    assert (caught.value.status_code, caught.value.code) == (501, "not_served")


def test_an_error_of_the_request_names_the_fields_of_this_route(client: openai.OpenAI) -> None:
    for fields, param in (
        ({"input": "x" * 1_000_000}, "input"),
        ({"input": "x", "max_output_tokens": 999_999}, "max_output_tokens"),
        ({"input": "x", "model": "nobody"}, "model"),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            client.responses.create(**{"model": BASE, **fields})
        assert caught.value.param == param
    made = client.responses.create(model=BASE, input="x", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.input_items.list(made.id, after="msg_none")
    assert caught.value.param == "after"
    with pytest.raises(openai.BadRequestError):
        client.responses.retrieve(made.id, stream=True)


def test_to_look_at_a_response_is_no_request_of_a_quota(server: Server, limited_key: str) -> None:
    with client_with(server, limited_key) as http:
        body = {"model": BASE, "input": "hi", "max_output_tokens": 1}
        made = http.post("/v1/responses", json=body)
        assert made.headers["x-ratelimit-remaining-requests"] == "0"
        path = f"/v1/responses/{made.json()['id']}"
        assert [http.get(path).status_code for _ in range(3)] == [200] * 3
        assert http.post("/v1/responses", json=body).status_code == 429


# ---- what is kept ---------------------------------------------------------------------------------


def kept(size: int) -> StoredResponse:
    return StoredResponse(b"x" * (size - OVERHEAD), b"")


def names(store: StoredResponses, tenant: str, count: int) -> list[int]:
    """Which of a tenant's are there, without using them."""
    shelf = store._shelves.get(tenant)
    return [n for n in range(count) if shelf is not None and f"{n}" in shelf.responses]


def test_the_response_that_was_not_used_for_longest_goes_first() -> None:
    store = StoredResponses(10_000)
    for n in range(3):
        store.store_response("one", f"{n}", kept(3000))
    store.find("one", "0", "response_id")
    store.store_response("one", "3", kept(3000))
    assert names(store, "one", 4) == [0, 2, 3]
    assert store.size == 9000


def test_a_tenant_that_keeps_many_takes_no_place_of_one_that_keeps_few() -> None:
    store = StoredResponses(20_000)
    store.store_response("few", "0", kept(4000))
    for n in range(50):
        store.store_response("many", f"{n}", kept(2000))
        store.store_response("some", f"{n}", kept(3000))
    assert names(store, "few", 1) == [0]
    assert names(store, "many", 50)[-1] == names(store, "some", 50)[-1] == 49
    assert min(len(names(store, tenant, 50)) for tenant in ("many", "some")) >= 2
    assert store.size <= 20_000


def test_a_response_that_comes_again_takes_the_place_of_the_first_and_no_more() -> None:
    store = StoredResponses(10_000)
    store.store_response("few", "0", kept(2000))
    for size in (*[3000] * 50, 4000):
        store.store_response("again", "0", kept(size))
    assert (names(store, "few", 1), names(store, "again", 1)) == ([0], [0])
    assert (store.size, store.find("again", "0", "response_id").size) == (6000, 4000)
    store.delete("again", "0", "response_id")
    store.delete("few", "0", "response_id")
    assert (store.size, store._shelves) == (0, {})


def test_a_response_larger_than_the_limit_is_not_kept_and_costs_nobody_a_place() -> None:
    store = StoredResponses(10_000)
    store.store_response("few", "0", kept(4000))
    store.store_response("large", "1", kept(4000))
    store.store_response("large", "0", kept(11_000))
    assert (names(store, "few", 1), names(store, "large", 2)) == ([0], [1])
    with pytest.raises(UnknownResponseError, match="--response-memory"):
        store.find("large", "0", "response_id")
    store.delete("few", "0", "response_id")
    store.delete("large", "1", "response_id")
    assert (store.size, store._shelves) == (0, {})
