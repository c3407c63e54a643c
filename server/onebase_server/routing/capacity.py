"""Capacity planning: how many servers a load takes and what limits them, by figures and then a simulation.

A decode step reads the weights once, and of each row its context and its adapter, or takes what the rows'
operations take, whichever is longer; it launches kernels; and it takes no less than Python takes for the
layers, which a CUDA graph spares. A prompt is computed, and takes its time from the steps. Nothing here was
measured on a server: it is what bytes, operations and launches predict, at the rates that `Device` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from onebase_server.routing.simulation import WARMING, Figures, OneBase, Scenario, requests, simulate

Resource = Literal["compute", "KV memory", "rows", "slots", "host memory", "time a token", "queues"]

_FULL = 0.85
"""Part of compute, rows or slots that is planned with: arrivals are not even."""
_HOMES = 2
"""Number of servers that have an adapter in host memory."""
_MOST_REPLICAS = 10_000
_TRIES = 8
"""Largest number of fleet sizes that are simulated, each an eighth larger."""
_REQUESTS = 6000
"""Number of requests of a simulation."""
_TURNOVERS = 12
"""Least length of a simulation, in mean requests one after the other."""
_MOST_SLOTS = 1024
_STAGED = 1.25
"""Memory of a slot, as a multiple of its bytes: copies under way take a quarter more."""
_SLOT_PARTS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Parts of the free memory that are tried for slots; the first is the engine's own."""


# What is assumed of a GPU. `make gpu-check` predicts with it, at best and at worst; here it is the worst.

BANDWIDTHS: dict[str, float] = {
    "t4": 320, "l4": 300, "a10": 600, "l40s": 864, "rtx3090": 936, "rtx4090": 1008, "rtx5090": 1792,
    "a100-40": 1555, "a100-80": 2039, "h100": 3350, "h200": 4800, "b200": 8000,
}  # fmt: skip
"""Memory bandwidth of the GPUs by their data sheets, in GB/s."""
REACHED = (0.85, 0.6)
"""Part of the bandwidth that matrix products reach, at best and at worst."""
LAUNCH = ((1e-6, 4e-6), (2.5e-6, 10e-6))
"""Seconds for each kernel besides its bytes, in a CUDA graph and outside of one, at best and at worst."""
LAYER_LAUNCHES, OTHER_LAUNCHES = 17, 24
"""Number of kernels of a layer with an adapter on all of its linear layers, and of a step besides its layers.
Short contexts need one kernel less in a layer. `make gpu-check CHECK_ARGS="--device cpu --only engine"`
counts them."""
GRAPH_ROWS = 64
"""Largest number of rows for which a step is a CUDA graph (`engine/graphs.py`)."""
BEST, WORST = 0, 1


def launch_seconds(inside: int, outside: int, case: int) -> float:
    """Return the time, in seconds, that launches take in a step whose layers are in a CUDA graph.

    inside: kernels of the layers. outside: other kernels, half of which a graph holds. case: BEST or WORST.
    """
    captured, apart = LAUNCH[case]
    return (inside + outside / 2) * captured + outside / 2 * apart


def bytes_read(stored: int, quantized: int, blocksize: int) -> int:
    """Return the bytes of weights read in a step. Kernels read each block's statistic in fp32, and one byte
    of it is stored.

    stored: bytes in memory. quantized: 4-bit weights among them.
    """
    return stored + 3 * quantized // blocksize


class UnservableError(ValueError):
    """No number of servers meets the demand; the message says why and what to change."""


@dataclass(frozen=True)
class Device:
    """A device, with the rates that the engine is expected to reach on it.

    Args:
        memory: bytes that a server may take.
        bandwidth: bytes a second.
        rate: operations a second.
        how: where the rates come from.
        layer_seconds: time that Python and kernel launches take for a layer of each step, while the device
            computes.
        graph_rows: largest number of rows for which a step is a CUDA graph, in which the host takes no time,
            but each kernel some (`LAUNCH`); 0 on a CPU.
    """

    name: str
    memory: int
    bandwidth: float
    rate: float
    how: str
    layer_seconds: float = 0.0
    graph_rows: int = 0


