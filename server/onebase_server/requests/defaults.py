"""Defaults that came with an adapter, in a request for it: what the request says itself stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

from onebase_adapters.format.config import AdapterFormatError
from onebase_adapters.format.defaults import DEFAULTS_FIELD
from onebase_edge.errors import InvalidRequestError
from onebase_protocol.adapters import AdapterDefaults
from onebase_server.requests.schemas.generation import ConversationFields, GrammarField, SamplingBody
from onebase_server.requests.schemas.messages import ChatMessage
from onebase_server.requests.schemas.wire import FieldError

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
Form: TypeAlias = GrammarField | FieldError | None
"""Grammar of the text that defaults describe, or what is wrong with it."""


def form_of(defaults: AdapterDefaults) -> Form:
    name = next((name for name in _FORMS if getattr(defaults, name) not in (None, ())), None)
    if name is None:
        return None
    try:
        return SamplingBody.model_construct(**{name: getattr(defaults, name)}).grammar
    except FieldError as error:
        return error


def check_form(defaults: AdapterDefaults) -> None:
    """Raise AdapterFormatError if the form of the text that defaults describe is too long: its limit counts
    the characters of the grammar."""
    form = form_of(defaults)
    if isinstance(form, FieldError):
        raise AdapterFormatError("bad_defaults", f"{DEFAULTS_FIELD}: {form.param}: as a grammar, it {form}")


def with_defaults(body: Body, defaults: AdapterDefaults | None, form: Form = None) -> Body:
    """Return a request with the sampling and the form of the text that its adapter has by default.

    Raises InvalidRequestError.
    """
    if defaults is None:
        return body
    given: dict[str, Any] = {
        name: getattr(defaults, name)
        for name in _SAMPLING
        if getattr(body, name) is None and getattr(defaults, name) is not None
    }
    if body.stop is None and defaults.stop:
        given["stop"] = list(defaults.stop)
    if form is None or _says_form(body):
        return body.model_copy(update=given) if given else body
    if isinstance(form, FieldError):
        raise InvalidRequestError(
            f"model: {form.param} in the adapter's defaults {form}. Send adapter_defaults: false, or upload "
            "the adapter with another.",
            param="model",
            code="bad_defaults",
        )
    made = body.model_copy(update=given)
    made.__dict__["grammar"] = form  # where the property keeps it
    return made


def _says_form(body: SamplingBody) -> bool:
    """Return True if a request says what its text must be, or that it may be anything. One that begins the
    answer does: a form is one of whole texts."""
    text = getattr(body, "text", None)  # of /v1/responses
    said = body.response_format is not None or (text is not None and text.format is not None)
    if isinstance(body, ConversationFields):
        said = said or body.calls_tools or bool(body.continue_final_message)
    return said or bool(body.ignore_eos) or body.grammar is not None


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
