"""What follows once a version is at the server: pulling, waiting and activating, with both clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest
from msgspec import convert
from tests.clients.registry_double import (
    COMMIT,
    Registry,
    digest,
    refusal,
    version,
)

from onebase import (
    AdapterRejectedError,
    AdapterSource,
    AdapterVersion,
    Progress,
)
from onebase._core.adapters import LONGEST_POLL_S, Waiting

pytestmark = pytest.mark.usefixtures("slept")
NAME = "acme-support"


# ---- ready, but not active ---------------------------------------------------------------------------


def test_a_version_that_the_server_did_not_activate_is_activated(sdk: Any, folder: Path) -> None:
    registry = Registry(activates=False)
    ready = sdk.call(lambda client: client.adapters.upload(folder, name=NAME), registry.transport)
    assert ready.active
    assert [entry["action"] for entry in registry.history[NAME]] == ["activate"]


def test_why_a_version_cannot_be_activated_is_raised(sdk: Any, folder: Path) -> None:
    registry = Registry(activates=False)

    def handle(request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/activate"):
            return refusal(400, "no_memory", "it does not fit into host memory")
        return registry.transport.handle_request(request)

    with pytest.raises(Exception, match="it does not fit into host memory"):
        sdk.call(lambda client: client.adapters.upload(folder, name=NAME), httpx2.MockTransport(handle))


def test_a_version_that_somebody_replaced_meanwhile_is_not_activated_again(sdk: Any, folder: Path) -> None:
    registry = Registry()
    registry.add(NAME, "other")

    def handle(request: httpx2.Request) -> httpx2.Response:
        answer = registry.transport.handle_request(request)
        if answer.json().get("state") == "ready":
            registry.activate(NAME, registry.versions[NAME][0])
            answer = httpx2.Response(200, json=answer.json() | {"active": False})
        return answer

    ready = sdk.call(lambda client: client.adapters.upload(folder, name=NAME), httpx2.MockTransport(handle))
    assert not ready.active
    assert registry.adapter(NAME)["version"] == digest("other")


# ---- pulling -----------------------------------------------------------------------------------------


def test_a_pull_says_what_to_fetch_and_ends_as_the_version_it_became(sdk: Any) -> None:
    registry = Registry(steps=[("pulling", 0.1), ("pulling", 0.9), ("proving", 0.5)])
    told: list[Progress] = []

    def pull(client: Any) -> Any:
        return client.adapters.pull(
            "acme/support-lora", revision="v2", subfolder="best", progress=told.append
        )

    ready = sdk.call(pull, registry.transport)
    assert registry.asked[0] == (
        "POST",
        "/v1/adapters",
        {
            "name": "support-lora",
            "hub": {"repo": "acme/support-lora", "revision": "v2", "subfolder": "best"},
            "activate": True,
        },
    )
    assert registry.asked[1][1].startswith("/v1/adapters/support-lora/versions/pull-1")
    assert ready.version == digest("acme/support-lora")
    assert ready.source == AdapterSource("hub", "acme/support-lora", "v2", COMMIT, "best")
    assert ready.active
    assert [step.stage for step in told] == ["pulling", "pulling", "pulling", "proving", "ready"]


def test_what_was_not_asked_for_is_left_to_the_server(sdk: Any) -> None:
    registry = Registry()
    sdk.call(
        lambda client: client.adapters.pull("acme/x", name=NAME, activate=False, wait=False),
        registry.transport,
    )
    assert registry.asked[0][2] == {"name": NAME, "hub": {"repo": "acme/x"}}


@pytest.mark.parametrize("repo", ["x", "/x", "acme/", "acme/x/y", "acme/x@v2", "hub:acme/x", ""])
def test_what_is_no_repository_is_refused_before_anything_is_sent(sdk: Any, repo: str) -> None:
    with pytest.raises(ValueError, match="repo must be org/repo"):
        sdk.call(lambda client: client.adapters.pull(repo, name=NAME), httpx2.MockTransport(pytest.fail))


# ---- waiting -----------------------------------------------------------------------------------------


def test_the_server_is_asked_less_often_the_longer_it_takes(sdk: Any, slept: list[float]) -> None:
    registry = Registry(steps=[("proving", step / 20) for step in range(20)])
    registry.add(NAME, "x", "proving")
    registry._left[digest("x")] = list(registry.steps)
    registry._activates_version[digest("x")] = False
    sent = convert(registry.versions[NAME][0], AdapterVersion)
    asked: list[float] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        asked.append(float(request.url.params["wait_seconds"]))
        return registry.transport.handle_request(request)

    ready = sdk.call(lambda client: client.adapters.wait(sent), httpx2.MockTransport(handle))
    assert ready.state == "ready"
    assert len(asked) == 21
    assert asked == sorted(asked)
    assert (asked[0], asked[-1]) == (0.1, LONGEST_POLL_S)
    # This server answers at once: what is left of the time is slept, and nothing after the last answer.
    assert all(0 <= pause <= wait + 0.001 for pause, wait in zip(slept, asked, strict=True))
    assert sum(slept) > 0
    assert slept[-1] == 0


def test_each_new_stage_is_looked_at_soon() -> None:
    waiting = Waiting(convert(version(NAME, "x", "validating"), AdapterVersion), None)
    for _ in range(10):
        waiting.question()
    waiting.note_answer(convert(version(NAME, "x", "proving"), AdapterVersion))
    assert waiting.question().path.endswith("?wait_seconds=0.1")


def test_a_step_is_told_once() -> None:
    told: list[Progress] = []
    step = version(NAME, "x", "proving", progress={"stage": "proving", "fraction": 0.5})
    waiting = Waiting(convert(step, AdapterVersion), told.append)
    waiting.note_answer(convert(step, AdapterVersion))
    assert told == [Progress("proving", 0.5)]
    assert not waiting.over


def test_waiting_for_a_version_that_is_ready_asks_nobody(sdk: Any) -> None:
    ready = convert(version(NAME, "x"), AdapterVersion)
    nobody = httpx2.MockTransport(pytest.fail)
    assert sdk.call(lambda client: client.adapters.wait(ready), nobody) == ready


def test_a_failure_without_a_reason_is_a_failure_too(sdk: Any) -> None:
    failed = convert(version(NAME, "x", "failed"), AdapterVersion)
    with pytest.raises(AdapterRejectedError, match="the server does not say why"):
        sdk.call(lambda client: client.adapters.wait(failed), httpx2.MockTransport(pytest.fail))
