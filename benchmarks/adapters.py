#!/usr/bin/env python3
"""Measures an adapter's life on a running server: upload to active, activation to first token, switches
between resident adapters, cold starts from disk, and many adapters at random.

Each target is started alone on the machine. Peers are asked what they can do: PEFT switches by `set_adapter`,
vLLM serves all adapters from its own host cache.

  python benchmarks/adapters.py                                        # against transformers + PEFT
  python benchmarks/adapters.py --vllm-python /tmp/vllm/bin/python     # and against vLLM
  python benchmarks/adapters.py --adapters 20 --requests 60            # a quick look
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import machine, targets
from bench.command import Options, base_of
from bench.lora import make_adapters
from bench.processes import end_on_signals
from bench.report import markdown, percentile, table, write
from bench.stream import Sample
from bench.targets import FAILURES, Session, Setup
from bench.workload import Prompts, Request
from onebase import Client

UPLOADS = 8
"""Number of uploads at once."""


@dataclass
class Bench:
    """One invocation: what is asked, and the figures that came of it, by target and name, in milliseconds."""

    options: argparse.Namespace
    folders: dict[str, Path]
    prompts: Prompts
    console: Console
    logs: Path
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    async def run(self) -> None:
        measures = {"onebase": self._onebase, "peft": self._peft, "vllm": self._vllm}
        if self.options.vllm_python is None:
            del measures["vllm"]
        for name, measure in measures.items():
            self.console.print(f"[bold]{name}[/]")
            try:
                await measure(Asked(name, self))
            except FAILURES as error:
                self.failed.append(name)
                self.console.print(f"[red]{name} failed: {type(error).__name__}:[/]", error)

    async def _onebase(self, asked: Asked) -> None:
        options, names = self.options, list(self.folders)
        extra = ["--data-dir", str(self.logs / "data"), *shlex.split(options.onebase_args)]
        setup, log = self._setup({}), self.logs / "onebase.log"
        resident = names[: options.slots]
        async with targets.onebase(setup, log, extra) as session:
            await machine.settle()
            with Client(session.url, timeout=600) as client:
                await asked.uploads(client)
                await asked.activation(client, session, [self.folders[name] for name in resident[-2:]])
            await asked.hot_switch(session, resident)
        # A new process on the same store and registry: nothing is in memory yet.
        async with targets.onebase(setup, log, extra) as session:
            await machine.settle()
            await asked.cold_and_warm(session, names[-options.cold :])
            await asked.random_load("random, from disk", session, names, options.seed + 1)
            # As vLLM, which reads all of them when it starts.
            with self.progress("to host memory", len(names)) as step:
                for name in names:
                    await asked.one(session, name, 1, "touch")
                    step()
            await asked.random_load("random", session, names, options.seed)
            await asked.random_load("resident", session, resident, options.seed)

    async def _peft(self, asked: Asked) -> None:
        some = dict(list(self.folders.items())[: self.options.slots])
        async with targets.peft(self._setup(some), self.logs / "peft.log") as session:
            await asked.hot_switch(session, list(some))

    async def _vllm(self, asked: Asked) -> None:
        options = self.options
        extra = ["--max-loras", str(options.slots), "--max-cpu-loras", str(len(self.folders))]
        extra += shlex.split(options.vllm_args)
        setup, log = self._setup(self.folders), self.logs / "vllm.log"
        async with targets.vllm(setup, log, options.vllm_python, extra) as session:
            await machine.settle()
            await asked.hot_switch(session, list(self.folders)[: options.slots])
            await asked.random_load("random", session, list(self.folders), options.seed)

    def _setup(self, adapters: dict[str, Path]) -> Setup:
        return Setup(self.options.base, adapters, self.options.rank, self.options.threads)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a bar; yield what moves it on by one."""
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total)
            yield lambda: progress.advance(task)

    def publish(self, described: dict[str, Any]) -> None:
        """Print the table; write adapters.json and adapters.md to the output folder."""
        names = dict.fromkeys(name for figures in self.figures.values() for name in figures)
        rows = [[name, *(_shown(one.get(name)) for one in self.figures.values())] for name in names]
        title = f"{self.options.base.name}, {len(self.folders)} adapters"
        self.console.print(table(["milliseconds unless it says otherwise", *self.figures], rows, title))
        content = {"figures": self.figures, "failed": self.failed}
        write("adapters", self.options, described, content, markdown(["", *self.figures], rows), self.console)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


