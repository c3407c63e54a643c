"""Versions, activation and rolling back, on SQLite and on PostgreSQL."""

from __future__ import annotations

import time

import pytest
from sqlalchemy import select
from tests.adapters.registry.conftest import Open, add, blob, files

from onebase_adapters.registry import (
    NothingToRollBackError,
    NotReadyError,
    Registry,
    RegistryError,
    StaleActivationError,
    UnknownAdapterError,
    UnknownVersionError,
    live,
)
from onebase_adapters.registry.database import Database
from onebase_adapters.registry.live import LiveSampler, LiveSession
from onebase_adapters.registry.records import State
from onebase_adapters.registry.tables import ProofRow
from onebase_adapters.store.blobs import AdapterFiles, Blob
from onebase_protocol.adapters import VersionFailure

HERE = ("default", "a")
REPORT = {
    "rank": 8,
    "kinds": ["lora"],
    "modules": [{"name": "model.layers.0.q_proj", "rank": 8, "norm": 0.5}],
    "proof": {"kernels": "torch"},
}


def active(registry: Registry) -> str | None:
    return registry.adapter(*HERE).active


# Versions


def test_a_version_keeps_what_it_was_registered_with(registry: Registry, open_registry: Open) -> None:
    before = time.time()
    both = files("1")
    source = {"kind": "hub", "repo": "acme/support", "commit": "c" * 40}
    record, created = registry.add_version("a", both.digest, both, source, actor="ann")
    assert created
    assert (record.tenant, record.name, record.digest, record.files) == ("default", "a", both.digest, both)
    assert (record.state, record.source, record.created_by) == ("validating", source, "ann")
    assert (record.report, record.prepared, record.error, record.finished_at) == (None, None, None, None)
    assert before <= record.created_at <= time.time()
    assert open_registry().version(*HERE, both.digest) == record


def test_the_same_content_under_the_same_name_is_the_same_version(registry: Registry) -> None:
    both = files("1")
    first, created = registry.add_version("a", both.digest, both, {"kind": "upload"}, actor="ann")
    again, created_again = registry.add_version("a", both.digest, both, {"kind": "folder"}, actor="bob")
    assert (created, created_again) == (True, False)
    assert again == first
    registry.set_state(*HERE, both.digest, "ready")
    again, created_again = registry.add_version("a", both.digest, both, {"kind": "upload"})
    assert (again.state, created_again) == ("ready", False)
    assert len(registry.versions(*HERE)) == 1
    other, created_other = registry.add_version("b", both.digest, both, {"kind": "upload"})
    assert (other.name, created_other) == ("b", True)


def test_a_failed_version_is_tried_again_when_it_is_sent_again(registry: Registry) -> None:
    both = files("1")
    registry.add_version("a", both.digest, both, {"kind": "upload"})
    failed = registry.set_state(*HERE, both.digest, "failed", error=("not_finite", "q_proj has NaN"))
    assert failed.error == VersionFailure("not_finite", "q_proj has NaN")
    assert failed.finished_at is not None
    hub = {"kind": "hub", "repo": "acme/a"}
    again, created = registry.add_version("a", both.digest, both, hub, actor="ob-2")
    assert created
    assert (again.state, again.error, again.finished_at) == ("validating", None, None)
    assert (again.source, again.created_by) == (hub, "ob-2"), "its options hold after a restart, too"


def test_a_proved_version_has_its_report_and_its_prepared_file(registry: Registry) -> None:
    digest = add(registry, "a", "1", ready=False)
    registry.set_state(*HERE, digest, "proving")
    record = registry.set_state(*HERE, digest, "ready", report=REPORT, prepared=blob("prepared"))
    assert (record.state, record.report, record.prepared) == ("ready", REPORT, blob("prepared"))
    assert registry.version(*HERE, digest) == record
    assert registry.versions(*HERE) == [record]


def test_a_list_of_adapters_leaves_out_the_modules_of_reports(registry: Registry) -> None:
    digest = add(registry, "a", "1", ready=False)
    registry.set_state(*HERE, digest, "ready", report=REPORT)
    short = {key: value for key, value in REPORT.items() if key != "modules"}
    for record in (registry.adapter(*HERE), registry.snapshot()[0], registry.activate(*HERE, digest)):
        assert record.versions[0].report == short


