"""The writer of the log of requests: erasures, keys, limits and files, without a server."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from onebase_adapters.registry import (
    ErasuresError,
    LogErasure,
    RegistryError,
    RequestLogRecords,
    Tenants,
)
from onebase_adapters.registry.database import Database
from onebase_adapters.registry.tables import LogErasureRow
from onebase_engine.engine.messages import Sampling
from onebase_server.inference.generation import GenerationRequest, Prompt
from onebase_server.inference.stream import OutputPiece
from onebase_server.requests import request_log
from onebase_server.requests.request_log import RequestLog, part_sizes, user_hash

from .conftest import REGISTRIES, registry_url

SECONDS = 20.0


class Logs:
    """Logs of one registry, each in a folder of its own."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.database = Database(url)
        self.database.migrate()
        self.records = RequestLogRecords(self.database)
        self.opened: list[RequestLog] = []
        self.ids = iter(range(10**6))

    def open(self, name: str = "log", **settings: Any) -> RequestLog:
        chosen: dict[str, Any] = {"mode": "text", "days": 30.0, "most_bytes": 1 << 20, "sync_seconds": 0.05}
        log = RequestLog(
            self.folder / name,
            self.records,
            base="base",
            base_id="base-id",
            server="server",
            **chosen | settings,
        )
        log.start()
        self.opened.append(log)
        return log

    def request(self, user: str | None = None, *, tenant: str = "acme", size: int = 3) -> GenerationRequest:
        prompt = Prompt([7] * size)
        return GenerationRequest(
            id=f"r{next(self.ids)}", tenant=tenant, prompts=(prompt,), sampling=Sampling(), user=user
        )

    def put(self, log: RequestLog, user: str | None = None, **about: Any) -> str:
        """Log a request that has ended, wait until it is written, and return its id."""
        request = self.request(user, **about)
        entry = log.begin(request)
        assert entry is not None
        entry.ended(1, Counter(stop=1))
        wait_for(lambda: request.id in ids(log, request.tenant))
        return request.id

    def close(self) -> None:
        for log in self.opened:
            log.close()
        self.database.close()


@pytest.fixture(params=REGISTRIES)
def logs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Logs]:
    made = Logs(tmp_path, registry_url(request, tmp_path))
    yield made
    made.close()


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.01)


def ids(log: RequestLog, tenant: str = "acme") -> list[str]:
    """Return the ids of the requests that have ended, the last first."""
    return [one.id for one in log.find(tenant, lambda one: True) if one.state == "done"]


def erase(log: RequestLog, user: str | None, tenant: str = "acme") -> int:
    return asyncio.run(asyncio.wait_for(log.erase(tenant, user), SECONDS))


def test_a_tenants_quota_says_for_how_long_its_requests_are_kept_and_whether_any_are(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "TIDY_SECONDS", 0.01)
    log, tenants, ago = logs.open(), Tenants(logs.database), time.time() - 3 * 86400
    old = {tenant: logs.put(log, tenant=tenant) for tenant in ("acme", "zeta")}
    for segment in (logs.folder / "log").rglob("*.jsonl"):
        os.utime(segment, (ago, ago))
    tenants.set_quotas("acme", {"log_days": 2})
    wait_for(lambda: ids(log) == [])
    assert ids(log, "zeta") == [old["zeta"]]
    new = logs.put(log)
    tenants.set_quotas("acme", {"log_days": 0})
    wait_for(lambda: ids(log) == [])
    written = log.written
    entry = log.begin(logs.request())
    assert entry is not None
    entry.ended(1, Counter(stop=1))
    wait_for(lambda: not log._waiting)
    assert log.written == written
    assert not list(log._place("acme").glob("*.jsonl"))
    tenants.set_quotas("acme", {"log_days": None})
    wait_for(lambda: log._days == {})
    assert logs.put(log) != new


def test_nothing_is_written_before_the_quotas_of_tenants_could_be_read(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "_AGAIN_SECONDS", 0.01)
    Tenants(logs.database).set_quotas("acme", {"log_days": 0})
    days, is_away, tries = logs.records.days, threading.Event(), itertools.count()

    def read() -> dict[str, int]:
        tried = next(tries)
        if is_away.is_set():
            if tried == 5:
                all_tried.set()
            raise RegistryError("the registry is away")
        return days()

    all_tried = threading.Event()
    monkeypatch.setattr(logs.records, "days", read)
    is_away.set()
    log = logs.open()
    for tenant in ("acme", "zeta"):
        entry = log.begin(logs.request(tenant=tenant))
        assert entry is not None
        entry.ended(1, Counter(stop=1))
    assert all_tried.wait(SECONDS)
    assert not list((logs.folder / "log").rglob("*.jsonl"))
    is_away.clear()
    wait_for(lambda: not log._waiting)
    assert len(ids(log, "zeta")) == 1
    assert not list(log._place("acme").glob("*.jsonl"))


