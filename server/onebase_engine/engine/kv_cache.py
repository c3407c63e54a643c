"""KV blocks: who holds which, and which free ones still hold a reusable prefix.

Block 0 is all zeros and only ever read (padding of shorter rows), block 1 only ever written (padding
tokens): a freed block is never touched, not even with weight 0.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import OrderedDict, deque
from collections.abc import Sequence
from hashlib import blake2b

import torch

from onebase_engine.engine.row import AdapterMix
from onebase_engine.kernels.interface import LayerCache

ZERO_BLOCK = 0
DUMP_BLOCK = 1
RESERVED_BLOCKS = 2
SCALE_DTYPE = torch.bfloat16
"""Of an int8 cache: half of fp32's bytes. It is no less exact, since numbers are divided by the scale as it
is kept: a rounded one makes the steps wider by 0.4% at most."""


def root_key(base: str, tenant: str, mix: AdapterMix) -> bytes:
    """Start of every prefix key: base, tenant, and each adapter's version digest with its fp32 weight."""
    key = blake2b(digest_size=16)
    for part in (base, tenant):
        encoded = part.encode()
        key.update(struct.pack("<I", len(encoded)) + encoded)
    for digest, weight in mix.terms:
        encoded = digest.encode()
        key.update(struct.pack("<I", len(encoded)) + encoded + struct.pack("<f", weight))
    return key.digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a full block: everything before it, and its own tokens."""
    return blake2b(parent + struct.pack(f"<{len(tokens)}I", *tokens), digest_size=16).digest()


class BlockPool:
    """Reference-counted blocks with a prefix cache; least recently used prefixes are evicted first."""

    def __init__(self, total: int, block_size: int) -> None:
        if total <= RESERVED_BLOCKS:
            raise ValueError(f"{total} KV blocks leave none to use; raise --kv-memory")
        self.block_size = block_size
        self.capacity = total - RESERVED_BLOCKS
        self._references = [0] * total
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._empty: deque[int] = deque(range(RESERVED_BLOCKS, total))
        self._reusable: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks that can be allocated now, reusable prefixes included."""
        return len(self._empty) + len(self._reusable)

    @property
    def cached(self) -> int:
        """Free blocks that still hold a prefix."""
        return len(self._reusable)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def unshared(self, blocks: Sequence[int]) -> int:
        """How many of the blocks nobody else holds."""
        return sum(self._references[block] == 1 for block in blocks)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and nothing taken) if there are not enough."""
        if count > self.free:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._empty:
            block = self._empty.popleft()
        else:
            block, _ = self._reusable.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
        self._references[block] = 1
        return block

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of `keys`, one reference more on each."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._reusable.pop(block, None)
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Offer a full, computed block to later rows. The first block with a key stays."""
        if block not in self._key_of and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give references back. The end of a prefix becomes evictable before its beginning."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] < 0:
                raise RuntimeError(f"KV block {block} released twice")
            if self._references[block] == 0:
                if block in self._key_of:
                    self._reusable[block] = None
                else:
                    self._empty.append(block)


class KVCache:
    """The tensors, per layer. In int8, each token has a scale for its key and one for its value in each head:
    they depend on nothing but the token's own, so that a block's bits never change once it is full."""

    def __init__(
        self,
        shapes: dict[int, tuple[int, int, int]],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`shapes`: layer -> (kv heads, key dim, value dim). `dtype`: the model's, or int8."""
        slots = blocks * block_size

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return _zeros(shape, dtype, device)

        self.layers = {
            layer: LayerCache(
                zeros(heads, slots, key_dim),
                zeros(heads, slots, value_dim),
                block_size,
                (zeros(heads, slots, dtype=SCALE_DTYPE), zeros(heads, slots, dtype=SCALE_DTYPE))
                if dtype == torch.int8
                else None,
            )
            for layer, (heads, key_dim, value_dim) in shapes.items()
        }


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros. On the CPU fresh pages of the system, which take memory only once written: torch.zeros writes
    them all, and calloc does too where it finds room among what was freed."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def bytes_per_token(shapes: dict[int, tuple[int, int, int]], dtype: torch.dtype) -> int:
    """KV bytes of one token over all layers."""
    scales = 2 * SCALE_DTYPE.itemsize if dtype == torch.int8 else 0
    return sum(
        heads * ((key_dim + value_dim) * dtype.itemsize + scales)
        for heads, key_dim, value_dim in shapes.values()
    )
