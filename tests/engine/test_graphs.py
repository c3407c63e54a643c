"""Passes as graphs of CUDA, where a capture on the CPU stands for one: which are captured, what a graph must
give before it is used, and what is left where one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine import triton_on_cpu
from tests.engine.layers import nf4
from torch import nn

from onebase_engine.engine import graphs
from onebase_engine.engine.batch import StepBatch
from onebase_engine.engine.graphs import Graphs
from onebase_engine.kernels import cuda
from onebase_engine.kernels.cuda import CaptureError, CudaKernels, FixedStep
from onebase_engine.kernels.interface import Contexts, RowGroup, RowMap
from onebase_engine.kernels.weights import LoraWeights
from onebase_engine.lora.linear import SlotLinear
from onebase_engine.lora.module import StepRows

pytestmark = pytest.mark.skipif(
    not cuda.INTERPRETED.value, reason="with a GPU here Triton compiles for it, in this process"
)
CPU = torch.device("cpu")
WORDS = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))


def passes(step: FixedStep) -> tuple[torch.Tensor, torch.Tensor]:
    """A model that is quickly computed: logits and hidden states of each row, by its token and place."""
    hidden = WORDS[step.ids.long()] * (step.positions + 1)[:, None]
    return hidden @ WORDS.T, hidden


def batch(*ids: int, slot: int | None = None, at: int = 0) -> StepBatch:
    """Decodes of these tokens, each of a context of its own, from position `at` on; `slot` acts on one."""
    count = len(ids)
    rows, none = np.arange(count, dtype=np.int32), np.zeros(0, dtype=np.int64)
    groups = () if slot is None else (RowGroup((0,), ((slot, 1.0),)),)
    return StepBatch(
        input_ids=np.array(ids),
        positions=rows.astype(np.int64) + at,
        logit_rows=rows.astype(np.int64),
        contexts=Contexts(
            rows + np.int32(at),
            rows,
            (32 + 16 * rows)[None],
            np.arange(2, 2 + count, dtype=np.int32)[None, :, None],
        ),
        token_map=RowMap(groups),
        logit_map=RowMap(groups),
        sampled=[],
        scored=[],
        hidden_rows=none,
        pooled=[],
    )


def made(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[FixedStep], tuple[torch.Tensor, torch.Tensor]] = passes
) -> Graphs:
    kernels = CudaKernels()
    monkeypatch.setattr(kernels, "capture", triton_on_cpu.Capture().of)
    return Graphs(run, kernels, 2, 16, [16], CPU)


def test_a_pass_is_captured_when_its_size_comes_again_and_gives_each_steps_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = made(monkeypatch)
    assert found.run_graph(batch(1, 2, 3)) is None
    for ids in ((4, 5, 6), (7, 8, 9, 10), (49, 0, 1)):
        got = found.run_graph(batch(*ids))
        assert got is not None
        hidden = WORDS[list(ids)] * torch.arange(1, len(ids) + 1)[:, None]
        assert torch.equal(got[1][: len(ids)], hidden)
        torch.testing.assert_close(got[0][: len(ids)], hidden @ WORDS.T)


def test_contexts_that_grow_and_adapters_of_usual_ranks_ask_for_no_other_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, split = made(monkeypatch), cuda.SPLIT.value
    for at, graph in (
        (split, False),
        (split, True),
        (2 * split, True),
        (4 * split - 1, True),
        (4 * split, False),
    ):
        found.ranks[0] = 64 if at > split else 4
        assert (found.run_graph(batch(1, slot=0, at=at)) is not None) == graph, at
    assert found.run_graph(batch(1, slot=0, at=16 * split - 1)) is not None
    found.ranks[0] = 65
    assert found.run_graph(batch(1, slot=0, at=split)) is None


def test_a_step_that_was_prepared_under_another_gives_what_its_tokens_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, plain = made(monkeypatch), made(monkeypatch)

    def prepared(*ids: int, **options: int) -> StepBatch:
        early = batch(*[-1] * len(ids), **options)
        found.prepare(early)
        early.input_ids[:] = ids
        return early

    def check(one: StepBatch) -> None:
        got, wanted = found.run_graph(one), plain.run_graph(one)
        assert (got is None) == (wanted is None)
        for mine, other in zip(got or (), wanted or (), strict=True):
            assert torch.equal(mine, other)

    for one in (batch(1, 2, 3), batch(1, 2, 3)):
        check(one)
    check(prepared(4, 5, 6))
    check(prepared(7, 8))  # a step of two rows is none of this size
    prepared(9, 8, 7)
    check(batch(4, 3, 2))  # it was packed again
    for rank in (300, 4):
        found.ranks[0] = plain.ranks[0] = rank
        for _ in range(2):
            check(batch(1, 2, 3, slot=0))
    early = prepared(1, 5, 9, slot=0, at=6)
    # Before the step runs the slot is filled with a larger rank, for which there is another place.
    found.ranks[0] = plain.ranks[0] = 300
    check(early)
    assert len(found._graphs) == 3


def test_a_number_of_the_hosts_that_got_into_a_graph_shows_before_it_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(step: FixedStep) -> tuple[torch.Tensor, torch.Tensor]:
        """As a model that reads how long a row is, where nobody notices that it waits for the device."""
        longest = int(np.max(step._parts[2]))  # of what the host has sent
        logits, hidden = passes(step)
        return logits * (longest + 2), hidden

    found = made(monkeypatch, run)
    assert found.run_graph(batch(1, 2)) is None
    assert found.run_graph(batch(3, 4)) is None
    assert "it gives something else than its kernels one by one" in caplog.text
    for _ in range(3):
        assert found.run_graph(batch(1, 2, 3)) is None, "nor is any other pass of this model a graph"
    assert caplog.text.count("is not captured") == 1


def test_a_row_whose_logits_are_no_numbers_keeps_no_pass_from_being_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(step: FixedStep) -> tuple[torch.Tensor, torch.Tensor]:
        logits, hidden = passes(step)
        return torch.where((step.ids == 4)[:, None], torch.nan, logits), hidden

    found = made(monkeypatch, run)
    found.run_graph(batch(3, 4))
    got = found.run_graph(batch(3, 4))
    assert got is not None
    assert got[0][:2].isnan().any(1).tolist() == [False, True]


def test_a_pass_for_which_memory_runs_out_is_not_captured_and_others_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = made(monkeypatch)
    whole = found._kernels.capture

    def capture(run: Callable[[], Any], device: torch.device) -> Any:
        if len(run()[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(run, device)

    monkeypatch.setattr(found._kernels, "capture", capture)
    for _ in range(2):
        assert found.run_graph(batch(1, 2, 3)) is None
        some = found.run_graph(batch(1, 2))
    assert some is not None
    assert found.run_graph(batch(1, 2, 3)) is None


def test_graphs_give_their_memory_back_where_it_is_short_and_take_half_as_much_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = made(monkeypatch)
    monkeypatch.setattr(graphs, "LEAST_BYTES", 0)
    reserved = iter(range(0, 10_000, 100))  # each look at it finds a hundred bytes more
    monkeypatch.setattr(found, "_reserved", lambda: next(reserved))
    assert not found.forget()
    for ids in ((1,), (1, 2), (1, 2, 3)):
        assert [found.run_graph(batch(*ids)) is not None for _ in range(2)] == [False, True]
    assert found.forget()
    assert not found._graphs
    for ids in ((1,), (1, 2)):
        assert [found.run_graph(batch(*ids)) is not None for _ in range(2)] == [False, True]
    assert found.run_graph(batch(1, 2, 3)) is found.run_graph(batch(1, 2, 3)) is None


def test_passes_are_captured_until_the_budget_is_taken_what_the_driver_keeps_included(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "MOST_BYTES", 300)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    kernels = CudaKernels()
    monkeypatch.setattr(kernels, "capture", triton_on_cpu.Capture().of)
    found = Graphs(passes, kernels, 2, 16, [16], CPU, executable=300)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 9)
    assert not found.full
    for ids, is_graph in (((1,), True), ((1, 2), True), ((1, 2, 3), False)):
        assert [found.run_graph(batch(*ids)) is not None for _ in range(2)] == [False, is_graph]
    assert found.full
    assert found.run_graph(batch(1)) is not None


def test_no_graph_has_so_many_splits_that_its_tiles_exceed_attentions_scratch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels, split = CudaKernels(), cuda.SPLIT.value
    monkeypatch.setattr(kernels, "capture", triton_on_cpu.Capture().of)
    monkeypatch.setattr(cuda, "SCRATCH", 8 * 4 * 100)
    found = Graphs(passes, kernels, 2, 16, [16], CPU, tile_rows=8, part_bytes=100)
    for rows, at, is_graph in (
        (16, split - 9, True),
        (16, 2 * split, True),
        (16, 5 * split, False),
        (2, 5 * split, True),
        (2, 17 * split, False),
    ):
        steps = [found.run_graph(batch(*range(rows), at=at - rows)) for _ in range(2)]
        assert (steps[1] is not None) == is_graph, (rows, at)


def test_graphs_of_more_nodes_may_take_more_memory_but_a_part_of_the_device_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense, mixture = graphs.executable_bytes(32, 0), graphs.executable_bytes(48, 48)
    assert dense == 512 * graphs.NODE_BYTES
    assert mixture > 4 * dense
    gpu, total = torch.device("cuda"), [80 << 30]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total[0])
    )
    assert graphs.most_bytes(mixture, gpu) == graphs.MOST_BYTES + graphs.MOST_GRAPHS * mixture
    total[0] = 14 << 30
    assert graphs.most_bytes(mixture, gpu) == (14 << 30) / 8
    assert graphs.most_bytes(dense, gpu) == graphs.MOST_BYTES + graphs.MOST_GRAPHS * dense


def test_a_graph_that_nobody_needs_any_more_gives_its_place_to_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    monkeypatch.setattr(graphs, "STALE", 10)
    found = made(monkeypatch)

    def is_graph(*ids: int) -> bool:
        return found.run_graph(batch(*ids)) is not None

    assert [is_graph(1), is_graph(1), is_graph(1, 2), is_graph(1, 2)] == [False, True] * 2
    assert not any(is_graph(1, 2, 3) for _ in range(7)), "both have run of late"
    assert is_graph(1, 2)
    assert is_graph(1, 2, 3)
    assert is_graph(1, 2)
    assert not is_graph(1), "it was the oldest"


def test_a_step_with_an_adapter_that_a_graph_does_not_have_is_no_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = made(monkeypatch)
    found.uncaptured = {1}
    for slot, captured in ((1, False), (0, True)):
        found.run_graph(batch(1, 2, slot=slot))
        assert (found.run_graph(batch(1, 2, slot=slot)) is not None) == captured


def test_adapters_of_layers_that_pytorch_computes_are_in_no_graph() -> None:
    """An int8 base's, say: a graph that was captured before one of them came would be without it."""
    kernels = CudaKernels()
    lora = LoraWeights(torch.ones(4, 64), torch.ones(8, 4), 1.0)
    own = SlotLinear(nf4(64, 8), StepRows(), kernels, slots=2)
    other = SlotLinear(nn.Linear(64, 8).requires_grad_(False), StepRows(), kernels, slots=2)  # fp32
    for layer in (own, other):
        layer.put(1, lora)
    assert list(own.uncaptured) == []
    assert list(other.uncaptured) == [1]
    other.put(1, None)
    assert list(other.uncaptured) == []


