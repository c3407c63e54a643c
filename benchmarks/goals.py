#!/usr/bin/env python3
"""Measures OneBase next to its peers in everything that it is for, and says which goals are met.

Runs serve.py with all sweeps, adapters.py, train.py and judges.py one after the other, next to peers that it
installs by itself (vLLM's CPU build, llama.cpp, TRL: pinned, in the user's cache), in about an hour on two
cores.

  python benchmarks/goals.py                     # or: make bench
  python benchmarks/goals.py --quick             # one round, few adapters: a look, no figures to publish
  python benchmarks/goals.py --only serve        # or adapters, train, judges; others: as last measured
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import machine
from bench.command import Options, names
from bench.peers import PeerError, installed
from bench.processes import end_on_signals
from bench.report import markdown, table

HERE = Path(__file__).parent
PARTS = ("serve", "adapters", "train", "judges")


Figure = tuple[str, ...]
"""Place of a figure: the part, then the keys in its JSON."""


@dataclass(frozen=True)
class Goal:
    """A figure of OneBase over one of a peer's, of its own, or a number: at least the limit, or at most."""

    work: str
    against: str
    limit: float
    own: Figure
    other: Figure | float
    at_most: bool = False

    def ratio(self, found: dict[str, Any]) -> float | None:
        """Return the ratio, or None if either figure is missing."""
        own = _figure(found, self.own)
        other = self.other if isinstance(self.other, float) else _figure(found, self.other)
        return None if own is None or not other else own / other

    def met(self, ratio: float) -> bool:
        return ratio <= self.limit if self.at_most else ratio >= self.limit


def _figure(found: Any, keys: Figure) -> float | None:
    for key in keys:
        found = found.get(key, {})
    return None if found == {} else float(found)


def _serving(load: str, target: str = "onebase", figure: str = "tokens_per_second") -> Figure:
    return "serve", load, target, figure


def _adapters(figure: str, target: str = "onebase") -> Figure:
    return "adapters", target, figure


def _training(target: str) -> Figure:
    return "train", target, "tokens_per_second"


def _judges(mode: str) -> Figure:
    return "judges", mode, "seconds"


SPEEDS = {
    ("1 stream, 1 adapter", "single"): {"llama.cpp": 0.8, "vllm": 3.5},
    ("1 stream, text that repeats its prompt", "copy"): {"llama.cpp": 1.2},
    ("16 streams, 8 adapters", "mixed"): {"vllm": 4.0, "llama.cpp": 3.5, "peft": 3.0},
    ("16 streams, base only", "base"): {"vllm": 1.0, "llama.cpp": 2.5},
}
"""Least ratio of tokens a second to each peer's, by what is done and the load of serve.py."""
FIRST_TOKENS = {
    "TTFT, prompt of 1,000, 1 stream": "prompt-1000",
    "TTFT, prompts of 1,000, 16 streams": "prompts-long",
}
"""Loads of serve.py whose median TTFT is at most that of a peer, by what is done."""
MIXED, BASE, LOADED, BARE = (_serving(load) for load in ("mixed", "base", "loaded", "bare"))
ALIKE, BESIDE = (_serving(load, "onebase", "tpot_p50") for load in ("alike", "beside"))
RANDOM, RANDOM_P99 = _adapters("random: tokens/s"), _adapters("random: TTFT p99")
UPLOADS, UPLOAD = _adapters("uploads at once: a minute"), _adapters("upload to active p50")
GOALS = [
    *(
        Goal(work, peer, limit, _serving(load), _serving(load, peer))
        for (work, load), limits in SPEEDS.items()
        for peer, limit in limits.items()
    ),
    Goal("16 streams, 8 adapters", "base only", 0.9, MIXED, BASE),
    Goal("16 streams, base only", "no adapters loaded", 0.99, LOADED, BARE),
    Goal("TPOT of rank 8, one row of rank 128", "rank 8 alone", 1.03, BESIDE, ALIKE, at_most=True),
    *(
        Goal(work, peer, 1.0, _serving(load, "onebase", "ttft_p50"), _serving(load, peer, "ttft_p50"), True)
        for work, load in FIRST_TOKENS.items()
        for peer in ("vllm", "llama.cpp")
    ),
    Goal("adapters at random", "vllm", 3.0, RANDOM, _adapters("random: tokens/s", "vllm")),
    Goal(
        "adapters at random, p99 of TTFT",
        "all in slots",
        1.5,
        RANDOM_P99,
        _adapters("resident: TTFT p99"),
        at_most=True,
    ),
    Goal("uploads at once, a minute", "100", 1.0, UPLOADS, 100.0),
    Goal("upload to active, p50", "1.5 s", 1.0, UPLOAD, 1500.0, at_most=True),
    Goal("training, tokens/s", "trl", 2.4, _training("onebase"), _training("trl")),
    Goal("judges by aLoRA, time", "as LoRA", 10.0, _judges("LoRA"), _judges("aLoRA")),
    Goal("judges by aLoRA, time", "vllm, LoRA", 15.0, _judges("vllm, LoRA"), _judges("aLoRA")),
]


