"""Load a PEFT adapter's two files into finished tensors: PEFT itself loads the canonical folder on a view.

So key mapping, scaling and dtypes are PEFT's own, and the loaded tree is at the same time the
reference against which each served module is compared.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from onebase_adapters.format.canonical import HEAD_FILE, AdapterFormatError, AdapterSpec, canonicalize
from onebase_adapters.format.config import CLASSIFIER_NAMES, WEIGHTS_FILE, Task
from onebase_adapters.proof.experts import give_places, merged, take_places
from onebase_adapters.proof.extract import compacted, extract
from onebase_engine.base.layers import adaptable_layers, empty_base, left_out
from onebase_engine.base.load import BaseChangedError, fingerprint
from onebase_engine.base.view import peft_view
from onebase_engine.kernels.weights import (
    HEAD,
    AdapterWeights,
    ExpertLora,
    Head,
    LoraWeights,
    ModuleWeights,
    SavedModule,
    TokenRows,
    tensors_of,
    weights_bytes,
    words_of,
)
from onebase_engine.lora.module import saved_twin

_NAME = "version"
_UNTRAINED_GAIN = 2**-7
"""Largest distance of DoRA's gain from 1 before training: PEFT makes the magnitudes in the base's dtype,
bf16."""


@dataclass(frozen=True)
class LoadedAdapter:
    """One version in host memory, ready for a slot."""

    spec: AdapterSpec
    weights: AdapterWeights
    reference: nn.Module
    """PEFT's own model of the version on a view of the base, the reference of the proof."""
    changed: int
    """Number of modules that change something."""

    @property
    def bytes(self) -> int:
        return weights_bytes(self.weights)


def load_adapter(
    base: nn.Module, config_file: Path, weights_file: Path, max_rank: int, *, allow_noop: bool = False
) -> LoadedAdapter:
    """Validate the files and load them through `PeftModel.from_pretrained` on a view of `base`.

    Args:
        max_rank: largest rank that the server's slots hold.
        allow_noop: accept an adapter that changes nothing.

    Raises:
        AdapterFormatError: the adapter is not servable, or changes nothing.
        BaseChangedError: loading wrote to the base.
    """
    before = fingerprint(base)
    own = dict(base.named_parameters(remove_duplicate=False))
    with tempfile.TemporaryDirectory(prefix="onebase-adapter-") as folder:
        canonical = Path(folder)
        layers = adaptable_layers(base)
        spec = canonicalize(
            config_file,
            weights_file,
            layers,
            max_rank,
            canonical,
            base_tensor=own.get,
            left_out=left_out(base),
        )
        resized = {module.name: module.words for module in spec.modules if module.words}
        _check_lookups(base, spec.words)
        reference = peft_model(base, canonical, resized)
        # PEFT brings a saved module to the dtype of the one that it replaces.
        head = load_file(canonical / HEAD_FILE) if spec.labels else {}
    weights = dict(compacted(extract(reference, _NAME), base, resized))
    if head:
        dtype = base.get_output_embeddings().weight.dtype  # type: ignore[operator]
        weights[HEAD] = Head(**{part: tensor.to(dtype) for part, tensor in head.items()})
    if fingerprint(base) != before:
        raise BaseChangedError("loading an adapter changed the base")
    differing = {module.name for module in spec.modules} ^ weights.keys()
    if differing:
        raise AdapterFormatError(
            "unknown_module", f"PEFT does not apply {sorted(differing)[0]} on this base as the files say"
        )
    for name, module in weights.items():
        _check_finite(name, module, own)
    changed = sum(
        isinstance(module, Head)
        or (_acts(module) if isinstance(module, ExpertLora) else _changes(module, base.get_submodule(name)))
        for name, module in weights.items()
    )
    if not changed and not allow_noop:
        raise AdapterFormatError(
            "no_effect", "no module changes anything: the adapter would serve the bare base"
        )
    return LoadedAdapter(spec, weights, reference, changed)


