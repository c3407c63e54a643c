"""Adapters that bring tokens of their own: from their folder to a chat over a real server."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.oracle import greedy
from tests.tiny import randomize
from transformers import AutoModelForCausalLM, AutoTokenizer

from onebase_edge.errors import UnavailableError
from onebase_engine.machine import thread_seconds
from onebase_protocol.adapters import AddedToken, TokenizerAdditions
from onebase_server.inference import own_templates
from onebase_server.inference.own_templates import Budget, OwnTemplateError, OwnTemplates
from onebase_server.inference.tokenization import BaseTokenizer, TemplateInput, Tokenizers

from ..hub_standin import HubStandIn
from .support import Server, Starter
from .test_tinker import new_sampler, retrieved, sample_body, sequences

TURN, END, TOOL = "<|turn|>", "<|over|>", "<|tool|>"
TEMPLATE = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|over|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
LONG = "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}"
FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
OPTIONS = ("--device", "cpu", "--quantization", "none", "--dtype", "float32", "--max-length", "256")


@dataclass(frozen=True)
class Grown:
    """An adapter's folder, its tokenizer, and PEFT's own model of it."""

    folder: Path
    tokenizer: Any
    peft: Any

    def answer(self, ids: list[int], count: int) -> list[int]:
        return greedy(self.peft, ids, count)


def grown_model(base: Path, words: int) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model.resize_token_embeddings(words, mean_resizing=False)
    return model.eval().requires_grad_(False)


def train(base: Path, folder: Path, seed: int = 5, template: str = TEMPLATE) -> Grown:
    """Add three tokens, train their rows and a LoRA, and save both as people do."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN, END]})
    tokenizer.add_tokens([TOOL])
    tokenizer.eos_token = END
    tokenizer.chat_template = template
    words, first = len(tokenizer), len(tokenizer) - 3
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        trainable_token_indices={"embed_tokens": list(range(first, words))},
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )
    model = get_peft_model(grown_model(base, words), config)
    randomize(model, 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Grown(folder, tokenizer, PeftModel.from_pretrained(grown_model(base, words), str(folder)).eval())


@pytest.fixture(scope="module")
def grown(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Grown:
    return train(small_base, tmp_path_factory.mktemp("grown"))


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


@pytest.fixture(scope="module")
def server(
    serve_real: Starter,
    small_base: Path,
    forks: None,
    hub: HubStandIn,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    options = ("--base", str(small_base), *OPTIONS, "--hub-allow", "acme/*")
    environment = hub.environment(tmp_path_factory.mktemp("hf"))
    with serve_real(*options, environment=environment) as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


def send(http: httpx2.Client, name: str, folder: Path, **fields: str) -> httpx2.Response:
    files = [("files", (one, (folder / one).read_bytes())) for one in FILES if (folder / one).exists()]
    data = {"name": name, "activate": "true", **fields}
    return http.post("/v1/adapters?wait=true", data=data, files=files)


@pytest.fixture(scope="module")
def chatty(http: httpx2.Client, grown: Grown) -> dict[str, Any]:
    answer = send(http, "chatty", grown.folder)
    assert answer.status_code == 200, answer.text
    version: dict[str, Any] = answer.json()
    return version


def test_the_report_says_what_the_tokenizer_adds(chatty: dict[str, Any], grown: Grown) -> None:
    report = chatty["report"]
    assert report["vocabulary"] == len(grown.tokenizer)
    assert [token["content"] for token in report["tokenizer"]["tokens"]] == [TURN, END, TOOL]
    assert report["tokenizer"]["chat_template"] == TEMPLATE
    assert report["proof"]["exact"]


def test_a_chat_is_written_by_its_template_and_tokens_and_answered_as_by_peft(
    http: httpx2.Client, chatty: dict[str, Any], grown: Grown
) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = grown.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert max(ids) >= len(grown.tokenizer) - 3
    body = {
        "model": "chatty",
        "messages": messages,
        "temperature": 0,
        "max_tokens": 8,
        "ignore_eos": True,
        "return_token_ids": True,
        "logprobs": True,
        "top_logprobs": 3,
    }
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["prompt_token_ids"] == ids
    expected = grown.answer(ids, 8)
    assert found["choices"][0]["token_ids"] == expected
    text = grown.tokenizer.decode(expected, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert found["choices"][0]["message"]["content"] == text
    names = [one["token"] for one in found["choices"][0]["logprobs"]["content"]]
    assert len(names) == 8
    messages = [{"role": "user", "content": f"say {END} and {TURN}"}]
    tokens = http.post("/tokenize", json={"model": "chatty", "messages": messages}).json()["tokens"]
    end = grown.tokenizer.convert_tokens_to_ids(END)
    assert tokens.count(end) == 1  # that of the template: in a message it is letters
    assert http.post("/detokenize", json={"model": "chatty", "tokens": [end]}).json()["prompt"] == END


def test_its_own_end_token_stops_it_and_its_names_are_its_own(
    http: httpx2.Client, chatty: dict[str, Any], grown: Grown
) -> None:
    end, tool = (grown.tokenizer.convert_tokens_to_ids(token) for token in (END, TOOL))
    body = {"adapter": "chatty", "prompt": f"{TURN}user", "temperature": 0, "max_tokens": 5}
    stopped = http.post("/generate", json={**body, "logit_bias": {str(end): 100}}).json()
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["choices"][0]["text"] == ""
    named = http.post("/generate", json={**body, "logit_bias": {str(tool): 100}, "logprobs": 1}).json()
    assert named["choices"][0]["text"] == TOOL * 5


def test_ids_beyond_the_base_are_refused_to_others_by_the_name_of_the_field(
    http: httpx2.Client, chatty: dict[str, Any], grown: Grown
) -> None:
    beyond = len(grown.tokenizer)
    first = beyond - 3
    base = http.get("/v1/models").json()["data"][0]["id"]
    for model, field, value, status in (
        (base, "prompt", [first], 400),
        (base, "logit_bias", {str(first): 1}, 400),
        (base, "stop_token_ids", [first], 400),
        ("chatty", "prompt", [beyond], 400),
        ("chatty", "prompt", [first], 200),
        ("chatty", "logit_bias", {str(first): 1}, 200),
        ("chatty", "stop_token_ids", [first], 200),
    ):
        body = {"model": model, "prompt": "a", "max_tokens": 1, field: value}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == status, (model, field, answer.text)
        if status == 400:
            assert answer.json()["error"]["param"] == field
    text = {"model": base, "prompt": TURN, "max_tokens": 1, "return_token_ids": True}
    found = http.post("/v1/completions", json=text).json()["choices"][0]
    assert len(found["prompt_token_ids"]) > 1  # letters to the base


def test_the_tinker_api_samples_it_by_its_own_tokens(
    http: httpx2.Client, chatty: dict[str, Any], grown: Grown
) -> None:
    own = [grown.tokenizer.convert_tokens_to_ids(token) for token in (TURN, TOOL, END)]
    sampler = new_sampler(http, model_path=f"tinker://adapters/sampler_weights/chatty@{chatty['version']}")
    prompt = {"chunks": [{"type": "encoded_text", "tokens": own}]}
    drawn = sample_body(
        sampler, 0, prompt=prompt, sampling_params={"max_tokens": 8, "temperature": 0, "stop": []}
    )
    accepted = http.post("/api/v1/asample", json=drawn)
    assert accepted.status_code == 200, accepted.text
    ((tokens, _),) = sequences(retrieved(http, accepted.json()["request_id"]))
    assert list(tokens) == grown.answer(own, 8)
    refused = http.post("/api/v1/asample", json=sample_body(new_sampler(http), 0, prompt=prompt))
    assert refused.status_code == 400
    assert "is not in the vocabulary" in refused.json()["error"]["message"]


def test_json_follows_its_schema_and_ends_by_its_own_token(
    http: httpx2.Client, chatty: dict[str, Any]
) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    messages = [{"role": "user", "content": "?"}]
    body = {"model": "chatty", "messages": messages, "response_format": format, "max_tokens": 60}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert json.loads(answer.json()["choices"][0]["message"]["content"])["a"] in (1, 2)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]},
        },
    }
]
CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{{ m['content'] }}{% for call in m['tool_calls'] or [] %}<|tool|>{{ call['function'] | tojson }}"
    "{% endfor %}<|over|>\n{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
