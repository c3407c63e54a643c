"""Between two tenants: what the other one has takes as many queries to be told unknown as what nobody has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event
from tests.adapters.registry.conftest import add
from tests.adapters.registry.test_jobs import add_file, add_job

from onebase_adapters.registry import Registry, RegistryError

OTHER = "other"
Look = Callable[[Registry, str], Any]
LOOKS: dict[str, tuple[str, Look]] = {
    "adapter": ("red", lambda registry, name: registry.adapter(OTHER, name)),
    "versions": ("red", lambda registry, name: registry.versions(OTHER, name)),
    "version": ("red", lambda registry, name: registry.version(OTHER, name, "0" * 64)),
    "history": ("red", lambda registry, name: registry.history(OTHER, name)),
    "activate": ("red", lambda registry, name: registry.activate(OTHER, name, "0" * 64)),
    "rollback": ("red", lambda registry, name: registry.rollback(OTHER, name)),
    "deactivate": ("red", lambda registry, name: registry.deactivate(OTHER, name)),
    "pin": ("red", lambda registry, name: registry.pin(OTHER, name, True)),
    "share": ("red", lambda registry, name: registry.share(OTHER, name, True)),
    "delete_version": ("red", lambda registry, name: registry.delete_version(OTHER, name, "0" * 64)),
    "delete_adapter": ("red", lambda registry, name: registry.delete_adapter(OTHER, name)),
    "file": ("file-a", lambda registry, name: registry.training.file(OTHER, name)),
    "files": ("file-a", lambda registry, name: registry.training.files(OTHER, after=name, limit=5)),
    "delete_file": ("file-a", lambda registry, name: registry.training.delete_file(OTHER, name)),
    "add_job": ("file-a", lambda registry, name: add_job(registry, "x", tenant=OTHER, training_file=name)),
    "job": ("ftjob-a", lambda registry, name: registry.training.job(OTHER, name)),
    "jobs": ("ftjob-a", lambda registry, name: registry.training.jobs(OTHER, after=name, limit=5)),
}


@pytest.mark.parametrize("look", LOOKS)
def test_looking_for_what_another_tenant_has_takes_the_queries_of_looking_for_nothing(
    registry: Registry, look: str
) -> None:
    add(registry, "red", "1", tenant="one")
    add_file(registry, "a", tenant="one")
    add_job(registry, "a", tenant="one")
    theirs, find = LOOKS[look]
    nothing = theirs[:-1] + "x"

    asked: list[str] = []
    event.listen(registry._database.engine, "before_cursor_execute", lambda *told: asked.append(told[2]))
    told = []
    for name in (theirs, nothing):
        asked.clear()
        with pytest.raises(RegistryError) as unknown:
            find(registry, name)
        told.append(([*asked], type(unknown.value), str(unknown.value).replace(name, "it")))

    assert told[0] == told[1]
    assert told[0][0]
