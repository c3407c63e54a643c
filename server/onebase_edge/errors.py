"""Errors that callers see, and the one table that turns them into HTTP (OpenAI's error shape).

ApiError
├── InvalidRequestError          the request names a field that must change
│   └── ContextLengthError       its tokens are more than the base's context has
├── BodyTooLargeError            the body is over the limit
├── HeadersTooLargeError         the address and headers are over the limit
├── HttpVersionError             the request is in another HTTP than 1.0 and 1.1
├── TransferCodingError          the body is coded otherwise than in chunks
├── TooSlowError                 the request did not arrive in time
├── UnauthenticatedError         no API key, or none that is valid
├── ForbiddenError               this server's operator does not allow it
│   └── InsufficientScopeError   the API key lacks the scope that the route needs
├── UnknownRouteError            there is nothing at the request's path
├── ConsoleMissingError          the files of the page were not built
├── WrongMethodError             there is, but not for its method
├── AdapterNotFoundError         no such adapter (or version) on /generate
├── UnknownModelError            no such model on /v1
├── NotServedError               a route of the API that this server follows has nothing behind it
├── UnknownResponseError         no such response, or none any more
├── UnknownConversationError     no such conversation, or none any more
├── UnknownGenerationError       no text of this id is being generated here
├── UnknownAnswerError           no answer of this id that feedback can be about
├── KeyNotFoundError             no such API key
├── GateNotFoundError            no such gate
├── TrainingFileNotFoundError    no such file
├── JobNotFoundError             no such training job
├── RequestNotFoundError         no such request in the log
├── BatchNotFoundError           no such batch
├── LiveNotFoundError            no such session, run, sampler, checkpoint or result of live training
├── ResultGoneError              a result of live training is not kept any more
├── StateConflictError           it collides with the state of what it names
│   ├── ActivationConflictError  another version is active than was expected
│   └── GateClosedError          a gate does not let the version answer
├── AdapterDeletedError          its adapter was deleted while it ran
├── VersionFailedError           a version that is not served, and why
├── DiskFullError                no space for an upload
├── QueueFullError               come back later
├── QuotaSpentError              a quota of its key or tenant is used up for a moment
├── QuotaExceededError           more than a quota allows, and waiting does not help
├── UnavailableError             the engine is starting, restarting or stopping
├── EngineRestartedError         the engine died under a running request
├── CrashesEngineError           the engine died under it again and again: it is not run
├── SequenceFailedError          the engine ended this request with an error
├── ClientGoneError              the caller left; nobody reads the answer
└── SlowReaderError              the caller did not read its stream
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self


class ApiError(Exception):
    """Base of all errors that a caller sees. `message` says what to do about it."""

    def __init__(
        self, message: str, *, code: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.details: dict[str, Any] = {}
        """Further fields of the error's object."""
        self.body: dict[str, Any] = {}
        """Further fields of the body, next to the error's object."""
        self.headers: dict[str, str] = {}

    def fresh(self) -> Self:
        """Return an equal error that was never raised.

        An error that is stored and raised for several callers would collect the frames of each of them, and
        what they hold, for as long as it is stored.
        """
        made = type(self).__new__(type(self), *self.args)
        made.__dict__.update(self.__dict__)
        return made


class InvalidRequestError(ApiError):
    """The request cannot be served as it is; `param` names the field."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message, code=code, param=param)


class ContextLengthError(InvalidRequestError):
    """The request has more tokens than the base's context.

    Clients know this error by words of its message, each by others, so that the message has all of them.
    `holds`: what else the context holds, as the end of a sentence.
    """

    def __init__(self, param: str, problem: str, length: int, remedy: str, holds: str = "") -> None:
        super().__init__(
            f"{param}: {problem}. This model's maximum context length is {length} tokens{holds} "
            f"(--max-length; context_length_exceeded). {remedy}",
            param=param,
            code="context_length_exceeded",
        )


class BodyTooLargeError(ApiError):
    def __init__(self, limit: int, option: str = "--max-body") -> None:
        super().__init__(
            f"The request body is over {limit} bytes. Send less, or raise {option}.",
            code="payload_too_large",
        )


class HeadersTooLargeError(ApiError):
    def __init__(self, size: int, lines: int) -> None:
        super().__init__(
            f"The request's address and headers are over {size} bytes (--max-header) or {lines} lines "
            "(--max-header-lines). Send less.",
            code="headers_too_large",
        )


class HttpVersionError(ApiError):
    def __init__(self, version: str) -> None:
        super().__init__(
            f"This server reads HTTP/1.1 and HTTP/1.0, not HTTP/{version}. Send the request in one of these.",
            code="http_version_not_supported",
        )


class TransferCodingError(ApiError):
    def __init__(self) -> None:
        super().__init__(
            "Transfer-Encoding: only 'chunked', given once, is read here. Send the body plain, in chunks or "
            "with a Content-Length.",
            code="transfer_coding_not_supported",
        )


class TooSlowError(ApiError):
    """`reason` names what did not arrive, and the limit."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The request's {reason}. Send it faster.", code="request_timeout")


