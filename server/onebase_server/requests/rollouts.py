"""Rollouts while requests run: what their answers were like, copies for the candidate, and the decisions.

Each server adds what it has seen to the registry's sums every second, and looks at what all servers have
added for the rollouts that it touched. Whichever sees first that a margin is crossed ends the rollout, in one
write.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from onebase_adapters.registry import (
    AdapterRecord,
    Origin,
    Registry,
    RegistryError,
    RolloutAnswer,
    RolloutRecord,
    RolloutSide,
    RolloutState,
    UnknownRolloutError,
    acting,
)
from onebase_edge.background import Threads
from onebase_edge.errors import (
    CALLER_CODES,
    AdapterNotFoundError,
    ApiError,
    ClientGoneError,
    EngineRestartedError,
    GateClosedError,
    InvalidRequestError,
    QueueFullError,
    QuotaSpentError,
    StateConflictError,
    UnavailableError,
    UnknownAnswerError,
)
from onebase_protocol.adapters import FeedbackAnswer, Rollout, RolloutJudge
from onebase_server.adapters.activation import ActivationService
from onebase_server.adapters.catalog import Catalog, RolloutPart, VersionRef
from onebase_server.adapters.residency import Residency
from onebase_server.adapters.rollout_rules import (
    RolloutSettings,
    cluster_of,
    compare,
    decide,
    is_refusal,
    observe,
    side_counts,
)
from onebase_server.inference.generation import GenerationRequest, GenerationRun, new_id
from onebase_server.inference.stream import OutputPiece
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.processes.supervisor import EngineSupervisor
from onebase_server.requests.planner import Planner
from onebase_server.requests.request_log import RequestEntry, RequestLog
from onebase_server.requests.schemas.generation import GenerateRequest
from onebase_server.requests.schemas.messages import ChatMessage
from onebase_server.storage.calls import RegistryThreads, storage_errors
from onebase_server.telemetry.measurements import RequestTimestamps, TokenUsage
from onebase_server.tenancy.access import Caller
from onebase_server.tenancy.quotas import Window

FLUSH_SECONDS = 1.0
"""Time, in seconds, between two writes, and so the longest figures that a killed server loses."""
CLOSE_SECONDS = 5.0
"""Limit for the last write, when the server stops."""
ANSWER_DAYS = 2.0
"""Days for which an answer is kept for feedback."""
DECISION_SECONDS = 60.0
"""Longest time, in seconds, that one look at a rollout may take, with the loading of its candidate."""
_MOST_PAUSE = 300.0
"""Longest pause, in seconds, after looks that failed."""
MOST_ANSWERS = 500
"""Answers in a second, of all rollouts on this server, that are kept for feedback. A tenant has no more of
them than are free, as in the route's waiting room."""
MOST_FEEDBACK = 600
"""Scores that one tenant may send to this server in a minute."""
MOST_COPIES = 8
"""Copies and judgements that run at once on this server. A tenant has no more of them than are free."""
COPY_SECONDS = 300.0
"""Longest time, in seconds, that a copy or a judgement may take."""
MOST_JUDGED = 16_000
"""Characters of the longest answer that is judged."""
_KEPT_CHARACTERS = 400
"""Characters of an answer that are kept where none is judged: enough to see a refusal."""
_TIMER_SECONDS = 0.01
"""Time, in seconds, by which a timer may be early: loops have clocks of a millisecond."""
_SWEEP_SECONDS = 600.0
_WARM_SECONDS = 30.0
_LOWEST_PRIORITY = -4
_SHOWN = 20
_PASSING = (
    QueueFullError,
    UnavailableError,
    EngineRestartedError,
    ClientGoneError,
    InvalidRequestError,
)
"""Errors before a request begins that say nothing about its version."""

_log = logging.getLogger(__name__)


