"""Read `adapter_config.json` against a closed list of fields, without torch, PEFT or the base.

PEFT takes some fields as regular expressions, others as modules to import or files to unpickle. Here each
field has one rule: it is read and checked, or it never acts and is dropped, or it must be switched off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from onebase_adapters.format.patterns import NamePattern, PatternError
from onebase_adapters.format.strict_json import parse_json, shown

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MLX_WEIGHTS_FILE = "adapters.safetensors"
"""Weights as mlx-lm names them."""
NOTE = "onebase_note"
"""Metadata of a weights file that was converted when it came: a sentence on what was read as what."""
MODEL_CONFIG_FILE = "config.json"
"""Config of a classifier's model, as transformers writes it, with the label names that PEFT does not save."""
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 8 << 20
"""Limit of a weights file's header: a little more than that of a LoRA of each single expert of Qwen3-30B-A3B,
with 37,000 tensors."""
MAX_RANK = 1 << 16
MAX_ALPHA = 1e6
"""Limit of |alpha| and of dropout, far above any use."""

_MOST_TOKEN = 2**31 - 1

_SWITCHED_OFF: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "loftq_config": (None, {}),
    "megatron_config": (None,),
    "corda_config": (None,),
    "lora_ga_config": (None,),
    "velora_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
    "layer_replication": (None,),
}
"""Fields that change the computation in a way that is not served; refused unless off."""

_DROPPED = frozenset(
    [
        *("auto_mapping", "megatron_core", "qalora_group_size", "runtime_config", "eva_config"),
        *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),  # of ms-swift
    ]
)
"""Fields that are never read: they act in training only, or name something to import."""
_OFF: tuple[Any, ...] = (None, False, "", [], {})
"""Values of a field of a later PEFT that leave it off."""

_READ = frozenset(
    [
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "ensure_weight_tying",
        "modules_to_save",
        "trainable_token_indices",
        "init_lora_weights",
        "base_model_name_or_path",
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "fan_in_fan_out",
        "layers_to_transform",
        "layers_pattern",
        "lora_dropout",
        "inference_mode",
        "peft_version",
        "revision",
        "id2label",
        "onebase_tokenizer",
        "alora_invocation_tokens",
        "onebase_defaults",
    ]
)

_HARMLESS_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initializations that leave the base's weights alone, so that the adapter fits the shared base."""

Task = Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION"]
"""Task of an adapter, in PEFT's words: text, classes of a text or of its tokens, or vectors."""
CLASSIFIERS: tuple[Task, ...] = ("SEQ_CLS", "TOKEN_CLS")
MOST_LABELS, LONGEST_LABEL, LABEL_CHARACTERS = 4096, 200, 1 << 16
"""Largest number of label names, of characters of one, and of characters of all together."""
MOST_INVOCATION_TOKENS = 64
"""Largest number of invocation tokens of an activated LoRA. Those of published ones are under ten."""
CLASSIFIER_NAMES = ("score", "classifier")
"""Names of a classifier's head in transformers, which PEFT adds to `modules_to_save`."""

Names = tuple[str, ...] | str | None


class AdapterFormatError(ValueError):
    """The files are not an adapter that can be served; `code` is stable, the message names the field."""

    def __init__(self, code: str, message: str) -> None:
        # Names in the message come from the file: JSON may hold lone surrogates, which no encoder takes.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())
        self.code = code


@dataclass(frozen=True)
class ConfigFacts:
    """Fields of the config, all of them checked for type and limits.

    `target_modules` and `exclude_modules` are a tuple of literal names, or a string that PEFT would take as a
    regular expression (never evaluated here), or None. `token_indices`: tokens by the name of the
    embedding; "" is the input embedding.
    """

    task: Task
    base_name: str | None
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    lora_bias: bool
    ensure_weight_tying: bool
    rank_pattern: NamePattern
    alpha_pattern: NamePattern
    target_modules: Names
    exclude_modules: Names
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    target_parameters: tuple[str, ...] = ()
    """Names of parameters that PEFT adapts: those of a mixture's experts. PEFT itself names them in a file
    without any tensors of them too."""
    peft_version: str | None = None
    """Release of PEFT that saved the adapter, if it says so."""
    warnings: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    """Names of a classifier's labels, in the order of its head's rows; empty if they have none."""
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tokenizer: Any = None
    """Value of `onebase_tokenizer`, which `added_tokens` reads."""
    invocation: tuple[int, ...] = ()
    """Invocation tokens of an activated LoRA (aLoRA, arXiv:2504.12397); none for any other adapter."""
    defaults: Any = None
    """Value of `onebase_defaults`, which `defaults` reads."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds that its modules can have: lora, dora or alora, head, saved, tokens."""
        extra = (
            ("head", self.task in CLASSIFIERS),
            ("saved", self.modules_to_save),
            ("tokens", self.token_indices),
        )
        return (self.lora_kind, *(kind for kind, present in extra if present))

    @property
    def lora_kind(self) -> Literal["lora", "dora", "alora"]:
        """Kind of its modules with matrices."""
        return "alora" if self.invocation else "dora" if self.dora else "lora"


