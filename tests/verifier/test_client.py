"""What becomes of jobs and processes when a verifier dies, hangs, is stopped or loses its api."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from tests.priorities import assert_behind
from tests.verifier.conftest import FAULTY, Bench, Published, new_client

from onebase_adapters.format.canonical import CONFIG_FILE, WEIGHTS_FILE
from onebase_adapters.proof.verifier import Verifier
from onebase_adapters.store.blobs import AdapterFiles
from onebase_adapters.store.store import GRACE, Store
from onebase_edge.background import Backoff
from onebase_engine.base import manifest as wire
from onebase_engine.engine.messages import FrameReader, Shutdown, encode
from onebase_engine.machine import PROVING
from onebase_server.processes import verifier
from onebase_server.processes import verifier_client as module
from onebase_server.processes.time_share import BusyFlag
from onebase_server.processes.trainer_client import TrainerClient
from onebase_server.processes.verifier_client import (
    ATTEMPTS,
    OnProgress,
    Proof,
    RejectedError,
    VerifierClient,
    VerifierGoneError,
    _Place,
)
from onebase_server.processes.verifier_protocol import (
    Alive,
    Attach,
    Attached,
    Merge,
    Prove,
    Proved,
    Rejected,
    VersionStage,
    from_verifier_decoder,
    scratch_folder,
)

SCRIPTED = Path(__file__).parents[1] / "server" / "scripted_verifier.py"
PATIENCE = 240
"""Seconds before a test gives up; passing tests never wait for it."""


def killer(bench: Bench, times: int) -> Callable[[VersionStage], None]:
    """Kill the process, `times` in all, when it says that it is proving."""
    killed: list[int] = []

    def on_progress(progress: VersionStage) -> None:
        pid = bench.verifier.pid
        if progress.stage == "proving" and pid is not None and pid not in killed and len(killed) < times:
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    return on_progress


def gone(pid: int | None) -> bool:
    assert pid is not None
    return not Path(f"/proc/{pid}").exists()


def test_a_job_whose_process_is_killed_is_proven_by_the_next_one(bench: Bench, adapter: Path) -> None:
    first, deaths = bench.verifier.pid, bench.verifier.deaths
    assert first is not None
    assert scratch_folder(first).exists()
    assert bench.prove(bench.job(adapter), killer(bench, times=1)).report.proof.exact
    assert bench.verifier.deaths == deaths + 1
    assert gone(first)
    assert not scratch_folder(first).exists()


def test_a_job_that_ends_its_process_twice_is_rejected_and_the_next_one_is_proven(
    bench: Bench, adapter: Path
) -> None:
    job, deaths = bench.job(adapter), bench.verifier.deaths
    with pytest.raises(RejectedError, match="SIGKILL") as rejected:
        bench.prove(job, killer(bench, times=2))
    assert rejected.value.code == "proof_crashed"
    assert not Path(job.packed_path).exists()
    assert bench.verifier.deaths == deaths + 2
    assert bench.prove(bench.job(adapter)).report.proof.exact


def test_a_process_that_died_while_nobody_asked_is_replaced(bench: Bench, adapter: Path) -> None:
    pid = bench.verifier.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert bench.prove(bench.job(adapter)).report.proof.exact
    assert bench.verifier.pid != pid


def test_jobs_are_proven_one_after_the_other_in_their_order(bench: Bench, adapter: Path) -> None:
    jobs = [bench.job(adapter) for _ in range(3)]
    seen: list[str] = []

    async def all_at_once() -> list[Proved]:
        proofs = [bench.verifier.ask(job, lambda progress: seen.append(progress.digest)) for job in jobs]
        return await asyncio.gather(*proofs)

    assert [proved.digest for proved in bench.run(all_at_once())] == [job.digest for job in jobs]
    assert list(dict.fromkeys(seen)) == [job.digest for job in jobs]
    assert seen == sorted(seen)


def test_cancelling_a_job_ends_its_process_and_spares_the_others(bench: Bench, adapter: Path) -> None:
    pid = bench.verifier.pid

    async def cancel_the_first() -> Proved:
        proving = asyncio.Event()
        hanging = bench.job(adapter, fault="hangs")
        first = asyncio.ensure_future(bench.verifier.ask(hanging, lambda progress: proving.set()))
        await proving.wait()
        second = asyncio.ensure_future(bench.verifier.ask(bench.job(adapter), lambda progress: None))
        await asyncio.sleep(0)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        return await second

    assert bench.run(cancel_the_first()).report.proof.exact
    assert gone(pid)


def test_a_job_that_takes_too_long_is_rejected_and_the_next_one_is_proven(
    bench: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid, job = bench.verifier.pid, bench.job(adapter, fault="hangs")
    with monkeypatch.context() as hasty:
        hasty.setattr(bench.verifier, "_proof_timeout", 1.0)
        with pytest.raises(RejectedError, match="within 1 s") as rejected:
            bench.prove(job)
    assert rejected.value.code == "proof_timeout"
    assert gone(pid)
    assert not Path(job.packed_path).exists()
    assert bench.prove(bench.job(adapter)).report.proof.exact


def test_a_process_that_is_stopped_is_replaced_and_its_jobs_are_proven(
    bench: Bench, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.verifier, "_silence", 10.0)
    stopped, deaths = bench.verifier.pid, bench.verifier.deaths
    assert stopped is not None

    def stop(progress: VersionStage) -> None:
        if progress.stage == "proving" and bench.verifier.pid == stopped:
            os.kill(stopped, signal.SIGSTOP)

    async def both() -> list[Proved]:
        jobs = [bench.job(adapter), bench.job(adapter)]
        return await asyncio.gather(*(bench.verifier.ask(job, stop) for job in jobs))

    assert [proved.report.proof.exact for proved in bench.run(both())] == [True, True]
    assert gone(stopped)
    assert not scratch_folder(stopped).exists()
    assert bench.verifier.deaths == deaths + 1


def test_stopping_ends_the_process_and_every_job_at_once_and_the_next_engine_has_another(
    bench: Bench, adapter: Path
) -> None:
    pid = bench.verifier.pid

    async def stop_while_proving() -> list[Any]:
        proving = asyncio.Event()
        jobs = [bench.job(adapter, fault="hangs"), bench.job(adapter)]
        running = [
            asyncio.ensure_future(bench.verifier.ask(job, lambda progress: proving.set())) for job in jobs
        ]
        await proving.wait()
        await bench.verifier.engine_gone()
        return await asyncio.gather(*running, return_exceptions=True)

    assert [type(end) for end in bench.run(stop_while_proving())] == [VerifierGoneError] * 2
    assert gone(pid)
    assert bench.verifier.pid is None
    with pytest.raises(VerifierGoneError, match="no verifier"):
        bench.prove(bench.job(adapter))
    bench.start()
    assert bench.prove(bench.job(adapter)).report.proof.exact


def test_a_base_that_cannot_be_attached_is_told_with_the_reason(published: Published, tmp_path: Path) -> None:
    bench = Bench(published, new_client(tmp_path), tmp_path)
    plan = wire.decode(published.manifest)
    names = {name: number for name, number in plan.names.items() if "inv_freq" not in name}
    manifest = wire.encode(msgspec.structs.replace(plan, names=names))
    with pytest.raises(VerifierGoneError, match="inv_freq"):
        bench.run(bench.verifier.attach(published.config, manifest, published.fd))
    assert bench.verifier.pid is None
    bench.close()


def test_a_command_that_is_no_verifier_is_given_up(published: Published, tmp_path: Path) -> None:
    async def start() -> None:
        verifier = new_client(tmp_path, "-c", "raise SystemExit(7)")
        await verifier.attach(published.config, published.manifest, published.fd)

    with pytest.raises(VerifierGoneError, match="exit status 7"):
        asyncio.run(start())


def test_a_verifier_for_which_there_are_no_processes_is_gone(published: Published, tmp_path: Path) -> None:
    async def start() -> None:
        verifier = new_client(tmp_path, command=[str(tmp_path / "none")])
        await verifier.attach(published.config, published.manifest, published.fd)

    with pytest.raises(VerifierGoneError, match="cannot be started"):
        asyncio.run(start())


# ---- a second process ------------------------------------------------------------------------


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two cores, and memory for two processes."""
    monkeypatch.setattr(module, "free_host_memory", lambda: 8 << 30)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


