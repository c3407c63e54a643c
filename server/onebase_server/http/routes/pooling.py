"""/v1/embeddings, /classify, /v1/rerank, /score and /v1/decide: texts that are read, by any adapter."""

from __future__ import annotations

import base64
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean as mean
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request, Response

from onebase_edge.sse import cancelled_when_gone
from onebase_engine.engine.messages import SequenceOutput
from onebase_protocol.common import CachedTokens
from onebase_protocol.reading import (
    ClassifyAnswer,
    Decision,
    DocumentAnswer,
    EmbeddingAnswer,
    EmbeddingsAnswer,
    Option,
    PairScore,
    RankedAnswer,
    ReadingUsage,
    RerankAnswer,
    ScoreAnswer,
    TextLabelAnswer,
    TokenLabelAnswer,
    TokenLabelsAnswer,
)
from onebase_server.http.answers import MODEL_REFUSED, answer
from onebase_server.http.authorization import needs
from onebase_server.http.deps import Admitted, Calling, Provided, Services, StrictRoute, json_response
from onebase_server.http.routes.generation import RequestUsageRecorder
from onebase_server.inference.generation import GenerationRequest, Reading, new_id
from onebase_server.requests.schemas.pooling import (
    ClassifyRequest,
    DecideRequest,
    EmbeddingRequest,
    PoolingFields,
    RerankRequest,
    ScoreRequest,
)
from onebase_server.telemetry.measurements import RequestTimestamps, TokenUsage
from onebase_server.tenancy.quotas import QuotaReservation

router = APIRouter(route_class=StrictRoute, tags=["pooling"])

INLINE_BYTES = 16 * 1024
"""Largest size, in bytes, of vectors and logits that are made into an answer on the event loop (about 5
ms)."""


@router.post("/v1/embeddings", responses=answer(EmbeddingsAnswer, *MODEL_REFUSED))
@needs("generate")
async def embed(
    body: EmbeddingRequest, request: Request, services: Provided, caller: Calling, reservation: Admitted
) -> Response:
    """Compute a vector of each input; `model` is the base's name or an adapter's."""
    services.refuse_if_draining()
    engine_requests = await services.read_planner.embed(body, caller)
    outputs, usage = await _read(request, services, reservation, engine_requests)

    def embeddings() -> list[Any]:
        vectors = _vectors(outputs)[:, : body.dimensions]
        if body.normalize is not False:
            vectors = _to_length_one(vectors)
        return _encoded(
            EmbeddingAnswer(index=index, embedding=_written(vector, body.encoding_format))
            for index, vector in enumerate(vectors)
        )

    return json_response(
        EmbeddingsAnswer(
            data=await _made_of(caller.tenant, outputs, embeddings, services),
            model=body.model or services.catalog.base_name,
            usage=_usage(usage),
            id=engine_requests[0].id.partition(".")[0],
        )
    )


@router.post("/v1/classify", responses=answer(ClassifyAnswer, *MODEL_REFUSED))
@router.post("/classify", responses=answer(ClassifyAnswer, *MODEL_REFUSED))
@needs("generate")
async def classify(
    body: ClassifyRequest, request: Request, services: Provided, caller: Calling, reservation: Admitted
) -> Response:
    """Classify each input, or each of its tokens, by an adapter that classifies."""
    services.refuse_if_draining()
    engine_requests = await services.read_planner.classify(body, caller)
    outputs, usage = await _read(request, services, reservation, engine_requests)
    prompts = [prompt for engine_request in engine_requests for prompt in engine_request.prompts]
    labels = engine_requests[0].adapter.label_names

    def classes() -> list[Any]:
        if engine_requests[0].adapter.task == "SEQ_CLS":
            return _encoded(
                TextLabelAnswer(index, *_classes(_vector(output), labels))
                for index, output in enumerate(outputs)
            )
        name = (engine_requests[0].tokenizer or services.tokenizer).token_text
        made = []
        for index, (output, prompt) in enumerate(zip(outputs, prompts, strict=True)):
            rows = _vector(output).reshape(len(prompt.tokens), -1)
            tokens = _encoded(
                TokenLabelAnswer(name(token), token, *_classes(row, labels))
                for token, row in zip(prompt.tokens, rows, strict=True)
            )
            made.append(TokenLabelsAnswer(index, tokens))
        return _encoded(made)

    return json_response(
        ClassifyAnswer(
            id=engine_requests[0].id.partition(".")[0],
            created=int(time.time()),
            model=body.model or services.catalog.base_name,
            data=await _made_of(caller.tenant, outputs, classes, services),
            usage=_usage(usage),
        )
    )


