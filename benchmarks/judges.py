#!/usr/bin/env python3
"""Time of many short judgements of one conversation: by activated LoRAs, by plain ones, and one by one.

The base has just answered in the conversation, whose keys and values are in its cache. Each judge is an
adapter of its own, asked for 1 to 16 tokens. In the engine itself, without HTTP, which costs all the same.

  python benchmarks/judges.py                                  # 20 judges, 2,000 tokens
  python benchmarks/judges.py --judges 4 --tokens 200 --busy   # a look
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from bench import engines, machine
from bench.command import Options, base_of
from bench.lora import make_adapters
from bench.report import markdown, table, write
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.messages import AdapterRef, Sampling, Submit

INVOCATION = [64, 65, 66]
LOWEST, HIGHEST = 100, 10_000
"""Token ids of conversations, which are random."""
MODES = {"aLoRA": ("alora", False), "LoRA": ("lora", False), "LoRA, one by one": ("lora", True)}
"""Kind of the adapters by the mode's name, and whether each judge waits for the one before."""


def judge(engine: Engine, kind: str, judges: int, text: list[int], *, apart: bool) -> dict[str, float]:
    """Return the seconds to all answers, and the tokens that were computed for them."""
    _ask(engine, [_submit("base", None, text, 1)])
    submits = [
        _submit(str(n), f"{kind}{n}", [*text, *INVOCATION], 1 + 15 * n // max(judges - 1, 1))
        for n in range(judges)
    ]
    before, started = _computed(engine), time.perf_counter()
    for some in [[one] for one in submits] if apart else [submits]:
        _ask(engine, some)
    return {"seconds": time.perf_counter() - started, "tokens": _computed(engine) - before}


def _submit(name: str, adapter: str | None, prompt: list[int], tokens: int) -> Submit:
    sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return Submit(
        id=name, prompt=prompt, sampling=sampling, adapters=[AdapterRef(adapter)] if adapter else []
    )


def _ask(engine: Engine, submits: list[Submit]) -> None:
    for _ in engines.outputs(engine, submits):
        pass


def _computed(engine: Engine) -> int:
    counters = engine.counters
    return counters.prompt_tokens - counters.cached_tokens + counters.generated_tokens


def adapters_of(base: Path, folder: Path, judges: int) -> dict[str, str]:
    """Write the same random adapters twice, as plain and as activated ones; return their folders by name."""
    found = {}
    for kind in ("lora", "alora"):
        for number, path in enumerate(make_adapters(base, folder / kind, judges).values()):
            config = path / "adapter_config.json"
            if kind == "alora":
                fields = json.loads(config.read_text())
                config.write_text(json.dumps(fields | {"alora_invocation_tokens": INVOCATION}))
            found[f"{kind}{number}"] = str(path)
    return found


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return the medians of each mode. Each conversation is another one, so that none is in the cache."""
    torch.set_num_threads(options.threads)
    draw = torch.Generator().manual_seed(options.seed)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in MODES}
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as folder:
        adapters = adapters_of(options.base, Path(folder), options.judges)
        engine = engines.load(options.base, adapters, 16, 0)
        for number in range(options.rounds + 1):
            for name, (kind, apart) in MODES.items():
                size = options.tokens if number else 32
                text = torch.randint(LOWEST, HIGHEST, (size,), generator=draw).tolist()
                found = judge(engine, kind, options.judges, text, apart=apart)
                if number:  # the first is a warm-up
                    runs[name].append(found)
    return {
        name: {key: median(one[key] for one in some) for key in ("seconds", "tokens")}
        for name, some in runs.items()
    }


def publish(figures: dict[str, Any], options: argparse.Namespace, described: dict[str, Any]) -> None:
    """Print the table; write judges.json and judges.md to the output folder."""
    columns = ["judges", "time to all answers", "tokens computed", "times aLoRA's time"]
    least = figures["aLoRA"]["seconds"]
    rows = [
        [name, f"{one['seconds']:.2f} s", f"{one['tokens']:,.0f}", f"{one['seconds'] / least:.1f}"]
        for name, one in figures.items()
    ]
    console = Console()
    title = f"{options.base.name}: {options.judges} judges of one conversation of {options.tokens:,} tokens"
    console.print(table(columns, rows, title))
    text = f"{title}.\n\n{markdown(columns, rows)}\n"
    write("judges", options, described, {"figures": figures}, text, console)


def main(argv: Sequence[str]) -> int:
    """Return the exit status."""
    asked = Options(__doc__)
    asked.common("base", "busy")
    asked.count("judges", 20, "adapters that judge")
    asked.count("tokens", 2000, "of the conversation")
    asked.count("rounds", 3, "measured rounds, of which the median counts")
    asked.threads()
    asked.seed("the conversations")
    asked.output("judges.json and judges.md")
    options = asked.parser.parse_args(argv)
    described = machine.describe()
    machine.demand_quiet(options.busy, Console())
    base_of(options)
    publish(measure(options), options, described)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