def read(folder: Path) -> dict[str, Any]:
    """Return the results of each part, by its name."""
    files = {part: folder / f"{part}.json" for part in PARTS}
    return {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}


def publish(written: dict[str, Any], console: Console, folder: Path) -> None:
    """Show the goals and what was measured, on the screen and in goals.md."""
    figures = {part: result["figures"] for part, result in written.items()}
    columns = ["work", "against", "goal", "measured", ""]
    rows = []
    for goal in GOALS:
        ratio = goal.ratio(figures)
        wanted = f"{'≤' if goal.at_most else '≥'} {goal.limit:g}"
        met = "not measured" if ratio is None else "met" if goal.met(ratio) else "missed"
        rows.append([goal.work, goal.against, wanted, "" if ratio is None else f"{ratio:.2f}", met])
    colors = {"met": "green", "missed": "red", "not measured": "dim"}
    colored = [[*cells, f"[{colors[met]}]{met}[/]"] for *cells, met in rows]
    console.print(table(columns, colored, "OneBase's figure over the other", left=2))
    sources = [
        f"- {part}: {result['machine']['date']}, commit {result['machine']['commit']}, "
        f"{machine.sentence(result['machine'])} {_extent(result['options'])}"
        for part, result in written.items()
    ]
    for source in sources:
        console.print(source, soft_wrap=True)
    (folder / "goals.md").write_text(f"{markdown(columns, rows, left=2)}\n" + "\n".join(sources) + "\n")
    console.print(f"Written: {folder / 'goals.md'}", soft_wrap=True)


def _extent(options: dict[str, str]) -> str:
    """Return the extent of the measurement, which tells a look from figures to publish."""
    told = ("rounds", "sweep_rounds", "adapters", "requests", "steps", "repeats")
    return ", ".join(f"{name} {options[name]}" for name in told if name in options)


def _commands(options: argparse.Namespace, console: Console) -> tuple[dict[str, list[str]], list[str]]:
    """Return each part's script and options, and the peers that cannot be had, which are left out."""
    quick = options.quick
    serve = ["--install-peers", "--sweeps", "all", "--targets", "onebase,engine,peft,vllm,llama.cpp"]
    given = {
        "serve": [*serve, *(["--rounds", "1"] if quick else [])],
        "adapters": ["--adapters", "20", "--requests", "60"] if quick else [],
        "train": ["--steps", "6", "--repeats", "1"] if quick else [],
        "judges": ["--install-peers", *(["--judges", "5", "--rounds", "1"] if quick else [])],
    }
    missing = []
    for part, peer in (("adapters", "vllm"), ("train", "trl")):
        if part in options.only:
            try:
                given[part] += [f"--{peer}-python", str(installed(peer, console))]
            except PeerError as error:
                console.print(f"[red]{error}[/]")
                missing.append(peer)
    common = ["--output", str(options.output), *(["--busy"] if options.busy else [])]
    scripts = {part: [sys.executable, str(HERE / f"{part}.py")] for part in options.only}
    return {part: [*script, *given[part], *common] for part, script in scripts.items()}, missing


def _run(command: list[str]) -> bool:
    """Run a part to its end. Who ends this ends the part first, which stops all that it has started."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait() == 0
        except BaseException:
            process.terminate()
            process.wait()
            raise


def main(argv: Sequence[str]) -> int:
    """Return the exit status: 0 when every part measured all its targets, else 1. Missed goals are no
    failure."""
    asked = Options(__doc__)
    asked.add("--quick", action="store_true", help="one round, few adapters, few steps")
    known = ", ".join(PARTS)
    asked.add("--only", type=names(*PARTS), default=list(PARTS), help=f"comma-separated: {known}")
    asked.common("busy")
    asked.output("figures and plots")
    options = asked.parser.parse_args(argv)
    end_on_signals()
    console = Console()
    if torch.cuda.is_available():
        console.print(
            "[red]The peers that this installs are built for the CPU. On a GPU run serve.py, adapters.py and "
            "train.py, with a vLLM and a TRL of your own (--vllm-python, --trl-python).[/]"
        )
        return 1
    commands, failed = _commands(options, console)
    machine.demand_quiet(options.busy, console)
    for part, command in commands.items():
        console.rule(part)
        # What an earlier run left would be taken for this one's.
        (options.output / f"{part}.json").unlink(missing_ok=True)
        if not _run(command):
            failed.append(part)
    console.rule("goals")
    options.output.mkdir(parents=True, exist_ok=True)
    publish(read(options.output), console, options.output)
    if failed:
        console.print(f"[red]Not everything was measured: {', '.join(failed)}[/]")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
