"""Defaults that come with an adapter: from its folder to the requests for it, over the shared server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onebase_edge.errors import InvalidRequestError
from onebase_protocol.adapters import AdapterDefaults
from onebase_server.requests.defaults import form_of, with_defaults
from onebase_server.requests.planner import Planner
from onebase_server.requests.schemas.generation import GenerateRequest
from onebase_server.requests.schemas.tgi import TgiRequest

TALK = [{"role": "user", "content": "The capital of France is"}]
SYSTEM, INSTRUCTION = "Answer in one word.", "Are you sure?"
DEFAULTS = {
    "description": "Answers yes or no.",
    "system": SYSTEM,
    "instruction": INSTRUCTION,
    "temperature": 0,
    "max_tokens": 3,
    "guided_choice": ["yes", "no"],
    "prompt_prefix": "Query: ",
}
WHOLE = [{"role": "system", "content": SYSTEM}, *TALK, {"role": "user", "content": INSTRUCTION}]


def push(api: Any, name: str, source: str = "red", defaults: Any = None, **files: str) -> Any:
    """The answer to an upload of the adapter `source` under another name."""
    folder: Path = api.adapters[source]
    sent = [
        ("files", (one, (folder / one).read_bytes()))
        for one in ("adapter_config.json", "adapter_model.safetensors")
    ]
    sent += [("files", (one.replace("_", "."), text.encode())) for one, text in files.items()]
    data = {"name": name, "activate": "true"}
    if defaults is not None:
        data["defaults"] = defaults if isinstance(defaults, str) else json.dumps(defaults)
    return api.http.post("/v1/adapters?wait=true", data=data, files=sent)


@pytest.fixture(scope="module", autouse=True)
def _nothing_left(api: Any) -> Iterator[None]:
    """The server's adapters are those of before: other files count them."""
    yield
    for name in {one["name"] for one in api.http.get("/v1/adapters").json()["data"]} - set(api.adapters):
        api.http.delete(f"/v1/adapters/{name}", params={"force": "true"}).raise_for_status()


@pytest.fixture(scope="module")
def careful(api: Any) -> dict[str, Any]:
    """An adapter with defaults, whose weights are those of `red`."""
    answer = push(api, "careful", onebase_json=json.dumps(DEFAULTS))
    assert answer.status_code == 200, answer.text
    version: dict[str, Any] = answer.json()
    return version


def ask(api: Any, **body: Any) -> Any:
    answer = api.http.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(answer: Any) -> tuple[str, int]:
    """The text, and the prompt's tokens."""
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]


def test_they_are_part_of_the_version_and_shown_with_it(api: Any, careful: dict[str, Any]) -> None:
    assert careful["report"]["defaults"] == DEFAULTS
    assert careful["version"] != api.digests["red"]
    again = push(api, "careful", defaults=DEFAULTS).json()
    assert again["version"] == careful["version"]


def test_a_request_has_them_where_it_does_not_say_otherwise(api: Any, careful: dict[str, Any]) -> None:
    form = {"guided_choice": ["yes", "no"], "temperature": 0, "adapter": "red"}
    expected = said(ask(api, messages=WHOLE, max_tokens=3, **form))
    assert said(ask(api, messages=TALK, adapter="careful")) == expected
    chat = {"model": "careful", "messages": TALK}
    answer = api.http.post("/v1/chat/completions", json=chat).json()
    assert (answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]) == expected
    respond = api.http.post("/v1/responses", json={"model": "careful", "input": TALK[0]["content"]}).json()
    assert respond["output"][0]["content"][0]["text"] == expected[0]
    assert respond["usage"]["input_tokens"] == expected[1]
    assert (respond["temperature"], respond["top_p"], respond["max_output_tokens"]) == (0.0, 1.0, 3)
    counted = api.http.post(
        "/v1/responses/input_tokens", json={"model": "careful", "input": TALK[0]["content"]}
    )
    assert counted.json()["input_tokens"] == expected[1]


