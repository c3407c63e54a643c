"""Vectors, scores of pairs and decisions, on the real engine; their limits and errors on a scripted one."""

from __future__ import annotations

import base64
import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from onebase import Client
from onebase_server.inference.tokenization import BaseTokenizer, TemplateInput

from .support import Server, Starter, one_server

BASE = "smollm2-135m-instruct"
TEXTS = ["A cat sleeps on the sofa.", "The stock market fell again.", "A kitten naps on a couch.", "x"]
FRANCE = "The capital of France is"


def answer_of(http: Any, path: str, status: int = 200, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json={"model": BASE, **body})
    assert answer.status_code == status, answer.text
    data: dict[str, Any] = answer.json()
    return data if status == 200 else data["error"]


def vectors(http: Any, **body: Any) -> list[list[float]]:
    return [one["embedding"] for one in answer_of(http, "/v1/embeddings", **body)["data"]]


# ---- embeddings ------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_the_same_alone_together_and_among_rows_that_generate(api: Any, pooling: str) -> None:
    alone = {
        model: [vectors(api.http, model=model, input=text, pooling=pooling)[0] for text in TEXTS]
        for model in (BASE, "red", "blue")
    }
    found: dict[str, list[list[float]]] = {}

    def ask(model: str) -> None:
        found[model] = vectors(api.http, model=model, input=TEXTS, pooling=pooling)

    threads = [threading.Thread(target=ask, args=[model]) for model in alone]
    threads.append(threading.Thread(target=lambda: api.generate(prompt=FRANCE, max_tokens=30)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == alone
    assert found["red"] != found[BASE] != found["blue"]
    assert all(len(one) == 576 and math.isclose(math.hypot(*one), 1, abs_tol=1e-5) for one in found["red"])


def test_openais_client_gets_vectors_of_texts_and_of_token_ids(api: Any, tokenizer: BaseTokenizer) -> None:
    client = openai.OpenAI(base_url=f"{api.server.url}/v1", api_key="none")

    answer = client.embeddings.create(model="red", input=TEXTS)  # in base64, which it decodes
    ids = client.embeddings.create(model="red", input=[tokenizer.encode(text) for text in TEXTS])
    short = client.embeddings.create(model="red", input=TEXTS[0], dimensions=64, encoding_format="float")

    assert [one.index for one in answer.data] == [0, 1, 2, 3]
    assert [one.embedding for one in ids.data] == [one.embedding for one in answer.data]
    assert answer.usage.prompt_tokens == sum(len(tokenizer.encode(text)) for text in TEXTS)
    cut = np.array(answer.data[0].embedding[:64])
    np.testing.assert_allclose(short.data[0].embedding, cut / np.linalg.norm(cut), rtol=1e-5)


def test_a_vector_comes_as_it_is_or_to_length_one_as_numbers_or_bytes(api: Any) -> None:
    (raw,) = vectors(api.http, input=TEXTS[0], normalize=False)
    (one,) = vectors(api.http, input=TEXTS[0])
    (text,) = vectors(api.http, input=TEXTS[0], encoding_format="base64")

    np.testing.assert_allclose(np.array(raw) / np.linalg.norm(raw), one, rtol=1e-5)
    assert np.frombuffer(base64.b64decode(str(text)), "<f4").tolist() == one


def test_more_inputs_than_there_are_places_are_read_one_after_the_other(api: Any) -> None:
    texts = [f"text number {number}" for number in range(400)]

    answer = answer_of(api.http, "/v1/embeddings", input=texts)

    assert [one["index"] for one in answer["data"]] == list(range(400))
    assert answer["data"][399]["embedding"] == vectors(api.http, input=texts[399])[0]


def test_a_request_has_no_more_rows_at_once_than_the_server_takes(serve_scripted: Starter) -> None:
    texts, choices = [[number] for number in range(8)], [f" {number}" for number in range(9)]
    with (
        serve_scripted("words", "--max-sequences", "2", "--queue-limit", "1") as server,
        server.client() as http,
    ):
        found = vectors(http, input=texts, normalize=False)
        assert found == np.eye(8).tolist()
        decided = answer_of(http, "/v1/decide", prompt="a", choices=choices, prior="b")
        assert [one["text"] for one in decided["choices"]] == choices


def test_a_request_that_is_being_read_in_parts_keeps_its_places_among_others(serve_scripted: Starter) -> None:
    with (
        serve_scripted("words", "--max-sequences", "1", "--queue-limit", "1") as server,
        server.client() as http,
    ):
        asked = {"model": BASE, "input": [[number] for number in range(1000)]}
        with ThreadPoolExecutor() as threads:
            answer = threads.submit(http.post, "/v1/embeddings", json=asked)
            server.wait_for(lambda: answer.done() or http.get("/status").json()["requests"] == 1)

            def flood() -> None:
                with server.client() as other:
                    while not answer.done():
                        other.post("/generate", json={"prompt": "w", "max_tokens": 2})

            for _ in range(3):
                threads.submit(flood)
        assert answer.result().status_code == 200, answer.result().text
        assert [one["index"] for one in answer.result().json()["data"]] == list(range(1000))


def test_what_is_too_long_is_cut_if_it_may_be(scripted: Server) -> None:
    with scripted.client() as http:
        error = answer_of(http, "/v1/embeddings", 400, input=[[5], [5] * 100_001])
        assert error["param"] == "input[1]"
        assert error["code"] == "context_length_exceeded"
        assert "maximum context length" in error["message"]
        long = [1] * 60_000 + [2] * 50_000
        (cut,) = vectors(http, input=long, truncate_prompt_tokens=3, normalize=False)
        assert cut == [0, 0, 3, 0, 0, 0, 0, 0]
        (cut,) = vectors(http, input=long, truncate_prompt_tokens=-1, normalize=False)
        assert cut[1:3] == [50_000, 50_000]
        assert len(vectors(http, input=[7] * 100_000)) == 1, "a whole context, without room for an answer"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [[1], []]}, "input[1]"),
        ({"input": [49152]}, "input"),
        ({"input": [[1], [49152]]}, "input[1]"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling": "cls"}, "pooling"),
        ({"input": "a", "stream": True}, "stream"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "timeout_s": 1e9}, "timeout_s"),
        ({"input": "a", "model": "nobody"}, "model"),
    ],
)
def test_bad_requests_for_vectors_are_refused_by_field(
    scripted: Server, body: dict[str, Any], param: str
) -> None:
    with scripted.client() as http:
        error = answer_of(http, "/v1/embeddings", 404 if "model" in body else 400, **body)
        assert error["param"] == param, error


