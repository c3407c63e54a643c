"""A registry of release 0.1 (revision 0002) is brought to today's revision, and nothing of it is lost.

`registry-0002.sql` is what that release's own code wrote: adapters, versions, rollbacks, files and jobs.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import JSON, Boolean, Engine, MetaData, create_engine, insert, select, text
from tests.adapters.registry.conftest import Open, add

from onebase_adapters.registry import Registry
from onebase_adapters.registry.database import Database

MARK = """INSERT INTO training_files VALUES
    (3, 'registry-01', 'registry', 'server-1', 'fine-tune-results', 'registry-01', 0, 1700000000.0);"""
"""How a server of release 0.1 knew a registry again that it had jobs in."""
DUMP = (Path(__file__).parent / "registry-0002.sql").read_text() + MARK
TENANT = "default"
Rows = dict[str, list[dict[str, Any]]]


def old_rows() -> Rows:
    """Every row of the dump by its table; JSON as it is stored, a text."""
    with closing(sqlite3.connect(":memory:")) as database:
        database.executescript(DUMP)
        database.row_factory = sqlite3.Row
        names = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: [dict(row) for row in database.execute(f"SELECT * FROM {name}")] for name in names}


def reflected(engine: Engine) -> MetaData:
    found = MetaData()
    found.reflect(engine)
    return found


def read_rows(engine: Engine) -> Rows:
    with engine.connect() as connection:
        return {
            name: [dict(row) for row in connection.execute(select(table)).mappings()]
            for name, table in reflected(engine).tables.items()
        }


def decoded(rows: Rows, tables: MetaData) -> Rows:
    """Rows of the dump as the columns' types give them."""

    def value(name: str, column: str, stored: Any) -> Any:
        kind = tables.tables[name].c[column].type
        if stored is None:
            return None
        if isinstance(kind, JSON):
            return json.loads(stored)
        return bool(stored) if isinstance(kind, Boolean) else stored

    return {
        name: [{key: value(name, key, stored) for key, stored in row.items()} for row in of_table]
        for name, of_table in rows.items()
    }


