"""Try every model type of transformers as a base, and write the documents' list of bases.

    python tools/base_matrix.py [--types llama,qwen3] [--jobs 2]
    python tools/base_matrix.py --page

With `--types` the others stay as they were in the last run, from which `--page` writes the page again.

A type's default config, which is the size that is published, is checked first. Then a tiny random model of
the type is saved, loaded in NF4 and served: four sequences in one batch, prompts longer than a step, two of
the sequences with a random LoRA on every linear layer. Each token is compared with transformers' and PEFT's
own pass over the whole model. A type that is not equal is served again unquantized in fp32, where only logic
can differ. Of a mixture the same is done with a LoRA on the parameters of its experts. No network is used and
no GPU. It takes some 5 seconds of a core for each type.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "reference" / "bases.json"
PAGE = ROOT / "docs" / "reference" / "bases.md"

SECONDS = 600
"""Time limit, in seconds, for one type."""
VOCABULARY = 512
NEW_TOKENS = 20
CLOSE = 0.01
"""Largest difference of log-probabilities in fp32, in nats, that is no difference in logic."""


@dataclass(frozen=True)
class Result:
    """Result for one type, or for one variant of it that people download."""

    title: str
    type: str
    state: str
    """`equal`, `near` (equal but for ties), `wrong`, `refused`, `untried` (no tiny model) or `crash`."""
    reason: str = ""
    off: float | None = None
    """Largest difference from PEFT's log-probabilities, in nats."""
    exact: float | None = None
    """The same in fp32, where it was asked."""
    experts: str | None = None
    """State of a LoRA on the parameters of a mixture's experts: `equal`, `near`, `wrong`, `none` (no
    parameters that can be adapted), or why it failed."""


# ---- tiny configs ------------------------------------------------------------------------------------