class Observation:
    """One request of a rollout while it runs. A GenerationRun's listener."""

    def __init__(
        self,
        rollouts: RolloutService,
        request: GenerationRequest,
        part: RolloutPart,
        began: float,
        *,
        copies: bool,
    ) -> None:
        self._rollouts = rollouts
        self.request = request
        self.part = part
        self.began = began
        """Time (monotonic) since when the server has the texts of this request, or of the one it copies."""
        self.settings = RolloutSettings.of(part.rollout)
        self.text = ""
        """Beginning of the first choice's text."""
        self._copies = copies
        judge = self.settings.judge
        self._judges = judge is not None and 100.0 * random.random() < judge.percent
        self._most = MOST_JUDGED + 1 if self._judges else _KEPT_CHARACTERS
        self._is_callers_fault = False

    def heard(self, piece: OutputPiece) -> None:
        if piece.index == 0 and len(self.text) < self._most:
            self.text += piece.text[: self._most - len(self.text)]

    def failed(self, code: str | None) -> None:
        self._is_callers_fault = code in CALLER_CODES or (code or "").startswith("grammar")

    def not_started(self, error: ApiError) -> None:
        """Record that the version could not be used at all."""
        lacking = isinstance(error, UnavailableError) and error.code.startswith("adapter_")
        if lacking or not isinstance(error, _PASSING):
            self._record(observe("errors", 1.0))

    def _record(self, sums: Mapping[str, float]) -> None:
        self._rollouts.record(self.part, sums, _cluster(self.part, self.request))

    def ended(self, usage: TokenUsage, timestamps: RequestTimestamps, finished: Counter[str]) -> None:
        """Record the end of the request. finished: its choices by how they ended."""
        if finished["error"]:
            if not self._is_callers_fault:
                self._record(observe("errors", 1.0))
            return
        if finished["abort"]:
            self._record(observe("errors", 1.0) if self._is_late() else {"aborted": 1.0})
            return
        sums = observe("errors", 0.0)
        sums |= {"prompt_tokens": float(usage.prompt), "completion_tokens": float(usage.completion)}
        each = usage.completion / max(1, self.request.choices)
        if each > 0:
            sums |= observe("tokens", math.log(each))
            sums |= observe("refusals", float(is_refusal(self.text, self.settings.phrases)))
        if not self.request.background and timestamps.first:
            waited = max(1e-6, timestamps.first - timestamps.arrived)
            sums |= observe("first_token", math.log(waited)) | {"first_token.seconds": waited}
            if each > 1:
                per_token = max(1e-6, (timestamps.last - timestamps.first) / (each - 1))
                sums |= observe("per_token", math.log(per_token))
                sums["decode.seconds"] = max(0.0, timestamps.last - timestamps.first)
        self._record(sums)
        if self.part.side != "shadow":
            self._rollouts.keep_answer(self.part, self.request)
        if self._judges and self.text and len(self.text) <= MOST_JUDGED and self.settings.judge is not None:
            self._rollouts.judge(self.part, self.request, self.text, self.settings.judge, self.began)
        if self._copies:
            self._rollouts.copy(self.part, self.request, self.began)

    def _is_late(self) -> bool:
        """Return True if the request's time is over, and was the version's: a copy's goes by in waiting."""
        deadline = self.request.deadline
        if deadline is None or self.request.background:
            return False
        return asyncio.get_running_loop().time() >= deadline - _TIMER_SECONDS


class _CopyRecorder:
    """Usage recorder of a copy: it counts in no quota, no usage and no histogram."""

    def __init__(self, observation: Observation | None, entry: RequestEntry | None) -> None:
        self._observation = observation
        self._entry = entry

    def sequences_ended(self) -> None:
        pass

    def used(self, usage: TokenUsage, timestamps: RequestTimestamps, finished: Counter[str]) -> None:
        if self._observation is not None:
            self._observation.ended(usage, timestamps, finished)
        if self._entry is not None:
            self._entry.ended(usage.completion, finished)

    @property
    def token_gap(self) -> Callable[[float], None]:
        return lambda seconds: None


