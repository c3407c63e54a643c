"""Outputs of one request on their way from the engine's socket to the task that answers it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from onebase_edge.errors import ApiError, ClientGoneError, SlowReaderError
from onebase_engine.engine.messages import SequenceOutput, Submit
from onebase_server.telemetry.measurements import RequestTimestamps, TokenUsage


def prompt_tokens(submit: Submit) -> int:
    """Return the number of tokens in the prompt and its branches."""
    return len(submit.prompt) + sum(map(len, submit.branches))


class Inflight:
    """A bounded mailbox: the engine's side never waits, the reader's side may.

    One request is one or more submits (prompts) of `n` sequences each. `buffer_limit` is the largest number
    of outputs that the reader has not read yet; with one more the request fails with SlowReaderError.

    Args:
        on_cut: called when the request is cut off, to free a reader's connection at once.
        on_ended: called once the engine has ended the last sequence, or is gone with all of them.
        is_continuation: whether it is the next part of a request whose last part has just released its
        places. on_gap: called with the seconds from one of a sequence's outputs to the next.
    """

    def __init__(
        self,
        submits: Sequence[Submit],
        buffer_limit: int,
        *,
        on_cut: Callable[[], None] = lambda: None,
        on_ended: Callable[[], None] = lambda: None,
        is_continuation: bool = False,
        on_gap: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.is_continuation = is_continuation
        self.submits = tuple(submits)
        self.open_sequences = {submit.id: len(submit.choices) for submit in submits}
        self._unseen = {submit.id: prompt_tokens(submit) for submit in submits}
        self.computed = TokenUsage()
        """Tokens that the engine has computed for it, including those that nobody read."""
        self.timestamps = RequestTimestamps()
        self._last_at: dict[tuple[str, int], float] = {}
        self._on_gap = on_gap
        self.given_up = False
        """Whether nobody waits for it any more, so that its sequences end early."""
        self.on_ended = on_ended
        self._on_cut = on_cut
        self._limit = buffer_limit
        self._pending: list[SequenceOutput] = []
        self._failure: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def tenant(self) -> str:
        """Tenant of the request."""
        return self.submits[0].tenant

    @property
    def background(self) -> bool:
        """Return True if its sequences only use capacity that other requests leave free."""
        return self.submits[0].background

    @property
    def sequences(self) -> int:
        """Number of sequences that the engine has not ended yet."""
        return sum(self.open_sequences.values())

    @property
    def failed(self) -> bool:
        return self._failure is not None

    @property
    def broken(self) -> bool:
        """Return True if it failed, and not because its caller left or was too slow."""
        return self.failed and not isinstance(self._failure, ClientGoneError | SlowReaderError)

    def push(self, output: SequenceOutput, at: float) -> bool:
        """Deliver one output, made at `at`. False: the reader is too slow, and was just cut off."""
        self._count(output, at)
        if output.finish is not None:
            left = self.open_sequences[output.id] - 1
            if left:
                self.open_sequences[output.id] = left
            else:
                del self.open_sequences[output.id]
        if self._failure is not None:
            return True
        if len(self._pending) >= self._limit:
            self._pending.clear()
            self.fail(SlowReaderError())
            self._on_cut()
            return False
        self._pending.append(output)
        self._wake()
        return True

    def _count(self, output: SequenceOutput, at: float) -> None:
        computed = self.computed
        if (output.tokens or output.finish == "stop") and output.id in self._unseen:
            computed.prompt += self._unseen.pop(output.id)
            computed.cached += output.cached_tokens or 0
        computed.completion += len(output.tokens)
        timestamps = self.timestamps
        if output.queue_seconds is not None:
            timestamps.started = max(timestamps.started, timestamps.submitted + output.queue_seconds)
        if output.tokens:
            sequence = (output.id, output.choice)
            if sequence in self._last_at:
                self._on_gap(at - self._last_at[sequence])
            else:
                timestamps.first = timestamps.first or at
            self._last_at[sequence] = timestamps.last = at
        elif output.finish == "stop":
            timestamps.last = at

    def fail(self, error: ApiError) -> None:
        """End the request: outputs already here are still taken, then `error` is raised."""
        if self._failure is None:
            self._failure = error
            self._wake()

    async def next_outputs(self) -> list[SequenceOutput]:
        """Return all outputs since the last call, at least one.

        Raises what the request failed with.
        """
        while not self._pending:
            if self._failure is not None:
                raise self._failure
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        batch, self._pending = self._pending, []
        return batch

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
