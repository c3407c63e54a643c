"""Puts one server's parts together: who is given what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import asdict, replace

from onebase_adapters.registry import (
    RegistryBusyError,
    RegistryError,
    RegistryFullError,
    UncertainChangeError,
)
from onebase_adapters.signatures import ServerKey, SignaturePolicy
from onebase_adapters.store.store import StoreError, local_folder
from onebase_edge.background import Threads
from onebase_edge.settings import Settings, is_loopback
from onebase_engine.base.default_base import ResolvedBase
from onebase_engine.engine.messages import EngineConfig, Loading
from onebase_protocol.adapters import BaseReference
from onebase_server.adapters.activation import ActivationService
from onebase_server.adapters.catalog import Catalog
from onebase_server.adapters.merging import Merging
from onebase_server.adapters.residency import PackedAdapterFiles, Residency
from onebase_server.adapters.service import AdapterService
from onebase_server.adapters.shared_proofs import SharedProofs
from onebase_server.adapters.sources import Folders, HubAdapters, Pulls
from onebase_server.batches.runner import BatchFolders, BatchRunner, Parts
from onebase_server.batches.service import BatchService
from onebase_server.http.deps import READ_THREADS, Services, Training
from onebase_server.http.metrics import MetricsCollector
from onebase_server.http.routes.generation import RequestUsageRecorder
from onebase_server.http.views.adapters import AdapterViews
from onebase_server.inference.generation import GenerationRequest
from onebase_server.inference.tokenization import BaseTokenizer, Tokenizers
from onebase_server.jobs.checkpoints import CheckpointModels
from onebase_server.jobs.delivery import PROOFS_WAITED, Delivery
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.folders import JobFolders
from onebase_server.jobs.grading import Grading
from onebase_server.jobs.handover_files import KeptFiles
from onebase_server.jobs.job_record import JobNotifier
from onebase_server.jobs.job_run import TrainerPool
from onebase_server.jobs.sampling import JobSampler
from onebase_server.jobs.scheduler import JobScheduler
from onebase_server.jobs.service import JobService
from onebase_server.live.sampling import Samples
from onebase_server.live.service import LiveTraining
from onebase_server.processes.link import ENGINE_COMMAND, EngineLink
from onebase_server.processes.live_client import LIVE_COMMAND, LiveSettings, LiveTrainer
from onebase_server.processes.supervisor import (
    AdapterStartError,
    EngineListeners,
    EngineSupervisor,
    RestartPolicy,
)
from onebase_server.processes.time_share import BusyFlag
from onebase_server.processes.trainer_client import TRAINER_COMMAND
from onebase_server.processes.verifier_client import PROBES, VERIFIER_COMMAND, VerifierClient
from onebase_server.requests.defaults import check_form
from onebase_server.requests.planner import Planner, RequestLimits
from onebase_server.requests.pooling import ReadingPlanner
from onebase_server.requests.request_log import RequestEntry, RequestLog
from onebase_server.requests.rollouts import RolloutService
from onebase_server.requests.stored_responses import StoredResponses
from onebase_server.storage.calls import RegistryThreads
from onebase_server.storage.opening import Storage, host_memory, prefix_memory
from onebase_server.telemetry.history import LoadRecorder
from onebase_server.telemetry.machine import MachineReader
from onebase_server.telemetry.measurements import RequestMeasurements
from onebase_server.telemetry.traces import Tracing
from onebase_server.tenancy.access import KeyRing
from onebase_server.tenancy.pacing import RequestPacer
from onebase_server.tenancy.peers import Peers, QuotaSharing
from onebase_server.tenancy.quotas import Limiter, QuotaReservation
from onebase_server.tenancy.usage import TenantUsageRecorder
from onebase_training.live_store import LiveStore

_UNREACHABLE = (RegistryError, RegistryBusyError, RegistryFullError, UncertainChangeError)
"""Kinds of errors of the registry that are not about what is in it."""
RECORD_THREADS = 4
KEY_THREADS = 2
DISK_THREADS = 8
PULL_THREADS = 4
PULL_THREADS_EACH = 2
"""Largest number of pulls that run for one tenant: they may take long, and others find a thread meanwhile."""


@dataclass(frozen=True)
class Commands:
    """Commands that start the other processes; each gets `--fd N` and `--base-fd N` appended."""

    engine: Sequence[str] = ENGINE_COMMAND
    verifier: Sequence[str] = VERIFIER_COMMAND
    trainer: Sequence[str] = TRAINER_COMMAND
    live: Sequence[str] = LIVE_COMMAND
    restarts: RestartPolicy = field(default_factory=RestartPolicy)
    """Limits of the engine's restarts."""


class _Threads(NamedTuple):
    """Threads for the registry's calls and for the store's."""

    records: RegistryThreads
    disk: Threads


