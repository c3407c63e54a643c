#!/usr/bin/env python3
"""Measures serving LoRA adapters on one base: OneBase next to its peers, on this machine, now.

Each round starts each target in turn, alone on the machine, sends it the same prompts with the same
eight random adapters, and stops it. Reported are medians over the rounds.

  python benchmarks/serve.py                                      # against transformers + PEFT
  python benchmarks/serve.py --install-peers --sweeps all         # and vLLM and llama.cpp, and all plots
  python benchmarks/serve.py --vllm-python ~/vllm/bin/python      # a vLLM of your own
  python benchmarks/serve.py --targets onebase --rounds 1         # a quick look
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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import machine, report
from bench.lora import make_adapters
from bench.peers import PeerError, installed
from bench.plots import draw
from bench.processes import StartError, end_on_signals
from bench.stream import HttpError, Sample
from bench.targets import (
    EngineTarget,
    LlamaCppTarget,
    OneBaseTarget,
    PeftTarget,
    Session,
    Setup,
    Target,
    VllmTarget,
)
from bench.workload import (
    SWEEPS,
    Block,
    Prompts,
    Request,
    Scenario,
    Shape,
    main_block,
    requests_of,
    sweep_blocks,
)

FAILURES = (StartError, HttpError, OSError, EOFError, TimeoutError, ValueError)
TARGETS = ("onebase", "engine", "peft", "vllm", "llama.cpp")
WARM_UP_TOKENS = 8
LLAMA_DRAFTS = ("--spec-type", "ngram-simple")


@dataclass
class Bench:
    """One invocation: what is asked of whom, and what came of it."""

    options: argparse.Namespace
    prompts: Prompts
    blocks: list[Block]
    """The main block first."""
    console: Console
    machine: dict[str, Any]
    folder: Path
    """Folder for adapters and logs; it is deleted at the end."""
    runs: list[report.Run]
    failed: set[str]

    @property
    def scenarios(self) -> list[Scenario]:
        return [scenario for block in self.blocks for scenario in block.scenarios]

    async def measure(self) -> None:
        """All rounds, the targets in turn within each block. One that fails is left out of what follows."""
        deadline = time.monotonic() + self.options.time_limit
        for number in range(1, self.options.rounds + 1):
            for block in self.blocks:
                if not block.every_round and number > self.options.sweep_rounds:
                    continue
                # In turns from the front and from the back: none is always the last on a machine that tires.
                names = self.options.targets if number % 2 else reversed(self.options.targets)
                for name in names:
                    if name in self.failed or (block.only is not None and name not in block.only):
                        continue
                    if time.monotonic() > deadline:
                        self.console.print(f"[red]Time limit reached in round {number}.[/]")
                        self.failed.add("time limit")
                        return
                    await self._ask(name, block, number)

    async def _ask(self, name: str, block: Block, number: int) -> None:
        self.console.print(f"round {number} of {self.options.rounds}, {block.key}: [bold]{name}[/]")
        target = self._target(name, block)
        try:
            async with target.start(self.folder / f"{name}.log") as session:
                await machine.settle()
                await self._warm_up(session, block)
                for scenario in block.scenarios:
                    requests = requests_of(scenario, self.prompts, number)
                    async with asyncio.timeout(self.options.run_timeout):
                        samples = await _send(session, scenario, requests)
                    _check(samples, scenario)
                    speed = sum(sample.tokens for sample in samples) / _busy_seconds(samples, scenario)
                    self.runs.append(report.Run(name, scenario.key, number, speed, samples))
                    self.console.print(f"  {scenario.title}: {speed:.1f} tokens/s")
        except FAILURES as error:
            self.failed.add(name)
            self.console.print(f"[red]{name} failed: {type(error).__name__}:[/]", error)

    def _target(self, name: str, block: Block) -> Target:
        options = self.options
        adapters = {f"a{index}": self._adapters(rank)[f"a{index}"] for index, rank in enumerate(block.ranks)}
        rank = max(block.ranks, default=1)
        setup = Setup(options.base, adapters, rank, options.threads, block.streams, block.context)
        if name == "vllm":
            return VllmTarget(setup, options.vllm_python, shlex.split(options.vllm_args))
        if name == "llama.cpp":
            extra = [*shlex.split(options.llama_args), *(LLAMA_DRAFTS if block.drafts else ())]
            return LlamaCppTarget(setup, options.llama_server, options.gguf, extra)
        if name == "peft":
            return PeftTarget(setup, options.peft_attention)
        # Random adapters repeat themselves: guesses from the text would be right more often than for users.
        drafts = [] if block.drafts else ["--draft-tokens", "0"]
        if name == "engine":
            return EngineTarget(setup, drafts)
        return OneBaseTarget(setup, [*drafts, *shlex.split(options.onebase_args)])

    def _adapters(self, rank: int) -> dict[str, Path]:
        """Return as many adapters of one rank as a block can have, made when first asked for."""
        options, folder = self.options, self.folder / f"rank-{rank}"
        if folder.exists():
            return {path.name: path for path in folder.iterdir()}
        return make_adapters(options.base, folder, options.adapters, rank, seed=options.seed)

    async def _warm_up(self, session: Session, block: Block) -> None:
        """Every adapter and the base once, together and alone, so that nothing is done for the first time."""
        adapters = [*(f"a{index}" for index in range(len(block.ranks))), None]
        count = max(self.options.streams, len(adapters))
        names = [adapters[index % len(adapters)] for index in range(count)]
        async with asyncio.timeout(self.options.run_timeout):
            await session.run([self._warm_up_request(index, name) for index, name in enumerate(names)])
            await session.run([self._warm_up_request(count, names[0])])

    def _warm_up_request(self, index: int, adapter: str | None) -> Request:
        return Request(self.prompts.make("warm-up", index), adapter, WARM_UP_TOKENS)

    def publish(self) -> None:
        """Prints the table; writes serve.json, serve.md and, of sweeps, serve.png to the output folder."""
        main = self.options.targets[0]
        figures = report.summarize(self.runs)
        cells = report.rows(figures, self.scenarios, main)
        equal = report.equal_texts(self.runs, main, "peft") if main != "peft" else {}
        title = f"{self.options.base.name}, {self.options.tokens} tokens out"
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
        written = ["serve.json", "serve.md"]
        if len(self.blocks) > 1:
            draw(self.runs, figures, self.scenarios, f"{title}: {self.machine['cpu']}", folder / "serve.png")
            written.append("serve.png")
        self.console.print(f"Written: {', '.join(str(folder / name) for name in written)}")


def _check(samples: list[Sample], scenario: Scenario) -> None:
    counts = {sample.tokens for sample in samples}
    if counts != {scenario.tokens}:
        raise ValueError(f"asked for {scenario.tokens} tokens a stream, got {sorted(counts)}")


async def _send(session: Session, scenario: Scenario, requests: list[Request]) -> list[Sample]:
    """Send the requests at once, or one after the other where the scenario has one stream."""
    if scenario.streams > 1:
        return await session.run(requests)
    return [sample for request in requests for sample in await session.run([request])]


def _busy_seconds(samples: list[Sample], scenario: Scenario) -> float:
    """Return the seconds from the first request to the last token, without pauses between requests of one
    stream."""
    if scenario.streams == 1:
        return sum(sample.ended - sample.started for sample in samples)
    return max(sample.ended for sample in samples) - min(sample.started for sample in samples)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(TARGETS):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(TARGETS)}")
    return names


def _sweeps(text: str) -> list[str]:
    names = list(SWEEPS) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    if not set(names) <= set(SWEEPS):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(SWEEPS)}, or all")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--targets", type=_names, help=f"comma-separated: {', '.join(TARGETS)}; ratios are the first one's")
    add(
        "--install-peers",
        action="store_true",
        help="install vLLM and llama.cpp, and measure them",
    )
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
    add("--sweeps", type=_sweeps, default=[], help=f"comma-separated: {', '.join(SWEEPS)}; or all")
    add("--sweep-rounds", type=int, default=1, help="rounds in which sweeps are measured (default: 1)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of each target (default: all)")
    add("--seed", type=int, default=0, help="of adapters and prompts (default: 0)")
    add("--peft-attention", default="sdpa", choices=["sdpa", "eager"], help="for the peft target")
    add("--onebase-args", default="", metavar="ARGS", help="more options for `onebase serve`, in one string")
    add("--vllm-args", default="", metavar="ARGS", help="more options for `vllm serve`, in one string")
    add("--llama-args", default="", metavar="ARGS", help="more options for llama-server, in one string")
    add("--run-timeout", type=float, default=300, help="seconds for one load on one target (default: 300)")
    add(
        "--time-limit", type=float, default=7200, help="start no target after so many seconds (default: 7200)"
    )
    add("--busy", action="store_true", help="measure although other work runs on this machine")
    add("--output", type=Path, default=Path("benchmarks/results"), help="folder for serve.json, .md and .png")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.targets is None:
        options.targets = ["onebase", "peft"]
        options.targets += ["vllm"] if options.vllm_python or options.install_peers else []
        options.targets += ["llama.cpp"] if options.llama_server or options.install_peers else []
    if "vllm" in options.targets and not (options.vllm_python or options.install_peers):
        parser.error("the target vllm needs --vllm-python, or --install-peers")
    if "llama.cpp" in options.targets and not (options.llama_server or options.install_peers):
        parser.error("the target llama.cpp needs --llama-server, or --install-peers")
    if "llama.cpp" in options.targets and options.base and not options.gguf:
        parser.error("the target llama.cpp needs --gguf where --base is another base")
    for name in (
        "streams",
        "tokens",
        "prompt_tokens",
        "adapters",
        "rank",
        "repeats",
        "rounds",
        "sweep_rounds",
        "threads",
    ):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def _install(options: argparse.Namespace, console: Console) -> set[str]:
    """Fill in the programs of peers that were not given. Gives the targets that cannot be had."""
    failed = set()
    for name, option in (("vllm", "vllm_python"), ("llama.cpp", "llama_server")):
        if name in options.targets and getattr(options, option) is None:
            try:
                setattr(options, option, installed(name, console))
            except PeerError as error:
                console.print(f"[red]{error}[/]")
                failed.add(name)
    return failed


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 when every target was measured, else 1."""
    options = _parse(argv)
    end_on_signals()
    console = Console()
    failed = _install(options, console)
    machine.demand_quiet(options.busy, console)
    if options.base is None:
        from onebase_engine.base.default_base import fetch_default_base

        options.base = fetch_default_base()
    if "llama.cpp" in options.targets and options.gguf is None:
        from onebase_engine.base.default_base import fetch_gguf
        from onebase_engine.user_cache import default_cache

        options.gguf = fetch_gguf(default_cache() / "gguf")
    shape = Shape(**{field.name: getattr(options, field.name) for field in fields(Shape)})
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as folder:
        prompts = Prompts(options.base, options.prompt_tokens, options.seed)
        blocks = [main_block(shape), *sweep_blocks(shape, options.sweeps)]
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
