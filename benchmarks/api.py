#!/usr/bin/env python3
"""Measures what the api process costs: seconds of its processor for each token that it streams.

The engine is a fake that gives every row a token every 20 ms and computes nothing, so that the rest is the
api's: decoding, stop strings, JSON, HTTP. Its time is the processor's: other work changes little.

  python benchmarks/api.py
  python benchmarks/api.py --streams 1,16,64 --tokens 200
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from bench import machine
from bench.command import Options
from bench.processes import cpu_seconds, end_on_signals, free_port, server
from bench.report import table, write
from bench.stream import stream_completion

SERVER = Path(__file__).parents[1] / "tests/server/serve_scripted.py"
PROMPT = "The quick brown fox jumps over the lazy dog. " * 4


@dataclass(frozen=True)
class ApiRun:
    """One load, after a first one that is not counted."""

    streams: int
    tokens: int
    """Number of tokens of all streams together."""
    cpu_s: float
    """Processor time of the api process's own threads, without those of the fake engine, in seconds."""


async def measure(streams: int, tokens: int, folder: Path) -> ApiRun:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(SERVER), "words", "--port", str(port), "--max-sequences", str(streams)]
    command += ["--data-dir", str(folder / f"data-{streams}")]
    body = {"model": "smollm2-135m-instruct", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}

    async def load() -> int:
        samples = await asyncio.gather(*(stream_completion(url, body) for _ in range(streams)))
        return sum(sample.tokens for sample in samples)

    async with server(command, f"{url}/ready", folder / "server.log") as process:
        await load()
        before = cpu_seconds(process.pid)
        count = await load()
        return ApiRun(streams, count, cpu_seconds(process.pid) - before)


def main(argv: Sequence[str]) -> int:
    options = Options(__doc__)
    options.add("--streams", default="1,16,64,256", help="at the same time, one load each")
    options.count("tokens", 400, "of each stream")
    options.output("api.json")
    given = options.parser.parse_args(argv)
    end_on_signals()
    console, described = Console(), machine.describe()
    runs: list[ApiRun] = []
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as folder:
        for streams in map(int, given.streams.split(",")):
            console.print(f"{streams} streams")
            runs.append(asyncio.run(measure(streams, given.tokens, Path(folder))))
    rows = [
        [str(run.streams), str(run.tokens), f"{run.cpu_s:.2f}", f"{1e6 * run.cpu_s / run.tokens:.0f}",
         f"{run.tokens / run.cpu_s:,.0f}"]
        for run in runs
    ]  # fmt: skip
    console.print(table(["streams", "tokens", "CPU, s", "us a token", "tokens/s and core"], rows, left=0))
    write("api", given, described, {"runs": [asdict(run) for run in runs]})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