@dataclass(frozen=True)
class BaseFigures:
    """Figures of a base.

    Args:
        bytes: in memory.
        read: bytes that a decode step reads, whatever the number of rows.
        flops: operations for a token.
        kv_bytes: bytes of a token in the KV cache.
    """

    bytes: int
    read: int
    flops: int
    kv_bytes: int
    layers: int


@dataclass(frozen=True)
class Demand:
    """Load to plan for, and its goals.

    Args:
        adapters: number of adapters, used by Zipf's law with `skew`.
        adapter_bytes: bytes of each in memory.
        requests: requests a second, of `prompt` and `answer` tokens.
        ttft: seconds to the first token for 99 of 100.
        token: seconds from one token to the next; None is any.
    """

    adapters: int
    adapter_bytes: int
    requests: float
    prompt: int
    answer: int
    ttft: float
    skew: float = 0.9
    token: float | None = None


@dataclass(frozen=True)
class Serving:
    """Configuration of each server.

    Args:
        rows, slots: the largest numbers; as many as memory holds, up to these.
        slot_memory: bytes; None: what takes the fewest servers.
        host_memory: bytes for adapters.
        store: bytes a second from the store, after `store_latency` seconds.
        link: bytes a second from host memory.
    """

    rows: int = 256
    slots: int = _MOST_SLOTS
    slot_memory: int | None = None
    host_memory: int = 64 << 30
    store: float = 0.5e9
    store_latency: float = 0.15
    link: float = 10e9


@dataclass(frozen=True)
class Setup:
    """Division of one server's memory. rows: as many of these requests as the KV cache holds, up to
    `Serving.rows`."""

    rows: int
    slots: int
    kv_memory: int
    slot_memory: int
    host_adapters: int
    kv_binds: bool


@dataclass(frozen=True)
class Point:
    """Prediction for each server, with one number of servers under the load.

    running: rows at once. used: the part of compute that prompts and rows take. prefill, token: seconds.
    ttft: of half and of 99 of 100; None where nothing was simulated. cold: the part of the requests for which
    the store was asked.
    """

    replicas: int
    running: float
    used: float
    prefill: float
    token: float
    ttft: tuple[float, float] | None = None
    cold: float = 0.0


@dataclass(frozen=True)
class Capacity:
    """Result of the planning. needs: servers, by the resource that takes so many. binds: the resource that
    takes most. chosen, more: with that number, and with one more; `meets`: whether the goal is met."""

    setup: Setup
    needs: dict[Resource, float]
    binds: Resource
    chosen: Point
    more: Point
    meets: bool