def test_a_layer_that_is_given_other_numbers_than_bf16_is_in_no_graph() -> None:
    layer = CudaKernels().linear(nf4(64, 8), 2)
    rows = FixedStep(cuda.StepSize(1, 1, 0, 0), 2, 16, [16], CPU).rows
    with pytest.raises(CaptureError, match="float32"):
        layer(torch.ones(1, 64), rows)


# ---- a capture that fails --------------------------------------------------------------------------


class Device:
    """What PyTorch does of a capture, as its sources say (`aten/src/ATen/cuda/CUDAGraph.cpp` and
    `c10/cuda/CUDACachingAllocator.cpp`): one that is broken ends by an error, the allocator still in it and
    the stream still the capture's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream: Any = "own"
        self.underway: list[Any] = []
        self.users: dict[Any, int] = {}
        """Of each pool."""
        self.broken = False
        self._handles = iter(range(1, 100))
        for place, name, fake in (
            (torch.cuda, "current_stream", lambda device: self.stream),
            (torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream)),
            (torch.cuda, "graph_pool_handle", lambda: next(self._handles)),
            (torch.cuda, "synchronize", lambda device: None),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device", lambda device: nullcontext()),
            (torch.cuda, "CUDAGraph", lambda: Graph(self)),
            (torch.cuda, "graph", self.capturing),
            (torch._C, "_cuda_endAllocateToPool", self.end),
            (torch._C, "_cuda_releasePool", self.release),
        ):
            monkeypatch.setattr(place, name, fake, raising=False)

    def release(self, device: int, pool: Any) -> None:
        self.users[pool] -= 1
        assert self.users[pool] >= 0

    def end(self, device: int, pool: Any) -> None:
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    @contextmanager
    def capturing(self, graph: Graph, pool: Any, capture_error_mode: str) -> Iterator[None]:
        assert self.users.get(pool, 1) > 0, "INTERNAL ASSERT FAILED: nobody uses this pool any more"
        self.users[pool] = self.users.get(pool, 0) + 1
        self.underway.append(pool)
        self.stream = "side"
        try:
            yield
        finally:
            if self.broken:
                raise torch.AcceleratorError("operation failed due to a previous error during capture")
            self.end(0, pool)
            graph.pool, self.stream = pool, "own"


class Graph:
    """As `torch.cuda.CUDAGraph`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.pool: Any = None

    def __del__(self) -> None:
        self.reset()

    def replay(self) -> None: ...

    def reset(self) -> None:
        """Its pool is its own only if its capture has ended."""
        if self.pool is not None:
            self._device.release(0, self.pool)
            self.pool = None


