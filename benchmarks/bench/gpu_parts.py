"""The parts of the GPU check that are one process: `python -m bench.gpu_parts NAME FILE SETUP`.

What each must show is in its docstring. Under Triton's interpreter, on the CPU, all of them run too.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import shutil
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bench import random_base as bases
from bench.gpu_report import NOT_BUILT, Findings, Setup, run_part
from bench.lora import ATTENTION
from onebase_engine.base.load import base_bytes
from onebase_engine.base.view import peft_view
from onebase_engine.engine import engine as stepping
from onebase_engine.engine import fusion
from onebase_engine.engine import graphs as captured
from onebase_engine.engine import messages as protocol
from onebase_engine.engine import model as served
from onebase_engine.engine.batch import StepBatch
from onebase_engine.engine.drafts import Drafts
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.forms import capture_steps, compile_kernels
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.memory_budget import measured_on, rounding_bytes, slot_bytes
from onebase_engine.engine.messages import EngineConfig
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.kernels import cuda
from onebase_engine.kernels.cuda import CaptureError, StepSize
from onebase_engine.kernels.interface import Draws, Kernels
from onebase_engine.kernels.reference import ReferenceKernels, ReferenceLinear
from onebase_engine.kernels.weights import weights_bytes
from onebase_engine.lora.slots import SlotLinear
from onebase_server.processes.engine import sizes

BLOCK = 16
Result = TypeVar("Result")


# ---- what several parts need ---------------------------------------------------------------------


def make_kernels(setup: Setup, switches: cuda.Switches) -> Kernels:
    """Return kernels in Triton that compute by these switches."""
    own: Any = cuda.CudaKernels(switches)
    if setup.interpreted:
        # It multiplies bf16 wrongly by itself. Trials of a model on few rows, and several pieces of a sum.
        mended = importlib.import_module("tests.engine.triton_on_cpu")
        small: Any = (cuda, served, fusion)
        small[0].PIECE = small[0].SPLIT = small[0].tl.constexpr(64)
        small[1].TILE = 8
        small[2]._PASSES = (0, 8), (1, 8)
        own.captures, own.capture = switches.graphs, mended.Capture().of
    return cast(Kernels, own)


def own_kernels(setup: Setup, found: Findings, **switches: bool) -> Kernels:
    """Return the kernels in Triton, and check whether they pass their trial. switches: those that are not as
    usual."""
    # As each process of a server has it.
    torch.set_float32_matmul_precision("highest")
    cuda.keep_sums_whole(torch.device(setup.device))
    kernels: Any = make_kernels(setup, replace(cuda.usual_switches(), **switches))
    if setup.interpreted:
        return cast(Kernels, kernels)
    wrong: str | None = None
    try:
        wrong = cuda._differing(kernels, torch.device(setup.device))
    except Exception as error:
        found.raised("the trial at a start")
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


def of_tenant(one: Asked, tenant: str) -> Asked:
    """Return the same, of a tenant that has no prefixes yet."""
    return replace(one, tenant=tenant)


class Ledger:
    """Tables of the device's memory: what is taken when, and what was set aside beside what is taken."""

    def __init__(self, setup: Setup, found: Findings) -> None:
        self._on, self._found = setup.device == "cuda", found
        columns = "when", "allocated", "reserved", "used, of the driver", "beyond PyTorch's", "free"
        self._add_use = found.table("Memory, MB", (*columns, "retries", "lacks"))
        self._add_sized = found.table(
            "Memory set aside and taken, MB", ("what", "set aside", "taken", "part")
        )
        self.note("at first")

    def note(self, when: str) -> None:
        """Report who has the device's memory."""
        if not self._on:
            self._add_use(when, *(None,) * 7)
            return
        free, total = torch.cuda.mem_get_info()
        reserved, stats = torch.cuda.memory_reserved(), torch.cuda.memory_stats()
        sizes = torch.cuda.memory_allocated(), reserved, total - free, total - free - reserved, free
        counts = (stats.get(name, 0) for name in ("num_alloc_retries", "num_ooms"))
        self._add_use(when, *(size / 1e6 for size in sizes), *counts)

    def allocated(self) -> int:
        """Return the bytes of all tensors on the device; 0 on the CPU, where PyTorch does not count them."""
        return torch.cuda.memory_allocated() if self._on else 0

    def compare(self, what: str, aside: int, taken: int | None) -> None:
        """Report bytes that were set aside beside those that are taken, which must not be more."""
        if taken is None:
            self._add_sized(what, aside / 1e6, None, None)
            return
        self._add_sized(what, aside / 1e6, taken / 1e6, taken / aside if aside else None)
        said = f"{taken / 1e6:.1f} of {aside / 1e6:.1f} MB"
        self._found.check(f"{what}: no more than was set aside", taken <= aside, said)


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
    model = ServedModel(base, slots, kernels=kernels, step_tokens=step_tokens)
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


