#!/usr/bin/env python3
"""Measures serving a base of a usual size, without its files: a Llama of 1B or 3B, or a mixture of experts of
OLMoE-1B-7B's shape. OneBase in NF4, transformers + PEFT in NF4 (a mixture in bf16), llama.cpp in Q4_1.

Its weights are random, the same ones for all three, and its tokenizer and vocabulary are the default base's.
The loads and the table are those of serve.py, which gets all further options. With --folder, the base and
what OneBase has proved about its adapters are kept for the next time; --prepare writes the base and ends.

  python benchmarks/shapes.py 1b --folder ~/1b --targets onebase,llama.cpp --install-peers
  python benchmarks/shapes.py olmoe --folder ~/olmoe --prepare          # 18 GB on disk
  python benchmarks/shapes.py olmoe --layers 2 --rounds 1 --tokens 16   # a quick look

With --resident the base is made of random 4-bit weights in this process, and its engine is measured without
files, server and peers: its memory, one stream, and 16 streams over 8 adapters.

  python benchmarks/shapes.py qwen3-30b-a3b --resident                  # 18 GB of memory
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import quantize
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoConfig

import serve
from bench.command import positive
from bench.engines import engine_on, outputs
from bench.random_base import CLASSES, SHAPES, random_adapter, random_base, write_folder
from bench.report import table
from onebase_engine.base.default_base import fetch_default_base, fetch_gguf
from onebase_engine.base.load import base_bytes
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.messages import AdapterRef, Sampling, Submit
from onebase_engine.user_cache import default_cache
from onebase_server.processes.engine import warm_up

Q4_1 = GGMLQuantizationType.Q4_1
BLOCK, BLOCKS = 32, 1 << 17
"""Weights in a block of Q4_1, and blocks that are drawn; tensors are put together from them."""
ADAPTERS = 8
"""Adapters of a base that is measured in this process."""
GGUF, DONE = "Q4_1.gguf", "written"
"""Files of the base: for llama.cpp, and its shape and number of layers once everything is written."""
WRITTEN = ("1b", "3b", "olmoe")
"""Shapes of which files are written; the others are measured with --resident alone."""
START_SECONDS, LOAD_SECONDS = 3600, 1800
"""Limits of a target's start and of a load. At its first start OneBase quantizes the base and proves its
adapters."""
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
MLP = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
"""Names of a layer's weights in Hugging Face's files and in GGUF, where those of experts end in _exps."""


class Planned(NamedTuple):
    """One tensor of the base: its name in Hugging Face's files, * for an expert's number, and in GGUF."""

    name: str
    gguf: str
    shape: tuple[int, ...]

    @property
    def in_4_bits(self) -> bool:
        """Whether the GGUF holds it in Q4_1: everything but norms and routers."""
        return len(self.shape) > 1 and not self.gguf.endswith("ffn_gate_inp")


def write_base(shape: str, folder: Path, layers: int, console: Console) -> None:
    """Write a base of random weights as Hugging Face's files in bf16, and as a GGUF in Q4_1.

    One layer is in memory at a time. What an interrupted call has left is written again.

    Raises:
        SystemExit: the disk has no room.
    """
    (folder / DONE).unlink(missing_ok=True)
    for old in [*folder.glob("model*.safetensors"), folder / GGUF]:
        old.unlink(missing_ok=True)
    config = _write_settings(shape, folder, layers)
    parts = {f"{number:02}": _layer(config, number) for number in range(layers)}
    parts["rest"] = _rest(config)
    planned = [one for part in parts.values() for one in part]
    size = sum(2 * math.prod(one.shape) + _bytes_in_gguf(one) for one in planned)
    if (free := shutil.disk_usage(folder).free) < size:
        raise SystemExit(f"The base takes {size / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free.")
    bank = torch.randn(BLOCKS, BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    in_4_bits = quantize(bank.float().numpy(), Q4_1)
    draw = np.random.default_rng(0)
    writer = _begin(folder / GGUF, config)
    for one in planned:
        kind = np.dtype(np.float16 if one.in_4_bits else np.float32)  # with a raw dtype, only its name counts
        raw = Q4_1 if one.in_4_bits else None
        writer.add_tensor_info(f"{one.gguf}.weight", one.shape, kind, _bytes_in_gguf(one), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    places: dict[str, str] = {}
    for part, ones in parts.items():
        console.print(f"writing the base ({size / 1e9:.1f} GB): part {part} of {layers} layers and rest")
        tensors: dict[str, torch.Tensor] = {}
        for one in ones:
            name, sizes = one.name, one.shape
            chosen = draw.integers(0, BLOCKS, math.prod(sizes) // BLOCK)
            many = len(sizes) > 1
            made = bank[torch.from_numpy(chosen)].view(sizes) if many else torch.ones(sizes).bfloat16()
            singles = enumerate(made) if "*" in name else [(0, made)]
            tensors |= {f"{name.replace('*', str(at))}.weight": single.clone() for at, single in singles}
            if one.in_4_bits:
                writer.write_tensor_data(in_4_bits[_rows_of_llama_cpp(one, chosen, config)])
            else:
                writer.write_tensor_data(made.float().numpy())
        file = f"model-{part}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
    writer.close()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / DONE).write_text(f"{shape} {layers}")


def _rows_of_llama_cpp(one: Planned, blocks: np.ndarray, config: Any) -> np.ndarray:
    """Return a tensor's blocks with its rows in llama.cpp's order: another one for q and k of a Llama."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(one.name.rpartition(".")[2])
    if config.model_type != "llama" or count is None:
        return blocks
    return blocks.reshape(count, 2, one.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(-1)


def _write_settings(shape: str, folder: Path, layers: int) -> Any:
    """Write the config and the default base's tokenizer; return the config."""
    base = fetch_default_base()
    for file in [*base.glob("*token*"), *base.glob("*.jinja"), *base.glob("vocab*"), *base.glob("merges*")]:
        shutil.copy(file, folder)
    words = json.loads((base / "config.json").read_text())
    fields = SHAPES[shape] | {name: words[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = AutoConfig.for_model(
        **fields | {"num_hidden_layers": layers},
        pad_token_id=0,
        architectures=[CLASSES[fields["model_type"]]],
    )
    config.save_pretrained(folder)
    return config


def _layer(config: Any, number: int) -> list[Planned]:
    size, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or size // heads
    of_queries, of_keys = heads * width, config.num_key_value_heads * width
    experts = getattr(config, "num_experts", None)
    shapes = {
        "self_attn.q_proj": (of_queries, size),
        "self_attn.k_proj": (of_keys, size),
        "self_attn.v_proj": (of_keys, size),
        "self_attn.o_proj": (size, of_queries),
        "input_layernorm": (size,),
        "post_attention_layernorm": (size,),
    }
    if experts:
        norms = {"self_attn.q_norm": (of_queries,), "self_attn.k_norm": (of_keys,)}
        shapes |= norms | {"mlp.gate": (experts, size)}
    place = f"model.layers.{number}"
    found = [
        Planned(f"{place}.{name}", f"blk.{number}.{NAMES[name]}", shape) for name, shape in shapes.items()
    ]
    for name, gguf in MLP.items():
        matrix = (size, inner) if name == "down_proj" else (inner, size)
        if experts:
            path = f"{place}.mlp.experts.*.{name}"
            found.append(Planned(path, f"blk.{number}.{gguf}_exps", (experts, *matrix)))
        else:
            found.append(Planned(f"{place}.mlp.{name}", f"blk.{number}.{gguf}", matrix))
    return found


def _rest(config: Any) -> list[Planned]:
    rows = (config.vocab_size, config.hidden_size)
    found = [
        Planned("model.embed_tokens", "token_embd", rows),
        Planned("model.norm", "output_norm", rows[1:]),
    ]
    return found if config.tie_word_embeddings else [*found, Planned("lm_head", "output", rows)]


def _bytes_in_gguf(one: Planned) -> int:
    """Return the size in GGUF: 20 bytes for a block of Q4_1, 4 for a number otherwise."""
    numbers = math.prod(one.shape)
    return numbers // BLOCK * 20 if one.in_4_bits else 4 * numbers


def _begin(file: Path, config: Any) -> GGUFWriter:
    """Return the writer of a GGUF with the fields of a config, and the default base's tokenizer."""
    writer = GGUFWriter(file, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.model_type == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    else:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    for field in GGUFReader(fetch_gguf(default_cache() / "gguf")).fields.values():
        if field.name.startswith("tokenizer."):
            within = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=within)
    return writer


def measure_resident(shape: str, layers: int, console: Console) -> None:
    """Print the memory and the speed of an engine over a base of this shape."""
    with tempfile.TemporaryDirectory(prefix="onebase-shape-") as name:
        folder = Path(name)
        write_folder(shape, folder, num_hidden_layers=layers)
        with console.status(f"making the weights of {shape}"):
            base = random_base(folder, torch.device("cpu"))
        engine = engine_on(base, torch.device("cpu"), folder, slots=ADAPTERS)
        for number in range(ADAPTERS):
            engine.put_adapter(f"a{number}", random_adapter(base, 16, number))
        with console.status("the first requests"):
            warm_up(engine)
        rows = [["the base", f"{base_bytes(base) / 1e9:.1f} GB"]]
        for streams, tokens in ((1, 64), (16, 24)):
            seconds, between = _load(engine, streams, tokens)
            title = "1 stream, 1 adapter" if streams == 1 else f"{streams} streams, {ADAPTERS} adapters"
            rows += [[f"{title}: tokens/s", f"{streams * tokens / seconds:.1f}"]]
            rows += [[f"{title}: ms between tokens", f"{between * 1e3:.0f}"]]
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        for title, field in (("memory now", "VmRSS"), ("the most", "VmHWM")):
            rows.append([f"this process, {title}", f"{int(status[field].split()[0]) * 1024 / 1e9:.1f} GB"])
        console.print(table(["", ""], rows, f"{shape}, {layers} layers"))


def _load(engine: Engine, streams: int, tokens: int) -> tuple[float, float]:
    """Return the seconds of a load from its first request to its last token, and the median between two steps
    that gave each stream a token. Each prompt has 85 tokens."""
    draw = np.random.default_rng(streams)
    asked = [
        Submit(
            id=f"{streams}-{number}",
            prompt=draw.integers(3, 250, 85).tolist(),
            sampling=Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True),
            adapters=[AdapterRef(f"a{number % ADAPTERS}")],
        )
        for number in range(streams)
    ]
    started, ends = time.perf_counter(), list[float]()
    for count, _ in enumerate(outputs(engine, asked), 1):
        if count % streams == 0:
            ends.append(time.perf_counter())
    return ends[-1] - started, median(after - before for before, after in pairwise(ends))


def main(argv: Sequence[str]) -> int:
    """Return the exit status: 0 when every target was measured, else 1."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("shape", choices=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--layers", type=positive, help="of the base (default: all of its shape)")
    parser.add_argument("--folder", type=Path, help="folder in which it is kept for the next time")
    parser.add_argument("--prepare", action="store_true", help="write the base to --folder, and end")
    parser.add_argument("--resident", action="store_true", help="measure an engine in this process")
    options, rest = parser.parse_known_args(argv)
    layers = options.layers or SHAPES[options.shape]["num_hidden_layers"]
    if options.resident:
        if rest:
            parser.error(f"--resident is measured without a server: leave out {' '.join(rest)}")
        torch.set_num_threads(os.cpu_count() or 1)
        measure_resident(options.shape, layers, Console())
        return 0
    if options.shape not in WRITTEN:
        parser.error(f"{options.shape} is measured with --resident alone; with files: {', '.join(WRITTEN)}")
    if options.prepare and options.folder is None:
        parser.error("--prepare needs --folder")
    with tempfile.TemporaryDirectory(prefix="onebase-shape-") as folder:
        kept = options.folder or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        done = kept / DONE
        if not done.exists() or done.read_text() != f"{options.shape} {layers}":
            write_base(options.shape, kept, layers, Console())
        if options.prepare:
            return 0
        usual = [
            "--start-seconds",
            START_SECONDS,
            "--load-seconds",
            LOAD_SECONDS,
            "--data-dir",
            kept / "data",
        ]
        return serve.main(["--base", str(kept), "--gguf", str(kept / GGUF), *map(str, usual), *rest])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
