"""What a folder from outside may hold: PEFT's own files, and nothing else whatever its bytes."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from onebase_adapters.base import base_tensors
from onebase_adapters.format import AdapterFormatError, AdapterSpec, LayerShape, canonicalize
from onebase_adapters.loader import adaptable_layers
from onebase_adapters.view import view

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q0}.lora_A.weight"
LAYERS = {Q0: LayerShape(8, 6), "model.embed_tokens": LayerShape(10, 8, "embedding")}
PAIR = {KEY: torch.ones(2, 8), KEY.replace("lora_A", "lora_B"): torch.ones(6, 2)}
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small valid adapter of LAYERS."""
    (tmp_path / CONFIG).write_text(json.dumps(SETTINGS))
    save_file(PAIR, tmp_path / WEIGHTS)
    return tmp_path


def read(folder: Path, max_rank: int = 64, layers: dict[str, LayerShape] = LAYERS) -> AdapterSpec:
    with tempfile.TemporaryDirectory() as target:
        return canonical(folder, layers, max_rank, Path(target))


def canonical(
    folder: Path, layers: dict[str, LayerShape], max_rank: int, target: Path, base: nn.Module | None = None
) -> AdapterSpec:
    own = {} if base is None else base_tensors(base)
    return canonicalize(folder / CONFIG, folder / WEIGHTS, layers, max_rank, target, base_tensor=own.get)


def refusal(folder: Path, **arguments: Any) -> AdapterFormatError:
    with pytest.raises(AdapterFormatError) as refused:
        read(folder, **arguments)
    str(refused.value).encode()
    assert len(str(refused.value)) < 500
    return refused.value


def write_config(folder: Path, **fields: Any) -> None:
    (folder / CONFIG).write_text(json.dumps({**SETTINGS, **fields}))


def write_raw(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    declared = len(text) if length is None else length
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", declared) + text + data)


# ---- what is taken --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {
            "rank_pattern": {"o_proj": 4, "layers.1.mlp.up_proj": 16},
            "alpha_pattern": {"down_proj": 5, "layers.0.self_attn.q_proj": 3},
        },
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": "all-linear", "lora_dropout": 0.1, "init_lora_weights": "gaussian"},
        {"target_modules": r".*\.(q|v)_proj"},
    ],
)
def test_a_folder_from_peft_gives_the_same_logits_from_its_canonical_form(
    base: nn.Module, save_adapter: Any, tokens: torch.Tensor, tmp_path: Path, fields: dict[str, Any]
) -> None:
    original = save_adapter(**fields)
    canonical(original, adaptable_layers(base), 64, tmp_path, base)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    with torch.inference_mode():
        bare = base(tokens).logits
        theirs = PeftModel.from_pretrained(view(base), str(original))(tokens).logits
        ours = PeftModel.from_pretrained(view(base), str(tmp_path))(tokens).logits
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, bare)


def test_the_spec_tells_ranks_alphas_and_targets(base: nn.Module, save_adapter: Any) -> None:
    folder = save_adapter(
        target_modules=["q_proj", "o_proj"], rank_pattern={"layers.1.self_attn.o_proj": 16}, use_rslora=True
    )
    spec = read(folder, layers=adaptable_layers(base))
    assert {m.name: m.rank for m in spec.modules} == {
        "model.layers.0.self_attn.q_proj": 8,
        "model.layers.0.self_attn.o_proj": 8,
        "model.layers.1.self_attn.q_proj": 8,
        "model.layers.1.self_attn.o_proj": 16,
    }
    assert {m.alpha for m in spec.modules} == {16.0}
    assert (spec.rank, spec.targets, spec.rslora) == (16, ["o_proj", "q_proj"], True)
    assert spec.parameters == sum(t.numel() for t in load_file(folder / WEIGHTS).values())


def test_the_canonical_config_holds_nothing_of_the_original_but_numbers(folder: Path, tmp_path: Path) -> None:
    write_config(
        folder,
        auto_mapping={"parent_library": "os"},
        eva_config={"x": 1},
        exclude_modules="(a+)+$",
        layers_pattern="(a+)+$",
        base_model_name_or_path="evil",
        target_modules="(a+)+$",
        revision="evil",
    )
    target = tmp_path / "target"
    target.mkdir()
    assert canonical(folder, LAYERS, 8, target).base_name == "evil"
    text = (target / CONFIG).read_text()
    assert not any(word in text for word in ("evil", "a+", "parent_library", "eva_config"))
    assert json.loads(text)["target_modules"] == [Q0]


