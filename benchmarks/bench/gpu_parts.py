"""The parts of the GPU check that are one process: `python -m bench.gpu_parts NAME FILE SETUP`.

What each must show is in its docstring. Under Triton's interpreter, on the CPU, all of them run too.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bench import random_base as bases
from bench.gpu_report import NOT_BUILT, Findings, Setup, run_part
from bench.lora import ATTENTION
from onebase_engine.base.load import base_bytes
from onebase_engine.base.view import peft_view
from onebase_engine.engine import messages as protocol
from onebase_engine.engine import model as served
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.forms import capture_steps
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.memory_budget import measured_on
from onebase_engine.engine.messages import EngineConfig
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.kernels.interface import Draws, Kernels
from onebase_engine.kernels.reference import ReferenceKernels
from onebase_engine.kernels.weights import weights_bytes
from onebase_server.processes.engine import sizes

BLOCK = 16


# ---- what several parts need ---------------------------------------------------------------------


def own_kernels(setup: Setup, found: Findings) -> Kernels:
    """Return the kernels in Triton, and check whether they pass their trial."""
    from onebase_engine.kernels import cuda

    if setup.interpreted:
        # It multiplies bf16 wrongly by itself. Trials of a model on few rows, and several pieces of a sum.
        mended = importlib.import_module("tests.engine.triton_on_cpu")
        small: Any = (cuda, served)
        small[0].PIECE = small[0].SPLIT = small[0].tl.constexpr(64)
        small[1].TILE = 8
        own: Any = cuda.CudaKernels()
        own.captures, own.capture = True, mended.Capture().of
        return cast(Kernels, own)
    kernels = cuda.CudaKernels()
    wrong: str | None = None
    try:
        wrong = cuda._differing(kernels, torch.device(setup.device))
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"[:500]
    said = "" if wrong is None else f"PyTorch computes in the engine: {wrong}"
    found.check("the kernels pass their trial at a start", wrong is None, said)
    return cast(Kernels, kernels)


def finish(setup: Setup) -> None:
    """Wait until all that was begun is computed."""
    if setup.device == "cuda":
        torch.cuda.synchronize()


def bandwidth(setup: Setup) -> float:
    """Return the bytes a second, read and written, of a large copy."""
    size = 1 << 31 if setup.device == "cuda" else 1 << 22
    source = torch.ones(size, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(6):
        finish(setup)
        began = time.perf_counter()
        target.copy_(source)
        finish(setup)
        seconds.append(time.perf_counter() - began)
    return 2 * size / min(seconds)


# ---- the engine ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One greedy request. `adapters`: names and weights of what is loaded."""

    name: str
    prompt: list[int]
    tokens: int
    adapters: tuple[tuple[str, float], ...] = ()
    tenant: str = "default"
    logprobs: int | None = 2

    def message(self) -> protocol.Submit:
        sampling = protocol.Sampling(
            temperature=0.0, max_tokens=self.tokens, ignore_eos=True, logprobs=self.logprobs
        )
        return protocol.Submit(
            id=self.name,
            prompt=self.prompt,
            sampling=sampling,
            adapters=[protocol.AdapterRef(*one) for one in self.adapters],
            tenant=self.tenant,
        )


def ledger(setup: Setup, found: Findings, when: str) -> None:
    """Report who has the device's memory."""
    if setup.device != "cuda":
        return
    free, total = torch.cuda.mem_get_info()
    stats = torch.cuda.memory_stats()
    held = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    held["of the driver, used"] = total - free
    found.figure(f"memory {when}", ", ".join(f"{size / 1e9:.2f} GB {what}" for what, size in held.items()))
    short = {name: stats.get(name, 0) for name in ("num_alloc_retries", "num_ooms")}
    if any(short.values()):
        found.figure(f"lack of memory {when}", str(short))


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def words(setup: Setup, count: int, seed: int) -> list[int]:
    """Return a random prompt of so many tokens."""
    most = bases.SHAPES[setup.shape]["vocab_size"]
    drawn: list[int] = np.random.default_rng(seed).integers(3, most, count).tolist()
    return drawn


