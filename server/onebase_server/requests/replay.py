"""Planning of a logged request once more: with its versions, its seed and its prompts, or with another
version."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError

from onebase_edge.background import Threads
from onebase_edge.errors import (
    AdapterDeletedError,
    AdapterNotFoundError,
    ApiError,
    InvalidRequestError,
    StateConflictError,
)
from onebase_protocol.request_log import LoggedAnswer, LoggedRequest, ReplayedChoice
from onebase_server.inference.generation import GenerationRequest, Prompt, new_id
from onebase_server.inference.stream import OutputPiece
from onebase_server.inference.transcript import Opening, Transcript
from onebase_server.requests.planner import Planner
from onebase_server.requests.request_log import (
    Begun,
    answer_hash,
    form_hash,
    prompt_hash,
    sampling_settings,
)
from onebase_server.requests.schemas.anthropic import MessagesRequest
from onebase_server.requests.schemas.generation import GenerateManyRequest, GenerateRequest
from onebase_server.requests.schemas.items import conversation
from onebase_server.requests.schemas.messages import ChatMessage
from onebase_server.requests.schemas.openai import ChatRequest, CompletionRequest
from onebase_server.requests.schemas.responses import ResponsesRequest
from onebase_server.requests.schemas.tgi import TgiRequest
from onebase_server.requests.schemas.wire import validation_error
from onebase_server.tenancy.access import Caller

_EXCERPT = 60
"""Characters of an excerpt, of which a third stands before the difference."""
ROUTES = (
    "/",
    "/generate",
    "/generate/many",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
)
"""Routes whose requests can be replayed. Replays, samples, and a rollout's copies have other ones."""
_OF_SCORES = ("logprobs", "prompt_logprobs")
"""Settings that do not change a text."""
_TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens")
"""Names of the limit of new tokens on the routes."""
_FORM = "stop, the format of the answer or the limit of its thought"
"""Name of what `form_hash` covers."""
_Body = TypeVar("_Body", bound=BaseModel)


