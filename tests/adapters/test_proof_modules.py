"""The proof holds for every kind of adapter, and fails for whatever is wrong with what is served."""

import ctypes
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tests.adapters.kinds import KINDS, LINEAR, TOKENS, peft_adapter, weights_of
from tests.matrix import matrix
from tests.oracle import greedy
from tests.tiny import ADAPTERS, ARCHITECTURES, load_folder, save_adapter, save_base
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from onebase_adapters.proof import modules as proof
from onebase_adapters.proof.modules import ModuleProof, ModuleProver
from onebase_adapters.proof.report import ProofError
from onebase_adapters.proof.texts import TextProver, regrets
from onebase_engine.base.load import BaseSettings, fingerprint, load_base
from onebase_engine.base.view import peft_view, view
from onebase_engine.kernels import cpu
from onebase_engine.kernels import reference as by_torch
from onebase_engine.kernels.cpu import CpuKernels, NativeLinear
from onebase_engine.kernels.interface import Kernels, RowMap
from onebase_engine.kernels.reference import ReferenceKernels, ReferenceLinear
from onebase_engine.kernels.weights import AdapterWeights, LoraWeights, TokenRows
from onebase_engine.lora.embedding import SlotEmbedding
from onebase_engine.lora.module import SlotModule
from onebase_engine.lora.slots import AdapterSlots, SlotNorm

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"quantization": "none", "dtype": torch.float32},
    "nf4": {"quantization": "nf4"},
    "nf4 in blocks of 32": {"quantization": "nf4", "blocksize": 32},
    "int8": {"quantization": "int8"},
    "bf16": {"quantization": "none"},
}
WRAPPED = 2 * 7 + 2 + 2 * 2 + 1
"""Linear layers, embedding, head and norms of a tiny Llama."""


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], nn.Module]:
    """`load(architecture, precision)`: a base that lives as long as the module's tests."""
    root, loaded = tmp_path_factory.mktemp("bases"), {}

    def _load(architecture: str, precision: str) -> nn.Module:
        key = (architecture, precision)
        if key not in loaded:
            folder = root / architecture
            if not folder.exists():
                save_base(architecture, folder)
            loaded[key] = load_base(BaseSettings(folder, **PRECISIONS[precision]))
        return loaded[key]

    return _load


@pytest.fixture(scope="module")
def base(load: Callable[[str, str], nn.Module]) -> nn.Module:
    return load("llama", "nf4")


def prove(
    base: nn.Module,
    kind: str,
    alter: Callable[[AdapterWeights], Any] | None = None,
    kernels: Kernels | None = None,
) -> ModuleProof:
    reference = peft_adapter(base, kind, seed=1)
    weights = weights_of(reference)
    return ModuleProver(base, kernels).prove(reference, alter(weights) if alter else weights)


@pytest.mark.parametrize(("architecture", "precision"), matrix(ARCHITECTURES, PRECISIONS, usual=["nf4"]))
def test_every_kind_is_proven_bit_by_bit_and_the_base_stays_as_it_is(
    load: Callable[[str, str], nn.Module], architecture: str, precision: str
) -> None:
    base = load(architecture, precision)
    before = fingerprint(base)
    for kind in KINDS:
        proof = prove(base, kind)
        assert (proof.exact, proof.largest_difference) == (proof.compared, 0.0), kind
        assert proof.rows == 3 * 32
    assert fingerprint(base) == before


@pytest.fixture
def portable() -> Iterator[CpuKernels]:
    """Kernels that sum in an order of their own, as on a processor whose order no trial finds."""
    library = cpu.load_library()
    if library is None:
        pytest.skip("the library in C was not built")
    library.library.onebase_choose(b"portable")
    one = CpuKernels(library.library, "portable")
    one._find_block = lambda layer, weight, bias: (32, False)  # type: ignore[method-assign]
    one.order = lambda inner, outer: (cpu._one_block(inner, outer), False)  # type: ignore[method-assign]
    yield one
    library.library.onebase_choose(None)


@pytest.mark.parametrize(
    ("architecture", "precision"), [("llama", "nf4"), ("gemma3", "nf4"), ("qwen2", "bf16")]
)
def test_where_sums_have_another_order_the_result_in_fp64_is_the_judge(
    load: Callable[[str, str], nn.Module], architecture: str, precision: str, portable: CpuKernels
) -> None:
    ratios = []
    for kind in KINDS:
        proof = prove(load(architecture, precision), kind, kernels=portable)
        ratios.append(proof.error_ratio)
        assert proof.error_ratio < 1.01, kind
        assert proof.largest_difference < 0.02, kind
    assert max(ratios) > 0.9, "some module had other bits"