@pytest.mark.parametrize(
    ("own", "messages"),
    [
        ({"max_tokens": 2, "temperature": 1, "seed": 5}, WHOLE),
        ({"instruction": ""}, WHOLE[:2]),
        ({"instruction": "Why?"}, [*WHOLE[:2], {"role": "user", "content": "Why?"}]),
        ({"guided_regex": "[a-z]{3}"}, WHOLE),
        ({"response_format": {"type": "text"}, "max_tokens": 5}, WHOLE),
    ],
)
def test_a_request_overrules_each(
    api: Any, careful: dict[str, Any], own: dict[str, Any], messages: list[Any]
) -> None:
    form = {"guided_choice": ["yes", "no"]} if "guided_regex" not in own and "max_tokens" not in own else {}
    form |= {"guided_choice": ["yes", "no"]} if own.get("seed") else {}
    plain = {"temperature": 0, "max_tokens": 3, **form, **own, "instruction": None}
    expected = ask(api, messages=messages, adapter="red", **plain)
    assert said(ask(api, messages=TALK, adapter="careful", **own)) == said(expected)


def test_they_can_be_left_aside_and_a_sum_has_none(api: Any, careful: dict[str, Any]) -> None:
    plain = {"messages": TALK, "temperature": 0, "max_tokens": 4}
    expected = said(ask(api, adapter="red", **plain))
    assert said(ask(api, adapter="careful", adapter_defaults=False, **plain)) == expected
    half = [{"name": "careful", "weight": 0.5}, {"name": "blue", "weight": 0.5}]
    red = [{"name": "red", "weight": 0.5}, {"name": "blue", "weight": 0.5}]
    assert said(ask(api, adapter=half, **plain)) == said(ask(api, adapter=red, **plain))


def test_a_reading_request_can_leave_a_default_template_aside(api: Any) -> None:
    push(api, "templated", defaults={"chat_template": "{{ messages[0]['content'] }}"})
    decide = {"messages": TALK, "choices": ["Paris", "Rome"]}
    for route, body in (("/v1/decide", decide), ("/v1/embeddings", {"input": "Paris"})):
        plain = api.http.post(route, json={**body, "model": "red"}).json()
        for given, same in ((False, True), (None, route == "/v1/embeddings")):
            answer = api.http.post(route, json={**body, "model": "templated", "adapter_defaults": given})
            assert answer.status_code == 200, answer.text
            counts = [one["usage"]["prompt_tokens"] for one in (answer.json(), plain)]
            assert (counts[0] == counts[1]) is same


def test_a_message_that_is_continued_has_no_default_form(api: Any, careful: dict[str, Any]) -> None:
    begun = [*TALK, {"role": "assistant", "content": "The capital of France"}]
    body = {"messages": begun, "continue_final_message": True}
    continued = [{"role": "system", "content": SYSTEM}, *begun]
    plain = {"messages": continued, "continue_final_message": True, "temperature": 0, "max_tokens": 3}
    assert said(ask(api, adapter="careful", **body)) == said(ask(api, adapter="red", **plain))


def test_tgis_own_defaults_come_after_the_adapters(api: Any, careful: dict[str, Any]) -> None:
    def text(**parameters: Any) -> str:
        body = {"inputs": "France", "parameters": {"do_sample": False, "stop": [], **parameters}}
        answer = api.http.post("/", json=body)
        assert answer.status_code == 200, answer.text
        found: str = answer.json()[0]["generated_text"]
        return found

    assert text(adapter_id="careful") in ("yes", "no")
    plain = ask(api, prompt="France", adapter="red", temperature=0, max_tokens=100)["choices"][0]["text"]
    assert text(adapter_id="careful", adapter_defaults=False) == plain


@pytest.mark.parametrize(
    ("parameters", "temperature", "tokens"),
    [({}, 0.0, 100), ({"top_p": 0.5}, 1.0, 100), ({"temperature": 0.3, "max_new_tokens": 5}, 0.3, 5)],
)
def test_tgis_request_says_only_what_it_was_given(
    parameters: dict[str, Any], temperature: float, tokens: int
) -> None:
    made = TgiRequest.model_validate({"inputs": "x", "parameters": parameters}).request()
    assert (made.temperature, made.max_tokens) == (
        parameters.get("temperature"),
        parameters.get("max_new_tokens"),
    )
    assert (made.temperature or made.default_temperature) == temperature
    assert (made.max_tokens or made.default_tokens) == tokens
    assert with_defaults(made, AdapterDefaults(temperature=0.7)).temperature == (made.temperature or 0.7)


