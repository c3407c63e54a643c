"""Effect of a training job on serving from the same base: the time between two tokens, and the texts."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from bench import targets
from bench.report import markdown, percentile, table, write
from bench.stream import stream_times
from bench.targets import FAILURES, HttpSession, Setup
from bench.workload import Prompts
from onebase import Client, OneBaseError, TrainingJob

COLUMNS = (
    "train share",
    "TPOT p50 alone",
    "beside a job",
    "TPOT p99 alone",
    "beside a job",
    "job steps/s, idle server",
    "beside rows",
    "texts equal",
)
JOB_ROWS = 2
"""Rows in one step of the job: short steps, so that many end while sequences run."""
JOB_STARTS = 600.0
"""Seconds until a job counts as one that does not start."""


@dataclass(frozen=True)
class Load:
    """A closed loop: `streams` at a time, each of which sends `requests` one after the other."""

    streams: int
    requests: int
    tokens: int


@dataclass(frozen=True)
class Served:
    """gaps: seconds between two pieces of text of a stream. seconds: of the whole load."""

    gaps: list[float]
    texts: list[str]
    seconds: float


@dataclass(frozen=True)
class Beside:
    """One share. steps_idle, steps_beside: steps a second of the job, server idle or with rows."""

    share: float
    alone: Served
    with_job: Served
    steps_idle: float
    steps_beside: float

    @property
    def cells(self) -> list[str]:
        """Return the cells of COLUMNS; times in ms."""
        parts = self.alone, self.with_job
        equal = sum(a == b for a, b in zip(self.alone.texts, self.with_job.texts, strict=True))
        return [
            f"{self.share:g}",
            *(f"{median(part.gaps) * 1e3:.0f}" for part in parts),
            *(f"{percentile(part.gaps, 0.99) * 1e3:.0f}" for part in parts),
            f"{self.steps_idle:.2f}",
            f"{self.steps_beside:.2f}",
            f"{equal} of {len(self.alone.texts)}",
        ]


async def beside(setup: Setup, share: float, load: Load, prompts: Prompts, data: Path, log: Path) -> Beside:
    """Start a server that lets jobs take `share`, send it the load, start a job, send the load again.

    Raises StartError, HttpError, TimeoutError.
    """
    async with targets.onebase(setup, log, ["--train-share", str(share)]) as session:
        await serve(session, Load(load.streams, 1, 8), prompts)
        alone = await serve(session, load, prompts)
        with Client(session.url, timeout=600) as client:
            job = await asyncio.to_thread(
                client.training.create,
                data,
                name="beside",
                activate="never",
                batch_size=JOB_ROWS,
                max_steps=100_000,
                epochs=1000.0,
                eval_split=0.0,
                save_every=100_000,
            )
            try:
                steps_idle = await _steps_per_second(job)
                before, began = await _step(job), time.perf_counter()
                with_job = await serve(session, load, prompts)
                steps_beside = (await _step(job) - before) / (time.perf_counter() - began)
            finally:
                await asyncio.to_thread(job.cancel)
    return Beside(share, alone, with_job, steps_idle, steps_beside)


async def serve(session: HttpSession, load: Load, prompts: Prompts) -> Served:
    """Send the load to the base; the same prompts each time."""
    gaps, texts = list[float](), dict[tuple[int, int], str]()

    async def stream(number: int) -> None:
        for turn in range(load.requests):
            prompt = prompts.make("beside", number, turn)
            payload = {"model": session.base_model, "prompt": prompt, "max_tokens": load.tokens}
            payload |= {"temperature": 0, "ignore_eos": True, "stream": True}
            pieces = [piece async for piece in stream_times(session.url, payload)]
            gaps.extend(after - before for (before, _), (after, _) in pairwise(pieces))
            texts[number, turn] = "".join(text for _, text in pieces)

    started = time.perf_counter()
    await asyncio.gather(*(stream(number) for number in range(load.streams)))
    return Served(gaps, [texts[key] for key in sorted(texts)], time.perf_counter() - started)


async def _step(job: TrainingJob) -> int:
    progress = (await asyncio.to_thread(job.refresh)).progress
    return 0 if progress is None else progress.step


async def _steps_per_second(job: TrainingJob, first: int = 2, steps: int = 6) -> float:
    """Return the speed of a job while the server is idle, after the first steps. Raises TimeoutError if the
    job does not start."""
    started = 0.0
    async with asyncio.timeout(JOB_STARTS):
        while True:
            step = await _step(job)
            if job.info.ended:
                raise ValueError(f"the job is {job.info.status}: {job.info.error}")
            if not started and step >= first:
                started, first = time.perf_counter(), step
            elif started and step >= first + steps:
                return (step - first) / (time.perf_counter() - started)
            await asyncio.sleep(0.1)


def measure_beside(
    setup: Setup,
    load: Load,
    prompts: Prompts,
    data: Path,
    shares: Sequence[float],
    logs: Path,
    console: Console,
) -> dict[float, Beside]:
    """Measure share by share; one that fails is left out, and reported."""
    found = {}
    for share in shares:
        console.print(f"serving beside a job: [bold]--train-share {share:g}[/]")
        log = logs / f"serve-{share:g}.log"
        try:
            found[share] = asyncio.run(beside(setup, share, load, prompts, data, log))
        except (*FAILURES, OneBaseError) as error:
            console.print(f"[red]failed: {type(error).__name__}:[/]", error)
    return found


def write_beside(
    found: Sequence[Beside],
    load: Load,
    options: argparse.Namespace,
    described: dict[str, Any],
    console: Console,
) -> None:
    """Print the table; write beside.json and beside.md."""
    rows = [one.cells for one in found]
    title = f"serving beside a job, {load.streams} streams, times in ms"
    console.print(table(COLUMNS, rows, title, left=0))
    content = {"load": asdict(load), "shares": [asdict(one) for one in found]}
    write("beside", options, described, content, markdown(COLUMNS, rows, left=0), console)