@pytest.mark.parametrize("scale", [1.0, 2.0**-5, 2.0**-7, 2.0**-9, 2.0**-12, 2.0**-16, 2.0**-40])
@pytest.mark.parametrize("precision", ["nf4", "bf16"])
def test_an_adapter_however_weak_is_proven_by_kernels_of_another_order(
    load: Callable[[str, str], nn.Module], precision: str, scale: float, portable: CpuKernels
) -> None:
    """The base's rounding swallows what it adds, in PEFT's output too."""
    base = load("qwen2", precision)
    reference: Any = peft_adapter(base, "lora", seed=1)
    for name, parameter in reference.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(scale)
    proof = ModuleProver(base, portable).prove(reference, weights_of(reference))
    assert proof.error_ratio < 1.01


def test_kernels_of_another_order_are_judged_by_the_result_in_fp64_where_bits_differ(
    tmp_path: Path, portable: CpuKernels
) -> None:
    """At a size at which some outputs are sure to differ."""
    sizes = {"hidden_size": 1536, "intermediate_size": 1536, "num_hidden_layers": 1, "vocab_size": 4096}
    config = LlamaConfig(**sizes, num_attention_heads=12, num_key_value_heads=12)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    wide = load_base(BaseSettings(tmp_path))
    proof = prove(wide, "lora", kernels=portable)
    assert proof.exact < proof.compared
    assert 0 < proof.error_ratio < 1.01


@pytest.mark.parametrize("gain", [0.0, 3.0, -20.0, 500.0])
def test_dora_of_any_gain_is_proven_by_kernels_of_another_order(
    base: nn.Module, gain: float, portable: CpuKernels
) -> None:
    reference: Any = peft_adapter(base, "dora", seed=1)
    for name, parameter in reference.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(gain)
    assert ModuleProver(base, portable).prove(reference, weights_of(reference)).error_ratio < 1.01


@pytest.mark.parametrize("rank", [1, 3, 5, 64])
def test_adapters_of_any_rank_are_proven_by_kernels_of_another_order(
    base: nn.Module, rank: int, portable: CpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "ranked", {"target_modules": LINEAR, "r": rank, "lora_alpha": 3})
    proof = prove(base, "ranked", kernels=portable)
    assert proof.error_ratio < 1.01


# ---- what rounding does to all outputs of a sequence together ----------------------------------


class _OtherOrder(ReferenceLinear):
    """PyTorch's products, each summed from the other end, and the adapter's part off by `bias`."""

    bias = 0.0

    def exact(self, slot: int) -> bool:
        return False

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight()
        return functional.linear(x.flip(-1).to(weight.dtype), weight.flip(-1), bias).to(x.dtype)

    def _delta(self, x: torch.Tensor, terms: Sequence[tuple[int, float]]) -> torch.Tensor | None:
        turned = self.plain
        self.plain = {slot: replace(lora, a=lora.a.flip(-1)) for slot, lora in turned.items()}
        delta = super()._delta(x.flip(-1), terms)
        self.plain = turned
        return None if delta is None else delta * (1 + self.bias)


class _OtherOrderKernels(ReferenceKernels):
    def linear(self, base: Any, slots: int, *, unpacked: bool = False) -> ReferenceLinear:
        return _OtherOrder(base, tiled=True, unpacked=unpacked)


SHAPES: dict[str, tuple[int, int, list[str], int]] = {
    "tiny": (64, 64, ["q_proj", "down_proj"], 40),
    "576 and 1536": (576, 1536, ["gate_proj", "down_proj"], 24),
    "4096": (4096, 64, ["q_proj"], 6),
}
"""Hidden and intermediate size, the layers that are adapted, and how many adapters are tried."""
SPREADS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "any": lambda b: b,
    "as saved in bf16": lambda b: b.bfloat16().float(),
    "of one size": lambda b: b.sign(),
    "of one size, most of them 0": lambda b: b.sign() * (b.abs() > 1.6),
    "two outputs alone": lambda b: b * (torch.arange(len(b)) < 2)[:, None],
}
"""What becomes of a B with normal numbers, [out, rank]."""


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], nn.Module]:
    """`shaped(shape, precision)`: a base of one layer; only the last one is kept."""
    root = tmp_path_factory.mktemp("shapes")

    @lru_cache(maxsize=1)
    def _load(shape: str, precision: str) -> nn.Module:
        folder, (hidden, intermediate, _, _) = root / shape, SHAPES[shape]
        if not folder.exists():
            sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": 64}
            heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": 1}
            config = LlamaConfig(**sizes, **heads, num_hidden_layers=1, tie_word_embeddings=True)
            torch.manual_seed(0)
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        return load_base(BaseSettings(folder, **PRECISIONS[precision]))

    return _load


