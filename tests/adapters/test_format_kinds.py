"""Each kind of adapter, as PEFT itself saves it: its canonical form is the same adapter to PEFT."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters.format_support import (
    CONFIG,
    WEIGHTS,
    layers_of,
    logits,
    read,
    read_for,
    train,
)
from tests.matrix import matrix
from tests.tiny import save_base, save_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from onebase_adapters.format.canonical import AdapterFormatError
from onebase_engine.base.load import BaseSettings, load_base

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EMBED, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"

KINDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "lora": ({"target_modules": LINEAR}, {"lora"}),
    "rslora": ({"target_modules": ATTENTION, "use_rslora": True}, {"lora"}),
    "patterns": (
        {
            "target_modules": ATTENTION,
            "rank_pattern": {"o_proj": 2, "layers.1.self_attn.q_proj": 8},
            "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 3, r"self_attn\.k_proj": 5, "k.proj": 7},
        },
        {"lora"},
    ),
    "patterns by regular expressions": (
        {
            "target_modules": ATTENTION,
            "rank_pattern": {r"layers\.[1-9]\d*\.self_attn\.(q|k)_proj": 2, ".*o_proj": 8, "[v]_proj": 3},
            "alpha_pattern": {r"^model\.(?:layers|blocks)\.0\..+": 3, "v_proj|o_proj": 5},
        },
        {"lora"},
    ),
    "set for another layer": ({"target_modules": LINEAR, "fan_in_fan_out": True, "use_dora": True}, {"dora"}),
    "some layers": ({"target_modules": ATTENTION, "layers_to_transform": [1]}, {"lora"}),
    "one layer by pattern": (
        {"target_modules": ["q_proj", HEAD], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"lora"},
    ),
    "excluded": ({"target_modules": LINEAR, "exclude_modules": ["layers.0.mlp.up_proj", "k_proj"]}, {"lora"}),
    "regular expression": ({"target_modules": r".*\.(q|v)_proj"}, {"lora"}),
    "all-linear": ({"target_modules": "all-linear", "init_lora_weights": "gaussian"}, {"lora"}),
    "dora": ({"target_modules": LINEAR, "use_dora": True}, {"dora"}),
    "dora, rslora, patterns": (
        {"target_modules": ATTENTION, "use_dora": True, "use_rslora": True, "rank_pattern": {"o_proj": 2}},
        {"dora"},
    ),
    "dora on embedding and head": ({"target_modules": ["embed_tokens", HEAD], "use_dora": True}, {"dora"}),
    "head": ({"target_modules": ["q_proj", HEAD]}, {"lora"}),
    "embedding": ({"target_modules": ["embed_tokens", "v_proj"]}, {"lora"}),
    "head and embedding": ({"target_modules": [HEAD, EMBED]}, {"lora"}),
    "alora": (
        {"target_modules": [*LINEAR, HEAD], "alora_invocation_tokens": [7, 3]},
        {"alora"},
    ),
    "lora_bias": ({"target_modules": [*LINEAR, HEAD], "lora_bias": True}, {"lora"}),
    "saved norm": ({"target_modules": ["q_proj"], "modules_to_save": [NORM]}, {"lora", "saved"}),
    "saved norms": (
        {
            "target_modules": "all-linear",
            "modules_to_save": [f"model.layers.{i}.input_layernorm" for i in (0, 1)],
        },
        {"lora", "saved"},
    ),
    "saved head": ({"target_modules": [HEAD, "q_proj"], "modules_to_save": [HEAD]}, {"lora", "saved"}),
    "saved embedding": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"lora", "saved"},
    ),
    "saved head, embedding and norm": (
        {"target_modules": ATTENTION, "use_dora": True, "modules_to_save": [HEAD, "embed_tokens", NORM]},
        {"dora", "saved"},
    ),
    "saved only": (
        {"target_modules": "dummy-target-modules", "modules_to_save": [NORM]},
        {"saved"},
    ),
    "tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 250]}, {"lora", "tokens"}),
    "tokens by name": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [0, 9]}},
        {"lora", "tokens"},
    ),
    "tokens of embedding and head": (
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [0, 9], HEAD: [0, 9]}},
        {"lora", "tokens"},
    ),
    "tokens and saved norm": (
        {"target_modules": ATTENTION, "trainable_token_indices": {EMBED: [4]}, "modules_to_save": [NORM]},
        {"lora", "saved", "tokens"},
    ),
}

TYING: dict[str, dict[str, Any]] = {
    "nothing to tie": {"target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": [HEAD, "q_proj"]},
    "both": {"target_modules": [HEAD, "embed_tokens", "q_proj"], "use_rslora": True},
    "dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": [HEAD]},
    "saved both": {"target_modules": ["q_proj"], "modules_to_save": [HEAD, "embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
}


@pytest.fixture(scope="module")
def bases_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`bases_of(architecture, quantization, dtype)`: each loaded once; no test may write to them."""
    loaded: dict[Any, nn.Module] = {}

    def _load(architecture: str, quantization: Any, dtype: torch.dtype) -> nn.Module:
        key = architecture, quantization, dtype
        if key not in loaded:
            folder = save_base(architecture, tmp_path_factory.mktemp(architecture))
            loaded[key] = load_base(BaseSettings(folder=folder, quantization=quantization, dtype=dtype))
        return loaded[key]

    return _load