class ReplayPlanner:
    """Plans logged requests of one server, whose base has the identity `base_id`. Bodies are validated in
    `threads`."""

    def __init__(self, planner: Planner, base_id: str, threads: Threads) -> None:
        self._planner = planner
        self._base_id = base_id
        self._threads = threads
        planners: tuple[Callable[[Any, Caller, Transcript], Awaitable[GenerationRequest]], ...] = (
            self._tgi,
            self._generate,
            self._one_of_many,
            self._completion,
            self._chat,
            self._response,
            self._message,
        )
        self._routes = dict(zip(ROUTES, planners, strict=True))

    async def plan(
        self,
        logged: LoggedRequest,
        line: Begun,
        caller: Caller,
        key: bytes,
        *,
        version: str | None,
        kept: Any,
        body: Any,
    ) -> GenerationRequest:
        """Return the request to the engine.

        Args:
            caller: of the request's tenant.
            key: of the tenant's hashes.
            version: the version that answers instead of the logged one.
            kept: the request as the log has it, if it does.
            body: the request as it was sent, where the log has no text.

        Raises StateConflictError where it cannot be replayed, and what planning raises.
        """
        if logged.base_id != self._base_id:
            raise StateConflictError(
                f"The request was answered by the base {logged.base} ({logged.base_id[:12]}), and this "
                f"server serves another ({self._base_id[:12]}). Replay it where that base is served.",
                code="replay_base",
            )
        if version is not None and len(logged.adapters) != 1:
            raise InvalidRequestError(
                "version: the request ran with "
                + ("the base alone" if not logged.adapters else "a sum of adapters")
                + ", of which there is no other version. Leave it out.",
                param="version",
            )
        if logged.route not in self._routes:
            raise StateConflictError(
                f"A request by the route {logged.route!r} cannot be replayed, only those for text.",
                code="replay_route",
            )
        is_supplied = body is not None
        body = body if is_supplied else kept
        if body is None:
            raise StateConflictError(
                "The log has hashes of this request and no text (--request-log text keeps it). Send the "
                "request's JSON as `body`.",
                code="replay_no_text",
            )
        planned = original = await self._plan(logged, body, caller, version)
        is_same, is_checked = version is None, True
        if is_supplied and not is_same:  # the other version may have a template and defaults of its own
            try:
                original = await self._plan(logged, body, caller, None)
            except StateConflictError:
                if _hashes(planned, key) != logged.prompts:
                    raise
                is_checked = False  # the logged version is gone
        if (is_same or is_supplied) and _hashes(original, key) != logged.prompts:
            if not is_same or not line.tokens:
                raise StateConflictError(
                    "body: its prompt is another than the logged one: the hashes differ. Send the request as "
                    "it was sent; where it went on from an earlier response, or the chat template writes the "
                    "date, only --request-log text can replay it.",
                    code="replay_prompt",
                )
            planned = replace(planned, prompts=tuple(Prompt(tokens) for tokens in line.tokens))
        if is_supplied and is_checked and (other := _other_settings(logged, line, original, body, key)):
            raise StateConflictError(
                f"body: {', '.join(other)}: the logged request had other settings. Send the request as it "
                "was sent.",
                code="replay_prompt",
            )
        if planned.choices != len(logged.answers):
            raise StateConflictError(
                f"body: it asks for {planned.choices} choices, and the logged request got "
                f"{len(logged.answers)}. Send the request as it was sent.",
                code="replay_prompt",
            )
        if is_same and not _names_token_limit(body):
            return self._with_logged_limit(logged, planned)
        return planned

    def _with_logged_limit(self, logged: LoggedRequest, planned: GenerationRequest) -> GenerationRequest:
        """Return a request that names no limit of new tokens with the one that it had, as far as that still
        fits: the default may be another by now."""
        had, sampling = logged.sampling, planned.sampling
        room = self._planner.max_length - max(len(prompt.tokens) for prompt in planned.prompts)
        limit = max(1, min(had.get("max_tokens", sampling.max_tokens), room))
        least = min(had.get("min_tokens", sampling.min_tokens), limit)
        limited = msgspec.structs.replace(sampling, max_tokens=limit, min_tokens=least)
        return replace(planned, sampling=limited)

    async def _plan(
        self, logged: LoggedRequest, body: Any, caller: Caller, version: str | None
    ) -> GenerationRequest:
        pinned = [f"{one.name}@{version or one.version}" for one in logged.adapters]
        opening = Opening(id=logged.id, created=0, seed=logged.seed, max_tokens=1, adapters=pinned)
        try:
            planned = await self._routes[logged.route](body, caller, Transcript(opening))
        except (AdapterDeletedError, AdapterNotFoundError) as error:
            raise _version_gone(pinned, error) from error
        except StateConflictError as error:
            if error.code != "version_not_ready":
                raise
            raise _version_gone(pinned, error) from error
        except InvalidRequestError as error:
            if error.code != "invalid_transcript":
                raise
            raise InvalidRequestError(
                "body: it names other adapters than the logged request.", param="body"
            ) from error
        sampling = msgspec.structs.replace(planned.sampling, seed=logged.seed)
        return replace(planned, id=new_id("replay_"), sampling=sampling, echo=False, unit=None)

    # ---- the routes --------------------------------------------------------------------------------

    async def _generate(self, body: Any, caller: Caller, versions: Transcript) -> GenerationRequest:
        read = await self._threads.run_for(caller.tenant, _read, GenerateRequest, body)
        return await self._planner.generate(read, caller, versions)

    async def _one_of_many(self, body: Any, caller: Caller, versions: Transcript) -> GenerationRequest:
        (one, *_) = await self._threads.run_for(
            caller.tenant, lambda: _read(GenerateManyRequest, body).bodies
        )
        if isinstance(one, ApiError):
            raise one
        return await self._planner.generate(one, caller, versions)

    async def _tgi(self, body: Any, caller: Caller, versions: Transcript) -> GenerationRequest:
        read = await self._threads.run_for(caller.tenant, lambda: _read(TgiRequest, body).request())
        return await self._planner.generate(read, caller, versions)

    async def _completion(self, body: Any, caller: Caller, versions: Transcript) -> GenerationRequest:
        read = await self._threads.run_for(caller.tenant, _read, CompletionRequest, body)
        return await self._planner.completion(read, caller, versions)

    async def _chat(self, body: Any, caller: Caller, versions: Transcript) -> GenerationRequest:
        read = await self._threads.run_for(caller.tenant, _read, ChatRequest, body)
        return await self._planner.chat(read, caller, versions)

    async def _response(self, body: Any, caller: Caller, versions: Transcript) -> GenerationRequest:
        """Plan what the request itself says; earlier turns are in the prompt that the log keeps."""

        def read_items() -> tuple[ResponsesRequest, list[ChatMessage]]:
            read = _read(ResponsesRequest, body)
            return read, conversation(read.instructions, read.items)

        read, messages = await self._threads.run_for(caller.tenant, read_items)
        return await self._planner.response(read, messages, caller, versions)

    async def _message(self, body: Any, caller: Caller, versions: Transcript) -> GenerationRequest:
        read = await self._threads.run_for(caller.tenant, _read, MessagesRequest, body)
        format = await self._planner.thought_format(caller, read.model, read)
        chat = await self._threads.run_for(caller.tenant, read.chat, format)
        return await self._planner.chat(chat, caller, versions)


