"""Every kind of adapter against PEFT's own modules, alone and in mixed tiles, bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.adapters.kinds import KINDS, TOKENS, peft_adapter, weights_of
from tests.matrix import matrix
from tests.rows import owned, row_map
from tests.tiny import save_base
from torch import nn
from torch.nn import functional

from onebase_adapters.proof.modules import peft_output
from onebase_adapters.proof.texts import activation_options
from onebase_engine.base.load import BaseSettings, fingerprint, load_base
from onebase_engine.base.view import view
from onebase_engine.kernels.interface import TILE, RowMap
from onebase_engine.kernels.reference import ReferenceKernels
from onebase_engine.kernels.weights import LoraWeights, SavedModule, TokenRows, composable, invocation_of
from onebase_engine.lora import linear as token_head
from onebase_engine.lora.linear import TokenHead
from onebase_engine.lora.module import StepRows
from onebase_engine.lora.slots import AdapterSlots, SlotEmbedding, SlotLinear, SlotNorm, wrap_layers

PRECISIONS: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": "nf4", "dtype": torch.bfloat16},
    "int8": {"quantization": "int8", "dtype": torch.bfloat16},
    "bf16": {"quantization": "none", "dtype": torch.bfloat16},
    "fp32": {"quantization": "none", "dtype": torch.float32},
}

# A tied head; biases on q, k and v; scaled embeddings; fused layers.
BASES = [f"{a} {p}" for a in ("llama", "qwen2", "gemma3", "phi3") for p in PRECISIONS]
IN_NF4 = [one for one in BASES if one.endswith("nf4")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], nn.Module]:
    known: dict[tuple[str, str], nn.Module] = {}
    logging.getLogger("transformers").setLevel(logging.ERROR)

    def load(architecture: str, precision: str) -> nn.Module:
        if (architecture, precision) not in known:
            folder = save_base(architecture, tmp_path_factory.mktemp(architecture))
            base: Any = load_base(BaseSettings(folder, **PRECISIONS[precision]))
            with torch.no_grad():
                for name, parameter in base.named_parameters():
                    if name.endswith("bias"):
                        parameter.normal_(generator=torch.Generator().manual_seed(1))
            known[architecture, precision] = base
        return known[architecture, precision]

    return load


class Bench:
    """A wrapped view of the base, and PEFT's models of the adapters in its slots."""

    def __init__(self, base: nn.Module, kinds: list[str], *, tiled: bool = True) -> None:
        self.base = base
        self.before = fingerprint(base)
        self.references: list[Any] = [peft_adapter(base, kind, i + 1) for i, kind in enumerate(kinds)]
        self.step = StepRows()
        self.served: Any = view(base)
        self.modules = wrap_layers(self.served, self.step, ReferenceKernels(tiled=tiled), slots=len(kinds))
        self.adapter_slots = AdapterSlots(self.modules, len(kinds), torch.device("cpu"))
        self.weights = [weights_of(model) for model in self.references]
        for slot, weights in enumerate(self.weights):
            self.adapter_slots.load(slot, weights)

    def input(self, name: str, seed: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(seed)
        module = self.modules[name]
        if name.endswith("embed_tokens"):
            ids = torch.randint(0, 320, (1, TILE), generator=draw)
            ids[0, ::3] = torch.tensor(TOKENS)[torch.randint(0, len(TOKENS), (11,), generator=draw)]
            return ids
        size = module.weight.shape[0] if isinstance(module, SlotNorm) else module.base.in_features
        dtype = self.served.get_output_embeddings().weight.dtype
        return torch.randn(1, TILE, size, generator=draw).to(dtype)

    @torch.inference_mode()
    def expected(self, name: str, x: torch.Tensor, slot: int | None) -> torch.Tensor:
        if slot is None:
            return self.base.get_submodule(name)(x)[0]  # type: ignore[no-any-return]
        module = self.references[slot].get_base_model().get_submodule(name)
        return peft_output(module, self.weights[slot].get(name), x)[0]

    @torch.inference_mode()
    def run(self, name: str, x: torch.Tensor, rows: RowMap) -> torch.Tensor:
        self.step.tokens = self.step.logits = rows
        return self.modules[name](x)[0]  # type: ignore[no-any-return]


def one_slot(slot: int) -> RowMap:
    return owned([slot] * TILE)


# ---- each kind alone ------------------------------------------------------------------------


@pytest.mark.parametrize(("on", "kind"), matrix(BASES, KINDS, usual=IN_NF4))
def test_every_module_of_every_kind_is_bit_equal_to_peft(on: str, kind: str, bases: Any) -> None:
    bench = Bench(bases(*on.split()), [kind])
    changed = set()
    for seed, name in enumerate(bench.modules):
        x = bench.input(name, seed)
        expected, bare = bench.expected(name, x, 0), bench.expected(name, x, None)
        assert torch.equal(bench.run(name, x, one_slot(0)), expected), name
        assert torch.equal(bench.run(name, x, RowMap()), bare), name
        if not torch.equal(expected, bare):
            changed.add(name)
    assert changed == set(bench.weights[0]), "each module that has weights acts, and no other"
    assert fingerprint(bench.base) == bench.before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_whole_model_is_bit_equal_to_peft_until_its_slot_is_cleared(
    precision: str, kind: str, bases: Any
) -> None:
    bench = Bench(bases("llama", precision), [kind])
    ids = torch.randint(0, 320, (1, TILE), generator=torch.Generator().manual_seed(5))
    ids[0, ::5] = TOKENS[1]
    bench.step.tokens = bench.step.logits = one_slot(0)
    with torch.inference_mode():
        everywhere = activation_options(0 if invocation_of(bench.weights[0]) else None, 0, TILE)
        expected, bare = bench.references[0](ids, **everywhere).logits, bench.base(ids).logits
        assert torch.equal(bench.served(ids).logits, expected)
        assert not torch.equal(expected, bare)
        bench.adapter_slots.clear(0)
        assert torch.equal(bench.served(ids).logits, bare)
    assert not any(module.filled or module.replacements for module in bench.modules.values())


def test_only_adapters_that_merely_add_compose(bases: Any) -> None:
    base = bases("llama", "nf4")
    found = {kind for kind in KINDS if composable(weights_of(peft_adapter(base, kind, 1)))}
    assert found == {"lora", "rslora", "head", "embedding"}


# ---- mixed tiles ----------------------------------------------------------------------------

ALL = list(KINDS)
OWNERS = st.lists(st.none() | st.integers(0, len(ALL) - 1), min_size=TILE, max_size=TILE)


@pytest.fixture(
    scope="module", params=[("llama", "nf4"), ("llama", "fp32"), ("qwen2", "bf16"), ("gemma3", "int8")]
)
def crowd(request: pytest.FixtureRequest, bases: Any) -> Bench:
    """One adapter of every kind, each in a slot of the same base."""
    return Bench(bases(*request.param), ALL)


@settings(max_examples=15)
@given(owners=OWNERS, seed=st.integers(0, 1000))
def test_each_row_of_any_mixture_equals_peft_alone(crowd: Bench, owners: list[int | None], seed: int) -> None:
    rows = owned(owners)
    for name in crowd.modules:
        x = crowd.input(name, seed)
        got = crowd.run(name, x, rows)
        for slot in set(owners):
            mine = torch.tensor([owner == slot for owner in owners])
            assert torch.equal(got[mine], crowd.expected(name, x, slot)[mine]), (name, slot)


PLAIN = [slot for slot, kind in enumerate(ALL) if kind in ("lora", "rslora", "head", "embedding")]
SUMS = st.dictionaries(st.sampled_from(PLAIN), st.floats(-2, 2, width=32).filter(bool), min_size=1)
MIXES = st.lists(
    st.just({}) | st.integers(0, len(ALL) - 1).map(lambda slot: {slot: 1.0}) | SUMS,
    min_size=TILE,
    max_size=TILE,
)


@settings(max_examples=10)
@given(mixes=MIXES, row=st.integers(0, TILE - 1), seed=st.integers(0, 1000))
def test_a_weighted_row_has_the_same_bits_beside_rows_of_any_kind(
    crowd: Bench, mixes: list[dict[int, float]], row: int, seed: int
) -> None:
    lonely: list[dict[int, float]] = [{} for _ in mixes]
    lonely[row] = mixes[row]
    for name in crowd.modules:
        x = crowd.input(name, seed)
        crowded = crowd.run(name, x, row_map(mixes))[row]
        assert torch.equal(crowded, crowd.run(name, x, row_map(lonely))[row]), name


@settings(max_examples=10)
@given(owners=OWNERS, seed=st.integers(0, 1000))
def test_each_row_in_the_shape_of_the_step_is_peft_s_up_to_rounding(
    accelerator: Bench, owners: list[int | None], seed: int
) -> None:
    rows = owned(owners)
    for name in accelerator.modules:
        x = accelerator.input(name, seed)
        got = accelerator.run(name, x, rows)
        for slot in set(owners):
            mine = torch.tensor([owner == slot for owner in owners])
            expected = accelerator.expected(name, x, slot)[mine]
            torch.testing.assert_close(got[mine], expected, rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def accelerator(bases: Any) -> Bench:
    return Bench(bases("llama", "fp32"), ALL, tiled=False)


@pytest.mark.parametrize("tiled", [True, False], ids=["tiled", "untiled"])
@pytest.mark.parametrize(
    "broken", [k for k in KINDS if k not in ("rslora", "bias odd scale", "dora odd scale")]
)
def test_what_overflows_in_one_kind_reaches_no_other_row(broken: str, tiled: bool, bases: Any) -> None:
    kinds = [broken, "lora", "dora", "bias", "tokens", "saved norms"]
    bench = Bench(bases("llama", "fp32"), kinds, tiled=tiled)
    owners: list[int | None] = [None if i % 7 == 6 else i % 7 for i in range(TILE)]
    rows = owned(owners)
    mine = torch.tensor([owner == 0 for owner in owners])
    for seed, name in enumerate(bench.weights[0]):
        module, x = bench.modules[name], bench.input(name, seed)
        before = bench.run(name, x, rows)
        module.put(0, _overflowing(bench.weights[0][name]))
        after = bench.run(name, x, rows)
        assert torch.equal(after[~mine], before[~mine]), name
        assert not torch.isfinite(after[mine]).all(), name


def _overflowing(weights: Any) -> Any:
    if isinstance(weights, LoraWeights):
        return LoraWeights(
            torch.full_like(weights.a, float("inf")), weights.b, weights.scale, weights.bias, weights.gain
        )
    if isinstance(weights, SavedModule):
        return SavedModule(torch.full_like(weights.weight, float("inf")))
    return TokenRows(weights.indices, torch.full_like(weights.rows, float("inf")))


# ---- parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [1, 8, 256])
@pytest.mark.parametrize(
    ("hidden", "dtype"), [(960, torch.float32), (128, torch.float32), (960, torch.bfloat16)]
)
def test_a_tied_head_has_the_bits_of_the_whole_product_whichever_way_it_takes(
    hidden: int, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_head, "COLUMNS", columns)
    draw = torch.Generator().manual_seed(1)
    base = nn.Linear(hidden, 700, bias=False, dtype=dtype)
    indices, rows = torch.tensor([3, 40, 699]), torch.randn(3, hidden, generator=draw)
    x = torch.randn(TILE, hidden, generator=draw).to(dtype)
    monkeypatch.setattr(token_head, "_exact", {})
    with torch.inference_mode():
        got = TokenHead(base, TokenRows(indices, rows), exact=True)(x, base(x))
        expected = functional.linear(x, base.weight.index_copy(0, indices, rows.to(dtype)))
    assert torch.equal(got, expected)
    assert len(token_head._exact) == 1


@pytest.mark.parametrize(
    ("base", "weights"),
    [
        (nn.LayerNorm(8), LoraWeights(torch.ones(2, 8), torch.ones(8, 2), 1.0)),
        (nn.Embedding(8, 4), LoraWeights(torch.ones(8, 2), torch.ones(4, 2), 1.0, bias=torch.ones(4))),
    ],
    ids=["lora on a norm", "bias on an embedding"],
)
def test_weights_without_a_meaning_for_a_module_are_refused(base: nn.Module, weights: Any) -> None:
    kind = SlotEmbedding if isinstance(base, nn.Embedding) else SlotNorm
    module = kind(base, StepRows(), ReferenceKernels())
    with pytest.raises(TypeError, match="cannot act on"):
        module.put(0, weights)
    assert not module.filled


def test_a_saved_module_or_token_rows_on_a_quantized_layer_are_refused(bases: Any) -> None:
    base = bases("llama", "nf4")
    up = base.get_submodule("model.layers.0.mlp.up_proj")
    layer = SlotLinear(up, StepRows(), ReferenceKernels(), slots=1)
    for weights in (SavedModule(torch.ones(192, 128)), TokenRows(torch.tensor([1]), torch.ones(1, 128))):
        with pytest.raises(TypeError, match="cannot act on Linear4bit"):
            layer.put(0, weights)
