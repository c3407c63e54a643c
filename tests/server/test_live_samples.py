"""Promised samples: how long they are kept, how many may wait, and what a cancel ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onebase_adapters.registry import LiveRecords, LiveSample, LiveSampler, Registry, RegistryBusyError
from onebase_edge.background import Backoff, Threads
from onebase_edge.errors import (
    ApiError,
    InvalidRequestError,
    LiveNotFoundError,
    LoadingQueueFullError,
    QueueFullError,
    QuotaSpentError,
    ResultGoneError,
    UnavailableError,
)
from onebase_server.adapters.catalog import AdapterChoice
from onebase_server.live import sampling
from onebase_server.live.sampling import PlaceTargets, SampleOrder, Samples
from onebase_server.tenancy.access import LOCAL, Caller

SAMPLER = LiveSampler("s:sample:0", "s", LOCAL.tenant, "base", None, 0.0)
BASE = SimpleNamespace(vocab_size=100, max_length=60_000, kv_longest=60_000, max_sequences=4)
WIDE = SimpleNamespace(**{**vars(BASE), "vocab_size": 103})
OWN: Any = SimpleNamespace(words=103, end_tokens=(101,))
"""Tokenizer of a version with three tokens of its own."""
OF_VERSION = LiveSampler(
    "s:sample:1", "s", LOCAL.tenant, "base", f"tinker://adapters/sampler_weights/own@{'d' * 64}", 0.0
)


def order(**fields: Any) -> SampleOrder:
    given: dict[str, Any] = {"prompt": [1, 2, 3], "n": 1, "seed": 1, "max_tokens": 4}
    given.update({"temperature": 1.0, "top_k": 0, "top_p": 1.0})
    given.update(fields)
    return SampleOrder(**given)


class Drawn(Samples):
    """Samples that are drawn by a function instead of an engine."""

    def __init__(self, registry: Registry, draw: Callable[[], Awaitable[bytes]]) -> None:
        parts: Any = SimpleNamespace(
            base_of=lambda tokenizer: BASE if tokenizer.words == 0 else WIDE,
            check_limits=lambda *_: None,
            parts_for=self._parts_for,
            end_tokens=(),
            words=0,
            run_for=self._run_for,
            caller_of=self._caller_of,
            enter=lambda *_, **__: parts,
        )
        super().__init__(
            registry.live, Threads("test", 1), "server", planner=parts, supervisor=parts, tokenizer=parts,
            reading=parts, residency=parts, keys=parts, limiter=parts, choose=self._chosen, recorder=parts,
            log=parts,
        )  # fmt: skip
        self.draw = draw
        self.built, self.caller = 0, LOCAL
        self.missing: ApiError | None = None

    async def _run_for(self, tenant: str, call: Callable[..., Any], *args: Any) -> Any:
        self.built += 1
        return await asyncio.to_thread(call, *args)

    async def _caller_of(self, key: str) -> Caller:
        return LOCAL

    async def _chosen(self, sampler: LiveSampler) -> AdapterChoice:
        if self.missing is not None:
            raise self.missing
        return AdapterChoice()

    async def _parts_for(self, choice: AdapterChoice, tenant: str, body: Any) -> Any:
        return SimpleNamespace(tokenizer=OWN)

    async def _draw(self, *_: Any) -> bytes:
        return await self.draw()

    async def promised(self, number: int, sampler: LiveSampler = SAMPLER, **fields: Any) -> None:
        reservation: Any = SimpleNamespace(leave=None, sequences_ended=lambda: None, settle=lambda _: None)
        await self.promise(f"s:sample:0:{number}", sampler, order(**fields), self.caller, reservation)

    async def drawn(self, number: int) -> Any:
        return await self.result(LOCAL.tenant, f"s:sample:0:{number}", 5.0)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(f"sqlite:///{tmp_path / 'registry.db'}", base_id="base-1", base_name="base")
    made.migrate()
    yield made
    made.close()


@pytest.mark.parametrize("failures", [0, 2])
def test_a_sample_that_an_earlier_process_promised_is_waited_for_while_this_one_starts(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    found = LiveRecords.open_samples
    away = {name: [RegistryBusyError("it is away")] * failures for name in ("open_samples", "sampler")}

    def open_samples(records: LiveRecords, server: str) -> list[LiveSample]:
        if away["open_samples"]:
            raise away["open_samples"].pop()
        return found(records, server)

    def read_sampler(records: LiveRecords, tenant: str, sampler: str) -> LiveSampler:
        if away["sampler"]:
            raise away["sampler"].pop()
        return SAMPLER

    monkeypatch.setattr(LiveRecords, "open_samples", open_samples)
    monkeypatch.setattr(LiveRecords, "sampler", read_sampler)

    async def run() -> None:
        killed = Drawn(registry, asyncio.get_running_loop().create_future)
        await killed.promised(0)
        await killed.stop()
        samples = Drawn(registry, lambda: asyncio.sleep(0, b"drawn"))
        assert await samples.result(LOCAL.tenant, "s:sample:0:0", 0.05) is None
        waiting = asyncio.create_task(samples.drawn(0))
        await samples.resume()
        assert (await waiting).result == b"drawn"
        with pytest.raises(ResultGoneError):
            await samples.drawn(1)

    asyncio.run(run())


def test_finished_samples_take_no_room_and_are_forgotten(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MOST_OPEN", 2)
    monkeypatch.setattr(sampling, "_IN_MEMORY_SECONDS", -1.0)

    async def run() -> None:
        count, held = 0, asyncio.Event()

        async def draw() -> bytes:
            nonlocal count
            count += 1
            return b"drawn"

        samples = Drawn(registry, draw)
        for number in range(5):
            await samples.promised(number)
            assert (await samples.drawn(number)).result == b"drawn"
        await samples.forget()
        assert not samples._open
        await samples.promised(3)  # from the registry: it is not drawn again
        assert (await samples.drawn(3)).result == b"drawn"
        assert count == 5

        async def wait() -> bytes:
            await held.wait()
            return b"held"

        samples.draw = wait
        await samples.promised(10)
        await samples.promised(11)
        limit = r"2 samples of this tenant are promised .* no more than 2 may be\."
        with pytest.raises(QueueFullError, match=limit) as refused:
            await samples.promised(12)
        assert "--queue-limit" not in refused.value.message  # which does not raise it
        assert (refused.value.code, refused.value.retry_after) == ("queue_full", 1.0)
        monkeypatch.setattr(sampling, "KEPT_SECONDS", -1.0)
        await samples.forget()
        assert registry.live.sample(LOCAL.tenant, "s:sample:0:3") is None
        assert registry.live.sample(LOCAL.tenant, "s:sample:0:10") is not None  # it waits
        await samples.stop()

    asyncio.run(run())


@pytest.mark.parametrize("late", [False, True])
def test_a_cancelled_sample_ends_also_while_its_result_is_written(registry: Registry, late: bool) -> None:
    async def run() -> None:
        drawing, writing, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def draw() -> bytes:
            drawing.set()
            if not late:
                await asyncio.Event().wait()
            return b"drawn"

        samples = Drawn(registry, draw)
        write = samples._writer.write

        async def slowly(sample: Any) -> None:
            if sample.finished_at is not None:
                writing.set()
                await go_on.wait()
            await write(sample)

        samples._writer.write = slowly  # type: ignore[method-assign]
        await samples.promised(0)
        await (writing if late else drawing).wait()
        samples.cancel(LOCAL.tenant, "s:sample:0:0")
        go_on.set()
        found = await samples.drawn(0)
        if late:
            assert found.result == b"drawn"
        else:
            assert found.error["error"] == "The sample was cancelled."
        kept = registry.live.sample(LOCAL.tenant, "s:sample:0:0")
        assert kept is not None
        assert kept.finished_at is not None

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (
            {"top": 1000, "n": 16, "max_tokens": 1000},
            "topk_sample_logprobs: 1000 at each of 16000 places .*499 ",
        ),
        ({"top": 200, "max_tokens": None}, "topk_sample_logprobs"),
        ({"prompt": [1] * 20_000, "prompt_top": 1000}, r"topk_prompt_logprobs.*399 or fewer"),
    ],
)
def test_the_likeliest_tokens_of_too_many_places_are_refused(
    registry: Registry, fields: dict[str, Any], told: str
) -> None:
    samples = Drawn(registry, lambda: asyncio.sleep(0, b""))
    with pytest.raises(InvalidRequestError, match=told):
        asyncio.run(samples.promised(0, **fields))


class Waiting(Drawn):
    """Samples of which those of an adapter's version wait for its weights."""

    _draw = Samples._draw

    async def _drawn(self, sampler: LiveSampler, *_: Any) -> bytes:
        if sampler is OF_VERSION:
            raise UnavailableError("it is being prepared", code="adapter_unavailable", retry_after=1.0)
        return await self.draw()


