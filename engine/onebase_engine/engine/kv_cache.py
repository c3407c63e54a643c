"""KV blocks: which sequences hold them, and which free ones still hold a reusable prefix.

Block 0 is all zeros and only ever read (padding of shorter sequences), block 1 only ever written (padding
tokens): a freed block is never touched, not even with weight 0.

Layers that see the same part of a sequence form a group, with a table of blocks of its own: where some layers
have a window, what lies before it is released, while layers that see everything keep it. All groups take
their blocks from one pool, in which every block has the same bytes. So layers of one kind may be several
groups: a base with one full layer for five with windows has six.

An evicted prefix may move to host memory, and return when a sequence begins with it. The moves are chosen
while a step is planned; `BlockPool.take_moves` returns them, and `HostCache` copies before the step runs.
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
import weakref
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import torch

from onebase_engine.engine.sequence import AdapterMix
from onebase_engine.kernels.interface import LayerCache
from onebase_engine.kernels.reference import sent

ZERO_BLOCK = 0
DUMP_BLOCK = 1
RESERVED_BLOCKS = 2
SCALE_DTYPE = torch.bfloat16
"""Dtype of an int8 cache's scales, with half of fp32's bytes. It is no less exact, since numbers are divided
by the stored scale: rounding makes the steps wider by 0.4% at most."""
RESTORED = 2
"""Limit of tokens that return from host memory in one step, in multiples of the tokens that a step computes.
A token crosses the bus in about a tenth of the time in which it is computed."""
STAGED_BLOCKS = 32
"""Largest number of blocks in flight between device and host; the device has staging room for them."""
LOCKED_BYTES = 256 << 20
"""About how many bytes of host memory are page-locked by one call. Linux 6.11 to 6.13 locks no more than 2 GB
at once, and the driver's other callers wait for the end of each call (NVIDIA/TensorRT-LLM#17773)."""

MOST_GROUPS = 16
"""Largest number of groups. Each has a table, which is built and sent for every step."""
MOST_UNUSED = 0.1
"""Part of the blocks' bytes that may stay unused because not every group has as many layers, if it can be
less with more groups."""
WORTH_UNUSED = 0.25
"""Part of the blocks' bytes beyond which a base has one group, and keeps all blocks."""

Shape = tuple[int, int, int]
"""A layer's KV heads, and the sizes of its keys and values."""


@dataclass(frozen=True)
class Sight:
    """Positions that a layer sees: all up to the row's own, or those of a window or of a chunk."""

    window: int | None = None
    """Number of positions that a row sees, its own included."""
    chunk: int | None = None
    """Size of the chunks of positions of which a row sees its own."""

    @property
    def most(self) -> int | None:
        """Largest number of positions that a row sees; None: all."""
        return self.window or self.chunk

    def first_seen(self, position: int) -> int:
        """Return the first position that is seen by rows from `position` on."""
        if self.window is not None:
            return max(position - self.window + 1, 0)
        return position - position % self.chunk if self.chunk is not None else 0