def test_who_erases_is_told_how_many_though_the_writer_applied_it_first(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logs.open()
    logs.put(log, "alice")
    commit = logs.records.erase

    def slow(*given: Any) -> LogErasure:
        erasure = commit(*given)
        wait_for(lambda: ids(log) == [])
        return erasure

    monkeypatch.setattr(logs.records, "erase", slow)
    assert erase(log, "alice") == 1


def test_who_erases_is_answered_though_another_erasure_replaced_theirs(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logs.open()
    logs.put(log, "alice")
    commit = logs.records.erase

    def twice(*given: Any) -> LogErasure:
        erasure = commit(*given)
        commit(*given)
        return erasure

    monkeypatch.setattr(logs.records, "erase", twice)
    erase(log, "alice")
    assert ids(log) == []


def test_an_erasure_is_applied_and_answered_in_a_registry_restored_from_before_the_last_one(
    logs: Logs,
) -> None:
    log = logs.open()
    first = logs.put(log, "alice")
    (logs.folder / "log" / "erased").write_text("1000000")
    assert erase(log, "alice") == 1
    assert first not in ids(log)


def test_a_request_whose_text_was_read_from_the_log_during_an_erasure_is_not_logged(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logs.open()
    logs.put(log, "alice")
    forget, seen = log._forget, []

    def during(*given: Any) -> None:
        forget(*given)
        seen.append(log.reads_since("acme"))
        seen.append(log.reads_since("other"))

    monkeypatch.setattr(log, "_forget", during)
    before = log.reads_since("acme")
    erase(log, "alice")
    assert log.begin(logs.request(), since=before) is None
    assert log.begin(logs.request(), since=seen[0]) is None
    assert log.begin(logs.request(tenant="other"), since=seen[1]) is not None
    assert log.begin(logs.request(), since=log.reads_since("acme")) is not None


def test_a_key_that_an_erasure_took_is_not_used_by_who_read_it_before(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logs.open()
    read = logs.records.key

    def slow(tenant: str) -> bytes:
        key = read(tenant)
        monkeypatch.setattr(logs.records, "key", read)
        erase(log, None)
        return key

    monkeypatch.setattr(logs.records, "key", slow)
    log.key("acme")
    assert log.key("acme") == logs.records.key("acme")


def test_a_user_is_erased_with_the_key_of_the_moment_though_another_server_made_a_new_one(
    logs: Logs,
) -> None:
    log, other = logs.open(), logs.open("other", sync_seconds=3600.0)
    logs.put(other, "alice")
    wait_for(lambda: other._tidy_at > 0)  # its only look is over
    erase(log, None)
    logs.put(log, "alice")
    assert asyncio.run(other.user_hash("acme", "alice")) != asyncio.run(log.user_hash("acme", "alice"))
    erase(other, "alice")
    wait_for(lambda: ids(log) == [])


def test_a_request_that_runs_is_forgotten_though_its_tenants_key_was_not_read_yet(logs: Logs) -> None:
    log = logs.open()
    entry = log.begin(logs.request("alice"))
    assert entry is not None
    wait_for(lambda: not log._waiting)
    log._keys.clear()
    erase(log, "alice")
    assert entry.is_left_out


def test_an_erasure_stays_to_be_applied_while_the_registry_gives_no_key(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logs.open()
    entry = log.begin(logs.request("alice"))
    assert entry is not None
    wait_for(lambda: not log._waiting)
    log._keys.clear()
    read = logs.records.key

    def away(tenant: str) -> bytes:
        raise RegistryError("away")

    monkeypatch.setattr(logs.records, "key", away)
    with pytest.raises(RegistryError):
        erase(log, "alice")
    assert not entry.is_left_out
    monkeypatch.setattr(logs.records, "key", read)
    wait_for(lambda: entry.is_left_out)


def test_a_tenant_with_as_many_erasures_as_are_kept_erases_users_again_and_older_ones_give_way(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase_adapters.registry.request_log.MOST_ERASURES", 2)
    log = logs.open(days=1.0)
    for user in ("alice", "bob", "alice"):
        erase(log, user)
    with pytest.raises(ErasuresError):
        erase(log, "carol")
    with logs.database.write_uncounted() as session:
        session.execute(update(LogErasureRow).values(at=LogErasureRow.at - 2 * 86400.0))
    erase(log, "carol")
    assert len(logs.records.erasures(0)) == 1


@pytest.mark.parametrize("damaged", ["", "1x", None])
def test_a_lost_number_of_the_last_erasure_does_not_erase_what_came_after_it(
    logs: Logs, damaged: str | None
) -> None:
    log = logs.open()
    logs.put(log, "alice")
    erase(log, None)
    with logs.database.write_uncounted() as session:
        session.execute(update(LogErasureRow).values(at=LogErasureRow.at - 3600.0))
    kept = logs.put(log, "alice")
    log.close()
    place = logs.folder / "log" / "erased"
    last = place.read_text()
    place.unlink() if damaged is None else place.write_text(damaged)
    again = logs.open()
    wait_for(lambda: place.exists() and place.read_text() == last)
    assert ids(again) == [kept]


def test_the_first_erasure_of_a_log_is_applied_whatever_the_clock_of_who_erased(logs: Logs) -> None:
    log = logs.open(sync_seconds=3600.0)
    logs.put(log, "alice")
    log.close()
    logs.records.erase("acme", None)
    with logs.database.write_uncounted() as session:
        session.execute(update(LogErasureRow).values(at=LogErasureRow.at - 3600.0))
    again = logs.open()
    wait_for(lambda: ids(again) == [])


def test_other_tenants_are_written_while_one_tenants_files_are_erased_in_one_pass(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logs.open(most_bytes=1 << 20, sync_seconds=3600.0)
    users = [f"user {number}" for number in range(6)]
    for user in users:
        logs.put(log, user, size=20_000)
    other = logs.request(tenant="other")
    written: list[bool] = []
    forget = log._forget

    def during(*given: Any) -> None:
        forget(*given)
        entry = log.begin(other)
        assert entry is not None
        entry.ended(1, Counter(stop=1))

    read, reads = Path.read_bytes, Counter[str]()

    def reading(path: Path) -> bytes:
        reads[path.name] += 1
        written.append(not log._waiting.get("other"))
        return read(path)

    monkeypatch.setattr(log, "_forget", during)
    for user in users[1:]:
        logs.records.erase("acme", partial(user_hash, user=user))
    monkeypatch.setattr(Path, "read_bytes", reading)
    erase(log, users[0])
    assert ids(log) == []
    assert len(reads) > 1
    assert max(reads.values()) <= 2
    assert any(written)


def test_more_tenants_than_files_may_be_open_go_on_in_their_files(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase_server.requests.request_log._OPEN_FILES", 2)
    log = logs.open(mode="hashes")
    tenants = [f"tenant {number}" for number in range(4)]
    for _ in range(3):
        for tenant in tenants:
            logs.put(log, tenant=tenant)
    assert len(log._files) <= 2
    assert len(list((logs.folder / "log").glob("*/*.jsonl"))) == len(tenants)
    assert [len(ids(log, tenant)) for tenant in tenants] == [3] * 4


def test_what_is_too_large_to_wait_is_logged_with_hashes_alone(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase_server.requests.request_log.MOST_WAITING", 80_000)
    log = logs.open()
    large, small = logs.put(log, size=2000), logs.put(log)
    found = {one.id: one for one in log.find("acme", lambda one: True)}
    assert (found[large].has_text, found[small].has_text) == (False, True)
    assert found[large].prompts
    assert log.dropped == 0
    entry = log.begin(logs.request())
    assert entry is not None
    entry.heard(OutputPiece(0, "word " * 4000))
    entry.ended(1, Counter(stop=1))
    wait_for(lambda: entry.request.id in ids(log))
    told = log.find("acme", lambda one: one.id == entry.request.id)[0]
    assert (told.has_text, told.answers[0].length) == (False, 20_000)
    assert log.dropped == 0


def test_each_of_several_requests_counts_its_own_part_of_the_body() -> None:
    body = b'{"requests": [{"prompt": "one"}, {"prompt": "' + b"x" * 1000 + b'"}], "max_tokens": 5}'
    first, second = part_sizes(body)
    assert first < 100
    assert 1000 < second < len(body)
