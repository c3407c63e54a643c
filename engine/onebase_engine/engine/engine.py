"""The engine proper: messages in, one step at a time, events out. It has no sockets and no threads."""

from __future__ import annotations

import logging
import math
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

import numpy as np
import torch
from torch import nn

from onebase_engine.base.layers import adaptable_layers
from onebase_engine.base.load import BaseChangedError, base_tensors, content_sum, fingerprint
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.batch import Packer, StepBatch
from onebase_engine.engine.grammar_follower import GrammarError
from onebase_engine.engine.grammars import IDLE_SECONDS, Grammars, RefusedGrammarError
from onebase_engine.engine.kv_cache import RESTORED, BlockPool, most_tokens
from onebase_engine.engine.memory_budget import staging_bytes
from onebase_engine.engine.messages import ScoredToken, SequenceOutput
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.recurrence import StatePool
from onebase_engine.engine.sampling import Drawn, Mask, begin_draw_apart, forced_end, score_tokens
from onebase_engine.engine.scheduler import (
    BackgroundPace,
    NeverFitsError,
    Scheduler,
    SchedulerLimits,
    TenantPace,
)
from onebase_engine.engine.sequence import AdapterMix, DraftedSequence, Segment, SequenceState, StepPlan
from onebase_engine.engine.slot_table import SlotTable
from onebase_engine.engine.staging import Copy, Staging, copier
from onebase_engine.engine.versions import Versions
from onebase_engine.kernels.weights import MOST_NEW_TOKENS, AdapterWeights
from onebase_engine.machine import is_out_of_memory

if TYPE_CHECKING:
    from onebase_engine.kernels.cuda import ContentSum

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_TOKEN_IDS = re.compile(r"<\[([^\]]*)\]>")
"""Ids of tokens in a grammar of llguidance."""
MAX_WEIGHT = 1e9
"""Largest absolute weight of one adapter in a sum; weights are applied in fp32, which could overflow."""

MAX_SCORE_BYTES = protocol.MAX_MESSAGE_BYTES * 3 // 4
"""Limit, in bytes, of one sequence's prompt logprobs, which travel in one message."""
SCORED_TOKEN_BYTES = 32
ALTERNATIVE_BYTES = 15
"""Upper bounds, in bytes of msgpack, of a scored token and of each alternative next to it."""


HEAD_TILE = 64
"""Number of tokens of one sequence that a classifier computes at once."""


@dataclass
class Counters:
    """Totals since the engine started."""

    steps: int = 0
    failed_steps: int = 0
    """Steps in which every sequence failed."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    restored_tokens: int = 0
    """Tokens whose keys and values were copied back from host memory."""
    draft_tokens: int = 0
    right_draft_tokens: int = 0


@dataclass(frozen=True)
class _StepOutputs:
    """Host copies of one step's results."""

    drawn: list[Drawn]
    """Draws, one for each entry of `StepBatch.sampled`."""
    scores: list[tuple[Segment, list[ScoredToken] | Exception]]
    pooled: list[tuple[Segment, np.ndarray]]
    """Hidden states [tokens, size] fp64 of segments that are pooled."""
    late: frozenset[SequenceState] = frozenset()
    """Sequences whose masks had not come: nothing of them is committed, and they are computed again."""


@dataclass(frozen=True)
class _StartedStep:
    """A step whose computation was started; an accelerator may still be computing it."""

    plan: StepPlan
    read: Callable[[], _StepOutputs]
    """Waits for the results and returns them; may be called any number of times."""
    only_draws: bool
    """Whether the step yields just one token for each sequence that samples, which takes no memory to
    read."""


@dataclass(frozen=True)
class _Computed:
    """Results of a step, none of which is in the state of a sequence or of the scheduler yet."""

    plan: StepPlan
    drawn: list[tuple[SequenceState, list[Drawn]]]
    """Draws of each sequence: those that match its draft, and one more."""
    outputs: _StepOutputs
    next_planned: bool
    """Whether the scheduler already counts the step as computed, because the next one has been planned."""


@dataclass(frozen=True)
class _Failure:
    """Reason why a step failed, without the exception, whose frames hold memory that the retry needs."""

    message: str
    out_of_memory: bool


@dataclass
class _Opening:
    """A request whose grammar is being compiled, with its choices that were not cancelled meanwhile."""

    request: protocol.Submit
    mix: AdapterMix
    choices: list[int]


class _Admission(TypedDict, total=False):
    cached_tokens: int | None
    queue_seconds: float | None