@dataclass(frozen=True)
class BlockGroup:
    """Layers that have the same blocks in a sequence."""

    layers: tuple[int, ...]
    sight: Sight = Sight()
    stride: int = 1
    """Number of slots from one block to the next, in blocks: 1 where nothing lies between a head's blocks."""

    def first_block(self, computed: int, block_size: int) -> int:
        """Return the number of blocks that no row from position `computed` on sees."""
        return self.sight.first_seen(computed) // block_size

    def most_blocks(self, tokens: int, block_size: int, step_tokens: int) -> int:
        """Return the largest number of blocks that a sequence of `tokens` holds at once, alone.

        Those are the ones that its next rows see, and those that a step of `step_tokens` writes.
        """
        every = -(-tokens // block_size)
        if self.sight.most is None:
            return every
        return min(every, (self.sight.most + step_tokens - 3 + 2 * block_size) // block_size)


def most_blocks(groups: Sequence[BlockGroup], tokens: int, block_size: int, step_tokens: int) -> int:
    """Return the largest number of blocks of all groups that a sequence of `tokens` holds at once, alone."""
    return sum(group.most_blocks(tokens, block_size, step_tokens) for group in groups)


def most_tokens(
    groups: Sequence[BlockGroup], blocks: int, block_size: int, step_tokens: int, limit: int
) -> int:
    """Return the length of the longest sequence that fits into `blocks`, up to `limit`."""
    return largest(limit, lambda tokens: most_blocks(groups, tokens, block_size, step_tokens) <= blocks)


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from 1 to `limit` that fits, or 0; whatever is smaller fits as well."""
    return bisect_left(range(1, limit + 1), True, key=lambda number: not fits(number))


def block_groups(shapes: Mapping[int, Shape], sights: Mapping[int, Sight]) -> tuple[BlockGroup, ...]:
    """Group the layers with keys and values of their own by what they see.

    Blocks of all groups must have the same bytes. Where layers that see the same differ in shape, or too much
    would stay unused, there is one group, which keeps what any of its layers sees.
    """
    kinds: dict[Sight, list[int]] = {}
    for layer in sorted(shapes, key=lambda layer: (sights[layer].most or sys.maxsize, -layer), reverse=True):
        kinds.setdefault(sights[layer], []).append(layer)
    found = {sight: {shapes[layer] for layer in layers} for sight, layers in kinds.items()}
    ratios = {Fraction(key_dim, value_dim) for some in found.values() for _, key_dim, value_dim in some}
    if len(kinds) > 1 and len(ratios) == 1 and all(len(some) == 1 for some in found.values()):
        stretch = _divided(kinds, {sight: min(some) for sight, some in found.items()})
        if stretch:
            return stretch
    windows = [sights[layer].window for layer in shapes]
    whole = None in windows or not windows
    alike = next(iter(kinds)) if len(kinds) == 1 else Sight() if whole else Sight(max(filter(None, windows)))
    return (BlockGroup(tuple(sorted(shapes)), alike),)


def _divided(kinds: Mapping[Sight, Sequence[int]], shapes: Mapping[Sight, Shape]) -> tuple[BlockGroup, ...]:
    """Divide layers into groups whose blocks have the same bytes; return none if too much stays unused.

    Blocks are as large as all layers of the smallest kind need, or as a part of them does.
    """
    sizes = {sight: heads * key_dim for sight, (heads, key_dim, _) in shapes.items()}
    smallest = min(kinds, key=lambda sight: len(kinds[sight]) * sizes[sight])
    used = sum(len(layers) * sizes[sight] for sight, layers in kinds.items())
    multiple = math.lcm(*(key_dim for _, key_dim, _ in shapes.values()))
    best: tuple[float, int, dict[Sight, int]] = (WORTH_UNUSED, 0, {})
    for parts in range(1, len(kinds[smallest]) + 1):
        size = -(-len(kinds[smallest]) // parts) * sizes[smallest]
        size = -(-max(size, *sizes.values()) // multiple) * multiple
        layers_each = {sight: size // own for sight, own in sizes.items()}
        count = sum(-(-len(layers) // layers_each[sight]) for sight, layers in kinds.items())
        unused = 1 - used / (count * size)
        if count <= MOST_GROUPS and unused < best[0]:
            best = unused, size, layers_each
        if unused <= MOST_UNUSED:
            break
    _, size, layers_each = best
    return tuple(
        BlockGroup(tuple(sorted(layers)[first : first + each]), sight, size // shapes[sight][1])
        for sight, layers in kinds.items()
        if (each := layers_each.get(sight))
        for first in range(0, len(layers), each)
    )


def root_key(base: str, tenant: str, mix: AdapterMix) -> bytes:
    """Return the start of every prefix key: base, tenant, and each adapter's version digest and fp32
    weight."""
    key = blake2b(digest_size=16)
    for part in (base, tenant):
        encoded = part.encode()
        key.update(struct.pack("<I", len(encoded)) + encoded)
    for digest, weight in mix.terms:
        encoded = digest.encode()
        key.update(struct.pack("<I", len(encoded)) + encoded + struct.pack("<f", weight))
    return key.digest()


def block_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Return the key of a full block, made of its own tokens and everything before it."""
    return blake2b(parent + struct.pack(f"<{len(tokens)}I", *tokens), digest_size=16).digest()


def activation_key(parent: bytes, adapters: bytes, acts_from: int) -> bytes:
    """Return the parent of the first block in which adapters act, if they do not act from the beginning.

    What comes before is the bare base's, and keyed as such.

    Args:
        parent: key of the block before; without one the root key of the bare base.
        adapters: root key of the adapters.
        acts_from: position of the first token on which they act.
    """
    return blake2b(parent + adapters + struct.pack("<I", acts_from), digest_size=16).digest()


def group_key(key: bytes, group: int) -> bytes:
    """Return the key of a group's block with these tokens."""
    return key + bytes([group]) if group else key


@dataclass(frozen=True)
class Moves:
    """Copies due before the next step: first `out` to host memory, then `back`.

    Each is a block and its place in the host, sorted by places; no block and no place is twice in either.
    """

    out: list[tuple[int, int]] = field(default_factory=list)
    back: list[tuple[int, int]] = field(default_factory=list)


class BlockPool:
    """Reference-counted blocks with a prefix cache.

    The least recently used prefixes are evicted first, to places in host memory if there are any, and from
    there by the same rule.
    """

    def __init__(
        self, total: int, block_size: int, host_blocks: int = 0, restored: int = sys.maxsize
    ) -> None:
        """Create a pool of `total` blocks.

        Args:
            host_blocks: places in host memory for evicted blocks.
            restored: largest number of blocks that return from there in one step.
        """
        if total <= RESERVED_BLOCKS:
            raise ValueError(f"{total} KV blocks leave none to use; raise --kv-memory")
        self.block_size = block_size
        self.capacity = total - RESERVED_BLOCKS
        self._references = [0] * total
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._empty: deque[int] = deque(range(RESERVED_BLOCKS, total))
        self._reusable: OrderedDict[int, None] = OrderedDict()
        self.host_capacity = host_blocks
        self._most_back = restored
        self._unused = deque(range(host_blocks))
        self._place_of: OrderedDict[bytes, int] = OrderedDict()
        """Place of each prefix block in host memory, least recently used first. It may be in the cache
        too."""
        self._out: dict[int, int] = {}
        """Place -> the block that is to be copied there before it is written to."""
        self._back: dict[int, int] = {}
        """Block -> the place that is to be copied there, in this order."""
        self._reading: set[int] = set()
        """Places that moves are to copy from, and so take nothing else."""

    @property
    def free(self) -> int:
        """Number of blocks that can be allocated now, reusable prefixes included."""
        return len(self._empty) + len(self._reusable)

    @property
    def cached(self) -> int:
        """Number of free blocks that still hold a prefix."""
        return len(self._reusable)

    @property
    def on_host(self) -> int:
        """Number of blocks in host memory."""
        return len(self._place_of)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def unshared(self, blocks: Sequence[int]) -> int:
        """Return the number of the blocks that have no other owner."""
        return sum(self._references[block] == 1 for block in blocks)

    def allocate(self, count: int) -> list[int] | None:
        """Allocate `count` blocks with one reference each, or return None if too few are free."""
        if count > self.free:
            return None
        blocks = [self._take() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def _take(self) -> int:
        """Return a free block, without a reference."""
        if self._empty:
            block = self._empty.popleft()
        else:
            block, _ = self._reusable.popitem(last=False)
            key = self._key_of.pop(block)
            del self._block_of[key]
            self._keep(key, block)
        self._back.pop(block, None)
        return block

    def share(self, keys: Sequence[bytes], *, restore: bool = False) -> list[int]:
        """Return the blocks of the longest cached prefix of `keys`, with one more reference on each.

        restore: prefixes in host memory count as cached too, and get free blocks. Contents arrive with the
            next moves or later ones: see `late`.
        """
        if restore:
            self._used(keys)
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None and restore:
                block = self._restore(key)
            if block is None:
                break
            self._reusable.pop(block, None)
            self._references[block] += 1
            blocks.append(block)
        return blocks

    def holds(self, key: bytes, *, restore: bool = False) -> bool:
        """Return True if a prefix block is cached; `restore`: or in host memory."""
        return key in self._block_of or (restore and key in self._place_of)

    def publish(self, block: int, key: bytes) -> None:
        """Offer a full, computed block to later sequences. The first block with a key stays."""
        if block not in self._key_of and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Release one reference on each block. The end of a prefix becomes evictable before its beginning."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] < 0:
                raise RuntimeError(f"KV block {block} released twice")
            if self._references[block] == 0:
                if block in self._key_of:
                    self._reusable[block] = None
                else:
                    self._empty.append(block)

    # ---- host memory -------------------------------------------------------------------------

    @property
    def moving(self) -> bool:
        """Whether copies are pending, or places are reserved for them."""
        return bool(self._out or self._back or self._reading)

    def late(self, blocks: Sequence[int]) -> list[int]:
        """Return those of the blocks that the next moves do not restore yet. No step must read them."""
        if len(self._back) <= self._most_back:
            return []
        next_ones = set(islice(self._back, self._most_back))
        return [block for block in blocks if block in self._back and block not in next_ones]

    def take_moves(self, written: Collection[int] = (), least: int = STAGED_BLOCKS) -> Moves:
        """Return the copies to make now, before anything is computed.

        A long prompt takes many blocks at once and writes to them in many steps: what it evicted goes to the
        host bit by bit, so that no step is held up for all of it. Nor is it for all that comes back.

        Args:
            written: blocks that the step writes to.
            least: blocks that go to the host even if they could wait.
        """
        now = dict(islice(self._back.items(), self._most_back))
        read = set(now.values())
        due = {
            place for place, block in self._out.items() if block in written or block in now or place in read
        }
        late = (place for place in self._out if place not in due)
        due.update(list(islice(late, max(least - len(due), 0))))
        out = [(self._out.pop(place), place) for place in sorted(due)]
        back = sorted(now.items(), key=lambda move: move[1])
        for block in now:
            del self._back[block]
        self._reading = set(self._back.values())
        return Moves(out, back)

    def _keep(self, key: bytes, block: int) -> None:
        """Assign an evicted block a place in host memory, if need be that of the least recently used one."""
        if key in self._place_of:
            self._place_of.move_to_end(key)
            return
        if self._unused:
            place = self._unused.popleft()
        else:
            oldest = next(iter(self._place_of), None)
            if oldest is None or self._place_of[oldest] in self._reading:
                return  # It is dropped.
            place = self._place_of.pop(oldest)
        self._place_of[key] = place
        self._out[place] = block

    def _restore(self, key: bytes) -> int | None:
        """Allocate a block for a prefix block in host memory, where it also stays. Return None if it is not
        there."""
        place = self._place_of.get(key)
        if place is None or not self.free:
            return None
        self._reading.add(place)
        block = self._take()
        self._back[block] = place
        self.publish(block, key)
        return block

    def _used(self, keys: Sequence[bytes]) -> None:
        """Mark prefix blocks in host memory as used. There, too, a prefix loses its end first."""
        for key in reversed(keys):
            if key in self._place_of:
                self._place_of.move_to_end(key)


class KVCache:
    """Tensors of the KV cache, per layer.

    In int8, each token has a scale for its key and one for its value in each head. They depend on this token
    alone, so that a block's bits never change once it is full.

    With one group of layers, each head has all of its blocks side by side. With several, each block has all
    heads of its group's layers, and a block's bytes are any group's.
    """

    def __init__(
        self,
        shapes: Mapping[int, Shape],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        groups: Sequence[BlockGroup] = (),
    ) -> None:
        """Allocate the tensors.

        Args:
            dtype: the model's, or int8.
            groups: the layers' groups; none: all are one.
        """
        self.layers: dict[int, LayerCache] = {}
        self.by_block: list[torch.Tensor] = []
        """Views of all of the cache, each [rows, blocks, bytes]: a row is one head of one layer, or all of a
        block."""
        if len(groups) > 1:
            self._divide(shapes, blocks, block_size, dtype, device, groups)
            return
        slots = blocks * block_size
        alike: dict[Shape, list[int]] = {}
        for layer, shape in shapes.items():
            alike.setdefault(shape, []).append(layer)
        for (heads, key_dim, value_dim), layers in alike.items():
            kinds: list[tuple[tuple[int, ...], torch.dtype]] = [((key_dim,), dtype), ((value_dim,), dtype)]
            if dtype == torch.int8:
                kinds += [((), SCALE_DTYPE)] * 2
            rows = heads * len(layers)
            parts = [zeros((rows, slots, *of_token), kind, device) for of_token, kind in kinds]
            self.by_block += [part.view(rows, blocks, -1).view(torch.uint8) for part in parts]
            for first, layer in zip(range(0, rows, heads), layers, strict=True):
                keys, values, *scales = (part[first : first + heads] for part in parts)
                pair = (scales[0], scales[1]) if scales else None
                self.layers[layer] = LayerCache(keys, values, block_size, pair)

    def _divide(
        self,
        shapes: Mapping[int, Shape],
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        groups: Sequence[BlockGroup],
    ) -> None:
        """Allocate blocks that are any group's. In a block, a row is one head's: [block size, size of it].

        A key or value has the same slot: blocks of both have as many rows.
        """

        def allocate(size: int, kind: torch.dtype) -> torch.Tensor:
            whole = zeros((blocks, size), kind, device)
            self.by_block.append(whole.view(1, blocks, size).view(torch.uint8))
            return whole

        def rows_of(whole: torch.Tensor, first: int, heads: int, dim: int) -> torch.Tensor:
            """Return a layer's rows, from number `first` on, as [heads, slots, dim]."""
            own, between = block_size * dim, whole.shape[1] // dim
            slots = (blocks - 1) * between + block_size
            return whole.as_strided((heads, slots, dim), (own, dim, 1), first * own)

        sizes = _sizes_in_block(shapes, groups, block_size)
        keys, values = (allocate(size, dtype) for size in sizes)
        scales: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if dtype == torch.int8:
            for stride in sorted({group.stride for group in groups}):
                scales[stride] = (
                    allocate(stride * block_size, SCALE_DTYPE),
                    allocate(stride * block_size, SCALE_DTYPE),
                )
        for table, group in enumerate(groups):
            first = 0
            for layer in group.layers:
                heads, key_dim, value_dim = shapes[layer]
                pair = None
                if scales:
                    one, other = (rows_of(part, first, heads, 1)[..., 0] for part in scales[group.stride])
                    pair = one, other
                self.layers[layer] = LayerCache(
                    rows_of(keys, first, heads, key_dim),
                    rows_of(values, first, heads, value_dim),
                    block_size,
                    pair,
                    table,
                )
                first += heads


class HostCache:
    """KV blocks in host memory, in one slab that is page-locked if the cache is on a GPU.

    Blocks are gathered on the device, all layers at once, and what was gathered is copied, and the other way
    round. On a GPU a stream of its own does what crosses the bus: what goes to the host overlaps with the
    step, which waits for what comes back. All copies are in that stream's order, so that a place is never
    overwritten before it was read; the host waits for nothing.
    """

    def __init__(self, cache: KVCache, blocks: int) -> None:
        """Allocate the slab. Raises RuntimeError if so much memory cannot be page-locked."""
        device = cache.by_block[0].device
        sizes = [part.shape[2] for part in cache.by_block]
        words = (torch.int64, torch.int32, torch.int16, torch.uint8)
        word = next(one for one in words if all(size % one.itemsize == 0 for size in sizes))
        self._parts = [part.view(word) for part in cache.by_block]
        rows = [(part.shape[0], part.shape[2]) for part in self._parts]
        size = sum(count * length for count, length in rows)
        self._slab = zeros((blocks, size), word, torch.device("cpu"))
        self._piece = _blocks_of_a_piece(blocks, self._slab.stride(0) * word.itemsize)
        self._staged = torch.zeros((min(blocks, STAGED_BLOCKS), size), dtype=word, device=device)
        columns = torch.split(self._staged, [count * length for count, length in rows], dim=1)
        self._gathered = [one.view(-1, *row).transpose(0, 1) for one, row in zip(columns, rows, strict=True)]
        """Staging room of each part, [rows, STAGED_BLOCKS, words]."""
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            _lock_pages(torch.split(self._slab, self._piece), device, self)

    def make(self, moves: Moves) -> None:
        """Copy blocks, before anything that the caller computes after this."""
        for group, index in self._groups(moves.out):
            self._wait_for_copies()
            for part, gathered in zip(self._parts, self._gathered, strict=True):
                torch.index_select(part, 1, index, out=gathered[:, : len(group)])
            with self._copies():
                for places, staged in _runs(group, self._piece):
                    self._slab[places].copy_(self._staged[staged], non_blocking=True)
        for group, index in self._groups(moves.back):
            with self._copies():
                for places, staged in _runs(group, self._piece):
                    self._staged[staged].copy_(self._slab[places], non_blocking=True)
            self._wait_for_copies()
            for part, gathered in zip(self._parts, self._gathered, strict=True):
                part.index_copy_(1, index, gathered[:, : len(group)])

    def _groups(self, moves: list[tuple[int, int]]) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor]]:
        """Yield groups of moves that are staged at once, with the indices of their blocks on the device."""
        for start in range(0, len(moves), len(self._staged)):
            group = moves[start : start + len(self._staged)]
            yield group, sent(np.array([block for block, _ in group]), self._staged.device)

    def _copies(self) -> AbstractContextManager[object]:
        """Return a context whose copies begin after all work that the device has been given so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._staged.device))
        return torch.cuda.stream(self._stream)

    def _wait_for_copies(self) -> None:
        """Make the device, not the host, wait for the copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._staged.device).wait_stream(self._stream)


