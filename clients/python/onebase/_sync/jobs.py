# Generated from _async/jobs.py by tools/generate_sync.py; do not edit.
"""A job on the server."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

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
from .http import Http
from .streams import EventStream


class TrainingJob(JobView):
    """A job on the server. Its properties are as the server reported them last.

    Examples:
        >>> job = client.training.get("ftjob-3f2a9c41")  # doctest: +SKIP
        >>> job.wait()  # doctest: +SKIP
        >>> print(job.report)  # doctest: +SKIP
    """

    def __init__(self, info: TrainingJobInfo, http: Http) -> None:
        super().__init__(info)
        self._http = http

    def refresh(self) -> TrainingJob:
        """Ask the server how the job is now. Gives the job itself."""
        return self._updated(training.job(self.id))

    def wait(self, *, progress: bool | TrainingCallback = True) -> TrainingJob:
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
        newest = self._newest_event()
        with observer(progress) as watch:
            self._refresh_patiently()
            watch.show(self.info)
            if not settled(self.info):
                with EventStream(self._http.open_stream, self.id, newest, known=True) as events:
                    self._follow(events, watch)
            check_outcome(self.info)
        return self

    def stream_events(self, *, after: str | None = None) -> EventStream:
        """Return the job's events as they happen, until it ends; see EventStream.

        Args:
            after: The id of an event: begin after it. By default with the job's first event.
        """
        return EventStream(self._http.open_stream, self.id, after)

    def events(self, *, limit: int | None = 100, after: str | None = None) -> tuple[TrainingEvent, ...]:
        """Return the job's events so far, the newest first.

        Args:
            limit: The largest number of events; None: all.
            after: The id of the last event of an earlier answer, to continue with older ones.
        """
        return self._http.collect(
            lambda last, size: training.events(self.id, last, size), PageAnswer[TrainingEvent], limit, after
        )

    def checkpoints(self) -> tuple[TrainingCheckpoint, ...]:
        """Return the checkpoints that the job could continue from, the newest first."""
        return self._http.collect(
            lambda last, size: training.checkpoints(self.id, last, size), PageAnswer[TrainingCheckpoint]
        )

    def curve(self) -> tuple[CurvePoint, ...]:
        """Return the losses by step: of the result file if the job has succeeded, else of the newest 5000
        events."""
        if curve_is_in_file(self.info):
            reply = self._http.send(training.file(self.info.result_files[0], "content"))
            return training.curve_of_file(reply.body)
        return training.curve_of_events(self.events(limit=CURVE_EVENTS))

    def data_report(self) -> Mapping[str, Any] | None:
        """Return the check's report of the job's files: tokens, findings, and rows as the model reads them.

        It waits for the check. None if the check failed.
        """
        with self.stream_events() as events:
            for event in events:
                if event.data.get("kind") == "data_checked":
                    report: Mapping[str, Any] = event.data["report"]
                    return report
                if event.type == "metrics":
                    break
        return None

    def cancel(self) -> TrainingJob:
        """End the job for good. Gives the job itself.

        Raises:
            ConflictError: it has ended, or its adapter is being proven.
        """
        return self._updated(training.change(self.id, "cancel"))

    def pause(self) -> TrainingJob:
        """Stop the job within a step and free the machine; `resume` continues it. Gives the job itself.

        Raises:
            ConflictError: it is neither queued nor running.
        """
        return self._updated(training.change(self.id, "pause"))

    def resume(self) -> TrainingJob:
        """Continue from the last checkpoint, also after some failures (`resumable`). Gives the job itself.

        A job that was made with `hold` begins to train.

        Raises:
            ConflictError: there is nothing to continue, or its files are still being checked.
        """
        return self._updated(training.change(self.id, "resume"))

    def stop(self) -> TrainingJob:
        """End training at the next step and keep the best, proved and activated as at the job's own end.

        A paused job, or a failed one that is `resumable`, goes on for that alone. Gives the job itself, which
        is still to be waited for.

        Raises:
            ConflictError: it has no step done, or has ended.
        """
        return self._updated(training.change(self.id, "stop"))

    def _follow(self, events: EventStream, watch: JobObserver) -> None:
        """Follow the events until the job is settled."""
        for event in events:
            if self._take(event):
                self._refresh_patiently()
            watch.note(event)
            watch.show(self.info)
            if settled(self.info):
                return
        self._info = events.job or self.info
        watch.show(self.info)

    def _newest_event(self) -> str | None:
        """Return the id of the newest event, even if the server is just being restarted."""
        reply = self._send_patiently(training.events(self.id, None, 1))
        items = decode(reply.body, PageAnswer[TrainingEvent]).data
        return items[0].id if items else None

    def _refresh_patiently(self) -> None:
        """Refresh the job as `refresh` does, even if the server is just being restarted."""
        reply = self._send_patiently(training.job(self.id))
        self._info = decode(reply.body, TrainingJobInfo)

    def _send_patiently(self, call: Call) -> Reply:
        backoff = ReconnectBackoff()
        while True:
            try:
                return self._http.send(call)
            except (APIConnectionError, APITimeoutError, APIStatusError) as error:
                delay = backoff.delay(error, call)
            time.sleep(delay)

    def _updated(self, call: Call) -> TrainingJob:
        self._info = self._http.ask(call, TrainingJobInfo)
        return self