@pytest.fixture
def old(url: str) -> str:
    """The URL of a database that holds the old registry."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
            database.executescript(DUMP)
        return url
    config, opened = Config(), Database(url)
    config.set_main_option("script_location", "onebase_adapters.registry:migrations")
    with opened.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
    tables = reflected(opened.engine)
    rows = decoded(old_rows(), tables)
    with opened.engine.begin() as connection:
        connection.execute(text("DELETE FROM change_counter"))
        connection.execute(text("DELETE FROM alembic_version"))
        for table in tables.sorted_tables:
            if rows[table.name]:
                connection.execute(insert(table), rows[table.name])
            key = table.primary_key.columns.values()[0]
            if key.autoincrement is True or key.server_default is not None:
                last = f"setval(pg_get_serial_sequence('{table.name}', '{key.name}'), max({key.name}))"
                connection.execute(text(f"SELECT {last} FROM {table.name}"))
    opened.close()
    return url


@pytest.fixture
def migrated_url(old: str) -> str:
    """What `open_registry` opens, and migrates."""
    return old


@pytest.fixture
def upgraded(open_registry: Open) -> Registry:
    return open_registry()


def by_key(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: str(next(iter(row.values()))))


def test_every_row_is_kept_and_wishes_become_options(upgraded: Registry, old: str) -> None:
    engine = create_engine(Database(old).engine.url)
    now, before = read_rows(engine), decoded(old_rows(), reflected(engine))
    engine.dispose()
    for version in before["versions"]:
        if "wishes" in version["source"]:
            version["source"]["options"] = version["source"].pop("wishes")
    sources = [version["source"] for version in before["versions"] if "options" in version["source"]]
    assert len(sources) == 2
    new = {
        "identity", "api_keys", "tenants", "usage", "usage_writers", "audit", "batches", "servers",
        "quota_use", "job_files", "proofs",
    }  # fmt: skip
    assert now.keys() - before.keys() == new
    assert now["audit"] == []
    # Files lie where they were until their server starts; the row by which 0.1 knew its registry is gone.
    before["training_files"] = [
        {**row, "sha256": None} for row in before["training_files"] if row["tenant"] != "registry"
    ]
    before["adapters"] = [{**row, "shared": False} for row in before["adapters"]]
    added = {"key": None, "parent": None, "hold": False, "stop": None}
    added |= {"kept_step": 0, "kept_adapter": False}
    before["training_jobs"] = [row | added for row in before["training_jobs"]]
    for name in before.keys() - {"alembic_version", "change_counter"}:
        assert by_key(now[name]) == by_key(before[name]), name
    assert now["change_counter"][0]["value"] > before["change_counter"][0]["value"]


def test_adapters_are_as_they_were_and_can_be_rolled_back(upgraded: Registry) -> None:
    acme, legal = upgraded.snapshot()
    versions = {row["digest"]: row for row in old_rows()["versions"]}
    for record in (acme, legal):
        for version in record.versions:
            row = versions.pop(version.digest)
            assert (version.state, version.created_by) == (row["state"], row["created_by"])
            assert version.files.weights.sha256 == row["weights_sha256"]
    assert not versions
    third, second, first = acme.versions
    assert (acme.name, acme.pinned, acme.active) == ("acme", True, second.digest)
    actions = [(entry.action, entry.version) for entry in upgraded.history(TENANT, "acme")]
    assert actions == [
        ("rollback", second.digest),
        ("activate", third.digest),
        ("activate", second.digest),
        ("activate", first.digest),
    ]
    assert upgraded.rollback(TENANT, "acme").active == first.digest
    (waiting,) = upgraded.unfinished()
    assert waiting.source["options"] == {"activate": True, "allow_noop": False, "any_base": True}
    assert waiting.digest in {version.digest for version in legal.versions}
    fourth = add(upgraded, "acme", "after the upgrade")
    assert upgraded.activate(TENANT, "acme", fourth).active == fourth


def test_jobs_are_as_they_were_and_go_on(upgraded: Registry) -> None:
    records = upgraded.training
    jobs = {job.id: job for job in records.jobs(TENANT, limit=9)}
    assert {name: job.state for name, job in jobs.items()} == {
        "ftjob-1": "succeeded",
        "ftjob-2": "failed",
        "ftjob-3": "paused",
        "ftjob-4": "validating_files",
    }
    done, failed = jobs["ftjob-1"], jobs["ftjob-2"]
    assert (done.activated, done.result_file, done.report) == (True, "file-2", {"better": True})
    assert failed.error is not None
    assert (failed.error.code, failed.error.param) == ("invalid_file", "training_file")
    assert [file.id for file in records.files(TENANT, limit=9)] == ["file-2", "file-1"]
    said = [event.message for event in records.events_since(done, 0, 9)]
    assert said == [
        "Created fine-tuning job.",
        "The files are valid.",
        "Training began.",
        "Step 4/8",
        "Done.",
    ]
    (checkpoint,) = records.checkpoints(done)
    assert (checkpoint.step, checkpoint.path, checkpoint.valid_loss) == (4, "checkpoint-4", 1.25)
    assert [job.id for job in records.open_jobs("server-1")] == ["ftjob-4"]
    assert records.move("ftjob-3", "queued", ("paused",)).state == "queued"


def test_a_version_that_a_running_server_of_release_0_1_adds_has_its_options(upgraded: Registry) -> None:
    digest = add(upgraded, "acme", "from an old server")
    stored = json.dumps({"kind": "upload", "wishes": {"activate": True}})
    with upgraded._database.engine.begin() as connection:
        change = text("UPDATE versions SET source = CAST(:source AS JSON) WHERE digest = :digest")
        if connection.dialect.name == "sqlite":
            change = text("UPDATE versions SET source = :source WHERE digest = :digest")
        connection.execute(change, {"source": stored, "digest": digest})
    seen = upgraded.version(TENANT, "acme", digest)
    assert seen.source == {"kind": "upload", "options": {"activate": True}}