@router.post("/v1/rerank", responses=answer(RerankAnswer, *MODEL_REFUSED))
@router.post("/v2/rerank", responses=answer(RerankAnswer, *MODEL_REFUSED))
@router.post("/rerank", responses=answer(RerankAnswer, *MODEL_REFUSED))
@needs("generate")
async def rerank(
    body: RerankRequest, request: Request, services: Provided, caller: Calling, reservation: Admitted
) -> Response:
    """Order the documents by how near they are to the query, the nearest first."""
    services.refuse_if_draining()
    pairs = [(body.query, document) for document in body.documents]
    params = [("query", f"documents[{index}]") for index in range(len(pairs))]
    scores, usage = await _scores(request, services, caller, reservation, body, pairs, params)
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
    told = body.return_documents is not False
    results = [
        RankedAnswer(index, scores[index], DocumentAnswer(body.documents[index]) if told else msgspec.UNSET)
        for index in order
    ]
    model = body.model or services.catalog.base_name
    return json_response(
        RerankAnswer(id=new_id("rerank-"), model=model, results=results, usage=_usage(usage))
    )


@router.post("/v1/score", responses=answer(ScoreAnswer, *MODEL_REFUSED))
@router.post("/score", responses=answer(ScoreAnswer, *MODEL_REFUSED))
@needs("generate")
async def score(
    body: ScoreRequest, request: Request, services: Provided, caller: Calling, reservation: Admitted
) -> Response:
    """Score how near two texts are, of one pair or of many."""
    services.refuse_if_draining()
    first = body.first * len(body.second) if len(body.first) == 1 else body.first
    pairs = list(zip(first, body.second, strict=True))
    params = [
        ("text_1" if len(body.first) == 1 else f"text_1[{index}]", f"text_2[{index}]")
        for index in range(len(pairs))
    ]
    scores, usage = await _scores(request, services, caller, reservation, body, pairs, params)
    return json_response(
        ScoreAnswer(
            id=new_id("score-"),
            created=int(time.time()),
            model=body.model or services.catalog.base_name,
            data=[PairScore(index=index, score=score) for index, score in enumerate(scores)],
            usage=_usage(usage),
        )
    )


@router.post("/v1/decide", responses=answer(Decision, *MODEL_REFUSED))
@needs("generate")
async def decide(
    body: DecideRequest, request: Request, services: Provided, caller: Calling, reservation: Admitted
) -> Response:
    """Return how likely each of the choices is to come next, among them."""
    services.refuse_if_draining()
    after, before = await services.read_planner.decide(body, caller)
    outputs, usage = await _read(request, services, reservation, after + before)
    found = [[one.logprob for one in output.prompt_logprobs or ()] for output in outputs]
    logprobs, priors = found[: len(body.choices)], found[len(body.choices) :]
    weigh = mean if body.normalize == "mean" else sum
    values = [weigh(some) for some in logprobs]
    if priors:
        values = [value - weigh(some) for value, some in zip(values, priors, strict=True)]
    probabilities = _softmax(values, body.temperature or 1.0)
    best = max(range(len(values)), key=lambda index: probabilities[index])
    return json_response(
        Decision(
            id=after[0].id.partition(".")[0],
            created=int(time.time()),
            model=body.model or services.catalog.base_name,
            choice=body.choices[best],
            index=best,
            options=tuple(
                Option(
                    index=index,
                    text=text,
                    probability=probabilities[index],
                    logprob=sum(logprobs[index]),
                    prior_logprob=sum(priors[index]) if priors else None,
                    token_logprobs=tuple(logprobs[index]),
                )
                for index, text in enumerate(body.choices)
            ),
            usage=_usage(usage),
        )
    )


# ---- how it is computed ----------------------------------------------------------------------


@dataclass
class _Total:
    """Total of what all jobs of a request take. It is reported once, when the request is over and no job
    runs."""

    meter: RequestUsageRecorder
    usage: TokenUsage = field(default_factory=TokenUsage)
    moments: RequestTimestamps | None = None
    finished: Counter[str] = field(default_factory=Counter)
    running: int = 0
    over: bool = False

    def begin(self) -> None:
        """Count a job that has started: it is reported, whatever its end."""
        self.running += 1
        self.meter.reservation.leave = lambda: None

    def sequences_ended(self) -> None:
        """Do nothing: the request may have more jobs."""

    @property
    def token_gap(self) -> Callable[[float], None]:
        return self.meter.token_gap

    def used(self, usage: TokenUsage, timestamps: RequestTimestamps, finished: Counter[str]) -> None:
        self.moments = timestamps if self.moments is None else replace(self.moments, last=timestamps.last)
        self.finished += finished
        self.usage.prompt += usage.prompt
        self.usage.cached += usage.cached
        self.running -= 1
        self._settle()

    def close(self) -> None:
        self.over = True
        self._settle()

    def _settle(self) -> None:
        if self.over and not self.running and self.moments is not None:
            self.meter.sequences_ended()
            self.meter.used(self.usage, self.moments, self.finished)


