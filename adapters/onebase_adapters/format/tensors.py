"""Group the tensors of a file by module, and check them by their headers alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

import torch

from onebase_adapters.format.added_tokens import checked_additions
from onebase_adapters.format.config import (
    CLASSIFIER_NAMES,
    CLASSIFIERS,
    WEIGHTS_FILE,
    AdapterFormatError,
    ConfigFacts,
    Task,
)
from onebase_adapters.format.names import (
    BaseModules,
    expert_targets,
    lora_targets,
    possible_targets,
    saved_modules,
    token_rows,
    unmet_names,
)
from onebase_adapters.format.patterns import PatternError, endings
from onebase_adapters.format.resized import ResizedMatrix, plan_resized, resized_to
from onebase_adapters.format.safetensors_file import TensorEntry
from onebase_adapters.format.single_experts import GatheredMatrix, gather
from onebase_adapters.format.spec import ModuleSpec
from onebase_adapters.format.spellings import PREFIX, TensorName, spelling, unnested, unwrapped, wrapper_of
from onebase_engine.base.layers import LayerShape
from onebase_protocol.adapters import TokenizerAdditions

MAX_LABELS: Mapping[Task, int] = {"SEQ_CLS": 1 << 12, "TOKEN_CLS": 1 << 10}
"""Largest number of labels, by task. More would delay the engine's other sequences: a classifier is applied
to each text, or to each of its tokens."""

# By the end of a tensor's name: what it is, and whether that is an embedding's (None: either's).
_ENDS: dict[str, tuple[str, bool | None]] = {
    ".lora_A.weight": ("lora_A", False),
    ".lora_B.weight": ("lora_B", False),
    ".lora_B.bias": ("lora_B.bias", False),
    ".lora_embedding_A": ("lora_A", True),
    ".lora_embedding_B": ("lora_B", True),
    ".lora_magnitude_vector": ("lora_magnitude_vector", None),
    ".lora_magnitude_vector.weight": ("lora_magnitude_vector", None),
    ".token_adapter.trainable_tokens_delta": ("trainable_tokens_delta", None),
}

_RELEASE = re.compile(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?")
"""Beginning of a release's name, as PEFT writes it."""
_ROUTERS = frozenset({"mlp.gate", "block_sparse_moe.gate"})
"""Ends of the names that routers had as layers."""
_TURNED = (
    "Matrices of experts are on the sides where PEFT had them before 0.19.1, and are written where it has "
    "them now."
)

Tensors = dict[str, TensorEntry]
"""Tensors of one module by their part: lora_A, lora_B, ..., weight, bias."""


