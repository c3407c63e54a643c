"""POST /generate on the real engine: text, adapters, streams, logprobs, limits and errors."""

from __future__ import annotations

import json
import math
import threading
from typing import Any

import pytest
from huggingface_hub import InferenceClient

from onebase_server.inference.tokenization import BaseTokenizer, TemplateInput

from .support import one_server

FRANCE = "The capital of France is"


def error_of(api: Any, status: int, **body: Any) -> dict[str, Any]:
    answer = api.http.post("/generate", json=body)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def text_of(events: list[Any], index: int = 0) -> str:
    return "".join(event["text"] for event in events[:-1] if event.get("index") == index)


def test_the_base_answers_with_text_usage_and_timing(api: Any, tokenizer: BaseTokenizer) -> None:
    answer = api.generate(prompt=FRANCE)

    (choice,) = answer["choices"]
    assert choice["text"].startswith(" Paris")
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert answer["object"] == "generation"
    assert answer["adapter"] is None
    assert answer["usage"]["prompt_tokens"] == len(tokenizer.encode(FRANCE))
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["timing"]["ttft_s"] > answer["timing"]["queue_s"] >= 0
    assert answer["timing"]["decode_s"] > 0


def test_a_stream_has_the_same_text_and_ends_with_usage_and_done(api: Any) -> None:
    whole = api.generate(prompt=FRANCE)

    events = api.events("/generate", prompt=FRANCE, temperature=0, max_tokens=6)

    assert text_of(events) == whole["choices"][0]["text"]
    assert events[-1] == "[DONE]"
    assert events[-2]["done"] is True
    assert events[-2]["usage"]["completion_tokens"] == 6
    assert events[-3]["finish_reason"] == "length"
    assert len({event["id"] for event in events[:-1]}) == 1


def test_base_and_adapters_in_one_batch_answer_as_they_do_alone(api: Any) -> None:
    names = [None, "red", "blue", None, "red"]
    alone = {name: api.generate(prompt=FRANCE, adapter=name)["choices"][0]["text"] for name in set(names)}
    together: dict[int, str] = {}

    def ask(index: int) -> None:
        together[index] = api.generate(prompt=FRANCE, adapter=names[index])["choices"][0]["text"]

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(alone.values())) == 3
    assert [together[index] for index in range(len(names))] == [alone[name] for name in names]


def test_a_version_and_its_beginning_name_the_same_adapter(api: Any) -> None:
    digest = api.digests["red"]

    answers = [
        api.generate(prompt=FRANCE, adapter=name) for name in ("red", f"red@{digest}", f"red@{digest[:8]}")
    ]

    assert {answer["adapter"] for answer in answers} == {f"red@{digest[:12]}"}
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1


def test_a_weighted_list_is_the_sum_of_its_terms(api: Any) -> None:
    single = api.generate(prompt=FRANCE, adapter="red")
    halves = [{"name": "red", "weight": 0.5}, {"name": "red", "weight": 0.5}, {"name": "blue", "weight": 0.0}]

    summed = api.generate(prompt=FRANCE, adapter=halves)

    assert summed["choices"][0]["text"] == single["choices"][0]["text"]
    assert [term["weight"] for term in summed["adapter"]] == [0.5, 0.5, 0.0]
    assert summed["adapter"][0]["name"] == f"red@{api.digests['red'][:12]}"


def test_messages_go_through_the_bases_own_chat_template(api: Any, tokenizer: BaseTokenizer) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]

    answer = api.generate(messages=messages)

    assert answer["choices"][0]["text"] == "The capital of France is Paris"
    assert answer["usage"]["prompt_tokens"] == len(tokenizer.encode_chat(TemplateInput(messages)))


@one_server
def test_a_stop_string_never_shows_in_a_stream_and_frees_the_row(api: Any) -> None:
    plain = api.generate(prompt=FRANCE)["choices"][0]["text"]
    stop = plain[4:9]

    events = api.events("/generate", prompt=FRANCE, temperature=0, max_tokens=500, stop=["zzz", stop])

    assert text_of(events) == plain[: plain.index(stop)]
    assert events[-3]["finish_reason"] == "stop"
    api.server.wait_for(lambda: api.http.get("/status").json()["requests"] == 0)


def test_a_stop_token_ends_the_text_before_itself(api: Any, tokenizer: BaseTokenizer) -> None:
    plain = api.generate(prompt=FRANCE)["choices"][0]["text"]
    token = tokenizer.encode(plain)[2]

    answer = api.generate(prompt=FRANCE, stop_token_ids=[token])

    assert answer["choices"][0]["text"] == tokenizer.decode(tokenizer.encode(plain)[:2])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 3


