"""LoRA on a mixture's experts: PEFT's files and its function, each row by its own adapter."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.harness import Lab, Request, run
from tests.tiny import ON_EXPERTS, load_folder, plain_experts, save_base, save_on_experts
from torch import nn
from transformers import AutoModelForCausalLM

from onebase_adapters.export import gguf_lora, gguf_model, merged
from onebase_adapters.export.base_files import ExportError
from onebase_adapters.format.config import CONFIG_FILE, WEIGHTS_FILE, AdapterFormatError
from onebase_adapters.proof.merging import MergeInput, MergeRecipe, merge
from onebase_adapters.proof.modules import ModuleProver
from onebase_adapters.proof.report import ProofError
from onebase_adapters.proof.verifier import Verifier
from onebase_engine.base.default_base import fetch_default_base
from onebase_engine.base.experts import expert_matrices, expert_modules
from onebase_engine.base.layers import adaptable_layers
from onebase_engine.base.load import BaseSettings, fingerprint, load_base
from onebase_engine.base.view import view
from onebase_engine.engine.experts import attach_experts
from onebase_engine.kernels.cpu import load_library
from onebase_engine.kernels.interface import Kernels, RowGroup, RowMap
from onebase_engine.kernels.reference import ReferenceKernels
from onebase_engine.kernels.weights import ExpertLora, LoraWeights, folded
from onebase_engine.lora.module import StepRows
from onebase_engine.lora.packed_adapter import PackedAdapterError, read_packed_adapter, write_packed_adapter

KINDS = ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "deepseek_v3", "gemma4_moe"]
QUANTIZED = [*((kind, "nf4") for kind in KINDS), ("qwen3_moe", "int8"), ("gpt_oss", "int8")]
"""Types of mixtures, and how their weights are quantized."""
KERNELS: dict[str, Callable[[], Kernels | None]] = {"torch": ReferenceKernels, "library": load_library}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a mixture, made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_base(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.mark.parametrize(("kind", "quantization"), QUANTIZED)
def test_the_reference_has_the_bits_of_pefts_forward_on_dequantized_parameters(
    kind: str, quantization: Any, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    base = load_base(BaseSettings(folders(kind), quantization=quantization))
    before = fingerprint(base)
    folder = save_on_experts(base, tmp_path)
    loaded = load_folder(base, folder)
    peft = PeftModel.from_pretrained(plain_experts(base), str(folder)).eval()
    ids = torch.arange(30)[None] + 3
    with torch.inference_mode():
        own, theirs, bare = (model(ids).logits for model in (loaded.reference, peft, base))
    assert torch.equal(own, theirs)
    assert not torch.equal(own, bare)
    assert fingerprint(base) == before
    assert all(isinstance(one, ExpertLora) for one in loaded.weights.values())
    assert {module.rank for module in loaded.spec.modules} == {4}


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    found = KERNELS[request.param]()
    if found is None:
        pytest.skip("the library is not built")
    return found


@pytest.mark.parametrize(("kind", "quantization"), QUANTIZED)
def test_what_is_served_is_proved_against_peft(
    kind: str, quantization: Any, folders: Callable[[str], Path], kernels: Kernels, tmp_path: Path
) -> None:
    # Of three axes, any two values meet.
    number = QUANTIZED.index((kind, quantization)) + (kernels.name == "torch")
    std = (0.01, 0.1)[number % 2]
    base = load_base(BaseSettings(folders(kind), quantization=quantization))
    loaded = load_folder(base, save_on_experts(base, tmp_path, std=std))
    prover = ModuleProver(base, kernels)
    proof = prover.prove(loaded.reference, folded(loaded.weights))
    assert 0.5 < proof.error_ratio < 1.3, "both round twice"
    assert proof.compared == len(prover._modules) + len(list(expert_modules(base)))


@pytest.mark.parametrize(("kind", "quantization"), QUANTIZED)
def test_a_mixed_batch_is_pefts_whatever_each_adapter_targets(
    kind: str, quantization: Any, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load_base(BaseSettings(folders(kind), quantization=quantization))
    before = fingerprint(base)
    attention = [name for name, _ in base.named_modules() if name.endswith((".q_proj", ".q_b_proj"))]
    wanted: list[dict[str, Any]] = [
        {},
        {"r": 3, "lora_alpha": 5, "target_parameters": ["experts.down_proj"]},
        {"target_parameters": ["layers.1." + mixture_of(base) + ".gate_up_proj"]},
        {"target_modules": attention, "rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    ]
    saved = [save_on_experts(base, tmp_path / str(seed), seed, **one) for seed, one in enumerate(wanted)]
    loaded = [load_folder(base, folder) for folder in saved]
    assert len({tuple(one.weights) for one in loaded}) == len(wanted)
    lab = Lab(base, saved, [one.reference for one in loaded], [one.weights for one in loaded])
    prompts = [tuple(range(5 + at, 40 + 19 * at)) for at in range(2)]
    asked = [Request(prompt, adapter, 6) for prompt in prompts for adapter in (None, 0, 1, 2, 3)]
    together = run(lab.engine(step_tokens=60), asked)
    assert not lab.disagreements(asked, together)
    assert len({tuple(text) for text in together[:5]}) > 3, "adapters act"
    for number in (0, 1, 8):
        assert run(lab.engine(step_tokens=23), [asked[number]]) == [together[number]]
    assert fingerprint(base) == before


def mixture_of(base: nn.Module) -> str:
    """What a layer of the base calls its module of experts."""
    path = next(path for path, _ in expert_modules(base))
    return path.partition(".layers.")[2].partition(".")[2]


_lanes: dict[tuple[Path, str], Callable[..., torch.Tensor]] = {}


def _served_experts(folder: Path, kernels: Kernels) -> Callable[..., torch.Tensor]:
    """The experts of a layer with three adapters in slots, as a function of rows, choices and row map."""
    key = folder, kernels.name
    if key not in _lanes:
        base = load_base(BaseSettings(folder))
        served, step = view(base), StepRows()
        slots = attach_experts(served, kernels, step, 3)
        path, _ = next(expert_modules(base))
        draw = torch.Generator().manual_seed(1)
        for name, layer in adaptable_layers(base).items():
            for slot in range(3):
                if name.startswith(path) and (slot != 1 or name.endswith("down_proj")):
                    a = torch.randn(layer.count, slot + 2, layer.size_in, generator=draw)
                    b = torch.randn(layer.count, layer.size_out, slot + 2, generator=draw)
                    slots[name].put(slot, ExpertLora(a, 0.1 * b, 0.3))
        module: Any = served.get_submodule(path)

        def compute(x: torch.Tensor, chosen: torch.Tensor, rows: RowMap) -> torch.Tensor:
            step.tokens = rows
            weights = torch.full(chosen.shape, 0.4)
            with torch.inference_mode():
                result: torch.Tensor = module(x, chosen, weights)
            return result

        _lanes[key] = compute
    return _lanes[key]


TERMS: list[tuple[tuple[int, float], ...]] = [
    (), ((0, 1.0),), ((1, 1.0),), ((2, 1.0),), ((0, 0.5), (2, -0.7)), ((1, 2.0), (0, 1.0)),
]  # fmt: skip


@given(data=st.data())
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "gemma4_moe"])
def test_a_row_has_its_bits_beside_rows_of_other_experts_and_other_adapters(
    kind: str, folders: Callable[[str], Path], kernels: Kernels, data: st.DataObject
) -> None:
    compute = _served_experts(folders(kind), kernels)
    rows = data.draw(st.integers(1, 70))
    own = data.draw(st.integers(0, rows - 1))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    x = 2 * torch.randn(rows, 128, generator=draw).bfloat16()
    chosen = torch.rand(rows, 4, generator=draw).topk(2).indices
    kinds = torch.randint(len(TERMS), (rows,), generator=draw).tolist()
    if data.draw(st.booleans()):  # neighbours that overflow
        x[torch.arange(rows) != own] *= 1e30
    groups = {}
    for row, number in enumerate(kinds):
        if TERMS[number]:
            groups.setdefault(number, []).append(row)
    mixed = RowMap(tuple(RowGroup(tuple(some), TERMS[number]) for number, some in groups.items()))
    terms = TERMS[kinds[own]]
    alone = RowMap((RowGroup((0,), terms),) if terms else ())
    got = compute(x, chosen, mixed)[own]
    assert torch.equal(got, compute(x[own : own + 1], chosen[own : own + 1], alone)[0])
    assert torch.isfinite(got).all()


def test_a_sum_of_adapters_adds_what_each_adds(folders: Callable[[str], Path], kernels: Kernels) -> None:
    compute = _served_experts(folders("qwen3_moe"), kernels)
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    chosen = torch.tensor([[2, 5]])

    def of(*terms: tuple[int, float]) -> torch.Tensor:
        return compute(x, chosen, RowMap((RowGroup((0,), terms),) if terms else ())).float()

    bare = of()
    # The one that adapts `down_proj` alone is linear in its weight.
    first, both = of((1, 1.0)) - bare, of((1, 0.5), (1, 0.5)) - bare
    assert float(first.abs().max()) > 0.1
    assert torch.allclose(first, both, atol=0.02 * float(bare.abs().max()))
    assert torch.allclose(of((1, 2.0)) - bare, 2 * first, atol=0.02 * float(bare.abs().max()))
    assert torch.equal(of((1, 0.0)), bare)


def test_weights_of_another_kind_are_refused(folders: Callable[[str], Path], kernels: Kernels) -> None:
    slots = attach_experts(view(load_base(BaseSettings(folders("mixtral")))), kernels, StepRows(), 1)
    lora = LoraWeights(torch.ones(2, 128), torch.ones(128, 2), 1.0)
    with pytest.raises(TypeError, match="cannot act on a mixture's experts"):
        next(iter(slots.values())).put(0, lora)


@pytest.mark.parametrize("fault", ["swapped", "scale", "another expert", "no down"])
def test_a_proof_finds_experts_that_are_served_otherwise(
    fault: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load_base(BaseSettings(folders("qwen3_moe")))
    loaded = load_folder(base, save_on_experts(base, tmp_path, std=0.02))
    wrong: dict[str, Any] = dict(loaded.weights)
    name = next(name for name in wrong if name.endswith("down_proj"))
    one = wrong[name]
    if fault == "swapped":
        wrong[name] = replace(one, a=one.a.flip(0))
    elif fault == "scale":
        wrong[name] = replace(one, scale=one.scale * 1.5)
    elif fault == "another expert":
        wrong[name] = replace(one, b=torch.cat([one.b[1:], one.b[:1]]))
    else:
        wrong[name] = replace(one, b=torch.zeros_like(one.b))
    with pytest.raises(ProofError):
        ModuleProver(base).prove(loaded.reference, wrong)


def test_a_packed_adapter_holds_what_was_proved(folders: Callable[[str], Path], tmp_path: Path) -> None:
    base = load_base(BaseSettings(folders("mixtral")))
    loaded = load_folder(base, save_on_experts(base, tmp_path / "adapter"))
    write_packed_adapter(tmp_path / "packed", loaded.weights, base_id="base")
    layers = adaptable_layers(base)
    found = read_packed_adapter(tmp_path / "packed", base_id="base", layers=layers)
    assert found.keys() == loaded.weights.keys()
    for name, one in found.items():
        own = loaded.weights[name]
        assert isinstance(one, ExpertLora)
        assert isinstance(own, ExpertLora)
        assert (one.scale, one.rank) == (own.scale, own.rank)
        assert torch.equal(one.a, own.a)
        assert torch.equal(one.b, own.b)
    fewer = {name: replace(layer, count=layer.count - 1) for name, layer in layers.items()}
    with pytest.raises(PackedAdapterError, match="does not fit the base"):
        read_packed_adapter(tmp_path / "packed", layers=fewer)


def test_a_version_on_experts_is_proved_whole_and_its_report_says_how(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load_base(BaseSettings(folders("qwen3_moe")))
    folder = save_on_experts(base, tmp_path / "adapter", std=0.05)
    verifier = Verifier(base, max_rank=64, base_id="base")
    proven = verifier.prove(
        folder / CONFIG_FILE, folder / WEIGHTS_FILE, tmp_path / "packed",
        probes=[list(range(20, 60)), [7, 8, 9]], probe_tokens=8, allow_noop=False,
        on_progress=lambda stage, part: None,
    )  # fmt: skip
    report = proven.report
    assert report.proof.modules_changed == 4
    assert report.targets == ("down_proj", "gate_up_proj")
    assert "2 round or sum in another order" in report.proof.shown
    assert all((one.norm or 0) >= (one.spectral_norm or 0) > 0 for one in report.modules)
    found = read_packed_adapter(tmp_path / "packed", proven.sha256, layers=adaptable_layers(base))
    assert {type(one) for one in found.values()} == {ExpertLora}


def test_adapters_on_experts_are_not_merged_into_one(folders: Callable[[str], Path], tmp_path: Path) -> None:
    base = load_base(BaseSettings(folders("mixtral")))
    folder = save_on_experts(base, tmp_path / "adapter")
    parents = [MergeInput("mine", folder / CONFIG_FILE, folder / WEIGHTS_FILE, 1.0)] * 2
    with pytest.raises(AdapterFormatError, match="weight adapters in each request") as refused:
        merge(
            base, parents, MergeRecipe("cat", None, "total", 0), 64, tmp_path / "config", tmp_path / "weights"
        )
    assert refused.value.code == "adapter_not_composable"


# ---- exports ---------------------------------------------------------------------------------------


def _half(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def bases(folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A mixture in 16 bit, as it is published."""

    @functools.cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(f"half-{kind}")
        _half(folders(kind)).save_pretrained(folder)
        return folder

    return make


