"""/v1/fine_tuning/jobs: training as jobs, as OpenAI's."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from onebase_adapters.names import MAX_NAME, is_adapter_name, label
from onebase_adapters.registry import ParentVersion, TrainingJob, VersionRecord
from onebase_edge.errors import (
    AdapterNotFoundError,
    ApiError,
    InsufficientScopeError,
    InvalidRequestError,
)
from onebase_edge.sse import identified_event
from onebase_protocol.common import PageAnswer, page_of
from onebase_protocol.training import (
    GraderRun,
    JobStreamEvent,
    TrainingCheckpoint,
    TrainingEvent,
    TrainingJobInfo,
    ValidatedGrader,
)
from onebase_server.adapters.catalog import check_name, is_checkpoint
from onebase_server.http.answers import answer
from onebase_server.http.authorization import needs
from onebase_server.http.deps import Calling, Provided, Services, StrictRoute, json_response
from onebase_server.http.schemas.jobs import (
    MAX_LABELS,
    CreateJobRequest,
    ParentSettings,
    RunGraderRequest,
    ValidateGraderRequest,
    label_problem,
)
from onebase_server.http.views.jobs import (
    CHECKPOINT,
    EVENT,
    checkpoint_view,
    event_id,
    event_view,
    grader_run_view,
    is_active,
    job_view,
    number_of,
)
from onebase_server.jobs.checkpoints import adapter_of
from onebase_server.jobs.service import default_name, new_job_id
from onebase_server.tenancy.access import Caller
from onebase_training.graders import Graded, to_json

router = APIRouter(prefix="/v1/fine_tuning", route_class=StrictRoute, tags=["training"])

MOST = 100
_log = logging.getLogger(__name__)
_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_LABEL, _LABEL_END = "metadata[", "]"
After = Annotated[str | None, Query(max_length=100, description="the last id of the page before")]
Limit = Annotated[int, Query(ge=1, le=MOST)]


@router.post("/jobs", responses=answer(TrainingJobInfo, 404, 409, 422, 429, 507))
@needs("train")
async def create_job(body: CreateJobRequest, services: Provided, caller: Calling) -> Response:
    """Train an adapter on the base that is served, or continue from a version of one (`model`). The result is
    proved, and activated as `activate` says."""
    services.refuse_if_draining()
    if body.method is not None and body.method.grader is not None:
        if not caller.may("generate"):
            raise InsufficientScopeError("generate", caller.key)
        services.grading.check(body.method.grader, "method.reinforcement.grader")
    base = services.catalog.base_name
    parent = None if body.model == base else await _parent(body.model, services, caller)
    job_id = new_job_id()
    name = _adapter_name(body, base, parent) or default_name(job_id)
    await services.adapters.check_trained(caller.tenant, name, actor=caller.key)
    if parent is not None:
        await services.adapters.check_parents(
            caller.tenant, name, [parent], actor=caller.key, act="training", param="model"
        )
    job = await services.training.jobs.create(
        caller.tenant,
        body.recipe(services.settings.max_rank, await _settings_of(parent, services)),
        training_file=body.training_file,
        validation_file=body.validation_file,
        job_id=job_id,
        name=name,
        activate=body.activate or "if_better",
        labels=body.metadata or {},
        parent=None if parent is None else ParentVersion.of(parent),
        hold=body.hold,
    )
    return await _shown(job, services)


@router.get("/jobs", responses=answer(PageAnswer[TrainingJobInfo], 404))
@needs("train")
async def list_jobs(
    request: Request,
    services: Provided,
    caller: Calling,
    after: After = None,
    limit: Limit = 20,
    tenant: Annotated[str | None, Query(max_length=200, description="for admins: of another tenant")] = None,
) -> Response:
    """List the jobs, newest first; `metadata[key]=value` picks those with that metadata."""
    labels = _labels(request.query_params)
    found = await services.training.jobs.find(
        caller.tenant_asked(tenant), after=after, limit=limit + 1, labels=labels
    )
    shown = await _views(found[:limit], services, in_list=True)
    return json_response(page_of(shown, more=len(found) > limit))


@router.get("/jobs/{job_id}", responses=answer(TrainingJobInfo, 404))
@needs("train")
async def get_job(job_id: str, services: Provided, caller: Calling) -> Response:
    """Return one job."""
    return await _shown(await services.training.jobs.get(caller.tenant, job_id), services)


@router.post("/jobs/{job_id}/cancel", responses=answer(TrainingJobInfo, 404, 409, 507))
@needs("train")
async def cancel_job(job_id: str, services: Provided, caller: Calling) -> Response:
    """Cancel a job for good."""
    services.refuse_if_draining()
    return await _shown(await services.training.jobs.cancel(caller.tenant, job_id), services)


@router.post("/jobs/{job_id}/pause", responses=answer(TrainingJobInfo, 404, 409, 507))
@needs("train")
async def pause_job(job_id: str, services: Provided, caller: Calling) -> Response:
    """Pause a job within a step, which frees the machine; `resume` continues from there."""
    services.refuse_if_draining()
    return await _shown(await services.training.jobs.pause(caller.tenant, job_id), services)


@router.post("/jobs/{job_id}/stop", responses=answer(TrainingJobInfo, 404, 409, 429, 507))
@needs("train")
async def stop_job(job_id: str, services: Provided, caller: Calling) -> Response:
    """End training at its next step and keep the best adapter: it is proved and activated as usual."""
    services.refuse_if_draining()
    return await _shown(await services.training.jobs.stop(caller.tenant, job_id), services)


@router.post("/jobs/{job_id}/resume", responses=answer(TrainingJobInfo, 404, 409, 429, 507))
@needs("train")
async def resume_job(job_id: str, services: Provided, caller: Calling) -> Response:
    """Resume a job from its last checkpoint, or start one that was made with `hold`."""
    services.refuse_if_draining()
    return await _shown(await services.training.jobs.resume(caller.tenant, job_id), services)


@router.get("/jobs/{job_id}/events", responses=answer(PageAnswer[TrainingEvent], 404, event=JobStreamEvent))
@needs("train")
async def list_events(
    job_id: str,
    services: Provided,
    caller: Calling,
    after: After = None,
    limit: Limit = 20,
    stream: Annotated[bool, Query(description="as server-sent events, oldest first, until the end")] = False,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """List the job's events, newest first; or, with `Accept: text/event-stream`, stream them as they
    happen."""
    if stream or "text/event-stream" in accept:
        job = await services.training.jobs.get(caller.tenant, job_id)
        known = last_event_id or after
        return StreamingResponse(
            _followed(services, caller, job, _number(known, EVENT, "Last-Event-ID") if known else 0),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
    before = None if after is None else _number(after, EVENT, "after")
    found = await services.training.jobs.events(caller.tenant, job_id, before=before, limit=limit + 1)
    return json_response(page_of([event_view(event) for event in found[:limit]], more=len(found) > limit))


@router.get("/jobs/{job_id}/checkpoints", responses=answer(PageAnswer[TrainingCheckpoint], 404))
@needs("train")
async def list_checkpoints(
    job_id: str, services: Provided, caller: Calling, after: After = None, limit: Limit = 10
) -> Response:
    """List the job's checkpoints, newest first."""
    jobs = services.training.jobs
    job, found = await jobs.get(caller.tenant, job_id), await jobs.checkpoints(caller.tenant, job_id)
    if after is not None:
        last = _number(after, CHECKPOINT, "after")
        steps = [one.step for one in found if one.number == last]
        found = [one for one in found if steps and one.step < steps[0]]
    views = [checkpoint_view(one, job) for one in found[:limit]]
    return json_response(page_of(views, more=len(found) > limit))


