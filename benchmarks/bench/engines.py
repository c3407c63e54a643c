"""OneBase's engine in a process without a server, with a server's defaults."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from onebase_adapters.proof.loader import load_adapter
from onebase_adapters.store.blobs import CONFIG_FILE, WEIGHTS_FILE
from onebase_engine.base.load import eos_ids
from onebase_engine.base.quantized_cache import load_kept_base
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.messages import AdapterRef, EngineConfig, Sampling, SequenceOutput, Submit
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.machine import freeze_loaded
from onebase_server.processes.engine import DEFAULT_STEP_TOKENS, base_settings, warm_up

KV_TOKENS = 65536
BLOCK = 16


def load_base(folder: Path) -> tuple[torch.nn.Module, torch.device]:
    """Return the base as a server loads it, and its device: a GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_kept_base(base_settings(EngineConfig(base_folder=str(folder)), device)), device


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def load(folder: Path, adapters: dict[str, str], rank: int, draft_tokens: int) -> Engine:
    """Return an engine with every adapter; a row names a version by the adapter's name.

    rank: the largest of the adapters.
    """
    base, device = load_base(folder)
    engine = engine_on(base, device, folder, slots=max(1, len(adapters)), draft_tokens=draft_tokens)
    for name, path in adapters.items():
        loaded = load_adapter(base, Path(path) / CONFIG_FILE, Path(path) / WEIGHTS_FILE, rank)
        engine.put_adapter(name, loaded.weights)
    warm_up(engine)
    freeze_loaded()
    return engine


def engine_on(
    base: torch.nn.Module, device: torch.device, folder: Path, *, slots: int, draft_tokens: int = 0
) -> Engine:
    """Return an engine over a loaded base. folder: of its tokenizer."""
    return Engine(
        base,
        name="bench",
        limits=SchedulerLimits(64, DEFAULT_STEP_TOKENS[device.type], 2048, draft_tokens),
        kv_blocks=KV_TOKENS // BLOCK,
        slots=slots,
        eos_ids=eos_ids(base),
        tokenizer=folder,
    )


def outputs(engine: Engine, submits: Iterable[Submit] = ()) -> Iterator[SequenceOutput]:
    """Submit requests and yield what they give, step by step. Raises RuntimeError for one that fails."""
    for submit in submits:
        engine.submit(submit)
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            if output.error_message is not None:
                raise RuntimeError(f"{output.id}: {output.error_message}")
            yield output


def session(
    base: str, adapters: dict[str, str], threads: int, rank: int, draft_tokens: int
) -> Callable[..., Any]:
    """Return what answers a list of requests, all at once, with a sample of each: a worker's function."""
    torch.set_num_threads(threads)
    engine = load(Path(base), adapters, rank, draft_tokens)
    tokenizer = load_tokenizer(Path(base))

    def generate(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        started = time.perf_counter()
        submits = []
        for index, request in enumerate(requests):
            prompt = request["prompt"]
            prompt = tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
            sampling = Sampling(temperature=0.0, max_tokens=request["tokens"], ignore_eos=True)
            acting = [] if request["adapter"] is None else [AdapterRef(request["adapter"])]
            submits.append(Submit(id=str(index), prompt=prompt, sampling=sampling, adapters=acting))
        samples: list[dict[str, Any]] = [{"started": started} for _ in requests]
        tokens: list[list[int]] = [[] for _ in requests]
        for output in outputs(engine, submits):
            now = time.perf_counter()
            sample, own = samples[int(output.id)], tokens[int(output.id)]
            sample.setdefault("ttft", now - started)
            own += output.tokens
            sample |= {"tokens": len(own), "ended": now}
        return [{**one, "text": tokenizer.decode(own)} for one, own in zip(samples, tokens, strict=True)]

    return generate
