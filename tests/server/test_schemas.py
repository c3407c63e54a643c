"""Bodies are checked strictly, and each refusal names the field and what would be right."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from onebase_server.inference.json_schema import closed
from onebase_server.requests.schemas.generation import GenerateRequest
from onebase_server.requests.schemas.openai import ChatRequest, CompletionRequest
from onebase_server.requests.schemas.wire import Wire, validation_error

USER = [{"role": "user", "content": "hi"}]


def refusal(model: type[Wire], body: dict[str, Any]) -> tuple[str, str | None]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    return validation_error(caught.value.errors())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("seed", 2**64),
        ("seed", "1"),
        ("n", 0),
        ("n", 129),
        ("max_tokens", -1),
        ("max_tokens", 10**9),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("logprobs", -1),
        ("stop", ""),
        ("stop", "x" * 257),
        ("stop", ["x"] * 17),
        ("timeout_s", 0),
        ("logit_bias", {"x": 1.0}),
        ("logit_bias", {"-1": 1.0}),
        ("logit_bias", {str(i): 1.0 for i in range(1025)}),
        ("adapter", []),
        ("adapter", [{"name": "a", "weight": 1.0}] * 17),
        ("stream", "yes"),
        ("nonsense", 1),
    ],
)
def test_a_value_out_of_its_limits_is_refused_by_the_name_of_its_field(field: str, value: object) -> None:
    message, param = refusal(GenerateRequest, {"prompt": "hi", field: value})

    assert param == field
    assert message.startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "hi", "stop": ["ok", ""]}, "stop[1]"),
        ({"prompt": "hi", "stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
        ({"prompt": "hi", "logit_bias": {"5": float("nan")}}, "logit_bias"),
        ({"prompt": "hi", "adapter": [{"name": "a", "weight": float("inf")}]}, "adapter[0].weight"),
        ({"prompt": "hi", "adapter": [{"name": "a", "weight": 1e9}]}, "adapter[0].weight"),
        ({"prompt": "hi", "adapter": [{"weight": 1.0}]}, "adapter[0].name"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": []}, "messages"),
        ({"prompt": "hi", "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"prompt": "hi", "messages": USER}, "prompt"),
        ({}, "prompt"),
    ],
)
def test_a_wrong_part_is_refused_by_its_path(body: dict[str, Any], param: str) -> None:
    message, found = refusal(GenerateRequest, body)

    assert found is not None
    assert found.startswith(param)
    assert param.split("[")[0] in message


@pytest.mark.parametrize(
    "field",
    [
        "functions",
        "function_call",
        "audio",
        "prediction",
        "web_search_options",
    ],
)
def test_a_chat_field_that_would_change_the_answer_is_refused_by_name(field: str) -> None:
    message, param = refusal(ChatRequest, {"model": "m", "messages": USER, field: {"x": 1}})

    assert param == field
    assert "does not support" in message


SCHEMA = {
    "type": "object",
    "properties": {"schema": {"const": "json"}},
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("field", "value", "kind", "text"),
    [
        ("response_format", {"type": "json_object"}, "json_schema", '{"type":"object"}'),
        (
            "response_format.json_schema.schema",
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            "json_schema",
            json.dumps(SCHEMA),
        ),
        ("guided_json", SCHEMA, "json_schema", json.dumps(SCHEMA)),
        ("guided_json", json.dumps(SCHEMA), "json_schema", json.dumps(SCHEMA)),
        ("guided_regex", "[a-z]+", "regex", "[a-z]+"),
        ("guided_choice", ["a.b", "c/\\\n"], "regex", "a\\.b|c\\/\\\\\n"),
        ("guided_grammar", 'start: "x"', "grammar", 'start: "x"'),
        ("structured_outputs.json", {"json": SCHEMA}, "json_schema", json.dumps(SCHEMA)),
        ("structured_outputs.regex", {"regex": "a"}, "regex", "a"),
        ("structured_outputs.choice", {"choice": ["a"]}, "regex", "a"),
        ("structured_outputs.grammar", {"grammar": "g"}, "grammar", "g"),
        ("structured_outputs.json_object", {"json_object": True}, "json_schema", '{"type":"object"}'),
    ],
)
def test_what_the_text_must_be_is_read_whichever_way_it_is_written(
    field: str, value: object, kind: str, text: str
) -> None:
    name = field.partition(".")[0]
    for model, body in (
        (GenerateRequest, {"prompt": "hi"}),
        (ChatRequest, {"model": "m", "messages": USER}),
        (CompletionRequest, {"model": "m", "prompt": "hi"}),
    ):
        found = model.model_validate({**body, name: value}).grammar
        assert found is not None
        assert (found.param, found.grammar.kind, found.grammar.text) == (field, kind, text)
        assert model.model_validate({**body, "response_format": {"type": "text"}}).grammar is None


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "goes with"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
            "response_format.json_schema",
            "goes with",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
            "must be an object",
        ),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "guided_json says what the text must be"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
            "response_format says",
        ),
        ({"guided_json": {"enum": ["x" * 300_000]}}, "guided_json", "262144"),
        ({"guided_regex": "x" * 300_000}, "guided_regex", "262144"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_choice": ["a"] * 1025}, "guided_choice", "1024"),
        ({"guided_choice": [""]}, "guided_choice[0]", "at least 1"),
        ({"guided_json": [1]}, "guided_json", "object"),
        ({"guided_json": "true"}, "guided_json", "is no JSON object"),
        ({"guided_json": "{"}, "guided_json", "is no JSON object"),
        ({"guided_json": "[" * 100_000}, "guided_json", "is no JSON object"),
        ({"structured_outputs": {}}, "structured_outputs.json", "give one of"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "does not know this field"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "guided_regex says where the text ends"),
    ],
)
def test_what_the_text_must_be_is_checked(body: dict[str, Any], param: str, says: str) -> None:
    message, found = refusal(GenerateRequest, {"prompt": "hi", **body})
    assert found == param
    assert says in message


@pytest.mark.parametrize(("field", "value"), [("suffix", "end"), ("best_of", 2)])
def test_a_completion_field_that_would_change_the_answer_is_refused_by_name(
    field: str, value: object
) -> None:
    _, param = refusal(CompletionRequest, {"model": "m", "prompt": "hi", field: value})

    assert param == field


def test_fields_that_change_nothing_are_accepted() -> None:
    body = {
        "model": "m",
        "messages": USER,
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "reasoning_effort": "low",
        "add_generation_prompt": True,
        "continue_final_message": False,
        "chat_template_kwargs": {},
        "skip_special_tokens": True,
        "use_beam_search": False,
        "length_penalty": 1.0,
        "top_k": -1,
        "frequency_penalty": None,
        "stop": None,
    }

    request = ChatRequest.model_validate(body)

    assert request.model == "m"


def test_a_message_may_say_who_speaks_and_how_to_cache_it() -> None:
    hint = {"cache_control": {"type": "ephemeral"}}
    parts = [{"type": "text", "text": "hi", **hint}]
    message = {"role": "user", "name": "Ann", "content": parts, **hint}

    request = ChatRequest.model_validate({"model": "m", "messages": [message]})

    assert request.messages[0].rendered() == {"role": "user", "content": "hi", "name": "Ann"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_beam_search", True),
        ("length_penalty", 2.0),
        ("prompt_logprobs", -1),
        ("top_k", -2),
        ("reasoning_effort", "very"),
    ],
)
def test_a_value_that_would_change_the_answer_is_refused_by_name(field: str, value: object) -> None:
    _, param = refusal(ChatRequest, {"model": "m", "messages": USER, field: value})

    assert param == field


def test_an_answer_sent_back_with_empty_extras_is_a_message() -> None:
    message = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "annotations": []}

    request = ChatRequest.model_validate({"model": "m", "messages": [message]})

    assert request.messages[0].rendered() == {"role": "assistant", "content": "hi"}


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth else {}


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
TOOL = {"type": "function", "function": {"name": "f", "strict": None, "parameters": {"type": "object"}}}


def test_calls_and_their_answers_are_handed_to_the_template() -> None:
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [CALL | {"index": 0}],
        "function_call": None,
    }
    result = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "fine"}]}

    request = ChatRequest.model_validate({"model": "m", "messages": [*USER, called, result]})

    function = {"name": "f", "arguments": {"a": [1]}}
    assert [message.rendered() for message in request.messages[1:]] == [
        {"role": "assistant", "content": "", "tool_calls": [CALL | {"function": function}]},
        {"role": "tool", "content": "fine", "tool_call_id": "call_1"},
    ]
    assert [message.is_of_tools for message in request.messages] == [False, True, True]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "tool_calls[0].function"),
        ({"role": "user", "content": "", "tool_calls": [CALL]}, "tool_calls"),
        ({"role": "user", "content": "", "tool_call_id": "1"}, "tool_call_id"),
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "tool", "content": None}, "content"),
        ({"role": "function", "content": "x"}, "role"),
        ({"role": "assistant", "tool_calls": [CALL] * 129}, "tool_calls"),
        *(
            (
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": text}}]},
                "tool_calls[0].function.arguments",
            )
            for text in (
                "[1",
                "[1]",
                "a",
                '{"a": 1}b',
                '{"a": 1e999',
                "[" * 100_000,
                '{"a": NaN}',
                json.dumps(nested(70)),
            )
        ),
    ],
)
def test_a_wrong_call_is_refused_by_its_path(message: dict[str, Any], param: str) -> None:
    _, found = refusal(ChatRequest, {"model": "m", "messages": [message]})

    assert found == f"messages[0].{param}"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"function": {"name": "f g"}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "f" * 129}}]}, "tools[0].function.name"),
        ({"tools": [{"function": {"name": "f", "description": 1}}]}, "tools[0].function.description"),
        ({"tools": [{"function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict"),
        ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [{"function": {"name": "f", "parameters": nested(400)}}]}, "tools[0]"),
        ({"chat_template_kwargs": {"a": nested(70)}}, "chat_template_kwargs"),
        ({"tools": [TOOL] * 2}, "tools"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"adapter": "a", "adapter_id": "b"}, "adapter_id"),
        ({"tools": [TOOL], "ignore_eos": True}, "ignore_eos"),
        ({"tools": [TOOL], "guided_regex": "a"}, "guided_regex"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ],
)
def test_wrong_tools_are_refused_by_their_path(fields: dict[str, Any], param: str) -> None:
    for request in (ChatRequest, GenerateRequest):
        named = {"model": "m"} if request is ChatRequest else {}
        _, found = refusal(request, {"messages": USER, **named, **fields})
        assert found == param


THING = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
CLOSED = THING | {"additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "kept"),
    [
        (THING, CLOSED),
        (CLOSED, CLOSED),
        (THING | {"additionalProperties": True}, THING | {"additionalProperties": True}),
        (THING | {"required": ["b"]}, THING | {"required": ["b"]}),
        ({"type": "object"}, {"type": "object"}),
        (THING | {"required": [["a"]]}, THING | {"required": [["a"]]}),
        (THING | {"required": 5}, THING | {"required": 5}),
        ({"properties": 5, "required": {"a": 1}}, {"properties": 5, "required": {"a": 1}}),
        ({"type": "array", "items": THING}, {"type": "array", "items": CLOSED}),
        ({"$defs": {"T": THING}, "$ref": "#/$defs/T"}, {"$defs": {"T": CLOSED}, "$ref": "#/$defs/T"}),
        ({"anyOf": [THING, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
        ({"enum": [{"properties": {}}]}, {"enum": [{"properties": {}}]}),
        *(
            (scattered, scattered)
            for scattered in (
                {"allOf": [THING, {"properties": {"b": {"type": "null"}}}]},
                THING | {"anyOf": [{"properties": {"b": {"type": "null"}}}]},
                {"if": THING, "then": {"properties": {"b": {"type": "null"}}}},
            )
        ),
    ],
)
def test_objects_have_no_other_properties_than_are_described(schema: Any, kept: Any) -> None:
    for given in (schema, json.dumps(schema)):
        request = GenerateRequest.model_validate({"prompt": "a", "guided_json": given})
        assert request.grammar is not None
        assert json.loads(request.grammar.grammar.text) == kept


def test_an_unknown_field_that_is_null_is_not_given() -> None:
    wanted = {"type": "json_object", "newer": None}
    request = GenerateRequest.model_validate({"prompt": "a", "response_format": wanted, "later": None})
    assert request.grammar is not None
    _, param = refusal(GenerateRequest, {"prompt": "a", "response_format": wanted | {"newer": 1}})
    assert param == "response_format.newer"


def test_a_json_object_may_have_its_schema_as_tgi_writes_it() -> None:
    wanted = {"type": "json_object", "value": THING}
    request = GenerateRequest.model_validate({"prompt": "a", "response_format": wanted})
    assert request.grammar is not None
    assert json.loads(request.grammar.grammar.text) == CLOSED
    _, param = refusal(GenerateRequest, {"prompt": "a", "response_format": wanted | {"type": "text"}})
    assert param == "response_format.value"


def test_a_list_that_is_too_long_says_how_long_it_may_be() -> None:
    message, param = refusal(GenerateRequest, {"prompt": "a", "stop": ["x"] * 17})
    assert (message, param) == ("stop: has more than the 16 entries that are taken. Send fewer.", "stop")


def test_what_goes_with_messages_is_refused_beside_a_prompt() -> None:
    for field in ({"tools": [TOOL]}, {"chat_template_kwargs": {"a": 1}}, {"continue_final_message": True}):
        _, param = refusal(GenerateRequest, {"prompt": "hi", **field})
        assert [param] == list(field)


def test_a_choice_of_tools_says_which_may_and_which_must_be_called() -> None:
    def wanted(choice: object) -> tuple[bool, bool, list[str]]:
        tools = [TOOL, {"function": {"name": "g"}}]
        request = ChatRequest.model_validate(
            {"model": "m", "messages": USER, "tools": tools, "tool_choice": choice}
        )
        return request.calls_tools, request.must_call, request.callable_names

    only_g = {"type": "function", "function": {"name": "g"}}
    some = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [only_g]}}
    assert wanted(None) == wanted("auto") == (True, False, ["f", "g"])
    assert wanted("none")[0] is False
    assert wanted("required") == (True, True, ["f", "g"])
    assert wanted(only_g) == (True, True, ["g"])
    assert wanted(some) == (True, False, ["g"])


def test_text_parts_are_joined_and_other_parts_refused() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]

    request = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": parts}]})
    image = {"type": "image_url", "image_url": {"url": "http://x"}}
    _, param = refusal(ChatRequest, {"model": "m", "messages": [{"role": "user", "content": [image]}]})

    assert request.messages[0].rendered()["content"] == "one two"
    assert param is not None
    assert param.startswith("messages[0].content[0]")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", ["hi"]),
        (["hi", "ho"], ["hi", "ho"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_completion_takes_every_form_of_prompt(prompt: object, expected: list[object]) -> None:
    request = CompletionRequest.model_validate({"model": "m", "prompt": prompt})

    assert request.prompts() == expected


@pytest.mark.parametrize("prompt", [[], [[]], [1, "x"], [-1], ["x"] * 65, None, {"a": 1}])
def test_what_is_no_prompt_is_refused(prompt: object) -> None:
    _, param = refusal(CompletionRequest, {"model": "m", "prompt": prompt})

    assert param is not None
    assert param.startswith("prompt")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_chat_fields_that_do_not_go_together_are_refused(body: dict[str, Any], param: str) -> None:
    _, found = refusal(ChatRequest, {"model": "m", "messages": USER, **body})

    assert found == param


def test_a_call_that_was_cut_is_taken_as_far_as_it_goes() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"city": "Zür'}}
    message = {"role": "assistant", "tool_calls": [call]}
    (found,) = ChatRequest.model_validate({"model": "m", "messages": [message]}).messages
    (rendered,) = found.rendered()["tool_calls"]
    assert rendered["function"]["arguments"] == {"city": "Zür"}


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_what_is_no_text_is_refused_as_such(kind: str) -> None:
    content = [{"type": "text", "text": "What is it?"}, {"type": kind, kind: {}}]
    message, param = refusal(ChatRequest, {"model": "m", "messages": [{"role": "user", "content": content}]})
    assert (param, "only text is" in message) == ("messages[0].content[1].type", True)


@pytest.mark.parametrize("format", ["date-time", "time", "duration", "hostname", "email", "uri"])
def test_strings_of_a_format_have_an_end_unless_the_schema_says_their_length(format: str) -> None:
    text = {"type": "string", "format": format}
    schema = {"anyOf": [text, {"type": "null"}, {**text, "maxLength": 9999}, {**text, "minLength": 1}]}
    bounded, null, *others = closed(schema)["anyOf"]
    assert bounded["maxLength"] <= 2048
    assert [null, *others] == schema["anyOf"][1:]
