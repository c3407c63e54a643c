"""Read a PEFT folder that somebody else wrote, without giving one byte of it to PEFT or torch.load.

PEFT loads non-strictly and in place: a foreign tensor would overwrite the shared base, a field of the
config is a regular expression, another names a module to import. So the folder is read here, checked
against a closed list of fields and against the base's own layers, and written again as a canonical
folder that holds nothing but the adapter's tensors. That folder is what PEFT sees.
"""

from __future__ import annotations

import json
import re
import reprlib
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1 << 16
MAX_ALPHA = 1e6
"""Far above any use."""
MAX_HEADER_BYTES = 16 << 20
"""A hundred times the header of a 70B model's adapter; parsed JSON takes many times its text in memory."""

_LITERAL = re.compile(r"[A-Za-z0-9_.]+\Z")
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?:lora_(?P<kind>A|B)\.weight|lora_embedding_(?P<embedding>A|B))\Z"
)
_DTYPES = ("F32", "F16", "BF16")

_SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "loftq_config": (None, {}),
    "megatron_config": (None,),
    "corda_config": (None,),
    "lora_ga_config": (None,),
    "velora_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "ensure_weight_tying": (False, None),
}
"""Fields that change what an adapter computes in a way that is not served: refused unless off."""

_IGNORED = frozenset(
    [
        "auto_mapping",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "eva_config",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "inference_mode",
        "peft_version",
        "revision",
        "target_modules",
    ]
)
"""Fields that never act here: the tensors themselves say which modules are meant."""

_READ = frozenset(
    [
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "init_lora_weights",
        "base_model_name_or_path",
    ]
)

_HARMLESS_INITIALISATIONS = (True, False, None, "gaussian", "eva")


class AdapterFormatError(ValueError):
    """The folder is not an adapter that can be served; `code` is stable, the message names the field."""

    def __init__(self, code: str, message: str) -> None:
        # Names in the message come from the file: JSON may hold lone surrogates, which no encoder takes.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())
        self.code = code


@dataclass(frozen=True)
class LayerShape:
    """What a target may be: a linear layer, an embedding or a norm of the base.

    `size_in` of an embedding is its vocabulary; of a norm both sizes are the hidden size. `bias`: whether
    the module has one.
    """

    size_in: int
    size_out: int
    kind: Literal["linear", "embedding", "norm"] = "linear"
    bias: bool = False


@dataclass(frozen=True)
class ModuleSpec:
    """One adapted module, as the tensors and the config agree on it.

    `rank` is 0 unless the kind is lora or dora; `bias`: whether lora_B has one; `indices`: the tokens whose
    rows are replaced.
    """

    name: str
    kind: Literal["lora", "dora", "saved", "tokens"]
    rank: int
    alpha: float
    bias: bool
    parameters: int
    indices: tuple[int, ...] = ()


@dataclass(frozen=True)
class AdapterSpec:
    """A validated adapter: what it adapts and how strongly.

    `dropped`: names of tensors in the file that were the base's own, bit for bit, and were left out.
    """

    modules: tuple[ModuleSpec, ...]
    rslora: bool
    base_name: str | None
    parameters: int
    dropped: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of any module; 0 if none has one."""
        return max(module.rank for module in self.modules)

    @property
    def alpha(self) -> float:
        """The largest alpha of any module; 0 if none has one."""
        return max(module.alpha for module in self.modules)

    @property
    def kinds(self) -> list[str]:
        """Kinds of the modules, sorted."""
        return sorted({module.kind for module in self.modules})

    @property
    def targets(self) -> list[str]:
        """Last parts of the adapted modules' names, sorted."""
        return sorted({module.name.rpartition(".")[2] for module in self.modules})