THINKS = "{% if add_generation_prompt %}{{ '<think>' if enable_thinking else '<think></think>' }}{% endif %}"


def test_tools_are_called_by_its_own_token(
    http: httpx2.Client, chatty: dict[str, Any], grown: Grown, small_base: Path, tmp_path: Path
) -> None:
    train(small_base, tmp_path, seed=7, template=CALLS)
    assert send(http, "calling", tmp_path).status_code == 200
    body = {
        "model": "calling",
        "messages": [{"role": "user", "content": "?"}],
        "tools": TOOLS,
        "tool_choice": "required",
        "max_tokens": 40,
        "return_token_ids": True,
    }
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["token_ids"][0] == grown.tokenizer.convert_tokens_to_ids(TOOL)
    call = choice["message"]["tool_calls"][0]["function"]
    assert call["name"] == "look"
    assert json.loads(call["arguments"])["a"] in (1, 2)
    named = {"prompt": "a", "max_tokens": 2, "guided_grammar": f"start: <[{len(grown.tokenizer) - 1}]>"}
    for model, status in ((None, 400), ("calling", 200)):
        answer = http.post("/generate", json=named | ({} if model is None else {"adapter": model}))
        assert answer.status_code == status, answer.text


def test_a_template_that_never_ends_fails_its_own_requests_alone(
    http: httpx2.Client, grown: Grown, small_base: Path, tmp_path: Path
) -> None:
    train(small_base, tmp_path, seed=6, template=LONG)
    assert send(http, "endless", tmp_path).status_code == 200
    chat = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 1}
    for _ in range(2):
        answer = http.post("/v1/chat/completions", json={"model": "endless", **chat})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] == "chat_template_failed"
    assert http.post("/v1/chat/completions", json={"model": "chatty", **chat}).status_code == 200
    plain = {"model": "endless", "prompt": f"{TURN}a", "max_tokens": 1}
    assert http.post("/v1/completions", json=plain).status_code == 200