def _blocks_of_a_piece(blocks: int, size: int) -> int:
    """Return how many of the blocks, of `size` bytes, are page-locked at once: in whole pages."""
    whole = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, size)
    return min(blocks, max(LOCKED_BYTES // (size * whole), 1) * whole)


def _runs(moves: Sequence[tuple[int, int]], piece: int) -> Iterator[tuple[slice, slice]]:
    """Yield runs of neighbouring places, and their positions among the moves: one copy per run.

    CUDA copies nothing that lies in two pieces of `piece` places, which were page-locked apart.
    """
    start = 0
    for number in range(1, len(moves) + 1):
        place = moves[number][1] if number < len(moves) else 0
        if number == len(moves) or place != moves[number - 1][1] + 1 or place % piece == 0:
            first = moves[start][1]
            yield slice(first, first + number - start), slice(start, number)
            start = number


def _lock_pages(pieces: Sequence[torch.Tensor], device: torch.device, owner: object) -> None:
    """Page-lock memory in place, piece by piece, for its owner's lifetime. Raises RuntimeError.

    Tensors that PyTorch pins would take the next power of two.
    """
    cuda: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    locked = list[torch.Tensor]()

    def unlock() -> None:
        torch.cuda.synchronize(device)  # copies may still be made
        for piece in locked:
            cuda.cudaHostUnregister(piece.data_ptr())

    for piece in pieces:
        failed = int(cuda.cudaHostRegister(piece.data_ptr(), piece.nbytes, 0))
        if failed:
            with suppress(torch.AcceleratorError):
                torch.ones(1, device=device)  # It would be raised by the next launch.
            unlock()
            size, done = (sum(one.nbytes for one in some) / 1e9 for some in (pieces, locked))
            raise RuntimeError(
                f"{size:.1f} GB of host memory cannot be page-locked: CUDA error {failed} after {done:.1f} GB"
            )
        locked.append(piece)
    # Else CUDA would take what lies there next for these pages, and copy from and to them. It keeps the slab.
    weakref.finalize(owner, unlock).atexit = False


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros. On the CPU they are fresh pages of the system, which take memory only once written.

    torch.zeros writes them all, and calloc does too if it finds room among freed memory.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _sizes_in_block(
    shapes: Mapping[int, Shape], groups: Sequence[BlockGroup], block_size: int
) -> tuple[int, int]:
    """Return the numbers of keys and of values in a block of several groups."""
    _, key_dim, value_dim = shapes[groups[0].layers[0]]
    return groups[0].stride * block_size * key_dim, groups[0].stride * block_size * value_dim


def bytes_per_block(
    shapes: Mapping[int, Shape], dtype: torch.dtype, block_size: int, groups: Sequence[BlockGroup]
) -> int:
    """Return the bytes of one block: of all layers, or with several groups of any one of them."""
    if len(groups) == 1:
        return block_size * bytes_per_token(shapes, dtype)
    scales = sum({group.stride for group in groups}) * block_size * 2 * SCALE_DTYPE.itemsize
    numbers = sum(_sizes_in_block(shapes, groups, block_size))
    return numbers * dtype.itemsize + (scales if dtype == torch.int8 else 0)


def bytes_per_token(shapes: Mapping[int, Shape], dtype: torch.dtype) -> int:
    """Return the KV bytes of one token over all layers."""
    scales = 2 * SCALE_DTYPE.itemsize if dtype == torch.int8 else 0
    return sum(
        heads * ((key_dim + value_dim) * dtype.itemsize + scales)
        for heads, key_dim, value_dim in shapes.values()
    )
