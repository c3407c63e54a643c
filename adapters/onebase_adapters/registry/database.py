"""Database of the registry: connections, transactions, migrations, errors, values that its columns can hold,
and the blobs that they name."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    create_engine,
    event,
    exc,
    make_url,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.orm import Session

from onebase_adapters.registry.errors import (
    RegistryBusyError,
    RegistryError,
    RegistryFullError,
    UncertainChangeError,
)
from onebase_adapters.registry.tables import ChangeCounter, JobFileRow, ProofRow, TrainingFileRow, VersionRow
from onebase_engine.redaction import redacted, without_secrets

_WAIT_SECONDS = 30.0
_COUNTER_ID = 1
_MIGRATION_LOCK = 0x6F6E_6562_6173_65  # "onebase", for pg_advisory_xact_lock
_CHANNEL = "onebase_changes"
_LISTEN_SECONDS = 0.2
"""Seconds after which a listening thread notices that it must end, and between two tries to connect."""
_DISK_FULL = "53100"  # PostgreSQL's SQLSTATE
_CONNECTION_LOST, _SHUTDOWN = "08", "57P"  # beginnings of SQLSTATEs
_STOOD_STILL = "25P03"  # of a session that was ended since it did nothing within a transaction
_LIMITS = ("lock_timeout", "idle_in_transaction_session_timeout")
"""PostgreSQL's limits on waiting for a lock, and on holding one in an idle transaction."""
_KEEPALIVES = {"keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3}
"""libpq's options, in seconds, that detect a database whose machine vanished."""
_READ = "onebase_read"
_LITTLE_SPACE = 1 << 20
SERVER = "server"
"""Key of a session's `info`: the id of the server that writes."""
SQLITE_ENDINGS = ("", "-wal", "-shm", "-journal", ".lock")
"""Suffixes of the files of a SQLite registry."""


class Database:
    """One engine for a SQLite file or a PostgreSQL database; raises only RegistryError and its kinds."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.server = ""
        """Id of the server that writes, for the audit log."""
        self.place = redacted(url)
        self._file: Path | None = None
        with self.errors("opening the registry"):
            parsed = self._parsed(url)
            if parsed.get_backend_name() == "sqlite":
                self._file = Path(str(parsed.database)).expanduser().absolute()
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self.engine = self._sqlite(parsed.set(database=str(self._file)))
                self._reading = self.engine.execution_options(**{_READ: True})
            else:
                self.engine = self._postgresql(parsed)
                self._reading = self.engine.execution_options(isolation_level="REPEATABLE READ")

    def _parsed(self, url: str) -> URL:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise RegistryError(f"{self.place}: the registry is a sqlite:/// or a postgresql:// URL.")
        if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
            raise RegistryError(f"{self.place}: the registry needs a file, which outlives the server.")
        return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed

    def _sqlite(self, url: URL) -> Engine:
        engine = create_engine(url, connect_args={"timeout": _WAIT_SECONDS}, hide_parameters=True)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine

    def _postgresql(self, url: URL) -> Engine:
        given = {"connect_timeout": int(_WAIT_SECONDS), "tcp_user_timeout": int(_WAIT_SECONDS * 1000)}
        given |= _KEEPALIVES
        engine = create_engine(
            url,
            pool_pre_ping=True,
            isolation_level="READ COMMITTED",  # who waited for the audit log's lock sees the entry before
            hide_parameters=True,
            connect_args={name: value for name, value in given.items() if name not in url.query},
        )
        event.listen(engine, "connect", _prepare_postgresql)
        return engine

    @contextmanager
    def write(self) -> Iterator[tuple[Session, int]]:
        """Yield a transaction that excludes other writers, and the change counter after it."""
        with self.write_uncounted() as session:
            counter = session.scalar(
                update(ChangeCounter)
                .where(ChangeCounter.id == _COUNTER_ID)
                .values(value=ChangeCounter.value + 1)
                .returning(ChangeCounter.value)
            )
            if counter is None:
                raise RegistryError(f"{self.place} has no change counter: it was not migrated.")
            yield session, counter
            if self._file is None:  # PostgreSQL sends it when the transaction is committed
                session.execute(text(f"NOTIFY {_CHANNEL}"))

    @contextmanager
    def notify_changes(self, changed: Callable[[], None]) -> Iterator[None]:
        """While this is open, call `changed`, in a thread, soon after each counted write of any server.

        Only PostgreSQL notifies; SQLite does not, and a lost connection may miss some. So poll now and then
        too.
        """
        if self._file is not None:
            yield
            return
        stop = threading.Event()
        thread = threading.Thread(target=self._listen, args=(changed, stop), name="registry", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _listen(self, changed: Callable[[], None], stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                with self.engine.connect() as connection:
                    connection.execution_options(isolation_level="AUTOCOMMIT")
                    connection.exec_driver_sql(f"LISTEN {_CHANNEL}")
                    driver: Any = connection.connection.driver_connection
                    connection.detach()  # from the pool, whose next user would listen as well
                    changed()  # what was written before it listened
                    while not stop.is_set():
                        for _ in driver.notifies(timeout=_LISTEN_SECONDS, stop_after=1):
                            changed()
            except Exception:  # of the driver too; who looks at the registry says what is wrong
                stop.wait(_LISTEN_SECONDS)

    @contextmanager
    def write_uncounted(self) -> Iterator[Session]:
        """Yield a writing transaction that leaves the change counter alone, for data that no catalog
        follows."""
        with self.errors("writing"), self._session() as session, session.begin():
            yield session
            session.flush()
            try:
                session.commit()
            except exc.DBAPIError as error:
                if self._file is None and _may_have_committed(error.orig):
                    said = without_secrets(f"{type(error.orig).__name__}: {error.orig}".strip(), self.url)
                    raise UncertainChangeError(
                        f"the change may have been made: {self.place} was lost during its commit ({said})"
                    ) from None
                raise

    def _session(self) -> Session:
        return Session(self.engine, info={SERVER: self.server})

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a transaction that sees one state throughout."""
        with self.errors("reading"), Session(self._reading) as session:
            yield session

    def counter(self, session: Session | None = None) -> int:
        """Return the change counter, as the transaction sees it or now."""
        if session is None:
            with self.read() as own:
                return self.counter(own)
        value = session.scalar(select(ChangeCounter.value).where(ChangeCounter.id == _COUNTER_ID))
        if value is None:
            raise RegistryError(f"{self.place} has no change counter: it was not migrated.")
        return value

    def migrate(self) -> None:
        """Bring the tables to this version, once, however many servers start at the same time."""
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", "onebase_adapters.registry:migrations")
        with self.errors("migrating"), self._alone(), self.engine.begin() as connection:
            if self._file is None:
                for limit in _LIMITS:  # a migration takes as long as it takes, and others wait for it
                    connection.execute(text(f"SET LOCAL {limit} = 0"))
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise RegistryError(
                    f"{self.place} was written by another version of OneBase ({error}): "
                    "use that or a newer one."
                ) from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """For SQLite, exclude other processes on this disk from switching the file to WAL or migrating it."""
        if self._file is None:
            yield
            return
        lock = os.open(f"{self._file}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            raw = sqlite3.connect(self._file, timeout=_WAIT_SECONDS)
            try:
                raw.execute("PRAGMA journal_mode=WAL")
            finally:
                raw.close()
            yield
        finally:
            os.close(lock)

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Raise errors of the database, its driver and the disk as RegistryError, without the URL's
        password."""
        try:
            yield
        except RegistryError:
            raise
        except (exc.SQLAlchemyError, sqlite3.Error, OSError) as error:
            cause = getattr(error, "orig", None) or error
            said = without_secrets(f"{type(cause).__name__}: {cause}".strip(), self.url)
            raise _kind(error, cause, self._file)(f"{self.place} failed while {doing}: {said}") from None


def clock(session: Session) -> float:
    """Return Unix seconds by the database's clock, which all servers share; SQLite's is this machine's."""
    if session.get_bind().dialect.name == "sqlite":
        return time.time()
    return float(session.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite registry; None for any other URL, also for an invalid one."""
    try:
        parsed = make_url(url)
    except exc.ArgumentError:
        return None
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return None
    return Path(parsed.database).expanduser().absolute()


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    # SQLAlchemy's own way to have BEGIN say which kind: the driver must not begin by itself.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("foreign_keys=ON", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _prepare_postgresql(connection: Any, _record: Any) -> None:
    """Limit how long a stalled or vanished server holds its locks to the time that others wait.

    Each counted write holds a lock that all others need.
    """
    with connection.cursor() as cursor:
        for limit in _LIMITS:
            cursor.execute(f"SET {limit} = {int(_WAIT_SECONDS * 1000)}")
    connection.commit()


def _begin_sqlite(connection: Connection) -> None:
    """Begin a transaction; a writer locks at once, because one that had read first could not if another
    wrote."""
    reads = connection.get_execution_options().get(_READ, False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _may_have_committed(cause: BaseException | None) -> bool:
    """Return True if a COMMIT that failed so may have worked: PostgreSQL does not say why it has not."""
    state: str | None = getattr(cause, "sqlstate", None)
    return state is None or state[:3] == _SHUTDOWN or state[:2] == _CONNECTION_LOST


def _kind(error: Exception, cause: BaseException, file: Path | None) -> type[RegistryError]:
    if file is not None and (code := getattr(cause, "sqlite_errorcode", None)) is not None:
        return _sqlite_kind(code & 0xFF, file)
    if getattr(cause, "sqlstate", None) == _DISK_FULL:
        return RegistryFullError
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return RegistryFullError
    if getattr(cause, "sqlstate", None) == _STOOD_STILL:
        return RegistryBusyError
    if isinstance(error, exc.OperationalError | exc.InterfaceError | exc.TimeoutError):
        return RegistryBusyError
    return RegistryError


def _sqlite_kind(code: int, file: Path) -> type[RegistryError]:
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return RegistryBusyError
    # SQLite calls it an I/O error when it cannot write the files next to the database.
    full = code == sqlite3.SQLITE_IOERR and shutil.disk_usage(file.parent).free < _LITTLE_SPACE
    return RegistryFullError if full or code == sqlite3.SQLITE_FULL else RegistryError


_BLOBS = (
    VersionRow.config_sha256,
    VersionRow.weights_sha256,
    VersionRow.prepared_sha256,
    ProofRow.prepared_sha256,
    TrainingFileRow.sha256,
    JobFileRow.sha256,
)


def referenced_blobs(session: Session, among: Collection[str] | None = None) -> set[str]:
    """Return the blobs that versions, files and resumable jobs need: all of them, or those of `among`."""
    parts = [select(column) for column in _BLOBS]
    if among is not None:
        parts = [part.where(column.in_(among)) for part, column in zip(parts, _BLOBS, strict=True)]
    return {digest for digest in session.scalars(union_all(*parts)) if digest is not None}


# What columns can hold


def plain(value: str) -> str:
    """Return text that every database accepts: a NUL or half a surrogate pair becomes U+FFFD."""
    return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def plain_json(value: Any) -> Any:
    """Return JSON that every database accepts: plain texts, and null for numbers that are not finite."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if isinstance(value, Mapping):
        return {plain(str(key)): plain_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(part) for part in value]
    return value
