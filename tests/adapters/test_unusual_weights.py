"""What stands out in an adapter is told with figures: planted changes are, trained adapters are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tests.tiny import _SIZES, ATTENTION, MLP
from torch import nn

from onebase_adapters.proof.extract import extract
from onebase_adapters.proof.unusual_weights import MOST_SAID, measure, unusual
from onebase_engine.base.view import peft_view
from onebase_engine.kernels.weights import AdapterWeights, LoraWeights, SavedModule, TokenRows

KINDS: dict[str, dict[str, Any]] = {
    "everywhere": {"r": 8, "target_modules": [*ATTENTION, *MLP]},
    "rank 1": {"r": 1, "target_modules": ATTENTION},
    "rank 64": {"r": 64, "target_modules": MLP, "use_rslora": True},
    "dora": {"r": 8, "target_modules": ATTENTION, "use_dora": True},
    "bias": {"r": 8, "target_modules": ATTENTION, "lora_bias": True},
    "head": {"r": 8, "target_modules": ["q_proj", "lm_head"]},
    "embedding": {"r": 8, "target_modules": ["q_proj", "embed_tokens"]},
    "saved head": {"r": 8, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved norms": {"r": 8, "target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
    "tokens": {"r": 8, "target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**_SIZES, "num_hidden_layers": 6}, tie_word_embeddings=False)
    model: nn.Module = tf.AutoModelForCausalLM.from_config(config).eval()
    return model.requires_grad_(False)


def trained(base: nn.Module, fields: dict[str, Any], steps: int = 8) -> AdapterWeights:
    """What PEFT makes of a kind in a few real steps of training on a made-up language."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, **fields)
    model: Any = get_peft_model(peft_view(base), config, adapter_name="version")
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-3)
    for _ in range(steps):
        start = torch.randint(5, 300, (4, 1))
        rows = (start + torch.arange(24) * 3) % 300
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    return extract(model, "version")


def changed(weights: AdapterWeights, name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    made = dict(weights)
    made[name] = change(copy.deepcopy(weights[name]))
    return made


def told(weights: AdapterWeights, base: nn.Module) -> list[str]:
    return unusual(measure(weights, base))


DOWN = "model.layers.3.mlp.down_proj"


@pytest.fixture(scope="module")
def everywhere(base: nn.Module) -> AdapterWeights:
    return trained(base, KINDS["everywhere"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_freshly_trained_adapter_has_nothing_that_stands_out(base: nn.Module, kind: str) -> None:
    for steps in (1, 8):
        assert told(trained(base, KINDS[kind], steps), base) == []


def test_modules_that_were_never_trained_do_not_stand_out_nor_make_others_do_so(
    base: nn.Module, everywhere: AdapterWeights
) -> None:
    def untrained(weights: LoraWeights) -> LoraWeights:
        return replace(weights, b=torch.zeros_like(weights.b))

    weights = everywhere
    for name in list(weights)[::2]:
        weights = changed(weights, name, untrained)
    assert told(weights, base) == []
    assert told(trained(base, KINDS["everywhere"], 0), base) == []


def test_the_figures_are_those_of_what_is_added(base: nn.Module, everywhere: AdapterWeights) -> None:
    weights: Any = everywhere[DOWN]
    product = weights.scale * weights.b.double() @ weights.a.double()
    found = measure(everywhere, base)[DOWN]
    assert found.norm == pytest.approx(float(product.norm()), rel=1e-6)
    assert found.spectral == pytest.approx(float(torch.linalg.matrix_norm(product, 2)), rel=1e-6)
    weight: Any = base.get_submodule(DOWN).weight
    assert found.relative == pytest.approx(float(product.norm() / weight.norm()), rel=0.2)


def test_a_layer_of_thirty_times_the_norm_is_told(base: nn.Module, everywhere: AdapterWeights) -> None:
    weights = changed(everywhere, DOWN, lambda one: replace(one, b=one.b * 30))
    (sentence,) = [one for one in told(weights, base) if "median" in one]
    assert sentence.startswith(f"{DOWN}: norm ")
    times = float(sentence.split(" is ")[1].split(" times")[0])
    assert 10 < times < 90


def test_a_spike_in_one_direction_is_told(base: nn.Module, everywhere: AdapterWeights) -> None:
    usual = measure(everywhere, base)[DOWN].norm

    def spiked(one: LoraWeights) -> LoraWeights:
        row, column = torch.randn(one.a.shape[1]), torch.randn(one.b.shape[0])
        a, b = one.a.clone(), one.b.clone()
        a[0], b[:, 0] = row / row.norm(), 4.5 * usual / one.scale * column / column.norm()
        return replace(one, a=a, b=b)

    (sentence,) = told(changed(everywhere, DOWN, spiked), base)
    assert sentence.startswith(f"{DOWN}: norm ")
    assert "times the median of its name, and 9" in sentence
    assert "% of its energy is in one direction of 8" in sentence


@pytest.mark.parametrize(("kind", "name"), [("head", "lm_head"), ("embedding", "model.embed_tokens")])
def test_a_change_to_the_row_of_one_token_is_told(base: nn.Module, kind: str, name: str) -> None:
    def targeted(one: LoraWeights) -> LoraWeights:
        rows = (one.b if kind == "head" else one.a).clone()
        rows[77] += 40 * rows.norm(dim=1).mean()
        return replace(one, **{"b" if kind == "head" else "a": rows})

    weights = changed(trained(base, KINDS[kind]), name, targeted)
    assert any(
        one.startswith(f"{name}: ") and one.endswith("% of what it adds is on the row of one token, 77")
        for one in told(weights, base)
    )


def test_replaced_rows_and_modules_far_from_the_bases_are_told(base: nn.Module) -> None:
    def far(one: SavedModule) -> SavedModule:
        weight = one.weight.clone()
        weight[9] += 50
        return SavedModule(weight)

    found = told(changed(trained(base, KINDS["saved head"]), "lm_head", far), base)
    assert "lm_head: 100% of what it adds is on the row of one token, 9" in found
    assert any("times the norm of the base's weight" in one for one in found)

    def long(one: TokenRows) -> TokenRows:
        return replace(one, rows=one.rows * torch.tensor([[1.0], [40.0]]))

    (sentence,) = told(changed(trained(base, KINDS["tokens"]), "model.embed_tokens", long), base)
    assert sentence.startswith("model.embed_tokens: the row of token 5 is ")


def test_one_module_that_alone_acts_and_large_magnitudes_are_told(base: nn.Module) -> None:
    weights: AdapterWeights = trained(base, KINDS["everywhere"], 0)
    weights = changed(weights, DOWN, lambda one: replace(one, b=torch.full_like(one.b, 1e-3)))
    assert told(weights, base) == [f"{DOWN} alone changes anything, of 6 modules of its name"]
    name = "model.layers.1.self_attn.q_proj"
    loud = changed(trained(base, KINDS["dora"]), name, lambda one: replace(one, gain=one.gain * 9))
    assert any(one.startswith(f"{name}: its magnitudes make an output 9") for one in told(loud, base))


def test_what_stands_out_is_told_up_to_a_number(base: nn.Module, everywhere: AdapterWeights) -> None:
    weights: AdapterWeights = {
        name: replace(one, b=one.b * 1e5) for name, one in everywhere.items() if isinstance(one, LoraWeights)
    }
    found = told(weights, base)
    assert len(found) == MOST_SAID + 1
    assert found[-1] == f"and {len(weights) - MOST_SAID} more of the kind"
