"""Read tensor names of other trainers, and of other classes of the same model, as PEFT's names on this base.

Trainers wrap modules (torch.compile, FSDP) or save a plain state dict, and a composite's language model has
another name in each release of transformers. A reading is taken only if it fits every tensor of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from onebase_adapters.format.config import WEIGHTS_FILE, AdapterFormatError

if TYPE_CHECKING:  # files are converted in a process without torch
    from onebase_engine.base.layers import LayerShape

PREFIX = "base_model.model."
"""Prefix that PEFT puts before the name of each module of the model."""

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Modules that torch.compile, FSDP and activation checkpointing put around others."""
_MOST_PREFIXES = 2
_PARAMETERS = ("weight", "bias")
_ADAPTER_PARTS = {
    "lora_A": _PARAMETERS,
    "lora_B": _PARAMETERS,
    "lora_embedding_A": ("",),
    "lora_embedding_B": ("",),
    "lora_magnitude_vector": ("weight", ""),
    "trainable_tokens_delta": ("",),
    "modules_to_save": _PARAMETERS,
}
"""Parts of PEFT's layers with an entry for each adapter, and the parameters of an entry; "" if the entry is a
parameter itself."""

_DECODERS = (
    ("model", "lm_head"),
    ("model.language_model", "lm_head"),
    ("language_model.model", "language_model.lm_head"),
    ("model.language_model.model", "model.language_model.lm_head"),
    ("language_model", "lm_head"),
    ("model.text_model", "lm_head"),
    ("text_model", "lm_head"),
    ("", "lm_head"),
)
"""Names of the decoder and of the head in transformers' classes: of a text model, of composites since 4.52
and before, and of models without a head."""
_OUTER = ("", "model", "language_model", "model.language_model")
"""Names of a whole model inside another one."""
_TOWERS = frozenset(
    [
        "vision_tower", "vision_model", "visual", "vpm", "embed_vision", "audio_tower", "audio_model",
        "embed_audio", "multi_modal_projector", "mm_projector", "connector", "aligner",
    ]
)  # fmt: skip
"""Parts of composites that read images or sounds. Text does not pass through them."""

_Pairs = tuple[tuple[str, str], ...]
"""Names of modules in the file and in the base. The first pair whose name is the module, or contains it,
replaces that name."""


@dataclass(frozen=True)
class TensorName:
    """A tensor's name, split: `module` of the model, and `end`, which is PEFT's plain one of a saved file."""

    module: str
    end: str

    @property
    def plain(self) -> str:
        return f"{PREFIX}{self.module}{self.end}"


@dataclass(frozen=True)
class Spelling:
    """Names of a file's tensors and of the base's layers, each in the other's words.

    `names`: the tensor's name on this base, by the name in the file. `of_layers`: name of each layer of the
    base in the class that the adapter was trained on; layers that this class lacks are not there. `left_out`:
    module of each tensor of a part for images or sounds that the base is loaded without. `notes`: sentences
    on what was read as what.
    """

    names: Mapping[str, TensorName]
    of_layers: Mapping[str, str]
    left_out: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    """Names of the parts that tensors were left out for."""
    notes: tuple[str, ...] = ()


# ---- what trainers wrap around a name ---------------------------------------------------------------


def unwrapped(names: Iterable[str]) -> tuple[dict[str, TensorName], tuple[str, ...]]:
    """Return PEFT's plain form of each name, in the class that was trained, and notes on what was left out.

    Raises:
        AdapterFormatError: the names are not all of one form, or they are of several adapters.
    """
    found: dict[str, TensorName] = {}
    prefixes: dict[int, str] = {}
    adapters: dict[str, str] = {}
    for name in names:
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        if parts[:1] == ["module"]:  # of DistributedDataParallel
            parts = parts[1:]
        count = 0
        while parts[:2] == ["base_model", "model"] and count < _MOST_PREFIXES:
            parts, count = parts[2:], count + 1
        prefixes.setdefault(count, name)
        found[name], adapter = _split(parts)
        if adapter is not None:
            adapters.setdefault(adapter, name)
    if len(prefixes) > 1:
        fewer, more = prefixes[min(prefixes)], prefixes[max(prefixes)]
        raise AdapterFormatError(
            "foreign_tensor",
            f"{WEIGHTS_FILE}: {fewer:.100} has fewer prefixes {PREFIX} than {more:.100}: all tensors must be "
            "named alike. Save the adapter by PEFT's save_pretrained.",
        )
    if len(adapters) > 1:
        one, other = sorted(adapters)[:2]
        raise AdapterFormatError(
            "foreign_tensor",
            f"{WEIGHTS_FILE}: {adapters[other]:.100} is of the adapter {other!r:.60}, and "
            f"{adapters[one]:.100} of {one!r:.60}. Save one adapter by PEFT's "
            "save_pretrained(..., selected_adapters=[name]).",
        )
    changed = next((name for name, read in found.items() if name != read.plain), None)
    if changed is None:
        return found, ()
    return found, (f"The tensor {changed:.150} is read as {found[changed].plain:.150}, and others alike.",)


