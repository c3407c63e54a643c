"""Resolve the module names of a config to modules of the base, and find modules that share one tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from onebase_adapters.format.config import AdapterFormatError, ConfigFacts
from onebase_adapters.format.patterns import Targets, endings, layer_numbers
from onebase_adapters.format.strict_json import shown
from onebase_engine.base.layers import LayerShape
from onebase_engine.kernels.weights import MOST_NEW_TOKENS

BaseTensor = Callable[[str], torch.Tensor | None]
"""Function from the full name of a parameter to the base's tensor; None if there is none."""

_SHOWN = 5
_ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the head."""
_TYING_NAMES = ("embed_tokens", "lm_head")
"""Names by which PEFT finds the modules that `ensure_weight_tying` applies to."""


@dataclass(frozen=True)
class BaseModules:
    """The base's layers, its input embedding and its head.

    `spelled`: names of the layers in the class that the adapter was trained on, whose names its config uses;
    layers that this class lacks are left out.
    """

    layers: Mapping[str, LayerShape]
    base_tensor: BaseTensor
    left_out: tuple[str, ...] = ()
    """Full names of parts that the base's files hold and that are not loaded: towers that see or hear."""
    spelled: Mapping[str, str] | None = None

    @cached_property
    def in_config(self) -> Mapping[str, str]:
        """Name that the adapter's config has for each layer that its class has, by the base's name."""
        return {name: name for name in self.layers} if self.spelled is None else self.spelled

    @cached_property
    def mixtures(self) -> Mapping[str, tuple[str, ...]]:
        """Full names of the parameters of each module of experts, in the order in which PEFT wraps them."""
        found: dict[str, tuple[str, ...]] = {}
        for name, layer in self.layers.items():
            if layer.kind == "experts":
                owner = name.rpartition(".")[0]
                found[owner] = (*found.get(owner, ()), name)
        return found

    @cached_property
    def embedding(self) -> str | None:
        return next((name for name, layer in self.layers.items() if layer.kind == "embedding"), None)

    @cached_property
    def head(self) -> str | None:
        return next((name for name in self.layers if name.rpartition(".")[2] == "lm_head"), None)

    @property
    def hidden_size(self) -> int:
        """Size of a token's hidden state behind the last norm; 0 if the base has no head."""
        return self.layers[self.head].size_in if self.head else 0

    def tensor(self, parameter: str) -> torch.Tensor | None:
        """Return the tensor of a parameter; for a tied head, which lists leave out, the embedding's."""
        found = self.base_tensor(parameter)
        if found is None and self.head and self.embedding and parameter == f"{self.head}.weight":
            return self.base_tensor(f"{self.embedding}.weight")
        return found

    @cached_property
    def pair(self) -> frozenset[str]:
        """The embedding and the head if they share one weight; otherwise empty."""
        if not self.embedding or not self.head:
            return frozenset()
        rows, head = self.tensor(f"{self.embedding}.weight"), self.tensor(f"{self.head}.weight")
        tied = rows is not None and head is not None and rows.data_ptr() == head.data_ptr()
        return frozenset({self.embedding, self.head}) if tied else frozenset()


def saved_modules(facts: ConfigFacts, base: BaseModules, left_out: Collection[str] = ()) -> set[str]:
    """Return the full names of the modules that `modules_to_save` replaces.

    Args:
        left_out: names in the file that belong to parts that are not loaded. An entry may mean some of them.

    Raises:
        AdapterFormatError: an entry does not mean exactly one norm, embedding or head of the base.
    """
    inner = {ending for name in left_out for module in _ancestors(name) for ending in endings(module)}
    saved = set()
    for entry in dict.fromkeys(facts.modules_to_save):
        if entry not in inner or any(own.endswith(entry) for own in base.in_config.values()):
            saved.add(_exact(entry, "modules_to_save", base))
    for name in sorted(saved):
        layer = base.layers[name]
        if layer.kind in ("linear", "experts") and name != base.head:
            raise AdapterFormatError(
                "unsupported_kind",
                f"modules_to_save with {name:.200} is not served; only norms, lm_head and embeddings are",
            )
    return _with_tied(saved, facts, base)


def lora_targets(facts: ConfigFacts, base: BaseModules, saved: set[str]) -> set[str] | None:
    """Return the full names of the layers that `target_modules` means; None for a regular expression."""
    names = facts.target_modules
    if isinstance(names, str) and names.lower() == _ALL_LINEAR:
        names = tuple(
            own
            for name, own in base.in_config.items()
            if base.layers[name].kind == "linear" and "." in own and name != base.head
        )
    targets = Targets.of(names, facts.exclude_modules, facts.layers_to_transform, facts.layers_pattern)
    if targets is None:
        return None
    named = {
        name
        for name, own in base.in_config.items()
        if base.layers[name].kind not in ("norm", "experts") and targets.means(own)
    }
    return _with_tied(named, facts, base) - saved


