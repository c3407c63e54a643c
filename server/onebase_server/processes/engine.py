"""The engine process: how it starts, and the loop of its steps.

The api runs it as `python -m onebase_server.processes engine --fd N [--base-fd M]`.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import nn

from onebase_engine.base.attach import AttachError, publish
from onebase_engine.base.layers import LayerShape, adaptable_layers, left_out
from onebase_engine.base.load import (
    BaseChangedError,
    BaseSettings,
    UnsupportedBaseError,
    base_bytes,
    eos_ids,
    longest_row,
    needed_memory,
    parameter_count,
)
from onebase_engine.base.quantized_cache import load_kept_base
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.base_proof import prove_once
from onebase_engine.engine.engine import Counters, Engine
from onebase_engine.engine.forms import capture_steps, compile_kernels
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS, STAGED_BLOCKS, most_blocks
from onebase_engine.engine.memory_budget import (
    CONTEXT_BYTES,
    Measure,
    MemoryBudgetError,
    fit_step,
    host_block_count,
    kv_block_count,
    kv_memory_available,
    largest_step_bytes,
    measured_on,
    rounding_bytes,
    slot_bytes,
    staging_bytes,
    state_place_count,
    verifier_bytes,
)
from onebase_engine.engine.messages import MAX_ADAPTER_TERMS, MAX_SLOTS, EngineConfig, SequenceOutput
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import NeverFitsError, SchedulerLimits
from onebase_engine.engine.staging import Arrived, PackedAdapterLoader
from onebase_engine.environment import mps_runs
from onebase_engine.kernels.interface import TILE
from onebase_engine.machine import (
    explain_refusal,
    free_memory,
    freeze_loaded,
    is_out_of_memory,
    switch_threads_soon,
)
from onebase_server.processes.child import GOODBYE_SECONDS, ApiGoneError, Channel, begin

logger = logging.getLogger(__name__)

Received = protocol.ToEngine | Arrived | protocol.AdapterFailed
"""Messages for the stepping thread: those from the api, and what the loader's thread has read."""
EngineChannel = Channel[Received]

IDLE_SECONDS = 1.0
"""Time, in seconds, between two reports of an idle engine."""
CHECK_STEPS = 256
"""Number of steps between two checks that the base is unchanged."""
SLOT_SHARE = 0.25
"""Part of an accelerator's free memory that versions in slots may take by default."""
MAX_FAILED_STEPS = 5
"""Number of consecutive failed steps after which the process ends, to be restarted."""
DEFAULT_STEP_TOKENS = {"cpu": 256, "cuda": 2048}


def main() -> int:
    inherited = begin("engine")
    return run_engine(inherited.sock, inherited.base_fd)


def run_engine(sock: socket.socket, base_fd: int | None = None) -> int:
    """Serve one api until it closes the socket; returns the process's exit status.

    `base_fd` is a memfd into which the base is published, for verifiers to attach.
    """
    switch_threads_soon()
    channel = EngineChannel(sock, protocol.to_engine_decoder().decode, leave_within=GOODBYE_SECONDS)
    try:
        start = channel.receive()
        if not isinstance(start, protocol.Start):
            raise ApiGoneError(f"expected Start, got {type(start).__name__}")
        try:
            engine = _start(start.config, channel, base_fd)
        except Exception as error:
            explained = isinstance(error, UnsupportedBaseError | MemoryBudgetError)
            if not explained:
                logger.exception("the engine cannot start")
            refusal = explain_refusal(error)
            prefix = "" if explained or refusal else f"the engine cannot start: {type(error).__name__}: "
            channel.send(protocol.Fatal(message=f"{prefix}{refusal or error}"))
            return 2
        return _serve(engine, channel)
    except ApiGoneError as error:
        logger.info("engine ends: %s", error)
        return 0
    except BaseChangedError as error:
        logger.critical("%s; the process ends", error)
        return 3
    finally:
        channel.close()