def _exported(export: Any, adapter: Path, target: Path, base: Path) -> Path:
    export(adapter, target, base=str(base), options={"name": "mine"}, progress=lambda stage, share: None)
    return target


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings", [{}, {"target_parameters": ["experts.down_proj"], "use_rslora": True}], ids=str
)
def test_a_merged_mixture_is_what_peft_merges(
    kind: str, settings: dict[str, Any], bases: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    base = bases(kind)
    adapter = save_on_experts(_half(base), tmp_path / "adapter", **settings)
    merged_by_peft = PeftModel.from_pretrained(_half(base), str(adapter)).merge_and_unload()
    want = dict(merged_by_peft.named_parameters())

    have = dict(_half(_exported(merged.export, adapter, tmp_path / "merged", base)).named_parameters())

    before = dict(_half(base).named_parameters())
    changed = [name for name in want if not torch.equal(want[name], before[name])]
    assert {name.rpartition(".")[2] for name in changed} == {
        one.rpartition(".")[2] for one in settings.get("target_parameters", ON_EXPERTS)
    }
    assert [name for name in want if name not in changed and not torch.equal(want[name], have[name])] == []
    for name in changed:
        # PEFT sums all experts' differences in one product, whose order may be another.
        torch.testing.assert_close(have[name], want[name], rtol=2**-7, atol=1e-6)
        assert (have[name] == want[name]).float().mean() > 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_served_experts_are_those_that_a_server_computes_with(
    kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(kind)
    served = load_base(BaseSettings(base))
    path = next(place.path for place in expert_matrices(served) if place.name == "down_proj")
    adapter = save_on_experts(_half(base), tmp_path / "adapter", target_parameters=[path])
    merged.export(
        adapter, tmp_path / "merged", base=str(base), progress=lambda stage, share: None,
        options={"name": "mine", "quantization": "nf4"},
    )  # fmt: skip
    have = dict(_half(tmp_path / "merged").named_parameters())
    for place in expert_matrices(served):
        stack = getattr(place.module, place.name)
        wanted = torch.stack([stack[number] for number in range(stack.count)])
        assert torch.equal(have[place.path], wanted) == (place.path != path), place.path


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_lora_on_experts_in_gguf_adds_what_peft_adds(
    kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    base = bases(kind)
    settings = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_up_proj": 5}}
    adapter = save_on_experts(_half(base), tmp_path / "adapter", **settings)
    file = gguf.GGUFReader(_exported(gguf_lora.export, adapter, tmp_path / "lora.gguf", base))

    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in file.tensors}
    alpha = file.fields["adapter.lora.alpha"].contents()
    peft = PeftModel.from_pretrained(_half(base).float(), str(adapter))
    for layer in range(2):
        wrapper: Any = peft.get_submodule(f"base_model.model.model.layers.{layer}.mlp.experts")
        for one in (wrapper, wrapper.base_layer):
            parts = ["gate", "up"] if one.parameter_name == "gate_up_proj" else ["down"]
            deltas = []
            for part in parts:
                a, b = (tensors.pop(f"blk.{layer}.ffn_{part}_exps.weight.lora_{side}") for side in "ab")
                deltas.append(b @ a * (alpha / b.shape[2]))  # as llama.cpp has it
            torch.testing.assert_close(
                torch.cat(deltas, 1), one.get_delta_weight("default"), rtol=1e-5, atol=1e-6
            )
    assert not tensors


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_mixture_in_gguf_has_the_weights_that_are_merged(
    kind: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shutil.copytree(bases(kind), tmp_path / "base")
    _add_tokenizer(base)
    adapter = save_on_experts(_half(base), tmp_path / "adapter")
    file = gguf.GGUFReader(_exported(gguf_model.export, adapter, tmp_path / "model.gguf", base))
    want = dict(_half(_exported(merged.export, adapter, tmp_path / "merged", base)).named_parameters())

    have = {one.name: one for one in file.tensors}
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        gate, up = want[f"{experts}.gate_up_proj"].chunk(2, dim=1)
        for part, matrix in (("gate", gate), ("up", up), ("down", want[f"{experts}.down_proj"])):
            held = have.pop(f"blk.{layer}.ffn_{part}_exps.weight")
            assert torch.equal(torch.from_numpy(held.data.copy()).view(torch.bfloat16), matrix)
        router = have[f"blk.{layer}.ffn_gate_inp.weight"]
        assert router.tensor_type == gguf.GGMLQuantizationType.F32
        assert torch.equal(
            torch.from_numpy(router.data.copy()), want[f"model.layers.{layer}.mlp.gate.weight"].float()
        )
    fields = {name: field.contents() for name, field in file.fields.items()}
    name = fields["general.architecture"]
    assert name == {"mixtral": "llama", "qwen3_moe": "qwen3moe", "olmoe": "olmoe"}[kind]
    assert (fields[f"{name}.expert_count"], fields[f"{name}.expert_used_count"]) == (
        want["model.layers.0.mlp.gate.weight"].shape[0],
        2,
    )


def _add_tokenizer(folder: Path) -> None:
    """Give a base as many tokens of the default base's as it has rows."""
    default = fetch_default_base()
    count = json.loads((folder / "config.json").read_text())["vocab_size"] - 3
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(default / name, folder / name)
    tokenizer = json.loads((default / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {text: number for text, number in model["vocab"].items() if number < count}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_experts_that_gguf_has_no_names_for_are_refused(bases: Callable[[str], Path], tmp_path: Path) -> None:
    base = bases("granitemoe")
    adapter = save_on_experts(_half(base), tmp_path / "adapter")
    with pytest.raises(ExportError, match="not among the architectures"):
        _exported(gguf_lora.export, adapter, tmp_path / "lora.gguf", base)


# ---- neighbours at realistic sizes -----------------------------------------------------------------

_REALISTIC = {"num_hidden_layers": 1, "vocab_size": 320, "num_experts_per_tok": 8, "num_experts": 64}


@pytest.fixture(scope="module")
def wide_mixture(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Kernels], Callable[..., torch.Tensor]]:
    """A layer's mixture of OLMoE-1B-7B's shape with two adapters on its experts, as a function of rows."""
    from bench.random_base import random_base, write_folder

    folder = tmp_path_factory.mktemp("wide")
    write_folder("olmoe", folder, **_REALISTIC)
    base = random_base(folder, torch.device("cpu"))

    @functools.cache
    def served(kernels: Kernels) -> Callable[..., torch.Tensor]:
        tree, step = view(base), StepRows()
        slots = attach_experts(tree, kernels, step, 2)
        draw = torch.Generator().manual_seed(1)
        for name, layer in adaptable_layers(base).items():
            for slot, rank in enumerate((16, 5)):
                if layer.kind == "experts" and (slot == 0 or name.endswith("down_proj")):
                    a = torch.randn(layer.count, rank, layer.size_in, generator=draw) * layer.size_in**-0.5
                    b = 0.05 * torch.randn(layer.count, layer.size_out, rank, generator=draw)
                    slots[name].put(slot, ExpertLora(a, b, 2.0))
        mixture: Any = tree.get_submodule("model.layers.0.mlp")

        def compute(x: torch.Tensor, rows: RowMap) -> torch.Tensor:
            step.tokens = rows
            padded = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % kernels.row_multiple))
            with torch.inference_mode():
                result: torch.Tensor = mixture(padded[None])[0, : len(x)]
            return result

        return compute

    return served


@pytest.mark.parametrize("rows", [2, 7, 16, 33, 70])
def test_a_row_of_a_realistic_mixture_has_its_bits_beside_any_neighbours(
    rows: int, wide_mixture: Callable[[Kernels], Callable[..., torch.Tensor]], kernels: Kernels
) -> None:
    if kernels.name == "torch" and rows > 16:
        pytest.skip("dequantizes every expert")
    compute = wide_mixture(kernels)
    draw = torch.Generator().manual_seed(rows)
    terms = [(), ((0, 1.0),), ((1, 1.0),), ((0, 0.5), (1, -0.7))]
    x = torch.randn(rows, 2048, generator=draw).bfloat16()
    x[rows // 2 :: 2] = x[0]  # neighbours that choose the same experts
    kinds = torch.randint(len(terms), (rows,), generator=draw).tolist()

    def mapped(numbers: Sequence[int]) -> RowMap:
        groups: dict[int, list[int]] = {}
        for place, number in enumerate(numbers):
            groups.setdefault(kinds[number], []).append(place)
        return RowMap(
            tuple(RowGroup(tuple(some), terms[kind]) for kind, some in groups.items() if terms[kind])
        )

    together = compute(x, mapped(range(rows)))
    assert torch.isfinite(together).all()
    for number in {0, 1, rows // 2, rows - 1}:
        alone = compute(x[number : number + 1], mapped([number]))
        assert torch.equal(together[number], alone[0])
        some = [number, *(other for other in range(0, rows, 3) if other != number)]
        assert torch.equal(together[number], compute(x[some], mapped(some))[0])
