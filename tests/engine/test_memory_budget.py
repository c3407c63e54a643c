"""How many KV blocks there are, and that unused ones cost nothing on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from onebase_engine.base.layers import LayerShape
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS, KVCache, bytes_per_token
from onebase_engine.engine.memory_budget import (
    MemoryBudgetError,
    kv_block_count,
    kv_memory_available,
    slot_bytes,
)
from onebase_engine.machine import NO_LIMIT, container_free, total_memory

MB = 1_000_000
PAGE = os.sysconf("SC_PAGE_SIZE")


def test_free_memory_less_the_training_share_is_cut_into_blocks() -> None:
    assert kv_block_count(MB, 10_000, 100 * MB, kv_memory=0, train_memory=0) == 100
    assert kv_block_count(MB, 10_000, 100 * MB, kv_memory=0, train_memory=60 * MB) == 40


def test_no_more_blocks_are_taken_than_rows_could_use() -> None:
    assert kv_block_count(MB, 30, 100 * MB, kv_memory=0, train_memory=0) == 30


def test_kv_memory_overrides_what_is_free_and_the_training_share() -> None:
    assert kv_block_count(MB, 30, 5 * MB, kv_memory=50 * MB, train_memory=90 * MB) == 50


@pytest.mark.parametrize(
    ("free", "kv_memory", "train_memory"),
    [(100 * MB, 0, 100 * MB), (100 * MB, 0, 500 * MB), (100 * MB, RESERVED_BLOCKS * MB, 0), (0, 0, 0)],
)
def test_too_little_memory_is_refused_with_a_remedy(free: int, kv_memory: int, train_memory: int) -> None:
    with pytest.raises(MemoryBudgetError, match="--kv-memory"):
        kv_block_count(MB, 1000, free, kv_memory=kv_memory, train_memory=train_memory)


def test_the_free_memory_of_the_cpu_is_less_than_the_machine_has() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < kv_memory_available(torch.device("cpu")) < total


@pytest.mark.parametrize(("limit", "available"), [("1000", 1000 - (900 - 500)), ("max", NO_LIMIT)])
def test_the_page_cache_of_a_container_counts_as_free(tmp_path: Path, limit: str, available: int) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 400\nfile 500\ninactive_file 300\nactive_file 200\nshmem 0\n")
    assert container_free(tmp_path) == available


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert container_free(tmp_path) == NO_LIMIT


@pytest.mark.parametrize(("limit", "total"), [("1000", 1000), ("999999999", 4_096_000), ("max", 4_096_000)])
def test_memory_is_the_machines_or_the_containers_if_that_is_less(
    tmp_path: Path, limit: str, total: int
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       4000 kB\nMemAvailable:   2000 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    assert total_memory(proc=tmp_path, cgroup=tmp_path) == total


def _tensors(cache: KVCache) -> list[torch.Tensor]:
    return [t for one in cache.layers.values() for t in (one.keys, one.values, *(one.scales or ()))]


def _resident(cache: KVCache) -> int:
    """Bytes of the cache that take memory or swap (Linux' pagemap, a word a page)."""
    found = 0
    for tensor in _tensors(cache):
        first, last = tensor.data_ptr() // PAGE, (tensor.data_ptr() + tensor.nbytes - 1) // PAGE
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:
            words = np.frombuffer(os.pread(pages.fileno(), 8 * (last - first + 1), 8 * first), np.uint64)
        found += int(np.count_nonzero(words >> 62)) * PAGE
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_kv_cache_on_the_cpu_takes_memory_only_once_written(dtype: torch.dtype) -> None:
    shapes = {0: (2, 64, 32), 1: (2, 64, 32)}
    cache = KVCache(shapes, 20_000, 16, dtype, torch.device("cpu"))
    size = sum(t.nbytes for t in _tensors(cache))
    assert size == 20_000 * 16 * bytes_per_token(shapes, dtype) > 50 * MB
    assert _resident(cache) < size / 10
    keys = cache.layers[0].keys
    assert not keys[:, :32].any()
    keys.fill_(1)
    assert _resident(cache) >= keys.nbytes


def test_keys_and_values_have_a_place_for_every_token_of_every_block() -> None:
    cache = KVCache({3: (2, 8, 4)}, 5, 16, torch.float32, torch.device("cpu"))
    assert cache.layers[3].keys.shape == (2, 80, 8)
    assert cache.layers[3].values.shape == (2, 80, 4)
    assert cache.layers[3].scales is None


def test_a_token_in_int8_takes_a_byte_a_number_and_two_for_each_scale() -> None:
    shapes = dict.fromkeys(range(32), (8, 128, 128))
    half = bytes_per_token(shapes, torch.int8)
    assert half == 32 * 8 * 2 * (128 + 2)
    assert bytes_per_token(shapes, torch.bfloat16) / half == pytest.approx(1.97, abs=0.01)


def test_slots_of_an_8b_llama_are_counted_in_bytes() -> None:
    attention = [
        LayerShape(4096, 4096),
        LayerShape(4096, 1024),
        LayerShape(4096, 1024),
        LayerShape(4096, 4096),
    ]
    norms = [LayerShape(4096, 4096, "norm")] * 65
    one = slot_bytes(attention * 32 + norms, slots=1, rank=32)
    assert one == 109_051_904, "109.05 MB for r=32 on q, k, v, o"
