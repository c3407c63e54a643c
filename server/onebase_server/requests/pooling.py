"""Planning of requests that read texts: vectors, classes, scores and decisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from onebase_adapters.format.config import CLASSIFIERS
from onebase_edge.errors import ContextLengthError, InvalidRequestError, UnavailableError
from onebase_engine.base.chat import without_padding
from onebase_engine.engine.messages import Pooling, Sampling
from onebase_server.inference.generation import GenerationRequest, Prompt, new_id
from onebase_server.inference.tokenization import BaseTokenizer
from onebase_server.requests.planner import OwnParts, Planner, check_generates, check_prompts
from onebase_server.requests.schemas.generation import ConversationFields
from onebase_server.requests.schemas.pooling import (
    ClassifyRequest,
    DecideRequest,
    EmbeddingRequest,
    PoolingFields,
    ReadingFields,
    inputs_of,
)
from onebase_server.requests.schemas.wire import rebuilt
from onebase_server.tenancy.access import Caller

AT_ONCE = 64
"""Largest number of sequences of a request at once; further ones wait, so that other requests find places."""

MAX_TOKEN_CLASSES = 1 << 21
TOKEN_OVERHEAD = 8
"""Labels that a token counts besides its own, for its name and number, in an answer with probabilities of
tokens' labels."""


