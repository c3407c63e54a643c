"""Planning of requests: from a request on the wire to a job for the engine. Names are resolved, text is
tokenized, and limits are checked."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec

from onebase_adapters.format.config import CLASSIFIERS
from onebase_edge.background import Threads, TurnBudget
from onebase_edge.errors import (
    AdapterDeletedError,
    AdapterNotFoundError,
    ApiError,
    ContextLengthError,
    InvalidRequestError,
    StateConflictError,
    UnavailableError,
    UnknownModelError,
)
from onebase_engine.base.chat import LONG_CHARACTERS
from onebase_engine.engine.messages import BaseInfo, Sampling
from onebase_protocol.adapters import AdapterDefaults
from onebase_server.adapters.catalog import HUB_PREFIX, AdapterChoice, Catalog, is_checkpoint
from onebase_server.adapters.rollout_rules import RequestUnit
from onebase_server.inference.generation import GenerationRequest, Prompt, in_time, new_id
from onebase_server.inference.thoughts import Thinking, ThoughtFormat, without_thought
from onebase_server.inference.tokenization import (
    BaseTokenizer,
    TemplateInput,
    TokenizerError,
    Tokenizers,
    encode_aside,
)
from onebase_server.inference.tool_call_parser import CallFormat
from onebase_server.inference.tool_format import NO_ARGUMENTS, ToolDefinition
from onebase_server.inference.transcript import Transcript, refused
from onebase_server.processes.supervisor import EngineSupervisor
from onebase_server.requests.defaults import Form, conversation_of, form_of, with_defaults
from onebase_server.requests.schemas.generation import (
    SEED_BITS,
    AdapterFields,
    ConversationFields,
    GenerateRequest,
    GrammarField,
    SamplingBody,
)
from onebase_server.requests.schemas.messages import ChatMessage
from onebase_server.requests.schemas.openai import ChatRequest, CompletionRequest
from onebase_server.requests.schemas.responses import ResponsesRequest
from onebase_server.tenancy.access import Caller
from onebase_training.data.rows import plain_tool

_T = TypeVar("_T")
_U = TypeVar("_U")

GENERATE_TOKENS = 256
COMPLETION_TOKENS = 16
_INLINE_CHARACTERS = 8_000
"""Characters that one turn of the event loop tokenizes, or makes a grammar of, for all requests together
(about 4 ms). The rest is computed in threads, so that it does not hold up the streams."""
_THREADS = 2
_OF_TOKENIZER = ("prompt", "messages", "tools", "logit_bias", "stop_token_ids", "chat_template_kwargs")
"""Fields that an adapter's own tokenizer may accept where the base's does not."""
_PLANS = 4
"""Number of times that a request is planned while its adapter turns out to have another tokenizer."""
_DEFAULTS = 64
"""Number of versions whose defaults are kept as requests need them, of at most 256 KiB each."""
_MESSAGE_CHARACTERS = 40
"""Characters that a message counts besides its text, for what a template writes around it."""
_TEXT_CHARACTERS = 40
"""Characters that a text counts besides its own: calling the tokenizer takes as long as reading so many."""
_MARK = "CONTINUE_FINAL_MESSAGE_TAG"
"""Text by which transformers finds the end of the last message."""


@dataclass(frozen=True)
class RequestLimits:
    """Limits that the operator sets for one request."""

    max_choices: int
    max_timeout: float


@dataclass(frozen=True)
class _Wanted:
    """A request in the words that all routes share. kind: prefix of the job's id."""

    kind: str
    prompts: tuple[Prompt, ...]
    prompt_param: str
    max_tokens: int | None
    default_tokens: int | None
    """Limit of new tokens where `max_tokens` is missing; None is as many as fit."""
    logprobs: int | None
    echo: bool
    answer: CallFormat | None = None
    thinking: Thinking | None = None
    token_ids: bool = False
    prompt_logprobs: int | None = None
    special_tokens: bool = False


@dataclass(frozen=True)
class OwnParts:
    """An adapter's tokenizer, or else the base's, and the adapter's defaults of requests."""

    tokenizer: BaseTokenizer
    defaults: AdapterDefaults | None = None
    form: Form = None

    @property
    def invocation(self) -> str | None:
        return None if self.defaults is None else self.defaults.invocation

    @property
    def max_tokens(self) -> int | None:
        return None if self.defaults is None else self.defaults.max_tokens

    @property
    def prompt_prefix(self) -> str:
        return (None if self.defaults is None else self.defaults.prompt_prefix) or ""

    def prefixed(self, prompt: str) -> str:
        """Return a prompt that is no conversation, with what the adapter has before each, once."""
        return prompt if prompt.startswith(self.prompt_prefix) else self.prompt_prefix + prompt


class AdapterFetcher(Protocol):
    """Source of adapters that requests may name before the catalog has them."""

    async def use(self, tenant: str, name: str, *, param: str) -> None:
        """Add the adapter to the catalog, unless it has it. `param`: the request's field that names it."""