def new_base(setup: Setup) -> torch.nn.Module:
    """Return the random base, on its device; its folder is `base` in the part's own."""
    folder = bases.write_folder(setup.shape, setup.folder / "base").folder
    return bases.random_base(folder, torch.device(setup.device))


def make_engine(
    setup: Setup, base: torch.nn.Module, kernels: Kernels | None, *, blocks: int, slots: int = 4,
    step_tokens: int = 2048, block: int = BLOCK, host_blocks: int = 0,
) -> Engine:  # fmt: skip
    """Return an engine as a server has it, for the kernels given; None: those that suit the device."""
    limits = SchedulerLimits(64, step_tokens, bases.SHAPES[setup.shape]["max_position_embeddings"])
    model = ServedModel(base, slots, kernels=kernels)
    return Engine(
        base,
        name="gpu-check",
        limits=limits,
        kv_blocks=blocks,
        block_size=block,
        host_blocks=host_blocks,
        slots=slots,
        model=model,
    )


def serve(engine: Engine, asked: Sequence[Asked], apart: int = 2) -> dict[str, list[protocol.ScoredToken]]:
    """Serve all requests, `apart` more before each step; return tokens with logprobs, floats as they are.

    Raises RuntimeError for a request that ends by an error.
    """
    found: dict[str, list[protocol.ScoredToken]] = {one.name: [] for one in asked}
    waiting = list(asked)
    while waiting or engine.busy:
        for one in waiting[:apart]:
            engine.submit(one.message())
        del waiting[:apart]
        engine.step()
        for output in engine.take_outputs():
            if output.error_message is not None:
                raise RuntimeError(f"{output.id}: {output.error_message}")
            found[output.id] += output.logprobs or []
    return found


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is launched while it is active: PyTorch's operators but views, and Triton's kernels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "empty" not in str(func):
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def counting(self, setup: Setup) -> Iterator[None]:
        """Count launches of Triton's kernels, which are no operators, by replacing their launch meanwhile."""
        if setup.interpreted:
            from triton.runtime.interpreter import GridExecutor as Kernel

            method = "__call__"
        else:
            from triton.runtime.jit import JITFunction as Kernel

            method = "run"
        whole = getattr(Kernel, method)

        def launch(kernel: Any, *args: Any, **named: Any) -> Any:
            self.names[getattr(getattr(kernel, "fn", kernel), "__name__", "kernel")] += 1
            with _disable_current_modes():
                return whole(kernel, *args, **named)

        setattr(Kernel, method, launch)
        try:
            with self:
                yield
        finally:
            setattr(Kernel, method, whole)


@dataclass(frozen=True)
class Load:
    """Decodes: so many rows over so many adapters. `kind`: `a` on q, k, v and o, `f` on all linear layers."""

    rows: int
    adapters: int = 0
    kind: str = "a"

    @property
    def title(self) -> str:
        where = ", all linear layers" if self.kind == "f" else ""
        return f"{counted(self.rows, 'row')}, {counted(self.adapters, 'adapter')}{where}"

    @property
    def names(self) -> list[str]:
        """Names of the adapters of the rows that have one."""
        return [f"{self.kind}{number % self.adapters}" for number in range(self.rows if self.adapters else 0)]


FULL = (Load(1), Load(1, 1), Load(1, 1, "f"), Load(16), Load(16, 8), Load(64), Load(64, 64))
SMALL = (Load(1, 1, "f"), Load(3, 2))