class Crowd:
    """Many jobs at once, of scripted processes that have a thread each."""

    def __init__(self, published: Published, folder: Path, behaviour: str = "threaded") -> None:
        self.file = folder / "jobs"
        self.client = new_client(folder, str(SCRIPTED), f"{behaviour}={self.file}", help_seconds=0.3)
        self.published, self.folder, self.jobs = published, folder, 0
        files = stored_version(self.client)
        self.paths = [str(self.client._store.local(blob.sha256)) for blob in (files.config, files.weights)]
        self.on_progress: Callable[[VersionStage, _Place], None] = lambda progress, place: None

    async def start(self) -> int:
        await self.client.attach(self.published.config, self.published.manifest, self.published.fd)
        self.file.unlink(missing_ok=True)
        assert self.client.pid is not None
        return self.client.pid

    async def prove(self) -> str:
        """One job: `Proved`, or the name of the error."""
        self.jobs += 1
        job = Prove(
            digest=f"{self.jobs:064x}", config_path=self.paths[0], weights_path=self.paths[1],
            packed_path=str(self.folder / f"{self.jobs}.packed"), probes=[], probe_tokens=1,
        )  # fmt: skip

        def heard(progress: VersionStage) -> None:
            place = next(place for place in self.client._places if place.on_progress is heard)
            self.on_progress(progress, place)

        try:
            return type(await self.client.ask(job, heard)).__name__
        except (VerifierGoneError, RejectedError) as error:
            return type(error).__name__

    async def prove_all(self, jobs: int) -> set[str]:
        return set(await asyncio.gather(*(self.prove() for _ in range(jobs))))

    async def prove_until(self, over: Callable[[], bool]) -> set[str]:
        """Always so many at once that some wait for help."""

        async def ask() -> set[str]:
            ends = set[str]()
            while not over():
                ends.add(await self.prove())
            return ends

        return set().union(*await asyncio.gather(*(ask() for _ in range(module.BACKLOG + 4))))

    @property
    def had_jobs(self) -> set[int]:
        """The processes that had any since the start."""
        return set(map(int, self.file.read_text().split())) if self.file.exists() else set()

    async def alone(self) -> None:
        """Wait until no second process is left."""
        while self.client._helper is not None:
            await asyncio.sleep(0.01)