def test_samples_that_wait_for_their_weights_hold_up_no_others_and_wait_for_so_long(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "MOST_RUNNING", 2)

    async def run() -> None:
        samples = Waiting(registry, lambda: asyncio.sleep(0, b"drawn"))
        for number in range(4):
            await samples.promised(number, OF_VERSION)
        await samples.promised(4)
        assert (await samples.drawn(4)).result == b"drawn"
        monkeypatch.setattr(sampling, "KEPT_SECONDS", -1.0)
        for number in range(4):
            failed = await samples.result(LOCAL.tenant, f"s:sample:0:{number}", 60.0)
            assert failed.error is not None
            assert failed.error["category"] == "server"
        assert not samples._turns_of_weights

    asyncio.run(run())


NO_WEIGHTS = UnavailableError("it is being prepared", code="adapter_unavailable", retry_after=1.0)
NO_ENGINE = UnavailableError("the engine is restarting", code="engine_restarting", retry_after=1.0)
NO_PLACE = LoadingQueueFullError(256, 256, 2.0)
SPENT = QuotaSpentError("spent", {"quota": "tokens", "limit": 1, "of": "tenant"}, retry_after=60.0)


def sampler_of(number: int) -> LiveSampler:
    """A sampler of weights of its own."""
    path = f"tinker://run/sampler_weights/step-{number}"
    return LiveSampler(f"s:sample:{number}", "s", LOCAL.tenant, "base", path, 0.0)


