"""`client.adapters` of both clients: looking, switching, deleting, and what is repeated after a failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from tests.clients.registry_double import (
    COMMIT,
    NOW,
    Flaky,
    Registry,
    digest,
    refusal,
    version,
)

from onebase import (
    Activation,
    Adapter,
    APIConnectionError,
    ConflictError,
    InvalidResponseError,
    NotFoundError,
    ServerUnavailableError,
)

pytestmark = pytest.mark.usefixtures("slept")
NAME = "acme-support"


# ---- looking -----------------------------------------------------------------------------------------


@pytest.fixture
def registry() -> Registry:
    """Two versions of one adapter, the older one active, and one that was pulled on first use."""
    made = Registry()
    made.activate(NAME, made.add(NAME, "1"))
    made.add(NAME, "2")
    made.add("hub:acme/x@main", "3", source={"kind": "hub", "repo": "acme/x", "commit": COMMIT})
    return made


def test_adapters_are_typed(sdk: Any, registry: Registry) -> None:
    first, second = sdk.call(lambda client: client.adapters.list(), registry.transport)
    assert first == Adapter(
        id=NAME,
        name=NAME,
        version=digest("1"),
        active=True,
        state="ready",
        kinds=("lora",),
        rank=8,
        alpha=16.0,
        targets=("q_proj", "v_proj"),
        parameters=480_000,
        bytes=1_920_000,
        base="SmolLM2-135M-Instruct",
        tenant="default",
        pinned=False,
        tier="slot",
        versions=2,
        created_at=NOW,
        updated_at=NOW,
    )
    assert (second.version, second.active, second.kinds, second.rank) == (None, False, (), None)
    assert sdk.call(lambda client: client.adapters.retrieve(NAME), registry.transport) == first


def test_versions_come_newest_first_and_one_by_its_first_digits(sdk: Any, registry: Registry) -> None:
    found = sdk.call(lambda client: client.adapters.versions(NAME), registry.transport)
    assert [one.version for one in found] == [digest("2"), digest("1")]
    one = sdk.call(lambda client: client.adapters.version(NAME, digest("1")[:8]), registry.transport)
    assert one == found[1]
    assert one.active


def test_history_is_typed(sdk: Any, registry: Registry) -> None:
    assert sdk.call(lambda client: client.adapters.history(NAME), registry.transport) == (
        Activation("activate", digest("1"), None, "", NOW),
    )


def test_a_name_cannot_change_the_path(sdk: Any, registry: Registry) -> None:
    found = sdk.call(lambda client: client.adapters.retrieve("hub:acme/x@main"), registry.transport)
    assert found.name == "hub:acme/x@main"
    assert registry.asked[-1][1] == "/v1/adapters/hub%3Aacme%2Fx%40main"
    with pytest.raises(NotFoundError):
        sdk.call(lambda client: client.adapters.retrieve("../models?x=1"), registry.transport)
    assert registry.asked[-1][1] == "/v1/adapters/..%2Fmodels%3Fx%3D1"
    with pytest.raises(ValueError, match="is empty"):
        sdk.call(lambda client: client.adapters.delete(""), registry.transport)


def test_what_is_not_there_is_not_found(sdk: Any, registry: Registry) -> None:
    with pytest.raises(NotFoundError) as adapter:
        sdk.call(lambda client: client.adapters.versions("nobody"), registry.transport)
    assert adapter.value.code == "adapter_not_found"
    with pytest.raises(NotFoundError) as missing:
        sdk.call(lambda client: client.adapters.version(NAME, "f" * 64), registry.transport)
    assert missing.value.code == "version_not_found"


@pytest.mark.parametrize("field", ["state", "source", "report", "created_at"])
def test_an_answer_that_lacks_a_field_is_refused(sdk: Any, field: str) -> None:
    body = version(NAME, "x")
    del body[field]
    answer = httpx2.MockTransport(lambda request: httpx2.Response(200, json=body))
    with pytest.raises(InvalidResponseError, match=f"no field '{field}'"):
        sdk.call(lambda client: client.adapters.version(NAME, "x"), answer)


# ---- switching ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sent"),
    [({}, {}), ({"expected": digest("1")}, {"expected": digest("1")})],
)
def test_activate_says_what_it_expects_only_when_told(
    sdk: Any, registry: Registry, given: dict[str, Any], sent: dict[str, Any]
) -> None:
    found = sdk.call(lambda client: client.adapters.activate(NAME, digest("2"), **given), registry.transport)
    assert found.version == digest("2")
    assert registry.asked == [("POST", f"/v1/adapters/{NAME}/activate", {"version": digest("2")} | sent)]


@pytest.mark.parametrize("expected", [digest("2"), None])
def test_a_lost_race_names_the_version_that_won(sdk: Any, registry: Registry, expected: str | None) -> None:
    with pytest.raises(ConflictError) as caught:
        sdk.call(
            lambda client: client.adapters.activate(NAME, digest("2"), expected=expected), registry.transport
        )
    assert (caught.value.code, caught.value.current) == ("stale_activation", digest("1"))
    assert registry.adapter(NAME)["version"] == digest("1")
    assert registry.asked[0][2] == {"version": digest("2"), "expected": expected}


def test_a_race_lost_to_nobody_has_no_current_version(sdk: Any, registry: Registry) -> None:
    sdk.call(lambda client: client.adapters.deactivate(NAME), registry.transport)
    with pytest.raises(ConflictError) as caught:
        sdk.call(lambda client: client.adapters.rollback(NAME, expected=digest("1")), registry.transport)
    assert (caught.value.code, caught.value.current) == ("stale_activation", None)


def test_rollback_deactivate_pin_and_share_give_the_adapter_as_it_then_is(
    sdk: Any, registry: Registry
) -> None:
    registry.activate(NAME, registry.versions[NAME][1])
    transport = registry.transport
    assert sdk.call(lambda client: client.adapters.rollback(NAME), transport).version == digest("1")
    assert sdk.call(lambda client: client.adapters.pin(NAME), transport).pinned
    assert not sdk.call(lambda client: client.adapters.pin(NAME, False), transport).pinned
    assert sdk.call(lambda client: client.adapters.share(NAME), transport).shared
    assert not sdk.call(lambda client: client.adapters.share(NAME, False), transport).shared
    assert sdk.call(lambda client: client.adapters.deactivate(NAME), transport).version is None
    assert [body for method, _, body in registry.asked if method == "POST"] == [
        {},
        {"pinned": True},
        {"pinned": False},
        {"shared": True},
        {"shared": False},
        {},
    ]


def test_one_version_or_all_are_deleted_and_force_is_sent_only_when_meant(
    sdk: Any, registry: Registry
) -> None:
    transport = registry.transport
    assert sdk.call(lambda client: client.adapters.delete(NAME, digest("2")), transport) is None
    registry.busy.add(NAME)
    with pytest.raises(ConflictError) as caught:
        sdk.call(lambda client: client.adapters.delete(NAME), transport)
    assert caught.value.code == "adapter_in_use"
    sdk.call(lambda client: client.adapters.delete(NAME, force=True), transport)
    assert NAME not in registry.versions
    assert [path for _, path, _ in registry.asked] == [
        f"/v1/adapters/{NAME}/versions/{digest('2')}",
        f"/v1/adapters/{NAME}",
        f"/v1/adapters/{NAME}?force=true",
    ]


@pytest.mark.parametrize(
    ("action", "repeated"),
    [
        (lambda adapters: adapters.list(), True),
        (lambda adapters: adapters.history(NAME), True),
        (lambda adapters: adapters.pin(NAME), True),
        (lambda adapters: adapters.pull("acme/x", wait=False), True),
        (lambda adapters: adapters.activate(NAME, digest("2")), False),
        (lambda adapters: adapters.activate(NAME, digest("2"), expected=digest("1")), False),
        (lambda adapters: adapters.rollback(NAME), False),
        (lambda adapters: adapters.deactivate(NAME), False),
        (lambda adapters: adapters.delete(NAME), False),
    ],
)
def test_what_may_have_happened_is_done_again_only_where_that_is_harmless(
    sdk: Any, registry: Registry, action: Callable[[Any], Any], repeated: bool
) -> None:
    flaky = Flaky(registry, httpx2.ReadError("reset"))
    if repeated:
        sdk.call(lambda client: action(client.adapters), flaky.transport)
    else:
        with pytest.raises(APIConnectionError):
            sdk.call(lambda client: action(client.adapters), flaky.transport)
    assert len(flaky.requests) == 1 + repeated


def test_a_server_that_restarts_its_engine_is_asked_again_whatever_was_wanted(
    sdk: Any, registry: Registry
) -> None:
    flaky = Flaky(registry, refusal(503, "engine_restarted"))
    found = sdk.call(lambda client: client.adapters.activate(NAME, digest("2")), flaky.transport)
    assert found.version == digest("2")
    flaky = Flaky(registry, *(refusal(503, "engine_restarted") for _ in range(3)))
    with pytest.raises(ServerUnavailableError):
        sdk.call(lambda client: client.adapters.rollback(NAME), flaky.transport)