def engine(setup: Setup, found: Findings) -> None:
    """Measure steps of 1, 16 and 64 decodes: launches, syncs, time, tokens/s, part of the bandwidth."""
    kernels = own_kernels(setup, found)
    began = time.perf_counter()
    base = new_base(setup)
    finish(setup)
    found.figure("making the base", time.perf_counter() - began, "s")
    found.figure("the base", base_bytes(base) / 1e9, "GB")
    ledger(setup, found, "with the base")
    loads = SMALL if setup.interpreted else FULL
    prompt, warm, steps = (5, 2, 2) if setup.interpreted else (128, 8, 40)
    slots, rows = (max(getattr(load, one) for load in loads) for one in ("adapters", "rows"))
    blocks = RESERVED_BLOCKS + 8 + rows * -(-(prompt + warm + steps + 64) // BLOCK) + 2 * -(-2100 // BLOCK)
    began = time.perf_counter()
    running = make_engine(setup, base, kernels if setup.interpreted else None, blocks=blocks, slots=slots)
    finish(setup)
    found.figure("making the engine, with its trials", time.perf_counter() - began, "s")
    ledger(setup, found, "with the engine")
    found.figure("kernels", running.model.kernels.name)
    if running.model._graphs is None:
        found.figure("CUDA graphs", NOT_BUILT)
    rank = 4 if setup.interpreted else 16
    sizes: dict[str, int] = {}
    for name in {name for load in loads for name in load.names}:
        targets = ATTENTION if name.startswith("a") else bases.ALL_LINEAR
        weights = bases.random_adapter(base, rank, int(name[1:]), targets)
        running.put_adapter(name, weights)
        sizes[name] = weights_bytes(weights)
    head: Any = base
    read = base_bytes(base) - head.get_input_embeddings().weight.nbytes
    measured = Decodes(setup, found, running, bandwidth(setup), rank, prompt, warm, steps)
    for load in loads:
        bytes_read = read + sum(sizes[name] for name in set(load.names))
        for graphs in (True, False) if running.model._graphs is not None else (False,):
            found.trying(load.title, measured.measure, load, bytes_read, graphs)
            measured.clear()
    for place, count in measured.places.most_common(12):
        found.figure(f"syncs at {place}", count, "in four steps of each load")
    length = 20 if setup.interpreted else 2048
    for title, terms in (("", ()), (", an adapter on all linear layers", ((max(sizes), 1.0),))):
        seconds = 0.0
        for repeat in range(2):
            finish(setup)
            began = time.perf_counter()
            serve(running, [Asked("prefill", words(setup, length, 7 + repeat), 1, terms, logprobs=None)])
            finish(setup)
            seconds = time.perf_counter() - began
        if not setup.interpreted:
            found.figure(f"a prefill of {length} tokens{title}", length / seconds, "tokens/s")
    if not setup.interpreted:
        found.figure("most memory allocated", torch.cuda.max_memory_allocated() / 1e9, "GB")
    ledger(setup, found, "with captured steps")
    found.trying("draws", _draws, setup, found, running)
    found.trying("stalls", _stalls, setup, found, running, sizes)
    found.trying("captures", _captures, setup, found, running)
    running.check_base()
    found.check("nothing wrote to the base", True)


def step(setup: Setup, found: Findings) -> None:
    """Serve a few rows with adapters, for a tool that watches each access to memory."""
    base = new_base(setup)
    kernels = own_kernels(setup, found) if setup.interpreted else None
    running = make_engine(setup, base, kernels, blocks=RESERVED_BLOCKS + 40)
    running.put_adapter("a", bases.random_adapter(base, 4, 1, bases.ALL_LINEAR))
    prompts = ((5, ()), (9, (("a", 1.0),)), (3, (("a", 0.5),)))
    served = serve(running, [Asked(str(n), words(setup, n, n), 3, terms) for n, terms in prompts])
    found.check("each row has its tokens", all(len(one) == 3 for one in served.values()))


def _draws(setup: Setup, found: Findings, running: Engine) -> None:
    """Time what draws the next tokens of a step, by how they are drawn."""
    add = found.table("Draws, milliseconds", ("rows", "how", "host", "until they are read"))
    for rows in (2,) if setup.interpreted else (1, 64):
        logits = torch.randn(rows, running.model.vocabulary, device=setup.device).to(torch.bfloat16)
        for how, temperature, top_p in (("greedy", 0.0, 1.0), ("temperature", 0.7, 1.0), ("top_p", 0.7, 0.9)):
            columns = [np.full(rows, one, dtype=np.float32) for one in (temperature, top_p, 0.0)]
            none, random = np.zeros(rows, dtype=np.int64), np.linspace(0, 0.99, rows)
            draws = Draws(columns[0], none, columns[1], columns[2], random)
            host = whole = 0.0
            for _ in range(2 if setup.interpreted else 5):
                finish(setup)
                began = time.perf_counter()
                drawing = running.model.kernels.draw(list(logits), draws, [None] * rows)
                host = time.perf_counter() - began
                tokens = drawing()
                whole = time.perf_counter() - began
            found.check(f"{rows} rows have tokens, {how}", None not in tokens)
            add(rows, how, *((None, None) if setup.interpreted else (host * 1e3, whole * 1e3)))


def _captures(setup: Setup, found: Findings, running: Engine) -> None:
    """Time the captures of a start, and see what they take of the driver's memory."""
    graphs = running.model._graphs
    if graphs is None or setup.interpreted:
        return
    before = len(graphs._graphs)
    free, reserved, began = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved(), time.perf_counter()
    capture_steps(running)
    finish(setup)
    found.figure("captures of a start", time.perf_counter() - began, "s")
    found.figure("captured passes", len(graphs._graphs) - before, f"beside {before}")
    own = free - torch.cuda.mem_get_info()[0] - (torch.cuda.memory_reserved() - reserved)
    found.figure("memory of the driver for them, beside PyTorch's", own / 1e6, "MB")


def _stalls(setup: Setup, found: Findings, running: Engine, sizes: Mapping[str, int]) -> None:
    """Time what the stepping thread does between steps, and steps on both sides of where forms end."""
    add = found.table("What steps wait for, milliseconds", ("what", "host", "until the device is done"))
    model = running.model

    def timed(title: str, run: Callable[[], Any]) -> None:
        finish(setup)
        began = time.perf_counter()
        run()
        host = time.perf_counter() - began
        finish(setup)
        whole = time.perf_counter() - began
        add(title, *((None, None) if setup.interpreted else (host * 1e3, whole * 1e3)))

    def check() -> None:
        running.begin_base_check()
        while running._slices is not None:
            running.watch_base()

    running.watch_content()
    timed("a check of the base, in slices", check)
    running.check_base()
    largest = max(sizes, key=lambda name: sizes[name])
    weights = running.versions.weights[largest]
    found.figure("the adapter that is swapped", sizes[largest] / 1e6, "MB")
    slot = 0
    timed("an adapter into a slot", lambda: model.move_slots({slot: largest}, lambda _: weights))
    timed("an adapter out of a slot", lambda: model.move_slots({slot: None}, lambda _: {}))
    for _ in range(2 if setup.interpreted else 50):
        model.move_slots({slot: largest}, lambda _: weights)
        model.move_slots({slot: None}, lambda _: {})
    ledger(setup, found, "after 50 adapters in and out of a slot")
    counts = (2, 5) if setup.interpreted else (1, 16, 17, 64, 65, 76, 128, 129, 256, 257, 512)
    for count in counts:
        for tenant in ("first", "second"):  # the first time compiles and captures
            one = Asked(f"{count}, {tenant}", words(setup, count, count), 1, tenant=tenant, logprobs=None)
            timed(f"a prompt of {count}, the {tenant} time", partial(serve, running, [one]))


class Decodes:
    """Measures loads on an engine. per_second: bytes that the device copies; prompt, warm, steps: tokens of
    a row before it is measured, of its answer too, and measured."""

    def __init__(
        self, setup: Setup, found: Findings, running: Engine, per_second: float, rank: int, prompt: int,
        warm: int, steps: int,
    ) -> None:  # fmt: skip
        self._setup, self._found, self._running, self._per_second = setup, found, running, per_second
        self._prompt, self._warm, self._steps = prompt, warm, steps
        self._graphs = running.model._graphs
        self._asked: list[str] = []
        self.places: Counter[str] = Counter()
        """Number of waits for the device, by place in the sources."""
        found.figure("a large copy, read and written", per_second / 1e9, "GB/s")
        headings = ["load", "graphs", "ms a step", "tokens/s", "launches a step", "a layer", "syncs a step"]
        headings += ["kernels a step", "GPU busy", "byte floor, ms", "of the bandwidth"]
        self._add = found.table(f"Decodes after {prompt} tokens, adapters of rank {rank}", headings)

    def measure(self, load: Load, read: int, graphs: bool) -> None:
        """`read`: bytes of weights that a step reads. With CUDA graphs, or each kernel launched by itself."""
        setup, running = self._setup, self._running
        running.model._graphs = self._graphs if graphs else None
        count = self._warm + self._steps + 32
        none: list[tuple[tuple[str, float], ...]] = [()] * load.rows
        names = [((name, 1.0),) for name in load.names] or none
        asked = [
            Asked(
                f"{load.title} {row}",
                words(setup, self._prompt, 1000 + row),
                count,
                names[row],
                logprobs=None,
            )
            for row in range(load.rows)
        ]
        self._asked = [one.name for one in asked]
        _start(running, asked, self._warm)
        finish(setup)
        began = time.perf_counter()
        for _ in range(self._steps):
            running.step()
        finish(setup)
        seconds = (time.perf_counter() - began) / self._steps
        whole, layer = self._launches()
        syncs = _syncs(setup, running, 4, self.places)
        kernels, busy = _profiled(
            setup, running, self._found, f"{load.title}, graphs {'on' if graphs else 'off'}"
        )
        context = self._prompt + self._warm + self._steps // 2
        floor = (read + load.rows * context * running.model.kv_bytes_per_token) / self._per_second
        times = (seconds * 1e3, load.rows / seconds, floor * 1e3, floor / seconds)
        step, rate, least, part = (None,) * 4 if setup.interpreted else times
        told = None if graphs else layer.total()
        # What stands for a graph under the interpreter launches all of it again.
        launches = None if graphs and setup.interpreted else whole.total()
        self._add(
            load.title, "on" if graphs else "off", step, rate, launches, told, syncs, kernels, busy,
            least, part,
        )  # fmt: skip
        if graphs:
            # A pass that is not captured is launched kernel by kernel, by way of the modules.
            self._found.check(f"{load.title}: its steps are graphs", not layer, str(dict(layer))[:200])
            return
        self._found.check(f"{load.title}: at most 20 launches a layer", layer.total() <= 20, str(dict(layer)))
        self._found.check(f"{load.title}: Triton's launches are counted", layer["_products"] > 0)

    def clear(self) -> None:
        """End all rows."""
        self._running.model._graphs = self._graphs
        for name in self._asked:
            self._running.cancel(protocol.Cancel(id=name))
        while self._running.busy:
            self._running.step()
        self._running.take_outputs()

    def _launches(self) -> tuple[Counter[str], Counter[str]]:
        """Return the launches of a step, and of its first layer."""
        layer: Any = self._running.model._view.model.layers[0]
        step, own, forward = Counted(), Counted(), layer.forward

        def watched(*args: Any, **named: Any) -> Any:
            with own.counting(self._setup):
                return forward(*args, **named)

        with step.counting(self._setup):
            self._running.step()
        layer.forward = watched
        try:
            self._running.step()
        finally:
            layer.forward = forward
        return step.names, own.names


def _start(running: Engine, asked: Sequence[Asked], warm: int) -> None:
    """Step until each has `warm` tokens."""
    made: Counter[str] = Counter()
    for one in asked:
        running.submit(one.message())
    while any(made[one.name] < warm for one in asked):
        running.step()
        for output in running.take_outputs():
            if output.finish is not None:
                raise RuntimeError(f"{output.id} ended: {output.finish} {output.error_message}")
            made[output.id] += len(output.tokens)


def _syncs(setup: Setup, running: Engine, steps: int, places: Counter[str]) -> float | None:
    """Return how often a step waits for the device, and count the places."""
    if setup.device != "cuda":
        return None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(steps):
                running.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in told if "called a synchronizing" in str(one.message)]
    places.update(f"{Path(one.filename).name}:{one.lineno}" for one in waits)
    return len(waits) / steps


