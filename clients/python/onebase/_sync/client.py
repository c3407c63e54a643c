# Generated from _async/client.py by tools/generate_sync.py; do not edit.
"""The client."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import closing
from datetime import date
from types import TracebackType
from typing import Any, Literal, Unpack

from onebase_protocol.access import UsageAnswer
from onebase_protocol.common import ListAnswer, PageAnswer
from onebase_protocol.reading import ClassifyAnswer, EmbeddingsAnswer, RerankAnswer
from onebase_protocol.text import GeneratedAnswer, GenerateManyAnswer

from .._core import access, adapters, judging, parse, reading, requests
from .._core.config import UNSET, ClientOptions, Timeout, Unset, api_key_or_default, url_or_default
from .._core.streams import broken
from .._http import Pool, Transport
from ..adapter_types import FeedbackAnswer
from ..errors import APIConnectionError, APITimeoutError, InvalidResponseError
from ..judging_types import Judge, Judgement
from ..metrics import METRICS, Metrics, parse_metrics
from ..types import (
    AdapterSpec,
    AuditEntry,
    Classification,
    Decision,
    Embeddings,
    Generation,
    Health,
    Messages,
    Model,
    Ranked,
    SamplingFields,
    ServerVersion,
    TenantUsage,
)
from .adapters import Adapters
from .batches import Batches
from .http import Http
from .keys import Gates, Keys, Tenants
from .request_log import Requests
from .streams import Stream
from .training import Files, Training


class Client:
    """Talks to one OneBase server. Safe to share between threads. Close it, or use it in a `with` block.

    Examples:
        >>> with Client() as client:  # doctest: +SKIP
        ...     answer = client.chat("What is the capital of France?", adapter="acme-support")
        ...     print(answer.text)

    Args:
        url: Where the server is; else $ONEBASE_URL, else http://127.0.0.1:8000.
        api_key: Sent as a bearer token to this server alone; else $ONEBASE_API_KEY, else none.
        timeout: Seconds that the server may be silent, or a Timeout for each kind of wait, or None for
            no limit. By default 5 seconds to connect and 600 for an answer.
        max_retries: How many times a request is sent again after a failure that another attempt cannot make
            worse: no connection, 429, 503; for reads also a lost connection, a timeout, 502 and 504. The
            pauses grow, or are as long as the server asks by Retry-After. A stream that has begun is never
            repeated.
        transport: Replaces the network, for tests.

    Raises:
        ValueError: an argument is out of range, or `url` is not a URL.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float | Timeout | None = Timeout(),  # noqa: B008 (frozen)
        max_retries: int = 2,
        transport: Transport | None = None,
    ) -> None:
        options = ClientOptions(api_key_or_default(api_key), Timeout.of(timeout), max_retries)
        self._url = url_or_default(url)
        self._http = Http(Pool(self._url, transport), options)

    @property
    def url(self) -> str:
        """Address of the server."""
        return self._url

    def with_options(
        self,
        *,
        api_key: str | Unset | None = UNSET,
        timeout: float | Timeout | Unset | None = UNSET,
        max_retries: int | Unset = UNSET,
    ) -> Client:
        """Return a client with other options over the same connections:
        `client.with_options(timeout=5).chat(...)`.

        Closing either closes both.
        """
        client = copy.copy(self)
        client._http = self._http.with_options(self._http.options.changed(api_key, timeout, max_retries))
        return client

    @property
    def adapters(self) -> Adapters:
        """The server's adapters: upload, pull, list, activate, roll back, delete."""
        return Adapters(self._http)

    @property
    def files(self) -> Files:
        """Files that jobs and batches read, and what they leave."""
        return Files(self._http)

    @property
    def batches(self) -> Batches:
        """Files of requests that the server answers when it has room."""
        return Batches(self._http)

    @property
    def training(self) -> Training:
        """Jobs that train adapters on the server's base."""
        return Training(self._http)

    @property
    def keys(self) -> Keys:
        """API keys, for operators: make, list, change, revoke."""
        return Keys(self._http)

    @property
    def requests(self) -> Requests:
        """The server's log of requests: list, replay, erase."""
        return Requests(self._http)

    @property
    def tenants(self) -> Tenants:
        """Tenants: their quotas, and what they have."""
        return Tenants(self._http)

    @property
    def gates(self) -> Gates:
        """Rules of what a version must pass before it answers."""
        return Gates(self._http)

    @property
    def models(self) -> Models:
        """The base and the adapters, as names for a request."""
        return Models(self._http)

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        adapter: AdapterSpec = None,
        **sampling: Unpack[SamplingFields],
    ) -> Generation:
        """Continue a text, or answer a conversation.

        Args:
            prompt: Text to continue, as it is, without a chat template.
            messages: A conversation instead; see `chat`.
            adapter: None for the base, a name, `name@version`, `hub:org/repo@revision`, or weights:
                `{"acme": 0.7, "legal": 0.3}`.
            **sampling: See SamplingFields.

        Raises:
            OneBaseError: see `onebase.errors` for its kinds.
            TypeError, ValueError: an argument is wrong; nothing was sent.
        """
        call = requests.generate(prompt, messages, adapter, sampling, stream=False)
        return parse.generation(self._http.ask(call, GeneratedAnswer), sampling.get("schema"))

    def chat(
        self, messages: Messages, *, adapter: AdapterSpec = None, **sampling: Unpack[SamplingFields]
    ) -> Generation:
        """Answer a conversation, laid out by the base's chat template.

        Args:
            messages: The turns so far, or one question as a string. To continue, append the answer's
                `message`.
            adapter, **sampling: As for `generate`.

        Raises:
            OneBaseError: As `generate`.
        """
        return self.generate(messages=messages, adapter=adapter, **sampling)

    def stream(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        adapter: AdapterSpec = None,
        **sampling: Unpack[SamplingFields],
    ) -> Stream:
        """Generate as `generate` does, piece by piece. The request is sent on entering the `with`
        block.

        Examples:
            >>> with client.stream("Once upon a time") as stream:  # doctest: +SKIP
            ...     for piece in stream:
            ...         print(piece.text, end="", flush=True)
            ...     print(stream.result.usage)

        Raises:
            OneBaseError: As `generate`, on entering.
            StreamError: While iterating.
        """
        call = requests.generate(prompt, messages, adapter, sampling, stream=True)
        return Stream(lambda: self._http.open_stream(call), schema=sampling.get("schema"))

    def judge(
        self, judges: Sequence[Judge], *, prompt: str | None = None, messages: Messages | None = None
    ) -> tuple[Judgement, ...]:
        """Ask several judges about one prompt or conversation, of which the server computes what they share
        once.

        Examples:
            >>> talk = [Message("user", "Where is it?"), Message("assistant", "Paris.")]  # doctest: +SKIP
            >>> judges = [  # doctest: +SKIP
            ...     Judge(adapter="polite", instruction="Is the answer polite?", choices=["yes", "no"]),
            ...     Judge(adapter="grounded", instruction="Is it true?", choices=["yes", "no"]),
            ... ]
            >>> for one in client.judge(judges, messages=talk):  # doctest: +SKIP
            ...     print(one.name, one.text)

        Args:
            judges: 1 to 64: an adapter or the base, what it is asked, and its sampling fields.
            prompt: Text that all of them continue, each after its `instruction`.
            messages: A conversation instead. A judge's `instruction` is one more message of the user.

        Returns:
            One judgement for each judge, in their order: an answer, or the error of this judge alone.

        Raises:
            OneBaseError: The request as a whole failed.
            TypeError, ValueError: an argument is wrong; nothing was sent.
        """
        call = judging.judge(judges, prompt, messages, stream=False)
        return judging.judgements(self._http.ask(call, GenerateManyAnswer), judges)

    def judge_as_ended(
        self, judges: Sequence[Judge], *, prompt: str | None = None, messages: Messages | None = None
    ) -> Generator[Judgement, None, None]:
        """Ask several judges as `judge` does, and yield each judgement when it is complete.

        Closing the generator ends those that still run.

        Raises:
            OneBaseError: As `judge`.
            StreamError: The stream broke.
        """
        reader = judging.JudgementReader(judges)
        response = self._http.open_stream(judging.judge(judges, prompt, messages, stream=True))
        try:
            with closing(response.events()) as events:
                for event in events:
                    if (judgement := reader.read(event.data)) is not None:
                        yield judgement
        except (APIConnectionError, APITimeoutError, InvalidResponseError) as error:
            if not reader.done:
                raise broken(error) from error
        finally:
            response.close()

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        adapter: AdapterSpec = None,
        pooling: reading.Pooling = "last",
        dimensions: int | None = None,
        normalize: bool = True,
    ) -> Embeddings:
        """Make a vector of each text.

        Args:
            texts: 2,048 at most.
            adapter: As for `generate`; also one that encodes.
            pooling: The last token's hidden state, or the mean of all tokens'.
            dimensions: Keep so many numbers of each vector; None: all.
            normalize: Make each vector 1 long.

        Raises:
            OneBaseError: see `onebase.errors` for its kinds.
            ValueError: there are no texts; nothing was sent.
        """
        call = reading.embed(texts, adapter, pooling, dimensions, normalize)
        return reading.embeddings(self._http.ask(call, EmbeddingsAnswer))

    def classify(
        self,
        texts: str | Sequence[str] | None = None,
        *,
        adapter: AdapterSpec,
        messages: Messages | None = None,
    ) -> tuple[Classification, ...]:
        """Say of each text, or of each of its tokens, which class it is of.

        Args:
            adapter: One that classifies: its `task_type` is SEQ_CLS or TOKEN_CLS.
            messages: In place of texts: one conversation, as the base's chat template writes it.

        Raises:
            OneBaseError: As `embed`.
            ValueError: Neither or both of `texts` and `messages`; nothing was sent.
        """
        call = reading.classify(texts, messages, adapter)
        return reading.classifications(self._http.ask(call, ClassifyAnswer))

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        adapter: AdapterSpec = None,
        pooling: reading.Pooling | None = None,
        top_n: int | None = None,
    ) -> tuple[Ranked, ...]:
        """Sort documents by how near they are to a query, the nearest first.

        Args:
            adapter: A classifier of one label, which sees both texts; else vectors are compared.
            pooling: How vectors are made, as for `embed`.
            top_n: So many of the best; None: all.

        Raises:
            OneBaseError: As `embed`.
        """
        call = reading.rerank(query, documents, adapter, pooling, top_n)
        return reading.ranked(self._http.ask(call, RerankAnswer), documents)

    def decide(
        self,
        choices: Sequence[str],
        *,
        prompt: str | None = None,
        messages: Messages | None = None,
        adapter: AdapterSpec = None,
        ends: bool | None = None,
        normalize: Literal["sum", "mean"] = "sum",
        prior: Messages | None = None,
        temperature: float = 1.0,
    ) -> Decision:
        """Say how likely each of some choices is to come next. Nothing is generated.

        Args:
            choices: 2 to 1,024 texts. After a prompt, each with the space that it begins with.
            prompt, messages: What comes before, as for `generate`.
            ends: Whether a choice is the whole answer; None: it is after messages.
            normalize: Weigh a choice by the sum of its tokens' logprobs, or by their mean.
            prior: A prompt or messages that say nothing, such as "N/A": what makes a choice likely after
                them is taken off (https://arxiv.org/abs/2102.09690).
            temperature: Above 1 the probabilities come nearer to each other.

        Raises:
            OneBaseError: As `generate`.
        """
        call = reading.decide(choices, prompt, messages, adapter, ends, normalize, prior, temperature)
        return self._http.ask(call, Decision)

    def feedback(
        self,
        answer: str,
        *,
        score: float | None = None,
        thumb: Literal["up", "down"] | None = None,
    ) -> FeedbackAnswer:
        """Send what a user thinks of an answer, which rollouts compare versions by. The last one counts.

        Args:
            answer: The answer's id, such as `Generation.id`.
            score: From 0 (bad) to 1 (good).
            thumb: `up` is 1, `down` is 0.

        Raises:
            NotFoundError: no rollout of its adapter ran when it was answered, or that is days ago.
            ValueError: neither or both of `score` and `thumb`.
        """
        return self._http.ask(adapters.feedback(answer, score, thumb), FeedbackAnswer)

    def usage(
        self,
        *,
        start: date | str | None = None,
        end: date | str | None = None,
        group_by: Sequence[str] = ("day", "tenant", "adapter"),
        tenant: str | None = None,
    ) -> tuple[TenantUsage, ...]:
        """Return requests, tokens and training: of all tenants for a key with the scope `admin`, for others
        theirs.

        Args:
            start, end: The first and the last day, in UTC: a date, or as "2026-11-26". By default the last
                30 days.
            group_by: Of `day`, `tenant`, `base`, `adapter`. The rest is summed.
            tenant: Only this one.

        Raises:
            BadRequestError: no such day or column, or too much for one answer.
            PermissionDeniedError: `tenant` is another one, and the key lacks the scope `admin`.
        """
        call = access.usage(start, end, group_by, tenant)
        return (self._http.ask(call, UsageAnswer)).data

    def usage_csv(
        self,
        *,
        start: date | str | None = None,
        end: date | str | None = None,
        group_by: Sequence[str] = ("day", "tenant", "adapter"),
        tenant: str | None = None,
    ) -> str:
        """Return `usage` as CSV with a line of titles. No name in it looks like a formula to a
        spreadsheet."""
        reply = self._http.send(access.usage(start, end, group_by, tenant, csv=True))
        return reply.body.decode()

    def audit(
        self,
        *,
        tenant: str | None = None,
        action: str | None = None,
        target: str | None = None,
        since: float | None = None,
        after: str | None = None,
        oldest_first: bool = False,
        limit: int | None = 100,
    ) -> tuple[AuditEntry, ...]:
        """Return changes of the server's registry and who made them, the newest first.

        Args:
            tenant: Of one tenant. Without it a key with the scope `admin` gets all, others their own.
            action: Such as `adapter.activated`, or all of a kind: `adapter`, `file`, `job`, `batch`, `key`,
                `tenant`.
            target: An adapter's name, or the id of a file, a job, a batch or a key.
            since: Unix seconds; nothing from before.
            after: The id of an entry, after which the list begins.
            oldest_first: The other way round, so that `after` the last known entry come the new ones.
            limit: The largest number of entries; None: all.

        Raises:
            BadRequestError: there is no such action, or `after` is no id of an entry.
            PermissionDeniedError: your key has neither the scope `adapters` nor `admin`.
        """
        order = "asc" if oldest_first else "desc"
        return self._http.collect(
            lambda last, size: access.audit_entries(tenant, action, target, since, order, last, size),
            PageAnswer[AuditEntry],
            limit,
            after,
        )

    def health(self) -> Health:
        """Return True if the server makes progress. A server that answers that it is unwell raises nothing.

        Raises:
            APIConnectionError, APITimeoutError: no server answers.
        """
        reply = self._http.send(requests.HEALTH)
        return parse.health(reply.status, reply.body)

    def ready(self) -> Health:
        """Return True if the server takes requests now. It does not while it loads the base or drains.

        Raises:
            APIConnectionError, APITimeoutError: no server answers.
        """
        reply = self._http.send(requests.READY)
        return parse.health(reply.status, reply.body)

    def version(self) -> ServerVersion:
        """Return the server's version."""
        return parse.version(self._http.ask(requests.VERSION, dict[str, Any]))

    def metrics(self) -> Metrics:
        """Return the server's figures of now, as Prometheus gets them.

        Raises:
            PermissionDeniedError: the server has API keys, and yours lacks the scope `admin`.
        """
        reply = self._http.send(METRICS)
        return parse_metrics(reply.body.decode())

    def close(self) -> None:
        """Close the connections. The client cannot be used after that."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Models:
    """`client.models`: the base and the adapters, as names for a request."""

    def __init__(self, http: Http) -> None:
        self._http = http

    def list(self) -> tuple[Model, ...]:
        """Return the base and every adapter."""
        return (self._http.ask(requests.MODELS, ListAnswer[Model])).data

    def retrieve(self, model_id: str) -> Model:
        """Return one model.

        Raises:
            NotFoundError: there is no model of this name.
        """
        return self._http.ask(requests.model(model_id), Model)
