"""From what was trained to what is served: only of a job that still runs, and only as it was wished."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onebase_adapters.store.blobs import ADAPTER_FILES
from onebase_edge.background import Backoff, Threads
from onebase_edge.errors import ApiError, InvalidRequestError, UnavailableError
from onebase_server.jobs import delivery
from onebase_server.jobs.delivery import Delivered, Delivery, DeliveryError

from .support import Starter
from .training_support import ended, make_job, messages, openai_client, run_job, wait_job

DIGEST = "d" * 64


class _Library:
    """Knows one version, which is ready at once or never; `away`: so often it can take nothing."""

    def __init__(self, *, away: int = 0, proved: bool = True, failure: ApiError | None = None) -> None:
        self.away = away
        self.proved = proved
        self.failure = failure
        self.wishes: list[Any] = []
        self.active: str | None = None
        self.signs = False
        self.known = SimpleNamespace(tenant="acme", name="orders", digest=DIGEST, state="ready", error=None)
        names = {"acme": SimpleNamespace(own=lambda name: SimpleNamespace(active=self.active))}
        self.catalog = SimpleNamespace(of_digest=lambda digest: [self.known], of=names.__getitem__)
        self.activation = SimpleNamespace(history=self.history)
        self.disk = Threads("disk", 1)
        blob = SimpleNamespace(sha256="0" * 64, size=1)
        self.store = SimpleNamespace(add_file=lambda path: blob, add_bytes=lambda content: blob)

    async def add(self, tenant: str, name: str, files: Any, source: Any, wishes: Any, *, actor: str) -> Any:
        self.wishes.append(wishes)
        self.away -= 1
        if self.away >= 0:
            raise UnavailableError("locked for a moment", code="registry_unavailable", retry_after=5)
        return self.known

    async def wait(self, tenant: str, name: str, digest: str) -> Any:
        if not self.proved:
            await asyncio.Event().wait()

    async def version(self, tenant: str, name: str, digest: str) -> Any:
        return self.known

    async def activate_with_retries(self, version: Any, *, expected: Any) -> ApiError | None:
        if self.failure is None:
            self.active = version.digest
        return self.failure

    async def history(self, tenant: str, name: str) -> list[Any]:
        return []

    async def check_job(self, job: Any, *, actor: str) -> None:
        """No signature is required of what is trained here."""


def test_of_a_recipe_listed_settings_are_signed_and_the_sum_of_all_but_no_prompts() -> None:
    recipe = {
        "method": "reinforcement",
        "r": 8,
        "seed": 7,
        "sample_prompts": ["secret" * 9999],
        "grader": "g",
    }
    job: Any = SimpleNamespace(
        report={"recipe": recipe}, settings={}, training_file=None, validation_file=None
    )
    files: Any = None
    facts = asyncio.run(delivery.training_facts(job, files))
    whole = json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()
    signed = {"method": "reinforcement", "r": 8, "seed": 7, "sha256": hashlib.sha256(whole).hexdigest()}
    assert facts == {"data": {}, "recipe": signed, "seed": 7}


@pytest.fixture
def deliver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Delivers a job with this wish to a library, while its row says this state."""
    monkeypatch.setattr(delivery, "BACKOFF", Backoff(0.0, 0.0))
    for file in ADAPTER_FILES:
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / file).write_text("x")

    async def restore(job: Any) -> None:
        """Its files are here."""

    async def store_curve(tenant: str, job_id: str, report: Any) -> str:
        return "file-1"

    def run(library: Any, activate: str = "always", state: str = "running") -> Delivered:
        async def current() -> Any:
            return SimpleNamespace(state=state)

        home: Any = SimpleNamespace(job=lambda job_id: tmp_path)
        files: Any = SimpleNamespace(store_curve=store_curve)
        kept: Any = SimpleNamespace(restore=restore)
        job: Any = SimpleNamespace(
            parent=None,
            settings={},
            id="ftjob-1",
            server="server-1",
            key="",
            tenant="acme",
            name="orders",
            activate=activate,
            report={"better": False},
        )
        record: Any = SimpleNamespace(current=current)
        return asyncio.run(Delivery(library, home, files, kept, proof_seconds=0.05).deliver(job, record))

    return run


@pytest.mark.parametrize(("activate", "active"), [("never", False), ("if_better", False), ("always", True)])
def test_what_is_active_is_as_asked_also_when_the_registry_was_away(
    deliver: Any, activate: str, active: bool
) -> None:
    library = _Library(away=1)
    done = deliver(library, activate)
    assert (done.activated, done.as_asked) == (active, True)
    assert library.active == (DIGEST if active else None)


@pytest.mark.parametrize("state", ["cancelled", "paused", "queued"])
def test_a_job_that_does_not_run_any_more_activates_nothing(deliver: Any, state: str) -> None:
    library = _Library()
    assert not deliver(library, state=state).activated
    assert library.active is None


