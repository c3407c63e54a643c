"""Targets of the measurement: each is started, asked and ended in the same way."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.lora import write_gguf_adapter
from bench.processes import StartError, free_port, onebase_server, server
from bench.stream import HttpError, Sample, fetch_json, stream_completion
from bench.worker import Worker, started
from bench.workload import Request
from onebase_engine.environment import computing_environment

FAILURES = (StartError, HttpError, OSError, EOFError, TimeoutError, ValueError)
"""Errors of a target that does not come up or does not answer as it must: the others are measured."""


class Session(Protocol):
    """A running target."""

    async def run(self, requests: list[Request]) -> list[Sample]:
        """Run the requests at the same time; the samples come in their order."""


@dataclass(frozen=True)
class Setup:
    """Settings with which every target is started."""

    base: Path
    adapters: dict[str, Path]
    rank: int
    """Largest rank of the adapters."""
    threads: int
    streams: int = 16
    """Largest number of streams at the same time."""
    context: int = 1024
    """Length of the longest sequence, in tokens."""
    start_seconds: float = 300.0
    """Limit of the start, in seconds."""
    data: Path | None = None
    """Folder in which OneBase keeps adapters and proofs for its next start."""


@dataclass(frozen=True)
class HttpSession:
    """Asks an OpenAI-compatible server for greedy streams of exactly as many tokens as are asked for.

    By default an adapter is the model's name. numbers: those that llama.cpp knows its adapters by; it
    switches all rows of a batch at once.
    """

    url: str
    base_model: str = ""
    numbers: dict[str, int] = field(default_factory=dict)
    cache: bool = False
    """Whether llama.cpp may find a prompt's beginning in its cache; the others always do."""
    silent: bool = False
    """Whether a stream may have tokens and no text, as one of a single random token may."""

    async def run(self, requests: list[Request]) -> list[Sample]:
        return await asyncio.gather(*(self._one(request) for request in requests))

    async def _one(self, request: Request) -> Sample:
        payload: dict[str, Any] = {
            "prompt": request.prompt,
            "max_tokens": request.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.base_model:
            payload["model"] = request.adapter or self.base_model
        else:
            numbers = [] if request.adapter is None else [self.numbers[request.adapter]]
            payload |= {
                "cache_prompt": self.cache,
                "lora": [{"id": number, "scale": 1.0} for number in numbers],
            }
        return await stream_completion(self.url, payload, silent=self.silent)


@dataclass(frozen=True)
class WorkerSession:
    """Asks a library in a process of its own."""

    worker: Worker

    async def run(self, requests: list[Request]) -> list[Sample]:
        answer = await self.worker.ask([asdict(request) for request in requests])
        return [Sample(**sample) for sample in answer]


async def _http_session(url: str, setup: Setup) -> HttpSession:
    models = [model["id"] for model in (await fetch_json(f"{url}/v1/models"))["data"]]
    missing = sorted(set(setup.adapters) - set(models))
    if missing:
        raise StartError(f"{url} does not serve {', '.join(missing)}")
    return HttpSession(url, next(model for model in models if model not in setup.adapters))


@asynccontextmanager
async def onebase(setup: Setup, log: Path, extra: Sequence[str] = ()) -> AsyncIterator[HttpSession]:
    """Run `onebase serve`, with a slot for each of the adapters, or with its default where there are none."""
    options = ["--base", str(setup.base), "--threads", str(setup.threads), "--kv-memory", "2GiB"]
    options += ["--max-rank", str(setup.rank)]
    if setup.adapters:
        options += ["--max-slots", str(len(setup.adapters))]
    for name, folder in setup.adapters.items():
        options += ["--adapter", f"{name}={folder}"]
    with tempfile.TemporaryDirectory(prefix="onebase-data-") as fresh:
        options += ["--data-dir", str(setup.data or fresh), *extra]
        async with onebase_server(log, *options, timeout=setup.start_seconds) as (url, _):
            yield await _http_session(url, setup)


@asynccontextmanager
async def vllm(
    setup: Setup, log: Path, python: Path, extra: Sequence[str] = ()
) -> AsyncIterator[HttpSession]:
    """Run `vllm serve` from a virtual environment of its own; the CPU build unless told otherwise."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [str(python.with_name("vllm")), "serve", str(setup.base)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "base"]
    command += ["--dtype", "bfloat16", "--max-model-len", "2048"]
    if setup.adapters:
        command += ["--enable-lora", "--max-loras", str(len(setup.adapters))]
        command += ["--max-lora-rank", str(setup.rank), "--lora-modules"]
        command += [f"{name}={folder}" for name, folder in setup.adapters.items()]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{setup.threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "HF_HUB_OFFLINE": "1",
    }
    # vLLM's own advice for the CPU; the library comes with its wheel's dependencies.
    openmp = python.parents[1] / "lib" / "libiomp5.so"
    environment |= {"LD_PRELOAD": str(openmp)} if openmp.exists() else {}
    async with server([*command, *extra], f"{url}/health", log, environment, setup.start_seconds):
        yield await _http_session(url, setup)


@asynccontextmanager
async def llama_cpp(
    setup: Setup, log: Path, program: Path, gguf: Path, extra: Sequence[str] = ()
) -> AsyncIterator[HttpSession]:
    """Run `llama-server` over a GGUF of the same base."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [str(program), "-m", str(gguf), "-t", str(setup.threads), "--no-webui"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # A row's prompt may have some tokens more there, and the cache is cut into equal parts.
    room = max(1024, setup.context + 64) * setup.streams
    command += ["-c", str(room), "-np", str(setup.streams), "--lora-init-without-apply"]
    with tempfile.TemporaryDirectory(prefix="onebase-gguf-") as folder:
        for name, adapter in setup.adapters.items():
            path = Path(folder) / f"{name}.gguf"
            write_gguf_adapter(adapter, setup.base, path)
            command += ["--lora", str(path)]
        libraries = {"LD_LIBRARY_PATH": str(program.parent)}
        numbers = {name: number for number, name in enumerate(setup.adapters)}
        async with server([*command, *extra], f"{url}/health", log, libraries, setup.start_seconds):
            yield HttpSession(url, numbers=numbers, silent=True)  # as random weights may be


def _keywords(setup: Setup) -> dict[str, Any]:
    adapters = {name: str(folder) for name, folder in setup.adapters.items()}
    return {"base": str(setup.base), "adapters": adapters, "threads": setup.threads}


@asynccontextmanager
async def peft(setup: Setup, log: Path, attention: str = "sdpa") -> AsyncIterator[Session]:
    """Run transformers + PEFT in NF4, without a server between. A batch starts and ends as one."""
    keywords = {**_keywords(setup), "attention": attention}
    async with started("bench.peft_nf4:session", keywords, log, seconds=setup.start_seconds) as worker:
        yield WorkerSession(worker)


@asynccontextmanager
async def engine(setup: Setup, log: Path, drafts: bool) -> AsyncIterator[Session]:
    """Run OneBase's engine without the server: what HTTP and the api cost is the difference."""
    keywords = {**_keywords(setup), "rank": setup.rank, "draft_tokens": 7 if drafts else 0}
    # As the server starts its engine.
    seconds = setup.start_seconds
    async with started(
        "bench.engines:session", keywords, log, computing_environment(), seconds=seconds
    ) as worker:
        yield WorkerSession(worker)