@router.post("/alpha/graders/validate", responses=answer(ValidatedGrader))
@needs("train")
async def validate_grader(body: ValidateGraderRequest, services: Provided, caller: Calling) -> Response:
    """Check a grader without running it."""
    return json_response(ValidatedGrader(to_json(services.grading.check(body.grader, "grader"))))


@router.post("/alpha/graders/run", responses=answer(GraderRun, 403, 404))
@needs("generate")
async def run_grader(body: RunGraderRequest, services: Provided, caller: Calling) -> Response:
    """Grade one text, as a job with this grader would."""
    services.refuse_if_draining()
    grader = services.grading.check(body.grader, "grader")
    began, processes = time.monotonic(), services.grading.processes(caller.tenant)
    try:
        found = await services.grading.grade(
            grader, Graded(body.model_sample, body.item or {}), caller, processes, "grader"
        )
    finally:
        await services.reading.run_for(caller.tenant, processes.close)
    return json_response(grader_run_view(grader, found, time.monotonic() - began))


async def _followed(
    services: Services, caller: Caller, job: TrainingJob, after: int
) -> AsyncGenerator[bytes]:
    """Yield a job's events as they come; ends with the job, with the caller's key, or with the server."""
    try:
        async for news in services.training.jobs.follow(job, after):
            if not await services.keys.still_valid(caller):
                return
            if isinstance(news, TrainingJob):
                (view,) = await _views([news], services)
                yield identified_event(view, event="done")
            elif news is None:
                yield b": nothing new\n\n"
            else:
                yield identified_event(event_view(news), identity=event_id(news.number))
            if services.draining:
                return
    except ApiError as error:
        _log.warning("the stream of job %s ends: %s", job.id, error.message)


