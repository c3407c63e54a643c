"""A tiny base published by this process, adapters on it, and real verifier processes that attach it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from tests.tiny import ADAPTERS, save_adapter, save_base
from torch import nn

from onebase_adapters.format.canonical import CONFIG_FILE, WEIGHTS_FILE
from onebase_adapters.store.store import Store
from onebase_edge.background import Threads
from onebase_engine.base.attach import publish
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine.messages import EngineConfig
from onebase_server.processes.verifier_client import VerifierClient
from onebase_server.processes.verifier_protocol import Prove, Proved, VersionStage

Result = TypeVar("Result")
FAULTY = Path(__file__).with_name("faulty_verifier.py")
BASE_ID = "the-tiny-base"


def new_client(folder: Path, *command: str, store: Store | None = None, **options: Any) -> VerifierClient:
    """A client with a store of its own. Without a `command` it starts the real verifier."""
    if command:
        options["command"] = (sys.executable, *command)
    store = store or Store(str(folder / "store"), folder / "cache")
    return VerifierClient(store, Threads("disk", 2), base_id=BASE_ID, probes=[], **options)


@dataclass
class Published:
    """A base in this process, and how another one attaches it."""

    base: nn.Module
    folder: Path
    config: EngineConfig
    manifest: bytes
    fd: int


@dataclass
class Bench:
    """One verifier and the event loop that it is called from."""

    published: Published
    verifier: VerifierClient
    scratch: Path
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    progress: list[VersionStage] = field(default_factory=list)
    jobs: int = 0
    started: bool = False

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 240))

    def start(self) -> None:
        shared = self.published
        self.run(self.verifier.attach(shared.config, shared.manifest, shared.fd))
        self.started = True

    def job(self, folder: Path, *, allow_noop: bool = False, fault: str | None = None) -> Prove:
        """A job for the adapter in `folder`, which meets one of `faulty_verifier.FAULTS`."""
        self.jobs += 1
        return Prove(
            digest=fault or f"{self.jobs:064x}",
            config_path=str(folder / CONFIG_FILE),
            weights_path=str(folder / WEIGHTS_FILE),
            packed_path=str(self.scratch / f"{self.jobs}.prepared"),
            probes=[list(range(5, 45)), [7, 8, 9]],
            probe_tokens=6,
            allow_noop=allow_noop,
        )

    def prove(self, job: Prove, on_progress: Callable[[VersionStage], None] | None = None) -> Proved:
        self.progress = []
        return self.run(self.verifier.ask(job, on_progress or self.progress.append))

    def close(self) -> None:
        self.run(self.verifier.engine_gone())
        self.loop.close()


@pytest.fixture(scope="module", autouse=True)
def _forks(forks: None) -> None:
    """Verifiers begin as forks."""


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = save_base("llama", tmp_path_factory.mktemp("verifier") / "base")
    base = load_base(BaseSettings(folder, quantization="nf4", compute_dtype=torch.bfloat16))
    fd = os.memfd_create("base")
    config = EngineConfig(base_folder=str(folder), device="cpu", threads=1, max_rank=32)
    yield Published(base, folder, config, publish(base, fd), fd)
    os.close(fd)


@pytest.fixture(scope="session")
def adapter(published: Published) -> Path:
    return save_adapter(published.base, ADAPTERS[2], published.folder.parent / "adapter", seed=1, std=0.3)


@pytest.fixture(scope="session")
def session_bench(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("bench")
    shared = Bench(published, new_client(folder, str(FAULTY)), folder)
    yield shared
    shared.close()


@pytest.fixture
def bench(session_bench: Bench) -> Bench:
    """One verifier for all tests, attached; starting a process takes seconds."""
    if not session_bench.started:
        session_bench.start()
    return session_bench
