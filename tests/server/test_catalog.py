"""Adapters' names and versions: what may be asked for, and how the registry's changes arrive."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onebase_adapters.names import label
from onebase_adapters.registry import (
    AdapterFiles,
    AdapterRecord,
    Blob,
    Registry,
    RegistryBusyError,
    UncertainChangeError,
)
from onebase_edge.errors import AdapterNotFoundError, ForbiddenError, InvalidRequestError, StateConflictError
from onebase_engine.engine.messages import AdapterRef
from onebase_server.adapters.catalog import Catalog, VisibleAdapters, check_name, same_base
from onebase_server.storage.calls import RegistryThreads


def blob(text: str) -> Blob:
    return Blob(hashlib.sha256(text.encode()).hexdigest(), len(text))


def register(
    registry: Registry,
    name: str,
    content: str,
    *,
    active: bool = True,
    ready: bool = True,
    tenant: str = "default",
) -> str:
    """A version of this content, as if it had been proved. Returns its digest."""
    files = AdapterFiles(blob("{}"), blob(content))
    registry.add_version(name, files.digest, files, {"kind": "upload"}, tenant=tenant)
    if ready:
        registry.set_state(tenant, name, files.digest, "ready", report={}, prepared=blob(content + "!"))
    if active:
        registry.activate(tenant, name, files.digest)
    return files.digest


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.db'}", base_id="b" * 64, base_name="base")
    registry.migrate()
    yield registry
    registry.close()


def look(registry: Registry, tenant: str = "default") -> VisibleAdapters:
    """What a tenant may name, after one look."""
    catalog = Catalog("base", registry, RegistryThreads("test", 2))
    asyncio.run(catalog.refresh())
    return catalog.of(tenant)


def test_a_name_a_version_and_a_beginning_of_it_all_find_the_adapter(registry: Registry) -> None:
    digest = register(registry, "acme", "one")
    names = look(registry)

    for reference in ("acme", f"acme@{digest}", f"acme@{digest[:8]}"):
        choice = names.choose(reference)
        assert choice.refs == (AdapterRef(digest),)
        assert choice.uses == (("default", "acme", digest),)
        assert choice.label == f"acme@{digest[:12]}"


def test_the_bare_name_is_the_active_version_and_others_can_be_named(registry: Registry) -> None:
    first = register(registry, "acme", "one")
    second = register(registry, "acme", "two", active=False)
    names = look(registry)

    assert names.choose("acme").refs == (AdapterRef(first),)
    assert names.choose(f"acme@{second[:8]}").refs == (AdapterRef(second),)


@pytest.mark.parametrize("reference", ["nobody", "acme@", "acme@0123", "acme@ffffffffffffffff", "ACME", ""])
def test_an_unknown_name_or_version_is_not_found_and_the_known_ones_are_named(
    registry: Registry, reference: str
) -> None:
    register(registry, "acme", "one")

    with pytest.raises(AdapterNotFoundError) as caught:
        look(registry).choose(reference)

    assert caught.value.code == (
        "version_not_found" if reference.startswith("acme@") else "adapter_not_found"
    )
    assert "acme" in caught.value.message


def test_too_short_a_beginning_of_a_version_is_refused_even_when_it_fits(registry: Registry) -> None:
    digest = register(registry, "acme", "one")

    with pytest.raises(AdapterNotFoundError, match="at least 8"):
        look(registry).choose(f"acme@{digest[:7]}")


def test_a_name_without_an_active_version_says_how_to_get_one(registry: Registry) -> None:
    digest = register(registry, "acme", "one", active=False)
    names = look(registry)

    with pytest.raises(AdapterNotFoundError, match="no active version"):
        names.choose("acme")
    assert names.choose(f"acme@{digest}").refs == (AdapterRef(digest),)


def test_a_version_that_is_not_ready_is_refused_by_its_state_and_its_error(registry: Registry) -> None:
    failed = register(registry, "acme", "one", active=False, ready=False)
    registry.set_state("default", "acme", failed, "failed", error=("no_effect", "it changes nothing"))
    waiting = register(registry, "acme", "two", active=False, ready=False)
    names = look(registry)

    with pytest.raises(StateConflictError, match="no_effect: it changes nothing") as caught:
        names.choose(f"acme@{failed}")
    assert caught.value.code == "version_not_ready"
    with pytest.raises(StateConflictError, match="validating"):
        names.choose(f"acme@{waiting}")


def test_a_weighted_sum_keeps_order_and_weights(registry: Registry) -> None:
    a, b = register(registry, "a", "one"), register(registry, "b", "two")

    choice = look(registry).choose_sum([("b", 0.5), ("a", -1.0), ("b", 0.12345678)])

    assert choice.refs == (AdapterRef(b, 0.5), AdapterRef(a, -1.0), AdapterRef(b, 0.12345678))
    one, other = (label(name, digest) for name, digest in (("a", a), ("b", b)))
    assert choice.version_label == f"{other}*0.5+{one}*-1+{other}*0.12345678"


def test_the_unknown_term_of_a_sum_is_named_by_its_place(registry: Registry) -> None:
    register(registry, "a", "one")

    with pytest.raises(AdapterNotFoundError) as caught:
        look(registry).choose_sum([("a", 1.0), ("nobody", 1.0)])

    assert caught.value.param == "adapter[1].name"


def test_a_hub_name_is_found_whole_although_it_holds_an_at_sign(registry: Registry) -> None:
    name = "hub:acme/support@main"
    digest = register(registry, name, "one")
    names = look(registry)

    assert names.choose(name).refs == (AdapterRef(digest),)
    assert names.choose(f"{name}@{digest[:9]}").refs == (AdapterRef(digest),)
    assert not names.names_version(name)
    assert names.names_version(f"{name}@{digest[:9]}")


def test_a_watching_catalog_sees_what_another_server_writes_and_deletes(
    registry: Registry, tmp_path: Path
) -> None:
    other = Registry(f"sqlite:///{tmp_path / 'registry.db'}", base_id="b" * 64, base_name="base")

    async def follow() -> list[Any]:
        catalog = Catalog("base", registry, RegistryThreads("test", 2))
        changes = asyncio.Event()
        catalog.subscribe(changes.set)
        watching = asyncio.create_task(catalog.watch(0.01))
        seen: list[Any] = []
        for write in (
            lambda: register(other, "acme", "one"),
            lambda: register(other, "zeta", "two"),
            lambda: other.delete_adapter("default", "acme"),
        ):
            changes.clear()
            write()
            await asyncio.wait_for(changes.wait(), 30)
            seen.append([record.name for record in catalog])
        watching.cancel()
        return seen

    seen = asyncio.run(follow())

    assert seen[-1] == ["zeta"]
    assert ["acme", "zeta"] in seen or seen[1] == ["acme"]
    other.close()


def test_what_this_server_writes_is_seen_when_the_write_returns(registry: Registry) -> None:
    digest = register(registry, "acme", "one", active=False)

    async def activate() -> tuple[AdapterRecord | None, AdapterRecord | None]:
        records = RegistryThreads("test", 2)
        catalog = Catalog("base", registry, records)
        await catalog.refresh()
        before = catalog.of("default").get("acme")
        await records.write(registry.activate, "default", "acme", digest)
        return before, catalog.of("default").get("acme")

    before, after = asyncio.run(activate())

    assert before is not None
    assert after is not None
    assert (before.active, after.active) == (None, digest)


def test_a_write_after_which_the_registry_cannot_be_read_is_said_to_be_made(registry: Registry) -> None:
    digest = register(registry, "acme", "one", active=False)

    async def activate() -> None:
        records = RegistryThreads("test", 2)

        async def away() -> None:
            raise RegistryBusyError("it is away")

        records.subscribe(away)
        await records.write(registry.activate, "default", "acme", digest)

    with pytest.raises(UncertainChangeError, match=r"change was made.*it is away"):
        asyncio.run(activate())
    assert registry.adapter("default", "acme").active == digest


def test_the_adapters_of_another_base_are_not_seen(registry: Registry, tmp_path: Path) -> None:
    register(registry, "acme", "one")
    other = Registry(f"sqlite:///{tmp_path / 'registry.db'}", base_id="c" * 64, base_name="base")

    assert len(list(look(registry))) == 1
    assert not list(look(other))
    other.close()


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "a@b", "ä", "a" * 65, "a\n", "base", "../a"])
def test_a_name_that_is_not_allowed_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_name(name, "base")
    assert caught.value.param == "name"


@pytest.mark.parametrize(
    ("wanted", "same"),
    [
        (None, True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("/models/smollm2-135m-instruct/", True),
        ("smollm2-135m-instruct", True),
        ("meta-llama/Llama-3.1-8B", False),
        ("smollm2-135m-instruct/other", False),
        ("", True),
    ],
)
def test_bases_are_the_same_when_the_last_parts_of_their_names_are(wanted: str | None, same: bool) -> None:
    assert same_base(wanted, "smollm2-135m-instruct", None) is same


# ---- tenants ------------------------------------------------------------------------------------


def test_a_tenant_finds_its_own_adapters_and_learns_of_no_other(registry: Registry) -> None:
    own = register(registry, "acme", "one", tenant="a")
    other = register(registry, "acme", "two", tenant="b")
    register(registry, "private", "three", tenant="b")

    assert look(registry, "a").choose("acme").uses == (("a", "acme", own),)
    assert look(registry, "b").choose("acme").uses == (("b", "acme", other),)
    with pytest.raises(AdapterNotFoundError, match=r"no adapter 'private'. Known: acme\.$"):
        look(registry, "a").choose("private")
    with pytest.raises(AdapterNotFoundError, match="has no version"):
        look(registry, "a").choose(f"acme@{other}")
    with pytest.raises(AdapterNotFoundError, match=r"Known: none\.$"):
        look(registry, "nobody").choose("acme")


def test_a_shared_adapter_is_found_by_all_after_their_own(registry: Registry) -> None:
    shared = register(registry, "acme", "one", tenant="operator")
    own = register(registry, "acme", "two", tenant="a")
    registry.share("operator", "acme", True)

    assert look(registry, "a").choose("acme").uses == (("a", "acme", own),)
    names = look(registry, "b")
    assert names.choose("acme").uses == (("operator", "acme", shared),)
    assert [record.tenant for record in names] == ["operator"]
    with pytest.raises(ForbiddenError, match="only its owner may change it"):
        names.check_own("acme")
    look(registry, "a").check_own("acme")
    look(registry, "operator").check_own("acme")

    registry.share("operator", "acme", False)
    with pytest.raises(AdapterNotFoundError):
        look(registry, "b").choose("acme")
