"""The wire models of POST /: text generation as Hugging Face's TGI and its clients write it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, JsonValue

from onebase_server.requests.schemas.generation import MAX_LOGPROBS, MAX_TOKENS, GenerateRequest, Stops
from onebase_server.requests.schemas.wire import Name, Tolerant, Wire, rebuilt

NEW_TOKENS = 100
"""Default of `max_new_tokens`, as TGI's."""


class TextGrammar(Wire):
    """Form of the text."""

    type: Literal["json", "json_schema", "regex"]
    value: JsonValue


class Parameters(Tolerant):
    """Sampling parameters. The likeliest tokens are chosen unless `do_sample`, `temperature`, `top_k` or
    `top_p` is given."""

    adapter_id: Name | None = None
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, gt=0, le=2)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    max_new_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    stop: Stops | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    top_n_tokens: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    grammar: TextGrammar | None = None

    neutral: ClassVar = {
        "best_of": (1,),
        "decoder_input_details": (False,),
        "truncate": (),
        "typical_p": (1.0,),
        "watermark": (False,),
    }
    reasons: ClassVar = {
        "best_of": "send the request several times",
        "truncate": "shorten the prompt",
        "decoder_input_details": "/generate has the prompt's with echo and logprobs",
    }


class TgiRequest(Wire):
    """Body of POST /."""

    inputs: str
    parameters: Parameters = Parameters()
    stream: Annotated[bool | None, Field(description="send tokens as they come")] = None

    def request(self) -> GenerateRequest:
        """Return the same request as POST /generate has it. Raises InvalidRequestError."""
        given = self.parameters
        fields: dict[str, Any] = given.model_dump(
            include={
                "adapter_id",
                "top_k",
                "top_p",
                "repetition_penalty",
                "frequency_penalty",
                "seed",
                "stop",
            },
            exclude_none=True,
        )
        sampled = given.do_sample or given.temperature is not None or given.top_k or given.top_p
        fields |= {
            "prompt": self.inputs,
            "temperature": given.temperature if given.temperature is not None else 1.0 if sampled else 0.0,
            "max_tokens": given.max_new_tokens or NEW_TOKENS,
            "logprobs": given.top_n_tokens or 0,
            "stream": self.stream,
        }
        if given.grammar is not None:
            kind = "guided_regex" if given.grammar.type == "regex" else "guided_json"
            fields[kind] = given.grammar.value
        return rebuilt(GenerateRequest, fields)
