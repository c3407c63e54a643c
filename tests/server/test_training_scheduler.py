"""The scheduler by itself, on a registry of its own: it goes on whatever fails, and keeps the disk tidy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text

from onebase_adapters.registry import (
    FileRecord,
    JobEvent,
    NewJob,
    Registry,
    ServerIdInUseError,
    TrainingJob,
    UnkeptJob,
)
from onebase_adapters.store.store import Store, StoreError, StoreFullError
from onebase_edge.background import Backoff, Threads
from onebase_protocol.training import TrainingFailure
from onebase_server.jobs import job_run
from onebase_server.jobs.checkpoints import CheckpointModels
from onebase_server.jobs.files import TrainingFiles
from onebase_server.jobs.folders import JobFolders
from onebase_server.jobs.handover_files import KeptFiles, _files_of
from onebase_server.jobs.job_record import JobNotifier
from onebase_server.jobs.job_run import FileGoneError, JobRun
from onebase_server.jobs.scheduler import JobScheduler
from onebase_server.jobs.state import is_resumable
from onebase_server.telemetry.traces import Tracing
from onebase_server.tenancy.peers import Peers

JOB = "ftjob-1"


@pytest.fixture
def storage(tmp_path: Path) -> JobFolders:
    return JobFolders(tmp_path, "registry-1")


def add_job(registry: Registry, storage: JobFolders, state: Any, **facts: Any) -> Path:
    """A job in this state, and the folder that it has written into."""
    records = registry.training
    records.add_file(
        FileRecord("file-1", "default", storage.server, "fine-tune", "a.jsonl", 1, 1.0, "0" * 64)
    )
    records.add_job(
        NewJob(
            id=JOB, tenant="default", server=storage.server, name="orders", training_file="file-1",
            validation_file=None, activate="never", settings={}, labels={},
        ),
        JobEvent(1.0, "made"),
    )  # fmt: skip
    records.move(JOB, state, ("validating_files",), **facts)
    (storage.job(JOB) / "checkpoints" / "5").mkdir(parents=True)
    return storage.job(JOB)


def _files(registry: Registry, storage: JobFolders, threads: Threads) -> TrainingFiles:
    store = Store(str(storage.root / "store"), storage.root / "cache")
    return TrainingFiles(registry.training, store, storage, threads, threads, 1 << 20)


def _kept(registry: Registry, storage: JobFolders, threads: Threads) -> KeptFiles:
    """For a server that shares nothing."""
    store = Store(str(storage.root / "store"), storage.root / "cache")
    return KeptFiles(registry.takeovers, store, storage, threads, threads, wanted=lambda: False)


async def followed(
    registry: Registry,
    storage: JobFolders,
    until: Callable[[], object],
    *,
    records: Any = None,
    most: int = 0,
) -> None:
    """Let a scheduler that looks and sweeps all the time run until something is so."""
    threads, notifier = Threads("records", 2), JobNotifier()
    nothing: Any = SimpleNamespace(catalog=[])
    pool: Any = SimpleNamespace(
        sampler=None,
        records=records or registry.training,
        threads=threads,
        notifier=notifier,
        folders=storage,
        files=_files(registry, storage, threads),
        checkpoints=CheckpointModels(nothing, registry.training, threads, storage),
        kept=_kept(registry, storage, threads),
    )
    peers = Peers(registry.servers, storage.server, storage.lock_id)
    scheduler = JobScheduler(pool, peers, most=most, look_seconds=0.01, sweep_seconds=0.0)
    base: Any = None
    scheduler.base_ready(base, b"", -1)
    await peers.renew(runs=True, room=most)
    task = asyncio.get_running_loop().create_task(scheduler.follow())
    try:
        async with asyncio.timeout(60):
            while not until() and not task.done():
                await asyncio.sleep(0.01)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def test_the_folder_of_a_job_without_a_row_is_swept(registry: Registry, storage: JobFolders) -> None:
    kept = add_job(registry, storage, "paused")
    orphan = storage.job("ftjob-unknown")
    (orphan / "checkpoints").mkdir(parents=True)
    asyncio.run(followed(registry, storage, lambda: not orphan.exists()))
    assert kept.exists()


@pytest.mark.parametrize(
    ("state", "facts"),
    [("paused", {}), ("failed", {"error": TrainingFailure("disk_full", "no space")})],
)
def test_a_job_that_another_server_cancels_leaves_nothing(
    registry: Registry, storage: JobFolders, state: str, facts: dict[str, Any]
) -> None:
    folder = add_job(registry, storage, state, **facts)
    looks = 0

    def gone_once_it_is_cancelled() -> bool:
        nonlocal looks
        looks += 1
        if looks == 20:
            assert folder.exists()
            registry.training.move(JOB, "cancelled", (state,))  # type: ignore[arg-type]
        return not folder.exists()

    asyncio.run(followed(registry, storage, gone_once_it_is_cancelled))


class _Held:
    """A registry's jobs, whose rows are read only once `goes_on` is set."""

    def __init__(self, records: Any) -> None:
        self.asked, self.goes_on = threading.Event(), threading.Event()
        self._records = records

    def job(self, tenant: str, job_id: str) -> Any:
        self.asked.set()
        assert self.goes_on.wait(60)
        return self._records.job(tenant, job_id)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)