def test_a_ready_version_stays_ready_whatever_a_slower_server_says(registry: Registry) -> None:
    digest = add(registry, "a", "1")
    for late in ("validating", "proving"):
        assert registry.set_state(*HERE, digest, late).state == "ready"
    said = registry.set_state(*HERE, digest, "failed", error=("proof_timeout", "too slow"))
    assert (said.state, said.error, said.prepared) == ("ready", None, blob("prepared 1"))


def test_a_ready_version_can_be_opened_for_another_proof_while_it_is_active(registry: Registry) -> None:
    digest = add(registry, "a", "1")
    registry.activate(*HERE, digest)
    assert registry.reopen(*HERE, digest).prepared is None
    assert [record.digest for record in registry.unfinished()] == [digest]
    assert active(registry) == digest
    registry.set_state(*HERE, digest, "ready", prepared=blob("again"))
    assert registry.version(*HERE, digest).prepared == blob("again")


def test_a_version_that_was_proved_again_is_not_opened_by_what_was_seen_before(registry: Registry) -> None:
    digest = add(registry, "a", "1")
    seen = registry.version(*HERE, digest)
    assert registry.reopen(*HERE, digest, seen=seen).state == "validating"
    healed = registry.set_state(*HERE, digest, "ready", prepared=seen.prepared)
    assert registry.reopen(*HERE, digest, seen=seen) == healed
    assert registry.reopen(*HERE, digest, seen=healed).state == "validating"


def test_unfinished_versions_are_found_after_a_restart(registry: Registry, open_registry: Open) -> None:
    waiting = [add(registry, name, name, ready=False) for name in ("b", "a", "c", "d")]
    registry.set_state("default", "a", waiting[1], "proving")
    registry.set_state("default", "c", waiting[2], "failed", error=("x", "y"))
    registry.set_state("default", "d", waiting[3], "ready")
    assert [record.name for record in open_registry().unfinished()] == ["b", "a"]


def test_versions_are_listed_newest_first_and_adapters_by_name(registry: Registry) -> None:
    digests = [add(registry, "b", text) for text in ("z", "y", "x")]
    add(registry, "a", "1")
    assert [record.digest for record in registry.versions("default", "b")] == digests[::-1]
    listed = registry.snapshot()
    assert [record.name for record in listed] == ["a", "b"]
    assert [version.digest for version in listed[1].versions] == digests[::-1]
    assert listed[1].version(digests[0]) == listed[1].versions[2]


def test_a_version_is_found_by_its_first_digits(registry: Registry) -> None:
    digest = add(registry, "a", "1")
    for prefix in (digest, digest[:8], digest[:12]):
        assert registry.version(*HERE, prefix).digest == digest
    for wrong in (digest[:7], "", "%" * 12, "_" * 8, digest.upper() if digest.upper() != digest else "X" * 8):
        with pytest.raises(UnknownVersionError):
            registry.version(*HERE, wrong)
    with pytest.raises(UnknownVersionError, match="no version"):
        registry.version(*HERE, "0" * 64)


def test_a_beginning_that_two_versions_share_is_refused(registry: Registry) -> None:
    one, two = "abcdef01" + "0" * 56, "abcdef01" + "1" * 56
    for digest in (one, two):
        registry.add_version("a", digest, files(digest), {"kind": "upload"}, state="proving")
        registry.set_state(*HERE, digest, "ready")
    with pytest.raises(UnknownVersionError, match="more digits"):
        registry.activate(*HERE, "abcdef01")
    assert registry.activate(*HERE, "abcdef010").active == one


def test_unknown_names_are_said_to_be_unknown(registry: Registry) -> None:
    add(registry, "a", "1")
    for name in ("b", "", "a\0", "\ud800", "A", "a ", "x" * 10_000):
        with pytest.raises(UnknownAdapterError):
            registry.adapter("default", name)
    for call in (registry.versions, registry.history, registry.rollback, registry.deactivate):
        with pytest.raises(UnknownAdapterError, match="'b'"):
            call("default", "b")
    with pytest.raises(UnknownAdapterError):
        registry.set_state("default", "b", "0" * 64, "ready")
    with pytest.raises(UnknownVersionError):
        registry.set_state(*HERE, "0" * 64, "ready")


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "x" * 513, "\ud800"])
def test_a_name_that_cannot_be_shown_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(RegistryError, match="adapter name"):
        add(registry, name, "1")
    assert registry.snapshot() == []