def check_config(raw: bytes) -> ConfigFacts:
    """Check the bytes of an `adapter_config.json` by themselves, without the base.

    Raises:
        AdapterFormatError: with code `bad_config`, `unknown_field` or `unsupported_kind`.
    """
    config = parse_config(raw)
    off = _check_kind(config)
    task: Task = config.get("task_type") or "CAUSAL_LM"
    heads = CLASSIFIER_NAMES if task in CLASSIFIERS else ()
    facts = ConfigFacts(
        task=task,
        base_name=_text(config, "base_model_name_or_path"),
        rank=_integer(config.get("r", 8), "r"),
        alpha=_finite(config.get("lora_alpha", 8), "lora_alpha"),
        rslora=_flag(config, "use_rslora"),
        dora=_flag(config, "use_dora"),
        lora_bias=_flag(config, "lora_bias"),
        ensure_weight_tying=_flag(config, "ensure_weight_tying"),
        rank_pattern=_pattern(config, "rank_pattern", _integer),
        alpha_pattern=_pattern(config, "alpha_pattern", _finite),
        target_modules=_names(config, "target_modules"),
        exclude_modules=_names(config, "exclude_modules"),
        layers_to_transform=_layer_numbers(config),
        layers_pattern=_several(config, "layers_pattern"),
        modules_to_save=tuple(
            name for name in _literal_names(config, "modules_to_save") if name not in heads
        ),
        target_parameters=_literal_names(config, "target_parameters"),
        peft_version=_text(config, "peft_version"),
        warnings=off,
        label_names=_label_names(config.get("id2label")) if heads else (),
        token_indices=_token_indices(config.get("trainable_token_indices")),
        tokenizer=config.get("onebase_tokenizer"),
        invocation=_invocation(config),
        defaults=config.get("onebase_defaults"),
    )
    _check_activated(facts, config)
    if facts.lora_bias and (facts.dora or not isinstance(config.get("init_lora_weights", True), bool)):
        raise AdapterFormatError(
            "bad_config",
            "lora_bias and use_dora cannot be combined, nor lora_bias and init_lora_weights by name",
        )
    if isinstance(facts.target_modules, str):
        for name, given in (
            ("layers_to_transform", facts.layers_to_transform),
            ("layers_pattern", facts.layers_pattern),
        ):
            if given:
                raise AdapterFormatError(
                    "bad_config",
                    f"{name} together with target_modules as a text: PEFT loads no such adapter, and which "
                    f"layers are meant would be a guess. Leave {name} out, or list the target_modules.",
                )
    _text(config, "revision")
    _flag(config, "inference_mode")
    # For transformers' Conv1D only: PEFT sets it itself there, and back for every other layer. It says how a
    # weight is stored, which merging needs to know.
    _flag(config, "fan_in_fan_out")
    _finite(config.get("lora_dropout", 0.0), "lora_dropout")
    return facts


def with_labels(raw: bytes, model_config: bytes | None) -> bytes:
    """Return the bytes of an `adapter_config.json` with `id2label` of the `config.json` next to it added.

    A version consists of two files, so the label names go into this one; PEFT ignores the field. The bytes of
    an adapter that does not classify, or whose names are defaults (`LABEL_0`), are returned unchanged.

    Raises AdapterFormatError if a classifier's `config.json` cannot be read. `check_config` checks the names.
    """
    if model_config is None or not names_labels(raw):
        return raw
    names = parse_config(model_config, MODEL_CONFIG_FILE).get("id2label")
    if names is None or (isinstance(names, dict) and all(names[key] == f"LABEL_{key}" for key in names)):
        return raw
    try:
        # Without line breaks: each would begin with as many spaces as what it is in is deep.
        return json.dumps({**parse_config(raw), "id2label": names}, sort_keys=True).encode()
    except RecursionError:
        raise AdapterFormatError("bad_config", f"{MODEL_CONFIG_FILE} is nested too deep") from None


