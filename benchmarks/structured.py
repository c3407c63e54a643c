#!/usr/bin/env python3
"""Measures structured output on the engine: what a grammar costs a token in a mixed batch, that of tools too,
and what comes of the schemas of the JSON Schema Test Suite (drafts 7, 2019-09 and 2020-12) at temperature 1.

  python benchmarks/structured.py                   # 16 rows over 4 adapters, and 1,000 schemas
  python benchmarks/structured.py --schemas 100     # a look
  python benchmarks/structured.py --rounds 0 --corpus jsonschemabench/data --tokens 256   # of a folder

The suite comes with the source of the `jsonschema` package, which pip downloads once into the user's cache.
"""

from __future__ import annotations

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
import jsonschema_specifications
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer

from bench import machine
from bench.command import Options
from bench.engines import load, load_tokenizer
from bench.lora import make_adapters
from bench.report import table
from onebase_engine.base.default_base import fetch_default_base
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.messages import AdapterRef, Grammar, Sampling, Submit
from onebase_engine.user_cache import default_cache
from onebase_server.inference.json_schema import closed
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.inference.tool_format import ToolChoice, ToolDefinition

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
    """A schema, and the draft that it is of: the class that validates it."""

    name: str
    schema: Any
    draft: Any

    @property
    def grammar(self) -> Grammar:
        """Return the grammar as the server asks for it."""
        schema = closed(self.schema) if isinstance(self.schema, dict) else self.schema
        return Grammar("json_schema", json.dumps(schema))


def suite(folder: Path) -> list[Case]:
    """Return all schemas of the suite but those of keywords that are optional."""
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
                    Case(f"{parts[3]}/{parts[4]}: {one['description']}", one["schema"], DRAFTS[parts[3]])
                    for one in groups
                ]
    return cases


def corpus(folder: Path) -> list[Case]:
    """Return all JSON files in a folder and those below it, each a schema."""
    cases = []
    for file in sorted(folder.rglob("*.json")):
        schema = json.loads(file.read_text("utf-8"))
        draft = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        cases.append(Case(str(file.relative_to(folder)), schema, draft))
    return cases


def speed(engine: Engine, prompt: list[int], grammar: Grammar | None, guided: int, least: int = 0) -> float:
    """Return tokens a second of ROWS rows over ADAPTERS adapters, the first `guided` under the grammar.

    While all run: what a grammar forces comes several tokens a step, and fewer rows are slower a token.

    least: tokens before which no row ends, by min_tokens, which takes time too; 0: the grammar has no end,
    and other rows pass over theirs.
    """
    for row in range(ROWS):
        endless = not least and row >= guided
        sampling = Sampling(
            temperature=1.0, seed=row, max_tokens=TOKENS, min_tokens=least, ignore_eos=endless
        )
        engine.submit(
            Submit(
                id=str(row),
                prompt=[*prompt, row],
                sampling=sampling,
                adapters=[AdapterRef(f"a{row % ADAPTERS}")],
                grammar=grammar if row < guided else None,
            )
        )
    tokens, started, ended = 0, 0.0, 0.0
    while engine.busy:
        engine.step()
        outputs = engine.take_outputs()
        if ended:
            continue
        if outputs and not started:
            started = time.perf_counter()  # prompts and compiling are over
            continue
        tokens += sum(len(output.tokens) for output in outputs)
        if any(output.finish for output in outputs):
            ended = time.perf_counter()
    return tokens / (ended - started)


@dataclass
class Outcomes:
    """Outcomes of schemas: how many are `valid`, `invalid`, `cut` by the limit of tokens, or have the reason
    of a refusal. wrong: the texts that do not match their schema."""

    found: Counter[str]
    wrong: list[str]
    tokens: int = 0
    seconds: float = 0.0


def outcomes(
    engine: Engine, tokenizer: Tokenizer, prompt: list[int], cases: list[Case], most: int
) -> Outcomes:
    """Return the outcomes of one sequence for each case, of `most` tokens at most."""
    made = Outcomes(Counter(), [])
    texts: dict[str, list[int]] = {}
    waiting = list(enumerate(cases))
    with_bar = track(waiting, "schemas", console=Console(stderr=True))
    started = time.perf_counter()
    for number, case in with_bar:
        sampling = Sampling(temperature=1.0, seed=number, max_tokens=most)
        engine.submit(Submit(id=str(number), prompt=prompt, sampling=sampling, grammar=case.grammar))
        last = number == len(cases) - 1
        while engine.busy and (last or len(engine.scheduler.running) + len(engine.scheduler.waiting) >= 32):
            engine.step()
            for output in engine.take_outputs():
                texts.setdefault(output.id, []).extend(output.tokens)
                made.tokens += len(output.tokens)
                if output.finish is not None:
                    one = cases[int(output.id)]
                    end = output.finish if output.finish != "error" else f"refused: {output.error_message}"
                    text = tokenizer.decode(texts.pop(output.id), skip_special_tokens=True)
                    outcome = judged(one, end, text)
                    made.found[outcome] += 1
                    if outcome in ("invalid", "no JSON"):
                        made.wrong.append(f"{outcome}: {one.name}: {text!r}")
    made.seconds = time.perf_counter() - started
    return made


