#!/usr/bin/env python3
"""Measures training: OneBase next to TRL's SFTTrainer, in one run, the targets in turn and each alone.

Both train a LoRA adapter on the same NF4 base: the same tokenized rows in the same steps, the same learning
rates, adapters in fp32. Then one plain evaluation gives the held-out loss of what each has saved.

  python benchmarks/train.py --trl-python /tmp/trl/bin/python      # against TRL
  python benchmarks/train.py --targets onebase --repeats 1         # a quick look
  python benchmarks/train.py --beside 0,0.2,1                      # what serving notices of a job
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import machine
from bench.beside import Load, measure_beside, write_beside
from bench.processes import StartError, end_on_signals
from bench.targets import Setup
from bench.training import (
    ONEBASE,
    WARM_UP,
    TrainRun,
    TrainTask,
    held_out_losses,
    run_target,
    summarize_training,
)
from bench.training_report import rich_table, rows_of, training_markdown
from bench.workload import Prompts
from train_trl import VARIANTS

DATA = Path(__file__).parent.parent / "examples" / "data"


@dataclass
class Bench:
    """One invocation. tokens: real ones of each step, the same for all targets."""

    options: argparse.Namespace
    device: str
    console: Console
    folder: Path
    tokens: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    runs: list[TrainRun] = field(default_factory=list)
    held_out: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def prepare(self) -> None:
        """Tokenize the rows once, as OneBase does, in the order in which its run takes them."""
        from transformers import AutoTokenizer

        from onebase_training.batches import step_rows
        from onebase_training.data.reader import load_dataset
        from onebase_training.loop import learning_rate
        from onebase_training.recipe import Recipe

        options = self.options
        tokenizer: Any = AutoTokenizer.from_pretrained(options.base, local_files_only=True)
        recipe = Recipe(max_length=options.max_length)
        train = load_dataset(options.data, tokenizer, recipe).rows
        steps = [step_rows(len(train), options.batch, step, options.seed) for step in range(options.steps)]
        if any(len(step) < options.batch for step in steps):
            raise ValueError(
                f"{options.data} has {len(train)} rows: too few for {options.steps} steps of {options.batch}"
            )
        self.tokens = [sum(len(train[row]) for row in step) for step in steps]
        self.rates = [
            learning_rate(step, options.steps, options.learning_rate, "cosine", options.warmup_ratio)
            for step in range(options.steps)
        ]
        ordered = [_plain(train[row]) for step in steps for row in step]
        (self.folder / "train.json").write_text(json.dumps(ordered))
        held_out = load_dataset(options.held_out, tokenizer, recipe, part="eval").rows
        (self.folder / "held_out.json").write_text(json.dumps([_plain(row) for row in held_out]))

    def measure(self) -> None:
        """All repeats; a target that fails is left out of those that follow."""
        options = self.options
        for repeat in range(1, options.repeats + 1):
            for target in options.targets:
                if target in self.failed:
                    continue
                self.console.print(f"repeat {repeat} of {options.repeats}: [bold]{target}[/]")
                try:
                    run = run_target(
                        target,
                        repeat,
                        self._task(target, repeat),
                        options.trl_python,
                        self._environment(),
                        options.run_timeout,
                    )
                except StartError as error:
                    self.failed.append(target)
                    self.console.print(f"[red]{target} failed:[/]", error)
                    continue
                self.runs.append(run)
                self.console.print(f"  {run.tokens_per_second(self.tokens):.0f} tokens/s")

    def evaluate(self) -> None:
        """The held-out loss of every adapter that was saved."""
        with self.console.status("evaluating on held-out rows"):
            self.held_out = held_out_losses(
                self.options.base,
                self.device,
                self.options.threads,
                self.folder / "held_out.json",
                [run.adapter for run in self.runs],
                self.folder / "evaluation.log",
                self.options.run_timeout,
            )

    def publish(self, described: dict[str, Any]) -> None:
        """Prints the table; writes train.json and train.md to the output folder."""
        figures = summarize_training(self.runs, self.tokens, self.held_out)
        rows = rows_of(figures, self.options.targets[0])
        title = (
            f"{self.options.base.name}, r={self.options.rank}, {self.options.batch} rows a step of "
            f"{sum(self.tokens) / len(self.tokens):.0f} tokens, {self.options.steps} steps"
        )
        self.console.print(rich_table(rows, title))
        note = f"held-out loss of the base: {self.held_out['']:.4f} nats a supervised token"
        self.console.print(note)
        folder: Path = self.options.output
        folder.mkdir(parents=True, exist_ok=True)
        result = {
            "machine": described,
            "options": {name: str(value) for name, value in vars(self.options).items()},
            "tokens": self.tokens,
            "base_held_out": self.held_out[""],
            "figures": {name: asdict(one) for name, one in figures.items()},
            "runs": [asdict(run) for run in self.runs],
            "failed": self.failed,
        }
        (folder / "train.json").write_text(json.dumps(result, indent=1))
        text = f"{machine.sentence(described)}\n\n{title}.\n\n{training_markdown(rows)}\n{note}\n"
        (folder / "train.md").write_text(text)
        self.console.print(f"Written: {folder / 'train.json'}, {folder / 'train.md'}")

    def _task(self, target: str, repeat: int) -> TrainTask:
        options = self.options
        return TrainTask(
            base=str(options.base),
            device=self.device,
            threads=options.threads,
            data=str(options.data.resolve()),
            rows=str(self.folder / "train.json"),
            steps=options.steps,
            batch=options.batch,
            rates=self.rates,
            warmup_ratio=options.warmup_ratio,
            rank=options.rank,
            alpha=2 * options.rank,
            targets=options.lora_targets,
            max_length=options.max_length,
            seed=options.seed,
            variant=target,
            out=str(self.folder / f"{target}-{repeat}"),
        )

    def _environment(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.options.threads), "TOKENIZERS_PARALLELISM": "false"}


def _plain(row: Any) -> dict[str, list[int]]:
    ids = row.ids.tolist()
    labels = [token if wanted else -100 for token, wanted in zip(ids, row.supervised, strict=True)]
    return {"input_ids": ids, "labels": labels}


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = (ONEBASE, *VARIANTS)
    if not names or not set(names) <= set(known):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(known)}")
    return names


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers from 0 to 1, as in 0,0.2,1")
    return shares


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--targets", type=_names, help=f"comma-separated: {ONEBASE}, {', '.join(VARIANTS)}")
    add("--trl-python", type=Path, help="the python of a virtual environment that has TRL and bitsandbytes")
    add("--base", type=Path, help="folder of a base model (default: the small default base)")
    add("--data", type=Path, default=DATA / "orders.train.jsonl", help="rows to train on")
    add("--held-out", type=Path, default=DATA / "orders.heldout.jsonl", help="rows to evaluate on")
    add("--steps", type=int, default=20, help=f"steps of a run, {WARM_UP} of them a warm-up (default: 20)")
    add("--batch", type=int, default=16, help="rows of a step (default: 16)")
    add("--rank", type=int, default=16, help="of the adapter; alpha is twice that (default: 16)")
    add("--lora-targets", default="all-linear", help="all-linear, or names of layers (default: all-linear)")
    add("--learning-rate", type=float, default=5e-4, help="at the end of the warm-up (default: 5e-4)")
    add("--warmup-ratio", type=float, default=0.1, help="part of the steps in which it rises (default: 0.1)")
    add("--max-length", type=int, default=1024, help="tokens of the longest row (default: 1024)")
    add("--repeats", type=int, default=2, help="how often each target is run (default: 2)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: a GPU if there is one")
    add("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of each target (default: all)")
    add("--seed", type=int, default=0, help="of the adapter and the order of rows (default: 0)")
    add(
        "--beside", type=_shares, metavar="SHARES", help="measure serving beside a job, at these train shares"
    )
    add("--streams", type=int, default=4, help="streams at the same time beside a job (default: 4)")
    add("--requests", type=int, default=4, help="requests of each, one after the other (default: 4)")
    add("--tokens", type=int, default=64, help="tokens of each of these (default: 64)")
    add("--run-timeout", type=float, default=1800, help="seconds for one run of one target (default: 1800)")
    add("--busy", action="store_true", help="measure although other work runs on this machine")
    add("--output", type=Path, default=Path("benchmarks/results"), help="folder for train.json and train.md")
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    options = parser.parse_args(argv)
    if options.targets is None and options.beside:
        options.targets = []
    elif options.targets is None:
        options.targets = [ONEBASE, *(["trl", "trl-checkpointing"] if options.trl_python else [])]
    if set(options.targets) - {ONEBASE} and options.trl_python is None:
        parser.error("TRL's targets need --trl-python")
    if options.steps <= WARM_UP:
        parser.error(f"--steps must be more than the {WARM_UP} of the warm-up")
    for name in ("batch", "rank", "repeats", "threads", "streams", "requests", "tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.lora_targets != "all-linear":
        options.lora_targets = [name.strip() for name in options.lora_targets.split(",")]
    return options


def _device(asked: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 when every target was measured, else 1."""
    options = _parse(argv)
    end_on_signals()
    console = Console()
    described = machine.describe(None, options.trl_python)
    machine.demand_quiet(options.busy, console)
    if options.base is None:
        from onebase_engine.base.default_base import fetch_default_base

        options.base = fetch_default_base()
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as folder:
        bench = Bench(options, _device(options.device), console, Path(folder))
        if options.targets:
            bench.prepare()
            try:
                bench.measure()
            finally:
                if bench.runs:
                    bench.evaluate()
                    bench.publish(described)
        if options.beside:
            setup = Setup(options.base, {}, options.rank, options.threads)
            load = Load(options.streams, options.requests, options.tokens)
            prompts = Prompts(options.base, 85, options.seed)
            found = measure_beside(setup, load, prompts, options.data, options.beside, bench.folder, console)
            bench.failed += [f"share {share:g}" for share in options.beside if share not in found]
            write_beside(found, load, described, options.output, console)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
