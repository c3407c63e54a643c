"""A job on the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio

from onebase_protocol.common import PageAnswer

from .._core import training
from .._core.jobs import CURVE_EVENTS, JobObserver, JobView, check_outcome, curve_is_in_file, settled
from .._core.parse import decode
from .._core.requests import Call
from .._core.retry import ReconnectBackoff
from .._http import Reply
from .._terminal.jobs import observer
from ..errors import APIConnectionError, APIStatusError, APITimeoutError
from ..training_types import (
    CurvePoint,
    TrainingCallback,
    TrainingCheckpoint,
    TrainingEvent,
    TrainingJobInfo,
)
from .http import AsyncHttp
from .streams import AsyncEventStream


class AsyncTrainingJob(JobView):
    """A job on the server. Its properties are as the server reported them last.

    Examples:
        >>> job = await client.training.get("ftjob-3f2a9c41")  # doctest: +SKIP
        >>> await job.wait()  # doctest: +SKIP
        >>> print(job.report)  # doctest: +SKIP
    """

    def __init__(self, info: TrainingJobInfo, http: AsyncHttp) -> None:
        super().__init__(info)
        self._http = http

    async def refresh(self) -> AsyncTrainingJob:
        """Ask the server how the job is now. Gives the job itself."""
        return await self._updated(training.job(self.id))

    async def wait(self, *, progress: bool | TrainingCallback = True) -> AsyncTrainingJob:
        """Wait until the adapter is there, and give the job itself. The job continues if you stop waiting.

        It returns when the job has succeeded, or when one that was made with `hold` is checked and waits for
        `resume`. It raises for any other paused job, which does not continue by itself: resume it and wait
        again.

        Args:
            progress: Draw a bar with loss, tokens per second and time left on stderr, or print lines if that
                is no terminal. Or a function that is called with each change instead.

        Raises:
            TrainingFailedError: the job failed; the error is the server's.
            TrainingStoppedError: it was cancelled or paused, now or before.
            APIConnectionError, APITimeoutError: the server was away for more than about a minute.
        """
        newest = await self._newest_event()
        with observer(progress) as watch:
            await self._refresh_patiently()
            watch.show(self.info)
            if not settled(self.info):
                async with AsyncEventStream(self._http.open_stream, self.id, newest, known=True) as events:
                    await self._follow(events, watch)
            check_outcome(self.info)
        return self

    def stream_events(self, *, after: str | None = None) -> AsyncEventStream:
        """Return the job's events as they happen, until it ends; see AsyncEventStream.

        Args:
            after: The id of an event: begin after it. By default with the job's first event.
        """
        return AsyncEventStream(self._http.open_stream, self.id, after)

    async def events(self, *, limit: int | None = 100, after: str | None = None) -> tuple[TrainingEvent, ...]:
        """Return the job's events so far, the newest first.

        Args:
            limit: The largest number of events; None: all.
            after: The id of the last event of an earlier answer, to continue with older ones.
        """
        return await self._http.collect(
            lambda last, size: training.events(self.id, last, size), PageAnswer[TrainingEvent], limit, after
        )

    async def checkpoints(self) -> tuple[TrainingCheckpoint, ...]:
        """Return the checkpoints that the job could continue from, the newest first."""
        return await self._http.collect(
            lambda last, size: training.checkpoints(self.id, last, size), PageAnswer[TrainingCheckpoint]
        )

    async def curve(self) -> tuple[CurvePoint, ...]:
        """Return the losses by step: of the result file if the job has succeeded, else of the newest 5000
        events."""
        if curve_is_in_file(self.info):
            reply = await self._http.send(training.file(self.info.result_files[0], "content"))
            return training.curve_of_file(reply.body)
        return training.curve_of_events(await self.events(limit=CURVE_EVENTS))

    async def data_report(self) -> Mapping[str, Any] | None:
        """Return the check's report of the job's files: tokens, findings, and rows as the model reads them.

        It waits for the check. None if the check failed.
        """
        async with self.stream_events() as events:
            async for event in events:
                if event.data.get("kind") == "data_checked":
                    report: Mapping[str, Any] = event.data["report"]
                    return report
                if event.type == "metrics":
                    break
        return None

    async def cancel(self) -> AsyncTrainingJob:
        """End the job for good. Gives the job itself.

        Raises:
            ConflictError: it has ended, or its adapter is being proven.
        """
        return await self._updated(training.change(self.id, "cancel"))

    async def pause(self) -> AsyncTrainingJob:
        """Stop the job within a step and free the machine; `resume` continues it. Gives the job itself.

        Raises:
            ConflictError: it is neither queued nor running.
        """
        return await self._updated(training.change(self.id, "pause"))

    async def resume(self) -> AsyncTrainingJob:
        """Continue from the last checkpoint, also after some failures (`resumable`). Gives the job itself.

        A job that was made with `hold` begins to train.

        Raises:
            ConflictError: there is nothing to continue, or its files are still being checked.
        """
        return await self._updated(training.change(self.id, "resume"))

    async def stop(self) -> AsyncTrainingJob:
        """End training at the next step and keep the best, proved and activated as at the job's own end.

        A paused job, or a failed one that is `resumable`, goes on for that alone. Gives the job itself, which
        is still to be waited for.

        Raises:
            ConflictError: it has no step done, or has ended.
        """
        return await self._updated(training.change(self.id, "stop"))

    async def _follow(self, events: AsyncEventStream, watch: JobObserver) -> None:
        """Follow the events until the job is settled."""
        async for event in events:
            if self._take(event):
                await self._refresh_patiently()
            watch.note(event)
            watch.show(self.info)
            if settled(self.info):
                return
        self._info = events.job or self.info
        watch.show(self.info)

    async def _newest_event(self) -> str | None:
        """Return the id of the newest event, even if the server is just being restarted."""
        reply = await self._send_patiently(training.events(self.id, None, 1))
        items = decode(reply.body, PageAnswer[TrainingEvent]).data
        return items[0].id if items else None

    async def _refresh_patiently(self) -> None:
        """Refresh the job as `refresh` does, even if the server is just being restarted."""
        reply = await self._send_patiently(training.job(self.id))
        self._info = decode(reply.body, TrainingJobInfo)

    async def _send_patiently(self, call: Call) -> Reply:
        backoff = ReconnectBackoff()
        while True:
            try:
                return await self._http.send(call)
            except (APIConnectionError, APITimeoutError, APIStatusError) as error:
                delay = backoff.delay(error, call)
            await anyio.sleep(delay)

    async def _updated(self, call: Call) -> AsyncTrainingJob:
        self._info = await self._http.ask(call, TrainingJobInfo)
        return self