class RolloutService:
    """Rollouts of one server. For one event loop."""

    def __init__(
        self,
        registry: Registry,
        records: RegistryThreads,
        catalog: Catalog,
        activation: ActivationService,
        residency: Residency,
        supervisor: EngineSupervisor,
        planner: Planner,
        tokenizer: BaseTokenizer,
        reading: Threads,
        log: RequestLog,
    ) -> None:
        self._registry = registry
        self._records = records
        self._catalog = catalog
        self._activation = activation
        self._residency = residency
        self._supervisor = supervisor
        self._planner = planner
        self._tokenizer = tokenizer
        self._reading = reading
        self._log = log
        self._writer = uuid.uuid4().hex
        self._batch = 1
        self._writing: tuple[dict[tuple[str, RolloutSide, str], float], list[RolloutAnswer]] = ({}, [])
        self._waiting: dict[tuple[str, RolloutSide, str], float] = {}
        self._answers: list[RolloutAnswer] = []
        self._answers_of: Counter[str] = Counter()
        """Number of `_answers` by tenant."""
        self._touched: set[str] = set()
        """Rollouts with new figures since the last look at them."""
        self._deciding: dict[str, asyncio.Task[None]] = {}
        """Looks at rollouts that run, by rollout."""
        self._undecided: dict[str, tuple[int, float]] = {}
        """Failed looks in a row, and the time of the next (monotonic), by rollout."""
        self._turn = asyncio.Lock()
        self._away = False
        self._feedback: dict[str, Window] = {}
        self._tasks: dict[asyncio.Task[None], str] = {}
        """Copies and judgements that run, with their tenants."""
        self._known: set[str] = set()
        self._warming: set[asyncio.Task[None]] = set()
        self._one_warms = asyncio.Semaphore(1)
        self._swept_at = -math.inf
        self._closed = False
        self.totals: dict[tuple[str, RolloutSide], Counter[str]] = {}
        """Sums since the start of this server, by rollout and side, of rollouts that run."""
        catalog.subscribe(self._names_changed)

    # ---- requests --------------------------------------------------------------------------------

    def observe(self, request: GenerationRequest, began: float) -> Observation | None:
        """Return the observation of a request that is about to begin, if it is part of a rollout. began: see
        Observation."""
        part = request.adapter.part
        if part is None:
            return None
        copies = part.side == "active" and request.plan_with is not None
        copies = copies and 100.0 * random.random() < part.rollout.shadow
        return Observation(self, request, part, began, copies=copies)

    def record(self, part: RolloutPart, sums: Mapping[str, float], cluster: int | None = None) -> None:
        """Add to the figures of one side of a rollout, and to those of the caller's cluster, if it counts."""
        rollout, side = part
        total = self.totals.setdefault((rollout.id, side), Counter())
        for figure, value in sums.items():
            keys = [(rollout.id, side, figure)]
            if cluster is not None and figure.endswith((".n", ".sum")):
                keys.append((rollout.id, side, f"{figure}.{cluster}"))
            for key in keys:
                self._waiting[key] = self._waiting.get(key, 0.0) + value
            total[figure] += value  # type: ignore[assignment]  # a Counter of floats
        self._touched.add(rollout.id)

    def keep_answer(self, part: RolloutPart, request: GenerationRequest) -> None:
        """Keep the id of an answer for feedback, as long as there are not too many."""
        if self._answers_of[request.tenant] < MOST_ANSWERS - len(self._answers):
            self._answers_of[request.tenant] += 1
            self._answers.append(
                RolloutAnswer(
                    request.tenant,
                    request.id,
                    part.rollout.id,
                    part.side,
                    time.time(),
                    cluster=_cluster(part, request),
                )
            )

    # ---- copies and judgements -------------------------------------------------------------------

    def copy(self, part: RolloutPart, request: GenerationRequest, began: float) -> None:
        """Have the candidate answer a request that has ended, for nobody, with capacity that nobody uses."""
        shadow = RolloutPart(part.rollout, "shadow")
        if not self._start(request.tenant, self._copy(shadow, request, began)):
            self.record(shadow, {"skipped": 1.0})

    def judge(
        self, part: RolloutPart, request: GenerationRequest, text: str, judge: RolloutJudge, began: float
    ) -> None:
        """Have the rollout's judge look at an answer."""
        if not self._start(request.tenant, self._judge(part, request, text, judge, began)):
            self.record(part, {"skipped": 1.0})

    def _start(self, tenant: str, work: Coroutine[Any, Any, None]) -> bool:
        """Start a copy or a judgement, unless too many run. Return True if it was started."""
        of_tenant = sum(one == tenant for one in self._tasks.values())
        if self._closed or of_tenant >= MOST_COPIES - len(self._tasks):
            work.close()
            return False
        # In a context of its own: whoever asked is not charged for it.
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks[task] = tenant
        task.add_done_callback(lambda done: self._tasks.pop(done, None))
        return True

    async def _copy(self, part: RolloutPart, request: GenerationRequest, began: float) -> None:
        rollout = part.rollout
        if not self._runs(rollout) or request.plan_with is None:
            return
        try:
            name = f"{rollout.name}@{rollout.candidate}"
            choice = self._catalog.of(rollout.tenant).choose(name)
            planned = await request.plan_with(replace(choice, part=part))
        except ApiError as error:
            Observation(self, request, part, began, copies=False).not_started(error)
            return
        planned = self._in_background(planned, "copy-", request)
        observation = Observation(self, planned, part, began, copies=False)
        await self._run(planned, "shadow", began, observation)

    def _in_background(
        self, request: GenerationRequest, kind: str, source: GenerationRequest
    ) -> GenerationRequest:
        """Return a request as one that nobody waits for, with the user of the request that it belongs to."""
        return replace(
            request,
            id=new_id(kind),
            user=source.user,
            background=True,
            priority=_LOWEST_PRIORITY,
            deadline=asyncio.get_running_loop().time() + COPY_SECONDS,
            plan_with=None,
        )

    async def _run(
        self, request: GenerationRequest, route: str, began: float, observation: Observation | None
    ) -> str | None:
        """Return the first choice's text of a request that nobody waits for; None if it was not answered.

        route: what the log of requests calls it. began: when the request did that it belongs to.
        """
        entry = self._log.begin(request, since=began, route=route)
        run = GenerationRun(
            self._supervisor,
            self._tokenizer,
            self._reading,
            request,
            recorder=_CopyRecorder(observation, entry),
            listeners=[one for one in (observation, entry) if one is not None],
        )
        began = False
        try:
            try:
                await run.start(self._residency)
            except BaseException as error:
                if entry is not None:
                    entry.not_started(error.code if isinstance(error, ApiError) else "cancelled")
                raise
            began = True
            return (await run.collect())[0].text
        except ApiError as error:
            if observation is not None and not began:
                if isinstance(error, QueueFullError):
                    self.record(observation.part, {"skipped": 1.0})
                observation.not_started(error)
            return None

    async def _judge(
        self, part: RolloutPart, request: GenerationRequest, text: str, judge: RolloutJudge, began: float
    ) -> None:
        prompt = request.prompts[0].text or ""
        said = list(request.said or [ChatMessage(role="user", content=prompt)])
        body = GenerateRequest.model_construct(
            messages=[*said, ChatMessage(role="assistant", content=text)], adapter=judge.adapter
        )
        caller = Caller("", request.tenant, frozenset(), background=True)
        try:
            planned = await self._planner.generate(body, caller)
        except ApiError as error:
            _log.warning("rollout %s: its judge cannot be asked: %s", part.rollout.id, error)
            self.record(part, {"skipped": 1.0})
            return
        planned = self._in_background(planned, "judge-", request)
        verdict = await self._run(planned, "judge", began, None)
        if verdict is None:
            self.record(part, {"skipped": 1.0})
        else:
            approves = verdict.strip().casefold().startswith(judge.approves.casefold())
            self.record(part, observe("judge", float(approves)), _cluster(part, request))

    def _runs(self, rollout: RolloutRecord) -> bool:
        record = self._catalog.of(rollout.tenant).own(rollout.name)
        return record is not None and record.rollout is not None and record.rollout.id == rollout.id

    # ---- the registry ----------------------------------------------------------------------------

    async def keep(self) -> None:
        """Write figures and decide every FLUSH_SECONDS, for ever."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            await self.flush()
            self._decide()
            await self._sweep()

    async def flush(self) -> bool:
        """Write what waits. Return True if nothing is left."""
        async with self._turn:
            if not any(self._writing):
                self._writing = (self._waiting, self._answers)
                self._waiting, self._answers, self._answers_of = {}, [], Counter()
            if not any(self._writing):
                return True
            try:
                await self._records.run_blocking(
                    self._registry.rollouts.add, self._writer, self._batch, *self._writing
                )
            except RegistryError as error:
                if not self._away:
                    _log.warning("figures of rollouts wait until the registry can be written: %s", error)
                self._away = True
                return False
            self._writing, self._away = ({}, []), False
            self._batch += 1
            return not (self._waiting or self._answers)

    async def close(self) -> None:
        """End copies, and write what is left, if the registry can be written."""
        self._closed = True
        for task in [*self._tasks, *self._warming, *self._deciding.values()]:
            task.cancel()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                while not await self.flush():
                    await asyncio.sleep(0.2)
        except TimeoutError:
            _log.error("the registry was away to the end: the last figures of rollouts are not in it")

    def _decide(self) -> None:
        """Look at the rollouts that this server has touched, each in a task of its own: a promotion may wait
        until its candidate is loaded."""
        now = time.monotonic()
        for rollout in self._touched - self._deciding.keys():
            _, again_at = self._undecided.get(rollout, (0, now))
            if again_at > now:
                continue
            self._touched.discard(rollout)
            task = asyncio.get_running_loop().create_task(self._try_to_decide(rollout))
            self._deciding[rollout] = task
            task.add_done_callback(partial(self._decided, rollout))

    def _decided(self, rollout: str, task: asyncio.Task[None]) -> None:
        self._deciding.pop(rollout, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("rollout %s cannot be decided", rollout, exc_info=error)

    async def _try_to_decide(self, rollout: str) -> None:
        """End a rollout if its figures ask for it. What fails is tried again, ever more rarely."""
        try:
            async with asyncio.timeout(DECISION_SECONDS):
                await self._decide_one(rollout)
        except (RegistryError, ApiError, TimeoutError) as error:
            gone = isinstance(error, StateConflictError | UnknownRolloutError)
            if gone and not isinstance(error, GateClosedError):  # another server was faster, or it is deleted
                self._undecided.pop(rollout, None)
                return
            failures = self._undecided.get(rollout, (0, 0.0))[0] + 1
            seconds = min(_MOST_PAUSE, FLUSH_SECONDS * 2**failures)
            self._undecided[rollout] = failures, time.monotonic() + seconds
            self._touched.add(rollout)
            if failures == 1:  # the others would say the same
                why = error if str(error) else f"it took more than {DECISION_SECONDS:g} s"
                _log.warning("rollout %s is not decided yet: %s", rollout, why)
        else:
            self._undecided.pop(rollout, None)

    async def _decide_one(self, rollout: str) -> None:
        found = await self._records.run_blocking(self._registry.rollouts.find, rollout)
        if found.state != "running":
            return
        decision = decide(found, RolloutSettings.of(found))
        if decision.state is None:
            return
        actor = f"rollout {found.id}"
        with acting(Origin(actor=actor)):
            await self._activation.end_rollout(
                found.tenant,
                found.name,
                decision.state,
                decision.reason,
                seen=found,
                facts=_facts(found),
                actor=actor,
            )
        _log.info("rollout %s of %r: %s, %s", found.id, found.name, decision.state, decision.reason)

    async def _sweep(self) -> None:
        if time.monotonic() - self._swept_at < _SWEEP_SECONDS:
            return
        self._swept_at = time.monotonic()
        try:
            await self._records.run_blocking(
                self._registry.rollouts.forget_answers, time.time() - ANSWER_DAYS * 86400
            )
        except RegistryError as error:
            _log.warning("old answers of rollouts stay until the next look: %s", error)

    def _names_changed(self) -> None:
        """Load candidates of rollouts that other servers have started, and forget those that have ended."""
        running = {record.rollout.id: record for record in self._catalog if record.rollout is not None}
        for rollout in running.keys() - self._known:
            task = asyncio.get_running_loop().create_task(self._warm(running[rollout]))
            self._warming.add(task)
            task.add_done_callback(self._warming.discard)
        self._known = set(running)
        for key in [key for key in self.totals if key[0] not in running]:
            del self.totals[key]

    async def _warm(self, record: AdapterRecord) -> None:
        if record.rollout is None:
            return
        use = VersionRef(record.tenant, record.name, record.rollout.candidate)
        try:
            async with (
                self._one_warms,
                asyncio.timeout(_WARM_SECONDS),
                self._residency.lease([use], tenant=record.tenant),
            ):
                pass
        except (ApiError, TimeoutError) as error:
            _log.info("the candidate of %r is not in memory yet: %s", record.name, error)

    # ---- what is asked of them -------------------------------------------------------------------

    async def start(
        self,
        tenant: str,
        name: str,
        version: str,
        *,
        percent: float,
        shadow: float,
        settings: RolloutSettings,
        actor: str,
    ) -> Rollout:
        """Start a rollout.

        Raises what ActivationService.start_rollout raises; AdapterNotFoundError, StateConflictError and
        InvalidRequestError also for a judge that is not there, is not ready or generates no text.
        """
        if settings.judge is not None:
            judge = self._catalog.of(tenant).choose(settings.judge.adapter, param="judge.adapter")
            if judge.task != "CAUSAL_LM":
                raise InvalidRequestError(
                    f"judge.adapter: a judge answers with a word, and {judge.named!r} generates no text: its "
                    f"task_type is {judge.task}. Name an adapter that does.",
                    param="judge.adapter",
                    code="adapter_task",
                )
        wanted = RolloutRecord(
            id=new_id("rollout-"),
            tenant=tenant,
            name=name,
            candidate=version,
            baseline="",
            state="running",
            percent=percent,
            shadow=shadow,
            settings=msgspec.to_builtins(settings),
            created_at=time.time(),
            created_by=actor,
        )
        return view(await self._activation.start_rollout(wanted))

    async def change(self, tenant: str, name: str, *, percent: float | None, shadow: float | None) -> Rollout:
        """Change the shares of the rollout that runs."""
        changed = await self._activation.change_rollout(tenant, name, percent=percent, shadow=shadow)
        return view(await self._found(changed))

    async def end(self, tenant: str, name: str, state: RolloutState, *, actor: str) -> Rollout:
        """Promote the candidate of the rollout that runs, or roll it back, because somebody says so."""
        await self.flush()
        names = self._catalog.of(tenant)
        names.check_own(name)
        rollout = names.adapter(name, param="name").rollout
        found = None if rollout is None else await self._found(rollout)
        facts = None if found is None else _facts(found)
        return view(
            await self._activation.end_rollout(
                tenant, name, state, "by hand", seen=found, facts=facts, actor=actor
            )
        )

    async def of_adapter(self, tenant: str, name: str) -> list[Rollout]:
        """Return the latest rollouts of a tenant's own adapter, newest first. Raises
        AdapterNotFoundError."""
        names = self._catalog.of(tenant)
        names.check_own(name, "look at its rollouts")
        names.adapter(name, param="name")
        await self.flush()
        with storage_errors(name):
            found = await self._records.run_blocking(self._registry.rollouts.of_adapter, tenant, name, _SHOWN)
        shown = [view(one) for one in found]
        if found and found[0].state == "running":
            decision = decide(found[0], RolloutSettings.of(found[0]))
            if decision.state == "promoted":
                closed = tuple(await self._closed_gates(found[0]))
                shown[0] = msgspec.structs.replace(shown[0], waits_for=closed)
        return shown

    async def _closed_gates(self, rollout: RolloutRecord) -> list[str]:
        """Return the gates that refuse a promotion whose figures are good enough, with the reasons."""
        with acting(Origin()), suppress(AdapterNotFoundError):  # it asks by itself, not for whoever looks
            found = await self._activation.gates(
                rollout.tenant, rollout.name, rollout.candidate, (rollout.created_by,)
            )
            return [f"{one.gate}: {one.reason.rstrip('.')}" for one in found.gates if not one.passed]
        return []

    async def _found(self, rollout: RolloutRecord) -> RolloutRecord:
        """Return the rollout with its figures of now."""
        with storage_errors(rollout.name):
            return await self._records.run_blocking(self._registry.rollouts.find, rollout.id)

    async def rate(self, tenant: str, answer: str, score: float) -> FeedbackAnswer:
        """Count a user's score (0 to 1) of an answer. Raises UnknownAnswerError, QuotaSpentError."""
        self._count_feedback(tenant)
        if any(one.id == answer for one in (*self._answers, *self._writing[1])):
            await self.flush()
        found = await self._rate(tenant, answer, score)
        if found is None:  # another server may have answered just now
            await asyncio.sleep(1.5 * FLUSH_SECONDS)
            found = await self._rate(tenant, answer, score)
        if found is None:
            raise UnknownAnswerError(answer, ANSWER_DAYS)
        rated, counted = found
        if counted:
            self._touched.add(rated.rollout)
        return FeedbackAnswer(id=answer, score=score, rollout=rated.rollout, counted=counted)

    async def _rate(self, tenant: str, answer: str, score: float) -> tuple[RolloutAnswer, bool] | None:
        with storage_errors():
            return await self._records.run_blocking(self._registry.rollouts.rate, tenant, answer, score)

    def _count_feedback(self, tenant: str) -> None:
        now = time.monotonic()
        self._feedback = {one: window for one, window in self._feedback.items() if window.by_second(now)}
        window = self._feedback.setdefault(tenant, Window())
        if window.total >= MOST_FEEDBACK:
            raise QuotaSpentError(
                f"Tenant {tenant!r} has sent {MOST_FEEDBACK} scores in a minute, as many as it may. Send "
                "fewer, or later.",
                {"quota": "feedback", "limit": MOST_FEEDBACK, "of": "tenant"},
                retry_after=max(1.0, window.seconds_until(MOST_FEEDBACK - 1, now)),
            )
        window.add(1, now)

    def running(self) -> Iterator[RolloutRecord]:
        """Yield the rollouts that run, of all tenants."""
        for record in self._catalog:
            if record.rollout is not None:
                yield record.rollout