def capacity(
    device: Device,
    base: BaseFigures,
    demand: Demand,
    serving: Serving,
    *,
    replicas: int | None = None,
    seed: int = 0,
    drawn: int = _REQUESTS,
    tick: Callable[[int], None] = lambda replicas: None,
) -> Capacity:
    """Return the fewest servers that meet the goals, as far as the simulation goes, or the result of
    `replicas`.

    Args:
        drawn: requests of each simulation.
        tick: called before each simulation with its number of servers.

    Raises UnservableError.
    """
    models = [
        _Model(device, base, demand, serving, setup) for setup in _setups(device, base, demand, serving)
    ]
    model = min(models, key=lambda one: math.ceil(max(one.needs().values()) - 1e-9))
    setup, needs = model.setup, model.needs()
    binds = max(needs, key=lambda one: needs[one])
    least = max(1, math.ceil(needs[binds] - 1e-9))
    if replicas is not None:
        tick(replicas)
        chosen = model.simulated(replicas, drawn, seed)
        binds = binds if replicas < least else _late(model, chosen) or binds
        more = model.simulated(replicas + 1, drawn, seed)
        return Capacity(setup, needs, binds, chosen, more, model.meets(chosen))
    for _ in range(_TRIES):
        tick(least)
        chosen = model.simulated(least, drawn, seed)
        late = _late(model, chosen)
        if late is None:
            break
        binds, least = late, least + max(1, least // 8)
    tick(chosen.replicas + 1)
    more = model.simulated(chosen.replicas + 1, drawn, seed)
    return Capacity(setup, needs, binds, chosen, more, model.meets(chosen))


def _late(model: _Model, point: Point) -> Resource | None:
    """Return the resource because of which the goal is not met, or None if it is."""
    if model.meets(point):
        return None
    in_memory = model.setup.host_adapters * point.replicas
    return "host memory" if point.cold > 0.01 and in_memory < _HOMES * model.adapters else "queues"


def _setups(device: Device, base: BaseFigures, demand: Demand, serving: Serving) -> list[Setup]:
    """Return the divisions of a server's memory to try: a part of the free memory for slots, the rest for KV
    blocks.

    Raises UnservableError.
    """
    free = 0.9 * (device.memory - base.bytes)
    a_row, a_slot = (demand.prompt + demand.answer) * base.kv_bytes, _STAGED * demand.adapter_bytes
    if free < a_row + a_slot:
        raise UnservableError(
            f"{device.name} has {device.memory / 1e9:.1f} GB, and the base takes {base.bytes / 1e9:.1f} GB: "
            "no request fits next to it. Take a larger device, or a smaller base"
        )
    given = serving.slot_memory
    made: dict[int, Setup] = {}
    for memory in _SLOT_PARTS if given is None else [given / free]:
        most = min(memory * free // a_slot, (free - a_row) // a_slot)
        slots = int(max(1, min(serving.slots, demand.adapters, most)))
        kv_memory = free - slots * a_slot
        rows = int(kv_memory // a_row)
        made[slots] = Setup(
            rows=max(1, min(rows, serving.rows)),
            slots=slots,
            kv_memory=int(kv_memory),
            slot_memory=slots * demand.adapter_bytes,
            host_adapters=int(min(demand.adapters, serving.host_memory // demand.adapter_bytes)),
            kv_binds=rows < serving.rows,
        )
    return list(made.values())


class _Model:
    """Rates and times of one server, by Little's law."""

    def __init__(
        self, device: Device, base: BaseFigures, demand: Demand, serving: Serving, setup: Setup
    ) -> None:
        self._demand, self._serving, self.setup = demand, serving, setup
        self.adapters = demand.adapters
        self._store = serving.store_latency + demand.adapter_bytes / serving.store
        adapter_flops = demand.adapter_bytes // 2  # two for each parameter of four bytes
        flops = base.flops + adapter_flops
        context = demand.prompt + demand.answer / 2
        self._least = base.layers * device.layer_seconds
        self._graph_rows = device.graph_rows
        launches = launch_seconds(base.layers * LAYER_LAUNCHES, OTHER_LAUNCHES, WORST)
        self._step = base.read / device.bandwidth + (launches if device.graph_rows else 0.0)
        self._prompt = max(demand.prompt * flops / device.rate, self._step, self._least)
        self._row = max(
            (context * base.kv_bytes + demand.adapter_bytes) / device.bandwidth, flops / device.rate
        )
        """Seconds that one more row adds to a step."""
        if self._prompt > demand.ttft:
            raise UnservableError(
                f"a prompt of {demand.prompt} tokens takes {self._prompt:.2f} s on {device.name} where "
                f"nothing else runs, and --ttft is {demand.ttft:g}. Take a faster device, or another goal"
            )
        if demand.token is not None and (one := self._seconds(1)) > demand.token:
            raise UnservableError(
                f"one row's token takes {1e3 * one:.1f} ms on {device.name}, and --token-time is "
                f"{1e3 * demand.token:g} ms. Take a faster device, or another goal"
            )

    def _seconds(self, rows: float) -> float:
        """Return the time, in seconds, of a step."""
        own = self._step + rows * self._row
        return own if rows <= self._graph_rows else max(self._least, own)

    def point(self, replicas: float) -> Point:
        """Return the point without a simulation. `running` is infinite if the load is more than they can
        compute."""
        rate = self._demand.requests / replicas
        tokens = rate * self._demand.answer
        steps = 1 - rate * self._prompt
        left = steps - tokens * self._row
        if left <= 0:
            return Point(math.ceil(replicas), math.inf, 1 - left, math.inf, math.inf)
        # As many as come while one is answered (Little): the step's length depends on how many they are.
        running = tokens * self._step / left
        if running > self._graph_rows:
            running = max(running, tokens * self._least / steps)
        prefill = self._prompt + self._seconds(min(running, self.setup.rows))
        return Point(math.ceil(replicas), running, 1 - left, prefill, running / tokens)

    def needs(self) -> dict[Resource, float]:
        """Return the number of servers needed, by resource.

        Raises UnservableError.
        """
        setup, demand = self.setup, self._demand
        rows: Resource = "KV memory" if setup.kv_binds else "rows"
        found: dict[Resource, float] = {
            "compute": _least(lambda count: self.point(count).used <= _FULL),
            rows: _least(lambda count: self.point(count).running <= _FULL * setup.rows),
            "slots": _least(lambda count: self._in_use(count) <= _FULL * setup.slots),
        }
        if self._store + self._prompt > demand.ttft:
            # Who waits for the store is late: each adapter must be in memory wherever it is at home.
            found["host memory"] = _HOMES * demand.adapters / max(1, setup.host_adapters)
        if demand.token is not None:
            goal = demand.token
            found["time a token"] = _least(lambda count: self.point(count).token <= goal)
        return found

    def _in_use(self, replicas: float) -> float:
        """Return how many adapters rows use at once on one server: each has its homes, and Poisson
        arrivals."""
        point, demand = self.point(replicas), self._demand
        if math.isinf(point.running):
            return math.inf
        seconds = point.prefill + demand.answer * point.token
        weights = [1 / rank**demand.skew for rank in range(1, demand.adapters + 1)]
        each = demand.requests * seconds / sum(weights)
        used = 0.0
        for weight in weights:
            rows = each * weight
            homes = min(replicas, max(_HOMES, rows / (0.75 * self.setup.rows)))
            used += homes / replicas * (1 - math.exp(-rows / homes))
        return used

    def simulated(self, replicas: int, drawn: int, seed: int) -> Point:
        """Return the point with the times to a first token of drawn requests, placed as `onebase route`
        does."""
        point, demand = self.point(replicas), self._demand
        if math.isinf(point.token):
            return replace(point, ttft=(math.inf, math.inf), cold=1.0)
        turnover = point.prefill + demand.answer * point.token
        seconds = max(drawn / demand.requests, _TURNOVERS * turnover) / (1 - WARMING)
        figures = Figures(
            rows=self.setup.rows,
            slots=self.setup.slots,
            host=max(1, self.setup.host_adapters),
            prefill_seconds=point.prefill,
            token_seconds=point.token,
            host_seconds=demand.adapter_bytes / self._serving.link,
            store_seconds=self._store,
            tell_seconds=max(Figures.tell_seconds, seconds / drawn),
        )
        coming = requests(
            Scenario(skew=demand.skew),
            demand.requests,
            demand.adapters,
            seconds,
            seed,
            tokens=demand.answer,
            token_seconds=point.token,
        )
        made = simulate(
            OneBase(seed), Scenario(), coming, replicas, demand.adapters, seconds,
            figures=figures, prefetch=_HOMES,
        )  # fmt: skip
        cold = made.cold / max(1, len(made.waits))
        return replace(point, ttft=(made.waited(0.5), made.waited(0.99)), cold=cold)

    def meets(self, point: Point) -> bool:
        """Return True if both goals are met."""
        demand = self._demand
        slow = demand.token is not None and point.token > demand.token
        return not slow and point.ttft is not None and point.ttft[1] <= demand.ttft


def _least(enough: Callable[[float], bool]) -> float:
    """Return the fewest servers that are enough, in fractions of one. Raises UnservableError."""
    low, high = 0.0, 1.0
    while not enough(high):
        low, high = high, 2 * high
        if high > _MOST_REPLICAS:
            raise UnservableError(f"more than {_MOST_REPLICAS} servers would be needed")
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if middle > 0 and enough(middle) else (middle, high)
    return high
