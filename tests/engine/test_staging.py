"""Versions are copied to the accelerator beside the steps: their rows wait, nobody else does.

The copies here are slow ones on the CPU; what a CUDA stream does is `CudaCopy`'s.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import logging
import queue
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.harness import Lab, Request, requests, run, submission
from tests.tiny import save_base

from onebase_engine.base.layers import adaptable_layers
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.memory_budget import staging_bytes
from onebase_engine.engine.scheduler import NeverFitsError
from onebase_engine.engine.staging import (
    ALIGNMENT,
    CudaCopy,
    PackedAdapterLoader,
    PinnedRing,
    Staging,
    in_slab,
)
from onebase_engine.kernels.weights import (
    AdapterWeights,
    LoraWeights,
    copied,
    folded,
    tensors_of,
    weights_bytes,
)
from onebase_engine.lora.module import SlotModule
from onebase_engine.lora.packed_adapter import write_packed_adapter

PROMPT = tuple(range(5, 25))


class SlowCopy:
    """Done when it has been asked `polls` times."""

    def __init__(self, copies: SlowCopies, weights: AdapterWeights) -> None:
        self._copies = copies
        self._weights = weights
        self._left = copies.polls
        self._bytes = weights_bytes(weights)
        copies.started += 1
        copies.alive += 1
        copies.bytes += self._bytes
        copies.most_bytes = max(copies.most_bytes, copies.bytes)

    def __del__(self) -> None:
        self._copies.alive -= 1
        self._copies.bytes -= self._bytes

    def done(self) -> bool:
        self._left -= 1
        return self._left < 0

    def wait(self) -> None:
        self._left = 0
        self._copies.waits += 1

    def cancel(self) -> None:
        self._copies.cancelled += 1

    def take_weights(self) -> AdapterWeights:
        assert self._left <= 0
        self._copies.taken += 1
        return self._weights


class SlowCopies:
    def __init__(self, polls: int) -> None:
        self.polls = polls
        self.started = self.cancelled = self.taken = self.waits = 0
        self.alive = self.bytes = self.most_bytes = 0

    def __call__(self, weights: AdapterWeights) -> SlowCopy:
        return SlowCopy(self, weights)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder: Path = tmp_path_factory.mktemp("staging")
    dtype = {"quantization": "none", "dtype": torch.float32}
    return Lab.create(load_base(BaseSettings(save_base("llama", folder / "base"), **dtype)), folder)


def test_others_decode_while_a_version_is_copied_and_its_row_joins_when_it_is_there(lab: Lab) -> None:
    copies = SlowCopies(polls=4)
    engine = lab.engine(copies)
    asked = [Request(PROMPT, None, 12), Request(PROMPT, 2, 3, at=2)]
    order: list[str] = []
    for step in range(20):
        for number, request in enumerate(asked):
            if request.at == step:
                engine.submit(submission(str(number), request))
        engine.step()
        order += [output.id for output in engine.take_outputs()]
    assert order == ["0"] * 6 + ["0", "1"] * 3 + ["0"] * 3
    assert (copies.started, copies.taken, copies.alive, copies.waits) == (1, 1, 0, 1)


@pytest.mark.parametrize("changes", [{}, {"slots": 2, "step_tokens": 20}, {"kv_blocks": 11}])
def test_rows_that_wait_for_copies_equal_peft_alone(lab: Lab, changes: dict[str, int]) -> None:
    asked, copies = requests(18, seed=7), SlowCopies(polls=3)
    assert run(lab.engine(copies, **changes), asked) == [lab.expected(request) for request in asked]
    assert copies.taken >= len({request.adapter for request in asked} - {None})
    assert copies.alive == 0


@pytest.mark.parametrize("digests", [["digest1"], ["digest0", "digest1"]])
def test_an_engine_with_nothing_else_to_do_waits_for_the_copies_instead_of_asking_again_and_again(
    lab: Lab, digests: list[str]
) -> None:
    engine = lab.engine(SlowCopies(polls=1_000_000))
    adapters = [protocol.AdapterRef(digest) for digest in digests]
    sampling = protocol.Sampling(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine.submit(protocol.Submit(id="0", prompt=list(PROMPT), sampling=sampling, adapters=adapters))
    for _ in range(3 + len(digests)):
        engine.step()
    assert [output.finish for output in engine.take_outputs()] == [None, "length"]


@pytest.mark.parametrize(
    ("prompt_tokens", "changes"), [(20, {"max_sequences": 2}), (150, {"max_sequences": 4, "step_tokens": 32})]
)
def test_steps_that_are_full_before_a_row_is_asked_do_not_throw_its_copy_away(
    lab: Lab, prompt_tokens: int, changes: dict[str, int]
) -> None:
    copies = SlowCopies(polls=3)
    engine = lab.engine(copies, **changes)
    first_token, others = None, 0
    for step in range(60):
        if step == 1:
            engine.submit(submission("adapted", Request(PROMPT, 0, 2)))
        while len(engine.scheduler.waiting) < 3:  # so that the server is never idle
            others += 1
            prompt = tuple(3 + (7 * others + i * i) % 300 for i in range(prompt_tokens))
            engine.submit(submission(f"other {others}", Request(prompt, None, 3)))
        engine.step()
        if any(output.id == "adapted" for output in engine.take_outputs()):
            first_token = step
            break
    assert first_token is not None
    assert copies.started == 1


def test_a_version_that_finds_no_memory_in_its_slot_leaves_none_behind(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors: list[weakref.ref[torch.Tensor]] = []

    def copy(weights: AdapterWeights) -> SlowCopy:
        copied: AdapterWeights = {}
        for name, module in weights.items():
            parts: dict[str, Any] = {part: tensor.clone() for part, tensor in tensors_of(module)}
            tensors.extend(map(weakref.ref, parts.values()))
            copied = {**copied, name: replace(module, **parts)}
        return SlowCopy(SlowCopies(polls=0), copied)

    engine = lab.engine(copy)
    put, added = SlotModule.put, itertools.count()

    def puts_three(*arguments: Any) -> None:
        if next(added) == 3:
            raise torch.OutOfMemoryError("no room")
        put(*arguments)

    monkeypatch.setattr(SlotModule, "put", puts_three)
    monkeypatch.setattr(
        logging.getLogger("onebase_engine.engine.engine"), "disabled", True
    )  # pytest keeps all
    gc.collect()
    gc.disable()
    try:
        engine.submit(submission("0", Request(PROMPT, 0, 2)))
        engine.step()
        assert [output.finish for output in engine.take_outputs()] == ["error"]
        assert tensors
        assert not [tensor for tensor in tensors if tensor() is not None]
    finally:
        gc.enable()


def test_the_copy_for_a_row_that_is_cancelled_is_freed(lab: Lab) -> None:
    copies = SlowCopies(polls=1_000_000)
    engine = lab.engine(copies)
    engine.submit(submission("busy", Request(PROMPT, None, 100)))
    engine.submit(submission("gone", Request(PROMPT, 1, 2)))
    engine.step()
    assert copies.alive == 1
    engine.cancel(protocol.Cancel("gone"))
    engine.step()
    assert (copies.alive, copies.taken) == (0, 0)


def test_versions_larger_than_the_room_for_copies_are_copied_by_their_own_step(lab: Lab) -> None:
    copies = SlowCopies(polls=3)
    engine = lab.engine(copies, slot_memory=2 * max(map(weights_bytes, lab.weights)))
    large = max(range(len(lab.weights)), key=lambda number: weights_bytes(lab.weights[number]))
    request = Request(PROMPT, large, 5)
    assert run(engine, [request]) == [lab.expected(request)]
    assert copies.started == 0


def test_a_version_larger_than_all_slots_is_refused_when_it_arrives(lab: Lab) -> None:
    sizes = [weights_bytes(folded(one)) for one in lab.weights]
    large = max(range(len(sizes)), key=sizes.__getitem__)
    engine = lab.engine(SlowCopies(polls=0), slot_memory=max(sizes))
    engine.slots.budget = sizes[large] - 1
    with pytest.raises(NeverFitsError, match="--slot-memory") as refused:
        engine.put_adapter("large", lab.weights[large])
    assert refused.value.code == "slot_memory_exceeded"
    assert "large" not in engine.versions.weights
    engine.slots.budget += 1
    engine.put_adapter("large", lab.weights[large])


def test_a_version_for_whose_copy_there_is_no_memory_is_left_to_its_own_step(lab: Lab) -> None:
    def fails(weights: AdapterWeights) -> SlowCopy:
        raise torch.OutOfMemoryError("no room")

    request = Request(PROMPT, 3, 5)
    assert run(lab.engine(fails), [request]) == [lab.expected(request)]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    polls=st.integers(0, 6),
    slots=st.integers(1, 4),
    rows=st.integers(1, 8),
    share=st.integers(1, 12),
)
def test_whatever_arrives_every_row_ends_as_peft_has_it_and_copies_keep_to_their_room(
    lab: Lab, seed: int, polls: int, slots: int, rows: int, share: int
) -> None:
    largest = max(map(weights_bytes, lab.weights))
    room = largest * share
    copies = SlowCopies(polls)
    engine = lab.engine(copies, slots=slots, max_sequences=rows, slot_memory=room)
    asked = requests(10, seed=seed, tokens=4, longest=24)
    assert run(engine, asked) == [lab.expected(request) for request in asked]
    assert copies.alive == 0
    assert copies.most_bytes <= staging_bytes(room)


def first_gets_its_copies(
    staging: Staging, waiting: list[list[str]], arrivals: Callable[[], list[str]] = list
) -> None:
    """Ask for the rows in order, step after step, as the scheduler does; `arrivals` come after each step."""
    first = waiting[0]
    for _ in range(20):
        for row in list(waiting):
            if staging.ready(row):
                waiting.remove(row)
                for digest in row:
                    staging.take_weights(digest)
        staging.drop_unwanted([digest for row in waiting for digest in row])
        if first not in waiting:
            return
        waiting += [[digest] for digest in arrivals()]
    raise AssertionError(f"{first} waits for ever")


def test_sums_whose_first_halves_fill_the_room_for_copies_do_not_wait_for_each_other(lab: Lab) -> None:
    store = dict.fromkeys(("a", "b", "c", "d"), lab.weights[0])
    staging = Staging(SlowCopies(polls=1), 2, store, lambda digest: 1)
    assert not staging.ready(["a"])
    assert not staging.ready(["b"])
    staging.drop_unwanted(["a", "b"])
    # The rows that asked are cancelled; sums with the same versions come instead.
    first_gets_its_copies(staging, [["a", "c"], ["b", "d"]])


def test_a_copy_that_nobody_waits_for_any_more_is_not_made(
    lab: Lab, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = SlowCopies(polls=9)
    staging = Staging(copies, 0, dict.fromkeys("ab", lab.weights[0]), lambda digest: 1)
    assert not staging.ready(["a", "b"])
    staging.drop_unwanted(["b"])
    assert copies.cancelled == 1

    ring = PinnedRing(torch.device("cpu"))
    goes_on = threading.Event()
    ring._thread.submit(goes_on.wait, 60)
    monkeypatch.setattr(torch, "empty_like", lambda one, device: torch.zeros(one.shape, dtype=one.dtype))
    copy = CudaCopy(in_slab(lab.weights[3]), torch.device("meta"), ring)
    copy.cancel()
    goes_on.set()
    ring._thread.shutdown()
    assert "copied" not in log


def test_a_row_that_needs_much_room_is_not_overtaken_for_ever_by_rows_that_need_little(lab: Lab) -> None:
    names = (f"v{number}" for number in range(1000))
    store = defaultdict[str, AdapterWeights](lambda: lab.weights[0])
    staging = Staging(SlowCopies(polls=2), 2, store, lambda digest: 1)
    assert not staging.ready(["early"])
    first_gets_its_copies(staging, [["a", "b"], ["early"]], lambda: [next(names)])


# ---- slabs and the ring ------------------------------------------------------------------------


def same(some: AdapterWeights, others: AdapterWeights) -> bool:
    def parts(weights: AdapterWeights) -> list[tuple[str, str, torch.Tensor]]:
        return [(name, part, one) for name, module in weights.items() for part, one in tensors_of(module)]

    pairs = list(zip(parts(some), parts(others), strict=True))
    return all(mine[:2] == theirs[:2] and torch.equal(mine[2], theirs[2]) for mine, theirs in pairs)


def test_a_version_of_any_kind_lies_in_one_slab_bit_for_bit_each_tensor_where_a_gpu_reads_it_best(
    lab: Lab,
) -> None:
    for weights in lab.weights:
        there = in_slab(weights)
        assert same(there, weights)
        tensors = [tensor for module in there.values() for _, tensor in tensors_of(module)]
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
        assert all(tensor.storage_offset() * tensor.itemsize % ALIGNMENT == 0 for tensor in tensors)
        padding = ALIGNMENT * len(tensors)
        assert weights_bytes(there) <= sum(tensor.nbytes for tensor in tensors) + padding


def test_a_version_comes_to_the_device_by_one_copy_and_what_was_shared_is_shared_there(lab: Lab) -> None:
    copies: list[torch.Tensor] = []

    def to(whole: torch.Tensor) -> torch.Tensor:
        copies.append(whole)
        return whole.clone()

    a, b = torch.randn(8, 64), torch.randn(64, 8)
    halves = LoraWeights(torch.randn(3, 5).bfloat16(), torch.randn(7, 3).bfloat16(), 1.0)
    shared = {"half": halves, "one": LoraWeights(a, b, 1.0), "two": LoraWeights(a, b.clone(), 0.5)}
    for weights in (*lab.weights, shared):
        copies.clear()
        found = copied(in_slab(weights), torch.device("meta"), to)  # the CPU under another name
        assert same(found, weights)
        assert len(copies) == 1
    one, two = found["one"], found["two"]
    assert isinstance(one, LoraWeights)
    assert isinstance(two, LoraWeights)
    assert one.a is two.a
    assert one.b is not two.b
    assert copied(weights, torch.device("cpu"))["one"] is weights["one"], "it is there already"


class Copied:
    """An event behind a copy, which nobody has waited for yet."""

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self._number = 0

    def record(self, stream: Any) -> None:
        self._number += 1
        self._log.append("copied")

    def synchronize(self) -> None:
        self._log.append("waited" if self._number else "new")

    def query(self) -> bool:
        return True


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a ring does on a GPU that is not there, in order."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda: Copied(done))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    return done


def test_a_version_larger_than_the_ring_waits_for_each_piece_that_it_uses_again(log: list[str]) -> None:
    ring = PinnedRing(torch.device("cpu"), size=100, pieces=2)
    here = torch.randint(0, 256, (450,), dtype=torch.uint8)
    there = torch.zeros_like(here)
    ring.send([(here, there)]).result()
    assert torch.equal(there, here)
    again = ["waited", "copied"]
    assert log == [*["new", "copied"] * 2, *again * 3, "copied"]


def test_a_copy_takes_no_page_locked_memory_and_tells_its_stream_once_that_the_steps_read_it(
    lab: Lab, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = PinnedRing(torch.device("cpu"), size=1000, pieces=3)
    told: list[int] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: told.append(tensor.data_ptr()))
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    monkeypatch.setattr(torch, "empty_like", lambda one, device: torch.zeros(one.shape, dtype=one.dtype))
    copy = CudaCopy(in_slab(lab.weights[3]), torch.device("meta"), ring)  # the CPU under another name
    copy.wait()
    assert copy.done()
    assert same(copy.take_weights(), lab.weights[3])
    assert len(told) == 1


def test_what_is_said_of_a_versions_size_is_what_its_slab_takes(lab: Lab, tmp_path: Path) -> None:
    write_packed_adapter(tmp_path / "packed", lab.weights[4], base_id="b")
    digest = hashlib.sha256((tmp_path / "packed").read_bytes()).hexdigest()
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    loader = PackedAdapterLoader(torch.device("cuda"), adaptable_layers(lab.base), answers.put, folded)
    loader.load(protocol.LoadAdapter("digest", str(tmp_path / "packed"), digest))
    arrived = answers.get(timeout=60)
    assert same(arrived.weights, folded(lab.weights[4]))
    slabs = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for module in arrived.weights.values()
        for _, one in tensors_of(module)
    }
    assert arrived.answer.bytes == sum(slabs.values())
    assert len(slabs) == 1
