"""Demonstration for `make demo`: one base and the adapters on it, answering at the same time.

Starts `onebase serve` with the default base and every adapter in `examples/adapters`, asks all of them
the same thing, streams the answers side by side, and leaves the server running until Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import sqlalchemy
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from onebase import APIConnectionError, APITimeoutError, AsyncClient, OneBaseError
from onebase_adapters.registry import RegistryBusyError, RegistryError, RegistryFullError
from onebase_adapters.registry.database import Database
from onebase_adapters.registry.tables import Table
from onebase_engine.user_cache import default_cache

DATA = default_cache() / "demo"
ADAPTERS = Path(__file__).resolve().parent / "adapters"
PROMPT = "Hi, I'm Anna Keller. I need three blue mugs in Lisbon. What should I do?"
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0


class DemoError(Exception):
    """Message for the person at the terminal, instead of a traceback."""


@dataclass
class DemoAnswer:
    """One column: who answers, what has come so far, and how fast."""

    title: str
    adapter: str | None
    text: str = ""
    speed: str = "waiting"
    complete: bool = False

    def panel(self, width: int) -> Panel:
        return Panel(Text(self.text.strip()), title=self.title, subtitle=self.speed, width=width, height=14)


@dataclass(frozen=True)
class DemoServer:
    """The server that this script started."""

    url: str
    process: Process
    log: Path

    def log_lines(self) -> list[str]:
        return self.log.read_text(errors="replace").strip().splitlines()

    def stage(self) -> str:
        """Return the server's present stage while it starts: the last line of its log that ends in dots."""
        return next((line for line in reversed(self.log_lines()) if line.endswith("...")), "")

    def tail(self) -> str:
        return "\n".join(self.log_lines()[-20:])


def main() -> int:
    """Run the demo; returns the exit status."""
    options = parse_options()
    console = Console(highlight=False)
    status = 0
    try:
        asyncio.run(demo(options, console))
    except* (DemoError, OneBaseError) as group:
        console.print(Text(f"\nThe demo stopped: {group.exceptions[0]}", style="red"))
        status = 1
    return status


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One base and its adapters, answering at the same time.")
    parser.add_argument("--prompt", default=PROMPT, help="what to ask them")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer, in tokens (default 64)")
    parser.add_argument("--port", type=int, default=8000, help="port to serve on (default 8000)")
    parser.add_argument("--once", action="store_true", help="stop the server and exit after the answers")
    options = parser.parse_args()
    options.once = options.once or os.environ.get("ONEBASE_DEMO_ONCE") == "1"
    return options


