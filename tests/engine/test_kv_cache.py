"""KV blocks: nothing leaks, nothing is handed out twice, and prefixes go in the order of last use."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from torch.utils._python_dispatch import TorchDispatchMode

from onebase_engine.engine import kv_cache
from onebase_engine.engine.kv_cache import (
    RESERVED_BLOCKS,
    BlockPool,
    HostCache,
    KVCache,
    Moves,
    block_key,
    bytes_per_token,
    root_key,
)
from onebase_engine.engine.messages import AdapterRef
from onebase_engine.engine.sequence import AdapterMix

BLOCKS = 9
KEYS = [bytes([number]) * 16 for number in range(6)]


class PoolMachine(RuleBasedStateMachine):
    """Rows that take, share, publish and return blocks in any order, against a count of every reference, and
    what each block would hold: the key that it was published with, or None."""

    held = Bundle("held")
    host = 0
    restored = 100

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS + RESERVED_BLOCKS, 4, self.host, self.restored)
        self.references: dict[int, int] = {}
        self.key_of: dict[int, bytes] = {}
        self.content: dict[int, bytes | None] = {}
        self.on_host: dict[int, bytes | None] = {}
        self.published: set[bytes] = set()
        self.fresh: list[int] = []
        """Blocks that rows will write to in the next step."""

    def took(self, block: int, key: bytes | None) -> None:
        """A free block went to somebody, with a key if it came back from the host."""
        assert block >= RESERVED_BLOCKS
        assert not self.references.get(block)
        self.references[block] = 1
        self.key_of.pop(block, None)
        if key is None:
            self.fresh.append(block)
        else:
            self.key_of[block] = key

    @rule(least=st.integers(0, 3))
    def step(self, least: int) -> None:
        """What is planned until now is copied, if it must be, and then computed."""
        late = self.pool.late(list(self.key_of))
        moves = self.pool.take_moves(set(self.fresh), least)
        assert len(moves.back) <= self.restored
        for some in (moves.out, moves.back):
            for numbers in zip(*some, strict=True):
                assert len(set(numbers)) == len(some)
        for block, place in moves.out:
            assert 0 <= place < self.host
            self.on_host[place] = self.content[block]
        for block, place in moves.back:
            self.content[block] = self.on_host[place]
        self.content.update(dict.fromkeys(self.fresh))
        self.fresh.clear()
        assert all(self.content[block] == key for block, key in self.key_of.items() if block not in late)
        assert not late or moves.back, "they come some time"

    @rule(target=held, count=st.integers(1, 4))
    def allocate(self, count: int) -> list[int]:
        before = self.pool.free
        blocks = self.pool.allocate(count)
        if blocks is None:
            assert count > before
            assert self.pool.free == before
            return []
        assert len(blocks) == count
        for block in blocks:
            self.took(block, None)
        return blocks

    @rule(target=held, first=st.integers(0, 4), count=st.integers(1, 3), restore=st.booleans())
    def share(self, first: int, count: int, restore: bool) -> list[int]:
        keys = KEYS[first : first + count]
        blocks = self.pool.share(keys, restore=restore)
        for block, key in zip(blocks, keys, strict=False):
            if self.key_of.get(block) == key:
                self.references[block] += 1
            else:
                assert restore
                assert self.host
                self.took(block, key)
        if len(blocks) < len(keys):
            missed = keys[len(blocks)]
            assert missed not in self.key_of.values()
            if restore and self.host >= len(KEYS):
                assert missed not in self.published or not self.pool.free, "it is lost"
        return blocks

    @rule(blocks=held, key=st.sampled_from(KEYS))
    def publish(self, blocks: list[int], key: bytes) -> None:
        self.fresh += [block for block in blocks[:1] if block not in self.key_of]
        self.step(0)
        for block in blocks[:1]:
            self.pool.publish(block, key)
            if block not in self.key_of and key not in self.key_of.values():
                self.key_of[block] = self.content[block] = key
                self.published.add(key)

    @rule(blocks=consumes(held))
    def release(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        for block in blocks:
            self.references[block] -= 1
            if not self.references[block] and block in self.fresh:
                self.fresh.remove(block)  # The row that was to write to it is computed later.

    @invariant()
    def every_block_is_either_held_or_free(self) -> None:
        used = [block for block, count in self.references.items() if count]
        assert self.pool.free + len(used) == self.pool.capacity == BLOCKS
        idle = [block for block in self.key_of if not self.references[block]]
        assert self.pool.cached == len(idle)
        assert self.pool.on_host <= min(self.host, len(KEYS))


class SmallHostMachine(PoolMachine):
    host = 2


class LargeHostMachine(PoolMachine):
    host = len(KEYS)


class SlowHostMachine(PoolMachine):
    host = len(KEYS) - 1
    restored = 1


# Blocks leave the bundle when they are released, so rules only touch blocks that are held.
TestPool = PoolMachine.TestCase
TestPoolOverASmallHost = SmallHostMachine.TestCase
TestPoolOverALargeHost = LargeHostMachine.TestCase
TestPoolOverASlowHost = SlowHostMachine.TestCase
TestPool.settings = TestPoolOverASmallHost.settings = settings(max_examples=60, stateful_step_count=30)
TestPoolOverALargeHost.settings = TestPoolOverASlowHost.settings = TestPool.settings


def held(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks


def test_the_prefix_used_longest_ago_is_evicted_first() -> None:
    pool = BlockPool(4 + RESERVED_BLOCKS, 4)
    blocks = held(pool, 4)
    for block, key in zip(blocks, KEYS, strict=False):
        pool.publish(block, key)
    for index in (2, 0, 3, 1):
        pool.release([blocks[index]])
    pool.release(pool.share([KEYS[2]]))
    evicted = [held(pool, 1)[0] for _ in range(4)]
    assert evicted == [blocks[0], blocks[3], blocks[1], blocks[2]]


def test_a_prefix_loses_its_end_before_its_beginning() -> None:
    pool = BlockPool(3 + RESERVED_BLOCKS, 4)
    blocks = held(pool, 3)
    for block, key in zip(blocks, KEYS, strict=False):
        pool.publish(block, key)
    pool.release(blocks)
    held(pool, 1)
    assert pool.share(KEYS[:3]) == blocks[:2]


def test_blocks_without_a_prefix_go_before_any_prefix_is_evicted() -> None:
    pool = BlockPool(2 + RESERVED_BLOCKS, 4)
    first, second = held(pool, 2)
    pool.publish(first, KEYS[0])
    pool.release([first])
    pool.release([second])
    assert held(pool, 1) == [second]
    assert pool.cached == 1


def test_an_evicted_prefix_is_found_no_more() -> None:
    pool = BlockPool(1 + RESERVED_BLOCKS, 4)
    blocks = held(pool, 1)
    pool.publish(blocks[0], KEYS[0])
    pool.release(blocks)
    held(pool, 1)
    assert pool.share([KEYS[0]]) == []


def test_the_first_block_published_under_a_key_stays() -> None:
    pool = BlockPool(2 + RESERVED_BLOCKS, 4)
    first, second = held(pool, 2)
    pool.publish(first, KEYS[0])
    pool.publish(second, KEYS[0])
    assert pool.share([KEYS[0]]) == [first]
    pool.release([second])
    assert pool.free == 1
    assert pool.cached == 0


def test_releasing_a_block_twice_raises() -> None:
    pool = BlockPool(2 + RESERVED_BLOCKS, 4)
    blocks = held(pool, 1)
    pool.release(blocks)
    with pytest.raises(RuntimeError, match="released twice"):
        pool.release(blocks)


def test_a_pool_of_reserved_blocks_only_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="--kv-memory"):
        BlockPool(RESERVED_BLOCKS, 4)


# ---- host memory ------------------------------------------------------------------------------------------


def left(pool: BlockPool, keys: Sequence[bytes]) -> None:
    """A row with these blocks ends, and others take every block of the cache and end too."""
    blocks = held(pool, len(keys))
    pool.take_moves()
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    pool.release(held(pool, pool.capacity))


def test_an_evicted_prefix_comes_back_from_host_memory() -> None:
    pool = BlockPool(4 + RESERVED_BLOCKS, 4, host_blocks=3)
    left(pool, KEYS[:3])
    (out,) = [pool.take_moves().out]
    assert (pool.cached, pool.on_host, len(out)) == (0, 3, 3)
    assert pool.share(KEYS[:3]) == []
    blocks = pool.share(KEYS[:4], restore=True)
    places = dict(pool.take_moves().back)
    assert [places[block] for block in blocks] == [2, 1, 0], "the end had left first"
    assert pool.free == 1
    assert pool.share(KEYS[:3]) == blocks, "it is in the cache again"


def dropped(pool: BlockPool, key: bytes, among: Sequence[bytes]) -> list[bytes]:
    """What of the host goes when a block with `key` leaves a cache in which it alone is not held."""
    (block,) = held(pool, 1)
    pool.take_moves()
    before = {one for one in among if pool._place_of.get(one) is not None}
    pool.publish(block, key)
    pool.release([block])
    pool.release(held(pool, 1))
    return sorted(one for one in before if pool._place_of.get(one) is None)


def test_host_memory_drops_what_was_used_longest_ago() -> None:
    pool = BlockPool(2 + RESERVED_BLOCKS, 4, host_blocks=3)
    for key in KEYS[:3]:
        left(pool, [key])
    pool.share(KEYS[:1], restore=True)
    assert dropped(pool, KEYS[3], KEYS[:3]) == [KEYS[1]], "the first one came back"


def test_host_memory_drops_the_end_of_a_prefix_before_its_beginning() -> None:
    pool = BlockPool(4 + RESERVED_BLOCKS, 4, host_blocks=3)
    left(pool, KEYS[:3])
    blocks = pool.share(KEYS[:3], restore=True)
    assert dropped(pool, KEYS[3], KEYS[:3]) == [KEYS[2]]
    pool.release(blocks)
    left(pool, KEYS[4:5])
    pool.share(KEYS[:3], restore=True)
    assert len(pool.take_moves().back) == 2


def test_a_block_that_host_memory_has_counts_as_used_there_when_it_leaves_the_cache_again() -> None:
    pool = BlockPool(3 + RESERVED_BLOCKS, 4, host_blocks=2)
    for key in KEYS[:2]:
        left(pool, [key])
    first, second = (pool.share([key], restore=True) for key in KEYS[:2])
    pool.take_moves()
    pool.release(second)
    pool.release(first)
    pool.release(held(pool, 3)[:1])
    assert pool.take_moves().out == [], "it is there"
    assert dropped(pool, KEYS[2], KEYS[:2]) == [KEYS[1]]


def test_a_place_of_the_host_that_is_still_to_be_copied_takes_no_other_block() -> None:
    pool = BlockPool(2 + RESERVED_BLOCKS, 4, host_blocks=1)
    left(pool, KEYS[:1])
    pool.take_moves()
    (block,) = pool.share(KEYS[:1], restore=True)
    (other,) = held(pool, 1)
    pool.publish(other, KEYS[1])
    pool.release([other])
    held(pool, 1)
    assert pool.take_moves() == Moves([], [(block, 0)]), "the other one is dropped"


def test_evicted_blocks_go_to_host_memory_bit_by_bit_but_before_they_are_written_to() -> None:
    pool = BlockPool(6 + RESERVED_BLOCKS, 4, host_blocks=6)
    blocks = held(pool, 6)
    for block, key in zip(blocks, KEYS, strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    last, *_, second, first = held(pool, 6)
    assert [last, second, first] == [blocks[5], blocks[1], blocks[0]], "the end goes first"
    assert pool.take_moves({first}, least=3).out == [(last, 0), (blocks[4], 1), (first, 5)]
    assert pool.take_moves({first, second}, least=0).out == [(second, 4)]
    pool.release([first])
    assert len(pool.share(KEYS[2:3], restore=True)) == 1
    assert pool.take_moves(least=0) == Moves([(blocks[2], 3)], [(first, 3)]), (
        "what is to come back goes first"
    )
    assert pool.take_moves().out == [(blocks[3], 2)]


def test_a_block_goes_to_host_memory_before_another_comes_back_into_it() -> None:
    pool = BlockPool(1 + RESERVED_BLOCKS, 4, host_blocks=2)
    left(pool, KEYS[:1])
    (block,) = held(pool, 1)
    assert pool.take_moves().out == [(block, 0)]
    pool.publish(block, KEYS[1])
    pool.release([block])
    pool.release(held(pool, 1))
    assert pool.take_moves(least=0) == Moves(), "nobody has written to it"
    assert pool.share(KEYS[:1], restore=True) == [block]
    assert pool.take_moves(least=0) == Moves([(block, 1)], [(block, 0)])


def test_what_host_memory_has_waits_there_while_no_block_is_free() -> None:
    pool = BlockPool(2 + RESERVED_BLOCKS, 4, host_blocks=2)
    left(pool, KEYS[:2])
    held(pool, 1)
    assert len(pool.share(KEYS[:2], restore=True)) == 1
    assert pool.share(KEYS[1:2], restore=True) == []


def test_a_block_that_goes_to_another_row_before_it_was_copied_back_is_left_alone() -> None:
    pool = BlockPool(2 + RESERVED_BLOCKS, 4, host_blocks=2)
    left(pool, KEYS[:1])
    pool.take_moves()
    pool.release(pool.share(KEYS[:1], restore=True))
    held(pool, 2)
    assert pool.take_moves() == Moves()
    assert pool.on_host == 1


def test_what_comes_back_in_a_later_step_keeps_its_place_in_host_memory_until_then() -> None:
    pool = BlockPool(3 + RESERVED_BLOCKS, 4, host_blocks=2, restored=1)
    for key in KEYS[:2]:
        left(pool, [key])
    pool.take_moves()
    first, second = pool.share(KEYS[:2], restore=True)
    (other,) = held(pool, 1)
    assert pool.late([first, second, other]) == [second]
    assert pool.take_moves() == Moves([], [(first, 0)])
    pool.publish(other, KEYS[2])
    pool.release([other])
    held(pool, 1)
    assert pool.late([first, second]) == []
    assert pool.take_moves() == Moves([], [(second, 1)]), "the other one is dropped"
    assert not pool.moving


@pytest.mark.parametrize(
    ("dtype", "block", "dim"),
    [(torch.bfloat16, 16, 8), (torch.int8, 16, 8), (torch.int8, 3, 5), (torch.float32, 1, 3)],
)
def test_blocks_come_back_from_host_memory_bit_for_bit(
    dtype: torch.dtype, block: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of two shapes, in pieces, at places one after the other and not, NaNs too."""
    monkeypatch.setattr(kv_cache, "STAGED_BLOCKS", 4)
    shapes = {0: (2, dim, dim), 1: (1, dim, 2), 2: (2, dim, dim)}
    cache, generator = KVCache(shapes, 20, block, dtype, torch.device("cpu")), torch.manual_seed(5)
    for part in cache.by_block:
        part.copy_(torch.randint(0, 256, part.shape, dtype=torch.uint8, generator=generator))
    before = [part.clone() for part in cache.by_block]
    host = HostCache(cache, 12)
    assert host._slab.nbytes == 12 * block * bytes_per_token(shapes, dtype)
    went, places = [7, 3, 19, 2, 8, 9, 11, 4, 15], [0, 1, 2, 4, 5, 7, 8, 9, 11]
    host.make(Moves(list(zip(went, places, strict=True))))
    for part in cache.by_block:
        part[:, went] = 1  # as by the step
    went, places = went[1:], places[1:]
    came = [5, 7, 3, 9, 8, 18, 17, 4]
    host.make(Moves(back=list(zip(came, places, strict=True))))
    for part, old in zip(cache.by_block, before, strict=True):
        assert torch.equal(part[:, came], old[:, went])
        rest = [0, 1, 6, 10, 12, 13, 14, 16]
        assert torch.equal(part[:, rest], old[:, rest])
    keys = cache.layers[2].keys.view(torch.uint8).reshape(2, 20, -1)
    assert torch.equal(keys[:, came], before[0].view(2, 2, 20, -1)[1, :, went]), "the layers have it"


