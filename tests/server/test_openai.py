"""The current `openai` client, unchanged, against the real server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from onebase_server.inference.tokenization import TemplateInput

from .support import one_server

FRANCE = "The capital of France is"
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(api: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_completion_has_text_and_usage(client: openai.OpenAI, api: Any) -> None:
    answer = client.completions.create(model=api.base, prompt=FRANCE, max_tokens=5, temperature=0)

    assert answer.choices[0].text.startswith(" Paris")
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion"
    assert answer.model == api.base
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    assert answer.usage.prompt_tokens_details is not None


def test_a_completion_makes_sixteen_tokens_unless_told_otherwise(client: openai.OpenAI, api: Any) -> None:
    answer = client.completions.create(model=api.base, prompt=FRANCE, temperature=0)

    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_several_prompts_and_n_give_choices_in_order(client: openai.OpenAI, api: Any) -> None:
    prompts = [FRANCE, "Two plus two is"]
    alone = [
        client.completions.create(model=api.base, prompt=prompt, max_tokens=4, temperature=0).choices[0].text
        for prompt in prompts
    ]

    answer = client.completions.create(model=api.base, prompt=prompts, n=2, max_tokens=4, temperature=0)

    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [alone[0], alone[0], alone[1], alone[1]]


def test_prompts_as_token_ids_give_the_same_text(client: openai.OpenAI, api: Any, tokenizer: Any) -> None:
    ids = tokenizer.encode(FRANCE)

    texts = [
        client.completions.create(model=api.base, prompt=prompt, max_tokens=4, temperature=0).choices[0].text
        for prompt in (FRANCE, ids, [ids])
    ]

    assert len(set(texts)) == 1


def test_token_ids_are_there_when_asked_for_with_a_logprob_each(
    client: openai.OpenAI, api: Any, tokenizer: Any
) -> None:
    ids = tokenizer.encode(FRANCE)
    plain = client.completions.create(model=api.base, prompt=ids, max_tokens=8, temperature=0)
    made = tokenizer.encode(plain.choices[0].text)
    extra = {"return_token_ids": True, "stop_token_ids": [made[4]]}
    fields: dict[str, Any] = {"model": api.base, "prompt": [ids, ids], "max_tokens": 8, "temperature": 0}
    fields |= {"logprobs": 0, "extra_body": extra}

    whole = client.completions.create(**fields)

    for choice in whole.choices:
        found = choice.to_dict()
        assert found["prompt_token_ids"] == ids
        assert found["token_ids"] == made[:5]
        assert choice.logprobs is not None
        assert len(choice.logprobs.token_logprobs or []) == 5
        assert choice.text == tokenizer.decode(made[:4])
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 10
    streamed: dict[str, list[int]] = {"token_ids": [], "prompt_token_ids": []}
    for chunk in client.completions.create(**fields | {"prompt": ids}, stream=True):
        for name, so_far in streamed.items():
            so_far += chunk.choices[0].to_dict().get(name) or []  # type: ignore[arg-type, operator]
    assert streamed == {"token_ids": made[:5], "prompt_token_ids": ids}
    stopped = client.completions.create(
        **fields | {"prompt": ids, "stop": " is", "extra_body": {"return_token_ids": True}, "max_tokens": 40}
    ).choices[0]
    assert stopped.logprobs is not None
    assert len(stopped.to_dict()["token_ids"]) == len(stopped.logprobs.token_logprobs or [])  # type: ignore[arg-type]


def test_a_chats_token_ids_are_vllms(client: openai.OpenAI, api: Any, tokenizer: Any) -> None:
    fields: dict[str, Any] = {
        "model": api.base,
        "messages": QUESTION,
        "max_completion_tokens": 4,
        "temperature": 0,
    }
    fields["extra_body"] = {"return_token_ids": True}
    prompt = tokenizer.encode_chat(TemplateInput(QUESTION))

    whole = client.chat.completions.create(**fields)
    first, *rest = client.chat.completions.create(**fields, stream=True)

    assert whole.to_dict()["prompt_token_ids"] == prompt == first.to_dict()["prompt_token_ids"]
    made: list[int] = []
    for chunk in rest:
        made += chunk.choices[0].to_dict().get("token_ids") or []  # type: ignore[arg-type, operator]
    assert whole.choices[0].to_dict()["token_ids"] == made
    assert len(made) == 4


def test_a_paused_server_computes_nothing_and_goes_on_with_what_it_has(api: Any) -> None:
    def steps() -> int:
        return int(api.http.get("/status").json()["stats"]["steps"])

    body = {"prompt": FRANCE, "temperature": 0, "max_tokens": 60, "ignore_eos": True}
    whole = api.generate(**body)["choices"][0]["text"]
    with api.http.stream("POST", "/generate", json=body | {"stream": True}) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        assert api.http.post("/pause", params={"mode": "keep"}).json() == {"status": "paused"}
        before = steps()
        assert api.http.get("/is_paused").json() == {"is_paused": True}
        assert api.http.get("/health").status_code == 200
        time.sleep(0.3)
        assert steps() == before
        assert api.http.post("/resume").status_code == 200
        events = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]
    assert "".join(event.get("text", "") for event in events) == whole
    assert api.http.get("/is_paused").json() == {"is_paused": False}
    refused = api.http.post("/pause", params={"mode": "abort"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "mode")


@one_server
def test_pauses_at_once_are_all_answered(api: Any) -> None:
    def ask(path: str) -> int:
        return int(httpx2.post(f"{api.server.url}{path}", timeout=30).status_code)

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(ask, ["/pause", "/resume"] * 4))
    assert statuses == [200] * 8
    assert ask("/resume") == 200


def test_a_stop_string_within_a_call_ends_it_unfinished(client: openai.OpenAI, api: Any) -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Paris, France"]}}, "required": ["city"]}
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": city}}]
    fields: Any = {"model": api.base, "messages": QUESTION, "tools": tools, "tool_choice": "required"}
    fields |= {"max_completion_tokens": 60, "temperature": 0, "parallel_tool_calls": False}
    whole = client.chat.completions.create(**fields).choices[0]
    cut = client.chat.completions.create(**fields, stop=", F").choices[0]
    assert (whole.finish_reason, cut.finish_reason) == ("tool_calls", "stop")
    (call,) = cut.message.tool_calls or []
    assert call.to_dict()["function"]["arguments"].endswith('"Paris')  # type: ignore[index]
    few = client.chat.completions.create(**fields | {"max_completion_tokens": 3}).choices[0]
    assert (few.message.content or "", few.message.tool_calls) == ("", None)


def test_a_server_says_of_itself_what_vllms_clients_read(api: Any) -> None:
    config = api.http.get("/server_info", params={"config_format": "json"}).json()["vllm_config"]
    assert config["model_config"]["dtype"] == "torch.bfloat16"
    assert config["lora_config"]["max_lora_rank"] >= 8
    assert config["parallel_config"]["data_parallel_size"] == 1
    assert api.http.get("/get_world_size").json() == {"world_size": 1}


def test_a_streamed_completion_adds_up_and_reports_usage_when_asked(client: openai.OpenAI, api: Any) -> None:
    options: dict[str, Any] = {"model": api.base, "prompt": FRANCE, "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**options)

    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))

    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].text
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_completion_logprobs_with_echo_score_the_prompt(client: openai.OpenAI, api: Any) -> None:
    answer = client.completions.create(
        model=api.base, prompt=FRANCE, max_tokens=3, temperature=0, logprobs=2, echo=True
    )

    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert answer.choices[0].text.startswith(FRANCE)
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])


def test_the_logprobs_of_prompts_come_as_from_vllm(client: openai.OpenAI, api: Any) -> None:
    extra = {"prompt_logprobs": 2}

    def told(entry: Any) -> Any:
        return entry.model_extra["prompt_logprobs"]

    answer = client.completions.create(
        model=api.base, prompt=[FRANCE, "a b"], max_tokens=1, n=2, extra_body=extra
    )
    echoed = client.completions.create(model=api.base, prompt=FRANCE, max_tokens=1, logprobs=2, echo=True)
    chat = client.chat.completions.create(model=api.base, messages=QUESTION, max_tokens=1, extra_body=extra)

    logprobs = echoed.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    for choice in answer.choices[:2]:
        first, *others = told(choice)
        assert first is None
        assert len(others) == len(logprobs.token_logprobs) - 2
        for one, expected in zip(others, logprobs.token_logprobs[1:], strict=False):
            assert next(iter(one.values()))["logprob"] == expected
            ranks = [entry["rank"] for entry in one.values() if entry["rank"] is not None]
            assert sorted(ranks) == [1, 2]
    assert len(told(answer.choices[2])) == 2
    assert chat.usage is not None
    assert told(chat)[0] is None
    assert len(told(chat)) == chat.usage.prompt_tokens
    bad: list[dict[str, Any]] = [{"stream": True}, {"echo": True, "logprobs": 1}]
    for more in bad:
        with pytest.raises(openai.BadRequestError, match="prompt_logprobs"):
            client.completions.create(model=api.base, prompt="x", extra_body=extra, **more)
    with pytest.raises(openai.BadRequestError, match="/v1/chat/completions has it"):
        client.responses.create(model=api.base, input="x", extra_body=extra)


def test_a_chat_answers_as_the_assistant(client: openai.OpenAI, api: Any) -> None:
    answer = client.chat.completions.create(
        model=api.base, messages=QUESTION, max_completion_tokens=6, temperature=0
    )

    message = answer.choices[0].message
    assert message.role == "assistant"
    assert message.content == "The capital of France is Paris"
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "chat.completion"


def test_the_end_of_a_turn_ends_the_chat_and_does_not_show(
    client: openai.OpenAI, api: Any, tokenizer: Any
) -> None:
    """A bias makes the base end its turn at once."""
    (end,) = tokenizer.encode("<|im_end|>")

    answer = client.chat.completions.create(
        model=api.base, messages=QUESTION, temperature=0, logit_bias={str(end): 100}
    )

    assert answer.choices[0].message.content == ""
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1


def test_a_streamed_chat_starts_with_the_role_and_adds_up(client: openai.OpenAI, api: Any) -> None:
    options: dict[str, Any] = {"model": api.base, "messages": QUESTION, "max_tokens": 5, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0].message.content

    chunks = list(
        client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )

    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert chunks[-1].usage is not None


def test_a_stream_tells_the_usage_in_every_chunk_when_asked(client: openai.OpenAI, api: Any) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(
            model=api.base, messages=QUESTION, max_tokens=5, stream=True, stream_options=options
        )
    )

    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert len(counts) == len(chunks)
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_chat_logprobs_have_bytes_and_alternatives(client: openai.OpenAI, api: Any) -> None:
    answer = client.chat.completions.create(
        model=api.base, messages=QUESTION, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )

    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    text = b"".join(bytes(entry.bytes or []) for entry in logprobs.content).decode()
    assert text == answer.choices[0].message.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(max(top.logprob for top in entry.top_logprobs))


def test_the_model_may_be_an_adapter_or_a_version_of_it(client: openai.OpenAI, api: Any) -> None:
    def ask(model: str) -> str | None:
        answer = client.completions.create(model=model, prompt=FRANCE, max_tokens=6, temperature=0)
        return answer.choices[0].text

    base, red, version = ask(api.base), ask("red"), ask(f"red@{api.digests['red'][:12]}")

    assert red == version
    assert red != base


def test_extensions_travel_in_the_extra_body(client: openai.OpenAI, api: Any) -> None:
    answer = client.completions.create(
        model=api.base,
        prompt=FRANCE,
        max_tokens=6,
        extra_body={"top_k": 1, "adapter": [{"name": "red", "weight": 1.0}], "ignore_eos": True},
    )
    red = client.completions.create(model="red", prompt=FRANCE, max_tokens=6, temperature=0)

    assert answer.choices[0].text == red.choices[0].text


def test_models_can_be_listed_and_fetched(client: openai.OpenAI, api: Any) -> None:
    assert {model.id for model in client.models.list()} == {api.base, "red", "blue"}
    assert client.models.retrieve("red").owned_by == "onebase"


def test_models_have_the_fields_that_anthropics_client_reads(client: openai.OpenAI, api: Any) -> None:
    with anthropic.Anthropic(base_url=api.server.url, api_key="none") as other:
        page = other.models.list()
    first = page.data[0]
    assert (first.id, first.display_name, first.type) == (api.base, api.base, "model")
    assert (page.first_id, page.last_id, page.has_more) == (first.id, page.data[-1].id, False)
    assert int(first.created_at.timestamp()) == client.models.list().data[0].created


@pytest.mark.parametrize("name", ["dummy", "tgi"])
def test_what_hugging_faces_clients_call_a_model_that_is_not_named_is_the_base(
    client: openai.OpenAI, api: Any, name: str
) -> None:
    named, base = (
        client.completions.create(model=model, prompt=FRANCE, max_tokens=4, temperature=0).choices[0].text
        for model in (name, api.base)
    )
    assert named == base


def test_special_tokens_are_in_the_text_when_asked_for(client: openai.OpenAI, api: Any) -> None:
    ended = "<|im_end|>"
    fields: Any = {"model": api.base, "prompt": FRANCE, "max_tokens": 2, "temperature": 0}
    special: Any = {"logit_bias": {"2": 100}, "extra_body": {"ignore_eos": True}}
    shown = client.completions.create(
        **fields, **special | {"extra_body": {"ignore_eos": True, "skip_special_tokens": False}}
    )
    assert client.completions.create(**fields, **special).choices[0].text == ""
    assert shown.choices[0].text == 2 * ended


def test_a_context_that_is_too_long_is_refused_in_the_words_that_clients_look_for(
    client: openai.OpenAI, api: Any
) -> None:
    """LangChain looks for the code in the error's text, LiteLLM for the sentence."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=api.base, prompt=FRANCE, max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"
    assert "context_length_exceeded" in str(caught.value)
    assert "This model's maximum context length is" in str(caught.value)


