"""Rollouts of adapters' versions, and feedback on the answers."""

from __future__ import annotations

from fastapi import APIRouter, Response

from onebase_edge.errors import AdapterNotFoundError
from onebase_protocol.adapters import FeedbackAnswer, Rollout, RolloutJudge
from onebase_protocol.common import ListAnswer
from onebase_server.adapters.rollout_rules import RolloutSettings, plain_phrase
from onebase_server.http.answers import answer
from onebase_server.http.authorization import needs
from onebase_server.http.deps import Calling, Provided, StrictRoute, json_response
from onebase_server.http.routes.adapters import AdapterName
from onebase_server.http.schemas.adapters import (
    EmptyRequest,
    FeedbackRequest,
    RolloutRequest,
    RolloutShareRequest,
)

router = APIRouter(route_class=StrictRoute, tags=["adapters"])
_OF_ADAPTER = "/v1/adapters/{name}/rollout"


@router.post(_OF_ADAPTER, responses=answer(Rollout, 404, 409, 422, 429, 507))
@needs("adapters")
async def start_rollout(
    name: AdapterName, body: RolloutRequest, services: Provided, caller: Calling
) -> Response:
    """Let another version answer a share of an adapter's requests, or copies of them, beside the active
    one."""
    services.refuse_if_draining()
    judge = None if body.judge is None else RolloutJudge(**body.judge.model_dump())
    settings = RolloutSettings(
        rules=body.rules.rules(),
        by=body.by,
        promote=body.promote,
        judge=judge,
        phrases=tuple(plain_phrase(phrase) for phrase in body.refusal_phrases or ()),
    )
    started = await services.rollouts.start(
        caller.tenant,
        name,
        body.version,
        percent=body.percent,
        shadow=body.shadow,
        settings=settings,
        actor=caller.key,
    )
    return json_response(started)


@router.get(_OF_ADAPTER, responses=answer(Rollout, 404))
@needs("adapters")
async def get_rollout(name: AdapterName, services: Provided, caller: Calling) -> Response:
    """Return the rollout that runs, or else the latest, with the figures of both versions."""
    found = await services.rollouts.of_adapter(caller.tenant, name)
    if not found:
        raise AdapterNotFoundError(
            f"Adapter {name!r} has never had a rollout. Start one with POST /v1/adapters/{name}/rollout.",
            param="name",
            code="rollout_not_found",
        )
    return json_response(found[0])


@router.get(f"{_OF_ADAPTER}s", responses=answer(ListAnswer[Rollout], 404))
@needs("adapters")
async def list_rollouts(name: AdapterName, services: Provided, caller: Calling) -> Response:
    """List the latest rollouts of an adapter, newest first."""
    found = await services.rollouts.of_adapter(caller.tenant, name)
    return json_response(ListAnswer(data=tuple(found)))


@router.post(f"{_OF_ADAPTER}/share", responses=answer(Rollout, 404, 409, 507))
@needs("adapters")
async def change_rollout(
    name: AdapterName, body: RolloutShareRequest, services: Provided, caller: Calling
) -> Response:
    """Change the shares of the rollout that runs. A larger percent moves nobody back to the active
    version."""
    services.refuse_if_draining()
    changed = await services.rollouts.change(caller.tenant, name, percent=body.percent, shadow=body.shadow)
    return json_response(changed)


@router.post(f"{_OF_ADAPTER}/promote", responses=answer(Rollout, 404, 409, 422, 429, 507))
@needs("adapters")
async def promote_rollout(
    name: AdapterName, services: Provided, caller: Calling, body: EmptyRequest | None = None
) -> Response:
    """Activate the candidate of the rollout that runs, which ends it."""
    services.refuse_if_draining()
    return json_response(await services.rollouts.end(caller.tenant, name, "promoted", actor=caller.key))


@router.post(f"{_OF_ADAPTER}/rollback", responses=answer(Rollout, 404, 409, 507))
@needs("adapters")
async def roll_back_rollout(
    name: AdapterName, services: Provided, caller: Calling, body: EmptyRequest | None = None
) -> Response:
    """End the rollout that runs: new requests get the active version at once; streams end as they began."""
    services.refuse_if_draining()
    return json_response(await services.rollouts.end(caller.tenant, name, "rolled_back", actor=caller.key))


@router.post("/v1/feedback", tags=["feedback"], responses=answer(FeedbackAnswer, 404, 429, 507))
@needs("feedback")
async def send_feedback(body: FeedbackRequest, services: Provided, caller: Calling) -> Response:
    """Send what a user thinks of an answer: a score from 0 to 1, or a thumb. The last one counts."""
    return json_response(await services.rollouts.rate(caller.tenant, body.id, body.value))
