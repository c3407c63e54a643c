"""LoRA on a mixture's experts: PEFT's files and its function, each row by its own adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.harness import Lab, Request, run
from tests.tiny import load_folder, plain_experts, save_base, save_on_experts
from torch import nn

from onebase_adapters.export import gguf_lora, gguf_model, merged
from onebase_adapters.export.base_files import ExportError
from onebase_adapters.format.config import CONFIG_FILE, WEIGHTS_FILE, AdapterFormatError
from onebase_adapters.proof.merging import MergeInput, MergeRecipe, merge
from onebase_adapters.proof.modules import ModuleProver
from onebase_adapters.proof.report import ProofError
from onebase_adapters.proof.verifier import Verifier
from onebase_engine.base.experts import expert_modules
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_has_the_bits_of_pefts_forward_on_dequantized_parameters(
    kind: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    base = load_base(BaseSettings(folders(kind)))
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


@pytest.mark.parametrize("std", [0.01, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_served_is_proved_against_peft(
    kind: str, std: float, folders: Callable[[str], Path], kernels: Kernels, tmp_path: Path
) -> None:
    base = load_base(BaseSettings(folders(kind)))
    loaded = load_folder(base, save_on_experts(base, tmp_path, std=std))
    prover = ModuleProver(base, kernels)
    proof = prover.prove(loaded.reference, folded(loaded.weights))
    assert 0.5 < proof.error_ratio < 1.3, "both round twice"
    assert proof.compared == len(prover._modules) + len(list(expert_modules(base)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_pefts_whatever_each_adapter_targets(
    kind: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load_base(BaseSettings(folders(kind)))
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
    asked = [Request(prompt, adapter, 10) for prompt in prompts for adapter in (None, 0, 1, 2, 3)]
    together = run(lab.engine(step_tokens=60), asked)
    assert not lab.disagreements(asked, together)
    assert len({tuple(text) for text in together[:5]}) > 3, "adapters act"
    for number in (0, 1, 2, 8, 9):
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


@pytest.mark.parametrize("export", [merged.export, gguf_lora.export, gguf_model.export])
def test_adapters_on_experts_are_exported_as_peft_alone(
    export: Any, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load_base(BaseSettings(folders("mixtral")))
    folder = save_on_experts(base, tmp_path / "adapter")
    with pytest.raises(ExportError, match="export it as peft"):
        export(
            folder, tmp_path / "out", base=str(folders("mixtral")), options={"name": "mine"},
            progress=lambda stage, part: None,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
