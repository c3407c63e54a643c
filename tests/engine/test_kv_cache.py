"""KV blocks: nothing leaks, nothing is handed out twice, and prefixes go in the order of last use."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from onebase_engine.engine.kv_cache import RESERVED_BLOCKS, BlockPool, block_key, root_key
from onebase_engine.engine.messages import AdapterRef
from onebase_engine.engine.row import AdapterMix

BLOCKS = 9
KEYS = [bytes([number]) * 16 for number in range(6)]


class PoolMachine(RuleBasedStateMachine):
    """Rows that take, share, publish and return blocks in any order, against a count of every reference."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS + RESERVED_BLOCKS, 4)
        self.references: dict[int, int] = {}
        self.key_of: dict[int, bytes] = {}

    @rule(target=held, count=st.integers(1, 4))
    def allocate(self, count: int) -> list[int]:
        before = self.pool.free
        blocks = self.pool.allocate(count)
        if blocks is None:
            assert count > before
            assert self.pool.free == before
            return []
        assert all(block >= RESERVED_BLOCKS for block in blocks)
        assert not any(self.references.get(block) for block in blocks)
        assert len(set(blocks)) == count
        for block in blocks:
            self.references[block] = 1
            self.key_of.pop(block, None)
        return blocks

    @rule(target=held, first=st.integers(0, 4), count=st.integers(1, 3))
    def share(self, first: int, count: int) -> list[int]:
        keys = KEYS[first : first + count]
        blocks = self.pool.share(keys)
        assert [self.key_of.get(block) for block in blocks] == keys[: len(blocks)]
        if len(blocks) < len(keys):
            assert keys[len(blocks)] not in self.key_of.values()
        for block in blocks:
            self.references[block] += 1
        return blocks

    @rule(blocks=held, key=st.sampled_from(KEYS))
    def publish(self, blocks: list[int], key: bytes) -> None:
        for block in blocks[:1]:
            self.pool.publish(block, key)
            if block not in self.key_of and key not in self.key_of.values():
                self.key_of[block] = key

    @rule(blocks=consumes(held))
    def release(self, blocks: list[int]) -> None:
        self.pool.release(blocks)
        for block in blocks:
            self.references[block] -= 1

    @invariant()
    def every_block_is_either_held_or_free(self) -> None:
        used = [block for block, count in self.references.items() if count]
        assert self.pool.free + len(used) == self.pool.capacity == BLOCKS
        idle = [block for block in self.key_of if not self.references[block]]
        assert self.pool.cached == len(idle)


# Blocks leave the bundle when they are released, so rules only touch blocks that are held.
TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)


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