class Locks:
    """CUDA's runtime, as far as it locks pages of the host."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.fails_at = 0

    def cudaHostRegister(self, place: int, size: int, flags: int) -> int:  # noqa: N802
        self.calls.append(("lock", place, size))
        return 2 if len(self.calls) == self.fails_at else 0

    def cudaHostUnregister(self, place: int) -> None:  # noqa: N802
        self.calls.append(("unlock", place))


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> Locks:
    found = Locks()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: found.calls.append("wait"))
    return found


def test_host_memory_is_page_locked_piece_by_piece_until_nobody_has_it_and_its_copies_are_made(
    locks: Locks,
) -> None:
    """The next engine of a process may get memory at the same place."""
    slab = torch.ones(10, dtype=torch.uint8)
    place, owner = slab.data_ptr(), KVCache({}, 3, 1, torch.float32, torch.device("cpu"))
    kv_cache._lock_pages(torch.split(slab, 4), torch.device("cuda"), owner)
    assert locks.calls == [("lock", place, 4), ("lock", place + 4, 4), ("lock", place + 8, 2)]
    del owner
    assert locks.calls[3:] == ["wait", *(("unlock", place + first) for first in (0, 4, 8))]


def test_what_was_page_locked_before_a_piece_that_cannot_be_is_given_back(
    locks: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    slab = torch.zeros(10, dtype=torch.uint8)
    locks.fails_at = 3
    with pytest.raises(RuntimeError, match="page-locked: CUDA error 2"):
        kv_cache._lock_pages(torch.split(slab, 4), torch.device("cuda"), slab)
    assert locks.calls[3:] == ["wait", ("unlock", slab.data_ptr()), ("unlock", slab.data_ptr() + 4)]


@pytest.mark.parametrize("size", [3, 2**12, 2_097_152, 2_129_920, 1 << 29])
def test_a_piece_of_host_memory_is_whole_pages_and_no_copy_lies_in_two(size: int) -> None:
    piece = kv_cache._blocks_of_a_piece(1 << 40, size)
    assert piece * size % mmap.PAGESIZE == 0
    assert piece * size <= max(kv_cache.LOCKED_BYTES, size * mmap.PAGESIZE)
    assert kv_cache._blocks_of_a_piece(7, size) <= 7
    moves = [(0, place) for place in (2, 3, 4, 5, 6, 9, 10)]
    runs = [(one.start, one.stop) for one, _ in kv_cache._runs(moves, 5)]
    assert runs == [(2, 5), (5, 7), (9, 10), (10, 11)]


class Streams(TorchDispatchMode):
    """Two streams of an accelerator, played on the CPU: what is launched waits in its stream's queue, and the
    queues run in an order that only `wait_stream` restricts."""

    def __init__(self, first: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.streams = [Stream(), Stream()]
        self.now, self.first = 0, first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) not in ("aten.copy_.default", "aten.index_select.out", "aten.index_copy_.default"):
            return func(*args, **(kwargs or {}))
        self.streams[self.now].queue.append(lambda: func(*args, **(kwargs or {})))
        return (kwargs or {}).get("out", args[0])

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        self.now = self.streams.index(stream)
        yield
        self.now = 0

    def run(self) -> None:
        """All of it: one stream continues until it has to wait for the other."""
        order = self.streams[self.first], self.streams[1 - self.first]
        while any(stream.done < len(stream.queue) for stream in order):
            next(stream for stream in order if stream.may_go_on()).go_on()


class Stream:
    """`queue`: what is launched, and as pairs (stream, count) what is waited for."""

    def __init__(self) -> None:
        self.queue: list[Any] = []
        self.done = 0

    def wait_stream(self, other: Stream) -> None:
        self.queue.append((other, len(other.queue)))

    def may_go_on(self) -> bool:
        if self.done == len(self.queue):
            return False
        one = self.queue[self.done]
        return not isinstance(one, tuple) or one[0].done >= one[1]

    def go_on(self) -> None:
        one = self.queue[self.done]
        if not isinstance(one, tuple):
            one()
        self.done += 1


@pytest.mark.parametrize("first", [0, 1])
def test_copies_in_a_stream_of_their_own_are_in_order_with_the_steps(
    first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever stream is the faster one."""
    monkeypatch.setattr(kv_cache, "STAGED_BLOCKS", 3)
    generator = torch.manual_seed(7)
    caches = [KVCache({0: (2, 4, 4)}, 12, 2, torch.float32, torch.device("cpu")) for _ in range(2)]
    hosts = [HostCache(cache, 8) for cache in caches]
    plain, apart = (cache.layers[0].keys.view(2, 12, 8) for cache in caches)
    with Streams(first) as streams:
        hosts[1]._stream = streams.streams[1]  # type: ignore[assignment]
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: streams.streams[0])
        monkeypatch.setattr(torch.cuda, "stream", streams.within)
    for _ in range(12):
        blocks, places = (torch.randperm(n, generator=generator).tolist() for n in (12, 8))
        moves = Moves(
            list(zip(blocks[:5], places, strict=False)), list(zip(blocks[3:9], places, strict=False))
        )
        step = torch.randperm(12, generator=generator)[:4], torch.rand(2, 4, 8, generator=generator)
        hosts[0].make(moves)
        plain.index_copy_(1, *step)
        with streams:
            hosts[1].make(moves)
            apart.index_copy_(1, *step)
    streams.run()
    assert plain.any()
    assert torch.equal(plain, apart)
    assert torch.equal(hosts[0]._slab, hosts[1]._slab)


