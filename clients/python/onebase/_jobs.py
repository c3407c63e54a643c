"""A job on the server, synchronous."""

from __future__ import annotations

import time
from collections.abc import Callable

from . import _training_parse, _training_requests
from ._event_stream import EventStream, Patience
from ._http import Reply, Response
from ._job_view import CURVE_EVENTS, JobView, check, curve_is_in_file, settled
from ._job_watch import Watcher, watcher
from ._paging import Page, collect, page_of
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


class TrainingJob(JobView):
    """A job on the server. Its properties are as the server told them last.

    Example:
        >>> job = client.training.get("ftjob-3f2a9c41")  # doctest: +SKIP
        >>> job.wait()  # doctest: +SKIP
        >>> print(job.report)  # doctest: +SKIP
    """

    def __init__(
        self, info: TrainingJobInfo, send: Callable[[Call], Reply], open: Callable[[Call], Response]
    ) -> None:
        super().__init__(info)
        self._send = send
        self._open = open

    def refresh(self) -> TrainingJob:
        """Ask the server how it is now; gives the job itself."""
        return self._after(_training_requests.job(self.id))

    def wait(self, *, progress: bool | TrainingCallback = True) -> TrainingJob:
        """Wait until the adapter is there, and give the job itself. To stop waiting does not stop the job.

        It returns only when the job has succeeded. A paused job does not go on by itself, so that waiting
        for it raises too; resume it and wait again.

        Args:
            progress: Draw a bar with loss, tokens per second and time left, on stderr: lines where that is no
                terminal. Or a function that is called with each change instead.

        Raises:
            TrainingFailedError: it failed; the error is the server's.
            TrainingStoppedError: it was cancelled, or paused, meanwhile or before.
            APIConnectionError, APITimeoutError: the server was away for more than about a minute.
        """
        newest = self._newest_event()
        with watcher(progress) as watch:
            self._refresh_patiently()
            watch.show(self.info)
            if not settled(self.info):
                with EventStream(self._open, self.id, newest, known=True) as events:
                    self._follow(events, watch)
            check(self.info)
        return self

    def stream_events(self, *, after: str | None = None) -> EventStream:
        """What the job tells, as it happens, until it ends; see EventStream.

        Args:
            after: The id of an event: begin behind it. By default with the job's first one.
        """
        return EventStream(self._open, self.id, after)

    def events(self, *, limit: int | None = 100, after: str | None = None) -> tuple[TrainingEvent, ...]:
        """What it told so far, the newest first.

        Args:
            limit: Not more than so many; None: all.
            after: The id of the last event of an earlier answer, to go on from there to older ones.
        """

        def fetch(last: str | None, size: int) -> Page[TrainingEvent]:
            call = _training_requests.events(self.id, last, size)
            return parse(self._send(call).body, page_of(_training_parse.event))

        return collect(fetch, limit, after)

    def checkpoints(self) -> tuple[TrainingCheckpoint, ...]:
        """The places that it could go on from, the newest first."""

        def fetch(last: str | None, size: int) -> Page[TrainingCheckpoint]:
            call = _training_requests.checkpoints(self.id, last, size)
            return parse(self._send(call).body, page_of(_training_parse.checkpoint))

        return collect(fetch, None)

    def curve(self) -> tuple[CurvePoint, ...]:
        """The losses by step: of the result file if it has succeeded, else of the newest 5000 events."""
        if curve_is_in_file(self.info):
            call = _training_requests.file(self.info.result_files[0], "content")
            return _training_parse.curve_of_file(self._send(call).body)
        return _training_parse.curve_of_events(self.events(limit=CURVE_EVENTS))

    def cancel(self) -> TrainingJob:
        """End it for good; gives the job itself.

        Raises:
            ConflictError: it has ended already, or its adapter is just being proven.
        """
        return self._after(_training_requests.change(self.id, "cancel"))

    def pause(self) -> TrainingJob:
        """Let it free the machine within a step; it keeps its place. Gives the job itself.

        Raises:
            ConflictError: it is neither queued nor running.
        """
        return self._after(_training_requests.change(self.id, "pause"))

    def resume(self) -> TrainingJob:
        """Let it go on from its last checkpoint, also after some failures (`resumable`).

        Raises:
            ConflictError: there is nothing to go on with.
        """
        return self._after(_training_requests.change(self.id, "resume"))

    def _follow(self, events: EventStream, watch: Watcher) -> None:
        """Until the job is settled."""
        for event in events:
            if self._take(event):
                self._refresh_patiently()
            watch.tell(event)
            watch.show(self.info)
            if settled(self.info):
                return
        self._info = events.job or self.info
        watch.show(self.info)

    def _newest_event(self) -> str | None:
        """The id of what it told last; also while the server is started again."""
        reply = self._send_patiently(_training_requests.events(self.id, None, 1))
        items = parse(reply.body, page_of(_training_parse.event)).items
        return items[0].id if items else None

    def _refresh_patiently(self) -> None:
        """As `refresh`, also while the server is started again."""
        reply = self._send_patiently(_training_requests.job(self.id))
        self._info = parse(reply.body, _training_parse.job)

    def _send_patiently(self, call: Call) -> Reply:
        patience = Patience()
        while True:
            try:
                return self._send(call)
            except (APIConnectionError, APITimeoutError, APIStatusError) as error:
                delay = patience.delay(error, call)
            time.sleep(delay)

    def _after(self, call: Call) -> TrainingJob:
        self._info = parse(self._send(call).body, _training_parse.job)
        return self