def adapter_with(base: nn.Module, targets: list[str], rank: int, spread: str, scale: float, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=targets)
    model: Any = get_peft_model(peft_view(base), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = SPREADS[spread](torch.randn_like(parameter)) * scale
    return model


@pytest.mark.parametrize(
    ("shape", "precision"),
    [("tiny", "nf4"), ("tiny", "fp32"), ("576 and 1536", "nf4"), ("576 and 1536", "bf16"), ("4096", "nf4")],
)
def test_sound_kernels_pass_whatever_the_rank_the_spread_and_the_scale_of_b(
    shaped: Callable[[str, str], nn.Module], shape: str, precision: str, portable: CpuKernels
) -> None:
    """In rank 1, and where all |B| are equal, one rounding decides for all outputs of a sequence."""
    base, (_, _, targets, examples) = shaped(shape, precision), SHAPES[shape]
    provers = [ModuleProver(base, kernels) for kernels in (portable, _OtherOrderKernels())]

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )  # fmt: skip
    @given(
        st.sampled_from([1, 1, 2, 3, 4, 8, 16]),
        st.sampled_from(list(SPREADS)),
        st.floats(-8, 4),
        st.integers(0, 99),
        st.sampled_from(provers),
    )
    def proved(rank: int, spread: str, power: float, seed: int, prover: ModuleProver) -> None:
        reference = adapter_with(base, targets, rank, spread, 10.0**power, seed)
        prover.prove(reference, weights_of(reference))

    proved()


@pytest.mark.parametrize("spread", ["any", "of one size"])
@pytest.mark.parametrize("rank", [1, 2, 4, 16])
@pytest.mark.parametrize(("shape", "power"), [("tiny", -9), ("576 and 1536", -11)])
def test_kernels_that_make_the_adapter_s_part_larger_are_found_in_any_rank(
    shaped: Callable[[str, str], nn.Module],
    shape: str,
    power: int,
    rank: int,
    spread: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a 512th of it in tiny layers, by a 2048th in those that users have."""
    base, (_, _, targets, _) = shaped(shape, "nf4"), SHAPES[shape]
    prover = ModuleProver(base, _OtherOrderKernels())
    reference = adapter_with(base, targets[-1:], rank, spread, 2e-4, seed=rank)
    prover.prove(reference, weights_of(reference))
    for bias in (2.0**power, -(2.0**power)):
        monkeypatch.setattr(_OtherOrder, "bias", bias)
        with pytest.raises(ProofError, match="differs from"):
            prover.prove(reference, weights_of(reference))


def test_every_wrapped_module_is_compared_also_those_that_no_adapter_touches(base: nn.Module) -> None:
    done: list[float] = []
    reference = peft_adapter(base, "saved norms", seed=1)
    assert ModuleProver(base).prove(reference, weights_of(reference), done.append).compared == WRAPPED
    assert len(done) == WRAPPED
    assert done[-1] == 1.0


@pytest.mark.parametrize("settings", ADAPTERS, ids=lambda s: f"r{s['r']}-{len(s['target_modules'])}")
def test_adapters_loaded_from_their_files_are_proven(
    base: nn.Module, settings: dict[str, Any], tmp_path: Path
) -> None:
    loaded = load_folder(base, save_adapter(base, settings, tmp_path / "adapter", seed=3))
    weights = {name: module.folded() for name, module in loaded.weights.items()}
    assert ModuleProver(base).prove(loaded.reference, weights).compared == WRAPPED


# ---- planted faults --------------------------------------------------------------------------


@pytest.fixture
def by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve by PyTorch, as without the kernels in C."""
    monkeypatch.setattr(proof, "find_kernels", lambda *_: ReferenceKernels())


def _scale_off_by_a_hair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_torch, "scaled", lambda delta, scale: delta * (scale * (1 + 2.0**-12)))


