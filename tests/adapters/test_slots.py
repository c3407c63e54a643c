"""Slots against PEFT's own modules, and rows against their neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from tests.rows import row_map
from tests.tiny import load_folder
from torch import nn

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.base.view import view
from onebase_engine.kernels.interface import TILE
from onebase_engine.kernels.reference import ReferenceKernels
from onebase_engine.kernels.weights import AdapterWeights, LoraWeights
from onebase_engine.lora.module import StepRows
from onebase_engine.lora.slots import AdapterSlots, SlotEmbedding, SlotLinear, SlotModule, wrap_layers

SLOTS = 4
HIDDEN, OUT = 128, 256
LAYER = "model.layers.0.mlp.gate_proj"


def lora(rank: int, seed: int, scale: float = 2.0, size_in: int = HIDDEN, size_out: int = OUT) -> LoraWeights:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, size_in, generator=draw), torch.randn(size_out, rank, generator=draw)
    return LoraWeights(a * 0.1, b * 0.1, scale)


def rows(count: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def load(base: nn.Module, folder: Path) -> AdapterWeights:
    return load_folder(base, folder).weights


def layer(base: nn.Module, tiled: bool = True) -> SlotLinear:
    return SlotLinear(view(base).get_submodule(LAYER), StepRows(), ReferenceKernels(tiled=tiled), slots=SLOTS)


@torch.inference_mode()
def run(
    module: SlotModule, x: torch.Tensor, mixes: Sequence[Mapping[int, float]] = (), start: int = 0
) -> torch.Tensor:
    """Row `start + i` has the adapters `mixes[i]`: slot to weight."""
    module.step.tokens = row_map(mixes, start)
    return module(x)


def peft_layer(base: nn.Module, folder: Path, name: str) -> Any:
    return PeftModel.from_pretrained(view(base), str(folder)).eval().base_model.model.get_submodule(name)


# ---- equal to PEFT --------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8", "none", "fp32"])
def test_a_tile_is_bit_equal_to_peft(
    kind: str, use_rslora: bool, bases: dict[str, nn.Module], save_adapter: Any
) -> None:
    base = bases[kind]
    folder = save_adapter(r=12, lora_alpha=20, use_rslora=use_rslora)
    module = layer(base)
    module.put(1, load(base, folder)[LAYER])
    x = rows(TILE, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
    with torch.inference_mode():
        expected = peft_layer(base, folder, LAYER)(x)
        bare = base.get_submodule(LAYER)(x)
    got = run(module, x, [{1: 1.0}] * TILE)
    assert torch.equal(got, expected)
    assert not torch.equal(got, bare)
    assert got.dtype == expected.dtype


@pytest.mark.parametrize("kind", ["nf4", "int8", "none", "fp32"])
def test_rows_without_an_adapter_are_the_bases(kind: str, bases: dict[str, nn.Module]) -> None:
    module = layer(bases[kind])
    module.put(0, lora(8, 1))
    x = rows(TILE, dtype=torch.float32 if kind == "fp32" else torch.bfloat16)
    with torch.inference_mode():
        bare = bases[kind].get_submodule(LAYER)(x)
    assert torch.equal(run(module, x), bare)
    half = run(module, x, [{0: 1.0} if i % 2 else {} for i in range(TILE)])
    assert torch.equal(half[::2], bare[::2])
    assert not (half[1::2] == bare[1::2]).all(dim=1).any()


@pytest.mark.parametrize("alpha", [16, 20], ids=["scale 2", "scale 2.5"])
def test_a_whole_wrapped_model_is_bit_equal_to_peft(base: nn.Module, save_adapter: Any, alpha: int) -> None:
    targets = ["q_proj", "o_proj", "down_proj", "lm_head", "embed_tokens"]
    folder = save_adapter(target_modules=targets, lora_alpha=alpha)
    ids = torch.randint(0, 256, (1, TILE), generator=torch.Generator().manual_seed(5))
    served, step = view(base), StepRows()
    modules = wrap_layers(served, step, ReferenceKernels(), slots=SLOTS)
    adapter_slots = AdapterSlots(modules, SLOTS, torch.device("cpu"))
    adapter_slots.load(2, load(base, folder))
    step.tokens = step.logits = row_map([{2: 1.0}] * TILE)
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(view(base), str(folder)).eval()(ids).logits
        assert torch.equal(served(ids).logits, expected)
        adapter_slots.clear(2)
        assert torch.equal(served(ids).logits, base(ids).logits)


# ---- rows and their neighbours --------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nf4", "none", "fp32"])
def test_a_row_is_the_same_beside_any_neighbours_and_in_any_slot(
    kind: str, bases: dict[str, nn.Module]
) -> None:
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    mine, row = lora(8, 1), rows(1, seed=9, dtype=dtype)
    alone = layer(bases[kind])
    alone.put(0, mine)
    padding = torch.zeros(TILE - 1, HIDDEN, dtype=dtype)
    expected = run(alone, torch.cat([row, padding]), [{0: 1.0}])[0]

    for slot, place in ((0, 0), (3, 17), (1, TILE - 1)):
        crowded = layer(bases[kind])
        for other in set(range(SLOTS)) - {slot}:
            crowded.put(other, lora(4 * (other + 1), 10 + other, scale=3.0))
        crowded.put(slot, mine)
        x = rows(3 * TILE, seed=slot + 20, dtype=dtype)
        x[TILE + place] = row[0]
        mixes = [{i % SLOTS: 1.0} if i % 5 else {0: 0.5, 3: 2.0} for i in range(TILE)]
        mixes[place] = {slot: 1.0}
        got = run(crowded, x, [{2: 1.0}] * TILE + mixes)
        assert torch.equal(got[TILE + place], expected)


@pytest.mark.parametrize("tiled", [True, False])
def test_an_adapter_that_overflows_changes_no_other_row(tiled: bool, base: nn.Module) -> None:
    module, x = layer(base, tiled), rows(8)
    for slot in range(3):
        module.put(slot, lora(8, slot))
    mixes: list[dict[int, float]] = [
        {0: 1.0},
        {1: 1.0},
        {2: 1.0},
        {},
        {0: 0.5, 2: 0.5},
        {1: 1.0},
        {},
        {2: 1.0},
    ]
    before = run(module, x, mixes)
    module.put(1, LoraWeights(torch.full((8, HIDDEN), float("inf")), torch.ones(OUT, 8), 2.0))
    after = run(module, x, mixes)
    mine = torch.tensor([1 in mix for mix in mixes])
    assert torch.equal(after[~mine], before[~mine])
    assert not torch.isfinite(after[mine]).any()


# ---- the accelerator's path -----------------------------------------------------------------

MIXES: list[dict[int, float]] = [
    {0: 1.0},
    {1: 1.0},
    {},
    {2: 1.0},
    {0: 0.25, 1: 0.75},
    {0: 1.0, 1: -0.5, 2: 2.0, 3: 1.0},
    {3: 1.0},
    {2: 1.5},
]


@pytest.mark.parametrize("order", [[4, 8, 16, 3], [16, 8, 3, 4], [8, 8, 8, 8]], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "none", "fp32"])
def test_products_in_the_shape_of_the_step_give_what_tiles_give(
    kind: str, order: list[int], bases: dict[str, nn.Module]
) -> None:
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    untiled, tiled, x = layer(bases[kind], False), layer(bases[kind]), rows(12, dtype=dtype)
    for slot, rank in enumerate(order):
        for module in (untiled, tiled):
            module.put(slot, lora(rank, slot, scale=0.5 + slot))
    mixes = [*MIXES, *MIXES[:3]]
    got, bare = run(untiled, x, mixes, start=1), run(untiled, x)
    _close(got, run(tiled, x, mixes, start=1))
    assert torch.equal(got[[0, 3, 11]], bare[[0, 3, 11]])
    assert not torch.equal(got[1], bare[1])


def test_folding_the_scale_changes_no_bit() -> None:
    weights, x = lora(8, 0), torch.randn(TILE, HIDDEN)
    before = (x @ weights.a.T @ weights.b.T) * weights.scale
    folded = weights.folded()
    assert torch.equal(x @ folded.a.T @ folded.b.T, before)
    assert lora(8, 0, scale=1.5).folded().scale == 1.5
    huge = LoraWeights(weights.a, weights.b * 1e38, 2.0**8)
    assert huge.folded().scale == 256.0, "B must stay finite"


def test_a_slot_overwritten_counts_once(base: nn.Module) -> None:
    module = layer(base)
    module.put(0, lora(4, 1))
    module.put(0, lora(4, 2))
    assert module.filled == {0}
    module.put(0, None)
    module.put(0, None)
    assert not module.filled


# ---- weighted sums --------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.25), (2.0, 0.75)])
@pytest.mark.parametrize("tiled", [True, False])
def test_weighted_sums_are_peft_s_cat(
    weights: tuple[float, float], tiled: bool, bases: dict[str, nn.Module], save_adapter: Any
) -> None:
    base = bases["fp32"]
    folders = [save_adapter(seed=1, r=8), save_adapter(seed=2, r=4, lora_alpha=12)]
    model: Any = PeftModel.from_pretrained(view(base), str(folders[0]), adapter_name="one")
    model.load_adapter(str(folders[1]), adapter_name="two")
    model.add_weighted_adapter(["one", "two"], list(weights), "sum", combination_type="cat")
    model.set_adapter("sum")
    x = rows(TILE, dtype=torch.float32)
    with torch.inference_mode():
        expected = model.eval().base_model.model.get_submodule(LAYER)(x)
    module = layer(base, tiled)
    for slot, folder in enumerate(folders):
        module.put(slot, load(base, folder)[LAYER])
    mixes = [{0: weights[0], 1: weights[1]}] * TILE
    got = run(module, x, mixes)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - run(module, x)).abs().max() > 0.01


# ---- embeddings -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """Gemma 3 multiplies its embeddings by a constant, and PEFT the adapter's part as well."""
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 64, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = tf.Gemma3TextConfig(vocab_size=256, **sizes, **heads)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gemma")
    tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return load_base(BaseSettings(folder=folder))


