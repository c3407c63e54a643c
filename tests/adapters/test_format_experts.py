"""Adapters on a mixture's experts as PEFT writes them: read as PEFT reads them, or refused by name."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.adapters.format_support import CONFIG, PREFIX, WEIGHTS, read, train
from torch import nn

from onebase_adapters.format.canonical import AdapterFormatError, AdapterSpec
from onebase_adapters.format.config import MAX_HEADER_BYTES
from onebase_adapters.format.strict_json import is_dense
from onebase_engine.base.experts import use_own_code
from onebase_engine.base.layers import adaptable_layers
from onebase_engine.base.view import peft_view, view

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
EXPERTS = "model.layers.0.mlp.experts"
INNER, OUTER = f"{PREFIX}{EXPERTS}.base_layer", f"{PREFIX}{EXPERTS}"
_SIZES: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
}
BASES: dict[str, Callable[[], Any]] = {
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_SIZES, num_experts=3),
    "gpt_oss": lambda: tf.GptOssConfig(**_SIZES, num_local_experts=3),
    "mixtral": lambda: tf.MixtralConfig(**_SIZES, num_local_experts=3),
}


def model_of(kind: str, **sizes: int) -> nn.Module:
    torch.manual_seed(0)
    config = BASES[kind]()
    for name, size in sizes.items():
        setattr(config, name, size)
    model: nn.Module = tf.AutoModelForCausalLM.from_config(config)
    use_own_code(model)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def base(request: pytest.FixtureRequest) -> nn.Module:
    return model_of(request.param)


def read_for(base: nn.Module, folder: Path, target: Path | None = None, max_rank: int = 64) -> AdapterSpec:
    own = dict(base.named_parameters(remove_duplicate=False))
    return read(folder, max_rank, adaptable_layers(base), own, target)


def made(base: nn.Module, folder: Path, **fields: Any) -> Path:
    wanted = {"target_modules": [], "target_parameters": [UP, DOWN], "r": 2, **fields}
    return train(peft_view(base), folder, wanted)


def answer(base: nn.Module, folder: Path) -> torch.Tensor:
    """PEFT's logits with the adapter, which has to use every tensor of the file."""
    tokens = torch.arange(9)[None]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(peft_view(base), str(folder)).eval()
        result: torch.Tensor = model(tokens).logits
    return result


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], **fields: Any) -> None:
    """Change the files of an adapter."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def keep(tensors: dict[str, torch.Tensor]) -> None:
    """Change nothing."""


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"target_parameters": [UP]},
        {"target_parameters": [DOWN]},
        {"target_parameters": ["down_proj", "gate_up_proj"]},
        {"target_parameters": ["layers.1." + DOWN, "layers.0." + UP]},
        {"target_modules": ["q_proj"], "use_rslora": True},
        {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"gate_up_proj": 5}},
        {"rank_pattern": {r".*\.gate_up_proj": 4}, "alpha_pattern": {r".*\.gate_up_proj": 12}},
    ],
    ids=str,
)
def test_what_peft_saves_is_read_as_peft_reads_it(
    base: nn.Module, fields: dict[str, Any], tmp_path: Path
) -> None:
    folder, target = made(base, tmp_path / "theirs", **fields), tmp_path / "ours"
    target.mkdir()
    spec = read_for(base, folder, target)
    assert torch.equal(answer(base, target), answer(base, folder))
    assert not torch.equal(answer(base, folder), view(base)(torch.arange(9)[None]).logits)
    assert {module.experts for module in spec.modules if "experts" in module.name} == {3}
    assert read_for(base, target).modules == spec.modules
    assert all(name in adaptable_layers(base) for name in (module.name for module in spec.modules))


def test_parameters_that_were_wrapped_in_another_order_are_told_by_their_shapes(
    base: nn.Module, tmp_path: Path
) -> None:
    folder, target = made(base, tmp_path / "theirs"), tmp_path / "ours"
    expected = answer(base, folder)
    target.mkdir()

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".base_layer." in name]:
            other = name.replace(".base_layer", "")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    changed(folder, swap)
    read_for(base, folder, target)
    assert torch.equal(answer(base, target), expected)


def _turn(tensors: dict[str, torch.Tensor], count: int = 3) -> None:
    """A and B where PEFT had them before 0.19.1, of parameters that it takes for [experts, in, out]."""
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        a, b = tensors[name], tensors[other]
        tensors[name] = b.view(len(b), -1, count).permute(2, 1, 0).reshape(-1, len(b))
        tensors[other] = a.view(count, -1, a.shape[1]).permute(2, 1, 0).reshape(a.shape[1], -1)


@pytest.mark.parametrize("parameters", [[UP, DOWN], [DOWN]], ids=str)
def test_matrices_on_the_sides_of_an_earlier_peft_are_turned(parameters: list[str], tmp_path: Path) -> None:
    base = model_of("qwen3_moe")
    folder, target = made(base, tmp_path / "theirs", target_parameters=parameters), tmp_path / "ours"
    target.mkdir()
    expected = answer(base, folder)
    delta = PeftModel.from_pretrained(peft_view(base), str(folder))
    wrapper: Any = delta.get_submodule(f"base_model.model.{EXPERTS}")
    new = wrapper.get_delta_weight("default")
    changed(folder, _turn, peft_version="0.18.1")
    # As that release computes it.
    tensors = load_file(folder / WEIGHTS)
    a, b = (tensors[f"{OUTER}.lora_{part}.weight"] for part in "AB")
    old = torch.einsum("ore,eri->eio", b.view(len(b), -1, 3), a.view(3, -1, a.shape[1])) * 3.0
    assert torch.allclose(old, new, atol=1e-6)
    spec = read_for(base, folder, target)
    assert torch.equal(answer(base, target), expected)
    assert any("0.19.1" in warning for warning in spec.warnings)


@pytest.mark.parametrize(("release", "turned"), [("0.18.1", True), ("0.19.1", False), ("0.21.2.dev0", False)])
def test_of_square_matrices_the_release_tells_the_sides(release: str, turned: bool, tmp_path: Path) -> None:
    base = model_of("qwen3_moe", moe_intermediate_size=16)
    folder, target = made(base, tmp_path / "theirs", target_parameters=[DOWN]), tmp_path / "ours"
    target.mkdir()
    expected = answer(base, folder)
    changed(folder, _turn if turned else keep, peft_version=release)
    read_for(base, folder, target)
    assert torch.equal(answer(base, target), expected)
    changed(folder, keep, peft_version=None)
    with pytest.raises(AdapterFormatError, match="peft_version") as refused:
        read_for(base, folder)
    assert refused.value.code == "bad_shape"


def test_parameters_that_are_in_out_were_never_turned(tmp_path: Path) -> None:
    base = model_of("gpt_oss")
    folder = made(base, tmp_path / "theirs")
    changed(folder, _turn, peft_version="0.18.1")
    with pytest.raises(AdapterFormatError, match="this base needs") as refused:
        read_for(base, folder)
    assert refused.value.code == "bad_shape"


@pytest.mark.parametrize(
    ("change", "fields", "code", "named"),
    [
        pytest.param(keep, {"use_dora": True}, "unsupported_kind", "use_dora", id="dora"),
        pytest.param(keep, {"lora_bias": True}, "unsupported_kind", "lora_bias", id="bias"),
        pytest.param(keep, {"target_parameters": [UP]}, "untargeted", "gate_up_proj", id="one target"),
        pytest.param(keep, {"target_parameters": []}, "untargeted", "none", id="no targets"),
        pytest.param(keep, {"r": 3}, "bad_shape", "rank 3", id="rank"),
        pytest.param(
            lambda tensors: tensors.pop(f"{INNER}.lora_B.weight"), {}, "incomplete", "lora_B", id="no B"
        ),
        pytest.param(
            lambda tensors: [tensors.pop(f"{OUTER}.lora_{part}.weight") for part in "AB"],
            {}, "incomplete", "2 of them", id="one parameter",
        ),
        pytest.param(
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.1." in name],
            {}, "incomplete", "layers.1.mlp.experts", id="one layer",
        ),
        pytest.param(
            lambda tensors: tensors.update({f"{INNER}.base_layer.lora_A.weight": torch.ones(6, 16)}),
            {}, "untargeted", "3 parameters", id="too deep",
        ),
        pytest.param(
            lambda tensors: tensors.update({f"{OUTER}.lora_B.bias": torch.ones(16)}),
            {}, "foreign_tensor", "lora_B.bias", id="a bias",
        ),
        pytest.param(keep, {"r": 65}, "rank_too_large", "limit is 64", id="too large"),
    ],
)  # fmt: skip
def test_what_is_not_such_an_adapter_is_refused_by_name(
    base: nn.Module,
    change: Callable[[dict[str, torch.Tensor]], None],
    fields: dict[str, Any],
    code: str,
    named: str,
    tmp_path: Path,
) -> None:
    folder = made(base, tmp_path)
    changed(folder, change, **fields)
    with pytest.raises(AdapterFormatError) as refused:
        read_for(base, folder)
    assert refused.value.code == code
    assert named in str(refused.value)


# ---- experts that were layers ----------------------------------------------------------------------

SPELLINGS = {
    "qwen3_moe": ("mlp.experts", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    "mixtral": ("block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
}
"""Names that transformers 4 had for the experts of a layer, and for the layers of one."""
RANK, ALPHA = 2, 6.0


def saved_singly(
    kind: str,
    folder: Path,
    adapted: Sequence[str] = ("gate", "up", "down"),
    change: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
    **fields: Any,
) -> Path:
    """An adapter of each single expert, as PEFT saved it on transformers 4."""
    mixture, names = SPELLINGS[kind]
    draw = torch.Generator().manual_seed(5)
    tensors = {}
    for layer, expert, what in itertools.product(range(2), range(3), adapted):
        size_in, size_out = (24, 16) if what == "down" else (16, 24)
        name = f"{PREFIX}model.layers.{layer}.{mixture}.{expert}.{names[what]}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, size_in, generator=draw)
        tensors[f"{name}.lora_B.weight"] = torch.randn(size_out, RANK, generator=draw)
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [names[what] for what in adapted],
        "peft_version": "0.17.1",
    }
    (folder / CONFIG).write_text(json.dumps(config | fields))
    return folder


@torch.no_grad()
def with_differences(base: nn.Module, kind: str, folder: Path, scale: float) -> torch.Tensor:
    """Logits of the base with each expert's B @ A added to its rows, without PEFT."""
    mixture, names = SPELLINGS[kind]
    tensors, model = load_file(folder / WEIGHTS), copy.deepcopy(base)
    rows = {"gate": slice(0, 24), "up": slice(24, 48), "down": slice(None)}
    for layer, expert, (what, name) in itertools.product(range(2), range(3), names.items()):
        path = f"{PREFIX}model.layers.{layer}.{mixture}.{expert}.{name}"
        if f"{path}.lora_A.weight" in tensors:
            own = model.get_submodule(f"model.layers.{layer}.mlp.experts")
            stack: Any = own.down_proj if what == "down" else own.gate_up_proj
            delta = tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
            stack[expert, rows[what]] += scale * delta
    logits: torch.Tensor = model(torch.arange(9)[None]).logits
    return logits