def _tile_of_b_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    put = SlotModule.put

    def transposing(self: SlotModule, slot: int, weights: Any) -> None:
        if slot == 0 and isinstance(weights, LoraWeights):
            b = weights.b.clone()
            b[8:16, :8] = b[8:16, :8].T.clone()
            weights = replace(weights, b=b)
        put(self, slot, weights)

    monkeypatch.setattr(SlotModule, "put", transposing)


def _layer_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    load = AdapterSlots.load

    def forgetful(self: AdapterSlots, slot: int, weights: AdapterWeights) -> None:
        load(self, slot, {n: w for n, w in weights.items() if n != "model.layers.1.self_attn.o_proj"})

    monkeypatch.setattr(AdapterSlots, "load", forgetful)


def _matrices_of_the_slot_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = ReferenceLinear._delta
    monkeypatch.setattr(
        ReferenceLinear,
        "_delta",
        lambda self, x, terms: delta(self, x, [((slot + 1) % 2, weight) for slot, weight in terms]),
    )


def _groups_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    add = ReferenceLinear.add

    def everywhere(self: ReferenceLinear, x: torch.Tensor, y: torch.Tensor, rows: RowMap) -> None:
        every = tuple(range(len(x)))
        add(self, x, y, RowMap(tuple(replace(group, rows=every) for group in rows.groups)))

    monkeypatch.setattr(ReferenceLinear, "add", everywhere)


