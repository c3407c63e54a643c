"""Defaults that came with an adapter, in a request for it: what the request says itself stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from onebase_protocol.adapters import AdapterDefaults
from onebase_server.requests.schemas.generation import ConversationFields, SamplingBody
from onebase_server.requests.schemas.messages import ChatMessage

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
)
"""Fields with the same name in both. `max_tokens` is none of them: a default is cut to what fits."""
_FORMS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")

Body = TypeVar("Body", bound=SamplingBody)


def with_defaults(body: Body, defaults: AdapterDefaults | None) -> Body:
    """Return a request with the sampling and the form of the text that its adapter has by default."""
    if defaults is None:
        return body
    given: dict[str, Any] = {
        name: getattr(defaults, name)
        for name in _SAMPLING
        if getattr(body, name) is None and getattr(defaults, name) is not None
    }
    if body.stop is None and defaults.stop:
        given["stop"] = list(defaults.stop)
    if not _says_form(body):
        form = next((name for name in _FORMS if getattr(defaults, name) not in (None, ())), None)
        if form is not None:
            value = getattr(defaults, form)
            given[form] = list(value) if isinstance(value, tuple) else value
    if not given:
        return body
    made = body.model_copy(update=given)
    made.__dict__.pop("grammar", None)  # cached before, and copied
    return made


def _says_form(body: SamplingBody) -> bool:
    """Return True if a request says what its text must be, or that it may be anything."""
    text = getattr(body, "text", None)  # of /v1/responses
    said = body.response_format is not None or (text is not None and text.format is not None)
    calls = isinstance(body, ConversationFields) and body.calls_tools
    return said or calls or bool(body.ignore_eos) or body.grammar is not None


def conversation_of(
    body: ConversationFields, messages: Sequence[ChatMessage], defaults: AdapterDefaults | None
) -> Sequence[ChatMessage]:
    """Return a request's conversation with the system message and the instruction that its adapter has by
    default, and the request's own instruction."""
    instruction = body.instruction
    if defaults is not None:
        if defaults.system and not any(one.role in ("system", "developer") for one in messages):
            messages = [ChatMessage(role="system", content=defaults.system), *messages]
        if instruction is None and not body.continue_final_message:
            instruction = defaults.instruction
    return [*messages, ChatMessage(role="user", content=instruction)] if instruction else messages
