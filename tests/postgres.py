"""A PostgreSQL server of the tests' own, from Debian's package, reached by a socket in a temporary folder."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import pytest


class PostgresServer:
    """`database()` makes a new, empty one and gives its SQLAlchemy URL."""

    def __init__(self, folder: Path, run: Callable[[list[str]], None]) -> None:
        self.folder = folder
        self._run = run
        self._names = (f"test{number}" for number in count())

    def start(self) -> None:
        """Returns once it answers."""
        options = f"-k {self.folder} -c fsync=off -c listen_addresses='' -c max_connections=50"
        self._run([*self._control, "-l", str(self.folder / "log"), "-o", options, "start"])

    def stop(self) -> None:
        """At once, as a crash: its connections break off."""
        self._run([*self._control, "-m", "immediate", "stop"])

    @property
    def _control(self) -> list[str]:
        return ["pg_ctl", "-D", str(self.folder / "data"), "-w"]

    def url(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def database(self, on: Path | None = None) -> str:
        """`on`: the folder of another disk, to keep the database in."""
        return self.url(self.create(on))

    def create(self, on: Path | None = None, template: str = "template1") -> str:
        """A new database's name; it is a copy of the one that is named `template`."""
        import psycopg

        name = next(self._names)
        place = ""
        with psycopg.connect(
            host=str(self.folder), user="postgres", dbname="postgres", autocommit=True
        ) as connection:
            if on is not None:
                space = on / "space"
                space.mkdir()
                owner = self.folder.stat()
                os.chown(space, owner.st_uid, owner.st_gid)
                connection.execute(f"CREATE TABLESPACE space_{name} LOCATION '{space}'")
                place = f"TABLESPACE space_{name}"
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} {place}")
        return name


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """Started once; skips the test where the package is not installed."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    binaries = programs[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir=_quick_place()))
    try:
        user = _server_user(folder)
        data = folder / "data"
        initdb = ["initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
        _run(user, binaries, initdb)
        server = PostgresServer(folder, partial(_run, user, binaries))
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _quick_place() -> str:
    """In memory where there is room: a hundred databases are 30,000 files to make and to remove."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > 4 << 30 else "/tmp"


def _server_user(folder: Path) -> str | None:
    """Who runs the server: initdb refuses root."""
    if os.getuid() != 0:
        return None
    try:
        owner = pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("as root, PostgreSQL's server takes a user `postgres`, which there is not")
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    return owner.pw_name


def _run(user: str | None, binaries: Path, command: list[str]) -> None:
    # The server must not hold the test run's pipes open: its output goes to a file.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            [str(binaries / command[0]), *command[1:]],
            user=user,
            group=user,
            extra_groups=[] if user else None,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        output.seek(0)
        if done.returncode != 0:
            raise RuntimeError(f"{command[0]}: {output.read().decode(errors='replace')}")