def serve(
    engine: Engine, asked: Sequence[Asked], apart: int = 2, texts: Mapping[str, Sequence[int]] | None = None
) -> dict[str, list[protocol.ScoredToken]]:
    """Serve all requests, `apart` more before each step; return tokens with logprobs, floats as they are.

    Raises RuntimeError for a request that ends by an error.

    Args:
        texts: what requests will be answered, by name: their drafts.
    """
    found: dict[str, list[protocol.ScoredToken]] = {one.name: [] for one in asked}
    waiting = list(asked)
    while waiting or engine.busy:
        for one in waiting[:apart]:
            submit(engine, one, (texts or {}).get(one.name))
        del waiting[:apart]
        engine.step()
        for output in engine.take_outputs():
            if output.error_message is not None:
                raise RuntimeError(f"{output.id}: {output.error_message}")
            found[output.id] += output.logprobs or []
    return found


class KnownDrafts(Drafts):
    """Drafts of a sequence whose text is known, so that all of them are right."""

    def __init__(self, text: Sequence[int]) -> None:
        super().__init__()
        self._text, self.right = text, 1.0

    def propose(
        self, tokens: Sequence[int], most: int, forced: Sequence[int] = (), *, drawing: bool = False
    ) -> list[int]:
        begin = len(tokens) + drawing
        self._draft = list(self._text[begin : begin + most])
        return self._draft


