"""A base of random 4-bit weights, made on its device: no files of weights, nothing to quantize.

For measurements where no base can be had. Its texts mean nothing; what it costs is what a base of its shape
costs. Random bytes are the packed weights, random bytes their statistics.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.lora import ATTENTION, B_STD, write_adapter
from onebase_engine.base.attach import quantized_module
from onebase_engine.base.experts import ExpertStack, Matrices, expert_matrices, place_stacks
from onebase_engine.base.layers import empty_base
from onebase_engine.base.load import NESTED_BLOCKSIZE, BaseSettings, freeze, import_bitsandbytes, load_config
from onebase_engine.base.manifest import QuantizedLayer
from onebase_engine.kernels.weights import AdapterWeights, LoraWeights

ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
BLOCKSIZE = 64
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # Llama-3.1-8B
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "1b": {  # Llama-3.2-1B
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "3b": {  # Llama-3.2-3B
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "olmoe": {  # OLMoE-1B-7B
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 4096,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
    "tiny": {  # for Triton's interpreter
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 8192,
    },
}
"""Fields of configs."""
CLASSES = {"llama": "LlamaForCausalLM", "olmoe": "OlmoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
"""Names of models, by type."""
_SPECIAL = ("<pad>", "<s>", "</s>")
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_folder(shape: str, folder: Path, **changes: Any) -> BaseSettings:
    """Write a folder with a config and a tokenizer of bytes. Its one tensor only gives it an identity.

    changes: other fields of the config than the shape's.
    """
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    fields = {"tie_word_embeddings": False} | SHAPES[shape] | changes
    config = AutoConfig.for_model(
        **fields,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        architectures=[CLASSES[fields["model_type"]]],
    )
    config.save_pretrained(folder)
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate((*_SPECIAL, *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos = _SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, chat_template=_TEMPLATE
    ).save_pretrained(folder)
    return BaseSettings(folder)


@torch.no_grad()
def random_base(folder: Path, device: torch.device, seed: int = 0) -> nn.Module:
    """Return the base of a folder that `write_folder` has made, as `load_base` would give it."""
    import_bitsandbytes()
    draw = torch.Generator(device).manual_seed(seed)
    tree: Any = empty_base(load_config(folder), dtype=torch.bfloat16, attn_implementation="eager")
    head = tree.get_output_embeddings()
    for name, module in list(tree.named_modules()):
        if type(module) is nn.Linear and module is not head:
            put_layer(tree, name, module.in_features, module.out_features, draw)
    place_stacks(tree, {place.path: _random_stack(place, draw) for place in list(expert_matrices(tree))})
    for module in tree.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                value = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
                if parameter.dim() > 1:
                    value.normal_(0, 0.02, generator=draw)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    tree.tie_weights()
    tree.is_loaded_in_4bit = True
    return freeze(tree)


def put_layer(tree: nn.Module, name: str, size_in: int, size_out: int, draw: torch.Generator) -> Any:
    """Replace the linear layer `name` by one of random 4-bit weights, on the device of `draw`; returns it.

    Weights are the 16 values of NF4 times an absmax of 0.02 to 0.04, quantized twice as by bitsandbytes.
    """
    weight, statistics = _random_numbers((), size_in * size_out, draw)
    described = QuantizedLayer(
        kind="Linear4bit",
        size_in=size_in,
        size_out=size_out,
        quant_type="nf4",
        blocksize=BLOCKSIZE,
        shape=(size_out, size_in),
        nested_blocksize=NESTED_BLOCKSIZE,
    )
    return quantized_module(tree, name, described, weight[:, None], statistics)


def _random_stack(place: Matrices, draw: torch.Generator) -> ExpertStack:
    experts, size_in, size_out = place.sizes
    weight, statistics = _random_numbers((experts,), size_in * size_out, draw)
    return ExpertStack(
        weight,
        statistics,
        size_in=size_in,
        size_out=size_out,
        blocksize=BLOCKSIZE,
        dtype=torch.bfloat16,
        transposed=place.transposed,
    )


def _random_numbers(
    lead: tuple[int, ...], count: int, draw: torch.Generator
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return packed weights [*lead, count / 2] and their statistics."""
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    device, blocks = draw.device, -(-count // BLOCKSIZE)

    def octets(number: int) -> torch.Tensor:
        return torch.randint(0, 256, (*lead, number), dtype=torch.uint8, device=device, generator=draw)

    statistics = {
        "absmax": octets(blocks),
        "code": get_4bit_type("nf4", device=str(device)),
        "offset": torch.full(lead, 0.03, device=device),
        "nested_absmax": torch.full((*lead, -(-blocks // NESTED_BLOCKSIZE)), 0.01, device=device),
        "nested_code": create_dynamic_map().to(device),
    }
    return octets(-(-count // 2)), statistics


def one_layer(size_in: int, size_out: int, draw: torch.Generator) -> Any:
    """Return a random 4-bit layer by itself."""
    import_bitsandbytes()
    holder = nn.ModuleDict({"layer": nn.Linear(size_in, size_out, bias=False, device="meta")})
    layer = put_layer(holder, "layer", size_in, size_out, draw)
    freeze(holder)
    return layer


def targets_of(base: nn.Module, targets: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Return (out, in) of the base's layers of these names."""
    found: Any = base.named_modules()
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in found
        if name.rpartition(".")[2] in targets
    }


def random_adapter(
    base: nn.Module, rank: int, seed: int, targets: tuple[str, ...] = ATTENTION
) -> AdapterWeights:
    """Return an adapter's finished tensors in host memory, without PEFT and files."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    return {
        name: LoraWeights(normal(rank, size_in) * size_in**-0.5, normal(size_out, rank) * B_STD, 2.0)
        for name, (size_out, size_in) in targets_of(base, targets).items()
    }


def adapter_folder(
    base: nn.Module, folder: Path, rank: int, seed: int, targets: tuple[str, ...] = ATTENTION
) -> Path:
    """Write the like as PEFT's two files."""
    write_adapter(folder, targets_of(base, targets), rank, targets, [seed])
    return folder


def write_chats(file: Path, rows: int, characters: int) -> Path:
    """Write training rows: conversations whose replies repeat a letter; a character is a token."""
    lines = []
    for number in range(rows):
        letter = chr(97 + number % 26)
        messages = [
            {"role": "user", "content": f"{number}: {letter}"},
            {"role": "assistant", "content": letter * characters},
        ]
        lines.append(json.dumps({"messages": messages}))
    file.write_text("\n".join(lines) + "\n")
    return file
