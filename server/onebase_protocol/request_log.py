"""Requests in a server's log: who asked what of which version, and whether it answers the same again."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from onebase_protocol.common import Sparse

LogState = Literal["running", "done", "cut", "failed", "interrupted"]
"""State of a request: `cut` by whoever asked, a time limit or a shutdown; `interrupted` with its server."""


class LoggedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    version: str
    weight: float = 1.0


class LoggedAnswer(Sparse, frozen=True, kw_only=True):
    """One choice, as far as it was generated. Lengths are in characters."""

    finish_reason: str | None
    length: int
    reasoning_length: int = 0
    hash: Annotated[str, Meta(description="keyed hash of the reasoning and the text")]
    text: str | None = None
    reasoning: str | None = None


class LoggedRequest(Sparse, frozen=True, kw_only=True):
    """A request and its answer. Texts are there in the mode `text` alone, where one request is asked for."""

    id: Annotated[str, Meta(description="the answer's id, as its caller got it")]
    object: Literal["request"] = "request"
    state: LogState
    at: float
    ended_at: float | None = None
    server: str
    tenant: str
    key: str = ""
    request_id: str = ""
    route: str
    user: Annotated[str | None, Meta(description="keyed hash of the user that the request named")] = None
    model: str
    adapters: tuple[LoggedAdapter, ...] = ()
    base: str
    base_id: str
    seed: int
    sampling: dict[str, Any]
    n: int = 1
    stream: bool = False
    prompt_tokens: int
    completion_tokens: int = 0
    prompts: Annotated[tuple[str, ...], Meta(description="keyed hash of each prompt's tokens")]
    answers: tuple[LoggedAnswer, ...] = ()
    error: str | None = None
    has_text: bool = False
    body: Annotated[dict[str, Any] | None, Meta(description="the request as it was sent")] = None


class ReplayedChoice(Sparse, frozen=True, kw_only=True):
    """One choice of a replay beside the logged one. Excerpts begin a little before the first difference."""

    index: int
    equal: bool
    first_difference: Annotated[int | None, Meta(description="in characters, where the text was kept")] = None
    logged: str | None = None
    replayed: str | None = None
    finish_reason: str | None
    text: str
    reasoning: str = ""


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """A logged request, answered again."""

    id: str
    object: Literal["request.replay"] = "request.replay"
    request: Annotated[str, Meta(description="id of the logged request")]
    adapters: tuple[LoggedAdapter, ...]
    equal: bool
    choices: tuple[ReplayedChoice, ...]


class LogErased(msgspec.Struct, frozen=True, kw_only=True):
    """Confirmation that nothing is left of the requests on this server. Others follow within seconds."""

    object: Literal["requests.erased"] = "requests.erased"
    tenant: str
    user: str | None
    erased: Annotated[int, Meta(description="requests erased on the server that answers")]
