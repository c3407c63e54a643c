from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, TypeAdapter

from onebase import AdapterWeight, Message
from onebase._core.requests import generate, model
from onebase.types import Choice, Generation, Timing, Usage


def body(prompt: str | None = "hi", messages: Any = None, adapter: Any = None, **sampling: Any) -> Any:
    call = generate(prompt, messages, adapter, sampling, stream=False)  # type: ignore[arg-type]
    assert call.body is not None
    return json.loads(call.body)


def test_fields_that_were_not_given_are_not_sent() -> None:
    assert body() == {"prompt": "hi", "adapter": None, "stream": False}


def test_each_way_to_write_an_adapter_reaches_the_server_as_the_contract_says() -> None:
    terms = [{"name": "a", "weight": 0.7}, {"name": "b", "weight": 0.3}]
    assert body(adapter="a@3f2a")["adapter"] == "a@3f2a"
    assert body(adapter={"a": 0.7, "b": 0.3})["adapter"] == terms
    assert body(adapter=[AdapterWeight("a", 0.7), AdapterWeight("b", 0.3)])["adapter"] == terms
    assert body(adapter=terms)["adapter"] == terms
    assert body(adapter=(AdapterWeight("a"),))["adapter"] == [{"name": "a", "weight": 1.0}]


def test_each_way_to_write_messages_reaches_the_server_as_the_contract_says() -> None:
    user = {"role": "user", "content": "héllo 🙂"}
    assert body(None, "héllo 🙂")["messages"] == [user]
    assert body(None, [Message("user", "héllo 🙂")])["messages"] == [user]
    assert body(None, [user])["messages"] == [user]
    assert "prompt" not in body(None, [user])


def test_sampling_fields_are_sent_as_json_has_them() -> None:
    sent = body(temperature=0, logit_bias={42: -5.0}, stop=("a", "b"), stop_token_ids=(1, 2), seed=None)
    assert sent["logit_bias"] == {"42": -5.0}
    assert sent["stop"] == ["a", "b"]
    assert sent["stop_token_ids"] == [1, 2]
    assert sent["temperature"] == 0
    assert sent["seed"] is None


def test_one_stop_string_stays_a_string() -> None:
    assert body(stop="END")["stop"] == "END"


class Place(BaseModel):
    city: str
    floors: int = 1


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")

    kept: dict[str, int] = {"type": 1}


def test_what_the_text_must_be_reaches_the_server_as_the_contract_says() -> None:
    schema = {"type": "integer"}
    assert body(schema=schema)["guided_json"] == schema
    assert body(schema=Place)["guided_json"] == Place.model_json_schema()
    assert body(schema=Open)["guided_json"] == Open.model_json_schema()
    places = TypeAdapter(list[Place])
    assert body(schema=places)["guided_json"] == places.json_schema()
    assert body(schema=TypeAdapter(list[int]))["guided_json"] == {
        "type": "array",
        "items": {"type": "integer"},
    }
    assert body(regex="a+")["guided_regex"] == "a+"
    assert body(choices=("a", "b"))["guided_choice"] == ["a", "b"]
    assert body(grammar="start: A")["guided_grammar"] == "start: A"
    assert not {"schema", "regex", "choices", "grammar"} & body(schema=Place, regex="a").keys()


def answer(text: str, schema: object = None, finish: str = "stop") -> Generation:
    return Generation("g", (Choice(0, text, finish),), None, Usage(1, 1), Timing(0, 0, 0), schema)


def test_an_answer_is_what_its_schema_says() -> None:
    whole = '{"city": "Rom"}'
    assert answer(whole, Place).parsed == Place(city="Rom")
    assert answer("[1, 2]", TypeAdapter(tuple[int, ...])).parsed == (1, 2)
    assert answer(whole, {"type": "object"}).parsed == answer(whole).parsed == {"city": "Rom"}
    for text in ('{"city": "Ro', "12"):
        with pytest.raises(ValueError, match=r"not whole.*raise max_tokens"):
            _ = answer(text, Place, "length").parsed
    with pytest.raises(ValueError, match="no schema was given"):
        _ = answer("Rom").parsed
    with pytest.raises(ValueError, match="a stop string or echo"):
        _ = answer('{"city', Place).parsed
    with pytest.raises(ValueError, match="city"):
        _ = answer('{"floors": 2}', Place).parsed


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"schema": 5}, TypeError, "schema is a int"),
        ({"prompt": None}, ValueError, "either prompt"),
        ({"messages": "hi"}, ValueError, "either prompt"),
        ({"prompt": None, "messages": []}, ValueError, "messages is empty"),
        ({"adapter": {}}, ValueError, "adapter is an empty sum"),
        ({"temprature": 1}, TypeError, "unknown field 'temprature'; there are: temperature"),
        ({"temperature": float("nan")}, ValueError, "temperature cannot be sent"),
        ({"adapter": {"a": float("inf")}}, ValueError, "adapter cannot be sent"),
        ({"seed": object()}, TypeError, "seed cannot be sent"),
        ({"prompt": "\udcff"}, ValueError, "prompt cannot be sent"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_sent(
    arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        body(**arguments)


def test_a_model_name_cannot_change_the_path() -> None:
    assert model("a/../b?x=1").path == "/v1/models/a%2F..%2Fb%3Fx%3D1"
    assert model("acme@3f2a").path == "/v1/models/acme@3f2a"
