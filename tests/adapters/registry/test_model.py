"""Any order of operations on the registry does what a plain model of it in Python does."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run
from tests.adapters.registry.conftest import blob, files
from tests.postgres import PostgresServer

from onebase_adapters.registry import (
    UNSET,
    NothingToRollBackError,
    NotReadyError,
    Registry,
    StaleActivationError,
    UnknownAdapterError,
    UnknownVersionError,
)

TEXTS = ("1", "2", "3")
# Most of what happens, happens to one adapter: long ways through its states are what finds mistakes.
NAMES = ("a", "a", "a", "b")
TENANTS = ("default", "default", "default", "acme")
STATES = ("validating", "proving", "ready", "failed")

names = st.sampled_from(NAMES)
tenants = st.sampled_from(TENANTS)
digests = st.sampled_from([files(text).digest for text in TEXTS])
texts = st.sampled_from(TEXTS)
expectations = st.one_of(st.just(UNSET), st.just("current"), st.none(), digests)


@dataclass
class Adapter:
    """What should be: states by digest in order of registration, and everything that was active before."""

    states: dict[str, str] = field(default_factory=dict)
    active: str | None = None
    stack: list[str] = field(default_factory=list)
    history: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    pinned: bool = False

    def switch(self, action: str, to: str | None) -> None:
        self.history.insert(0, (action, to, self.active))
        self.active = to

    def activate(self, digest: str) -> None:
        if digest != self.active:
            if self.active is not None:
                self.stack.append(self.active)
            self.switch("activate", digest)

    def deactivate(self) -> None:
        if self.active is not None:
            self.stack.append(self.active)
            self.switch("deactivate", None)

    def roll_back(self) -> bool:
        for at in reversed(range(len(self.stack))):
            if self.states[self.stack[at]] == "ready" and self.stack[at] != self.active:
                digest = self.stack[at]
                del self.stack[at:]
                self.switch("rollback", digest)
                return True
        return False

    def delete(self, digest: str) -> None:
        if self.active == digest:
            self.deactivate()
        del self.states[digest]
        self.stack = [held for held in self.stack if held != digest]


class RegistryMachine(RuleBasedStateMachine):
    """Two servers on one registry, taken in turn, so that nothing rests on what one of them remembers."""

    urls: Iterator[str]

    def __init__(self) -> None:
        super().__init__()
        url = next(self.urls)
        self.servers = [Registry(url, base_id="base-1", base_name="base") for _ in range(2)]
        self.servers[0].migrate()
        self.turn = count()
        self.model: dict[tuple[str, str], Adapter] = {}
        self.counter = -1
        self.followed: dict[tuple[str, str], Any] = {}

    def teardown(self) -> None:
        for server in self.servers:
            server.close()

    @property
    def registry(self) -> Registry:
        return self.servers[next(self.turn) % 2]

    def known(self, where: tuple[str, str], digest: str | None = None) -> Adapter | None:
        adapter = self.model.get(where)
        return adapter if adapter and (digest is None or digest in adapter.states) else None

    def refused(self, where: tuple[str, str], call: Any, digest: str | None = None) -> bool:
        """Whether there is no such adapter or version, in which case the call must say so."""
        if self.known(where, digest):
            return False
        with pytest.raises(UnknownVersionError if self.known(where) else UnknownAdapterError):
            call()
        return True

    def stale(self, where: tuple[str, str], expected: Any, call: Any) -> bool:
        if expected is UNSET or expected == self.model[where].active:
            return False
        with pytest.raises(StaleActivationError) as stale:
            call()
        assert stale.value.current == self.model[where].active
        return True

    def real(self, where: tuple[str, str], expected: Any) -> Any:
        adapter = self.model.get(where)
        return (adapter.active if adapter else None) if expected == "current" else expected

    @initialize(text=texts)
    def begin(self, text: str) -> None:
        self.add("default", "a", text)

    @rule(tenant=tenants, name=names, text=texts)
    def add(self, tenant: str, name: str, text: str) -> None:
        both = files(text)
        adapter = self.model.setdefault((tenant, name), Adapter())
        fresh = adapter.states.get(both.digest, "failed") == "failed"
        record, created = self.registry.add_version(name, both.digest, both, {"text": text}, tenant=tenant)
        assert created == fresh
        if fresh:
            adapter.states[both.digest] = "validating"
        assert record.state == adapter.states[both.digest]

    @rule(tenant=tenants, name=names, digest=digests, state=st.sampled_from(("ready", *STATES)))
    def set_state(self, tenant: str, name: str, digest: str, state: Any) -> None:
        prepared = blob(f"prepared {digest}") if state == "ready" else None

        def call() -> Any:
            return self.registry.set_state(tenant, name, digest, state, prepared=prepared)

        if not self.refused((tenant, name), call, digest):
            states = self.model[tenant, name].states
            if states[digest] != "ready":
                states[digest] = state
            assert call().state == states[digest]

    @rule(tenant=tenants, name=names, digest=digests)
    def reopen(self, tenant: str, name: str, digest: str) -> None:
        def call() -> Any:
            return self.registry.reopen(tenant, name, digest)

        if not self.refused((tenant, name), call, digest):
            call()
            self.model[tenant, name].states[digest] = "validating"

    @rule(tenant=tenants, name=names, digest=digests, expected=expectations)
    def activate(self, tenant: str, name: str, digest: str, expected: Any) -> None:
        where = (tenant, name)
        expected = self.real(where, expected)

        def call() -> Any:
            return self.registry.activate(tenant, name, digest, expected=expected)

        if not self.known(where):
            self.refused(where, call)
        elif self.stale(where, expected, call) or self.refused(where, call, digest):
            pass
        elif self.model[where].states[digest] != "ready":
            with pytest.raises(NotReadyError):
                call()
        else:
            self.model[where].activate(digest)
            assert call().active == digest

    @rule(tenant=tenants, name=names, expected=expectations)
    def roll_back(self, tenant: str, name: str, expected: Any) -> None:
        where = (tenant, name)
        expected = self.real(where, expected)

        def call() -> Any:
            return self.registry.rollback(tenant, name, expected=expected)

        if self.refused(where, call) or self.stale(where, expected, call):
            return
        if self.model[where].roll_back():
            assert call().active == self.model[where].active
        else:
            with pytest.raises(NothingToRollBackError):
                call()

    @rule(tenant=tenants, name=names, expected=expectations)
    def deactivate(self, tenant: str, name: str, expected: Any) -> None:
        where = (tenant, name)
        expected = self.real(where, expected)

        def call() -> Any:
            return self.registry.deactivate(tenant, name, expected=expected)

        if not (self.refused(where, call) or self.stale(where, expected, call)):
            self.model[where].deactivate()
            assert call().active is None

    @rule(tenant=tenants, name=names, pinned=st.booleans())
    def pin(self, tenant: str, name: str, pinned: bool) -> None:
        def call() -> Any:
            return self.registry.pin(tenant, name, pinned)

        if not self.refused((tenant, name), call):
            self.model[tenant, name].pinned = pinned
            assert call().pinned == pinned

    @rule(tenant=tenants, name=names, digest=digests)
    def delete_version(self, tenant: str, name: str, digest: str) -> None:
        def call() -> Any:
            return self.registry.delete_version(tenant, name, digest)

        if self.refused((tenant, name), call, digest):
            return
        before = self.blobs()
        adapter = self.model[tenant, name]
        adapter.delete(digest)
        if not adapter.states:
            del self.model[tenant, name]
        assert call() == before - self.blobs()

    @precondition(lambda self: len(self.model) > 1)
    @rule(tenant=tenants, name=names)
    def delete_adapter(self, tenant: str, name: str) -> None:
        def call() -> Any:
            return self.registry.delete_adapter(tenant, name)

        if not self.refused((tenant, name), call):
            before = self.blobs()
            del self.model[tenant, name]
            assert call() == before - self.blobs()

    def blobs(self) -> set[str]:
        by_digest = {files(text).digest: files(text) for text in TEXTS}
        wanted = set()
        for adapter in self.model.values():
            for digest, state in adapter.states.items():
                wanted |= {by_digest[digest].config.sha256, by_digest[digest].weights.sha256}
                if state == "ready":
                    wanted.add(blob(f"prepared {digest}").sha256)
        return wanted

    @invariant()
    def both_servers_see_what_the_model_says(self) -> None:
        for server in self.servers:
            seen = {(record.tenant, record.name): record for record in server.snapshot()}
            assert set(seen) == set(self.model)
            for where, adapter in self.model.items():
                assert seen[where].active == adapter.active
                assert seen[where].pinned == adapter.pinned
                states = [(version.digest, version.state) for version in seen[where].versions]
                assert states == list(adapter.states.items())[::-1]
                history = [(e.action, e.version, e.previous) for e in server.history(*where)]
                assert history == adapter.history
            assert server.referenced_blobs() == self.blobs()

    @invariant()
    def one_who_follows_the_changes_knows_as_much_as_a_snapshot(self) -> None:
        changes = self.servers[1].changes(self.counter)
        self.counter = changes.counter
        self.followed.update({(record.tenant, record.name): record for record in changes.changed})
        self.followed = {where: record for where, record in self.followed.items() if where in changes.names}
        whole = {(record.tenant, record.name): record for record in self.servers[0].snapshot()}
        assert {w: dataclasses.asdict(r) for w, r in self.followed.items()} == {
            w: dataclasses.asdict(r) for w, r in whole.items()
        }


def machine(source: Iterator[str]) -> type[RegistryMachine]:
    return type("Machine", (RegistryMachine,), {"urls": source})


def check(source: Iterator[str], examples: int) -> None:
    run(
        machine(source),
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("examples", [6, pytest.param(20, marks=pytest.mark.full)])
def test_any_order_of_operations_does_what_the_model_does_on_sqlite(
    migrated_file: Path, tmp_path: Path, examples: int
) -> None:
    paths = (Path(shutil.copyfile(migrated_file, tmp_path / f"{number}.db")) for number in count())
    check((f"sqlite:///{path}" for path in paths), examples)


@pytest.mark.parametrize("examples", [3, pytest.param(6, marks=pytest.mark.full)])
def test_any_order_of_operations_does_what_the_model_does_on_postgresql(
    postgres: PostgresServer, migrated_database: str, examples: int
) -> None:
    check((postgres.url(postgres.create(template=migrated_database)) for _ in count()), examples)
