"""Adapters of every kind on any base, with random weights, as PEFT builds them."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import own_names, randomize
from torch import nn

from onebase_adapters.proof.extract import extract
from onebase_engine.base.view import peft_view
from onebase_engine.kernels.weights import AdapterWeights

LINEAR = ["q_proj", "o_proj", "down_proj"]
TOKENS = [300, 4, 17, 5, 250]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": LINEAR},
    "rslora": {"target_modules": LINEAR, "use_rslora": True, "r": 12},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "dora odd scale": {"target_modules": LINEAR, "use_dora": True, "lora_alpha": 5, "r": 3},
    "bias": {"target_modules": LINEAR, "lora_bias": True},
    "bias odd scale": {"target_modules": LINEAR, "lora_bias": True, "lora_alpha": 7},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head dora": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "embedding dora": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "saved norms": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["model.norm", "model.layers.1.input_layernorm"],
    },
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["model.embed_tokens"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": TOKENS},
    "alora": {"target_modules": [*LINEAR, "lm_head"], "alora_invocation_tokens": [5, 6]},
    "alora bias odd scale": {
        "target_modules": LINEAR,
        "alora_invocation_tokens": [5],
        "lora_bias": True,
        "lora_alpha": 7,
    },
}


def peft_adapter(base: nn.Module, kind: str, seed: int, std: float = 0.1) -> nn.Module:
    """PEFT's model of a random adapter of one of KINDS, on a view of the base."""
    settings = {"r": 8, "lora_alpha": 16, **KINDS[kind]}
    targets = own_names(base, settings["target_modules"])
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", **{**settings, "target_modules": targets})
    model: nn.Module = get_peft_model(peft_view(base), config)
    randomize(model, std)
    return model.eval()


def weights_of(model: nn.Module) -> AdapterWeights:
    """As the engine has them: powers of two folded into B."""
    return {name: module.folded() for name, module in extract(model, "default").items()}
