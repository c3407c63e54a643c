"""API keys in the registry, on SQLite and on PostgreSQL."""

from __future__ import annotations

import time
from typing import Any

import pytest
from sqlalchemy import text
from tests.adapters.registry.conftest import Open, add

from onebase_adapters.registry import (
    Quotas,
    Registry,
    RegistryError,
    UnknownAdapterError,
    UnknownKeyError,
)
from onebase_adapters.registry.keys import USED_SECONDS, Callers, id_of, is_key_of


def test_a_key_is_known_again_and_the_registry_holds_nothing_of_its_secret(
    registry: Registry, open_registry: Open
) -> None:
    made, key = registry.keys.create("acme", ["train", "generate"], name="ci", expires_at=time.time() + 60)

    (known,) = open_registry(base_id="base-2").keys.all()
    assert known == made
    assert (known.tenant, known.name, known.scopes) == ("acme", "ci", ("generate", "train"))
    assert key.startswith(f"{known.id}-")
    assert id_of(key) == known.id
    assert is_key_of(key, known)
    with registry._database.read() as session:
        rows = str(session.execute(text("SELECT * FROM api_keys")).all())
    secret = key.removeprefix(f"{known.id}-")
    assert len(secret) == 43  # 256 bits
    assert secret not in rows + repr(known)


def test_no_two_keys_are_alike_and_only_the_whole_key_is_one(registry: Registry) -> None:
    made, key = registry.keys.create("acme", ["train"])
    _, other = registry.keys.create("acme", ["train"])

    assert key != other
    for wrong in (
        other,
        key[:-1],
        key + "A",
        key.swapcase(),
        key[:-1] + ("A" if key[-1] != "A" else "B"),
        "",
    ):
        assert not is_key_of(wrong, made)
    assert not is_key_of(key, None)
    for wrong in (
        "",
        "ob-",
        key[:-1],
        key + "A",
        key.upper(),
        f" {key}",
        key.replace("ob-", "sk-"),
        key + "\n",
    ):
        assert id_of(wrong) is None


def test_a_key_ends_when_it_is_revoked_or_expires_and_its_row_stays(registry: Registry) -> None:
    made, _ = registry.keys.create("acme", ["train"], expires_at=time.time() + 60)
    now = time.time()
    assert made.valid_at(now)
    assert not made.valid_at(now + 61)

    revoked = registry.keys.revoke(made.id)

    assert not revoked.valid_at(now)
    assert registry.keys.revoke(made.id).revoked_at == revoked.revoked_at
    assert registry.keys.all() == [revoked]
    with pytest.raises(UnknownKeyError, match="no API key 'ob-nobody'"):
        registry.keys.revoke("ob-nobody")


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"tenant": ""}, "tenant"),
        ({"tenant": "a/b"}, "tenant"),
        ({"tenant": "x" * 65}, "tenant"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["train", "root"]}, "scopes"),
        ({"name": "a\tb"}, "name"),
        ({"name": "n" * 201}, "name"),
        ({"expires_at": 1.0}, "expires"),
        ({"quotas": {"sequences": -1}}, "quotas.sequences"),
        ({"quotas": {"bytes": 1}}, "quotas.bytes"),
        ({"quotas": {"wishes": 1}}, "quotas.wishes"),
        ({"priority": 5}, "priority"),
    ],
)
def test_what_no_key_can_have_is_refused_by_its_name(
    registry: Registry, wrong: dict[str, Any], field: str
) -> None:
    settings = {"tenant": "acme", "scopes": ["train"], **wrong}
    with pytest.raises(RegistryError, match=f"^{field}: "):
        registry.keys.create(settings.pop("tenant"), settings.pop("scopes"), **settings)
    assert registry.keys.all() == []


def test_servers_read_the_keys_again_only_after_a_change_of_one(
    registry: Registry, open_registry: Open
) -> None:
    other = open_registry().keys
    assert other.since(-1) == (0, Callers([], {}))
    assert other.since(0) == (0, None)

    made, _ = registry.keys.create("acme", ["train"])
    newest, callers = other.since(0)
    assert callers == Callers([made], {})
    add(registry, "acme", "1")
    assert other.since(newest) == (newest, None)

    registry.keys.revoke(made.id)
    later, callers = other.since(newest)
    assert later > newest
    assert callers is not None
    assert callers.keys[0].revoked_at is not None

    registry.tenants.set_quotas("acme", {"sequences": 4})
    last, callers = other.since(later)
    assert last > later
    assert callers is not None
    assert callers.tenants == {"acme": Quotas(sequences=4)}


def test_the_use_of_a_key_is_written_down_once_an_hour_and_is_no_change(registry: Registry) -> None:
    made, _ = registry.keys.create("acme", ["train"])
    before = registry.change_counter()

    registry.keys.note_use(made.id)
    (used,) = registry.keys.all()
    registry.keys.note_use(made.id)

    assert used.last_used_at == pytest.approx(time.time(), abs=60)
    assert registry.keys.all() == [used]
    assert registry.change_counter() == before
    with registry._database.write_uncounted() as session:
        session.execute(text(f"UPDATE api_keys SET last_used_at = last_used_at - {USED_SECONDS + 1}"))
    registry.keys.note_use(made.id)
    assert registry.keys.all()[0].last_used_at >= used.last_used_at  # type: ignore[operator]


def test_an_adapter_is_shared_and_no_longer(registry: Registry) -> None:
    add(registry, "acme", "1", tenant="operator")
    counter = registry.change_counter()
    assert not registry.adapter("operator", "acme").shared

    assert registry.share("operator", "acme", True).shared
    (changed,) = registry.changes(counter).changed
    assert changed.shared
    assert not registry.share("operator", "acme", False).shared
    with pytest.raises(UnknownAdapterError):
        registry.share("default", "acme", True)