def failing(error: Exception, device: Device, *, breaks: bool) -> Callable[[], Any]:
    def run() -> Any:
        device.broken = breaks
        raise error

    return run


def test_a_capture_that_breaks_leaves_the_stream_and_the_allocator_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, kernels = Device(monkeypatch), CudaKernels()
    stopped = torch.AcceleratorError("operation not permitted when stream is capturing")
    with pytest.raises(CaptureError, match="not permitted when stream is capturing"):
        kernels.capture(failing(stopped, device, breaks=True), CPU)
    assert (device.stream, device.underway) == ("own", [])
    assert set(device.users.values()) == {0}
    assert kernels._abandoned, "the allocator has its address"


def test_a_capture_for_which_memory_runs_out_says_so_and_the_next_has_memory_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, kernels = Device(monkeypatch), CudaKernels()
    with pytest.raises(torch.OutOfMemoryError):
        kernels.capture(failing(torch.OutOfMemoryError("out of memory"), device, breaks=False), CPU)
    assert (device.stream, device.underway) == ("own", [])
    first = kernels.capture(lambda: "outputs", CPU)
    again = kernels.capture(lambda: "more", CPU)
    assert [outputs for _, outputs in (first, again)] == ["outputs", "more"]
    assert sorted(device.users.values()) == [0, 2], "both graphs share what they have"
    del first, again
    assert set(device.users.values()) == {0}
    assert kernels.capture(lambda: "of another engine", CPU)[1] == "of another engine"


def test_a_pass_that_waits_for_the_device_is_found_before_it_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    kernels, there = CudaKernels(), torch.device("cuda")

    def waits() -> None:
        assert modes[-1] == "error"
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(CaptureError, match="synchronizing"):
        kernels.unawaited(waits, there)
    assert kernels.unawaited(lambda: 3, there) == 3
    assert modes == ["default", "error", "default", "error", "default"]
