#!/usr/bin/env python3
"""Measures training: OneBase next to TRL's SFTTrainer, in one run, the targets in turn and each alone.

Both train a LoRA adapter on the same NF4 base: the same tokenized rows in the same steps, the same learning
rates, adapters in fp32. Then one plain evaluation gives the held-out loss of what each has saved.

  python benchmarks/train.py --trl-python /tmp/trl/bin/python      # against TRL
  python benchmarks/train.py --targets onebase --repeats 1         # a quick look
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import machine, training
from bench.command import Options, base_of, names
from bench.processes import StartError, end_on_signals
from bench.report import markdown, table, write
from bench.worker import call

DATA = Path(__file__).parent.parent / "examples" / "data"
RUN_SECONDS = 1800.0
"""Limit of one run of one target, in seconds."""


@dataclass
class Bench:
    """One invocation. tokens: real ones of each step, the same for all targets."""

    options: argparse.Namespace
    console: Console
    folder: Path
    tokens: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    runs: list[training.TrainRun] = field(default_factory=list)
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
        recipe = Recipe(max_length=training.MAX_LENGTH)
        train = load_dataset(options.data, tokenizer, recipe).rows
        steps = [step_rows(len(train), options.batch, step, options.seed) for step in range(options.steps)]
        if any(len(step) < options.batch for step in steps):
            raise ValueError(
                f"{options.data} has {len(train)} rows: too few for {options.steps} steps of {options.batch}"
            )
        self.tokens = [sum(len(train[row]) for row in step) for step in steps]
        self.rates = [
            learning_rate(step, options.steps, training.LEARNING_RATE, "cosine", training.WARMUP_RATIO)
            for step in range(options.steps)
        ]
        ordered = [_plain(train[row]) for step in steps for row in step]
        (self.folder / "train.json").write_text(json.dumps(ordered))
        held_out = load_dataset(options.held_out, tokenizer, recipe, part="eval").rows
        (self.folder / "held_out.json").write_text(json.dumps([_plain(row) for row in held_out]))

    def measure(self) -> None:
        """Run all repeats; a target that fails is left out of those that follow."""
        options = self.options
        for repeat in range(1, options.repeats + 1):
            for target in options.targets:
                if target in self.failed:
                    continue
                self.console.print(f"repeat {repeat} of {options.repeats}: [bold]{target}[/]")
                try:
                    run = training.run_target(
                        repeat, self._task(target, repeat), options.trl_python, RUN_SECONDS
                    )
                except StartError as error:
                    self.failed.append(target)
                    self.console.print(f"[red]{target} failed:[/]", error)
                    continue
                self.runs.append(run)
                self.console.print(f"  {run.tokens_per_second(self.tokens):.0f} tokens/s")

    def _task(self, target: str, repeat: int) -> training.TrainTask:
        options = self.options
        return training.TrainTask(
            base=str(options.base),
            threads=options.threads,
            data=str(options.data.resolve()),
            rows=str(self.folder / "train.json"),
            steps=options.steps,
            batch=options.batch,
            rates=self.rates,
            rank=options.rank,
            seed=options.seed,
            variant=target,
            out=str(self.folder / f"{target}-{repeat}"),
        )

    def _held_out(self) -> dict[str, float]:
        """Return the held-out loss of every adapter that was saved and of the base, by one plain code."""
        keywords = {
            "base": str(self.options.base),
            "threads": self.options.threads,
            "rows": str(self.folder / "held_out.json"),
            "adapters": [run.adapter for run in self.runs],
        }
        with self.console.status("evaluating on held-out rows"):
            log = self.folder / "evaluation.log"
            losses: dict[str, float] = call("bench.peft_nf4:losses", keywords, log, RUN_SECONDS)
        return losses

    def publish(self, described: dict[str, Any]) -> None:
        """Print the table; write train.json and train.md to the output folder."""
        options, held_out = self.options, self._held_out()
        figures = training.summarize_training(self.runs, self.tokens, held_out)
        rows = training.rows_of(figures, options.targets[0])
        mean = sum(self.tokens) / len(self.tokens)
        title = f"{options.base.name}, r={options.rank}, {options.batch} rows a step of {mean:.0f} tokens, "
        title += f"{options.steps} steps"
        note = f"held-out loss of the base: {held_out['']:.4f} nats a supervised token"
        self.console.print(table(training.COLUMNS, rows, title), note)
        result = {
            "tokens": self.tokens,
            "base_held_out": held_out[""],
            "figures": {name: asdict(one) for name, one in figures.items()},
            "runs": [asdict(run) for run in self.runs],
            "failed": self.failed,
        }
        text = f"{title}.\n\n{markdown(training.COLUMNS, rows)}\n{note}\n"
        write("train", options, described, result, text, self.console)


def _plain(row: Any) -> dict[str, list[int]]:
    ids = row.ids.tolist()
    labels = [token if wanted else -100 for token, wanted in zip(ids, row.supervised, strict=True)]
    return {"input_ids": ids, "labels": labels}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    options = Options(__doc__)
    add = options.add
    known = (training.ONEBASE, *training.VARIANTS)
    add("--targets", type=names(*known), help=f"comma-separated: {', '.join(known)}")
    add("--trl-python", type=Path, help="the python of a virtual environment that has TRL and bitsandbytes")
    options.common("base", "busy")
    add("--data", type=Path, default=DATA / "orders.train.jsonl", help="rows to train on")
    add("--held-out", type=Path, default=DATA / "orders.heldout.jsonl", help="rows to evaluate on")
    options.count("steps", 20, f"steps of a run, {training.WARM_UP} of them a warm-up")
    options.count("batch", 16, "rows of a step")
    options.count("rank", 16, "of the adapter; alpha is twice that")
    options.count("repeats", 2, "how often each target is run")
    options.threads()
    options.seed("the adapter and the order of rows")
    options.output("train.json and train.md")
    given = options.parser.parse_args(argv)
    if given.targets is None:
        trl = ["trl", "trl-checkpointing"] if given.trl_python else []
        given.targets = [training.ONEBASE, *trl]
    if set(given.targets) - {training.ONEBASE} and given.trl_python is None:
        options.parser.error("TRL's targets need --trl-python")
    if given.steps <= training.WARM_UP:
        options.parser.error(f"--steps must be more than the {training.WARM_UP} of the warm-up")
    return given


def main(argv: Sequence[str]) -> int:
    """Return the exit status: 0 when every target was measured, else 1."""
    options = _parse(argv)
    end_on_signals()
    console = Console()
    described = machine.describe(trl_python=options.trl_python)
    machine.demand_quiet(options.busy, console)
    base_of(options)
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as folder:
        bench = Bench(options, console, Path(folder))
        bench.prepare()
        try:
            bench.measure()
        finally:
            if bench.runs:
                bench.publish(described)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