def submit(engine: Engine, one: Asked, text: Sequence[int] | None = None) -> None:
    """Queue a request. text: the answer if it is known, by which its drafts are right."""
    engine.submit(one.message())
    for sequence in engine._sequences.get(one.name, ()) if text is not None else ():
        sequence.drafts = KnownDrafts([*one.prompt, *(text or ())])


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
    ledger = Ledger(setup, found)
    found.trying("workspaces", _workspaces, setup, ledger)
    found.stage("making the base")
    kernels = own_kernels(setup, found)
    began = time.perf_counter()
    base = new_base(setup)
    finish(setup)
    found.figure("making the base", time.perf_counter() - began, "s")
    found.figure("the base", base_bytes(base) / 1e9, "GB")
    ledger.note("with the base")
    loads = SMALL if setup.interpreted else FULL
    prompt, warm, steps = (5, 2, 2) if setup.interpreted else (128, 8, 40)
    slots, rows = (max(getattr(load, one) for load in loads) for one in ("adapters", "rows"))
    blocks = RESERVED_BLOCKS + 8 + rows * -(-(prompt + warm + steps + 64) // BLOCK) + 2 * -(-2100 // BLOCK)
    found.stage("making the engine")
    began = time.perf_counter()
    running = make_engine(setup, base, kernels if setup.interpreted else None, blocks=blocks, slots=slots)
    finish(setup)
    found.figure("making the engine, with its trials", time.perf_counter() - began, "s")
    ledger.note("with the engine")
    found.figure("kernels", running.model.kernels.name)
    _fallbacks(found, running)
    found.stage("compiling")
    began = time.perf_counter()
    compile_kernels(running)
    found.figure("compiling what steps will ask for", time.perf_counter() - began, "s")
    passes, late, captures = Passes(running), LateForms(running), Captures(setup, found, running)
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
        found.stage(f"a prefill{title}")
        seconds, asked = 0.0, Asked("prefill", [], 1, terms, logprobs=None)
        for repeat in range(2):
            finish(setup)
            began = time.perf_counter()
            serve(running, [replace(asked, prompt=words(setup, length, 7 + repeat))])
            finish(setup)
            seconds = time.perf_counter() - began
        prefill = partial(serve, running, [replace(asked, prompt=words(setup, length, 9))])
        _profiled(setup, prefill, 1, found, f"a prefill{title}")
        if not setup.interpreted:
            found.figure(f"a prefill of {length} tokens{title}", length / seconds, "tokens/s")
    if not setup.interpreted:
        found.figure("most memory allocated", torch.cuda.max_memory_allocated() / 1e9, "GB")
    ledger.note("with captured steps")
    found.trying("draws", _draws, setup, found, running)
    found.trying("drafts", _drafts, setup, found, running)
    found.trying("stalls", _stalls, setup, found, running, sizes)
    ledger.note("after adapters in and out of a slot")
    found.trying("pauses", _pauses, setup, found, running, base, rank)
    found.trying("captures", _captures, setup, found, running, ledger)
    captures.report()
    passes.report(found)
    found.check("no kernel is compiled after the start", not late.names, ", ".join(late.names)[:500])
    found.trying("a capture that fails", _failing_capture, setup, found, running)
    scratch = getattr(running.model.kernels, "_scratch", {})
    unpacked = sum(one.nbytes for one in scratch.values())
    found.figure("weights that are unpacked for many rows", unpacked / 1e6, "MB")
    running.check_base()
    found.check("nothing wrote to the base", True)


def _workspaces(setup: Setup, ledger: Ledger) -> None:
    """Compare what cuBLAS takes at its first product with what it is left, by `cuda.WHOLE_SUMS`."""
    device = torch.device(setup.device)
    if not cuda.library_may_fit(device):
        return
    cuda.keep_sums_whole(device)
    x = torch.ones(16, 64, dtype=torch.bfloat16, device=device)
    sums = torch.empty(16, 16, device=device)
    before = ledger.allocated()
    cuda.library_product(x, x, sums)
    finish(setup)
    ledger.compare("workspaces of cuBLAS", (8 * 16 + 1) << 10, ledger.allocated() - before)


def step(setup: Setup, found: Findings) -> None:
    """Serve a few rows with adapters, for a tool that watches each access to memory."""
    base = new_base(setup)
    kernels = own_kernels(setup, found, graphs=False)  # under the tool no pass can be captured
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


def _drafts(setup: Setup, found: Findings, running: Engine) -> None:
    """Time steps with drafts that are all right: what further rows cost, next to what the scheduler assumes,
    and what drafts can give."""
    limits, small = running.scheduler.limits, setup.interpreted
    prompt, tokens = (4, 6) if small else (128, 48)
    add = found.table(
        "Drafts that are all right",
        ("rows", "draft", "steps", "ms a step", "tokens/s", "a further row, of a step of one row"),
    )
    found.figure("a further row, as the scheduler assumes", running.model.kernels.draft_cost)
    one_row = 0.0
    try:
        for rows in (1, 2) if small else (1, 4, 8):
            asked = [
                Asked(f"{rows}, {row}", words(setup, prompt, 300 + row), tokens, logprobs=None)
                for row in range(rows)
            ]
            texts: dict[str, list[int]] = {}
            bare = 0.0
            for draft in (0, 3) if small else (0, 1, 3, 7):
                running.scheduler.limits = replace(limits, draft_tokens=draft)
                given = [replace(one, tenant=f"drafts of {draft}") for one in asked]
                before = running.counters.right_draft_tokens
                got, steps, seconds, made = _drafted(setup, running, given, texts)
                texts, step = texts or got, seconds / steps
                bare, one_row = bare or step, one_row or step
                if draft:
                    title = f"{counted(rows, 'row')}, drafts of {draft}"
                    right = running.counters.right_draft_tokens - before
                    found.check(f"{title}: the text is the one without", got == texts)
                    found.check(f"{title}: drafts were right", right > 0, f"{right} tokens")
                further = (step - bare) / (rows * draft * one_row) if draft else None
                add(rows, draft, steps, *((None,) * 3 if small else (step * 1e3, made / seconds, further)))
    finally:
        running.scheduler.limits = limits


def _drafted(
    setup: Setup, running: Engine, asked: Sequence[Asked], texts: Mapping[str, Sequence[int]]
) -> tuple[dict[str, list[int]], int, float, int]:
    """Serve requests, with drafts of the texts that are known; return the texts, and the numbers of steps, of
    seconds and of tokens from the first token of each row on."""
    found: dict[str, list[int]] = {one.name: [] for one in asked}
    for one in asked:
        submit(running, one, texts.get(one.name, ()))
    steps = before = 0
    began = time.perf_counter()
    while running.busy:
        if not before and all(found.values()):
            finish(setup)
            before, steps, began = sum(map(len, found.values())), 0, time.perf_counter()
        running.step()
        steps += 1
        for output in running.take_outputs():
            if output.error_message is not None:
                raise RuntimeError(f"{output.id}: {output.error_message}")
            found[output.id] += output.tokens
    finish(setup)
    return found, steps, time.perf_counter() - began, sum(map(len, found.values())) - before


def _fallbacks(found: Findings, running: Engine) -> None:
    """Report what is fused, and which layers PyTorch computes, with what keeps the kernels from them."""
    modules = dict(running.model._view.named_modules())
    fused = Counter(type(one).__name__ for one in modules.values() if "forward" in vars(one))
    linear = {name: one for name, one in modules.items() if isinstance(one, SlotLinear)}
    fused["layers of the same rows"] = sum(one.shared is not None for one in linear.values())
    add = found.table("Modules with a forward of our own", ("module", "count"))
    for name, count in sorted(fused.items()):
        add(name, count)
    others: dict[tuple[Any, ...], list[str]] = {}
    for name, one in linear.items():
        if isinstance(one.kernel, ReferenceLinear):
            base: Any = one.base
            facts = type(base).__name__, base.in_features, base.out_features, str(base.weight.dtype)
            others.setdefault((*facts, base.weight.data_ptr() % 16), []).append(name)
    if others:
        headings = ("first", "layers", "class", "in", "out", "dtype", "bytes off 16")
        add = found.table("Layers by PyTorch", headings)
        for facts, names in others.items():
            add(names[0], len(names), *facts)
    found.figure("layers by a kernel", len(linear) - sum(map(len, others.values())), f"of {len(linear)}")


class LateForms:
    """Names of the kernels that are compiled from now on, while sequences would wait, each with the step that
    asked for it."""

    def __init__(self, running: Engine) -> None:
        self.names: list[str] = []
        knobs: Any = importlib.import_module("triton").knobs
        before = knobs.runtime.jit_post_compile_hook

        def note(*, fn: Any, **more: Any) -> None:
            self.names.append(f"{fn.name} in step {running.counters.steps}")
            if before is not None:
                before(fn=fn, **more)

        knobs.runtime.jit_post_compile_hook = note


class Passes:
    """Counts the steps that are graphs, and those that are not by why."""

    def __init__(self, running: Engine) -> None:
        self._graphs, self._counts = running.model._graphs, Counter[str]()
        if self._graphs is not None:
            whole, own = self._graphs.run_graph, self._graphs

            def run_graph(batch: StepBatch) -> Any:
                got = whole(batch)
                self._counts["replayed" if got is not None else self._why(own, batch)] += 1
                return got

            own.run_graph = run_graph  # type: ignore[method-assign]

    @staticmethod
    def _why(graphs: captured.Graphs, batch: StepBatch) -> str:
        size = graphs._size(batch)
        if size is None:
            many = len(batch.input_ids) > captured.ROWS[-1]
            return (
                f"of more than {captured.ROWS[-1]} rows"
                if many
                else "with adapters or contexts that no graph has"
            )
        return "of a size that cannot be captured" if size in graphs._graphs else "of a size that is new"

    def report(self, found: Findings) -> None:
        if self._counts:
            add = found.table("Steps, by whether they are a graph", ("steps", "count"))
            for why, count in self._counts.most_common():
                add(why, count)


NODES = (
    "kernel", "copy", "fill", "host", "graph", "empty", "wait", "event", "signal", "semaphore", "allocation",
    "release", "batch", "condition",
)  # fmt: skip
"""Kinds of a graph's nodes, by their numbers in CUDA (CUgraphNodeType)."""
LAUNCHED = {"kernel", "copy", "fill", "operator", "empty"}
"""Kinds that a captured pass may have. Operators are PyTorch's, where no GPU tells what they become."""


def node_kinds(graph: int, library: str = "libcuda.so.1") -> Counter[str]:
    """Return how many nodes of each kind a CUDA graph has, which is given by its address.

    Raises RuntimeError where the driver refuses.
    """
    driver, count, kind = ctypes.CDLL(library), ctypes.c_size_t(), ctypes.c_int()

    def call(name: str, *given: Any) -> None:
        if code := getattr(driver, name)(*given):
            raise RuntimeError(f"{name}: error {code} of the driver")

    call("cuGraphGetNodes", ctypes.c_void_p(graph), None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    call("cuGraphGetNodes", ctypes.c_void_p(graph), nodes, ctypes.byref(count))
    found = Counter[str]()
    for node in nodes:
        call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        found[NODES[kind.value] if kind.value < len(NODES) else f"kind {kind.value}"] += 1
    return found


class Captures:
    """Watches the captures of an engine: size, outcome, nodes, seconds and free memory of each."""

    def __init__(self, setup: Setup, found: Findings, running: Engine) -> None:
        self._setup, self._found = setup, found
        self._layers = int(running.model._layers)
        self._said, self._spent = "", dict[str, float]()
        self._nodes: Counter[str] | None = None
        self._counted: dict[StepSize, Counter[str]] = {}
        kernels: Any = running.model.kernels
        graphs: Any = running.model._graphs
        if graphs is None:
            return
        headings = ("rows", "splits", "adapters", "rank", "outcome", "nodes", "s launched", "captured")
        self._add = found.table(
            "Captured passes", (*headings, "compared", "MB free before", "MB taken of the device")
        )
        graphs._capture = partial(self._capture, graphs._capture)
        kernels.unawaited = partial(self._step, "launched", kernels.unawaited)
        kernels.capture = partial(self._step, "captured", partial(self._keep_graph, kernels.capture))

    def report(self) -> None:
        """Report the nodes of a layer, which the memory for graphs is set aside by, and check their kinds."""
        if not self._counted:
            return
        strange = {kind for nodes in self._counted.values() for kind in nodes} - LAUNCHED
        self._found.check("captured passes are kernels and copies", not strange, ", ".join(sorted(strange)))
        most = max(nodes.total() for nodes in self._counted.values())
        self._found.figure("most nodes of a captured pass, by its layers", most / self._layers)
        self._found.figure("nodes of a layer, as memory is set aside for them", captured.LAYER_NODES)

    def _capture(self, whole: Callable[..., Any], size: StepSize, batch: StepBatch) -> Any:
        self._said, self._spent, self._nodes = "", {}, None
        free, began = self._free(), time.perf_counter()
        graph = whole(size, batch)
        seconds = time.perf_counter() - began
        taken = free - self._free()
        outcome = "captured" if graph is not None else self._said or "other bits than kernel by kernel"
        if self._nodes is not None:
            self._counted[size] = self._nodes
        nodes = self._nodes or Counter[str]()
        said = ", ".join(f"{count} {kind}" for kind, count in nodes.most_common())
        launched, recorded = (self._spent.get(name, 0.0) for name in ("launched", "captured"))
        times = launched, recorded, seconds - launched - recorded
        numbers = (None,) * 5 if self._setup.interpreted else (*times, free / 1e6, taken / 1e6)
        self._add(size.rows, size.splits, size.terms, size.most_rank, outcome, said, *numbers)
        return graph

    def _step(self, name: str, whole: Callable[..., Any], *given: Any) -> Any:
        began = time.perf_counter()
        try:
            return whole(*given)
        except Exception as error:
            self._said = f"{name}: {type(error).__name__}: {error}"[:300]
            raise
        finally:
            self._spent[name] = time.perf_counter() - began

    def _keep_graph(self, whole: Callable[..., Any], *given: Any) -> Any:
        """Capture, and count the nodes of what PyTorch would not keep."""
        if self._setup.interpreted:
            result = whole(*given)
            self._nodes = whole.__self__.nodes  # type: ignore[attr-defined]
            return result
        kept: Any = partial(torch.cuda.CUDAGraph, keep_graph=True)
        made: list[Any] = []

        def make() -> Any:
            made.append(kept())
            return made[-1]

        with patch.object(torch.cuda, "CUDAGraph", make):
            result = whole(*given)
        made[-1].instantiate()
        try:
            self._nodes = node_kinds(made[-1].raw_cuda_graph())
        except Exception as error:  # no capture fails by what only looks at it
            self._found.figure("nodes of a captured pass", f"{type(error).__name__}: {error}"[:200])
        return result

    def _free(self) -> int:
        if self._setup.device != "cuda":
            return 0
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])