class UnauthenticatedError(ApiError):
    """`given`: whether the request had any."""

    def __init__(self, problem: str, *, given: bool = True) -> None:
        super().__init__(
            f"{problem} Send `Authorization: Bearer ob-...` (or `x-api-key: ob-...`) with a key "
            "from this server's operator (onebase keys create).",
            code="invalid_api_key",
        )
        error = ', error="invalid_token"' if given else ""
        self.headers = {"WWW-Authenticate": f'Bearer realm="onebase"{error}'}


class ForbiddenError(ApiError):
    """The operator does not allow it; the message names the option that would."""


class InsufficientScopeError(ForbiddenError):
    """`scope`: what the route needs; `key`: the id of the key that lacks it."""

    def __init__(self, scope: str, key: str) -> None:
        super().__init__(
            f"This needs the scope {scope!r}, which the API key {key} lacks. Use one that has it: this "
            "server's operator makes them (onebase keys create).",
            code="insufficient_scope",
        )
        self.headers = {
            "WWW-Authenticate": f'Bearer realm="onebase", error="insufficient_scope", scope="{scope}"'
        }


class UnknownRouteError(ApiError):
    """`meant`: the path that is there, if this one looks like a slip."""

    def __init__(self, path: str, meant: str | None = None) -> None:
        hint = "GET /docs lists what there is."
        if meant is not None:
            hint = f"Did you mean {meant}? "
            hint += "Clients of OpenAI's take the address with /v1 as base URL, others without."
        super().__init__(f"There is nothing at {path}. {hint}", code="http_404")


class ConsoleMissingError(ApiError):
    def __init__(self) -> None:
        super().__init__(
            "This server was installed without the console. In a clone, `make console` builds it; packages "
            "from PyPI have it.",
            code="console_missing",
        )


class WrongMethodError(ApiError):
    """`methods`: those that are possible."""

    def __init__(self, method: str, path: str, methods: Iterable[str]) -> None:
        super().__init__(f"{method} is not possible at {path}. GET /docs lists what is.", code="http_405")
        self.headers = {"Allow": ", ".join(sorted(methods))}


class AdapterNotFoundError(ApiError):
    def __init__(
        self, message: str, *, param: str | None = "adapter", code: str = "adapter_not_found"
    ) -> None:
        super().__init__(message, code=code, param=param)


class UnknownModelError(ApiError):
    def __init__(self, message: str) -> None:
        super().__init__(message, code="model_not_found", param="model")


class UnknownResponseError(ApiError):
    def __init__(self, response_id: str, param: str) -> None:
        super().__init__(
            f"{param}: there is no response {response_id[:100]!r}, or none any more: this server keeps the "
            "latest ones in its memory (--response-memory). Send the whole conversation as input.",
            code="response_not_found",
            param=param,
        )


class NotServedError(ApiError):
    def __init__(self, message: str) -> None:
        super().__init__(message, code="not_served")


class UnknownConversationError(ApiError):
    def __init__(self, conversation_id: str, param: str) -> None:
        super().__init__(
            f"{param}: there is no conversation {conversation_id[:100]!r}, or none any more: this server "
            "keeps the latest in its memory (--response-memory). Make a new one with the items so far.",
            code="conversation_not_found",
            param=param,
        )


