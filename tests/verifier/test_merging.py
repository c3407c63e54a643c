"""The real verifier merges adapters: what it writes is PEFT's own merge, and is proved like all others."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.matrix import matrix
from tests.tiny import ATTENTION, MLP, load_folder, save_adapter
from tests.verifier.conftest import Bench, Published

from onebase_adapters.format.canonical import CONFIG_FILE, WEIGHTS_FILE
from onebase_adapters.proof.extract import extract
from onebase_engine.base.view import peft_view
from onebase_engine.kernels.weights import AdapterWeights, LoraWeights
from onebase_server.processes.verifier_client import RejectedError
from onebase_server.processes.verifier_protocol import Merge, Merged, MergeSource

_NUMBERS = itertools.count()
KINDS: dict[str, list[dict[str, Any]]] = {
    "alike": [{"r": 8, "lora_alpha": 16, "target_modules": ATTENTION}] * 2,
    "other targets and alphas": [
        {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
        {"r": 8, "lora_alpha": 5, "target_modules": [*ATTENTION, *MLP]},
    ],
    "head and embedding": [{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head", "embed_tokens"]}]
    * 2,
    "ranks of their own": [
        {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION, "rank_pattern": {"o_proj": 12}}
    ]
    * 2,
}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "ties": {"density": 0.5},
    "ties by frequency": {"density": 0.5, "majority_sign_method": "frequency"},
    "dare_linear": {"density": 0.7},
    "dare_ties": {"density": 0.7},
}
WEIGHTS = (0.7, -1.5)


@pytest.fixture(scope="module")
def folders(published: Published, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two adapters of each of KINDS."""
    parent = tmp_path_factory.mktemp("parents")
    return {
        kind: [
            save_adapter(published.base, settings, parent / f"{kind}-{number}", seed=number, std=0.2)
            for number, settings in enumerate(both)
        ]
        for kind, both in KINDS.items()
    }


def merge(bench: Bench, parents: list[Path], method: str = "linear", seed: int = 0, **how: Any) -> Path:
    """A folder with what the verifier made of the parents."""
    folder = bench.scratch / f"merged-{next(_NUMBERS)}"
    folder.mkdir()
    job = Merge(
        digest=folder.name,
        parents=[
            MergeSource(parent.name, str(parent / CONFIG_FILE), str(parent / WEIGHTS_FILE), weight)
            for parent, weight in zip(parents, WEIGHTS, strict=False)
        ],
        method=method,  # type: ignore[arg-type]
        density=how.get("density"),
        sign=how.get("majority_sign_method", "total"),
        seed=seed,
        config_path=str(folder / CONFIG_FILE),
        weights_path=str(folder / WEIGHTS_FILE),
    )
    bench.run(bench.verifier._ask(job, Merged, lambda progress: None))
    return folder


def by_peft(published: Published, parents: list[Path], method: str, seed: int, **how: Any) -> AdapterWeights:
    """PEFT's own merge of the same files."""
    model: Any = PeftModel.from_pretrained(peft_view(published.base), parents[0], adapter_name="0")
    for number, parent in enumerate(parents[1:], 1):
        model.load_adapter(parent, adapter_name=str(number))
    names = [str(number) for number in range(len(parents))]
    torch.manual_seed(seed)
    model.add_weighted_adapter(names, list(WEIGHTS), "merged", combination_type=method, **how)
    return extract(model, "merged")


@pytest.mark.parametrize(("kind", "method"), matrix(KINDS, METHODS))
def test_the_matrices_are_pefts_own(
    bench: Bench, folders: dict[str, list[Path]], kind: str, method: str
) -> None:
    name, how = method.partition(" ")[0], METHODS[method]
    folder = merge(bench, folders[kind], name, seed=5, **how)
    want = by_peft(bench.published, folders[kind], name, 5, **how)
    have = load_folder(bench.published.base, folder).weights
    assert have.keys() == want.keys()
    for module, wanted in want.items():
        found = have[module]
        assert isinstance(wanted, LoraWeights)
        assert isinstance(found, LoraWeights)
        assert (found.scale, wanted.scale) == (1.0, 1.0)
        if name == "cat":  # PEFT copies into matrices of the base's dtype
            found = replace(found, a=found.a.bfloat16().float(), b=found.b.bfloat16().float())
        assert torch.equal(found.a, wanted.a)
        assert torch.equal(found.b, wanted.b)


