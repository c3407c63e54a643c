"""Servers in the registry: which of them live, and what they tell each other of quotas."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update
from tests.adapters.registry.conftest import Open

from onebase_adapters.registry import OtherServer, QuotaUse, Registry, ServerIdInUseError
from onebase_adapters.registry.servers import leases_of
from onebase_adapters.registry.tables import ServerRow


def test_a_server_lives_as_long_as_it_renews_its_lease(registry: Registry, open_registry: Open) -> None:
    here, there = registry.servers, open_registry(base_id="base-2").servers
    assert here.renew("p1", "s1", runs=True, room=1, seconds=60.0) == []
    assert there.renew("p2", "s2", runs=False, room=0, seconds=60.0) == [
        OtherServer("s1", same_base=False, runs=True, room=1, alive=True)
    ]
    there.renew("p2", "s2", runs=True, room=3, seconds=0.0)
    time.sleep(0.01)
    gone = OtherServer("s2", same_base=False, runs=True, room=3, alive=False)
    assert here.renew("p1", "s1", runs=True, room=1, seconds=60.0) == [gone]
    here.leave("p1")
    time.sleep(0.01)
    (left,) = there.renew("p2", "s2", runs=True, room=3, seconds=60.0)
    assert (left.server, left.alive, left.room) == ("s1", False, 0)


def test_a_lease_from_before_the_clock_went_back_has_run_out(registry: Registry, open_registry: Open) -> None:
    here, there = registry.servers, open_registry().servers
    here.renew("p1", "s1", runs=True, room=1, seconds=60.0)
    there.renew("p2", "s2", runs=True, room=1, seconds=60.0)
    with registry._database.write_uncounted() as session:
        session.execute(
            update(ServerRow)
            .where(ServerRow.id == "p1")
            .values(at=ServerRow.at + 3600, until=ServerRow.until + 3600)
        )
        leases = leases_of(session, registry.base_id)
    assert leases["s1"][0] < leases["s2"][0]
    (seen,) = there.renew("p2", "s2", runs=True, room=1, seconds=60.0)
    assert not seen.alive
    here.renew("p1", "s1", runs=True, room=1, seconds=60.0)
    (seen,) = there.renew("p2", "s2", runs=True, room=1, seconds=60.0)
    assert seen.alive


def test_a_copy_of_a_data_folder_gets_no_lease_while_the_original_s_process_lives(
    registry: Registry, open_registry: Open
) -> None:
    here, there = registry.servers, open_registry().servers
    here.renew("original.1", "s1", runs=True, room=1, seconds=60.0)
    there.renew("copy.1", "s1", runs=False, room=0, seconds=60.0)
    with pytest.raises(ServerIdInUseError, match="s1") as first:
        there.renew("copy.1", "s1", runs=True, room=1, seconds=60.0)
    here.renew("original.2", "s1", runs=True, room=1, seconds=60.0)  # started again after kill -9
    with pytest.raises(ServerIdInUseError) as later:
        there.renew("copy.1", "s1", runs=True, room=1, seconds=60.0)
    assert later.value.renewed_at > first.value.renewed_at
    there.renew("copy.1", "s2", runs=True, room=1, seconds=60.0)  # once it has an id of its own

    for process in ("original.1", "original.2"):
        here.leave(process)
    time.sleep(0.01)
    there.renew("copy.2", "s1", runs=True, room=1, seconds=60.0)
    there.renew("copy.2", "s1", runs=True, room=1, seconds=60.0)
    with pytest.raises(ServerIdInUseError):
        here.renew("original.2", "s1", runs=True, room=1, seconds=60.0)


def test_of_two_copies_of_a_data_folder_that_start_at_once_one_gets_the_lease(
    registry: Registry, open_registry: Open
) -> None:
    both, begin = (registry.servers, open_registry().servers), threading.Barrier(2)

    def is_alone(place: int, number: int) -> bool:
        begin.wait(60)
        try:
            both[place].renew(f"{place}.{number}", f"s{number}", runs=True, room=1, seconds=60.0)
        except ServerIdInUseError:
            return False
        return True

    with ThreadPoolExecutor(2) as threads:
        for number in range(10):
            assert sum(threads.map(is_alone, (0, 1), (number, number))) == 1


def test_a_use_is_told_to_the_others_and_grows_old(registry: Registry, open_registry: Open) -> None:
    here, there = registry.servers, open_registry().servers
    first = QuotaUse("key", "ob-1", requests=((3.5, 2),), tokens=((3.5, 20), (0.5, 7)), sequences=1)
    told, heard = here.share_use("p1", [first, QuotaUse("tenant", "acme", (), (), 0)], 0.0)
    assert heard == []
    now, heard = there.share_use("p2", [], 0.0)
    assert now >= told
    by_name = {use.name: (process, use) for process, use in heard}
    process, use = by_name["ob-1"]
    assert (process, use.sequences, [amount for _, amount in use.tokens]) == ("p1", 1, [20, 7])
    assert [age >= least for (age, _), least in zip(use.tokens, (3.5, 0.5), strict=True)] == [True, True]
    assert 0.0 <= use.age < 60.0
    here.share_use("p1", [QuotaUse("key", "ob-1", (), (), 0)], 0.0)
    _, heard = there.share_use("p2", [first], now)
    assert [(use.name, use.sequences, use.tokens) for _, use in heard if use.name == "ob-1"] == [
        ("ob-1", 0, ())
    ]
    assert [use.name for _, use in here.share_use("p1", [], now)[1]] == ["ob-1"]
    here.forget_use()
    assert len(there.share_use("p3", [], 0.0)[1]) == 3
