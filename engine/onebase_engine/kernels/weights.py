"""Finished tensors of an adapter, module by module, as slots hold them and packed adapters store them.

All floating tensors of LoRA and of token rows are fp32, as PEFT computes with them; a saved module keeps
the dtype of the module it replaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

from onebase_engine.base.layers import LayerShape


@dataclass(frozen=True)
class LoraWeights:
    """One module's matrices, fp32: `a` [rank, in], `b` [out, rank]. For an embedding `a` is [vocab, rank].

    Where the kernels take it, `a` and `b` of a plain one are bf16 if that changes none of their numbers.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    bias: torch.Tensor | None = None
    """Bias [out], added to `b`'s product before the scale (`lora_bias`)."""
    gain: torch.Tensor | None = None
    """Gain [out]: DoRA's magnitude by the norm of W + scale * B @ A (https://arxiv.org/abs/2402.09353)."""
    invocation: tuple[int, ...] = ()
    """Invocation tokens of an activated LoRA (https://arxiv.org/abs/2504.12397), the same in all modules of
    a version: it acts from their last occurrence in the prompt on. Empty: it acts on every token."""

    @property
    def rank(self) -> int:
        return self.b.shape[1]

    @property
    def plain(self) -> bool:
        """Whether the module only adds scale * B @ A."""
        return self.bias is None and self.gain is None

    @property
    def adds_wide(self) -> bool:
        """Whether PEFT adds the part in fp32 on quantized layers too, without rounding it first
        (`ALoraLinearVariant`)."""
        return bool(self.invocation)

    def to(self, device: torch.device) -> LoraWeights:
        return moved(self, device)

    def folded(self) -> LoraWeights:
        """Fold the scale into B if that changes no bit: if it is a power of two, as most are."""
        if self.scale == 1.0 or math.frexp(self.scale)[0] != 0.5:
            return self
        b = self.b * self.scale
        bias = None if self.bias is None else self.bias * self.scale
        finite = bool(torch.isfinite(b).all()) and (bias is None or bool(torch.isfinite(bias).all()))
        return replace(self, b=b, bias=bias, scale=1.0) if finite else self


@dataclass(frozen=True)
class ExpertLora:
    """Matrices on one parameter of a mixture's experts, fp32: `a` [experts, rank, in], `b` [experts, out,
    rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.b.shape[2]

    def of_expert(self, number: int) -> LoraWeights:
        """Return one expert's matrices, over the same memory."""
        return LoraWeights(self.a[number], self.b[number], self.scale)

    def to(self, device: torch.device) -> ExpertLora:
        return moved(self, device)

    def folded(self) -> ExpertLora:
        """Fold the scale into B as `LoraWeights.folded` does."""
        if self.scale == 1.0 or math.frexp(self.scale)[0] != 0.5:
            return self
        b = self.b * self.scale
        return replace(self, b=b, scale=1.0) if bool(torch.isfinite(b).all()) else self


@dataclass(frozen=True)
class SavedModule:
    """A whole module in place of the base's (`modules_to_save`): a norm, the embedding or the output head.

    The embedding and the head may have another number of rows: that of the adapter's own vocabulary.
    """

    weight: torch.Tensor
    """Weight with the base module's dtype and, the number of tokens aside, its shape."""
    bias: torch.Tensor | None = None

    def to(self, device: torch.device) -> SavedModule:
        return moved(self, device)

    def folded(self) -> SavedModule:
        return self


@dataclass(frozen=True)
class TokenRows:
    """Rows that replace some of an embedding's, and of a tied head's (`trainable_token_indices`)."""

    indices: torch.Tensor
    """Token ids, [n] int64, ascending."""
    rows: torch.Tensor
    """Rows, [n, dim] fp32; used in the dtype of the base's weight."""
    words: int = 0
    """Number of tokens of the adapter's own vocabulary; 0: it is the base's.

    Tokens beyond the base's all have a row; those from here on do not exist for the adapter.
    """

    def to(self, device: torch.device) -> TokenRows:
        return moved(self, device)

    def folded(self) -> TokenRows:
        return self


@dataclass(frozen=True)
class Head:
    """Classifier over hidden states. It is no module of the base, and in no slot."""

    weight: torch.Tensor
    """Weight [labels, hidden], in the base's dtype, as in PEFT."""
    bias: torch.Tensor | None = None

    def to(self, device: torch.device) -> Head:
        return moved(self, device)

    def folded(self) -> Head:
        return self


MOST_NEW_TOKENS = 1024
"""Largest number of tokens that an adapter may add behind the base's vocabulary. Each costs a row of the
embedding and one of the head, and widens the logits of every sequence in a step."""

HEAD = "score"
"""Name of a classifier's head among an adapter's modules."""

ModuleWeights = LoraWeights | ExpertLora | SavedModule | TokenRows | Head
AdapterWeights = Mapping[str, ModuleWeights]
"""Weights by the full name of the base's module."""

_Module = TypeVar("_Module", bound=ModuleWeights)


def tensors_of(module: ModuleWeights) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the module's tensors, by the name of their field."""
    for field in fields(module):
        value = getattr(module, field.name)
        if isinstance(value, torch.Tensor):
            yield field.name, value


def moved(module: _Module, device: torch.device) -> _Module:
    """Return the module on `device`, or the same object if it is there already."""
    return copied({"": module}, device)[""]  # type: ignore[return-value]