def _failing_capture(setup: Setup, found: Findings, running: Engine) -> None:
    """Let captures fail by a wait for the device; then steps, and other captures, are as before.

    PyTorch's allocators are in a capture that failed until `_abandon` takes them out of it; that of
    page-locked memory it may leave (pytorch/pytorch#180395).
    """
    kernels: Any = running.model.kernels
    if not kernels.captures:
        return
    device, reasons = running.model.device, list[str]()
    asked = [Asked("captures", words(setup, 4 if setup.interpreted else 64, 400), 3)]
    before = serve(running, asked)
    held = _held(setup)
    for _ in range(4):
        try:
            kernels.capture(lambda: bool(torch.ones(1 << 10, device=device).sum() > 1), device)
        except (CaptureError, RuntimeError) as error:
            reasons.append(str(error))
    found.check("a capture that waits for the device fails", len(reasons) == 4, "; ".join(reasons[:1])[:300])
    x = torch.zeros(8, device=device)
    replay, _ = kernels.capture(lambda: x.add_(1), device)
    x.zero_()
    for _ in range(3):
        replay()
    found.check("another capture is replayed after them", bool((x == 3).all()), str(x[0].item()))
    again = serve(running, [of_tenant(one, "after") for one in asked])
    found.check("steps have their bits after them", again == before)
    for name, size in _held(setup).items():
        found.figure(f"{name}, more after four of them", (size - held[name]) / 1e6, "MB")


