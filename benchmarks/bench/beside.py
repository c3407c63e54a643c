"""Effect of a training job on serving from the same base: the time between two tokens, and the texts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.processes import StartError
from bench.report import percentile
from bench.stream import DONE, HttpError, request
from bench.targets import HttpSession, OneBaseTarget, Setup
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
    def equal_texts(self) -> int:
        return sum(a == b for a, b in zip(self.alone.texts, self.with_job.texts, strict=True))


async def beside(setup: Setup, share: float, load: Load, prompts: Prompts, data: Path, log: Path) -> Beside:
    """Start a server that lets jobs take `share`, send it the load, start a job, send the load again.

    Raises StartError, HttpError, TimeoutError.
    """
    target = OneBaseTarget(setup, ["--train-share", str(share)])
    async with target.start(log) as session:
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

    async def one(stream: int) -> list[tuple[list[float], str]]:
        return [
            await _stream(session, prompts.make("beside", stream, number), load.tokens)
            for number in range(load.requests)
        ]

    started = time.perf_counter()
    streams = await asyncio.gather(*(one(stream) for stream in range(load.streams)))
    seconds = time.perf_counter() - started
    answers = [answer for answers in streams for answer in answers]
    return Served([gap for gaps, _ in answers for gap in gaps], [text for _, text in answers], seconds)


async def _stream(session: HttpSession, prompt: str, tokens: int) -> tuple[list[float], str]:
    payload = {
        "model": session.base_model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    times, text = [], ""
    async with request(f"{session.url}/v1/completions", "POST", payload) as response:
        if response.status != 200:
            raise HttpError(response.status, (await response.body()).decode(errors="replace"))
        async for event in response.events():
            if event == DONE:
                break
            pieces = [choice.get("text") for choice in json.loads(event).get("choices", ())]
            if any(pieces):
                times.append(time.perf_counter())
                text += "".join(piece for piece in pieces if piece)
    return [after - before for before, after in pairwise(times)], text


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
    """Share by share; one that fails is left out, and told."""
    found = {}
    for share in shares:
        console.print(f"serving beside a job: [bold]--train-share {share:g}[/]")
        log = logs / f"serve-{share:g}.log"
        try:
            found[share] = asyncio.run(beside(setup, share, load, prompts, data, log))
        except (StartError, HttpError, OneBaseError, OSError, EOFError, TimeoutError, ValueError) as error:
            console.print(f"[red]failed: {type(error).__name__}:[/]", error)
    return found


def write_beside(
    found: Mapping[float, Beside], load: Load, described: dict[str, Any], folder: Path, console: Console
) -> None:
    """Prints the table; writes beside.json and beside.md."""
    rows = beside_rows(list(found.values()))
    table = Table(title=f"serving beside a job, {load.streams} streams, times in ms", box=SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"machine": described, "load": asdict(load), "shares": [asdict(one) for one in found.values()]}
    (folder / "beside.json").write_text(json.dumps(result, indent=1))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " ---: |" * len(COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    (folder / "beside.md").write_text(machine.sentence(described) + "\n\n" + "\n".join(lines) + "\n")
    console.print(f"Written: {folder / 'beside.json'}, {folder / 'beside.md'}")


def beside_rows(found: Sequence[Beside]) -> list[list[str]]:
    """Cells of COLUMNS; times in ms."""
    return [
        [
            f"{one.share:g}",
            *(_shown(median(part.gaps)) for part in (one.alone, one.with_job)),
            *(_shown(percentile(part.gaps, 0.99)) for part in (one.alone, one.with_job)),
            f"{one.steps_idle:.2f}",
            f"{one.steps_beside:.2f}",
            f"{one.equal_texts} of {len(one.alone.texts)}",
        ]
        for one in found
    ]


def _shown(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}"