@dataclass(frozen=True)
class _AdapterParts:
    """Parts through which a version goes from its files to being served."""

    catalog: Catalog
    residency: Residency
    verifier: VerifierClient
    activation: ActivationService
    service: AdapterService
    files: PackedAdapterFiles


class Preparation:
    """Preparation before an engine gets requests: some of it once, some of it for each new engine."""

    def __init__(self, adapters: AdapterService, folders: Folders, residency: Residency) -> None:
        self._adapters = adapters
        self._folders = folders
        self._residency = residency
        self._served = False

    async def prepare_adapters(self) -> None:
        """Serve the folders given at start, once, and load pinned adapters each time. Raises
        AdapterStartError."""
        if not self._served:
            try:
                await self._adapters.resume()
                await self._folders.serve_given()
            except RegistryError as error:
                failed = type(error) in _UNREACHABLE
                raise AdapterStartError(
                    f"{error} (--registry, --data-dir)" if failed else str(error)
                ) from error
            except StoreError as error:
                raise AdapterStartError(f"{error} (--store)") from error
            self._served = True
        await self._residency.load_pinned()


def assemble(
    settings: Settings,
    base: ResolvedBase,
    storage: Storage,
    given: Sequence[tuple[str, Path]],
    commands: Commands,
    on_loading: Callable[[Loading], None],
    tracing: Tracing,
) -> Services:
    """Make all parts of one server. `given`: the folders to serve before it is ready. Raises DataDirError."""
    threads = _Threads(RegistryThreads("records", RECORD_THREADS), Threads("disk", DISK_THREADS))
    tokenizer = BaseTokenizer(str(base.folder), raw_control_tokens=settings.raw_control_tokens)
    tokenizers = Tokenizers(tokenizer)
    link, busy = EngineLink(), BusyFlag.make()

    supervisor = _supervisor(settings, base, link, busy, commands, on_loading)
    parts = _adapter_parts(
        settings,
        base,
        storage,
        tokenizers,
        link,
        busy,
        threads,
        commands.verifier,
        tracing,
        supervisor.kernels,
    )
    adapters, residency = parts.service, parts.residency
    folders = Folders(adapters, parts.activation, given, settings.max_upload)
    pulls = Pulls(
        storage.store,
        Threads("pull", PULL_THREADS, each=PULL_THREADS_EACH),
        settings.hub_allow,
        settings.max_upload,
        adapters.vocabulary,
        signed=adapters.signatures.is_active,
    )
    hub = HubAdapters(adapters, pulls)
    usage = TenantUsageRecorder(storage.registry.usage, threads.records, base.name)
    training = _training(settings, base, storage, adapters, busy, threads, usage, commands.trainer, tracing)
    live = _live_trainer(settings, base, storage, threads, busy, commands.live)
    supervisor.listen(
        EngineListeners(
            versions=residency,
            base=(training.scheduler, live, parts.verifier),
            prepare=Preparation(adapters, folders, residency).prepare_adapters,
        )
    )
    limits = RequestLimits(max_choices=settings.max_choices, max_timeout=settings.max_timeout)
    planner = Planner(supervisor, tokenizers, parts.catalog, hub, training.checkpoints, limits)
    reading = Threads("read", READ_THREADS)
    request_log = _request_log(settings, base, storage, training.folders.server)
    rollouts = RolloutService(
        storage.registry,
        threads.records,
        parts.catalog,
        parts.activation,
        residency,
        supervisor,
        planner,
        tokenizer,
        reading,
        request_log,
    )
    keys = KeyRing(
        storage.registry.keys,
        storage.registry.tenants,
        Threads("keys", KEY_THREADS),
        open_without_keys=settings.insecure or is_loopback(settings.host),
    )
    limiter = Limiter(keys.quotas_of)
    sharing = QuotaSharing(training.peers, limiter, lambda: keys.has_quotas)
    batches = _batches(settings, storage, training, keys, limiter, supervisor)
    measured, answers = RequestMeasurements(), Counter[tuple[str, int]]()
    live_training = LiveTraining(
        live if settings.train_jobs else None,
        storage.registry.live,
        threads.records,
        training.folders.server,
        base_names=base.names,
        tokenizer=base.repo or str(base.folder),
        max_rank=settings.max_rank,
        files=parts.files,
        residency=residency,
        library=adapters,
        usage=usage,
        check_room=keys.check_room,
        checkpoints=training.checkpoints,
    )

    def recorder(
        reservation: QuotaReservation, request: GenerationRequest, entry: RequestEntry | None = None
    ) -> RequestUsageRecorder:
        return RequestUsageRecorder(reservation, usage, measured, request, entry=entry)

    grading = Grading(limiter, settings.python_graders)
    training.pool.sampler = JobSampler(
        planner=planner,
        supervisor=supervisor,
        tokenizer=tokenizer,
        reading=reading,
        files=parts.files,
        residency=residency,
        keys=keys,
        limiter=limiter,
        grading=grading,
        recorder=recorder,
    )
    samples = Samples(
        storage.registry.live,
        threads.records,
        training.folders.server,
        planner=planner,
        supervisor=supervisor,
        tokenizer=tokenizer,
        reading=reading,
        residency=residency,
        keys=keys,
        limiter=limiter,
        choose=live_training.choose,
        recorder=recorder,
        log=request_log,
    )
    metrics = MetricsCollector(
        supervisor=supervisor,
        catalog=parts.catalog,
        residency=residency,
        adapters=adapters,
        scheduler=training.scheduler,
        batches=batches.runner,
        requests=measured,
        answers=answers,
        rollouts=rollouts,
        request_log=request_log,
    )
    return Services(
        settings=settings,
        keys=keys,
        limiter=limiter,
        sharing=sharing,
        usage=usage,
        catalog=parts.catalog,
        tokenizer=tokenizer,
        supervisor=supervisor,
        planner=planner,
        read_planner=ReadingPlanner(planner, limits.max_timeout),
        responses=StoredResponses(settings.response_memory),
        residency=residency,
        adapters=adapters,
        hub=hub,
        merging=Merging(adapters, parts.verifier, max_rank=settings.max_rank, max_bytes=settings.max_upload),
        activation=parts.activation,
        rollouts=rollouts,
        folders=folders,
        views=AdapterViews(adapters, hub, residency, _reference(base, settings)),
        verifier=parts.verifier,
        training=training,
        live=live,
        live_training=live_training,
        samples=samples,
        grading=grading,
        batches=batches,
        request_log=request_log,
        measured=measured,
        tracing=tracing,
        metrics=metrics,
        answers=answers,
        load=LoadRecorder(
            measured,
            answers,
            supervisor.client.total,
            lambda: supervisor.client.stats,
            MachineReader(wants_gpu=settings.device != "cpu"),
        ),
        pacer=RequestPacer(),
        reading=reading,
    )