def test_odd_text_from_an_adapter_is_kept_as_far_as_a_database_can(registry: Registry) -> None:
    both = files("1")
    odd = {"kind": "upload", "note": "a\0b \ud800 \u202e 'quoted\" é 🦜"}
    record, _ = registry.add_version("hub:org/a@v1:sub", both.digest, both, odd, actor="a\0\ud800")
    assert record.created_by == "a\ufffd?"
    where = ("default", "hub:org/a@v1:sub", both.digest)
    assert registry.version(*where).source == odd
    failed = registry.set_state(*where, "failed", error=("bad", "name 'x\0y' '\ud800'; DROP TABLE versions"))
    assert failed.error is not None
    assert failed.error.message == "name 'x\ufffdy' '?'; DROP TABLE versions"
    assert registry.version(*where).error == failed.error


def test_sizes_beyond_four_gigabytes_are_kept(registry: Registry) -> None:
    large = AdapterFiles(blob("config"), Blob("a" * 64, 5 << 40))
    registry.add_version("a", large.digest, large, {})
    record = registry.set_state(*HERE, large.digest, "ready", prepared=Blob("b" * 64, 1 << 41))
    assert (record.files, record.prepared) == (large, Blob("b" * 64, 1 << 41))


def test_a_state_that_there_is_not_is_refused(registry: Registry) -> None:
    digest = add(registry, "a", "1", ready=False)
    with pytest.raises(RegistryError, match="no state"):
        registry.set_state(*HERE, digest, "done")  # type: ignore[arg-type]


# Activation


def test_only_a_ready_version_is_activated(registry: Registry) -> None:
    digest = add(registry, "a", "1", ready=False)
    for state in ("validating", "proving", "failed"):
        registry.set_state(*HERE, digest, state)
        with pytest.raises(NotReadyError) as refused:
            registry.activate(*HERE, digest)
        assert refused.value.state == state
    assert active(registry) is None
    assert registry.history(*HERE) == []


def test_an_activation_compares_with_what_the_caller_expects(registry: Registry) -> None:
    one, two = add(registry, "a", "1"), add(registry, "a", "2")
    with pytest.raises(StaleActivationError) as refused:
        registry.activate(*HERE, one, expected=two)
    assert refused.value.current is None
    assert registry.activate(*HERE, one, expected=None).active == one
    for stale in (None, two):
        with pytest.raises(StaleActivationError) as refused:
            registry.activate(*HERE, two, expected=stale)
        assert refused.value.current == one
        with pytest.raises(StaleActivationError):
            registry.deactivate(*HERE, expected=stale)
        with pytest.raises(StaleActivationError):
            registry.rollback(*HERE, expected=stale)
    assert active(registry) == one
    assert registry.activate(*HERE, two, expected=one).active == two


def test_activating_the_active_version_changes_nothing(registry: Registry) -> None:
    one, two = add(registry, "a", "1"), add(registry, "a", "2")
    for digest in (one, two, two, two):
        registry.activate(*HERE, digest)
    assert len(registry.history(*HERE)) == 2
    assert registry.rollback(*HERE).active == one


def test_rolling_back_walks_back_through_what_was_active(registry: Registry) -> None:
    one, two, three = (add(registry, "a", text) for text in "123")
    for digest in (one, two, three):
        registry.activate(*HERE, digest)
    assert registry.rollback(*HERE).active == two
    assert registry.rollback(*HERE).active == one
    command = f"onebase adapters activate a {three[:12]}"
    with pytest.raises(
        NothingToRollBackError, match=f"others are ready: {three[:12]}, {two[:12]}\\. .*: {command}$"
    ):
        registry.rollback(*HERE)
    assert active(registry) == one


def test_a_rollback_of_the_only_version_says_what_can_be_done_instead(registry: Registry) -> None:
    registry.activate(*HERE, add(registry, "a", "1"))
    with pytest.raises(
        NothingToRollBackError, match=r"push FOLDER --name a .*: onebase adapters deactivate a$"
    ):
        registry.rollback(*HERE)
    registry.deactivate(*HERE)
    assert registry.rollback(*HERE).active is not None  # what was deactivated is what was active before


