"""Packed adapters into memory, in a thread: no step waits for a disk."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from onebase_engine.base.layers import LayerShape
from onebase_engine.engine.messages import AdapterFailed, AdapterLoaded, LoadAdapter
from onebase_engine.lora.packed_adapter import PackedAdapterError, read_packed_adapter
from onebase_engine.lora.weights import AdapterWeights, ModuleWeights, folded, tensors_of, weights_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrived:
    """A version's finished tensors in host memory, and what to tell the api once the engine holds them."""

    weights: AdapterWeights
    answer: AdapterLoaded


class PackedAdapterLoader:
    """Reads one file after the other and hands over each result by a call from its thread.

    `load`, `forget` and `wanted` are the stepping thread's. `layers`: the base's, which a file must fit.
    """

    def __init__(
        self,
        device: torch.device,
        layers: Mapping[str, LayerShape],
        deliver: Callable[[Arrived | AdapterFailed], None],
    ) -> None:
        self._layers = layers
        self._pin = device.type == "cuda"
        self._deliver = deliver
        self._orders: queue.SimpleQueue[LoadAdapter] = queue.SimpleQueue()
        self._wanted: set[str] = set()
        threading.Thread(target=self._run, name="engine-loader", daemon=True).start()

    def load(self, order: LoadAdapter) -> None:
        """Queue a file; returns at once."""
        self._wanted.add(order.digest)
        self._orders.put(order)

    def forget(self, digest: str) -> None:
        """What is being read of this version is not wanted any more."""
        self._wanted.discard(digest)

    def wanted(self, digest: str) -> bool:
        """Whether a result that has come is still to be used; asked once for each."""
        wanted = digest in self._wanted
        self._wanted.discard(digest)
        return wanted

    def _run(self) -> None:
        while True:
            order = self._orders.get()
            try:
                self._deliver(self._read(order))
            except PackedAdapterError as error:
                self._fail(order, "damaged", str(error))
            except Exception as error:
                # No memory, say: this version's trouble, not everyone's.
                logger.exception("loading %s failed", order.digest[:12])
                self._fail(order, "load_failed", f"{type(error).__name__}: {error}")

    def _read(self, order: LoadAdapter) -> Arrived:
        started = time.monotonic()
        weights = folded(read_packed_adapter(Path(order.path), order.sha256, layers=self._layers))
        if self._pin:
            weights = pinned(weights)
        return Arrived(
            weights,
            AdapterLoaded(
                digest=order.digest,
                bytes=weights_bytes(weights),
                load_seconds=time.monotonic() - started,
            ),
        )

    def _fail(self, order: LoadAdapter, code: str, message: str) -> None:
        self._deliver(AdapterFailed(digest=order.digest, code=code, message=message))


def pinned(weights: AdapterWeights) -> AdapterWeights:
    """The same in page-locked memory, from which copies to the accelerator overlap with its work."""
    result: dict[str, ModuleWeights] = {}
    pages: dict[int, torch.Tensor] = {}
    for name, module in weights.items():
        parts: dict[str, Any] = {}
        for part, tensor in tensors_of(module):
            if id(tensor) not in pages:
                pages[id(tensor)] = tensor.pin_memory()
            parts[part] = pages[id(tensor)]
        result[name] = replace(module, **parts)
    return result