def test_counted_tokens_are_those_of_a_request_with_them_or_without(
    api: Any, careful: dict[str, Any]
) -> None:
    def count(route: str, field: str, **body: Any) -> int:
        answer = api.http.post(route, json={"messages": TALK, **body})
        assert answer.status_code == 200, answer.text
        found: int = answer.json()[field]
        return found

    for route, field in (("/v1/messages/count_tokens", "input_tokens"), ("/tokenize", "count")):
        plain = count(route, field, model="red")
        whole = ask(api, messages=WHOLE, adapter="red", max_tokens=1)["usage"]["prompt_tokens"]
        assert count(route, field, model="careful") == whole
        assert count(route, field, model="careful", adapter_defaults=False) == plain != whole


@pytest.mark.parametrize(
    "defaults",
    [{"guided_choice": ["." * 4000] * 60}, {"guided_json": {"enum": ["\u4e00" * 80_000]}}],
    ids=["escaped", "of other scripts"],
)
def test_a_form_that_is_too_long_as_a_grammar_is_refused(api: Any, defaults: dict[str, Any]) -> None:
    answer = push(api, "wrong", defaults=json.dumps(defaults, ensure_ascii=False))
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bad_defaults")
    stored = AdapterDefaults(**defaults)
    body = GenerateRequest(prompt="x")
    with pytest.raises(InvalidRequestError, match="adapter_defaults: false") as caught:
        with_defaults(body, stored, form_of(stored))
    assert caught.value.code == "bad_defaults"
    own = GenerateRequest(prompt="x", guided_regex="a")
    assert with_defaults(own, stored, form_of(stored)).grammar == own.grammar


def test_the_form_of_a_version_is_made_once_and_that_of_many_is_not_kept() -> None:
    nothing: Any = SimpleNamespace(base=None)
    planner = Planner(nothing, nothing, nothing, nothing, nothing, nothing)
    report = {"defaults": {"guided_json": {"type": "object"}}}
    first = planner._defaults_of("0", report)
    assert planner._defaults_of("0", report) is first
    for digest in range(1, 200):
        planner._defaults_of(f"{digest}", report)
    assert len(planner._defaults) < 100
    assert planner._defaults_of("0", report) == first