def test_more_dimensions_than_there_are_are_refused(api: Any) -> None:
    error = answer_of(api.http, "/v1/embeddings", 400, input="a", dimensions=577)
    assert error["message"] == "dimensions: this base's vectors have 576. Ask for that or fewer."


# ---- pairs -----------------------------------------------------------------------------------


def test_documents_come_in_the_order_of_their_nearness(api: Any) -> None:
    body = {"query": TEXTS[0], "documents": TEXTS[1:], "pooling": "mean"}

    answer = answer_of(api.http, "/v1/rerank", **body)
    best = answer_of(api.http, "/v2/rerank", **body, top_n=1, return_documents=False)

    scores = {one["index"]: one["relevance_score"] for one in answer["results"]}
    assert [one["index"] for one in answer["results"]] == sorted(scores, key=lambda index: -scores[index])
    assert answer["results"][0]["document"] == {"text": TEXTS[2]}, "the other cat"
    assert best["results"] == [{"index": 1, "relevance_score": scores[1]}]
    own = np.array(vectors(api.http, input=TEXTS, pooling="mean"))
    np.testing.assert_allclose([scores[index] for index in range(3)], own[1:] @ own[0], rtol=1e-5)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 20


def test_pairs_are_scored_one_to_many_and_one_to_one(scripted: Server) -> None:
    with scripted.client() as http:
        many = answer_of(http, "/score", text_1=TEXTS[0], text_2=TEXTS)
        pairs = answer_of(http, "/v1/score", text_1=TEXTS, text_2=TEXTS)
        single = answer_of(http, "/score", text_1=TEXTS[0], text_2=TEXTS[1])
        documents = [{"text": text} for text in TEXTS]
        ranked = answer_of(http, "/rerank", query=TEXTS[0], documents=documents, priority=0)
        cut = answer_of(http, "/v2/rerank", 400, query="a", documents=TEXTS, max_tokens_per_doc=512)
        error = answer_of(http, "/score", 400, text_1=TEXTS[:2], text_2=TEXTS)
    assert math.isclose(many["data"][0]["score"], 1)
    assert [round(one["score"], 9) for one in pairs["data"]] == [1] * 4
    assert single["data"] == [many["data"][1] | {"index": 0}]
    assert {one["index"]: one["relevance_score"] for one in ranked["results"]} == {
        one["index"]: one["score"] for one in many["data"]
    }
    assert error["param"] == "text_1"
    assert cut["param"] == "max_tokens_per_doc"
    assert "truncate_prompt_tokens" in cut["message"]