@pytest.fixture(scope="module")
def templates() -> Iterator[OwnTemplates]:
    templates = OwnTemplates()
    yield templates
    templates.close()


def test_a_template_that_writes_far_more_than_it_is_given_is_refused(templates: OwnTemplates) -> None:
    many = "{% for a in range(20000) %}{{ 'ab ' * 20 }}{% endfor %}"
    with pytest.raises(OwnTemplateError, match="characters"):
        templates.render(many, [], None, {})
    long = [{"role": "user", "content": "ab " * 500_000}]
    assert templates.render("{{ messages[0].content }}", long, None, {}) == long[0]["content"]


def test_a_template_that_is_slow_to_read_is_refused_however_many_renderings_it_takes(
    templates: OwnTemplates,
) -> None:
    busy = "{% for a in range(1000) %}{% for b in range(300) %}{% endfor %}{% endfor %}a"
    budget = Budget(0.2)
    with suppress(OwnTemplateError):
        while budget.seconds > 0:
            templates.render(busy, [], None, {}, budget)
    with pytest.raises(OwnTemplateError, match="takes more than"):
        templates.render(busy, [], None, {})
    assert templates.render("a", [], None, {}) == "a"


def test_what_a_template_computes_counts_as_time_of_the_thread_that_renders_it(
    templates: OwnTemplates,
) -> None:
    busy = "{% for a in range(1000) %}{% for b in range(5000) %}{% endfor %}{% endfor %}b"
    before = thread_seconds() - time.thread_time()
    assert templates.render(busy, [], None, {}) == "b"
    assert thread_seconds() - time.thread_time() > before + 0.001


def test_a_process_that_is_killed_while_it_renders_is_replaced(templates: OwnTemplates) -> None:
    busy = "{% for a in range(1000) %}{% for b in range(5000) %}{% endfor %}{% endfor %}b"
    assert templates.render("a", [], None, {}) == "a"
    first = templates._helper.process
    assert first is not None
    killer = threading.Timer(0.1, first.kill)
    killer.start()
    assert templates.render(busy, [], None, {}) == "b"
    killer.join()


