"""Tiny random models of every tested architecture, and adapters on them, saved as real folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

from onebase_adapters.format.canonical import CONFIG_FILE, WEIGHTS_FILE
from onebase_adapters.proof.loader import LoadedAdapter, load_adapter
from onebase_engine.base.experts import expert_matrices
from onebase_engine.base.layers import whole_class
from onebase_engine.base.view import peft_view

_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# A tied head over embeddings scaled by sqrt(hidden) would only ever repeat the last token.
_GEMMA: dict[str, Any] = {"sliding_window": 24, "query_pre_attn_scalar": 32, "tie_word_embeddings": False}

# Four layers, of which the last two attend to what the first two have written.
_SHARED: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 24,
    "vocab_size_per_layer_input": 320,
    "hidden_size_per_layer_input": 64,
    "tie_word_embeddings": False,
}

ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "mistral": lambda: tf.MistralConfig(**_SIZES, sliding_window=24, tie_word_embeddings=False),
    "qwen2": lambda: tf.Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "qwen3": lambda: tf.Qwen3Config(**_SIZES, tie_word_embeddings=True),
    "gemma2": lambda: tf.Gemma2Config(**_SIZES, **_GEMMA),
    "gemma3": lambda: tf.Gemma3TextConfig(**_SIZES, **_GEMMA),
    "phi3": lambda: tf.Phi3Config(**_SIZES, tie_word_embeddings=False),
    # Full layers have larger heads, and keys that are their values.
    "gemma4": lambda: tf.Gemma4TextConfig(
        **_SIZES | _SHARED, global_head_dim=64, num_global_key_value_heads=1, attention_k_eq_v=True
    ),
    "gemma3n": lambda: tf.Gemma3nTextConfig(**_SIZES | _SHARED, laurel_rank=64),
    # Queries that are scaled by their positions.
    "ministral3": lambda: tf.Ministral3Config(
        **_SIZES,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 32,
            "llama_4_scaling_beta": 0.5,
        },
    ),
    # Sinks, and a layer without positions.
    "granite_swa": lambda: tf.GraniteSWAConfig(
        **_SIZES,
        attention_multiplier=0.2,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"],
        layer_rope_theta=[10000.0, 0],
        tie_word_embeddings=False,
    ),
    # Chunks, and queries that are scaled by their positions in the layer without chunks.
    "llama4": lambda: tf.Llama4TextConfig(
        **_SIZES,
        moe_layers=[],
        intermediate_size_mlp=192,
        attention_chunk_size=24,
        no_rope_layers=[1, 0],
        floor_scale=16,
        attn_scale=0.5,
        tie_word_embeddings=False,
    ),
    # Latent attention: keys of 96 numbers, values of 64.
    "youtu": lambda: tf.YoutuConfig(
        **_SIZES | {"num_key_value_heads": 4},
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        tie_word_embeddings=False,
    ),
}

_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_expand": 2}
_LAYERS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}

HYBRIDS: dict[str, Callable[[], Any]] = {
    "qwen3_5": lambda: tf.Qwen3_5TextConfig(
        **_SIZES | _LAYERS,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        tie_word_embeddings=False,
    ),
    "olmo_hybrid": lambda: tf.OlmoHybridConfig(
        **_SIZES | _LAYERS, linear_num_value_heads=4, linear_num_key_heads=4
    ),
    "granite_h": lambda: tf.GraniteMoeHybridConfig(
        **_SIZES | {"layer_types": ["mamba", "attention"]},
        **_MAMBA,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=192,
    ),
    "falcon_h1": lambda: tf.FalconH1Config(**_SIZES, **_MAMBA, mamba_d_ssm=256),
    "bamba": lambda: tf.BambaConfig(**_SIZES, **_MAMBA, attn_layer_indices=[1]),
    "nemotron_h": lambda: tf.NemotronHConfig(
        **_SIZES | {"num_hidden_layers": 3, "layer_types": ["mamba", "attention", "mlp"]},
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=2,
    ),
    "mamba2": lambda: tf.Mamba2Config(
        vocab_size=320,
        hidden_size=128,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=32,
        state_size=16,
        n_groups=2,
        tie_word_embeddings=False,
    ),
    "falcon_mamba": lambda: tf.FalconMambaConfig(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        state_size=16,
        time_step_rank=64,
        tie_word_embeddings=False,
    ),
    "lfm2": lambda: tf.Lfm2Config(**_SIZES | {"layer_types": ["conv", "full_attention"]}),
}
"""Models in which layers keep a recurrent state."""

_ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}

MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: tf.MixtralConfig(**_SIZES | _ROUTED, num_local_experts=6),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_SIZES | _ROUTED, num_experts=8, norm_topk_prob=True),
    # A dense layer, and a shared expert beside groups of experts of which some are left out.
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **_SIZES | _ROUTED | _LATENT,
        n_routed_experts=8,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    # Matrices [in, out], biases, a clamped gate, sinks.
    "gpt_oss": lambda: tf.GptOssConfig(
        **_SIZES | _ROUTED | {"intermediate_size": 64}, num_local_experts=4, sliding_window=24
    ),
    # Experts outside transformers' interface, chunks, layers without rotation, scaled queries, a dense layer.
    "llama4_text": lambda: tf.Llama4TextConfig(
        **_SIZES
        | _ROUTED
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size": 64,
            "intermediate_size_mlp": 128,
            "head_dim": 32,
            "attention_chunk_size": 24,
            "floor_scale": 16,
            "attn_scale": 0.5,
            "no_rope_layers": [1, 0],
            "moe_layers": [1],
        }
    ),
    # Experts that compute nothing, and a router with a layer of its own; two attentions a layer.
    "longcat_flash": lambda: tf.LongcatFlashConfig(
        **_SIZES
        | _LATENT
        | {
            "num_layers": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 64,
            "ffn_hidden_size": 128,
        }
    ),
    # Another gate than silu, next to a dense MLP in the same layer.
    "gemma4_moe": lambda: tf.Gemma4TextConfig(
        **_SIZES,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=64,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        tie_word_embeddings=False,
    ),
}
"""Mixtures of experts."""
MORE_MIXTURES: dict[str, Callable[[], Any]] = {
    "olmoe": lambda: tf.OlmoeConfig(**_SIZES | _ROUTED | {"intermediate_size": 64}, num_experts=8),
    "granitemoe": lambda: tf.GraniteMoeConfig(
        **_SIZES | _ROUTED | {"intermediate_size": 64}, num_local_experts=4
    ),
    # Layers with a recurrent state, and a gated shared expert.
    "qwen3_5_moe": lambda: tf.Qwen3_5MoeTextConfig(
        **_SIZES | _ROUTED | _LAYERS,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        num_experts=8,
        shared_expert_intermediate_size=64,
    ),
    "granite_h_moe": lambda: tf.GraniteMoeHybridConfig(
        **_SIZES | _MAMBA | {"layer_types": ["mamba", "attention"], "intermediate_size": 64},
        num_local_experts=8,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
    ),
    # A dense layer, and scores that a bias corrects for the choice alone.
    "glm4_moe": lambda: tf.Glm4MoeConfig(
        **_SIZES | _ROUTED,
        use_qk_norm=True,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    "ernie4_5_moe": lambda: tf.Ernie4_5_MoeConfig(
        **_SIZES | _ROUTED | {"moe_k": 2},
        moe_num_experts=8,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    # A router that is given its experts' biases beside the rows.
    "minimax_m2": lambda: tf.MiniMaxM2Config(
        **_SIZES | _ROUTED | {"intermediate_size": 64}, num_local_experts=8
    ),
}
"""Mixtures whose experts are computed as those of Mixtral."""

_TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_SCALED: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "llama_4_scaling_beta": 0.5,
    "max_position_embeddings": 512,
}
_SECTIONS: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_QWEN: dict[str, Any] = {"depth": 1, "num_heads": 2, "out_hidden_size": 128, "patch_size": 4}

_TEXT: dict[str, Any] = {**_SIZES, "initializer_range": 0.15, "tie_word_embeddings": False}
COMPOSITES: dict[str, Callable[[], Any]] = {
    "mistral3": lambda: tf.Mistral3Config(
        text_config={"model_type": "mistral", **_TEXT}, vision_config={**_TOWER, "head_dim": 32}
    ),
    "ministral3": lambda: tf.Mistral3Config(
        text_config={"model_type": "ministral3", **_TEXT, "rope_parameters": _SCALED},
        vision_config={**_TOWER, "head_dim": 32},
    ),
    "qwen3_vl": lambda: tf.Qwen3VLConfig(
        text_config={**_TEXT, "rope_parameters": _SECTIONS | {"mrope_interleaved": True}},
        vision_config=_QWEN | {"hidden_size": 64, "intermediate_size": 128, "deepstack_visual_indexes": [0]},
    ),
    # Of SigLIP's size in Gemma 3: no multiple of 64.
    "gemma3": lambda: tf.Gemma3Config(
        text_config=_TEXT | {"sliding_window": 24, "query_pre_attn_scalar": 32},
        vision_config=_TOWER | {"intermediate_size": 4304},
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
    ),
    "smolvlm": lambda: tf.SmolVLMConfig(text_config={"model_type": "llama", **_TEXT}, vision_config=_TOWER),
    # Its forward does not know logits_to_keep.
    "qwen2_5_omni_thinker": lambda: tf.Qwen2_5OmniThinkerConfig(
        text_config=_TEXT | {"rope_parameters": _SECTIONS},
        vision_config=_QWEN | {"embed_dim": 64, "hidden_size": 64, "intermediate_size": 128},
        audio_config={
            "d_model": 64,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
        },
    ),
}
"""Composites, as people download them: a language model with a tower that sees or hears."""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
OTHERWISE = {
    "q_proj": ("qkv_proj", "q_b_proj"),
    "k_proj": ("qkv_proj", "kv_a_proj_with_mqa"),
    "v_proj": ("qkv_proj", "kv_b_proj"),
    "gate_proj": ("gate_up_proj",),
    "up_proj": ("gate_up_proj",),
}
"""Layers of bases that have none of that name."""

INVOCATION = [41, 42, 41]
"""Tokens that activate the last of ADAPTERS."""

ADAPTERS: list[dict[str, Any]] = [
    {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION},
    {"r": 16, "lora_alpha": 16, "target_modules": ATTENTION},
    {"r": 4, "lora_alpha": 24, "target_modules": ATTENTION + MLP},
    {"r": 32, "lora_alpha": 20, "target_modules": ATTENTION + MLP},
    {"r": 8, "lora_alpha": 16, "target_modules": [*ATTENTION, "lm_head"]},
    {"r": 8, "lora_alpha": 12, "target_modules": ATTENTION + MLP, "use_rslora": True},
    {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ATTENTION + MLP,
        "rank_pattern": {"o_proj": 12},
        "alpha_pattern": {"down_proj": 5},
    },
    {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "embed_tokens"]},
    {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION + MLP, "use_dora": True},
    {"r": 3, "lora_alpha": 5, "target_modules": ["v_proj", "lm_head", "embed_tokens"], "use_dora": True},
    {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION + MLP, "lora_bias": True},
    {
        "r": 64,
        "lora_alpha": 64,
        "target_modules": ["q_proj"],
        "modules_to_save": ["model.norm", "model.layers.0.input_layernorm"],
    },
    {"r": 4, "lora_alpha": 12, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    {"r": 4, "lora_alpha": 4, "target_modules": ["up_proj"], "modules_to_save": ["model.embed_tokens"]},
    {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["o_proj"],
        "trainable_token_indices": [*range(310, 250, -3), *range(3, 63, 2)],
    },
    {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": [*ATTENTION, *MLP, "lm_head"],
        "alora_invocation_tokens": INVOCATION,
        "exclude_modules": ["kv_b_proj"],  # of more dimensions, where PEFT's own forward fails
    },
]
"""Attention only; all linear layers; lm_head; embed_tokens; unlike ranks and alphas; rsLoRA; patterns; DoRA;
biases; saved norms, head and embedding; tokens of its own; an activated LoRA. The first eight compose."""


def save_base(architecture: str, folder: Path, seed: int = 0, layers: int | None = None) -> Path:
    """A random model whose greedy texts wander: wide weights, so that logits are far apart."""
    config = (ARCHITECTURES | HYBRIDS | MIXTURES | MORE_MIXTURES)[architecture]()
    config.initializer_range = 0.15
    if layers is not None:
        config.num_hidden_layers = layers
    return save_model(config, folder, seed)


def save_model(config: Any, folder: Path, seed: int = 0) -> Path:
    """Save a random model of a config in fp32; returns the folder."""
    torch.manual_seed(seed)
    model = whole_class(config).from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def save_adapter(
    base: torch.nn.Module, settings: dict[str, Any], folder: Path, seed: int, std: float = 0.1
) -> Path:
    """An adapter of the base with random weights of its own, as PEFT itself saves it."""
    torch.manual_seed(seed)
    targets = own_names(base, settings["target_modules"])
    model = get_peft_model(
        peft_view(base),
        LoraConfig(task_type="CAUSAL_LM", **{**settings, "target_modules": targets}),
    )
    randomize(model, std)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


ON_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def plain_experts(base: torch.nn.Module) -> Any:
    """A view whose experts are plain parameters, as PEFT knows them, of the dequantized numbers."""
    tree = peft_view(base)
    for place in list(expert_matrices(tree)):
        stack = getattr(place.module, place.name)
        matrices = torch.stack([stack[number].detach() for number in range(place.sizes[0])])
        place.module._modules.pop(place.name, None)
        place.module._parameters.pop(place.name, None)
        place.module.register_parameter(place.name, torch.nn.Parameter(matrices, requires_grad=False))
    return tree


def save_on_experts(
    base: torch.nn.Module, folder: Path, seed: int = 0, std: float = 0.1, **settings: Any
) -> Path:
    """An adapter on experts with random weights, as PEFT itself makes and saves it."""
    torch.manual_seed(seed)
    wanted = {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": ON_EXPERTS, **settings}
    model = get_peft_model(plain_experts(base), LoraConfig(task_type="CAUSAL_LM", **wanted))
    randomize(model, std)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def own_names(base: torch.nn.Module, targets: Iterable[str]) -> list[str]:
    """What a base calls the layers of these names."""
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    found = {next(one for one in (name, *OTHERWISE.get(name, ())) if one in names) for name in targets}
    return sorted(found)


@torch.no_grad()
def randomize(model: torch.nn.Module, std: float) -> None:
    """Move PEFT's freshly made adapter away from the base, from torch's current seed."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.mul_(1 + 3 * std * torch.randn_like(parameter))
        elif "lora_" in name:
            parameter.normal_(0, std)
        elif "modules_to_save" in name or "trainable_tokens_delta" in name:
            parameter.add_(std * torch.randn_like(parameter))


def load_folder(base: torch.nn.Module, folder: Path, max_rank: int = 64) -> LoadedAdapter:
    """The adapter whose two files lie in `folder`."""
    return load_adapter(base, folder / CONFIG_FILE, folder / WEIGHTS_FILE, max_rank)
