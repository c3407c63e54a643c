"""The SDK and the command against the real server, with a small base and adapters on it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import anthropic
import anyio
import httpx2
import openai
import pytest
from pydantic import BaseModel, ConfigDict
from tests.clients.real_server import Server

from onebase import (
    AsyncClient,
    BadRequestError,
    Client,
    Message,
    NotFoundError,
    __version__,
)

PROMPT = "The capital of France is"
EMOJI = "Repeat after me: 🙂 日本語 é"


@pytest.fixture
def adapter(server: Server) -> str:
    """The name of an adapter that the server has."""
    return "orders"


def test_the_server_is_well_and_lists_what_it_has(sdk: Any, server: Server, adapter: str) -> None:
    assert sdk.call(lambda client: client.health(), url=server.url).ok
    assert sdk.call(lambda client: client.ready(), url=server.url).ok
    assert sdk.call(lambda client: client.version(), url=server.url).version == __version__
    (first, *_) = sdk.call(lambda client: client.adapters.list(), url=server.url)
    names = [model.id for model in sdk.call(lambda client: client.models.list(), url=server.url)]
    assert {first.name, first.base} <= set(names)
    assert sdk.call(lambda client: client.models.retrieve(first.base), url=server.url).id == first.base
    assert len(first.version) == 64
    assert first.rank > 0
    assert first.targets


def test_the_base_answers_and_says_what_it_took(sdk: Any, server: Server) -> None:
    answer = sdk.call(lambda client: client.generate(PROMPT, temperature=0, max_tokens=8), url=server.url)
    assert answer.text
    assert answer.adapter is None
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.prompt_tokens > 0
    assert answer.timing.ttft_s > 0
    assert answer.tokens_per_second > 0


@pytest.mark.parametrize("messages", [EMOJI, [Message("system", "Be brief"), Message("user", EMOJI)]])
def test_a_stream_and_a_whole_answer_are_the_same(server: Server, adapter: str, messages: Any) -> None:
    fields: dict[str, Any] = {"adapter": adapter, "temperature": 0, "max_tokens": 12}
    with Client(server.url) as client:
        whole = client.chat(messages, **fields)
        with client.stream(messages=messages, **fields) as stream:
            pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == stream.result.text == whole.text
    assert len(pieces) > 2
    assert stream.result.choices == whole.choices
    assert stream.result.adapter == whole.adapter
    assert str(whole.adapter).startswith(f"{adapter}@")
    assert stream.result.usage.completion_tokens == whole.usage.completion_tokens


def test_an_adapter_changes_the_answer_and_weight_zero_gives_it_back(server: Server, adapter: str) -> None:
    with Client(server.url) as client:
        base, own, none = (
            client.chat("How are you today?", adapter=spec, temperature=0, max_tokens=12).text
            for spec in (None, adapter, {adapter: 0.0})
        )
    assert own != base
    assert none == base


def test_choices_and_logprobs_come_as_asked(sdk: Any, server: Server) -> None:
    answer = sdk.call(
        lambda client: client.generate(PROMPT, n=2, seed=7, max_tokens=4, logprobs=2, ignore_eos=True),
        url=server.url,
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert "".join(choice.logprobs.tokens) == choice.text
        assert len(choice.logprobs.token_ids) == 4
        assert all(value <= 0 for value in choice.logprobs.token_logprobs)
        assert all(len(top) >= 2 for top in choice.logprobs.top_logprobs)


def test_the_servers_refusals_are_typed_and_name_the_field(sdk: Any, server: Server) -> None:
    with pytest.raises(NotFoundError) as unknown:
        sdk.call(lambda client: client.chat("x", adapter="no-such-adapter"), url=server.url)
    assert unknown.value.param == "adapter"
    with pytest.raises(BadRequestError) as wrong:
        sdk.call(lambda client: client.chat("x", top_k=-2), url=server.url)
    assert wrong.value.param == "top_k"


def test_many_streams_at_once_each_get_their_own_answer(server: Server, adapter: str) -> None:
    answers: dict[int, str] = {}

    async def one(client: AsyncClient, number: int) -> None:
        who = adapter if number % 2 else None
        async with client.stream(PROMPT, adapter=who, temperature=0, max_tokens=6) as stream:
            answers[number] = (await stream.read()).text

    async def run() -> None:
        async with AsyncClient(server.url) as client, anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(one, client, number)

    anyio.run(run)
    assert len(answers) == 8
    assert len({answers[number] for number in (0, 2, 4, 6)}) == 1
    assert len({answers[number] for number in (1, 3, 5, 7)}) == 1


def test_leaving_a_stream_ends_its_request_on_the_server(server: Server) -> None:
    def running() -> int:
        return int(httpx2.get(f"{server.url}/status", timeout=60).json()["requests"])

    during: list[int] = []

    def leave(client: Client) -> None:
        with client.stream(PROMPT, max_tokens=30_000, ignore_eos=True) as stream:
            next(iter(stream))
            during.append(running())

    before = running()
    with Client(server.url) as client:
        leave(client)
        for _ in range(600):
            if running() == before:
                break
            anyio.run(anyio.sleep, 0.05)
        assert running() == before
    assert during == [before + 1]


class Answer(BaseModel):
    """A random base answers under it soon, and only so."""

    model_config = ConfigDict(extra="forbid")

    sure: bool
    city: Literal["Paris", "Rom"]


@pytest.mark.parametrize("named", [None, "adapter"])
def test_an_answer_under_a_schema_is_an_instance_of_its_model(
    sdk: Any, server: Server, adapter: str, named: str | None
) -> None:
    fields: dict[str, Any] = {"adapter": named and adapter, "schema": Answer, "max_tokens": 300, "n": 2}
    answer = sdk.call(lambda client: client.chat("Where?", **fields), url=server.url)
    assert isinstance(answer.parsed, Answer)
    with Client(server.url) as client, client.stream("Where?", **fields) as stream:
        assert isinstance(stream.read().parsed, Answer)


def tool(model: type[BaseModel], **more: object) -> dict[str, Any]:
    """A function whose arguments are those of a model."""
    schema = model.model_json_schema()
    return {"type": "function", "function": {"name": model.__name__, "parameters": schema, **more}}


@pytest.mark.parametrize("named", [None, "adapter"])
def test_an_answer_calls_a_tool_with_arguments_of_its_schema(
    sdk: Any, server: Server, adapter: str, named: str | None
) -> None:
    fields: dict[str, Any] = {"adapter": named and adapter, "tools": [tool(Answer)], "max_tokens": 300}
    fields |= {"tool_choice": "required", "parallel_tool_calls": False, "seed": 5}
    answer = sdk.call(lambda client: client.chat("Where?", n=2, **fields), url=server.url)
    assert [choice.finish_reason for choice in answer.choices] == ["tool_calls"] * 2
    for choice in answer.choices:
        (call,) = choice.tool_calls
        assert (choice.text, call.name) == ("", "Answer")
        Answer.model_validate(call.values)
    with Client(server.url) as client:
        with client.stream(messages="Where?", n=2, **fields) as stream:
            streamed = stream.read()
        assert [choice.tool_calls[0].arguments for choice in streamed.choices] == [
            choice.tool_calls[0].arguments for choice in answer.choices
        ]
        first, *rest = answer.tool_calls
        more = [Message("user", "Where?"), answer.message, first.result("There.")]
        after = client.chat(
            more, tools=[tool(Answer)], tool_choice="none", max_tokens=3, adapter=named and adapter
        )
    assert not rest
    assert not after.tool_calls
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens / 2


def test_the_openai_client_calls_tools_whole_and_streamed(server: Server) -> None:
    class Where(BaseModel):
        model_config = ConfigDict(extra="forbid")

        sure: bool

    messages: Any = [{"role": "user", "content": "Where?"}]
    tools: Any = [tool(Answer), tool(Where, strict=True)]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        base = client.models.list().data[0].id
        fields: Any = {"model": base, "messages": messages, "tools": tools, "max_completion_tokens": 300}
        choice: Any = {"type": "function", "function": {"name": "Where"}}
        made = client.chat.completions.create(**fields, tool_choice=choice).choices[0]
        assert made.finish_reason == "stop"
        assert made.message.content is None
        assert [call.function.name for call in made.message.tool_calls or []] == ["Where"]
        with client.chat.completions.stream(**fields, tool_choice="required", seed=3) as stream:
            final = stream.get_final_completion().choices[0].message
        assert final.tool_calls
        for call in final.tool_calls:
            assert isinstance(call.function.parsed_arguments if call.function.name == "Where" else {}, dict)
            json.loads(call.function.arguments)
        chunks = client.chat.completions.create(**fields, tool_choice="required", seed=3, stream=True)
        told = [chunk.choices[0].delta.tool_calls or [] for chunk in chunks]
        assert {len(calls) for calls in told} == {0, 1}, "clients read one call of a chunk"
        parts = [call.function.arguments or "" for (call,) in filter(None, told) if call.function]
        assert "".join(parts) == "".join(call.function.arguments for call in final.tool_calls)
        text = client.chat.completions.create(**fields, tool_choice="none").choices[0]
        assert text.message.tool_calls is None
        cut = client.chat.completions.create(
            **fields | {"max_completion_tokens": 20}, tool_choice=choice
        ).choices[0]
        assert (cut.finish_reason, len(cut.message.tool_calls or [])) == ("length", 1)


def test_the_openai_client_gets_responses_whole_parsed_and_streamed(server: Server, adapter: str) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        base = client.models.list().data[0].id
        fields: Any = {"input": "Where?", "max_output_tokens": 6, "temperature": 0}
        by_name = client.responses.create(model=adapter, **fields)
        beside = client.responses.create(model=base, **fields, extra_body={"adapter": adapter, "top_k": 1})
        chat = client.chat.completions.create(
            model=adapter, messages=[{"role": "user", "content": "Where?"}], max_tokens=6, temperature=0
        )
        assert by_name.output_text == beside.output_text == chat.choices[0].message.content
        assert by_name.output_text != client.responses.create(model=base, **fields).output_text

        asked: Any = {"model": base, "input": "Where?", "text_format": Answer, "max_output_tokens": 300}
        assert isinstance(client.responses.parse(**asked).output_parsed, Answer)
        with client.responses.stream(**asked) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            final = stream.get_final_response()
        assert final.output_parsed == Answer.model_validate_json(text)
        assert (final.status, final.output_text) == ("completed", text)

        scored: Any = client.responses.create(model=base, **fields, top_logprobs=2).output[0]
        tokens = scored.content[0].logprobs
        assert "".join(token.token for token in tokens) == scored.content[0].text
        assert all(len(token.top_logprobs) == 2 for token in tokens)


def test_the_openai_client_calls_a_function_and_goes_on_from_its_response(server: Server) -> None:
    function = tool(Answer)["function"]
    fields: Any = {"tools": [{"type": "function", **function}], "max_output_tokens": 300}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        fields |= {"model": client.models.list().data[0].id, "parallel_tool_calls": False}
        must: Any = {"input": "Where?", "tool_choice": "required", "extra_body": {"seed": 5}}
        first = client.responses.create(**fields, **must)
        with client.responses.stream(**fields, **must) as stream:
            (streamed,) = stream.get_final_response().output
        (call,) = first.output
        assert call.type == streamed.type == "function_call"
        assert call.arguments == streamed.arguments
        Answer.model_validate_json(call.arguments)

        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "There."}
        fields |= {"tool_choice": "none", "max_output_tokens": 4, "temperature": 0}
        after = client.responses.create(**fields, input=[result], previous_response_id=first.id)
        asked: Any = {"role": "user", "content": "Where?"}
        alike = client.responses.create(**fields, input=[asked, call.model_dump(), result])
        assert after.output_text == alike.output_text
        assert after.usage is not None
        assert alike.usage is not None
        assert after.usage.input_tokens == alike.usage.input_tokens


def test_the_anthropic_client_calls_tools_whole_and_streamed(server: Server, adapter: str) -> None:
    described = {"name": "Answer", "input_schema": Answer.model_json_schema()}
    question: Any = {"role": "user", "content": "Where?"}
    fields: Any = {"model": adapter, "max_tokens": 300, "tools": [described], "messages": [question]}
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        made = client.messages.create(**fields, tool_choice={"type": "tool", "name": "Answer"})
        (call,) = made.content
        assert call.type == "tool_use"
        assert (made.stop_reason, call.name) == ("tool_use", "Answer")
        Answer.model_validate(call.input)
        any_tool: Any = {"type": "any", "disable_parallel_tool_use": True}
        with client.messages.stream(**fields, tool_choice=any_tool) as stream:
            streamed = stream.get_final_message()
        (again,) = streamed.content
        assert again.type == "tool_use"
        Answer.model_validate(again.input)
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "There."}
        talk: Any = [question, made.to_param(), {"role": "user", "content": [result]}]
        fields |= {"messages": talk, "max_tokens": 3, "tool_choice": {"type": "none"}}
        after = client.messages.create(**fields)
        assert [block.type for block in after.content] == ["text"]
        used = after.usage.input_tokens + (after.usage.cache_read_input_tokens or 0)
        del fields["max_tokens"]
        assert client.messages.count_tokens(**fields).input_tokens == used
        fields |= {"messages": [question], "max_tokens": 20, "tool_choice": {"type": "any"}}
        cut = client.messages.create(**fields)
        assert (cut.stop_reason, [block.type for block in cut.content]) == ("max_tokens", ["tool_use"])


def test_the_anthropic_client_streams_what_it_gets_whole_and_goes_on_from_there(server: Server) -> None:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        (base, *_) = httpx2.get(f"{server.url}/v1/models", timeout=60).json()["data"]
        fields: Any = {"model": base["id"], "max_tokens": 12, "extra_body": {"temperature": 0}}
        fields |= {"system": "Be brief.", "messages": [{"role": "user", "content": EMOJI}]}
        whole = client.messages.create(**fields)
        with client.messages.stream(**fields) as stream:
            text = "".join(stream.text_stream)
            made = stream.get_final_message()
        (block,) = whole.content
        assert block.type == "text"
        assert (text, made.stop_reason) == (block.text, "max_tokens")
        assert made.usage.cache_read_input_tokens
        assert made.usage.input_tokens + made.usage.cache_read_input_tokens == whole.usage.input_tokens
        parsed = client.messages.parse(**fields | {"max_tokens": 300}, output_format=Answer)
        assert isinstance(parsed.parsed_output, Answer)


def test_a_schema_of_a_tool_that_cannot_be_kept_to_is_refused_as_of_tools(server: Server) -> None:
    bad = {"type": "object", "properties": {"a": {"type": "string", "pattern": "[a"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": bad}}]
    with Client(server.url, max_retries=0) as client, pytest.raises(BadRequestError) as refused:
        client.chat("Where?", tools=tools, tool_choice="required", max_tokens=20)
    assert (refused.value.code, refused.value.param) == ("grammar_refused", "tools")


def test_the_snippet_of_the_sdks_page_about_schemas_runs(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs/sdk.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n([^`]*schema=[^`]*?)^```$", page, re.MULTILINE)
    with Client(server.url) as client:
        code = compile(snippet, "docs/sdk.md", "exec", dont_inherit=True)
        exec(code, {"client": client, "__name__": "page"})  # noqa: S102 (our own documentation)
    ticket, said = capsys.readouterr().out.splitlines()
    assert re.fullmatch("(billing|shipping|other) (True|False)", ticket)
    assert said in ("yes", "no")


def test_the_openai_client_gets_instances_of_its_models(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        base = client.models.list().data[0].id
        messages: Any = [{"role": "user", "content": "Where?"}]
        parsed = client.chat.completions.parse(
            model=base, messages=messages, response_format=Answer, max_completion_tokens=300
        )
        assert isinstance(parsed.choices[0].message.parsed, Answer)
        said = client.completions.create(
            model=base, prompt="Where?", max_tokens=20, extra_body={"guided_choice": ["here", "there"]}
        )
        assert said.choices[0].text in ("here", "there")
        with pytest.raises(openai.BadRequestError, match=r"guided_regex: .*unclosed") as refused:
            client.chat.completions.create(
                model=base, messages=messages, stream=True, extra_body={"guided_regex": "[a"}
            )
        assert refused.value.code == "grammar_refused"
        assert refused.value.param == "guided_regex"


def test_the_command_keeps_an_answer_to_a_schema_and_to_choices(server: Server, tmp_path: Path) -> None:
    def generate(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "onebase.cli", "generate", "Where?", *options],
            env=os.environ | {"ONEBASE_URL": server.url},
            capture_output=True,
            text=True,
            check=False,
        )

    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(Answer.model_json_schema()))
    Answer.model_validate_json(generate("--schema", str(schema)).stdout)
    assert generate("--choice", "a b", "--choice", "c").stdout.strip() in ("a b", "c")
    schema.write_text("{")
    for options, says in (
        (["--schema", str(schema)], "is not JSON"),
        (["--schema", str(tmp_path / "none")], "cannot be read"),
        (["--grammar", str(schema)], "grammar"),
    ):
        refused = generate(*options)
        assert refused.returncode != 0
        assert says in refused.stderr


def test_texts_are_read_for_vectors_ranks_and_decisions(server: Server, adapter: str) -> None:
    texts = ["A cat sleeps.", "The market fell.", "A kitten naps."]
    with Client(server.url) as client:
        found = client.embed(texts, adapter=adapter, pooling="mean")
        short = client.embed(texts[0], adapter=adapter, dimensions=8, normalize=False)
        ranked = client.rerank(texts[0], texts[1:], adapter=adapter, pooling="mean", top_n=1)
        question = "Is Paris in France?"
        decided = client.decide(["Yes", "No"], messages=question, prior="N/A", adapter=adapter)
        plain = client.decide([" Paris", " Rome"], prompt="The capital of France is")
        with pytest.raises(BadRequestError, match="does not classify"):
            client.classify(texts, adapter=adapter)
        with pytest.raises(ValueError, match="prompt"):
            client.decide(["a", "b"])
    assert len(found.vectors) == 3
    assert len(short.vectors[0]) == 8
    assert found.usage.prompt_tokens > 10
    nearness = [sum(a * b for a, b in zip(found.vectors[0], one, strict=True)) for one in found.vectors[1:]]
    (best,) = ranked
    assert best.text == texts[1 + nearness.index(max(nearness))]
    assert best.score == pytest.approx(max(nearness), abs=1e-5)
    assert sum(one.probability for one in decided.options) == pytest.approx(1)
    assert decided.options[0].prior_logprob is not None
    best_option = max(plain.options, key=lambda option: option.probability)
    assert plain.choice == best_option.text


def test_the_command_talks_and_changes_adapter_on_the_way(server: Server, adapter: str) -> None:
    command = [sys.executable, "-m", "onebase.cli", "chat", "--temperature", "0", "--max-tokens", "8"]
    lines = f"How are you today?\n/adapter {adapter}\nHow are you today?\n"
    done = subprocess.run(
        command,
        input=lines,
        env=os.environ | {"ONEBASE_URL": server.url},
        capture_output=True,
        text=True,
        check=True,
    )
    with Client(server.url) as client:
        question = Message("user", "How are you today?")
        first = client.chat([question], temperature=0, max_tokens=8)
        second = client.chat(
            [question, first.message, question], adapter=adapter, temperature=0, max_tokens=8
        )
    assert done.stdout == f"{first.text}\n{second.text}\n"
    assert f"answering from now on: {adapter}" in done.stderr
