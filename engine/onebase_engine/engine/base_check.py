"""Check whether a base can be served from its config alone, before its weights are downloaded.

The model is built on the meta device, where tensors have a shape and no memory, and passes the probe of the
served view there, as at a start.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from onebase_engine.base.experts import expert_matrices
from onebase_engine.base.layers import empty_base, left_out, transformers_class
from onebase_engine.base.load import (
    Quantization,
    UnsupportedBaseError,
    check_servable,
    estimate_memory,
    longest_row,
    parameter_count,
    stored_quantization,
    unpacked_format,
)
from onebase_engine.engine.attention import UnsupportedAttentionError
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.recurrence import UnsupportedRecurrenceError
from onebase_engine.kernels.reference import ReferenceKernels

QUANTIZATIONS: tuple[Quantization, ...] = ("nf4", "int8", "none")
_BLOCKSIZE = 64


@dataclass(frozen=True, kw_only=True)
class BaseCheck:
    """Facts that a config says of its base. Fields are None or empty where a refused base was not built."""

    model_type: str
    text_type: str
    """Model type of the part that is served."""
    architecture: str | None
    """Name of transformers' class."""
    refusal: str | None
    """Reason why the base cannot be served, or None."""
    certain: bool = True
    """Whether nothing is left to be decided at the start of a server."""
    parameters: int | None = None
    """Number of weights that are loaded."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of weights of each part that is not loaded, by full name."""
    stored: Quantization | None = None
    """Quantization of the weights in the base's files."""
    memory: Mapping[Quantization, int] = field(default_factory=dict)
    """Bytes of the weights in memory, by the quantization that can be chosen."""
    context: int | None = None
    """Longest sequence, in tokens (prompt and reply); None if the config names no limit."""
    layers: Mapping[str, int] = field(default_factory=dict)
    """Number of layers of each kind."""
    kv_bytes_per_token: int | None = None
    """Bytes of the KV cache for one token, in bfloat16."""
    kv_bytes_per_old_token: int | None = None
    """Bytes of it that stay when the token lies before the windows of all layers that have one."""
    state_bytes: int | None = None
    """Bytes of the recurrent state of one sequence."""
    notes: tuple[str, ...] = ()
    """Restrictions, a sentence each."""


def check_base(config: Any) -> BaseCheck:
    """Check a base by transformers' config of it. What is wrong with it is told, not raised."""
    found = transformers_class(config)
    text = config.get_text_config()
    known: dict[str, Any] = {
        "model_type": config.model_type,
        "text_type": text.model_type,
        "architecture": None if found is None else found.__name__,
        "context": longest_row(config),
        "layers": _layers(text),
    }
    try:
        check_servable(config)
        known["stored"] = stored_quantization(config)
        with torch.device("meta"):
            tree = empty_base(copy.deepcopy(config), dtype=torch.bfloat16, attn_implementation="eager").eval()
        known |= _size(tree, known["stored"])
        if unpacked := unpacked_format(config):
            what = "experts in MXFP4" if unpacked == "mxfp4" else "weights in fp8"
            known["notes"] += (
                f"Its files hold {what}, which are unpacked, and quantized again unless --quantization none.",
            )
    except UnsupportedBaseError as error:
        return BaseCheck(refusal=str(error), **known)
    try:
        served = ServedModel(tree, 1, kernels=ReferenceKernels())
    except UnsupportedBaseError as error:
        if isinstance(error.__cause__, UnsupportedAttentionError | UnsupportedRecurrenceError):
            return BaseCheck(refusal=str(error), **known)
        # Its code wants tensors with values, for instance.
        known["notes"] += (f"A server's start decides: without weights, {error.__cause__}.",)
        return BaseCheck(refusal=None, certain=False, **known)
    return BaseCheck(
        refusal=None,
        kv_bytes_per_token=served.kv_bytes_per_token,
        kv_bytes_per_old_token=served.kv_bytes_per_old_token,
        state_bytes=served.state_bytes,
        **known,
    )


def _layers(text: Any) -> Mapping[str, int]:
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        window = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
        kind = "sliding_attention" if window else "full_attention"
        kinds = [kind] * int(getattr(text, "num_hidden_layers", 0) or 0)
    return dict(Counter(kinds))


def _size(tree: Any, stored: Quantization) -> dict[str, Any]:
    choices = QUANTIZATIONS if stored == "none" else (stored,)
    notes = []
    experts = list(expert_matrices(tree))
    head = tree.get_output_embeddings()
    odd = [
        f"{name} ({module.in_features})"
        for name, module in tree.named_modules()
        if type(module) is nn.Linear and module is not head and module.in_features % _BLOCKSIZE
    ]
    odd += [f"{one.path} ({one.sizes[1]})" for one in experts if one.sizes[1] % _BLOCKSIZE]
    if odd and "nf4" in choices:
        notes.append(
            f"Inputs of {len(odd)} layers are no multiple of {_BLOCKSIZE}, as of {odd[0]}: on a CPU nf4 is "
            "refused, and int8 or none works."
        )
    return {
        "parameters": parameter_count(tree),
        "left_out": dict(left_out(tree)),
        "memory": {kind: estimate_memory(tree, kind).total for kind in choices},
        "notes": tuple(notes),
    }