# ---- the config -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"surprise": 1}, "unknown_field", "surprise"),
        ({"\ud800": 1}, "unknown_field", "ud800"),
        ({"peft_type": "IA3"}, "unsupported_kind", "peft_type"),
        ({"peft_type": "x" * 9999}, "unsupported_kind", "peft_type"),
        ({"task_type": "SEQ_CLS"}, "unsupported_kind", "task_type"),
        ({"use_dora": True}, "incomplete", "lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "unknown_module", "modules_to_save"),
        ({"bias": "all"}, "unsupported_kind", "bias"),
        ({"lora_bias": True}, "incomplete", "lora_B.bias"),
        ({"fan_in_fan_out": True}, "unsupported_kind", "fan_in_fan_out"),
        ({"loftq_config": {"loftq_bits": 4}}, "unsupported_kind", "loftq_config"),
        ({"trainable_token_indices": [1]}, "incomplete", "trainable_tokens_delta"),
        ({"layer_replication": [[0, 1]]}, "unsupported_kind", "layer_replication"),
        ({"init_lora_weights": "pissa"}, "unsupported_kind", "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "unsupported_kind", "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "unsupported_kind", "init_lora_weights"),
        ({"rank_pattern": {"(a+)+$": 4}}, "bad_config", "rank_pattern"),
        ({"alpha_pattern": {".*_proj": 4}}, "bad_config", "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 2.5}}, "bad_config", "rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "bad_config", "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "4"}}, "bad_config", "alpha_pattern"),
        ({"r": 0}, "bad_config", "r must"),
        ({"r": -1}, "bad_config", "r must"),
        ({"r": True}, "bad_config", "r must"),
        ({"r": 2.0}, "bad_config", "r must"),
        ({"r": 10**400}, "bad_config", "r must"),
        ({"lora_alpha": 10**400}, "bad_config", "lora_alpha"),
        ({"lora_alpha": 1e300}, "bad_config", "lora_alpha"),
        ({"lora_alpha": "16"}, "bad_config", "lora_alpha"),
        ({"use_rslora": "yes"}, "bad_config", "use_rslora"),
        ({"base_model_name_or_path": 3}, "bad_config", "base_model_name_or_path"),
        ({"base_model_name_or_path": "\ud800"}, "bad_config", "base_model_name_or_path"),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_a_config_that_would_not_be_served_as_trained_is_refused(
    folder: Path, fields: dict[str, Any], code: str, named: str
) -> None:
    read(folder)
    write_config(folder, **fields)
    error = refusal(folder)
    assert error.code == code
    assert named in str(error)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is not JSON"),
        ('{"peft_type": "LORA", "lora_alpha": -Infinity}', "-Infinity is not JSON"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha"),
        ('{"peft_type": "LORA", "r": 8, "r": 4}', "twice"),
        ('{"peft_type": "LORA", "rank_pattern": {"q": 8, "q": 4}}', "twice"),
        ("[" * 100_000, "valid JSON"),
        ('{"a":' * 100_000, "valid JSON"),
        ("[]", "object"),
        ("", "valid JSON"),
        ('{"peft_type": "LORA"', "valid JSON"),
        (" " * ((1 << 20) + 1), "over 1048576 bytes"),
    ],
    ids=lambda value: f"{value:.30}",
)
def test_a_config_that_is_no_plain_json_is_refused(folder: Path, text: str, why: str) -> None:
    (folder / CONFIG).write_text(text)
    error = refusal(folder)
    assert error.code == "bad_config"
    assert why in str(error)


@pytest.mark.parametrize("depth", [100, 500, 900, 960, 980, 990])
def test_nesting_near_the_parsers_limit_is_refused_like_any_value(folder: Path, depth: int) -> None:
    for field in ("peft_type", "use_dora", "init_lora_weights", "lora_alpha", "rank_pattern", "new"):
        nested = "[" * depth + "]" * depth
        others = {key: value for key, value in SETTINGS.items() if key != field}
        (folder / CONFIG).write_text(json.dumps(others)[:-1] + f', "{field}": {nested}}}')
        assert refusal(folder).code in {"bad_config", "unsupported_kind", "unknown_field"}


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    error = refusal(folder)
    assert error.code == "missing_file"
    assert missing in str(error)


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nabort\n(tR.")
    error = refusal(folder)
    assert error.code == "missing_file"
    assert "safe_serialization=True" in str(error)


# ---- the tensors ----------------------------------------------------------------------------

PARTNER = KEY.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({KEY: torch.full((2, 8), float("nan"))}, "not_finite"),
        ({PARTNER: torch.full((6, 2), float("inf"))}, "not_finite"),
        ({"base_model.model.model.embed_tokens.weight": torch.ones(10, 8)}, "foreign_tensor"),
        ({"model.embed_tokens.weight": torch.ones(10, 8)}, "foreign_tensor"),
        ({f"base_model.model.{Q0}.weight": torch.ones(6, 8)}, "foreign_tensor"),
        ({f"base_model.model.{Q0}.lora_magnitude_vector": torch.ones(6)}, "foreign_tensor"),
        ({f"base_model.model.{Q0}.lora_B.bias": torch.ones(6)}, "foreign_tensor"),
        ({"../../etc/passwd": torch.ones(1)}, "foreign_tensor"),
        ({f"{KEY}\n": torch.ones(2, 8)}, "foreign_tensor"),
        ({f"x.{KEY}": torch.ones(2, 8)}, "foreign_tensor"),
        ({"": torch.ones(1)}, "foreign_tensor"),
        ({"base_model.model.../../etc/passwd.lora_A.weight": torch.ones(2, 8)}, "unknown_module"),
        ({KEY.replace("layers.0", "layers.7"): torch.ones(2, 8)}, "unknown_module"),
        ({KEY.replace("lora_A", "default.lora_A"): torch.ones(2, 8)}, "unknown_module"),
        ({KEY: torch.ones(2, 9)}, "bad_shape"),
        ({KEY: torch.ones(3, 8)}, "bad_shape"),
        ({KEY: torch.ones(16)}, "bad_shape"),
        ({KEY: torch.ones(0, 8)}, "bad_shape"),
        ({KEY: torch.ones(2, 0)}, "bad_shape"),
        ({KEY: torch.ones(0, 8), PARTNER: torch.ones(6, 0)}, "bad_shape"),
        ({PARTNER: torch.ones(2, 6)}, "bad_shape"),
        ({PARTNER: None}, "incomplete"),
        ({KEY: None}, "incomplete"),
        ({KEY: None, PARTNER: None}, "empty"),
        ({f"base_model.model.{Q0}.lora_embedding_A": torch.ones(2, 8)}, "bad_shape"),
        ({"base_model.model.model.embed_tokens.lora_A.weight": torch.ones(2, 8)}, "bad_shape"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 10)}, "incomplete"),
        ({KEY: torch.ones(2, 8, dtype=torch.float64)}, "bad_weights"),
        ({KEY: torch.ones(2, 8, dtype=torch.int8)}, "bad_weights"),
        ({KEY: torch.ones(2, 8, dtype=torch.bool)}, "bad_weights"),
    ],
)
def test_tensors_other_than_whole_finite_pairs_of_the_base_are_refused(
    folder: Path, change: dict[str, torch.Tensor | None], code: str
) -> None:
    read(folder)
    tensors = {key: tensor for key, tensor in {**PAIR, **change}.items() if tensor is not None}
    save_file(tensors, folder / WEIGHTS)
    assert refusal(folder).code == code


