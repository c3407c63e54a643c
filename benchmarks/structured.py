#!/usr/bin/env python3
"""Measures structured output on the engine: what a grammar costs a token in a mixed batch, and what comes of
the schemas of the JSON Schema Test Suite (drafts 7, 2019-09 and 2020-12) at temperature 1.

  python benchmarks/structured.py                   # 16 rows over 4 adapters, and 1,000 schemas
  python benchmarks/structured.py --schemas 100     # a look

The suite comes with the source of the `jsonschema` package, which pip downloads once into the user's cache.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer

from bench import machine
from bench.engine_worker import load
from bench.lora import make_adapters
from onebase_engine.base.default_base import default_cache, fetch_default_base
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.messages import AdapterRef, Grammar, Sampling, Submit

SUITE = "jsonschema==4.26.0"
DRAFTS = {
    "draft7": jsonschema.Draft7Validator,
    "draft2019-09": jsonschema.Draft201909Validator,
    "draft2020-12": jsonschema.Draft202012Validator,
}
ROWS, ADAPTERS, TOKENS = 16, 4, 64
ENDLESS = {
    "type": "array",
    "minItems": 100_000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "kind": {"enum": ["a", "b"]}},
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
}
"""No row ends before its last token."""
PROMPT = "Write some JSON about the people of a small town:\n"


@dataclass(frozen=True)
class Case:
    """A schema of the suite."""

    draft: str
    name: str
    schema: Any

    @property
    def grammar(self) -> Grammar:
        return Grammar("json_schema", json.dumps(self.schema))


def suite(folder: Path) -> list[Case]:
    """All schemas of the suite but those of keywords that are optional."""
    archives = list(folder.glob("*.tar.gz"))
    if not archives:
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(folder), SUITE], check=True)
        archives = list(folder.glob("*.tar.gz"))
    cases: list[Case] = []
    with tarfile.open(archives[0]) as archive:
        for member in archive:
            parts = member.name.split("/")
            if parts[1:3] == ["json", "tests"] and len(parts) == 5 and parts[3] in DRAFTS:
                file = archive.extractfile(member)
                groups = json.load(file) if file is not None else []
                cases += [
                    Case(parts[3], f"{parts[4]}: {one['description']}", one["schema"]) for one in groups
                ]
    return cases


def speed(engine: Engine, prompt: list[int], guided: int) -> float:
    """Tokens a second of ROWS rows over ADAPTERS adapters, the first `guided` of which follow a schema."""
    grammar = Grammar("json_schema", json.dumps(ENDLESS))
    for row in range(ROWS):
        sampling = Sampling(temperature=1.0, seed=row, max_tokens=TOKENS, ignore_eos=row >= guided)
        engine.submit(
            Submit(
                id=str(row),
                prompt=[*prompt, row],
                sampling=sampling,
                adapters=[AdapterRef(f"a{row % ADAPTERS}")],
                grammar=grammar if row < guided else None,
            )
        )
    tokens, started = 0, 0.0
    while engine.busy:
        engine.step()
        outputs = engine.take_outputs()
        if outputs and not started:
            started = time.perf_counter()  # prompts and compiling are over
            continue
        tokens += sum(len(output.tokens) for output in outputs)
    return tokens / (time.perf_counter() - started)


def outcomes(
    engine: Engine, tokenizer: Tokenizer, prompt: list[int], cases: list[Case]
) -> tuple[Counter[str], list[str]]:
    """What came of each: `valid`, `invalid`, `cut` by the limit of tokens, or the reason of a refusal.

    And the texts that do not keep to their schema.
    """
    found: Counter[str] = Counter()
    wrong: list[str] = []
    texts: dict[str, list[int]] = {}
    waiting = list(enumerate(cases))
    with_bar = track(waiting, "schemas", console=Console(stderr=True))
    for number, case in with_bar:
        sampling = Sampling(temperature=1.0, seed=number, max_tokens=200)
        engine.submit(Submit(id=str(number), prompt=prompt, sampling=sampling, grammar=case.grammar))
        last = number == len(cases) - 1
        while engine.busy and (last or len(engine.scheduler.running) + len(engine.scheduler.waiting) >= 32):
            engine.step()
            for output in engine.take_outputs():
                texts.setdefault(output.id, []).extend(output.tokens)
                if output.finish is not None:
                    one = cases[int(output.id)]
                    end = output.finish if output.finish != "error" else f"refused: {output.error_message}"
                    text = tokenizer.decode(texts.pop(output.id), skip_special_tokens=True)
                    outcome = judged(one, end, text)
                    found[outcome] += 1
                    if outcome in ("invalid", "no JSON"):
                        wrong.append(f"{outcome}: {one.draft}/{one.name}: {text!r}")
    return found, wrong


def judged(case: Case, end: str, text: str) -> str:
    if end != "stop":
        return "cut" if end == "length" else end
    try:
        value = json.loads(text)
    except ValueError:
        return "no JSON"
    try:
        return "valid" if DRAFTS[case.draft](case.schema).is_valid(value) else "invalid"
    except Exception as error:
        return f"not judged: {type(error).__name__}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemas", type=int, default=1000, help="how many of the suite (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="of the cost, in turns (default: 5)")
    parser.add_argument("--busy", action="store_true", help="measure although other processes compute")
    options = parser.parse_args()
    console = Console()
    machine.demand_quiet(options.busy, console)
    base = fetch_default_base()
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    with tempfile.TemporaryDirectory() as folder:
        adapters = {name: str(path) for name, path in make_adapters(base, Path(folder), ADAPTERS).items()}
        engine = load(str(base), adapters, 16, 0)
    show_cost(console, engine, prompt, options.rounds)
    cases = suite(default_cache() / "json-schema-test-suite")
    chosen = random.Random(0).sample(cases, min(options.schemas, len(cases)))
    found, wrong = outcomes(engine, tokenizer, prompt, chosen)
    table = Table("outcome", "schemas", title=f"{len(chosen)} of {len(cases)} schemas")
    refused = {reason: count for reason, count in found.items() if reason.startswith("refused")}
    for outcome in sorted(found.keys() - refused.keys(), key=lambda one: -found[one]):
        table.add_row(outcome, str(found[outcome]))
    table.add_row("refused", str(sum(refused.values())))
    console.print(table)
    for text in wrong:
        console.print(text, highlight=False, markup=False)
    for reason, count in sorted(refused.items(), key=lambda item: -item[1])[:10]:
        console.print(f"{count:5} {reason}", highlight=False)


def show_cost(console: Console, engine: Engine, prompt: list[int], rounds: int) -> None:
    speed(engine, prompt, ROWS)
    times: dict[int, list[float]] = {0: [], ROWS // 2: [], ROWS: []}
    for _ in track(range(rounds), "cost", console=Console(stderr=True)):
        for guided, found in times.items():
            found.append(speed(engine, prompt, guided))
    table = Table("rows under a schema", "tokens/s", "to none", title=f"{ROWS} rows over {ADAPTERS} adapters")
    for guided, found in times.items():
        ratios = [one / plain for one, plain in zip(found, times[0], strict=True)]
        table.add_row(
            f"{guided} of {ROWS}", f"{statistics.median(found):.0f}", f"{statistics.median(ratios):.3f}"
        )
    console.print(table)


if __name__ == "__main__":
    main()
