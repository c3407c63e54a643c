"""Tensor names as trainers and other classes of the model write them: all are read, or none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.adapters.format_support import (
    A0,
    B0,
    BASE,
    HEAD,
    LAYERS,
    NORM,
    PAIR,
    PREFIX,
    Q0,
    ROWS,
    WEIGHTS,
    entry,
    read,
    refusal,
    train,
    write,
    write_raw,
)
from tests.tiny import load_folder
from torch import nn
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from onebase_adapters.format.canonical import AdapterFormatError, AdapterSpec
from onebase_adapters.format.spellings import TensorName, spelling, unwrapped
from onebase_engine.base.layers import LayerShape, adaptable_layers
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.base.view import view
from onebase_engine.kernels.weights import LoraWeights

# ---- what wraps a name ------------------------------------------------------------------------------

KEYS = [
    A0,
    B0,
    f"{PREFIX}{Q0}.lora_B.bias",
    f"{PREFIX}{Q0}.lora_magnitude_vector",
    f"{PREFIX}model.embed_tokens.lora_embedding_A",
    f"{PREFIX}model.embed_tokens.lora_embedding_B",
    f"{PREFIX}{NORM}.weight",
    f"{PREFIX}{NORM}.bias",
    ROWS,
]


def of_adapter(key: str, name: str) -> str:
    """The key as it stands in the state dict of a live PEFT model."""
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        if f".{part}" in key:
            return key.replace(f".{part}", f".{part}.{name}")
    if "trainable_tokens_delta" in key:
        return f"{key}.{name}"
    module, _, parameter = key.rpartition(".")
    return f"{module}.modules_to_save.{name}.{parameter}"


WHOLE: dict[str, Callable[[str], str]] = {
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "prefix twice": lambda key: PREFIX + key,
    "an adapter's name": lambda key: of_adapter(key, "default"),
    "another name": lambda key: of_adapter(key, "my-run_3"),
    "distributed": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "sharded": lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module.").replace(
        PREFIX, f"_fsdp_wrapped_module.{PREFIX}"
    ),
}
"""Ways to write all keys of a file."""
WRAPPERS = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]


@settings(deadline=None, max_examples=300)
@given(
    st.sets(st.sampled_from(KEYS), min_size=1),
    st.lists(st.sampled_from(sorted(WHOLE)), max_size=1),
    st.randoms(use_true_random=False),
)
def test_wrapped_names_are_read_back(keys: set[str], ways: list[str], random: Any) -> None:
    def wrap(key: str) -> str:
        for way in ways:
            key = WHOLE[way](key)
        parts = key.split(".")
        for _ in range(random.randrange(3)):
            parts.insert(random.randrange(len(parts)), random.choice(WRAPPERS))
        return ".".join(parts)

    written = {wrap(key): key for key in keys}
    names, notes = unwrapped(written)
    assert {name: read.plain for name, read in names.items()} == written
    assert bool(notes) == (set(written) != keys)


@settings(deadline=None, max_examples=100)
@given(st.permutations(KEYS), st.sampled_from(["no prefix", "prefix twice", "an adapter's name"]), st.data())
def test_names_of_which_some_are_written_otherwise_are_refused(
    keys: list[str], way: str, data: st.DataObject
) -> None:
    named = [key for key in keys if NORM not in key]  # a plain weight tells nothing of an adapter's name
    count = data.draw(st.integers(1, len(named) - 1))
    mixed = [WHOLE[way](key) for key in named[:count]] + named[count:]
    with pytest.raises(AdapterFormatError, match=r"named alike|Save one adapter") as refused:
        unwrapped(mixed)
    assert refused.value.code == "foreign_tensor"


def test_two_adapters_in_one_file_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, {of_adapter(A0, "first"): PAIR[A0], of_adapter(B0, "second"): PAIR[B0]})
    error = refusal(tmp_path)
    assert error.code == "foreign_tensor"
    assert "first" in str(error)
    assert "second" in str(error)


def test_names_that_meet_after_reading_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {**PAIR, A0.replace("layers.0.", "layers.0._orig_mod."): PAIR[A0].clone()})
    assert refusal(tmp_path).code == "bad_weights"


@pytest.mark.parametrize(
    "name", ["", ".", "_orig_mod", "module", "base_model.model", "lora_A", "lora_A.weight"]
)
def test_a_name_of_nothing_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, {name: PAIR[A0]})
    assert refusal(tmp_path).code in ("foreign_tensor", "unknown_module")


@pytest.mark.parametrize("odd", ["\x1b[31m", "\ud800", "a\nb"])
def test_an_odd_name_of_an_adapter_reaches_no_report(tmp_path: Path, odd: str) -> None:
    header = {of_adapter(A0, odd): entry(0, [2, 8]), of_adapter(B0, odd): entry(64, [6, 2])}
    write(tmp_path)
    write_raw(tmp_path, header, bytes(112))
    assert refusal(tmp_path).code == "foreign_tensor"


@pytest.mark.parametrize("way", sorted(WHOLE))
def test_a_wrapped_file_is_the_plain_one_and_its_report_tells(tmp_path: Path, way: str) -> None:
    for folder in ("plain", "wrapped", "a", "b"):
        (tmp_path / folder).mkdir()
    norm = {f"{PREFIX}{NORM}.weight": torch.ones(8), f"{PREFIX}{NORM}.bias": torch.ones(8)}
    plain = write(tmp_path / "plain", {**PAIR, **norm}, modules_to_save=["model.norm"])
    changed = {WHOLE[way](name): tensor for name, tensor in {**PAIR, **norm}.items()}
    wrapped = write(tmp_path / "wrapped", changed, modules_to_save=["model.norm"])
    one, other = read(plain, target=tmp_path / "a"), read(wrapped, target=tmp_path / "b")
    assert other.modules == one.modules
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert not one.warnings
    assert "is read as base_model.model." in other.warnings[0]


def test_the_weights_of_a_live_peft_model_are_read(tmp_path: Path) -> None:
    """A state dict also has the base's own weights, which are dropped as everywhere."""
    raw = {of_adapter(name, "default"): tensor for name, tensor in PAIR.items()}
    raw[f"{PREFIX}{NORM}.original_module.weight"] = BASE[f"{NORM}.weight"]
    raw[f"{PREFIX}{NORM}.modules_to_save.default.weight"] = torch.full((8,), 2.0)
    raw[f"{PREFIX}{NORM}.modules_to_save.default.bias"] = torch.ones(8)
    spec = read(write(tmp_path, raw, modules_to_save=["model.norm"]))
    assert spec.dropped == (f"{PREFIX}{NORM}.original_module.weight",)
    assert spec.kinds == ["lora", "saved"]


