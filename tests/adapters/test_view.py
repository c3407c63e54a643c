"""A view is another tree of modules over the same memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from onebase_engine.base.load import base_bytes, base_tensors, fingerprint
from onebase_engine.base.view import view

pytestmark = pytest.mark.parametrize("kind", ["nf4", "int8", "none"])

STATISTICS = {
    "nf4": {"absmax", "code", "offset", "nested_absmax", "nested_code"},
    "int8": {"state_CB", "state_SCB"},
    "none": set(),
}


def test_a_view_shares_every_tensor(kind: str, bases: dict[str, nn.Module]) -> None:
    base = bases[kind]
    mine, theirs = base_tensors(base), base_tensors(view(base))
    assert mine.keys() == theirs.keys()
    assert {name.rpartition("#")[2] for name in mine if "#" in name} == STATISTICS[kind]
    assert "model.rotary_emb.inv_freq" in mine
    assert all(theirs[name] is tensor for name, tensor in mine.items())


def test_a_view_takes_no_memory_for_tensors(kind: str, bases: dict[str, nn.Module]) -> None:
    base = bases[kind]
    both = nn.ModuleList([base, view(base), view(base)])
    assert base_bytes(both) == base_bytes(base) > 0
    # Nor in a tensor that hangs anywhere else in the tree, whatever it is called.
    assert _storages(both) == _storages(base)


def test_a_view_gives_the_bases_logits_and_leaves_it_alone(
    kind: str, bases: dict[str, nn.Module], tokens: torch.Tensor
) -> None:
    base = bases[kind]
    before = fingerprint(base)
    with torch.inference_mode():
        expected = base(tokens).logits
        assert torch.equal(view(base)(tokens).logits, expected)
        assert torch.equal(base(tokens).logits, expected)
    assert fingerprint(base) == before


def test_a_module_replaced_in_a_view_stays_in_the_base(
    kind: str, bases: dict[str, nn.Module], tokens: torch.Tensor
) -> None:
    base: Any = bases[kind]
    with torch.inference_mode():
        expected = base(tokens).logits
        other: Any = view(base)
        assert other.config is not base.config
        other.model.layers[0].mlp = nn.Identity()
        other.lm_head = nn.Linear(128, 3, dtype=torch.bfloat16)
        other.config.use_cache = not base.config.use_cache
        assert other(tokens).logits.shape[-1] == 3
        assert torch.equal(base(tokens).logits, expected)
    assert other.config.use_cache != base.config.use_cache


def _storages(module: nn.Module) -> set[int]:
    """Storages of all tensors reachable from the modules' attributes, some levels deep."""
    found: set[int] = set()

    def walk(value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            found.add(value.untyped_storage().data_ptr())
        if isinstance(value, dict):
            children = list(value.values())
        elif isinstance(value, list | tuple):
            children = list(value)
        else:
            children = list(getattr(value, "__dict__", {}).values())
        if depth:
            for child in children:
                walk(child, depth - 1)

    for part in module.modules():
        walk(part, 4)
    return found - {0}