async def _shown(job: TrainingJob, services: Services) -> Response:
    (view,) = await _views([job], services)
    return json_response(view)


async def _views(
    jobs: Sequence[TrainingJob], services: Services, *, in_list: bool = False
) -> list[TrainingJobInfo]:
    """Return the jobs as callers see them, with what is active now, even if another server has changed
    that."""
    catalog = services.catalog
    if any(job.activated and not is_active(job, catalog.of(job.tenant)) for job in jobs):
        await catalog.look_again()
    return [job_view(job, catalog.base_name, catalog.of(job.tenant), in_list=in_list) for job in jobs]


async def _parent(model: str, services: Services, caller: Caller) -> VersionRecord:
    """Return the caller's version to continue training from. A foreign one is refused: the result would
    reveal its weights.

    Raises InvalidRequestError, StateConflictError, ForbiddenError.
    """
    try:
        if is_checkpoint(checkpoint := model.partition("@")[0]):
            await services.training.checkpoints.use(caller.tenant, checkpoint, param="model")
        catalog = services.catalog
        found = await catalog.find_current(lambda: catalog.of(caller.tenant).find(model, param="model"))
        catalog.of(caller.tenant).check_own(found.name, "train it further")
        return found
    except AdapterNotFoundError as error:
        raise InvalidRequestError(
            f"model: {model[:80]!r} cannot be trained on: this server's base is "
            f"{services.catalog.base_name!r}, and it is no adapter here. {error.message}",
            param="model",
        ) from error


async def _settings_of(parent: VersionRecord | None, services: Services) -> ParentSettings | None:
    if parent is None:
        return None
    version = await services.adapters.version(parent.tenant, parent.name, parent.digest)
    return ParentSettings(label(version.name, version.digest), version.report or {})


def _adapter_name(body: CreateJobRequest, base: str, parent: VersionRecord | None) -> str | None:
    """Return the name that gets the result; None for one that is made of the job's id. Without a name or a
    suffix it is the parent's, unless that is a name of the Hub."""
    if body.name is not None:
        return check_name(body.name, base)
    if body.suffix is None:
        if parent is None:
            return None
        name = adapter_of(parent.name)
        return name if is_adapter_name(name) else None
    try:
        # OpenAI takes any text: what a name cannot have becomes a dash, as there.
        return check_name(f"ft-{_NO_NAME.sub('-', body.suffix)}"[:MAX_NAME], base)
    except InvalidRequestError as error:
        raise InvalidRequestError(error.message.replace("name:", "suffix:", 1), param="suffix") from error


def _labels(query: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata in a query. Raises InvalidRequestError for what no job can have."""
    labels = {
        key[len(_LABEL) : -len(_LABEL_END)]: value
        for key, value in query.items()
        if key.startswith(_LABEL) and key.endswith(_LABEL_END)
    }
    if len(labels) > MAX_LABELS:
        raise InvalidRequestError(
            f"metadata: there are {len(labels)} keys and a job has {MAX_LABELS} at most. Ask for fewer.",
            param="metadata",
        )
    for key in labels:
        if problem := label_problem(key):
            raise InvalidRequestError(f"metadata: {problem}.", param="metadata")
    return labels


def _number(given: str, prefix: str, param: str) -> int:
    number = number_of(given, prefix)
    if number is None:
        raise InvalidRequestError(f"{param}: {given[:80]!r} is no id of this list.", param=param)
    return number
