#!/usr/bin/env python3
"""Measures an adapter's life on a running server: upload to active, activation to first token, switches
between resident adapters, cold starts from disk, and many adapters at random over few slots.

Each target is started alone on the machine. Peers are asked what they can do: PEFT switches by `set_adapter`,
vLLM serves all adapters from its own host cache.

  python benchmarks/adapters.py                                        # against transformers + PEFT
  python benchmarks/adapters.py --vllm-python /tmp/vllm/bin/python     # and against vLLM
  python benchmarks/adapters.py --adapters 20 --requests 60            # a quick look
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench import life, machine
from bench.lora import make_adapters
from bench.processes import StartError, end_on_signals
from bench.stream import HttpError
from bench.targets import OneBaseTarget, PeftTarget, Session, Setup, VllmTarget
from bench.workload import Prompts
from onebase import Client

_UPLOADS = 8
"""Number of uploads at once."""
FAILURES = (StartError, HttpError, OSError, EOFError, TimeoutError, ValueError)


@dataclass
class Bench:
    """One invocation: what is asked, and the figures that came of it, by target and name, in milliseconds."""

    options: argparse.Namespace
    base: Path
    folders: dict[str, Path]
    prompts: Prompts
    console: Console
    logs: Path
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    async def run(self) -> None:
        targets = {"onebase": self._onebase, "peft": self._peft, "vllm": self._vllm}
        for name, measure in targets.items():
            if name == "vllm" and self.options.vllm_python is None:
                continue
            self.console.print(f"[bold]{name}[/]")
            try:
                await measure()
            except FAILURES as error:
                self.failed.append(name)
                self.console.print(f"[red]{name} failed: {type(error).__name__}:[/]", error)

    async def _onebase(self) -> None:
        data = self.logs / "data"
        extra = ["--data-dir", str(data), "--max-slots", str(self.options.slots)]
        extra += shlex.split(self.options.onebase_args)
        target = OneBaseTarget(self._setup({}), extra)
        resident = list(self.folders)[: self.options.slots]
        async with target.start(self.logs / "onebase.log") as session:
            await machine.settle()
            with Client(session.url, timeout=600) as client:
                with self._progress("upload, prove, activate", len(self.folders)) as step:
                    # One after the other for the time of one; the rest at once for how many a minute holds.
                    first, rest = self._halves()
                    self._note("onebase", "upload to active", await life.upload(client, first, step))
                    if rest:
                        uploads = await life.upload_at_once(client, rest, _UPLOADS, step)
                        self.figures["onebase"]["uploads at once: a minute"] = uploads
                spare = [self.folders[name] for name in resident[-2:]]
                times = await life.activation(client, session, "live", spare, self.prompts)
                self._note("onebase", "activate to first token", times)
            await self._hot_switch("onebase", session, resident)
        # A new process on the same store and registry: nothing is in memory yet.
        async with target.start(self.logs / "onebase.log") as session:
            await machine.settle()
            names = list(self.folders)[-min(len(self.folders), self.options.cold) :]
            cold, warm = await life.cold_and_warm(session, names, self.prompts)
            self._note("onebase", "TTFT cold, from disk", cold)
            self._note("onebase", "TTFT warm", warm)
            await self._random(
                "onebase", session, "random, from disk", list(self.folders), self.options.seed + 1
            )
            # As vLLM, which reads all of them when it starts.
            with self._progress("to host memory", len(self.folders)) as step:
                await life.touch(session, list(self.folders), self.prompts, step)
            await self._random("onebase", session, "random", list(self.folders))
            await self._random("onebase", session, "resident", resident)

    def _halves(self) -> tuple[dict[str, Path], dict[str, Path]]:
        items = list(self.folders.items())
        half = -(-len(items) // 2)
        return dict(items[:half]), dict(items[half:])

    async def _peft(self) -> None:
        some = dict(list(self.folders.items())[: self.options.slots])
        async with PeftTarget(self._setup(some)).start(self.logs / "peft.log") as session:
            await self._hot_switch("peft", session, list(some))

    async def _vllm(self) -> None:
        extra = ["--max-loras", str(self.options.slots), "--max-cpu-loras", str(len(self.folders))]
        extra += shlex.split(self.options.vllm_args)
        target = VllmTarget(self._setup(self.folders), self.options.vllm_python, extra)
        async with target.start(self.logs / "vllm.log") as session:
            await machine.settle()
            await self._hot_switch("vllm", session, list(self.folders)[: self.options.slots])
            await self._random("vllm", session, "random", list(self.folders))

    def _setup(self, adapters: dict[str, Path]) -> Setup:
        return Setup(self.base, adapters, self.options.rank, self.options.threads)

    async def _hot_switch(self, target: str, session: Session, names: list[str]) -> None:
        same, other = await life.hot_switch(session, names, self.prompts, self.options.rounds)
        self._note(target, "TTFT, same adapter", same)
        self._note(target, "TTFT, another adapter", other)
        self.figures[target]["cost of a switch"] = other.above(same) * 1e3

    async def _random(
        self, target: str, session: Session, title: str, names: list[str], seed: int | None = None
    ) -> None:
        options = self.options
        with self._progress(f"{len(names)} adapters at random", options.requests) as step:
            load = await life.random_load(
                session,
                names,
                self.prompts,
                streams=options.streams,
                requests=options.requests,
                tokens=options.tokens,
                seed=options.seed if seed is None else seed,
                step=step,
            )
        self._note(target, f"{title}: TTFT", load.ttft)
        self.figures[target][f"{title}: tokens/s"] = load.tokens_per_second
        self.figures[target][f"{title}: adapters asked for"] = load.adapters

    def _note(self, target: str, name: str, times: life.Times) -> None:
        figures = self.figures.setdefault(target, {})
        figures[f"{name} p50"], figures[f"{name} p99"] = times.p50 * 1e3, times.p99 * 1e3

    @contextmanager
    def _progress(self, title: str, total: int) -> Iterator[life.Step]:
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total)
            yield lambda: progress.advance(task)

    def publish(self, described: dict[str, Any]) -> None:
        """Prints the table; writes adapters.json and adapters.md to the output folder."""
        names = list(dict.fromkeys(name for figures in self.figures.values() for name in figures))
        table = Table(title=f"{self.base.name}, {len(self.folders)} adapters", box=SIMPLE_HEAD)
        table.add_column("milliseconds unless it says otherwise")
        lines = ["| | " + " | ".join(self.figures) + " |", "| --- |" + " ---: |" * len(self.figures)]
        for target in self.figures:
            table.add_column(target, justify="right")
        for name in names:
            cells = [_shown(figures.get(name)) for figures in self.figures.values()]
            table.add_row(name, *cells)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        self.console.print(table)
        folder: Path = self.options.output
        folder.mkdir(parents=True, exist_ok=True)
        options = {name: str(value) for name, value in vars(self.options).items()}
        result = {"machine": described, "options": options, "figures": self.figures, "failed": self.failed}
        (folder / "adapters.json").write_text(json.dumps(result, indent=1))
        (folder / "adapters.md").write_text(f"{machine.sentence(described)}\n\n" + "\n".join(lines) + "\n")
        self.console.print(f"Written: {folder / 'adapters.json'}, {folder / 'adapters.md'}")


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--vllm-python", type=Path, help="the python of a virtual environment that has vLLM")
    add("--base", type=Path, help="folder of a base model (default: the small default base)")
    add("--adapters", type=int, default=200, help="adapters that are registered (default: 200)")
    add("--slots", type=int, default=8, help="adapters in the batch at once (default: 8)")
    add("--rank", type=int, default=16, help="rank of the adapters (default: 16)")
    add("--requests", type=int, default=200, help="requests of the random load (default: 200)")
    add("--streams", type=int, default=16, help="of them at the same time (default: 16)")
    add("--tokens", type=int, default=32, help="tokens of each (default: 32)")
    add("--prompt-tokens", type=int, default=85, help="length of each prompt (default: 85)")
    add("--rounds", type=int, default=6, help="turns of the hot switch over all slots (default: 6)")
    add("--cold", type=int, default=16, help="adapters that are started cold (default: 16)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of each target (default: all)")
    add("--seed", type=int, default=0, help="of adapters, prompts and choices (default: 0)")
    add("--busy", action="store_true", help="measure although other work runs on this machine")
    add("--onebase-args", default="", metavar="ARGS", help="more options for `onebase serve`, in one string")
    add("--vllm-args", default="", metavar="ARGS", help="more options for `vllm serve`, in one string")
    add(
        "--output",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder for adapters.json and adapters.md",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 when every target was measured, else 1."""
    parser = _parser()
    options = parser.parse_args(argv)
    for name in ("adapters", "slots", "rank", "requests", "streams", "tokens", "rounds", "cold", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.slots > options.adapters:
        parser.error("--slots must not be more than --adapters")
    end_on_signals()
    console = Console()
    described = machine.describe(options.vllm_python)
    machine.demand_quiet(options.busy, console)
    if options.base is None:
        from onebase_engine.base.default_base import fetch_default_base

        options.base = fetch_default_base()
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as folder:
        with console.status("making random adapters"):
            folders = make_adapters(
                options.base, Path(folder) / "adapters", options.adapters, options.rank, seed=options.seed
            )
        prompts = Prompts(options.base, options.prompt_tokens, options.seed)
        bench = Bench(options, options.base, folders, prompts, console, Path(folder))
        try:
            asyncio.run(bench.run())
        finally:
            if bench.figures:
                bench.publish(described)
    return 1 if bench.failed or not bench.figures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