def test_a_job_whose_engine_dies_while_it_is_read_waits_for_the_next_one(
    registry: Registry, storage: JobFolders
) -> None:
    add_job(registry, storage, "queued")
    records = _Held(registry.training)

    async def look() -> None:
        base: Any = None
        pool = _pool(registry, storage)
        pool.sampler, pool.records = None, records
        peers = Peers(registry.servers, storage.server, storage.lock_id)
        scheduler = JobScheduler(pool, peers, most=1, look_seconds=60.0)
        scheduler.base_ready(base, b"", -1)
        task = asyncio.get_running_loop().create_task(scheduler.follow())
        await asyncio.to_thread(records.asked.wait, 60)
        await scheduler.engine_gone()
        records.goes_on.set()
        scheduler.look()
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert not scheduler.running
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    asyncio.run(look())
    assert registry.training.job("default", JOB).state == "queued"


def _pool(registry: Registry, storage: JobFolders) -> Any:
    threads = Threads("records", 2)
    library: Any = SimpleNamespace(catalog=[])
    return SimpleNamespace(
        records=registry.training,
        threads=threads,
        notifier=JobNotifier(),
        folders=storage,
        files=_files(registry, storage, threads),
        checkpoints=CheckpointModels(library, registry.training, threads, storage),
        kept=_kept(registry, storage, threads),
    )


def test_an_earlier_dead_process_of_a_folder_is_not_taken_for_one_that_renews_its_lease(
    registry: Registry, storage: JobFolders
) -> None:
    async def start() -> None:
        peers, renew = Peers(registry.servers, "s1", storage.lock_id), registry.servers.renew
        peers._lease = 0.01
        for process, seconds in (("other.1", 0.5), ("other.2", 60.0)):
            renew(process, "s1", runs=True, room=1, seconds=seconds)
        claiming = asyncio.get_running_loop().create_task(peers.claim(room=0))
        await asyncio.sleep(0.05)
        registry.servers.leave("other.2")
        await claiming
        assert peers.owns_jobs

    asyncio.run(asyncio.wait_for(start(), 60))


def test_a_server_whose_registry_takes_no_lease_serves_and_runs_jobs_once_it_does(
    registry: Registry, storage: JobFolders
) -> None:
    async def start() -> None:
        peers = Peers(registry.servers, storage.server, storage.lock_id)
        pool = _pool(registry, storage)
        scheduler = JobScheduler(pool, peers, most=0, look_seconds=600.0)
        with registry._database.write_uncounted() as session:
            session.execute(text("ALTER TABLE servers RENAME TO away"))
        assert not await scheduler.claim()
        assert not peers.owns_jobs
        with registry._database.write_uncounted() as session:
            session.execute(text("ALTER TABLE away RENAME TO servers"))
        assert await scheduler.claim()
        assert peers.owns_jobs

    asyncio.run(asyncio.wait_for(start(), 60))