def test_what_a_template_can_do_is_not_concluded_from_a_process_that_does_not_start(
    small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizers = Tokenizers(BaseTokenizer(str(small_base)))
    first = len(AutoTokenizer.from_pretrained(small_base))
    token = AddedToken(id=first, content=TOOL)
    own = tokenizers.of(TokenizerAdditions(tokens=(token,), chat_template=CALLS + THINKS), 0)
    with monkeypatch.context() as patch:
        patch.setattr(own_templates, "_COMMAND", ["false"])
        for property in ("template_options", "thought_format", "tool_format"):
            with pytest.raises(UnavailableError):
                getattr(own, property)
        with pytest.raises(UnavailableError):
            own.encode_chat(TemplateInput([{"role": "user", "content": "?"}]))
    assert own.template_options == {"enable_thinking"}
    assert own.thought_format is not None
    assert own.tool_format is not None
    tokenizers.templates.close()


def test_another_tokenizer_is_refused_by_name_if_the_rows_need_it(
    http: httpx2.Client, grown: Grown, tmp_path: Path
) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes((grown.folder / name).read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    answer = send(http, "other", tmp_path)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"] == "bad_tokenizer"
    assert "merges" in answer.json()["error"]["message"]


def test_a_stream_adds_up_to_the_answer_and_a_named_version_has_its_own_tokens_too(
    http: httpx2.Client, chatty: dict[str, Any]
) -> None:
    tool = chatty["report"]["tokenizer"]["tokens"][2]["id"]
    body = {
        "model": chatty["id"],
        "messages": [{"role": "user", "content": "?"}],
        "max_tokens": 6,
        "seed": 3,
        "logit_bias": {str(tool): 9},
    }
    whole = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    text = ""
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    assert text == whole != ""
    assert http.post("/v1/completions", json={"prompt": [tool], "max_tokens": 1, **named(chatty)}).is_success
    mixed = {"adapter": [{"name": "chatty", "weight": 0.5}], "prompt": "a", "max_tokens": 1}
    answer = http.post("/generate", json=mixed)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_not_composable")


def test_the_first_use_of_one_on_the_hub_may_read_texts(
    http: httpx2.Client, hub: HubStandIn, grown: Grown
) -> None:
    hub.add_repo("acme/grown", {name: (grown.folder / name).read_bytes() for name in FILES})
    answer = http.post("/v1/embeddings", json={"model": "hub:acme/grown", "input": f"{TURN}a"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["prompt_tokens"] == len(grown.tokenizer.encode(f"{TURN}a"))


def named(version: dict[str, Any]) -> dict[str, str]:
    return {"model": version["id"]}


@pytest.mark.full
def test_tokens_within_spare_rows_of_the_base_need_no_further_ones(
    serve_real: Starter, small_base: Path, tmp_path: Path, forks: None
) -> None:
    base = tmp_path / small_base.name
    shutil.copytree(small_base, base)
    first = len(AutoTokenizer.from_pretrained(base))
    grown_model(small_base, first + 64).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN, END]})
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, END
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices=[first, first + 1],
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    )
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    randomize(model, 0.5)
    model.save_pretrained(tmp_path / "spare")
    tokenizer.save_pretrained(tmp_path / "spare")
    messages = [{"role": "user", "content": "What?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    body = {
        "messages": messages,
        "max_tokens": 5,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with serve_real("--base", str(base), *OPTIONS) as server, server.client() as http:
        version = send(http, "spare", tmp_path / "spare").json()
        assert version["report"]["vocabulary"] == 0
        found = http.post(
            "/v1/chat/completions", json={"model": "spare", "return_token_ids": True, **body}
        ).json()
        assert found["prompt_token_ids"] == ids
        assert found["choices"][0]["token_ids"] == greedy(model.eval(), ids, 5)
        ending = {"prompt": "a", "max_tokens": 3, "logit_bias": {str(first + 1): 100}, "adapter": "spare"}
        assert http.post("/generate", json=ending).json()["choices"][0]["finish_reason"] == "stop"
