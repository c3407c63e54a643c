#!/usr/bin/env python3
"""Measures serving LoRA adapters on one base: OneBase next to its peers, on this machine, now.

Each round starts each target in turn, alone on the machine, sends it the same prompts with the same
eight random adapters, and stops it. Reported are medians over the rounds.

  python benchmarks/serve.py                                      # against transformers + PEFT
  python benchmarks/serve.py --install-peers --sweeps all         # and vLLM and llama.cpp, and all sweeps
  python benchmarks/serve.py --vllm-python ~/vllm/bin/python      # a vLLM of your own
  python benchmarks/serve.py --targets onebase --rounds 1         # a quick look
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import figures, machine, targets, workload
from bench.command import Options, base_of, names
from bench.lora import make_adapters
from bench.peers import fill_in_programs, gguf_of
from bench.processes import end_on_signals
from bench.report import markdown, table, write
from bench.stream import Sample
from bench.targets import FAILURES, Session, Setup

TARGETS = ("onebase", "engine", "peft", "vllm", "llama.cpp")
WARM_UP_TOKENS = 8
LLAMA_DRAFTS = ("--spec-type", "ngram-simple")


@dataclass
class Bench:
    """One invocation: what is asked of whom, and what came of it."""

    options: argparse.Namespace
    prompts: workload.Prompts
    blocks: list[workload.Block]
    """The main block first."""
    console: Console
    machine: dict[str, Any]
    folder: Path
    """Folder for adapters and logs; it is deleted at the end."""
    runs: list[figures.Run]
    failed: set[str]

    async def measure(self) -> None:
        """Run all rounds, the targets in turn within each block. One that fails is left out of the rest."""
        for number in range(1, self.options.rounds + 1):
            for block in self.blocks:
                if not block.every_round and number > self.options.sweep_rounds:
                    continue
                # In turns from the front and from the back: none is always the last on a machine that tires.
                for name in self.options.targets if number % 2 else reversed(self.options.targets):
                    if name not in self.failed and (block.only is None or name in block.only):
                        await self._ask(name, block, number)

    async def _ask(self, name: str, block: workload.Block, number: int) -> None:
        self.console.print(f"round {number} of {self.options.rounds}, {block.key}: [bold]{name}[/]")
        try:
            async with self._target(name, block) as session:
                await machine.settle()
                await self._warm_up(session, block)
                for scenario in block.scenarios:
                    requests = workload.requests_of(scenario, self.prompts, number)
                    async with asyncio.timeout(self.options.load_seconds):
                        samples = await _send(session, scenario, requests)
                    speed = sum(sample.tokens for sample in samples) / _busy_seconds(samples, scenario)
                    self.runs.append(figures.Run(name, scenario.key, number, speed, samples))
                    self.console.print(f"  {scenario.title}: {speed:.1f} tokens/s")
        except FAILURES as error:
            self.failed.add(name)
            self.console.print(f"[red]{name} failed: {type(error).__name__}:[/]", error)

    def _target(self, name: str, block: workload.Block) -> AbstractAsyncContextManager[Session]:
        options, log = self.options, self.folder / f"{name}.log"
        adapters = {f"a{index}": self._adapters(rank)[f"a{index}"] for index, rank in enumerate(block.ranks)}
        rank = max(block.ranks, default=1)
        setup = Setup(
            options.base,
            adapters,
            rank,
            options.threads,
            block.streams,
            block.context,
            options.start_seconds,
            options.data_dir,
        )
        if name == "vllm":
            return targets.vllm(setup, log, options.vllm_python, shlex.split(options.vllm_args))
        if name == "llama.cpp":
            extra = [*shlex.split(options.llama_args), *(LLAMA_DRAFTS if block.drafts else ())]
            return targets.llama_cpp(setup, log, options.llama_server, options.gguf, extra)
        if name == "peft":
            return targets.peft(setup, log, options.peft_attention)
        # Random adapters repeat themselves: guesses from the text would be right more often than for users.
        if name == "engine":
            return targets.engine(setup, log, block.drafts)
        drafts = [] if block.drafts else ["--draft-tokens", "0"]
        return targets.onebase(setup, log, [*drafts, *shlex.split(options.onebase_args)])

    def _adapters(self, rank: int) -> dict[str, Path]:
        """Return as many adapters of one rank as a block can have, made when first asked for."""
        options, folder = self.options, self.folder / f"rank-{rank}"
        if folder.exists():
            return {path.name: path for path in folder.iterdir()}
        return make_adapters(options.base, folder, options.adapters, rank, seed=options.seed)

    async def _warm_up(self, session: Session, block: workload.Block) -> None:
        """Ask every adapter and the base once, together and alone: nothing is left for the first time."""
        adapters = [*(f"a{index}" for index in range(len(block.ranks))), None]
        count = max(self.options.streams, len(adapters))
        requests = [
            workload.Request(
                self.prompts.make("warm-up", index), adapters[index % len(adapters)], WARM_UP_TOKENS
            )
            for index in range(count)
        ]
        alone = workload.Request(self.prompts.make("warm-up", count), adapters[0], WARM_UP_TOKENS)
        async with asyncio.timeout(self.options.load_seconds):
            await session.run(requests)
            await session.run([alone])

    def publish(self) -> None:
        """Print the table; write serve.json and serve.md to the output folder."""
        options, main = self.options, self.options.targets[0]
        scenarios = [scenario for block in self.blocks for scenario in block.scenarios]
        found = figures.summarize(self.runs)
        cells = figures.rows(found, scenarios, main)
        equal = figures.equal_texts(self.runs, main, "peft") if main != "peft" else {}
        title = f"{options.base.name}, {options.tokens} tokens out"
        made = table(["", *figures.COLUMNS[2:-1]], figures.compact(cells), title)
        made.caption = f"times in ms; ratio: {main}'s tokens/s over the target's"
        self.console.print(made)
        notes = [f"texts equal to PEFT's, {key}: {n} of {total}" for key, (n, total) in equal.items()]
        for note in notes:
            self.console.print(note)
        result = {
            "figures": {key: {t: asdict(f) for t, f in by.items()} for key, by in found.items()},
            "texts_equal_to_peft": equal,
            "failed": sorted(self.failed),
            "runs": [asdict(run) for run in self.runs],
        }
        text = markdown(figures.COLUMNS, cells, left=2) + "\n" + "".join(f"- {note}\n" for note in notes)
        write("serve", options, self.machine, result, text, self.console)


async def _send(
    session: Session, scenario: workload.Scenario, requests: list[workload.Request]
) -> list[Sample]:
    """Send the requests at once, or one after the other where the scenario has one stream.

    Raises ValueError if a stream has another number of tokens than were asked for.
    """
    if scenario.streams > 1:
        samples = await session.run(requests)
    else:
        samples = [sample for request in requests for sample in await session.run([request])]
    if (counts := {sample.tokens for sample in samples}) != {scenario.tokens}:
        raise ValueError(f"asked for {scenario.tokens} tokens a stream, got {sorted(counts)}")
    return samples


def _busy_seconds(samples: list[Sample], scenario: workload.Scenario) -> float:
    """Return the seconds from the first request to the last token, without pauses between requests of one
    stream."""
    if scenario.streams == 1:
        return sum(sample.ended - sample.started for sample in samples)
    return max(sample.ended for sample in samples) - min(sample.started for sample in samples)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    options = Options(__doc__)
    add = options.add
    known = ", ".join(TARGETS)
    add("--targets", type=names(*TARGETS), help=f"comma-separated: {known}; ratios are the first one's")
    options.common("install-peers", "llama-server", "gguf", "llama-args")
    options.common("base", "vllm-python", "vllm-args", "onebase-args", "busy")
    options.count("streams", 16, "streams at the same time")
    options.count("tokens", 64, "tokens generated by each stream")
    options.count("prompt-tokens", 85, "length of each prompt")
    options.count("adapters", 8, "number of adapters")
    options.count("rank", 16, "their rank")
    options.count("repeats", 3, "requests in a row for the one-stream load")
    options.count("rounds", 3, "how often each target is started and measured")
    sweeps = ", ".join(workload.SWEEPS)
    add("--sweeps", type=names(*workload.SWEEPS), default=[], help=f"comma-separated: {sweeps}; or all")
    options.count("sweep-rounds", 1, "rounds in which sweeps are measured")
    options.count("start-seconds", 300, "limit of the start of a target")
    options.count("load-seconds", 300, "limit of a load on a target")
    add(
        "--data-dir", type=Path, help="OneBase's folder of adapters and proofs (default: a new one each time)"
    )
    options.threads()
    options.seed("adapters and prompts")
    add("--peft-attention", default="sdpa", choices=["sdpa", "eager"], help="for the peft target")
    options.output("serve.json and serve.md")
    given = options.parser.parse_args(argv)
    programs = {"vllm": given.vllm_python, "llama.cpp": given.llama_server}
    if given.targets is None:
        peers = [name for name, program in programs.items() if program or given.install_peers]
        given.targets = ["onebase", "peft", *peers]
    for name, option in (("vllm", "--vllm-python"), ("llama.cpp", "--llama-server")):
        if name in given.targets and not (programs[name] or given.install_peers):
            options.parser.error(f"the target {name} needs {option}, or --install-peers")
    if "llama.cpp" in given.targets and given.base and not given.gguf:
        options.parser.error("the target llama.cpp needs --gguf where --base is another base")
    return given


def main(argv: Sequence[str]) -> int:
    """Return the exit status: 0 when every target was measured, else 1."""
    options = _parse(argv)
    end_on_signals()
    console = Console()
    failed = fill_in_programs(options, console)
    machine.demand_quiet(options.busy, console)
    base = base_of(options)
    gguf_of(options)
    shape = workload.Shape(**{field.name: getattr(options, field.name) for field in fields(workload.Shape)})
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as folder:
        prompts = workload.Prompts(base, options.prompt_tokens, options.seed)
        blocks = [workload.main_block(shape), *workload.sweep_blocks(shape, options.sweeps)]
        described = machine.describe(options.vllm_python, llama_server=options.llama_server)
        bench = Bench(options, prompts, blocks, console, described, Path(folder), [], failed)
        try:
            asyncio.run(bench.measure())
        finally:
            if bench.runs:
                bench.publish()
    return 1 if bench.failed or not bench.runs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