def test_a_server_that_stood_still_while_a_copy_of_its_folder_began_ends_and_leaves_the_copy_s_jobs_alone(
    registry: Registry, storage: JobFolders
) -> None:
    add_job(registry, storage, "queued")

    async def stand_still() -> None:
        pool = _pool(registry, storage)
        peers = Peers(registry.servers, storage.server, storage.lock_id)
        peers._lease = 0.0
        scheduler = JobScheduler(pool, peers, most=0, look_seconds=600.0)
        assert await scheduler.claim()
        begin = asyncio.get_running_loop().create_task
        following = begin(scheduler.follow())
        while JOB not in scheduler._noted_disabled:
            await asyncio.sleep(0.01)
        registry.servers.renew("copy.1", storage.server, runs=True, room=1, seconds=60.0)
        registry.training.move(JOB, "running", ("queued",))
        keeping = begin(peers.keep(scheduler))
        with pytest.raises(ServerIdInUseError):
            await asyncio.wait_for(following, 60)
        keeping.cancel()

    asyncio.run(asyncio.wait_for(stand_still(), 60))
    assert registry.training.job("default", JOB).state == "running"


class _Failing:
    """A registry's jobs, of which the first looks fail as nobody expects."""

    def __init__(self, records: Any, times: int) -> None:
        self.times = times
        self._records = records

    def open_jobs(self, server: str) -> Any:
        self.times -= 1
        if self.times >= 0:
            raise ValueError("a row that cannot be read")
        return self._records.open_jobs(server)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._records, name)


def test_a_failure_that_nobody_expects_does_not_end_the_jobs(
    registry: Registry, storage: JobFolders, caplog: pytest.LogCaptureFixture
) -> None:
    add_job(registry, storage, "queued")
    records = _Failing(registry.training, times=2)

    def told() -> bool:
        job = registry.training.job("default", JOB)
        return any("--train-jobs 0" in event.message for event in registry.training.events(job, limit=5))

    asyncio.run(followed(registry, storage, told, records=records))
    assert told()
    assert "a row that cannot be read" in caplog.text


class _Broken:
    """A run that ends without a word, as when the registry is away: its job is still called running."""

    kind, delivering, stopping, computes = "train", False, False, False

    def __init__(self, pool: Any, job: Any, kind: str, base: Any) -> None:
        self.job = job
        self._records = pool.records

    def begin(self) -> None:
        self.task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        self._records.move(self.job.id, "running", ("queued",))