@pytest.mark.parametrize("family", ["llama", "gemma"])
@pytest.mark.parametrize("tiled", [True, False])
def test_an_embedding_is_equal_to_peft(
    family: str, tiled: bool, base: nn.Module, gemma: nn.Module, tmp_path: Path
) -> None:
    model: Any = base if family == "llama" else gemma
    settings = LoraConfig(r=6, lora_alpha=9, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    theirs: Any = get_peft_model(view(model), settings)
    for seed, (name, parameter) in enumerate(theirs.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    name = "model.embed_tokens"
    module = SlotEmbedding(view(model).get_submodule(name), StepRows(), ReferenceKernels(tiled=tiled))
    module.put(3, load(model, tmp_path)[name])
    ids = torch.arange(TILE)
    mixes: list[dict[int, float]] = [{3: 1.0} if i % 3 else {} for i in range(TILE)]
    got = run(module, ids, mixes)
    with torch.inference_mode():
        expected = theirs.eval().base_model.model.get_submodule(name)(ids).to(got.dtype)
        bare = model.get_submodule(name)(ids)
    mine = torch.tensor([bool(mix) for mix in mixes])
    assert torch.equal(got[mine], expected[mine])
    assert torch.equal(got[~mine], bare[~mine])
    assert not torch.equal(expected, bare)


def _close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the order of fp32 sums, or for bf16 outputs one last bit."""
    bits = 1e-5 if got.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, expected, rtol=bits, atol=bits)
