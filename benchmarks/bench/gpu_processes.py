"""The parts of the GPU check in which other processes share the engine's base.

`python -m bench.gpu_processes NAME FILE SETUP` is a part. `python -m bench.gpu_processes writes LIBRARY
DEVICE FD SIZE` writes to memory of another process, and prints what the driver says.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import random_base as bases
from bench.gpu_parts import BLOCK, Asked, Ledger, make_engine, serve, words
from bench.gpu_report import Findings, NotHereError, Setup, run_part
from bench.processes import tail
from bench.worker import Worker, started
from onebase_adapters.format.canonical import CONFIG_FILE, WEIGHTS_FILE
from onebase_adapters.store.store import Store
from onebase_edge.background import Threads
from onebase_engine.base.attach import publish
from onebase_engine.base.manifest import decode
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.memory_budget import verifier_bytes
from onebase_engine.engine.messages import EngineConfig
from onebase_engine.environment import mps_runs
from onebase_engine.machine import free_memory
from onebase_server.processes.job_memory import ROOM
from onebase_server.processes.time_share import BusyFlag
from onebase_server.processes.trainer_client import TRAINER_COMMAND, Died, TrainerClient
from onebase_server.processes.trainer_protocol import Check, FilesChecked, Train, Trained, TrainJob
from onebase_server.processes.verifier_client import VerifierClient
from onebase_server.processes.verifier_protocol import Prove, Proved
from onebase_training import events

ROOT = Path(__file__).resolve().parents[2]
IDLE = "nothing, while the engine rests"
"""Phase in which the engine computes no step."""
START_SECONDS = 170.0
"""Limit, in seconds, for the engine to make its base, compile its kernels and answer once."""
ROOMY = 32e9
"""Bytes that are free beside the engine, from which on eight samples of 1,024 tokens are trained at once; on
a smaller card two are."""
TESTS = (
    "tests/engine/test_oracle.py",
    "tests/engine/test_isolation.py",
    "tests/engine/test_kinds.py",
    "tests/adapters/test_view.py",
    "tests/adapters/test_loader.py",
)
"""Test files that take their device from ONEBASE_TEST_DEVICE."""


# ---- the engine beside which the others work ------------------------------------------------------


def host(device: str, shape: str, folder: str, base_fd: int | None) -> Callable[[str], dict[str, Any]]:
    """Publish a random base and serve on it, again and again: a worker's function.

    Returns what begins a phase and gives the steps of the one before it.
    """
    setup = Setup(device, shape, Path(folder))
    base = bases.random_base(setup.folder / "base", torch.device(device))
    manifest = publish(base, base_fd)
    rows, prompt, tokens = (2, 4, 4) if setup.interpreted else (16, 100, 100)
    blocks = RESERVED_BLOCKS + 8 + rows * (-(-(prompt + tokens) // BLOCK) + 1)
    engine = make_engine(setup, base, None, blocks=blocks, slots=8)
    for number in range(2 if setup.interpreted else 8):
        engine.put_adapter(f"a{number}", bases.random_adapter(base, 4 if setup.interpreted else 16, number))
    names = sorted(engine.versions.weights)
    asked = [
        Asked(str(row), words(setup, prompt, row), tokens, ((names[row % len(names)], 1.0),), logprobs=None)
        for row in range(rows)
    ]
    serve(engine, [replace(one, tokens=4) for one in asked], len(asked))  # compiles, and fills slots
    phases: queue.SimpleQueue[str] = queue.SimpleQueue()
    ended: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def begin(phase: str) -> dict[str, Any]:
        phases.put(phase)
        return ended.get()

    def serving() -> None:
        texts: dict[str, Any] = {}
        first: dict[str, Any] = {}
        seconds: list[float] = []
        rounds = wrong = made = 0
        phase = ""
        about: dict[str, Any] = {"manifest": manifest.hex(), "kernels": engine.model.kernels.name}
        about["load"] = f"{rows} rows, {len(names)} adapters"
        about["segments"] = len(decode(manifest).storages) if manifest else 0
        about["verifier"] = verifier_bytes(base)
        while True:
            if not engine.busy:
                first = first or texts
                rounds, wrong = rounds + bool(texts), wrong + (bool(texts) and texts != first)
                texts = {}
            if not engine.busy and phase == IDLE:
                time.sleep(0.02)
            else:
                if not engine.busy:
                    if setup.interpreted:
                        time.sleep(0.1)  # the others have no other device
                    texts = {one.name: [] for one in asked}
                    for one in asked:
                        engine.submit(one.message())
                began = time.perf_counter()
                engine.step()
                seconds.append(time.perf_counter() - began)
            for output in engine.take_outputs():
                texts[output.id] += [output.error_message] if output.error_message else output.tokens
                made += len(output.tokens)
            if not phases.empty():
                engine.check_base()
                counts = {"steps": len(seconds), "rounds": rounds, "wrong": wrong, "tokens": made}
                p50, p99, longest = np.percentile(seconds, (50, 99, 100)) if seconds else (0.0,) * 3
                times = {"p50": p50, "p99": p99, "longest": longest, "seconds": sum(seconds)}
                ended.put({"phase": phase, **about, **counts, **times})
                seconds, phase, rounds, wrong, made = [], phases.get(), 0, 0, 0

    def serving_or_none() -> None:
        try:
            serving()
        finally:
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=serving_or_none, daemon=True).start()
    return begin


class Host:
    """The engine's process, from the outside; its phases are the rows of a table."""

    def __init__(self, setup: Setup, found: Findings, worker: Worker, fd: int | None) -> None:
        self._timed, self._found, self._worker = not setup.interpreted, found, worker
        self.fd, self.process = fd, worker.process
        self.manifest = b""
        self.verifier_bytes = 0
        """Bytes that a server sets aside for a verifier."""
        self._alone: float | None = None
        """Tokens a second of the first phase, in which nothing else computes."""

    async def begin(self, phase: str) -> None:
        """Begin a phase; the one before it goes into the table. Its rows get the texts that they got first.

        Raises TimeoutError, or EOFError if the engine's process has ended.
        """
        ended = await asyncio.wait_for(self._worker.ask(phase), START_SECONDS)
        if not self.manifest:
            self.manifest, self.verifier_bytes = bytes.fromhex(ended["manifest"]), ended["verifier"]
            self._found.figure("the engine's kernels", ended["kernels"])
            self._found.figure("the processes share the GPU by", "MPS" if mps_runs() else "time slices")
            self._found.figure("segments of memory that hold the base", ended["segments"])
            headings = ("beside", "steps", "tokens/s", "of those alone", "ms p50", "p99", "longest")
            self._add = self._found.table(f"The engine's steps, {ended['load']}", headings)
            return
        timed = self._timed and ended["steps"] > 0
        times = [ended[one] * 1e3 if timed else None for one in ("p50", "p99", "longest")]
        rate = ended["tokens"] / ended["seconds"] if timed else None
        self._alone = self._alone or rate
        part = rate / self._alone if rate and self._alone else None
        self._add(ended["phase"], ended["steps"], rate, part, *times)
        title = f"{ended['phase']}: rows get the texts that they got first"
        self._found.check(title, not ended["wrong"], f"{ended['rounds']} rounds")

    async def last(self, seconds: float, least: int) -> None:
        """Let the phase go on for so long."""
        await asyncio.sleep(seconds if self._timed else least * 0.2)


