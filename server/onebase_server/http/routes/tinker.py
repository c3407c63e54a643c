"""/api/v1: the Tinker API. Its clients train adapters step by step, and sample from what they train."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Annotated, Any, BinaryIO, Literal

import msgspec
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse
from starlette import types as asgi

from onebase_edge.errors import (
    ApiError,
    BodyTooLargeError,
    InvalidRequestError,
    QuotaExceededError,
    status_of,
)
from onebase_protocol import tinker as wire
from onebase_server.http.answers import answer, refused
from onebase_server.http.authorization import NO_KEY, needs
from onebase_server.http.deps import (
    CALLER,
    CUT,
    Admitted,
    BodyError,
    Calling,
    Provided,
    Services,
    StrictRoute,
    json_response,
    off_loop,
    refusal_of,
)
from onebase_server.http.routes.files import CONTENT
from onebase_server.http.schemas.tinker import (
    MAX_ID,
    CancelFutureRequest,
    ClientConfigRequest,
    CreateModelRequest,
    CreateSamplingSessionRequest,
    CreateSessionRequest,
    FinishSessionRequest,
    HeartbeatRequest,
    JoinSamplingSessionRequest,
    LoadWeightsRequest,
    OfModelRequest,
    OptimStepRequest,
    RetrieveFutureRequest,
    SampleRequest,
    SaveExternalRequest,
    SaveForSamplerRequest,
    SaveWeightsRequest,
    TelemetryRequest,
    TtlRequest,
    WeightsInfoRequest,
)
from onebase_server.live import codec
from onebase_server.live.sampling import PlaceTargets, SampleOrder
from onebase_server.live.service import Place, answer_of
from onebase_server.requests.schemas.generation import SEED_BITS
from onebase_server.storage.calls import storage_errors
from onebase_server.tenancy.access import Caller
from onebase_training.live_operations import (
    CheckpointFolder,
    Computed,
    Kind,
    Load,
    ModelSpec,
    Operation,
    OptimStep,
    Refuse,
)


class _InRun(msgspec.Struct):
    """Place of a request in its run's order."""

    model_id: str
    seq_id: int


_read_in_run = msgspec.json.Decoder(_InRun).decode
_IN_ORDER = tuple(
    f"/api/v1/{name}"
    for name in (
        "optim_step",
        "save_weights",
        "save_weights_for_sampler",
        "save_weights_external",
        "load_weights",
    )
)
_FINAL = (400, 404, 413, 422)
"""Statuses of refusals that do not change if the request is sent again."""


class OrderedRoute(StrictRoute):
    """Keeps the place of a refused request in its run's order, so that the run goes on: its future fails."""

    async def refused(self, request: Request, error: Exception) -> Response:
        refusal = refusal_of(error)
        is_final = status_of(refusal)[0] in _FINAL or isinstance(refusal, QuotaExceededError)
        if not is_final or self.path not in _IN_ORDER:
            raise error
        services: Services = request.app.state.services
        caller: Caller = request.scope[CALLER]
        try:
            body = await request.body()
            place = await services.reading.run_for(caller.tenant, _read_in_run, body)
            operation = Refuse(message=refusal.message, code=refusal.code or "invalid_request")
            return await _accept(services, caller, place.model_id, place.seq_id, operation)
        except (ApiError, BodyError, RuntimeError, msgspec.MsgspecError):  # it has no place
            raise error from None


router = APIRouter(prefix="/api/v1", route_class=OrderedRoute, tags=["tinker"])

WAIT_SECONDS = 25.0
"""Seconds for which a request for a result waits for it; clients give up after 45."""
MOST_LISTED = 1000
DAY_SECONDS = 86_400
_TYPES: Mapping[Kind, Literal["training", "sampler", "external"]] = {
    "weights": "training",
    "sampler": "sampler",
    "external": "external",
}
_OPTIMIZER = {"type": "adamw"}
_ADAM = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
RunId = Annotated[str, Path(max_length=MAX_ID)]
Named = Annotated[str, Path(max_length=128)]
Segment = Annotated[Literal["weights", "sampler_weights", "external_weights"], Path()]
Offset = Annotated[int, Query(ge=0)]
Limit = Annotated[int, Query(ge=1, le=MOST_LISTED)]
Scope = Annotated[Literal["owned", "accessible"], Query(description="a tenant sees its own either way")]

