"""The registry's database: migrations, several servers at once, and what its errors say."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import alembic.config
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from tests.adapters.registry.conftest import Open, add, files
from tests.disks import fill, small_disk
from tests.postgres import postgres_server

from onebase_adapters.registry import (
    AdapterRecord,
    Registry,
    RegistryBusyError,
    RegistryError,
    RegistryFullError,
    StaleActivationError,
    UncertainChangeError,
    database,
    migrations,
)
from onebase_adapters.registry.tables import Table

HERE = ("default", "a")


def test_the_migrations_make_exactly_the_tables_that_the_code_uses(registry: Registry) -> None:
    with registry._database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
        assert set(inspect(connection).get_table_names()) == {*Table.metadata.tables, "alembic_version"}


def test_migrating_again_changes_nothing(registry: Registry, open_registry: Open) -> None:
    digest = add(registry, "a", "1")
    before = registry.change_counter()
    registry.migrate()
    assert open_registry().version(*HERE, digest).state == "ready"
    assert registry.change_counter() == before


def test_a_registry_is_the_same_one_for_all_its_servers_and_no_other(
    registry: Registry, open_registry: Open, tmp_path: Path
) -> None:
    other = Registry(f"sqlite:///{tmp_path / 'other.db'}", base_id="base-1", base_name="base")
    other.migrate()
    here = registry.training.registry_id()
    assert open_registry(base_id="base-2").training.registry_id() == here
    assert other.training.registry_id() != here
    other.close()


def test_many_servers_that_start_at_once_migrate_once(url: str) -> None:
    start = threading.Barrier(6)

    def server(number: int) -> str:
        registry = Registry(url, base_id="base-1", base_name="base")
        try:
            start.wait()
            registry.migrate()
            return add(registry, f"adapter-{number}", str(number))
        finally:
            registry.close()

    with ThreadPoolExecutor(6) as pool:
        digests = set(pool.map(server, range(6)))
    registry = Registry(url, base_id="base-1", base_name="base")
    assert {record.versions[0].digest for record in registry.snapshot()} == digests
    registry.close()


LATER = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "9999", "{head}", None, None

def upgrade():
    op.add_column("adapters", sa.Column("note", sa.Text(), nullable=False, server_default="none"))
"""


def test_servers_of_a_later_release_that_start_at_once_upgrade_once_and_nothing_is_lost(
    registry: Registry, open_registry: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (add(registry, "a", text) for text in "12")
    registry.activate(*HERE, first)
    registry.activate(*HERE, second)
    before = registry.snapshot()
    counter = registry.change_counter()
    start = threading.Barrier(6)

    def later_server(_: int) -> list[AdapterRecord]:
        start.wait()
        return open_registry().snapshot()

    with monkeypatch.context() as patch:
        patch.setattr(alembic.config, "Config", with_a_later_revision(tmp_path / "versions"))
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(later_server, range(6))) == [before] * 6
    with registry._database.engine.connect() as connection:
        assert connection.execute(text("SELECT note FROM adapters")).all() == [("none",)]
    # Servers that run go on; one of the earlier release that starts now does not.
    assert registry.change_counter() == counter
    third = add(registry, "a", "3")
    assert registry.activate(*HERE, third).active == third
    assert registry.rollback(*HERE).active == second
    with pytest.raises(RegistryError, match="another version of OneBase"):
        open_registry()


def with_a_later_revision(folder: Path) -> Callable[[], Config]:
    """Alembic's configuration of a release with one migration more."""
    ours = Path(migrations.__file__).parent / "versions"
    made = Config()
    made.set_main_option("script_location", str(ours.parent))
    head = ScriptDirectory.from_config(made).get_current_head()
    folder.mkdir()
    (folder / "later.py").write_text(LATER.format(head=head))

    def config() -> Config:
        later = Config()
        later.set_main_option("path_separator", "os")
        later.set_main_option("version_locations", f"{ours}{os.pathsep}{folder}")
        return later

    return config


PROGRAM = """
import sys
from onebase_adapters.registry import *
registry = Registry(sys.argv[1], base_id="base-1", base_name="base")
registry.migrate()
print(flush=True)
sys.stdin.readline()
wins = 0
for digest in sys.argv[2:]:
    try:
        registry.activate("default", "a", digest, expected=None)
        wins += 1
    except StaleActivationError:
        pass
print(wins)
"""