def _profiled(
    setup: Setup, running: Engine, found: Findings, title: str
) -> tuple[float | None, float | None]:
    """Return the kernels and copies of a step, and the part of the time in which one runs; None where
    nothing is seen."""
    if setup.device != "cuda":
        return None, None
    try:
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            began = time.perf_counter()
            for _ in range(4):
                running.step()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        seen = [event for event in profiled.events() or () if str(event.device_type).endswith("CUDA")]
        spent: float = sum(event.time_range.elapsed_us() for event in seen) / 1e6
        by_name: dict[str, list[float]] = {}
        for event in seen:
            by_name.setdefault(str(event.name)[:60], []).append(event.time_range.elapsed_us())
        add = found.table(
            f"Kernels of four steps, us: {title}", ("kernel", "count", "all", "mean", "longest")
        )
        for name, times in sorted(by_name.items(), key=lambda one: -sum(one[1]))[:15]:
            add(name, len(times), sum(times), sum(times) / len(times), max(times))
        return (len(seen) / 4, spent / seconds) if seen else (None, None)
    except Exception as error:
        found.figure("the profiler", f"{type(error).__name__}: {error}"[:200])
        return None, None


# ---- invariance, memory, PEFT ---------------------------------------------------------------------


def invariance(setup: Setup, found: Findings) -> None:
    """Compare tokens and logprobs of each row to the last bit: in company, alone, in chunks, preempted."""
    kernels = own_kernels(setup, found)
    used = kernels if setup.interpreted else None
    base = new_base(setup)
    rank = 4 if setup.interpreted else 16
    adapters = {
        "a": bases.random_adapter(base, rank, 1),
        "f": bases.random_adapter(base, 2 * rank, 2, bases.ALL_LINEAR),
    }
    mixes: tuple[tuple[tuple[str, float], ...], ...] = (
        (),
        (("a", 1.0),),
        (("f", 1.0),),
        (("a", 0.7), ("f", -0.4)),
    )
    small = setup.interpreted
    lengths = (18, 6, 4, 3) if small else (4000, 1500, 600, 65, 37, 16, 5, *(120,) * 9)
    tokens, block = (5, 2) if small else (40, BLOCK)
    asked = [Asked(str(i), words(setup, one, i), tokens, mixes[(i + 1) % 4]) for i, one in enumerate(lengths)]
    room = RESERVED_BLOCKS + 8 + sum(-(-(one + tokens) // block) + 1 for one in lengths)

    def new(**changes: int) -> Engine:
        made = make_engine(
            setup,
            base,
            used,
            **{"blocks": room, "block": block, "step_tokens": 64 if small else 2048, **changes},
        )
        for name, weights in adapters.items():
            made.put_adapter(name, weights)
        return made

    def compare(title: str, got: Mapping[str, list[protocol.ScoredToken]]) -> None:
        wrong = [name for name, one in got.items() if one != together[name]]
        longest = max((lengths[int(name)] for name in wrong), default=0)
        told = (
            f"{len(wrong)} of {len(got)} rows differ, one of {longest} tokens"
            if wrong
            else f"{len(got)} rows"
        )
        found.check(f"{title}: the same bits", not wrong, told)

    running = new()
    together = serve(running, asked)
    found.figure("rows", len(asked))
    found.figure("the longest prompt", max(lengths), "tokens")
    found.figure("different texts", len({tuple(one.token for one in row) for row in together.values()}))
    some = asked[:3] if small else asked
    compare("alone", {one.name: serve(running, [_of(one, "alone")])[one.name] for one in some})
    if not small:
        compare("the other way round", serve(running, [_of(one, "back") for one in asked[::-1]], 1))
        compare("with prefixes that are cached", serve(running, asked))
    if running.model._graphs is not None:
        running.model._graphs = None
        compare("without graphs", serve(running, [_of(one, "no graphs") for one in some]))
    del running
    # An odd number, so that no chunk ends with a block.
    compare("in small chunks", serve(new(step_tokens=7 if small else 333), asked))
    tight = RESERVED_BLOCKS + 2 + len(lengths) + sum(-(-one // block) for one in lengths)
    cramped = new(blocks=tight, host_blocks=3 * room)
    compare("preempted", serve(cramped, asked))
    found.check("rows were preempted", cramped.scheduler.preemptions > 0, str(cramped.scheduler.preemptions))
    if not small:
        serve(cramped, [_of(one, "between") for one in asked])  # whose blocks take the places of the others'
        before = cramped.counters.restored_tokens
        compare("with prefixes that were in host memory", serve(cramped, asked))
        count = cramped.counters.restored_tokens - before
        found.check("prefixes came back from host memory", count > 0, f"{count} tokens")
    cramped.check_base()


def _of(one: Asked, tenant: str) -> Asked:
    """Return the same, of a tenant that has no prefixes yet."""
    return replace(one, tenant=tenant)


def memory(setup: Setup, found: Findings) -> None:
    """Check that a cache which is sized as a server's leaves room for its steps. A prompt whose step does not
    fit into memory: the rows beside it get the bits that they get alone."""
    kernels = own_kernels(setup, found)
    base = new_base(setup)
    _sized(setup, found, base)
    small = setup.interpreted
    length, tokens, step_tokens = (24, 3, 64) if small else (7000, 48, 8192)
    others = [Asked(str(i), words(setup, 4 if small else 100, i), tokens) for i in range(2 if small else 4)]
    blocks = RESERVED_BLOCKS + 8 + 2 * (length + 8 * (120 + tokens)) // BLOCK
    used = kernels if small else None
    running = make_engine(setup, base, used, blocks=blocks, step_tokens=step_tokens)
    alone = serve(running, others)
    times = _make_short(setup, found, running)
    outputs: dict[str, list[protocol.ScoredToken]] = {one.name: [] for one in (*others, _CULPRIT)}
    ends: dict[str, str] = {}
    for one in (
        *(_of(other, "beside") for other in others),
        replace(_CULPRIT, prompt=words(setup, length, 99)),
    ):
        running.submit(one.message())
    while running.busy:
        running.step()
        for output in running.take_outputs():
            outputs[output.id] += output.logprobs or []
            if output.finish is not None:
                ends[output.id] = f"{output.finish} {output.error_code or ''} {output.error_message or ''}"
    del outputs[_CULPRIT.name]
    found.figure("times that memory was short", times())
    found.figure("what became of the long prompt", ends[_CULPRIT.name][:200])
    found.check("memory was short", times() > 0)
    found.check("the rows beside it have the bits that they have alone", outputs == alone, str(ends)[:300])
    again = serve(running, [_of(one, "after") for one in others])
    found.check("and so after it", again == alone)
    found.check("no block is lost", running.pool.free == running.pool.capacity)


def _sized(setup: Setup, found: Findings, base: torch.nn.Module) -> None:
    """Measure the largest step, give the rest to the KV cache; then decode rows next to a long prompt."""
    small, device = setup.interpreted, torch.device(setup.device)
    if small:
        # As if it were a GPU's: of this machine's memory others may take any part.
        own: Any = sys.modules[sizes.__module__]
        own.kv_memory_available = lambda device: 8 << 30
    measure = (lambda run: int(run() is not None)) if device.type == "cpu" else measured_on(device)
    most = bases.SHAPES[setup.shape]["max_position_embeddings"]
    limits = SchedulerLimits(2, 8, 64) if small else SchedulerLimits(64, 2048, most, 7)
    model = ServedModel(base, 1, kernels=ReferenceKernels(tiled=False) if small else None)
    began = time.monotonic()
    blocks, _ = sizes(EngineConfig(base_folder="", max_rank=16, max_slots=1), base, model, limits, measure)
    found.figure("sizing the cache, its largest step included", time.monotonic() - began, "s")
    found.figure("the cache", blocks * BLOCK, "tokens")
    engine = Engine(base, name="sized", limits=limits, kv_blocks=blocks, slots=1, model=model)
    before = _shortages(device)
    longest = min(16 if small else 8000, limits.max_length - 8, (blocks - RESERVED_BLOCKS) * BLOCK // 2)
    decoding = [Asked(str(i), words(setup, 4, i), 8) for i in range(limits.max_sequences - 1)]
    serve(engine, [*decoding, Asked("long", words(setup, longest, 99), 2)], apart=limits.max_sequences)
    found.check("the steps of a server find the memory that was left for them", _shortages(device) == before)
    del engine, model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _shortages(device: torch.device) -> int:
    return int(torch.cuda.memory_stats(device).get("num_ooms", 0)) if device.type == "cuda" else 0


_CULPRIT = Asked("the long prompt", [], 2)


def _make_short(setup: Setup, found: Findings, running: Engine) -> Callable[[], int]:
    """Leave the engine too little memory for a long step, on the CPU as if; returns what says how often
    memory was short."""
    if not setup.interpreted:
        finish(setup)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (192 << 20)) / total)
        found.figure("memory beyond the engine's own", 192, "MiB")
        before = _shortages(torch.device("cuda"))
        return lambda: _shortages(torch.device("cuda")) - before
    forward, failed = running.model.forward, list[int]()

    def short(batch: Any) -> Any:
        if len(batch.input_ids) > 8:
            failed.append(len(batch.input_ids))
            raise torch.OutOfMemoryError("as if there were no memory")
        return forward(batch)

    running.model.forward = short  # type: ignore[method-assign]
    found.figure("memory", "as if it were short for more than 8 tokens")
    return lambda: len(failed)


def peft(setup: Setup, found: Findings) -> None:
    """Run transformers' `generate` with PEFT on the same base: what the engine's figures stand beside."""
    from peft import PeftModel

    shutil.rmtree(setup.folder / "adapters", ignore_errors=True)
    base = new_base(setup)
    small = setup.interpreted
    count, prompt, tokens = (2, 5, 3) if small else (8, 128, 40)
    view: Any = peft_view(base)
    with contextlib.suppress(Exception):
        view.set_attn_implementation("sdpa")
    found.figure("attention", view.config._attn_implementation)
    made = [
        bases.adapter_folder(base, setup.folder / "adapters" / str(i), 4 if small else 16, i)
        for i in range(count)
    ]
    model: Any = PeftModel.from_pretrained(view, str(made[0]), adapter_name="a0").eval()
    for i, path in enumerate(made[1:], 1):
        model.load_adapter(str(path), adapter_name=f"a{i}")
    table = found.table(f"`generate`, {prompt} tokens in, {tokens} out", ("load", "ms a token", "tokens/s"))
    many_rows = 2 if small else 16
    for rows, used in ((1, 0), (1, 1), (many_rows, 1), (many_rows, count)):
        title = f"{counted(rows, 'row')}, {counted(used, 'adapter')}"
        names = [f"a{i % used}" for i in range(rows)] if used else None
        ids = torch.tensor([words(setup, prompt, 50 + row) for row in range(rows)], device=setup.device)
        how: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        if names is not None and len(set(names)) > 1:
            how["adapter_names"] = names
        with (
            contextlib.nullcontext() if names is not None else model.disable_adapter(),
            torch.inference_mode(),
        ):
            for many in (2, tokens):
                finish(setup)
                began = time.perf_counter()
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=many,
                    min_new_tokens=many,
                    **how,
                )
                finish(setup)
                seconds = time.perf_counter() - began
        made_tokens = out.shape[1] - prompt
        found.check(f"{title}: {tokens} tokens", made_tokens == tokens, str(made_tokens))
        table(title, *((None, None) if small else (seconds / tokens * 1e3, rows * tokens / seconds)))


PARTS = {
    "engine": engine,
    "step": step,
    "invariance": invariance,
    "memory": memory,
    "peft": peft,
}

if __name__ == "__main__":
    sys.exit(run_part(PARTS, sys.argv[1:]))
