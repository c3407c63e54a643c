"""LoRA on a mixture's experts: PEFT's files and its function, each row by its own adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.harness import Lab, Request, run
from tests.tiny import load_folder, plain_experts, save_base, save_on_experts
from torch import nn

from onebase_adapters.proof.modules import ModuleProver
from onebase_engine.base.experts import expert_modules
from onebase_engine.base.load import BaseSettings, fingerprint, load_base
from onebase_engine.kernels.cpu import load_library
from onebase_engine.kernels.interface import Kernels
from onebase_engine.kernels.reference import ReferenceKernels
from onebase_engine.kernels.weights import ExpertLora, folded

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
