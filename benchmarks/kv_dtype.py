#!/usr/bin/env python3
"""Changes by an int8 KV cache: log-probabilities, greedy texts, and the tokens that fit in the same memory.

  python benchmarks/kv_dtype.py               # the default base, on this machine's best kernels
  python benchmarks/kv_dtype.py --tokens 16   # a look

For scale, the same once more with PyTorch's kernels and a cache in bf16: what another order of sums changes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from bench.engine_worker import KV_TOKENS
from onebase_engine.base.default_base import fetch_default_base
from onebase_engine.base.load import eos_ids
from onebase_engine.base.quantized_cache import load_kept_base
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.memory_budget import kv_block_count
from onebase_engine.engine.messages import EngineConfig, Sampling, ScoredToken, Submit
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.kernels.reference import ReferenceKernels
from onebase_server.processes.engine import DEFAULT_STEP_TOKENS, base_settings

ROOT = Path(__file__).parents[1]
ANSWERED, LONG = 24, 1500
TEXTS = ("docs/security.md", "docs/http.md")
KV_MEMORY = 1_000_000_000
BLOCK = 16


@dataclass(frozen=True)
class Found:
    """Results of one engine. short, long: of each token of the prompts. greedy: answers to some of them."""

    short: list[ScoredToken]
    long: list[ScoredToken]
    greedy: list[list[int]]
    tokens: int
    """Number of tokens that fit in KV_MEMORY."""


def measure(model: ServedModel, base: torch.nn.Module, tokenizer: Tokenizer, tokens: int) -> Found:
    limits = SchedulerLimits(64, DEFAULT_STEP_TOKENS[model.device.type], 4096, 0)
    blocks = KV_TOKENS // BLOCK
    engine = Engine(base, name="bench", limits=limits, kv_blocks=blocks, eos_ids=eos_ids(base), model=model)
    lines = (ROOT / "examples/data/pirate.heldout.jsonl").read_text().splitlines()
    questions = [json.loads(line)["messages"][0]["content"] for line in lines]
    long = [tokenizer.encode((ROOT / path).read_text()).ids[:LONG] for path in TEXTS]
    chats = [f"<|im_start|>user\n{one}<|im_end|>\n<|im_start|>assistant\n" for one in questions[:ANSWERED]]
    short = [tokenizer.encode(one).ids for one in questions]
    greedy = Sampling(temperature=0.0, max_tokens=tokens)
    size = model.kv_bytes_per_token * BLOCK
    room = kv_block_count(size, 1 << 40, 0, kv_memory=KV_MEMORY) - RESERVED_BLOCKS
    return Found(
        [one for row in scored(engine, short) for one in row],
        [one for row in scored(engine, long) for one in row],
        [answer for answer, _ in ask(engine, [tokenizer.encode(one).ids for one in chats], greedy)],
        room * BLOCK,
    )


def scored(engine: Engine, prompts: Sequence[list[int]]) -> list[list[ScoredToken]]:
    sampling = Sampling(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    return [of_prompt for _, of_prompt in ask(engine, prompts, sampling)]


def ask(
    engine: Engine, prompts: Sequence[list[int]], sampling: Sampling
) -> list[tuple[list[int], list[ScoredToken]]]:
    """Return, for each prompt, the answer and the log-probabilities of the prompt's own tokens."""
    found: list[tuple[list[int], list[ScoredToken]]] = [([], []) for _ in prompts]
    for number, prompt in enumerate(prompts):
        engine.submit(Submit(id=str(number), prompt=prompt, sampling=sampling))
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            if output.error_message is not None:
                raise RuntimeError(output.error_message)
            found[int(output.id)][0].extend(output.tokens)
            found[int(output.id)][1].extend(output.prompt_logprobs or [])
    return found


def show(console: Console, found: dict[str, Found]) -> None:
    plain, *others = found.values()
    table = Table(title=f"next to {next(iter(found))}")
    for column in ("", *list(found)[1:]):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("short", "long"):
        own: list[ScoredToken] = getattr(plain, name)
        rows: list[list[ScoredToken]] = [getattr(one, name) for one in others]
        differences = [
            torch.tensor([abs(a.logprob - b.logprob) for a, b in zip(own, row, strict=True)]).double()
            for row in rows
        ]
        title = f"{name} prompts, {len(own):,} tokens: log-probability"
        table.add_row(f"{title}, mean difference", *(f"{float(one.mean()):.4f}" for one in differences))
        table.add_row("  99 of 100 below", *(f"{float(one.quantile(0.99)):.3f}" for one in differences))
        table.add_row("  largest", *(f"{float(one.max()):.3f}" for one in differences))
        means = [sum(one.logprob for one in row) / len(row) for row in (own, *rows)]
        table.add_row("  of the mean", *(f"{one - means[0]:+.4f}" for one in means[1:]))
        same = [
            sum(a.top[0][0] == b.top[0][0] for a, b in zip(own, row, strict=True)) / len(own) for row in rows
        ]
        table.add_row("  same most likely token", *(f"{one:.1%}" for one in same))
    count = sum(map(len, plain.greedy))
    table.add_row(
        f"greedy, {len(plain.greedy)} answers, {count:,} tokens: whole answers equal",
        *(str(sum(a == b for a, b in zip(plain.greedy, one.greedy, strict=True))) for one in others),
    )
    equal = [
        sum(x == y for a, b in zip(plain.greedy, one.greedy, strict=True) for x, y in zip(a, b, strict=False))
        for one in others
    ]
    table.add_row("  tokens equal, place by place", *(f"{one / count:.1%}" for one in equal))
    table.add_row(
        f"tokens in --kv-memory {KV_MEMORY // 10**9}GB ({plain.tokens:,})",
        *(f"{one.tokens:,}" for one in others),
    )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64, help="of each greedy answer (default: 64)")
    options = parser.parse_args()
    console = Console()
    folder = fetch_default_base()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_kept_base(base_settings(EngineConfig(base_folder=str(folder)), device))
    tokenizer: Tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    models = {
        "bf16": ServedModel(base, 1),
        "int8": ServedModel(base, 1, kv_dtype=torch.int8),
        "bf16 by PyTorch": ServedModel(base, 1, kernels=ReferenceKernels(tiled=device.type == "cpu")),
    }
    found: dict[str, Found] = {}
    for name, model in models.items():
        with console.status(f"{name}, by {model.kernels.name}"):
            found[name] = measure(model, base, tokenizer, options.tokens)
    console.print(f"{models['int8'].kernels.name} on {device}")
    show(console, found)


if __name__ == "__main__":
    main()
