#!/usr/bin/env python3
"""Loads a server with everything at once for some minutes, then proves that nothing leaked.

32 clients send random prompts, adapters, weighted sums, lengths, sampling settings and n, streamed or
not; some leave in the middle, some set deadlines, some send nonsense. Among them run canaries:
requests whose answer was recorded before the load, and must come out the same under it.

After a warm-up and again at the end, the soak waits until the server is idle and compares: KV blocks
all free, no rows, no restart, memory and file descriptors of the server's processes where they were.
Exit status: 0 when all of that holds and every answer kept the contract, else 1.

  python benchmarks/soak.py                                     # starts `onebase serve` itself, 3 minutes
  python benchmarks/soak.py --url http://127.0.0.1:8000 --pid 4711 --minutes 30
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from bench import soak
from bench.command import Options
from bench.lora import make_adapters
from bench.processes import StartError, end_on_signals, onebase_server, tail
from bench.report import table
from bench.stream import HttpError, fetch_json

ABORT_AFTER_FAILURES = 20
CANARY_SHARE = 0.08
HANG_SECONDS = 300.0
"""Seconds after which a request counts as hung."""
SETTLE_SECONDS = 60.0
"""Seconds that the server gets to become idle."""
ADAPTERS, SLOTS, KV_MEMORY = 8, 4, "24MiB"
"""A server of our own has fewer slots than adapters, so that some wait, and a cache that is too small."""


@dataclass
class Soak:
    """One soak of a server that is ready."""

    url: str
    pid: int | None
    options: argparse.Namespace
    console: Console
    planner: soak.Planner
    tally: soak.Tally

    async def run(self) -> list[str]:
        """Run all phases; return what is wrong, in sentences."""
        options, seconds = self.options, self.options.minutes * 60
        canaries = await self._record(self.planner.canaries())
        self.console.print(f"{len(canaries)} canaries recorded; {options.clients} clients start")
        warm_up = min(seconds / 3, 120.0)
        await self._load("warm-up", warm_up, canaries)
        before = await self._idle()
        await self._load("soak", seconds - warm_up, canaries)
        after = await self._idle()
        for plan in canaries:
            await self._one(plan)
        rows = [[outcome, str(count)] for outcome, count in self.tally.outcomes.most_common()]
        self.console.print(table(["outcome", "requests"], rows, f"{self.tally.tokens} tokens read"))
        self.console.print(soak.leak_table(before, after))
        leaks = soak.compare(before, after, options.memory_bound * 2**20)
        if not self.tally.outcomes["finished"]:
            leaks.append("no request finished")
        return [*self.tally.failures, *leaks]

    async def _record(self, plans: list[soak.Plan]) -> list[soak.Plan]:
        """Return the same plans, with the texts that the idle server gives for them."""
        recorded = []
        for plan in plans:
            answer = await soak.run_plan(self.url, plan, self.tally, HANG_SECONDS)
            if answer is None:
                raise soak.ContractError(f"the idle server refused {plan.body}")
            recorded.append(replace(plan, text=soak.texts_of(answer)) if self.options.canaries else plan)
        return recorded

    async def _load(self, phase: str, seconds: float, canaries: list[soak.Plan]) -> None:
        """Run all clients until the time is over; requests that run then are awaited."""
        end = time.monotonic() + seconds
        reporter = asyncio.create_task(self._report(phase, end))
        try:
            await asyncio.gather(*(self._client(end, canaries) for _ in range(self.options.clients)))
        finally:
            reporter.cancel()

    async def _client(self, end: float, canaries: list[soak.Plan]) -> None:
        while time.monotonic() < end and len(self.tally.failures) < ABORT_AFTER_FAILURES:
            is_canary = self.planner.chance(CANARY_SHARE)
            await self._one(self.planner.choose(canaries) if is_canary else self.planner.plan())

    async def _one(self, plan: soak.Plan) -> None:
        try:
            answer = await soak.run_plan(self.url, plan, self.tally, HANG_SECONDS)
        except soak.ContractError as error:
            self.tally.failures.append(str(error))
            self.console.print(f"[red]failure {len(self.tally.failures)}:[/] {escape(str(error))}")
        else:
            self.tally.outcomes["canaries right"] += plan.text is not None and answer is not None

    async def _report(self, phase: str, end: float) -> None:
        """Print a line now and then, for the person who waits."""
        while True:
            await asyncio.sleep(15)
            try:
                now = await soak.snapshot(self.url, self.pid)
            except (OSError, EOFError, HttpError) as error:
                self.console.print(f"{phase}: /status does not answer: {error!r}")
                continue
            left = max(0.0, end - time.monotonic())
            self.console.print(
                f"{phase}: {left:.0f} s left, {self.tally.outcomes.total()} requests, "
                f"{self.tally.tokens} tokens, {len(self.tally.failures)} failures; {now.line()}"
            )

    async def _idle(self) -> soak.Snapshot:
        """Return the state once nothing runs and all is free, or what it is after SETTLE_SECONDS."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            state = await soak.snapshot(self.url, self.pid)
            if state.idle or time.monotonic() > deadline:
                await asyncio.sleep(3)
                return await soak.snapshot(self.url, self.pid)
            await asyncio.sleep(0.5)