class UnknownGenerationError(ApiError):
    def __init__(self, generation_id: str) -> None:
        super().__init__(
            f"id: no text {generation_id[:100]!r} is being generated: it has ended, or never began.",
            code="generation_not_found",
            param="id",
        )


class UnknownAnswerError(ApiError):
    """`days`: how long answers are kept for feedback."""

    def __init__(self, answer_id: str, days: float) -> None:
        super().__init__(
            f"id: there is no answer {answer_id[:100]!r} that feedback can be about. Answers of an adapter "
            f"are kept for it while a rollout of the adapter runs, for {days:g} days. Send the `id` of one.",
            code="answer_not_found",
            param="id",
        )


class KeyNotFoundError(ApiError):
    def __init__(self, message: str) -> None:
        super().__init__(message, code="key_not_found", param="key_id")


class TrainingFileNotFoundError(ApiError):
    def __init__(self, message: str) -> None:
        super().__init__(message, code="file_not_found", param="file_id")


class JobNotFoundError(ApiError):
    def __init__(self, message: str) -> None:
        super().__init__(message, code="job_not_found", param="fine_tuning_job_id")


class RequestNotFoundError(ApiError):
    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"id: the log has no request {request_id[:100]!r}: it was never kept, its time is over, it was "
            "erased, or another server answered it.",
            code="request_not_found",
            param="id",
        )


class BatchNotFoundError(ApiError):
    def __init__(self, message: str) -> None:
        super().__init__(message, code="batch_not_found", param="batch_id")


class LiveNotFoundError(ApiError):
    """Live training knows nothing of this id, or another tenant has it. kind: session, run, sampler,
    checkpoint or result."""

    codes: ClassVar = {
        "session": "session_not_found",
        "run": "run_not_found",
        "sampler": "sampler_not_found",
        "checkpoint": "checkpoint_not_found",
        "result": "result_not_found",
    }

    def __init__(self, kind: str, name: str, param: str) -> None:
        super().__init__(
            f"{param}: there is no {kind} {name[:120]!r} here. It belongs to another tenant or another "
            "server, or is gone.",
            code=self.codes[kind],
            param=param,
        )


class ResultGoneError(ApiError):
    def __init__(self, request_id: str, hint: str = "Send the request again.") -> None:
        super().__init__(
            f"request_id: the result of {request_id[:120]!r} is not kept any more. {hint}",
            code="result_gone",
            param="request_id",
        )


class StateConflictError(ApiError):
    """Conflict of the request with the state of what it names."""


class ActivationConflictError(StateConflictError):
    """`current` is the digest that is active now, or None."""

    def __init__(self, name: str, current: str | None) -> None:
        active = f"version {current} is active" if current else "no version is active"
        super().__init__(
            f"expected: of adapter {name!r} {active}, not the expected one. Look at it again, then decide.",
            code="stale_activation",
            param="expected",
        )
        self.details = {"current": current}


GATE_CODES = {
    "signature": "gate_signature",
    "proof": "gate_proof",
    "evaluation": "gate_evaluation",
    "weights": "gate_weights",
    "approval": "gate_approval",
}
"""Code of the error of each gate."""