@contextlib.asynccontextmanager
async def hosted(setup: Setup, found: Findings) -> AsyncIterator[Host]:
    """Run an engine in a process of its own, whose base can be attached. Raises StartError."""
    bases.write_folder(setup.shape, setup.folder / "base")
    fd = os.memfd_create("gpu-check-base") if setup.device == "cpu" else None
    fds = () if fd is None else (fd,)
    keywords = {"device": setup.device, "shape": setup.shape, "folder": str(setup.folder), "base_fd": fd}
    log = setup.folder / "host.log"
    function = "bench.gpu_processes:host"
    try:
        async with started(function, keywords, log, pass_fds=fds, seconds=START_SECONDS) as worker:
            yield Host(setup, found, worker, fd)
    except EOFError:
        raise RuntimeError(f"the engine's process has ended:\n{tail(log)}") from None
    finally:
        for one in fds:
            os.close(one)


# ---- memory that another process may only read ---------------------------------------------------


class _Place(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("place", _Place),
        ("metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("place", _Place), ("flags", ctypes.c_int))


_MAY_WRITE = "it may write"


class DriverError(Exception):
    """The driver refused a call; the message is the call and the driver's name of the error."""


class Driver:
    """CUDA's driver, as far as it maps memory of other processes.

    torch maps it by cudaIpcOpenMemHandle, always to be written to. Whether a mapping that may only be read
    keeps writes out, only a GPU can tell.
    """

    READS, WRITES = 1, 3
    """CU_MEM_ACCESS_FLAGS_PROT_READ and _READWRITE."""
    _ON_DEVICE, _PINNED, _FILE = 1, 1, 1

    def __init__(self, library: str, device: int) -> None:
        self._library, self._place = ctypes.CDLL(library), _Place(self._ON_DEVICE, device)
        context = ctypes.c_void_p()
        self("cuInit", 0)
        self("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self("cuCtxSetCurrent", context)

    def __call__(self, name: str, *given: Any) -> None:
        if code := getattr(self._library, name)(*given):
            told = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(told))
            raise DriverError(f"{name}: {(told.value or b'error').decode()} ({code})")

    def create(self) -> tuple[ctypes.c_uint64, int]:
        """Allocate as little as can be mapped; return its handle and its size."""
        how = _Properties(self._PINNED, self._FILE, self._place)
        size, handle = ctypes.c_size_t(), ctypes.c_uint64()
        self("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(how), 0)
        self("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(how), ctypes.c_uint64(0))
        return handle, size.value

    def export_file(self, handle: ctypes.c_uint64) -> int:
        """Return a file descriptor by which another process imports the memory."""
        fd = ctypes.c_int()
        self("cuMemExportToShareableHandle", ctypes.byref(fd), handle, self._FILE, ctypes.c_uint64(0))
        return fd.value

    def import_file(self, fd: int) -> ctypes.c_uint64:
        handle = ctypes.c_uint64()
        self("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(fd), self._FILE)
        return handle

    def map(self, handle: ctypes.c_uint64, size: int, flags: int) -> ctypes.c_uint64:
        """Return the address at which the memory is mapped, to be read or written to."""
        address, none, whole = ctypes.c_uint64(), ctypes.c_uint64(0), ctypes.c_size_t(size)
        access = _Access(self._place, flags)
        self("cuMemAddressReserve", ctypes.byref(address), whole, ctypes.c_size_t(0), none, none)
        self("cuMemMap", address, whole, ctypes.c_size_t(0), handle, none)
        self("cuMemSetAccess", address, whole, ctypes.byref(access), ctypes.c_size_t(1))
        return address

    def write(self, address: ctypes.c_uint64, word: int, size: int) -> None:
        self("cuMemsetD32_v2", address, ctypes.c_uint(word), ctypes.c_size_t(size // 4))
        self("cuCtxSynchronize")

    def read(self, address: ctypes.c_uint64) -> int:
        word = ctypes.c_uint()
        self("cuMemcpyDtoH_v2", ctypes.byref(word), address, ctypes.c_size_t(4))
        return word.value


def write_to_read_only(library: str = "libcuda.so.1", device: int = 0) -> tuple[str, bool]:
    """Let another process write to memory that it has mapped to be read.

    Returns:
        What the driver said to it, and whether the memory is as before.

    Raises:
        RuntimeError: the other process did not come to its write.
    """
    driver, word = Driver(library, device), 7
    handle, size = driver.create()
    address = driver.map(handle, size, Driver.WRITES)
    driver.write(address, word, size)
    fd = driver.export_file(handle)
    try:
        command = [
            sys.executable,
            "-m",
            "bench.gpu_processes",
            "writes",
            library,
            *map(str, (device, fd, size)),
        ]
        done = subprocess.run(command, pass_fds=(fd,), capture_output=True, text=True, timeout=300)
    finally:
        os.close(fd)
    said = (done.stdout.strip().splitlines() or [""])[-1]
    if said != _MAY_WRITE and not said.startswith("cu"):
        raise RuntimeError(f"exit status {done.returncode}: {(said or done.stderr)[-400:]}")
    return said, driver.read(address) == word


def _write(library: str, device: int, fd: int, size: int) -> str:
    """Map another process's memory to be read, and write to it; return what the driver says."""
    driver = Driver(library, device)
    address = driver.map(driver.import_file(fd), size, Driver.READS)
    word = driver.read(address)
    try:
        driver.write(address, word + 1, size)
    except DriverError as error:
        return str(error)
    return _MAY_WRITE


# ---- parts ---------------------------------------------------------------------------------------


def proof(setup: Setup, found: Findings) -> None:
    """Let another process attach the base and prove versions on it next to the engine, and kill each."""
    shutil.rmtree(setup.folder / "adapter", ignore_errors=True)
    asyncio.run(_proof(setup, found))
    if setup.device == "cuda":
        found.trying("a mapping that may only be read", _try_mapping, found)


def _try_mapping(found: Findings) -> None:
    if mps_runs():
        found.figure(
            "a write to memory that is mapped to be read", "not tried: under MPS it ends all processes"
        )
        return
    said, kept = write_to_read_only()
    found.figure(
        "a write to memory that is mapped to be read", f"{said}; {'as before' if kept else 'changed'}"
    )


async def _proof(setup: Setup, found: Findings) -> None:
    async with hosted(setup, found) as running:
        await _prove_beside(setup, found, running)


async def _prove_beside(setup: Setup, found: Findings, running: Host) -> None:
    folder, device = setup.folder, torch.device(setup.device)
    rank = 4 if setup.interpreted else 16
    adapter = bases.adapter_folder(_empty(folder / "base"), folder / "adapter", rank, 5)
    config = config_of(setup)
    store = Store(str(folder / "store"), folder / "cache")
    busy, ledger = BusyFlag.make(), Ledger(setup, found)
    verifier = VerifierClient(store, Threads("disk", 2), base_id="random", probes=[], busy_fd=busy.fd)
    free = free_memory(device)
    await running.begin("nothing")
    await running.last(8, 3)
    try:
        await running.begin("attaching")
        began = time.monotonic()
        await verifier.attach(config, running.manifest, running.fd)
        found.figure("attaching the base, with its process", time.monotonic() - began, "s")
        found.figure("memory of the attached process", max(0, free - free_memory(device)) / 1e6, "MB")
        await running.begin("a proof")

        def job(number: int) -> Prove:
            return Prove(
                digest=f"{number:064x}",
                config_path=str(adapter / CONFIG_FILE),
                weights_path=str(adapter / WEIGHTS_FILE),
                packed_path=str(folder / f"{number}.packed"),
                probes=[words(setup, 40, 60), words(setup, 3, 61)],
                probe_tokens=6,
            )

        began = time.monotonic()
        proved = await verifier.ask(job(1), lambda progress: None)
        _told(found, proved, time.monotonic() - began)
        taken = max(0, free - free_memory(device)) if setup.device == "cuda" else None
        ledger.compare("the verifier, after a proof", running.verifier_bytes, taken)
        ledger.note("after a proof")
        busy.set(True)
        await running.begin("a proof that lets rows go first")
        began = time.monotonic()
        await verifier.ask(job(4), lambda progress: None)
        found.figure("a proof that lets rows go first", time.monotonic() - began, "s")
        busy.set(False)
        await running.begin("a proof whose process is killed")
        begun = asyncio.Event()
        asked = asyncio.create_task(verifier.ask(job(2), lambda progress: begun.set()))
        await begun.wait()
        killed = verifier.pid
        os.kill(killed or os.getpid(), signal.SIGKILL)
        again = await asked
        found.check("a killed process is replaced, and the version proved", verifier.deaths == 1)
        found.check("its proof is the same", again.sha256 == proved.sha256)
        await running.begin("nothing, again")
        await running.last(4, 2)
        await running.begin("a proof, and the engine is killed")
        begun.clear()
        orphan = asyncio.create_task(verifier.ask(job(3), lambda progress: begun.set()))
        await begun.wait()
        pid = verifier.pid
        running.process.kill()
        began = time.monotonic()
        await running.process.wait()
        await verifier.engine_gone()
        found.figure("from the engine's death to its verifier's", time.monotonic() - began, "s")
        (said,) = await asyncio.gather(orphan, return_exceptions=True)
        ended = isinstance(said, Exception | Proved)
        found.check("its proof ends by an error that says so", ended, f"{type(said).__name__}: {said}"[:160])
        found.check("its verifier is gone", pid is None or not Path(f"/proc/{pid}").exists())
        if setup.device == "cuda":
            for _ in range(50):  # the driver takes its time
                await asyncio.sleep(0 if free_memory(device) > free else 0.2)
            back = free_memory(device)
            found.check("their memory is free again", back > free, f"{back / 1e9:.1f} GB free")
    finally:
        await verifier.engine_gone()


def _told(found: Findings, proved: Proved, seconds: float) -> None:
    report = proved.report.proof
    found.figure("a proof", seconds, "s")
    found.figure("its kernels", report.kernels)
    found.figure("modules with PEFT's bits", f"{report.modules_exact} of {report.modules_compared}")
    found.figure("largest error of the others, over PEFT's own", report.error_ratio)
    found.figure("tokens compared", report.tokens_compared)
    found.check("the version is proved, and the base unchanged", report.base_unchanged)


def _empty(folder: Path) -> torch.nn.Module:
    from onebase_engine.base.layers import empty_base
    from onebase_engine.base.load import load_config

    tree: torch.nn.Module = empty_base(load_config(folder), dtype=torch.bfloat16)
    return tree


def config_of(setup: Setup) -> EngineConfig:
    device: Any = setup.device
    return EngineConfig(
        base_folder=str(setup.folder / "base"),
        device=device,
        threads=1 if device == "cpu" else 4,
        max_rank=64,
    )


def training(setup: Setup, found: Findings) -> None:
    """Train next to the engine, as a server does: tokens a second of both, and memory; kill it at last."""
    shutil.rmtree(setup.folder / "runs", ignore_errors=True)
    asyncio.run(_training(setup, found))


async def _training(setup: Setup, found: Findings) -> None:
    async with hosted(setup, found) as running:
        jobs = Jobs(setup, found, running)
        await running.begin("nothing")
        await running.last(6, 3)
        if not await jobs.check("a job", jobs.job("checked")):
            return
        jobs.busy.set(False)
        await jobs.train(IDLE, 1.0, jobs.job("alone", max_steps=2 if setup.interpreted else 6))
        await jobs.train("a job that takes all it can", 1.0, jobs.job("greedy"))
        jobs.busy.set(True)
        if not setup.interpreted:
            await jobs.train("a job with a fifth of the time", 0.2, jobs.job("modest", max_steps=6))
        await jobs.kill("a job that is killed", jobs.job("killed", max_steps=1000))
        await running.begin("nothing, again")
        await running.last(4, 2)
        await running.begin("end")


class Jobs:
    """Trainers next to an engine: each is a process of its own, and a phase of the engine's."""

    def __init__(self, setup: Setup, found: Findings, running: Host) -> None:
        self._setup, self._found, self._running = setup, found, running
        self._config, self._device = config_of(setup), torch.device(setup.device)
        self.busy = BusyFlag.make()
        small = setup.interpreted
        self._rows = bases.write_chats(setup.folder / "rows.jsonl", 8 if small else 64, 20 if small else 900)
        roomy = not small and free_memory(self._device) > ROOMY
        self._recipe = {
            "r": 4 if small else 16,
            "targets": list(bases.ALL_LINEAR),
            "batch_size": 8 if roomy else 2,
            "max_steps": 2 if small else 12,
            "epochs": 1000.0,
            "max_length": 64 if small else 1024,
            "eval_split": 0.0,
        }
        self._told: list[events.StepDone] = []
        """Steps of the job that runs."""
        self._estimated = 0
        """Bytes that the job that runs was estimated to take."""
        self._ledger = Ledger(setup, found)
        self._alone = 0.0
        """Tokens a second of the first job, beside which the engine rests."""

    def job(self, name: str, **more: Any) -> TrainJob:
        return TrainJob(
            id=name,
            name=name,
            recipe=self._recipe | more,
            train=str(self._rows),
            train_name="rows.jsonl",
            held_out=None,
            held_out_name=None,
            folder=str(self._setup.folder / "runs" / name),
            base_name="random",
            memory_limit=0,
        )

    async def check(self, title: str, job: TrainJob) -> bool:
        """Have its rows and recipe checked, as a server does first."""
        await self._running.begin(f"the check of {title}")
        message = Check(config=self._config, job=job)
        outcome = await (await TrainerClient.start(TRAINER_COMMAND, message, {}, self._listen)).outcome()
        sound = isinstance(outcome, FilesChecked)
        self._found.check(f"{title}: the job is checked", sound, "" if sound else str(outcome)[:300])
        return sound

    async def train(self, title: str, share: float, job: TrainJob) -> None:
        """Train until the job has ended, and report its tokens a second, its loss and its memory."""
        free = free_memory(self._device)
        trained = await (await self._start(title, share, job)).outcome()
        ended = isinstance(trained, Trained)
        self._found.check(f"{title}: it is trained", ended, "" if ended else str(trained)[:300])
        if not isinstance(trained, Trained):
            return
        figure, told = self._found.figure, self._told
        later = told[len(told) // 3 :]
        if not self._setup.interpreted and later:
            rate = sum(one.tokens for one in later) / sum(one.tokens / one.tokens_per_second for one in later)
            figure(f"{title}: training", rate, "tokens/s")
            self._alone = self._alone or rate
            figure(f"{title}: training, of its speed alone", rate / self._alone)
        if told:
            figure(f"{title}: loss, first and last", f"{told[0].loss:.3f}, {told[-1].loss:.3f}")
        peak = trained.report["peak_memory_bytes"]
        figure(f"{title}: its peak memory", peak / 1e9, "GB")
        self._ledger.compare(title, int(self._estimated * ROOM), None if self._setup.interpreted else peak)
        self._ledger.note(title)
        if self._device.type == "cuda":
            figure(f"{title}: free beside it at its start", free / 1e9, "GB")

    async def kill(self, title: str, job: TrainJob) -> None:
        """Kill the trainer once it has made a step."""
        client = await self._start(title, 1.0, job)
        outcome = asyncio.create_task(client.outcome())
        while not self._told and not outcome.done():
            await asyncio.sleep(0.05)
        client.kill()
        said = await outcome
        self._found.check("a killed trainer is told as dead", isinstance(said, Died), str(said)[:200])

    async def _start(self, title: str, share: float, job: TrainJob) -> TrainerClient:
        await self._running.begin(title)
        self._told.clear()
        fd = self._running.fd
        fds = {"--busy-fd": self.busy.fd} | ({} if fd is None else {"--base-fd": fd})
        message = Train(config=self._config, manifest=self._running.manifest, job=job, share=share)
        return await TrainerClient.start(TRAINER_COMMAND, message, fds, self._listen)

    def _listen(self, event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            self._told.append(event)
        elif isinstance(event, events.Planned):
            self._estimated = int(event.estimate["total"])


def tests(setup: Setup, found: Findings) -> None:
    """Run the tests of the engine and of adapters on this device, and report them file by file."""
    if setup.device == "cpu":
        raise NotHereError("`make test` runs them on the CPU")
    command = [sys.executable, "-m", "pytest", "-v", "--maxfail=25", "-p", "no:xdist", "--tb=short"]
    command += ["-o", f"cache_dir={setup.folder / 'pytest-cache'}", "-m", "not full"]
    # Products of other dtypes are cuBLAS's, which promises nothing.
    command += ["-k", "not fp32 and not int8", *TESTS]
    environment = {**os.environ, "ONEBASE_TEST_DEVICE": setup.device}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        tell_tests(running.stdout or (), found)
    found.check("pytest is content", running.returncode == 0, f"exit status {running.returncode}")


def tell_tests(lines: Iterable[str], found: Findings) -> None:
    """Read what `pytest -v` prints: a row of a table for each file, and each failure."""
    add = found.table("Tests", ("file", "passed", "skipped", "failed"))
    counts: Counter[str] = Counter()
    before = ""
    for line in lines:
        print(line, end="", flush=True)
        told = re.match(r"(tests/\S+?\.py)::(.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if told is None:
            continue
        file, name, state = told.groups()
        if file != before and before:
            add(before, counts["PASSED"], counts["SKIPPED"], counts["FAILED"] + counts["ERROR"])
            counts.clear()
        before = file
        counts[state] += 1
        if state in ("FAILED", "ERROR"):
            found.check(f"{Path(file).name}: {name}", False, state)
    if before:
        add(before, counts["PASSED"], counts["SKIPPED"], counts["FAILED"] + counts["ERROR"])


PARTS = {"proof": proof, "training": training, "tests": tests}

if __name__ == "__main__":
    if sys.argv[1] == "writes":
        print(_write(sys.argv[2], *map(int, sys.argv[3:])))
        sys.exit(0)
    sys.exit(run_part(PARTS, sys.argv[1:]))