def _split(parts: list[str]) -> tuple[TensorName, str | None]:
    """Split a name at the part that PEFT added, and return the adapter's name in it.

    That name is "" if the part lacks it, and None if the tensor is of no such part.
    """
    for back in (1, 2, 3):
        place = len(parts) - back
        if place < 0 or parts[place] not in _ADAPTER_PARTS:
            continue
        kind, rest = parts[place], parts[place + 1 :]
        for parameter in _ADAPTER_PARTS[kind]:
            own = [parameter] if parameter else []
            if rest == own:
                adapter = ""
            elif len(rest) == len(own) + 1 and rest[1:] == own and rest[0].isprintable():
                adapter = rest[0]
            else:
                continue
            return _named(parts[:place], kind, own), adapter if kind != "modules_to_save" or adapter else None
        break
    if len(parts) > 1 and parts[-1] in _PARAMETERS:
        module = parts[:-1]
        if module[-1] == "original_module":
            module[-1] = "base_layer"
        if module[-2:] == ["token_adapter", "base_layer"]:
            del module[-2]
        return TensorName(".".join(module), f".{parts[-1]}"), None
    return TensorName(".".join(parts), ""), None


def _named(module: list[str], kind: str, parameter: list[str]) -> TensorName:
    if kind == "trainable_tokens_delta":
        if module[-1:] != ["token_adapter"]:
            return TensorName(".".join([*module, kind]), "")
        module, kind = module[:-1], "token_adapter.trainable_tokens_delta"
    ends = parameter if kind == "modules_to_save" else [kind, *parameter]
    return TensorName(".".join(module), f".{'.'.join(ends)}")


# ---- the names of other classes ---------------------------------------------------------------------


def spelling(
    names: Mapping[str, TensorName],
    layers: Mapping[str, LayerShape],
    has_parameter: Callable[[str], bool],
    not_loaded: Collection[str] = (),
) -> Spelling:
    """Return the one reading in which every tensor belongs to the base.

    The base's own names come first. If no reading fits, the names stay as they are, and what does not fit is
    refused by who looks at the tensors.

    Args:
        names: result of `unwrapped`.
        layers: layers of the base by their full names.
        has_parameter: returns True if the base has a parameter of this full name.
        not_loaded: full names of parts that the base's files hold and that are not loaded.

    Raises:
        AdapterFormatError: several readings fit, and they differ.
    """

    mixtures = {name.rpartition(".")[0] for name, layer in layers.items() if layer.kind == "experts"}

    def fits(module: str) -> bool:
        known = module in layers or module in mixtures
        return known or any(has_parameter(f"{module}.{one}") for one in _PARAMETERS)

    modules = {_base_layer_of(name) for name in names.values()}
    towers = {
        module: part
        for module in modules
        if not fits(module) and (part := _missing_part(module, layers, not_loaded))
    }
    ordered = sorted(modules - towers.keys())
    found = _reading_of(ordered, layers, fits)
    if found is None:
        return Spelling(names, {layer: layer for layer in layers})
    by_module, pairs = found
    left_out = {file: layer for file, name in names.items() if (layer := _base_layer_of(name)) in towers}
    kept = {}
    for file in names.keys() - left_out.keys():
        name = names[file]
        layer = _base_layer_of(name)
        kept[file] = TensorName(f"{by_module[layer]}{name.module[len(layer) :]}", name.end)
    backwards = tuple((base, file) for file, base in pairs)
    of_layers = {layer: own for layer in layers if (own := _replaced(layer, backwards)) is not None}
    parts = tuple(sorted(set(towers.values())))
    return Spelling(kept, of_layers, left_out, parts, tuple(_notes(by_module, parts, len(left_out))))


def _reading_of(
    modules: list[str], layers: Mapping[str, LayerShape], fits: Callable[[str], bool]
) -> tuple[dict[str, str], _Pairs] | None:
    """Return the base's name of each module, and the names that were replaced; None if no reading fits.

    Raises AdapterFormatError if several fit, and they differ.
    """
    if all(map(fits, modules)):
        return {module: module for module in modules}, (("", ""),)
    found: dict[tuple[str, ...], _Pairs] = {}
    for pairs in _readings(layers, modules):
        read = tuple(one for module in modules if (one := _replaced(module, pairs)) is not None)
        if len(read) == len(modules) and all(map(fits, read)):
            found.setdefault(read, pairs)
    if not found:
        return None
    if len(found) > 1:
        _refuse_ambiguous(modules, *list(found)[:2])
    ((read, pairs),) = found.items()
    return dict(zip(modules, read, strict=True)), pairs