def test_n_choices_differ_and_a_seed_repeats_them(api: Any) -> None:
    body = {"prompt": "Once upon a time", "temperature": 1.2, "n": 3, "seed": 7}

    first, second = (api.generate(**body)["choices"] for _ in range(2))

    assert [choice["index"] for choice in first] == [0, 1, 2]
    assert len({choice["text"] for choice in first}) > 1
    assert [choice["text"] for choice in first] == [choice["text"] for choice in second]


def test_without_a_seed_two_requests_differ(api: Any) -> None:
    texts = {api.generate(prompt="Once upon a time", temperature=1.5)["choices"][0]["text"] for _ in range(3)}

    assert len(texts) > 1


def test_emoji_cjk_and_combining_marks_stream_as_valid_text(api: Any) -> None:
    prompt = "🎉👩‍👩‍👧‍👦 漢字 e\u0301 🎉👩‍👩‍👧‍👦 漢字 e\u0301 🎉👩‍👩‍👧‍👦"

    events = api.events("/generate", prompt=prompt, temperature=0, max_tokens=6, ignore_eos=True)
    whole = api.generate(prompt=prompt, ignore_eos=True)

    assert text_of(events) == whole["choices"][0]["text"]


def test_tokens_that_are_half_a_character_stay_out_of_a_stream(api: Any, tokenizer: BaseTokenizer) -> None:
    """A bias forces the first token of an emoji again and again: the text is its bytes' decoding."""
    first, *_ = tokenizer.encode("🦩")
    body = {"prompt": "bird", "temperature": 0, "max_tokens": 3, "logit_bias": {str(first): 100}}

    events = api.events("/generate", **body)

    assert text_of(events) == tokenizer.decode([first] * 3)


def test_logprobs_add_up_to_the_text(api: Any) -> None:
    choice = api.generate(prompt=FRANCE, logprobs=3)["choices"][0]
    logprobs = choice["logprobs"]

    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == [
        len("".join(logprobs["tokens"][:position])) for position in range(len(logprobs["tokens"]))
    ]
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert value <= 0
        assert top[token] == pytest.approx(max(top.values()))
        assert sum(math.exp(other) for other in top.values()) <= 1 + 1e-5


def test_streamed_logprobs_are_those_of_the_whole_answer(api: Any) -> None:
    whole = api.generate(prompt=FRANCE, logprobs=2)["choices"][0]["logprobs"]

    events = api.events("/generate", prompt=FRANCE, temperature=0, max_tokens=6, logprobs=2)

    parts = [event["logprobs"] for event in events[:-1] if event.get("logprobs")]
    for field, values in whole.items():
        joined = [value for part in parts for value in part[field]]
        if field == "token_logprobs":
            assert joined == pytest.approx(values)
        elif field != "top_logprobs":
            assert joined == values


def test_echo_begins_with_the_prompt_and_scores_it(api: Any, tokenizer: BaseTokenizer) -> None:
    choice = api.generate(prompt=FRANCE, echo=True, logprobs=1)["choices"][0]
    prompt = tokenizer.encode(FRANCE)

    assert choice["text"].startswith(FRANCE + " Paris")
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert choice["logprobs"]["token_ids"][: len(prompt)] == prompt
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"][1:])


def test_echo_without_new_tokens_scores_the_prompt_alone(api: Any) -> None:
    answer = api.generate(prompt=FRANCE, echo=True, logprobs=0, max_tokens=0)

    assert answer["choices"][0]["text"] == FRANCE
    assert answer["choices"][0]["finish_reason"] == "length"
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 0


@one_server
def test_a_repeated_prompt_hits_the_prefix_cache(api: Any) -> None:
    prompt = "A long shared beginning that fills more than one block of the cache. " * 6

    api.generate(prompt=prompt, max_tokens=1)
    again = api.generate(prompt=prompt, max_tokens=1)

    assert 0 < again["usage"]["cached_tokens"] < again["usage"]["prompt_tokens"]


def test_a_deadline_ends_the_request_with_what_there_is(api: Any) -> None:
    answer = api.generate(prompt=FRANCE, max_tokens=4000, ignore_eos=True, timeout_s=3)

    assert answer["choices"][0]["finish_reason"] == "cancelled"
    assert 0 < answer["usage"]["completion_tokens"] < 4000
    assert answer["choices"][0]["text"]