def _held(setup: Setup) -> dict[str, int]:
    """Return the bytes that PyTorch has reserved, on the device and page-locked."""
    if setup.device != "cuda":
        return {}
    found = {"reserved memory": torch.cuda.memory_reserved()}
    with contextlib.suppress(AttributeError, RuntimeError):
        stats: Any = torch.cuda.host_memory_stats()
        found["page-locked memory"] = int(stats.get("allocated_bytes.current", 0))
    return found


def _captures(setup: Setup, found: Findings, running: Engine, ledger: Ledger) -> None:
    """Time the captures of a start, and compare what they take of memory with what is set aside for them."""
    graphs, model = running.model._graphs, running.model
    if graphs is None:
        return
    each = captured.executable_bytes(model._layers, model._mixtures)
    if setup.interpreted:
        ledger.compare("captured passes", model.graph_bytes, None)
        return
    before = len(graphs._graphs)
    free, reserved, began = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved(), time.perf_counter()
    capture_steps(running)
    finish(setup)
    torch.cuda.empty_cache()
    made = len(graphs._graphs) - before
    found.figure("captures of a start", time.perf_counter() - began, "s")
    found.figure("captured passes", made, f"beside {before}")
    taken = free - torch.cuda.mem_get_info()[0]
    own = max(taken - (torch.cuda.memory_reserved() - reserved), 0)
    ledger.note("with the captures of a start")
    ledger.compare("captured passes", model.graph_bytes, max(taken, 0))
    if made > 0:
        ledger.compare("a captured pass, beyond PyTorch's", each, own // made)


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
    counts = (2, 5) if setup.interpreted else (1, 16, 17, 64, 65, 76, 128, 129, 256, 257, 512)
    for count in counts:
        for tenant in ("first", "second"):  # the first time compiles and captures
            one = Asked(f"{count}, {tenant}", words(setup, count, count), 1, tenant=tenant, logprobs=None)
            timed(f"a prompt of {count}, the {tenant} time", partial(serve, running, [one]))


def _pauses(setup: Setup, found: Findings, running: Engine, base: torch.nn.Module, rank: int) -> None:
    """Time the steps of rows that decode while something else comes: the longest is the pause that a stream
    sees."""
    small = setup.interpreted
    rows, prompt, steps = (2, 4, 4) if small else (16, 16, 32)
    new = bases.random_adapter(base, rank, 77, bases.ALL_LINEAR)

    def come(title: str, length: int, *adapters: tuple[str, float]) -> None:
        running.submit(Asked(title, words(setup, length, 500), 2, adapters, title, logprobs=None).message())

    def come_with_adapter() -> None:
        running.put_adapter("new", new)
        come("with an adapter", 5, ("new", 1.0))

    coming: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "a check of the base": running.begin_base_check,
        "a request with an adapter in no slot": come_with_adapter,
        "a prompt of 100 tokens": lambda: come("a prompt", 6 if small else 100),
        "a prompt of 1,000 tokens": lambda: come("a long prompt", 9 if small else 1000),
    }
    add = found.table(
        f"Steps of {rows} rows, milliseconds, while something comes", ("what", "p50", "longest")
    )
    for what, begin in coming.items():
        tenant = f"pauses by {what}"
        asked = [
            Asked(f"{tenant} {row}", words(setup, prompt, 600 + row), steps + 4, tenant=tenant, logprobs=None)
            for row in range(rows)
        ]
        _start(running, asked, 2)
        seconds = list[float]()
        for number in range(steps):
            if number == steps // 4:
                begin()
            finish(setup)
            began = time.perf_counter()
            running.step()
            running.watch_base()
            seconds.append(time.perf_counter() - began)
        while running.busy:
            running.step()
        ends = [output.error_message for output in running.take_outputs() if output.finish == "error"]
        found.check(f"rows end without an error beside {what}", not ends, "; ".join(map(str, ends))[:300])
        add(what, *((None, None) if small else (1e3 * float(np.median(seconds)), 1e3 * max(seconds))))
    running.unload_adapter("new")
    running.check_base()