@pytest.mark.parametrize(
    ("failures", "is_drawn"),
    [
        ([NO_ENGINE] * 3, True),
        ([NO_WEIGHTS, NO_WEIGHTS, NO_ENGINE, NO_WEIGHTS, NO_WEIGHTS], True),
        ([NO_WEIGHTS] * 3, False),
    ],
)
def test_only_the_time_for_which_weights_could_not_be_had_ends_a_sample_but_none_in_a_queue(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, failures: list[ApiError], is_drawn: bool
) -> None:
    now, pause, left, sleep = [0.0], 6.0, list(failures), asyncio.sleep

    class InQueue(Drawn):
        _draw = Samples._draw

        async def _drawn(self, *_: Any) -> bytes:
            now[0] += 1_000_000.0
            if left:
                raise left.pop(0)
            return b"drawn"

    async def slept(seconds: float) -> None:
        now[0] += seconds
        await sleep(0)

    monkeypatch.setattr(sampling, "KEPT_SECONDS", 1.5 * pause)
    monkeypatch.setattr(sampling, "_AGAIN", Backoff(pause, pause))
    clock = SimpleNamespace(monotonic=lambda: now[0], monotonic_ns=lambda: 0, time=lambda: now[0])
    monkeypatch.setattr(sampling, "time", clock)
    monkeypatch.setattr(asyncio, "sleep", slept)

    async def run() -> None:
        samples = InQueue(registry, lambda: sleep(0, b""))
        await samples.promised(0)
        found = await samples.result(LOCAL.tenant, "s:sample:0:0", 60.0)
        assert (found.result == b"drawn", found.error is None) == (is_drawn, is_drawn)

    asyncio.run(run())
    assert not left


