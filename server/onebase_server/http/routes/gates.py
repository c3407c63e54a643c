"""Gates of activations: their rules, and what a version has passed of them."""

from __future__ import annotations

from fastapi import APIRouter, Response

from onebase_protocol.adapters import GateRule, VersionGates
from onebase_protocol.common import DeletedAnswer, ListAnswer
from onebase_server.http.answers import answer
from onebase_server.http.authorization import needs
from onebase_server.http.deps import Calling, Provided, StrictRoute, json_response
from onebase_server.http.routes.adapters import AdapterName
from onebase_server.http.schemas.adapters import EmptyRequest, EvaluationRequest, GateRequest

router = APIRouter(prefix="/v1", route_class=StrictRoute, tags=["gates"])
_OF_VERSION = "/adapters/{name}/versions/{version}"


@router.get("/gates", responses=answer(ListAnswer[GateRule]))
@needs("adapters")
async def list_gates(services: Provided, caller: Calling) -> Response:
    """List the rules that apply to the caller's tenant; for an admin all of them."""
    found = await services.activation.gate_rules(None if caller.is_admin else caller.tenant)
    return json_response(ListAnswer(data=tuple(found)))


@router.post("/gates", responses=answer(GateRule, 507))
@needs("admin")
async def set_gate(body: GateRequest, services: Provided, caller: Calling) -> Response:
    """Set what versions must pass before they answer under names that match a pattern."""
    services.refuse_if_draining()
    return json_response(await services.activation.set_gate(body.rule(), actor=caller.key))


@router.delete("/gates/{gate_id}", responses=answer(DeletedAnswer, 404, 507))
@needs("admin")
async def delete_gate(gate_id: str, services: Provided, caller: Calling) -> Response:
    """Delete a rule."""
    services.refuse_if_draining()
    deleted = await services.activation.delete_gate(gate_id, actor=caller.key)
    return json_response(DeletedAnswer(id=deleted.id, object="gate.deleted"))


@router.get(f"{_OF_VERSION}/gates", responses=answer(VersionGates, 404))
@needs("adapters")
async def get_version_gates(name: AdapterName, version: str, services: Provided, caller: Calling) -> Response:
    """Return the gates that the caller would have to pass to activate a version, and which are open."""
    return json_response(await services.activation.gates(caller.tenant, name, version))


@router.post(f"{_OF_VERSION}/approval", responses=answer(VersionGates, 404, 507))
@needs("adapters")
async def approve_version(
    name: AdapterName,
    version: str,
    services: Provided,
    caller: Calling,
    body: EmptyRequest | None = None,
) -> Response:
    """Approve a version for its next activation. Whoever made it cannot."""
    services.refuse_if_draining()
    return json_response(await services.activation.approve(caller.tenant, name, version, approved=True))


@router.delete(f"{_OF_VERSION}/approval", responses=answer(VersionGates, 404, 507))
@needs("adapters")
async def withdraw_approval(name: AdapterName, version: str, services: Provided, caller: Calling) -> Response:
    """Withdraw the caller's approval of a version."""
    services.refuse_if_draining()
    return json_response(await services.activation.approve(caller.tenant, name, version, approved=False))


@router.post(f"{_OF_VERSION}/evaluation", responses=answer(VersionGates, 404, 507))
@needs("adapters")
async def send_evaluation(
    name: AdapterName, version: str, body: EvaluationRequest, services: Provided, caller: Calling
) -> Response:
    """Send how a version compares with another one, or with the base, on the same rows. Whoever made it
    cannot, nor a key that no gate takes. Approvals from before do not count any more."""
    services.refuse_if_draining()
    return json_response(
        await services.activation.evaluate(
            caller.tenant, name, version, body.against, body.metric, body.scores(), data=body.data
        )
    )