@dataclass(frozen=True)
class PlannedTensor:
    """Tensor to copy: PEFT's name for it, the dtype to write it in and the dtype that the base uses."""

    name: str
    entry: TensorEntry
    dtype: torch.dtype = torch.float32
    used_as: torch.dtype | None = None
    experts: int = 0
    """Number of experts of a tensor that was B and is written as A, or the other way round; 0: it is copied.
    """
    gathered: GatheredMatrix | None = None
    """The matrix that is written, if it is put together from tensors of the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what is written."""
        return self.entry.shape[::-1] if self.experts else self.entry.shape

    def turned(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the tensor as the other one of A [experts * rank, size] and B [size, rank * experts]."""
        if self.name.endswith("lora_A.weight"):
            return whole.view(len(whole), -1, self.experts).permute(2, 1, 0).reshape(self.shape)
        return whole.view(self.experts, -1, whole.shape[1]).permute(2, 1, 0).reshape(self.shape)


@dataclass(frozen=True)
class TensorPlan:
    """Content of a weights file by its headers. `of_base`: tensors that must prove to be the base's own."""

    modules: tuple[ModuleSpec, ...]
    tensors: tuple[PlannedTensor, ...]
    of_base: tuple[tuple[TensorEntry, torch.Tensor], ...]
    by_module: Mapping[str, Tensors]
    saved: frozenset[str]
    warnings: tuple[str, ...]
    head: Mapping[str, PlannedTensor]
    """A classifier's weight [labels, hidden], and its bias if it has one."""
    same: tuple[tuple[TensorEntry, TensorEntry], ...] = ()
    """Pairs of tensors that must be equal, since PEFT saves one of them twice."""
    resized: tuple[ResizedMatrix, ...] = ()
    """The embedding and the head, if they were resized."""
    tokenizer: TokenizerAdditions | None = None


def plan(
    entries: tuple[TensorEntry, ...], facts: ConfigFacts, base: BaseModules, max_rank: int
) -> TensorPlan:
    """Group and check the tensors that the headers describe, without reading any.

    Raises:
        AdapterFormatError: a tensor is foreign, missing, misshapen, or of a kind that is not served.
    """
    names: Mapping[str, TensorName]
    names, notes = unwrapped(entry.name for entry in entries)
    head, entries = _head(entries, facts, base, names)
    entries, names, facts, gathered, single_experts, notes_on_experts = gather(entries, names, facts, base)
    spelled = spelling(
        {entry.name: names[entry.name] for entry in entries},
        base.layers,
        lambda parameter: base.tensor(parameter) is not None,
        base.left_out,
    )
    base = replace(base, spelled=spelled.of_layers)
    entries = tuple(entry for entry in entries if entry.name not in spelled.left_out)
    left_out = set(spelled.left_out.values())
    saved, rows = saved_modules(facts, base, left_out), token_rows(facts, base)
    sorted_in = _sorted_in(entries, base, saved, spelled.names, facts, gathered)
    by_module = sorted_in.by_module
    tokenizer, problem = checked_additions(facts.tokenizer)
    words = resized_to(by_module, sorted_in.resized, rows, saved, base)
    _check_task(facts, base, by_module.keys() | saved, words)
    modules: list[ModuleSpec] = []
    tensors: list[PlannedTensor] = []
    resized: list[ResizedMatrix] = []
    if words:
        matrices = by_module, sorted_in.resized, rows, saved, base
        modules, resized = plan_resized(words, tokenizer, problem, *matrices)
    size = base.layers[base.embedding].size_in if base.embedding else 0
    tokenizer, token_warnings = _tokens_within(tokenizer, problem, words or size)
    whole = {module.name for module in modules}
    for name in sorted((by_module.keys() | saved | rows.keys()) - whole):
        spec, copied = _plan_module(name, sorted_in, saved, rows, facts, base, max_rank)
        modules.append(spec)
        tensors += copied
    _check_invocation(facts, modules, base)
    if head:
        modules.append(ModuleSpec(CLASSIFIER_NAMES[0], "head", 0, 0.0, False, _numel(head)))
    modules.sort(key=lambda module: module.name)
    lora = {module.name for module in modules if module.rank}
    experts = {module.name for module in modules if module.experts}
    _check_targets(lora - experts, facts, base, saved)
    if not modules:
        raise _no_tensors(spelled.parts if left_out else ())
    warnings = (
        *facts.warnings,
        *notes,
        *notes_on_experts,
        *spelled.notes,
        *([_TURNED] if sorted_in.turned else []),
        *token_warnings,
        *unmet_names(facts, {module.name for module in modules}, base, left_out | single_experts),
    )
    used_as = None if base.head is None else getattr(base.tensor(f"{base.head}.weight"), "dtype", None)
    planned = {what: PlannedTensor(what, entry, entry.dtype, used_as) for what, entry in head.items()}
    return TensorPlan(
        tuple(modules),
        tuple(replace(tensor, gathered=gathered.get(tensor.entry.name)) for tensor in tensors),
        tuple(sorted_in.of_base),
        by_module,
        frozenset(saved),
        warnings,
        planned,
        tuple(sorted_in.same),
        tuple(resized),
        tokenizer,
    )


def _check_task(facts: ConfigFacts, base: BaseModules, names: Set[str], words: int) -> None:
    """Raise AdapterFormatError if a classifier changes the head, or has another vocabulary than the base.

    Args:
        names: modules that the adapter changes.
        words: result of `resized_to`.
    """
    if facts.task == "CAUSAL_LM":
        return
    if base.head in names:
        raise AdapterFormatError(
            "unknown_module",
            f"{base.head} is in no model whose task_type is {facts.task}: PEFT would ignore it",
        )
    if words:
        raise AdapterFormatError(
            "unsupported_kind",
            f"{WEIGHTS_FILE} is for a vocabulary of {words} tokens, which is served for text alone: its "
            f"task_type is {facts.task}",
        )


def _plan_module(
    name: str,
    sorted_in: _SortedTensors,
    saved: set[str],
    rows: Mapping[str, tuple[int, ...]],
    facts: ConfigFacts,
    base: BaseModules,
    max_rank: int,
) -> tuple[ModuleSpec, list[PlannedTensor]]:
    """Return what the adapter changes in one module, and the tensors to copy for it.

    Args:
        saved: modules that were trained whole.
        rows: tokens whose rows were trained, by module.

    Raises:
        AdapterFormatError: a tensor is foreign, missing or misshapen.
    """
    own, layer = sorted_in.by_module.get(name, {}), base.layers[name]
    turned = 0
    if name in saved:
        _check_kinds(name, own, {"weight", "bias"} if layer.bias else {"weight"}, rows)
        shapes = {"weight": layer.weight_shape, "bias": (layer.size_out,)}
        spec = ModuleSpec(name, "saved", 0, 0.0, False, _numel(own))
    elif name in rows:
        follows = name != base.embedding and name in base.pair
        delta = own.get("trainable_tokens_delta") if follows else None
        if delta is not None:  # which PEFT saves next to the embedding's
            embedding = sorted_in.by_module[base.embedding or ""]
            sorted_in.same.append((embedding["trainable_tokens_delta"], delta))
            own = {}
        _check_kinds(name, own, set() if follows else {"trainable_tokens_delta"}, rows)
        shapes = {"trainable_tokens_delta": (len(rows[name]), layer.weight_shape[1])}
        spec = ModuleSpec(name, "tokens", 0, 0.0, False, _numel(own), rows[name])
    else:
        spec, shapes = _lora(name, own, facts, base, max_rank)
        if name in sorted_in.turned:
            shapes, turned = _turned(shapes), layer.count
    _check_shapes(name, own, shapes, spec, base)
    return spec, _planned(name, own, layer, spec, base, sorted_in.by_module, turned)


def _no_tensors(left_out: Collection[str]) -> AdapterFormatError:
    """Return the error of a file without tensors that are served. left_out: parts that it is for instead."""
    if left_out:
        return AdapterFormatError(
            "no_effect",
            f"{WEIGHTS_FILE} holds tensors of {', '.join(left_out):.200} alone: OneBase serves the "
            "language model, without the parts that see or hear",
        )
    return AdapterFormatError("empty", f"{WEIGHTS_FILE} holds no tensors of an adapter")


def _check_invocation(facts: ConfigFacts, modules: Sequence[ModuleSpec], base: BaseModules) -> None:
    """Raise AdapterFormatError unless an activated LoRA has tokens of this base, and nothing but matrices."""
    size = base.layers[base.embedding].size_in if base.embedding else 0
    if facts.invocation and max(facts.invocation) >= size:
        raise AdapterFormatError(
            "bad_config",
            f"alora_invocation_tokens has the token {max(facts.invocation)}, and this base has tokens 0 to "
            f"{size - 1}",
        )
    for module in modules if facts.invocation else ():
        if module.kind != "alora":
            raise AdapterFormatError(
                "unsupported_kind",
                f"alora_invocation_tokens together with {module.name:.200}, which is of the kind "
                f"{module.kind}: it would act before the invocation too",
            )


def _tokens_within(
    tokenizer: TokenizerAdditions | None, problem: str, words: int
) -> tuple[TokenizerAdditions | None, tuple[str, ...]]:
    """Return the additions whose tokens have rows, and a sentence on those that are not used."""
    if problem:
        return None, (f"The tokenizer next to the adapter is not used: {problem}.",)
    if tokenizer is None or tokenizer.tokens[-1].id < words:
        return tokenizer, ()
    kept = tuple(token for token in tokenizer.tokens if token.id < words)
    first = tokenizer.tokens[len(kept)]
    ends = tuple(end for end in tokenizer.end_tokens if end < words)
    additions = TokenizerAdditions(tokens=kept, end_tokens=ends, chat_template=tokenizer.chat_template)
    warning = f"The token {first.content} ({first.id}) and those behind it have no rows, and are not used."
    return (additions if kept else None), (warning,)


def _head(
    entries: tuple[TensorEntry, ...], facts: ConfigFacts, base: BaseModules, names: Mapping[str, TensorName]
) -> tuple[Tensors, tuple[TensorEntry, ...]]:
    """Return a classifier's own tensors, and the other entries."""
    if facts.task not in CLASSIFIERS:
        return {}, entries
    parts = {TensorName(name, f".{what}"): what for name in CLASSIFIER_NAMES for what in ("weight", "bias")}
    found = [(parts[names[entry.name]], entry) for entry in entries if names[entry.name] in parts]
    head = dict(found)
    if "weight" not in head or len(head) < len(found):
        raise AdapterFormatError(
            "incomplete",
            f"{WEIGHTS_FILE} must have one {PREFIX}{CLASSIFIER_NAMES[0]}.weight: task_type is {facts.task}",
        )
    labels, most = (*head["weight"].shape, 0)[0], MAX_LABELS[facts.task]
    fits = head["weight"].shape == (labels, base.hidden_size) and 1 <= labels <= most
    if not fits or ("bias" in head and head["bias"].shape != (labels,)):
        raise AdapterFormatError(
            "bad_shape",
            f"{WEIGHTS_FILE}: the classifier is {list(head['weight'].shape)}; this base needs 1 to "
            f"{most} labels, {base.hidden_size} numbers each, and a bias of as many labels if any",
        )
    return head, tuple(entry for entry in entries if names[entry.name] not in parts)


def part_of(name: str, saved: Set[str]) -> tuple[str, str]:
    """Return the module that an adapter's tensor belongs to, and its part there: lora_A, ..., bias.

    Args:
        saved: full names of the modules that the adapter replaces.
    """
    module, what, _ = _taken_apart(unwrapped([name])[0][name], saved)
    if what is None:
        raise _foreign(name)
    return module, what


@dataclass(frozen=True)
class _SortedTensors:
    """A file's tensors: of the adapter by module, of the base, and of a resized embedding or head."""

    by_module: dict[str, Tensors] = field(default_factory=dict)
    of_base: list[tuple[TensorEntry, torch.Tensor]] = field(default_factory=list)
    resized: dict[str, list[TensorEntry]] = field(default_factory=dict)
    same: list[tuple[TensorEntry, TensorEntry]] = field(default_factory=list)
    """Pairs of tensors of which one is to be the other's copy."""
    turned: set[str] = field(default_factory=set)
    """Parameters of experts whose A is on the side of the outputs."""


def _sorted_in(
    entries: tuple[TensorEntry, ...],
    base: BaseModules,
    saved: set[str],
    names: Mapping[str, TensorName],
    facts: ConfigFacts,
    gathered: Container[str],
) -> _SortedTensors:
    found = _SortedTensors()
    by_module = found.by_module
    nested: dict[str, dict[int, Tensors]] = {}
    for entry in entries:
        name, what, embedding = _taken_apart(names[entry.name], saved)
        owner, depth = unnested(name)
        if what is not None and owner in base.mixtures:
            own = nested.setdefault(owner, {}).setdefault(depth, {})
            if what in own:
                raise AdapterFormatError("bad_weights", f"{WEIGHTS_FILE}: {name:.200} has two {what}")
            own[what] = entry
            continue
        if what is None:
            module, _, part = name.rpartition(".")
            if part == "weight" and _is_resized(module, entry, base):
                found.resized.setdefault(module, []).append(entry)
            else:
                found.of_base.append((entry, _of_base(entry, name, base)))
            continue
        layer = base.layers.get(name)
        if layer is None:
            raise _unknown(entry.name, name, base, facts)
        _check_no_parameter(entry.name, base.in_config.get(name, name), facts)
        if embedding is not None and (layer.kind == "norm" or embedding != (layer.kind == "embedding")):
            raise AdapterFormatError(
                "bad_shape", f"{WEIGHTS_FILE}: {entry.name:.200} does not fit the kind of layer it names"
            )
        if what in by_module.setdefault(name, {}):
            if name not in saved:
                raise AdapterFormatError("bad_weights", f"{WEIGHTS_FILE}: {name:.200} has two {what}")
            found.same.append((by_module[name][what], entry))
        by_module[name][what] = entry
    experts = _of_experts(nested, facts, base)
    # What was put together here is on PEFT's sides of today, whichever release has saved it.
    saved_so = {
        name: own for name, own in experts.items() if not any(one.name in gathered for one in own.values())
    }
    found.turned.update(_turned_ones(saved_so, facts, base))
    by_module |= experts
    return found


def _of_experts(
    nested: Mapping[str, Mapping[int, Tensors]], facts: ConfigFacts, base: BaseModules
) -> dict[str, Tensors]:
    """Return the tensors of each parameter of experts.

    PEFT names a tensor after the module, and tells its parameters by how deep their wrappers are nested: the
    first one that it has wrapped is innermost.

    Args:
        nested: tensors by the module of experts, and by the number of wrappers around theirs.
    """
    targets = expert_targets(facts, base) if nested else set()
    found: dict[str, Tensors] = {}
    for owner, by_depth in nested.items():
        first = next(iter(by_depth[min(by_depth)].values()))
        for problem, refused in (
            ("use_dora", facts.dora),
            ("lora_bias", facts.lora_bias),
            ("alora_invocation_tokens", bool(facts.invocation)),
        ):
            if refused:
                raise AdapterFormatError(
                    "unsupported_kind",
                    f"{problem} on a parameter of experts ({owner:.150}) is not served: PEFT has none there. "
                    f"Train without {problem}, or layers alone (target_modules)",
                )
        wanted = [name for name in base.mixtures[owner] if name in targets]
        if sorted(by_depth) != list(range(len(wanted))):
            raise AdapterFormatError(
                "untargeted" if len(by_depth) > len(wanted) else "incomplete",
                f"{WEIGHTS_FILE} has matrices of {len(by_depth)} parameters of {owner:.150} (such as "
                f"{first.name:.100}), and target_parameters means {len(wanted)} of them: "
                f"{', '.join(name.rpartition('.')[2] for name in wanted) or 'none'}",
            )
        ordered = [by_depth[depth] for depth in sorted(by_depth, reverse=True)]
        shapes = [base.layers[name] for name in wanted]
        if _sides(ordered, shapes) is None and _sides(ordered[::-1], shapes) is not None:
            ordered.reverse()  # wrapped in another order
        found |= dict(zip(wanted, ordered, strict=True))
    if missing := sorted(name for name in targets if name not in found):
        raise AdapterFormatError(
            "incomplete",
            f"{WEIGHTS_FILE} has no matrices of {missing[0]:.200}, which target_parameters means",
        )
    return found


def _sides(ordered: Sequence[Tensors], layers: Sequence[LayerShape]) -> bool | None:
    """Return True if all A are on the side of the outputs, False if all are on that of the inputs.

    None: neither, or some are on one and some on the other. The rank does not matter here.
    """
    pairs = [
        (own[part].shape[place:][:1], (layer.size_in, layer.size_out)[place == side])
        for side in (0, 1)
        for own, layer in zip(ordered, layers, strict=True)
        for part, place in (("lora_A", 1), ("lora_B", 0))
        if part in own
    ]
    half = len(pairs) // 2
    fits = [all(shape == (size,) for shape, size in some) for some in (pairs[:half], pairs[half:])]
    return None if not any(fits) else not fits[0]


def _turned_ones(experts: Mapping[str, Tensors], facts: ConfigFacts, base: BaseModules) -> Iterable[str]:
    """Return the parameters of experts whose A is on the side of the outputs, and B on that of the inputs.

    Before 0.19.1 PEFT took every parameter for [experts, in, out], which those of most classes are not. Where
    a matrix is square, others of the file tell, and otherwise the release.

    Raises:
        AdapterFormatError: nothing tells.
    """
    names = [name for name in experts if not base.layers[name].transposed]
    told = {
        _sides([experts[name]], [base.layers[name]])
        for name in names
        if base.layers[name].size_in != base.layers[name].size_out
    } - {None}
    if told:
        return names if told == {True} else ()
    if not names:
        return ()
    release = _RELEASE.match(facts.peft_version or "")
    if release is None:
        raise AdapterFormatError(
            "bad_shape",
            f"{WEIGHTS_FILE}: the matrices of {names[0]:.150} are square, so that A and B may be on either "
            f"side: PEFT changed that with 0.19.1. Write the release that saved them as peft_version",
        )
    return names if tuple(map(int, release.groups(default="0"))) < (0, 19, 1) else ()


def _turned(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of A and B that are each other's."""
    return {"lora_A": shapes["lora_B"][::-1], "lora_B": shapes["lora_A"][::-1]}


def _is_resized(module: str, entry: TensorEntry, base: BaseModules) -> bool:
    """Return True if it is the embedding's or the head's matrix, with another number of rows."""
    if module not in (base.embedding, base.head) or len(entry.shape) != 2:
        return False
    layer = base.layers[module]
    words, size = (
        (layer.size_in, layer.size_out) if layer.kind == "embedding" else (layer.size_out, layer.size_in)
    )
    return entry.shape[1] == size and entry.shape[0] != words


def _taken_apart(name: TensorName, saved: Set[str]) -> tuple[str, str | None, bool | None]:
    """Return a tensor's module, its part there, and whether that part is for embeddings only.

    The part is None for a parameter of the base, whose own name is returned instead of a module's.
    """
    if name.end in _ENDS:
        return name.module, *_ENDS[name.end]
    if name.module in saved and name.end in (".weight", ".bias"):
        return name.module, name.end[1:], None
    return f"{name.module.removesuffix('.base_layer')}{name.end}", None, None


def _check_no_parameter(name: str, module: str, facts: ConfigFacts) -> None:
    """Raise AdapterFormatError if `target_parameters` names a parameter of the module, as PEFT compares
    names."""
    ends = {*endings(f"{module}.weight"), *endings(f"{module}.bias")}
    if named := ends.intersection(facts.target_parameters):
        raise _of_parameter(name, min(named))


def _of_parameter(name: str, parameter: str) -> AdapterFormatError:
    return AdapterFormatError(
        "unsupported_kind",
        f"target_parameters: {name:.150} is of {parameter:.100}, and of parameters only those of a mixture's "
        "experts are served. Train layers (target_modules), or merge the adapter into its base.",
    )


def _unknown(name: str, module: str, base: BaseModules, facts: ConfigFacts) -> AdapterFormatError:
    owner = module.removesuffix(".base_layer")
    ends = set(endings(base.in_config.get(owner, owner)))
    for parameter in facts.target_parameters:
        of = parameter.rpartition(".")[0]
        if not of or of in ends:
            return _of_parameter(name, parameter)
    if base.mixtures and ends & _ROUTERS:
        raise AdapterFormatError(
            "unknown_module",
            f"{WEIGHTS_FILE}: {name:.150} is of a mixture's router, which is no layer in transformers 5. "
            "Train without it: name layers in target_modules instead of all-linear",
        )
    example = next((layer for layer, shape in base.layers.items() if shape.kind == "linear"), "none")
    return AdapterFormatError(
        "unknown_module",
        f"{WEIGHTS_FILE}: the base has no layer {module:.150} (of {name:.100}). Its layers are named as "
        f"{example:.100}; other names are read only if all tensors of the file have them alike.",
    )


def _of_base(entry: TensorEntry, parameter: str, base: BaseModules) -> torch.Tensor:
    tensor = base.tensor(parameter)
    if tensor is None:
        raise _foreign(
            entry.name, "Save the adapter by PEFT's save_pretrained, which writes its tensors alone."
        )
    if not tensor.is_floating_point():
        raise _foreign(entry.name, f"{parameter:.100} is quantized here. Leave the base's weights out.")
    shape = tuple(tensor.shape)
    if shape != entry.shape:
        _check_vocabulary(parameter.rpartition(".")[0], entry, shape, base)
        raise _foreign(entry.name, f"{parameter:.100} is {list(shape)} here, and {list(entry.shape)} there.")
    return tensor


def _check_vocabulary(name: str, entry: TensorEntry, shape: tuple[int, ...], base: BaseModules) -> None:
    """Raise AdapterFormatError if the tensor differs from `shape` only in the size of the vocabulary."""
    if name not in (base.embedding, base.head) or len(entry.shape) != len(shape):
        return
    layer = base.layers[name]
    words = layer.size_in if layer.kind == "embedding" else layer.size_out
    differing = [(own, here) for own, here in zip(entry.shape, shape, strict=True) if own != here]
    if len(differing) == 1 and differing[0][1] == words:
        raise AdapterFormatError(
            "bad_shape",
            f"{WEIGHTS_FILE}: {entry.name:.150} is for a vocabulary of {differing[0][0]} tokens, and the "
            f"base has {words}. Matrices of an embedding or a head with another vocabulary are not served: "
            "train the module by modules_to_save, or its new rows by trainable_token_indices.",
        )


def _foreign(name: str, hint: str = "") -> AdapterFormatError:
    return AdapterFormatError(
        "foreign_tensor",
        f"{WEIGHTS_FILE}: {name:.200} is neither a tensor of this adapter, as its config describes it, nor "
        f"the base's own.{' ' * bool(hint)}{hint}",
    )


def _check_kinds(name: str, own: Tensors, wanted: set[str], rows: Mapping[str, tuple[int, ...]]) -> None:
    """Raise AdapterFormatError unless the module has exactly the parts `wanted`.

    PEFT cannot combine a replaced module, token rows and matrices.
    """
    for what in sorted(own.keys() - wanted):
        if what == "trainable_tokens_delta" or name not in rows:
            raise _foreign(own[what].name)
        raise AdapterFormatError(
            "unsupported_kind", f"{name:.200} has trainable_token_indices and {what}; both are not served"
        )
    for what in sorted(wanted - own.keys()):
        raise AdapterFormatError("incomplete", f"{WEIGHTS_FILE}: {name:.200} lacks its {what}")


def _lora(
    name: str, own: Tensors, facts: ConfigFacts, base: BaseModules, max_rank: int
) -> tuple[ModuleSpec, dict[str, tuple[int, ...]]]:
    layer, in_config = base.layers[name], base.in_config.get(name, name)
    if facts.lora_bias and layer.kind == "embedding":
        raise AdapterFormatError("unsupported_kind", f"lora_bias on an embedding ({name:.200}) is not served")
    if facts.invocation and layer.kind == "embedding":
        raise AdapterFormatError(
            "unsupported_kind",
            f"alora_invocation_tokens with matrices on the embedding ({name:.200}), where PEFT knows no "
            "activated LoRA: train linear layers alone",
        )
    wanted = {"lora_A", "lora_B"}
    if facts.dora:
        wanted.add("lora_magnitude_vector")
    if facts.lora_bias:
        wanted.add("lora_B.bias")
    _check_kinds(name, own, wanted, {})
    try:
        rank = int(facts.rank_pattern.lookup(in_config, facts.rank))
        alpha = facts.alpha_pattern.lookup(in_config, facts.alpha)
    except PatternError as error:
        raise AdapterFormatError("bad_config", f"rank_pattern and alpha_pattern: {error}") from None
    if rank > max_rank:
        raise AdapterFormatError(
            "rank_too_large",
            f"{name} has rank {rank}, the server's limit is {max_rank}: start it with --max-rank {rank}",
        )
    shapes: dict[str, tuple[int, ...]]
    if layer.kind == "experts":
        rows = rank * layer.count
        shapes = {"lora_A": (rows, layer.size_in), "lora_B": (layer.size_out, rows)}
        return ModuleSpec(name, "lora", rank, alpha, False, _numel(own), experts=layer.count), shapes
    shapes = {
        "lora_A": (rank, layer.size_in),
        "lora_B": (layer.size_out, rank),
        "lora_B.bias": (layer.size_out,),
        "lora_magnitude_vector": (layer.size_out,),
    }
    return ModuleSpec(name, facts.lora_kind, rank, alpha, facts.lora_bias, _numel(own)), shapes


def _check_shapes(
    name: str, own: Tensors, shapes: Mapping[str, tuple[int, ...]], spec: ModuleSpec, base: BaseModules
) -> None:
    for what, entry in own.items():
        if entry.shape != shapes[what]:
            _check_vocabulary(name, entry, shapes[what], base)
            rank = f"rank {spec.rank} on " if spec.rank else ""
            raise AdapterFormatError(
                "bad_shape",
                f"{WEIGHTS_FILE}: {what} of {name} is {list(entry.shape)}; {rank}this base needs "
                f"{list(shapes[what])}",
            )


def _planned(
    name: str,
    own: Tensors,
    layer: LayerShape,
    spec: ModuleSpec,
    base: BaseModules,
    adapted: Container[str],
    turned: int = 0,
) -> list[PlannedTensor]:
    if spec.experts:
        place = wrapper_of(name, [one for one in base.mixtures[name.rpartition(".")[0]] if one in adapted])
        other = {"lora_A": "lora_B", "lora_B": "lora_A"} if turned else {}
        return [
            PlannedTensor(f"{PREFIX}{place}.{other.get(what, what)}.weight", entry, experts=turned)
            for what, entry in own.items()
        ]
    if spec.rank:
        ends = {what: end for end, (what, embedding) in reversed(_ENDS.items()) if _fits(embedding, layer)}
        return [PlannedTensor(f"{PREFIX}{name}{ends[what]}", entry) for what, entry in own.items()]
    replaced = base.tensor(f"{name}.weight")
    used_as = replaced.dtype if replaced is not None and replaced.is_floating_point() else None
    if spec.kind == "tokens":
        token_adapter = f"{PREFIX}{name}.token_adapter"
        return [
            PlannedTensor(f"{token_adapter}.{what}", entry, used_as=used_as) for what, entry in own.items()
        ]
    return [
        PlannedTensor(f"{PREFIX}{name}.{what}", entry, entry.dtype, used_as) for what, entry in own.items()
    ]


def _fits(embedding: bool | None, layer: LayerShape) -> bool:
    return embedding is None or embedding == (layer.kind == "embedding")


def _check_targets(lora: set[str], facts: ConfigFacts, base: BaseModules, saved: set[str]) -> None:
    targets = lora_targets(facts, base, saved)
    if targets is None:
        # Only a regular expression tells; but a pair that PEFT ties is there whole or not at all.
        half = facts.ensure_weight_tying and len(lora & base.pair) == 1
        targets = (lora & possible_targets(facts, base)) | (base.pair if half else set())
    for name in sorted(targets - lora):
        raise AdapterFormatError(
            "incomplete", f"{WEIGHTS_FILE} has no matrices of {name:.200}, which target_modules means"
        )
    for name in sorted(lora - targets):
        raise AdapterFormatError(
            "untargeted",
            f"{WEIGHTS_FILE} has matrices of {name:.200}, which target_modules (with layers_to_transform) "
            "leaves out: PEFT would ignore them",
        )


def _numel(own: Tensors) -> int:
    return sum(entry.numel for entry in own.values())