def test_after_a_rollback_the_next_activation_remembers_what_was_rolled_back_to(registry: Registry) -> None:
    one, two, three = (add(registry, "a", text) for text in "123")
    registry.activate(*HERE, one)
    registry.activate(*HERE, two)
    registry.rollback(*HERE)
    registry.activate(*HERE, three)
    assert registry.rollback(*HERE).active == one
    with pytest.raises(NothingToRollBackError):
        registry.rollback(*HERE)


def test_rolling_back_passes_over_deleted_versions_and_the_active_one(registry: Registry) -> None:
    one, two, three = (add(registry, "a", text) for text in "123")
    for digest in (one, two, one, three, one, three):
        registry.activate(*HERE, digest)
    registry.delete_version(*HERE, one)
    assert active(registry) == three
    assert registry.rollback(*HERE).active == two
    with pytest.raises(NothingToRollBackError):
        registry.rollback(*HERE)


def test_content_that_was_deleted_and_sent_again_is_not_rolled_back_to(registry: Registry) -> None:
    one, two = add(registry, "a", "1"), add(registry, "a", "2")
    registry.activate(*HERE, one)
    registry.activate(*HERE, two)
    registry.delete_version(*HERE, one)
    assert add(registry, "a", "1") == one
    with pytest.raises(NothingToRollBackError):
        registry.rollback(*HERE)


def test_deactivating_is_undone_by_rolling_back(registry: Registry) -> None:
    one, two = add(registry, "a", "1"), add(registry, "a", "2")
    registry.activate(*HERE, one)
    registry.activate(*HERE, two)
    assert registry.deactivate(*HERE).active is None
    assert registry.deactivate(*HERE).active is None
    assert registry.rollback(*HERE).active == two
    assert registry.rollback(*HERE).active == one


@pytest.mark.parametrize("is_active", [False, True], ids=["none is active", "another is active"])
def test_a_deactivation_calls_off_what_would_become_active_once_it_is_ready(
    registry: Registry, is_active: bool
) -> None:
    if is_active:
        registry.activate(*HERE, add(registry, "a", "1"))
    both = files("2")
    registry.add_version("a", both.digest, both, {"kind": "upload"}, activates=True)
    registry.deactivate(*HERE, actor="ann")
    noted = registry.audit.entries(limit=1)
    assert [(entry.action, entry.actor) for entry in noted] == [("adapter.deactivated", "ann")]
    registry.add_version("a", both.digest, both, {"kind": "checkpoint"}, activates=True, if_due=True)
    registry.set_state(*HERE, both.digest, "ready")
    assert registry.activate(*HERE, both.digest, if_due=True).active is None
    assert registry.activate(*HERE, both.digest).active == both.digest


def test_a_deletion_of_the_active_version_calls_off_no_activation(registry: Registry) -> None:
    registry.activate(*HERE, one := add(registry, "a", "1"))
    both = files("2")
    registry.add_version("a", both.digest, both, {"kind": "upload"}, activates=True)
    registry.delete_version(*HERE, one)
    registry.set_state(*HERE, both.digest, "ready")
    assert registry.activate(*HERE, both.digest, if_due=True).active == both.digest


def test_an_adapter_knows_since_when_its_version_is_active(registry: Registry) -> None:
    one, two = add(registry, "a", "1"), add(registry, "a", "2")
    assert registry.adapter(*HERE).activated_at is None
    changes = (
        lambda: registry.activate(*HERE, one),
        lambda: registry.activate(*HERE, two),
        lambda: registry.rollback(*HERE),
    )
    for change in changes:
        told = change().activated_at
        assert told == registry.history(*HERE)[0].at
        registry.pin(*HERE, True)
        registry.activate(*HERE, active(registry) or "")
        assert [record.activated_at for record in registry.changes().changed] == [told]
    assert registry.deactivate(*HERE).activated_at is None


def test_a_version_that_is_being_proved_again_is_passed_over(registry: Registry) -> None:
    one, two, three = (add(registry, "a", text) for text in "123")
    for digest in (one, two, three):
        registry.activate(*HERE, digest)
    registry.reopen(*HERE, two)
    assert registry.rollback(*HERE).active == one
    registry.set_state(*HERE, two, "ready")
    with pytest.raises(NothingToRollBackError):
        registry.rollback(*HERE)