# ---- the names of other classes ---------------------------------------------------------------------

TEXT = list(LAYERS)
COMPOSITE = {
    ("lm_head" if name == HEAD else name.replace("model.", "model.language_model.", 1)): layer
    for name, layer in LAYERS.items()
}
TOWER = {
    "model.vision_tower.encoder.layers.0.self_attn.q_proj": LayerShape(8, 6),
    "model.multi_modal_projector.linear": LayerShape(8, 6),
}
CLASSES: dict[str, tuple[str, str]] = {
    "text": ("model", "lm_head"),
    "composite": ("model.language_model", "lm_head"),
    "composite until 4.51": ("language_model.model", "language_model.lm_head"),
    "decoder alone": ("", "lm_head"),
    "composite without a head": ("language_model", "lm_head"),
    "text, twice": ("model.model", "model.lm_head"),
    "composite, twice": ("model.model.language_model", "model.lm_head"),
    "SmolVLM": ("model.text_model", "lm_head"),
}
BASES = {"text": LAYERS, "composite": COMPOSITE, "with its tower": {**TOWER, **COMPOSITE}}


def in_class(name: str, of: str) -> str:
    """The name of a layer of the text model in another class."""
    decoder, head = CLASSES[of]
    return head if name == HEAD else f"{decoder}.{name.removeprefix('model.')}".removeprefix(".")


@settings(deadline=None, max_examples=200)
@given(
    st.sets(st.sampled_from(TEXT), min_size=1),
    st.sampled_from(sorted(CLASSES)),
    st.sampled_from(sorted(BASES)),
    st.booleans(),
)
def test_names_of_every_class_are_read_on_every_base(
    layers: set[str], of: str, base: str, tower: bool
) -> None:
    tower = tower and "twice" not in of
    own = "text" if base == "text" else "composite"
    wanted = {in_class(name, of): in_class(name, own) for name in layers}
    if tower:
        part = "vision_tower.encoder.layers.0.self_attn.q_proj"
        wanted[f"model.{part}" if of == "composite" else part] = f"model.{part}"
    names = {f"{name}.lora_A.weight": TensorName(name, ".lora_A.weight") for name in wanted}
    found = spelling(names, BASES[base], lambda parameter: False)
    if tower and base != "with its tower":
        left_out = {name for name in names if "vision_tower" in name}
        assert found.left_out.keys() == left_out
        names = {name: key for name, key in names.items() if name not in left_out}
        assert "left out" in found.notes[-1]
    assert {name: found.names[name].module for name in names} == {
        name: wanted[key.module] for name, key in names.items()
    }
    for name in layers:
        assert found.of_layers[in_class(name, own)] in (in_class(name, of), in_class(name, own))