def _added_before_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_torch, "added", lambda y, delta, quantized: (y.float() + delta).to(y.dtype))


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (_scale_off_by_a_hair, "model.layers.0.self_attn.q_proj"),
        (_tile_of_b_transposed, "model.layers.0.self_attn.q_proj"),
        (_layer_dropped, "model.layers.1.self_attn.o_proj"),
        (_matrices_of_the_slot_beside, "model.layers.0.self_attn.q_proj"),
        (_groups_forgotten, "model.layers.0.self_attn.q_proj"),
        (_added_before_rounding, "model.layers.0.self_attn.q_proj"),
    ],
)
@pytest.mark.usefixtures("by_pytorch")
def test_a_fault_of_the_modules_is_found_in_the_first_one_that_has_it(
    base: nn.Module,
    plant: Callable[[pytest.MonkeyPatch], None],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prove(base, "lora")
    plant(monkeypatch)
    with pytest.raises(ProofError, match=r"differs from PEFT's") as found:
        prove(base, "lora")
    assert found.value.name == name
    assert found.value.difference > 0


def _a_rank_dropped(layer: NativeLinear) -> None:
    put = layer.put

    def dropping(slot: int, weights: LoraWeights | None) -> None:
        if weights is not None:
            weights = replace(weights, a=weights.a * (torch.arange(weights.rank) > 0)[:, None])
        put(slot, weights)

    layer.put = dropping  # type: ignore[method-assign]


def _scaled_by(layer: NativeLinear, factor: float) -> None:
    put = layer.put
    layer.put = lambda slot, w: put(slot, w and replace(w, scale=w.scale * factor))  # type: ignore[method-assign]


def _a_scale_off_by_a_hair(layer: NativeLinear) -> None:
    _scaled_by(layer, 1 + 2.0**-12)


def _a_scale_off_by_a_rounding(layer: NativeLinear) -> None:
    _scaled_by(layer, 1 + 2.0**-8)


def _weights_of_another_rounding(layer: NativeLinear) -> None:
    # The scales themselves are those of all views of the base.
    layer._base[2] = layer._base[2] * (1 + 2.0**-9)
    layer.structure.absmax = layer._base[2].data_ptr()


def _a_block_skipped(layer: NativeLinear) -> None:
    put = layer.put

    def skipping(slot: int, weights: LoraWeights | None) -> None:
        put(slot, weights)
        if weights is not None:
            short = cpu._ordered([layer.size_in - 16], [0])
            layer._held[slot] += (short,)
            layer._lora[slot].shrink = ctypes.pointer(short)

    layer.put = skipping  # type: ignore[method-assign]


def _a_delta_added_before_rounding(layer: NativeLinear) -> None:
    layer.structure.quantized = 0


def _rows_of_the_neighbour(layer: NativeLinear) -> None:
    whole: Any = layer._layers

    def shifted(x: torch.Tensor, rows: RowMap | None) -> list[torch.Tensor]:
        if rows is not None and (address := cpu._groups_of(rows)) is not None:
            groups = cpu._Groups.from_address(address)
            first = (ctypes.c_int32 * 32).from_address(groups.row)
            first[0] = (first[0] + 1) % 32
        result: list[torch.Tensor] = whole(x, rows)
        return result

    layer._layers = shifted  # type: ignore[assignment]


def _nan_from_the_neighbour(layer: NativeLinear) -> None:
    whole: Any = layer._layers

    def leaking(x: torch.Tensor, rows: RowMap | None) -> list[torch.Tensor]:
        result: list[torch.Tensor] = whole(x, rows)
        if rows is not None and len(rows.groups) == 2:
            result[0][rows.groups[1].rows[3], 5] = float("nan")
        return result

    layer._layers = leaking  # type: ignore[assignment]


FAULTS = [
    _nan_from_the_neighbour,
    _a_rank_dropped,
    _a_scale_off_by_a_rounding,
    _weights_of_another_rounding,
    _a_block_skipped,
    _rows_of_the_neighbour,
]
FAULTS_OF_LAST_BITS = [_a_scale_off_by_a_hair, _a_delta_added_before_rounding]


def _plant(fault: Callable[[NativeLinear], None], monkeypatch: pytest.MonkeyPatch) -> None:
    linear = CpuKernels.linear

    def planted(self: CpuKernels, *arguments: Any, **named: Any) -> NativeLinear | ReferenceLinear:
        layer = linear(self, *arguments, **named)
        if isinstance(layer, NativeLinear) and layer.kind == 0:
            fault(layer)
        return layer

    monkeypatch.setattr(CpuKernels, "linear", planted)


@pytest.mark.parametrize("fault", FAULTS + FAULTS_OF_LAST_BITS)
def test_a_fault_of_the_kernels_in_c_is_found_in_the_first_module_that_has_it(
    base: nn.Module, fault: Callable[[NativeLinear], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if cpu.load_library() is None:
        pytest.skip("PyTorch computes here")
    prove(base, "lora")
    _plant(fault, monkeypatch)
    with pytest.raises(ProofError, match=r"differs from PEFT's") as found:
        prove(base, "lora")
    assert found.value.name == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_fault_of_kernels_that_have_not_peft_s_bits_is_found_as_well(
    base: nn.Module,
    kind: str,
    fault: Callable[[NativeLinear], None],
    portable: CpuKernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prove(base, kind, kernels=portable)
    _plant(fault, monkeypatch)
    with pytest.raises(ProofError, match="differs from") as found:
        prove(base, kind, kernels=portable)
    assert found.value.name == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("rank", [8, 256])
def test_one_rank_dropped_of_many_in_a_weak_adapter_is_found(
    base: nn.Module, rank: int, portable: CpuKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its part is below what rounding does to the base's."""
    monkeypatch.setitem(KINDS, "ranked", {"target_modules": ["q_proj"], "r": rank, "lora_alpha": rank})

    reference: Any = peft_adapter(base, "ranked", seed=1)
    for name, parameter in reference.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(2.0**-14)
    weights = weights_of(reference)
    ModuleProver(base, portable).prove(reference, weights)
    _plant(_a_rank_dropped, monkeypatch)
    with pytest.raises(ProofError, match="with the adapter made larger"):
        ModuleProver(base, portable).prove(reference, weights)


def _without_gain(weights: AdapterWeights) -> AdapterWeights:
    return {n: replace(w, gain=None) if isinstance(w, LoraWeights) else w for n, w in weights.items()}


def _without_bias(weights: AdapterWeights) -> AdapterWeights:
    return {n: replace(w, bias=None) if isinstance(w, LoraWeights) else w for n, w in weights.items()}


def _without_one_token(weights: AdapterWeights) -> AdapterWeights:
    return {
        n: replace(w, indices=w.indices[:-1], rows=w.rows[:-1]) if isinstance(w, TokenRows) else w
        for n, w in weights.items()
    }


def _without_norms(weights: AdapterWeights) -> AdapterWeights:
    return {n: w for n, w in weights.items() if not n.endswith("norm")}


@pytest.mark.parametrize(
    ("kind", "alter", "name"),
    [
        ("dora", _without_gain, "model.layers.0.self_attn.q_proj"),
        ("embedding dora", _without_gain, "model.embed_tokens"),
        ("bias", _without_bias, "model.layers.0.self_attn.q_proj"),
        ("tokens", _without_one_token, "model.embed_tokens"),
        ("saved norms", _without_norms, "model.layers.1.input_layernorm"),
    ],
)
def test_a_part_that_is_left_out_is_found(
    base: nn.Module, kind: str, alter: Callable[[AdapterWeights], AdapterWeights], name: str
) -> None:
    prove(base, kind)
    with pytest.raises(ProofError) as found:
        prove(base, kind, alter)
    assert found.value.name == name


@pytest.mark.usefixtures("by_pytorch")
def test_a_norm_that_acts_on_its_neighbours_is_found(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy_norm(self: SlotNorm, x: torch.Tensor, y: torch.Tensor, acting: Any, act: Any) -> None:
        for group in self.rows.groups:
            if any(slot in acting for slot, _ in group.terms):
                act(x, y, group.terms)

    prove(base, "saved norms")
    monkeypatch.setattr(SlotNorm, "on_groups", greedy_norm)
    with pytest.raises(ProofError, match=r"layernorm|norm"):
        prove(base, "saved norms")


def test_an_embedding_that_forgets_its_scale_is_found(
    load: Callable[[str, str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load("gemma3", "fp32")
    prove(base, "embedding")
    monkeypatch.setattr(SlotEmbedding, "_scale", lambda self, dtype: None)
    with pytest.raises(ProofError) as found:
        prove(base, "embedding")
    assert found.value.name == "model.embed_tokens"


def test_every_trained_token_is_among_the_rows(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    many = list(range(0, 320, 4))
    monkeypatch.setitem(KINDS, "many", {"target_modules": ["v_proj"], "trainable_token_indices": many})
    prove(base, "many")
    for token in (many[0], many[40], many[-1], TOKENS[0]):

        def off(weights: AdapterWeights, token: int = token) -> AdapterWeights:
            module = weights["model.embed_tokens"]
            assert isinstance(module, TokenRows)
            rows = module.rows + 0.5 * (module.indices == token)[:, None]
            return {**weights, "model.embed_tokens": replace(module, rows=rows)}

        with pytest.raises(ProofError) as found:
            prove(base, "many", off)
        assert found.value.name == "model.embed_tokens"


def test_an_adapted_module_that_no_slot_serves_is_found(base: nn.Module) -> None:
    def elsewhere(weights: AdapterWeights) -> AdapterWeights:
        name = next(iter(weights))
        return {**weights, "model.layers.9.self_attn.q_proj": weights[name]}

    with pytest.raises(ProofError, match="no slot serves it") as found:
        prove(base, "lora", elsewhere)
    assert found.value.name == "model.layers.9.self_attn.q_proj"


def test_what_the_caller_raises_ends_the_proof(base: nn.Module) -> None:
    def stop(fraction: float) -> None:
        raise KeyboardInterrupt

    reference = peft_adapter(base, "lora", seed=1)
    with pytest.raises(KeyboardInterrupt):
        ModuleProver(base).prove(reference, weights_of(reference), stop)


def test_an_adapter_that_overflows_in_peft_too_is_told_so(base: nn.Module) -> None:
    reference = peft_adapter(base, "lora", seed=1)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "lora_A" in name:
                parameter.fill_(3e38)
    with pytest.raises(ProofError, match="overflows"):
        ModuleProver(base).prove(reference, weights_of(reference))


def test_a_prover_judges_after_a_version_that_failed_as_a_new_one_does(
    base: nn.Module, portable: CpuKernels
) -> None:
    prover, sound = ModuleProver(base, portable), peft_adapter(base, "lora", seed=2)
    reference: Any = peft_adapter(base, "lora", seed=1)
    first = prover.prove(reference, weights_of(reference))
    with pytest.raises(ProofError):
        prover.prove(reference, weights_of(sound))
    fresh = ModuleProver(base, portable).prove(sound, weights_of(sound))
    assert prover.prove(sound, weights_of(sound)) == fresh
    assert prover.prove(reference, weights_of(reference)) == first


def _other_weights(module: Any) -> None:
    module.weight = nn.Parameter(module.weight * 2, requires_grad=False)


def _hooked(module: Any) -> None:
    module.register_forward_hook(lambda module, inputs, output: output * 2)


def _other_forward(module: Any) -> None:
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


@pytest.mark.parametrize("change", [_other_weights, _hooked, _other_forward])
def test_a_module_that_no_version_had_is_compared_again_where_peft_has_another_one(
    base: nn.Module, change: Callable[[Any], None]
) -> None:
    prover = ModuleProver(base)
    for seed in (1, 2):
        sound = peft_adapter(base, "lora", seed=seed)
        prover.prove(sound, weights_of(sound))
    reference: Any = peft_adapter(base, "lora", seed=3)
    change(reference.get_base_model().model.norm)
    with pytest.raises(ProofError) as found:
        prover.prove(reference, weights_of(reference))
    assert found.value.name == "model.norm"


def test_what_one_version_adapts_is_compared_where_the_one_before_left_it_alone(base: nn.Module) -> None:
    prover, few, many = ModuleProver(base), *(peft_adapter(base, kind, seed=1) for kind in ("lora", "dora"))
    adapted = weights_of(many)
    prover.prove(few, weights_of(few))
    last = sorted(adapted)[-1]
    with pytest.raises(ProofError):
        prover.prove(many, {**adapted, last: replace(adapted[last], scale=0.5)})
    assert prover.prove(few, weights_of(few)) == ModuleProver(base).prove(few, weights_of(few))


def test_a_prover_keeps_nothing_of_a_version(base: nn.Module) -> None:
    prover, reference = ModuleProver(base), peft_adapter(base, "lora", seed=1)
    weights = weights_of(reference)
    kept = [weakref.ref(one.a) for one in weights.values() if isinstance(one, LoraWeights)]
    prover.prove(reference, weights)
    del weights, reference
    gc.collect()
    assert kept
    assert not any(one() is not None for one in kept)


# ---- texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 20, 32, 33, 70])
def test_a_greedy_text_has_no_regrets_and_another_one_has(base: nn.Module, length: int) -> None:
    prompt = torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    model = peft_adapter(base, "lora", seed=1)
    text = greedy(model, prompt, 40)
    assert regrets(model, prompt, text) == [0.0] * 40
    other = [*text[:9], (text[9] + 1) % 320, *text[10:]]
    found = regrets(model, prompt, other)
    assert found[:9] == [0.0] * 9
    assert found[9] > 0
    assert greedy(base, prompt, 40) != text


def test_equal_logits_are_ties_even_if_all_are_zero(base: nn.Module) -> None:
    silent = view(base)
    with torch.no_grad():
        silent.get_output_embeddings().weight = nn.Parameter(  # type: ignore[operator]
            torch.zeros_like(base.get_output_embeddings().weight)  # type: ignore[operator]
        )
    assert regrets(silent, [5, 6], [0, 7]) == [0.0, 0.0]


# ---- texts -----------------------------------------------------------------------------------

PROBES = [list(range(5, 40)), list(range(90, 50, -1))]


def test_an_engine_that_stays_serves_each_version_its_own_texts(base: nn.Module) -> None:
    prover, engines = TextProver(base), set()
    references = [
        peft_adapter(base, kind, seed, std=0.5) for seed, kind in enumerate(("lora", "dora", "head"))
    ]
    for reference in (*references, references[0]):
        proof = prover.prove(reference, weights_of(reference), PROBES, 8, lambda part: None)
        assert (proof.texts, proof.tokens, proof.changed) == (2, 16, 2)
        engine = prover._engine
        assert engine is not None
        assert (engine.slots.used, len(engine.versions)) == (0, 0)
        engines.add(id(engine))
    assert len(engines) == 1
    with pytest.raises(ProofError, match="differs from PEFT's at token"):
        prover.prove(references[0], weights_of(references[2]), PROBES, 8, lambda part: None)


def test_an_engine_that_was_left_or_is_too_small_is_made_again(base: nn.Module) -> None:
    def stop(part: float) -> None:
        raise KeyboardInterrupt

    prover, reference = TextProver(base), peft_adapter(base, "lora", seed=1, std=0.5)
    weights = weights_of(reference)
    with pytest.raises(KeyboardInterrupt):
        prover.prove(reference, weights, PROBES, 8, stop)
    for probes, tokens in ((PROBES, 8), ([*PROBES, [7] * 300], 8), (PROBES, 20)):
        proof = prover.prove(reference, weights, probes, tokens, lambda part: None)
        assert proof.texts == len(probes)
    assert prover._room == (6, 308)