def _serve(engine: Engine, channel: EngineChannel) -> int:
    loader = PackedAdapterLoader(engine.model.device, engine.layers, channel.post, engine.model.kept)
    failures, reported, told, paused = 0, time.monotonic(), 0, False
    waits_for_steps = not engine.model.kernels.asynchronous

    def report() -> None:
        """Send the results of the last step: before anything else, or, where an accelerator need not wait,
        while it computes the next."""
        nonlocal reported, told
        _report_versions(engine, channel)
        outputs = engine.take_outputs()
        # Also while all sequences wait for grammars, which is no stall.
        silent = time.monotonic() - reported > IDLE_SECONDS
        if outputs or engine.counters.steps != told or not engine.busy or silent or paused:
            reported, told = time.monotonic(), engine.counters.steps
            _report(outputs, msgspec.structs.replace(engine.stats(), paused=paused), channel)

    while True:
        waits = paused or not engine.busy
        if waits or waits_for_steps:  # else the next step reports while it is computed
            report()
        for message in channel.arrived(IDLE_SECONDS if waits else 0):
            if isinstance(message, protocol.Shutdown):
                report()
                return 0
            if isinstance(message, protocol.Pause):
                paused = message.paused
                continue
            _handle(engine, channel, loader, message)
        engine.watch_base()
        if paused:
            continue
        steps, failed = engine.counters.steps, engine.counters.failed_steps
        engine.step(report if engine.busy else None)
        if engine.counters.failed_steps != failed:
            failures += 1
        elif engine.counters.steps != steps:
            # Idle time between two failing steps proves nothing.
            failures = 0
        if failures >= MAX_FAILED_STEPS:
            logger.critical("%d steps failed in a row; the process ends", failures)
            report()
            return 4
        if engine.counters.steps != steps and engine.counters.steps % CHECK_STEPS == 0:
            engine.begin_base_check()


LONG_VECTOR = 64 * 1024
"""Size, in bytes, above which a vector is sent in a message of its own."""


def _report(outputs: list[SequenceOutput], stats: protocol.Stats, channel: EngineChannel) -> None:
    """Send the outputs of a step. Long ones go alone: two of them may not fit in one message."""
    at, small = time.monotonic(), []
    for output in outputs:
        if output.prompt_logprobs is not None or len(output.vector or b"") > LONG_VECTOR:
            channel.send(protocol.StepResult(outputs=[output], stats=stats, at=at))
        else:
            small.append(output)
    if small or not outputs:
        channel.send(protocol.StepResult(outputs=small, stats=stats, at=at))


def _report_versions(engine: Engine, channel: EngineChannel) -> None:
    """Send which versions have left memory, and which are in slots if that has changed."""
    for digest in engine.versions.take_dropped():
        channel.send(protocol.AdapterUnloaded(digest))
    seconds = engine.slots_changed()
    if seconds is not None:
        digests = sorted(engine.slots.slot_of)
        channel.send(protocol.SlotsChanged(digests, {one: seconds[one] for one in digests if one in seconds}))


def _handle(engine: Engine, channel: EngineChannel, loader: PackedAdapterLoader, message: Received) -> None:
    if isinstance(message, protocol.Submit):
        engine.submit(message)
    elif isinstance(message, protocol.Cancel):
        engine.cancel(message)
    elif isinstance(message, protocol.LoadAdapter):
        loader.load(message)
    elif isinstance(message, Arrived):
        _take_in(engine, channel, loader, message)
    elif isinstance(message, protocol.AdapterFailed):
        loader.forget(message.digest)
        channel.send(message)
    elif isinstance(message, protocol.UnloadAdapter):
        loader.forget(message.digest)
        engine.unload_adapter(message.digest)
    else:
        logger.error("unexpected message %s", type(message).__name__)


def _take_in(engine: Engine, channel: EngineChannel, loader: PackedAdapterLoader, arrived: Arrived) -> None:
    digest = arrived.answer.digest
    # Another process has just worked on the base to prove it.
    engine.begin_base_check()
    if not loader.wanted(digest):
        channel.send(protocol.AdapterUnloaded(digest))
        return
    try:
        engine.put_adapter(digest, arrived.weights)
    except NeverFitsError as error:
        channel.send(protocol.AdapterFailed(digest=digest, code=error.code, message=str(error)))
    else:
        channel.send(arrived.answer)


