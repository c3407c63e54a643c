"""Checkpoints of jobs that requests ask for: proved on first use, gone with the job."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai import OpenAI

from onebase_adapters.registry import DEFAULT_TENANT, Registry
from onebase_adapters.signatures import PolicyRule, SignaturePolicy
from onebase_adapters.store.blobs import AdapterFiles
from onebase_adapters.store.store import Store
from onebase_edge.errors import InvalidRequestError, VersionFailedError
from onebase_server.adapters.activation import RefusalLimit
from onebase_server.jobs import checkpoints
from onebase_server.jobs.checkpoints import CheckpointModels, adapter_of

from .access import Keys
from .support import Server, Starter
from .test_adapter_service import House
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


class Checkpoint:
    """A checkpoint whose job runs, with the service around it; made in an event loop."""

    name = "ckpt:ftjob-5b7e0d12:step-8"

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.registry = Registry(f"sqlite:///{folder / 'registry.db'}", base_id="b" * 64, base_name="base")
        self.registry.migrate()
        self.house = House(self.registry, folder)
        nothing: Any = None
        self.models = CheckpointModels(self.house.adapters, nothing, nothing, nothing)
        self.models._found = self._found  # type: ignore[method-assign]
        monkeypatch.setattr(checkpoints, "take_folder", self._take)
        self.while_taken: Callable[[], object] = list
        """Call of another client while the checkpoint's files are copied."""

    async def _found(self, tenant: str, name: str, param: str) -> tuple[Any, int, Path]:
        job = SimpleNamespace(id="ftjob-5b7e0d12", name="ckpt", tenant=tenant, key="", parent=None)
        return job, 8, Path()

    def _take(self, store: Store, place: Path) -> AdapterFiles:
        self.while_taken()
        return self.house.both

    async def use(self) -> None:
        await self.models.use(DEFAULT_TENANT, self.name, param="model")
        await self.house.settled()
        await self.house.catalog.refresh()

    def register(self) -> None:
        files = self.house.both
        source = {"kind": "checkpoint"}
        self.registry.add_version(self.name, files.digest, files, source, activates=True)

    def set_ready(self) -> None:
        self.registry.set_state(DEFAULT_TENANT, self.name, self.house.digest, "ready")

    def deactivate(self) -> None:
        self.registry.deactivate(DEFAULT_TENANT, self.name)

    @property
    def states(self) -> list[str]:
        return [version.state for version in self.registry.versions(DEFAULT_TENANT, self.name)]

    @property
    def active(self) -> str | None:
        return self.registry.adapter(DEFAULT_TENANT, self.name).active


@pytest.mark.parametrize("moment", ["proof", "copy", "copy after the proof", "proof again"])
def test_a_checkpoint_that_is_deactivated_before_its_first_use_is_done_stays_inactive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    async def test() -> None:
        ours = Checkpoint(tmp_path, monkeypatch)

        def change() -> None:
            if moment == "copy after the proof":
                ours.set_ready()
            ours.deactivate()

        if moment.startswith("copy"):  # a restart interrupted its proof
            ours.register()
            ours.while_taken = change
            await ours.use()
        else:
            ours.house.verifier.free.clear()
            if moment == "proof again":
                ours.register()
                ours.set_ready()
                ours.registry.activate(DEFAULT_TENANT, ours.name, ours.house.digest)
                ours.registry.reopen(DEFAULT_TENANT, ours.name, ours.house.digest)
                ours.register()
                await ours.house.catalog.refresh()
                await ours.house.adapters.resume()
            using = asyncio.create_task(ours.use())
            while not ours.house.verifier.proofs:
                await asyncio.sleep(0.01)
            change()
            ours.house.verifier.free.set()
            await using
        assert ours.active is None
        await ours.use()
        assert ours.active is None
        ours.registry.close()

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("is_ready", [True, False])
@pytest.mark.parametrize("is_deactivated", [False, True])
def test_a_checkpoint_that_was_registered_before_its_files_were_copied_is_active_unless_that_was_called_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_deactivated: bool, is_ready: bool
) -> None:
    async def test() -> None:
        ours = Checkpoint(tmp_path, monkeypatch)
        ours.register()
        add = ours.house.adapters.add

        async def add_late(*args: Any, **how: Any) -> Any:
            if is_ready:
                ours.set_ready()
            if is_deactivated:
                ours.deactivate()
            return await add(*args, **how)

        monkeypatch.setattr(ours.house.adapters, "add", add_late)
        await ours.use()
        assert ours.active == (None if is_deactivated else ours.house.digest)
        ours.registry.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_checkpoint_that_had_no_room_in_memory_is_activated_by_a_later_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        ours = Checkpoint(tmp_path, monkeypatch)
        no_room = InvalidRequestError("pinned adapters take all", code="host_memory_exceeded")
        ours.house.activation.refusal = no_room
        for _ in range(2):
            with pytest.raises(InvalidRequestError, match="take all"):
                await ours.use()
        await ours.house.settled()
        ours.house.activation.refusal = None
        await ours.use()
        assert ours.active == ours.house.digest
        ours.registry.close()

    asyncio.run(asyncio.wait_for(test(), 60))


@pytest.mark.parametrize("is_active", [True, False])
def test_an_active_checkpoint_that_fails_when_it_is_proved_again_is_proved_by_the_next_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_active: bool
) -> None:
    async def test() -> None:
        ours = Checkpoint(tmp_path, monkeypatch)
        await ours.use()
        lost = ours.house.files.find(ours.house.digest)
        (await ours.house.files.fetch(lost)).unlink()
        ours.house.verifier.rejects = True  # as a full store does
        ours.house.adapters.prove_again(lost)
        await ours.house.settled()
        await ours.house.catalog.refresh()
        if not is_active:
            ours.deactivate()
        with suppress(VersionFailedError):
            await ours.use()
        assert ours.states == ["failed"]
        ours.house.verifier.rejects = False
        await ours.use()
        assert ours.states == ["ready" if is_active else "failed"]
        assert ours.active == (ours.house.digest if is_active else None)
        ours.registry.close()

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_refusal_in_a_minute_of_too_many_is_in_the_audit_log_at_the_next_request_and_then_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        ours = Checkpoint(tmp_path, monkeypatch)
        adapters = ours.house.adapters
        adapters.signatures = SignaturePolicy((PolicyRule("require", signers=("acme",)),))
        while adapters._refusals.take(DEFAULT_TENANT):
            pass
        for expected in (0, 1, 1):
            with pytest.raises(VersionFailedError):
                await ours.use()
            noted = [entry.action for entry in ours.registry.audit.entries(limit=9)]
            assert noted.count("adapter.refused") == expected
            adapters._refusals = RefusalLimit()  # a minute later
        ours.registry.close()

    asyncio.run(asyncio.wait_for(test(), 60))


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
