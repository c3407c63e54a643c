"""A valid adapter with accidents in its structure: refused, or to PEFT the same as what it was given.

Where `target_modules` is a regular expression, which is never evaluated, the tensors say what is meant.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tests.adapters.format_support import (
    CONFIG,
    EMBEDDING,
    HEAD,
    NORM,
    PREFIX,
    WEIGHTS,
    in_one_layout,
    layers_of,
    read,
    train,
)
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from onebase_adapters.format.canonical import AdapterFormatError

WHOLE = ["q_proj", "o_proj", "down_proj"]
TRAINED: list[dict[str, Any]] = [
    {"target_modules": WHOLE, "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"down_proj": 5}},
    {"target_modules": WHOLE, "use_dora": True, "use_rslora": True},
    {"target_modules": [*WHOLE, HEAD], "lora_bias": True},
    {"target_modules": [HEAD, "embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"], "modules_to_save": [NORM, HEAD]},
    {"target_modules": ["q_proj"], "trainable_token_indices": [5, 1], "modules_to_save": [NORM]},
]


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, num_hidden_layers=2, tie_word_embeddings=True, initializer_range=0.3, **sizes
    )
    model: nn.Module = LlamaForCausalLM(config).eval().requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def trained(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            train(tiny, tmp_path_factory.mktemp("trained"), fields, seed=i)
            for i, fields in enumerate(TRAINED)
        ]


VALUES: dict[str, list[Any]] = {
    "r": [1, 3, 4],
    "lora_alpha": [0, 1.5, -2],
    "rank_pattern": [{}, {"q_proj": 3}, {"o.proj": 3}, {"^o_proj": 3}, {"layers.0.self_attn.o_proj": 3}],
    "alpha_pattern": [{}, {"q_proj": 9}, {"q.proj": 9}, {"^q_proj": 9}, {"self_attn.q_proj": 1, "q_proj": 2}],
    "use_rslora": [True, False, None],
    "use_dora": [True, False],
    "lora_bias": [True, False],
    "target_modules": [["q_proj"], WHOLE, [HEAD], "all-linear", [HEAD, "q_proj"], ["proj"]],
    "exclude_modules": [None, [], ["o_proj"], ["layers.0.self_attn.q_proj"]],
    "layers_to_transform": [None, [], 0, [1], [0, 1]],
    "modules_to_save": [None, [], [NORM], [HEAD], ["embed_tokens"], ["norm"], [NORM, HEAD, "embed_tokens"]],
    "trainable_token_indices": [None, [5, 1], [1, 5], [3], {"embed_tokens": [5, 1]}, {HEAD: [5, 1]}],
    "ensure_weight_tying": [True, False],
    "lora_dropout": [0.5],
    "init_lora_weights": [True, False, "gaussian"],
}
Change = Callable[[dict[str, torch.Tensor], str, str], object]
CHANGES: dict[str, Change] = {
    "remove": lambda tensors, one, other: tensors.pop(one),
    "rename": lambda tensors, one, other: tensors.update(
        {one.replace("layers.0", "layers.1"): tensors.pop(one)}
    ),
    "swap": lambda tensors, one, other: tensors.update({one: tensors[other], other: tensors[one]}),
    "halve": lambda tensors, one, other: tensors.update({one: tensors[one].bfloat16()}),
    "scale": lambda tensors, one, other: tensors.update({one: tensors[one] * 3}),
    "cut": lambda tensors, one, other: tensors.update({one: tensors[one][:1].clone()}),
    "turn": lambda tensors, one, other: tensors.update({one: tensors[one].T.contiguous()}),
    "poison": lambda tensors, one, other: tensors.update({one: tensors[one] / 0}),
    "old name": lambda tensors, one, other: tensors.update({f"{one}.weight": tensors.pop(one)}),
    "base": lambda tensors, one, other: tensors.update({f"{PREFIX}{EMBEDDING}.weight": torch.ones(12, 16)}),
}


@settings(
    max_examples=120,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    which=st.integers(0, len(TRAINED) - 1),
    fields=st.lists(st.sampled_from(sorted(VALUES)), max_size=2, unique=True),
    pick=st.randoms(use_true_random=False),
    changes=st.lists(st.sampled_from(sorted(CHANGES)), max_size=2),
)
def test_a_changed_adapter_is_refused_or_loads_to_what_peft_loads(
    tiny: nn.Module,
    trained: list[Path],
    which: int,
    fields: list[str],
    pick: random.Random,
    changes: list[str],
) -> None:
    config = json.loads((trained[which] / CONFIG).read_text())
    config.update({name: pick.choice(VALUES[name]) for name in fields})
    tensors = load_file(trained[which] / WEIGHTS)
    for change in changes:
        one, other = pick.choice(sorted(tensors)), pick.choice(sorted(tensors))
        CHANGES[change](tensors, one, other)
    with tempfile.TemporaryDirectory() as theirs, tempfile.TemporaryDirectory() as ours:
        (Path(theirs) / CONFIG).write_text(json.dumps(config))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(theirs) / WEIGHTS)
        base = dict(tiny.named_parameters())
        try:
            read(Path(theirs), layers=layers_of(tiny), base=base, target=Path(ours))
        except AdapterFormatError:
            return
        assert torch.equal(answer(tiny, ours), answer(tiny, theirs))


def answer(tiny: nn.Module, folder: str) -> torch.Tensor:
    """What PEFT's model says, of a copy of the base, which a foreign tensor might overwrite.

    The copy is resized to the vocabulary that the file is for, as PEFT's user has to resize it.
    """
    model = copy.deepcopy(tiny)
    tensors = load_file(Path(folder) / WEIGHTS)
    whole = [tensors[name] for module in (EMBEDDING, HEAD) if (name := f"{PREFIX}{module}.weight") in tensors]
    words = whole[0].shape[0] if whole else 12
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        if words != 12:
            model.resize_token_embeddings(words, mean_resizing=False)
        loaded = in_one_layout(PeftModel.from_pretrained(model, folder).eval())
        logits: torch.Tensor = loaded(torch.arange(words)[None]).logits
        return logits.nan_to_num(7.0)