def run_crowd(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, PATIENCE))


@pytest.mark.usefixtures("roomy")
def test_a_second_process_helps_while_many_wait_and_ends_when_it_has_no_job(
    published: Published, tmp_path: Path
) -> None:
    async def crowd_comes_twice() -> None:
        crowd = Crowd(published, tmp_path)
        first = await crowd.start()
        for _ in range(2):
            crowd.file.unlink(missing_ok=True)
            assert await crowd.prove_until(lambda: len(crowd.had_jobs) == 2) == {"Proved"}
            (second,) = crowd.had_jobs - {first}
            await crowd.alone()
            assert crowd.client.pids == [first]
            assert gone(second)
            assert not scratch_folder(second).exists()
        assert crowd.client.deaths == 0
        await crowd.client.engine_gone()
        assert gone(first)

    run_crowd(crowd_comes_twice())


@pytest.mark.usefixtures("roomy")
def test_those_that_wait_for_the_first_process_get_a_second_one_too(
    published: Published, tmp_path: Path
) -> None:
    async def all_are_there_already() -> None:
        crowd = Crowd(published, tmp_path)
        starting = asyncio.ensure_future(crowd.start())
        while not crowd.client.has_base:
            await asyncio.sleep(0)
        jobs = asyncio.ensure_future(crowd.prove_all(40))
        await starting
        while crowd.client._helper is None:
            assert not jobs.done()
            await asyncio.sleep(0)
        assert await jobs == {"Proved"}
        await crowd.client.engine_gone()

    run_crowd(all_are_there_already())


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("lacks", ["a crowd", "memory", "cores"])
def test_one_process_proves_alone_where_few_wait_or_there_is_no_room(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    if lacks == "memory":
        base = os.fstat(published.fd).st_size
        monkeypatch.setattr(module, "free_host_memory", lambda: module.HELP_BYTES + base - 1)
    elif lacks == "cores":
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})

    async def jobs_come() -> None:
        crowd = Crowd(published, tmp_path)
        first = await crowd.start()
        assert await crowd.prove_all(1 + module.BACKLOG + (lacks != "a crowd")) == {"Proved"}
        assert crowd.client._helper is None
        assert crowd.had_jobs == {first}
        await crowd.client.engine_gone()

    run_crowd(jobs_come())