def _cluster(part: RolloutPart, request: GenerationRequest) -> int | None:
    """Return the caller's cluster in a rollout that divides callers; None if each request counts."""
    by_request = part.rollout.settings.get("by") == "request"
    if by_request or part.side == "shadow" or request.unit is None:
        return None
    return cluster_of(part.rollout, request.unit)


def _facts(rollout: RolloutRecord) -> dict[str, Any]:
    """Return what the audit log holds of a rollout's end besides its sums."""
    return {"comparisons": msgspec.to_builtins(compare(rollout.figures, RolloutSettings.of(rollout)))}


def view(rollout: RolloutRecord) -> Rollout:
    """Return a rollout as callers get it."""
    settings = RolloutSettings.of(rollout)
    runs = rollout.state == "running"
    return Rollout(
        id=rollout.id,
        name=rollout.name,
        tenant=rollout.tenant,
        version=rollout.candidate,
        active=rollout.baseline,
        state=rollout.state,
        percent=rollout.percent,
        shadow=rollout.shadow,
        by=settings.by,
        promote=settings.promote,
        rules=settings.rules,
        judge=settings.judge,
        sides=side_counts(rollout),
        comparisons=tuple(compare(rollout.figures, settings)),
        waits_for=decide(rollout, settings).waits_for if runs else (),
        reason=rollout.reason,
        created_at=rollout.created_at,
        created_by=rollout.created_by,
        ended_at=rollout.ended_at,
        ended_by=rollout.ended_by,
    )