BASES: dict[str, tuple[str, Any, torch.dtype]] = {
    "tied": ("llama", "none", torch.bfloat16),
    "tied fp32": ("llama", "none", torch.float32),
    "untied with biases, nf4": ("qwen2", "nf4", torch.bfloat16),
    "untied, scaled embedding": ("gemma2", "none", torch.bfloat16),
}


@pytest.fixture(params=BASES, scope="module")
def some_base(request: pytest.FixtureRequest, bases_of: Any) -> nn.Module:
    model: nn.Module = bases_of(*BASES[request.param])
    return model


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def text() -> torch.Tensor:
    tokens = torch.randint(0, 320, (1, 20), generator=torch.Generator().manual_seed(5))
    return torch.cat([tokens, torch.tensor([[7, 3, 250, 0, 9, 4, 5, 6]])], dim=1)


def fields_of(kind: str) -> dict[str, Any]:
    return {**KINDS[kind][0]}


def same_to_peft(base: nn.Module, folder: Path, target: Path, text: torch.Tensor) -> None:
    with torch.inference_mode():
        bare = base(text).logits
    theirs, ours = logits(base, folder, text), logits(base, target, text)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, bare)


@pytest.mark.parametrize(("on", "kind"), matrix(BASES, KINDS))
def test_the_canonical_form_of_each_kind_is_the_same_adapter_to_peft(
    on: str, kind: str, bases_of: Any, text: torch.Tensor, tmp_path: Path
) -> None:
    base = bases_of(*BASES[on])
    folder, target = train(base, tmp_path / "theirs", fields_of(kind)), tmp_path / "ours"
    target.mkdir()
    spec = read_for(base, folder, target)
    assert set(spec.kinds) == KINDS[kind][1]
    assert sorted(path.name for path in target.iterdir()) == [CONFIG, WEIGHTS]
    assert load_file(target / WEIGHTS).keys() == load_file(folder / WEIGHTS).keys()
    assert spec.parameters == sum(t.numel() for t in load_file(folder / WEIGHTS).values())
    same_to_peft(base, folder, target, text)
    again = tmp_path / "again"
    again.mkdir()
    assert read_for(base, target, again).modules == spec.modules
    assert (again / WEIGHTS).read_bytes() == (target / WEIGHTS).read_bytes()


@pytest.mark.parametrize("what", TYING)
@pytest.mark.parametrize("on", ["tied", "tied fp32", "untied with biases, nf4"])
def test_ensured_weight_tying_gives_what_peft_gives(
    on: str, what: str, bases_of: Any, text: torch.Tensor, tmp_path: Path
) -> None:
    base = bases_of(*BASES[on])
    folder = train(base, tmp_path / "theirs", {**TYING[what], "ensure_weight_tying": True})
    target = tmp_path / "ours"
    target.mkdir()
    spec = read_for(base, folder, target)
    assert "ensure_weight_tying" not in json.loads((target / CONFIG).read_text())
    same_to_peft(base, folder, target, text)
    if what != "nothing to tie" and on != "untied with biases, nf4":
        assert {EMBED, HEAD} <= {module.name for module in spec.modules}


def test_tied_token_rows_name_both_sides_and_count_once(bases_of: Any, tmp_path: Path) -> None:
    fields = {"target_modules": ["q_proj"], "trainable_token_indices": [9, 2]}
    tied, untied = bases_of(*BASES["tied"]), bases_of(*BASES["untied with biases, nf4"])
    both = {m.name: m for m in read_for(tied, train(tied, tmp_path / "tied", fields)).modules}
    assert both[EMBED].indices == both[HEAD].indices == (9, 2)
    assert (both[EMBED].parameters, both[HEAD].parameters) == (2 * 128, 0)
    alone = {m.name: m for m in read_for(untied, train(untied, tmp_path / "untied", fields)).modules}
    assert (alone[EMBED].indices, HEAD in alone) == ((9, 2), False)