def _live_trainer(
    settings: Settings,
    base: ResolvedBase,
    storage: Storage,
    threads: _Threads,
    busy: BusyFlag,
    command: Sequence[str],
) -> LiveTrainer:
    return LiveTrainer(
        LiveStore(Path(settings.data_dir).expanduser().absolute() / "live", storage.base_id),
        threads.disk,
        LiveSettings(
            base.name,
            base.revision,
            share=settings.train_share,
            memory=settings.train_memory // max(1, settings.train_jobs),
            busy_fd=busy.fd,
            command=command,
        ),
    )


def _request_log(settings: Settings, base: ResolvedBase, storage: Storage, server: str) -> RequestLog:
    return RequestLog(
        Path(settings.data_dir).expanduser().absolute() / "requests" / storage.registry_id,
        storage.registry.request_log,
        mode=settings.request_log,
        days=settings.request_log_days,
        most_bytes=settings.request_log_size,
        base=base.name,
        base_id=storage.base_id,
        server=server,
        sync_seconds=settings.sync_seconds,
    )


def _adapter_parts(
    settings: Settings,
    base: ResolvedBase,
    storage: Storage,
    tokenizers: Tokenizers,
    link: EngineLink,
    busy: BusyFlag,
    threads: _Threads,
    command: Sequence[str],
    tracing: Tracing,
    kernels: Callable[[], str],
) -> _AdapterParts:
    """Make the adapters' parts. `busy`: whether sequences run. `command` starts the verifier. `kernels`: the
    engine's."""
    registry, store, (records, disk) = storage.registry, storage.store, threads
    key = ServerKey.load(Path(settings.signing_key).expanduser()) if settings.signing_key else None
    policy = Path(settings.signatures).expanduser() if settings.signatures else None
    root = Path(settings.sigstore_root).expanduser() if settings.sigstore_root else None
    catalog = Catalog(base.name, registry, records)
    files = PackedAdapterFiles(catalog, store, disk, kernels)
    verifier = VerifierClient(
        store,
        disk,
        base_id=storage.base_id,
        probes=[tokenizers.base.encode(probe) for probe in PROBES],
        busy_fd=busy.fd,
        command=command,
        proof_timeout=settings.proof_timeout,
    )
    proofs = SharedProofs(
        registry, store, catalog, verifier, kernels, records=records, disk=disk, tracing=tracing
    )
    residency = Residency(
        host_memory(settings),
        files.find,
        files.fetch,
        link.send,
        settings.queue_limit,
        prove=proofs.for_kernels,
        knows=lambda use: files.is_live(use.digest) or catalog.knows(use),
    )
    activation = ActivationService(registry, store, catalog, residency, records, disk)
    service = AdapterService(
        registry,
        store,
        catalog,
        activation,
        proofs,
        base_names=base.names,
        records=records,
        disk=disk,
        vocabulary=lambda: tokenizers.base.vocabulary,
        check_tokens=tokenizers.check,
        check_defaults=check_form,
        signatures=SignaturePolicy.load(policy, key, root),
        key=key,
        base_facts={"id": storage.base_id, **asdict(_reference(base, settings))},
    )
    residency.subscribe(service.prove_again)
    return _AdapterParts(catalog, residency, verifier, activation, service, files)