def _start(config: EngineConfig, channel: EngineChannel, base_fd: int | None) -> Engine:
    """Load the base, publish it, size the KV cache, warm up, and say Ready."""
    started = time.monotonic()
    device = _device(config.device)
    config = msgspec.structs.replace(config, max_slots=_slot_count(config, device))
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic and device.type != "cpu":
        raise UnsupportedBaseError(
            "--deterministic is kept on the CPU only, where it always holds; on CUDA sequences agree up to "
            "rounding. Leave it out, or use --device cpu"
        )
    if config.cpu_weights == "bf16" and (device.type, config.quantization) != ("cpu", "nf4"):
        raise UnsupportedBaseError(
            "--cpu-weights bf16 is for 4-bit weights on a CPU: leave it out, or use --device cpu and "
            "--quantization nf4"
        )
    channel.send(protocol.Loading(stage="loading the base", fraction=0.1))
    settings = base_settings(config, device)
    base = _load(settings)
    if parts := left_out(base):
        logger.info("served as a language model, without %s", ", ".join(parts))
    # Before anything holds on to its tensors: they move into the memory that verifiers attach.
    manifest = _publish(base, base_fd, device)
    channel.send(protocol.Loading(stage="preparing the served view", fraction=0.7))
    max_length = _max_length(config, base)
    step_tokens = config.step_tokens or DEFAULT_STEP_TOKENS[device.type]
    model = ServedModel(
        base,
        config.max_slots,
        unpacked=config.cpu_weights == "bf16",
        kv_dtype=torch.int8 if config.kv_dtype == "int8" else None,
        max_length=max_length,
        step_tokens=step_tokens,
    )
    limits = SchedulerLimits(
        max_sequences=config.max_sequences,
        step_tokens=step_tokens,
        max_length=max_length,
        draft_tokens=config.draft_tokens,
    )
    measure = measured_on(device) if device.type == "cuda" else None
    places = state_place_count(model.state_bytes, config.max_sequences, kv_memory_available(device))
    if 0 < places // 2 < config.max_sequences:
        logger.warning(
            "%d sequences run at once, not %d (--max-sequences): the state of each takes %.1f MB, twice",
            places // 2, config.max_sequences, model.state_bytes / 1e6,
        )  # fmt: skip
    blocks, slot_memory, _ = sizes(config, base, model, limits, measure, places * model.state_bytes)
    host_blocks = host_block_count(model.kv_bytes_per_block(config.block_size), config.prefix_memory)
    engine = Engine(
        base,
        name=config.base_folder,
        limits=limits,
        kv_blocks=blocks,
        block_size=config.block_size,
        host_blocks=host_blocks,
        state_places=places,
        slots=config.max_slots,
        slot_memory=slot_memory,
        eos_ids=eos_ids(base),
        model=model,
        tokenizer=Path(config.base_folder),
    )
    channel.send(protocol.Loading(stage="compiling kernels", fraction=0.85))
    compile_kernels(engine)
    channel.send(protocol.Loading(stage="warming up", fraction=0.9))
    warm_up(engine)
    capture_steps(engine)
    channel.send(protocol.Loading(stage="proving the base", fraction=0.95))
    prove_once(engine, base, settings, config.cpu_weights)
    engine.counters = Counters()
    freeze_loaded()
    kv_bytes = blocks * model.kv_bytes_per_block(config.block_size)
    info = _base_info(config, base, engine, kv_bytes, time.monotonic() - started)
    channel.send(protocol.Ready(base=info, manifest=manifest))
    return engine


class MemorySizes(NamedTuple):
    """Division of a device's free memory."""

    blocks: int
    """Number of blocks of the KV cache."""
    slot_memory: int
    """Bytes for versions in slots; 0 is no limit."""
    aside: Mapping[str, int]
    """Bytes that are left for others, by who they are and which setting changes that."""