async def _read(
    request: Request,
    services: Services,
    reservation: QuotaReservation,
    engine_requests: Sequence[GenerationRequest],
) -> tuple[list[SequenceOutput], TokenUsage]:
    """Return the outputs of the jobs' choices, computed one after the other, as many at once as have places.

    Raises what QuotaReservation.admit, Reading.start and Reading.outputs raise.
    """
    services.refuse_if_draining()
    base = services.supervisor.base
    places = (base.max_sequences if base else 0) + services.settings.queue_limit
    if reservation.max_sequences is not None:
        places = min(places, reservation.max_sequences)
    engine_requests = [
        part for engine_request in engine_requests for part in engine_request.parts(max(places, 1))
    ]
    reservation.admit(
        sum(engine_request.reserved_tokens for engine_request in engine_requests),
        max(engine_request.choices for engine_request in engine_requests),
    )
    spans = services.tracing.of_request(engine_requests[0], request.scope, services.catalog.base_name)
    total = _Total(
        RequestUsageRecorder(reservation, services.usage, services.measured, engine_requests[0], spans)
    )
    outputs: list[SequenceOutput] = []
    try:
        for engine_request in engine_requests:
            reading = Reading(
                services.supervisor, replace(engine_request, is_continuation=bool(outputs)), recorder=total
            )
            await reading.start(services.residency)
            total.begin()
            with cancelled_when_gone(request.receive, reading):
                outputs += await reading.outputs()
    finally:
        total.close()
    return outputs, total.usage


async def _scores(
    request: Request,
    services: Services,
    caller: Calling,
    reservation: QuotaReservation,
    body: PoolingFields,
    pairs: Sequence[tuple[str, str]],
    params: Sequence[tuple[str, str]],
) -> tuple[list[float], TokenUsage]:
    """Return each pair's score: the cosine between their vectors, or the probability of a classifier of one
    label, from 0 to 1. `params`: the fields that the texts are from."""
    engine_requests, fields = await services.read_planner.scores(body, pairs, params, caller)
    outputs, usage = await _read(request, services, reservation, engine_requests)
    if not fields:
        return [_sigmoid(float(_vector(output)[0])) for output in outputs], usage
    vectors = dict(zip(fields, _to_length_one(_vectors(outputs)), strict=True))
    return [float(vectors[one] @ vectors[other]) for one, other in params], usage


async def _made_of(
    tenant: str, outputs: Sequence[SequenceOutput], make: Callable[[], list[Any]], services: Services
) -> list[Any]:
    """Return `make()`, computed in a thread for many numbers, so that it does not hold up the streams."""
    if sum(len(output.vector or b"") for output in outputs) <= INLINE_BYTES:
        return make()
    return await services.reading.run_for(tenant, make)


def _encoded(values: Iterable[Any]) -> list[Any]:
    """Encode the values one by one: other threads wait for as long as one takes."""
    return [msgspec.Raw(msgspec.json.encode(value)) for value in values]


def _vector(output: SequenceOutput) -> np.ndarray:
    return np.frombuffer(output.vector or b"", "<f4").astype(np.float64)


def _vectors(outputs: Sequence[SequenceOutput]) -> np.ndarray:
    """Return the vectors as an array of [outputs, size] in fp64."""
    return np.stack([_vector(output) for output in outputs])


def _classes(logits: np.ndarray, labels: Sequence[str]) -> tuple[str, list[float], int]:
    """Return the likeliest label of one text or token, the probabilities of all labels, and their number.

    labels: their names, if they have some.
    """
    values = logits.tolist()
    probs = [_sigmoid(values[0])] if len(values) == 1 else _softmax(values)
    best = max(range(len(probs)), key=lambda index: probs[index])
    label = labels[best] if labels else f"LABEL_{best}"
    return label, probs, len(probs)


def _to_length_one(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: np.ndarray = vectors / np.where(lengths > 0, lengths, 1.0)
    return scaled


def _written(vector: np.ndarray, encoding: str | None) -> str | list[float]:
    narrow = vector.astype("<f4")
    return base64.b64encode(narrow.tobytes()).decode() if encoding == "base64" else narrow.tolist()


def _sigmoid(value: float) -> float:
    small = math.exp(-abs(value))
    return 1 / (1 + small) if value >= 0 else small / (1 + small)


def _softmax(values: Sequence[float], temperature: float = 1.0) -> list[float]:
    top = max(values)
    weights = [math.exp((value - top) / temperature) for value in values]
    whole = sum(weights)
    return [weight / whole for weight in weights]


def _usage(usage: TokenUsage) -> ReadingUsage:
    cached = CachedTokens(usage.cached)
    return ReadingUsage(prompt_tokens=usage.prompt, total_tokens=usage.prompt, prompt_tokens_details=cached)
