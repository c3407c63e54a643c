"""Recurrent layers over several rows in one packed sequence, where each row begins with a state of zeros.

The base's own modules stay: the functions that they call for their convolution and their scan, which know one
state for a whole sequence, are given each row as a sequence of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from onebase_engine.base.view import called_by, forward_with
from onebase_training.attention import PackedAttention

_TOKENS: dict[str, tuple[int, tuple[str, ...]]] = {
    "causal_conv1d_fn": (2, ("hidden_states",)),
    "torch_chunk_gated_delta_rule": (1, ("query", "key", "value", "g", "beta")),
    "chunk_kimi_delta_attention": (1, ("query", "key", "value", "g", "beta")),
    "mamba2_chunk_scan": (1, ("hidden_states", "dt", "B", "C", "z")),
    "mamba_selective_scan": (2, ("hidden_states", "dt", "B", "C", "z")),
}
"""Dimension of the tokens of each function's arguments and results, and the names of these arguments."""
_WHOLE_LAYERS = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
"""Functions that compute a whole layer where a library has it, and return None where none does."""


def attach(model: nn.Module, packed: PackedAttention) -> None:
    """Make the recurrent modules of a view keep the rows of `packed` apart."""
    for module in model.modules():
        own = {name: one for name in _TOKENS if (one := called_by(module, name)) is not None}
        if own:
            functions: dict[str, Callable[..., Any]] = {
                name: partial(_row_by_row, packed, one, *_TOKENS[name]) for name, one in own.items()
            }
            module.forward = forward_with(module, functions | dict.fromkeys(_WHOLE_LAYERS, _nothing))


def _row_by_row(
    packed: PackedAttention,
    function: Callable[..., Any],
    dim: int,
    names: tuple[str, ...],
    *args: Any,
    **named: Any,
) -> Any:
    """Call transformers' function with the rows of the packed sequence, those of about one length at once."""
    given = inspect.signature(function).bind(*args, **named).arguments
    given |= given.pop("kwargs", {})
    found, more = list[torch.Tensor](), None
    for group in packed.groups:
        own = {
            name: group.rows(tensor.squeeze(0).movedim(dim - 1, 0)).movedim(1, dim)
            for name in names
            if (tensor := given.get(name)) is not None
        }
        output = function(**given | own)
        if isinstance(output, tuple):
            output, more = output[0], (None,)
        found.append(group.flat(output.movedim(dim, 1)))
    joined = torch.cat(found) if len(found) > 1 else found[0]
    result = joined.movedim(0, dim - 1).unsqueeze(0)
    return result if more is None else (result, *more)


def _nothing(*args: Any, **named: Any) -> None:
    return None