def sizes(
    config: EngineConfig,
    base: nn.Module,
    model: ServedModel,
    limits: SchedulerLimits,
    measure: Measure | None,
    state_bytes: int = 0,
) -> MemorySizes:
    """Divide the memory that is free between the KV cache, versions in slots, and others.

    Args:
        measure: measures how much memory the largest step takes; None leaves it to a share.
        state_bytes: bytes of all recurrent states.

    Raises MemoryBudgetError.
    """
    device, layers = model.device, adaptable_layers(base)
    aside = {"recurrent states (--max-sequences)": state_bytes}

    def held(tokens: int) -> int:
        """Return the blocks that a sequence of so many tokens holds."""
        return most_blocks(model.groups, tokens, config.block_size, limits.step_tokens)

    most = config.max_sequences * held(limits.max_length) + RESERVED_BLOCKS
    if config.kv_memory:
        measure = None
    if measure is not None:
        aside["the verifier and trainers next to their jobs (--train-jobs)"] = (
            verifier_bytes(base) + config.train_jobs * CONTEXT_BYTES
        )
        aside["captured steps and rounding"] = model.graph_bytes + rounding_bytes(model)
    free = kv_memory_available(device)
    if device.type != "cpu" and config.kv_memory > free:
        raise MemoryBudgetError(
            f"--kv-memory asks for {config.kv_memory / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free next to "
            "the base; lower it, or choose a smaller base"
        )
    left = free - config.kv_memory - sum(aside.values())
    slot_memory = _slot_memory(config, layers.values(), left, device)
    if device.type != "cpu":
        aside["slots (--slot-memory)"] = slot_memory + staging_bytes(slot_memory)
    block_bytes = model.kv_bytes_per_block(config.block_size)
    aside["blocks in flight to host memory"] = min(config.prefix_memory, STAGED_BLOCKS * block_bytes)
    aside["jobs (--train-memory)"] = config.train_memory or _job_memory(config, base, measure)
    if measure is not None:

        def step_at(length: int) -> int:
            return largest_step_bytes(
                model,
                layers,
                replace(limits, max_length=length),
                block_size=config.block_size,
                rank=config.max_rank,
                measure=measure,
            )

        step, length = fit_step(
            free - sum(aside.values()),
            lambda tokens: block_bytes * held(tokens),
            limits.max_length,
            step_at,
        )
        aside["the largest step (--step-tokens, --max-length)"] = step
        if length < limits.max_length:
            most = min(most, held(length - length % config.block_size) + RESERVED_BLOCKS)
        free = kv_memory_available(device)  # less what has been loaded for the step
    blocks = kv_block_count(block_bytes, most, free, kv_memory=config.kv_memory, aside=aside)
    if measure is not None:
        said = ", ".join(f"{size / 1e6:.0f} MB for {who}" for who, size in aside.items() if size)
        logger.info("memory: %.0f MB are free; set aside are %s", free / 1e6, said)
    return MemorySizes(blocks, slot_memory, aside)


def _job_memory(config: EngineConfig, base: Any, measure: Measure | None) -> int:
    """Return the bytes that jobs take on an accelerator where no setting says how many."""
    if measure is None or not config.train_jobs:
        return 0
    from onebase_server.processes.job_memory import job_bytes  # imports what trains

    return config.train_jobs * job_bytes(base.config, config)


def warm_up(engine: Engine) -> None:
    """Run one short request, so that the first user does not pay for lazy initialisation."""
    sampling = protocol.Sampling(temperature=0.0, max_tokens=2, ignore_eos=True)
    most = engine.longest
    prompt = [0] * max(min(TILE + 1, most - sampling.max_tokens), 1)
    engine.submit(protocol.Submit(id="warm-up", prompt=prompt, sampling=sampling, tenant="warm-up"))
    while engine.busy:
        engine.step()
    failed = [output.error_message for output in engine.take_outputs() if output.finish == "error"]
    if failed:
        raise UnsupportedBaseError(f"the base cannot generate: {failed[0]}")
    engine.counters = Counters()


def base_settings(config: EngineConfig, device: torch.device) -> BaseSettings:
    return BaseSettings(
        folder=Path(config.base_folder),
        quantization=config.quantization,
        blocksize=config.blocksize,
        double_quant=config.double_quant,
        compute_dtype=getattr(torch, config.compute_dtype),
        dtype=getattr(torch, config.dtype),
        device=device,
    )


def _publish(base: nn.Module, base_fd: int | None, device: torch.device) -> bytes:
    """Return the manifest for verifiers; empty if the base is not shared: without a memfd, or without CUDA
    IPC."""
    if base_fd is None and device.type == "cpu":
        return b""
    try:
        return publish(base, base_fd)
    except AttachError as error:
        if device.type == "cpu":
            raise
        logger.error("the base cannot be shared, so that no new version can be proven: %s", error)
        return b""


