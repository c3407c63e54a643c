"""Samples for jobs that learn from rewards: drawn from the engine with the job's newest weights, and graded.

They are background sequences of the tenant that made the job, by its key: they count for its quotas, and only
use what other requests leave free. The choices of one prompt share its prefix.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from onebase_adapters.registry import TrainingJob
from onebase_edge.background import Threads
from onebase_edge.errors import (
    ApiError,
    ContextLengthError,
    InsufficientScopeError,
    QuotaExceededError,
    SequenceFailedError,
    UnavailableError,
)
from onebase_engine.engine.messages import AdapterRef, Sampling
from onebase_server.adapters.catalog import AdapterChoice, VersionRef
from onebase_server.adapters.residency import PackedAdapterFiles, Residency
from onebase_server.inference.generation import (
    GenerationRequest,
    GenerationRun,
    Prompt,
    UsageRecorder,
    new_id,
)
from onebase_server.inference.stream import OutputPiece
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.jobs.grading import AGAIN, MOST_JUDGED, PASSING, GraderProcesses, Grading, RoomWait
from onebase_server.processes.supervisor import EngineSupervisor
from onebase_server.processes.trainer_protocol import DrawnReplies, NotDrawn
from onebase_server.requests.planner import Planner
from onebase_server.tenancy.access import Caller, KeyRing
from onebase_server.tenancy.quotas import Limiter, QuotaReservation
from onebase_training import rollouts
from onebase_training.graders import Graded, Grader, encodable, floor_of
from onebase_training.rollouts import LiveWeights, RewardedReply, RolloutOrder, item_of

MOST_GROUPS = 16
"""Largest number of prompts of one job whose replies the engine has at once."""
LIVE = "live"
"""Name of a job's newest weights in leases, usage and metrics: each step has others."""
_QUOTA_HINT = " In a job, n is group_size and max_tokens is sample_tokens. The job can be resumed."

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass
class _Run:
    """Graders' processes and newest weights of one job."""

    processes: GraderProcesses
    waiting: RoomWait
    weights: LiveWeights | None = None
    judged: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_JUDGED))