def copied(
    weights: AdapterWeights,
    device: torch.device,
    copy: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> AdapterWeights:
    """Copy weights to `device`, each storage by one copy. Tensors that modules share are shared there too.

    Modules that are there already are the same objects. `copy`: returns the place there of a storage's bytes,
    into which they are copied then or later.
    """
    storages: dict[int, torch.Tensor] = {}
    tensors: dict[int, torch.Tensor] = {}

    def there(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in storages:
            whole = tensor.new_empty(0, dtype=torch.uint8)
            whole.set_(tensor.untyped_storage())
            storages[key] = whole.to(device) if copy is None else copy(whole)
        if id(tensor) not in tensors:
            own = storages[key].view(tensor.dtype)
            tensors[id(tensor)] = own.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return tensors[id(tensor)]

    result: dict[str, ModuleWeights] = {}
    for name, module in weights.items():
        elsewhere: dict[str, Any] = {
            part: there(tensor) for part, tensor in tensors_of(module) if tensor.device != device
        }
        result[name] = replace(module, **elsewhere) if elsewhere else module
    return result


def composable(weights: AdapterWeights) -> bool:
    """Return True if the adapter may be weighted or added to others: it only adds scale * B @ A.

    PEFT's `add_weighted_adapter` (`cat`) drops `lora_bias`, and knows no sum of DoRA's gains, of saved
    modules, of token rows or of adapters that act from different tokens on.
    """
    return all(
        isinstance(module, Head | ExpertLora)
        or (isinstance(module, LoraWeights) and module.plain and not module.invocation)
        for module in weights.values()
    )


def invocation_of(weights: AdapterWeights) -> tuple[int, ...]:
    """Return the invocation tokens of an activated LoRA; none for any other adapter."""
    found = (module.invocation for module in weights.values() if isinstance(module, LoraWeights))
    return next(found, ())


def folded(weights: AdapterWeights) -> AdapterWeights:
    """Fold each module's scale into B if that changes no bit."""
    return {name: module.folded() for name, module in weights.items()}


def narrowed(weights: AdapterWeights, linear: Container[str]) -> AdapterWeights:
    """Convert each plain LoRA of the modules `linear` to bf16, half its bytes, if that changes no number.

    This holds for weights that were saved in bf16 with a scale that is a power of two. Weights on an
    accelerator are not converted, which would make the host wait.
    """

    def narrow(tensor: torch.Tensor) -> torch.Tensor | None:
        halved = tensor.to(torch.bfloat16)
        return halved if torch.equal(halved.to(tensor.dtype), tensor) else None

    result = dict(weights)
    for name, module in weights.items():
        if name not in linear or not isinstance(module, LoraWeights) or not module.plain:
            continue
        if module.a.device.type == "cpu" and module.a.dtype == torch.float32:
            a = narrow(module.a)
            b = None if a is None else narrow(module.b)
            if a is not None and b is not None:
                result[name] = replace(module, a=a, b=b)
    return result


def without_head(weights: AdapterWeights) -> AdapterWeights:
    """Return the weights of the base's modules, without a classifier's head."""
    return {name: module for name, module in weights.items() if not isinstance(module, Head)}


def words_of(module: ModuleWeights) -> int:
    """Return the number of tokens for which an embedding or a head has rows; 0 for any other module."""
    if isinstance(module, TokenRows):
        return module.words
    return len(module.weight) if isinstance(module, SavedModule) and module.weight.ndim > 1 else 0


def vocabulary_of(weights: AdapterWeights) -> int:
    """Return the number of tokens of the adapter's own vocabulary; 0 if it is the base's."""
    return max(map(words_of, weights.values()), default=0)


def fits(module: ModuleWeights, layer: LayerShape) -> bool:
    """Return True if the module's shapes are those that this layer of the base needs."""
    if isinstance(module, Head) or isinstance(module, ExpertLora) != (layer.kind == "experts"):
        return False
    if isinstance(module, ExpertLora):
        count, rank = layer.count, module.rank
        shapes = tuple(module.a.shape), tuple(module.b.shape)
        return shapes == ((count, rank, layer.size_in), (count, layer.size_out, rank))
    if isinstance(module, SavedModule):
        rows, *others = layer.weight_shape
        rows = rows if layer.kind == "norm" else words_of(module)
        return (
            tuple(module.weight.shape) == (rows, *others) and rows <= layer.weight_shape[0] + MOST_NEW_TOKENS
        )
    if isinstance(module, TokenRows):
        words, dim = layer.weight_shape if layer.kind != "norm" else (0, 0)
        new = torch.arange(words, max(module.words, words))
        covered = len(new) <= MOST_NEW_TOKENS and bool(torch.isin(new, module.indices).all())
        inside = bool(((module.indices >= 0) & (module.indices < (module.words or words))).all())
        return inside and covered and module.rows.shape[1] == dim
    rank, embedding = module.rank, layer.kind == "embedding"
    a = (layer.size_in, rank) if embedding else (rank, layer.size_in)
    return layer.kind != "norm" and (tuple(module.a.shape), module.b.shape[0]) == (a, layer.size_out)


def host_bytes(weights: AdapterWeights) -> int:
    """Return the bytes of a version in the engine's memory, where a classifier's head is in fp64."""
    head = weights.get(HEAD)
    own = 0 if head is None else sum(tensor.numel() for _, tensor in tensors_of(head))
    return weights_bytes(without_head(weights)) + 8 * own


def weights_bytes(weights: AdapterWeights) -> int:
    """Return the tensors' bytes, each storage counted once (a tied head shares its embedding's)."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in weights.values()
        for _, tensor in tensors_of(module)
    }
    return sum(storages.values())
