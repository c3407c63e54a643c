"""Errors in talking to a OneBase server, one class per kind of failure.

* OneBaseError
  x APIConnectionError          no connection, or it broke before the answer was complete
  x APITimeoutError             a timeout passed before the answer was complete
  x APIStatusError              the server answered with an error status
    + BadRequestError           400: a field is missing or wrong (`param` names it)
    + AuthenticationError       401: no API key, or one that is unknown, expired or revoked
    + PermissionDeniedError     403: the server does not allow this, or the key lacks the scope
    + NotFoundError             404: no such adapter, version, model or path
    + ConflictError             409: it collides with the state of what it names (`current` says which)
    + PayloadTooLargeError      413: the body is over the server's limit
    + UnprocessableError        422: well formed, but it cannot be done
    + RateLimitError            429: the queue is full; `retry_after` says when to come back
    + ServerUnavailableError    502, 503: starting, draining or restarting its engine
    + StorageFullError          507: the server's disk is full; nothing was kept of the request
    + InternalServerError       any other 5xx: a fault of the server
  x AdapterRejectedError        an adapter was not accepted: `code` and `version` say why and which
  x TrainingStoppedError        a job that was waited for was paused or cancelled
    + TrainingFailedError       it failed: `code` and `param` say why, `job` which
  x StreamError                 a stream failed after it had begun
  x InvalidResponseError        the answer is not what a OneBase server sends

Wrong arguments (an unknown field, both `prompt` and `messages`, a folder that holds no adapter) raise
TypeError or ValueError before anything is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapter_types import AdapterVersion
    from .training_types import TrainingJobInfo


@dataclass(frozen=True)
class ErrorDetail:
    """The body of an error, in OpenAI's shape."""

    message: str
    type: str | None = None
    """The broad kind, such as `invalid_request_error`."""
    param: str | None = None
    """The field of the request that is at fault, when one is."""
    code: str | None = None
    """The exact kind, stable enough to compare with, such as `adapter_not_found`."""
    current: str | None = None
    """The digest that is active, in an error that says that another one was expected."""
    version: str | None = None
    """The digest of the version that the error is about, where the answer says it."""


class OneBaseError(Exception):
    """The base of every error that this package raises for what the network or the server does.

    Attributes:
        message: What happened and what to do about it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle and copy by state, not by calling `__init__`: errors cross process pools."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[OneBaseError], args: tuple[object, ...], state: dict[str, object]) -> OneBaseError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class APIConnectionError(OneBaseError):
    """The server could not be reached, or the connection broke before the answer was complete.

    Attributes:
        sent: False if the request certainly never left (connection refused, unknown host), so that it can
            be sent again without harm.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class APITimeoutError(OneBaseError):
    """A timeout passed before the answer was complete.

    Attributes:
        sent: False if it passed while connecting.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class APIStatusError(OneBaseError):
    """The server answered with an error status; statuses of their own kind raise a subclass.

    Attributes:
        status: The HTTP status.
        type: The broad kind of error, or None.
        param: The field of the request that is at fault, or None.
        code: The exact kind of error, or None.
        retry_after: Seconds after which the server asks to be tried again, or None.
        version: The digest of the version that the error is about, or None. One that could not be activated
            is kept: activate it later, without sending it again.
    """

    def __init__(self, status: int, detail: ErrorDetail, *, retry_after: float | None = None) -> None:
        super().__init__(detail.message)
        self.status = status
        self.type = detail.type
        self.param = detail.param
        self.code = detail.code
        self.retry_after = retry_after
        self.version = detail.version

    def __str__(self) -> str:
        named = self.param is None or self.param in self.message
        return f"{self.message} (HTTP {self.status}{'' if named else f', {self.param}'})"


class BadRequestError(APIStatusError):
    """400: a field is missing or wrong; `param` names it."""


class AuthenticationError(APIStatusError):
    """401: no API key, or one that is unknown, expired or revoked."""


class PermissionDeniedError(APIStatusError):
    """403: the server does not allow this: the API key lacks a scope (code `insufficient_scope`), or, for
    instance, `adapter="hub:org/repo"` is outside its `--hub-allow`."""


class NotFoundError(APIStatusError):
    """404: no such adapter, version, model or path."""


class ConflictError(APIStatusError):
    """409: the request collides with the present state of what it names.

    Attributes:
        current: With code `stale_activation`: the digest of the version that is active instead of the
            expected one; None when none is.
    """

    def __init__(self, status: int, detail: ErrorDetail, *, retry_after: float | None = None) -> None:
        super().__init__(status, detail, retry_after=retry_after)
        self.current = detail.current


class PayloadTooLargeError(APIStatusError):
    """413: the body is over the server's limit."""