def test_the_same_tokens_named_on_both_tied_sides_are_taken(
    bases_of: Any, text: torch.Tensor, tmp_path: Path
) -> None:
    base = bases_of(*BASES["tied"])
    fields = {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 4], HEAD: [7, 4]}}
    folder, target = train(base, tmp_path / "theirs", fields), tmp_path / "ours"
    target.mkdir()
    read_for(base, folder, target)
    same_to_peft(base, folder, target, text)


@pytest.mark.parametrize(
    ("on", "fields", "code"),
    [
        ("tied", {"trainable_token_indices": {"embed_tokens": [3], HEAD: [4]}}, "unsupported_kind"),
        ("tied", {"trainable_token_indices": {HEAD: [3]}}, "unsupported_kind"),
        ("tied", {"trainable_token_indices": [4], "target_modules": ["q_proj", HEAD]}, "unsupported_kind"),
        ("untied with biases, nf4", {"trainable_token_indices": {HEAD: [3]}}, "unsupported_kind"),
        ("tied", {"modules_to_save": ["norm"]}, "unsupported_kind"),
        ("tied", {"modules_to_save": ["input_layernorm"]}, "unsupported_kind"),
        ("tied", {"modules_to_save": ["model.layers.0.mlp.up_proj"]}, "unsupported_kind"),
        ("tied", {"modules_to_save": ["model.layers.0.mlp"]}, "unknown_module"),
    ],
    ids=lambda value: f"{value!r:.60}",
)
def test_what_peft_saves_but_is_not_served_is_refused_by_name(
    on: str, fields: dict[str, Any], code: str, bases_of: Any, tmp_path: Path
) -> None:
    base = bases_of(*BASES[on])
    folder = train(base, tmp_path, {"target_modules": ["q_proj"], **fields})
    with pytest.raises(AdapterFormatError) as refused:
        read_for(base, folder)
    assert refused.value.code == code
    assert "modules_to_save" in str(refused.value) or "trainable_token_indices" in str(refused.value)


@pytest.mark.parametrize(("quantization", "fields"), [("nf4", {}), ("int8", {}), ("nf4", {"use_dora": True})])
def test_an_adapter_trained_on_unquantized_conv1d_answers_as_by_peft(
    tmp_path: Path, text: torch.Tensor, quantization: Any, fields: dict[str, Any]
) -> None:
    """PEFT sets `fan_in_fan_out` itself for GPT-2, whose layers store their weights the other way round."""
    sizes = {"vocab_size": 320, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
    made = save_model(GPT2Config(**sizes, initializer_range=0.15), tmp_path / "base")
    trained_on = GPT2LMHeadModel.from_pretrained(made).eval().requires_grad_(False)
    targets = ["c_attn", "c_proj", "c_fc"]
    folder = train(trained_on, tmp_path / "theirs", {"target_modules": targets, **fields})
    assert json.loads((folder / CONFIG).read_text())["fan_in_fan_out"] is True
    base = load_base(BaseSettings(folder=made, quantization=quantization))
    target = tmp_path / "ours"
    target.mkdir()
    read_for(base, folder, target)
    same_to_peft(base, folder, target, text)


def test_parameters_of_which_the_file_has_no_tensors_are_accepted(
    some_base: nn.Module, text: torch.Tensor, tmp_path: Path
) -> None:
    """PEFT adds those of experts by itself, whether or not the base has any."""
    folder, target = train(some_base, tmp_path / "theirs", {"target_modules": ["q_proj"]}), tmp_path / "ours"
    target.mkdir()
    config = json.loads((folder / CONFIG).read_text())
    named = {**config, "target_parameters": ["gate_up_proj", "mlp.experts.down_proj"]}
    (folder / CONFIG).write_text(json.dumps(named))
    read_for(some_base, folder, target)
    (folder / CONFIG).write_text(json.dumps(config))
    same_to_peft(some_base, folder, target, text)


@pytest.mark.parametrize("parameter", ["q_proj.weight", "self_attn.q_proj.weight", "weight"])
def test_tensors_of_a_parameter_are_refused_by_name(
    some_base: nn.Module, tmp_path: Path, parameter: str
) -> None:
    folder = train(some_base, tmp_path, {"target_modules": ["q_proj"]})
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "target_parameters": [parameter]}))
    with pytest.raises(AdapterFormatError, match="target_parameters") as refused:
        read_for(some_base, folder)
    assert refused.value.code == "unsupported_kind"


def test_tensors_of_experts_are_refused_where_the_base_has_none(tmp_path: Path, some_base: nn.Module) -> None:
    folder = train(some_base, tmp_path, {"target_modules": ["q_proj"]})
    tensors = load_file(folder / WEIGHTS)
    experts = "base_model.model.model.layers.0.mlp.experts"
    tensors[f"{experts}.base_layer.lora_A.weight"] = torch.ones(4, 128)
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "target_parameters": ["mlp.experts.gate_up_proj"]}))
    with pytest.raises(AdapterFormatError, match=r"experts\.gate_up_proj") as refused:
        read_for(some_base, folder)
    assert refused.value.code == "unsupported_kind"


