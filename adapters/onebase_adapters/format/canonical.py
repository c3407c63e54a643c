"""Read a PEFT adapter from an untrusted source, without passing one byte of it to PEFT or torch.load.

PEFT loads non-strictly and in place: a foreign tensor would overwrite the shared base, a field of the
config is a regular expression, another names a module to import. So the files are read here, checked
against a closed list of fields and against the base's own layers, and written again as a canonical
folder that holds nothing but the adapter's tensors. PEFT sees only that folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from onebase_adapters.format.config import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    WEIGHTS_FILE,
    AdapterFormatError,
    check_config,
)
from onebase_adapters.format.defaults import checked_defaults
from onebase_adapters.format.names import BaseModules, BaseTensor
from onebase_adapters.format.safetensors_file import TensorFile, TensorToWrite, write_tensors
from onebase_adapters.format.spec import AdapterSpec, ModuleSpec
from onebase_adapters.format.tensors import PlannedTensor, TensorPlan, plan
from onebase_engine.base.layers import LayerShape

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "AdapterFormatError",
    "AdapterSpec",
    "LayerShape",
    "ModuleSpec",
    "canonicalize",
]

_PIECE = 1 << 20
"""Elements of a tensor that are written at once, if it is not copied."""
HEAD_FILE = "head.safetensors"
"""File of a canonical folder with a classifier's weight and bias, which PEFT does not load."""
_NO_TARGETS = "dummy-target-modules"
"""PEFT's own word for an adapter without matrices (`peft.utils.constants.DUMMY_TARGET_MODULES`)."""


def canonicalize(
    config_file: Path,
    weights_file: Path,
    layers: Mapping[str, LayerShape],
    max_rank: int,
    target: Path,
    *,
    base_tensor: BaseTensor,
    left_out: Collection[str] = (),
) -> AdapterSpec:
    """Validate a PEFT adapter and write a canonical folder to `target` (empty and existing).

    Whatever the adapter's task, the folder is that of a text model, which has the same layers. Tensors pass
    through memory a few MiB at a time. Matrices, magnitudes and token rows are written in fp32, as PEFT
    holds them; saved modules as they are, since PEFT itself converts them to the base's dtype.

    Args:
        layers: every layer of the base that may be adapted, by its full name.
        max_rank: largest rank that the server's slots hold.
        base_tensor: the base's tensor by the full name of its parameter; None if there is none.
        left_out: full names of parts that the base's files hold and that are not loaded. Tensors of an
            adapter for them are left out with a warning.

    Raises:
        AdapterFormatError: with a code and a message that names the file, field or tensor.
        OSError: the canonical folder cannot be written.
    """
    facts = check_config(_read_config(config_file))
    base = BaseModules(layers, base_tensor, tuple(left_out))
    try:
        opened = weights_file.open("rb")
    except OSError as error:
        raise AdapterFormatError(
            "missing_file",
            f"cannot read {WEIGHTS_FILE}: {error.strerror}. Pickled weights (.bin) are never loaded; save "
            "the adapter with safe_serialization=True.",
        ) from None
    with opened:
        file = TensorFile.read_header(opened)
        planned = plan(file.entries, facts, base, max_rank)
        _check_of_base(file, planned)
        for matrix in planned.resized:
            matrix.check(file)
        if facts.ensure_weight_tying:
            _check_tied(file, planned, base)
        config = exact_config(
            planned.modules,
            rslora=facts.rslora,
            dora=facts.dora,
            lora_bias=facts.lora_bias,
            invocation=facts.invocation,
        )
        (target / CONFIG_FILE).write_text(json.dumps(config))
        matrices = [
            TensorToWrite(one.name, one.dtype, one.shape, partial(one.chunks, file))
            for one in planned.resized
        ]
        write_tensors(
            target / WEIGHTS_FILE, [*(_to_write(file, tensor) for tensor in planned.tensors), *matrices]
        )
        if planned.head:
            write_tensors(target / HEAD_FILE, [_to_write(file, tensor) for tensor in planned.head.values()])
    labels = planned.head["weight"].entry.shape[0] if planned.head else 0
    names, warnings = facts.label_names, (*([file.note] if file.note else []), *planned.warnings)
    if names and len(names) != labels:
        warnings = (*warnings, f"id2label names {len(names)} labels, and there are {labels}: it is not used")
        names = ()
    defaults = checked_defaults(facts.defaults)
    if defaults is not None:
        warnings = (*warnings, *defaults.notes)
    return AdapterSpec(
        modules=planned.modules,
        rslora=facts.rslora,
        base_name=facts.base_name,
        parameters=sum(module.parameters for module in planned.modules),
        task=facts.task,
        labels=labels,
        label_names=names,
        tokens=planned.tokenizer,
        invocation=facts.invocation,
        defaults=defaults,
        dropped=tuple(entry.name for entry, _ in planned.of_base),
        warnings=warnings,
    )