def test_an_unknown_model_raises_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert caught.value.code == "model_not_found"


def test_a_variable_that_the_chat_template_does_not_know_is_refused(client: openai.OpenAI, api: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="no variable 'enable_thinking'") as caught:
        client.chat.completions.create(
            model=api.base,
            messages=QUESTION,
            extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        )
    assert caught.value.param == "chat_template_kwargs"


def test_an_answer_may_go_on_where_the_last_message_ends(client: openai.OpenAI, api: Any) -> None:
    begun: Any = [*QUESTION, {"role": "assistant", "content": "The capital is"}]

    def prompt_tokens(**fields: Any) -> int:
        made = client.chat.completions.create(
            model=api.base, messages=begun, max_completion_tokens=1, extra_body=fields
        )
        assert made.usage is not None
        return made.usage.prompt_tokens

    on, new, bare = (
        prompt_tokens(**fields)
        for fields in (
            {"continue_final_message": True},
            {"add_generation_prompt": True},
            {"add_generation_prompt": False},
        )
    )
    assert on < bare < new
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=api.base,
            messages=[*QUESTION, {"role": "assistant", "content": ""}],
            extra_body={"continue_final_message": True},
        )
    assert caught.value.param == "continue_final_message"


def test_an_adapter_beside_a_model_that_is_one_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="red", prompt="hi", extra_body={"adapter": "blue"})
    assert caught.value.param == "adapter"


def test_a_prompt_of_foreign_token_ids_is_refused(client: openai.OpenAI, api: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model=api.base, prompt=[1, 60_000])
