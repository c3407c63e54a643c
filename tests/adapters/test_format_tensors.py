"""What `adapter_model.safetensors` may hold: whole, finite tensors of this adapter on this base only."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.format_support import (
    A0,
    B0,
    CONFIG,
    EMBEDDING,
    HEAD,
    NORM,
    PAIR,
    PREFIX,
    Q0,
    Q1,
    ROWS,
    WEIGHTS,
    entry,
    read,
    refusal,
    write,
    write_raw,
)

from onebase_adapters.format.config import AdapterFormatError
from onebase_adapters.format.safetensors_file import TensorFile, TensorToWrite, write_tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path)


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


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({A0: torch.full((2, 8), float("nan"))}, "not_finite"),
        ({B0: torch.full((6, 2), float("inf"))}, "not_finite"),
        ({"base_model.model.model.embed_tokens.weight": torch.ones(10, 8)}, "foreign_tensor"),
        ({"model.embed_tokens.weight": torch.ones(10, 8)}, "foreign_tensor"),
        ({f"base_model.model.{Q0}.weight": torch.ones(6, 8)}, "foreign_tensor"),
        ({f"base_model.model.{Q0}.lora_magnitude_vector": torch.ones(6)}, "foreign_tensor"),
        ({f"base_model.model.{Q0}.lora_B.bias": torch.ones(6)}, "foreign_tensor"),
        ({"../../etc/passwd": torch.ones(1)}, "foreign_tensor"),
        ({f"{A0}\n": torch.ones(2, 8)}, "foreign_tensor"),
        ({f"x.{A0}": torch.ones(2, 8)}, "foreign_tensor"),
        ({"": torch.ones(1)}, "foreign_tensor"),
        ({"base_model.model.../../etc/passwd.lora_A.weight": torch.ones(2, 8)}, "unknown_module"),
        ({A0.replace("layers.0", "layers.7"): torch.ones(2, 8)}, "unknown_module"),
        ({A0.replace("lora_A", "default.lora_A"): torch.ones(2, 8)}, "unknown_module"),
        ({A0: torch.ones(2, 9)}, "bad_shape"),
        ({A0: torch.ones(3, 8)}, "bad_shape"),
        ({A0: torch.ones(16)}, "bad_shape"),
        ({A0: torch.ones(0, 8)}, "bad_shape"),
        ({A0: torch.ones(2, 0)}, "bad_shape"),
        ({A0: torch.ones(0, 8), B0: torch.ones(6, 0)}, "bad_shape"),
        ({B0: torch.ones(2, 6)}, "bad_shape"),
        ({B0: None}, "incomplete"),
        ({A0: None}, "incomplete"),
        ({A0: None, B0: None}, "empty"),
        ({f"base_model.model.{Q0}.lora_embedding_A": torch.ones(2, 8)}, "bad_shape"),
        ({"base_model.model.model.embed_tokens.lora_A.weight": torch.ones(2, 8)}, "bad_shape"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 10)}, "incomplete"),
        ({A0: torch.ones(2, 8, dtype=torch.float64)}, "bad_weights"),
        ({A0: torch.ones(2, 8, dtype=torch.int8)}, "bad_weights"),
        ({A0: torch.ones(2, 8, dtype=torch.bool)}, "bad_weights"),
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


def test_a_tensor_name_given_twice_is_refused(folder: Path) -> None:
    one, two = json.dumps(entry(0, [2, 8])), json.dumps(entry(64, [6, 2]))
    data = b"\0" * (64 + 48 + 64)
    name, other = json.dumps(A0), json.dumps(B0)
    write_raw(folder, f"{{{name}: {one}, {other}: {two}}}".encode(), data[: 64 + 48])
    read(folder)
    again = json.dumps(entry(112, [2, 8]))
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
        {A0: 1},
        {A0: {"dtype": ["F32"], "shape": [2, 8], "data_offsets": [0, 64]}},
        {A0: {"dtype": {}, "shape": [2, 8], "data_offsets": [0, 64]}},
        {A0: {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 60]}},
        {A0: {"dtype": "F32", "shape": [2, -8], "data_offsets": [0, 64]}},
        {A0: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}},
        {A0: entry(0, [2, 8]), B0: entry(16, [6, 2])},
        {A0: entry(0, [2, 8]), "__metadata__": {"a": []}},
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


@pytest.mark.parametrize("start", [0, 16, 48, 64, 80])
def test_tensors_lie_one_behind_the_other(folder: Path, start: int) -> None:
    write_raw(folder, {A0: entry(0, [2, 8]), B0: entry(start, [6, 2])}, b"\0" * (64 + 48))
    if start == 64:
        read(folder)
    else:
        assert refusal(folder).code == "bad_weights"


# ---- each kind's own tensors ----------------------------------------------------------------

MAGNITUDE, BIAS = f"{PREFIX}{Q0}.lora_magnitude_vector", f"{PREFIX}{Q0}.lora_B.bias"
ON_EMBEDDING = {
    f"{PREFIX}{EMBEDDING}.lora_embedding_A": torch.ones(2, 10),
    f"{PREFIX}{EMBEDDING}.lora_embedding_B": torch.ones(8, 2),
}
NORM_WEIGHT, NORM_BIAS = f"{PREFIX}{NORM}.weight", f"{PREFIX}{NORM}.bias"
HEAD_WEIGHT, EMBEDDING_WEIGHT = f"{PREFIX}{HEAD}.weight", f"{PREFIX}{EMBEDDING}.weight"
ON_HEAD = {
    f"{PREFIX}{HEAD}.lora_A.weight": torch.ones(2, 8),
    f"{PREFIX}{HEAD}.lora_B.weight": torch.ones(10, 2),
}
SAVED_NORM = {NORM_WEIGHT: torch.ones(8), NORM_BIAS: torch.ones(8)}

VALID: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "dora": ({"use_dora": True}, {**PAIR, MAGNITUDE: torch.ones(6)}),
    "bias": ({"lora_bias": True}, {**PAIR, BIAS: torch.ones(6)}),
    "embedding": ({}, ON_EMBEDDING),
    "norm": ({"modules_to_save": [NORM]}, {**PAIR, **SAVED_NORM}),
    "head": ({"modules_to_save": [HEAD]}, {**PAIR, HEAD_WEIGHT: torch.ones(10, 8)}),
    "saved embedding": ({"modules_to_save": ["embed_tokens"]}, {**PAIR, EMBEDDING_WEIGHT: torch.ones(10, 8)}),
    "tokens": ({"trainable_token_indices": [9, 0]}, {**PAIR, ROWS: torch.ones(2, 8)}),
    "targets": ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, PAIR),
}


@pytest.mark.parametrize("kind", VALID)
def test_the_smallest_adapter_of_each_kind_is_taken(tmp_path: Path, kind: str) -> None:
    fields, tensors = VALID[kind]
    target = tmp_path / "target"
    target.mkdir()
    spec = read(write(tmp_path, tensors, **fields), target=target)
    assert load_file(target / WEIGHTS).keys() == tensors.keys()
    assert spec.parameters == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("kind", "change", "code"),
    [
        ("dora", {MAGNITUDE: None}, "incomplete"),
        ("dora", {MAGNITUDE: torch.ones(8)}, "bad_shape"),
        ("dora", {MAGNITUDE: torch.ones(1, 6)}, "bad_shape"),
        ("dora", {BIAS: torch.ones(6)}, "foreign_tensor"),
        ("bias", {BIAS: None}, "incomplete"),
        ("bias", {BIAS: torch.ones(2)}, "bad_shape"),
        ("bias", {MAGNITUDE: torch.ones(6)}, "foreign_tensor"),
        ("bias", ON_EMBEDDING, "unsupported_kind"),
        ("embedding", {f"{PREFIX}{EMBEDDING}.lora_embedding_A": torch.ones(10, 2)}, "bad_shape"),
        ("embedding", {f"{PREFIX}{NORM}.lora_A.weight": torch.ones(2, 8)}, "bad_shape"),
        ("embedding", {ROWS: torch.ones(2, 8)}, "foreign_tensor"),
        ("norm", {NORM_WEIGHT: None}, "incomplete"),
        ("norm", {NORM_BIAS: None}, "incomplete"),
        ("norm", {NORM_WEIGHT: torch.ones(8, 1)}, "bad_shape"),
        ("norm", {NORM_WEIGHT: torch.full((8,), float("nan"))}, "not_finite"),
        ("norm", {f"{PREFIX}{NORM}.running_mean": torch.ones(8)}, "foreign_tensor"),
        ("norm", {NORM_WEIGHT: torch.full((8,), 3.4028e38)}, "not_finite"),
        ("head", {HEAD_WEIGHT: torch.ones(8, 10)}, "bad_shape"),
        ("head", {HEAD_WEIGHT: torch.ones(11, 8)}, "incomplete"),
        ("head", {f"{PREFIX}{HEAD}.bias": torch.ones(10)}, "foreign_tensor"),
        ("head", ON_HEAD, "foreign_tensor"),
        ("saved embedding", ON_EMBEDDING, "foreign_tensor"),
        ("saved embedding", {HEAD_WEIGHT: torch.ones(10, 8)}, "foreign_tensor"),
        ("tokens", {ROWS: None}, "incomplete"),
        ("tokens", {ROWS: torch.ones(3, 8)}, "bad_shape"),
        ("tokens", {ROWS: torch.ones(2, 6)}, "bad_shape"),
        ("tokens", {ROWS: torch.ones(0, 8)}, "bad_shape"),
        ("tokens", {ROWS: torch.full((2, 8), 3.4028e38)}, "not_finite"),
        ("tokens", {EMBEDDING_WEIGHT: torch.ones(10, 8)}, "foreign_tensor"),
        ("tokens", ON_EMBEDDING, "unsupported_kind"),
        (
            "tokens",
            {ROWS.replace("token_adapter", "token_adapter.base_layer"): torch.ones(2, 8)},
            "foreign_tensor",
        ),
        (
            "targets",
            {A0.replace("s.0", "s.1"): torch.ones(2, 8), B0.replace("s.0", "s.1"): torch.ones(6, 2)},
            "untargeted",
        ),
        ("targets", {A0: None, B0: None}, "incomplete"),
    ],
)
def test_a_kind_with_other_tensors_than_its_own_is_refused(
    tmp_path: Path, kind: str, change: dict[str, torch.Tensor | None], code: str
) -> None:
    fields, tensors = VALID[kind]
    read(write(tmp_path, tensors, **fields))
    changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    assert refusal(write(tmp_path, changed, **fields)).code == code


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"modules_to_save": ["surprise"]}, "unknown_module", "surprise"),
        ({"modules_to_save": [""]}, "unknown_module", "modules_to_save"),
        ({"modules_to_save": ["(a+)+$"]}, "unknown_module", "modules_to_save"),
        ({"modules_to_save": ["orm"]}, "unknown_module", "orm"),
        ({"modules_to_save": ["norm"]}, "unsupported_kind", "means 3 modules"),
        ({"modules_to_save": [Q0]}, "unsupported_kind", "only norms"),
        ({"trainable_token_indices": {"surprise": [1]}}, "unknown_module", "surprise"),
        ({"trainable_token_indices": {Q0: [1]}}, "unsupported_kind", Q0),
        ({"trainable_token_indices": {"embed_tokens": [1], EMBEDDING: [1]}}, "bad_config", "once"),
        ({"trainable_token_indices": [10]}, "incomplete", "trainable_tokens_delta"),
        ({"trainable_token_indices": [10**4000]}, "bad_config", "the vocabulary ends at 9"),
        ({"target_modules": ["q_proj"]}, "incomplete", Q1),
        ({"target_modules": ["k_proj"]}, "untargeted", Q0),
        ({"target_modules": []}, "untargeted", Q0),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "untargeted", Q0),
        ({"rank_pattern": {"q_proj": 4}}, "bad_shape", "rank 4"),
        ({"r": 4}, "bad_shape", "rank 4"),
    ],
    ids=lambda value: f"{value!r:.60}",
)
def test_a_config_that_does_not_fit_the_tensors_or_the_base_is_refused(
    folder: Path, fields: dict[str, Any], code: str, named: str
) -> None:
    error = refusal(write(folder, **fields))
    assert error.code == code
    assert named in str(error)


# ---- a rotten file --------------------------------------------------------------------------


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    save_file({A0: torch.ones(64, 1024)}, path)
    with path.open("rb") as opened:
        file = TensorFile.read_header(opened)
        assert torch.equal(file.tensor(file.entries[0]), torch.ones(64, 1024))
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(AdapterFormatError, match="shorter while it was read"):
            file.tensor(file.entries[0])


def test_written_tensors_lie_at_multiples_of_their_element(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    tensors = {"a": torch.arange(3.0).half(), "b": torch.arange(2.0), "c": torch.arange(5.0).bfloat16()}
    write_tensors(
        path,
        [TensorToWrite(name, t.dtype, tuple(t.shape), lambda t=t: [t]) for name, t in tensors.items()],
    )
    with path.open("rb") as opened:
        entries = TensorFile.read_header(opened).entries
    assert [(one.name, one.offset % one.dtype.itemsize) for one in entries] == [("b", 0), ("a", 0), ("c", 0)]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())


@pytest.mark.parametrize(
    ("starts", "size"),
    [((4, 68), 116), ((0, 68), 116), ((0, 64), 116), ((0, 48), 112), ((64, 64), 112), ((0, 128), 240)],
    ids=["before all", "between", "after all", "overlapping", "on the same bytes", "padded to 128 bytes"],
)
def test_a_file_in_which_bytes_belong_to_no_tensor_or_to_two_is_refused(
    tmp_path: Path, starts: tuple[int, int], size: int
) -> None:
    write(tmp_path)
    header = {A0: entry(starts[0], [2, 8]), B0: entry(starts[1], [6, 2])}
    write_raw(tmp_path, header, b"\0" * size)
    assert refusal(tmp_path).code == "bad_weights"
    write_raw(tmp_path, {A0: entry(0, [2, 8]), B0: entry(64, [6, 2])}, b"\0" * 112)
    assert read(tmp_path).parameters == 28


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "incomplete"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "(a+)+$"},
            "untargeted",
        ),
        ({"target_modules": ["k_proj"], "exclude_modules": "(a+)+$"}, "untargeted"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "bad_config"),
        ({"target_modules": ".*q_proj", "layers_pattern": "layers"}, "bad_config"),
        ({"target_modules": "all-linear", "layers_to_transform": 1}, "bad_config"),
    ],
)
def test_matrices_that_the_config_cannot_mean_are_refused_though_a_field_is_a_regular_expression(
    tmp_path: Path, fields: dict[str, Any], code: str
) -> None:
    assert refusal(write(tmp_path, PAIR, **fields)).code == code


def test_what_the_config_names_and_the_tensors_lack_is_told(tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj", "gate", "up"], "layers_to_transform": [0, 7, 9]}
    assert read(write(tmp_path, PAIR, **fields)).warnings == (
        "target_modules names gate, up, of which the adapter has no tensors.",
        "layers_to_transform names 7, 9, of which the adapter has no tensors.",
    )
    agreeing = {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "(a+)+$"}
    assert read(write(tmp_path, PAIR, **agreeing)).warnings == ()
    assert read(write(tmp_path, PAIR, target_modules=".*")).warnings == ()


def test_an_invocation_has_tokens_of_the_base_and_acts_on_linear_layers_alone(tmp_path: Path) -> None:
    spec = read(write(tmp_path, alora_invocation_tokens=[9, 0, 9]))
    assert (spec.invocation, spec.kinds) == ((9, 0, 9), ["alora"])
    unknown = refusal(write(tmp_path, alora_invocation_tokens=[3, 10]))
    assert (unknown.code, "tokens 0 to 9" in str(unknown)) == ("bad_config", True)
    of_embedding = {
        f"{PREFIX}{EMBEDDING}.lora_embedding_A": torch.ones(2, 10),
        f"{PREFIX}{EMBEDDING}.lora_embedding_B": torch.ones(8, 2),
    }
    everywhere = refusal(write(tmp_path, PAIR | of_embedding, alora_invocation_tokens=[3]))
    assert (everywhere.code, EMBEDDING in str(everywhere)) == ("unsupported_kind", True)
