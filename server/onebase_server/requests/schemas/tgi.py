"""The wire models of POST /: text generation as TGI, LoRAX and their clients write it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, JsonValue, model_validator

from onebase_server.adapters.catalog import HUB_PREFIX
from onebase_server.requests.schemas.generation import MAX_LOGPROBS, MAX_TOKENS, GenerateRequest, Stops
from onebase_server.requests.schemas.wire import FieldError, JsonSchema, Name, Tolerant, Wire, rebuilt

NEW_TOKENS = 100
"""Default of `max_new_tokens`, as TGI's."""


class _Sampled(GenerateRequest):
    default_tokens: ClassVar = NEW_TOKENS


class _Greedy(_Sampled):
    default_temperature: ClassVar = 0.0


class TextGrammar(Wire):
    """Form of the text."""

    type: Literal["json", "json_schema", "regex"]
    value: JsonValue


class LoraxFormat(Wire):
    """LoRAX's name for a grammar."""

    type: Literal["json_object"]
    schema_: JsonSchema = Field(alias="schema")


class Parameters(Tolerant):
    """Sampling parameters. The likeliest tokens are chosen unless `do_sample`, `temperature`, `top_k` or
    `top_p` is given, or the adapter's defaults have a temperature."""

    adapter_id: Name | None = None
    adapter_defaults: bool | None = Field(
        default=None, description="false: without the defaults that the adapter came with"
    )
    adapter_source: Literal["local", "hub"] | None = Field(
        default=None, description="LoRAX's: hub says that adapter_id is a repository of the Hugging Face Hub"
    )
    ignore_eos_token: bool | None = None
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
    response_format: LoraxFormat | None = Field(default=None, description="LoRAX's: the same as a grammar")

    neutral: ClassVar = {
        "api_token": (),
        "merged_adapters": (),
        "return_k_alternatives": (0,),
        "best_of": (1,),
        "decoder_input_details": (False,),
        "truncate": (),
        "typical_p": (1.0,),
        "watermark": (False,),
    }
    reasons: ClassVar = {
        "api_token": "the server reads the Hub with its own token (HF_TOKEN)",
        "best_of": "send the request several times",
        "merged_adapters": "send POST /generate with adapter as a list of names and weights",
        "return_k_alternatives": "top_n_tokens gives them",
        "truncate": "shorten the prompt",
        "decoder_input_details": "/generate has the prompt's with echo and logprobs",
    }

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if self.grammar is not None and self.response_format is not None:
            raise FieldError("response_format", "grammar says what the text must be; leave one out")
        if self.adapter_source == "hub" and self.adapter_id is None:
            raise FieldError("adapter_source", "goes with adapter_id")
        return self


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
                "top_k",
                "top_p",
                "repetition_penalty",
                "frequency_penalty",
                "seed",
                "temperature",
                "adapter_defaults",
            },
            exclude_none=True,
        )
        sampled = given.do_sample or given.top_k or given.top_p
        fields |= {
            "prompt": self.inputs,
            "stop": given.stop or None,
            "max_tokens": given.max_new_tokens,
            "logprobs": given.top_n_tokens or 0,
            "stream": self.stream,
            "ignore_eos": given.ignore_eos_token,
        }
        if given.adapter_id is not None:
            of_hub = given.adapter_source == "hub" and not given.adapter_id.startswith(HUB_PREFIX)
            fields["adapter_id"] = f"{HUB_PREFIX}{given.adapter_id}" if of_hub else given.adapter_id
        if given.response_format is not None:
            fields["guided_json"] = given.response_format.schema_
        if given.grammar is not None:
            kind = "guided_regex" if given.grammar.type == "regex" else "guided_json"
            fields[kind] = given.grammar.value
        return rebuilt(_Sampled if sampled else _Greedy, fields)