def test_a_prompt_begins_with_the_prefix_once(api: Any, careful: dict[str, Any]) -> None:
    body = {"model": "careful", "prompt": "France", "max_tokens": 2, "echo": True, "guided_regex": "[a-z]+"}
    texts = [
        api.http.post("/v1/completions", json={**body, "prompt": prompt}).json()["choices"][0]["text"]
        for prompt in ("France", "Query: France")
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("Query: France")


def test_the_prefix_is_counted_and_stands_before_texts_whose_vectors_are_computed(
    api: Any, careful: dict[str, Any]
) -> None:
    def post(route: str, **body: Any) -> Any:
        answer = api.http.post(route, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    whole = post("/tokenize", model="red", prompt="Query: France")["tokens"]
    bare = post("/tokenize", model="red", prompt="France")["tokens"]
    for prompt in ("France", "Query: France"):
        assert post("/tokenize", model="careful", prompt=prompt)["tokens"] == whole
    assert post("/tokenize", model="careful", prompt="France", adapter_defaults=False)["tokens"] == bare
    for given, asked in (("Query: France", "France"), ("Query: France", "Query: France"), (bare, bare)):
        mine, red = (
            post("/v1/embeddings", model=model, input=text)
            for model, text in (("careful", asked), ("red", given))
        )
        assert mine["data"] == red["data"]
        assert mine["usage"] == red["usage"]
    pair = {"text_1": "France", "text_2": "Paris"}
    prefixed = {"text_1": "Query: France", "text_2": "Query: Paris"}
    assert post("/score", model="careful", **pair)["data"] == post("/score", model="red", **prefixed)["data"]


def test_a_thought_is_ended_when_its_budget_is_spent(api: Any) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<issue_start>"
        "{{ m.reasoning_content }}<issue_closed>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<issue_start>{% endif %}"
    )
    push(api, "thinker", defaults={"chat_template": template})
    body = {"model": "thinker", "messages": TALK, "temperature": 0, "max_tokens": 24}

    def chat(**more: Any) -> tuple[str, str, int]:
        answer = api.http.post("/v1/chat/completions", json=body | {"ignore_eos": True} | more)
        assert answer.status_code == 200, answer.text
        message, usage = answer.json()["choices"][0]["message"], answer.json()["usage"]
        used = usage["completion_tokens_details"]["reasoning_tokens"]
        return message.get("reasoning_content", ""), message["content"], used

    free, bounded = chat(), chat(thinking_token_budget=5)
    assert (free[1], free[2]) == ("", 24)
    assert free[0].startswith(bounded[0])
    assert bounded[1]
    assert 5 <= bounded[2] < 10, "with its end, and the space behind that"
    thought, text = api.http.post(
        "/v1/messages", json=body | {"thinking": {"type": "enabled", "budget_tokens": 5}}
    ).json()["content"]
    assert thought["thinking"] == bounded[0]
    assert bounded[1].startswith(text["text"])
    lines = api.http.post("/generate", json={**_generated(body), "stream": True}).text.split("\n\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event.get("reasoning", "") for event in events) == bounded[0]
    assert "".join(event.get("text", "") for event in events) == bounded[1]


def _generated(body: dict[str, Any]) -> dict[str, Any]:
    """The request for /generate, with a budget."""
    rest = {name: value for name, value in body.items() if name != "model"}
    return {**rest, "adapter": body["model"], "ignore_eos": True, "thinking_token_budget": 5}


def test_another_version_brings_its_own_and_a_rollback_those_of_before(api: Any) -> None:
    template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    push(api, "switched", defaults={"guided_choice": ["one"], "chat_template": template})
    first = ask(api, messages=TALK, adapter="switched")
    push(api, "switched", defaults={"guided_choice": ["two"], "invocation": "<|im_start|>judge\n"})
    second = ask(api, messages=TALK, adapter="switched")
    api.http.post("/v1/adapters/switched/rollback")
    third = ask(api, messages=TALK, adapter="switched")

    texts = [answer["choices"][0]["text"] for answer in (first, second, third)]
    assert texts == ["one", "two", "one"]
    assert first["usage"]["prompt_tokens"] == third["usage"]["prompt_tokens"]
    plain = api.http.post("/tokenize", json={"prompt": f"{TALK[0]['content']}|", "add_special_tokens": False})
    assert first["usage"]["prompt_tokens"] == len(plain.json()["tokens"])
    usual = {"messages": TALK, "adapter": "switched", "adapter_defaults": False, "max_tokens": 1}
    begun = ask(api, **usual, add_generation_prompt=False)["usage"]["prompt_tokens"]
    marks = api.http.post("/tokenize", json={"prompt": "judge\n", "add_special_tokens": False}).json()[
        "tokens"
    ]
    assert second["usage"]["prompt_tokens"] == begun + 1 + len(marks)


def test_judges_ask_what_their_adapters_ask(api: Any, careful: dict[str, Any]) -> None:
    body = {"messages": TALK, "requests": [{"adapter": "careful"}, {"adapter": "careful"}], "stream": False}
    answered = api.http.post("/generate/many", json=body).json()["data"]
    alone = ask(api, messages=TALK, adapter="careful")
    assert [one["answer"]["choices"] for one in answered] == [alone["choices"]] * 2


@pytest.mark.parametrize(
    ("defaults", "status", "said"),
    [
        ({"temprature": 1}, 400, "Did you mean temperature?"),
        ("{", 400, "defaults"),
        ("x" * (300 << 10), 400, "over"),
    ],
)
def test_wrong_ones_are_refused_at_upload(api: Any, defaults: Any, status: int, said: str) -> None:
    for answer in (
        push(api, "wrong", defaults=defaults),
        push(api, "wrong", onebase_json=defaults if isinstance(defaults, str) else json.dumps(defaults)),
    ):
        assert answer.status_code == status
        assert (
            said in answer.json()["error"]["message"] or "onebase.json" in answer.json()["error"]["message"]
        )


def test_what_of_a_vendors_file_is_not_used_is_a_warning(api: Any) -> None:
    version = push(api, "vendor", Modelfile='SYSTEM "Hi"\nTEMPLATE "x"').json()
    assert version["report"]["defaults"]["system"] == "Hi"
    assert "TEMPLATE is not used" in version["report"]["warnings"][0]
    large = push(api, "vendor", Modelfile="# a license\n" * 10_000).json()
    assert "Modelfile is over" in large["report"]["warnings"][0]
