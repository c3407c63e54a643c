"""A job on the server, asynchronous: TrainingJob's methods, awaited. What they mean is documented there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio

from . import _training_parse, _training_requests
from ._event_stream import AsyncEventStream, Patience
from ._http import AsyncResponse, Reply
from ._job_view import CURVE_EVENTS, JobView, check, curve_is_in_file, settled
from ._job_watch import Watcher, watcher
from ._paging import Page, acollect, page_of
from ._parse import parse
from ._requests import Call
from .errors import APIConnectionError, APIStatusError, APITimeoutError
from .training_types import (
    CurvePoint,
    TrainingCallback,
    TrainingCheckpoint,
    TrainingEvent,
    TrainingJobInfo,
)


class AsyncTrainingJob(JobView):
    """A job on the server. Its properties are as the server told them last."""

    def __init__(
        self,
        info: TrainingJobInfo,
        send: Callable[[Call], Awaitable[Reply]],
        open: Callable[[Call], Awaitable[AsyncResponse]],
    ) -> None:
        super().__init__(info)
        self._send = send
        self._open = open

    async def refresh(self) -> AsyncTrainingJob:
        """As TrainingJob.refresh."""
        return await self._after(_training_requests.job(self.id))

    async def wait(self, *, progress: bool | TrainingCallback = True) -> AsyncTrainingJob:
        """As TrainingJob.wait."""
        newest = await self._newest_event()
        with watcher(progress) as watch:
            await self._refresh_patiently()
            watch.show(self.info)
            if not settled(self.info):
                async with AsyncEventStream(self._open, self.id, newest, known=True) as events:
                    await self._follow(events, watch)
            check(self.info)
        return self

    def stream_events(self, *, after: str | None = None) -> AsyncEventStream:
        """As TrainingJob.stream_events, for `async with` and `async for`."""
        return AsyncEventStream(self._open, self.id, after)

    async def events(self, *, limit: int | None = 100, after: str | None = None) -> tuple[TrainingEvent, ...]:
        """As TrainingJob.events."""

        async def fetch(last: str | None, size: int) -> Page[TrainingEvent]:
            call = _training_requests.events(self.id, last, size)
            return parse((await self._send(call)).body, page_of(_training_parse.event))

        return await acollect(fetch, limit, after)

    async def checkpoints(self) -> tuple[TrainingCheckpoint, ...]:
        """As TrainingJob.checkpoints."""

        async def fetch(last: str | None, size: int) -> Page[TrainingCheckpoint]:
            call = _training_requests.checkpoints(self.id, last, size)
            return parse((await self._send(call)).body, page_of(_training_parse.checkpoint))

        return await acollect(fetch, None)

    async def curve(self) -> tuple[CurvePoint, ...]:
        """As TrainingJob.curve."""
        if curve_is_in_file(self.info):
            call = _training_requests.file(self.info.result_files[0], "content")
            return _training_parse.curve_of_file((await self._send(call)).body)
        return _training_parse.curve_of_events(await self.events(limit=CURVE_EVENTS))

    async def cancel(self) -> AsyncTrainingJob:
        """As TrainingJob.cancel."""
        return await self._after(_training_requests.change(self.id, "cancel"))

    async def pause(self) -> AsyncTrainingJob:
        """As TrainingJob.pause."""
        return await self._after(_training_requests.change(self.id, "pause"))

    async def resume(self) -> AsyncTrainingJob:
        """As TrainingJob.resume."""
        return await self._after(_training_requests.change(self.id, "resume"))

    async def _follow(self, events: AsyncEventStream, watch: Watcher) -> None:
        """Until the job is settled."""
        async for event in events:
            if self._take(event):
                await self._refresh_patiently()
            watch.tell(event)
            watch.show(self.info)
            if settled(self.info):
                return
        self._info = events.job or self.info
        watch.show(self.info)

    async def _newest_event(self) -> str | None:
        """The id of what it told last; also while the server is started again."""
        reply = await self._send_patiently(_training_requests.events(self.id, None, 1))
        items = parse(reply.body, page_of(_training_parse.event)).items
        return items[0].id if items else None

    async def _refresh_patiently(self) -> None:
        """As `refresh`, also while the server is started again."""
        reply = await self._send_patiently(_training_requests.job(self.id))
        self._info = parse(reply.body, _training_parse.job)

    async def _send_patiently(self, call: Call) -> Reply:
        patience = Patience()
        while True:
            try:
                return await self._send(call)
            except (APIConnectionError, APITimeoutError, APIStatusError) as error:
                delay = patience.delay(error, call)
            await anyio.sleep(delay)

    async def _after(self, call: Call) -> AsyncTrainingJob:
        self._info = parse((await self._send(call)).body, _training_parse.job)
        return self