@settings(deadline=None, max_examples=100)
@given(st.permutations([name for name in TEXT if name != HEAD]), st.integers(1, 5), st.data())
def test_names_of_two_classes_in_one_file_are_not_read(
    layers: list[str], count: int, data: st.DataObject
) -> None:
    one, other = data.draw(
        st.sampled_from(
            [("text", "composite"), ("composite", "composite until 4.51"), ("text", "decoder alone")]
        )
    )
    mixed = [in_class(name, one) for name in layers[:count]] + [
        in_class(name, other) for name in layers[count:]
    ]
    names = {name: TensorName(name, ".lora_A.weight") for name in mixed}
    for base in (LAYERS, COMPOSITE):
        found = spelling(names, base, lambda parameter: False)
        assert found.names == names  # as they are, of which one is no layer of the base
        assert not all(name in base for name in mixed)


def test_a_mixture_is_refused_with_the_name_and_the_way_out(tmp_path: Path) -> None:
    other = B0.replace("model.layers", "language_model.model.layers")
    error = refusal(write(tmp_path, {A0: PAIR[A0], other: PAIR[B0]}))
    assert error.code == "unknown_module"
    assert "language_model.model.layers.0.self_attn.q_proj" in str(error)
    assert "all tensors" in str(error)


def test_names_with_two_meanings_are_refused() -> None:
    names = {A0: TensorName(Q0.removeprefix("model."), ".lora_A.weight")}
    twice = {**COMPOSITE, **{name: layer for name, layer in LAYERS.items() if layer.kind == "linear"}}
    with pytest.raises(AdapterFormatError, match="Rename") as refused:
        spelling(names, twice, lambda parameter: False)
    assert refused.value.code == "unknown_module"


def test_the_layers_of_a_tower_are_never_taken_for_those_of_the_text(tmp_path: Path) -> None:
    tower = f"{PREFIX}vision_tower.layers.0.self_attn.q_proj"
    write(tmp_path, {f"{tower}.lora_A.weight": PAIR[A0], f"{tower}.lora_B.weight": PAIR[B0]})
    error = refusal(tmp_path)
    assert error.code == "no_effect"
    assert "vision_tower" in str(error)


def test_the_config_speaks_in_the_names_of_its_own_class(tmp_path: Path) -> None:
    """Targets, patterns and saved modules are those of the class that was trained."""
    q1 = Q0.replace("0", "1")
    names = {name: in_class(name, "composite until 4.51") for name in (Q0, q1, NORM)}
    tensors = {
        f"{PREFIX}{names[Q0]}.lora_A.weight": torch.ones(3, 8),
        f"{PREFIX}{names[Q0]}.lora_B.weight": torch.ones(6, 3),
        f"{PREFIX}{names[q1]}.lora_A.weight": torch.ones(2, 8),
        f"{PREFIX}{names[q1]}.lora_B.weight": torch.ones(6, 2),
        f"{PREFIX}{names[NORM]}.weight": torch.ones(8),
        f"{PREFIX}{names[NORM]}.bias": torch.ones(8),
    }
    write(
        tmp_path,
        tensors,
        target_modules=[names[Q0], names[q1]],
        rank_pattern={f"^{names[Q0]}": 3},
        alpha_pattern={names[q1]: 7},
        modules_to_save=[names[NORM]],
    )
    for layers in (LAYERS, COMPOSITE):
        base = dict(BASE) if layers is LAYERS else {}
        spec = read(tmp_path, layers=layers, base=base)
        lora = [(module.rank, module.alpha) for module in spec.modules if module.rank]
        assert lora == [(3, 4.0), (2, 7.0)]
        assert spec.kinds == ["lora", "saved"]
    write(
        tmp_path,
        tensors,
        target_modules=[names[Q0]],
        rank_pattern={names[Q0]: 3},
        modules_to_save=[names[NORM]],
    )
    assert refusal(tmp_path, layers=COMPOSITE).code == "untargeted"


# ---- real models ------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "sliding_window": 8,
}
TOKENS = torch.tensor([[5, 9, 1, 33, 60, 2]])
FIELDS: dict[str, Any] = {
    "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|down_proj)))",
    "modules_to_save": ["model.norm"],
}
"""Targets as Unsloth writes them: for composites and for text models alike."""


