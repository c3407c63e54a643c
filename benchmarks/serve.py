#!/usr/bin/env python3
"""Measures serving LoRA adapters on one base: OneBase next to its peers, on this machine, now.

Each round starts each target in turn, alone on the machine, sends it the same prompts with the same
eight random adapters, and stops it. Reported are medians over the rounds.

  python benchmarks/serve.py                                        # against transformers + PEFT
  python benchmarks/serve.py --vllm-python /tmp/vllm/bin/python     # and against vLLM
  python benchmarks/serve.py --llama-server /tmp/llama/llama-server # and against llama.cpp
  python benchmarks/serve.py --targets onebase --rounds 1           # a quick look
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import machine, report
from bench.lora import make_adapters
from bench.processes import StartError, end_on_signals
from bench.stream import HttpError, Sample
from bench.targets import LlamaCppTarget, OneBaseTarget, PeftTarget, Session, Setup, Target, VllmTarget
from bench.workload import Prompts, Request, Scenario, requests_of, scenarios

FAILURES = (StartError, HttpError, OSError, EOFError, TimeoutError, ValueError)
TARGETS = ("onebase", "peft", "vllm", "llama.cpp")
WARM_UP_TOKENS = 8


@dataclass
class Bench:
    """One invocation: what is asked of whom, and what came of it."""

    options: argparse.Namespace
    setup: Setup
    prompts: Prompts
    scenarios: list[Scenario]
    console: Console
    machine: dict[str, Any]
    runs: list[report.Run]
    failed: set[str]

    async def measure(self, targets: Sequence[Target], logs: Path) -> None:
        """All rounds; a target that fails is left out of the rounds that follow."""
        deadline = time.monotonic() + self.options.time_limit
        for number in range(1, self.options.rounds + 1):
            for target in targets:
                if target.name in self.failed:
                    continue
                if time.monotonic() > deadline:
                    self.console.print(f"[yellow]Time limit reached in round {number}.[/]")
                    return
                self.console.print(f"round {number} of {self.options.rounds}: [bold]{target.name}[/]")
                try:
                    await self._round(target, number, logs / f"{target.name}.log")
                except FAILURES as error:
                    self.failed.add(target.name)
                    self.console.print(f"[red]{target.name} failed: {type(error).__name__}:[/]", error)

    async def _round(self, target: Target, number: int, log: Path) -> None:
        async with target.start(log) as session:
            await self._warm_up(session)
            for scenario in self.scenarios:
                requests = requests_of(scenario, self.prompts, number, self.options.tokens)
                async with asyncio.timeout(self.options.run_timeout):
                    samples = await _send(session, scenario, requests)
                self._check(samples)
                speed = sum(sample.tokens for sample in samples) / _busy_seconds(samples, scenario)
                self.runs.append(report.Run(target.name, scenario.key, number, speed, samples))
                self.console.print(f"  {scenario.title}: {speed:.1f} tokens/s")

    async def _warm_up(self, session: Session) -> None:
        """Every adapter and the base once, together and alone, so that nothing is done for the first time."""
        adapters = [*self.setup.adapters, None]
        count = max(self.options.streams, len(adapters))
        names = [adapters[index % len(adapters)] for index in range(count)]
        async with asyncio.timeout(self.options.run_timeout):
            await session.run([self._warm_up_request(index, name) for index, name in enumerate(names)])
            await session.run([self._warm_up_request(count, names[0])])

    def _warm_up_request(self, index: int, adapter: str | None) -> Request:
        return Request(self.prompts.make("warm-up", index), adapter, WARM_UP_TOKENS)

    def _check(self, samples: list[Sample]) -> None:
        counts = {sample.tokens for sample in samples}
        if counts != {self.options.tokens}:
            raise ValueError(f"asked for {self.options.tokens} tokens a stream, got {sorted(counts)}")

    def publish(self) -> None:
        """Prints the tables; writes serve.json and serve.md to the output folder."""
        main = self.options.targets[0]
        figures = report.summarize(self.runs)
        cells = report.rows(figures, self.scenarios, main)
        equal = report.equal_texts(self.runs, main, "peft") if main != "peft" else {}
        title = f"{self.setup.base.name}, {self.options.tokens} tokens out"
        self.console.print(report.rich_table(cells, main, title))
        notes = [f"texts equal to PEFT's, {key}: {n} of {total}" for key, (n, total) in equal.items()]
        for note in notes:
            self.console.print(note)
        result = {
            "machine": self.machine,
            "options": {name: str(value) for name, value in vars(self.options).items()},
            "figures": {key: {t: asdict(f) for t, f in by.items()} for key, by in figures.items()},
            "texts_equal_to_peft": equal,
            "failed": sorted(self.failed),
            "runs": [asdict(run) for run in self.runs],
        }
        folder: Path = self.options.output
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "serve.json").write_text(json.dumps(result, indent=1))
        listed = "".join(f"- {note}\n" for note in notes)
        markdown = f"{machine.sentence(self.machine)}\n\n{report.markdown_table(cells)}\n{listed}"
        (folder / "serve.md").write_text(markdown)
        self.console.print(f"Written: {folder / 'serve.json'}, {folder / 'serve.md'}")


async def _send(session: Session, scenario: Scenario, requests: list[Request]) -> list[Sample]:
    """At once, or one after the other where the scenario has one stream."""
    if scenario.streams > 1:
        return await session.run(requests)
    return [sample for request in requests for sample in await session.run([request])]


def _busy_seconds(samples: list[Sample], scenario: Scenario) -> float:
    """From the first request to the last token; without the pauses between the requests of one stream."""
    if scenario.streams == 1:
        return sum(sample.ended - sample.started for sample in samples)
    return max(sample.ended for sample in samples) - min(sample.started for sample in samples)


def _targets(options: argparse.Namespace, setup: Setup) -> list[Target]:
    made: dict[str, Target] = {
        "onebase": OneBaseTarget(setup, shlex.split(options.onebase_args)),
        "peft": PeftTarget(setup, options.peft_attention),
    }
    if options.vllm_python is not None:
        made["vllm"] = VllmTarget(setup, options.vllm_python, shlex.split(options.vllm_args))
    if options.llama_server is not None:
        extra = shlex.split(options.llama_args)
        made["llama.cpp"] = LlamaCppTarget(setup, options.llama_server, options.gguf, options.streams, extra)
    return [made[name] for name in options.targets]


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(TARGETS):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(TARGETS)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--targets", type=_names, help=f"comma-separated: {', '.join(TARGETS)}; ratios are the first one's")
    add("--vllm-python", type=Path, help="the python of a virtual environment that has vLLM")
    add("--llama-server", type=Path, help="llama.cpp's llama-server")
    add("--gguf", type=Path, help="the base for it: by default the file that the default base is made from")
    add("--base", type=Path, help="folder of a base model (default: the small default base)")
    add("--streams", type=int, default=16, help="streams at the same time (default: 16)")
    add("--tokens", type=int, default=64, help="tokens generated by each stream (default: 64)")
    add("--prompt-tokens", type=int, default=85, help="length of each prompt (default: 85)")
    add("--adapters", type=int, default=8, help="number of adapters (default: 8)")
    add("--rank", type=int, default=16, help="their rank (default: 16)")
    add("--repeats", type=int, default=3, help="requests in a row for the one-stream load (default: 3)")
    add("--rounds", type=int, default=3, help="how often each target is started and measured (default: 3)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of each target (default: all)")
    add("--seed", type=int, default=0, help="of adapters and prompts (default: 0)")
    add("--peft-attention", default="sdpa", choices=["sdpa", "eager"], help="for the peft target")
    add("--onebase-args", default="", metavar="ARGS", help="more options for `onebase serve`, in one string")
    add("--vllm-args", default="", metavar="ARGS", help="more options for `vllm serve`, in one string")
    add("--llama-args", default="", metavar="ARGS", help="more options for llama-server, in one string")
    add("--run-timeout", type=float, default=300, help="seconds for one load on one target (default: 300)")
    add(
        "--time-limit", type=float, default=3600, help="start no target after so many seconds (default: 3600)"
    )
    add("--output", type=Path, default=Path("benchmarks/results"), help="folder for serve.json and serve.md")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.targets is None:
        options.targets = ["onebase", "peft", *(["vllm"] if options.vllm_python else [])]
        options.targets += ["llama.cpp"] if options.llama_server else []
    if "vllm" in options.targets and options.vllm_python is None:
        parser.error("the target vllm needs --vllm-python")
    if "llama.cpp" in options.targets and options.llama_server is None:
        parser.error("the target llama.cpp needs --llama-server")
    if options.llama_server and options.base and not options.gguf:
        parser.error("the target llama.cpp needs --gguf where --base is another base")
    for name in ("streams", "tokens", "prompt_tokens", "adapters", "rank", "repeats", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 when every target was measured, else 1."""
    options = _parse(argv)
    end_on_signals()
    console = Console()
    if os.getloadavg()[0] > 0.5:
        console.print(f"[yellow]This machine is busy (load {os.getloadavg()[0]:.1f}): expect noise.[/]")
    if options.base is None:
        from onebase_engine.base.default_base import fetch_default_base

        options.base = fetch_default_base()
    if options.llama_server is not None and options.gguf is None:
        from onebase_engine.base.default_base import default_cache, fetch_gguf

        options.gguf = fetch_gguf(default_cache() / "gguf")
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as folder:
        names = make_adapters(
            options.base, Path(folder) / "adapters", options.adapters, options.rank, seed=options.seed
        )
        setup = Setup(options.base, names, options.rank, options.threads)
        prompts = Prompts(options.base, options.prompt_tokens, options.seed)
        loads = scenarios(options.streams, list(names), options.repeats)
        bench = Bench(
            options, setup, prompts, loads, console, machine.describe(options.vllm_python), [], set()
        )
        try:
            asyncio.run(bench.measure(_targets(options, setup), Path(folder)))
        finally:
            if bench.runs:
                bench.publish()
    return 1 if bench.failed or not bench.runs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
