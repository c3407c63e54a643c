"""One client of the soak, and what an idle server must have given back.

Random requests have every field of POST /generate, in mixtures no test would think of; their answers are held
to the contract.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from bench.report import table
from bench.stream import DONE, Response, fetch_json, request
from bench.workload import WORDS

# ---- requests -------------------------------------------------------------------------------------

PIECES = ("naïve café", "日本語の文章", "👩‍👩‍👧‍👦 🇨🇭", "e\u0301", "\n\n", "{}", "</s>")
INVALID: tuple[dict[str, Any], ...] = (
    {"temperature": -1.0},
    {"adapter": "there-is-no-such-adapter"},
    {"max_tokens": 10**9},
    {"top_p": 0.0},
    {"no_such_field": 1},
    {"adapter": [{"name": "there-is-no-such-adapter", "weight": 0.5}]},
)


@dataclass(frozen=True)
class Plan:
    """One request and what its client does with the answer."""

    body: dict[str, Any]
    valid: bool = True
    leave_after_events: int | None = None
    """Disconnect once so many events of the stream have been read."""
    leave_after_seconds: float | None = None
    """Disconnect after so long, whatever has come."""
    text: tuple[str, ...] | None = None
    """Text that each choice must have, where that is known."""


class Planner:
    """Draws plans; the same seed draws the same ones."""

    def __init__(self, adapters: list[str], seed: int) -> None:
        self._adapters = adapters
        self._rng = random.Random(seed)
        self._words = WORDS.split()
        self._prefixes = [self._sentence(length) for length in (8, 40, 80, 160)]

    def plan(self) -> Plan:
        rng = self._rng
        body = self._prompt() | self._sampling() | self._length()
        if (adapter := self._adapter()) is not None:
            body["adapter"] = adapter
        if rng.random() < 0.04:
            return Plan(body | rng.choice(INVALID), valid=False)
        if rng.random() < 0.05:
            body["timeout_s"] = round(rng.uniform(0.1, 3.0), 2)
        body["stream"] = rng.random() < 0.75
        if rng.random() < 0.2:
            if body["stream"] and rng.random() < 0.7:
                return Plan(body, leave_after_events=rng.randrange(12))
            return Plan(body, leave_after_seconds=rng.uniform(0.0, 2.0))
        return Plan(body)

    def canaries(self) -> list[Plan]:
        """Return requests with a known answer once they have run: every adapter, a sum, a seeded sample."""
        wanted: list[Any] = [None, *self._adapters]
        if len(self._adapters) > 1:
            wanted.append([{"name": name, "weight": 0.7} for name in self._adapters[:2]])
        plans = []
        for index, adapter in enumerate(wanted):
            body = {"prompt": self._sentence(10 + 9 * index), "max_tokens": 12, "ignore_eos": True}
            body |= {"temperature": 0.0} if index % 3 else {"temperature": 0.9, "seed": index, "n": 2}
            plans.append(Plan(body if adapter is None else body | {"adapter": adapter}))
        return plans

    def chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def choose(self, plans: list[Plan]) -> Plan:
        return self._rng.choice(plans)

    def _sentence(self, length: int) -> str:
        return " ".join(self._rng.choice(self._words) for _ in range(length))

    def _prompt(self) -> dict[str, Any]:
        rng = self._rng
        text = self._sentence(rng.randint(1, 60))
        if rng.random() < 0.4:
            text = f"{rng.choice(self._prefixes)} {text}"
        if rng.random() < 0.2:
            text += rng.choice(PIECES) * rng.randint(1, 5)
        if rng.random() < 0.15:
            return {"messages": [{"role": "user", "content": text}]}
        return {"prompt": text}

    def _adapter(self) -> Any:
        rng = self._rng
        draw = rng.random()
        if draw < 0.2 or not self._adapters:
            return None
        if draw < 0.7:
            return rng.choice(self._adapters)
        names = rng.choices(self._adapters, k=rng.randint(1, 3))
        return [{"name": name, "weight": round(rng.uniform(-1.0, 1.5), 3)} for name in names]

    def _length(self) -> dict[str, Any]:
        rng = self._rng
        length: dict[str, Any] = {"max_tokens": min(128, 1 + int(rng.expovariate(1 / 20)))}
        if rng.random() < 0.3:
            length["ignore_eos"] = True
        elif rng.random() < 0.2:
            length["min_tokens"] = rng.randint(0, length["max_tokens"])
        if rng.random() < 0.2:
            length["n"] = rng.randint(2, 4)
        if rng.random() < 0.15:
            length["stop"] = rng.choice(["the", [".", "\n\n"], ["zzz", ", and"]])
        return length

    def _sampling(self) -> dict[str, Any]:
        rng = self._rng
        choices: list[dict[str, Any]] = [
            {"temperature": rng.choice([0.0, 0.7, 1.0, 1.8])},
            {"top_k": rng.choice([1, 5, 50])},
            {"top_p": rng.choice([0.1, 0.9])},
            {"min_p": 0.05},
            {"repetition_penalty": 1.2},
            {"presence_penalty": 0.5, "frequency_penalty": 0.5},
            {"seed": rng.randrange(2**31)},
            {"logit_bias": {str(rng.randrange(1000)): rng.uniform(-5, 5)}},
            {"logprobs": rng.randint(0, 5)},
            {"stop_token_ids": [rng.randrange(1000)]},
            {"logprobs": 2, "echo": True},
        ]
        sampling: dict[str, Any] = {}
        for choice in rng.sample(choices, k=rng.randint(0, 3)):
            sampling |= choice
        return sampling


# ---- answers --------------------------------------------------------------------------------------

FINISHES = ("stop", "length")


class ContractError(Exception):
    """An answer that the server must not give."""


@dataclass
class Tally:
    """Outcomes of all requests so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass
class Answer:
    """A whole answer, streamed or not."""

    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)


class _LeftError(Exception):
    """The client has read as much as it wanted."""


async def run_plan(url: str, plan: Plan, tally: Tally, hang_seconds: float) -> Answer | None:
    """Run one plan and count its outcome; return None if there was no whole answer.

    Raises:
        ContractError: the answer is wrong, or none came within `hang_seconds`.
    """
    try:
        async with asyncio.timeout(hang_seconds):
            try:
                async with asyncio.timeout(plan.leave_after_seconds):
                    return await _ask(url, plan, tally)
            except (_LeftError, TimeoutError):
                if plan.leave_after_events is None and plan.leave_after_seconds is None:
                    raise
                tally.outcomes["left by the client"] += 1
                return None
    except TimeoutError as error:
        raise ContractError(f"no end after {hang_seconds:.0f} s: {_short(plan.body)}") from error
    except (OSError, EOFError, ValueError) as error:
        raise ContractError(f"{type(error).__name__}: {error}: {_short(plan.body)}") from error


async def _ask(url: str, plan: Plan, tally: Tally) -> Answer | None:
    async with request(f"{url}/generate", "POST", plan.body) as response:
        if response.status != 200:
            await _refused(response, plan, tally)
            return None
        if not plan.valid:
            raise ContractError(f"an invalid request was served: {_short(plan.body)}")
        answer = await (_streamed(response, plan) if plan.body.get("stream") else _whole(response))
    check(answer, plan)
    tally.tokens += answer.usage["completion_tokens"]
    tally.outcomes[
        "cancelled by its deadline" if "cancelled" in answer.finishes.values() else "finished"
    ] += 1
    return answer