class Planner:
    """Plans generation requests.

    Every method raises InvalidRequestError, AdapterNotFoundError, UnavailableError, and what pulling an
    adapter from the Hub raises. Adapters are looked up last, so that the result is up to date.
    """

    def __init__(
        self,
        supervisor: EngineSupervisor,
        tokenizers: Tokenizers,
        catalog: Catalog,
        hub: AdapterFetcher,
        checkpoints: AdapterFetcher,
        limits: RequestLimits,
    ) -> None:
        self._supervisor = supervisor
        self._tokenizers = tokenizers
        self._tokenizer = tokenizers.base
        self._catalog = catalog
        self._hub = hub
        self._checkpoints = checkpoints
        self._limits = limits
        self._threads = Threads("tokenize", _THREADS)
        self._one_thread = Threads("tokenize-long", 1)
        self._template_thread = Threads("templates", 1)
        """Thread that waits for the templates' process, apart from those that tokenize."""
        self._inline = TurnBudget(_INLINE_CHARACTERS)
        self._defaults: OrderedDict[str, tuple[AdapterDefaults, Form]] = OrderedDict()
        """Defaults by the digest of their version, the latest used last."""

    async def generate(
        self, body: GenerateRequest, caller: Caller, transcript: Transcript | None = None
    ) -> GenerationRequest:
        """Return the planned form of a request to /generate.

        transcript: transcript of a stream that another server began, here and in the methods that follow. The
        versions in it are used, whichever are active now.
        """
        self.base()
        self._check_room(body, caller)

        async def plan(own: OwnParts) -> GenerationRequest:
            return await self._plan_generate(body, caller, own)

        async def choose(request: GenerationRequest) -> AdapterChoice:
            return await self._adapter(body, request, transcript)

        return await self._with_own_tokenizer(plan, choose, caller, self.base_name, body, transcript)

    async def _plan_generate(self, body: GenerateRequest, caller: Caller, own: OwnParts) -> GenerationRequest:
        thinking, tokenizer = None, own.tokenizer
        body = with_defaults(body, own.defaults, own.form)
        if body.messages:
            messages = conversation_of(body, body.messages, own.defaults)
            prompt = await self.chat_prompt(
                caller.tenant, body, messages, tokenizer=tokenizer, invocation=own.invocation
            )
            thinking = None if body.echo else self._thinking(body, messages, prompt, tokenizer)
        else:
            text = own.prefixed(body.prompt or "")
            prompt = (await self._prompts(caller.tenant, [text], tokenizer))[0]
        wanted = _Wanted(
            kind="gen-",
            prompts=(prompt,),
            prompt_param="messages" if body.messages else "prompt",
            max_tokens=body.max_tokens,
            default_tokens=own.max_tokens or body.default_tokens or GENERATE_TOKENS,
            logprobs=body.logprobs,
            echo=bool(body.echo),
            answer=await self._answer(caller.tenant, body, tokenizer),
            thinking=thinking,
        )
        return replace(self._request(wanted, body, caller, tokenizer), said=body.messages)

    async def _with_own_tokenizer(
        self,
        plan: Callable[[OwnParts], Awaitable[GenerationRequest]],
        choose: Callable[[GenerationRequest], Awaitable[AdapterChoice]],
        caller: Caller,
        model: str,
        body: AdapterFields,
        transcript: Transcript | None,
    ) -> GenerationRequest:
        """Return a request that is planned with the tokenizer and the defaults of its adapter.

        A request is planned before its adapter is chosen, with the tokenizer and the defaults that the name
        has by then. If the chosen version has others, because it was pulled or activated meanwhile, the
        request is planned again.

        Args:
            plan: makes the request, given a tokenizer and defaults.
            choose: returns the adapter of a planned request; it may pull one first.
        """
        tenant, deadline = caller.tenant, self.deadline_of(body, caller)
        unit = _unit_of(body, caller)
        versions = () if transcript is None else transcript.opening.adapters
        if len(versions) == 1:  # with which the stream began, whichever is active now
            own, pulled = await self._parts_of_name(tenant, versions[0], body), True
        else:
            own, pulled = await self.parts_of(tenant, model, body, unit), False
        for _ in range(_PLANS):
            try:
                request = replace(await plan(own), deadline=deadline, unit=unit, user=_user_of(body))
            except InvalidRequestError as error:
                concerned = (error.param or "").startswith(_OF_TOKENIZER)
                if pulled or not concerned or not await self.pull_first(tenant, model, body, deadline):
                    raise
                pulled = True
                found = await self.parts_of(tenant, model, body, unit)
                if found == own:
                    raise
                own = found
                continue
            choice = check_generates(await choose(request))
            found = await self.parts_for(choice, tenant, body)
            if found == own:
                planned, part = self._with_choice(request, choice, own), choice.part
                if part is None or part.side != "active" or not part.rollout.shadow:
                    return planned
                return replace(planned, plan_with=partial(self._plan_with, plan, tenant, body))
            own = found
        raise UnavailableError(
            "The adapter's active version changes faster than requests are planned. Try again.",
            code="adapter_unavailable",
            retry_after=1.0,
        )

    def _with_choice(
        self, request: GenerationRequest, choice: AdapterChoice, own: OwnParts
    ) -> GenerationRequest:
        """Return the request with its adapter, and its conversation if a judge may read it."""
        tokenizer = None if own.tokenizer is self._tokenizer else own.tokenizer
        is_judged = choice.part is not None and choice.part.rollout.settings.get("judge") is not None
        said = request.said if is_judged else None
        return replace(request, adapter=choice, tokenizer=tokenizer, said=said)

    async def _plan_with(
        self,
        plan: Callable[[OwnParts], Awaitable[GenerationRequest]],
        tenant: str,
        body: AdapterFields,
        choice: AdapterChoice,
    ) -> GenerationRequest:
        """Return the request as it is planned for another version. Raises StateConflictError."""
        own = await self.parts_for(choice, tenant, body)
        return self._with_choice(await plan(own), choice, own)

    async def thought_format(
        self, caller: Caller, model: str, body: AdapterFields | None = None
    ) -> ThoughtFormat | None:
        """Return the format of the thoughts in a request's answer, by its chat template, if it thinks."""
        if body is not None:
            await self.pull_first(caller.tenant, model, body, self.deadline_of(body, caller))
        own = await self.tokenizer_of(caller.tenant, model, body)
        await self.read_template(caller.tenant, own)
        return own.thought_format

    async def read_template(self, tenant: str, tokenizer: BaseTokenizer) -> None:
        """Read the chat template of an adapter, if it has one, without the event loop waiting for the
        templates' process."""

        def read() -> None:
            _ = tokenizer.template_options, tokenizer.thought_format

        if tokenizer.own_templates is not None:
            await self._template_thread.run_for(tenant, read)

    async def tokenizer_of(
        self, tenant: str, model: str | None, body: AdapterFields | None = None
    ) -> BaseTokenizer:
        """Return the tokenizer of the adapter that a request names: see `parts_of`."""
        return (await self.parts_of(tenant, model, body)).tokenizer

    async def parts_of(
        self,
        tenant: str,
        model: str | None,
        body: AdapterFields | None = None,
        unit: RequestUnit | None = None,
    ) -> OwnParts:
        """Return the tokenizer and the defaults of the adapter that a request names, or the base's: also for
        a sum of several, and for a name that is not known, or not ready. unit: see GenerationRequest."""
        reference = self._named(tenant, model, body)
        if reference is None:
            return OwnParts(self._tokenizer)
        return await self._parts_of_name(tenant, reference, body, unit)

    async def _parts_of_name(
        self, tenant: str, reference: str, body: AdapterFields | None, unit: RequestUnit | None = None
    ) -> OwnParts:
        try:
            choice = self._catalog.of(tenant).choose(reference, unit=unit)
        except ApiError:
            return OwnParts(self._tokenizer)
        return await self.parts_for(choice, tenant, body)

    async def parts_for(self, choice: AdapterChoice, tenant: str, body: AdapterFields | None) -> OwnParts:
        """Return the tokenizer and the defaults of the adapters of a request. Raises StateConflictError."""
        report, defaults, form = choice.report, None, None
        if choice.weighted:
            return OwnParts(self._tokenizer)
        if report.get("defaults") and (body is None or body.adapter_defaults is not False):
            defaults, form = self._defaults_of(choice.refs[0].digest, report)
        template = None if defaults is None else defaults.chat_template
        if not (report.get("vocabulary") or report.get("tokenizer") or template):
            return OwnParts(self._tokenizer, defaults, form)
        try:
            tokenizer = await self._threads.run_for(
                tenant, self._tokenizers.of_version, choice.refs[0].digest, report, template
            )
        except TokenizerError as error:
            raise StateConflictError(
                f"{choice.named}: its tokenizer does not fit this base's: {error}.", code="version_not_ready"
            ) from error
        return OwnParts(tokenizer, defaults, form)

    def _defaults_of(self, digest: str, report: Mapping[str, Any]) -> tuple[AdapterDefaults, Form]:
        """Return the defaults of a version and their form; those of the latest versions are kept: a long
        schema takes 15 ms."""
        found = self._defaults.get(digest)
        if found is None:
            defaults = msgspec.convert(report["defaults"], AdapterDefaults)
            found = defaults, form_of(defaults)
            self._defaults[digest] = found
            if len(self._defaults) > _DEFAULTS:
                self._defaults.popitem(last=False)
        self._defaults.move_to_end(digest)
        return found

    def deadline_of(self, body: AdapterFields, caller: Caller) -> float | None:
        """Return the time of the event loop at which a request that comes now ends; None: at none."""
        timeout_s = body.timeout_s or (None if caller.background else self._limits.max_timeout)
        return None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s

    async def pull_first(
        self, tenant: str, model: str | None, body: AdapterFields, deadline: float | None
    ) -> bool:
        """Fetch the adapter that a request names if it is not known yet. Return False if it is."""
        reference = self._named(tenant, model, body)
        if reference is None or not (reference.startswith(HUB_PREFIX) or is_checkpoint(reference)):
            return False
        if self._catalog.of(tenant).get(reference) is not None:
            return False
        await self._pull({"model" if model == reference else "adapter": reference}, tenant, deadline)
        return True

    def _named(self, tenant: str, model: str | None, body: AdapterFields | None) -> str | None:
        """Return the name of the one adapter that a request runs with; None for the base or a sum."""
        if model is not None and not self._catalog.means_base(tenant, model):
            return model
        wanted = None if body is None else body.wanted_adapter
        if wanted is None or isinstance(wanted, str):
            return wanted
        return wanted[0].name if len(wanted) == 1 and wanted[0].weight == 1.0 else None

    async def completion(
        self, body: CompletionRequest, caller: Caller, transcript: Transcript | None = None
    ) -> GenerationRequest:
        self.base()
        self.check_model(caller.tenant, body.model, body)
        self._check_room(body, caller, len(body.prompts()))

        async def plan(own: OwnParts) -> GenerationRequest:
            return await self._plan_completion(body, caller, own)

        async def choose(request: GenerationRequest) -> AdapterChoice:
            return await self.choose(body.model, body, request, transcript)

        return await self._with_own_tokenizer(plan, choose, caller, body.model, body, transcript)

    async def _plan_completion(
        self, body: CompletionRequest, caller: Caller, own: OwnParts
    ) -> GenerationRequest:
        body, tokenizer = with_defaults(body, own.defaults, own.form), own.tokenizer
        wanted = _Wanted(
            kind="cmpl-",
            prompts=tuple(
                await self._prompts(
                    caller.tenant,
                    [own.prefixed(one) if isinstance(one, str) else one for one in body.prompts()],
                    tokenizer,
                    special=body.add_special_tokens is not False,
                )
            ),
            prompt_param="prompt",
            max_tokens=body.max_tokens,
            default_tokens=own.max_tokens or COMPLETION_TOKENS,
            logprobs=body.logprobs,
            echo=bool(body.echo),
            token_ids=bool(body.return_token_ids),
            prompt_logprobs=body.prompt_logprobs,
            special_tokens=body.skip_special_tokens is False,
        )
        return self._request(wanted, body, caller, tokenizer)

    async def chat(
        self, body: ChatRequest, caller: Caller, transcript: Transcript | None = None
    ) -> GenerationRequest:
        return await self._conversation("chatcmpl-", body, body.messages, caller, transcript)

    async def response(
        self,
        body: ResponsesRequest,
        messages: Sequence[ChatMessage],
        caller: Caller,
        transcript: Transcript | None = None,
    ) -> GenerationRequest:
        """Return the planned form of a request to /v1/responses.

        messages: the request's instructions, what was said before, and its input.
        """
        try:
            return await self._conversation("resp_", body, messages, caller, transcript)
        except InvalidRequestError as error:
            raise _in_words_of_responses(error) from error.__cause__

    async def _conversation(
        self,
        kind: str,
        body: ChatRequest | ResponsesRequest,
        messages: Sequence[ChatMessage],
        caller: Caller,
        transcript: Transcript | None,
    ) -> GenerationRequest:
        self.base()
        self.check_model(caller.tenant, body.model, body)
        self._check_room(body, caller)

        async def plan(own: OwnParts) -> GenerationRequest:
            return await self._plan_conversation(kind, body, messages, caller, own)

        async def choose(request: GenerationRequest) -> AdapterChoice:
            return await self.choose(body.model, body, request, transcript)

        return await self._with_own_tokenizer(plan, choose, caller, body.model, body, transcript)

    async def _plan_conversation(
        self,
        kind: str,
        body: ChatRequest | ResponsesRequest,
        messages: Sequence[ChatMessage],
        caller: Caller,
        own: OwnParts,
    ) -> GenerationRequest:
        effort, tokenizer = body.reasoning_effort, own.tokenizer
        body = with_defaults(body, own.defaults, own.form)
        messages = conversation_of(body, messages, own.defaults)
        prompt = await self.chat_prompt(
            caller.tenant, body, messages, effort, tokenizer=tokenizer, invocation=own.invocation
        )
        wanted = _Wanted(
            kind=kind,
            prompts=(prompt,),
            prompt_param="messages",
            max_tokens=body.token_limit,
            default_tokens=own.max_tokens,
            logprobs=body.logprob_count,
            echo=False,
            answer=await self._answer(caller.tenant, body, tokenizer),
            thinking=self._thinking(body, messages, prompt, tokenizer, effort),
            token_ids=bool(body.return_token_ids),
            prompt_logprobs=body.prompt_logprobs,
            special_tokens=body.skip_special_tokens is False,
        )
        return replace(self._request(wanted, body, caller, tokenizer), said=messages)

    async def resumed(
        self, request: GenerationRequest, transcript: Transcript, seconds: float
    ) -> GenerationRequest:
        """Return the request as the first server planned it `seconds` ago: with its id and its seed.

        Raises InvalidRequestError.
        """
        base = self.base_of(request.tokenizer or self._tokenizer)
        opening, sampling = transcript.opening, request.sampling
        if opening.max_tokens > sampling.max_tokens:
            raise refused("has more tokens than the request may have here")
        await self._threads.run_for(
            request.tenant,
            transcript.check_outputs,
            [len(prompt.tokens) for prompt in request.prompts],
            request.n,
            base.vocab_size,
            sampling.logprobs is not None,
            sampling.prompt_logprobs is not None,
        )
        return replace(
            request,
            id=opening.id,
            created=opening.created,
            sampling=msgspec.structs.replace(
                sampling,
                seed=opening.seed,
                max_tokens=opening.max_tokens,
                min_tokens=min(sampling.min_tokens, opening.max_tokens),
            ),
            deadline=None if request.deadline is None else request.deadline - seconds,
        )

    @property
    def base_name(self) -> str:
        """Return the name of the base in requests."""
        return self._catalog.base_name

    # ---- tokens alone ------------------------------------------------------------------------

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt with its answer. Raises UnavailableError."""
        return self.base().max_length

    async def chat_tokens(
        self,
        tenant: str,
        body: ConversationFields,
        messages: Sequence[ChatMessage],
        reasoning_effort: str | None = None,
        own: OwnParts | None = None,
    ) -> list[int]:
        """Return the prompt of a conversation. own: of its adapter, whose defaults it gets."""
        own = own or OwnParts(self._tokenizer)
        prompt = await self.chat_prompt(
            tenant,
            body,
            conversation_of(body, messages, own.defaults),
            reasoning_effort,
            tokenizer=own.tokenizer,
            invocation=own.invocation,
        )
        return prompt.tokens

    async def input_tokens(self, tenant: str, body: ResponsesRequest, messages: Sequence[ChatMessage]) -> int:
        """Return the number of tokens of a response's prompt."""
        own = await self.parts_of(tenant, body.model, body)
        try:
            found = await self.chat_tokens(tenant, body, messages, body.reasoning_effort, own)
        except InvalidRequestError as error:
            raise _in_words_of_responses(error) from error.__cause__
        return len(found)

    async def texts(
        self,
        tenant: str,
        param: str,
        texts: Sequence[str],
        *,
        special: bool = True,
        tokenizer: BaseTokenizer | None = None,
    ) -> list[list[int]]:
        """Return the tokens of each, computed in one turn of the tenant.

        special: with the tokens that the base expects around a prompt.
        tokenizer: an adapter's; None: the base's.
        """
        own = tokenizer or self._tokenizer

        def encode(texts: Sequence[str]) -> list[list[int]]:
            return [own.encode(text, special=special) for text in texts]

        for text in texts:
            self._check_size(param, len(text), own)
        size = sum(map(len, texts)) + _TEXT_CHARACTERS * len(texts)
        return await self._in_turn(tenant, size, encode, texts)

    async def names_of(
        self, tenant: str, tokens: Sequence[int], tokenizer: BaseTokenizer | None = None
    ) -> list[str]:
        """Return the vocabulary's names of tokens."""
        return await self._threads.run_for(tenant, (tokenizer or self._tokenizer).names, tokens)

    async def text_of(
        self, tenant: str, tokens: Sequence[int], tokenizer: BaseTokenizer | None = None
    ) -> str:
        """Return the text that tokens stand for, special ones by their names."""
        own = tokenizer or self._tokenizer
        base = self.base_of(own)
        if len(tokens) > base.max_length:
            raise ContextLengthError(
                "tokens", f"there are {len(tokens)}", base.max_length, "Send them in parts."
            )
        _check_vocabulary("tokens", tokens, base)
        return await self._threads.run_for(tenant, own.decode, tokens, True)

    # ---- parts -------------------------------------------------------------------------------

    def base(self) -> BaseInfo:
        reason = self._supervisor.unavailable()
        if reason is not None or self._supervisor.base is None:
            raise reason or RuntimeError("ready without a base")
        return self._supervisor.base

    def base_of(self, tokenizer: BaseTokenizer) -> BaseInfo:
        """Return the base, with the number of tokens of an adapter's own vocabulary if it has one."""
        base = self.base()
        return msgspec.structs.replace(base, vocab_size=tokenizer.words) if tokenizer.words else base

    async def _adapter(
        self, body: AdapterFields, request: GenerationRequest, transcript: Transcript | None = None
    ) -> AdapterChoice:
        wanted = body.wanted_adapter
        if wanted is None:
            return (
                AdapterChoice()
                if transcript is None
                else await self._resumed_adapters(transcript, [], request)
            )
        if isinstance(wanted, str):
            reference = wanted
            if transcript is not None:
                return await self._resumed_adapters(transcript, [reference], request)
            param = "adapter" if body.adapter_id is None else "adapter_id"
            await self._pull({param: reference}, request.tenant, request.deadline)
            return await self._catalog.find_current(
                lambda: self._catalog.of(request.tenant).choose(reference, unit=request.unit)
            )
        terms = [(term.name, term.weight) for term in wanted]
        if transcript is not None:
            weights = [weight for _, weight in terms]
            return await self._resumed_adapters(transcript, [name for name, _ in terms], request, weights)
        params = {f"adapter[{index}].name": name for index, (name, _) in enumerate(terms)}
        await self._pull(params, request.tenant, request.deadline)
        return await self._catalog.find_current(lambda: self._catalog.of(request.tenant).choose_sum(terms))

    async def _resumed_adapters(
        self,
        transcript: Transcript,
        references: Sequence[str],
        request: GenerationRequest,
        weights: Sequence[float] | None = None,
    ) -> AdapterChoice:
        """Return the versions of a resumed stream, also if they are no longer active.

        Args:
            references: their names in the request.
            weights: of a sum's terms; None for one adapter alone.

        Raises AdapterDeletedError, StateConflictError (one is not ready now), InvalidRequestError.
        """
        versions = transcript.opening.adapters
        names = self._catalog.of(request.tenant)
        names_here = [names.ours(reference) for reference in references]
        version_names = [one.rpartition("@")[0] for one in versions]
        if len(versions) != len(names_here) or not all(
            reference == name or reference.startswith(f"{name}@")
            for reference, name in zip(names_here, version_names, strict=True)
        ):
            raise refused("is of other adapters")
        if not versions:
            return AdapterChoice()

        def find() -> AdapterChoice:
            names = self._catalog.of(request.tenant)
            if weights is None:
                return names.choose(versions[0])
            return names.choose_sum(list(zip(versions, weights, strict=True)))

        try:
            return await self._catalog.find_current(find)
        except AdapterNotFoundError as error:
            raise AdapterDeletedError(version_names[0]) from error

    def check_model(self, tenant: str, model: str, body: AdapterFields) -> None:
        if body.wanted_adapter is not None and not self._catalog.means_base(tenant, model):
            raise InvalidRequestError(
                f"model already names an adapter. Send adapter with model {self._catalog.base_name!r} only.",
                param="adapter",
            )

    async def choose(
        self,
        model: str,
        body: AdapterFields,
        request: GenerationRequest,
        transcript: Transcript | None = None,
    ) -> AdapterChoice:
        if self._catalog.means_base(request.tenant, model):
            return await self._adapter(body, request, transcript)
        if transcript is not None:
            return await self._resumed_adapters(transcript, [model], request)
        await self._pull({"model": model}, request.tenant, request.deadline)
        try:
            return await self._catalog.find_current(
                lambda: self._catalog.of(request.tenant).choose(model, param="model", unit=request.unit)
            )
        except AdapterNotFoundError as error:
            raise UnknownModelError(f"{error.message} The base is {self._catalog.base_name!r}.") from error

    async def _pull(self, names: dict[str, str], tenant: str, deadline: float | None) -> None:
        """Fetch what is named by its Hub repository, and is not known yet, or as a job's checkpoint.

        names: by the request's field.
        """
        known = self._catalog.of(tenant)
        for param, name in names.items():
            if name.startswith(HUB_PREFIX) and not known.names_version(name):
                async with in_time(deadline):
                    await self._hub.use(tenant, name, param=param)
            elif is_checkpoint(checkpoint := name.partition("@")[0]):
                async with in_time(deadline):
                    await self._checkpoints.use(tenant, checkpoint, param=param)

    async def _prompts(
        self,
        tenant: str,
        given: Sequence[str | list[int]],
        tokenizer: BaseTokenizer,
        *,
        special: bool = True,
    ) -> list[Prompt]:
        """Return the prompts of a request, of which each is text or tokens. special: see `texts`."""
        texts = [one for one in given if isinstance(one, str)]
        tokens = iter(await self.texts(tenant, "prompt", texts, special=special, tokenizer=tokenizer))
        return [Prompt(next(tokens), one) if isinstance(one, str) else Prompt(one) for one in given]

    async def chat_prompt(
        self,
        tenant: str,
        body: ConversationFields,
        messages: Sequence[ChatMessage],
        reasoning_effort: str | None = None,
        *,
        tokenizer: BaseTokenizer | None = None,
        invocation: str | None = None,
    ) -> Prompt:
        """Return the prompt of a conversation.

        invocation: see AdapterDefaults. It is not used if the request says how the prompt ends.
        """
        own = tokenizer or self._tokenizer
        if body.add_generation_prompt is not None or body.continue_final_message:
            invocation = None
        if invocation is not None:
            body = body.model_copy(update={"add_generation_prompt": False})
        known = own.chat_template
        if any(message.is_of_tools for message in messages) and "tool_calls" not in known:
            raise _no_tools("messages")
        tools = body.tools if body.calls_tools else None
        if tools and "tools" not in known:
            raise _no_tools("tools")
        await self.read_template(tenant, own)
        options = self._options(body, messages, reasoning_effort, own)
        format = own.thought_format
        rendered = [message.rendered() for message in messages]
        try:
            said = list(map(without_thought, rendered)) if format is None else format.conversation(rendered)
        except ValueError as error:
            raise InvalidRequestError(f"messages: {error}.", param="messages") from error
        chat = TemplateInput(said, tools, options)
        size = sum(
            _MESSAGE_CHARACTERS + sum(len(part) for part in message.values() if isinstance(part, str))
            for message in rendered
        )
        size += body.tool_characters if tools else 0
        if options or any(message.tool_calls for message in messages):
            size += len(json.dumps([options, [message.get("tool_calls") for message in chat.messages]]))
        self._check_size("messages", size, own)

        def encode(chat: TemplateInput) -> list[int]:
            tools = None if chat.tools is None else [plain_tool(tool) for tool in chat.tools]
            tokens = own.encode_chat(replace(chat, tools=tools))
            return tokens if invocation is None else [*tokens, *own.encode_marks(invocation)]

        return Prompt(await self._in_turn(tenant, size, encode, chat, apart=own.own_templates is not None))

    def _options(
        self,
        body: ConversationFields,
        messages: Sequence[ChatMessage],
        reasoning_effort: str | None,
        tokenizer: BaseTokenizer,
    ) -> dict[str, Any]:
        """Return the chat template's variables besides messages and tools."""
        given = dict(body.chat_template_kwargs or {})
        known = tokenizer.template_options
        for name in given:
            if name not in known:
                hint = f"It knows {', '.join(sorted(known))}" if known else "It knows none"
                raise InvalidRequestError(
                    f"chat_template_kwargs: this base's chat template has no variable {name[:60]!r}. {hint}.",
                    param="chat_template_kwargs",
                )
        switch, format = tokenizer.thinking_switch, tokenizer.thought_format
        if reasoning_effort == "none" and switch is not None:
            given.setdefault(switch.name, switch.off)
        elif reasoning_effort is not None and "reasoning_effort" in known:
            effort = reasoning_effort if format is None else format.effort(reasoning_effort)
            given.setdefault("reasoning_effort", effort)
        if format is not None and format.budget is not None and body.thinking_token_budget is not None:
            given.setdefault(format.budget, body.thinking_token_budget)
        if body.continue_final_message:
            if not messages[-1].rendered()["content"].strip():
                raise InvalidRequestError(
                    "continue_final_message: the last message is empty; there is nothing to continue.",
                    param="continue_final_message",
                )
            if messages[-1].tool_calls or _MARK in json.dumps([message.rendered() for message in messages]):
                raise InvalidRequestError(
                    "continue_final_message: the end of the last message cannot be found. Leave it out, or "
                    "send a last message without tool_calls.",
                    param="continue_final_message",
                )
            return given | {"continue_final_message": True, "add_generation_prompt": False}
        if body.add_generation_prompt is not None:
            given["add_generation_prompt"] = body.add_generation_prompt
        return given

    def _thinking(
        self,
        body: ConversationFields,
        messages: Sequence[ChatMessage],
        prompt: Prompt,
        tokenizer: BaseTokenizer,
        reasoning_effort: str | None = None,
    ) -> Thinking | None:
        """Return the thought that the answer to a conversation may begin with, if the base thinks."""
        format, budget = tokenizer.thought_format, body.thinking_token_budget
        if format is None:
            if budget is not None and body.needs_budget:
                raise _budget_not_supported("writes no thoughts that could be told from the text")
            return None
        opened = tokenizer.opens_thought(prompt.tokens)
        if body.continue_final_message:
            said = messages[-1].rendered()["content"]
            opened = said.rfind(format.opening) > said.rfind(format.closing)
            if not opened:
                return None
        on = (
            format.is_on(self._options(body, messages, reasoning_effort, tokenizer))
            if opened is None
            else opened
        )
        thinking = Thinking(format, bool(opened), on)
        if budget is None or not (on or opened):
            return thinking
        bound = format.bounded(budget, opened=bool(opened))
        if bound is None and body.needs_budget:
            raise _budget_not_supported("has no token that ends a thought, so that none can be ended early")
        return replace(thinking, bound=bound)

    async def _answer(
        self, tenant: str, body: ConversationFields, tokenizer: BaseTokenizer
    ) -> CallFormat | None:
        """Return the format by which tool calls are read from the text, or None if the answer calls no
        tools."""
        if not body.calls_tools:
            return None
        size = body.tool_characters + (len(body.grammar.grammar.text) if body.grammar else 0)
        apart = tokenizer.own_templates is not None
        return await self._in_turn(tenant, size, partial(self._call_format, tokenizer), body, apart=apart)

    def _call_format(self, tokenizer: BaseTokenizer, body: ConversationFields) -> CallFormat:
        """Build the grammar of the tools' schemas, which takes 50 ms for long ones."""
        format = tokenizer.tool_format
        if format is None:
            raise InvalidRequestError(
                f"tools: this base's chat template {tokenizer.tools_refusal}. "
                "Leave tools out, or give the base another template (chat_template.jinja in its folder).",
                param="tools",
                code="tools_not_supported",
            )
        tools = {
            function["name"]: ToolDefinition(
                function["name"], function.get("parameters") or NO_ARGUMENTS, bool(function.get("strict"))
            )
            for function in body.functions
            if function["name"] in body.callable_names
        }
        content = None if body.grammar is None else json.loads(body.grammar.grammar.text)
        try:
            grammar = format.grammar(
                tools,
                "required" if body.must_call else "auto",
                parallel=body.parallel_tool_calls is not False and body.named_tool is None,
                content=content,
            )
        except ValueError as error:
            raise InvalidRequestError(f"tools: {error}. Change them.", param="tools") from error
        except (TypeError, AttributeError, KeyError) as error:
            raise InvalidRequestError(
                "tools: the parameters of one are no JSON schema. Change them.", param="tools"
            ) from error
        return CallFormat(
            format,
            tools,
            grammar,
            named=body.named_tool is not None,
            required=body.must_call,
            at_once=content is not None,
        )

    def _check_size(self, param: str, size: int, tokenizer: BaseTokenizer) -> None:
        length = self.base().max_length
        most = length * tokenizer.longest_token
        if size > most:
            raise ContextLengthError(
                param,
                f"has {size} characters",
                length,
                "Shorten it.",
                f", which stand for {most} characters at most",
            )

    async def _in_turn(
        self, tenant: str, size: int, encode: Callable[[_T], _U], text: _T, *, apart: bool = False
    ) -> _U:
        """Return what `encode` makes of a text of `size` characters: at once while this turn of the event
        loop has room for it, else in a thread, where tenants take turns. `apart`: in the thread for the
        chat templates of adapters."""
        if apart:
            return await self._template_thread.run_for(tenant, encode, text)
        if self._inline.try_spend(size):
            return encode(text)
        if size <= LONG_CHARACTERS:
            return await self._threads.run_for(tenant, encode, text)
        return await self._one_thread.run_for(tenant, encode_aside, encode, text)

    def _request(
        self, wanted: _Wanted, body: SamplingBody, caller: Caller, tokenizer: BaseTokenizer
    ) -> GenerationRequest:
        base = self.base_of(tokenizer)
        check_prompts(wanted.prompts, base, wanted.prompt_param)
        timeout_s = body.timeout_s or (None if caller.background else self._limits.max_timeout)
        scores_only = wanted.max_tokens == 0
        if scores_only and not wanted.echo:
            raise InvalidRequestError(
                "max_tokens: must be at least 1, or 0 together with echo.", param="max_tokens"
            )
        ends = () if wanted.thinking is None else wanted.thinking.format.ends
        sampling = _sampling(body, base, wanted, (*tokenizer.end_tokens, *ends))
        guide = body.grammar if wanted.answer is None else GrammarField("tools", wanted.answer.grammar)
        grammar = None if guide is None else guide.grammar
        if wanted.thinking is not None:
            grammar = wanted.thinking.before(grammar, calls=wanted.answer is not None)
        expected = sampling.max_tokens if wanted.max_tokens else min(sampling.max_tokens, GENERATE_TOKENS)
        return GenerationRequest(
            id=new_id(wanted.kind),
            tenant=caller.tenant,
            priority=caller.priority,
            background=caller.background,
            grammar=grammar,
            grammar_param="" if guide is None else guide.param,
            calls=wanted.answer,
            thinking=wanted.thinking,
            token_ids=wanted.token_ids,
            special_tokens=wanted.special_tokens,
            prompts=wanted.prompts,
            sampling=sampling,
            expected_tokens=0 if scores_only else expected,
            has_default_limit=wanted.max_tokens is None and wanted.default_tokens is not None,
            n=body.n or 1,
            stops=body.stops,
            echo=wanted.echo,
            scores_only=scores_only,
            timeout_s=timeout_s,
        )

    def _check_room(self, body: SamplingBody, caller: Caller, prompts: int = 1) -> None:
        """Check the limits of a request, and that the queue has room, before any of its text is tokenized."""
        choices = (body.n or 1) * prompts
        self.check_limits(choices, body.timeout_s)
        if not caller.background:  # It asks again, as long as there is no room.
            self._supervisor.check_room(caller.tenant, choices)

    def check_limits(self, choices: int, timeout_s: float | None) -> None:
        most, longest = self._limits.max_choices, self._limits.max_timeout
        if choices > most:
            raise InvalidRequestError(
                f"n: {choices} completions are asked for; this server allows {most} per request "
                "(--max-choices). Lower n or send fewer prompts.",
                param="n",
            )
        if timeout_s is not None and timeout_s > longest:
            raise InvalidRequestError(
                f"timeout_s: this server ends requests after {longest:g} seconds (--max-timeout). "
                "Ask for that or less.",
                param="timeout_s",
            )


