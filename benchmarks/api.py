#!/usr/bin/env python3
"""Measures what the api process costs: seconds of its processor for each token that it streams.

The engine is a fake that gives every row a token every 20 ms and computes nothing, so that the rest is the
api's: decoding, stop strings, JSON, HTTP. Its time is the processor's: other work changes little.

  python benchmarks/api.py
  python benchmarks/api.py --streams 1,16,64 --tokens 200
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.processes import end_on_signals, free_port, server
from bench.stream import stream_completion

SERVER = Path(__file__).parents[1] / "tests/server/serve_scripted.py"
PROMPT = "The quick brown fox jumps over the lazy dog. " * 4


@dataclass(frozen=True)
class Run:
    """One load, after a first one that is not counted."""

    streams: int
    tokens: int
    """Number of tokens of all streams together."""
    cpu_s: float
    """Processor time of the api process, in seconds."""

    @property
    def tokens_per_core(self) -> float:
        """Tokens a second that one core would stream."""
        return self.tokens / self.cpu_s


async def measure(streams: int, tokens: int, folder: Path) -> Run:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(SERVER), "words", "--port", str(port), "--max-rows", str(streams)]
    command += ["--data-dir", str(folder / f"data-{streams}")]
    body = {"model": "smollm2-135m-instruct", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}

    async def load() -> int:
        samples = await asyncio.gather(*(stream_completion(url, body) for _ in range(streams)))
        return sum(sample.tokens for sample in samples)

    async with server(command, f"{url}/ready", folder / "server.log") as process:
        await load()
        before = _cpu_seconds(process.pid)
        count = await load()
        return Run(streams, count, _cpu_seconds(process.pid) - before)


def _cpu_seconds(pid: int) -> float:
    """Return the processor time of the process's own threads, without those of the fake engine, in
    seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _table(runs: Sequence[Run]) -> Table:
    table = Table("streams", "tokens", "CPU, s", "us a token", "tokens/s and core", box=SIMPLE_HEAD)
    for run in runs:
        each = f"{1e6 * run.cpu_s / run.tokens:.0f}"
        table.add_row(
            str(run.streams), str(run.tokens), f"{run.cpu_s:.2f}", each, f"{run.tokens_per_core:,.0f}"
        )
    return table


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", default="1,16,64,256", help="at the same time, one load each")
    parser.add_argument("--tokens", type=int, default=400, help="of each stream (default: 400)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for api.json")
    options = parser.parse_args(argv)
    end_on_signals()
    console = Console()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="onebase-bench-") as folder:
        for streams in map(int, options.streams.split(",")):
            console.print(f"{streams} streams")
            runs.append(asyncio.run(measure(streams, options.tokens, Path(folder))))
    console.print(_table(runs))
    options.output.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine.describe(None), "runs": [asdict(run) for run in runs]}
    (options.output / "api.json").write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