def _reference(base: ResolvedBase, settings: Settings) -> BaseReference:
    """Return where the base comes from and how it is quantized, for those who take adapters elsewhere."""
    how = (settings.quantization, settings.blocksize, settings.double_quant)
    return BaseReference(base.name, base.repo, base.revision, *how)


def engine_config(settings: Settings, base_folder: str) -> EngineConfig:
    """Return the engine's part of the settings, for the base in a local folder."""
    shared = {item.name for item in fields(settings)} & set(EngineConfig.__struct_fields__)
    return EngineConfig(base_folder=base_folder, **{name: getattr(settings, name) for name in shared})


def _supervisor(
    settings: Settings,
    base: ResolvedBase,
    link: EngineLink,
    busy: BusyFlag,
    commands: Commands,
    on_loading: Callable[[Loading], None],
) -> EngineSupervisor:
    return EngineSupervisor(
        replace(engine_config(settings, str(base.folder)), prefix_memory=prefix_memory(settings)),
        link,
        queue_limit=settings.queue_limit,
        stall_timeout=settings.stall_timeout,
        command=commands.engine,
        policy=commands.restarts,
        on_loading=on_loading,
        busy=busy.set,
    )


def _training(
    settings: Settings,
    base: ResolvedBase,
    storage: Storage,
    adapters: AdapterService,
    busy: BusyFlag,
    threads: _Threads,
    usage: TenantUsageRecorder,
    command: Sequence[str],
    tracing: Tracing,
) -> Training:
    """Make the training of one engine's base. Raises DataDirError.

    `command` starts a trainer; `busy` says whether sequences run.
    """
    records, disk = threads
    folder = JobFolders(Path(settings.data_dir).expanduser().absolute(), storage.registry_id)
    storage.registry.sign(folder.server)
    peers = Peers(storage.registry.servers, folder.server, folder.lock_id)
    registry, notifier = storage.registry.training, JobNotifier()
    files = TrainingFiles(registry, storage.store, folder, records, disk, settings.max_train_file)
    # Another server could go on with a job where the store is no folder, or one was ever on the registry.
    is_remote = local_folder(settings.store or settings.data_dir) is None
    kept = KeptFiles(
        storage.registry.takeovers,
        storage.store,
        folder,
        records,
        disk,
        wanted=lambda: is_remote or peers.have_been,
    )
    checkpoints = CheckpointModels(adapters, registry, records, folder)
    pool = TrainerPool(
        records=registry,
        threads=records,
        notifier=notifier,
        files=files,
        folders=folder,
        delivery=Delivery(adapters, folder, files, kept, PROOFS_WAITED * settings.proof_timeout),
        config=engine_config(settings, str(base.folder)),
        base=base,
        command=command,
        share=settings.train_share,
        memory=settings.train_memory // max(1, settings.train_jobs),
        busy_fd=busy.fd,
        tenants=storage.registry.tenants,
        usage=usage,
        checkpoints=checkpoints,
        kept=kept,
        tracing=tracing,
        base_id=storage.base_id,
    )
    scheduler = JobScheduler(pool, peers, most=settings.train_jobs, look_seconds=settings.sync_seconds)
    jobs = JobService(
        registry,
        storage.registry.tenants,
        records,
        files,
        folder,
        scheduler,
        notifier,
        most=settings.train_jobs,
        look_seconds=settings.sync_seconds,
    )
    return Training(files, jobs, scheduler, checkpoints, storage, records, folder, peers, pool)


def _batches(
    settings: Settings,
    storage: Storage,
    training: Training,
    keys: KeyRing,
    limiter: Limiter,
    supervisor: EngineSupervisor,
) -> BatchService:
    records, data = storage.registry.batches, Path(settings.data_dir).expanduser().absolute()
    parts = Parts(
        records,
        training.threads,
        training.files,
        BatchFolders(data, storage.registry_id),
        training.folders,
        keys,
        limiter,
        supervisor,
        training.peers,
        max_body=settings.max_body,
        most=settings.batch_requests,
    )
    runner = BatchRunner(parts, settings.sync_seconds)
    return BatchService(records, training.threads, training.files, runner, training.folders.server)