async def demo(options: argparse.Namespace, console: Console) -> None:
    """Run the whole show, until the answers are there (`--once`) or somebody presses Ctrl-C."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    adapters = find_adapters()
    set_aside_if_unusable(DATA, console)
    async with running_server(adapters, choose_port(options.port, console), console) as server:
        finished = await until_stopped(show(server, adapters, options, console), stop, server)
        if finished and not options.once:
            print_next_steps(server, adapters[-1].name, console)
            await until_stopped(forever(), stop, server)


def find_adapters() -> list[Path]:
    folders = sorted(path.parent for path in ADAPTERS.glob("*/adapter_config.json"))
    if not folders:
        raise DemoError(f"no adapter found in {ADAPTERS}; is this clone complete?")
    return folders


def set_aside_if_unusable(data: Path, console: Console) -> None:
    """Rename the data of earlier runs if another version of OneBase wrote it: this run makes it anew.

    Raises:
        DemoError: a server of that version is using it.
    """
    registry = data / "registry.db"
    if not registry.exists() or is_usable(registry):
        return
    try:
        with closing(sqlite3.connect(registry, timeout=1)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")  # which nobody else may use meanwhile
    except sqlite3.OperationalError:
        raise DemoError(f"another version of OneBase is using {data}. Stop that one first.") from None
    except sqlite3.DatabaseError:
        pass  # it is no database at all
    aside = next(path for path in (data.with_name(f"{data.name}-{n}") for n in count(1)) if not path.exists())
    data.rename(aside)
    console.print(
        f"{data} was written by another version of OneBase. The demo keeps nothing there that it does not "
        f"make anew, so it begins an empty one; what was there is now in {aside}, to be deleted at will.",
        soft_wrap=True,
    )


def is_usable(registry: Path) -> bool:
    """Return True if this version can read a registry, which it brings to its own tables."""
    database = Database(f"sqlite:///{registry}")
    try:
        database.migrate()
        with database.errors("reading its tables"):
            found = sqlalchemy.inspect(database.engine)
            names = found.get_table_names()
            has = {name: {column["name"] for column in found.get_columns(name)} for name in names}
    except (RegistryBusyError, RegistryFullError):
        return True  # the server says what is wrong
    except RegistryError:
        return False
    finally:
        database.close()
    tables = Table.metadata.tables.values()
    return all({column.name for column in table.columns} <= has.get(table.name, set()) for table in tables)


def choose_port(wanted: int, console: Console) -> int:
    """`wanted` when it is free, else one that the system picks."""
    for port in (wanted, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            chosen = int(probe.getsockname()[1])
            if wanted and chosen != wanted:
                console.print(f"Port {wanted} is taken by another program: using {chosen} instead.")
            return chosen
    raise DemoError("no port on 127.0.0.1 could be opened")


@asynccontextmanager
async def running_server(adapters: list[Path], port: int, console: Console) -> AsyncIterator[DemoServer]:
    """`onebase serve`, stopped and waited for however the block ends."""
    command = [str(Path(sys.executable).with_name("onebase")), "serve", "--port", str(port)]
    # Its standard input is a pipe from here, which ends with this script, however that ends.
    command += ["--stop-with-stdin"]
    # A registry of its own, kept between runs: the adapters are proven once.
    command += ["--data-dir", str(DATA)]
    for folder in adapters:
        command += ["--adapter", f"{folder.name}={folder}"]
    environment = {**os.environ, "NO_COLOR": "1"}
    with tempfile.TemporaryDirectory(prefix="onebase-demo-") as scratch:
        log = Path(scratch) / "server.log"
        with log.open("wb") as out:
            # A session of its own: Ctrl-C comes to this script alone, which then stops the server.
            process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=out, stderr=out, env=environment, start_new_session=True
            )
        try:
            yield DemoServer(f"http://127.0.0.1:{port}", process, log)
        finally:
            await stop_server(process, console)


async def stop_server(process: Process, console: Console) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        # Nobody may be there to read it: Ctrl-C ends the `tee` of a pipeline too.
        console.print("\nStopping the server ...")
    finally:
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
    console.print("Stopped.")


async def until_stopped(work: Coroutine[None, None, None], stop: asyncio.Event, server: DemoServer) -> bool:
    """Do the work; False when Ctrl-C came first.

    Raises:
        DemoError: the server ended by itself.
    """
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    ending = asyncio.create_task(server.process.wait())
    tasks = (working, stopping, ending)
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finished, stopped = working.done(), stopping.done()
    for task in tasks:
        task.cancel()
    outcome, *_ = await asyncio.gather(*tasks, return_exceptions=True)
    if server.process.returncode is not None and not stopped:
        raise DemoError(f"the server ended with status {server.process.returncode}:\n{server.tail()}")
    if finished and isinstance(outcome, BaseException):
        raise outcome
    return finished and not stopped


async def forever() -> None:
    await asyncio.Event().wait()


async def show(
    server: DemoServer, adapters: list[Path], options: argparse.Namespace, console: Console
) -> None:
    """Wait until the server is ready, then let all answer at once."""
    answers = [DemoAnswer("base", None), *(DemoAnswer(f"adapter {f.name}", f.name) for f in adapters)]
    async with AsyncClient(server.url) as client:
        await wait_until_ready(client, server, console)
        console.print(f"\n{len(answers)} requests at the same time, each with the prompt:\n")
        console.print(Text(f"    {options.prompt}\n", style="bold"), soft_wrap=True)
        async with asyncio.TaskGroup() as group:
            for answer in answers:
                group.create_task(ask(client, answer, options))
            if console.is_terminal:
                await show_live(answers, console)
    if not console.is_terminal:
        for answer in answers:
            plain = f"--- {answer.title} ({answer.speed})\n{answer.text.strip()}\n"
            console.print(Text(plain), soft_wrap=True)


async def wait_until_ready(client: AsyncClient, server: DemoServer, console: Console) -> None:
    """Poll the server, telling what it does meanwhile.

    Raises:
        DemoError: it is not ready within START_TIMEOUT_S.
    """
    started, shown = time.monotonic(), ""
    console.print("Starting the server ...")
    with console.status("") as status:
        while not await is_ready(client):
            if time.monotonic() - started > START_TIMEOUT_S:
                raise DemoError(f"the server is not ready after {START_TIMEOUT_S:.0f} s:\n{server.tail()}")
            stage = server.stage()
            status.update(Text(stage))
            if stage != shown and not console.is_terminal:
                console.print(Text(f"  {stage}"))
            shown = stage
            await asyncio.sleep(0.2)
    console.print(f"Ready after {time.monotonic() - started:.0f} s: {server.url}")


async def is_ready(client: AsyncClient) -> bool:
    try:
        return (await client.with_options(max_retries=0, timeout=2).ready()).ok
    except (APIConnectionError, APITimeoutError):  # not listening yet, or not answering
        return False


async def ask(client: AsyncClient, answer: DemoAnswer, options: argparse.Namespace) -> None:
    """Stream one answer into its column."""
    started, pieces = time.monotonic(), 0
    async with client.stream(
        messages=options.prompt, adapter=answer.adapter, temperature=0, max_tokens=options.tokens
    ) as stream:
        async for piece in stream:
            answer.text += piece.text
            pieces += 1
            answer.speed = f"about {pieces / (time.monotonic() - started):.1f} tokens/s"
        result = stream.result
    rate = result.tokens_per_second
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    answer.speed = f"{result.usage.completion_tokens} tokens{speed}"
    answer.complete = True


async def show_live(answers: list[DemoAnswer], console: Console) -> None:
    """Redraw the columns until all answers are complete."""
    width = max(24, console.width // len(answers) - 1)

    def columns() -> Columns:
        return Columns([answer.panel(width) for answer in answers], padding=(0, 1))

    with Live(columns(), console=console, auto_refresh=False) as live:
        while not all(answer.complete for answer in answers):
            await asyncio.sleep(0.1)
            live.update(columns(), refresh=True)


def print_next_steps(server: DemoServer, adapter: str, console: Console) -> None:
    """Print what to try next, ready to be pasted."""
    text = f"""
The server is running: {server.url} (its log: {server.log})

In a browser, side by side: {server.url}/console

From another terminal, in this folder:

  curl {server.url}/generate -H 'Content-Type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "How are you?"}}], "adapter": "{adapter}"}}'

  .venv/bin/onebase chat --url {server.url}

API keys, if you want the server to ask for them:

  .venv/bin/onebase keys create --scope admin --data-dir {DATA}

From Python (.venv/bin/python):

  from onebase import Client
  client = Client("{server.url}")
  print(client.chat("How are you?", adapter="{adapter}").text)

Ctrl-C stops the server.
"""
    console.print(Text(text), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