def _base_layer_of(name: TensorName) -> str:
    """Return the module that a tensor belongs to; of what PEFT wrapped, the module inside."""
    return unnested(name.module)[0]


def unnested(module: str) -> tuple[str, int]:
    """Return the module that PEFT wrapped, and how many wrappers a module's name is inside of it.

    PEFT wraps a module once for each of its parameters that are targets.
    """
    parts = module.split(".")
    depth = next((depth for depth, part in enumerate(reversed(parts)) if part != "base_layer"), 0)
    return ".".join(parts[: len(parts) - depth]), depth


def wrapper_of(name: str, adapted: Sequence[str]) -> str:
    """Return PEFT's name of what wraps a parameter of experts.

    adapted: full names of those of the same module that are adapted, in the order in which PEFT wraps them.
    """
    outer = len(adapted) - 1 - adapted.index(name)
    return f"{name.rpartition('.')[0]}{'.base_layer' * outer}"


def _notes(by_module: Mapping[str, str], parts: tuple[str, ...], left_out: int) -> Iterator[str]:
    changed = next((module for module, read in by_module.items() if module != read), None)
    if changed is not None:
        yield (
            f"The modules have the names of another class: {changed:.150} is read as "
            f"{by_module[changed]:.150}, and others alike."
        )
    if left_out:
        yield (
            f"{left_out} tensors of {', '.join(parts):.200} are left out: OneBase serves the language model, "
            "without the parts that see or hear."
        )


def _refuse_ambiguous(modules: list[str], one: tuple[str, ...], other: tuple[str, ...]) -> None:
    place = next(place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
    raise AdapterFormatError(
        "unknown_module",
        f"{WEIGHTS_FILE}: {modules[place]:.100} can be {one[place]:.100} or {other[place]:.100} of this "
        "base. Rename all tensors to the base's own names.",
    )


def _readings(layers: Mapping[str, LayerShape], modules: Iterable[str]) -> Iterator[_Pairs]:
    """Yield each way to read the names of another class, beginning with the base's own.

    A class has the base's towers if one of the modules is in them; otherwise it is a text model's.
    """
    decoder, head, root = _decoder_of(layers), _head_of(layers), _root_of(layers)
    named = {part for module in modules for part in module.split(".")[:3]}
    towers = [tower for tower in sorted(_TOWERS & named) if _has_part(layers, f"{root}.{tower}")]
    for outer in _OUTER:
        yield ((outer, ""),)
        yield ((outer, root),)
        for its_decoder, its_head in _DECODERS:
            pairs = [(_joined(outer, its_head), head)] if head else []
            for tower in towers:
                pairs += [(_joined(outer, tower), f"{root}.{tower}")]
                pairs += [(_joined(outer, f"model.{tower}"), f"{root}.{tower}")]
            yield (*pairs, (_joined(outer, its_decoder), decoder))


def _replaced(module: str, pairs: _Pairs) -> str | None:
    for old, new in pairs:
        if module == old or not old:
            return _joined(new, module if not old else "")
        if module.startswith(f"{old}."):
            return _joined(new, module[len(old) + 1 :])
    return None


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def _missing_part(module: str, layers: Mapping[str, LayerShape], not_loaded: Collection[str]) -> str:
    """Return the part for images or sounds that the module is in and of which the base has nothing, or ""."""
    for part in not_loaded:
        if f"{module}.".startswith(f"{part}."):
            return part
    parts = module.split(".")[:3]
    place = next((place for place, part in enumerate(parts) if part in _TOWERS), None)
    if place is None or not module.isprintable():
        return ""
    return (
        "" if any(parts[place] in layer.split(".")[:3] for layer in layers) else ".".join(parts[: place + 1])
    )


def _has_part(layers: Mapping[str, LayerShape], part: str) -> bool:
    return any(layer.startswith(f"{part}.") for layer in layers)


def _embedding_of(layers: Mapping[str, LayerShape]) -> str:
    return next((name for name, layer in layers.items() if layer.kind == "embedding"), "")


def _root_of(layers: Mapping[str, LayerShape]) -> str:
    return _embedding_of(layers).partition(".")[0]


def _head_of(layers: Mapping[str, LayerShape]) -> str:
    return next((name for name in layers if name.rpartition(".")[2] == "lm_head"), "")


def _decoder_of(layers: Mapping[str, LayerShape]) -> str:
    """Return the module that holds the input embedding and the numbered layers next to it."""
    embedding = _embedding_of(layers).split(".")
    longest: list[str] = []
    for name in layers:
        parts = name.split(".")
        if not any(part.isdigit() for part in parts):
            continue
        same = 0
        while same < min(len(parts), len(embedding)) - 1 and parts[same] == embedding[same]:
            same += 1
        longest = max(longest, parts[:same], key=len)
    return ".".join(longest)