def _unit_of(body: AdapterFields, caller: Caller) -> RequestUnit | None:
    """Return what a request is to a rollout; None for rows of batches, which the active version answers."""
    if caller.background:
        return None
    asker = body.asker if isinstance(body, SamplingBody) else None
    return RequestUnit(asker or f"key:{caller.key}", secrets.token_hex(8))


def _user_of(body: AdapterFields) -> str | None:
    """Return the user whom a request names; None if it names none."""
    field, _, name = ((body.asker if isinstance(body, SamplingBody) else None) or "").partition(":")
    return name if field == "user" else None


def check_generates(choice: AdapterChoice, param: str = "model") -> AdapterChoice:
    if choice.task != "CAUSAL_LM":
        route = "POST /classify" if choice.task in CLASSIFIERS else "POST /v1/embeddings"
        raise InvalidRequestError(
            f"{param}: {choice.named!r} generates no text: its task_type is {choice.task}. Send it to "
            f"{route}.",
            param=param,
            code="adapter_task",
        )
    return choice


def _in_words_of_responses(error: InvalidRequestError) -> InvalidRequestError:
    """Return the error, with the field's name of /v1/responses."""
    param = error.param or ""
    name = {"messages": "input", "max_tokens": "max_output_tokens"}.get(param.partition("[")[0])
    if name is None:
        return error
    said = error.message
    message = name + said.removeprefix(param) if said.startswith(param) else said
    return InvalidRequestError(message, param=name, code=error.code)


