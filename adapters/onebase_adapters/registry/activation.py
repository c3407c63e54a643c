"""Activate versions, roll them back, and record the history of both, inside a write transaction."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from onebase_adapters.registry import audit, gates, rollouts
from onebase_adapters.registry.database import plain
from onebase_adapters.registry.errors import (
    NothingToRollBackError,
    NotReadyError,
    StaleActivationError,
)
from onebase_adapters.registry.records import Action, AuditAction, Unset
from onebase_adapters.registry.tables import AdapterRow, HistoryRow, PreviousRow, VersionRow

_SHOWN_DIGITS, _MOST_SHOWN = 12, 10
"""Digits of a digest in a message, and digests that one lists."""
_AUDITED: dict[Action, AuditAction] = {
    "activate": "adapter.activated",
    "rollback": "adapter.rolled_back",
    "deactivate": "adapter.deactivated",
}


def check_expected(adapter: AdapterRow, expected: str | Unset | None) -> None:
    """Raise StaleActivationError unless `expected` is the active version or was not given."""
    if isinstance(expected, Unset) or expected == adapter.active:
        return
    raise StaleActivationError(
        f"The active version of {adapter.name!r} is {adapter.active or 'none'}, not {expected or 'none'}: "
        "look at it and decide again.",
        adapter.active,
    )


def activate(
    session: Session,
    adapter: AdapterRow,
    version: VersionRow,
    actor: str,
    at: float,
    askers: Collection[str] = (),
) -> None:
    """Make `version` active unless it already is, and push the version active before onto the stack.

    askers: keys that ask for it besides the caller's. Raises NotReadyError, GateError.
    """
    if version.state != "ready":
        raise NotReadyError(
            f"Version {version.digest} of {adapter.name!r} is {version.state}: "
            "only a ready one can be activated.",
            version.state,
        )
    if adapter.active == version.digest:
        rollouts.settle(adapter)
        return
    gates.check(session, adapter, version, askers)
    gates.use_up(session, version)
    _push_active(session, adapter)
    _switch(session, adapter, version.digest, "activate", actor, at)


def roll_back(session: Session, adapter: AdapterRow, actor: str, at: float) -> None:
    """Activate the version that was active before the current one, and pop it from the stack.

    It passes no gate: going back must be possible at once, and the version was let in when it came.
    Entries that cannot be active now (no longer ready, or the active version itself) are skipped.
    """
    stack = session.execute(
        select(PreviousRow, VersionRow)
        .join(VersionRow, VersionRow.id == PreviousRow.version_id)
        .where(PreviousRow.adapter_id == adapter.id)
        .order_by(PreviousRow.id.desc())
    ).all()
    for previous, version in stack:
        if version.state == "ready" and version.digest != adapter.active:
            session.execute(
                delete(PreviousRow).where(PreviousRow.adapter_id == adapter.id, PreviousRow.id >= previous.id)
            )
            _switch(session, adapter, version.digest, "rollback", actor, at)
            return
    ready = session.scalars(
        select(VersionRow.digest)
        .where(
            VersionRow.adapter_id == adapter.id,
            VersionRow.state == "ready",
            VersionRow.digest != (adapter.active or ""),
        )
        .order_by(VersionRow.id.desc())
    ).all()
    raise NothingToRollBackError(
        f"{adapter.name!r} has no earlier version to roll back to, {_next_step(adapter, ready)}"
    )


def _next_step(adapter: AdapterRow, ready: Sequence[str]) -> str:
    """Return what can be done where nothing is left to roll back to, with the commands."""
    name = adapter.name
    if ready:
        others = ", ".join(digest[:_SHOWN_DIGITS] for digest in ready[:_MOST_SHOWN])
        more = f" and {len(ready) - _MOST_SHOWN} more" if len(ready) > _MOST_SHOWN else ""
        return (
            f"but others are ready: {others}{more}. Activate one by its digest: "
            f"onebase adapters activate {name} {ready[0][:_SHOWN_DIGITS]}"
        )
    push = f"and no other is ready. Add one: onebase adapters push FOLDER --name {name} --activate"
    if adapter.active is None:
        return push
    return f"{push}; to have no version answer: onebase adapters deactivate {name}"


def deactivate(session: Session, adapter: AdapterRow, actor: str, at: float) -> None:
    """Make no version active, and keep those that are not ready yet from becoming active by themselves;
    rolling back activates the version active before."""
    was_due = any(version.activates for version in adapter.versions)
    for version in adapter.versions:
        version.activates = False
    if adapter.active is not None:
        end_active(session, adapter, actor, at)
    elif was_due:
        _audit(session, adapter, None, "deactivate", actor)


def end_active(session: Session, adapter: AdapterRow, actor: str, at: float) -> None:
    """Make the active version inactive; one that is not ready yet may still become active by itself."""
    _push_active(session, adapter)
    _switch(session, adapter, None, "deactivate", actor, at)


def _push_active(session: Session, adapter: AdapterRow) -> None:
    active = session.scalar(
        select(VersionRow.id).where(VersionRow.adapter_id == adapter.id, VersionRow.digest == adapter.active)
    )
    if active is not None:
        session.add(PreviousRow(adapter_id=adapter.id, version_id=active))


def _switch(
    session: Session, adapter: AdapterRow, digest: str | None, action: Action, actor: str, at: float
) -> None:
    session.add(
        HistoryRow(
            adapter_id=adapter.id,
            action=action,
            version=digest,
            previous=adapter.active,
            actor=plain(actor),
            at=at,
        )
    )
    rollouts.settle(adapter)
    rollouts.active_changed(session, adapter, digest, actor, at)
    _audit(session, adapter, digest, action, actor)
    adapter.active = digest
    session.flush()  # so that `switched_at`, which is read from the history, can be loaded


def _audit(session: Session, adapter: AdapterRow, digest: str | None, action: Action, actor: str) -> None:
    audit.note(
        session,
        _AUDITED[action],
        adapter.tenant,
        adapter.name,
        version=digest,
        base_id=adapter.base_id,
        actor=actor,
        details={"previous": adapter.active},
    )