class UnprocessableError(APIStatusError):
    """422: well formed, but it cannot be done."""


class RateLimitError(APIStatusError):
    """429: the server's queue is full (code `queue_full`), or a quota of your key or tenant is used up for a
    moment (`rate_limit_exceeded`): `retry_after` says when to come back. With `insufficient_quota` waiting
    does not help: the message says what does."""


class ServerUnavailableError(APIStatusError):
    """502 or 503: the server is starting, draining, or restarting its engine."""


class StorageFullError(APIStatusError):
    """507: the server's disk is full. Nothing was kept of the request; what it had before is untouched."""


class InternalServerError(APIStatusError):
    """Any other 5xx: a fault of the server."""


class AdapterRejectedError(OneBaseError):
    """An adapter was not accepted: it could not be fetched, its files are wrong, or its proof failed.

    Nothing of it is served. The active version is unchanged.

    Attributes:
        code: The exact kind of reason, such as `no_effect`, or None.
        version: The version that failed, or None if the server refused the files before they became one.
    """

    def __init__(self, message: str, *, code: str | None, version: AdapterVersion | None) -> None:
        super().__init__(message)
        self.code = code
        self.version = version

    def __str__(self) -> str:
        return self.message if self.code is None else f"{self.message} ({self.code})"


class TrainingStoppedError(OneBaseError):
    """A job that was waited for did not succeed: somebody paused or cancelled it, or it failed.

    Attributes:
        code: `paused`, `cancelled`, or why it failed, such as `invalid_file` or `out_of_memory`.
        job: The job as it is then. `job.resumable` says whether `resume` would continue it.
    """

    def __init__(self, message: str, *, code: str, job: TrainingJobInfo) -> None:
        super().__init__(message)
        self.code = code
        self.job = job


class TrainingFailedError(TrainingStoppedError):
    """A job failed. The active version of its adapter is unchanged.

    Attributes:
        param: The file or setting that is at fault, or None.
    """

    def __init__(self, message: str, *, code: str, param: str | None, job: TrainingJobInfo) -> None:
        super().__init__(message, code=code, job=job)
        self.param = param


class StreamError(OneBaseError):
    """A stream failed after it had begun. It is never retried: pieces were already handed out.

    The text before the failure is in the stream's `text`.

    Attributes:
        type, param, code: As in APIStatusError. `code` is `connection_lost` or `timeout` when the
            connection failed rather than the server.
    """

    def __init__(self, detail: ErrorDetail) -> None:
        super().__init__(detail.message)
        self.type = detail.type
        self.param = detail.param
        self.code = detail.code


class InvalidResponseError(OneBaseError):
    """The answer is not what a OneBase server sends: the URL may lead to another service."""


_BY_STATUS: Mapping[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: PayloadTooLargeError,
    422: UnprocessableError,
    429: RateLimitError,
    502: ServerUnavailableError,
    503: ServerUnavailableError,
    507: StorageFullError,
}


def status_error(status: int, detail: ErrorDetail, *, retry_after: float | None = None) -> APIStatusError:
    """Return the exception for an error status, of the most exact class there is."""
    kind = _BY_STATUS.get(status, InternalServerError if status >= 500 else APIStatusError)
    return kind(status, detail, retry_after=retry_after)