def test_what_was_merged_is_proved_like_any_other_and_changes_texts(
    bench: Bench, folders: dict[str, list[Path]]
) -> None:
    report = bench.prove(bench.job(merge(bench, folders["other targets and alphas"]))).report
    assert (report.kinds, report.rank, report.alpha, report.rslora) == (("lora",), 8, 8.0, False)
    assert (report.proof.modules_changed, report.proof.exact, report.proof.texts_changed) == (14, True, 2)


def test_what_dare_drops_follows_from_the_seed_alone(bench: Bench, folders: dict[str, list[Path]]) -> None:
    one, again, other = (
        (merge(bench, folders["alike"], "dare_ties", seed, density=0.5) / WEIGHTS_FILE).read_bytes()
        for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other
    zeros = [
        (tensor == 0).float().mean()
        for tensor in load_file(bench.scratch / f"merged-{next(_NUMBERS) - 1}" / WEIGHTS_FILE).values()
    ]
    assert 0.2 < sum(zeros) / len(zeros) < 0.8


def test_cat_adds_the_deltas_up(bench: Bench, folders: dict[str, list[Path]]) -> None:
    def deltas(folder: Path) -> dict[str, torch.Tensor]:
        weights = load_folder(bench.published.base, folder).weights
        return {
            name: module.scale * module.b.double() @ module.a.double()
            for name, module in weights.items()
            if isinstance(module, LoraWeights)
        }

    one, two = map(deltas, folders["other targets and alphas"])
    both = deltas(merge(bench, folders["other targets and alphas"], "cat"))
    assert both.keys() == one.keys() | two.keys()
    for name, delta in both.items():
        nothing = torch.zeros_like(delta)
        want = WEIGHTS[0] * one.get(name, nothing) + WEIGHTS[1] * two.get(name, nothing)
        torch.testing.assert_close(delta, want, rtol=1e-5, atol=1e-6)


def test_the_scale_of_rslora_is_in_the_matrices(
    bench: Bench, folders: dict[str, list[Path]], tmp_path: Path
) -> None:
    """PEFT itself would give the result the first one's rsLoRA, and so scale it twice."""
    parents = []
    for number, folder in enumerate(folders["alike"]):
        parents.append(tmp_path / str(number))
        parents[-1].mkdir()
        config = json.loads((folder / CONFIG_FILE).read_text()) | {"use_rslora": True}
        (parents[-1] / CONFIG_FILE).write_text(json.dumps(config))
        (parents[-1] / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes())
    plain, scaled = (
        load_folder(bench.published.base, merge(bench, both, "cat")).weights
        for both in (folders["alike"], parents)
    )
    for name, module in plain.items():
        other = scaled[name]
        assert isinstance(module, LoraWeights)
        assert isinstance(other, LoraWeights)
        torch.testing.assert_close(
            other.b @ other.a * other.scale, 8**0.5 * module.b @ module.a * module.scale
        )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"r": 8, "target_modules": ATTENTION, "use_dora": True}, "odd has DoRA on model.layers.0"),
        ({"r": 8, "target_modules": ATTENTION, "lora_bias": True}, "odd has lora_bias on"),
        (
            {"r": 8, "target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
            "odd has modules_to_save on lm_head",
        ),
        ({"r": 8, "target_modules": ATTENTION, "trainable_token_indices": [3]}, "odd has token rows on"),
        ({"r": 4, "target_modules": ATTENTION}, "alike-0 has rank 8 and odd rank 4: linear needs the same"),
        (
            {"r": 8, "target_modules": ATTENTION, "rank_pattern": {"o_proj": 4}},
            "has rank 8 and odd rank 4 on model.layers.0.self_attn.o_proj: linear needs the same",
        ),
    ],
    ids=["dora", "bias", "saved", "tokens", "rank", "rank of a module"],
)
def test_what_peft_cannot_merge_is_refused_by_name_and_leaves_nothing(
    bench: Bench, folders: dict[str, list[Path]], settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    odd = save_adapter(bench.published.base, settings, tmp_path / "odd", seed=7)
    with pytest.raises(RejectedError) as error:
        merge(bench, [folders["alike"][0], odd])
    assert reason in error.value.message
    left = bench.scratch / f"merged-{next(_NUMBERS) - 1}"
    assert list(left.iterdir()) == []


def test_a_merge_ends_with_its_client_and_the_next_one_is_served(
    bench: Bench, folders: dict[str, list[Path]], tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(RejectedError) as error:
        merge(bench, [folders["alike"][0], missing])
    assert error.value.code == "missing_file"
    assert merge(bench, folders["alike"]).is_dir()