def names_labels(raw: bytes) -> bool:
    """Return True if `config.json` may add label names: a classifier has no names of its own."""
    try:
        config = parse_config(raw)
    except AdapterFormatError:
        return False  # which `check_config` will say
    return config.get("task_type") in CLASSIFIERS and config.get("id2label") is None


def _label_names(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    count = len(value) if isinstance(value, dict) else 0
    if not 1 <= count <= MOST_LABELS or value.keys() != {str(number) for number in range(count)}:
        raise AdapterFormatError(
            "bad_config", f"id2label must name labels 0, 1, 2 and so on, {MOST_LABELS} at most"
        )
    names = [value[str(number)] for number in range(count)]
    for number, name in enumerate(names):
        fits = isinstance(name, str) and 0 < len(name) <= LONGEST_LABEL and name.isprintable()
        if not fits:
            raise AdapterFormatError(
                "bad_config",
                f"id2label[{number}] must be a text of 1 to {LONGEST_LABEL} characters that can be printed, "
                f"got {shown(name)}",
            )
    if len(set(names)) < count:
        raise AdapterFormatError("bad_config", "id2label gives two labels the same name")
    if sum(map(len, names)) > LABEL_CHARACTERS:
        raise AdapterFormatError(
            "bad_config", f"id2label has over {LABEL_CHARACTERS} characters altogether: shorten the names"
        )
    return tuple(names)


def parse_config(raw: bytes, name: str = CONFIG_FILE, most: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return the fields of a config. Raises AdapterFormatError if it is none, or over `most` bytes."""
    if len(raw) > most:
        raise AdapterFormatError("bad_config", f"{name} is over {most} bytes")
    try:
        config = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError("bad_config", f"{name} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(config, dict):
        raise AdapterFormatError("bad_config", f"{name} must hold a JSON object")
    return config


def _check_kind(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Check what kind of adapter it is. Returns a sentence on fields that are not known and are off."""
    if config.get("peft_type") != "LORA":
        raise AdapterFormatError(
            "unsupported_kind", f"peft_type is {shown(config.get('peft_type'))}; only LORA is served"
        )
    if config.get("task_type") not in (*get_args(Task), None):
        raise AdapterFormatError(
            "unsupported_kind",
            f"task_type is {shown(config['task_type'])}; only {', '.join(get_args(Task))} are served",
        )
    unknown = sorted(config.keys() - _READ - _DROPPED - _SWITCHED_OFF.keys())
    if acting := [name for name in unknown if not (_is_one_of(config[name], _OFF) and name.isprintable())]:
        raise AdapterFormatError(
            "unknown_field",
            f"{CONFIG_FILE} has unknown fields: {', '.join(acting)[:200]}. They may change what the adapter "
            "computes; only null, false and empty ones are accepted.",
        )
    for name, allowed in _SWITCHED_OFF.items():
        if not _is_one_of(config.get(name, allowed[0]), allowed):
            raise AdapterFormatError(
                "unsupported_kind", f"{name} = {shown(config[name])} is not served; only {allowed[0]!r}"
            )
    if not _is_one_of(config.get("init_lora_weights", True), _HARMLESS_INITIALISATIONS):
        raise AdapterFormatError(
            "unsupported_kind",
            f"init_lora_weights = {shown(config['init_lora_weights'])} trains against a changed base, so "
            "the adapter does not fit the shared one. Convert it to a plain LoRA (PEFT: "
            "path_initial_model_for_weight_conversion).",
        )
    if not unknown:
        return ()
    return (f"{CONFIG_FILE} has fields that are not known here, all of them off: {', '.join(unknown)[:200]}",)


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Return True if an allowed value has the same type and is equal: 0 is not False, nor 1.0 True."""
    return any(type(value) is type(one) and value == one for one in allowed)


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise AdapterFormatError("bad_config", f"{name} must be true or false, got {shown(value)}")
    return bool(value)


def _text(config: Mapping[str, Any], name: str) -> str | None:
    value = config.get(name) or None
    if value is not None and not (isinstance(value, str) and value.isprintable()):
        raise AdapterFormatError("bad_config", f"{name} must be a printable string, got {shown(value)}")
    return value


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise AdapterFormatError(
            "bad_config", f"{name} must be an integer from 1 to {MAX_RANK}, got {shown(value)}"
        )
    return value


def _finite(value: Any, name: str) -> float:
    # Compared before it is converted: an integer of 400 digits has no float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise AdapterFormatError(
            "bad_config", f"{name} must be a number within ±{MAX_ALPHA:g}, got {shown(value)}"
        )
    return float(value)


def _pattern(config: Mapping[str, Any], name: str, check: Any) -> NamePattern:
    pattern = config.get(name)
    if pattern is not None and not isinstance(pattern, dict):
        raise AdapterFormatError("bad_config", f"{name} must be an object")
    try:
        return NamePattern(
            {key: check(value, f"{name}[{key:.80}]") for key, value in (pattern or {}).items()}
        )
    except PatternError as error:
        raise AdapterFormatError("bad_config", f"{name}: {error}") from None


def _names(config: Mapping[str, Any], name: str) -> Names:
    value = config.get(name)
    if value is None or isinstance(value, str):
        return value
    return _list(value, name, str, "a string or a list of strings")


def _several(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = _names(config, name)
    return ((value,) if value else ()) if isinstance(value, str) else value or ()


def _literal_names(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = config.get(name)
    return () if value is None else _list(value, name, str, "a list of exact module names")


def _layer_numbers(config: Mapping[str, Any]) -> frozenset[int] | None:
    value = config.get("layers_to_transform")
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    return frozenset(_list(numbers, "layers_to_transform", int, "an integer or a list of integers"))


def _list(value: Any, name: str, kind: type, wanted: str) -> tuple[Any, ...]:
    if not isinstance(value, list) or not all(type(one) is kind for one in value):
        raise AdapterFormatError("bad_config", f"{name} must be {wanted}, got {shown(value)}")
    return tuple(value)


def _invocation(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the invocation tokens of an activated LoRA; none if it is none."""
    name, value = "alora_invocation_tokens", config.get("alora_invocation_tokens")
    if value is None:
        return ()
    tokens: tuple[int, ...] = _list(value, name, int, "a list of token ids, or null")
    if not 1 <= len(tokens) <= MOST_INVOCATION_TOKENS:
        raise AdapterFormatError(
            "bad_config", f"{name} must have 1 to {MOST_INVOCATION_TOKENS} tokens, got {len(tokens)}"
        )
    if not 0 <= min(tokens) <= max(tokens) <= _MOST_TOKEN:
        raise AdapterFormatError("bad_config", f"{name} must be token ids from 0 on, got {shown(value)}")
    return tokens


def _check_activated(facts: ConfigFacts, config: Mapping[str, Any]) -> None:
    """Raise AdapterFormatError for an activated LoRA with a field that acts before its invocation too.

    PEFT then applies one and not the other, or both at once, and the keys and values before the invocation
    are no longer the base's.
    """
    if not facts.invocation:
        return
    clashing = {
        "use_dora": facts.dora,
        "modules_to_save": bool(facts.modules_to_save),
        "trainable_token_indices": bool(facts.token_indices),
        "onebase_tokenizer": facts.tokenizer is not None,
        "init_lora_weights = mica": config.get("init_lora_weights") == "mica",
    }
    for name, given in clashing.items():
        if given:
            raise AdapterFormatError(
                "unsupported_kind",
                f"alora_invocation_tokens together with {name}: an activated LoRA leaves all tokens before "
                "its invocation to the base, so only plain matrices on linear layers are served",
            )
    if config.get("task_type") != "CAUSAL_LM":
        raise AdapterFormatError(
            "unsupported_kind",
            f"alora_invocation_tokens needs the task_type CAUSAL_LM, got {shown(config.get('task_type'))}: "
            "PEFT never activates it for another one",
        )


def _token_indices(value: Any) -> dict[str, tuple[int, ...]]:
    """Return token indices by embedding, as PEFT reads them: a bare list is for the input embedding."""
    if value is None:
        return {}
    if isinstance(value, dict) and "" in value:
        raise AdapterFormatError("bad_config", "trainable_token_indices must name the embedding")
    by_name = value if isinstance(value, dict) else {"": value}
    result: dict[str, tuple[int, ...]] = {}
    for key, indices in by_name.items():
        name = f"trainable_token_indices[{key:.80}]" if key else "trainable_token_indices"
        numbers: tuple[int, ...] = _list(indices, name, int, "a list of token indices, or an object of such")
        if any(number < 0 for number in numbers) or len(set(numbers)) != len(numbers):
            raise AdapterFormatError("bad_config", f"{name} must hold each index once, and none below zero")
        if numbers:
            result[key] = numbers
    return result