def judged(case: Case, end: str, text: str) -> str:
    if end != "stop":
        return "cut" if end == "length" else end
    try:
        value = json.loads(text)
    except ValueError:
        return "no JSON"
    known = {"registry": jsonschema_specifications.REGISTRY, "format_checker": case.draft.FORMAT_CHECKER}
    try:
        return "valid" if case.draft(case.schema, **known).is_valid(value) else "invalid"
    except Exception as error:
        return f"not judged: {type(error).__name__}"


def main() -> None:
    asked = Options(__doc__)
    asked.count("schemas", 1000, "how many of them")
    asked.add("--corpus", type=Path, help="a folder of schemas, such as data/ of JSONSchemaBench")
    asked.count("tokens", 200, "of a text, at most")
    asked.add("--rounds", type=int, default=5, help="of the cost, in turns, 0: none (default: 5)")
    asked.common("busy")
    options = asked.parser.parse_args()
    console = Console()
    machine.demand_quiet(options.busy, console)
    base = fetch_default_base()
    tokenizer = load_tokenizer(base)
    prompt = tokenizer.encode(PROMPT).ids
    with tempfile.TemporaryDirectory() as folder:
        adapters = {name: str(path) for name, path in make_adapters(base, Path(folder), ADAPTERS).items()}
        engine = load(base, adapters, 16, 0)
    if options.rounds:
        show_cost(console, engine, base, prompt, options.rounds)
    cases = corpus(options.corpus) if options.corpus else suite(default_cache() / "json-schema-test-suite")
    chosen = random.Random(0).sample(cases, min(options.schemas, len(cases)))
    made = outcomes(engine, tokenizer, prompt, chosen, options.tokens)
    refused = Counter({end: count for end, count in made.found.items() if end.startswith("refused")})
    rows = [[end, str(count)] for end, count in (made.found - refused).most_common()]
    rows.append(["refused", str(refused.total())])
    console.print(table(["outcome", "schemas"], rows, f"{len(chosen)} of {len(cases)} schemas"))
    rate = made.tokens / made.seconds
    console.print(f"{made.tokens} tokens, {rate:.0f} a second with compiling, up to 32 rows at once")
    for text in made.wrong:
        console.print(text, highlight=False, markup=False)
    for reason, count in refused.most_common(10):
        console.print(f"{count:5} {reason}", highlight=False)


def show_cost(console: Console, engine: Engine, base: Path, prompt: list[int], rounds: int) -> None:
    schema = Grammar("json_schema", json.dumps(ENDLESS))
    auto, call = tools(base, "auto"), tools(base, "required")
    half, kept = ROWS // 2, "none, with min_tokens"
    # Rows with tools may end at any time: they are compared with others that are kept from it alike.
    cases: dict[str, tuple[str, Grammar | None, int, int]] = {
        "none": ("none", None, 0, 0),
        f"{half} of {ROWS} under a schema": ("none", schema, half, 0),
        f"{ROWS} of {ROWS} under a schema": ("none", schema, ROWS, 0),
        f"{ROWS} of {ROWS} in a call of a tool": ("none", call, ROWS, 0),
        kept: (kept, None, 0, TOKENS),
        f"{half} of {ROWS} with tools, in text": (kept, auto, half, TOKENS),
        f"{ROWS} of {ROWS} with tools, in text": (kept, auto, ROWS, TOKENS),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in track(range(rounds + 1), "cost", console=Console(stderr=True)):
        for name, (_, grammar, guided, least) in cases.items():
            measured = speed(engine, prompt, grammar, guided, least)
            times[name] += [measured] if number else []  # the first round compiles
    rows = []
    for name, found in times.items():
        ratios = [one / plain for one, plain in zip(found, times[cases[name][0]], strict=True)]
        rows.append([name, f"{statistics.median(found):.0f}", f"{statistics.median(ratios):.3f}"])
    console.print(table(["rows", "tokens/s", "to none"], rows, f"{ROWS} rows over {ADAPTERS} adapters"))


def tools(base: Path, choice: ToolChoice) -> Grammar:
    """Return the grammar of one tool with endless arguments, as the server makes it of the base's
    template."""
    format = BaseTokenizer(str(base)).tool_format
    if format is None:
        raise RuntimeError("the default base's chat template knows tools")
    schema = {"type": "object", "properties": {"people": ENDLESS}, "required": ["people"]}
    return format.grammar({"add": ToolDefinition("add", schema)}, choice, parallel=True)


if __name__ == "__main__":
    main()