@pytest.mark.parametrize("saving", [{"save_embedding_layers": True}, {"save_embedding_layers": "auto"}])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", HEAD], ["embed_tokens"], ["embed_tokens", HEAD]])
def test_embeddings_that_peft_saves_beside_the_adapter_are_left_out(
    some_base: nn.Module,
    targets: list[str],
    saving: dict[str, Any],
    text: torch.Tensor,
    tmp_path: Path,
) -> None:
    folder = train(some_base, tmp_path / "theirs", {"target_modules": targets}, **saving)
    beside = {name for name in load_file(folder / WEIGHTS) if "lora_" not in name}
    assert beside or saving["save_embedding_layers"] == "auto"
    target = tmp_path / "ours"
    target.mkdir()
    spec = read_for(some_base, folder, target)
    assert set(spec.dropped) == beside
    assert load_file(folder / WEIGHTS).keys() - load_file(target / WEIGHTS).keys() == beside
    same_to_peft(some_base, folder, target, text)
    if beside:
        tensors = load_file(folder / WEIGHTS)
        changed = sorted(beside)[-1]
        tensors[changed][-1, -1] += 1
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(AdapterFormatError, match="other values than this base has") as refused:
            read_for(some_base, folder)
        assert refused.value.code == "foreign_tensor"


def test_half_precision_files_are_written_in_fp32_and_saved_modules_as_they_are(
    bases_of: Any, text: torch.Tensor, tmp_path: Path
) -> None:
    base = bases_of(*BASES["tied"])
    fields = {"target_modules": ["q_proj"], "use_dora": True, "modules_to_save": [NORM]}
    folder = train(base, tmp_path / "theirs", {**fields, "trainable_token_indices": [3]})
    stored = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(stored, folder / WEIGHTS)
    target = tmp_path / "ours"
    target.mkdir()
    read_for(base, folder, target)
    written = load_file(target / WEIGHTS)
    assert written.keys() == stored.keys()
    for name, tensor in written.items():
        assert tensor.dtype == (torch.float16 if "norm" in name else torch.float32)
        assert torch.equal(tensor, stored[name].to(tensor.dtype))
    same_to_peft(base, folder, target, text)


def test_magnitudes_under_their_older_name_are_taken(
    bases_of: Any, text: torch.Tensor, tmp_path: Path
) -> None:
    base = bases_of(*BASES["tied"])
    folder = train(base, tmp_path / "theirs", {"target_modules": ["q_proj"], "use_dora": True})
    old = {
        f"{name}.weight" if name.endswith("magnitude_vector") else name: tensor
        for name, tensor in load_file(folder / WEIGHTS).items()
    }
    save_file(old, folder / WEIGHTS)
    target = tmp_path / "ours"
    target.mkdir()
    read_for(base, folder, target)
    same_to_peft(base, folder, target, text)
    both = {**old, **load_file(target / WEIGHTS)}
    save_file(both, folder / WEIGHTS)
    with pytest.raises(AdapterFormatError, match="has two lora_magnitude_vector"):
        read_for(base, folder)


def test_the_spec_tells_kind_rank_alpha_bias_and_parameters(bases_of: Any, tmp_path: Path) -> None:
    base = bases_of(*BASES["untied with biases, nf4"])
    fields = {
        "target_modules": ["q_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 8},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
        "lora_bias": True,
        "modules_to_save": [NORM],
    }
    spec = read_for(base, train(base, tmp_path, fields))
    told = {m.name: (m.kind, m.rank, m.alpha, m.bias, m.parameters) for m in spec.modules}
    assert told == {
        "model.layers.0.self_attn.q_proj": ("lora", 4, 3.0, True, 2 * 4 * 128 + 128),
        "model.layers.1.self_attn.q_proj": ("lora", 8, 6.0, True, 2 * 8 * 128 + 128),
        NORM: ("saved", 0, 0.0, False, 128),
    }
    assert (spec.rank, spec.alpha, spec.targets) == (8, 6.0, ["norm", "q_proj"])


def test_a_list_of_parameters_that_leaves_out_the_tied_head_is_enough(bases_of: Any, tmp_path: Path) -> None:
    base = bases_of(*BASES["tied"])
    assert f"{HEAD}.weight" not in dict(base.named_parameters())
    every = dict(base.named_parameters(remove_duplicate=False))
    folder = train(base, tmp_path, {"target_modules": ["q_proj"], "trainable_token_indices": [1]})
    assert read(folder, layers=layers_of(base), base=every) == read_for(base, folder)