def test_a_rank_over_the_limit_names_the_way_out(folder: Path) -> None:
    assert read(folder, max_rank=2).rank == 2
    error = refusal(folder, max_rank=1)
    assert error.code == "rank_too_large"
    assert "--max-rank 2" in str(error)


def _entry(start: int, shape: list[int]) -> dict[str, Any]:
    size = 4
    for n in shape:
        size *= n
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}


def test_a_tensor_name_given_twice_is_refused(folder: Path) -> None:
    one, two = json.dumps(_entry(0, [2, 8])), json.dumps(_entry(64, [6, 2]))
    data = b"\0" * (64 + 48 + 64)
    name, other = json.dumps(KEY), json.dumps(PARTNER)
    write_raw(folder, f"{{{name}: {one}, {other}: {two}}}".encode(), data[: 64 + 48])
    read(folder)
    again = json.dumps(_entry(112, [2, 8]))
    write_raw(folder, f"{{{name}: {one}, {other}: {two}, {name}: {again}}}".encode(), data)
    error = refusal(folder)
    assert error.code == "bad_weights"
    assert "twice" in str(error)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: raw[:100],
        lambda raw: raw[:7],
        lambda raw: b"",
        lambda raw: raw + b"\0",
        lambda raw: struct.pack("<Q", 2) + raw[8:],
        lambda raw: struct.pack("<Q", len(raw)) + raw[8:],
        lambda raw: struct.pack("<Q", (16 << 20) + 1) + raw[8:],
        lambda raw: struct.pack("<Q", 2**64 - 1) + raw[8:],
        lambda raw: b"\xff" * len(raw),
    ],
)
def test_a_damaged_file_is_refused(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    assert refusal(folder).code == "bad_weights"


@pytest.mark.parametrize(
    "header",
    [
        [],
        3,
        None,
        {KEY: 1},
        {KEY: {"dtype": ["F32"], "shape": [2, 8], "data_offsets": [0, 64]}},
        {KEY: {"dtype": {}, "shape": [2, 8], "data_offsets": [0, 64]}},
        {KEY: {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 60]}},
        {KEY: {"dtype": "F32", "shape": [2, -8], "data_offsets": [0, 64]}},
        {KEY: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}},
        {KEY: _entry(0, [2, 8]), PARTNER: _entry(16, [6, 2])},
        {KEY: _entry(0, [2, 8]), "__metadata__": {"a": []}},
        {"\ud800": {"dtype": "I64", "shape": [8], "data_offsets": [0, 64]}},
        b"[" * 100_000,
        b"\xff\xfe{}",
        b'{"a": NaN}',
    ],
    ids=lambda value: f"{value!r:.50}",
)
def test_a_header_that_lies_is_refused(folder: Path, header: Any) -> None:
    write_raw(folder, header, b"\0" * 64)
    assert refusal(folder).code == "bad_weights"