def mix(*terms: tuple[str, float]) -> AdapterMix:
    return AdapterMix.of([AdapterRef(digest, weight) for digest, weight in terms])


def test_keys_differ_by_base_tenant_adapter_version_and_weight() -> None:
    roots = [
        root_key("base", "a", mix()),
        root_key("base2", "a", mix()),
        root_key("base", "b", mix()),
        root_key("basea", "", mix()),
        root_key("base", "a", mix(("x", 1.0))),
        root_key("base", "a", mix(("y", 1.0))),
        root_key("base", "a", mix(("x", 0.5))),
        root_key("base", "a", mix(("x", 1.0), ("y", 1.0))),
        root_key("base", "a", mix(("xy", 1.0))),
    ]
    assert len(set(roots)) == len(roots)
    blocks = {block_key(root, [1, 2, 3]) for root in roots}
    assert len(blocks) == len(roots)
    assert block_key(roots[0], [1, 2, 3]) != block_key(roots[0], [1, 2, 4])
    assert block_key(roots[0], [1, 2, 3]) == block_key(root_key("base", "a", mix()), [1, 2, 3])


def test_weights_that_are_equal_in_fp32_share_a_key() -> None:
    assert root_key("b", "t", mix(("x", 0.1))) == root_key("b", "t", mix(("x", 0.1 + 1e-12)))


def test_a_mix_sums_duplicates_sorts_by_digest_and_drops_zeros() -> None:
    assert mix(("b", 1.0), ("a", 0.25), ("b", 0.5), ("c", 0.0)).terms == (("a", 0.25), ("b", 1.5))
    assert mix(("a", 1.0), ("a", -1.0)) == AdapterMix()
