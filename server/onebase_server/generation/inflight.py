"""One request's outputs on their way from the engine's socket to the task that answers the caller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from onebase_engine.engine.messages import RowOutput, Submit
from onebase_server.errors import OneBaseError, SlowReaderError


class Inflight:
    """A bounded mailbox: the engine's side never waits, the reader's side may.

    One request is one or more submits (prompts) of `n` rows each. `buffer_limit` counts outputs that
    the reader has not taken yet; one more, and the request fails with SlowReaderError.
    """

    def __init__(self, submits: Sequence[Submit], buffer_limit: int) -> None:
        self.submits = tuple(submits)
        self.open_rows = {submit.id: submit.n for submit in submits}
        self.given_up = False
        """Nobody waits for it any more: its rows end before their time."""
        self.on_cut: Callable[[], None] = lambda: None
        """Called when the request is cut off, to free a reader's connection at once."""
        self.on_ended: Callable[[], None] = lambda: None
        """Called once when the engine has ended the last row, or is gone with all of them."""
        self._limit = buffer_limit
        self._pending: list[RowOutput] = []
        self._failure: OneBaseError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def rows(self) -> int:
        """Rows that the engine has not ended yet."""
        return sum(self.open_rows.values())

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def push(self, output: RowOutput) -> bool:
        """Deliver one output. False: the reader is too slow and the request has just been cut off."""
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
            self.on_cut()
            return False
        self._pending.append(output)
        self._wake()
        return True

    def fail(self, error: OneBaseError) -> None:
        """End the request: outputs already here are still taken, then `error` is raised."""
        if self._failure is None:
            self._failure = error
            self._wake()

    async def take(self) -> list[RowOutput]:
        """All outputs since the last call, at least one. Raises what the request failed with."""
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