class GateClosedError(StateConflictError):
    """A gate does not let a version answer. `gates`: those that are closed, with their reasons."""

    def __init__(self, message: str, closed: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(message, code=GATE_CODES[closed[0]["gate"]], param="version")
        self.details = {"gates": list(closed)}


class GateNotFoundError(ApiError):
    def __init__(self, message: str) -> None:
        super().__init__(message, code="gate_not_found", param="gate_id")


class AdapterDeletedError(ApiError):
    def __init__(self, name: str) -> None:
        super().__init__(
            f"Adapter {name!r}, or the version in use, was deleted while this request was using it.",
            code="adapter_deleted",
        )


class VersionFailedError(ApiError):
    """A version is not served; `code` and the message are what its validation or its proof found."""

    is_audited = False
    """Whether the audit log has this refusal."""


class DiskFullError(ApiError):
    def __init__(self) -> None:
        super().__init__(
            "The server has no space left for adapters: nothing of this request was kept, and serving goes "
            "on. Delete versions or files, or give the store (--store, --data-dir) more space, and send it "
            "again.",
            code="store_full",
        )


class QueueFullError(ApiError):
    """A refusal of what would have to wait, since as much waits already as may."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, code="queue_full", retry_after=retry_after)


class SequencesFullError(QueueFullError):
    """`asked`: the sequences of the request that was refused; of these, `waiting` wait already."""

    def __init__(self, asked: int, waiting: int, limit: int, retry_after: float) -> None:
        super().__init__(
            f"The request asks for {asked} {'sequence' if asked == 1 else 'sequences'}, {waiting} wait "
            f"already, and no more than {limit} may wait (--queue-limit). Try again in a moment"
            f"{', or ask for fewer at once' if asked > 1 else ''}.",
            retry_after,
        )


class LoadingQueueFullError(QueueFullError):
    """A refusal of a request whose adapter is not in memory; those of loaded ones do not get it.

    `waiting`: the requests that wait for adapters to be loaded.
    """

    def __init__(self, waiting: int, limit: int, retry_after: float) -> None:
        super().__init__(
            f"{waiting} requests wait already for adapters to be loaded, and no more than {limit} may wait "
            "(--queue-limit). Try again in a moment, or ask for an adapter that is in memory.",
            retry_after,
        )


class SamplesFullError(QueueFullError):
    """A tenant has as many samples promised and not there yet as it may have."""

    def __init__(self, waiting: int, limit: int, retry_after: float) -> None:
        super().__init__(
            f"{waiting} samples of this tenant are promised and not there yet, and no more than {limit} may "
            "be. Send this one again once others are there, or cancel some.",
            retry_after,
        )


class QuotaSpentError(ApiError):
    """`of`: the `quota`, its `limit`, and whether it is `of` a key or a tenant. retry_after: seconds."""

    def __init__(self, message: str, of: dict[str, Any], *, retry_after: float) -> None:
        super().__init__(message, code="rate_limit_exceeded", retry_after=retry_after)
        self.details = of


class QuotaExceededError(ApiError):
    """A refusal like QuotaSpentError's that waiting does not end: clients are asked not to repeat the
    request."""

    def __init__(self, message: str, of: dict[str, Any]) -> None:
        super().__init__(message, code="insufficient_quota")
        self.details = of
        self.headers = {"x-should-retry": "false"}


class UnavailableError(ApiError):
    """Nothing can be generated now; `retry_after` is in seconds, None where a client must not try again."""

    def __init__(self, message: str, *, code: str, retry_after: float | None) -> None:
        super().__init__(message, code=code, retry_after=retry_after)


class UnconfirmedChangeError(UnavailableError):
    """A change that was made, or may have been. It is not answered by 503, after which requests are sent
    again; within the server, what may be done twice is tried again as after others of its kind."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"{reason[:1].upper()}{reason[1:]}. Send the request again only if you see that it was not.",
            code="change_uncertain",
            retry_after=None,
        )
        self.headers = {"x-should-retry": "false"}


class EngineRestartedError(ApiError):
    def __init__(self) -> None:
        super().__init__(
            "The engine stopped while this request was running and is being restarted. Send it again.",
            code="engine_restarted",
            retry_after=2.0,
        )


class CrashesEngineError(ApiError):
    """`deaths` of engines under the same request; `seconds` until it may be tried again."""

    def __init__(self, deaths: int, seconds: float) -> None:
        super().__init__(
            f"The engine died {deaths} times while this request was running, so it is refused for the next "
            f"{max(1, math.ceil(seconds / 60))} minutes. Change the prompt, the adapter or the sampling "
            "settings, and report it with the server's log.",
            code="crashes_engine",
        )


class SequenceFailedError(ApiError):
    """Error with which the engine ended a sequence, in its own words."""

    @property
    def status(self) -> int:
        return CALLER_CODES.get(self.code, 500)


class ClientGoneError(ApiError):
    def __init__(self) -> None:
        super().__init__("The client closed the connection.", code="client_closed_request")


class SlowReaderError(ApiError):
    def __init__(self) -> None:
        super().__init__(
            "The stream was not read fast enough and was cut off (--stream-buffer).", code="slow_reader"
        )


