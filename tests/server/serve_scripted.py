"""`onebase serve` with a scripted engine, a scripted verifier and scripted trainers.

`python serve_scripted.py ENGINE[,WORKSHOP[,real]] [options of onebase serve]`: how each of them behaves; with
`real` trainers are real ones, which check files without a base. A trainer that died is followed
at once by the next.

`--forks FD` starts such servers, or `onebase route`, as a socket asks for them, each by a fork: see
ForkedServers. What is scripted begins as a fork there too.
"""

import asyncio
import functools
import gc
import importlib
import inspect
import json
import os
import secrets
import socket
import sqlite3
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event

import onebase_server
from onebase_adapters.registry.database import Database
from onebase_edge.background import Backoff
from onebase_engine.base.default_base import fetch_default_base
from onebase_server.app.cli import serve
from onebase_server.app.wiring import Commands
from onebase_server.inference import tokenization
from onebase_server.inference.tokenization import leave_torch_out
from onebase_server.jobs.state import Death
from onebase_server.processes.supervisor import RestartPolicy
from onebase_server.processes.trainer_client import TRAINER_COMMAND
from onebase_server.tenancy import peers

HERE = Path(__file__).parent


def command(script: str, *behaviour: str) -> tuple[str, ...]:
    return sys.executable, str(HERE / script), *behaviour


def main(argv: list[str]) -> int:
    engine, verifier, trainer = (*argv[0].split(","), "", "")[:3]
    pace = os.environ.get("ONEBASE_TEST_PACE")  # an engine would not inherit it
    commands = Commands(
        command("scripted_engine.py", engine, *(("--pace", pace) if pace else ())),
        command("scripted_verifier.py", verifier or "proves"),
        TRAINER_COMMAND if trainer == "real" else command("scripted_trainer.py"),
        RestartPolicy(backoff=Backoff(0.02, 30.0)) if engine == "die-ready" else RestartPolicy(),
    )
    if clock := os.environ.get("ONEBASE_TEST_CLOCK"):
        shift_clock(Path(clock))
    if disk := os.environ.get("ONEBASE_TEST_DISK"):
        slow_disk(Path(disk))
    onebase_server.__version__ = os.environ.get("ONEBASE_TEST_RELEASE", onebase_server.__version__)
    peers.LEASE_SECONDS = float(os.environ.get("ONEBASE_TEST_LEASE", peers.LEASE_SECONDS))
    Death.pause = property(lambda death: 0.0)  # type: ignore[assignment, method-assign]
    return serve(argv[1:], commands)


def shift_clock(offset: Path) -> None:
    """Have `time.time` run ahead by the seconds in a file, which a test changes."""
    now, known = time.time, [0.0, 0.0]

    def shifted() -> float:
        at = now()
        if at - known[0] > 0.05:  # how often the file is read
            known[:] = at, float(offset.read_text())
        return at + known[1]

    time.time = shifted


def slow_disk(seconds: Path) -> None:
    """Have each step that a disk is asked for, and each commit of SQLite, take the seconds in a file longer,
    which a test changes."""

    def wait(*_: Any) -> None:
        if delay := float(seconds.read_text()):
            time.sleep(delay)

    def slowed(step: Any) -> Any:
        @functools.wraps(step)
        def slow(*given: Any, **how: Any) -> Any:
            wait()
            return step(*given, **how)

        return slow

    for name in ("open", "fsync", "replace", "rename", "unlink"):
        setattr(os, name, slowed(getattr(os, name)))

    def commit(connection: Connection) -> None:
        if connection.dialect.name == "sqlite":
            wait()

    event.listen(Engine, "commit", commit)


def serve_forks(requests: socket.socket) -> int:
    """Be the parent of servers that need not import anything: what ForkedServers asks for, one at a time."""
    leave_torch_out()
    from onebase_route import proxy  # noqa: F401  (all that a route imports)
    from onebase_route.cli import route
    from onebase_server.app import startup  # noqa: F401  (all that a server imports)

    for script in ("engine", "trainer", "verifier"):
        importlib.import_module(f"scripted_{script}")  # all that these import
    # What a server does first imports more. Those of one base share its tokenizer.
    tokenization._load = functools.cache(tokenization._load)
    tokenization.BaseTokenizer(str(fetch_default_base()))
    inspect.getsource(main)  # FastAPI reads sources, for which patterns are compiled once
    with tempfile.TemporaryDirectory() as folder:
        database = Database(f"sqlite:///{folder}/registry.db")
        database.migrate()
        database.close()
        registry = Path(folder, "registry.db").read_bytes()
    gc.freeze()
    while True:
        data, (*descriptors,), _, _ = socket.recv_fds(requests, 1 << 20, 1)
        if not data:
            return 0
        request = json.loads(data)
        if (pid := request.get("ended")) is not None:
            answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        elif (answer := os.fork()) == 0:
            requests.close()
            os.dup2(descriptors[0], sys.stderr.fileno())
            os.environ.clear()
            os.environ.update(request["environment"])
            if request["umask"] >= 0:
                os.umask(request["umask"])
            first, *rest = arguments = request["arguments"]
            if first == "route":
                sys.exit(route(rest))
            begin_with(registry, arguments)
            fork_what_is_scripted()
            sys.exit(main(arguments))
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(json.dumps(answer).encode())


def fork_what_is_scripted() -> None:
    """Have this server's engines, verifiers and trainers begin as forks, which takes a tenth of the time."""
    from tests.forks import Nursery, Started

    popen, plain = Nursery.fork().popen(), asyncio.create_subprocess_exec

    async def begin(*words: str, **how: Any) -> Any:
        if Path(words[1]).parent == HERE:
            return Started(popen(words, **how))
        return await plain(*words, **how)

    asyncio.create_subprocess_exec = begin


def begin_with(registry: bytes, arguments: list[str]) -> None:
    """Give a new data folder an empty registry: making its tables takes a tenth of a second."""
    if "--data-dir" not in arguments:
        return
    folder = Path(arguments[arguments.index("--data-dir") + 1])
    if "--registry" in arguments or not folder.is_dir() or (own := folder / "registry.db").exists():
        return
    made = folder / f"registry-{secrets.token_hex(8)}.new"
    made.write_bytes(registry)
    with closing(sqlite3.connect(made)) as connection, connection:
        connection.execute("UPDATE identity SET value = ?", (made.stem,))
    with suppress(FileExistsError):  # of another server that begins on it just now
        os.link(made, own)
    made.unlink()


if __name__ == "__main__":
    if sys.argv[1] == "--forks":
        sys.exit(serve_forks(socket.socket(fileno=int(sys.argv[2]))))
    sys.exit(main(sys.argv[1:]))