PHASES: tuple[tuple[str, Callable[[Engine], Any], str], ...] = (
    ("plan", lambda running: running.scheduler, "plan"),
    ("pack", lambda running: running._packer, "pack"),
    ("fill in tokens", lambda running: running._packer, "fill"),
    ("write to its place", lambda running: running.model, "prepare"),
    ("send and launch", lambda running: running.model, "forward"),
    ("draw", lambda running: stepping, "begin_draw_apart"),
    ("wait and read", lambda running: running, "_wait"),
    ("commit", lambda running: running, "_commit"),
)
"""Phases of a step: what the report calls each, and the object and its method that is the phase."""


def _timed(function: Callable[..., Result], spent: dict[str, float], phase: str) -> Callable[..., Result]:
    def timed(*given: Any, **named: Any) -> Result:
        began = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            spent[phase] += time.perf_counter() - began

    return timed


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
        headings = ["load", "graphs", "ms a step", "p50", "longest", "tokens/s", "launches a step", "a layer"]
        headings += ["syncs a step", "kernels a step", "GPU busy", "byte floor, ms", "of the bandwidth"]
        self._add = found.table(f"Decodes after {prompt} tokens, adapters of rank {rank}", headings)
        self._add_host = found.table(
            "Host, milliseconds a step", ("load", "graphs", *(phase for phase, *_ in PHASES), "all")
        )

    def measure(self, load: Load, read: int, graphs: bool) -> None:
        """`read`: bytes of weights that a step reads. With CUDA graphs, or each kernel launched by itself."""
        setup, running = self._setup, self._running
        running.model._graphs = self._graphs if graphs else None
        count = self._warm + self._steps + 40
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
        began, ends = time.perf_counter(), list[float]()
        for _ in range(self._steps):
            running.step()
            ends.append(time.perf_counter())
        finish(setup)
        seconds = (time.perf_counter() - began) / self._steps
        each = [1e3 * (end - start) for start, end in pairwise((began, *ends))]
        self._host(load, graphs)
        whole, layer = self._launches()
        syncs = _syncs(setup, running, 4, self.places)
        title = f"{load.title}, graphs {'on' if graphs else 'off'}"
        kernels, busy = _profiled(setup, running.step, 4, self._found, title)
        context = self._prompt + self._warm + self._steps // 2
        floor = (read + load.rows * context * running.model.kv_bytes_per_token) / self._per_second
        spread = float(np.median(each)), max(each)
        times = (seconds * 1e3, *spread, load.rows / seconds, floor * 1e3, floor / seconds)
        *step, rate, least, part = (None,) * 6 if setup.interpreted else times
        told = None if graphs else layer.total()
        # What stands for a graph under the interpreter launches all of it again.
        launches = None if graphs and setup.interpreted else whole.total()
        self._add(
            load.title, "on" if graphs else "off", *step, rate, launches, told, syncs, kernels, busy,
            least, part,
        )  # fmt: skip
        if graphs:
            # A pass that is not captured is launched kernel by kernel, by way of the modules.
            self._found.check(f"{load.title}: its steps are graphs", not layer, str(dict(layer))[:200])
            return
        self._found.check(f"{load.title}: at most 20 launches a layer", layer.total() <= 20, str(dict(layer)))
        self._found.check(f"{load.title}: Triton's launches are counted", layer["_products"] > 0)

    def _host(self, load: Load, graphs: bool) -> None:
        """Time what the stepping thread does in some steps, by phase."""
        steps, spent = 2 if self._setup.interpreted else 8, defaultdict[str, float](float)
        with contextlib.ExitStack() as stack:
            for phase, owner, name in PHASES:
                place = owner(self._running)
                timed = _timed(getattr(place, name), spent, phase)
                stack.enter_context(patch.object(place, name, timed))
            finish(self._setup)
            began = time.perf_counter()
            for _ in range(steps):
                self._running.step()
            spent["all"] = time.perf_counter() - began
        told: list[float | None] = [
            spent[phase] / steps * 1e3 for phase in (*(phase for phase, *_ in PHASES), "all")
        ]
        timeless = [None] * len(told)
        self._add_host(
            load.title, "on" if graphs else "off", *(timeless if self._setup.interpreted else told)
        )

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
    setup: Setup, run: Callable[[], object], count: int, found: Findings, title: str
) -> tuple[float | None, float | None]:
    """Return the kernels and copies of a run, of `count` that are watched, and the part of the time in which
    one runs; None where nothing is seen."""
    if setup.device != "cuda":
        return None, None
    try:
        from torch.profiler import ProfilerActivity, profile

        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            began = time.perf_counter()
            for _ in range(count):
                run()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        seen = [event for event in profiled.events() or () if str(event.device_type).endswith("CUDA")]
        spent: float = sum(event.time_range.elapsed_us() for event in seen) / 1e6
        by_name: dict[str, list[float]] = {}
        for event in seen:
            by_name.setdefault(str(event.name)[:60], []).append(event.time_range.elapsed_us())
        steps = f"of {count} steps, " if count > 1 else ""
        headings = ("kernel", "count", "all", "of all", "mean", "shortest", "longest")
        add = found.table(f"Kernels {steps}us: {title}", headings)
        for name, times in sorted(by_name.items(), key=lambda one: -sum(one[1]))[:15]:
            own = sum(times)
            add(name, len(times), own, own / spent / 1e6, own / len(times), min(times), max(times))
        gaps = _gaps([(one.time_range.start, one.time_range.end) for one in seen])
        found.figure(f"idle between kernels, {steps}{title}", sum(gaps), f"us in {len(gaps)} gaps")
        return (len(seen) / count, spent / seconds) if seen else (None, None)
    except Exception as error:
        found.figure("the profiler", f"{type(error).__name__}: {error}"[:200])
        return None, None


