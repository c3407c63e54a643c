"""Puts one server's parts together: who is given what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from onebase_engine.engine.messages import Loading
from onebase_server.adapters.activation import Activation
from onebase_server.adapters.catalog import Catalog
from onebase_server.adapters.folders import Folders
from onebase_server.adapters.hub_adapters import HubAdapters
from onebase_server.adapters.packed_files import PackedAdapterFiles
from onebase_server.adapters.pulls import Pulls
from onebase_server.adapters.residency import Residency
from onebase_server.adapters.service import Library
from onebase_server.background import Threads
from onebase_server.generation.planner import Limits, Planner
from onebase_server.generation.tokenization import BaseTokenizer
from onebase_server.http.deps import Services
from onebase_server.http.views.adapters import AdapterViews
from onebase_server.jobs.wiring import assemble_training
from onebase_server.processes.link import EngineLink
from onebase_server.processes.share import BusyFlag
from onebase_server.processes.supervisor import EngineListeners, EngineSupervisor, RestartPolicy
from onebase_server.processes.verifier_client import PROBES, VerifierClient
from onebase_server.served_base import Base
from onebase_server.settings import Settings
from onebase_server.storage import Storage, host_memory

RECORD_THREADS = 4
DISK_THREADS = 8
PULL_THREADS = 4


class Preparation:
    """What is done between a base that is loaded and the first request: once, and at each new engine."""

    def __init__(self, library: Library, folders: Folders, residency: Residency) -> None:
        self._library = library
        self._folders = folders
        self._residency = residency
        self._served = False

    async def run(self) -> None:
        """Serve what was given at start; then load what is pinned. Raises AdapterStartError."""
        if not self._served:
            await self._library.resume()
            await self._folders.serve_given()
            self._served = True
        await self._residency.load_pinned()


def assemble(
    settings: Settings,
    base: Base,
    storage: Storage,
    given: Sequence[tuple[str, Path]],
    *,
    engine_command: Sequence[str],
    engine_restarts: RestartPolicy,
    verifier_command: Sequence[str],
    trainer_command: Sequence[str],
    on_loading: Callable[[Loading], None],
) -> Services:
    """All parts of one server. `given`: the folders to serve before it is ready. Raises DataDirError."""
    registry, store = storage.registry, storage.store
    tokenizer = BaseTokenizer(str(base.folder))
    records, disk = Threads("records", RECORD_THREADS), Threads("disk", DISK_THREADS)
    catalog = Catalog(base.name, registry, records)
    files = PackedAdapterFiles(catalog, store, disk)
    link = EngineLink()
    residency = Residency(host_memory(settings), files.find, files.fetch, link.send, settings.queue_limit)
    verifier = VerifierClient(
        store,
        disk,
        base_id=storage.base_id,
        probes=[tokenizer.encode(probe) for probe in PROBES],
        command=verifier_command,
        proof_timeout=settings.proof_timeout,
    )
    activation = Activation(registry, store, catalog, residency, records, disk)
    library = Library(
        registry, store, catalog, activation, verifier, base_names=base.names, records=records, disk=disk
    )
    pulls = Pulls(store, Threads("pull", PULL_THREADS), settings.hub_allow, settings.max_upload)
    hub = HubAdapters(library, pulls)
    folders = Folders(library, activation, given, settings.max_upload)
    limits = Limits(max_choices=settings.max_choices, max_timeout=settings.max_timeout)
    residency.on_damaged = library.begin_again
    busy = BusyFlag.make()
    training = assemble_training(
        settings, base, storage, library, busy, command=trainer_command, records=records, disk=disk
    )
    listeners = EngineListeners(
        versions=residency,
        base=(training.manager, verifier),
        prepare=Preparation(library, folders, residency).run,
        busy=busy.set,
    )
    supervisor = EngineSupervisor(
        settings.engine_config(str(base.folder)),
        link,
        listeners,
        queue_limit=settings.queue_limit,
        stall_timeout=settings.stall_timeout,
        command=engine_command,
        policy=engine_restarts,
        on_loading=on_loading,
    )
    return Services(
        settings=settings,
        catalog=catalog,
        tokenizer=tokenizer,
        supervisor=supervisor,
        planner=Planner(supervisor, tokenizer, catalog, hub, limits),
        residency=residency,
        library=library,
        hub=hub,
        activation=activation,
        folders=folders,
        views=AdapterViews(library, hub, residency),
        verifier=verifier,
        training=training,
    )