def _slot_memory(config: EngineConfig, layers: Iterable[LayerShape], free: int, device: torch.device) -> int:
    """Return the limit, in bytes, of versions in slots; 0 is no limit.

    On the CPU slots point at what host memory holds anyway. On an accelerator the default is a part of the
    free memory, SLOT_SHARE, and no more than `max_slots` of `max_rank` could fill.
    """
    if config.slot_memory or device.type == "cpu":
        return config.slot_memory
    return min(max(int(free * SLOT_SHARE), 1), slot_bytes(layers, config.max_slots, config.max_rank))


def _slot_count(config: EngineConfig, device: torch.device) -> int:
    """Return the number of slots: by default one for each sequence of a step, up to MAX_SLOTS, on an
    accelerator within their memory.

    On the CPU a slot points at what host memory holds, so there are at least as many as a request may name.
    """
    if config.max_slots:
        return config.max_slots
    most = min(config.max_sequences, MAX_SLOTS)
    return max(most, MAX_ADAPTER_TERMS if device.type == "cpu" else 1)


def _device(name: str) -> torch.device:
    """Return the device of the name; `auto` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedBaseError("--device cuda, but torch finds no CUDA device; use --device cpu")
    return torch.device(name)


def _load(settings: BaseSettings) -> nn.Module:
    """Load the base. Raise UnsupportedBaseError, with figures, where the GPU has no room for it."""
    if settings.device.type == "cpu":
        return load_kept_base(settings)
    needed, free, cause = needed_memory(settings), free_memory(settings.device), None
    if needed <= free:
        try:
            return load_kept_base(settings)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            cause = error
    smaller = "a smaller base" if settings.quantization == "nf4" else "--quantization nf4 or a smaller base"
    raise UnsupportedBaseError(
        f"no memory for the base on {settings.device}: its weights take {needed / 1e9:.1f} GB with "
        f"--quantization {settings.quantization}, and {free / 1e9:.1f} GB are free. Choose {smaller}, or end "
        "what else uses the GPU. A base lies on one GPU: on several, `onebase cluster` runs several servers"
    ) from cause


def _gpu_sharing(device: torch.device) -> str:
    """Return the text of `BaseInfo.gpu_sharing`, and log it."""
    if device.type != "cuda":
        return ""
    if mps_runs():
        logger.info("the processes share the GPU by MPS, at once")
        return "mps"
    logger.info(
        "the processes share the GPU by time slices; to have them use it at once, run "
        "`nvidia-cuda-mps-control -d` before the server starts"
    )
    return "time slices"


def _max_length(config: EngineConfig, base: Any) -> int:
    own = longest_row(base.config) or 0
    # Shorter than what the config promises: longrope is the only reason.
    cut = own != (getattr(base.config.get_text_config(), "max_position_embeddings", None) or 0)
    if cut:
        logger.warning("longrope: sequences end at %d tokens, beyond which they would change others", own)
    if config.max_length and own and config.max_length > own:
        raise UnsupportedBaseError(
            f"--max-length {config.max_length} is over the base's own limit of {own} tokens"
            + (", at which its longrope switches frequencies for all sequences of a step" if cut else "")
        )
    return config.max_length or own or 4096


def _base_info(
    config: EngineConfig, base: nn.Module, engine: Engine, kv_bytes: int, seconds: float
) -> protocol.BaseInfo:
    limits = engine.scheduler.limits
    return protocol.BaseInfo(
        architecture=type(base).__name__,
        parameters=parameter_count(base),
        quantization=config.quantization,
        dtype=config.dtype,
        device=str(engine.model.device),
        kernels=engine.model.kernels.name,
        gpu_sharing=_gpu_sharing(engine.model.device),
        promise=engine.model.promise,
        base_bytes=base_bytes(base),
        kv_bytes=kv_bytes,
        kv_dtype=str(engine.model.kv_dtype).removeprefix("torch."),
        kv_blocks=engine.pool.capacity,
        kv_groups=len(engine.model.groups),
        kv_tokens=engine.kv_tokens,
        kv_longest=engine.longest,
        block_size=config.block_size,
        max_length=limits.max_length,
        max_sequences=limits.max_sequences,
        max_slots=config.max_slots,
        max_rank=config.max_rank,
        vocab_size=int(base.config.get_text_config().vocab_size),  # type: ignore[union-attr, operator]
        hidden_size=int(base.config.get_text_config().hidden_size),  # type: ignore[union-attr, operator]
        load_seconds=seconds,
    )
