"""How to wait for a version: how often to ask, what each answer means. Pure: the caller asks and sleeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from .adapter_types import FAILED, Activation, AdapterVersion, Progress, ProgressCallback
from .errors import AdapterRejectedError, UnprocessableError

FIRST_POLL_S: Final = 0.1
LONGEST_POLL_S: Final = 2.0


class Waiting:
    """One wait for one version."""

    def __init__(self, version: AdapterVersion, progress: ProgressCallback | None) -> None:
        self.version = version
        self._progress = progress
        self._told: Progress | None = None
        self._delay = FIRST_POLL_S
        self._tell()

    @property
    def over(self) -> bool:
        """Whether there is nothing more to wait for.

        Raises:
            AdapterRejectedError: the version failed.
        """
        if self.version.state == FAILED:
            raise rejected(self.version)
        return self.version.finished

    def take(self, version: AdapterVersion) -> None:
        """The server's newest answer. Each step forward is told, and lets the next one come soon."""
        if version.state != self.version.state:
            self._delay = FIRST_POLL_S
        self.version = version
        self._tell()

    def next_delay(self) -> float:
        """Seconds until the server is to be asked again: longer each time."""
        delay, self._delay = self._delay, min(LONGEST_POLL_S, self._delay * 1.5)
        return delay

    def _tell(self) -> None:
        now = Progress(self.version.state)
        if self.version.progress is not None and not self.version.finished:
            now = self.version.progress
        if self._progress is not None and now != self._told:
            self._progress(now)
        self._told = now


def was_active(version: AdapterVersion, history: Sequence[Activation]) -> bool:
    """Whether it has answered to its name already, even if another one does now."""
    return any(entry.version == version.version for entry in history)


def rejected(version: AdapterVersion) -> AdapterRejectedError:
    """The error for a version that failed."""
    what = version.name if version.is_pull else version.id
    failure = version.error
    if failure is None:
        message = f"{what} failed, and the server does not say why"
        return AdapterRejectedError(message, code=None, version=version)
    return AdapterRejectedError(f"{what}: {failure.message}", code=failure.code, version=version)


def refused(error: UnprocessableError) -> AdapterRejectedError:
    """The error for files that did not even become a version."""
    return AdapterRejectedError(error.message, code=error.code, version=None)
