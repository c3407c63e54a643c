"""The language model of a composite is served alone, as PEFT computes it in the whole model."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tests.device import DEVICE
from tests.engine.harness import Lab, Request, run
from tests.tiny import ATTENTION, COMPOSITES, HYBRIDS, MLP, load_folder, randomize, save_model
from tests.training.runs import recipe_for, samples, trainer
from transformers import AutoConfig, BitsAndBytesConfig

from onebase_adapters.format.canonical import WEIGHTS_FILE, AdapterFormatError
from onebase_adapters.proof.texts import TextProver
from onebase_engine.base.attach import attach, publish
from onebase_engine.base.layers import left_out, whole_class
from onebase_engine.base.load import BaseSettings, base_bytes, freeze, load_base, needed_memory
from onebase_engine.base.view import peft_view, view
from onebase_engine.engine import base_proof
from onebase_training.checkpoint import write_adapter

ADAPTERS: list[dict[str, Any]] = [
    {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION + MLP},
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head", "embed_tokens"]},
]


def whole_model(folder: Path) -> Any:
    """The whole composite in NF4, as transformers itself loads it."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = whole_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder,
        quantization_config=settings,
        dtype=torch.bfloat16,
        device_map={"": str(DEVICE)},
        attn_implementation="eager",
    )
    return freeze(model)


