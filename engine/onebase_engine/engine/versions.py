"""The adapter versions that this engine holds in host memory, ready for a slot."""

from __future__ import annotations

from collections.abc import Set

import numpy as np

from onebase_engine.base.chat import last_occurrence
from onebase_engine.engine.messages import MAX_MESSAGE_BYTES
from onebase_engine.engine.scheduler import NeverFitsError
from onebase_engine.engine.sequence import AdapterMix
from onebase_engine.engine.slot_table import SlotTable
from onebase_engine.kernels.weights import (
    HEAD,
    AdapterWeights,
    Head,
    composable,
    folded,
    invocation_of,
    vocabulary_of,
    weights_bytes,
    without_head,
)

MAX_VECTOR_BYTES = MAX_MESSAGE_BYTES * 3 // 4
"""Limit, in bytes, of one sequence's vector on the socket."""


class Versions:
    """Finished tensors by digest. A version that is unloaded stays until its last sequence has ended."""

    def __init__(self) -> None:
        self.weights: dict[str, AdapterWeights] = {}
        """Tensors that go into slots, by digest."""
        self.heads: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        """Heads of versions that are classifiers: weight [labels, hidden] and bias [labels], fp64."""
        self._words: dict[str, int] = {}
        """Numbers of tokens of versions whose vocabulary is not the base's."""
        self._invocations: dict[str, tuple[int, ...]] = {}
        """Invocation tokens of versions that are activated LoRAs."""
        self._sizes: dict[str, int] = {}
        self._alone: set[str] = set()
        """Versions that are no sum of products, and so cannot be weighted or added to others."""
        self._leaving: set[str] = set()
        self._dropped: list[str] = []

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def any_leaving(self) -> bool:
        return bool(self._leaving)

    def put(self, digest: str, weights: AdapterWeights) -> None:
        """Add a version; its scales are folded into B where that changes no bit."""
        if isinstance(head := weights.get(HEAD), Head):
            weight = head.weight.double().numpy()
            bias = np.zeros(len(weight)) if head.bias is None else head.bias.double().numpy()
            self.heads[digest] = weight, bias
        self.weights[digest] = folded(without_head(weights))
        self._sizes[digest] = weights_bytes(self.weights[digest])
        if words := vocabulary_of(self.weights[digest]):
            self._words[digest] = words
        if invocation := invocation_of(weights):
            self._invocations[digest] = invocation
        self._leaving.discard(digest)
        if not composable(weights):
            self._alone.add(digest)

    def check_slot(self, weights: AdapterWeights, slot_budget: int) -> None:
        """Raise NeverFitsError if a version is larger than all slots together. `slot_budget`: 0 is no
        limit."""
        needed = weights_bytes(without_head(weights))
        if slot_budget and needed > slot_budget:
            raise NeverFitsError(
                "slot_memory_exceeded",
                "adapter",
                f"it takes {needed} bytes in a slot and all slots have {slot_budget} (--slot-memory). Raise "
                "the limit",
            )

    def leave(self, digest: str) -> None:
        """Refuse new sequences of this version, and let `drop_unused` drop it."""
        if digest in self.weights:
            self._leaving.add(digest)

    def drop_unused(self, in_use: Set[str], slots: SlotTable) -> None:
        """Free the leaving versions that no sequence uses."""
        for digest in list(self._leaving - in_use):
            if slots.evict(digest):
                self._leaving.discard(digest)
                del self.weights[digest], self._sizes[digest]
                self.heads.pop(digest, None)
                self._words.pop(digest, None)
                self._invocations.pop(digest, None)
                self._alone.discard(digest)
                self._dropped.append(digest)

    def take_dropped(self) -> list[str]:
        """Return the digests whose memory has become free since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def words(self, mix: AdapterMix, of_base: int) -> int:
        """Return the number of tokens that a sequence's logits have. `of_base`: that of the base's own."""
        return self._words.get(mix.digests[0], of_base) if len(mix.terms) == 1 else of_base

    def activation(self, mix: AdapterMix, prompt: list[int]) -> tuple[AdapterMix, int]:
        """Return the adapters that act on a sequence, and the number of its leading tokens that they leave
        alone.

        An activated LoRA acts from the last occurrence of its invocation in the prompt on, and not at all
        without one: what is generated is not searched (PEFT's `calculate_alora_offsets`).
        """
        invocation = self._invocations.get(mix.digests[0], ()) if len(mix.terms) == 1 else ()
        if not invocation:
            return mix, 0
        first = last_occurrence(prompt, invocation)
        return (AdapterMix(), 0) if first is None else (mix, first)

    def size(self, digest: str) -> int:
        """Return the bytes of a version in a slot."""
        return self._sizes[digest]

    def check_mix(self, mix: AdapterMix, slot_budget: int = 0) -> None:
        """Raise NeverFitsError if a sequence's adapters are not loaded, or can never be in slots together."""
        for digest in mix.digests:
            if digest not in self.weights or digest in self._leaving:
                raise NeverFitsError(
                    "adapter_not_loaded", "adapter", f"adapter version {digest[:12]} is not loaded"
                )
        if len(mix.terms) > 1 or any(weight != 1.0 for _, weight in mix.terms):
            self._check_composes(mix)
        needed = sum(self._sizes[digest] for digest in mix.digests)
        if slot_budget and needed > slot_budget:
            raise NeverFitsError(
                "slot_memory_exceeded",
                "adapter",
                f"the adapters of this request take {needed} bytes in slots and there are {slot_budget}; "
                "raise --slot-memory",
            )

    def check_head(self, mix: AdapterMix, tokens: int) -> None:
        """Raise NeverFitsError unless the adapters are one classifier whose output fits in a message."""
        if len(mix.terms) != 1 or mix.terms[0][1] != 1.0 or mix.terms[0][0] not in self.heads:
            raise NeverFitsError("no_classifier", "adapter", "classes need one adapter that is a classifier")
        labels = len(self.heads[mix.digests[0]][1])
        if 4 * labels * tokens > MAX_VECTOR_BYTES:
            raise NeverFitsError(
                "vector_too_large",
                "input",
                f"{tokens} tokens of {labels} labels each are over {MAX_VECTOR_BYTES} bytes; shorten it",
            )

    def _check_composes(self, mix: AdapterMix) -> None:
        for digest in mix.digests:
            if digest in self._alone:
                raise NeverFitsError(
                    "adapter_not_composable",
                    "adapter",
                    f"adapter version {digest[:12]} has DoRA, lora_bias, an invocation, saved modules or "
                    "token rows, which can neither be weighted nor added to others; name it alone, with "
                    "weight 1",
                )