def _read_config(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise AdapterFormatError("missing_file", f"cannot read {CONFIG_FILE}: {error.strerror}") from None


def _check_of_base(file: TensorFile, planned: TensorPlan) -> None:
    for entry, tensor in planned.of_base:
        if not file.holds(entry, tensor):
            raise AdapterFormatError(
                "foreign_tensor",
                f"{WEIGHTS_FILE}: {entry.name:.200} is a weight of the base, with other values than this "
                "base has. Save with save_embedding_layers=False, or train the module by modules_to_save.",
            )
    for one, other in planned.same:
        if not file.same(one, other):
            raise AdapterFormatError(
                "bad_weights",
                f"{WEIGHTS_FILE}: {one.name:.150} and {other.name:.150} are one tensor to PEFT, and differ",
            )


def _check_tied(file: TensorFile, planned: TensorPlan, base: BaseModules) -> None:
    """Raise AdapterFormatError if an adapter with `ensure_weight_tying` has two unlike tensors.

    PEFT then holds one tensor for both sides. Matrices on a base in half precision are exempt: their
    conversion to fp32 separates them in PEFT too.
    """
    if len(base.pair) != 2 or not base.pair <= planned.by_module.keys():
        return
    rows, head = planned.by_module[base.embedding or ""], planned.by_module[base.head or ""]
    weight = base.tensor(f"{base.head}.weight")
    if base.pair <= planned.saved:
        equal = file.same(rows["weight"], head["weight"])
    elif "lora_A" in rows and "lora_A" in head and weight is not None and weight.dtype == torch.float32:
        equal = all(
            rows[one].dtype == head[other].dtype
            and file.holds(head[other], file.tensor(rows[one]).T.contiguous())
            for one, other in (("lora_A", "lora_B"), ("lora_B", "lora_A"))
        )
    else:
        return
    if not equal:
        raise AdapterFormatError(
            "unsupported_kind",
            f"ensure_weight_tying, but {base.embedding} and {base.head} differ in {WEIGHTS_FILE}",
        )


def _to_write(file: TensorFile, tensor: PlannedTensor) -> TensorToWrite:
    return TensorToWrite(tensor.name, tensor.dtype, tensor.shape, lambda: _usable(file, tensor))


def _usable(file: TensorFile, tensor: PlannedTensor) -> Iterator[torch.Tensor]:
    """Yield the tensor's chunks. Raises AdapterFormatError if one overflows in the base's dtype."""
    if tensor.gathered is not None:
        yield from torch.split(tensor.gathered.tensor(file).reshape(-1), _PIECE)
        return
    if tensor.experts:
        for _ in file.chunks(tensor.entry):  # which refuses what is not finite
            pass
        yield from torch.split(tensor.turned(file.tensor(tensor.entry)).reshape(-1), _PIECE)
        return
    for chunk in file.chunks(tensor.entry):
        if tensor.used_as is not None and not torch.isfinite(chunk.to(tensor.used_as)).all():
            raise AdapterFormatError(
                "not_finite",
                f"{WEIGHTS_FILE}: {tensor.entry.name:.200} overflows the base's {tensor.used_as}",
            )
        yield chunk


def exact_config(
    modules: Sequence[ModuleSpec],
    *,
    rslora: bool = False,
    dora: bool = False,
    lora_bias: bool = False,
    base_name: str | None = None,
    invocation: Sequence[int] = (),
) -> dict[str, Any]:
    """Return PEFT's config of an adapter of these modules, each by its full name."""
    lora = [module for module in modules if module.rank]
    experts = [module.name for module in lora if module.experts]
    layers = [module.name for module in lora if not module.experts]
    rank, alpha = (lora[0].rank, lora[0].alpha) if lora else (8, 8.0)
    saved = [module.name for module in modules if module.kind == "saved" or module.words]
    tokens = {m.name: list(m.indices) for m in modules if m.kind == "tokens" and m.parameters and not m.words}
    activated = {"alora_invocation_tokens": list(invocation)} if invocation else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "use_dora": dora,
        "lora_bias": lora_bias,
        "target_modules": layers or ([] if experts else _NO_TARGETS),
        "rank_pattern": {re.escape(m.name): m.rank for m in lora if m.rank != rank},
        "alpha_pattern": {re.escape(m.name): m.alpha for m in lora if m.alpha != alpha},
        "modules_to_save": saved or None,
        "trainable_token_indices": tokens or None,
        **activated,
        **({"target_parameters": experts} if experts else {}),
    }