def canonicalize(
    config_file: Path,
    weights_file: Path,
    layers: Mapping[str, LayerShape],
    max_rank: int,
    target: Path,
    *,
    base_tensor: Callable[[str], torch.Tensor | None],
) -> AdapterSpec:
    """Validate a PEFT adapter and write a canonical folder to `target` (empty and existing).

    Args:
        layers: every layer of the base that may be adapted, by its full name.
        max_rank: largest rank that the server's slots hold.
        base_tensor: the base's tensor by the full name of its parameter; None if there is none.

    Raises:
        AdapterFormatError: with a code and a message that names the file, field or tensor.
    """
    config = _read_config(config_file)
    tensors = _read_tensors(weights_file)
    grouped = _group(tensors, layers)
    modules = tuple(
        _check_module(name, pair, layers[name], config, max_rank) for name, pair in sorted(grouped.items())
    )
    spec = AdapterSpec(
        modules=modules,
        rslora=bool(config.get("use_rslora")),
        base_name=config.get("base_model_name_or_path") or None,
        parameters=sum(t.numel() for t in tensors.values()),
    )
    (target / CONFIG_FILE).write_text(json.dumps(_canonical_config(spec)))
    save_file({key: tensor.float().contiguous() for key, tensor in tensors.items()}, target / WEIGHTS_FILE)
    return spec