@pytest.mark.parametrize(("failure", "asking"), [(SPENT, 6), (NO_ENGINE, 2), (NO_WEIGHTS, 6), (NO_PLACE, 6)])
def test_few_samples_of_a_tenant_ask_again_at_once_whatever_their_weights_are(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, failure: ApiError, asking: int
) -> None:
    pause, sleep = 0.001, asyncio.sleep
    monkeypatch.setattr(sampling, "MOST_RUNNING", 2)
    monkeypatch.setattr(sampling, "_AGAIN", Backoff(pause, pause))

    class Failing(Drawn):
        _draw = Samples._draw

        async def _drawn(
            self, sampler: LiveSampler, order: SampleOrder, wanted: Any, caller: Caller, *_: Any
        ) -> bytes:
            await begun.wait()
            if passed.is_set() or sampler is SAMPLER or caller.key == "other":
                return b"drawn"
            tries.append(order.seed)
            if len(tries) == 60:
                enough.set()
            raise failure

    async def slept(seconds: float) -> None:
        pausing.append(1 + pausing[-1])
        await sleep(seconds)
        pausing.append(pausing[-1] - 1)

    monkeypatch.setattr(asyncio, "sleep", slept)
    tries: list[int] = []
    pausing = [0]
    begun, enough, passed = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def run() -> None:
        samples = Failing(registry, lambda: sleep(0, b""))
        for number in range(6):
            await samples.promised(number, sampler_of(number), seed=number)
        begun.set()
        await enough.wait()
        assert max(pausing) == 2
        assert len(set(tries)) == asking, "the others wait for their turn"
        assert min(tries.count(seed) for seed in set(tries)) > 60 // asking // 2, "each gets its turn"
        if failure is not NO_ENGINE:
            await samples.promised(6)
            assert (await samples.drawn(6)).result == b"drawn", "other weights"
            samples.caller = replace(LOCAL, key="other")
            await samples.promised(7, sampler_of(0))
            assert (await samples.drawn(7)).result == b"drawn", "another key"
        passed.set()
        for number in range(6):
            assert (await samples.result(LOCAL.tenant, f"s:sample:0:{number}", 60.0)).result == b"drawn"
        assert not samples._turns_of_weights
        assert not samples._turns
        assert not samples._pausing

    asyncio.run(run())


def test_named_tokens_are_read_once_and_not_on_the_event_loop(registry: Registry) -> None:
    async def run() -> None:
        samples = Drawn(registry, lambda: asyncio.sleep(0, b""))
        targets = PlaceTargets([5, -1, -1, 7], (2, 2))
        wanted = await samples._wanted(order(targets=targets), LOCAL, 100)
        assert wanted == {1: [5], 2: [7]}
        request = [
            samples._request(order(targets=targets), wanted, LOCAL, AdapterChoice(), samples._tokenizer)
            for _ in range(3)
        ]
        assert request[-1].sampling.prompt_targets == wanted
        assert samples.built == 1
        with pytest.raises(InvalidRequestError, match="not in the vocabulary"):
            await samples._wanted(order(targets=PlaceTargets([5, 100, -1, 7], (2, 2))), LOCAL, 100)

    asyncio.run(run())


def test_tokens_of_a_versions_own_vocabulary_are_promised_for_its_samplers_alone(registry: Registry) -> None:
    own: dict[str, Any] = {"prompt": [1, 102, 3], "targets": PlaceTargets([101, 5], (2, 1))}

    async def run() -> None:
        samples = Drawn(registry, lambda: asyncio.sleep(0, b"drawn"))
        await samples.promised(0, OF_VERSION, **own)
        assert (await samples.drawn(0)).result == b"drawn"
        for fields in ({"prompt": own["prompt"]}, {"targets": own["targets"]}):
            with pytest.raises(InvalidRequestError, match="not in the vocabulary"):
                await samples.promised(1, **fields)
        request = samples._request(order(prompt=own["prompt"]), {}, LOCAL, AdapterChoice(), OWN)
        assert (request.sampling.end_token_ids, request.tokenizer) == ((101,), OWN)
        with pytest.raises(InvalidRequestError, match=r"not in the vocabulary \(0 to 102\)"):
            await samples.promised(1, OF_VERSION, prompt=[1, 103])
        samples.missing = UnavailableError(
            "it is being prepared", code="adapter_unavailable", retry_after=1.0
        )
        with pytest.raises(UnavailableError):
            await samples.promised(1, OF_VERSION, **own)
        samples.missing = LiveNotFoundError("checkpoint", "x", "path")
        await samples.promised(1, OF_VERSION)  # its future says so

    asyncio.run(run())
