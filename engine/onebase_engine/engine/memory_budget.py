"""Memory budget: the shares of the free memory that the KV cache and the adapter slots take.

On the CPU that is a share. On an accelerator it is what is free less what others will need: the largest step
that the limits allow is computed once to see what it takes, and the rest is counted.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from onebase_engine import machine
from onebase_engine.base.experts import ExpertStack
from onebase_engine.base.layers import LayerShape, adaptable_layers
from onebase_engine.engine.batch import Packer
from onebase_engine.engine.kv_cache import RESERVED_BLOCKS, largest
from onebase_engine.engine.messages import MAX_ADAPTER_TERMS, Sampling
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.sampling import draw
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.engine.sequence import AdapterMix, Segment, SequenceState, StepPlan
from onebase_engine.kernels.interface import TILE
from onebase_engine.kernels.weights import LoraWeights

CPU_SHARE = 0.5
"""Part of the free memory that the KV cache may take on the CPU, where everything else lives as well."""
STATE_SHARE = 0.25
"""Largest part of the memory for the KV cache that recurrent states take."""
CONTEXT_BYTES = 768 << 20
"""Bytes of a process's context on a GPU. PyTorch 2.10 with CUDA 13 takes 426 MiB before its first kernel
(unslothai/unsloth-zoo#1053) and more with each module of kernels; all of PyTorch's took over 1 GB, before
they were loaded one by one (pytorch/pytorch#107667). Not measured by us."""
PROOF_RANK, PROOF_VERSIONS = 32, 3
"""Rank and number of versions for which a proof's tensors are counted: a version on every layer, as PEFT
holds it and in a slot, and its neighbour of the same size. Counted, not measured. A proof that needs more is
refused."""
PROOF_BYTES = 1 << 30
"""Lower limit, in bytes, of what is reserved for these and an unpacked layer: what they take of an 8B."""
_PROOF_VIEWS = 2
"""Number of views of the base that a verifier holds, each with the scales of 4-bit weights in fp32."""

ROUNDED_TO = 2 << 20
"""Size, in bytes, to a multiple of which PyTorch rounds its requests to a GPU (`kRoundLarge`)."""
_WEIGHT = 0.3
"""Weight of the adapters in a largest step. It is not 1, which would skip the multiplication."""
_REPLACING_RANK = 16
"""Largest rank of the adapter that replaces rows: the memory that it takes of a step hardly grows with its
rank, and it lies next to the step."""
SHORTEST = 512
"""Tokens of the shortest context for which a largest step is tried."""

Measure = Callable[[Callable[[], object]], int]
"""Function that runs another one and returns the peak of its bytes, less those that it still holds."""


class MemoryBudgetError(Exception):
    """The KV cache has no room; the message says which setting to change."""


def kv_memory_available(device: torch.device) -> int:
    """Return the bytes that the KV cache may take on `device`, before anything is set aside.

    Memory that PyTorch reserves without a tensor, as after a step that ran out of memory, is released first.

    Raises MemoryBudgetError if the system does not report its memory.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    free = machine.free_memory(device)
    if free == machine.NO_LIMIT:
        raise MemoryBudgetError("/proc/meminfo does not say what is available; set --kv-memory")
    return free if device.type == "cuda" else int(free * CPU_SHARE)


def kv_block_count(
    block_bytes: int, most: int, free: int, *, kv_memory: int = 0, aside: Mapping[str, int] | None = None
) -> int:
    """Return the number of KV blocks: `kv_memory` in blocks, or else the free memory less what is set aside.

    Args:
        block_bytes: bytes of one block.
        most: blocks beyond which none could be used by running sequences.
        free: bytes that may be taken.
        aside: bytes for others, by who they are and which setting changes that.

    Raises:
        MemoryBudgetError: fewer than one usable block fits.
    """
    others = {} if kv_memory or aside is None else {who: size for who, size in aside.items() if size}
    budget = kv_memory or free - sum(others.values())
    count = budget // block_bytes if kv_memory else min(budget // block_bytes, most)
    if count <= RESERVED_BLOCKS:
        taken = "".join(f", less {size / 1e6:.0f} MB for {who}" for who, size in others.items())
        raise MemoryBudgetError(
            f"no memory for the KV cache: {max(kv_memory or free, 0) / 1e6:.0f} MB are available{taken}, and "
            f"a block takes {block_bytes / 1e6:.2f} MB; "
            f"{'lower one of these, ' if others else ''}choose a smaller base or set --kv-memory"
        )
    return int(count)


def host_block_count(block_bytes: int, prefix_memory: int) -> int:
    """Return the number of KV blocks that fit into `prefix_memory` bytes of host memory.

    It is limited to half of the free host memory, since it is allocated at once.
    """
    return min(prefix_memory, machine.free_memory(torch.device("cpu")) // 2) // block_bytes


def state_place_count(state_bytes: int, max_sequences: int, free: int) -> int:
    """Return the number of places for recurrent states; 0 for a base that keeps none.

    Each of `max_sequences` sequences has two, and as many keep the states behind prefixes. Where all of them
    would take more than STATE_SHARE of the free memory there are fewer, and fewer sequences run at once.

    Raises:
        MemoryBudgetError: there is no room for one sequence.
    """
    if not state_bytes:
        return 0
    fitting = int(free * STATE_SHARE) // state_bytes
    if fitting < 3:
        raise MemoryBudgetError(
            f"no memory for recurrent states: one takes {state_bytes / 1e6:.1f} MB, and a part of "
            f"{STATE_SHARE:.0%} of the {free / 1e6:.0f} MB that are free holds {fitting} of the 3 that are "
            "needed; choose a smaller base"
        )
    return min(fitting, 1 + 4 * max_sequences)


def slot_bytes(layers: Iterable[LayerShape], slots: int, rank: int) -> int:
    """Return the largest size, in bytes, of `slots` adapters of `rank`, fp32."""
    ends = sum(layer.count * (layer.size_in + layer.size_out) for layer in layers if layer.kind != "norm")
    return ends * rank * slots * 4


def staging_bytes(slot_memory: int) -> int:
    """Return the bytes for versions in flight to the accelerator, besides slots; 0 is no limit."""
    return -(-slot_memory // 4)  # 0, which is no limit, only of 0


def verifier_bytes(base: nn.Module) -> int:
    """Return the bytes that the verifier takes on a GPU, next to the base that it shares."""
    found: Iterable[Any] = (getattr(one, "quant_state", None) for one in base.parameters())
    states = [state for state in found if state is not None]
    scales: int = sum(state.absmax.numel() * 4 for state in states)
    unpacked = max((2 * math.prod(state.shape) for state in states), default=0)
    stacks = [module for module in base.modules() if isinstance(module, ExpertStack)]
    # What autograd does not keep is unpacked one matrix at a time.
    unpacked = max((unpacked, *(2 * stack.size_in * stack.size_out for stack in stacks)))
    # Of adapters on experts, which are many times as large, only those are proved for which there is room.
    layers = [layer for layer in adaptable_layers(base).values() if layer.kind != "experts"]
    versions = PROOF_VERSIONS * slot_bytes(layers, 1, PROOF_RANK)
    experts = sum(4 * stack.absmax.numel() for stack in stacks if stack.nested)  # in the served view alone
    return CONTEXT_BYTES + max(PROOF_BYTES, versions + unpacked) + _PROOF_VIEWS * scales + experts


def rounding_bytes(model: ServedModel) -> int:
    """Return the bytes by which rounding, tensor by tensor, may enlarge a KV cache."""
    return model.kv_tensors * ROUNDED_TO


# ---- the largest step --------------------------------------------------------------------------


def fit_step(
    free: int, kv_bytes: Callable[[int], int], max_length: int, step_at: Callable[[int], int]
) -> tuple[int, int]:
    """Return the bytes to set aside for a step, and the longest context for which they suffice.

    A step's memory grows with its longest context, and no context is longer than the KV cache, which gets the
    rest: the two are chosen so that both fit.

    Args:
        free: bytes for both.
        kv_bytes: returns the bytes of a sequence of this length in the KV cache.
        step_at: returns the bytes of the largest step at the end of contexts of this length. Raises
            MemoryBudgetError if they exceed the memory.

    Raises:
        MemoryBudgetError: even a step with the shortest contexts does not fit.
    """
    longest = length = max(largest(max_length, lambda tokens: kv_bytes(tokens) <= free), 1)
    while True:
        try:
            step = step_at(length)
            break
        except MemoryBudgetError:
            if length <= SHORTEST:
                raise
            length = max(length // 2, SHORTEST)
    # A step takes something at any length, so that at this one it takes no less than its part.
    both = max(largest(max_length, lambda tokens: kv_bytes(tokens) + step * tokens / length <= free), 1)
    if both >= longest and length == longest:
        return step, max_length
    try:
        return step_at(min(both, longest)), min(both, longest)
    except MemoryBudgetError:
        return step, length


def measured_on(device: torch.device) -> Measure:
    """Return a function that measures by the memory that PyTorch requests, fragments included."""

    def measure(run: Callable[[], object]) -> int:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)

    return measure


def largest_step_bytes(
    model: ServedModel,
    layers: Mapping[str, LayerShape],
    limits: SchedulerLimits,
    *,
    block_size: int,
    rank: int,
    measure: Measure,
) -> int:
    """Return the bytes of the largest step that the limits allow, computed while there is no KV cache yet.

    Its sequences are at the end of the longest contexts, and all read the same few blocks. Logits are wanted
    of every token, and on every linear layer act as many adapters of `rank` as a sequence may have; or one
    that replaces rows, by DoRA, which takes most of those that do. Not in it is a copy of the head, which an
    adapter with rows of its own for tokens takes where a head has a bias.

    Raises:
        MemoryBudgetError: memory ran out.
    """
    if not model.drafts:
        limits = replace(limits, draft_tokens=0)
    # TILE: as many as layers are tried with before they are fused.
    model.allocate_kv(RESERVED_BLOCKS + 2 * -(-TILE // block_size) * len(model.groups), block_size)

    def taken(terms: int, weights: Mapping[str, LoraWeights]) -> int:
        mix = AdapterMix(tuple((str(number), _WEIGHT) for number in range(terms)))
        plan = _largest_plan(limits, mix, block_size, len(model.groups))
        # Two that act take as much as more would, and do so in an eighth of the time.
        slots = {digest: 0 if number < 2 else model.empty_slot for number, digest in enumerate(mix.digests)}
        packer = Packer(block_size, model.row_multiple, model.groups, recurrent=model.state_bytes > 0)
        batch = packer.pack(plan, slots)
        for error in model.move_slots({0: "any"}, lambda digest: weights).values():
            raise error

        def run_step() -> None:
            logits = model.forward(batch).logits[: len(batch.sampled)]
            masks = [np.full(-(-logits.shape[1] // 32), -1, dtype=np.int32)] * len(batch.sampled)
            draw(logits, batch.sampled, frozenset(), model.kernels, masks)
            model.rewind(*packer.rewound(plan, {}))

        return measure(run_step)

    try:
        return max(
            taken(MAX_ADAPTER_TERMS, thin_adapter(layers, rank)),
            taken(1, thin_adapter(layers, min(rank, _REPLACING_RANK), replaces=True)),
        )
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold the step's tensors, and a shorter one may be tried
        raise _too_large(limits) from error
    finally:
        model.move_slots({0: None}, lambda digest: {})
        model.release_kv()


def _too_large(limits: SchedulerLimits) -> MemoryBudgetError:
    return MemoryBudgetError(
        f"no memory for a step of {limits.step_tokens} tokens with contexts of {limits.max_length}: lower "
        "--step-tokens or --max-sequences, or choose a smaller base"
    )


def _largest_plan(limits: SchedulerLimits, mix: AdapterMix, block_size: int, groups: int = 1) -> StepPlan:
    """Plan the largest number of decodes, each with the longest draft, and fill the step with prompts."""
    # What makes a draw take most: a nucleus of nearly all tokens, and logits that are changed first, also
    # those behind each token of a draft.
    ends = limits.draft_tokens + 1
    sampling = Sampling(temperature=100.0, top_p=0.9999, min_tokens=ends, logprobs=1, prompt_logprobs=0)
    rows = min(limits.max_sequences - 1, limits.step_tokens - 1)
    draft = min(
        limits.draft_tokens, limits.max_length - 1, max((limits.step_tokens - 1) // max(rows, 1) - 1, 0)
    )

    def sequence(length: int) -> SequenceState:
        one = SequenceState("largest", 0, [0] * length, sampling, mix, arrival=0, arrived_at=0.0)
        one.blocks = [array("i", [RESERVED_BLOCKS]) * -(-limits.max_length // block_size)] * groups
        return one

    longest = sequence(limits.max_length - draft)
    decoding = Segment(longest, len(longest.tokens) - 1, len(longest.tokens), (0,) * draft)
    prefills, left = [], limits.step_tokens - rows * decoding.length
    while left > 0:
        length = min(left, limits.max_length)
        prefills.append(Segment(sequence(limits.max_length), limits.max_length - length, limits.max_length))
        left -= length
    return StepPlan([replace(decoding) for _ in range(rows)], prefills)


def thin_adapter(
    layers: Mapping[str, LayerShape], rank: int, *, replaces: bool = False
) -> dict[str, LoraWeights]:
    """Return zeros for every linear layer, shared by layers of one size. `replaces`: with DoRA's gain."""
    linear = {name: layer for name, layer in layers.items() if layer.kind == "linear"}
    a = {size: torch.zeros(rank, size) for size in {layer.size_in for layer in linear.values()}}
    b = {size: torch.zeros(size, rank) for size in {layer.size_out for layer in linear.values()}}
    gain = {size: torch.ones(size) if replaces else None for size in b}
    return {
        name: LoraWeights(a[layer.size_in], b[layer.size_out], _WEIGHT, gain=gain[layer.size_out])
        for name, layer in linear.items()
    }