async def _refused(response: Response, plan: Plan, tally: Tally) -> None:
    """Check a refusal: it is right for an invalid request, and for any when the queue is full."""
    body = json.loads(await response.body())
    if not body.get("error", {}).get("message"):
        raise ContractError(f"status {response.status} without an error message: {body}")
    if response.status == 429:
        wait = response.headers.get("retry-after")
        if wait is None:
            raise ContractError("status 429 without Retry-After")
        tally.outcomes["refused, queue full"] += 1
        await asyncio.sleep(min(5.0, float(wait)))
    elif plan.valid or not 400 <= response.status < 500:
        raise ContractError(f"status {response.status}: {body['error']}: {_short(plan.body)}")
    else:
        tally.outcomes["refused, invalid"] += 1


async def _whole(response: Response) -> Answer:
    body = json.loads(await response.body())
    choices = {choice["index"]: choice for choice in body["choices"]}
    return Answer(
        {index: choice["text"] for index, choice in choices.items()},
        {index: choice["finish_reason"] for index, choice in choices.items()},
        body["usage"],
    )


async def _streamed(response: Response, plan: Plan) -> Answer:
    answer, seen, done = Answer(), 0, False
    async for data in response.events():
        if seen == plan.leave_after_events:
            raise _LeftError
        seen += 1
        if data == DONE:
            if not done:
                raise ContractError(f"[DONE] before the last event: {_short(plan.body)}")
            return answer
        done = _take(answer, json.loads(data)) or done
    raise ContractError(f"a stream ended without [DONE]: {_short(plan.body)}")


def _take(answer: Answer, event: dict[str, Any]) -> bool:
    """Add one event to the answer. Returns True for the last one, which carries the usage."""
    if "error" in event:
        raise ContractError(f"error in a stream: {event['error']}")
    if event.get("done"):
        answer.usage = event["usage"]
        return True
    index = event["index"]
    if index in answer.finishes:
        raise ContractError(f"choice {index} went on after its end")
    answer.texts[index] = answer.texts.get(index, "") + event["text"]
    if event.get("finish_reason"):
        answer.finishes[index] = event["finish_reason"]
    return False


def check(answer: Answer, plan: Plan) -> None:
    body, short = plan.body, _short(plan.body)
    count = body.get("n", 1)
    if sorted(answer.finishes) != list(range(count)):
        raise ContractError(f"{count} choices asked for, ended were {sorted(answer.finishes)}: {short}")
    allowed = (*FINISHES, "cancelled") if "timeout_s" in body else FINISHES
    wrong = [reason for reason in answer.finishes.values() if reason not in allowed]
    if wrong:
        raise ContractError(f"finish_reason {wrong[0]!r}: {short}")
    tokens, most = answer.usage["completion_tokens"], count * body["max_tokens"]
    exact = body.get("ignore_eos") and not {"stop", "stop_token_ids", "timeout_s"} & set(body)
    if tokens > most or (exact and tokens != most):
        raise ContractError(f"{tokens} tokens where {most} were asked for: {short}")
    if plan.text is not None and plan.text != texts_of(answer):
        raise ContractError(f"expected {plan.text}, got {texts_of(answer)}: {short}")


def texts_of(answer: Answer) -> tuple[str, ...]:
    """Return the text of each choice, in order."""
    return tuple(text for _, text in sorted(answer.texts.items()))


