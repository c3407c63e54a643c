"""Measurements of an adapter's life: each function asks a running target and returns seconds."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

from bench.report import percentile
from bench.stream import Sample
from bench.targets import Session
from bench.workload import Prompts, Request
from onebase import Client


@dataclass(frozen=True)
class Times:
    """Seconds, one an occurrence."""

    values: tuple[float, ...]

    @property
    def p50(self) -> float:
        return median(self.values)

    @property
    def p99(self) -> float:
        return percentile(self.values, 0.99)

    def above(self, others: Times) -> float:
        """Return by how much these are longer, pair by pair; the median."""
        return median(own - other for own, other in zip(self.values, others.values, strict=True))


@dataclass(frozen=True)
class Load:
    """A closed loop of streams over many adapters."""

    tokens_per_second: float
    ttft: Times
    requests: int
    adapters: int
    """Number of different adapters that were asked for."""


class Step(Protocol):
    """Called after each upload or request, for the progress bar."""

    def __call__(self) -> None: ...


async def upload(client: Client, folders: Mapping[str, Path], step: Step) -> Times:
    """Measure, one after the other, the time from sending an adapter's files to the answer that it is
    active."""
    times = []
    for name, folder in folders.items():
        started = time.perf_counter()
        await asyncio.to_thread(client.adapters.upload, folder, name=name, activate=True, wait=True)
        times.append(time.perf_counter() - started)
        step()
    return Times(tuple(times))


async def upload_at_once(client: Client, folders: Mapping[str, Path], streams: int, step: Step) -> float:
    """Upload so many at a time until all are proven and active. Returns how many that makes a minute."""
    waiting = iter(folders.items())

    async def stream() -> None:
        for name, folder in waiting:
            await asyncio.to_thread(client.adapters.upload, folder, name=name, activate=True, wait=True)
            step()

    started = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(streams)))
    return len(folders) / (time.perf_counter() - started) * 60


async def activation(
    client: Client, session: Session, name: str, folders: Sequence[Path], prompts: Prompts
) -> Times:
    """Measure the time from asking for a proven version's activation to the first token of a request for the
    name."""
    versions = []
    for folder in folders:
        version = await asyncio.to_thread(
            client.adapters.upload, folder, name=name, activate=False, wait=True
        )
        versions.append(version.version)
    times = []
    for index, digest in enumerate(versions * 2):
        request = Request(prompts.make("activation", index), name, 4)
        started = time.perf_counter()
        await asyncio.to_thread(client.adapters.activate, name, digest)
        (sample,) = await session.run([request])
        times.append(sample.started - started + sample.ttft)
    return Times(tuple(times))


async def hot_switch(
    session: Session, adapters: Sequence[str], prompts: Prompts, rounds: int
) -> tuple[Times, Times]:
    """TTFT of requests one after the other, two for each adapter in turn: the second of a pair meets the
    same adapter as the one before it, the first another. So a change of the machine's speed meets both.
    """
    for index, name in enumerate(adapters):
        await session.run([Request(prompts.make("switch-warm-up", index), name, 4)])
    times: dict[str, list[float]] = {"other": [], "same": []}
    for number in range(rounds):
        for name in adapters:
            for kind, ttfts in times.items():
                (sample,) = await session.run([Request(prompts.make(kind, number, name), name, 4)])
                ttfts.append(sample.ttft)
    return Times(tuple(times["same"])), Times(tuple(times["other"]))


async def cold_and_warm(session: Session, adapters: Sequence[str], prompts: Prompts) -> tuple[Times, Times]:
    """TTFT of each adapter's first request after a start, and of its second: disk against host memory."""
    cold: list[float] = []
    warm: list[float] = []
    await session.run([Request(prompts.make("before"), None, 4)])
    for name in adapters:
        for times, key in ((cold, "cold"), (warm, "warm")):
            (sample,) = await session.run([Request(prompts.make(key, name), name, 4)])
            times.append(sample.ttft)
    return Times(tuple(cold)), Times(tuple(warm))


async def touch(session: Session, adapters: Sequence[str], prompts: Prompts, step: Step) -> None:
    """One token of each, so that all are in host memory."""
    for name in adapters:
        await session.run([Request(prompts.make("touch", name), name, 1)])
        step()


async def random_load(
    session: Session,
    adapters: Sequence[str],
    prompts: Prompts,
    *,
    streams: int,
    requests: int,
    tokens: int,
    seed: int,
    step: Step,
) -> Load:
    """`streams` at once, each asking for an adapter at random as soon as its last answer has ended."""
    generator = random.Random(seed)
    names = [generator.choice(list(adapters)) for _ in range(requests)]
    waiting = iter(enumerate(names))
    samples: list[Sample] = []

    async def stream() -> None:
        for index, name in waiting:
            samples.extend(
                await session.run([Request(prompts.make("random", seed, index, len(adapters)), name, tokens)])
            )
            step()

    started = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(streams)))
    seconds = time.perf_counter() - started
    wrong = {sample.tokens for sample in samples} - {tokens}
    if wrong:
        raise ValueError(f"asked for {tokens} tokens a request, got {sorted(wrong)}")
    return Load(
        tokens_per_second=sum(sample.tokens for sample in samples) / seconds,
        ttft=Times(tuple(sample.ttft for sample in samples)),
        requests=len(samples),
        adapters=len(set(names)),
    )
