#!/usr/bin/env python3
"""Changes by an int8 KV cache: log-probabilities, greedy texts, and the tokens that fit in the same memory.

  python benchmarks/kv_dtype.py               # the default base, on this machine's best kernels
  python benchmarks/kv_dtype.py --tokens 16   # a look

For scale, the same once more with PyTorch's kernels and a cache in bf16: what another order of sums changes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer

from bench.command import Options
from bench.engines import BLOCK, KV_TOKENS, load_base, load_tokenizer, outputs
from bench.report import table
from onebase_engine.base.default_base import fetch_default_base
from onebase_engine.base.load import eos_ids
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.memory_budget import kv_block_count
from onebase_engine.engine.messages import Sampling, ScoredToken, Submit
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.kernels.reference import ReferenceKernels
from onebase_server.processes.engine import DEFAULT_STEP_TOKENS

ROOT = Path(__file__).parents[1]
ANSWERED, LONG = 24, 1500
TEXTS = ("docs/security.md", "docs/http.md")
KV_MEMORY = 1_000_000_000


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
    submits = [Submit(id=str(number), prompt=one, sampling=sampling) for number, one in enumerate(prompts)]
    for output in outputs(engine, submits):
        found[int(output.id)][0].extend(output.tokens)
        found[int(output.id)][1].extend(output.prompt_logprobs or [])
    return found


def compared(plain: Found, other: Found) -> dict[str, str]:
    """Return how an engine differs from another one, row by row of the table."""
    rows: dict[str, str] = {}
    for name, own, row in (("short", plain.short, other.short), ("long", plain.long, other.long)):
        pairs = list(zip(own, row, strict=True))
        differences = torch.tensor([abs(a.logprob - b.logprob) for a, b in pairs]).double()
        same = sum(a.top[0][0] == b.top[0][0] for a, b in pairs)
        mean = sum(b.logprob - a.logprob for a, b in pairs) / len(pairs)
        title = f"{name}, {len(own):,} tokens: "
        rows |= {
            f"{title}mean difference": f"{float(differences.mean()):.4f}",
            f"{title}99 of 100 below": f"{float(differences.quantile(0.99)):.3f}",
            f"{title}largest": f"{float(differences.max()):.3f}",
            f"{title}of the mean": f"{mean:+.4f}",
            f"{title}same most likely token": f"{same / len(pairs):.1%}",
        }
    count = sum(map(len, plain.greedy))
    answers = list(zip(plain.greedy, other.greedy, strict=True))
    equal = sum(x == y for a, b in answers for x, y in zip(a, b, strict=False))
    title = f"{len(answers)} greedy answers: "
    return rows | {
        f"{title}whole answers equal": str(sum(a == b for a, b in answers)),
        f"{title}of {count:,} tokens equal, by place": f"{equal / count:.1%}",
        f"tokens in --kv-memory {KV_MEMORY // 10**9}GB ({plain.tokens:,})": f"{other.tokens:,}",
    }


def main() -> None:
    asked = Options(__doc__)
    asked.count("tokens", 64, "of each greedy answer")
    options = asked.parser.parse_args()
    console, folder = Console(), fetch_default_base()
    base, device = load_base(folder)
    tokenizer = load_tokenizer(folder)
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
    plain, *others = found.values()
    columns = [compared(plain, one) for one in others]
    rows = [[name, *(one[name] for one in columns)] for name in columns[0]]
    console.print(
        table(["", *list(found)[1:]], rows, f"next to {next(iter(found))}; log-probabilities of prompts")
    )


if __name__ == "__main__":
    main()
