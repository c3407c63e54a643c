"""Outputs of one request on their way from the engine's socket to the task that answers it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from onebase_edge.errors import ClientGoneError, OneBaseError, SlowReaderError
from onebase_engine.engine.messages import RowOutput, Submit
from onebase_server.telemetry.measurements import Moments, Usage


def prompt_tokens(submit: Submit) -> int:
    """Return the number of tokens in the prompt and its branches."""
    return len(submit.prompt) + sum(map(len, submit.branches))


class Inflight:
    """A bounded mailbox: the engine's side never waits, the reader's side may.

    One request is one or more submits (prompts) of `n` rows each. `buffer_limit` counts outputs that
    the reader has not taken yet; one more, and the request fails with SlowReaderError.

    Args:
        on_cut: called when the request is cut off, to free a reader's connection at once.
        on_ended: called once the engine has ended the last row, or is gone with all of them.
        goes_on: whether it is the next part of a request whose last part has just given up its places.
        on_gap: called with the seconds from one of a row's outputs to the next.
    """

    def __init__(
        self,
        submits: Sequence[Submit],
        buffer_limit: int,
        *,
        on_cut: Callable[[], None] = lambda: None,
        on_ended: Callable[[], None] = lambda: None,
        goes_on: bool = False,
        on_gap: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.goes_on = goes_on
        self.submits = tuple(submits)
        self.open_rows = {submit.id: len(submit.choices) for submit in submits}
        self._unseen = {submit.id: prompt_tokens(submit) for submit in submits}
        self.computed = Usage()
        """Tokens that the engine has computed for it, including those that nobody read."""
        self.moments = Moments()
        self._last_at: dict[tuple[str, int], float] = {}
        self._on_gap = on_gap
        self.given_up = False
        """Whether nobody waits for it any more, so that its sequences end early."""
        self.on_ended = on_ended
        self._on_cut = on_cut
        self._limit = buffer_limit
        self._pending: list[RowOutput] = []
        self._failure: OneBaseError | None = None
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
    def rows(self) -> int:
        """Number of sequences that the engine has not ended yet."""
        return sum(self.open_rows.values())

    @property
    def failed(self) -> bool:
        return self._failure is not None

    @property
    def broken(self) -> bool:
        """Return True if it failed, and not because its caller left or was too slow."""
        return self.failed and not isinstance(self._failure, ClientGoneError | SlowReaderError)

    def push(self, output: RowOutput, at: float) -> bool:
        """Deliver one output, made at `at`. False: the reader is too slow, and was just cut off."""
        self._count(output, at)
        if output.finish is not None:
            left = self.open_rows[output.id] - 1
            if left:
                self.open_rows[output.id] = left
            else:
                del self.open_rows[output.id]
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

    def _count(self, output: RowOutput, at: float) -> None:
        computed = self.computed
        if (output.tokens or output.finish == "stop") and output.id in self._unseen:
            computed.prompt += self._unseen.pop(output.id)
            computed.cached += output.cached_tokens or 0
        computed.completion += len(output.tokens)
        moments = self.moments
        if output.queue_seconds is not None:
            moments.begun = max(moments.begun, moments.submitted + output.queue_seconds)
        if output.tokens:
            row = (output.id, output.choice)
            if row in self._last_at:
                self._on_gap(at - self._last_at[row])
            else:
                moments.first = moments.first or at
            self._last_at[row] = moments.last = at
        elif output.finish == "stop":
            moments.last = at

    def fail(self, error: OneBaseError) -> None:
        """End the request: outputs already here are still taken, then `error` is raised."""
        if self._failure is None:
            self._failure = error
            self._wake()

    async def take(self) -> list[RowOutput]:
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