# ---- client and sessions ---------------------------------------------------------------------------


@router.post("/client/config", responses=answer(wire.ClientConfigAnswer))
@needs("any")
async def client_config(body: ClientConfigRequest, services: Provided) -> Response:
    """Return the flags of a client."""
    services.refuse_if_draining()
    codec.messages()
    # A pass's body is larger than the client's estimate of its tensors alone.
    chunk = min(5_000_000, services.settings.max_body // 2)
    return json_response(
        wire.ClientConfigAnswer(
            sample_join_sampling_session=True,
            fwdbwd_max_chunk_bytes_count=chunk,
            sample_max_concurrent_requests=MOST_CONNECTIONS,
        )
    )


MOST_CONNECTIONS = 256
"""Samples that one client waits for at once: each takes a connection."""


@router.post("/client/dynamic_config", responses=answer(wire.ClientDynamicConfigAnswer))
@needs("any")
async def client_dynamic_config(body: ClientConfigRequest) -> Response:
    """Return the flags that a client reads again from time to time."""
    return json_response(wire.ClientDynamicConfigAnswer(sample_cancel_enabled=True))


@router.get("/healthz", responses=answer(wire.HealthzAnswer))
@needs("any")
async def healthz(services: Provided) -> Response:
    """Return whether requests are served."""
    services.planner.base()
    return json_response(wire.HealthzAnswer(status="ok"))


@router.get("/get_server_capabilities", responses=answer(wire.CapabilitiesAnswer))
@needs("any")
async def get_server_capabilities(services: Provided) -> Response:
    """List the base, under each name that clients may give it."""
    base = services.planner.base()
    trains = services.live_training.trains
    return json_response(
        wire.CapabilitiesAnswer(
            [
                wire.SupportedModel(
                    model_name=name, max_context_length=base.max_length, trainable=trains, sampleable=True
                )
                for name in services.live_training.base_names
            ]
        )
    )


@router.post("/create_session", responses=answer(wire.SessionCreatedAnswer))
@needs("any")
async def create_session(body: CreateSessionRequest, services: Provided, caller: Calling) -> Response:
    """Begin a session: what a client trains and samples belongs to one."""
    services.refuse_if_draining()
    details = body.model_dump(include={"tags", "user_metadata", "sdk_version", "display_name"})
    session = await services.live_training.create_session(caller, details)
    return json_response(wire.SessionCreatedAnswer(type="create_session", session_id=session))


@router.post("/session_heartbeat", responses=answer(wire.TypeAnswer, 404))
@needs("any")
async def session_heartbeat(body: HeartbeatRequest, services: Provided, caller: Calling) -> Response:
    """Keep a session: its runs end some hours after its last sign of life."""
    await services.live_training.session_seen(caller, body.session_id)
    return json_response(wire.TypeAnswer("session_heartbeat"))


@router.post("/sessions/{session_id}/finish", responses=answer(wire.NothingAnswer, 404))
@needs("any")
async def finish_session(
    session_id: RunId, body: FinishSessionRequest, services: Provided, caller: Calling
) -> Response:
    """End a session: its runs end, which needs the scope `train`, and named checkpoints stay."""
    await services.live_training.finish(caller, session_id)
    return json_response(wire.NothingAnswer())


@router.get("/sessions", responses=answer(wire.SessionsAnswer))
@needs("any")
async def list_sessions(
    services: Provided, caller: Calling, limit: Limit = 20, offset: Offset = 0, access_scope: Scope = "owned"
) -> Response:
    """List the ids of the tenant's sessions, newest first."""
    return json_response(wire.SessionsAnswer(await services.live_training.sessions(caller, offset, limit)))


@router.get("/sessions/{session_id}", responses=answer(wire.SessionAnswer, 404))
@needs("any")
async def get_session(
    session_id: RunId, services: Provided, caller: Calling, access_scope: Scope = "owned"
) -> Response:
    """Return the runs and samplers of a session."""
    live = services.live_training
    session = await live.session(caller, session_id)
    runs = [spec.id for spec in await live.runs(caller) if spec.session == session_id]
    samplers = [sampler.id for sampler in await live.samplers(caller, session_id)]
    details = session.details
    return json_response(
        wire.SessionAnswer(runs, samplers, _texts(details.get("user_metadata")), details.get("display_name"))
    )


@router.post("/telemetry", responses=answer(wire.TelemetryAnswer))
@needs("any")
async def telemetry(body: TelemetryRequest) -> Response:
    """Take what a client says of itself, and keep nothing of it."""
    return json_response(wire.TelemetryAnswer("accepted"))


# ---- runs ------------------------------------------------------------------------------------------


@router.post("/create_model", responses=answer(wire.FutureAnswer, 404, 422, 507))
@needs("train")
async def create_model(body: CreateModelRequest, services: Provided, caller: Calling) -> Response:
    """Create a run: an adapter of the base, which the client trains step by step."""
    services.refuse_if_draining()
    lora = body.lora_config
    run = await services.live_training.create_run(
        caller,
        body.session_id,
        body.model_seq_id,
        base_model=body.base_model,
        rank=lora.rank,
        seed=lora.seed,
        train=lora.model_dump(include={"train_mlp", "train_attn", "train_unembed"}),
        metadata=body.user_metadata,
    )
    return json_response(wire.FutureAnswer(f"{run}:0", run))


@router.post("/get_info", responses=answer(wire.RunInfoAnswer, 404))
@needs("train")
async def get_info(body: OfModelRequest, services: Provided, caller: Calling) -> Response:
    """Return a run's base and rank, and the name by which the client finds its tokenizer."""
    spec = await services.live_training.run(caller, body.model_id)
    base = services.supervisor.base
    data = wire.RunData(
        arch=None if base is None else base.architecture,
        model_name=spec.base,
        tokenizer_id=services.live_training.tokenizer,
    )
    return json_response(
        wire.RunInfoAnswer(
            type="get_info",
            model_data=data,
            model_id=spec.id,
            is_lora=True,
            lora_rank=spec.rank,
            model_name=spec.base,
            optimizer_config=_OPTIMIZER,
        )
    )


@router.post(
    "/forward_backward",
    responses=answer(wire.FutureAnswer, 404, 507),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {codec.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
@needs("train")
async def forward_backward(request: Request, services: Provided, caller: Calling) -> Response:
    """Compute a loss and its gradients, which add up until a step; or the loss alone. The body is a
    ForwardBackwardRequest of the protocol buffers."""
    services.refuse_if_draining()
    if not request.headers.get("content-type", "").startswith(codec.MEDIA_TYPE):
        raise InvalidRequestError(
            f"The body must be a protocol buffer, sent with Content-Type: {codec.MEDIA_TYPE}. Use a client "
            "of release 0.38 or newer."
        )
    body, most = await request.body(), services.settings.max_body
    is_compressed = request.headers.get("content-encoding") == "zstd"

    def read() -> codec.PassRequest:
        try:
            if CUT in request.scope:
                raise BodyTooLargeError(most)
            content = codec.decompressed(body, most) if is_compressed else body
            return codec.read_pass(content, codec.DENSE_TIMES * most)
        except BodyTooLargeError as error:
            place = codec.read_place(body, is_compressed)
            if place is None:
                raise
            return codec.PassRequest(*place, None, error.message)

    asked = await services.reading.run_for(caller.tenant, read)
    operation = Refuse(message=asked.refused) if asked.operation is None else asked.operation
    return await _accept(services, caller, asked.model_id, asked.seq_id, operation)


@router.post("/optim_step", responses=answer(wire.FutureAnswer, 404, 507))
@needs("train")
async def optim_step(body: OptimStepRequest, services: Provided, caller: Calling) -> Response:
    """Step the optimizer with the gradients added up since the last step."""
    services.refuse_if_draining()
    operation = OptimStep(**body.adam_params.model_dump(include=set(_ADAM)))
    return await _accept(services, caller, body.model_id, body.seq_id, operation)


@router.post("/save_weights", responses=answer(wire.FutureAnswer, 404, 507))
@needs("train")
async def save_weights(body: SaveWeightsRequest, services: Provided, caller: Calling) -> Response:
    """Save the weights and the optimizer's state under a name."""
    services.refuse_if_draining()
    accepted = await services.live_training.save(
        caller,
        body.model_id,
        body.seq_id,
        body.path,
        "weights",
        body.ttl_seconds,
        body.overwrite,
        _texts(body.user_metadata),
    )
    return json_response(wire.FutureAnswer(accepted, body.model_id))


@router.post("/save_weights_for_sampler", responses=answer(wire.FutureAnswer, 404, 507))
@needs("train")
async def save_weights_for_sampler(
    body: SaveForSamplerRequest, services: Provided, caller: Calling
) -> Response:
    """Let the weights be sampled: those of a step at once, those with a name as a version that is proved,
    too."""
    services.refuse_if_draining()
    live, run = services.live_training, body.model_id
    if body.path is not None:
        metadata = _texts(body.user_metadata)
        accepted = await live.save(
            caller, run, body.seq_id, body.path, "sampler", body.ttl_seconds, False, metadata
        )
    else:
        accepted = await live.save_for_session(caller, run, body.seq_id, body.sampling_session_seq_id or 0)
    return json_response(wire.FutureAnswer(accepted, run))


@router.post("/save_weights_external", responses=answer(wire.FutureAnswer, 404, 507))
@needs("train")
async def save_weights_external(body: SaveExternalRequest, services: Provided, caller: Calling) -> Response:
    """Save the weights as PEFT does, for download. Those of a sampler become versions of an adapter."""
    services.refuse_if_draining()
    accepted = await services.live_training.save(
        caller,
        body.model_id,
        body.seq_id,
        body.path,
        "external",
        body.ttl_seconds,
        False,
        None,
        body.age_encryption_recipients,
    )
    return json_response(wire.FutureAnswer(accepted, body.model_id))


@router.post("/load_weights", responses=answer(wire.FutureAnswer, 404, 409, 422, 507))
@needs("train")
async def load_weights(body: LoadWeightsRequest, services: Provided, caller: Calling) -> Response:
    """Load a checkpoint into a run, or into a new one."""
    services.refuse_if_draining()
    live = services.live_training
    if body.model_id is not None and body.seq_id is not None:
        found = await live.checkpoint(caller, body.path, "path")
        operation = Load(folder=found.folder, optimizer=body.optimizer)
        return await _accept(services, caller, body.model_id, body.seq_id, operation)
    run = await live.continue_from(
        caller,
        body.session_id or "",
        body.model_seq_id or 0,
        body.path,
        optimizer=body.optimizer,
        base_model=body.base_model,
        metadata=body.user_metadata,
    )
    return json_response(wire.FutureAnswer(f"{run}:0", run))


async def _accept(
    services: Services, caller: Caller, run: str, number: int, operation: Operation
) -> Response:
    accepted = await services.live_training.submit(caller, run, number, operation)
    return json_response(wire.FutureAnswer(accepted, run))


# ---- samplers --------------------------------------------------------------------------------------


@router.post("/create_sampling_session", responses=answer(wire.SamplerCreatedAnswer, 404, 409, 422, 507))
@needs("generate")
async def create_sampling_session(
    body: CreateSamplingSessionRequest, services: Provided, caller: Calling
) -> Response:
    """Begin to sample from a checkpoint, or from the base."""
    services.refuse_if_draining()
    sampler = await services.live_training.create_sampler(
        caller, body.session_id, body.sampling_session_seq_id, body.base_model, body.model_path
    )
    return json_response(
        wire.SamplerCreatedAnswer(type="create_sampling_session", sampling_session_id=sampler.id)
    )


@router.post("/join_sampling_session", responses=answer(wire.SamplerJoinedAnswer, 404))
@needs("any")
async def join_sampling_session(
    body: JoinSamplingSessionRequest, services: Provided, caller: Calling
) -> Response:
    """Count one more client of a sampling session, whose requests have numbers of their own."""
    number = await services.live_training.join_sampler(caller, body.sampling_session_id)
    return json_response(wire.SamplerJoinedAnswer(type="join_sampling_session", client_counter=number))


@router.get("/samplers/{sampler_id}", responses=answer(wire.SamplerAnswer, 404))
@needs("any")
async def get_sampler(sampler_id: RunId, services: Provided, caller: Calling) -> Response:
    """Return what a sampling session samples from."""
    sampler = await services.live_training.sampler(caller, sampler_id)
    live = await services.live_training.live_version(sampler)
    return json_response(wire.SamplerAnswer(sampler.id, sampler.base_model, sampler.path, live))


@router.post("/asample", responses=answer(wire.FutureAnswer, 404, 507))
@needs("generate")
async def asample(
    body: SampleRequest, request: Request, services: Provided, caller: Calling, reservation: Admitted
) -> Response:
    """Promise samples of a prompt."""
    services.refuse_if_draining()
    sampler = await services.live_training.sampler(caller, body.sampling_session_id)
    order = await off_loop(request, _order, body)
    sample = f"{sampler.id}:{body.seq_id}"
    await services.samples.promise(sample, sampler, order, caller, reservation)
    names = [f"{sample}:{number}" for number in range(body.num_samples)]
    return json_response(wire.FutureAnswer(sample, sample_sequence_ids=names))


def _order(body: SampleRequest) -> SampleOrder:
    given, targets = body.sampling_params, body.target_prompt_logprobs
    stop = [given.stop] if isinstance(given.stop, str) else given.stop or []
    seed = secrets.randbits(SEED_BITS) if given.seed is None else given.seed % 2**SEED_BITS
    return SampleOrder(
        prompt=body.tokens,
        n=body.num_samples,
        seed=seed,
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        stops=[one for one in stop if isinstance(one, str)],
        stop_tokens=[one for one in stop if isinstance(one, int)],
        ignore_eos=given.stop is not None,
        top=body.topk_sample_logprobs,
        prompt_logprobs=bool(body.prompt_logprobs),
        prompt_top=body.topk_prompt_logprobs,
        last_n=body.prompt_logprobs_last_n,
        targets=None
        if targets is None
        else PlaceTargets(
            targets.data,
            (targets.shape[0], targets.shape[1]),
            targets.sparse_crow_indices,
            targets.sparse_col_indices,
        ),
    )


# ---- results ---------------------------------------------------------------------------------------


@router.post(
    "/retrieve_future",
    responses={
        **answer(wire.FutureResult, 404, also=(codec.MEDIA_TYPE,)),
        **answer(wire.TryAgainAnswer, status=408, description="The result is not there yet"),
        **refused(410),
    },
)
@needs("any")
async def retrieve_future(body: RetrieveFutureRequest, services: Provided, caller: Calling) -> Response:
    """Return a result, or why there is none; passes and samples as protocol buffers. Waits for a while.
    Results of runs need the scope `train`."""
    if ":sample:" in body.request_id:
        return await _retrieved_sample(body.request_id, services, caller)
    live = services.live_training
    spec, result = await live.result(caller, body.request_id, WAIT_SECONDS)
    if result is None:
        return _try_again(body.request_id, live.queue_state)
    if isinstance(result, Computed):
        encoded = await services.reading.run_for(caller.tenant, codec.write_pass, result)
        return Response(encoded, media_type=codec.MEDIA_TYPE)
    number = int(body.request_id.rpartition(":")[2])
    return json_response(answer_of(spec, number, result))


async def _retrieved_sample(request_id: str, services: Services, caller: Caller) -> Response:
    sample = await services.samples.result(caller.tenant, request_id, WAIT_SECONDS)
    if sample is None:
        return _try_again(request_id, "active")
    if sample.error is not None:
        return json_response(sample.error)
    return Response(sample.result, media_type=codec.MEDIA_TYPE)


def _try_again(request_id: str, state: Any) -> Response:
    return json_response(
        wire.TryAgainAnswer(type="try_again", request_id=request_id, queue_state=state), status=408
    )


@router.post("/cancel_future", responses=answer(wire.NothingAnswer))
@needs("any")
async def cancel_future(body: CancelFutureRequest, services: Provided, caller: Calling) -> Response:
    """End a promised sample, unless it is there already. Requests of runs cannot be cancelled."""
    services.samples.cancel(caller.tenant, body.request_id)
    return json_response(wire.NothingAnswer())


# ---- runs and checkpoints, listed ------------------------------------------------------------------


@router.get("/training_runs", responses=answer(wire.LiveRunsAnswer))
@needs("train")
async def list_training_runs(
    services: Provided,
    caller: Calling,
    limit: Limit = 20,
    offset: Offset = 0,
    access_scope: Scope = "owned",
    project_id: Annotated[str | None, Query(description="not served: keys belong to tenants")] = None,
) -> Response:
    """List the tenant's runs, newest first."""
    if project_id is not None:
        raise InvalidRequestError(
            "project_id: this server has tenants instead of projects. Leave it out.", param="project_id"
        )
    specs = await services.live_training.runs(caller)
    shown = specs[offset : offset + limit]
    runs = await asyncio.gather(*(_run_answer(services, spec) for spec in shown))
    return json_response(wire.LiveRunsAnswer(list(runs), wire.PageCursor(offset, limit, len(specs))))


@router.get("/training_runs/{run}", responses=answer(wire.LiveRun, 404))
@needs("train")
async def get_training_run(
    run: RunId, services: Provided, caller: Calling, access_scope: Scope = "owned"
) -> Response:
    """Return one run."""
    return json_response(await _run_answer(services, await services.live_training.run(caller, run, "run")))


async def _run_answer(services: Services, spec: ModelSpec) -> wire.LiveRun:
    found = await services.live_training.checkpoints(spec.id)
    last = {one.kind: await _checkpoint_answer(services, spec.owner, one) for one in found}
    return wire.LiveRun(
        training_run_id=spec.id,
        base_model=spec.base,
        model_owner=spec.owner,
        is_lora=True,
        corrupted=False,
        lora_rank=spec.rank,
        last_request_time=_time(max([spec.created, *(one.created for one in found)])),
        last_checkpoint=last.get("weights"),
        last_sampler_checkpoint=last.get("sampler"),
        user_metadata=_texts(spec.metadata),
    )


@router.get("/training_runs/{run}/checkpoints", responses=answer(wire.LiveCheckpointsAnswer, 404))
@needs("train")
async def list_run_checkpoints(run: RunId, services: Provided, caller: Calling) -> Response:
    """List the named checkpoints of a run, oldest first."""
    await services.live_training.run(caller, run, "run")
    found = await services.live_training.checkpoints(run)
    made = [await _checkpoint_answer(services, caller.tenant, one) for one in found]
    return json_response(wire.LiveCheckpointsAnswer(made))


@router.get("/checkpoints", responses=answer(wire.LiveCheckpointsAnswer))
@needs("train")
async def list_checkpoints(
    services: Provided, caller: Calling, limit: Limit = 100, offset: Offset = 0
) -> Response:
    """List the tenant's named checkpoints, newest first."""
    live = services.live_training
    found = [one for spec in await live.runs(caller) for one in await live.checkpoints(spec.id)]
    found.sort(key=lambda one: -one.created)
    shown = [await _checkpoint_answer(services, caller.tenant, one) for one in found[offset : offset + limit]]
    return json_response(wire.LiveCheckpointsAnswer(shown, wire.PageCursor(offset, limit, len(found))))


@router.delete("/training_runs/{run}/checkpoints/{segment}/{name}", responses=answer(wire.NothingAnswer, 404))
@needs("train")
async def delete_checkpoint(
    run: RunId, segment: Segment, name: Named, services: Provided, caller: Calling
) -> Response:
    """Delete a checkpoint. The version that it was proved as stays."""
    await services.live_training.delete_checkpoint(caller, f"tinker://{run}/{segment}/{name}")
    return json_response(wire.NothingAnswer())


@router.put(
    "/training_runs/{run}/checkpoints/{segment}/{name}/ttl", responses=answer(wire.NothingAnswer, 404)
)
@needs("train")
async def set_checkpoint_ttl(
    run: RunId, segment: Segment, name: Named, body: TtlRequest, services: Provided, caller: Calling
) -> Response:
    """Set after how many seconds from now a checkpoint expires; null keeps it."""
    path = f"tinker://{run}/{segment}/{name}"
    await services.live_training.set_ttl(caller, path, body.ttl_seconds)
    return json_response(wire.NothingAnswer())


@router.get(
    "/training_runs/{run}/checkpoints/external_weights/{name}/external_weights_urls",
    responses=answer(wire.ExternalWeightsAnswer, 404),
)
@needs("train")
async def get_external_weights_urls(
    run: RunId, name: Named, request: Request, services: Provided, caller: Calling
) -> Response:
    """Return addresses from which the files of external weights can be downloaded for an hour, without a
    key."""
    found = await services.live_training.external_files(caller, run, name)
    folder = f"{str(request.base_url).rstrip('/')}/api/v1/external_weights/{run}/{name}"
    urls = {
        file: f"{folder}/{file}?save={found.save}&expires={found.until}&signature={signature}"
        for file, signature in found.signatures.items()
    }
    return json_response(wire.ExternalWeightsAnswer(urls, _time(found.until)))


@router.get(
    "/external_weights/{run}/{name}/{file}",
    response_class=FileResponse,
    responses={**CONTENT, **refused(403)},
    openapi_extra=NO_KEY,
)
@needs("open")
async def get_external_weights(
    run: RunId,
    name: Named,
    file: Named,
    services: Provided,
    save: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    expires: Annotated[int, Query(ge=0, lt=2**63)] = 0,
    signature: Annotated[str, Query(max_length=MAX_ID)] = "",
) -> Response:
    """Download a file of external weights from an address that `external_weights_urls` has returned."""
    place = Place(run, "external", name)
    return OpenFileResponse(
        await services.live_training.external_file(place, save, file, expires, signature),
        media_type="application/octet-stream",
        filename=file,
        headers={"Cache-Control": "private, no-store"},
    )


class OpenFileResponse(FileResponse):
    """Sends a file that is open already, which may be deleted meanwhile, and closes it."""

    def __init__(self, file: BinaryIO, **options: Any) -> None:
        number = file.fileno()
        super().__init__(f"/proc/self/fd/{number}", stat_result=os.fstat(number), **options)
        self._file = file

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)


@router.post("/weights_info", responses=answer(wire.WeightsInfoAnswer, 404))
@needs("train")
async def weights_info(body: WeightsInfoRequest, services: Provided, caller: Calling) -> Response:
    """Return what a client must know of a checkpoint to go on from it."""
    live = services.live_training
    found = await live.checkpoint(caller, body.tinker_path, "tinker_path")
    spec = await live.run(caller, found.model, "tinker_path")
    return json_response(
        wire.WeightsInfoAnswer(
            base_model=spec.base,
            is_lora=True,
            lora_rank=found.rank,
            train_unembed=found.train_unembed,
            train_mlp=found.train_mlp,
            train_attn=found.train_attn,
            optimizer_config=_OPTIMIZER,
        )
    )


# ---- the tenant ------------------------------------------------------------------------------------


@router.get("/audit", responses=answer(wire.ClientAuditAnswer))
@needs("adapters")
async def list_audit_entries(
    services: Provided,
    caller: Calling,
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
    day: Annotated[date | None, Query(description="in UTC; without it the newest entries")] = None,
) -> Response:
    """List the tenant's 1,000 newest entries of the audit log, or the first 1,000 of a day, oldest first."""
    kinds = {"all": None, "checkpoints": "checkpoint", "organizations": "tenant"}
    if event_type not in kinds:  # there are no projects and no teams
        return json_response(wire.ClientAuditAnswer([]))
    since = None if day is None else datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()
    with storage_errors():
        found = await services.training.threads.run_blocking(
            services.training.storage.registry.audit.entries,
            tenant=caller.tenant,
            action=kinds[event_type],
            since=since,
            limit=MOST_LISTED,
            oldest_first=since is not None,
        )
    entries = [
        wire.ClientAuditEntry(
            _time(one.at),
            one.action.replace(".", "_"),
            {"target": one.target, "key": one.key, "actor": one.actor, **one.details},
        )
        for one in sorted(found, key=lambda one: one.number)
        if since is None or one.at < since + DAY_SECONDS
    ]
    return json_response(wire.ClientAuditAnswer(entries))


@router.get("/billing/usage/checkpoints/current", responses=answer(wire.StorageAnswer))
@needs("train")
async def get_checkpoint_storage(services: Provided, caller: Calling) -> Response:
    """Return the number of the tenant's named checkpoints, and what they take."""
    live = services.live_training
    sizes = [one.bytes for spec in await live.runs(caller) for one in await live.checkpoints(spec.id)]
    stored = wire.StoredCheckpoints(len(sizes), sum(sizes), sum(sizes) / 1e9)
    return json_response(wire.StorageAnswer([stored]))


@router.get("/auth/apikey/me", responses=answer(wire.ClientKeyAnswer))
@needs("any")
async def get_own_key(caller: Calling) -> Response:
    """Return the caller's key, by which a client checks that it may log in."""
    number = int(hashlib.sha256(caller.key.encode()).hexdigest()[:12], 16)
    details = wire.KeyDetails(wire.Named(caller.tenant), wire.KeyUser(""))
    return json_response(wire.ClientKeyAnswer(number, caller.key, "", details))


# ---- what others have ------------------------------------------------------------------------------

_PUBLISH = "/training_runs/{run}/checkpoints/{segment}/{name}/publish"
_NOT_SERVED: Mapping[tuple[str, str], str] = {
    ("POST", "/copy_weights"): "all sessions of a tenant read its checkpoints where they are: give "
    "create_training_client_from_state or create_sampling_client the path itself",
    (
        "POST",
        _PUBLISH,
    ): "a checkpoint is its tenant's. Save it with save_weights_for_sampler: an operator can "
    "share the version that it becomes with all tenants (POST /v1/adapters/NAME/share)",
    ("DELETE", _PUBLISH): "no checkpoint is public. An operator ends what was shared with POST "
    "/v1/adapters/NAME/share",
    ("POST", "/sessions/search"): "list the sessions (GET /api/v1/sessions, RestClient.list_sessions), and "
    "look at each",
    ("PUT", "/sessions/{session_id}/project"): "this server has tenants instead of projects: a session is "
    "that of its key's tenant",
    ("GET", "/sessions/{session_id}/trace_export"): "traces go to OpenTelemetry (onebase serve "
    "--otlp-endpoint)",
    ("GET", "/billing/usage/events"): "usage is counted by day, and at GET /v1/usage (onebase usage)",
    ("POST", "/auth/token"): "there are no tokens: send the key itself, with tml- before it",
    ("POST", "/create_custom_loss"): "losses of a client's own run at the client: call "
    "forward_backward_custom with a function",
    ("POST", "/retrieve_futures"): "ask for results one by one, with POST /api/v1/retrieve_future",
}
"""Routes of the client that are not served, and what to do instead."""


def _refuse(method: str, path: str, message: str) -> None:
    @router.api_route(path, methods=[method], include_in_schema=False)
    @needs("any")
    async def not_served(caller: Calling) -> Response:
        raise InvalidRequestError(
            f"{method} {router.prefix}{path} is not served here: {message}.", code="not_supported"
        )


for (_method, _path), _message in _NOT_SERVED.items():
    _refuse(_method, _path, _message)


async def _checkpoint_answer(
    services: Services, tenant: str, checkpoint: CheckpointFolder
) -> wire.LiveCheckpoint:
    place = Place.of(checkpoint)
    adapter, version = await services.live_training.proved_as(tenant, checkpoint) or (None, None)
    return wire.LiveCheckpoint(
        checkpoint_id=place.path.split("/", 3)[3],
        checkpoint_type=_TYPES[checkpoint.kind],
        time=_time(checkpoint.created),
        tinker_path=place.path,
        size_bytes=checkpoint.bytes,
        public=False,
        user_metadata=checkpoint.metadata,
        expires_at=None if checkpoint.expires is None else _time(checkpoint.expires),
        adapter=adapter,
        version=version,
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _texts(metadata: Any) -> dict[str, str] | None:
    """Return a client's metadata as it reads them again: texts alone."""
    if not metadata:
        return None
    return {
        str(name): value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for name, value in metadata.items()
    }