def _gaps(ranges: Sequence[tuple[float, float]]) -> list[float]:
    """Return the times, in the ranges' unit, between the end of all earlier ranges and the next one."""
    gaps, last = list[float](), float("inf")
    for begin, end in sorted(ranges):
        if begin > last:
            gaps.append(begin - last)
        last = end if last == float("inf") else max(last, end)
    return gaps


# ---- memory, PEFT -----------------------------------------------------------------------------------


def memory(setup: Setup, found: Findings) -> None:
    """Check that a cache which is sized as a server's leaves room for its steps. A prompt whose step does not
    fit into memory: the rows beside it get the bits that they get alone."""
    kernels = own_kernels(setup, found)
    ledger = Ledger(setup, found)
    base = new_base(setup)
    ledger.note("with the base")
    found.stage("sizing")
    _sized(setup, found, base, ledger)
    found.stage("a long prompt")
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
        *(of_tenant(other, "beside") for other in others),
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
    again = serve(running, [of_tenant(one, "after") for one in others])
    found.check("and so after it", again == alone)
    found.check("no block is lost", running.pool.free == running.pool.capacity)


def _sized(setup: Setup, found: Findings, base: torch.nn.Module, ledger: Ledger) -> None:
    """Measure the largest step, give the rest to the KV cache; then decode rows next to a long prompt, and
    fill the slots. Compare what each takes with what was set aside for it."""
    small, device = setup.interpreted, torch.device(setup.device)
    if small:
        # As if it were a GPU's: of this machine's memory others may take any part.
        own: Any = sys.modules[sizes.__module__]
        own.kv_memory_available = lambda device: 8 << 30
    measure = (lambda run: int(run() is not None)) if device.type == "cpu" else measured_on(device)
    most = bases.SHAPES[setup.shape]["max_position_embeddings"]
    limits = SchedulerLimits(2, 8, 64) if small else SchedulerLimits(64, 2048, most, 7)
    slots, rank = (2, 4) if small else (8, 16)
    kernels = ReferenceKernels(tiled=False) if small else None
    model = ServedModel(base, slots, kernels=kernels, step_tokens=limits.step_tokens)
    ledger.note("with the served view")
    began = time.monotonic()
    config = EngineConfig(base_folder="", max_rank=rank, max_slots=slots)
    blocks, slot_memory, aside = sizes(config, base, model, limits, measure)
    found.figure("sizing the cache, its largest step included", time.monotonic() - began, "s")
    found.figure("the cache", blocks * BLOCK, "tokens")
    ledger.note("after sizing")
    held = ledger.allocated()
    engine = Engine(
        base, name="sized", limits=limits, kv_blocks=blocks, slots=slots, slot_memory=slot_memory, model=model
    )
    ledger.note("with the KV cache")
    block_bytes = model.kv_bytes_per_block(BLOCK)
    cache: Any = model._attention.cache
    taken = sum(view.nbytes for view in cache.by_block) if small else ledger.allocated() - held
    ledger.compare("the KV cache", blocks * block_bytes + rounding_bytes(model), taken)
    before = _shortages(device)
    longest = min(16 if small else 8000, limits.max_length - 8, (blocks - RESERVED_BLOCKS) * BLOCK // 2)
    decoding = [Asked(str(i), words(setup, 4, i), 8) for i in range(limits.max_sequences - 1)]
    if not small:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = 0 if small else torch.cuda.memory_reserved()
    serve(engine, [*decoding, Asked("long", words(setup, longest, 99), 2)], apart=limits.max_sequences)
    found.check("the steps of a server find the memory that was left for them", _shortages(device) == before)
    step = aside.get(_LARGEST_STEP, 0)
    graphs = model.graph_bytes  # passes were captured meanwhile
    ledger.compare(
        "the largest step and captured passes",
        step + graphs,
        None if small else torch.cuda.max_memory_reserved() - held,
    )
    ledger.note("after its largest step")
    _fill_slots(setup, engine, ledger, slots, rank, aside.get(_SLOTS, 0) or slot_memory)
    for who, size in aside.items():
        if who not in (_LARGEST_STEP, _SLOTS) and size:
            ledger.compare(who, size, None)
    del engine, model, cache
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


_LARGEST_STEP, _SLOTS = "the largest step (--step-tokens, --max-length)", "slots (--slot-memory)"
"""Names, in the division of memory, of what is measured here."""


def _fill_slots(setup: Setup, engine: Engine, ledger: Ledger, slots: int, rank: int, set_aside: int) -> None:
    """Fill all slots with adapters on all linear layers, and compare what they take with what was set aside;
    on the CPU slots point at versions in host memory, of which that many fit."""
    engine.model._graphs = None  # whose outputs are not the slots'
    held, size = ledger.allocated(), 0
    for number in range(slots):
        weights = bases.random_adapter(engine._base, rank, 800 + number, bases.ALL_LINEAR)
        size += weights_bytes(weights)
        engine.put_adapter(f"full {number}", weights)
        one = Asked(f"full {number}", words(setup, 5, 800 + number), 2, ((f"full {number}", 1.0),))
        serve(engine, [one])
    finish(setup)
    ledger.note("with all slots filled")
    if setup.interpreted:
        set_aside = slot_bytes(engine.layers.values(), slots, rank)
    ledger.compare("slots", set_aside, size if setup.interpreted else ledger.allocated() - held)


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
    "memory": memory,
    "peft": peft,
}

if __name__ == "__main__":
    sys.exit(run_part(PARTS, sys.argv[1:]))