def test_the_history_says_who_did_what_and_when(registry: Registry) -> None:
    one, two = add(registry, "a", "1"), add(registry, "a", "2")
    before = time.time()
    registry.activate(*HERE, one, actor="ann")
    registry.activate(*HERE, two, actor="bob")
    registry.rollback(*HERE, actor="cyd")
    registry.deactivate(*HERE, actor="dan")
    seen = registry.history(*HERE)
    assert [(entry.action, entry.version, entry.previous, entry.actor) for entry in seen] == [
        ("deactivate", None, one, "dan"),
        ("rollback", one, two, "cyd"),
        ("activate", two, one, "bob"),
        ("activate", one, None, "ann"),
    ]
    times = [entry.at for entry in seen]
    assert times == sorted(times, reverse=True)
    assert before <= times[-1]
    assert times[0] <= time.time()


def test_a_pin_is_kept(registry: Registry, open_registry: Open) -> None:
    add(registry, "a", "1")
    assert registry.pin(*HERE, True).pinned
    assert open_registry().adapter(*HERE).pinned
    assert not registry.pin(*HERE, False).pinned


# Deleting


def test_deleting_gives_the_blobs_that_nothing_needs_any_more(registry: Registry) -> None:
    one, two = add(registry, "a", "1"), add(registry, "a", "2")
    add(registry, "b", "2")
    config = blob("config").sha256
    first = {blob("weights 1").sha256, blob("prepared 1").sha256}
    second = {blob("weights 2").sha256, blob("prepared 2").sha256}
    assert registry.referenced_blobs() == first | second | {config}
    assert registry.delete_version(*HERE, one) == first
    assert registry.delete_version(*HERE, two) == set()
    assert registry.delete_adapter("default", "b") == second | {config}
    assert registry.referenced_blobs() == set()


def test_a_blob_that_another_version_uses_as_its_prepared_file_is_kept(registry: Registry) -> None:
    one = add(registry, "a", "1")
    two = add(registry, "a", "2", ready=False)
    registry.set_state(*HERE, two, "ready", prepared=blob("weights 1"))
    assert registry.delete_version(*HERE, one) == {blob("prepared 1").sha256}


def test_deleting_the_active_version_deactivates_it(registry: Registry) -> None:
    one, two = add(registry, "a", "1"), add(registry, "a", "2")
    registry.activate(*HERE, one)
    registry.activate(*HERE, two)
    registry.delete_version(*HERE, two[:8], actor="ann")
    assert active(registry) is None
    newest = registry.history(*HERE)[0]
    assert (newest.action, newest.version, newest.previous, newest.actor) == ("deactivate", None, two, "ann")
    assert registry.rollback(*HERE).active == one


def test_with_the_last_version_the_name_goes_too(registry: Registry) -> None:
    digest = add(registry, "a", "1")
    registry.activate(*HERE, digest)
    registry.delete_version(*HERE, digest)
    assert registry.snapshot() == []
    add(registry, "a", "1")
    assert registry.history(*HERE) == []
    assert active(registry) is None


# Scopes


def test_tenants_and_bases_do_not_see_each_other_but_share_blobs(
    registry: Registry, open_registry: Open
) -> None:
    other_base = open_registry("base-2", "another")
    digest = add(registry, "a", "1")
    assert add(registry, "a", "1", tenant="acme") == digest
    assert add(other_base, "a", "1", ready=False) == digest
    registry.activate(*HERE, digest)
    assert registry.adapter("acme", "a").active is None
    assert other_base.adapter(*HERE).active is None
    with pytest.raises(NotReadyError):
        other_base.activate(*HERE, digest)
    assert [record.name for record in other_base.unfinished()] == ["a"]
    assert registry.unfinished() == []
    assert {record.tenant for record in registry.snapshot()} == {"default", "acme"}
    assert [record.tenant for record in registry.snapshot("acme")] == ["acme"]
    assert registry.delete_adapter(*HERE) == set()
    assert registry.delete_adapter("acme", "a") == {blob("prepared 1").sha256}
    with pytest.raises(UnknownAdapterError):
        registry.adapter(*HERE)
    assert other_base.referenced_blobs() == {blob("config").sha256, blob("weights 1").sha256}