def expert_targets(facts: ConfigFacts, base: BaseModules) -> set[str]:
    """Return the full names of the experts' parameters that `target_parameters` means."""
    wanted = set(facts.target_parameters)
    return {
        name
        for name, own in base.in_config.items()
        if base.layers[name].kind == "experts" and not wanted.isdisjoint(endings(own))
    }


def possible_targets(facts: ConfigFacts, base: BaseModules) -> set[str]:
    """Return the layers that `target_modules` can mean at most.

    Regular expressions in other fields only leave some out. If
    `target_modules` is one itself, or is not given, these are all layers of the base.
    """
    if not isinstance(facts.target_modules, tuple):
        return set(base.layers)
    targets = Targets.at_most(facts.target_modules, facts.layers_to_transform)
    return _with_tied({name for name, own in base.in_config.items() if targets.means(own)}, facts, base)


def unmet_names(
    facts: ConfigFacts, adapted: set[str], base: BaseModules, left_out: Collection[str] = ()
) -> list[str]:
    """Return a sentence for each field that names modules or layers for which the adapter has no tensors.

    `left_out`: names in the file that belong to parts that are not loaded.
    """
    names = {base.in_config.get(name, name) for name in adapted}.union(left_out)
    found = []
    if isinstance(facts.target_modules, tuple):
        met = {ending for name in names for ending in endings(name)}
        left_out = facts.exclude_modules if isinstance(facts.exclude_modules, tuple) else ()
        if unmet := sorted(set(facts.target_modules).difference(met, left_out)):
            found.append(_unmet("target_modules", unmet))
    numbers = {number for name in names for number in layer_numbers(name)}
    if unmet_layers := sorted((facts.layers_to_transform or frozenset()) - numbers):
        found.append(_unmet("layers_to_transform", list(map(str, unmet_layers))))
    return found


def _unmet(field: str, names: list[str]) -> str:
    shown_names = ", ".join(name[:80] for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{field} names {shown_names}{more}, of which the adapter has no tensors."


def token_rows(facts: ConfigFacts, base: BaseModules) -> dict[str, tuple[int, ...]]:
    """Return token indices by the full name of the module whose rows they replace, a tied head included.

    Raises:
        AdapterFormatError: it names anything but the embedding, or an index is beyond the vocabulary.
    """
    if not facts.token_indices:
        return {}
    field, rows = "trainable_token_indices", dict[str, tuple[int, ...]]()
    for key, indices in facts.token_indices.items():
        name = _exact(key, field, base) if key else base.embedding
        if name is None or name in rows:
            raise AdapterFormatError("bad_config", f"{field} must name one embedding of the base, once")
        rows[name] = indices
    embedding = base.embedding
    own = rows.get(embedding or "")
    for name, indices in rows.items():
        fits = name == base.head and (name not in base.pair or indices == own)
        if embedding is None or own is None or (name != embedding and not fits):
            raise AdapterFormatError(
                "unsupported_kind",
                f"{field} on {name:.200} is not served; only on the input embedding, and with it on the head",
            )
    if embedding is None or own is None:
        return {}
    if (highest := max(map(max, rows.values()))) >= base.layers[embedding].size_in + MOST_NEW_TOKENS:
        raise AdapterFormatError(
            "bad_config",
            f"{field} has {shown(highest)}, the vocabulary ends at {base.layers[embedding].size_in - 1}, "
            f"and an adapter may add {MOST_NEW_TOKENS} tokens",
        )
    return rows | dict.fromkeys(base.pair, own)


def _ancestors(name: str) -> Iterator[str]:
    """Yield the names of the modules that a module or parameter is in, its own last."""
    parts = name.split(".")
    yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _exact(entry: str, field: str, base: BaseModules) -> str:
    """Return the one module that PEFT, which compares ends of names, finds by `entry`."""
    found = [name for name, own in base.in_config.items() if own.endswith(entry)]
    if not any(entry in endings(base.in_config[name]) for name in found):
        raise AdapterFormatError("unknown_module", f"{field}: the base has no layer {entry:.200}")
    if len(found) > 1:
        raise AdapterFormatError(
            "unsupported_kind",
            f"{field}: {entry:.100} means {len(found)} modules of the base, such as {found[0]:.100} and "
            f"{found[1]:.100}; only exact names are served",
        )
    return found[0]


def _with_tied(names: set[str], facts: ConfigFacts, base: BaseModules) -> set[str]:
    tying = {name for name in names & base.pair if name.rpartition(".")[2] in _TYING_NAMES}
    return names | base.pair if facts.ensure_weight_tying and tying else names