# ---- adapters that generate no text ----------------------------------------------------------

KINDS: dict[str, tuple[str, int]] = {
    "sorts": ("SEQ_CLS", 4),
    "ranks": ("SEQ_CLS", 1),
    "tags": ("TOKEN_CLS", 3),
    "encodes": ("FEATURE_EXTRACTION", 0),
}


TAGS = ("<b>noun</b>", "verb", "\u00e9tat")
"""Names of labels, which are data: nothing is made of what looks like HTML."""


@pytest.fixture(scope="module")
def reads(api: Any, base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The shared server with an adapter of each kind, as PEFT saves it."""
    classes: dict[str, Any] = {
        "SEQ_CLS": AutoModelForSequenceClassification,
        "TOKEN_CLS": AutoModelForTokenClassification,
        "FEATURE_EXTRACTION": AutoModel,
    }
    for seed, (name, (task, labels)) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        more = {"num_labels": labels} if labels else {}
        model = classes[task].from_pretrained(base_folder, dtype=torch.bfloat16, **more)
        config = LoraConfig(task_type=task, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        folder = tmp_path_factory.mktemp(name)
        get_peft_model(model, config).save_pretrained(folder)
        if name == "tags":
            model.config.id2label = dict(enumerate(TAGS))
            model.config.save_pretrained(folder)
        with Client(api.server.url) as client:
            client.adapters.upload(folder, name=name)
    yield api
    for name in KINDS:
        api.http.delete(f"/v1/adapters/{name}", params={"force": True}).raise_for_status()


def test_what_an_adapter_is_for_is_told_with_its_proof(reads: Any) -> None:
    for name, (task, labels) in KINDS.items():
        adapter = reads.http.get(f"/v1/adapters/{name}").json()
        report = reads.http.get(f"/v1/adapters/{name}/versions/{adapter['version']}").json()["report"]
        assert (report["task"], report["labels"]) == (task, labels)
        assert ("head" in adapter["kinds"]) == bool(labels)
        assert ("The classes of" in report["proof"]["shown"]) == bool(labels)
        assert report["label_names"] == (list(TAGS) if name == "tags" else [])
    with Client(reads.server.url) as client:
        (version,) = client.adapters.versions("tags")
        report = client.adapters.version("tags", version.version).report
    assert report is not None
    assert report.label_names == TAGS


def test_texts_are_sorted_into_classes_and_tokens_tagged(reads: Any, tokenizer: BaseTokenizer) -> None:
    sorted_ = answer_of(reads.http, "/classify", model="sorts", input=TEXTS)
    again = answer_of(reads.http, "/v1/classify", model="sorts", input=TEXTS[1])
    padded = answer_of(reads.http, "/classify", model="sorts", input=TEXTS[1] + "<|im_end|><|im_end|>")
    tags = answer_of(reads.http, "/classify", model="tags", input=TEXTS)

    for index, entry in enumerate(sorted_["data"]):
        assert entry["index"] == index
        assert entry["num_classes"] == len(entry["probs"]) == 4
        assert math.fsum(entry["probs"]) == pytest.approx(1)
        assert entry["label"] == f"LABEL_{entry['probs'].index(max(entry['probs']))}"
    assert again["data"][0]["probs"] == sorted_["data"][1]["probs"] == padded["data"][0]["probs"]
    for text, entry in zip(TEXTS, tags["data"], strict=True):
        assert [one["token_id"] for one in entry["tokens"]] == tokenizer.encode(text)
        assert "".join(one["token"] for one in entry["tokens"]) == text
        assert all(math.fsum(one["probs"]) == pytest.approx(1) for one in entry["tokens"])
        for one in entry["tokens"]:
            assert one["label"] == TAGS[one["probs"].index(max(one["probs"]))]
    assert sorted_["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(text)) for text in TEXTS)


def test_a_conversation_is_classified_as_the_chat_template_writes_it(
    reads: Any, tokenizer: BaseTokenizer
) -> None:
    messages = [{"role": "user", "content": "Where is my parcel?"}]
    ids = tokenizer.encode_chat(TemplateInput(messages))
    found = answer_of(reads.http, "/classify", model="sorts", messages=messages)
    assert found["data"] == answer_of(reads.http, "/classify", model="sorts", input=ids)["data"]
    with Client(reads.server.url) as client:
        (said,) = client.classify(messages=messages, adapter="sorts")
        assert said.label is not None
        assert list(said.label.probabilities) == found["data"][0]["probs"]
        with pytest.raises(ValueError, match="either texts or messages"):
            client.classify("x", messages=messages, adapter="sorts")
    for body in ({}, {"input": "x", "messages": messages}):
        assert answer_of(reads.http, "/classify", 400, model="sorts", **body)["param"] == "input"


def test_a_classifier_of_one_label_scores_pairs(reads: Any) -> None:
    joined = answer_of(reads.http, "/classify", model="ranks", input=[TEXTS[0] + text for text in TEXTS[1:3]])
    ranked = answer_of(reads.http, "/rerank", model="ranks", query=TEXTS[0], documents=TEXTS[1:3])
    scored = answer_of(reads.http, "/score", model="ranks", text_1=TEXTS[0], text_2=TEXTS[1:3])

    scores = [one["score"] for one in scored["data"]]
    assert scores == [one["probs"][0] for one in joined["data"]]
    assert [one["index"] for one in ranked["results"]] == sorted((0, 1), key=lambda index: -scores[index])


def test_an_encoder_makes_vectors_and_scores_pairs_by_them(reads: Any) -> None:
    own = np.array(vectors(reads.http, model="encodes", input=TEXTS))
    scored = answer_of(reads.http, "/score", model="encodes", text_1=TEXTS[0], text_2=TEXTS[1:])

    assert own.tolist() != vectors(reads.http, input=TEXTS)
    np.testing.assert_allclose([one["score"] for one in scored["data"]], own[1:] @ own[0], rtol=1e-5)


def test_a_long_answer_about_tokens_is_whole_or_refused_with_what_it_has_room_for(
    reads: Any, tokenizer: BaseTokenizer
) -> None:
    texts = [" ".join(TEXTS) * 12] * 3
    tags = answer_of(reads.http, "/classify", model="tags", input=texts)["data"]
    alone = answer_of(reads.http, "/classify", model="tags", input=TEXTS[0])["data"][0]["tokens"]
    assert [[one["token_id"] for one in entry["tokens"]] for entry in tags] == [
        tokenizer.encode(text) for text in texts
    ]
    assert tags[2]["tokens"][: len(alone)] == alone

    labels = KINDS["tags"][1]
    room = (1 << 21) // (labels + 8)
    error = answer_of(reads.http, "/classify", 400, model="tags", input=[[5] * 2000] * (room // 2000 + 1))
    assert error["param"] == "input"
    assert f"one answer has room for {room} with the {labels} labels of each" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"model": "sorts", "prompt": "x"}, "model"),
        ("/v1/chat/completions", {"model": "tags", "messages": [{"role": "user", "content": "x"}]}, "model"),
        ("/generate", {"model": None, "adapter": "encodes", "prompt": "x"}, "model"),
        ("/v1/decide", {"model": "sorts", "prompt": "x", "choices": ["a", "b"]}, "model"),
        ("/classify", {"model": "encodes", "input": "x"}, "model"),
        ("/classify", {"model": BASE, "input": "x"}, "model"),
        ("/classify", {"adapter": [{"name": "sorts", "weight": 0.5}], "input": "x"}, "model"),
        ("/score", {"model": "sorts", "text_1": "x", "text_2": "y"}, "model"),
        ("/rerank", {"model": "tags", "query": "x", "documents": ["y"]}, "model"),
        ("/score", {"adapter": [{"name": "ranks", "weight": 0.5}], "text_1": "x", "text_2": "y"}, "model"),
        ("/score", {"model": "ranks", "text_1": "x", "text_2": "y", "pooling": "mean"}, "pooling"),
    ],
)
def test_an_adapter_is_asked_only_for_what_it_is_for(
    reads: Any, path: str, body: dict[str, Any], param: str
) -> None:
    error = answer_of(reads.http, path, 400, **body)
    assert error["param"] == param, error
    assert error["code"] in ("adapter_task", "invalid_value")


# ---- decisions -------------------------------------------------------------------------------


def logprob_of(api: Any, prompt: str, text: str, tokenizer: BaseTokenizer, model: str) -> float:
    body = {"model": model, "prompt": prompt + text, "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = answer_of(api.http, "/v1/completions", **body)
    count = len(tokenizer.encode(text, special=False))
    return math.fsum(answer["choices"][0]["logprobs"]["token_logprobs"][-count:])


def test_a_decision_has_the_probabilities_of_its_choices(api: Any, tokenizer: BaseTokenizer) -> None:
    choices = [" Paris", " Berlin", " a small village"]
    for model in (BASE, "red"):
        answer = answer_of(api.http, "/v1/decide", model=model, prompt=FRANCE, choices=choices)
        expected = [logprob_of(api, FRANCE, choice, tokenizer, model) for choice in choices]
        found = answer["choices"]
        assert [one["logprob"] for one in found] == pytest.approx(expected, abs=1e-6)
        whole = math.fsum(map(math.exp, expected))
        assert [one["probability"] for one in found] == pytest.approx(
            [math.exp(value) / whole for value in expected]
        )
        assert math.fsum(one["probability"] for one in found) == pytest.approx(1)
        best = max(found, key=lambda one: one["probability"])
        assert (answer["choice"], answer["index"]) == (best["text"], best["index"])
    assert answer_of(api.http, "/v1/decide", prompt=FRANCE, choices=choices)["choice"] == " Paris"


@one_server
def test_what_the_prefix_cache_had_is_told_once_for_each_prompt(api: Any) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 6 + FRANCE
    first = answer_of(api.http, "/v1/embeddings", input=text)["usage"]
    generated = answer_of(api.http, "/v1/completions", prompt=text, max_tokens=1)["usage"]
    embedded = answer_of(api.http, "/v1/embeddings", input=[text, text, "x"])["usage"]
    decided = answer_of(api.http, "/v1/decide", prompt=text, choices=[" a", " b", " c"])["usage"]

    cached = generated["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached <= first["prompt_tokens"]
    assert embedded["prompt_tokens_details"]["cached_tokens"] == 2 * cached
    assert decided["prompt_tokens_details"]["cached_tokens"] == cached


def test_the_least_temperature_chooses_the_likeliest(api: Any) -> None:
    body: dict[str, Any] = {"prompt": FRANCE, "choices": [" Rome", " Paris"]}
    answer = answer_of(api.http, "/v1/decide", **body, temperature=1e-310)
    assert [one["probability"] for one in answer["choices"]] == [0, 1]
    assert answer["choice"] == " Paris"


def test_a_prior_takes_off_what_is_likely_anyway(api: Any) -> None:
    body: dict[str, Any] = {"prompt": FRANCE, "choices": [" Paris", " the"]}
    plain = answer_of(api.http, "/v1/decide", **body)
    prior = answer_of(api.http, "/v1/decide", prompt="N/A is", choices=body["choices"])
    both = answer_of(api.http, "/v1/decide", **body, prior="N/A is")
    soft = answer_of(api.http, "/v1/decide", **body, temperature=100)
    own = [one["logprob"] for one in plain["choices"]]
    before = [one["logprob"] for one in prior["choices"]]
    assert [one["prior_logprob"] for one in both["choices"]] == pytest.approx(before)
    odds = both["choices"][0]["probability"] / both["choices"][1]["probability"]
    assert math.log(odds) == pytest.approx((own[0] - before[0]) - (own[1] - before[1]))
    assert abs(soft["choices"][0]["probability"] - 0.5) < abs(plain["choices"][0]["probability"] - 0.5)


def test_after_messages_a_choice_is_the_whole_answer(api: Any, tokenizer: BaseTokenizer) -> None:
    messages = [{"role": "user", "content": "Is Paris in France? Answer Yes or No."}]
    body = {"messages": messages, "choices": ["Yes", "No", "Yes, it is."]}
    whole = answer_of(api.http, "/v1/decide", **body)
    begun = answer_of(api.http, "/v1/decide", **body, ends=False)
    for one, other, text in zip(whole["choices"], begun["choices"], body["choices"], strict=True):
        count = len(tokenizer.encode(text, special=False))
        assert len(one["token_logprobs"]) == count + 1
        assert one["token_logprobs"][:count] == pytest.approx(other["token_logprobs"], abs=1e-6)
        assert one["logprob"] < other["logprob"]
    evened = answer_of(api.http, "/v1/decide", **body, normalize="mean")
    weights = [
        math.exp(math.fsum(one["token_logprobs"]) / len(one["token_logprobs"])) for one in whole["choices"]
    ]
    assert [one["probability"] for one in evened["choices"]] == pytest.approx(
        [weight / math.fsum(weights) for weight in weights]
    )


def test_more_choices_than_there_are_places_are_weighed_together(scripted: Server) -> None:
    with scripted.client() as http:
        choices = [f" {number}" for number in range(300)]
        answer = answer_of(http, "/v1/decide", prompt="a", choices=choices, prior="b")
        assert [one["text"] for one in answer["choices"]] == choices
        assert math.fsum(one["probability"] for one in answer["choices"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"choices": ["a", "b"]}, "prompt"),
        ({"prompt": "x"}, "choices"),
        ({"prompt": "x", "choices": ["a"]}, "choices"),
        ({"prompt": "x", "choices": ["a", "a"]}, "choices"),
        ({"prompt": "x", "choices": ["a", ""]}, "choices[1]"),
        ({"prompt": "x", "choices": [str(n) for n in range(1025)]}, "choices"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}], "choices": ["a", "b"]}, "prompt"),
        ({"prompt": "x", "choices": ["a", "b"], "prior": [{"role": "user", "content": "x"}]}, "prior"),
        ({"prompt": "x", "choices": ["a", "b"], "temperature": 0}, "temperature"),
        ({"prompt": "x", "choices": ["a", "b"], "adapter": "nobody"}, "adapter"),
        ({"prompt": "x", "choices": ["a", "b"], "max_tokens": 5}, "max_tokens"),
    ],
)
def test_bad_decisions_are_refused_by_field(scripted: Server, body: dict[str, Any], param: str) -> None:
    with scripted.client() as http:
        error = answer_of(http, "/v1/decide", 404 if "adapter" in body else 400, **body)
        assert error["param"] == param, error