# Following


def test_every_write_of_any_server_moves_the_counter_and_no_reading_does(
    registry: Registry, open_registry: Open
) -> None:
    other = open_registry()
    seen = [other.change_counter()]

    def moved() -> bool:
        seen.append(other.change_counter())
        return seen[-1] > seen[-2]

    digest = add(registry, "a", "1")
    assert moved()
    for write in (
        lambda: registry.activate(*HERE, digest),
        lambda: registry.pin(*HERE, True),
        lambda: registry.deactivate(*HERE),
        lambda: registry.rollback(*HERE),
        lambda: registry.delete_version(*HERE, digest),
    ):
        write()
        assert moved()
    registry.snapshot()
    registry.referenced_blobs()
    with pytest.raises(UnknownAdapterError):
        registry.activate(*HERE, digest)
    assert not moved()


def test_another_server_follows_by_what_has_changed_only(registry: Registry, open_registry: Open) -> None:
    other = open_registry()
    one = add(registry, "a", "1")
    add(registry, "b", "2")
    add(registry, "c", "3", tenant="acme")
    add(open_registry("base-2"), "d", "4")
    first = other.changes()
    assert {record.name for record in first.changed} == {"a", "b", "c"}
    assert first.names == {("default", "a"), ("default", "b"), ("acme", "c")}
    assert other.changes(first.counter).changed == ()
    registry.activate(*HERE, one)
    registry.delete_adapter("acme", "c")
    second = other.changes(first.counter)
    assert [(record.name, record.active) for record in second.changed] == [("a", one)]
    assert second.names == {("default", "a"), ("default", "b")}
    assert second.counter == other.change_counter()


def test_a_thousand_adapters_are_told_in_a_handful_of_queries(registry: Registry) -> None:
    from sqlalchemy import event

    for number in range(30):
        add(registry, f"adapter-{number}", str(number))
    statements: list[str] = []
    event.listen(
        registry._database.engine,
        "before_cursor_execute",
        lambda _c, _cursor, statement, *_: statements.append(statement),
    )
    assert len(registry.snapshot()) == 30
    assert len([text for text in statements if text.startswith("SELECT")]) <= 3


# Who proves a version


def test_one_server_proves_a_version_until_its_claim_ends(open_registry: Open) -> None:
    one, other = open_registry(), open_registry()
    one.sign("server-1")
    other.sign("server-2")
    version = one.version(*HERE, add(one, "a", "1", ready=False))
    assert one.proofs.claim(version, "torch", 60)
    assert one.proofs.claim(version, "torch", 60), "after a restart it goes on"
    assert not other.proofs.claim(version, "torch", 60)
    assert other.proofs.claim(version, "avx2", 60), "other kernels are another proof"
    one.proofs.renew(version, "torch", -1)
    assert other.proofs.claim(version, "torch", 60)
    one.proofs.release(version, "torch")
    assert not one.proofs.claim(version, "torch", 60), "it is not its own any more"
    other.proofs.release(version, "torch")
    assert one.proofs.claim(version, "torch", 60)
    one.set_state(*HERE, version.digest, "ready", report=REPORT, prepared=blob("prepared"))
    one.proofs.release(version, "torch")
    assert not other.proofs.claim(version, "torch", 60), "it is proved"
    one.delete_version(*HERE, version.digest)
    assert not other.proofs.claim(version, "avx2", 60), "it is deleted"


@pytest.mark.parametrize("state", ["ready", "failed"])
def test_a_claim_ends_with_the_version_that_it_is_for(
    open_registry: Open, migrated_url: str, state: State
) -> None:
    one, other = open_registry(), open_registry()
    one.sign("server-1")
    other.sign("server-2")
    version = one.version(*HERE, add(one, "a", "1", ready=False))
    assert one.proofs.claim(version, "torch", 60)
    assert other.proofs.claim(version, "avx2", 60)

    if state == "ready":
        one.set_state(*HERE, version.digest, state, report=REPORT, prepared=blob("prepared"))
    else:
        one.set_state(*HERE, version.digest, state, error=("proof_failed", "it is wrong"))

    database = Database(migrated_url)

    def claims() -> list[str]:
        with database.read() as session:
            return list(session.scalars(select(ProofRow.kernels).where(ProofRow.until.is_not(None))))

    assert claims() == (["avx2"] if state == "ready" else []), "with other kernels it may still be proved"
    other.proofs.renew(version, "avx2", -1)
    assert one.proofs.claim(one.version(*HERE, add(one, "a", "2", ready=False)), "torch", 60)
    assert claims() == ["torch"], "a claim of a server that died goes with the next claim"
    database.close()