class Asked:
    """Measurements of one target; each function asks it while it runs, and notes figures."""

    def __init__(self, target: str, bench: Bench) -> None:
        self._bench, self._prompts, self._options = bench, bench.prompts, bench.options
        self._figures = bench.figures.setdefault(target, {})

    def _note(self, name: str, seconds: Sequence[float]) -> None:
        self._figures[f"{name} p50"] = median(seconds) * 1e3
        self._figures[f"{name} p99"] = percentile(seconds, 0.99) * 1e3

    async def one(self, session: Session, name: str | None, tokens: int, *key: object) -> Sample:
        (sample,) = await session.run([Request(self._prompts.make(*key, name), name, tokens)])
        return sample

    async def uploads(self, client: Client) -> None:
        """Measure from sending an adapter's files to the answer that it is active: half of them one after the
        other for the time of one, the rest at once for how many a minute holds."""
        waiting = iter(self._bench.folders.items())
        total = len(self._bench.folders)
        first = -(-total // 2)
        times: list[float] = []

        async def upload(step: Callable[[], None], most: int) -> None:
            for name, folder in waiting:
                started = time.perf_counter()
                await asyncio.to_thread(client.adapters.upload, folder, name=name, activate=True, wait=True)
                times.append(time.perf_counter() - started)
                step()
                if len(times) == most:
                    return

        with self._bench.progress("upload, prove, activate", total) as step:
            await upload(step, first)
            self._note("upload to active", times)
            if total > first:
                started = time.perf_counter()
                await asyncio.gather(*(upload(step, total) for _ in range(UPLOADS)))
                minutes = (time.perf_counter() - started) / 60
                self._figures["uploads at once: a minute"] = (total - first) / minutes

    async def activation(self, client: Client, session: Session, folders: Sequence[Path]) -> None:
        """Measure from asking for a proven version's activation to the first token of a request."""
        upload, activate = client.adapters.upload, client.adapters.activate
        versions = [
            await asyncio.to_thread(upload, folder, name="live", activate=False, wait=True)
            for folder in folders
        ]
        times = []
        for index, version in enumerate(versions * 2):
            started = time.perf_counter()
            await asyncio.to_thread(activate, "live", version.version)
            sample = await self.one(session, "live", 4, "activation", index)
            times.append(sample.started - started + sample.ttft)
        self._note("activate to first token", times)

    async def hot_switch(self, session: Session, adapters: Sequence[str]) -> None:
        """Measure TTFT of requests one after the other, two for each adapter in turn.

        The second of a pair meets the same adapter as the one before it, the first another. So a change of
        the machine's speed meets both.
        """
        for name in adapters:
            await self.one(session, name, 4, "switch-warm-up")
        same, other = list[float](), list[float]()
        for number in range(self._options.rounds):
            for name in adapters:
                other.append((await self.one(session, name, 4, "other", number)).ttft)
                same.append((await self.one(session, name, 4, "same", number)).ttft)
        self._note("TTFT, same adapter", same)
        self._note("TTFT, another adapter", other)
        costs = [one - again for one, again in zip(other, same, strict=True)]
        self._figures["cost of a switch"] = median(costs) * 1e3

    async def cold_and_warm(self, session: Session, adapters: Sequence[str]) -> None:
        """Measure TTFT of each adapter's first request after a start, and of its second: disk against host
        memory."""
        await self.one(session, None, 4, "before")
        cold, warm = list[float](), list[float]()
        for name in adapters:
            cold.append((await self.one(session, name, 4, "cold")).ttft)
            warm.append((await self.one(session, name, 4, "warm")).ttft)
        self._note("TTFT cold, from disk", cold)
        self._note("TTFT warm", warm)

    async def random_load(self, title: str, session: Session, adapters: Sequence[str], seed: int) -> None:
        """Send `--streams` at once, each asking for a random adapter as soon as its last answer has ended.

        Raises ValueError if an answer has another length than was asked for.
        """
        options, generator = self._options, random.Random(seed)
        names = [generator.choice(list(adapters)) for _ in range(options.requests)]
        waiting = iter(enumerate(names))
        samples: list[Sample] = []

        async def stream() -> None:
            for index, name in waiting:
                key = "random", seed, index, len(adapters)
                samples.append(await self.one(session, name, options.tokens, *key))
                step()

        started = time.perf_counter()
        with self._bench.progress(f"{len(adapters)} adapters at random", options.requests) as step:
            await asyncio.gather(*(stream() for _ in range(options.streams)))
        seconds = time.perf_counter() - started
        if wrong := {sample.tokens for sample in samples} - {options.tokens}:
            raise ValueError(f"asked for {options.tokens} tokens a request, got {sorted(wrong)}")
        self._note(f"{title}: TTFT", [sample.ttft for sample in samples])
        self._figures[f"{title}: tokens/s"] = sum(sample.tokens for sample in samples) / seconds
        self._figures[f"{title}: adapters asked for"] = len(set(names))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    options = Options(__doc__)
    options.common("base", "vllm-python", "vllm-args", "onebase-args", "busy")
    options.count("adapters", 200, "adapters that are registered")
    options.count("slots", 8, "adapters of the load that has all in slots, and vLLM's most in a batch")
    options.count("rank", 16, "rank of the adapters")
    options.count("requests", 200, "requests of the random load")
    options.count("streams", 16, "of them at the same time")
    options.count("tokens", 32, "tokens of each")
    options.count("prompt-tokens", 85, "length of each prompt")
    options.count("rounds", 6, "turns of the hot switch over all slots")
    options.count("cold", 16, "adapters that are started cold")
    options.threads()
    options.seed("adapters, prompts and choices")
    options.output("adapters.json and adapters.md")
    given = options.parser.parse_args(argv)
    if given.slots > given.adapters:
        options.parser.error("--slots must not be more than --adapters")
    return given


def main(argv: Sequence[str]) -> int:
    """Return the exit status: 0 when every target was measured, else 1."""
    options = _parse(argv)
    end_on_signals()
    console = Console()
    described = machine.describe(options.vllm_python)
    machine.demand_quiet(options.busy, console)
    base = base_of(options)
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as folder:
        with console.status("making random adapters"):
            made = Path(folder) / "adapters"
            folders = make_adapters(base, made, options.adapters, options.rank, seed=options.seed)
        prompts = Prompts(base, options.prompt_tokens, options.seed)
        bench = Bench(options, folders, prompts, console, Path(folder))
        try:
            asyncio.run(bench.run())
        finally:
            if any(bench.figures.values()):
                bench.publish(described)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