_FIELDS: Mapping[int, str] = {
    VOCABULARY: "vocab_size padded_vocab_size vocab_size_per_layer_input",
    128: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim lru_width emb_dim",
    192: "intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
    "dense_intermediate_size intermediate_size_mlp feed_forward_hidden_size block_ff_dim",
    64: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size q_lora_rank "
    "kv_lora_rank moe_shared_expert_intermediate_size expert_ffn_hidden_size index_head_dim "
    "hidden_size_per_layer_input qk_head_dim global_head_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_experts num_local_experts n_routed_experts index_n_heads linear_num_value_heads moe_num_experts "
    "swa_num_attention_heads",
    2: "num_key_value_heads n_kv_heads num_kv_heads num_experts_per_tok linear_num_key_heads moe_topk moe_k "
    "num_experts_per_token top_k_experts num_global_key_value_heads swa_num_key_value_heads eos_token_id",
    32: "head_dim attention_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim "
    "linear_value_head_dim kv_channels d_kv mamba_d_head query_pre_attn_scalar swa_head_dim rotary_dim",
    512: "max_position_embeddings n_positions n_ctx seq_length max_seq_len max_sequence_length",
    24: "sliding_window attention_window_size window_size sliding_window_size attention_chunk_size",
    16: "index_topk",
    1: "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace num_dense_layers "
    "bos_token_id decoder_start_token_id moe_layer_start_index num_nextn_predict_layers",
    0: "pad_token_id",
}
SIZES: dict[str, Any] = {name: value for value, names in _FIELDS.items() for name in names.split()}
SIZES["tie_word_embeddings"] = False
LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers", "depth",
)  # fmt: skip
LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
LAYERS = 4
TOWER: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "num_hidden_layers": 2, "depth": 2, "out_hidden_size": 128,
    "hidden_size": 64, "embed_dim": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1], "encoder_layers": 2, "d_model": 64,
    "encoder_ffn_dim": 128, "encoder_attention_heads": 2, "temporal_patch_size": 2,
    "position_embedding_size": 16, "projection_dim": 64,
}  # fmt: skip
"""Sizes of parts that see or hear."""
_SEES = re.compile("vision|audio|image|vit|siglip|pixtral|whisper|encoder")
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_MLA = (
    "minicpm3", "youtu", "deepseek_v2", "deepseek_v3", "sarvam_mla", "longcat_flash", "mistral4", "axk1",
    "glm4_moe_lite", "bailing_hybrid", "kimi_linear",
)  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    **{name: {"num_key_value_heads": 4} for name in _MLA},
    **{
        f"{name}_text": {"rope_parameters": _MROPE, "head_dim": 32}
        for name in (
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen2_5_omni",
            "glm4v",
            "glm46v",
            "glm_ocr",
            "paddleocr_vl",
        )
    },
    "qwen3_vl_text": {"rope_parameters": _MROPE | {"mrope_interleaved": True, "mrope_section": [6, 5, 5]}},
    "gpt2": {"n_inner": None},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 32},
    "falcon_h1": {"mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 32, "attn_layer_indices": [1, 3]},
    "mamba2": {"num_heads": 8, "head_dim": 32, "state_size": 16, "n_groups": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "moshi": {"ffn_dim": 256},
    "mamba": {"time_step_rank": 64},
    "falcon_mamba": {"time_step_rank": 64},
    "gemma3": {"mm_tokens_per_image": 4},
    "dbrx": {
        "vocab_size": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma4_vision": {"position_embedding_size": 16, "patch_size": 8},
    "gemma4_unified_vision": {"position_embedding_size": 16, "patch_size": 8},
    "gemma4_audio": {"output_proj_dims": 128},
    "hunyuan_v1_dense": {"head_dim": 32},
    "glm4v_moe_text": {"rope_parameters": _MROPE | {"mrope_section": [2, 3, 3]}, "head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
    "step3p5": {"sliding_window": 24, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "longcat_flash": {"num_key_value_heads": 4, "zero_expert_num": 2},
    "muse_spark_vision": {"layer_types": ["window_attention", "full_attention"]},
    "muse_spark_audio": {
        "num_hidden_layers": 4,
        "hidden_sizes": [64] * 4,
        "patch_sizes": [4] * 4,
        "depths": [1] * 4,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [64, 64]},
    "hunyuan_v1_moe": {"head_dim": 32, "num_experts": 64},
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 4},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "ministral": {"head_dim": 32},
    "nemotron": {"head_dim": 32, "num_key_value_heads": 2},
    "starcoder2": {"sliding_window": None},
    "phi": {"partial_rotary_factor": 0.5},
}
"""Fields of single types, besides SIZES."""


def _yarn(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    return {"rope_parameters": rope | more}


_PLAIN_GEMMA4 = {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "tie_word_embeddings": True}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3.1 to 3.3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }
        },
    ),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "Qwen2 with YaRN": ("qwen2", _yarn()),
    "Qwen3 with windows": ("qwen3", _SLIDING | {"use_sliding_window": True}),
    "Phi-4-mini": (
        "phi3",
        {
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 12,
                "long_factor": [2.0] * 12, "original_max_position_embeddings": 128,
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "Gemma 3 4B to 27B": ("gemma3", {"vision_config": {"intermediate_size": 4304, "hidden_size": 64}}),
    "Gemma 4 31B": ("gemma4", {"text_config": {"attention_k_eq_v": True, **_PLAIN_GEMMA4}}),
    "Gemma 4 E2B and E4B": (
        "gemma4",
        {
            "text_config": {
                "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
                "hidden_size_per_layer_input": 64,
            }
        },
    ),
    "Granite 4.0 micro, 1B and 350M": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * 4, "num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    "Granite 4.0 H": (
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    "EXAONE 4 32B": ("exaone4", _SLIDING),
    "OPT 350M": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 64}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
    "Ministral 3": (
        "mistral3",
        {
            "text_config": {
                "model_type": "ministral3",
                **_yarn(original_max_position_embeddings=32, llama_4_scaling_beta=0.5),
            }
        },
    ),
    "Mistral Small 3.1 and 3.2": ("mistral3", {}),
    "Qwen3.5 dense": ("qwen3_5", {}),
    "OLMo 3 with YaRN": ("olmo3", _yarn()),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    "Gemma 4 26B A4B": (
        "gemma4",
        {
            "text_config": {
                "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64,
                **_PLAIN_GEMMA4,
            }
        },
    ),
    "Granite 4.0 H tiny and small": (
        "granitemoehybrid",
        {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "Command A and R7B": ("cohere2", {"tie_word_embeddings": True}),
    "Mixtral 8x7B": ("mixtral", {"num_local_experts": 8}),
    "OLMoE 1B 7B": ("olmoe", {"num_experts": 8, "num_key_value_heads": 4}),
    "Qwen3 30B A3B": ("qwen3_moe", {"num_experts": 8, "norm_topk_prob": True}),
    "Qwen3.5 and 3.6 35B A3B": ("qwen3_5_moe", {"text_config": {"num_experts": 8}}),
    "gpt-oss 20B": ("gpt_oss", _SLIDING | {"num_local_experts": 8}),
    "GLM 4.5 to 4.7": (
        "glm4_moe",
        {"n_routed_experts": 8, "use_qk_norm": True, "partial_rotary_factor": 0.5, "attention_bias": True},
    ),
    "DeepSeek V3 and R1": ("deepseek_v3", {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
    "ERNIE 4.5 21B A3B": ("ernie4_5_moe", {"moe_num_experts": 8, "moe_num_shared_experts": 2}),
    "Llama 4 Scout": ("llama4", {"text_config": {"num_local_experts": 8, "num_experts_per_tok": 1}}),
}  # fmt: skip
"""Models that people download, where they differ from their type's default config."""


def _value(config: Any, name: str, otherwise: Any = None) -> Any:
    """Return an attribute of a config, of which some raise where layers differ in it."""
    try:
        return getattr(config, name, otherwise)
    except Exception:
        return otherwise


def tiny_fields(kind: Any) -> dict[str, Any]:
    """Return the fields that make a config tiny, with a layer of each kind that its default has."""
    renamed = getattr(kind, "attribute_map", {}) or {}
    known = {
        name
        for name in (*getattr(kind, "__dataclass_fields__", {}), *renamed)
        if renamed.get(name, name) == name
    }
    try:
        default = kind()
    except Exception:
        default = None
    chosen = {
        name: value
        for name, value in SIZES.items()
        if name in known and (value == 0 or name == "vocab_size" or _value(default, name, 0) is not None)
    }
    kinds = {
        name: list(dict.fromkeys(given))
        for name in LAYER_KINDS
        if name in known
        and isinstance(given := _value(default, name), list | tuple)
        and given
        and isinstance(given[0], str)
    }
    count = max([LAYERS, *map(len, kinds.values())])
    for name, names in kinds.items():
        chosen[name] = (names * count)[:count]
        if "full_attention" in names:  # which Gemma has last
            others = [one for one in chosen[name] if one != "full_attention"]
            chosen[name] = (others[: count - 1] + ["full_attention"] * count)[:count]
    chosen |= {name: count for name in LAYER_COUNTS if name in known and _value(default, name, 1) is not None}
    for name, spec in (getattr(kind, "sub_configs", None) or {}).items():
        given = _value(default, name)
        part: Any = type(given) if given is not None else getattr(spec, "config_class", spec)
        if isinstance(part, type) and hasattr(part, "__dataclass_fields__"):
            model_type: str = part.model_type  # type: ignore[attr-defined]
            chosen[name] = {**tiny_fields(part), "model_type": model_type}
    if _SEES.search(getattr(kind, "base_config_key", "") + kind.model_type):
        chosen |= {name: value for name, value in TOWER.items() if name in known}
    return chosen | OVERRIDES.get(getattr(kind, "model_type", ""), {})


def tiny_config(name: str, changes: Mapping[str, Any]) -> Any:
    """Return a tiny config of a type, with some fields changed."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    fields = tiny_fields(kind)
    for key, value in changes.items():
        inner = isinstance(value, dict) and isinstance(fields.get(key), dict)
        fields[key] = {**fields[key], **value} if inner else value
    return kind(**fields)


def default_config(name: str) -> Any:
    """Return the config of the size that is published."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[name]()
    if hasattr(config, "add_cross_attention") and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True
    return config


# ---- one type ----------------------------------------------------------------------------------------


def save_tiny(name: str, changes: Mapping[str, Any], folder: Path) -> None:
    """Save a random model whose greedy texts wander: its weights are wide, so that logits are far apart."""
    import torch

    from onebase_engine.base.layers import base_class, whole_class

    config = tiny_config(name, changes)
    torch.manual_seed(0)
    try:
        model = whole_class(config).from_config(config, dtype=torch.float32)
    except ImportError:  # a tower of a library that is not here
        model = base_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.5 if "embed" in key else 1.3 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)


def save_adapter(base: Any, folder: Path) -> None:
    """Save a random LoRA on every linear layer but the head and routers."""
    import torch
    from peft import LoraConfig, get_peft_model

    from onebase_engine.base.layers import adaptable_layers
    from onebase_engine.base.view import peft_view

    head = base.get_output_embeddings()
    names = [
        name
        for name, layer in adaptable_layers(base).items()
        if layer.kind == "linear" and base.get_submodule(name) is not head and re.search(r"\.\d+\.", name)
        and not re.search(r"vision|visual|audio|router|\.gate$|image", name)
    ]  # fmt: skip
    if base.config.model_type in ("falcon_h1", "mamba", "mamba2", "falcon_mamba"):  # PEFT refuses it there
        names = [name for name in names if not name.endswith("out_proj")]
    torch.manual_seed(3)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=names)
    model = get_peft_model(peft_view(base), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.02 if "lora_B" in name else 0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    # PEFT writes the shortest names that mean these layers, which may mean others of a tower.
    file = folder / "adapter_config.json"
    exact: dict[str, Any] = {
        "target_modules": names,
        "target_parameters": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | exact))


def save_on_experts(base: Any, folder: Path) -> bool:
    """Save a random LoRA on the parameters of experts; return False if none can be adapted."""
    import torch
    from peft import LoraConfig, get_peft_model

    from onebase_adapters.proof.experts import give_places
    from onebase_engine.base.layers import adaptable_layers
    from onebase_engine.base.view import peft_view

    names = [name for name, layer in adaptable_layers(base).items() if layer.kind == "experts"]
    if not names:
        return False
    tree = peft_view(base)
    give_places(tree)
    torch.manual_seed(4)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=[], target_parameters=names
    )
    model = get_peft_model(tree, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.02 if "lora_B" in name else 0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    return True


def serve(base: Any, weights: Any) -> list[tuple[list[int], list[float], list[int], bool]]:
    """Serve all sequences in one batch.

    Returns of each sequence the prompt, the new tokens' log-probabilities, these tokens, and whether it had
    the adapter.
    """
    import random

    from onebase_engine.engine import messages as protocol
    from onebase_engine.engine.engine import Engine
    from onebase_engine.engine.scheduler import SchedulerLimits

    engine = Engine(base, name="tiny", limits=SchedulerLimits(8, 48, 256, 0), kv_blocks=100, slots=2)
    engine.put_adapter("one", weights)
    sampling = protocol.Sampling(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    chosen = random.Random(7)
    rows: dict[str, tuple[list[int], bool]] = {}
    for length in (71, 38):
        prompt = [chosen.randrange(3, VOCABULARY - 60) for _ in range(length)]
        for adapted in (False, True):
            name = f"{length} {adapted}"
            rows[name] = prompt, adapted
            adapters = [protocol.AdapterRef("one")] if adapted else []
            engine.submit(protocol.Submit(id=name, prompt=prompt, sampling=sampling, adapters=adapters))
    texts: dict[str, list[int]] = {name: [] for name in rows}
    scores: dict[str, list[float]] = {name: [] for name in rows}
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            if output.error_message is not None:
                raise RuntimeError(f"{output.error_code}: {output.error_message}")
            texts[output.id] += output.tokens
            scores[output.id] += [one.logprob for one in output.logprobs or ()]
    engine.check_base()
    return [(prompt, scores[name], texts[name], adapted) for name, (prompt, adapted) in rows.items()]


def whole_model(folder: Path, quantized: bool, attention: str = "eager") -> Any:
    """Return the whole model as transformers itself loads it, without a tower whose library is not here."""
    import torch
    from transformers import AutoConfig, BitsAndBytesConfig

    from onebase_engine.base.layers import base_class, whole_class
    from onebase_engine.base.load import BaseSettings, _skipped_modules, freeze

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    options = {
        "quantization_config": settings if quantized else None,
        "dtype": torch.bfloat16 if quantized else torch.float32,
        "device_map": {"": "cpu"},
        "attn_implementation": attention,
        "experts_implementation": "eager",
    }
    config = AutoConfig.from_pretrained(folder)
    settings.llm_int8_skip_modules = _skipped_modules(BaseSettings(folder), config)
    try:
        model = whole_class(config).from_pretrained(folder, **options)
    except ImportError:
        model = base_class(config).from_pretrained(folder, **options)
    if quantized:
        round_experts(model)
    freeze(model)
    for (
        module
    ) in model.modules():  # transformers' own forward, also of experts that OneBase computes otherwise
        if isinstance(module.__dict__.get("forward"), partial):
            del module.forward
    return model


def round_experts(model: Any) -> None:
    """Replace each expert's matrices by what bitsandbytes makes of them in NF4, and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from onebase_engine.base.experts import expert_matrices

    for place in expert_matrices(model):
        for matrix in getattr(place.module, place.name).data:
            plain = matrix.T if place.transposed else matrix
            packed = quantize_4bit(plain.contiguous(), compress_statistics=True, quant_type="nf4")
            plain.copy_(dequantize_4bit(*packed))


def differences(
    folder: Path, adapter: Path, rows: Sequence[Any], quantized: bool
) -> tuple[float, float, float]:
    """Compare served sequences with PEFT's own pass over the whole model.

    Returns the largest distance of a chosen token's logit from the largest one, the largest difference of
    log-probabilities, and the largest one that another of transformers' attentions brings about: rounding.
    """
    import torch
    from peft import PeftModel

    from onebase_engine.base.view import keep_names

    bare = whole_model(folder, quantized)
    other = None
    if quantized:
        with contextlib.suppress(ValueError):  # a tower has no such attention
            other = whole_model(folder, quantized, "sdpa")
    regret = off = noise = 0.0
    tuned = None
    for prompt, scores, text, adapted in sorted(rows, key=lambda row: row[3]):
        if adapted and tuned is None:
            keep_names(bare)
            tuned = PeftModel.from_pretrained(bare, adapter).eval()
        logits = _logits(tuned if adapted else bare, prompt, text)
        places = torch.tensor(text)[:, None]
        logprobs = logits.log_softmax(-1).gather(1, places)[:, 0]
        regret = max(regret, float((logits.max(-1).values - logits.gather(1, places)[:, 0]).max()))
        off = max(off, float((logprobs - torch.tensor(scores)).abs().max()))
        if not adapted and other is not None:
            found = _logits(other, prompt, text).log_softmax(-1).gather(1, places)[:, 0]
            noise = max(noise, float((found - logprobs).abs().max()))
    return regret, off, noise


def _logits(model: Any, prompt: list[int], text: list[int]) -> Any:
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + text[:-1]]), use_cache=False).logits
    return logits[0, len(prompt) - 1 :].float()


def try_type(title: str, name: str, changes: Mapping[str, Any] | None) -> Result:
    """Check, load, serve and compare one type; `changes`: fields of a variant, None for the type itself."""
    from transformers import CONFIG_MAPPING

    from onebase_engine.base.experts import expert_matrices
    from onebase_engine.base.load import BaseSettings, UnsupportedBaseError, load_base
    from onebase_engine.engine.base_check import check_base

    if changes is None:
        try:
            refusal = check_base(CONFIG_MAPPING[name]()).refusal
        except Exception:
            refusal = None
        # A default config may be incomplete, as no published one is.
        if refusal is not None and "transformers cannot make a model" not in refusal:
            return Result(title, name, "refused", _line(refusal))
    with tempfile.TemporaryDirectory(prefix="base-") as place:
        folder, adapter = Path(place) / "base", Path(place) / "adapter"
        try:
            save_tiny(name, changes or {}, folder)
        except Exception as error:
            return Result(title, name, "untried", _line(f"{type(error).__name__}: {error}"))
        stage = "load"
        try:
            base = load_base(BaseSettings(folder))
            stage = "adapter"
            save_adapter(base, adapter)
            state, off, exact = try_adapter(base, folder, adapter)
            experts = None
            if next(expert_matrices(base), None) is not None:
                stage = "experts"
                experts = _try_experts(base, folder, Path(place) / "experts")
            return Result(title, name, state, off=off, exact=exact, experts=experts)
        except UnsupportedBaseError as error:
            # What some composites save of a tiny model is its text part, which transformers does not read.
            state = "untried" if "TextConfig has no" in str(error) else "refused"
            return Result(title, name, state, _line(str(error)))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{stage}: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
            return Result(title, name, "crash", _line(reason))


def try_adapter(base: Any, folder: Path, adapter: Path) -> tuple[str, float, float | None]:
    """Serve and compare one adapter; return `equal`, `near` or `wrong`, and the differences.

    Args:
        base: the base of `folder` in NF4.
    """
    from onebase_adapters.format.canonical import CONFIG_FILE, WEIGHTS_FILE
    from onebase_adapters.proof.loader import load_adapter
    from onebase_engine.base.load import BaseSettings, load_base

    weights = load_adapter(base, adapter / CONFIG_FILE, adapter / WEIGHTS_FILE, 64).weights
    regret, off, noise = differences(folder, adapter, serve(base, weights), quantized=True)
    if regret == 0 and off <= max(0.12, 4 * noise):
        return "equal", round(off, 3), None
    plain = load_base(BaseSettings(folder, quantization="none", dtype=_fp32()))
    _, exact, _ = differences(folder, adapter, serve(plain, weights), quantized=False)
    return "near" if exact <= CLOSE else "wrong", round(off, 3), round(exact, 5)


def _try_experts(base: Any, folder: Path, adapter: Path) -> str:
    """Return the state of a LoRA on experts (`Result.experts`)."""
    try:
        return try_adapter(base, folder, adapter)[0] if save_on_experts(base, adapter) else "none"
    except Exception as error:
        return _line(f"{type(error).__name__}: {error}")


def _fp32() -> Any:
    import torch

    return torch.float32


def _line(text: str) -> str:
    """Return a message in one line, without the folder that it names."""
    return " ".join(re.sub(r"/\S*/base-[^\s/]*/", "", text).split())[:400]


def try_apart(title: str, name: str, changes: Mapping[str, Any] | None) -> Result:
    """Try a type in a process of its own, which may hang or die."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        signal.alarm(SECONDS)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        with os.fdopen(writing, "w") as pipe:
            json.dump(asdict(try_type(title, name, changes)), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(process, 0)
    return Result(**json.loads(text)) if text else Result(title, name, "crash", f"status {status}")


def all_types() -> list[str]:
    """Return every type that transformers generates text with."""
    from transformers.models.auto import modeling_auto as auto

    return list(
        dict.fromkeys(
            [
                *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
                *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
                *auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
            ]
        )
    )


def run_all(types: Sequence[str], jobs: int) -> None:
    """Try the types and variants, or those named, and write data and page after each."""
    import peft
    import torch
    import transformers

    # Imported once for the processes that are forked.
    import onebase_engine.engine.base_check
    import onebase_engine.engine.engine  # noqa: F401
    from onebase_engine.base.load import import_bitsandbytes

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    import_bitsandbytes()
    todo: list[tuple[str, str, Mapping[str, Any] | None]] = [(name, name, None) for name in all_types()]
    todo += [(title, name, changes) for title, (name, changes) in VARIANTS.items()]
    order = [title for title, _, _ in todo]
    known = {one.title: one for one in read_results() if one.title in order} if types else {}
    todo = [one for one in todo if not types or one[0] in types or one[1] in types]
    used = (transformers, peft, torch)
    versions = {module.__name__: module.__version__ for module in used}
    began = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        for result in pool.map(lambda one: try_apart(*one), todo):
            known[result.title] = result
            _write(known, order, versions)
            figures = "" if result.off is None else f"off {result.off}, fp32 {result.exact}"
            print(f"{result.title[:40]:40} {result.state:8} {figures} {result.reason[:160]}", flush=True)
    PAGE.write_text(page())
    print(f"{len(todo)} in {time.monotonic() - began:.0f} s")


def _write(known: Mapping[str, Result], order: Sequence[str], versions: Mapping[str, str]) -> None:
    results = [asdict(known[title]) for title in order if title in known]
    results = [{key: value for key, value in one.items() if value not in ("", None)} for one in results]
    DATA.write_text(json.dumps({"versions": versions, "results": results}, indent=1) + "\n")


# ---- the page ----------------------------------------------------------------------------------------

REASONS: Sequence[tuple[str, str, str]] = (
    ("is an encoder-decoder", "Encoder-decoders", "OneBase serves decoders. Choose a causal language model."),
    ("no causal language model", "Encoders, and models that attend to another one", "Choose a decoder."),
    ("a mixture's experts in a way", "Mixtures whose experts are computed in a way of their own",
     "Choose another mixture, or a dense base."),
    ("does not know logits_to_keep", "Logits of all tokens at every step", "Choose another base."),
    ("does not quantize", "Layers of classes that bitsandbytes does not quantize", "Choose another base."),
    ("s_aux|asks for", "Attention with sinks, indices or other terms of its own", "Choose another base."),
    ("mask of its own", "Attention with a mask of its own", "Choose another base."),
    ("drafts for another", "Drafters that read another model's keys and values", "Choose that model."),
    ("more than once", "Attention twice in a layer", "Choose another base."),
    ("not causal", "Attention that looks ahead", "Choose another base."),
    ("do not call the attention|brings its own attention", "Attention that transformers cannot replace",
     "Choose another base."),
    ("none of its layers is an attention|whose state|recurrence|recurrent",
     "Layers that keep sparse indices, or a state that OneBase does not know", "Choose another base."),
    (r"cannot be served: \w+(Error|Exception)\b|is no language model over tokens|expected in",
     "Models that want more than tokens and their positions", "Choose another base."),
    ("lack .* of the tensors", "Models that transformers does not read back as it saved them",
     "Choose another base."),
    ("convolves over tokens", "Layers that mix neighbouring tokens in a way of their own",
     "Choose another base."),
    ("no multiple of blocksize", "Inputs that NF4's blocks do not divide, on a CPU", "Choose int8 or none."),
    ("which part of", "Models whose decoder or head transformers does not name", "Choose another base."),
)  # fmt: skip
"""Pattern in a refusal, heading, and advice."""


def read_results() -> list[Result]:
    """Return the results of the last run."""
    return [Result(**one) for one in json.loads(DATA.read_text())["results"]]


def read_versions() -> dict[str, str]:
    """Return the versions of the libraries in the last run."""
    versions: dict[str, str] = json.loads(DATA.read_text())["versions"]
    return versions


def page() -> str:
    """Return the documents' list of bases, from the last run."""
    versions = read_versions()
    results = read_results()
    types = [one for one in results if one.title == one.type]
    variants = [one for one in results if one.title != one.type]
    served = [one for one in types if one.state in ("equal", "near")]
    refused = [one for one in types if one.state == "refused"]
    lines = [
        "# Bases",
        "*For whoever chooses a base. At the end you know whether it is served, and how well that was tried. "
        "Two minutes.*",
        "<!-- Written by tools/base_matrix.py. -->",
        "Whether a base can be served, and what it takes, is said before its weights are downloaded:",
        "```\nonebase base check mistralai/Mistral-Small-3.2-24B-Instruct-2506\n```",
        f"Each of the {len(types)} types that transformers {versions['transformers']} writes text with was "
        "tried by a tiny random model of it in NF4. Four sequences in one batch, with and without a LoRA on "
        f"every linear layer, were compared with PEFT {versions['peft']}'s own pass over the whole model. "
        "Random weights show that the logic is right, not that a model is good. `tools/base_matrix.py` "
        "repeats it.",
        f"## Served and equal to PEFT: {len(served)} types",
        _names(served),
        "Types with * differ from PEFT by rounding: tokens whose logits tie may be others, and in fp32 there "
        "is no difference."
        if any(one.state == "near" for one in served)
        else "",
        "Of a model that sees or hears, the language model is served. Its towers are neither loaded nor "
        "counted, images and sound are refused, and tensors of an adapter for the towers are left out with a "
        "warning.",
    ]
    adapted = [one for one in served if one.experts in ("equal", "near")]
    if adapted:
        others = [one for one in served if one.experts not in (None, "equal", "near")]
        lines += [
            f"## Adapters on experts: {len(adapted)} types",
            "A LoRA on the parameters of experts ([target_parameters](adapters.md#on-experts)) was "
            "tried in the same way. It is served, and equal to PEFT but for rounding (in fp32 there is "
            "no difference), on",
            ", ".join(f"`{one.type}`" for one in sorted(adapted, key=_by_name)),
            "Mixtures on which adapters act on layers alone: " + ", ".join(f"`{one.type}`" for one in others)
            if others
            else "",
            "On mixtures in neither list it was not tried by this tool.",
        ]
    if variants:
        rows = [
            f"| {one.title} | `{one.type}` | {_state(one)} | {_EXPERTS.get(one.experts or '', '')} |"
            for one in variants
        ]
        heads = ["| model | type | | adapters on experts |", "|---|---|---|---|"]
        lines += ["## Models by name", "\n".join([*heads, *rows])]
    lines += [f"## Refused: {len(refused)} types", "Each is refused at start, and by `onebase base check`."]
    for heading, advice, names in _grouped(refused):
        lines += [f"### {heading}", advice, names]
    for state, text in (
        ("untried", "Not tried: no tiny model of them could be made"),
        ("crash", "Not served: they fail before or while they are served"),
        ("wrong", "Wrong: refused by the proof at the first start"),
    ):
        if found := [one for one in types if one.state == state]:
            lines += [f"## {text}", _names(found)]
    return "\n\n".join(line for line in lines if line) + "\n"


_EXPERTS = {"equal": "served", "near": "served*", "none": "refused"}
"""Words for the state of an adapter on experts."""


def _names(results: Sequence[Result]) -> str:
    return ", ".join(
        f"`{one.type}`{'*' if one.state == 'near' else ''}" for one in sorted(results, key=_by_name)
    )


def _by_name(result: Result) -> str:
    return result.type


def _state(result: Result) -> str:
    words = {"equal": "served", "near": "served*", "untried": "not tried"}
    return words.get(result.state, f"{result.state}: {result.reason}" if result.reason else result.state)


def _grouped(refused: Sequence[Result]) -> list[tuple[str, str, str]]:
    """Return heading, advice and names of each group of refused types that has any."""
    groups: dict[tuple[str, str], list[Result]] = {(heading, advice): [] for _, heading, advice in REASONS}
    others = ("Others", "The error says why.")
    for one in refused:
        found = ((heading, advice) for pattern, heading, advice in REASONS if re.search(pattern, one.reason))
        groups.setdefault(next(found, others), []).append(one)
    return [(*key, _names(results)) for key, results in groups.items() if results]


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", default="", help="types or titles of variants, separated by commas")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--page", action="store_true", help="write the page from the last run")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page())
        return 0
    run_all([one for one in options.types.split(",") if one], options.jobs)
    return 0


if __name__ == "__main__":
    # Before anything imports torch: one thread each, as the processes share the cores.
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    sys.exit(main())
