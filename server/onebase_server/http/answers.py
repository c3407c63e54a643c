"""Types that routes state for their answers, and the schemas that OpenAPI has of them.

Nothing is validated on the way out, and no schema is made before somebody asks for the reference: `answer`
only notes a route's type, of which openapi.py asks for the schema.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import UnionType
from typing import Any, get_args, get_origin

import msgspec

from onebase_edge.cross_site import ADAPTER_HEADER
from onebase_protocol.common import Json, Sparse, Stored
from onebase_protocol.reading import TextLabelAnswer, TokenLabelsAnswer

Responses = dict[int | str, dict[str, Any]]
"""`responses` of a route, as FastAPI takes them."""
MODEL_REFUSED = (404, 409, 422, 507)
"""Statuses of errors of a request to a model, which may be an adapter that comes from the Hub first."""
_VERSION_TOLD: Json = {
    ADAPTER_HEADER: {
        "description": "the version that answered; not there for the base alone, or several requests in one",
        "schema": {"type": "string"},
    }
}
COMPONENTS = "#/components/schemas/"
_NAMES = {
    "Activation": "HistoryAnswer", "Adapter": "AdapterAnswer", "AdapterSource": "VersionSource",
    "AdapterVersion": "VersionAnswer", "AdapterWeight": "WeightedAdapter", "ApiKey": "KeyAnswer",
    "AuditEntry": "AuditAnswer", "BaseReference": "FilesBase", "Batch": "BatchAnswer",
    "BatchError": "BatchProblem", "Decision": "DecisionAnswer", "Logprobs": "FlatLogprobs",
    "MergeParent": "MergedAnswer", "Model": "ModelAnswer", "NewApiKey": "NewKeyAnswer",
    "Option": "OptionAnswer", "Tenant": "TenantAnswer",
    "TenantUsage": "UsageRowAnswer", "Timing": "GeneratedTiming", "TrainingCheckpoint": "CheckpointAnswer",
    "TrainingEvent": "JobEventAnswer", "TrainingFailure": "JobProblem", "TrainingFile": "FileAnswer",
    "TrainingJobInfo": "JobAnswer", "TrainingStop": "JobStopAnswer", "Usage": "GeneratedUsage",
    "VersionFailure": "VersionProblem", "VersionFile": "VersionFileAnswer",
    "VersionFiles": "VersionFilesAnswer",
}  # fmt: skip
"""Schemas that are called otherwise than the SDK calls their structs."""
_NAMED_BY_OTHERS = (TextLabelAnswer, TokenLabelsAnswer)


class Described(dict[str, Any]):
    """One of a route's `responses`. kind: the type of its JSON, or None. event: that of what it streams."""

    def __init__(self, kind: Any, event: Any = None, **fields: Any) -> None:
        super().__init__(fields)
        self.kind = kind
        self.event = event


def refused(*statuses: int) -> Responses:
    """Return the `responses` of a route's errors, but for those that any route may send (see openapi.py)."""
    return {one: {} for one in statuses}


def answer(
    kind: Any,
    *errors: int,
    description: str = "Successful Response",
    status: int = 200,
    event: Any = None,
    also: tuple[str, ...] = (),
) -> Responses:
    """Return the `responses` of a route whose answer is JSON of this type.

    Args:
        errors: their statuses, as in `refused`.
        event: the type of what it streams as server-sent events, if it does.
        also: media types of the same, as text.
    """
    texts = also if event is None else ("text/event-stream", *also)
    content = {media_type: {"schema": {"type": "string"}} for media_type in texts}
    made: Responses = {status: Described(kind, event, description=description, content=content)}
    return made | refused(*errors)


def streamed_answer(kind: Any, event: Any) -> Responses:
    """Return the `responses` of a route for text, which answers in one piece, or by server-sent events."""
    told = "In one piece; or as it comes, by server-sent events"
    made = answer(kind, *MODEL_REFUSED, description=told, event=event)
    made[200]["headers"] = _VERSION_TOLD
    return made


def written_out(schema: Json) -> Json:
    """Return a schema without `$defs`: each reference is replaced by what it means. None may refer to
    itself."""
    parts = schema.get("$defs", {})

    def whole(part: Any) -> Any:
        if isinstance(part, list):
            return [whole(item) for item in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return whole(parts[part["$ref"].rpartition("/")[2]])
        return {key: whole(value) for key, value in part.items() if key != "$defs"}

    made: Json = whole(schema)
    return made


# ---- schemas ---------------------------------------------------------------------------------------


def schemas_of(kinds: Sequence[Any]) -> tuple[list[Json], dict[str, Json]]:
    """Return the schema of each type, and the components that they refer to.

    msgspec's schemas say what can be read; these say what is sent: every field, but for those that may be
    left out.
    """
    variants = [_variants(kind) for kind in kinds]
    plain = [variant for group in variants for variant in group]
    made, parts = msgspec.json.schema_components([*plain, *_NAMED_BY_OTHERS])
    bases = {kind.__name__: base for base in (Sparse, Stored) for kind in _subclasses(base)}
    components = {_named(name): _renamed(_sent(part, bases.get(name))) for name, part in parts.items()}
    schemas = iter(made)
    found = [[_renamed(next(schemas)) for _ in group] for group in variants]
    return [group[0] if len(group) == 1 else {"anyOf": group} for group in found], components


def _variants(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is UnionType else (kind,)


def _subclasses(kind: type) -> list[type]:
    direct: list[type] = kind.__subclasses__()
    return [*direct, *(one for child in direct for one in _subclasses(child))]


def _sent(part: Json, base: type | None) -> Json:
    """Return the schema of a struct as it is sent. base: Sparse, Stored, or neither."""
    properties, required = {}, set(part.get("required", ()))
    for name, schema in part["properties"].items():
        if "default" in schema and base is not Stored:
            schema = dict(schema)
            default = schema.pop("default")
            if base is not Sparse:
                required.add(name)
            elif default is None:
                schema = _without_null(schema)
        properties[name] = schema
    part = {**part, "properties": properties}
    if required:
        part["required"] = [name for name in properties if name in required]
    if "description" in part:
        part["description"] = " ".join(part["description"].split())
    return part


def _without_null(schema: Json) -> Json:
    rest = [one for one in schema.pop("anyOf") if one != {"type": "null"}]
    return schema | (rest[0] if len(rest) == 1 else {"anyOf": rest})


def _renamed(value: Any) -> Any:
    """Return a schema with the references and the constants of OpenAPI's components."""
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    if isinstance(value, str) and value.startswith("#/$defs/"):
        return COMPONENTS + _named(value.rpartition("/")[2])
    if not isinstance(value, dict):
        return value
    value = value.get("x-sent", value)
    made = {key: _renamed(item) for key, item in value.items()}
    if isinstance(made.get("enum"), list) and len(made["enum"]) == 1:
        (made["const"],) = made.pop("enum")
    if made.get("type") == "object" and "properties" not in made:
        made.setdefault("additionalProperties", True)
    return made


def _named(name: str) -> str:
    return re.sub(r"[A-Za-z]+", lambda found: _NAMES.get(found[0], found[0]), name)