def _no_tools(param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param}: this base's chat template has no place for tools: they would be lost. Give the base a "
        "template that knows them (chat_template.jinja in its folder), or describe them in a message.",
        param=param,
        code="tools_not_supported",
    )


def check_prompts(prompts: Sequence[Prompt], base: BaseInfo, param: str, room: int | None = None) -> None:
    """room: one more token than a prompt may have."""
    for prompt in prompts:
        if not prompt.tokens:
            raise InvalidRequestError(
                f"{param}: has no tokens. Write at least one character (this base adds none of its own).",
                param=param,
            )
        highest = max(prompt.tokens)
        if highest >= base.vocab_size:
            raise InvalidRequestError(
                f"{param}: token id {highest} is not in the vocabulary (0 to {base.vocab_size - 1}).",
                param=param,
            )
        if len(prompt.tokens) >= (base.max_length if room is None else room):
            raise ContextLengthError(
                param,
                f"has {len(prompt.tokens)} tokens",
                base.max_length,
                "Shorten it.",
                ", those of the answer with them",
            )


def _sampling(body: SamplingBody, base: BaseInfo, wanted: _Wanted, end_tokens: tuple[int, ...]) -> Sampling:
    max_tokens, told = _token_limit(base, wanted), wanted.prompt_logprobs
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    _check_vocabulary("logit_bias", bias, base)
    _check_vocabulary("stop_token_ids", body.stop_token_ids or (), base)
    seed = secrets.randbits(SEED_BITS) if body.seed is None else body.seed % 2**SEED_BITS
    return Sampling(
        temperature=_given(body.temperature, body.default_temperature),
        top_k=max(_given(body.top_k, 0), 0),
        top_p=_given(body.top_p, 1.0),
        min_p=_given(body.min_p, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        logit_bias=bias,
        seed=seed,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        end_token_ids=end_tokens,
        min_tokens=min(_given(body.min_tokens, 0), max_tokens),
        max_tokens=max_tokens,
        ignore_eos=bool(body.ignore_eos),
        logprobs=wanted.logprobs,
        prompt_logprobs=wanted.logprobs if wanted.echo and told is None else told,
        thought=None if wanted.thinking is None else wanted.thinking.bound,
    )


def _given(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def _check_vocabulary(param: str, tokens: Sequence[int] | dict[int, float], base: BaseInfo) -> None:
    for token in tokens:
        if token >= base.vocab_size:
            raise InvalidRequestError(
                f"{param}: token id {token} is not in the vocabulary (0 to {base.vocab_size - 1}).",
                param=param,
            )


def _token_limit(base: BaseInfo, wanted: _Wanted) -> int:
    """Return the number of tokens to generate. What the caller asked for must fit; a default is cut to
    what fits."""
    prompt = max(len(prompt.tokens) for prompt in wanted.prompts)
    room = base.max_length - prompt
    if wanted.max_tokens is None:
        held = max(1, base.kv_longest - prompt)
        return min(room, held, room if wanted.default_tokens is None else wanted.default_tokens)
    if wanted.max_tokens > room:
        raise ContextLengthError(
            "max_tokens",
            f"{wanted.max_tokens} tokens after a prompt of {prompt} are too many",
            base.max_length,
            f"Ask for {room} or fewer, or shorten the prompt.",
        )
    return max(1, wanted.max_tokens)


def _budget_not_supported(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"thinking_token_budget: this base's chat template {why}. Leave it out; max_tokens ends thoughts and "
        "texts alike.",
        param="thinking_token_budget",
        code="thinking_budget_not_supported",
    )
