"""Targets of the measurement: each is started, asked and ended in the same way."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bench.lora import write_gguf_adapter
from bench.processes import StartError, free_port, server, tail
from bench.stream import Sample, fetch_json, stream_completion
from bench.workload import Request
from onebase_engine.environment import computing_environment

HERE = Path(__file__).parent


class Session(Protocol):
    """A running target."""

    async def run(self, requests: list[Request]) -> list[Sample]:
        """Runs the requests at the same time; the samples come in their order."""


class Target(Protocol):
    """A server, or a library, that can be started."""

    @property
    def name(self) -> str: ...

    def start(self, log: Path) -> AbstractAsyncContextManager[Session]:
        """Runs the target until the block ends; raises StartError when it does not come up."""


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


def _payload(request: Request) -> dict[str, Any]:
    """A greedy stream of exactly as many tokens as are asked for."""
    return {
        "prompt": request.prompt,
        "max_tokens": request.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@dataclass(frozen=True)
class HttpSession:
    """Asks an OpenAI-compatible server; the adapter is the model's name."""

    url: str
    base_model: str

    async def run(self, requests: list[Request]) -> list[Sample]:
        return await asyncio.gather(*(self._one(request) for request in requests))

    async def _one(self, request: Request) -> Sample:
        return await stream_completion(
            self.url, {**_payload(request), "model": request.adapter or self.base_model}
        )


async def _http_session(url: str, setup: Setup) -> HttpSession:
    models = [model["id"] for model in (await fetch_json(f"{url}/v1/models"))["data"]]
    missing = sorted(set(setup.adapters) - set(models))
    if missing:
        raise StartError(f"{url} does not serve {', '.join(missing)}")
    return HttpSession(url, next(model for model in models if model not in setup.adapters))


@dataclass(frozen=True)
class OneBaseTarget:
    """`onebase serve`, as installed next to the Python that runs this."""

    setup: Setup
    extra: list[str] = field(default_factory=list)
    name: str = "onebase"

    @asynccontextmanager
    async def start(self, log: Path) -> AsyncIterator[HttpSession]:
        setup, url = self.setup, f"http://127.0.0.1:{(port := free_port())}"
        command = [str(Path(sys.executable).with_name("onebase")), "serve", "--base", str(setup.base)]
        command += ["--port", str(port), "--threads", str(setup.threads), "--kv-memory", "2GiB"]
        command += ["--max-slots", str(max(1, len(setup.adapters))), "--max-rank", str(setup.rank)]
        for name, folder in setup.adapters.items():
            command += ["--adapter", f"{name}={folder}"]
        with tempfile.TemporaryDirectory(prefix="onebase-data-") as data:
            command += ["--data-dir", data, *self.extra]
            async with server(command, f"{url}/ready", log):
                yield await _http_session(url, setup)


@dataclass(frozen=True)
class VllmTarget:
    """`vllm serve` from a virtual environment of its own; the CPU build unless told otherwise."""

    setup: Setup
    python: Path
    extra: list[str] = field(default_factory=list)
    name: str = "vllm"

    @asynccontextmanager
    async def start(self, log: Path) -> AsyncIterator[HttpSession]:
        setup, url = self.setup, f"http://127.0.0.1:{(port := free_port())}"
        command = [str(self.python.with_name("vllm")), "serve", str(setup.base)]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "base"]
        command += ["--dtype", "bfloat16", "--max-model-len", "2048"]
        if setup.adapters:
            command += ["--enable-lora", "--max-loras", str(len(setup.adapters))]
            command += ["--max-lora-rank", str(setup.rank), "--lora-modules"]
            command += [f"{name}={folder}" for name, folder in setup.adapters.items()]
        async with server([*command, *self.extra], f"{url}/health", log, self._environment()):
            yield await _http_session(url, setup)

    def _environment(self) -> dict[str, str]:
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{self.setup.threads - 1}",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        # vLLM's own advice for the CPU; the library comes with its wheel's dependencies.
        openmp = self.python.parents[1] / "lib" / "libiomp5.so"
        return environment | ({"LD_PRELOAD": str(openmp)} if openmp.exists() else {})


