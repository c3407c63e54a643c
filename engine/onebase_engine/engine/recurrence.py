"""Recurrent layers over states in places, plugged into the functions that transformers' modules call.

A hybrid's modelling code stays as it is: it projects the packed step at once, and calls a function for its
convolution and another for its scan. Here these continue the state of each sequence, computed by the kernels
(`RecurrentKernels` in `kernels/interface.py`). A state is read from one place and written to another, so that
a step which fails can be computed again, and a state that another sequence needs stays.

Wrong tokens of a draft cannot be taken back out of a state. A step with drafts therefore keeps the inputs of
its recurrent layers, which are small next to states, until it is known which tokens are right. Where some are
not, the state behind the right ones is computed again from that before the step.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from onebase_engine.base.layers import decoder_of
from onebase_engine.base.view import called_by, forward_with
from onebase_engine.engine.kv_cache import zeros
from onebase_engine.kernels.interface import RecurrentKernels, StateRuns

NORM_EPS = 1e-6
"""Number that transformers adds to the squared length of a query or key before it normalizes it."""

StateKey = tuple[str, int]
"""A module's path, and which of its calls in a pass."""

_Layer = Callable[[Sequence[torch.Tensor], StateRuns], torch.Tensor]
"""A layer with its states: computes its outputs from the inputs of packed rows, in runs."""


class UnsupportedRecurrenceError(Exception):
    """A recurrent layer asks for something that the kernels do not compute."""


