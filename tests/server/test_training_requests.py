"""What a job may be asked for: what this server cannot serve, keep or find again is refused by field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from pydantic import ValidationError

from onebase_edge.errors import InvalidRequestError
from onebase_server.http.schemas.jobs import CreateJobRequest, Method, ParentSettings

from .support import Starter
from .training_support import BASE


def recipe(max_rank: int = 64, **settings: Any) -> Any:
    body = {"model": BASE, "training_file": "file-1", "hyperparameters": settings}
    return CreateJobRequest.model_validate(body).recipe(max_rank)


@pytest.mark.parametrize(
    ("settings", "field", "limit"),
    [
        ({"r": 65}, "r", "up to rank 64"),
        ({"r": 33, "init": "eva"}, "r", "Write 32 or less"),
        ({"rank_pattern": {"q_proj": 8, "down_proj": 65}}, "rank_pattern", "down_proj is 65"),
    ],
)
def test_a_rank_that_the_server_does_not_serve_is_refused_before_it_is_trained(
    settings: dict[str, Any], field: str, limit: str
) -> None:
    with pytest.raises(InvalidRequestError, match=limit) as refused:
        recipe(**settings)
    assert refused.value.param == f"hyperparameters.{field}"
    assert "--max-rank" in refused.value.message


@pytest.mark.parametrize("settings", [{"r": 64, "rank_pattern": {"q_proj": 64}}, {"r": 32, "init": "eva"}])
def test_the_highest_rank_that_is_served_is_trained(settings: dict[str, Any]) -> None:
    assert recipe(**settings).r == settings["r"]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"sample_prompts": ["x"] * 33}, "sample_prompts"),
        ({"sample_prompts": ["x", "x" * 8001]}, "sample_prompts"),
        ({"metrics": [f"contains:{number}" for number in range(33)]}, "metrics"),
        ({"metrics": ["contains:" + "x" * 500]}, "metrics"),
    ],
)
def test_texts_that_the_registry_would_read_again_and_again_are_bounded(
    settings: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError, match="at most") as refused:
        recipe(**settings)
    assert refused.value.param == f"hyperparameters.{field}"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"metrics": ["exact_match"]}, "metrics"),
        ({"best_by": "word_f1"}, "best_by"),
        ({"tools": []}, "tools"),
    ],
)
def test_a_classifier_is_asked_for_no_replies(settings: dict[str, Any], field: str) -> None:
    def body(**given: Any) -> CreateJobRequest:
        method = {"type": "classification", "classification": {"hyperparameters": given}}
        return CreateJobRequest.model_validate({"model": BASE, "training_file": "file-1", "method": method})

    with pytest.raises(InvalidRequestError) as refused:
        body(**settings).recipe(64)
    assert refused.value.param == f"method.classification.hyperparameters.{field}"
    assert body(best_by="f1", r=4).recipe(64).method == "classification"
    with pytest.raises(InvalidRequestError, match="trained from the base") as refused:
        body().recipe(64, ParentSettings("acme@1", {"modules": [], "rslora": False}))
    assert refused.value.param == "model"
    with pytest.raises(ValidationError, match="leave dpo out"):
        Method.model_validate({"type": "classification", "dpo": {}})


def test_texts_within_their_bounds_are_taken() -> None:
    taken = recipe(sample_prompts=["x" * 8000] * 32, metrics=["contains:" + "x" * 491] * 32)
    assert (len(taken.sample_prompts), len(taken.metrics)) == (32, 32)


def test_epochs_by_both_of_their_names_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="give one of the two") as refused:
        recipe(n_epochs=2, epochs=3)
    assert refused.value.param == "hyperparameters.n_epochs"


@pytest.fixture(scope="module")
def http(serve_scripted: Starter) -> Iterator[httpx2.Client]:
    with serve_scripted("words") as server, server.client() as client:
        yield client


def jobs(http: httpx2.Client, **labels: str) -> httpx2.Response:
    return http.get("/v1/fine_tuning/jobs", params={f"metadata[{key}]": labels[key] for key in labels})


@pytest.fixture(scope="module")
def file(http: httpx2.Client) -> str:
    answer = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", b"rows")})
    return str(answer.json()["id"])


@pytest.mark.parametrize("key", ['a"b', "a\\b", "a\nb", "a\x00b"])
def test_a_key_by_which_no_job_can_be_found_is_refused(http: httpx2.Client, file: str, key: str) -> None:
    body = {"model": BASE, "training_file": file, "metadata": {key: "x"}}
    for answer in (http.post("/v1/fine_tuning/jobs", json=body), jobs(http, **{key: "x"})):
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "metadata"


@pytest.mark.parametrize("key", ["team", "a.b", "a b", "a[b]", "$", "a'b", "é", "日本", "a:b/c", "😀"])
def test_a_job_is_found_by_each_key_that_is_taken(http: httpx2.Client, file: str, key: str) -> None:
    body = {"model": BASE, "training_file": file, "metadata": {key: key}}
    made = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]
    assert [job["id"] for job in jobs(http, **{key: key}).json()["data"]] == [made]


def test_more_keys_than_a_job_can_have_are_refused(http: httpx2.Client) -> None:
    assert jobs(http, **{f"key{number}": "x" for number in range(16)}).status_code == 200
    for many in (17, 1100):
        answer = jobs(http, **{f"key{number}": "x" for number in range(many)})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "metadata")


@pytest.mark.parametrize("task", ["FEATURE_EXTRACTION", "SEQ_CLS"])
def test_a_job_does_not_go_on_from_what_generates_no_text(task: str) -> None:
    module = {"name": "q_proj", "kind": "lora", "rank": 8, "alpha": 16.0, "parameters": 64, "norm": 1.0}
    parent = ParentSettings("acme@1", {"task": task, "modules": [module], "rslora": False})
    body = CreateJobRequest.model_validate({"model": "acme", "training_file": "file-1"})
    with pytest.raises(InvalidRequestError, match=f"acme@1 cannot be trained further.*{task}") as refused:
        body.recipe(64, parent)
    assert refused.value.param == "model"