@pytest.mark.parametrize("kind", SPELLINGS)
@pytest.mark.parametrize("adapted", [("gate", "up", "down"), ("gate", "up"), ("down",), ("up",)], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_matrices_of_single_experts_add_what_they_added(
    kind: str, adapted: Sequence[str], rslora: bool, tmp_path: Path
) -> None:
    base, target = model_of(kind), tmp_path / "ours"
    folder = saved_singly(kind, tmp_path / "theirs", adapted, use_rslora=rslora)
    target.mkdir()
    spec = read_for(base, folder, target)
    scale = ALPHA / (RANK**0.5 if rslora else RANK)
    found = answer(base, target)
    torch.testing.assert_close(found, with_differences(base, kind, folder, scale), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, view(base)(torch.arange(9)[None]).logits, atol=1e-2)
    ranks = {module.name.rpartition(".")[2]: module.rank for module in spec.modules}
    halves = len(set(adapted) & {"gate", "up"})
    expected = ({"gate_up_proj": halves * RANK} if halves else {}) | (
        {"down_proj": RANK} if "down" in adapted else {}
    )
    assert ranks == expected
    assert any("single experts" in warning for warning in spec.warnings)
    assert not any("no tensors" in warning for warning in spec.warnings)
    # PEFT's own conversion, which with rsLoRA adds sqrt(2) of it, and loads all three or `down` alone.
    if not rslora and len(adapted) != 2 and "down" in adapted:
        peft = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
        torch.testing.assert_close(found, peft(torch.arange(9)[None]).logits, rtol=1e-5, atol=1e-5)


def _without(*ends: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(ends)]:
            del tensors[name]

    return change


@pytest.mark.parametrize(
    ("kind", "change", "fields", "code", "named"),
    [
        pytest.param(
            "mixtral", _without("experts.1.w3.lora_B.weight"), {}, "incomplete", "expert 1", id="no B"
        ),
        pytest.param(
            "qwen3_moe",
            _without("1.mlp.experts.2.down_proj.lora_A.weight", "1.mlp.experts.2.down_proj.lora_B.weight"),
            {}, "incomplete", "layers.1.mlp.experts.down_proj", id="no expert",
        ),
        pytest.param(
            "qwen3_moe",
            lambda tensors: tensors.update(
                {name.replace("experts.0", "experts.7"): one.clone() for name, one in tensors.items()}
            ),
            {}, "unknown_module", "3 experts, and no 7", id="too many",
        ),
        pytest.param(
            "qwen3_moe",
            lambda tensors: tensors.update(
                {f"{PREFIX}model.layers.0.mlp.gate.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
            ),
            {}, "unknown_module", "router", id="router",
        ),
        pytest.param("mixtral", keep, {"use_dora": True}, "unsupported_kind", "DoRA", id="dora"),
        pytest.param("mixtral", keep, {"r": 3}, "bad_shape", "rank 3", id="rank"),
        pytest.param(
            "mixtral", keep, {"alpha_pattern": {"experts.1.w1": 9}}, "unsupported_kind", "differ in rank",
            id="alphas",
        ),
    ],
)  # fmt: skip
def test_matrices_of_single_experts_that_no_parameter_can_have_are_refused(
    kind: str,
    change: Callable[[dict[str, torch.Tensor]], None],
    fields: dict[str, Any],
    code: str,
    named: str,
    tmp_path: Path,
) -> None:
    folder = saved_singly(kind, tmp_path / "adapter", change=change, **fields)
    with pytest.raises(AdapterFormatError) as refused:
        read_for(model_of(kind), folder)
    assert refused.value.code == code
    assert named in str(refused.value)


def test_the_header_of_an_adapter_of_each_expert_of_a_large_mixture_is_read() -> None:
    header: dict[str, Any] = {}
    names = itertools.product(range(48), range(128), ("gate_proj", "up_proj", "down_proj"), "AB")
    for number, (layer, expert, name, part) in enumerate(names):  # of Qwen3-30B-A3B, of rank 32 in bf16
        tensor = f"{PREFIX}model.layers.{layer}.mlp.experts.{expert}.{name}.lora_{part}.weight"
        shape = [32, 2048] if part == "A" else [2048, 32]
        offsets = [number * 131072, (number + 1) * 131072]
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) < MAX_HEADER_BYTES
    assert not is_dense(text)
    assert is_dense(json.dumps([[]] * (1 << 20)).encode())


def test_single_experts_of_a_base_with_another_layout_are_refused(tmp_path: Path) -> None:
    folder = saved_singly("qwen3_moe", tmp_path / "adapter")
    with pytest.raises(AdapterFormatError, match="another way than Mixtral") as refused:
        read_for(model_of("gpt_oss"), folder)
    assert refused.value.code == "unsupported_kind"


ACCIDENTS: dict[str, list[Any]] = {
    "r": [1, 2, 3],
    "lora_alpha": [0, 1.5, -2, 6],
    "rank_pattern": [{}, {"down_proj": 2}, {"down_proj": 3}, {"experts.gate_up_proj": 2}],
    "alpha_pattern": [{}, {"down_proj": 9}, {"^down_proj": 9}, {"layers.1.mlp.experts.down_proj": 1}],
    "use_rslora": [True, False],
    "target_modules": [[], ["q_proj"], ["down_proj"]],
    "target_parameters": [[UP, DOWN], [UP], [DOWN], ["gate_up_proj", "down_proj"], [UP, "layers.0." + DOWN]],
}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_adapter_with_accidents_is_refused_or_the_same_to_peft(
    base: nn.Module, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, target = Path(place) / "theirs", Path(place) / "ours"
        target.mkdir()
        parameters = data.draw(st.sampled_from(ACCIDENTS["target_parameters"]))
        made(base, folder, target_parameters=parameters)
        fields = {
            name: data.draw(st.sampled_from(values))
            for name, values in ACCIDENTS.items()
            if data.draw(st.integers(0, 3)) == 0
        }

        def accident(tensors: dict[str, torch.Tensor]) -> None:
            name = data.draw(st.sampled_from(sorted(tensors)))
            match data.draw(st.sampled_from(["none", "none", "gone", "nested", "bare", "shape"])):
                case "gone":
                    del tensors[name]
                case "nested":
                    tensors[name.replace(".lora_", ".base_layer.lora_")] = tensors.pop(name)
                case "bare":
                    tensors[name.replace(".base_layer", "")] = tensors.pop(name)
                case "shape":
                    tensors[name] = tensors[name][:-1]

        changed(folder, accident, **fields)
        try:
            read_for(base, folder, target)
        except AdapterFormatError:
            return
        assert torch.equal(answer(base, target), answer(base, folder))