def _read_config(path: Path) -> dict[str, Any]:
    raw = _read_limited(path, MAX_CONFIG_BYTES)
    try:
        config = json.loads(raw, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError("bad_config", f"{CONFIG_FILE} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterFormatError("bad_config", f"{CONFIG_FILE} must hold a JSON object")
    if config.get("peft_type") != "LORA":
        raise AdapterFormatError(
            "unsupported_kind", f"peft_type is {_shown(config.get('peft_type'))}; only LORA is served"
        )
    if config.get("task_type") not in ("CAUSAL_LM", None):
        raise AdapterFormatError(
            "unsupported_kind", f"task_type is {_shown(config['task_type'])}; only CAUSAL_LM is served"
        )
    unknown = sorted(config.keys() - _READ - _IGNORED - _SWITCHED_OFF.keys())
    if unknown:
        raise AdapterFormatError(
            "unknown_field", f"{CONFIG_FILE} has unknown fields: {', '.join(unknown)[:200]}"
        )
    for name, allowed in _SWITCHED_OFF.items():
        if config.get(name) not in allowed:
            raise AdapterFormatError(
                "unsupported_kind", f"{name} = {_shown(config[name])} is not served yet; only {allowed[0]!r}"
            )
    if config.get("init_lora_weights") not in _HARMLESS_INITIALISATIONS:
        raise AdapterFormatError(
            "unsupported_kind",
            f"init_lora_weights = {_shown(config['init_lora_weights'])} trains against a changed base, so "
            "the adapter does not fit the shared one. Convert it to a plain LoRA (PEFT: "
            "path_initial_model_for_weight_conversion).",
        )
    _check_numbers(config)
    return config


def _shown(value: Any) -> str:
    """A value from the file for a message: cut in length and in depth, where `repr` may recurse too far."""
    return reprlib.repr(value)[:80]


def _check_numbers(config: Mapping[str, Any]) -> None:
    _integer(config.get("r", 8), "r")
    _finite(config.get("lora_alpha", 8), "lora_alpha")
    if not isinstance(config.get("use_rslora", False), bool):
        raise AdapterFormatError("bad_config", "use_rslora must be true or false")
    base_name = config.get("base_model_name_or_path") or ""
    if not isinstance(base_name, str) or not base_name.isprintable():
        raise AdapterFormatError("bad_config", "base_model_name_or_path must be a printable string")
    for field, check in (("rank_pattern", _integer), ("alpha_pattern", _finite)):
        pattern = config.get(field) or {}
        if not isinstance(pattern, dict):
            raise AdapterFormatError("bad_config", f"{field} must be an object")
        for key, value in pattern.items():
            if not _LITERAL.match(key):
                raise AdapterFormatError(
                    "bad_config", f"{field} key {key!r:.80} is not a literal module name"
                )
            check(value, f"{field}[{key:.80}]")


def _integer(value: Any, field: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise AdapterFormatError(
            "bad_config", f"{field} must be an integer from 1 to {MAX_RANK}, got {_shown(value)}"
        )


def _finite(value: Any, field: str) -> None:
    # Compared, not converted: an integer of 400 digits has no float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise AdapterFormatError(
            "bad_config", f"{field} must be a number within ±{MAX_ALPHA:g}, got {_shown(value)}"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constants(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _read_limited(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise AdapterFormatError("missing_file", f"cannot read {path.name}: {error.strerror}") from None
    if len(raw) > limit:
        raise AdapterFormatError("bad_config", f"{path.name} is over {limit} bytes")
    return raw


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The file's tensors; its header is read first, for what safetensors itself lets through."""
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:
        raise AdapterFormatError(
            "bad_weights", f"{WEIGHTS_FILE} is not a valid safetensors file: {error}"
        ) from None
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterFormatError("not_finite", f"{WEIGHTS_FILE}: {key:.200} holds NaN or infinity")
    return tensors


def _check_header(path: Path) -> None:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise AdapterFormatError(
                    "bad_weights", f"{WEIGHTS_FILE}: header over {MAX_HEADER_BYTES} bytes"
                )
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise AdapterFormatError(
            "missing_file",
            f"cannot read {WEIGHTS_FILE}: {error.strerror}. Pickled weights (.bin) are never loaded; save "
            "the adapter with safe_serialization=True.",
        ) from None
    except AdapterFormatError:
        raise
    except (ValueError, RecursionError, struct.error) as error:
        raise AdapterFormatError(
            "bad_weights", f"{WEIGHTS_FILE} is not a valid safetensors file: {error}"
        ) from None
    if not isinstance(header, dict):
        raise AdapterFormatError("bad_weights", f"{WEIGHTS_FILE}: the header is no JSON object")
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if not isinstance(entry, dict) or entry.get("dtype") not in _DTYPES:
            raise AdapterFormatError("bad_weights", f"{WEIGHTS_FILE}: {key:.200} must be F32, F16 or BF16")


def _group(
    tensors: Mapping[str, torch.Tensor], layers: Mapping[str, LayerShape]
) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by module, as {"A": ..., "B": ...}; every one must be a LoRA matrix of a layer of the base."""
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise AdapterFormatError(
                "foreign_tensor",
                f"{WEIGHTS_FILE}: {key:.200} is not a LoRA matrix. Save with save_embedding_layers=False if "
                "it is a weight of the base; other kinds of adapters are not served yet.",
            )
        name = match["module"]
        layer = layers.get(name)
        if layer is None:
            raise AdapterFormatError("unknown_module", f"{WEIGHTS_FILE}: the base has no layer {name:.200}")
        if (layer.kind == "embedding") != (match["embedding"] is not None):
            raise AdapterFormatError(
                "bad_shape", f"{WEIGHTS_FILE}: {key:.200} does not fit the kind of layer it names"
            )
        grouped.setdefault(name, {})[match["kind"] or match["embedding"]] = tensor
    if not grouped:
        raise AdapterFormatError("empty", f"{WEIGHTS_FILE} holds no LoRA matrices")
    return grouped


def _check_module(
    name: str, pair: Mapping[str, torch.Tensor], layer: LayerShape, config: Mapping[str, Any], max_rank: int
) -> ModuleSpec:
    if pair.keys() != {"A", "B"}:
        raise AdapterFormatError(
            "incomplete", f"{WEIGHTS_FILE}: {name} has lora_{next(iter(pair))} but not its partner"
        )
    rank = int(_patterned(config.get("rank_pattern"), name, config.get("r", 8)))
    if rank > max_rank:
        raise AdapterFormatError(
            "rank_too_large",
            f"{name} has rank {rank}, the server's limit is {max_rank}: start it with --max-rank {rank}",
        )
    for which, expected in (("A", (rank, layer.size_in)), ("B", (layer.size_out, rank))):
        if tuple(pair[which].shape) != expected:
            raise AdapterFormatError(
                "bad_shape",
                f"{WEIGHTS_FILE}: lora_{which} of {name} is {list(pair[which].shape)}; rank {rank} on this "
                f"base needs {list(expected)}",
            )
    alpha = float(_patterned(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
    return ModuleSpec(name, "lora", rank, alpha, False, sum(t.numel() for t in pair.values()))


def _patterned(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's lookup (first key that is the name or a dotted end of it), by literal comparison."""
    for key, value in (pattern or {}).items():
        if name == key or name.endswith(f".{key}"):
            return value
    return default


def _canonical_config(spec: AdapterSpec) -> dict[str, Any]:
    first = spec.modules[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "use_rslora": spec.rslora,
        "target_modules": [module.name for module in spec.modules],
        "rank_pattern": {re.escape(m.name): m.rank for m in spec.modules if m.rank != first.rank},
        "alpha_pattern": {re.escape(m.name): m.alpha for m in spec.modules if m.alpha != first.alpha},
    }
