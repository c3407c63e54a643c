"""Which layers of a base an adapter is put on: the one reading of a recipe's `targets`.

Names are compared as they are written, part by part; none is ever taken as a pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from onebase_adapters.training.recipe import RecipeError

_ATTENTION_WORDS = ("attn", "attention")
_MLP_WORDS = ("mlp", "feed_forward", "feedforward", "ffn", "experts")


def resolve_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The names for LoraConfig's `target_modules` that mean exactly the layers of `target_layers`.

    They are last names such as `q_proj` where those mean nothing else in the model, else full names.

    Raises:
        RecipeError: as `target_layers`.
    """
    chosen = set(target_layers(model, targets))
    short = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if meant == chosen else chosen)


def target_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that `targets` mean, by full name, in the model's order.

    Args:
        model: a causal language model without adapters; it may be on meta, its layers quantized.
        targets: `attention`, `mlp`, `all-linear` (all but the output head), or names of linear layers: the
            last part (`q_proj`), more of them (`self_attn.q_proj`) or all.

    Raises:
        RecipeError: a target means no linear layer of this model; the message lists those that exist.
    """
    layers = _linear_layers(model)
    head = _head_name(model)
    body = {name: layer for name, layer in layers.items() if name != head}
    chosen = set[str]()
    for target in targets:
        group = _GROUPS.get(target)
        found = group(body) if group else {name for name in layers if f".{name}".endswith(f".{target}")}
        if not found:
            raise RecipeError("targets", _refusal(model, target, body, head))
        chosen |= found
    return {name: layer for name, layer in layers.items() if name in chosen}


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers that text passes through: the decoder's and the head, not an image encoder's."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder else None
    if isinstance(decoder, nn.Module):
        inside = {id(module) for module in decoder.modules()}
    else:
        inside = {id(module) for module in model.modules()}
    head = _head_name(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name and (id(module) in inside or name == head)
    }


def _head_name(model: Any) -> str | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return next((name for name, module in model.named_modules() if module is head), None) if head else None


def _all(body: dict[str, nn.Linear]) -> set[str]:
    return set(body)


def _attention(body: dict[str, nn.Linear]) -> set[str]:
    return {name for name in body if _within(name, _ATTENTION_WORDS)}


def _mlp(body: dict[str, nn.Linear]) -> set[str]:
    named = {name for name in body if _within(name, _MLP_WORDS)} - _attention(body)
    # OPT and others keep these layers directly in the decoder's: there it is what is not attention.
    return named or {name for name in body if _numbered(name)} - _attention(body)


def _within(name: str, words: tuple[str, ...]) -> bool:
    """Whether the name of a module around the layer has one of these words."""
    return any(word in part.lower() for part in name.split(".")[:-1] for word in words)


def _numbered(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


_GROUPS: dict[str, Callable[[dict[str, nn.Linear]], set[str]]] = {
    "all-linear": _all,
    "attention": _attention,
    "mlp": _mlp,
}


def _refusal(model: nn.Module, target: str, body: dict[str, nn.Linear], head: str | None) -> str:
    if not body:
        return (
            f"target {target!r}: {type(model).__name__} has no linear layers to put an adapter on "
            "(its products are of another kind, such as GPT-2's Conv1D); choose another base"
        )
    other = [type(module) for name, module in model.named_modules() if f".{name}".endswith(f".{target}")]
    if target in _GROUPS:
        kind = ": this base has no linear layers of that kind (experts that share one tensor are not)"
    elif other:
        kind = f" is of type {other[0].__name__}, not a linear layer"
    else:
        kind = " is not a linear layer of this base"
    parts = [
        f"{group} ({', '.join(names)})"
        for group, find in (("attention", _attention), ("mlp", _mlp))
        if (names := _last_names(find(body)))
    ]
    rest = _last_names(set(body) - _attention(body) - _mlp(body)) + ([head] if head else [])
    return f"target {target!r}{kind}; there are {', '.join([*parts, *rest])}, or all-linear"


def _last_names(names: set[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