def save_adapter(tree: Any, settings: dict[str, Any], folder: Path, seed: int) -> Path:
    """Save a random adapter of a whole model, as a training script with lists of names makes it."""
    torch.manual_seed(seed)
    model = get_peft_model(peft_view(tree), LoraConfig(task_type="CAUSAL_LM", **settings))
    randomize(model, 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


class Composite:
    """A composite's folder, the whole model and the served language model."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder = save_model(COMPOSITES[kind](), folder / "base")
        self.settings = BaseSettings(self.folder, device=DEVICE)
        self.whole = whole_model(self.folder)
        self.base: Any = load_base(self.settings)


@pytest.fixture(scope="module", params=COMPOSITES)
def composite(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Composite:
    return Composite(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Composite:
    return Composite("gemma3", tmp_path_factory.mktemp("gemma"))


def test_the_language_model_is_loaded_alone_and_keeps_its_names_and_weights(composite: Composite) -> None:
    own, all_of_it = dict(composite.base.named_parameters()), dict(composite.whole.named_parameters())
    assert left_out(composite.base)
    assert own.keys() < all_of_it.keys()
    others = {name for name in all_of_it.keys() - own.keys() if "language_model" in name or "lm_head" in name}
    assert not others
    assert all(torch.equal(parameter, all_of_it[name]) for name, parameter in own.items())


def test_its_logits_are_those_of_the_whole_model(composite: Composite) -> None:
    ids = torch.randint(3, 320, (1, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.inference_mode():
        own, expected = (view(tree)(input_ids=ids).logits for tree in (composite.base, composite.whole))
    assert torch.equal(own, expected)


def test_a_head_that_only_the_composite_ties_is_tied(tmp_path: Path) -> None:
    config = tf.Qwen3_5Config(
        text_config=HYBRIDS["qwen3_5"]().to_dict(),
        vision_config={
            "depth": 1,
            "num_heads": 2,
            "hidden_size": 64,
            "out_hidden_size": 128,
            "patch_size": 4,
        },
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    whole = tf.Qwen3_5ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["text_config"]["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    settings = BaseSettings(tmp_path, quantization="none", dtype=torch.float32)
    base: Any = load_base(settings)
    file = os.memfd_create("base")
    attached: Any = attach(settings, publish(base, file), file)
    assert attached.get_output_embeddings().weight is attached.get_input_embeddings().weight
    ids = torch.randint(3, 320, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        own, expected = (tree(input_ids=ids).logits for tree in (base, whole))
    assert torch.allclose(own, expected, atol=1e-4)


def test_loading_says_nothing_of_the_tensors_left_out(
    composite: Composite, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        load_base(composite.settings)
    assert "vision" not in caplog.text
    assert "visual" not in caplog.text


def test_memory_is_estimated_without_what_is_left_out(composite: Composite) -> None:
    held = base_bytes(composite.base)
    assert needed_memory(composite.settings) == pytest.approx(held, rel=0.01)
    assert base_bytes(composite.whole) > held + sum(left_out(composite.base).values()) // 2


def test_rows_with_and_without_adapters_are_those_of_peft_on_the_whole_model(
    composite: Composite, tmp_path: Path
) -> None:
    folders = [save_adapter(composite.whole, one, tmp_path / f"{i}", i) for i, one in enumerate(ADAPTERS)]
    loaded = [load_folder(composite.base, folder) for folder in folders]
    references = [PeftModel.from_pretrained(peft_view(composite.whole), folder).eval() for folder in folders]
    lab = Lab(composite.base, folders, references, [one.weights for one in loaded])
    engine = lab.engine(step_tokens=48)
    base_proof.prove_base(engine, composite.base)
    generator = torch.Generator().manual_seed(5)
    asked = [
        Request(
            prompt=tuple(torch.randint(3, 320, (length,), generator=generator).tolist()),
            adapter=adapter,
            max_tokens=8,
            at=at,
        )
        for length, adapter, at in [
            (71, 0, 0),
            (71, None, 0),
            (38, 1, 1),
            (5, 0, 2),
            (45, None, 2),
            (33, 1, 3),
        ]
    ]
    assert lab.disagreements(asked, run(engine, asked)) == []
    engine.check_base()
    prompts = [list(request.prompt) for request in asked[:2]]
    proof = TextProver(composite.base).prove(
        loaded[0].reference, loaded[0].weights, prompts, 8, lambda part: None
    )
    assert proof.texts == 2


def test_an_adapter_trained_on_it_is_one_of_the_whole_model(composite: Composite, tmp_path: Path) -> None:
    data = samples(8)
    state = trainer(composite.base, recipe_for(data, max_steps=1), data, tmp_path)
    state.run_steps()
    write_adapter(
        state.trainable.model, tmp_path / "adapter", base="b", commit=None, card=lambda size: f"# {size}\n"
    )
    config = LoraConfig.from_pretrained(tmp_path / "adapter")
    adapted = set(load_folder(composite.base, tmp_path / "adapter").spec.targets)
    assert adapted
    model = get_peft_model(peft_view(composite.whole), LoraConfig(target_modules=config.target_modules))
    assert not any("lora_" in name for part in left_out(composite.base) for name in names_below(model, part))


def names_below(model: Any, part: str) -> list[str]:
    return [name for name, _ in model.get_base_model().named_parameters() if name.startswith(f"{part}.")]


def test_tensors_of_a_tower_are_left_out_with_a_warning_that_counts_them(
    gemma: Composite, tmp_path: Path
) -> None:
    settings = {
        "r": 4,
        "target_modules": [*ATTENTION, "out_proj"],
        "modules_to_save": ["multi_modal_projector"],
    }
    loaded = load_folder(gemma.base, save_adapter(gemma.whole, settings, tmp_path, 1))
    names = [name for name in load_file(tmp_path / WEIGHTS_FILE) if ".language_model." not in name]
    assert loaded.spec.warnings == (
        f"{len(names)} tensors of model.multi_modal_projector, model.vision_tower are left out: OneBase "
        "serves the language model, without the parts that see or hear.",
    )
    assert all(module.name.startswith("model.language_model.") for module in loaded.spec.modules)


def test_an_adapter_of_a_tower_alone_is_refused(gemma: Composite, tmp_path: Path) -> None:
    folder = save_adapter(gemma.whole, {"r": 4, "target_modules": ["fc1", "out_proj"]}, tmp_path, 1)
    with pytest.raises(AdapterFormatError, match=r"model\.vision_tower alone") as refused:
        load_folder(gemma.base, folder)
    assert refused.value.code == "no_effect"


@pytest.mark.skipif(DEVICE.type != "cpu", reason="what is published on a GPU has no file")
def test_a_composite_is_shared_without_its_towers(tmp_path: Path) -> None:
    settings = BaseSettings(save_model(COMPOSITES["smolvlm"](), tmp_path / "base"))
    base = load_base(settings)
    file = os.memfd_create("base")
    attached = attach(settings, publish(base, file), file)
    assert os.fstat(file).st_size == pytest.approx(base_bytes(base), rel=0.05)
    assert left_out(attached) == left_out(base)
    own = dict(attached.named_parameters())
    assert all(torch.equal(parameter, own[name]) for name, parameter in base.named_parameters())
