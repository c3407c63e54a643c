"""Routing of the engine's outputs to their requests, with counts of sequences and the time of the last one's
progress."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

from onebase_edge.errors import ApiError, InvalidRequestError, SequencesFullError
from onebase_engine.engine.messages import Cancel, Stats, StepResult, ToEngine
from onebase_server.processes.crash_suspects import Suspects
from onebase_server.processes.inflight import Inflight
from onebase_server.tenancy.shares import QueueShares

_log = logging.getLogger(__name__)
_LONGEST_RETRY_AFTER = 30.0
_SMOOTHING = 0.1
TOTALS = (
    "steps", "preemptions", "prompt_tokens", "generated_tokens", "cached_tokens", "draft_tokens",
    "right_draft_tokens", "restored_tokens",
)  # fmt: skip
"""Fields of an engine's Stats that only grow."""


class EngineClient:
    """Client of the engine: submits requests and delivers their outputs.

    `send` passes a message to it without blocking. `on_busy` is called when the first sequence starts and
    when the last one has ended."""

    def __init__(
        self,
        queue_limit: int,
        send: Callable[[ToEngine], None],
        on_busy: Callable[[bool], None] = lambda busy: None,
    ) -> None:
        self.stats: Stats | None = None
        """The engine's newest counts; None before its first step, and when it is gone."""
        self._past: Counter[str] = Counter()
        """Totals of the engines that are gone, by field."""
        self._shares = QueueShares()
        """Open sequences by tenant. Those in the background are not counted, since they take no place in the
        queue."""
        self.background_sequences = 0
        self._queue_limit = queue_limit
        self._send = send
        self._on_busy = on_busy
        self._requests: dict[str, Inflight] = {}
        self._suspects = Suspects()
        self._last_progress = time.monotonic()
        self._last_sequence_end = 0.0
        self._seconds_per_sequence = 0.5

    @property
    def open_sequences(self) -> int:
        """Number of sequences that have not ended, of all requests."""
        return self._shares.total + self.background_sequences

    @property
    def foreground_sequences(self) -> int:
        """Number of sequences that have not ended, without those in the background."""
        return self._shares.total

    @property
    def open_requests(self) -> int:
        """Number of requests that have not ended, without those in the background."""
        return len({id(request) for request in self._requests.values() if not request.background})

    @property
    def tenants(self) -> dict[str, int]:
        """Number of sequences that have not ended by tenant, without those in the background."""
        return dict(self._shares.taken)

    def total(self, field: str) -> int:
        """Return one of TOTALS, summed over all engines since the start."""
        return self._past[field] + (getattr(self.stats, field) if self.stats is not None else 0)

    def check_room(self, tenant: str, sequences: int, max_sequences: int) -> None:
        """Check that a tenant may have so many sequences more.

        `max_sequences` run at once and `queue_limit` more may wait.

        Raises SequencesFullError if there is no room and the tenant has its share, InvalidRequestError if
        even an empty queue is too short.
        """
        capacity = self._check_capacity(sequences, max_sequences)
        if not self._shares.has_room(tenant, sequences, capacity):
            raise self._queue_full(sequences, max_sequences)

    def submit(self, request: Inflight, max_sequences: int) -> None:
        """Send a request.

        Raises what `check_room` does, CrashesEngineError, or UnavailableError while another suspect of
        crashes runs.
        """
        if not (request.background or request.is_continuation):
            self.check_room(request.tenant, request.sequences, max_sequences)
        else:
            self._check_capacity(request.sequences, max_sequences)
            if request.background and self.background_sequences >= 2 * max_sequences:
                raise self._queue_full(request.sequences, max_sequences)
        self._suspects.admit(request)
        if self.open_sequences == 0:
            self.note_progress()
            self._on_busy(True)
        if request.background:
            self.background_sequences += request.sequences
        else:
            self._shares.enter(request.tenant, request.sequences)
        for message in request.submits:
            self._requests[message.id] = request
            self._send(message)

    def cancel(self, request: Inflight, request_id: str | None = None, choice: int | None = None) -> None:
        """Cancel all of a request's sequences, or one choice of one of its submits."""
        if choice is None:
            request.given_up = True
        for open_id in [request_id] if request_id else list(request.open_sequences):
            if open_id in self._requests:
                self._send(Cancel(open_id, choice))

    def deliver(self, step: StepResult) -> None:
        """Deliver each sequence's output to its request. Called once per engine step: the api's hot path."""
        now = time.monotonic()
        waits = step.stats.awaits_grammars  # for other processes, each of which has limits of its own
        if step.outputs or self.stats is None or step.stats.steps != self.stats.steps or waits:
            self._last_progress = now
        self.stats = step.stats
        for output in step.outputs:
            request = self._requests.get(output.id)
            if request is None:
                continue
            if not request.push(output, step.at):
                _log.warning("request %s is not read fast enough: cut off", output.id)
                self.cancel(request)
            if output.finish is not None:
                self._sequence_ended(request, output.id, now)

    def fail_all(self, error: ApiError) -> None:
        """End every request's wait with an error; outputs that have arrived are still delivered."""
        for request in self._requests.values():
            request.fail(error.fresh())

    def engine_died(self) -> None:
        """Count a death for the requests that were running; one that is found to be the cause fails with its
        own error."""
        self._suspects.engine_died({id(request): request for request in self._requests.values()}.values())

    def forget_all(self) -> None:
        """Drop all requests: the engine is gone, and its sequences with it."""
        ended = {id(request): request for request in self._requests.values()}
        self._requests.clear()
        self._past = Counter({field: self.total(field) for field in TOTALS})
        self.stats = None
        self._shares.clear()
        self.background_sequences = 0
        self._on_busy(False)
        for request in ended.values():
            request.on_ended()

    def note_progress(self) -> None:
        """Restart the clock of `stalled_for`."""
        self._last_progress = time.monotonic()

    def stalled_for(self) -> float:
        """Return the seconds without progress while there are sequences; 0 if there are none."""
        return time.monotonic() - self._last_progress if self.open_sequences else 0.0

    def _check_capacity(self, sequences: int, max_sequences: int) -> int:
        """Return the number of sequences that run and wait at most, which is not below `sequences`."""
        capacity = max_sequences + self._queue_limit
        if sequences > capacity:
            raise InvalidRequestError(
                f"The request asks for {sequences} completions at once and this server takes {capacity} "
                "(--max-sequences plus --queue-limit). Lower n or send fewer prompts.",
                param="n",
            )
        return capacity

    def _queue_full(self, asked: int, max_sequences: int) -> SequencesFullError:
        waiting = max(0, self.foreground_sequences - max_sequences)
        wait = min(_LONGEST_RETRY_AFTER, self._seconds_per_sequence * (waiting + 1))
        return SequencesFullError(asked, waiting, self._queue_limit, wait)

    def _sequence_ended(self, request: Inflight, request_id: str, now: float) -> None:
        if request.background:
            self.background_sequences -= 1
        else:
            self._shares.leave(request.tenant)
        if not self.open_sequences:
            self._on_busy(False)
        if request_id not in request.open_sequences:
            del self._requests[request_id]
        if not request.open_sequences:
            self._suspects.ended(request)
            request.on_ended()
        if self._last_sequence_end:
            gap = min(_LONGEST_RETRY_AFTER, now - self._last_sequence_end)
            self._seconds_per_sequence += _SMOOTHING * (gap - self._seconds_per_sequence)
        self._last_sequence_end = now
