#!/usr/bin/env python3
"""Time of many short judgements of one conversation: by activated LoRAs, by plain ones, one by one, by peers.

The base has just answered in the conversation, whose keys and values are in its cache. Each judge is an
adapter of its own, asked for 1 to 16 tokens over HTTP, all at once unless one by one. A way that takes longer
than LONG_SECONDS is measured once: plain LoRAs compute the conversation again for each judge.

  python benchmarks/judges.py                                  # 20 judges, 2,000 tokens, OneBase alone
  python benchmarks/judges.py --install-peers                  # and llama.cpp's aLoRA, and vLLM's LoRA
  python benchmarks/judges.py --judges 4 --tokens 200 --busy   # a look
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from rich.console import Console

from bench import machine, targets
from bench.command import Options, base_of
from bench.lora import make_adapters
from bench.peers import fill_in_programs, gguf_of
from bench.processes import end_on_signals
from bench.report import markdown, table, write
from bench.targets import FAILURES, HttpSession, Session, Setup
from bench.workload import Request

INVOCATION = [64, 65, 66]
LOWEST, HIGHEST = 100, 10_000
"""Token ids of conversations, which are random."""
RANK = 16
WARM_UP_TOKENS = 32
"""Tokens of the conversation that is judged first, and not measured."""
LONG_SECONDS = 15.0
"""Time of a round, in seconds, after which no further one of its mode is measured."""
RUN_SECONDS = 1800.0
"""Limit of one round, in seconds."""


class Mode(NamedTuple):
    """A way to ask all judges. kind: of the adapters. apart: each judge waits for the one before."""

    target: str
    kind: str
    apart: bool = False


MODES = {
    "aLoRA": Mode("onebase", "alora"),
    "LoRA": Mode("onebase", "lora"),
    "LoRA, one by one": Mode("onebase", "lora", apart=True),
    "llama.cpp, aLoRA": Mode("llama.cpp", "alora"),
    "vllm, LoRA": Mode("vllm", "lora"),
}


async def judge(session: Session, mode: Mode, judges: int, text: list[int]) -> dict[str, float]:
    """Return the seconds to all answers and to the base's answer before them, and the tokens computed."""
    # Of activated LoRAs alone llama.cpp wants one in each request; without its invocation it is the base.
    of_base = f"{mode.kind}0" if mode.target == "llama.cpp" else None
    started = time.perf_counter()
    await session.run([Request(text, of_base, 1)])
    before = time.perf_counter() - started
    requests = [
        Request([*text, *INVOCATION], f"{mode.kind}{n}", 1 + 15 * n // max(judges - 1, 1))
        for n in range(judges)
    ]
    started, computed = time.perf_counter(), 0
    for some in [[one] for one in requests] if mode.apart else [requests]:
        for request, sample in zip(some, await session.run(some), strict=True):
            computed += len(request.prompt) - sample.cached + sample.tokens
    return {"seconds": time.perf_counter() - started, "tokens": computed, "base_seconds": before}


def adapters_of(base: Path, folder: Path, judges: int) -> dict[str, Path]:
    """Write the same random adapters twice, as plain and as activated ones; return their folders by name."""
    found = {}
    for kind in ("lora", "alora"):
        for number, path in enumerate(make_adapters(base, folder / kind, judges, RANK).values()):
            config = path / "adapter_config.json"
            if kind == "alora":
                fields = json.loads(config.read_text())
                config.write_text(json.dumps(fields | {"alora_invocation_tokens": INVOCATION}))
            found[f"{kind}{number}"] = path
    return found


@asynccontextmanager
async def _started(
    name: str, options: argparse.Namespace, adapters: dict[str, Path], log: Path
) -> AsyncIterator[Session]:
    async with _target(name, options, adapters, log) as session:
        # Random adapters say anything, if only half a letter, and each target may use its cache.
        yield replace(session, silent=True, cache=True)


def _target(
    name: str, options: argparse.Namespace, adapters: dict[str, Path], log: Path
) -> AbstractAsyncContextManager[HttpSession]:
    kinds = {mode.kind for mode in MODES.values() if mode.target == name}
    loaded = {key: path for key, path in adapters.items() if key.rstrip("0123456789") in kinds}
    context = options.tokens + len(INVOCATION) + 16
    # llama.cpp has a cache for each of its slots: with one, all judges find the conversation there.
    streams = 1 if name == "llama.cpp" else options.judges
    setup = Setup(options.base, loaded, RANK, options.threads, streams, context)
    if name == "vllm":
        extra = ["--enable-prompt-tokens-details", *shlex.split(options.vllm_args)]
        return targets.vllm(setup, log, options.vllm_python, extra)
    if name == "llama.cpp":
        extra = shlex.split(options.llama_args)
        return targets.llama_cpp(setup, log, options.llama_server, options.gguf, extra)
    return targets.onebase(setup, log, ["--draft-tokens", "0", *shlex.split(options.onebase_args)])


async def measure(options: argparse.Namespace, console: Console, runs: dict[str, Any]) -> set[str]:
    """Fill in the rounds of each mode; return the targets that failed.

    Each conversation is another one, so that none is in the cache.
    """
    draw, failed = random.Random(options.seed), set()
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as folder:
        adapters = adapters_of(options.base, Path(folder), options.judges)
        for target in options.targets:
            console.print(f"starting [bold]{target}[/]")
            try:
                async with _started(target, options, adapters, Path(folder) / f"{target}.log") as session:
                    await machine.settle()
                    for name, mode in MODES.items():
                        if mode.target == target:
                            await _rounds(name, session, options, draw, console, runs)
            except FAILURES as error:
                failed.add(target)
                console.print(f"[red]{target} failed: {type(error).__name__}:[/]", error)
    return failed


async def _rounds(
    name: str,
    session: Session,
    options: argparse.Namespace,
    draw: random.Random,
    console: Console,
    runs: dict[str, Any],
) -> None:
    for number in range(options.rounds + 1):
        size = options.tokens if number else WARM_UP_TOKENS
        text = [draw.randrange(LOWEST, HIGHEST) for _ in range(size)]
        async with asyncio.timeout(RUN_SECONDS):
            found = await judge(session, MODES[name], options.judges, text)
        if number == 0:
            continue
        runs.setdefault(name, []).append(found)
        console.print(f"  {name}, round {number} of {options.rounds}: {found['seconds']:.2f} s")
        if found["seconds"] > LONG_SECONDS:
            break


def publish(runs: dict[str, Any], options: argparse.Namespace, described: dict[str, Any]) -> None:
    """Print the table; write judges.json and judges.md to the output folder."""
    figures = {
        name: {key: median(one[key] for one in some) for key in some[0]} for name, some in runs.items()
    }
    columns = ["judges", "time to all answers", "tokens computed", "the base's answer before", "ratio"]
    least = figures["aLoRA"]["seconds"] if "aLoRA" in figures else None
    rows = [
        [
            name,
            f"{one['seconds']:.2f} s",
            f"{one['tokens']:,.0f}",
            f"{one['base_seconds']:.2f} s",
            f"{one['seconds'] / least:.1f}x" if least else "",
        ]
        for name, one in figures.items()
    ]
    console = Console()
    title = f"{options.base.name}: {options.judges} judges of one conversation of {options.tokens:,} tokens"
    console.print(table(columns, rows, title))
    text = f"{title}.\n\n{markdown(columns, rows)}\n"
    write("judges", options, described, {"figures": figures, "runs": runs}, text, console)


def main(argv: Sequence[str]) -> int:
    """Return the exit status: 0 when every target was measured, else 1."""
    asked = Options(__doc__)
    asked.common("base", "busy", "install-peers", "llama-server", "gguf", "llama-args")
    asked.common("vllm-python", "vllm-args", "onebase-args")
    asked.count("judges", 20, "adapters that judge")
    asked.count("tokens", 2000, "of the conversation")
    asked.count("rounds", 3, "measured rounds of what does not take long, of which the median counts")
    asked.threads()
    asked.seed("the conversations")
    asked.output("judges.json and judges.md")
    options = asked.parser.parse_args(argv)
    end_on_signals()
    console = Console()
    programs = {"llama.cpp": options.llama_server, "vllm": options.vllm_python}
    options.targets = ["onebase", *(name for name in programs if programs[name] or options.install_peers)]
    failed = fill_in_programs(options, console)
    options.targets = [name for name in options.targets if name not in failed]
    machine.demand_quiet(options.busy, console)
    base_of(options)
    gguf_of(options)
    described = machine.describe(options.vllm_python, llama_server=options.llama_server)
    runs: dict[str, Any] = {}
    try:
        failed |= asyncio.run(measure(options, console, runs))
    finally:
        if runs:
            publish(runs, options, described)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
