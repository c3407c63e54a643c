"""JSON schemas, closed to properties that they do not describe, with strings that end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ELSEWHERE = frozenset({"allOf", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef"})
"""Keywords with which the properties of one object may be described in several places."""
_OTHERS = frozenset({"anyOf", "oneOf", "$ref", "not"})
"""Keywords that, next to `properties`, may describe further properties of the same object."""
_OPEN = frozenset({"additionalProperties", "patternProperties"})
_VALUES = frozenset({"const", "enum", "default", "examples"})
"""Keywords whose values are no schemas."""
_LENGTHS = frozenset({"minLength", "maxLength", "pattern"})
_NAMED = frozenset({"properties", "$defs", "definitions"})
"""Keywords with schemas by name."""


_LONGEST = {"date-time": 64, "time": 64, "duration": 64, "hostname": 253, "email": 320, "uri": 2048}
"""Characters that a string of a format has at most: small models go on with its last part until they are
cut."""


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema with objects that have no other properties than it describes, and with bounded
    formats.

    A schema allows others unless it says `additionalProperties: false`. Those that are made of a program's
    types leave that out, and a model goes on with an object as long as it may. What keeps to the closed
    schema keeps to the other one too. Objects that say `additionalProperties` stay as they are, and so does a
    schema that describes the properties of an object in several places.
    """
    made: dict[str, Any] = _closed(schema, objects=not _is_scattered(schema))
    return made


def _is_scattered(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_is_scattered, value))
    if not isinstance(value, Mapping):
        return False
    if not _ELSEWHERE.isdisjoint(value) or ("properties" in value and not _OTHERS.isdisjoint(value)):
        return True
    return any(map(_is_scattered, value.values()))


def _closed(value: Any, *, objects: bool) -> Any:
    """objects: whether objects are closed as well."""
    if isinstance(value, list):
        return [_closed(part, objects=objects) for part in value]
    if not isinstance(value, Mapping):
        return value
    made = dict(value)
    for key, part in value.items():
        if key in _NAMED and isinstance(part, Mapping):
            made[key] = {name: _closed(inner, objects=objects) for name, inner in part.items()}
        elif key not in _VALUES:
            made[key] = _closed(part, objects=objects)
    longest = _LONGEST.get(value["format"]) if isinstance(value.get("format"), str) else None
    if longest is not None and value.get("type") == "string" and not _LENGTHS & value.keys():
        made["maxLength"] = longest
    is_described = _describes_all(value.get("properties"), value.get("required", []))
    if objects and is_described and _OPEN.isdisjoint(value):
        made["additionalProperties"] = False
    return made


def _describes_all(properties: Any, required: Any) -> bool:
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return False
    return all(isinstance(name, str) and name in properties for name in required)