class ReadingPlanner:
    """Planner of jobs that only read texts. Every method raises what those of Planner raise."""

    def __init__(self, planner: Planner, max_timeout: float) -> None:
        self._planner = planner
        self._max_timeout = max_timeout

    async def embed(self, body: EmbeddingRequest, caller: Caller) -> list[GenerationRequest]:
        """Return requests whose choices, one after the other, are the vectors of the inputs."""
        most = self._planner.base().hidden_size
        if body.dimensions is not None and most and body.dimensions > most:
            raise InvalidRequestError(
                f"dimensions: this base's vectors have {most}. Ask for that or fewer.", param="dimensions"
            )
        parts, deadline = await self._parts_of(body, caller)
        own = parts.tokenizer
        prompts, params = await self._inputs(caller.tenant, body.input, own, parts.prefixed)
        jobs = self._pooled("embd-", body, prompts, params, caller, Pooling(body.pooling or "last"), own)
        return await self._with_model(body, jobs, own, deadline, parts.prompt_prefix)

    async def classify(self, body: ClassifyRequest, caller: Caller) -> list[GenerationRequest]:
        """Return requests whose choices are the logits of the inputs' classes; of their tokens', one after
        the other."""
        own, deadline = await self._tokenizer_of(body, caller)
        if body.input is not None:
            prompts, params = await self._inputs(caller.tenant, body.input, own)
        else:
            options = {"chat_template_kwargs": body.chat_template_kwargs}
            chat = rebuilt(ConversationFields, options)
            prompt = await self._planner.chat_prompt(caller.tenant, chat, body.messages or [], tokenizer=own)
            prompts, params = [prompt], ["messages"]
        jobs = self._pooled("classify-", body, prompts, params, caller, Pooling(head=True), own)
        jobs = await self._with_model(body, jobs, own, deadline)
        choice = jobs[0].adapter
        if choice.task not in CLASSIFIERS or choice.weighted:
            raise InvalidRequestError(
                f"model: {choice.named or self._planner.base_name!r} does not classify. Name one adapter "
                "whose task_type is SEQ_CLS or TOKEN_CLS.",
                param="model",
                code="adapter_task",
            )
        if choice.task == "SEQ_CLS":
            return [
                replace(job, prompts=tuple(_without_padding(prompt, own) for prompt in job.prompts))
                for job in jobs
            ]
        count = sum(len(prompt.tokens) for job in jobs for prompt in job.prompts)
        most = MAX_TOKEN_CLASSES // (choice.labels + TOKEN_OVERHEAD)
        if count > most:
            raise InvalidRequestError(
                f"input: has {count} tokens; one answer has room for {most} with the {choice.labels} labels "
                "of each. Send fewer texts at once.",
                param="input",
            )
        return [replace(job, pooling=Pooling("each", head=True)) for job in jobs]

    async def scores(
        self,
        body: PoolingFields,
        pairs: Sequence[tuple[str, str]],
        params: Sequence[tuple[str, str]],
        caller: Caller,
    ) -> tuple[list[GenerationRequest], list[str]]:
        """Return requests for the nearness of pairs, whose texts come from the fields `params`.

        With a classifier of one label, a pair is one choice: its logit. Else each field is one, once: its
        vector; the second result says in which order.
        """
        parts, deadline = await self._parts_of(body, caller)
        own = parts.tokenizer
        empty = self._reading(new_id("score-"), body, [], [], caller, own)
        choice = (await self._with_model(body, [empty], own, deadline, parts.prompt_prefix))[0].adapter
        if choice.task == "TOKEN_CLS" or choice.labels > 1:
            raise InvalidRequestError(
                f"model: {choice.named!r} tells {choice.labels} classes apart, which is no score. Send it to "
                "POST /classify, or name a classifier of one label, an encoder or the base.",
                param="model",
                code="adapter_task",
            )
        if choice.task == "SEQ_CLS" and choice.weighted:
            raise InvalidRequestError(
                "model: a classifier scores with weight 1 and alone. Name it alone, or leave it out.",
                param="model",
                code="adapter_task",
            )
        if choice.task == "SEQ_CLS":
            if body.pooling is not None:
                raise InvalidRequestError("pooling: a classifier has its own. Leave it out.", param="pooling")
            texts = await self._planner.texts(
                caller.tenant, params[0][0], [one for one, _ in pairs], tokenizer=own
            )
            others = await self._planner.texts(
                caller.tenant, params[0][1], [other for _, other in pairs], special=False, tokenizer=own
            )
            prompts = [
                _without_padding(Prompt(one + other), own) for one, other in zip(texts, others, strict=True)
            ]
            names = [other for _, other in params]
            jobs = self._pooled("score-", body, prompts, names, caller, Pooling(head=True), own)
            return [replace(one, adapter=choice, tokenizer=own, deadline=deadline) for one in jobs], []
        fields = {
            param: parts.prefixed(text)
            for names, some in zip(params, pairs, strict=True)
            for param, text in zip(names, some, strict=True)
        }
        tokens = await self._planner.texts(caller.tenant, params[0][1], list(fields.values()), tokenizer=own)
        prompts = [Prompt(one, text) for one, text in zip(tokens, fields.values(), strict=True)]
        pooling = Pooling(body.pooling or "last")
        jobs = self._pooled("score-", body, prompts, list(fields), caller, pooling, own)
        return [replace(one, adapter=choice, tokenizer=own, deadline=deadline) for one in jobs], list(fields)

    async def _inputs(
        self,
        tenant: str,
        given: str | list[str] | list[int] | list[list[int]],
        tokenizer: BaseTokenizer,
        written: Callable[[str], str] = str,
    ) -> tuple[list[Prompt], list[str]]:
        """Return the prompts, and the fields that they are from.

        written: returns a text as the adapter reads it.
        """
        found = [written(one) if isinstance(one, str) else one for one in inputs_of(given)]
        texts = [one for one in found if isinstance(one, str)]
        tokens = iter(await self._planner.texts(tenant, "input", texts, tokenizer=tokenizer))
        prompts = [Prompt(next(tokens), one) if isinstance(one, str) else Prompt(one) for one in found]
        single = isinstance(given, str) or isinstance(given[0], int)
        return prompts, ["input"] if single else [f"input[{index}]" for index in range(len(prompts))]

    def _pooled(
        self,
        kind: str,
        body: ReadingFields,
        prompts: Sequence[Prompt],
        params: Sequence[str],
        caller: Caller,
        pooling: Pooling,
        tokenizer: BaseTokenizer,
    ) -> list[GenerationRequest]:
        id, jobs = new_id(kind), []
        for first in range(0, len(prompts), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            job = self._reading(f"{id}.{first}", body, prompts[some], params[some], caller, tokenizer)
            jobs.append(replace(job, pooling=pooling))
        return jobs

    async def decide(
        self, body: DecideRequest, caller: Caller
    ) -> tuple[list[GenerationRequest], list[GenerationRequest]]:
        """Return requests whose choices are the request's, after its prompt, and after its prior if it has
        one."""
        ends = body.messages is not None if body.ends is None else body.ends
        own, deadline = await self._tokenizer_of(body, caller)
        choices = [
            tuple(one)
            for one in await self._planner.texts(
                caller.tenant, "choices", body.choices, special=False, tokenizer=own
            )
        ]
        for index, one in enumerate(choices):
            if not one:
                raise InvalidRequestError(f"choices[{index}]: has no tokens.", param=f"choices[{index}]")
        if ends:
            end = own.end
            if end is None:
                raise InvalidRequestError(
                    "ends: this base's tokenizer has no token for the end of a text. Send false.",
                    param="ends",
                )
            choices = [(*one, end) for one in choices]
        id = new_id("decide-")
        groups: list[list[GenerationRequest]] = []
        for param, given in (("prompt", body.prompt or body.messages), ("prior", body.prior)):
            if given is None:
                groups.append([])
                continue
            if isinstance(given, str):
                (tokens,) = await self._planner.texts(caller.tenant, param, [given], tokenizer=own)
                prompt = Prompt(tokens, given)
            else:
                await self._planner.read_template(caller.tenant, own)
                switch = own.thinking_switch  # a choice is an answer, not a thought
                off = {} if switch is None else {switch.name: switch.off}
                options = {"chat_template_kwargs": off | (body.chat_template_kwargs or {})}
                prompt = await self._planner.chat_prompt(
                    caller.tenant, rebuilt(ConversationFields, options), given, tokenizer=own
                )
                prompt = Prompt([*prompt.tokens, *own.answer_header()])
                param = "messages" if param == "prompt" else param
            jobs = []
            for first in range(0, len(choices), AT_ONCE):
                some = choices[first : first + AT_ONCE]
                longest = max(map(len, some))
                job = self._reading(f"{id}.{param}{first}", body, [prompt], [param], caller, own, longest)
                sampling = Sampling(max_tokens=0, prompt_logprobs=0)
                jobs.append(replace(job, sampling=sampling, branches=tuple(some), n=len(some)))
            groups.append(jobs)
        after, before = groups
        named = await self._with_model(body, after + before, own, deadline)
        check_generates(named[0].adapter)
        return named[: len(after)], named[len(after) :]

    def _reading(
        self,
        id: str,
        body: ReadingFields,
        prompts: Sequence[Prompt],
        params: Sequence[str],
        caller: Caller,
        tokenizer: BaseTokenizer,
        more: int = 0,
    ) -> GenerationRequest:
        """more: tokens that come after a prompt."""
        base = self._planner.base_of(tokenizer)
        self._planner.check_limits(1, body.timeout_s)
        room, kept = base.max_length - more, body.truncate_prompt_tokens
        if room < 1:
            raise ContextLengthError(
                "choices",
                f"one has {more} tokens",
                base.max_length,
                "Shorten it.",
                ", those of the prompt with them",
            )
        if kept == 0:
            raise InvalidRequestError(
                "truncate_prompt_tokens: keeps no token. Send at least 1, or -1 for as many as fit.",
                param="truncate_prompt_tokens",
            )
        if kept is not None:
            kept = room if kept < 0 else kept
            prompts = [Prompt(prompt.tokens[max(0, len(prompt.tokens) - kept) :]) for prompt in prompts]
        for param, prompt in zip(params, prompts, strict=True):
            check_prompts([prompt], base, param, room + 1)
        timeout_s = body.timeout_s or (None if caller.background else self._max_timeout)
        return GenerationRequest(
            id=id,
            tenant=caller.tenant,
            priority=caller.priority,
            prompts=tuple(prompts),
            sampling=Sampling(max_tokens=0),
            timeout_s=timeout_s,
            background=caller.background,
        )

    async def _tokenizer_of(self, body: ReadingFields, caller: Caller) -> tuple[BaseTokenizer, float | None]:
        """Return the tokenizer of a request's adapter, which is fetched first, and the request's deadline."""
        parts, deadline = await self._parts_of(body, caller)
        return parts.tokenizer, deadline

    async def _parts_of(self, body: ReadingFields, caller: Caller) -> tuple[OwnParts, float | None]:
        """Return the parts of a request's adapter, which is fetched first, and the request's deadline."""
        self._planner.check_model(caller.tenant, body.model or self._planner.base_name, body)
        self._planner.check_limits(1, body.timeout_s)
        deadline = self._planner.deadline_of(body, caller)
        await self._planner.pull_first(caller.tenant, body.model, body, deadline)
        return await self._planner.parts_of(caller.tenant, body.model, body), deadline

    async def _with_model(
        self,
        body: ReadingFields,
        jobs: Sequence[GenerationRequest],
        tokenizer: BaseTokenizer,
        deadline: float | None,
        prefix: str | None = None,
    ) -> list[GenerationRequest]:
        """Return the jobs with their adapter. Raises UnavailableError if it turns out to have another
        tokenizer than the one that made their tokens, or other defaults than the prefix in them.

        prefix: text before each prompt; None: the adapter's defaults are not used.
        """
        model = body.model or self._planner.base_name
        jobs = [replace(job, deadline=deadline) for job in jobs]
        adapter = await self._planner.choose(model, body, jobs[0])
        found = await self._planner.parts_for(adapter, jobs[0].tenant, body)
        if found.tokenizer is not tokenizer or prefix not in (None, found.prompt_prefix):
            raise UnavailableError(
                "The adapter's active version has just changed, and reads texts otherwise. Try again.",
                code="adapter_unavailable",
                retry_after=0.1,
            )
        return [replace(job, adapter=adapter, tokenizer=tokenizer) for job in jobs]


def _without_padding(prompt: Prompt, tokenizer: BaseTokenizer) -> Prompt:
    return replace(prompt, tokens=without_padding(prompt.tokens, tokenizer.padding))
