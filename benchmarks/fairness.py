#!/usr/bin/env python3
"""Measures what a flood of one tenant costs another: its time to the first token, and everybody's throughput.

Drives the engine in process. A guest asks again and again, with pauses: alone (quiet); next to a flood of
its own tenant, in which rows are served by arrival (arrival); next to one of another tenant (counters). Time
is the processor's, of one thread, so that others on the machine change little. While nothing runs it jumps.

  python benchmarks/fairness.py
  python benchmarks/fairness.py --requests 200 --loads quiet,counters       # a quick look
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

import torch
from rich.console import Console

from bench import machine
from bench.command import Options, base_of, names
from bench.report import percentile, table, write
from onebase_engine.base.load import load_base
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.messages import EngineConfig, Sampling, Submit
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_server.processes.engine import DEFAULT_STEP_TOKENS, base_settings, warm_up

FLOODED_BY = {"quiet": "", "arrival": "guest", "counters": "other"}
"""Load -> the tenant that floods."""
VOCABULARY = 300
"""Token ids from which prompts are drawn."""


@dataclass
class Run:
    """One load. Times are seconds of the processor."""

    load: str
    ttft: list[float] = field(default_factory=list)
    """Time to the first token of each of the guest's requests, from its arrival, which may be within a
    step."""
    seconds: float = 0.0
    """Time until the last sequence of the flood had ended; 0 without a flood."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    preemptions: int = 0


class Bench:
    """An engine on the default settings of the CPU, and its clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        config = EngineConfig(base_folder=str(options.base), device="cpu")
        device = torch.device("cpu")
        self._base = load_base(base_settings(config, device))
        self._limits = SchedulerLimits(options.max_rows, DEFAULT_STEP_TOKENS["cpu"], 4096)
        self._random = random.Random(options.seed)
        self._now = 0.0
        self._engine = self._made()

    def run(self, load: str) -> Run:
        """Run one load on a new engine, until the flood is over or the guest has asked often enough."""
        options, tenant, run = self._options, FLOODED_BY[load], Run(load)
        self._engine, self._now = self._made(), 0.0
        for number in range(options.requests if tenant else 0):
            self._ask(f"flood-{number}", tenant, options.flood_prompt_tokens, options.flood_tokens)
        flooding = {f"flood-{number}" for number in range(options.requests if tenant else 0)}
        next_at, asked_at = self._pause(), None
        while flooding or asked_at is not None or (not tenant and len(run.ttft) < options.quiet):
            if asked_at is None and not self._engine.busy:
                self._now = max(self._now, next_at)
            if asked_at is None and self._now >= next_at and (flooding or not tenant):
                asked_at = next_at
                self._ask(f"guest-{len(run.ttft)}", "guest", options.prompt_tokens, options.tokens)
            ended = self._step(run, asked_at)
            flooding -= ended
            if flooding or not tenant:
                run.seconds = self._now
                run.generated_tokens = self._engine.counters.generated_tokens
                run.prompt_tokens = self._engine.counters.prompt_tokens
            if any(name.startswith("guest") for name in ended):
                next_at, asked_at = self._now + self._pause(), None
        run.steps, run.preemptions = self._engine.counters.steps, self._engine.scheduler.preemptions
        return run

    def _step(self, run: Run, asked_at: float | None) -> set[str]:
        """Run one step; note the guest's first token. Returns the requests that have ended."""
        started = time.process_time()
        self._engine.step()
        self._now += time.process_time() - started
        outputs = self._engine.take_outputs()
        for output in outputs:
            if output.error_message is not None:
                raise RuntimeError(output.error_message)
            if output.queue_seconds is not None and output.id.startswith("guest") and asked_at is not None:
                run.ttft.append(self._now - asked_at)
        return {output.id for output in outputs if output.finish is not None}

    def _ask(self, name: str, tenant: str, prompt: int, tokens: int) -> None:
        text = [self._random.randrange(VOCABULARY) for _ in range(prompt)]
        sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        self._engine.submit(Submit(id=name, prompt=text, sampling=sampling, tenant=tenant))

    def _pause(self) -> float:
        return self._random.uniform(0, 2 * self._options.pause)

    def _made(self) -> Engine:
        blocks = self._options.kv_tokens // 16
        engine = Engine(self._base, name="bench", limits=self._limits, kv_blocks=blocks)
        warm_up(engine)
        return engine


def rows(runs: Sequence[Run]) -> list[list[str]]:
    """Return, by load: the guest's requests, TTFT p50 and p99 in ms, p99 by the quiet one, tokens/s,
    preemptions."""
    quiet = [one for run in runs if run.load == "quiet" for one in run.ttft]
    found = []
    for load in dict.fromkeys(run.load for run in runs):
        those = [run for run in runs if run.load == load]
        ttft = [one for run in those for one in run.ttft]
        p99 = percentile(ttft, 0.99)
        speed = sum(run.generated_tokens + run.prompt_tokens for run in those) / sum(
            run.seconds for run in those
        )
        found.append(
            [
                load,
                str(len(ttft)),
                f"{median(ttft) * 1e3:.0f}",
                f"{p99 * 1e3:.0f}",
                f"{p99 / percentile(quiet, 0.99):.2f}x" if quiet else "",
                f"{speed:.1f}" if FLOODED_BY[load] else "",
                str(sum(run.preemptions for run in those)),
            ]
        )
    return found


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    options = Options(__doc__)
    options.common("base")
    loads = names(*FLOODED_BY)
    options.add("--loads", type=loads, default=list(FLOODED_BY), help="comma-separated (default: all)")
    options.count("requests", 1000, "of the flood, all at once")
    options.count("flood-prompt-tokens", 64, "length of its prompts")
    options.count("flood-tokens", 64, "generated for each")
    options.count("prompt-tokens", 512, "length of the guest's prompts")
    options.count("tokens", 16, "generated for each of them")
    options.number("pause", 1.0, "mean seconds between the guest's requests")
    options.count("quiet", 100, "the guest's requests without a flood")
    options.count("max-rows", 64, "rows that run at once")
    options.count("kv-tokens", 65536, "tokens that the KV cache holds")
    options.count("rounds", 1, "how often each load is run")
    options.seed("prompts and pauses")
    options.output("fairness.json")
    return options.parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options, console, described = _parse(argv), Console(), machine.describe()
    base_of(options)
    # Of several threads the processor's time would count those that wait for each other, too.
    torch.set_num_threads(1)
    bench, runs = Bench(options), []
    for number in range(options.rounds):
        for load in options.loads if number % 2 == 0 else reversed(options.loads):
            runs.append(bench.run(load))
            console.print(f"{load}: {len(runs[-1].ttft)} requests of the guest, {runs[-1].steps} steps")
    columns = ["load", "requests", "TTFT p50", "TTFT p99", "by quiet", "tokens/s", "preemptions"]
    title = f"a guest and {options.requests} requests, {options.max_rows} places"
    console.print(table(columns, rows(runs), title))
    write("fairness", options, described, {"runs": [asdict(run) for run in runs]}, console=console)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