@one_server
def test_a_caller_who_leaves_frees_the_row(api: Any) -> None:
    with api.http.stream(
        "POST",
        "/generate",
        json={"prompt": FRANCE, "max_tokens": 4000, "ignore_eos": True, "stream": True},
    ) as answer:
        lines = answer.iter_lines()  # which, forgotten, would close the connection
        assert next(lines).startswith("data: ")
        assert api.http.get("/status").json()["requests"] == 1

    api.server.wait_for(lambda: api.http.get("/status").json()["requests"] == 0)
    api.server.wait_for(lambda: api.http.get("/status").json()["stats"]["sequences_running"] == 0)


@one_server
def test_a_caller_who_leaves_without_a_stream_frees_the_row(api: Any) -> None:
    body = {"prompt": FRANCE, "max_tokens": 4000, "ignore_eos": True}

    with api.server.client(timeout=1.0) as impatient, pytest.raises(Exception, match="timed out"):
        impatient.post("/generate", json=body)

    api.server.wait_for(lambda: api.http.get("/status").json()["stats"]["sequences_running"] == 0)


def test_hugging_faces_client_gets_texts_tokens_and_streams(api: Any) -> None:
    with InferenceClient(model=api.server.url, token="none") as client:
        whole = client.text_generation(FRANCE, max_new_tokens=6, details=True, top_n_tokens=2)
        plain = api.generate(prompt=FRANCE, max_tokens=6, temperature=0, logprobs=2)["choices"][0]
        assert whole.generated_text == plain["text"]
        assert whole.details.finish_reason == "length"
        assert whole.details.generated_tokens == 6
        assert [token.id for token in whole.details.tokens] == plain["logprobs"]["token_ids"]
        assert all(len(top) == 2 for top in whole.details.top_tokens)
        parts = list(client.text_generation(FRANCE, max_new_tokens=6, stream=True, details=True))
        assert "".join(part.token.text for part in parts) == parts[-1].generated_text == plain["text"]
        assert parts[-1].details.finish_reason == "length"
        stopped = client.text_generation(FRANCE, max_new_tokens=40, stop=["."], details=True)
        assert stopped.details.finish_reason == "stop_sequence"
        full = client.text_generation(FRANCE, max_new_tokens=3, return_full_text=True)
        assert full.startswith(FRANCE)
        red = client.text_generation(FRANCE, max_new_tokens=3, adapter_id="red")
        assert (
            red
            == api.generate(prompt=FRANCE, max_tokens=3, temperature=0, adapter="red")["choices"][0]["text"]
        )
        chosen = client.text_generation(
            FRANCE, max_new_tokens=9, grammar={"type": "regex", "value": "(yes|no)"}
        )
        assert chosen in ("yes", "no")
    refused = api.http.post("/", json={"inputs": "a", "parameters": {"truncate": 5}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "parameters.truncate")


def test_an_adapter_may_be_named_as_lorax_and_tgi_do(api: Any) -> None:
    body = {"prompt": FRANCE, "max_tokens": 3, "temperature": 0}
    named, theirs = api.generate(**body, adapter="red"), api.generate(**body, adapter_id="red")
    assert (theirs["choices"], theirs["adapter"]) == (named["choices"], named["adapter"])


def test_loraxs_client_gets_text_of_an_adapter_whole_and_streamed(api: Any) -> None:
    """The bodies are those of lorax-client 0.6.3, which sends every parameter that it knows."""
    sent = {
        "adapter_id": "red", "adapter_source": "local", "merged_adapters": None, "api_token": None,
        "do_sample": False, "max_new_tokens": 3, "ignore_eos_token": True, "repetition_penalty": None,
        "return_full_text": False, "stop": [], "seed": None, "temperature": None, "top_k": None,
        "top_p": None, "truncate": None, "typical_p": None, "best_of": None, "watermark": False,
        "details": True, "decoder_input_details": False, "return_k_alternatives": None,
        "response_format": None,
    }  # fmt: skip
    expected = api.generate(prompt=FRANCE, max_tokens=3, temperature=0, adapter="red", ignore_eos=True)

    (answer,) = api.http.post("/", json={"inputs": FRANCE, "stream": False, "parameters": sent}).json()
    *_, last = api.events("/", inputs=FRANCE, stream=True, parameters=sent)

    assert answer["generated_text"] == expected["choices"][0]["text"] == last["generated_text"]
    for details in (answer["details"], last["details"]):
        assert details["prompt_tokens"] == expected["usage"]["prompt_tokens"]
        assert details["generated_tokens"] == 3


def test_lorax_may_describe_the_text_by_a_schema(api: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}
    parameters = {"response_format": {"type": "json_object", "schema": schema}, "max_new_tokens": 40}
    (answer,) = api.http.post("/", json={"inputs": FRANCE, "parameters": parameters}).json()
    assert json.loads(answer["generated_text"]) == {"a": "x"}


@pytest.mark.parametrize(
    ("parameters", "param", "said"),
    [
        ({"adapter_source": "s3", "adapter_id": "a"}, "adapter_source", "'local' or 'hub'"),
        ({"adapter_source": "hub"}, "adapter_source", "adapter_id"),
        ({"adapter_source": "hub", "adapter_id": "a/b"}, "adapter_id", "--hub-allow"),
        ({"api_token": "hf_x"}, "api_token", "HF_TOKEN"),
        ({"merged_adapters": {"ids": ["a"]}}, "merged_adapters", "POST /generate"),
        ({"return_k_alternatives": 2}, "return_k_alternatives", "top_n_tokens"),
    ],
)
def test_what_lorax_does_otherwise_is_refused_with_the_way_out(
    api: Any, parameters: dict[str, Any], param: str, said: str
) -> None:
    answer = api.http.post("/", json={"inputs": "a", "parameters": parameters})
    assert answer.status_code in (400, 403)
    error = answer.json()["error"]
    assert error["param"].removeprefix("parameters.") == param
    assert said in error["message"]


def test_an_unknown_adapter_is_not_found(api: Any) -> None:
    error = error_of(api, 404, prompt="hi", adapter="nobody")

    assert (error["code"], error["param"]) == ("adapter_not_found", "adapter")
    assert "red" in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"prompt": ""}, "prompt", "no tokens"),
        ({"prompt": "hi", "max_tokens": 8192}, "max_tokens", "--max-length"),
        ({"prompt": "hi " * 9000}, "prompt", "--max-length"),
        ({"prompt": "hi", "max_tokens": 0}, "max_tokens", "echo"),
        ({"prompt": "hi", "stop_token_ids": [49152]}, "stop_token_ids", "vocabulary"),
        ({"prompt": "hi", "logit_bias": {"49152": 1}}, "logit_bias", "vocabulary"),
        ({"prompt": "hi", "temperature": 3}, "temperature", "at most 2"),
        ({"prompt": "hi", "temprature": 1}, "temprature", "does not know"),
    ],
)
def test_a_refusal_names_the_field_and_the_limit(
    api: Any, body: dict[str, Any], param: str, said: str
) -> None:
    error = error_of(api, 400, **body)

    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "hi", "temperature": NaN}', "valid JSON"),
        (b'{"prompt": "hi", "temperature": 1e999}', "out of range"),
        (b'{"prompt": "hi"', "valid JSON"),
        (b"[" * 100_000, "valid JSON"),
        (b'{"prompt": "\xff"}', "valid JSON"),
        (b"[]", "JSON object"),
        (b"", "JSON object"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(api: Any, content: bytes, said: str) -> None:
    answer = api.http.post("/generate", content=content, headers={"Content-Type": "application/json"})

    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


def test_a_body_with_another_content_type_is_refused_with_the_right_one(api: Any) -> None:
    answer = api.http.post("/generate", content=b'{"prompt": "hi"}', headers={"Content-Type": "text/plain"})

    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_over_the_limit_is_refused_whether_announced_or_not(api: Any, announced: bool) -> None:
    body = b'{"prompt": "' + b"x" * 9_000_000 + b'"}'
    content: Any = body if announced else (body[at : at + 65536] for at in range(0, len(body), 65536))

    answer = api.http.post("/generate", content=content, headers={"Content-Type": "application/json"})

    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "payload_too_large"
    assert "--max-body" in answer.json()["error"]["message"]


def test_a_timeout_over_the_servers_is_refused(api: Any) -> None:
    error = error_of(api, 400, prompt="hi", timeout_s=1e6)

    assert error["param"] == "timeout_s"
    assert "--max-timeout" in error["message"]


def test_too_many_choices_are_refused(api: Any) -> None:
    body = {"model": api.base, "prompt": ["hi"] * 64, "n": 3}

    answer = api.http.post("/v1/completions", json=body)

    assert answer.status_code == 400
    assert "--max-choices" in answer.json()["error"]["message"]
