"""Checkpoints of jobs that requests ask for: proved on first use, gone with the job."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import openai
import pytest
from openai import OpenAI

from onebase_adapters.registry import DEFAULT_TENANT, Registry
from onebase_server.jobs.checkpoints import adapter_of

from .access import Keys
from .support import Server, Starter
from .training_support import BASE, add_file, ended, job_folder, make_job, openai_client, step_of, wait_job


@pytest.fixture(scope="module")
def server(serve_scripted: Starter) -> Iterator[Server]:
    with serve_scripted("words", "--train-jobs", "3") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return openai_client(server)


def waiting(server: Server, client: OpenAI, name: str) -> Any:
    """A job that has written a checkpoint and is paused."""
    job = make_job(client, "until-paused", extra={"name": name})
    wait_job(server, client, job.id, lambda job: step_of(job) == 5)
    client.fine_tuning.jobs.pause(job.id)
    return wait_job(server, client, job.id, lambda job: job.status == "paused")


def newest(client: OpenAI, job_id: str) -> str:
    return client.fine_tuning.jobs.checkpoints.list(job_id).data[0].fine_tuned_model_checkpoint


def ask(client: OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt="one two", max_tokens=2).choices[0].text


def test_a_checkpoint_is_proved_when_it_is_first_asked_for_and_answers(
    server: Server, client: OpenAI
) -> None:
    job = waiting(server, client, "ckpt")
    model = newest(client, job.id)
    assert model == f"ckpt:{job.id}:step-5"
    assert server.client().get(f"/v1/adapters/{model}").status_code == 404
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: ask(client, model), range(4)))
    assert texts[0]
    answer = server.client().post("/generate", json={"prompt": "one", "adapter": model, "max_tokens": 1})
    assert answer.json()["adapter"].startswith(f"{model}@")
    versions = server.client().get(f"/v1/adapters/{model}/versions").json()["data"]
    assert [version["state"] for version in versions] == ["ready"]
    source = versions[0]["source"]
    assert (source["kind"], source["job"], source["step"]) == ("checkpoint", job.id, 5)
    # Nothing of the adapter itself has changed.
    assert server.client().get("/v1/adapters/ckpt").status_code == 404
    client.fine_tuning.jobs.cancel(job.id)


def test_a_sample_of_a_checkpoint_undoes_neither_its_deactivation_nor_its_deletion(
    server: Server, client: OpenAI
) -> None:
    http = server.client()
    job = waiting(server, client, "undone")
    model = newest(client, job.id)
    session = http.post("/api/v1/create_session", json={}).json()["session_id"]
    wanted = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
    wanted["model_path"] = f"tinker://adapters/sampler_weights/{model}"
    sampler = http.post("/api/v1/create_sampling_session", json=wanted).json()["sampling_session_id"]

    def sampled(number: int) -> bool:
        chunks = [{"type": "encoded_text", "tokens": [5, 6, 7]}]
        body = {"sampling_session_id": sampler, "seq_id": number, "num_samples": 1}
        body |= {"prompt": {"chunks": chunks}, "sampling_params": {"max_tokens": 1}}
        request_id = http.post("/api/v1/asample", json=body).json()["request_id"]
        body = {"request_id": request_id}
        return b'"error"' not in http.post("/api/v1/retrieve_future", json=body, timeout=120.0).content

    http.post(f"/v1/adapters/{model}/deactivate").raise_for_status()
    assert sampled(0)
    with pytest.raises(openai.NotFoundError):
        ask(client, model)
    assert not http.get(f"/v1/adapters/{model}").json()["active"]
    http.delete(f"/v1/adapters/{model}").raise_for_status()
    assert not sampled(1)
    assert http.get(f"/v1/adapters/{model}").status_code == 404
    client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize("is_due", [False, True], ids=["deactivated", "not activated yet"])
def test_a_checkpoint_that_is_proved_again_becomes_active_only_if_nobody_has_deactivated_it(
    server: Server, client: OpenAI, is_due: bool
) -> None:
    http = server.client()
    job = waiting(server, client, "again")
    model = newest(client, job.id)
    ask(client, model)
    http.post(f"/v1/adapters/{model}/deactivate").raise_for_status()

    def states() -> list[str]:
        found = http.get(f"/v1/adapters/{model}/versions").json()["data"]
        return [version["state"] for version in found]

    file = server.data_dir / "registry.db"
    with closing(sqlite3.connect(file)) as database:
        ((base,),) = database.execute("SELECT base_id FROM adapters WHERE name = ?", (model,))
    with closing(Registry(f"sqlite:///{file}", base_id=base, base_name=BASE)) as registry:
        (version,) = registry.versions(DEFAULT_TENANT, model)
        registry.reopen(DEFAULT_TENANT, model, version.digest)
        server.wait_for(lambda: states() == ["validating"])
        if is_due:  # as a server leaves it that ends between proof and activation
            registry.add_version(model, version.digest, version.files, version.source, activates=True)
            found = {"report": version.report, "prepared": version.prepared}
            registry.set_state(DEFAULT_TENANT, model, version.digest, "ready", **found)
            server.wait_for(lambda: states() == ["ready"])
            assert ask(client, model)
        else:
            with pytest.raises(openai.NotFoundError):
                ask(client, model)
            (version,) = registry.versions(DEFAULT_TENANT, model)
            assert (version.state, version.activates) == ("validating", False)
    client.fine_tuning.jobs.cancel(job.id)


def test_a_checkpoint_is_gone_with_the_end_of_its_job_and_the_error_says_what_to_ask_for(
    server: Server, client: OpenAI
) -> None:
    job = waiting(server, client, "over")
    model = newest(client, job.id)
    ask(client, model)
    client.fine_tuning.jobs.resume(job.id)
    done = wait_job(server, client, job.id, ended)
    assert done.status == "succeeded"
    server.wait_for(lambda: server.client().get(f"/v1/adapters/{model}").status_code == 404)
    with pytest.raises(openai.NotFoundError, match=r"is gone: .* Ask for over"):
        ask(client, model)
    cancelled = waiting(server, client, "undone")
    model = newest(client, cancelled.id)
    ask(client, model)
    client.fine_tuning.jobs.cancel(cancelled.id)
    server.wait_for(lambda: server.client().get(f"/v1/adapters/{model}").status_code == 404)
    with pytest.raises(openai.NotFoundError, match="is gone"):
        ask(client, model)


def test_a_checkpoint_whose_files_are_gone_is_not_served_any_more(server: Server, client: OpenAI) -> None:
    job = waiting(server, client, "pruned")
    model = newest(client, job.id)
    ask(client, model)
    shutil.rmtree(job_folder(server.data_dir, job.id) / "checkpoints")
    with pytest.raises(openai.NotFoundError, match=r"is gone: .*list of checkpoints"):
        ask(client, model)
    assert server.client().get(f"/v1/adapters/{model}").status_code == 404
    client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize(
    "model", ["x:ftjob-0000:step-5", "x:step-5", "x:ftjob-0000:step-5@00000000", "x:ftjob-../..:step-1"]
)
def test_a_checkpoint_of_no_job_is_unknown(client: OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError):
        ask(client, model)


def test_a_checkpoint_of_another_step_or_name_is_unknown(server: Server, client: OpenAI) -> None:
    job = waiting(server, client, "exact")
    for model in (f"exact:{job.id}:step-4", f"other:{job.id}:step-5"):
        with pytest.raises(openai.NotFoundError):
            ask(client, model)
    client.fine_tuning.jobs.cancel(job.id)


def test_training_goes_on_from_a_checkpoint_as_a_version_of_its_adapter(
    server: Server, client: OpenAI
) -> None:
    job = waiting(server, client, "branch")
    model = newest(client, job.id)
    branch = client.fine_tuning.jobs.create(model=model, training_file=add_file(client, "rows"))
    done = wait_job(server, client, branch.id, ended)
    assert (done.status, done.name) == ("succeeded", "branch")
    assert done.parent["name"] == model
    assert done.model.startswith(f"{model}@")
    client.fine_tuning.jobs.cancel(job.id)
    assert BASE in {one.id for one in client.models.list()}


def test_another_tenant_neither_asks_a_checkpoint_nor_goes_on_from_it(
    serve_scripted: Starter, keys: Keys
) -> None:
    own, other = (keys.make("generate", "adapters", "train", tenant=name) for name in ("own", "other"))
    with serve_scripted("words", data_dir=keys.file.parent) as server:
        url = f"{server.url}/v1"
        ours, theirs = (OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60) for key in (own, other))
        job = make_job(ours, "until-paused", extra={"name": "secret"})

        def at_five() -> bool:
            return step_of(ours.fine_tuning.jobs.retrieve(job.id)) == 5

        server.wait_for(at_five)
        ours.fine_tuning.jobs.pause(job.id)
        model = newest(ours, job.id)
        assert ask(ours, model)
        nobody = f"secret:ftjob-{'0' * 24}:step-5"
        said = []
        for name in (model, nobody):
            with pytest.raises(openai.NotFoundError) as refused:
                ask(theirs, name)
            said.append(refused.value.message.replace(name, "NAME"))
            with pytest.raises(openai.BadRequestError, match="There is no checkpoint"):
                make_job(theirs, "rows", model=name)
        assert said[0] == said[1]
        ours.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("acme:ftjob-1f:step-2", "acme"),
        ("hub:acme/repo", "hub:acme/repo"),
        ("acme", "acme"),
        ("a:b:step-2", "a:b:step-2"),
        ("acme:ftjob-1f:step-02", "acme:ftjob-1f:step-02"),
    ],
)
def test_only_a_checkpoints_name_begins_with_its_adapters(name: str, adapter: str) -> None:
    assert adapter_of(name) == adapter