def test_of_several_processes_that_expect_the_same_exactly_one_activates(
    registry: Registry, migrated_url: str, tmp_path: Path
) -> None:
    digests = [add(registry, "a", text) for text in "12345678"]
    root = Path(__file__).parents[3]
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, migrated_url, *digests[number::4]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root / "adapters",
        )
        for number in range(4)
    ]
    for server in servers:
        assert server.stdout is not None
        server.stdout.readline()
    outputs = []
    for server in servers:
        assert server.stdin is not None
        server.stdin.write("\n")
        server.stdin.flush()
    for server in servers:
        outputs.append(server.communicate()[0])
        assert server.returncode == 0
    assert sum(int(output) for output in outputs) == 1
    assert len(registry.history(*HERE)) == 1


def test_of_several_threads_that_expect_the_same_exactly_one_activates(
    registry: Registry, open_registry: Open
) -> None:
    servers = [registry, open_registry()]
    digests = [add(registry, "a", text) for text in "0123456789"]
    current: str | None = None
    for pair in zip(digests[::2], digests[1::2], strict=True):
        start = threading.Barrier(8)

        def attempt(number: int) -> bool:
            start.wait()  # noqa: B023
            try:
                servers[number % 2].activate(*HERE, pair[number // 4], expected=current)  # noqa: B023
            except StaleActivationError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(attempt, range(8)))
        assert won.count(True) == 1
        current = pair[won.index(True) // 4]
        assert registry.adapter(*HERE).active == current
    assert len(registry.history(*HERE)) == 5


def test_the_same_content_sent_at_once_is_one_version(registry: Registry, open_registry: Open) -> None:
    servers = [registry, open_registry()]
    both = files("same")
    start = threading.Barrier(8)

    def send(number: int) -> bool:
        start.wait()
        _, created = servers[number % 2].add_version("a", both.digest, both, {"kind": "upload"})
        return created

    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(send, range(8)))
    assert created.count(True) == 1
    assert len(registry.versions(*HERE)) == 1


def test_readers_see_one_state_while_others_write(registry: Registry, open_registry: Open) -> None:
    one, two = add(registry, "a", "1"), add(registry, "a", "2")
    registry.activate(*HERE, one)
    other = open_registry()
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            registry.activate(*HERE, two)
            registry.delete_version(*HERE, two)
            add(registry, "a", "2")
            registry.activate(*HERE, one)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = set()
        while len(seen) < 3:
            record = other.adapter(*HERE)
            assert record.active is None or record.active_version is not None
            seen.add((record.active, len(record.versions)))
    finally:
        stop.set()
        writer.join()


# What is said when it goes wrong


def test_a_registry_that_was_not_migrated_says_so(url: str) -> None:
    registry = Registry(url, base_id="base-1", base_name="base")
    with pytest.raises(RegistryError) as refused:
        registry.snapshot()
    assert not isinstance(refused.value, RegistryBusyError)
    registry.close()


def test_a_registry_of_a_later_version_is_left_alone(registry: Registry) -> None:
    with registry._database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RegistryError, match="another version of OneBase"):
        registry.migrate()


@pytest.mark.parametrize(
    "url",
    ["mysql://root@localhost/x", "sqlite://", "sqlite:///:memory:", "nonsense", ""],
)
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(RegistryError):
        Registry(url, base_id="b", base_name="b")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RegistryError, match="opening"):
        Registry(f"sqlite:///{tmp_path / 'file' / 'registry.db'}", base_id="b", base_name="b")