CALLER_CODES = {
    "context_length_exceeded": 400,
    "empty_prompt": 400,
    "kv_memory_exceeded": 400,
    "slot_memory_exceeded": 400,
    "too_many_adapters": 400,
    "prompt_logprobs_too_large": 400,
    "vector_too_large": 400,
    "adapter_not_composable": 409,
}
"""Engine error codes that the caller can cure by asking for something else, with their HTTP status."""

_TABLE: dict[type[ApiError], tuple[int, str]] = {
    InvalidRequestError: (400, "invalid_request_error"),
    ContextLengthError: (400, "invalid_request_error"),
    BodyTooLargeError: (413, "invalid_request_error"),
    HeadersTooLargeError: (431, "invalid_request_error"),
    HttpVersionError: (505, "invalid_request_error"),
    TransferCodingError: (501, "invalid_request_error"),
    TooSlowError: (408, "invalid_request_error"),
    UnauthenticatedError: (401, "invalid_request_error"),
    ForbiddenError: (403, "permission_error"),
    InsufficientScopeError: (403, "permission_error"),
    UnknownRouteError: (404, "invalid_request_error"),
    ConsoleMissingError: (404, "invalid_request_error"),
    WrongMethodError: (405, "invalid_request_error"),
    UnknownResponseError: (404, "invalid_request_error"),
    UnknownConversationError: (404, "invalid_request_error"),
    NotServedError: (501, "invalid_request_error"),
    UnknownGenerationError: (404, "invalid_request_error"),
    UnknownAnswerError: (404, "invalid_request_error"),
    KeyNotFoundError: (404, "invalid_request_error"),
    GateNotFoundError: (404, "invalid_request_error"),
    AdapterNotFoundError: (404, "invalid_request_error"),
    UnknownModelError: (404, "invalid_request_error"),
    TrainingFileNotFoundError: (404, "invalid_request_error"),
    JobNotFoundError: (404, "invalid_request_error"),
    RequestNotFoundError: (404, "invalid_request_error"),
    BatchNotFoundError: (404, "invalid_request_error"),
    LiveNotFoundError: (404, "invalid_request_error"),
    ResultGoneError: (410, "invalid_request_error"),
    StateConflictError: (409, "invalid_request_error"),
    ActivationConflictError: (409, "invalid_request_error"),
    GateClosedError: (409, "invalid_request_error"),
    AdapterDeletedError: (409, "invalid_request_error"),
    VersionFailedError: (422, "invalid_request_error"),
    DiskFullError: (507, "server_error"),
    QueueFullError: (429, "rate_limit_error"),
    SequencesFullError: (429, "rate_limit_error"),
    LoadingQueueFullError: (429, "rate_limit_error"),
    SamplesFullError: (429, "rate_limit_error"),
    QuotaSpentError: (429, "rate_limit_error"),
    QuotaExceededError: (429, "insufficient_quota"),
    UnavailableError: (503, "service_unavailable"),
    UnconfirmedChangeError: (500, "server_error"),
    EngineRestartedError: (503, "service_unavailable"),
    CrashesEngineError: (422, "invalid_request_error"),
    SequenceFailedError: (500, "server_error"),
    ClientGoneError: (499, "invalid_request_error"),
    SlowReaderError: (499, "invalid_request_error"),
}


def status_of(error: ApiError) -> tuple[int, str]:
    """HTTP status and OpenAI error type."""
    if isinstance(error, SequenceFailedError) and error.status < 500:
        return error.status, "invalid_request_error"
    return _TABLE.get(type(error), (500, "server_error"))


def error_body(error: ApiError) -> dict[str, Any]:
    """`{"error": {...}}`, as OpenAI's clients expect it."""
    body = error_dict(error.message, status_of(error)[1], error.code, error.param)
    body["error"] |= error.details
    return body | error.body


def error_dict(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_headers(error: ApiError) -> dict[str, str]:
    """Return the error's own headers, and `Retry-After` in whole seconds, rounded up, where waiting helps."""
    if error.retry_after is None:
        return error.headers
    return {**error.headers, "Retry-After": str(max(1, math.ceil(error.retry_after)))}
