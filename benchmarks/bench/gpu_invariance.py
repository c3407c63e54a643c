"""The part of the GPU check that compares bits: `python -m bench.gpu_invariance invariance FILE SETUP`.

Each row must have the bits that it has in any company. Where one has others, the part says from which module
on, and on which of the kernels' switches that hangs. Under Triton's interpreter, on the CPU, it runs too.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from bench import random_base as bases
from bench.gpu_parts import (
    BLOCK,
    Asked,
    make_engine,
    make_kernels,
    new_base,
    of_tenant,
    own_kernels,
    serve,
    words,
)
from bench.gpu_report import Findings, Setup, run_part
from onebase_engine.engine.batch import StepBatch
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS
from onebase_engine.engine.messages import ScoredToken
from onebase_engine.engine.sequence import StepPlan
from onebase_engine.kernels.cuda import CudaLayers, Switches
from onebase_engine.kernels.interface import Kernels, RowMap
from onebase_engine.kernels.weights import AdapterWeights

Rows = dict[str, list[ScoredToken]]
"""Tokens with logprobs of each request, by its name."""
SWITCHES = tuple(one.name for one in fields(Switches))
MOST_TURNED = 2
"""Number of ways to serve with other bits for which switches are turned around."""


@dataclass(frozen=True)
class Way:
    """A way to serve requests in which each row must have the bits that it has among all at once."""

    title: str
    parts: Sequence[Sequence[Asked]]
    """Requests that are served one part after the other."""
    apart: int = 2
    """Number of requests that come before each step."""
    before: Sequence[Sequence[Asked]] = ()
    """Requests that are served first, and not compared."""
    graphs: bool = True
    draft: int = 0
    """Number of tokens of the longest draft. Drafts are what all at once have given, and so right."""
    changes: Mapping[str, int] = field(default_factory=dict)
    """Arguments of the engine that are others."""

    def serve(self, running: Engine, known: Rows) -> Rows:
        """Return the rows that an engine gives in this way. known: those of all at once."""
        model, scheduler, found = running.model, running.scheduler, Rows()
        graphs, limits = model._graphs, scheduler.limits
        texts = {name: [one.token for one in row] for name, row in known.items()} if self.draft else {}
        scheduler.limits = replace(limits, draft_tokens=self.draft * model.drafts)
        model._graphs = graphs if self.graphs else None
        try:
            for part in self.before:
                serve(running, part, self.apart)
            for part in self.parts:
                found |= serve(running, part, self.apart, texts)
        finally:
            model._graphs, scheduler.limits = graphs, limits
        return found


@dataclass(frozen=True)
class Fleet:
    """Base and adapters of engines that are compared. room: blocks of their KV caches."""

    setup: Setup
    base: torch.nn.Module
    adapters: Mapping[str, AdapterWeights]
    room: int

    def engine(self, kernels: Kernels | None, **changes: int) -> Engine:
        """Return an engine. kernels: None for those that suit the device."""
        small = self.setup.interpreted
        usual = {"blocks": self.room, "block": 2 if small else BLOCK, "step_tokens": 64 if small else 2048}
        made = make_engine(self.setup, self.base, kernels, **usual | changes)
        for name, weights in self.adapters.items():
            made.put_adapter(name, weights)
        return made


def invariance(setup: Setup, found: Findings) -> None:
    """Compare tokens and logprobs of each row to the last bit: in company, alone, in chunks, preempted."""
    own = own_kernels(setup, found)
    base, rank = new_base(setup), 4 if setup.interpreted else 16
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
    fleet = Fleet(setup, base, adapters, room)
    tight = RESERVED_BLOCKS + 2 + len(lengths) + sum(-(-one // block) for one in lengths)
    ways = list(_ways(asked, small, {"blocks": tight, "host_blocks": 3 * room}))
    differing, usual = _compare(found, fleet, own if small else None, asked, ways)
    if usual is not None:
        for way in differing[:MOST_TURNED]:
            turn_switches(found, way.title, usual, partial(_differing, fleet, way, asked))
    if small:
        found.trying("a fault that is planted", _find_planted_fault, found, fleet)


def _compare(
    found: Findings, fleet: Fleet, kernels: Kernels | None, asked: Sequence[Asked], ways: Sequence[Way]
) -> tuple[list[Way], Switches | None]:
    """Compare all ways with all requests at once; return those with other bits, and the switches of the
    kernels, if they have any."""
    running = fleet.engine(kernels)
    together = serve(running, asked)
    lengths = {one.name: len(one.prompt) for one in asked}
    found.figure("rows", len(asked))
    found.figure("the longest prompt", max(lengths.values()), "tokens")
    found.figure("different texts", len({tuple(one.token for one in row) for row in together.values()}))
    engines: dict[tuple[tuple[str, int], ...], Engine] = {(): running}
    differing = list[Way]()
    for way in ways:
        found.stage(way.title)
        key = tuple(way.changes.items())
        one = engines[key] = engines.get(key) or fleet.engine(kernels, **way.changes)
        right, restored = one.counters.right_draft_tokens, one.counters.restored_tokens
        got = way.serve(one, together)
        wrong = [name for name, row in got.items() if row != together[name]]
        longest = max((lengths[name] for name in wrong), default=0)
        said = f"{len(wrong)} of {len(got)} rows differ, one of {longest} tokens"
        found.check(f"{way.title}: the same bits", not wrong, said if wrong else f"{len(got)} rows")
        if way.draft:
            count = one.counters.right_draft_tokens - right
            found.check(f"{way.title}: drafts were right", count > 0, f"{count} tokens")
        if way.title == "preempted":
            count = one.scheduler.preemptions
            found.check("rows were preempted", count > 0, str(count))
        if way.title == "with prefixes that were in host memory":
            count = one.counters.restored_tokens - restored
            found.check("prefixes came back from host memory", count > 0, f"{count} tokens")
        if wrong:
            differing.append(way)
            places = (running, [asked]), (one, way.parts)
            found.trying(f"{way.title}: a trace", trace, found, way.title, wrong[0], *places)
    for one in engines.values():
        one.check_base()
    return differing, getattr(running.model.kernels, "switches", None)


def _ways(asked: Sequence[Asked], small: bool, cramped: Mapping[str, int]) -> Iterator[Way]:
    """Yield ways to serve the requests. cramped: changes of an engine in which not all have room."""
    some = asked[1:3] if small else asked  # with an adapter on all layers, and with two

    def apart(title: str, requests: Sequence[Asked]) -> list[Asked]:
        return [of_tenant(one, title) for one in requests]

    yield Way("alone", [[one] for one in apart("alone", some)])
    if not small:
        yield Way("the other way round", [[one] for one in apart("back", asked[::-1])], 1)
        yield Way("with prefixes that are cached", [asked], before=[asked])
    yield Way("without graphs", [[one] for one in apart("no graphs", some)], graphs=False)
    yield Way("with drafts", [apart("drafts", some)], draft=3 if small else 7)
    # An odd number, so that no chunk ends with a block.
    yield Way("in small chunks", [asked], changes={"step_tokens": 7 if small else 333})
    yield Way("preempted", [asked], changes=cramped)
    if not small:
        between = apart("between", asked)  # whose blocks take the places of the others'
        yield Way("with prefixes that were in host memory", [asked], before=[asked, between], changes=cramped)


# ---- on which switch a difference hangs ------------------------------------------------------------


def turn_switches(
    found: Findings,
    title: str,
    usual: Switches,
    differing: Callable[[Switches], int],
    names: Sequence[str] = SWITCHES,
) -> list[str]:
    """Compare again with one switch after the other turned around; report how many rows differ then.

    Args:
        usual: the switches with which rows have other bits.
        differing: compares with these switches, and returns the number of rows that differ.
        names: the switches that are turned.

    Returns:
        The names of those with which no row differs.
    """
    add = found.table(f"{title}: rows with other bits, by switches", ("switches", "rows"))
    ends = list[str]()

    def compared(switches: Switches, said: str) -> int | None:
        found.stage(f"{title}, {said}")
        try:
            count = differing(switches)
        except Exception as error:
            found.raised(f"{title}, {said}")
            add(said, f"{type(error).__name__}: {error}"[:200])
            return None
        add(said, count)
        return count

    verdict = f"{title}: the difference hangs on"
    if compared(usual, "as usual") == 0:
        found.figure(verdict, "chance: computed again, no row differs")
        return ends
    if compared(replace(usual, **dict.fromkeys(names, False)), "all off"):
        found.figure(verdict, "no switch: with all off, rows differ too")
        return ends
    for name in names:
        turned = not getattr(usual, name)
        if compared(replace(usual, **{name: turned}), f"{name} {'on' if turned else 'off'}") == 0:
            ends.append(name)
    found.figure(verdict, ", ".join(ends) or "more than one switch")
    return ends


def _differing(fleet: Fleet, way: Way, asked: Sequence[Asked], switches: Switches) -> int:
    """Return the number of rows that differ between all at once and another way, by kernels with these
    switches."""
    gc.collect()  # the engines of the switches before
    if fleet.setup.device == "cuda":
        torch.cuda.empty_cache()
    kernels = make_kernels(fleet.setup, switches)
    running = fleet.engine(kernels)
    known = serve(running, asked)
    got = way.serve(fleet.engine(kernels, **way.changes) if way.changes else running, known)
    return sum(row != known[name] for name, row in got.items())


def _find_planted_fault(found: Findings, fleet: Fleet) -> None:
    """Plant a fault that depends on a row's company and on one switch, which has to be found."""
    asked = [Asked(str(number), words(fleet.setup, 3, 700 + number), 2) for number in range(2)]
    way, whole = Way("planted", [[of_tenant(one, "alone")] for one in asked]), CudaLayers.__call__

    def faulty(
        layers: CudaLayers, x: torch.Tensor, rows: RowMap, onto: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        ys = whole(layers, x, rows, onto)
        return [y * 1.25 for y in ys] if layers._gated and 1 < len(x) < 6 else ys

    with patch.object(CudaLayers, "__call__", faulty):
        compare = partial(_differing, fleet, way, asked)
        usual = Switches(graphs=False, joined=False, turned=False, sums=False)
        ends = turn_switches(found, "a planted fault", usual, compare, ("ahead", "gated"))
    found.check("a planted fault is traced to its switch", ends == ["gated"], str(ends))


# ---- from which module on bits differ ------------------------------------------------------------------


class RowSums:
    """Sums over the bits of what modules give one sequence's rows, by position and module, in the order of
    the calls."""

    def __init__(self, running: Engine, name: str) -> None:
        self._running, self._name = running, name
        self.sums: dict[tuple[int, str], int] = {}
        self.steps: dict[int, int] = {}
        """Rows of the step that computed each position."""
        self._rows: dict[int, list[tuple[int, int, int]]] = {}
        """First position, first row and number of rows of the sequence's segments, by batch."""
        self._own: list[tuple[int, int, int]] = []
        self._count = 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the steps of the engine, which are launched kernel by kernel meanwhile."""
        model, packer = self._running.model, self._running._packer
        graphs, model._graphs = model._graphs, None
        pack, launch = packer.pack, model.launch

        def packed(plan: StepPlan, slots: Mapping[str, int]) -> StepBatch:
            batch, first = pack(plan, slots), 0
            own = self._rows[id(batch)] = []
            for segment in plan.segments:
                if segment.sequence.id == self._name:
                    own.append((segment.start, first, segment.length))
                first += segment.length
            return batch

        def launched(batch: StepBatch) -> Any:
            self._own, self._count = self._rows.pop(id(batch), []), len(batch.input_ids)
            return launch(batch)

        named = [(name, module) for name, module in model._view.named_modules() if name]
        hooks = [module.register_forward_hook(partial(self._note, name)) for name, module in named]
        try:
            with patch.object(packer, "pack", packed), patch.object(model, "launch", launched):
                yield
        finally:
            model._graphs = graphs
            for hook in hooks:
                hook.remove()

    def _note(self, name: str, module: torch.nn.Module, given: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        if not self._own or not isinstance(output, torch.Tensor) or output.dtype != torch.bfloat16:
            return
        if output.numel() == 0 or output.numel() % self._count or output.shape[:2].numel() != self._count:
            return
        bits = output.reshape(self._count, -1).contiguous().view(torch.int16).long()
        odd = 2 * torch.arange(bits.shape[1], device=bits.device) + 1
        sums = (bits * odd).sum(1).tolist()
        for start, first, length in self._own:
            for number in range(length):
                self.sums.setdefault((start + number, name), sums[first + number])
                self.steps[start + number] = self._count

    def first_other(self, other: RowSums) -> tuple[int, str] | None:
        """Return position and module of the first sum that is another one there; None if there is none."""
        shared = [key for key in self.sums if other.sums.get(key, self.sums[key]) != self.sums[key]]
        return min(shared, key=lambda key: key[0], default=None)  # of a position the first that was called


Serving = tuple[Engine, Sequence[Sequence[Asked]]]
"""An engine, and requests that are served one part after the other."""


def trace(found: Findings, title: str, name: str, first: Serving, second: Serving) -> None:
    """Serve requests in two ways again, and report the first module that gives row `name` other bits."""
    traces = []
    for number, (running, parts) in enumerate((first, second)):
        trace = RowSums(running, name)
        with trace.watching():
            for part in parts:
                serve(running, [of_tenant(one, f"{title}, traced {number}") for one in part])
        traces.append(trace)
    place = traces[0].first_other(traces[1])
    if place is None:
        found.figure(f"{title}: the first module with other bits", "none, launched kernel by kernel")
        return
    position, module = place
    steps = " and ".join(str(trace.steps[position]) for trace in traces)
    said = f"{module}, of row {name} at token {position}, in steps of {steps} rows"
    found.figure(f"{title}: the first module with other bits", said)


if __name__ == "__main__":
    sys.exit(run_part({"invariance": invariance}, sys.argv[1:]))