class Recurrence:
    """Shared by all recurrent modules of the served view; `runs` is set before each forward pass."""

    def __init__(self, kernels: RecurrentKernels) -> None:
        self.runs: StateRuns | None = None
        self.shapes: dict[StateKey, tuple[tuple[int, ...], torch.dtype]] = {}
        """Shape and dtype of each state, found by the probe pass."""
        self.layers: set[int] = set()
        """Numbers of the decoder layers that keep a state."""
        self._states: dict[StateKey, torch.Tensor] = {}
        self._kept: list[tuple[list[torch.Tensor], _Layer]] = []
        """Inputs of the last pass's drafts, [drafted, ...] each, and what computes them, of each call."""
        self._kernels = kernels
        self._calls: Counter[str] = Counter()

    @property
    def bytes_per_place(self) -> int:
        """Bytes of one state over all layers."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes.values())

    def attach(self, model: nn.Module) -> None:
        """Make the view's recurrent modules call this object."""
        # What it would say of the kernels that it lacks holds for its own passes, not for these.
        logging.getLogger("transformers.integrations.hub_kernels").addFilter(_is_no_fallback_warning)
        functions: dict[str, Callable[..., Any]] = {
            "causal_conv1d_fn": self._convolve,
            "torch_chunk_gated_delta_rule": self._delta_rule,
            "chunk_kimi_delta_attention": self._delta_rule,
            "mamba2_chunk_scan": self._state_space,
            "mamba_selective_scan": self._selective_scan,
        }
        owners: set[nn.Module] = set()
        for path, module in model.named_modules():
            called = {name: one for name, one in functions.items() if called_by(module, name) is not None}
            if called:
                own = {name: partial(one, path) for name, one in called.items()}
                module.forward = forward_with(module, own)
                self.layers.add(int(module.layer_idx))
                owners.add(module)
        for module in decoder_of(model).modules():
            if module not in owners and any(isinstance(child, nn.Conv1d) for child in module.children()):
                raise UnsupportedRecurrenceError(
                    f"its {type(module).__name__} convolves over tokens, in a way that OneBase does not know"
                )

    def allocate(self, places: int, device: torch.device) -> None:
        """Allocate states for so many places. Place 0 is zeros and never written.

        On the CPU it is zeroed memory, of which pages are taken only when written.
        """
        self._states = {
            key: zeros((places, *shape), dtype, device) for key, (shape, dtype) in self.shapes.items()
        }

    def release(self) -> None:
        self._states, self._kept = {}, []

    def begin_pass(self, runs: StateRuns | None) -> None:
        """Begin a forward pass; None is the probe, which finds out the shapes."""
        self.runs = runs
        self._calls.clear()
        self._kept.clear()

    def rewind(self, rows: torch.Tensor, runs: StateRuns) -> None:
        """Compute the states behind drafts again, as far as these were right, and drop the kept inputs.

        Args:
            rows: numbers of the right tokens' packed rows in the last pass, int64.
            runs: the same rows by sequence, from the states before the pass.
        """
        kept, self._kept = self._kept, []
        for inputs, layer in kept if len(rows) else ():
            layer([one[rows] for one in inputs], runs)

    def _state(self, path: str, shape: tuple[int, ...], x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the states [places, *shape] of a module's next call."""
        key = path, self._calls[path]
        self._calls[path] += 1
        if self.runs is not None:
            return self._states[key]
        self.shapes[key] = shape, dtype
        return torch.zeros((1, *shape), dtype=dtype, device=x.device)

    def _compute(self, inputs: Sequence[torch.Tensor], layer: _Layer) -> torch.Tensor:
        """Compute a layer from inputs [T, ...], and keep those of drafts."""
        none = np.zeros(1, dtype=np.int32)
        runs = self.runs or StateRuns(np.array([0, len(inputs[0])], dtype=np.int32), none, none - 1)
        if runs.drafted:
            self._kept.append(([one[: runs.drafted].clone() for one in inputs], layer))
        return layer(inputs, runs)

    # ---- transformers' functions, of one batch --------------------------------------------------

    def _convolve(
        self,
        path: str,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        activation: str | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Compute `causal_conv1d_fn`: hidden_states [1, channels, T] -> the same."""
        from transformers.activations import ACT2FN

        x = hidden_states[0].transpose(0, 1)
        states = self._state(path, (weight.shape[1] - 1, weight.shape[0]), x, x.dtype)

        def layer(inputs: Sequence[torch.Tensor], runs: StateRuns) -> torch.Tensor:
            return self._kernels.convolve(inputs[0], weight, bias, states, runs)

        y = self._compute([x], layer)
        y = y if activation is None else ACT2FN[activation](y)
        return y.to(hidden_states.dtype).transpose(0, 1)[None]

    def _delta_rule(
        self,
        path: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Compute `torch_chunk_gated_delta_rule`.

        query and key [1, T, key heads, key dim], value [1, T, heads, value dim] -> the value's shape.
        """
        _check_plain(initial_state, output_final_state)
        q, v = query[0], value[0]
        states = self._state(path, (v.shape[1], q.shape[2], v.shape[2]), v, torch.float32)
        scale, eps = q.shape[2] ** -0.5, NORM_EPS if use_qk_l2norm_in_kernel else None

        def layer(inputs: Sequence[torch.Tensor], runs: StateRuns) -> torch.Tensor:
            q, k, v, decay, rate = inputs
            return self._kernels.delta_rule(q, k, v, decay, rate, states, runs, scale=scale, eps=eps)

        y = self._compute([q, key[0], v, g[0], beta[0]], layer)
        return y.to(query.dtype)[None], None

    def _state_space(
        self,
        path: str,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,  # noqa: N803 (as transformers passes it)
        B: torch.Tensor,  # noqa: N803
        C: torch.Tensor,  # noqa: N803
        chunk_size: int,
        D: torch.Tensor | None = None,  # noqa: N803
        z: None = None,
        dt_bias: torch.Tensor | None = None,
        initial_states: None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        return_final_states: bool = False,
        **_: Any,
    ) -> torch.Tensor:
        """Compute `mamba2_chunk_scan`: hidden_states [1, T, heads, dim] -> the same, fp32."""
        _check_plain(initial_states, return_final_states or z is not None)
        x, b, c = hidden_states[0], B[0], C[0]
        steps = _time_steps(dt[0], dt_bias, dt_softplus).clamp(*dt_limit)
        return self._scan(path, x, steps, A, b, c, D)[None]

    def _selective_scan(
        self,
        path: str,
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,  # noqa: N803
        B: torch.Tensor,  # noqa: N803
        C: torch.Tensor,  # noqa: N803
        D: torch.Tensor | None = None,  # noqa: N803
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **_: Any,
    ) -> torch.Tensor:
        """Compute `mamba_selective_scan`, a state space in which each channel is a head.

        hidden_states [1, channels, T] -> the same.
        """
        _check_plain(None, return_last_state)
        x = hidden_states[0].transpose(0, 1)
        steps = _time_steps(dt[0].transpose(0, 1), delta_bias, delta_softplus)
        b, c = (one[0].transpose(0, 1)[:, None] for one in (B, C))
        y = self._scan(path, x[..., None], steps, A, b, c, D).squeeze(-1).transpose(0, 1)[None]
        return y if z is None else y * functional.silu(z)

    def _scan(
        self,
        path: str,
        x: torch.Tensor,
        dt: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor,
        skip: torch.Tensor | None,
    ) -> torch.Tensor:
        states = self._state(path, (x.shape[1], x.shape[2], b.shape[2]), x, torch.float32)

        def layer(inputs: Sequence[torch.Tensor], runs: StateRuns) -> torch.Tensor:
            x, dt, b, c = inputs
            return self._kernels.state_space(x, dt, a, b, c, states, runs, skip=skip)

        return self._compute([x, dt, b, c], layer)


def _is_no_fallback_warning(record: logging.LogRecord) -> bool:
    return "is falling back to its reference" not in record.getMessage()


def _check_plain(initial: None, wants_state: bool) -> None:
    if initial is not None or wants_state:
        raise UnsupportedRecurrenceError("its recurrent layers keep their state in a way of their own")


def _time_steps(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool) -> torch.Tensor:
    """Return the time steps [T, heads], in dt's dtype as in transformers."""
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return functional.softplus(dt) if softplus else dt


class StatePool:
    """Reference-counted places for recurrent states, and those that hold the state behind a known prefix.

    Such a snapshot is kept, by the key of the prefix's last block, until its place is needed: the least
    recently used one goes first. Place 0 holds zeros: the state before a text.
    """

    def __init__(self, places: int) -> None:
        """Create a pool of `places`, the one of zeros included: at least three."""
        self._references = [1, *[0] * (places - 1)]
        self._free = list(range(places - 1, 0, -1))
        self._snapshots: OrderedDict[bytes, int] = OrderedDict()
        self._key_of: dict[int, bytes] = {}
        self.capacity = places - 1

    @property
    def snapshots(self) -> int:
        """Number of prefixes whose state is kept."""
        return len(self._snapshots)

    @property
    def rows(self) -> int:
        """Number of sequences that can run at once: each needs a state and the place of the next one."""
        return self.capacity // 2

    def allocate(self) -> int:
        """Return a free place with one reference, if need be a snapshot's that no sequence reads."""
        if not self._free:
            place = next((one for one in self._snapshots.values() if self._references[one] == 1), None)
            if place is None:
                raise RuntimeError("no place for a recurrent state is left: more sequences run than may")
            self.forget(self._key_of[place])
        place = self._free.pop()
        self._references[place] = 1
        return place

    def share(self, place: int) -> int:
        """Return the place with one more reference on it."""
        self._references[place] += 1
        return place

    def release(self, place: int) -> None:
        """Release one reference."""
        self._references[place] -= 1
        if self._references[place] < (place == 0):
            raise RuntimeError(f"state {place} released twice")
        if not self._references[place]:
            self._free.append(place)

    def publish(self, place: int, key: bytes) -> None:
        """Keep the state in a place for later sequences with this prefix. The first one with a key stays."""
        if key not in self._snapshots:
            self._snapshots[key] = self.share(place)
            self._key_of[place] = key

    def forget(self, key: bytes) -> None:
        """Keep a snapshot no longer, if there is one."""
        place = self._snapshots.pop(key, None)
        if place is not None:
            del self._key_of[place]
            self.release(place)

    def holds(self, key: bytes) -> bool:
        """Return True if the state behind this prefix is kept. It does not count as a use."""
        return key in self._snapshots

    def longest(self, keys: Sequence[bytes]) -> tuple[int, int]:
        """Return how many of a text's first blocks have a state behind them, and its place (0, 0: none)."""
        for count in range(len(keys), 0, -1):
            place = self._snapshots.get(keys[count - 1])
            if place is not None:
                self._snapshots.move_to_end(keys[count - 1])
                return count, place
        return 0, 0
