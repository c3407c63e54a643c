#!/usr/bin/env python3
"""Measures serving a mixture of experts of OLMoE-1B-7B's shape: OneBase in NF4, transformers + PEFT in bf16,
llama.cpp in Q4_1.

Its weights are random, the same ones for all three, and its tokenizer is the default base's. The loads and
the table are those of serve.py, which gets all further options.

  python benchmarks/mixture.py --folder ~/olmoe --targets onebase,peft,llama.cpp --install-peers
  python benchmarks/mixture.py --layers 2 --rounds 1 --tokens 16      # a quick look
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import save_file
from transformers import OlmoeConfig

import serve
from bench.random_base import SHAPES
from onebase_engine.base.default_base import fetch_default_base, fetch_gguf
from onebase_engine.user_cache import default_cache

Q4_1 = GGMLQuantizationType.Q4_1
BLOCK, BLOCKS = 32, 1 << 17
"""Weights in a block of Q4_1, and blocks that are drawn; tensors are put together from them."""
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def write_mixture(folder: Path, layers: int) -> Path:
    """Write a random mixture as Hugging Face's files in bf16, and return it as a GGUF in Q4_1."""
    base = fetch_default_base()
    for file in [*base.glob("*token*"), *base.glob("*.jinja"), *base.glob("vocab*"), *base.glob("merges*")]:
        shutil.copy(file, folder)
    words = json.loads((base / "config.json").read_text())
    fields = SHAPES["olmoe"] | {name: words[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = OlmoeConfig(
        **fields | {"num_hidden_layers": layers}, pad_token_id=0, architectures=["OlmoeForCausalLM"]
    )
    config.save_pretrained(folder)
    file = folder / "Q4_1.gguf"
    writer = _begin(file, config)
    bank = torch.randn(BLOCKS, BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    in_4_bits = quantize(bank.float().numpy(), Q4_1)
    draw = np.random.default_rng(0)
    places: dict[str, str] = {}

    def put(name: str, gguf: str, *shape: int, tensors: dict[str, torch.Tensor]) -> None:
        """Make a tensor for both files of drawn blocks; experts are [experts, out, in], one for each."""
        chosen = draw.integers(0, BLOCKS, math.prod(shape) // BLOCK)
        made = bank[torch.from_numpy(chosen)].view(shape) if len(shape) > 1 else torch.ones(shape).bfloat16()
        parts = enumerate(made) if "*" in name else [(0, made)]
        tensors |= {f"{name.replace('*', str(number))}.weight": one.clone() for number, one in parts}
        if len(shape) == 1 or gguf.endswith("ffn_gate_inp"):
            writer.add_tensor(f"{gguf}.weight", made.float().numpy())
        else:
            packed = in_4_bits[chosen].reshape(*shape[:-1], -1)
            writer.add_tensor(f"{gguf}.weight", packed, raw_dtype=Q4_1)

    def save(tensors: dict[str, torch.Tensor], part: str) -> None:
        save_file(tensors, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, f"model-{part}.safetensors"))

    size, inner, count = config.hidden_size, config.intermediate_size, config.num_experts
    for number in range(layers):
        tensors: dict[str, torch.Tensor] = {}
        for name, gguf in NAMES.items():
            shape = (size,) if "norm" in name else (count, size) if name == "mlp.gate" else (size, size)
            path = f"model.layers.{number}.{name}"
            put(path, f"blk.{number}.{gguf}", *shape, tensors=tensors)
        for name, gguf in EXPERTS.items():
            matrix = (size, inner) if name == "down_proj" else (inner, size)
            path = f"model.layers.{number}.mlp.experts.*.{name}"
            put(path, f"blk.{number}.{gguf}", count, *matrix, tensors=tensors)
        save(tensors, f"{number:02}")
    tensors = {}
    put("model.embed_tokens", "token_embd", config.vocab_size, size, tensors=tensors)
    put("lm_head", "output", config.vocab_size, size, tensors=tensors)
    put("model.norm", "output_norm", size, tensors=tensors)
    save(tensors, "rest")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _begin(file: Path, config: Any) -> GGUFWriter:
    """Return the writer of a GGUF with the fields of a config, and the default base's tokenizer."""
    writer = GGUFWriter(file, "olmoe", use_temp_file=True)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    for field in GGUFReader(fetch_gguf(default_cache() / "gguf")).fields.values():
        if field.name.startswith("tokenizer."):
            within = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=within)
    return writer


def main(argv: Sequence[str]) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--layers", type=int, default=16, help="of the mixture; OLMoE has 16 (14 GB on disk)")
    parser.add_argument("--folder", type=Path, help="folder in which it is kept for the next time")
    options, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory(prefix="onebase-mixture-") as folder:
        kept = options.folder or Path(folder)
        file = kept / "Q4_1.gguf"
        if not (kept / "model.safetensors.index.json").exists():
            kept.mkdir(parents=True, exist_ok=True)
            write_mixture(kept, options.layers)
        return serve.main(["--base", str(kept), "--gguf", str(file), *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