def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    path.write_bytes(b"not a database, but somebody's file" * 100)
    registry = Registry(f"sqlite:///{path}", base_id="b", base_name="b")
    with pytest.raises(RegistryError, match="not a database"):
        registry.migrate()
    assert path.read_bytes() == b"not a database, but somebody's file" * 100
    registry.close()


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("postgresql://user:s3cr3t@127.0.0.1:1/x", "s3cr3t"),
        ("postgresql://user:s3%23cr3t@127.0.0.1:1/x", "s3#cr3t"),
        ("postgresql://127.0.0.1:1/x?password=s3cr3t&user=u", "s3cr3t"),
    ],
)
def test_a_server_that_cannot_be_reached_is_said_to_be_without_its_password(
    url: str, secret: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    registry = Registry(url, base_id="b", base_name="b")
    with pytest.raises(RegistryBusyError, match=r"127\.0\.0\.1") as refused:
        registry.migrate()
    shown = "".join(str(part) for part in (refused.value, refused.value.__cause__, caplog.text))
    assert secret not in shown
    assert url not in shown
    registry.close()


def test_sqlite_is_kept_so_that_an_acknowledged_write_outlives_a_power_cut(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path / 'r.db'}", base_id="b", base_name="b")
    registry.migrate()
    with registry._database.engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    registry.close()


def add_until_full(add_long: Callable[[], None]) -> None:
    for _ in range(100):
        add_long()


def test_a_postgresql_without_space_says_so_keeps_what_it_has_and_works_again() -> None:
    # A server of its own: one whose disk was taken away is of no use to other tests.
    with postgres_server() as server, small_disk(server.folder / "small", 48 << 20) as disk:
        registry = Registry(server.database(on=disk), base_id="b", base_name="b")
        registry.migrate()
        digest = add(registry, "a", "1")
        filler = fill(disk)
        long = {"kind": "upload", "note": "".join(random.Random(1).choices("abcdefghij", k=300_000))}
        added: list[str] = []

        def add_long() -> None:
            both = files(f"large {len(added)}")
            registry.add_version("a", both.digest, both, long)
            added.append(both.digest)

        with pytest.raises(RegistryFullError):
            add_until_full(add_long)
        assert [record.digest for record in registry.versions(*HERE)] == [*added[::-1], digest]
        assert registry.version(*HERE, digest).state == "ready"
        filler.unlink()
        add_long()
        assert registry.version(*HERE, added[-1]).source == long
        registry.close()


@pytest.mark.full
def test_a_server_that_stands_still_in_a_write_holds_up_no_other_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(database, "_WAIT_SECONDS", 1.0)
    with postgres_server() as postgres:
        one, other = (Registry(url, base_id="base-1", base_name="base") for url in [postgres.database()] * 2)
        one.migrate()
        add(one, "a", "1")

        def stand_still() -> None:
            with one._database.write() as (session, _):
                session.execute(text("UPDATE adapters SET pinned = true"))
                while True:
                    with contextlib.suppress(RegistryBusyError):
                        other.share(*HERE, True)
                        break

        with pytest.raises(RegistryBusyError):
            stand_still()
        left = other.adapter(*HERE)
        assert (left.shared, left.pinned) == (True, False)
        one.pin(*HERE, True)
        assert other.adapter(*HERE).pinned
        one.close()
        other.close()


def test_postgresql_tells_each_server_of_what_another_wrote_and_again_after_a_lost_connection(
    kind: str, open_registry: Open
) -> None:
    writer, reader = open_registry(), open_registry()
    told = threading.Event()

    with reader.notify_changes(told.set):
        if kind == "sqlite":  # which cannot
            add(writer, "acme", "1")
            assert not told.wait(0.1)
            return
        assert told.wait(60)  # it listens
        for name in ("acme", "other"):
            told.clear()
            add(writer, name, name)
            assert told.wait(60)
        told.clear()
        with writer._database.engine.connect() as connection:
            ended = connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND query LIKE 'LISTEN%'"
                )
            )
            assert ended.all() == [(True,)]
        assert told.wait(60)  # what it may have missed meanwhile
    told.clear()
    add(writer, "third", "3")
    assert not told.wait(0.3)


def test_a_change_whose_commit_is_not_answered_is_said_to_be_uncertain(
    kind: str, open_registry: Open
) -> None:
    if kind == "sqlite":  # which has no connection to lose
        return
    writer, other = open_registry(), open_registry()
    add(writer, "acme", "1")

    def write_while_it_is_ended() -> None:
        with writer._database.write_uncounted() as session:
            session.execute(text("UPDATE adapters SET pinned = true"))
            mine = session.scalar(text("SELECT pg_backend_pid()"))
            with other._database.engine.connect() as connection:
                connection.execute(text("SELECT pg_terminate_backend(:mine, 60000)"), {"mine": mine})

    with pytest.raises(UncertainChangeError, match="may have been made"):
        write_while_it_is_ended()
    writer.pin("default", "acme", False)  # over another connection
