#!/usr/bin/env python3
"""Measures llguidance next to XGrammar on the CPU: what it takes to compile the schemas of MaskBench
(`maskbench/data` of guidance-ai/jsonschemabench), and to compute the mask of each token of a text that keeps
to them.

  pip install xgrammar                             # into an environment that has onebase[server]
  python benchmarks/grammar_libraries.py jsonschemabench/maskbench/data --schemas 300

Each library has one thread, and a process of its own that is ended where a schema takes over five seconds.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from bench.command import Options
from bench.report import table
from bench.worker import started
from onebase_engine.base.default_base import fetch_default_base
from onebase_engine.engine.grammar_link import WHITESPACE
from onebase_server.inference.json_schema import closed

PATIENCE = 5.0
Mask = Callable[[], None]
Accept = Callable[[int], bool]


def llguidance_matchers(folder: Path) -> Callable[[Any], tuple[Mask, Accept]]:
    import llguidance
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    from onebase_engine.engine.grammar_process import load_tokenizer

    config = json.loads((folder / "config.json").read_text())
    tokenizer = load_tokenizer(folder, config["vocab_size"], [config["eos_token_id"]])
    bitmask = allocate_token_bitmask(1, config["vocab_size"])

    def compiled(schema: Any) -> tuple[Mask, Accept]:
        make = llguidance.LLMatcher.grammar_from_json_schema
        grammar = make(json.dumps(closed(schema)), defaults={"whitespace_pattern": WHITESPACE})
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return lambda: fill_next_token_bitmask(matcher, bitmask, 0), matcher.consume_token

    return compiled


def xgrammar_matchers(folder: Path) -> Callable[[Any], tuple[Mask, Accept]]:
    import xgrammar  # type: ignore[import-not-found,unused-ignore]
    from transformers import AutoTokenizer

    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=config["vocab_size"])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    bitmask = xgrammar.allocate_token_bitmask(1, config["vocab_size"])

    def compiled(schema: Any) -> tuple[Mask, Accept]:
        grammar = compiler.compile_json_schema(
            json.dumps(schema), any_whitespace=False, separators=(", ", ": "), strict_mode=True
        )
        matcher = xgrammar.GrammarMatcher(grammar)
        return lambda: matcher.fill_next_token_bitmask(bitmask), matcher.accept_token

    return compiled


LIBRARIES = {"llguidance": llguidance_matchers, "xgrammar": xgrammar_matchers}


def answering(library: str, folder: str) -> Callable[[tuple[Any, list[int]]], dict[str, Any]]:
    """Return what answers a schema and tokens with times in seconds, or why there are none: a worker's
    function."""
    compiled = LIBRARIES[library](Path(folder))

    def answer(asked: tuple[Any, list[int]]) -> dict[str, Any]:
        schema, tokens = asked
        found: dict[str, Any] = {"masks": [], "end": "followed"}
        try:
            begun = time.perf_counter()
            mask, accept = compiled(schema)
            mask()
            found["compile"] = time.perf_counter() - begun
            for token in tokens:
                begun = time.perf_counter()
                mask()
                found["masks"].append(time.perf_counter() - begun)
                if not accept(token):
                    found["end"] = "refused a text that is valid"
                    break
        except Exception as error:
            found["end"] = "refused the schema" if "compile" not in found else f"failed: {error}"
        return found

    return answer


async def measure(
    library: str, base: Path, cases: Sequence[tuple[Any, list[int]]], log: Path
) -> list[dict[str, Any]]:
    """Return the answer to each case. A process that takes too long for one, or ends, is started again."""
    found: list[dict[str, Any]] = []
    waiting = iter(track(cases, library, console=Console(stderr=True)))
    while len(found) < len(cases):
        keywords = {"library": library, "folder": str(base)}
        async with started("grammar_libraries:answering", keywords, log) as worker:
            for case in waiting:
                try:
                    found.append(await asyncio.wait_for(worker.ask(case), PATIENCE))
                    continue
                except TimeoutError:
                    end = f"took more than {PATIENCE:.0f} s"
                except (EOFError, OSError):
                    end = "ended its process"
                found.append({"end": end, "masks": []})
                break
    return found


def main() -> None:
    from tokenizers import Tokenizer

    asked = Options(__doc__)
    asked.add("data", type=Path, help="MaskBench's folder of schemas with texts")
    asked.count("schemas", 300, "how many of them")
    options = asked.parser.parse_args()
    base = fetch_default_base()
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    files = sorted(options.data.glob("*.json"))
    cases = []
    for file in random.Random(0).sample(files, min(options.schemas, len(files))):
        case = json.loads(file.read_text())
        texts = [test["data"] for test in case.get("tests", []) if test["valid"]]
        text = json.dumps(texts[0], ensure_ascii=False) if texts else ""
        cases.append((case["schema"], tokenizer.encode(text).ids[:500]))
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as folder:
        shown = [
            figures(library, asyncio.run(measure(library, base, cases, Path(folder) / library)))
            for library in LIBRARIES
        ]
    names = dict.fromkeys(name for rows in shown for name in rows)
    rows = [[name, *(one.get(name, "0") for one in shown)] for name in names]
    Console().print(table(["", *LIBRARIES], rows, f"{len(cases)} schemas"))


def figures(library: str, results: list[dict[str, Any]]) -> dict[str, str]:
    compile = np.array([one["compile"] for one in results if "compile" in one]) * 1e3
    masks = np.concatenate([one["masks"] for one in results if one["masks"]]) * 1e6
    ends = Counter(one["end"] for one in results)
    about = metadata(library)
    return {
        "version": about["Version"],
        "licence": about["License-Expression"] or about["License"] or "MIT",
        "compile and first mask, ms: median, p99, most": " ".join(
            f"{value:.1f}" for value in (*np.percentile(compile, [50, 99]), compile.max())
        ),
        "a mask, us: median, p99, p99.9": " ".join(
            f"{value:.0f}" for value in np.percentile(masks, [50, 99, 99.9])
        ),
    } | {end: str(count) for end, count in ends.most_common()}


if __name__ == "__main__":
    main()
