"""What adapters may be called."""

from __future__ import annotations

from onebase_adapters.names import NAME_RULE, is_adapter_name
from onebase_server.errors import InvalidRequestError

SHORT_DIGEST = 12
HUB_PREFIX = "hub:"
"""Names of adapters that a request named by their Hub repository."""


def check_name(name: str, base_name: str) -> str:
    """The name, if an adapter may have it. Raises InvalidRequestError."""
    if not is_adapter_name(name):
        raise InvalidRequestError(
            f"name: {name[:80]!r} cannot be an adapter's name. Use {NAME_RULE}.", param="name"
        )
    if name == base_name:
        raise InvalidRequestError(f"name: {name!r} is the base's own name. Choose another.", param="name")
    return name


def label(name: str, digest: str) -> str:
    """How answers call a version: `name@` and the first digits of its digest."""
    return f"{name}@{digest[:SHORT_DIGEST]}"


def same_base(wanted: str | None, *own: str | None) -> bool:
    """Whether a config's `base_model_name_or_path` may mean the base that goes by the names in `own`.

    Only the last part of each path counts, in any case: the same base lies in many places. None and "" mean
    any base.
    """
    return not wanted or _last_part(wanted) in {_last_part(name) for name in own if name}


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