@pytest.fixture(scope="module")
def gemmas() -> dict[str, nn.Module]:
    """A composite, and the text model in it with the very same weights."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config={**SIZES}, vision_config=vision, mm_tokens_per_image=4)
    whole: Any = Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)
    text: Any = Gemma3ForCausalLM(config.text_config).eval().requires_grad_(False)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    return {"composite": whole, "text": text}


def read_on(base: nn.Module, folder: Path, target: Path | None) -> AdapterSpec:
    own = dict(base.named_parameters(remove_duplicate=False))
    return read(folder, layers=adaptable_layers(base), base=own, target=target)


def answers(base: nn.Module, folder: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(view(base), str(folder)).eval()
    with torch.inference_mode():
        found: torch.Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("trained_on", ["text", "composite"])
@pytest.mark.parametrize("way", ["plain", "until 4.51", "no prefix", "live"])
def test_an_adapter_of_another_class_answers_as_where_it_was_trained(
    gemmas: dict[str, nn.Module], tmp_path: Path, trained_on: str, way: str
) -> None:
    """PEFT's own model of the canonical folder is the same on the text model and on the composite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = {**FIELDS, "modules_to_save": None} if trained_on == "composite" else FIELDS
        folder = train(gemmas[trained_on], tmp_path / "made", fields)
        expected = answers(gemmas[trained_on], folder)
        tensors = load_file(folder / WEIGHTS)
        if way == "until 4.51":
            tensors = {
                f"{PREFIX}language_model.model.{name.rpartition('layers.')[1]}{name.rpartition('layers.')[2]}"
                if "layers." in name
                else f"{PREFIX}language_model.model.norm.weight": tensor
                for name, tensor in tensors.items()
            }
        elif way == "no prefix":
            tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        elif way == "live":
            tensors = {of_adapter(name, "default"): tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / WEIGHTS)
        for name, base in gemmas.items():
            target = tmp_path / f"on-{name}"
            target.mkdir()
            spec = read_on(base, folder, target)
            assert torch.equal(answers(base, target), expected)
            assert bool(spec.warnings) == (way != "plain" or name != trained_on)


def test_a_text_model_s_adapter_is_loaded_on_a_quantized_composite(tmp_path: Path) -> None:
    """The base as a server has it: in NF4, in which only its text part is asked for."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4, "vision_use_head": False,
    }  # fmt: skip
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 512, "head_dim": 64}
    config = Gemma3Config(text_config=sizes, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    text: Any = Gemma3ForCausalLM(config.text_config).eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = train(text, tmp_path / "made", {"target_modules": ["q_proj"], "use_rslora": True})
        base = load_base(BaseSettings(folder=tmp_path / "base", quantization="nf4"))
        loaded = load_folder(base, folder)
    saved = load_file(folder / WEIGHTS)
    assert len(loaded.weights) == len(saved) // 2 == 2
    for name, module in loaded.weights.items():
        assert isinstance(module, LoraWeights)
        own = f"{PREFIX}{name.replace('model.language_model.', 'model.')}"
        assert torch.equal(module.a, saved[f"{own}.lora_A.weight"])
        assert torch.equal(module.b, saved[f"{own}.lora_B.weight"])
    assert any("is read as model.language_model." in sentence for sentence in loaded.spec.warnings)


def test_list_targets_on_a_composite_are_read_with_and_without_the_tower(
    gemmas: dict[str, nn.Module], tmp_path: Path
) -> None:
    """PEFT adapts the tower of a composite as well, which text does not pass through."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = train(gemmas["composite"], tmp_path / "made", {"target_modules": ["q_proj", "k_proj"]})
        expected = answers(gemmas["composite"], folder)
        for name, base in gemmas.items():
            target = tmp_path / name
            target.mkdir()
            spec = read_on(base, folder, target)
            assert torch.equal(answers(base, target), expected)
            assert any("see or hear" in sentence for sentence in spec.warnings) == (name == "text")
            assert any("vision_tower" in module.name for module in spec.modules) == (name == "composite")


def test_a_plain_text_adapter_reads_as_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    base: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    folder = train(base, tmp_path / "made", {"target_modules": ["q_proj"]})
    spec = read_on(base, folder, None)
    assert spec.warnings == ()
    assert {module.name for module in spec.modules} == {
        name for name in adaptable_layers(base) if name.endswith("q_proj")
    }