@asynccontextmanager
async def _server(options: argparse.Namespace, folder: Path) -> AsyncIterator[tuple[str, int | None]]:
    """Yield the URL and process of the server to soak: the one given, or one of our own."""
    if options.url:
        yield options.url.rstrip("/"), options.pid
        return
    from onebase_engine.base.default_base import resolve_base

    base, log = resolve_base(options.base).folder, folder / "server.log"
    serve = ["--base", base, "--max-slots", SLOTS, "--kv-memory", KV_MEMORY, "--data-dir", folder / "data"]
    for name, path in make_adapters(base, folder / "adapters", ADAPTERS).items():
        serve += ["--adapter", f"{name}={path}"]
    async with onebase_server(log, *serve, *shlex.split(options.onebase_args)) as (url, process):
        try:
            yield url, process.pid
        finally:
            if process.poll() is not None:
                sys.stderr.write(f"the server ended with {process.returncode}:\n{tail(log)}\n")


async def _soak(options: argparse.Namespace, console: Console) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="onebase-soak-") as folder:
        async with _server(options, Path(folder)) as (url, pid):
            adapters = [item["id"] for item in (await fetch_json(f"{url}/v1/adapters"))["data"]]
            if pid is None:
                console.print("[yellow]Without --pid, memory and file descriptors are not watched.[/]")
            planner = soak.Planner(adapters, options.seed)
            return await Soak(url, pid, options, console, planner, soak.Tally()).run()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    options = Options(__doc__)
    add = options.add
    options.number("minutes", 3, "length, with the warm-up")
    options.count("clients", 32, "requests at the same time")
    options.seed("the random requests")
    add("--url", default="", help="a running server on this machine (default: start one)")
    add("--pid", type=int, help="its process, to watch memory and file descriptors")
    add("--base", default="smollm2-135m-instruct", help="for a server of our own: as in `onebase serve`")
    options.common("onebase-args")
    add(
        "--memory-bound",
        type=int,
        default=160,
        help="MiB that a process may grow by: oneDNN keeps up to 1024 kernels (default: 160)",
    )
    add(
        "--canaries",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="require recorded answers to stay the same; they may not on CUDA without --deterministic",
    )
    return options.parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Return the exit status: 0 when nothing leaked and nothing went wrong, else 1."""
    options = _parse(argv)
    end_on_signals()
    console = Console()
    try:
        problems = asyncio.run(_soak(options, console))
    except (StartError, soak.ContractError, HttpError, OSError, EOFError) as error:
        problems = [f"{type(error).__name__}: {error}"]
    for problem in problems:
        console.print(f"[bold red]FAILED[/] {escape(problem)}")
    if not problems:
        console.print("[bold green]No leak, no wrong answer.[/]")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