@pytest.mark.usefixtures("roomy")
def test_all_is_proved_by_one_process_where_a_second_cannot_attach_the_base(
    published: Published, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def jobs_come() -> None:
        crowd = Crowd(published, tmp_path, "lonely")
        await crowd.start()
        crowd.file.touch()
        told = "no second verifier helps"
        assert await crowd.prove_until(lambda: told in caplog.text) == {"Proved"}
        assert await crowd.prove_all(module.BACKLOG + 2) == {"Proved"}
        assert crowd.client._helper is None
        await crowd.client.engine_gone()
        assert caplog.text.count(told) == 1

    run_crowd(jobs_come())


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("when", ["the second starts", "both prove"])
def test_an_engine_that_ends_takes_both_processes_with_it_and_the_next_one_has_its_own(
    published: Published, tmp_path: Path, when: str
) -> None:
    async def lose_the_engine() -> None:
        crowd = Crowd(published, tmp_path)
        await crowd.start()
        over = asyncio.Event()
        ends = asyncio.ensure_future(crowd.prove_until(over.is_set))
        while len(crowd.client.pids if when == "the second starts" else crowd.had_jobs) < 2:
            await asyncio.sleep(0.001)
        pids = crowd.client.pids
        over.set()
        await crowd.client.engine_gone()
        assert "VerifierGoneError" in await ends
        assert all(map(gone, pids))
        assert crowd.client.pids == []
        await crowd.start()
        assert await crowd.prove_until(lambda: len(crowd.had_jobs) == 2) == {"Proved"}
        await crowd.client.engine_gone()
        assert crowd.client.pids == []

    run_crowd(lose_the_engine())


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize("dies", ["the first", "the second"])
def test_what_dies_beside_another_is_proved_all_the_same_and_from_then_on_one_proves_alone(
    published: Published, tmp_path: Path, dies: str
) -> None:
    async def kill_one() -> None:
        crowd = Crowd(published, tmp_path, "steady")
        await crowd.start()
        job, killed = list[str](), list[int]()

        def kill(progress: VersionStage, place: _Place) -> None:
            """While both prove; the first at the same job as often as rejects one that is proved alone."""
            assert place.process is not None
            begins = (place is crowd.client._helper) == (dies == "the second") and len(crowd.had_jobs) == 2
            if not job and begins:
                job.append(progress.digest)
            most = ATTEMPTS if dies == "the first" else 1
            if progress.digest in job and place.process.pid not in killed and len(killed) < most:
                killed.append(place.process.pid)
                os.kill(killed[-1], signal.SIGKILL)

        crowd.on_progress = kill
        assert await crowd.prove_until(lambda: bool(killed)) == {"Proved"}
        assert crowd.client.deaths == len(killed)
        await crowd.alone()
        crowd.file.unlink()
        assert await crowd.prove_all(module.BACKLOG + 2) == {"Proved"}
        assert len(crowd.had_jobs) == 1
        await crowd.client.engine_gone()

    run_crowd(kill_one())


# ---- from files to a packed adapter ------------------------------------------------------------


def stored_version(client: VerifierClient, content: bytes = b"weights") -> AdapterFiles:
    with client._store.writer() as config, client._store.writer() as weights:
        config.write(b"{}")
        weights.write(content)
        return AdapterFiles(config.commit(), weights.commit())


def test_content_that_two_ask_for_is_proved_once_and_both_hear_of_it(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def prove_twice() -> None:
        client = new_client(tmp_path, str(SCRIPTED), "slow")
        ask, jobs = client.ask, []

        def counted(job: Prove, on_progress: OnProgress, tenant: str) -> Any:
            jobs.append(job)
            return ask(job, on_progress, tenant)

        monkeypatch.setattr(client, "ask", counted)
        files, heard = stored_version(client), ([], [])
        client.base_ready(published.config, published.manifest, published.fd)
        proofs = [
            client.prove(
                files, tenant="one", allow_noop=False, wait_for_verifier=True, on_progress=stages.append
            )
            for stages in heard
        ]
        first, second = await asyncio.gather(*proofs)
        assert first is second
        assert client._store.local(first.packed.sha256).read_bytes() == b"weights"
        assert len(jobs) == 1
        assert [progress.stage for progress in heard[0]] == ["validating", "proving"]
        assert heard[1] == heard[0]
        await client.engine_gone()

    asyncio.run(asyncio.wait_for(prove_twice(), PATIENCE))


def test_one_who_waits_for_a_verifier_gets_the_proof_of_the_next_engine_whoever_began_it(
    published: Published, tmp_path: Path
) -> None:
    async def lose_the_engine() -> None:
        client = new_client(tmp_path, str(SCRIPTED), "slow", backoff=Backoff(0.01, 0.01))
        files, proving = stored_version(client), asyncio.Event()

        def on_progress(progress: VersionStage) -> None:
            if progress.stage == "proving":
                proving.set()

        def prove(*, wait: bool) -> asyncio.Task[Proof]:
            proof = client.prove(
                files, tenant="one", allow_noop=False, wait_for_verifier=wait, on_progress=on_progress
            )
            return asyncio.ensure_future(proof)

        hasty = prove(wait=False)
        await asyncio.sleep(0)
        patient = prove(wait=True)
        client.base_ready(published.config, published.manifest, published.fd)
        await proving.wait()
        await client.engine_gone()
        with pytest.raises(VerifierGoneError, match="engine ended"):
            await hasty
        client.base_ready(published.config, published.manifest, published.fd)
        assert (await patient).report["rank"] == 8
        await client.engine_gone()

    asyncio.run(asyncio.wait_for(lose_the_engine(), PATIENCE))


class Queue:
    """Jobs that wait for one process, whose first proof ends with `release`."""

    def __init__(self, published: Published, folder: Path, store: Store | None = None) -> None:
        self._blocked = folder / "blocked"
        self._blocked.touch()
        self.client = client = new_client(folder, str(SCRIPTED), f"held={self._blocked}", store=store)
        self.order: list[str] = []
        """Content of the jobs that the process had."""
        self._jobs: list[asyncio.Task[Any]] = []
        answer = client._answer

        def noted(place: _Place, base: Any, job: Prove | Merge, kind: Any) -> Any:
            source = job if isinstance(job, Prove) else job.parents[0]
            self.order.append(Path(source.weights_path).read_text())
            return answer(place, base, job, kind)

        client._answer = noted  # type: ignore[method-assign]
        client.base_ready(published.config, published.manifest, published.fd)

    async def prove(self, tenant: str, content: str) -> None:
        await self._add(self.proof(tenant, content))

    async def proof(self, tenant: str, content: str) -> None:
        files = stored_version(self.client, content.encode())
        await self.client.prove(
            files, tenant=tenant, allow_noop=False, wait_for_verifier=False, on_progress=lambda progress: None
        )

    async def merge(self, tenant: str, content: str) -> None:
        parents = [("parent", stored_version(self.client, content.encode()), 1.0)]
        await self._add(
            self.client.merge(parents, tenant=tenant, method="linear", density=None, sign="total", seed=0)
        )

    async def _add(self, job: Coroutine[Any, Any, object]) -> None:
        """Begin a job, and wait until the process has it or it waits in line."""
        self._jobs.append(asyncio.ensure_future(job))
        while not self.order or self.client._waiting < len(self._jobs) - 1:
            await asyncio.sleep(0.001)

    async def release(self) -> None:
        self._blocked.unlink()
        await asyncio.gather(*self._jobs)
        await self.client.engine_gone()


def test_tenants_take_turns_however_many_proofs_one_of_them_has_waiting(
    published: Published, tmp_path: Path
) -> None:
    async def work() -> list[str]:
        queue = Queue(published, tmp_path)
        for content in ("flood 1", "flood 2", "flood 3", "the same"):
            await queue.prove("flood", content)
        await queue.prove("one", "the same")
        await queue.prove("two", "two 1")
        await queue.merge("one", "one 2")
        await queue.release()
        return queue.order

    order = asyncio.run(asyncio.wait_for(work(), PATIENCE))
    assert order == ["flood 1", "the same", "two 1", "flood 2", "one 2", "flood 3", "the same"]


@pytest.mark.parametrize("url", ["{folder}/store", "memory://of-a-verifier"])
def test_waiting_jobs_keep_their_files_when_the_cache_drops_them_and_take_no_copy(
    published: Published, tmp_path: Path, url: str
) -> None:
    store = Store(url.format(folder=tmp_path), tmp_path / "cache", cache_bytes=0)
    cached, is_remote = store.scratch().parent / "blobs", url.startswith("memory")

    def files() -> list[Path]:
        return [path for path in store.scratch().rglob("*") if path.is_file()]

    async def work() -> None:
        queue = Queue(published, tmp_path, store)
        for tenant in ("one", "two"):
            await queue.prove(tenant, f"weights of {tenant}")
        await queue.merge("one", "merged weights")
        blobs = {path.stat().st_ino for path in cached.iterdir()}
        held = {path.stat().st_ino for path in files()}
        assert held >= blobs if is_remote else not held

        for path in (*cached.iterdir(), *files()):
            os.utime(path, (0, 0))
        newest = store.add_bytes(b"that the cache is too small for").sha256
        assert {path.name for path in cached.iterdir()} == {newest} or not is_remote
        assert store.sweep({path.name for path in cached.iterdir()}, GRACE) == 0

        await queue.release()
        assert files() == []

    asyncio.run(asyncio.wait_for(work(), PATIENCE))


def test_of_a_tenants_waiting_jobs_few_hold_files_and_other_tenants_jobs_do_too(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_HELD", 4)
    store = Store("memory://of-few", tmp_path / "cache", cache_bytes=0)

    async def work() -> None:
        queue = Queue(published, tmp_path, store)
        for content in ("flood 1", "flood 2"):
            await queue.prove("flood", content)
        late = asyncio.ensure_future(queue.proof("flood", "flood 3"))
        await queue.prove("one", "one 1")
        assert sum(path.is_file() for path in store.scratch().rglob("*")) == 3 * 2
        await queue.release()
        await late
        assert queue.order[:2] == ["flood 1", "one 1"]

    asyncio.run(asyncio.wait_for(work(), PATIENCE))


def test_files_that_a_killed_server_held_are_deleted_at_the_next_start(tmp_path: Path) -> None:
    left = new_client(tmp_path)._held_folder / "left"
    left.parent.mkdir()
    left.touch()
    new_client(tmp_path)
    assert not left.exists()


# ---- the process's own side ------------------------------------------------------------------


class Api:
    """The api's end of a socket to a verifier process, without the link."""

    def __init__(self, published: Published, *command: str) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(PATIENCE)
        options = ["--fd", str(theirs.fileno()), "--base-fd", str(published.fd)]
        self.process = subprocess.Popen(
            [sys.executable, *(command or ("-m", "onebase_server.processes", "verifier")), *options],
            pass_fds=[theirs.fileno(), published.fd],
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        self._frames, self._decoder = FrameReader(), from_verifier_decoder()
        self._messages: list[Any] = []
        self.send(Attach(config=published.config, manifest=published.manifest))

    def send(self, message: Attach | Prove | Shutdown) -> None:
        self.send_bytes(encode(message))

    def send_bytes(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self) -> Any:
        while not self._messages:
            data = self._socket.recv(1 << 16)
            assert data, "the verifier hung up"
            self._messages += [self._decoder.decode(payload) for payload in self._frames.feed(data)]
        return self._messages.pop(0)

    def wait_until_proving(self) -> None:
        while not (isinstance(message := self.receive(), VersionStage) and message.stage == "proving"):
            pass

    def hang_up(self) -> None:
        self._socket.close()

    def end(self) -> int:
        return self.process.wait(PATIENCE)


NewApi = Callable[..., Api]


@pytest.fixture
def new_api(published: Published) -> Iterator[NewApi]:
    made: list[Api] = []

    def new(*command: str) -> Api:
        made.append(Api(published, *command))
        return made[-1]

    yield new
    for api in made:
        api.process.kill()
        api.process.wait()


def test_the_verifier_steps_aside_in_the_session_of_the_engine(bench: Bench) -> None:
    assert bench.verifier.pid is not None
    assert_behind(bench.verifier.pid, PROVING)


def test_the_verifier_obeys_a_shutdown(new_api: NewApi) -> None:
    api = new_api()
    assert isinstance(api.receive(), Attached)
    pid = api.process.pid
    assert scratch_folder(pid).is_dir()
    api.send(Shutdown())
    assert api.end() == 0
    assert not scratch_folder(pid).exists()


def test_the_verifier_ends_in_the_middle_of_a_proof_when_its_api_hangs_up(
    new_api: NewApi, session_bench: Bench, adapter: Path
) -> None:
    api, job = new_api(), session_bench.job(adapter)
    api.send(job)
    api.wait_until_proving()
    api.hang_up()
    assert api.end() == 0
    assert not Path(job.packed_path).exists()
    assert not scratch_folder(api.process.pid).exists()


def test_a_job_that_hangs_gives_signs_of_life_and_the_verifier_ends_all_the_same(
    new_api: NewApi, session_bench: Bench, adapter: Path
) -> None:
    api = new_api(str(FAULTY))
    api.send(session_bench.job(adapter, fault="hangs"))
    api.wait_until_proving()
    for _ in range(3):
        while not isinstance(api.receive(), Alive):
            pass
    assert scratch_folder(api.process.pid).is_dir()
    api.hang_up()
    assert api.end() == 0
    assert not scratch_folder(api.process.pid).exists()


def test_bytes_that_are_no_message_end_the_process(new_api: NewApi) -> None:
    api = new_api()
    api.send_bytes(b"\x03\0\0\0\xc1\xc1\xc1")
    assert api.end() == 0


# ---- beside rows -------------------------------------------------------------------------------

YIELDING = (
    "import sys; from onebase_server.processes import verifier; verifier.SHARE = 0.0; "
    "sys.exit(verifier.main())"
)
"""The real verifier, with no time at all while rows run."""


def test_a_proof_waits_at_its_gate_while_rows_run_gives_signs_of_life_and_ends_when_they_have(
    published: Published, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, news = BusyFlag.make(), asyncio.Queue[VersionStage | Alive]()
    take_news = VerifierClient._take_news

    def told(client: VerifierClient, place: Any, message: Any) -> bool:
        if isinstance(message, VersionStage | Alive):
            news.put_nowait(message)
        return take_news(client, place, message)

    monkeypatch.setattr(VerifierClient, "_take_news", told)
    bench = Bench(published, new_client(tmp_path, "-c", YIELDING, busy_fd=busy.fd), tmp_path)

    async def prove() -> list[VersionStage | Alive]:
        busy.set(True)
        asked = asyncio.create_task(bench.verifier.ask(bench.job(adapter), lambda progress: None))
        waited = [await news.get() for _ in range(3)]
        busy.set(False)
        await asked
        return waited

    try:
        bench.start()
        first, *others = bench.run(prove())
        assert isinstance(first, VersionStage)
        assert all(isinstance(one, Alive) for one in others), others
    finally:
        bench.close()


def test_the_gate_is_passed_after_each_module_each_step_of_a_text_and_each_figure(
    published: Published, adapter: Path, tmp_path: Path
) -> None:
    passed: list[float] = []
    proven = Verifier(published.base, max_rank=32, base_id="").prove(
        adapter / CONFIG_FILE,
        adapter / WEIGHTS_FILE,
        tmp_path / "packed",
        probes=[[7, 8, 9], [5, 6]],
        probe_tokens=4,
        allow_noop=False,
        on_progress=lambda stage, part: passed.append(part),
    )
    proof, steps = proven.report.proof, 4
    assert len(passed) == 2 + proof.modules_compared + steps + proof.texts + len(proven.report.modules)
    assert passed == sorted(passed)


def test_verifiers_and_trainers_yield_to_the_engine_where_there_is_mps(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        f"import os, sys; open({str(tmp_path / 'said')!r}, 'a').write("
        "os.environ.get('CUDA_MPS_CLIENT_PRIORITY', 'none') + ' ')"
    )
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))

    async def start_both() -> None:
        verifier = new_client(tmp_path, "-c", program)
        with pytest.raises(VerifierGoneError):
            await verifier.attach(published.config, published.manifest, published.fd)
        await verifier.engine_gone()
        job: Any = Shutdown()
        trainer = await TrainerClient.start((sys.executable, "-c", program), job, {}, lambda event: None)
        await trainer.outcome()

    asyncio.run(start_both())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as daemon:
        daemon.bind(str(tmp_path / "control"))
        daemon.listen()
        asyncio.run(start_both())
    said = (tmp_path / "said").read_text().split()
    assert said == ["none"] * (len(said) // 2) + ["1"] * (len(said) // 2)
    assert len(said) == 2 * (ATTEMPTS + 1)


def test_a_result_that_cannot_be_written_is_a_refusal() -> None:
    sent: list[Any] = []

    class Wire:
        def send(self, message: Any) -> None:
            encode(message)
            sent.append(message)

    reply = Rejected(digest="abc", code="bad_config", message="\ud800")
    verifier._send(cast(Any, Wire()), reply)
    assert [(one.digest, one.code) for one in sent] == [("abc", "proof_error")]