def _hashes(planned: GenerationRequest, key: bytes) -> tuple[str, ...]:
    return tuple(prompt_hash(key, prompt.tokens) for prompt in planned.prompts)


def _other_settings(
    logged: LoggedRequest, line: Begun, planned: GenerationRequest, body: Any, key: bytes
) -> list[str]:
    """Return the names of the settings that differ and may make another text.

    A limit of new tokens that the body does not name follows the size of the KV cache, which may have
    changed since: it counts only where it ended an answer, or might have.
    """
    settings = sampling_settings(planned.sampling)
    left_out: tuple[str, ...] = _OF_SCORES
    is_free = not _names_token_limit(body) and all(one.finish_reason != "length" for one in logged.answers)
    if is_free and planned.sampling.max_tokens >= logged.completion_tokens:
        left_out = (*_OF_SCORES, "max_tokens")
    other = [
        name
        for name, value in settings.items()
        if name not in left_out and logged.sampling.get(name, value) != value
    ]
    return other + [_FORM] * (line.form not in ("", form_hash(key, planned)))


def _names_token_limit(body: Any) -> bool:
    """Return True if a request's JSON, which was planned already, names its limit of new tokens."""
    parts = (body, body.get("parameters"), *(body.get("requests") or ())[:1])
    return any(
        isinstance(part, dict) and part.get(name) is not None for part in parts for name in _TOKEN_LIMITS
    )


def _read(kind: type[_Body], body: Any) -> _Body:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        message, param = validation_error(error.errors(include_url=False))
        raise InvalidRequestError(f"body: {message}", param=f"body.{param}" if param else "body") from error


def _version_gone(versions: Sequence[str], error: ApiError) -> StateConflictError:
    return StateConflictError(
        f"The request needs {', '.join(versions)}, which cannot answer any more: {error.message}",
        code="replay_version",
    )


def _shared(one: str, other: str) -> int:
    """Return the number of characters with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def compare(logged: LoggedRequest, choices: Sequence[OutputPiece], key: bytes) -> tuple[ReplayedChoice, ...]:
    """Compare a replay's choices with those in the log: of an answer that was cut, as far as it went."""
    return tuple(_compare(answer, piece, key) for answer, piece in zip(logged.answers, choices, strict=True))


def _compare(answer: LoggedAnswer, piece: OutputPiece, key: bytes) -> ReplayedChoice:
    text, reasoning = piece.text, piece.reasoning
    is_cut = answer.finish_reason in (None, "cancelled", "error")
    if is_cut:
        text, reasoning = text[: answer.length], reasoning[: answer.reasoning_length]
    equal = answer_hash(key, reasoning, text) == answer.hash
    equal = equal and (is_cut or piece.finish_reason == answer.finish_reason)
    at = before = after = None
    if not equal and answer.text is not None:
        was, now = (answer.reasoning or "") + answer.text, reasoning + text
        at = _shared(was, now)
        begin = max(0, at - _EXCERPT // 3)
        before, after = was[begin : begin + _EXCERPT], now[begin : begin + _EXCERPT]
    return ReplayedChoice(
        index=piece.index,
        equal=equal,
        first_difference=at,
        logged=before,
        replayed=after,
        finish_reason=piece.finish_reason,
        text=piece.text,
        reasoning=piece.reasoning,
    )