def peft_model(base: nn.Module, canonical: Path, resized: Mapping[str, int] | None = None) -> nn.Module:
    """Return PEFT's own model of a canonical folder, over a view of the base: the reference of each
    sequence.

    Args:
        resized: numbers of rows of the embedding and the head, by name, if the adapter was trained after
            `resize_token_embeddings`.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        # Advice to who trains, merges or saves: nobody does here.
        warnings.simplefilter("ignore", UserWarning)
        tree = resized_view(base, resized or {})
        places = give_places(tree)
        model: nn.Module = PeftModel.from_pretrained(tree, str(canonical), adapter_name=_NAME)
        take_places(tree, places, _NAME, merged)
    return model.eval()


def resized_view(base: nn.Module, resized: Mapping[str, int]) -> nn.Module:
    """Return a view for PEFT whose embedding and head have other numbers of rows, all of zeros.

    PEFT replaces both, so that the rows take no memory of their own before.
    """
    tree: nn.Module = peft_view(base)
    for name, words in resized.items():
        parent, _, child = name.rpartition(".")
        own: Any = tree.get_submodule(name)
        if len(own.weight) != words:
            zeros = own.weight.new_zeros(1, own.weight.shape[1]).expand(words, -1)
            twin: Any = saved_twin(own, SavedModule(zeros))
            setattr(twin, "num_embeddings" if isinstance(own, nn.Embedding) else "out_features", words)
            setattr(tree.get_submodule(parent), child, twin)
    return tree


def classifier_of(reference: nn.Module, task: Task, head: Head) -> nn.Module:
    """Return transformers' classifier for the base, with PEFT's layers and the version's head.

    Args:
        reference: PEFT's model of the version, on a view of the base.

    Raises:
        AdapterFormatError: transformers has none for this base, or one with another kind of head.
    """
    adapted: Any = reference
    full = adapted.get_base_model()
    layer = nn.Linear(head.weight.shape[1], len(head.weight), bias=head.bias is not None, device="meta")
    device = next(full.parameters()).device
    layer.weight = nn.Parameter(head.weight.to(device), requires_grad=False)
    if head.bias is not None:
        layer.bias = nn.Parameter(head.bias.to(device), requires_grad=False)
    return classifier_with(full, task, layer).eval()


def classifier_with(full: Any, task: Task, layer: nn.Linear) -> nn.Module:
    """Return transformers' classifier for a text model, over its decoder, with `layer` as its head.

    Raises AdapterFormatError as `classifier_of`.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    kind = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForTokenClassification
    config = copy.deepcopy(full.config)
    config.num_labels = layer.out_features
    # Of a row alone the last token is what is classified.
    config.pad_token_id = config.get_text_config().pad_token_id = None
    try:
        model = empty_base(config, kind)
    except (ValueError, AttributeError) as error:
        raise AdapterFormatError(
            "unsupported_kind",
            f"task_type is {task}, and transformers has no such model for {type(config).model_type}",
        ) from error
    names = [name for name in CLASSIFIER_NAMES if isinstance(getattr(model, name, None), nn.Linear)]
    if not names or not hasattr(model, model.base_model_prefix):
        raise AdapterFormatError(
            "unsupported_kind", f"task_type is {task}, and {type(model).__name__} has another kind of head"
        )
    name = names[0]
    if (getattr(model, name).bias is None) != (layer.bias is None):
        raise AdapterFormatError(
            "bad_shape",
            f"{type(model).__name__} has a classifier {'with' if layer.bias is None else 'without'} a bias",
        )
    setattr(model, name, layer)
    setattr(model, model.base_model_prefix, full.base_model)
    return model  # type: ignore[no-any-return]


def _check_lookups(base: Any, words: int) -> None:
    """Raise AdapterFormatError if layers of the base have embeddings of their own, without rows for new
    tokens: those of Gemma 4, and unlike those of Gemma 3n, which take other tokens for the first one."""
    config = base.config.get_text_config()
    per_layer = getattr(config, "hidden_size_per_layer_input", 0)
    if words > config.vocab_size and per_layer and config.model_type != "gemma3n_text":
        raise AdapterFormatError(
            "unsupported_kind",
            f"{WEIGHTS_FILE} is for a vocabulary of {words} tokens, and the layers of {type(base).__name__} "
            f"look each of its {config.vocab_size} tokens up by themselves: train rows that the base has",
        )


def _check_finite(name: str, module: ModuleWeights, own: Mapping[str, torch.Tensor]) -> None:
    """Raise AdapterFormatError if a tensor overflows between the file and the product."""
    if isinstance(module, ExpertLora):
        finite, problem = [module.b * module.scale], "a lora_B times its scale overflows fp32"
    elif isinstance(module, LoraWeights):
        vectors = [part * module.scale for part in (module.b, module.bias) if part is not None]
        finite = [*vectors, *([] if module.gain is None else [module.gain])]
        problem = "a lora_B times its scale overflows fp32, or the magnitude by the norm of its row does"
    elif isinstance(module, TokenRows):
        finite, problem = [module.rows.to(own[f"{name}.weight"].dtype)], "a row overflows the base's dtype"
    else:
        finite, problem = [tensor for _, tensor in tensors_of(module)], "a tensor overflows the base's dtype"
    if not all(torch.isfinite(tensor).all() for tensor in finite):
        raise AdapterFormatError("not_finite", f"{name}: {problem}")


@torch.inference_mode()
def _acts(experts: ExpertLora) -> bool:
    """Return True if what is added to an expert's matrix is not zero."""
    x = torch.randn(experts.a.shape[2], generator=torch.Generator().manual_seed(0))
    return bool((experts.scale * (experts.b @ (experts.a @ x)[..., None]) != 0).any())


@torch.inference_mode()
def _changes(module: ModuleWeights, base: Any) -> bool:
    """Return True if the module's output differs from the base's for any input."""
    if words_of(module) not in (0, len(base.weight)):
        return True
    if isinstance(module, LoraWeights):
        if module.gain is not None and bool(((module.gain - 1).abs() > _UNTRAINED_GAIN).any()):
            return True
        if module.bias is not None and bool((module.bias * module.scale != 0).any()):
            return True
        a = module.a if module.a.shape[0] == module.rank else module.a.T
        # B @ (A @ x) is zero for a random x only where B @ A is.
        x = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(0))
        return bool((module.scale * (module.b @ (a @ x)) != 0).any())
    if isinstance(module, TokenRows):
        weight = base.weight.cpu()[module.indices]
        return not torch.equal(module.rows.to(weight.dtype), weight)
    return any(not torch.equal(tensor, getattr(base, part).cpu()) for part, tensor in tensors_of(module))