def test_the_library_is_not_told_to_activate_since_it_would_after_a_restart(deliver: Any) -> None:
    library = _Library()
    assert deliver(library).activated
    assert [wishes.activate for wishes in library.wishes] == [False]


def test_an_activation_that_fails_is_told_and_its_job_is_delivered(deliver: Any) -> None:
    done = deliver(_Library(failure=InvalidRequestError("no room in memory")))
    assert (done.activated, done.as_asked) == (False, False)
    assert "could not be activated: no room in memory" in done.message


def test_an_adapter_that_no_verifier_proves_fails_its_job_for_now(deliver: Any) -> None:
    library = _Library(proved=False)
    with pytest.raises(DeliveryError, match="not proved within") as failed:
        deliver(library)
    assert failed.value.code == "delivery_failed"
    assert library.active is None


@pytest.mark.parametrize(("wish", "state"), [("cancel", "cancelled"), ("pause", "paused")])
def test_a_job_that_is_stopped_before_it_is_delivered_again_never_gets_active(
    serve_scripted: Starter, tmp_path: Path, wish: str, state: str
) -> None:
    with serve_scripted("words,hangs", data_dir=tmp_path) as server:
        client = openai_client(server)
        job = make_job(client, "rows", extra={"name": "orders", "activate": "always"})
        server.wait_for(lambda: _state_of_the_version(server) in ("validating", "proving"))
        server.process.kill()
        server.exit_status()
    with serve_scripted("sleep-early", ready=False, data_dir=tmp_path) as server:
        server.wait_for(lambda: server.status_of("/health") is not None)
        client = openai_client(server)
        wait_job(server, client, job.id, lambda job: job.status == "queued")
        assert getattr(client.fine_tuning.jobs, wish)(job.id).status == state
    with serve_scripted("words", data_dir=tmp_path) as server:
        client = openai_client(server)
        server.wait_for(lambda: _state_of_the_version(server) == "ready")
        assert run_job(server, client, "rows").status == "succeeded"  # all the time that it takes
        assert server.client().get("/v1/adapters/orders").json()["active"] is False
        assert client.fine_tuning.jobs.retrieve(job.id).status == state
        if wish == "pause":
            client.fine_tuning.jobs.resume(job.id)
            done = wait_job(server, client, job.id, ended)
            assert (done.status, done.activated) == ("succeeded", True)


@pytest.mark.parametrize("then", ["another", "none"])
def test_a_version_is_not_activated_in_place_of_one_that_it_was_not_compared_with(
    serve_scripted: Starter, tmp_path: Path, then: str
) -> None:
    held = tmp_path / "held"
    with serve_scripted(f"words,held={held}") as server, server.client() as http:
        client = openai_client(server)
        old = run_job(server, client, "rows", extra={"name": "orders"})
        other = run_job(server, client, "rows", extra={"name": "orders", "activate": "never"})
        held.touch()
        job = make_job(client, "rows", extra={"name": "orders"})
        server.wait_for(lambda: "The adapter is being proved." in messages(client, job.id))
        if then == "none":
            assert http.post("/v1/adapters/orders/deactivate").is_success
        else:
            assert http.post("/v1/adapters/orders/activate", json={"version": other.version}).is_success
        held.unlink()
        done = wait_job(server, client, job.id, ended)
        assert (done.status, done.activated, done.report["active"]) == ("succeeded", False, old.version)
        (said, *_) = client.fine_tuning.jobs.list_events(job.id)
        now = f"{other.fine_tuned_model} is active" if then == "another" else "no version is active"
        assert f"it was compared with {old.fine_tuned_model}, and now {now}." in said.message
        assert said.level == "warn"
        adapter = http.get("/v1/adapters/orders").json()
        assert adapter["version" if then == "another" else "active"] == (
            other.version if then == "another" else False
        )


def test_a_job_trains_while_another_ones_adapter_waits_for_a_verifier(serve_scripted: Starter) -> None:
    with serve_scripted("words,unattached") as server:
        client = openai_client(server)
        for job in (make_job(client, "rows"), make_job(client, "rows")):
            server.wait_for(lambda job=job: "The adapter is being proved." in messages(client, job.id))


def _state_of_the_version(server: Any) -> str | None:
    answer = server.client().get("/v1/adapters/orders/versions")
    return answer.json()["data"][0]["state"] if answer.status_code == 200 else None


def test_a_version_that_training_went_on_from_and_that_is_active_is_named_once() -> None:
    job: Any = SimpleNamespace(
        name="orders",
        parent=SimpleNamespace(name="orders", digest="a" * 64),
        activate="if_better",
        settings={},
        report={"better_than": {"base": True, "parent": False, "active": False}, "active": "a" * 64},
    )

    assert delivery.decide(job).reason == (
        f"on held-out rows it is no better than orders@{'a' * 12}, which is active"
    )