# ---- any bytes at all -----------------------------------------------------------------------

fuzz = settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "peft_type",
    "task_type",
    "target_modules",
    "init_lora_weights",
    "base_model_name_or_path",
    "modules_to_save",
    "loftq_config",
]


def read_or_refuse(folder: Path) -> None:
    """The only exception that may leave `canonicalize`, with a message that any encoder takes."""
    try:
        spec = read(folder)
    except AdapterFormatError as error:
        str(error).encode()
        return
    assert [module.name for module in spec.modules] == [Q0]
    (spec.base_name or "").encode()


@fuzz
@given(
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, 400),
)
def test_changed_bytes_of_the_weights_are_taken_or_refused(
    folder: Path, edits: list[tuple[int, int]], cut: int | None
) -> None:
    _mutate(folder, WEIGHTS, edits, cut)


@fuzz
@given(
    edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, 100),
)
def test_changed_bytes_of_the_config_are_taken_or_refused(
    folder: Path, edits: list[tuple[int, int]], cut: int | None
) -> None:
    _mutate(folder, CONFIG, edits, cut)


def _mutate(folder: Path, file: str, edits: list[tuple[int, int]], cut: int | None) -> None:
    with tempfile.TemporaryDirectory() as copied:
        copy = Path(copied)
        for name in (CONFIG, WEIGHTS):
            shutil.copy(folder / name, copy)
        raw = bytearray((copy / file).read_bytes())
        for where, value in edits:
            raw[where % len(raw)] = value
        (copy / file).write_bytes(bytes(raw[:cut]))
        read_or_refuse(copy)


@fuzz
@given(config=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4))
def test_any_values_in_the_config_are_taken_or_refused(folder: Path, config: dict[str, Any]) -> None:
    write_config(folder, **config)
    read_or_refuse(folder)


@fuzz
@given(
    header=json_values
    | st.dictionaries(
        st.sampled_from([KEY, PARTNER, "__metadata__", "x"]),
        json_values
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "I8", None]) | json_values,
                "shape": st.lists(st.integers(-1, 9), max_size=3) | json_values,
                "data_offsets": st.lists(st.integers(-1, 200), max_size=3) | json_values,
            }
        ),
        max_size=3,
    ),
    size=st.integers(0, 200),
)
def test_any_header_is_taken_or_refused(folder: Path, header: Any, size: int) -> None:
    write_raw(folder, header, b"\0" * size)
    read_or_refuse(folder)