def test_a_run_that_broke_off_is_not_told_as_a_start_of_the_server(
    registry: Registry, storage: JobFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase_server.jobs.scheduler.JobRun", _Broken)
    add_job(registry, storage, "running")

    def told() -> list[str]:
        job = registry.training.job("default", JOB)
        return [event.message for event in registry.training.events(job, limit=100)][::-1]

    asyncio.run(followed(registry, storage, lambda: len(told()) >= 3, most=1))
    assert told()[1:3] == [
        "The server was started again; the job continues from its beginning.",
        "The registry was away; the job continues from its beginning.",
    ]


def _of_a_dead_server(registry: Registry, storage: JobFolders, sha256: str, **facts: Any) -> None:
    """A job that trained on a server whose lease has run out."""
    records, file = registry.training, "file-1"
    records.add_file(FileRecord(file, "default", "gone", "fine-tune", "a.jsonl", 1, 1.0, sha256))
    job = NewJob(JOB, "default", "gone", "orders", file, None, "never", {}, {})
    records.add_job(job, JobEvent(1.0, "made"))
    records.move(JOB, "running", ("validating_files",), **facts)
    registry.servers.renew("process", "gone", runs=True, room=1, seconds=-100.0)


def test_a_job_that_was_lost_with_too_many_servers_fails_and_can_be_resumed(
    registry: Registry, storage: JobFolders
) -> None:
    content = Store(str(storage.root / "store"), storage.root / "cache").add_bytes(b"rows")
    _of_a_dead_server(registry, storage, content.sha256, deaths=3)
    records = registry.training
    asyncio.run(followed(registry, storage, lambda: records.job("default", JOB).ended, most=1))
    job = records.job("default", JOB)
    assert (job.server, job.error_code, job.deaths) == (storage.server, "trainer_died", 4)
    assert is_resumable(job.state, job.error_code)


def test_a_job_whose_files_another_store_has_is_left_to_its_server(
    registry: Registry, storage: JobFolders, caplog: pytest.LogCaptureFixture
) -> None:
    _of_a_dead_server(registry, storage, "0" * 64)
    asyncio.run(followed(registry, storage, lambda: "--store" in caplog.text, most=1))
    job = registry.training.job("default", JOB)
    assert (job.server, job.state) == ("gone", "running")


async def checked(
    registry: Registry, *problems: Exception, stop: bool = False, pause: float = 0.0
) -> tuple[TrainingJob, list[str]]:
    """A job whose check finds these problems, one each time that it asks for its files; and what it told."""
    left, asked = list(problems), asyncio.Event()

    async def train_job(job: Any, store: Any) -> Any:
        asked.set()
        raise left.pop(0) if len(left) > 1 else left[0]

    records = registry.training
    pool: Any = SimpleNamespace(
        sampler=None,
        records=records,
        threads=Threads("records", 2),
        notifier=JobNotifier(),
        train_job=train_job,
        tracing=Tracing(),
    )
    run = JobRun(pool, records.job("default", JOB), "check", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_run, "BACKOFF", Backoff(pause, pause))
        run.begin()
        if stop:
            await asyncio.wait_for(asked.wait(), 60)
            records.move(JOB, "paused", ("validating_files",))
            run.stop("pause", 60.0)
        await run.ended()
    job = records.job("default", JOB)
    return job, [event.message for event in records.events(job, limit=9)]


def test_a_job_waits_for_a_store_that_is_away_for_a_moment(registry: Registry, storage: JobFolders) -> None:
    add_job(registry, storage, "validating_files")
    away = StoreError("the bucket does not answer")
    job, _ = asyncio.run(checked(registry, away, away, FileGoneError("training_file", "It is gone.")))
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("file_not_found", "training_file")


@pytest.mark.parametrize(
    ("problem", "code"),
    [(StoreError("the bucket does not answer"), "store_unavailable"), (StoreFullError("no"), "disk_full")],
)
def test_a_job_whose_files_the_store_does_not_give_fails_and_can_be_resumed(
    registry: Registry, storage: JobFolders, problem: StoreError, code: str
) -> None:
    add_job(registry, storage, "validating_files")
    job, _ = asyncio.run(checked(registry, problem))
    assert (job.state, job.error_code) == ("failed", code)
    assert is_resumable(job.state, job.error_code)


def test_a_job_that_waits_for_the_store_can_be_paused(registry: Registry, storage: JobFolders) -> None:
    add_job(registry, storage, "validating_files")
    job, told = asyncio.run(checked(registry, StoreError("away"), stop=True, pause=3600.0))
    assert job.state == "paused"
    assert told[0].startswith("Paused.")


def test_another_server_gets_what_was_computed_before_the_first_step_with_a_checkpoint(
    tmp_path: Path,
) -> None:
    step = tmp_path / "checkpoints/step-00000002"
    step.mkdir(parents=True)
    (tmp_path / "checkpoints/references.json").write_text("{}")
    job = UnkeptJob("ftjob-1", 2, step.name, trained=False)
    assert _files_of(tmp_path, job) == {}
    (step / "state.json").write_text("{}")
    assert _files_of(tmp_path, job).keys() == {
        "checkpoints/step-00000002/state.json",
        "checkpoints/references.json",
    }