class Engine:
    """One base with its sequences and adapters. Not thread-safe: one thread calls everything."""

    def __init__(
        self,
        base: nn.Module,
        *,
        name: str,
        limits: SchedulerLimits,
        kv_blocks: int,
        block_size: int = 16,
        host_blocks: int = 0,
        state_places: int = 0,
        slots: int = 8,
        slot_memory: int = 0,
        eos_ids: frozenset[int] = frozenset(),
        model: ServedModel | None = None,
        copy: Callable[[AdapterWeights], Copy] | None = None,
        tokenizer: Path | None = None,
    ) -> None:
        """Allocate the KV cache and set up the scheduler.

        Args:
            copy: starts a version's copy to the accelerator; `copier` chooses it by default.
            host_blocks: places in host memory for prefix blocks that leave the KV cache.
            state_places: places for recurrent states, of which each running sequence has two; the others keep
                those behind prefixes. 0: two for each of `limits.max_sequences`, and as many for prefixes.
            tokenizer: folder of the base's tokenizer, without which no sequence can follow a grammar.
        """
        self._base = base
        self._vocabulary = int(base.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        self._eos_ids = frozenset(token for token in eos_ids if 0 <= token < self._vocabulary)
        self._fingerprint = fingerprint(base)
        self._content: int | None = None
        """Sum over the base's bytes, if they are watched."""
        self._watch: ContentSum | None = None
        self._slices: Iterator[None] | None = None
        """Check of the base whose launches are not all made."""
        self._sum_awaited = self._check_again = False
        self.layers = adaptable_layers(base)
        self.model = model or ServedModel(
            base, slots, max_length=limits.max_length, step_tokens=limits.step_tokens
        )
        if self.model.device.type != "cpu":
            self.watch_content()
        places = state_places or 1 + 4 * limits.max_sequences
        states = StatePool(places) if self.model.state_bytes else None
        if states is not None:
            limits = replace(limits, max_sequences=min(limits.max_sequences, states.rows))
        self.model.allocate_kv(kv_blocks, block_size, host_blocks, places)
        kernels = self.model.kernels
        limits = replace(limits, draft_cost=kernels.draft_cost, draft_rows=kernels.draft_rows)
        if not self.model.drafts:
            limits = replace(limits, draft_tokens=0)
        places = host_blocks if self.model.host is not None else 0
        restored = -(-RESTORED * limits.step_tokens // block_size) * len(self.model.groups)
        self.pool = BlockPool(kv_blocks, block_size, places, restored)
        self.versions = Versions()
        self._staging = Staging(
            copy or copier(self.model.device),
            staging_bytes(slot_memory),
            self.versions.weights,
            self.versions.size,
        )
        self.slots = SlotTable(slots, slot_memory, self.versions.size, self._staging.ready)
        self.scheduler = Scheduler(name, self.pool, self.slots, limits, self.model.groups, states)
        self._pace = BackgroundPace(limits.step_tokens)
        self._tenant_pace = TenantPace(limits.step_tokens)
        self._step_clock = time.thread_time if self.model.device.type == "cpu" else time.monotonic
        """Clock of the bound between tenants. On a CPU a step is timed by this thread's processor time: what
        else the machine does would make one that is measured alone look as long as a full one."""
        self.counters = Counters()
        self._grammars: Grammars | None = None
        if tokenizer is not None:
            places = limits.max_sequences * (limits.draft_tokens + 1)
            self._grammars = Grammars(tokenizer, self._vocabulary + MOST_NEW_TOKENS, self._eos_ids, places)
            self.scheduler.awaits = self._grammars.awaits
        self._opening: dict[tuple[str, str], list[_Opening]] = {}
        """Requests whose grammar is being compiled, by tenant and grammar key."""
        self._awaits_grammars = False
        """Whether the last step computed nothing because all sequences wait for grammars or masks."""
        self._packer = Packer(
            block_size, self.model.row_multiple, self.model.groups, recurrent=states is not None
        )
        self._async_scheduling = self.model.kernels.asynchronous
        """Whether the next step is planned while one is computed."""
        self._next: tuple[StepPlan, StepBatch | None] | None = None
        """The step that has been planned, and packed if that did not fail."""
        self._meanwhile: Callable[[], None] | None = None
        """Callback that the caller passed to `step`, until it has been called."""
        self._sequences: dict[str, list[SequenceState]] = {}
        self._arrivals = 0
        self._outputs: list[SequenceOutput] = []
        self._slots_changed = False
        self._slot_seconds: dict[str, float] = {}

    @property
    def longest(self) -> int:
        """Number of tokens of the longest sequence that fits into the KV cache, alone."""
        limits, size = self.scheduler.limits, self.pool.block_size
        return most_tokens(self.model.groups, self.pool.capacity, size, limits.step_tokens, limits.max_length)

    @property
    def kv_tokens(self) -> int:
        """Number of tokens that fit into the KV cache, in sequences as long as `longest`.

        Shorter ones have fewer tokens for which layers with a window have no blocks any more.
        """
        return self.pool.capacity * self.longest // max(self.scheduler.most_blocks(self.longest), 1)

    # ---- requests ---------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._sequences or self._opening)

    def submit(self, request: protocol.Submit) -> None:
        """Queue the request's sequences, or report at once why they can never run."""
        waiting_ids = (one.request.id for waiting in self._opening.values() for one in waiting)
        choices = len(request.branches) or request.n
        none = request.n < 1 or request.n != choices or not request.choices
        if request.id in self._sequences or request.id in waiting_ids or none:
            # Its events could not be distinguished from the first one's, which continues.
            logger.error("ignoring request %s: its id is running already, or it has no choices", request.id)
            return
        mix = AdapterMix.of(request.adapters)
        try:
            longest = max(map(len, request.branches), default=request.sampling.max_tokens)
            self.scheduler.check_limits(len(request.prompt), longest, len(mix.terms))
            check_resume_tokens(request)
            check_scores(request)
            check_weights(mix)
            self.versions.check_mix(mix, self.slots.budget)
            words = self.versions.words(mix, self._vocabulary)
            check_tokens(request, words)
            check_grammar_tokens(request, words)
            check_pooling(request)
            if request.pooling is not None and request.pooling.head:
                count = len(request.prompt) if request.pooling.kind == "each" else 1
                self.versions.check_head(mix, count)
            if request.grammar is not None and self._grammars is None:
                raise NeverFitsError("grammar_refused", "grammar", "this engine has no tokenizer")
        except NeverFitsError as error:
            self._refuse(request, request.choices, error)
            return
        opening = _Opening(request, mix, request.choices)
        if request.grammar is None or self._grammars is None:
            self._admit(opening)
            return
        try:
            key = self._grammars.open_grammar(request.grammar, request.tenant, len(opening.choices))
        except RefusedGrammarError as error:
            refusal = NeverFitsError(error.code, "grammar", str(error))
            self._refuse(request, opening.choices, refusal, error.retry_after)
        else:
            self._opening.setdefault((request.tenant, key), []).append(opening)

    def _refuse(
        self,
        request: protocol.Submit,
        choices: list[int],
        error: NeverFitsError,
        retry_after: float | None = None,
    ) -> None:
        for choice in choices:
            self._outputs.append(
                SequenceOutput(
                    id=request.id,
                    choice=choice,
                    finish="error",
                    error_code=error.code,
                    error_message=str(error),
                    error_param=error.param,
                    retry_after=retry_after,
                )
            )

    def _admit(self, opening: _Opening, grammar: str | None = None) -> None:
        request, sequences = opening.request, list[SequenceState]()
        mix, acts_from = self.versions.activation(opening.mix, request.prompt)
        for choice in opening.choices:
            branch = request.branches[choice] if request.branches else []
            sequence = SequenceState(
                id=request.id,
                choice=choice,
                tokens=request.prompt + branch,
                sampling=request.sampling,
                mix=mix,
                acts_from=acts_from,
                arrival=self._arrivals,
                arrived_at=time.monotonic(),
                tenant=request.tenant,
                words=self.versions.words(opening.mix, self._vocabulary),
                priority=request.priority,
                background=request.background,
                grammar=grammar,
                pooling=request.pooling,
                branch=len(branch),
                leader=sequences[0] if sequences else None,
            )
            if request.resume_tokens is not None:
                sequence.tokens.extend(request.resume_tokens[choice])
            self._arrivals += 1
            sequences.append(sequence)
            self.scheduler.add(sequence)
        self._sequences[request.id] = sequences

    def _admit_compiled(self, timeout: float = 0.0) -> None:
        """Queue the sequences of requests whose grammar has been compiled, or report the grammar's error."""
        if self._grammars is None:
            return
        for opened in self._grammars.opened(timeout):
            for opening in self._opening.pop((opened.tenant, opened.key), ()):
                if opened.error is None:
                    self._admit(opening, opened.key)
                    continue
                self._grammars.close(opened.tenant, opened.key, len(opening.choices))
                error = NeverFitsError(opened.code, "grammar", opened.error)
                self._refuse(opening.request, opening.choices, error, opened.retry_after)

    def cancel(self, message: protocol.Cancel) -> None:
        """End the request's unfinished sequences; each yields its final event."""
        self._cancel_opening(message)
        for sequence in list(self._sequences.get(message.id, ())):
            if message.choice in (None, sequence.choice):
                self._end(sequence, "cancelled")

    def _cancel_opening(self, message: protocol.Cancel) -> None:
        """Cancel sequences whose grammar is being compiled, so that they are not queued."""
        for (tenant, key), waiting in list(self._opening.items()):
            for opening in waiting:
                gone = [one for one in opening.choices if message.choice in (None, one)]
                if opening.request.id != message.id or not gone or self._grammars is None:
                    continue
                opening.choices = [one for one in opening.choices if one not in gone]
                self._outputs += [
                    SequenceOutput(id=message.id, choice=one, finish="cancelled") for one in gone
                ]
                self._grammars.close(tenant, key, len(gone))
            self._opening[tenant, key] = [one for one in waiting if one.choices]
            if not self._opening[tenant, key]:
                del self._opening[tenant, key]

    # ---- adapters ---------------------------------------------------------------------------

    def put_adapter(self, digest: str, weights: AdapterWeights) -> None:
        """Add a version's finished tensors; from now on requests may name it.

        Raises NeverFitsError if no slot can ever hold it.
        """
        self.versions.check_slot(weights, self.slots.budget)
        self.versions.put(digest, weights)

    def unload_adapter(self, digest: str) -> None:
        """Drop a version, at once or when its last sequence ends; `versions.take_dropped` reports it."""
        self.versions.leave(digest)
        self._drop_unused()

    def _drop_unused(self) -> None:
        running = [sequence.mix for sequence in self.scheduler.running]
        in_use = {digest for mix in (*running, *self.scheduler.waiting.mixes) for digest in mix.digests}
        self.versions.drop_unused(in_use, self.slots)

    # ---- steps ------------------------------------------------------------------------------

    def step(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Compute one step. If it fails, compute it in parts and end only the sequences that fail alone.

        Args:
            meanwhile: called once, before the step waits for anything: work of the caller that an accelerator
                need not wait for.

        Raises:
            BaseChangedError, torch.AcceleratorError: nothing can be trusted any more; the process must end.
        """
        self._meanwhile = meanwhile
        if not self._async_scheduling:
            self._do_meanwhile()
        self._admit_compiled()
        began, worked = time.monotonic(), self._step_clock()
        plan, batch = self._next_plan()
        if not plan:
            plan, batch = self._plan(), None
        self._move_blocks(plan)
        if self._apply_moves():
            plan, batch = plan.unfinished(), None
        self._staging.drop_unwanted(digest for mix in self.scheduler.waiting.mixes for digest in mix.digests)
        if not plan:
            self._do_meanwhile()
            if any(sequence.late for sequence in self.scheduler.running):
                return  # More of their cached prefixes is restored before the next step.
            awaiting = self._grammars is not None and any(map(self._grammars.awaits, self.scheduler.running))
            self._awaits_grammars = awaiting or bool(self._opening)
            if self._awaits_grammars:
                self._admit_compiled(IDLE_SECONDS)
            else:
                self._staging.wait()
            return
        self._awaits_grammars = False
        self.counters.steps += 1
        self._note_first_steps(plan)
        started = self._try(partial(self._begin, plan, batch))
        self._do_meanwhile()
        foreseen = self._async_scheduling and isinstance(started, _StartedStep) and started.only_draws
        if foreseen:
            self._plan_next(plan)
        computed = started if isinstance(started, _Failure) else self._wait(started, foreseen)
        del started  # frees its tensors for the retry of a failed step
        if isinstance(computed, _Failure):
            if foreseen:
                self._end_failed(
                    plan, {segment.sequence: computed.message for segment in plan.segments if segment.samples}
                )
            else:
                self._compute_apart(plan)
            return
        for sequence, error in self._commit(computed).items():
            self._fail(sequence, error)
        seconds = time.monotonic() - began
        self._pace.took(plan, seconds)
        self._tenant_pace.took(plan, self._step_clock() - worked)

    def _plan(self, *, ahead: bool = False) -> StepPlan:
        return self.scheduler.plan(self._background_tokens, self._tenant_pace.bounded, ahead=ahead)

    @property
    def _background_tokens(self) -> int:
        return self._pace.alone if self.scheduler.only_background else self._pace.joined

    def _next_plan(self) -> tuple[StepPlan, StepBatch | None]:
        """Return the step that was planned during the last one, without sequences that have ended since."""
        if self._next is None:
            return StepPlan([], []), None
        (planned, batch), self._next = self._next, None
        unfinished = planned.unfinished()
        if self.scheduler.holds_up(unfinished):
            return StepPlan([], []), None
        plan = self.scheduler.settle(unfinished, self._background_tokens)
        if batch is None or plan is not unfinished or len(unfinished.segments) != len(planned.segments):
            return plan, None
        self._packer.fill(batch, plan)
        return plan, batch

    def _plan_next(self, plan: StepPlan) -> None:
        """Plan the step after `plan`, of which only the drawn tokens are still missing."""
        self.scheduler.guess(plan)
        for segment in plan.segments:
            self.scheduler.computed(segment)
        drawn = [segment.sequence for segment in plan.segments if segment.samples]
        for sequence in drawn:
            sequence.drawing = True
        try:
            following = self._plan(ahead=True)
            if following:
                batch = self._try(partial(self._prepare, following))
                self._next = following, None if isinstance(batch, _Failure) else batch
        finally:
            for sequence in drawn:
                sequence.drawing = False

    def _prepare(self, plan: StepPlan) -> StepBatch:
        batch = self._packer.pack(plan, self.slots.slot_of)
        self.model.prepare(batch)
        return batch

    def _do_meanwhile(self) -> None:
        if self._meanwhile is not None:
            meanwhile, self._meanwhile = self._meanwhile, None
            meanwhile()

    def take_outputs(self) -> list[SequenceOutput]:
        """Return the outputs since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def watch_content(self) -> None:
        """Make checks read the base's contents, since on a GPU other processes could write to it."""
        make = getattr(self.model.kernels, "content_sum", None)
        if make is not None:
            self._watch = make(base_tensors(self._base).values(), self.model.device)
        self._content = self._sum_base()

    def check_base(self) -> None:
        """Raise BaseChangedError if anything wrote to the base's tensors. Waits for the device."""
        self._check_fingerprint()
        self._slices, self._sum_awaited, self._check_again = None, False, False
        if self._content is not None:
            self._compare(self._sum_base())

    def begin_base_check(self) -> None:
        """Begin a check that no step waits for: `watch_base` goes on with it.

        Raises BaseChangedError if this process itself wrote to the base.
        """
        if self._watch is None:
            self.check_base()
            return
        self._check_fingerprint()
        if self._slices is None and not self._sum_awaited:
            self._slices = self._watch.begin()
        else:
            self._check_again = True  # what is read already may be written to since

    def watch_base(self) -> None:
        """Launch the next slice of a check, or read its result if it is there, without waiting for it.

        Raises BaseChangedError if anything wrote to the base's tensors.
        """
        if self._slices is not None:
            for _ in self._slices:
                if self.busy:
                    return
            self._slices, self._sum_awaited = None, True
        elif self._sum_awaited and self._watch is not None and (found := self._watch.take()) is not None:
            self._sum_awaited = False
            self._compare(found)
            if self._check_again:
                self._check_again = False
                self.begin_base_check()

    def _check_fingerprint(self) -> None:
        if fingerprint(self._base) != self._fingerprint:
            raise BaseChangedError("a tensor of the shared base was written to")

    def _compare(self, content: int) -> None:
        if content != self._content:
            raise BaseChangedError("a tensor of the shared base was written to")

    def _sum_base(self) -> int:
        if self._watch is None:
            return content_sum(self._base)
        for _ in self._watch.begin():
            pass
        found = self._watch.take(wait=True)
        if found is None:
            raise RuntimeError("a sum over the base was waited for and is not there")
        return found

    def stats(self) -> protocol.Stats:
        return protocol.Stats(
            sequences_running=len(self.scheduler.running),
            sequences_waiting=len(self.scheduler.waiting),
            kv_blocks_free=self.pool.free,
            kv_blocks_cached=self.pool.cached,
            kv_blocks_total=self.pool.capacity,
            kv_blocks_on_host=self.pool.on_host,
            kv_blocks_host_total=self.pool.host_capacity,
            slots_used=self.slots.used,
            steps=self.counters.steps,
            preemptions=self.scheduler.preemptions,
            prompt_tokens=self.counters.prompt_tokens,
            generated_tokens=self.counters.generated_tokens,
            cached_tokens=self.counters.cached_tokens,
            restored_tokens=self.counters.restored_tokens,
            draft_tokens=self.counters.draft_tokens,
            right_draft_tokens=self.counters.right_draft_tokens,
            adapters_loaded=len(self.versions),
            background_waiting=self.scheduler.waiting.in_background,
            awaits_grammars=self._awaits_grammars,
        )

    def slots_changed(self) -> dict[str, float] | None:
        """Return the seconds that each new version took, or None if no slot changed since the last call."""
        if not self._slots_changed:
            return None
        seconds, self._slot_seconds, self._slots_changed = self._slot_seconds, {}, False
        return seconds

    def _move_blocks(self, plan: StepPlan) -> None:
        """Copy blocks to host memory before this step overwrites them, and back before it reads them.

        This is not done in `_try`: a step that is computed again finds the blocks where they are. An error
        here ends the engine, since blocks would not hold what the pool records.
        """
        if self.model.host is not None and self.pool.moving:
            moves = self.pool.take_moves(plan.written(self.pool.block_size))
            self.model.host.make(moves)
            self.counters.restored_tokens += len(moves.back) * self.pool.block_size // len(self.model.groups)

    def _apply_moves(self) -> bool:
        """Update the slots and end sequences whose version cannot be loaded. Return True if any ended."""
        moves, self.slots.moves = self.slots.moves, {}
        if moves:
            self._slots_changed = True
            self._packer.forget()
        failed = self.model.move_slots(moves, self._staging.take_weights) if moves else {}
        for digest, began in self._staging.began.items():
            self._slot_seconds[digest] = time.monotonic() - began
        self._staging.began.clear()
        for slot, error in failed.items():
            logger.error("a version cannot be put into slot %d", slot, exc_info=error)
            _drop_references(error)
            message = f"its adapter cannot be put into a slot: {error}"
            for sequence in self.slots.users(slot):
                self._end(sequence, "error", code="step_failed", message=message)
            self.slots.vacate(slot)
        return bool(failed)

    def _note_first_steps(self, plan: StepPlan) -> None:
        for segment in plan.segments:
            sequence = segment.sequence
            if sequence.queue_seconds is None:
                sequence.queue_seconds = time.monotonic() - sequence.arrived_at
                self.counters.prompt_tokens += sequence.prompt_length
                self.counters.cached_tokens += sequence.cached_tokens or 0

    def _try(self, compute: Callable[[], _Result]) -> _Result | _Failure:
        try:
            return compute()
        except (BaseChangedError, torch.AcceleratorError):
            raise
        except Exception as error:
            logger.exception("computing a step failed")
            failure = _Failure(str(error), is_out_of_memory(error))
            traceback.clear_frames(error.__traceback__)  # they hold tensors, and each other
        if failure.out_of_memory:
            self.model.release_memory()  # without the exception, whose frames hold tensors
        return failure

    def _compute(self, plan: StepPlan) -> _Computed:
        return self._finish(self._begin(plan, None), foreseen=False)

    def _wait(self, started: _StartedStep, foreseen: bool) -> _Computed | _Failure:
        """Wait for a step. If the scheduler already counts on its KV, only the draws are tried again."""
        computed = self._try(partial(self._finish, started, foreseen))
        if foreseen and isinstance(computed, _Failure):
            computed = self._try(partial(self._finish, started, foreseen))
        return computed

    def _begin(self, plan: StepPlan, batch: StepBatch | None) -> _StartedStep:
        """Begin a forward pass and its sampling. Of all state, only KV beyond `computed` changes.

        Such KV lies in blocks of the sequence's own, and every later step writes it again before it reads it.
        `batch` is the plan, if it is packed already.
        """
        if batch is None and not self._async_scheduling:
            batch = self._packer.advance(plan)
        if batch is None:
            batch = self._packer.pack(plan, self.slots.slot_of)
        masked = self._grammars is not None and self._grammars.request(plan.segments)
        logits, hidden = self.model.forward(batch)
        if masked or hidden is not None or batch.scored:
            return _StartedStep(plan, partial(self._read, plan, batch, logits, hidden), only_draws=False)
        sampled_logits = logits if len(logits) == len(batch.sampled) else logits[: len(batch.sampled)]
        ends = self._ends_of_thoughts(batch.sampled)
        read = begin_draw_apart(sampled_logits, batch.sampled, self._eos_ids, self.model.kernels, ends)
        more = any(segment.draft for segment in plan.decodes)
        more = more or any(sequence.sampling.logprobs is not None for sequence in batch.sampled)
        return _StartedStep(plan, lambda: _StepOutputs(read(), [], []), only_draws=not more)

    def _read(
        self, plan: StepPlan, batch: StepBatch, logits: torch.Tensor, hidden: torch.Tensor | None
    ) -> _StepOutputs:
        """Return all results of a forward pass. Waits for the accelerator, and briefly for masks."""
        exact = None if hidden is None else _exactly(hidden)
        pooled = [] if exact is None else [(one, exact[part]) for one, part in batch.pooled]
        scores = [(segment, self._scores(segment, logits[part])) for segment, part in batch.scored]
        sampled_logits = logits[: len(batch.sampled)]
        masks, late = self._masks_of(plan)
        if ends := self._ends_of_thoughts(batch.sampled):
            masks = [
                allowed if end is None or isinstance(allowed, Exception) else end
                for end, allowed in zip(ends, masks or ends, strict=True)
            ]
        drawn = begin_draw_apart(sampled_logits, batch.sampled, self._eos_ids, self.model.kernels, masks)()
        return _StepOutputs(drawn, scores, pooled, late)

    def _finish(self, started: _StartedStep, foreseen: bool) -> _Computed:
        outputs = started.read()
        drawn = iter(outputs.drawn)
        accepted = [
            (segment.sequence, self._accepted(segment, list(islice(drawn, len(segment.draft) + 1))))
            for segment in started.plan.segments
            if segment.samples
        ]
        if self.model.state_bytes and any(segment.draft for segment in started.plan.decodes):
            right = {sequence: len(draws) - 1 for sequence, draws in accepted}
            self.model.rewind(*self._packer.rewound(started.plan, right))
        return _Computed(started.plan, accepted, outputs, foreseen)

    def _masks_of(self, plan: StepPlan) -> tuple[list[Mask], frozenset[SequenceState]]:
        """Return the mask of each entry of `StepBatch.sampled`, and the sequences whose masks have not
        come."""
        if self._grammars is None:
            return [], frozenset()
        mask_of = self._grammars.masks(plan.segments, self.model.synchronize)
        masks: list[Mask] = []
        for segment in plan.segments:
            if mask_of and segment.samples:
                mask = mask_of.get(segment.sequence)
                masks.extend(mask if isinstance(mask, np.ndarray) else [mask] * (1 + len(segment.draft)))
        return masks, frozenset(sequence for sequence, mask in mask_of.items() if mask is None)

    def _ends_of_thoughts(self, sequences: Sequence[SequenceState | DraftedSequence]) -> list[Mask]:
        """Return masks that end the thoughts whose budgets are spent; none at all if no thought is to end."""
        ends = [self._end_of_thought(sequence) for sequence in sequences]
        if not any(end is not None for end in ends):
            return []
        masks: list[Mask] = []
        for end in ends:
            if end is None:
                masks.append(None)
                continue
            allowed = np.zeros(-(-(self._vocabulary + MOST_NEW_TOKENS) // 32), dtype=np.uint32)
            allowed[end // 32] = 1 << end % 32
            masks.append(allowed.view(np.int32))
        return masks

    def _end_of_thought(self, sequence: SequenceState | DraftedSequence) -> int | None:
        """Return the token that has to end a thought next, unless `min_tokens` forbids it: then none does."""
        end, sampling = forced_end(sequence), sequence.sampling
        if end is None or sequence.generated >= sampling.min_tokens:
            return end
        ends = (self._eos_ids, sampling.end_token_ids, sampling.stop_token_ids)
        return None if any(end in one for one in ends) else end

    def _scores(self, segment: Segment, logits: torch.Tensor) -> list[ScoredToken] | Exception:
        """Score the prompt tokens that follow the segment's, or return the exception that this raised."""
        sequence = segment.sequence
        targets = [sequence.tokens[number + 1] for number in segment.scored]
        by_place = sequence.sampling.prompt_targets
        named = [by_place.get(number + 1, []) for number in segment.scored] if by_place else []
        top = sequence.sampling.prompt_logprobs or 0
        try:
            return score_tokens(logits[:, : sequence.words], targets, top, named)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            return error

    def _commit(self, computed: _Computed) -> dict[SequenceState, Exception]:
        """Apply a step's results to all sequences but those that failed alone. Return their exceptions."""
        late = computed.outputs.late
        drawn_of = {sequence: drawn for sequence, drawn in computed.drawn if sequence not in late}
        failed = {
            sequence: drawn[0].error for sequence, drawn in drawn_of.items() if drawn[0].error is not None
        }
        for segment, scores in computed.outputs.scores:
            sequence = segment.sequence
            if sequence in late:
                continue
            if isinstance(scores, Exception):
                failed[sequence] = scores
                continue
            afresh = segment.start <= sequence.first_scored
            sequence.prompt_scores = scores if afresh else sequence.prompt_scores + scores
            sequence.prompt_scored = segment.stop >= sequence.prompt_length
        for segment, hidden in computed.outputs.pooled:
            self._pool(segment, hidden)
        for segment in computed.plan.segments:
            sequence = segment.sequence
            if sequence in failed or sequence in late:
                continue
            accepted = drawn_of.get(sequence, [])
            sequence.tokens.extend(draw.token for draw in accepted[:-1] if draw.token is not None)
            if not computed.next_planned:
                self.scheduler.computed(segment, right=max(len(accepted) - 1, 0))
            self.counters.draft_tokens += len(segment.draft)
            self.counters.right_draft_tokens += max(len(accepted) - 1, 0)
            if accepted:
                self._append(sequence, accepted)
            elif sequence.prefilled and not sequence.generates:
                self._answer(sequence)
        if self._grammars is not None:
            unfinished = (sequence for sequence in drawn_of if sequence.finish is None)
            self._grammars.note_drawn(unfinished, foresee=bool(self.scheduler.limits.draft_tokens))
        return failed

    def _accepted(self, segment: Segment, drawn: list[Drawn]) -> list[Drawn]:
        """Return the drawn tokens that match the draft, and the first one that does not."""
        sequence = segment.sequence
        count = 1
        for guess, before in zip(segment.draft, drawn, strict=False):
            ends = before.token is None or self._finish_reason(sequence, before.token, count)[0] is not None
            if ends or before.token != guess or drawn[count].token is None or drawn[count].error is not None:
                break
            count += 1
        return drawn[:count]

    def _compute_apart(self, plan: StepPlan) -> None:
        """Compute a failed step again in parts: decodes together, then by halves, and each prefill alone.

        A sequence that fails alone ends. Where every one does, none is to blame: the step has failed.
        """
        parts = [StepPlan(plan.decodes, [])] if plan.decodes else []
        parts += [StepPlan([], [segment]) for segment in plan.prefills]
        failed: dict[SequenceState, str] = {}
        while parts:
            part = parts.pop(0)
            computed = self._try(partial(self._compute, part))
            if isinstance(computed, _Computed):
                for sequence, error in self._commit(computed).items():
                    failed[sequence] = str(error)
                    _drop_references(error)
            elif smaller := _smaller(part, computed):
                parts = smaller + parts
            else:
                failed[part.segments[0].sequence] = computed.message
        self._end_failed(plan, failed)

    def _end_failed(self, plan: StepPlan, failed: dict[SequenceState, str]) -> None:
        """End the sequences of a failed step, for the given reasons."""
        nobody = len(failed) == len(plan.segments)
        self.counters.failed_steps += nobody
        code, what = ("step_failed", "the step") if nobody else ("row_failed", "this sequence")
        for sequence, message in failed.items():
            logger.error("a sequence of request %s failed: %s", sequence.id, message)
            self._end(sequence, "error", code=code, message=f"{what} failed: {message}")

    def _fail(self, sequence: SequenceState, error: Exception) -> None:
        """End a sequence because of an exception of its own."""
        if isinstance(error, GrammarError):
            self._end(sequence, "error", code="grammar_refused", message=str(error))
            return
        logger.error("a sequence of request %s failed", sequence.id, exc_info=error)
        _drop_references(error)
        self._end(sequence, "error", code="row_failed", message=f"this sequence failed: {error}")

    def _answer(self, sequence: SequenceState) -> None:
        """End a sequence that generates nothing, with its prompt logprobs or pooled vector."""
        if not all(math.isfinite(one.logprob) for one in sequence.prompt_scores):
            message = "the logits are not finite: an adapter of this request overflows"
            self._end(sequence, "error", code="not_finite", message=message)
            return
        vector = None
        if sequence.pooling is not None:
            values = np.stack(sequence.pooled)
            if sequence.pooling.kind == "mean":
                values /= sequence.prompt_length
            if sequence.pooling.head and sequence.pooling.kind != "each":
                values = np.stack([self._classified(sequence, one) for one in values])
            narrow = values.astype("<f4")
            if not np.isfinite(narrow).all():
                message = "the hidden states are not finite: an adapter of this request overflows"
                self._end(sequence, "error", code="not_finite", message=message)
                return
            vector = narrow.tobytes()
        self._end(sequence, "stop", vector=vector)

    def _classified(self, sequence: SequenceState, hidden: np.ndarray) -> np.ndarray:
        """Return the classifier's values [labels] fp64 of one state. Computed alone, its bits never vary."""
        weight, bias = self.versions.heads[sequence.mix.digests[0]]
        values: np.ndarray = weight @ hidden + bias
        return values

    def _classified_each(self, sequence: SequenceState, first: int, hidden: np.ndarray) -> list[np.ndarray]:
        """Return the classifier's values [labels] fp64 of each state [hidden], from token `first` on.

        They are computed in tiles of one size, in which a token's place depends on its number alone, so that
        chunks of another length give the same bits. One state at a time would take several times as long.
        """
        weight, bias = self.versions.heads[sequence.mix.digests[0]]
        before = first % HEAD_TILE
        tiles = np.zeros((-(-(before + len(hidden)) // HEAD_TILE), HEAD_TILE, hidden.shape[1]))
        tiles.reshape(-1, hidden.shape[1])[before : before + len(hidden)] = hidden
        values = np.concatenate([tile @ weight.T + bias for tile in tiles])
        return list(values[before : before + len(hidden)])

    def _pool(self, segment: Segment, hidden: np.ndarray) -> None:
        """Add hidden states to a sequence's, one by one, so that the length of chunks changes no bit."""
        sequence = segment.sequence
        if segment.start == 0:
            sequence.pooled = []
        if sequence.pooling is not None and sequence.pooling.kind == "each":
            sequence.pooled += (
                self._classified_each(sequence, segment.start, hidden) if sequence.pooling.head else hidden
            )
            return
        sequence.pooled = sequence.pooled or [np.zeros(hidden.shape[1])]
        for state in hidden:
            sequence.pooled[0] += state

    def _append(self, sequence: SequenceState, accepted: list[Drawn]) -> None:
        """Append the new tokens to a sequence; all but the last are among its tokens already."""
        tokens = [drawn.token for drawn in accepted if drawn.token is not None]
        if not tokens:
            message = "the logits are not finite: an adapter of this request overflows"
            self._end(sequence, "error", code="not_finite", message=message)
            return
        sequence.tokens.append(tokens[-1])
        if sequence.forced:
            sequence.forced = (
                sequence.forced[len(tokens) :] if sequence.forced[: len(tokens)] == tokens else []
            )
        self.counters.generated_tokens += len(tokens)
        if sequence.drafts is not None:
            sequence.drafts.observe(tokens)
        finish, stop_token = self._finish_reason(sequence, tokens[-1])
        logprobs = [drawn.logprob for drawn in accepted if drawn.logprob is not None]
        output = SequenceOutput(
            id=sequence.id,
            choice=sequence.choice,
            tokens=tokens,
            logprobs=logprobs or None,
            prompt_logprobs=self._prompt_scores(sequence),
            finish=finish,
            stop_token=stop_token,
            **self._admission(sequence),
        )
        self._outputs.append(output)
        if finish is not None:
            sequence.finish = finish
            self._remove(sequence)

    def _finish_reason(
        self, sequence: SequenceState, token: int, more: int = 0
    ) -> tuple[protocol.FinishReason | None, int | None]:
        """Return the finish reason if the sequence ends with `token`, when it has `more` tokens than now."""
        sampling = sequence.sampling
        ends = token in self._eos_ids or token in sampling.end_token_ids
        if token in sampling.stop_token_ids or (ends and not sampling.ignore_eos):
            return "stop", token
        return ("length", None) if sequence.generated + more >= sampling.max_tokens else (None, None)

    def _prompt_scores(self, sequence: SequenceState) -> list[protocol.ScoredToken] | None:
        return sequence.prompt_scores if sequence.prompt_scored and not sequence.reported else None

    def _admission(self, sequence: SequenceState) -> _Admission:
        """Return the figures that go with a sequence's first output, and nothing later."""
        if sequence.reported:
            return {}
        sequence.reported = True
        return {"cached_tokens": sequence.cached_tokens, "queue_seconds": sequence.queue_seconds}

    def _end(
        self,
        sequence: SequenceState,
        finish: protocol.FinishReason,
        code: str | None = None,
        message: str | None = None,
        vector: bytes | None = None,
    ) -> None:
        """End a sequence with its final event: before its time, or one that generates nothing."""
        sequence.finish = finish
        scores = self._prompt_scores(sequence) if finish == "stop" else None
        self._outputs.append(
            SequenceOutput(
                id=sequence.id,
                choice=sequence.choice,
                finish=finish,
                error_code=code,
                error_message=message,
                prompt_logprobs=scores,
                vector=vector,
                **self._admission(sequence),
            )
        )
        self._remove(sequence)

    def _remove(self, sequence: SequenceState) -> None:
        self.scheduler.finish(sequence)
        if self._grammars is not None:
            self._grammars.forget(sequence)
        siblings = self._sequences[sequence.id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[sequence.id]
        if self.versions.any_leaving:
            self._drop_unused()


def _drop_references(error: Exception) -> None:
    """Clear an exception's traceback and causes, whose frames hold tensors and the exception itself."""
    error.__traceback__ = error.__context__ = error.__cause__ = None


def _exactly(hidden: torch.Tensor) -> np.ndarray:
    """Return hidden states in fp64, on the host."""
    states: np.ndarray = hidden.float().cpu().numpy().astype(np.float64)
    return states


def _smaller(part: StepPlan, failure: _Failure) -> list[StepPlan]:
    """Split a failed part into smaller ones. A single sequence is split only if memory ran out."""
    if any(segment.draft for segment in part.decodes):
        return [StepPlan([replace(segment, draft=()) for segment in part.decodes], [])]
    if len(part.decodes) > 1:
        half = len(part.decodes) // 2
        return [StepPlan(part.decodes[:half], []), StepPlan(part.decodes[half:], [])]
    (segment,) = part.segments
    if failure.out_of_memory and segment.length > 1:
        # The next step continues from there.
        return [StepPlan([], [Segment(segment.sequence, segment.start, segment.start + segment.length // 2)])]
    return []


# ---- what is checked of a request, since a value that fails a step takes its neighbours along -----------
# The api checks the same and more, with the user's own field names; here are the last lines of defence.


def check_tokens(request: protocol.Submit, vocabulary: int) -> None:
    """Raise NeverFitsError for a token id that the base, or the request's adapter, does not have; on CUDA it
    would end the process."""
    sampling = request.sampling
    thought = sampling.thought
    ends = (
        () if thought is None else (thought.end,) if thought.begin is None else (thought.end, thought.begin)
    )
    groups = {
        "prompt": request.prompt,
        "logit_bias": sampling.logit_bias,
        "stop_token_ids": sampling.stop_token_ids,
        "end_token_ids": sampling.end_token_ids,
        "thinking_token_budget": ends,
        "choices": [token for branch in request.branches for token in branch],
        "resume_tokens": [token for tokens in (request.resume_tokens or {}).values() for token in tokens],
    }
    for param, tokens in groups.items():
        for token in tokens:
            if not 0 <= token < vocabulary:
                raise NeverFitsError(
                    "token_out_of_range",
                    param,
                    f"{param}: token id {token} is not in the vocabulary (0 to {vocabulary - 1})",
                )


def check_grammar_tokens(request: protocol.Submit, vocabulary: int) -> None:
    """Raise NeverFitsError for a grammar that names a token id, as `<[5]>`, which the request's model does
    not have. Grammars are compiled for the largest vocabulary of any adapter."""
    grammar = request.grammar
    if grammar is None:
        return
    text = grammar.text if grammar.kind in ("grammar", "lark") else ""
    for found in _TOKEN_IDS.finditer(f"{grammar.before or ''}\n{text}"):
        ids = map(int, re.findall(r"\d{1,18}", found[1]))
        if (highest := max(ids, default=0)) >= vocabulary:
            raise NeverFitsError(
                "grammar_refused",
                "grammar",
                f"the grammar names the token id {highest}, which is not in the vocabulary (0 to "
                f"{vocabulary - 1})",
            )


def check_resume_tokens(request: protocol.Submit) -> None:
    """Raise NeverFitsError for resumed sequences with tokens that they cannot have generated."""
    most = request.sampling.max_tokens
    for choice, tokens in (request.resume_tokens or {}).items():
        if not 0 <= choice < request.n or len(tokens) >= most or request.branches or request.pooling:
            raise NeverFitsError(
                "cannot_go_on",
                "resume_tokens",
                f"choice {choice} of {request.n} has {len(tokens)} tokens of {most}",
            )


def check_pooling(request: protocol.Submit) -> None:
    """Raise NeverFitsError for hidden states of each token without a classifier, which nothing pools."""
    pooling = request.pooling
    if pooling is not None and pooling.kind == "each" and not pooling.head:
        raise NeverFitsError(
            "no_classifier", "pooling", "pooling each token takes a classifier; use last or mean without one"
        )


def check_weights(mix: AdapterMix) -> None:
    """Raise NeverFitsError for an adapter weight that fp32 cannot hold."""
    for _, weight in mix.terms:
        if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
            raise NeverFitsError(
                "weight_out_of_range", "adapter", f"adapter weight {weight} is not within ±{MAX_WEIGHT:g}"
            )


def check_scores(request: protocol.Submit) -> None:
    """Raise NeverFitsError for prompt logprobs that no message to the api could hold."""
    top = request.sampling.prompt_logprobs
    if top is None:
        return
    named = 9 * sum(map(len, request.sampling.prompt_targets.values()))  # a float of msgpack
    most = (MAX_SCORE_BYTES - named) // (SCORED_TOKEN_BYTES + ALTERNATIVE_BYTES * top)
    if len(request.prompt) > most:
        raise NeverFitsError(
            "prompt_logprobs_too_large",
            "logprobs",
            f"prompt logprobs with {top} alternatives are limited to {max(0, most)} tokens, and this prompt "
            f"has {len(request.prompt)}; lower logprobs or shorten the prompt",
        )