def test_a_claim_from_before_the_clock_went_back_holds_nobody_up(open_registry: Open) -> None:
    one, other = open_registry(), open_registry()
    one.sign("server-1")
    other.sign("server-2")
    version = one.version(*HERE, add(one, "a", "1", ready=False))
    assert one.proofs.claim(version, "torch", 3600)  # as a claim of a minute is an hour before it was made
    assert other.proofs.claim(version, "torch", 60)
    assert not one.proofs.claim(version, "torch", 60)


def test_each_kind_of_kernels_has_its_packed_adapter(registry: Registry) -> None:
    digest = add(registry, "a", "1", ready=False)
    registry.set_state(*HERE, digest, "ready", report=REPORT, prepared=blob("first"))
    version = registry.version(*HERE, digest)
    assert (version.packed_for("torch"), version.packed_for("avx2")) == (blob("first"), None)
    counter = registry.change_counter()
    registry.proofs.keep(version, "avx2", {"rank": 8}, blob("second"))
    (changed,) = registry.changes(counter).changed
    (version,) = changed.versions
    assert version.packed_for("torch") == blob("first")
    assert version.packed_for("avx2") == blob("second")
    assert {blob("first").sha256, blob("second").sha256} <= registry.referenced_blobs()
    assert not registry.proofs.claim(version, "avx2", 60)
    registry.proofs.keep(version, "torch", {}, blob("third"))
    assert registry.version(*HERE, digest).packed_for("torch") == blob("first"), "its first proof stays"
    registry.reopen(*HERE, digest)
    version = registry.version(*HERE, digest)
    assert (version.packed_for("torch"), version.packed_for("avx2")) == (None, None)
    registry.proofs.keep(version, "avx2", {}, blob("second"))
    assert registry.version(*HERE, digest).packed_for("avx2") is None, "first it must be ready"


def test_what_other_kernels_packed_goes_with_the_version(registry: Registry) -> None:
    digest = add(registry, "a", "1")
    registry.proofs.keep(registry.version(*HERE, digest), "avx2", {}, blob("second"))
    assert blob("second").sha256 in registry.delete_version(*HERE, digest)
    assert blob("second").sha256 not in registry.referenced_blobs()


def test_signing_updates_a_ready_version_and_brings_none_back(registry: Registry) -> None:
    signature = {"status": "verified", "signer": "server"}
    digest = add(registry, "a", "1")
    assert registry.sign_version(*HERE, digest, signature).source["signature"] == signature
    add(registry, "a", "2")
    registry.delete_version(*HERE, digest)
    with pytest.raises(UnknownVersionError):
        registry.sign_version(*HERE, digest, signature)
    waiting = files("3")
    registry.add_version("a", waiting.digest, waiting, {"kind": "upload"})
    with pytest.raises(UnknownVersionError, match="only a ready one"):
        registry.sign_version(*HERE, waiting.digest, signature)


# Sessions of live training


def test_old_sessions_are_forgotten_however_many_others_are_known_to_live(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "FORGOTTEN_AT_ONCE", 2)
    for number in range(7):
        name = f"session-{number}"
        registry.live.add_session(LiveSession(name, "default", "key", float(number), {}), "server")
        registry.live.add_sampler(LiveSampler(f"{name}:0", name, "default", "base", None, 0.0), "server")
    known = ["session-2", *(f"elsewhere-{number}" for number in range(300_000))]
    registry.live.forget_sessions(6.0, known)
    left = registry.live.sessions("default", offset=0, limit=9)
    assert left == ["session-6", "session-2"]
    assert [len(registry.live.samplers("default", f"session-{number}")) for number in range(7)] == [
        name in left for name in (f"session-{number}" for number in range(7))
    ]