@dataclass(frozen=True)
class LlamaCppSession:
    """Asks `llama-server`, which knows adapters by their number and switches all rows of a batch at once."""

    url: str
    numbers: dict[str, int]

    async def run(self, requests: list[Request]) -> list[Sample]:
        return await asyncio.gather(*(self._one(request) for request in requests))

    async def _one(self, request: Request) -> Sample:
        chosen = [] if request.adapter is None else [{"id": self.numbers[request.adapter], "scale": 1.0}]
        return await stream_completion(self.url, {**_payload(request), "cache_prompt": False, "lora": chosen})


@dataclass(frozen=True)
class LlamaCppTarget:
    """`llama-server` over a GGUF of the same base."""

    setup: Setup
    program: Path
    gguf: Path
    extra: list[str] = field(default_factory=list)
    name: str = "llama.cpp"

    @asynccontextmanager
    async def start(self, log: Path) -> AsyncIterator[LlamaCppSession]:
        setup, url = self.setup, f"http://127.0.0.1:{(port := free_port())}"
        command = [str(self.program), "-m", str(self.gguf), "-t", str(setup.threads), "--no-webui"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        # A row's prompt may have some tokens more there, and the cache is cut into equal parts.
        room = max(1024, setup.context + 64) * setup.streams
        command += ["-c", str(room), "-np", str(setup.streams), "--lora-init-without-apply"]
        libraries = {"LD_LIBRARY_PATH": str(self.program.parent)}
        with tempfile.TemporaryDirectory(prefix="onebase-gguf-") as folder:
            for name, adapter in setup.adapters.items():
                path = Path(folder) / f"{name}.gguf"
                write_gguf_adapter(adapter, setup.base, path)
                command += ["--lora", str(path)]
            numbers = {name: number for number, name in enumerate(setup.adapters)}
            async with server([*command, *self.extra], f"{url}/health", log, libraries):
                yield LlamaCppSession(url, numbers)


@dataclass(frozen=True)
class WorkerSession:
    """Speaks with a worker: one line of JSON with the requests, one with their samples."""

    process: asyncio.subprocess.Process

    async def run(self, requests: list[Request]) -> list[Sample]:
        answer = await self.ask([asdict(request) for request in requests])
        return [Sample(**sample) for sample in answer]

    async def ask(self, job: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.process.stdin is None:
            raise StartError("the worker was started without a pipe")
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        await self.process.stdin.drain()
        samples: list[dict[str, Any]] = await self.answer()
        return samples

    async def answer(self) -> Any:
        line = b"" if self.process.stdout is None else await self.process.stdout.readline()
        if not line:
            raise EOFError("the worker ended")
        return json.loads(line)


@asynccontextmanager
async def _worker(
    script: str, setup: Setup, log: Path, *extra: str, env: Mapping[str, str] | None = None
) -> AsyncIterator[Session]:
    adapters = json.dumps({name: str(folder) for name, folder in setup.adapters.items()})
    command = [sys.executable, str(HERE / script), "--base", str(setup.base), "--adapters", adapters]
    command += ["--threads", str(setup.threads), *extra]
    pipe = asyncio.subprocess.PIPE
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=errors, limit=2**24, env=env
        )
    session = WorkerSession(process)
    try:
        try:
            await asyncio.wait_for(session.answer(), 300)
        except (EOFError, TimeoutError) as error:
            raise StartError(f"{script} did not start:\n{tail(log)}") from error
        yield session
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@dataclass(frozen=True)
class PeftTarget:
    """transformers + PEFT in NF4, without a server between. A batch starts and ends as one."""

    setup: Setup
    attention: str = "sdpa"
    name: str = "peft"

    def start(self, log: Path) -> AbstractAsyncContextManager[Session]:
        return _worker("peft_worker.py", self.setup, log, "--attention", self.attention)


@dataclass(frozen=True)
class EngineTarget:
    """OneBase's engine in a process without the server: what HTTP and the api cost is the difference."""

    setup: Setup
    extra: list[str] = field(default_factory=list)
    name: str = "engine"

    def start(self, log: Path) -> AbstractAsyncContextManager[Session]:
        options = ("--rank", str(self.setup.rank), *self.extra)
        # As the server starts its engine.
        return _worker("engine_worker.py", self.setup, log, *options, env=computing_environment())