def _short(body: dict[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False)[:400]


# ---- leaks ----------------------------------------------------------------------------------------

COUNTERS = (
    "rows_running",
    "rows_waiting",
    "requests",
    "kv_blocks_free",
    "kv_blocks_total",
    "slots_used",
    "adapters_loaded",
    "preemptions",
    "generated_tokens",
    "cached_tokens",
    "restarts",
)
OPTIONAL = ("requests", "restarts")
"""Counters that are not the engine's own; a server may leave them out of /status."""


@dataclass(frozen=True)
class ProcessStats:
    """One process of a server. rss: resident memory in bytes."""

    pid: int
    name: str
    rss: int
    descriptors: int


@dataclass(frozen=True)
class Snapshot:
    """A server's state at one moment."""

    counters: dict[str, int]
    processes: list[ProcessStats]

    @property
    def idle(self) -> bool:
        """Return True if nothing runs or waits, and every KV block is free."""
        counters = self.counters
        open_work = (counters.get(name, 0) for name in ("rows_running", "rows_waiting", "requests"))
        return not any(open_work) and counters["kv_blocks_free"] == counters["kv_blocks_total"]

    def line(self) -> str:
        """Return the state in a few words."""
        counters = self.counters
        memory = " + ".join(f"{process.rss / 2**20:.0f}" for process in self.processes)
        return (
            f"rows {counters['rows_running']}+{counters['rows_waiting']}, "
            f"blocks {counters['kv_blocks_free']}/{counters['kv_blocks_total']} free, "
            f"{counters['preemptions']} preempted, {memory or '?'} MiB"
        )


async def snapshot(url: str, pid: int | None) -> Snapshot:
    """Read `GET /status`, and the process `pid` and all below it, where it is given.

    Raises:
        HttpError: /status did not answer 200.
        OSError: nothing listens, it lacks a figure, or the process is gone.
    """
    figures = _flatten(await fetch_json(f"{url}/status"))
    missing = [name for name in COUNTERS if name not in figures and name not in OPTIONAL]
    if missing:
        raise OSError(f"{url}/status lacks {', '.join(missing)}")
    counters = {name: int(figures[name]) for name in COUNTERS if name in figures}
    return Snapshot(counters, [] if pid is None else processes_of(pid))


def _flatten(status: Mapping[str, Any]) -> dict[str, int]:
    """Return every whole number in nested objects, by its own name."""
    found: dict[str, int] = {}
    for name, value in status.items():
        if isinstance(value, dict):
            found |= _flatten(value)
        elif isinstance(value, int):
            found[name] = value
    return found


def processes_of(pid: int) -> list[ProcessStats]:
    """Return the process and all below it, by pid; what ends meanwhile is left out.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess as error:
        raise ProcessLookupError(str(error)) from error
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            words = process.cmdline()
            # The module after -m, else the program.
            name = words[words.index("-m") + 1] if "-m" in words[:-1] else Path(process.name()).name
            found.append(ProcessStats(process.pid, name, process.memory_info().rss, process.num_fds()))
    return sorted(found, key=lambda one: one.pid)


def compare(before: Snapshot, after: Snapshot, memory_bound: int) -> list[str]:
    """Return the leaks between two idle moments, in sentences.

    memory_bound: bytes that the resident memory of one process may grow by.
    """
    leaks = [
        f"{when} the server is not idle: {state.line()}"
        for when, state in (("after the warm-up", before), ("at the end", after))
        if not state.idle
    ]
    for name in ("kv_blocks_total", "adapters_loaded", "restarts"):
        if before.counters.get(name) != after.counters.get(name):
            leaks.append(f"{name} went from {before.counters.get(name)} to {after.counters.get(name)}")
    old = {process.pid: process for process in before.processes}
    if old.keys() != {process.pid for process in after.processes}:
        leaks.append("the server's processes are not the same as after the warm-up")
    for process in after.processes:
        if (earlier := old.get(process.pid)) is None:
            continue
        growth = process.rss - earlier.rss
        if growth > memory_bound:
            leaks.append(f"{process.name} grew by {growth / 2**20:.0f} MiB")
        if process.descriptors > earlier.descriptors:
            leaks.append(f"{process.name} has {process.descriptors} descriptors, had {earlier.descriptors}")
    return leaks


def leak_table(before: Snapshot, after: Snapshot) -> Table:
    rows = [[name, str(before.counters.get(name, "")), str(after.counters[name])] for name in after.counters]
    old = {process.pid: process for process in before.processes}
    for process in after.processes:
        both = (old.get(process.pid), process)
        memory = ["" if one is None else f"{one.rss / 2**20:.1f}" for one in both]
        files = ["" if one is None else str(one.descriptors) for one in both]
        rows += [[f"{process.name}, MiB resident", *memory], [f"{process.name}, descriptors", *files]]
    return table(["figure", "after warm-up", "at the end"], rows, "the idle server")
