"""Tensors of the base in an adapter's file: left out where they are the base's own, otherwise refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters.format_support import (
    BASE,
    EMBEDDING,
    HEAD,
    LAYERS,
    NORM,
    PAIR,
    PREFIX,
    Q0,
    TIED,
    read,
    refusal,
    write,
)

from onebase_engine.base.layers import LayerShape

HEAD_WEIGHT, EMBEDDING_WEIGHT = f"{PREFIX}{HEAD}.weight", f"{PREFIX}{EMBEDDING}.weight"
NORM_BIAS = f"{PREFIX}{NORM}.bias"
ON_EMBEDDING = {
    f"{PREFIX}{EMBEDDING}.lora_embedding_A": torch.ones(2, 10),
    f"{PREFIX}{EMBEDDING}.lora_embedding_B": torch.ones(8, 2),
}
ON_HEAD = {
    f"{PREFIX}{HEAD}.lora_A.weight": torch.ones(2, 8),
    f"{PREFIX}{HEAD}.lora_B.weight": torch.ones(10, 2),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [f"{HEAD}.weight", f"{HEAD}.base_layer.weight", f"{NORM}.bias"])
def test_a_tensor_that_is_the_base_s_own_is_left_out(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    own = BASE[name.replace(".base_layer", "")].to(dtype)
    spec = read(write(tmp_path, {**PAIR, f"{PREFIX}{name}": own}))
    assert spec.dropped == (f"{PREFIX}{name}",)
    assert spec.parameters == 28


def test_a_tied_head_in_the_file_is_compared_with_the_embedding(tmp_path: Path) -> None:
    for name in (EMBEDDING_WEIGHT, HEAD_WEIGHT):
        write(tmp_path, {**PAIR, name: BASE[f"{EMBEDDING}.weight"]})
        assert read(tmp_path, base=TIED).dropped == (name,)
    write(tmp_path, {**PAIR, HEAD_WEIGHT: BASE[f"{HEAD}.weight"]})
    assert refusal(tmp_path, base=TIED).code == "foreign_tensor"
    read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor + 1,
        lambda tensor: tensor.reshape(8, 10),
        lambda tensor: torch.cat([tensor.flatten()[:-1], torch.tensor([5.0])]).bfloat16().reshape(10, 8),
    ],
)
def test_a_tensor_that_only_resembles_the_base_s_is_refused(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    write(tmp_path, {**PAIR, HEAD_WEIGHT: change(BASE[f"{HEAD}.weight"])})
    assert refusal(tmp_path).code == "foreign_tensor"


def test_minus_zero_is_not_the_base_s_zero(tmp_path: Path) -> None:
    write(tmp_path, {**PAIR, NORM_BIAS: -torch.zeros(8)})
    assert refusal(tmp_path).code == "foreign_tensor"


def test_a_quantized_weight_is_never_the_base_s_own(tmp_path: Path) -> None:
    write(tmp_path, {**PAIR, f"{PREFIX}{Q0}.base_layer.weight": torch.ones(24, 1)})
    assert refusal(tmp_path).code == "foreign_tensor"


def test_a_long_tensor_is_compared_to_its_last_element(tmp_path: Path) -> None:
    base = {**BASE, f"{HEAD}.weight": torch.zeros(3, 1 << 20)}
    own = torch.zeros(3, 1 << 20)
    read(write(tmp_path, {**PAIR, HEAD_WEIGHT: own}), base=base)
    own[-1, -1] = 1
    assert refusal(write(tmp_path, {**PAIR, HEAD_WEIGHT: own}), base=base).code == "foreign_tensor"


@pytest.mark.parametrize("saved", [True, False])
def test_ensured_weight_tying_with_two_unlike_sides_is_refused(tmp_path: Path, saved: bool) -> None:
    base = {**TIED, f"{EMBEDDING}.weight": torch.ones(10, 8)}
    fields: dict[str, Any] = {"ensure_weight_tying": True, "target_modules": ["embed_tokens"]}
    tensors, changed = {**ON_EMBEDDING, **ON_HEAD}, f"{PREFIX}{HEAD}.lora_B.weight"
    if saved:
        fields = {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}
        tensors, changed = {EMBEDDING_WEIGHT: torch.ones(10, 8), HEAD_WEIGHT: torch.ones(10, 8)}, HEAD_WEIGHT
    read(write(tmp_path, tensors, **fields), base=base)
    one_side = {name: tensor for name, tensor in tensors.items() if HEAD not in name}
    assert refusal(write(tmp_path, one_side, **fields), base=base).code == "incomplete"
    unlike = {**tensors, changed: tensors[changed] * 2}
    error = refusal(write(tmp_path, unlike, **fields), base=base)
    assert (error.code, "ensure_weight_tying" in str(error)) == ("unsupported_kind", True)


def test_long_tied_tensors_are_compared_to_their_last_element(tmp_path: Path) -> None:
    layers = {**LAYERS, EMBEDDING: LayerShape(3000, 1024, "embedding"), HEAD: LayerShape(1024, 3000)}
    base = {**TIED, f"{EMBEDDING}.weight": torch.ones(3000, 1024)}
    fields: dict[str, Any] = {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}
    rows = torch.randn(3000, 1024, generator=torch.Generator().manual_seed(0))
    write(tmp_path, {EMBEDDING_WEIGHT: rows, HEAD_WEIGHT: rows.clone()}, **fields)
    assert {module.name for module in read(tmp_path, layers=layers, base=base).modules} == {EMBEDDING, HEAD}
    head = rows.clone()
    head[-1, -1] += 1
    write(tmp_path, {EMBEDDING_WEIGHT: rows, HEAD_WEIGHT: head}, **fields)
    assert refusal(tmp_path, layers=layers, base=base).code == "unsupported_kind"


def test_one_side_of_a_tied_pair_is_incomplete_even_where_the_targets_are_a_regular_expression(
    tmp_path: Path,
) -> None:
    fields: dict[str, Any] = {"ensure_weight_tying": True, "target_modules": ".*embed.*"}
    for one_side in (ON_EMBEDDING, ON_HEAD):
        assert refusal(write(tmp_path, one_side, **fields), base=TIED).code == "incomplete"
        read(write(tmp_path, one_side, **fields))
    read(write(tmp_path, {**ON_EMBEDDING, **ON_HEAD}, **fields), base=TIED)