class JobSampler:
    """Samples for the jobs of one server. For one event loop.

    Args:
        recorder: makes the recorder of a request's usage.
    """

    def __init__(
        self,
        *,
        planner: Planner,
        supervisor: EngineSupervisor,
        tokenizer: BaseTokenizer,
        reading: Threads,
        files: PackedAdapterFiles,
        residency: Residency,
        keys: KeyRing,
        limiter: Limiter,
        grading: Grading,
        recorder: Callable[[QuotaReservation, GenerationRequest], UsageRecorder],
    ) -> None:
        self._planner = planner
        self._supervisor = supervisor
        self._tokenizer = tokenizer
        self._reading = reading
        self._files = files
        self._residency = residency
        self._keys = keys
        self._limiter = limiter
        self._grading = grading
        self._recorder = recorder
        self._runs: dict[str, _Run] = {}

    async def draw(
        self, job: TrainingJob, rollout: RolloutOrder, say: Callable[[str], None]
    ) -> DrawnReplies | NotDrawn:
        """Return the replies to a rollout's prompts with their rewards, or why there are none.

        Args:
            say: records an event of the job that a person should see.
        """
        run = self._runs.get(job.id)
        if run is None:
            run = self._runs[job.id] = _Run(self._grading.processes(job.tenant), RoomWait(say))
        try:
            caller = await self._caller(job)
            grader = self._grading.check(str(job.settings["grader"]), "grader")
            choice = self._choice(job, run, rollout.weights)
            self._planner.check_limits(rollout.n, None)
            limit = asyncio.Semaphore(MOST_GROUPS)
            groups = (
                self._group(job, run, grader, caller, choice, rollout, prompt, limit)
                for prompt in rollout.prompts
            )
            return DrawnReplies(await _together(groups))
        except ApiError as error:
            _log.warning("job %s gets no samples: %s", job.id, error.message)
            hint = _QUOTA_HINT if isinstance(error, QuotaExceededError) else ""
            return NotDrawn(error.code or "sampling_failed", error.message + hint, error.param)

    def forget(self, job: TrainingJob) -> None:
        """Drop what a job has here, whose process has ended."""
        run = self._runs.pop(job.id, None)
        if run is not None:
            self._drop(run.weights)
            asyncio.get_running_loop().run_in_executor(None, run.processes.close)

    def _drop(self, weights: LiveWeights | None) -> None:
        if weights is not None:
            self._residency.forget(self._files.drop_live(Path(weights.path).parent))

    async def _caller(self, job: TrainingJob) -> Caller:
        """Return the job's key as it is now, in the background: whoever resumes a job may have raised its
        tenant's quotas just before. Raises ApiError."""
        self._keys.doubt()
        caller = await self._keys.caller_of(job.key)
        if not caller.may("generate"):
            raise InsufficientScopeError("generate", caller.key)
        return replace(caller, background=True)

    def _choice(self, job: TrainingJob, run: _Run, weights: LiveWeights | None) -> AdapterChoice:
        """Return the weights as requests name them; those before are dropped."""
        if weights is None:
            return AdapterChoice()
        if weights != run.weights:
            self._drop(run.weights)
            run.weights = weights
            self._files.add_live(Path(weights.path), weights.digest, weights.bytes)
        ref = AdapterRef(weights.digest)
        return AdapterChoice((ref,), (VersionRef(job.tenant, LIVE, ref.digest),), f"{LIVE}@{ref.digest}")

    async def _group(
        self,
        job: TrainingJob,
        run: _Run,
        grader: Grader,
        caller: Caller,
        choice: AdapterChoice,
        rollout: RolloutOrder,
        prompt: rollouts.RolloutPrompt,
        limit: asyncio.Semaphore,
    ) -> list[RewardedReply]:
        """Return the replies to one prompt. Raises ApiError."""
        try:
            async with limit:
                choices = await self._sampled(caller, run, choice, rollout, prompt)
        except (ContextLengthError, SequenceFailedError) as error:  # the other prompts are as good as before
            failed = RewardedReply(
                tokens=[],
                logprobs=[],
                text="",
                reward=floor_of(grader),
                errors={"other_error": f"the engine made no reply: {encodable(error.message)}"},
            )
            return [failed] * rollout.n
        item = item_of(prompt.item)

        async def graded(piece: OutputPiece) -> RewardedReply:
            async with run.judged:
                found = await self._grading.grade(
                    grader, Graded(piece.text, item), caller, run.processes, job.id, run.waiting
                )
                run.waiting.admitted()
            logprobs = [0.0 if one.logprob is None else one.logprob for one in piece.tokens]
            return RewardedReply(
                tokens=piece.ids,
                logprobs=logprobs,
                text=piece.text,
                reward=found.reward,
                parts=found.parts,
                errors=found.errors,
            )

        return await _together(map(graded, choices))

    async def _sampled(
        self,
        caller: Caller,
        run: _Run,
        choice: AdapterChoice,
        rollout: RolloutOrder,
        prompt: rollouts.RolloutPrompt,
    ) -> list[OutputPiece]:
        """Return the choices of one prompt, once the engine and the quotas have room. Raises ApiError."""
        longest = await self._longest(run)
        if len(prompt.tokens) >= longest:
            found = f"has {len(prompt.tokens)} tokens"
            raise ContextLengthError(
                "prompt", found, longest, "Shorten it.", ", those of the answer with them"
            )
        sampling = Sampling(
            temperature=rollout.temperature,
            seed=prompt.seed,
            end_token_ids=self._tokenizer.end_tokens,
            max_tokens=min(prompt.max_tokens, longest - len(prompt.tokens)),
            logprobs=0,
        )
        for pause in AGAIN.pauses():
            request = GenerationRequest(
                id=new_id("rollout-"),
                tenant=caller.tenant,
                priority=caller.priority,
                background=True,
                prompts=(Prompt(prompt.tokens),),
                sampling=sampling,
                adapter=choice,
                n=rollout.n,
                token_ids=True,
                expected_tokens=sampling.max_tokens,
            )
            try:
                choices = await self._run(request, caller)
                run.waiting.admitted()
                return choices
            except PASSING as error:
                run.waiting.refused(error)
                _log.debug("a rollout of %s waits: %s", caller.tenant, error)
                pause = max(pause, error.retry_after or 0.0)
            await asyncio.sleep(pause)
        raise RuntimeError("pauses have no end")

    async def _longest(self, run: _Run) -> int:
        """Return the tokens of the longest sequence that the engine has memory for, once it runs."""
        for pause in AGAIN.pauses():
            try:
                base = self._planner.base()
            except UnavailableError as error:
                run.waiting.refused(error)
                await asyncio.sleep(max(pause, error.retry_after or 0.0))
                continue
            return min(base.max_length, base.kv_longest)
        raise RuntimeError("pauses have no end")

    async def _run(self, request: GenerationRequest, caller: Caller) -> list[OutputPiece]:
        reservation = self._limiter.enter(caller)
        try:
            reservation.admit(request.reserved_tokens, request.choices)
            run = GenerationRun(
                self._supervisor,
                self._tokenizer,
                self._reading,
                request,
                recorder=self._recorder(reservation, request),
            )
            await run.start(self._residency)
        except BaseException:
            reservation.refund_request()
            reservation.sequences_ended()
            reservation.settle(0)
            raise
        return await run.collect()


async def _together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results in order. The first failure cancels the others, waits for their end, and is raised
    alone."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
