"""Adapters made to cost time or memory, and a program that reads them all and tells what each took.

`python evil_files.py FOLDER`, in a process of its own so that a hang can be ended and its peak memory seen,
prints one JSON object a line for each folder in it: code of the refusal (or null), seconds of the processor,
and by how many bytes the process's peak memory grew.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from onebase_adapters.format.canonical import AdapterFormatError, canonicalize
from onebase_adapters.format.safetensors_file import MAX_HEADER_BYTES, TensorToWrite, write_tensors
from onebase_engine.base.layers import LayerShape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LAYERS = {
    "model.embed_tokens": LayerShape(32_768, 4096, "embedding"),
    **{
        f"model.layers.{i}.{name}": LayerShape(4096, 4096, "norm" if "norm" in name else "linear")
        for i in range(80)
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
            "input_layernorm",
            "post_attention_layernorm",
        )
    },
    "model.norm": LayerShape(4096, 4096, "norm"),
    "lm_head": LayerShape(4096, 32_768),
}
"""As many layers as a base of 70 billion weights has."""
SETTINGS = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
TARGET = "model.layers.0.self_attn.q_proj"
REGEX = "(([a-z])+.)+[A-Z]([a-z])+$(a+)+$"
MiB = 1 << 20


def _filled(text: str, size: int) -> str:
    return text * (size // len(text))


def evil_configs() -> Iterator[tuple[str, bytes]]:
    """Configs that reach or pass each limit of size, count, depth and form."""

    def made(**fields: Any) -> bytes:
        return json.dumps({**SETTINGS, **fields}).encode()

    for field in ("target_modules", "exclude_modules", "layers_pattern", "megatron_core", "revision"):
        yield f"regex {field}", made(**{field: REGEX})
    for field in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        yield f"regexes {field}", made(**{field: [REGEX], "layers_to_transform": [0]})
        yield f"many {field}", made(**{field: [f"n{i}" for i in range(90_000)]})
        yield f"known {field}", made(**{field: ["q_proj", "model.norm", "lm_head"] * 20_000})
    linear = sorted({name.rpartition(".")[2] for name in LAYERS if "proj" in name})
    many = [f"n{i}" for i in range(90_000)]
    yield "layers by many names", made(target_modules=linear, layers_to_transform=[0], layers_pattern=many)
    for field in ("rank_pattern", "alpha_pattern"):
        yield f"regex {field}", made(**{field: {REGEX: 1}})
        yield f"many {field}", made(**{field: {f"n{i}": 1 for i in range(8_000)}})
        yield f"too many {field}", made(**{field: {f"n{i}": 1 for i in range(60_000)}})
        dotted = (
            "".join("." if mask >> place & 1 else letter for place, letter in enumerate("self_attn.q_proj"))
            for mask in range(1, 1 << 7)
        )
        yield f"dots {field}", made(**{field: {**dict.fromkeys(dotted, 1), "q_proj": 1}})
        yield f"one long {field}", made(**{field: {"a" * 900_000: 1}})
    yield "tokens", made(trainable_token_indices=list(range(31_999)))
    yield "huge tokens", made(trainable_token_indices=[10**4000] * 200)
    yield "token dict", made(trainable_token_indices={f"n{i}": [1] for i in range(40_000)})
    yield "unknown fields", made(**{f"f{i}": 1 for i in range(60_000)})
    yield "deep list", b'{"r": ' + b"[" * (MiB // 2)
    yield "deep object", b'{"r": ' * (MiB // 7)
    yield "nested", b'{"r": ' + b"[" * 900 + b"]" * 900 + b"}"
    yield "numbers", b'{"eva_config": [' + _filled("1,", MiB - 100).encode() + b"1]}"
    yield "objects", b'{"eva_config": [' + _filled("{},", MiB - 100).encode() + b"1]}"
    yield "long number", b'{"r": ' + b"9" * (MiB - 20) + b"}"
    yield "exponent", b'{"peft_type": "LORA", "lora_alpha": 1e999999999}'
    yield "escapes", b'{"base_model_name_or_path": "' + _filled("\\ud800", MiB - 100).encode() + b'"}'
    yield "too large", b" " * (MiB + 1)
    yield "zeros", b"\0" * MiB


def evil_headers() -> Iterator[tuple[str, bytes]]:
    """Headers of just under the limit, of all that JSON can hold."""
    size = MAX_HEADER_BYTES - 100
    yield "empty", b"{}"
    yield "one object", b'{"a": ' + _filled('{"a":', size).encode()
    yield "lists", b'{"a": ' + _filled("[", size).encode()
    yield "numbers", b'{"a": [' + _filled("7,", size).encode() + b"7]}"
    yield "large numbers", b'{"a": [' + _filled("12345678901,", size).encode() + b"7]}"
    yield "objects", b'{"a": [' + _filled("{},", size).encode() + b"7]}"
    yield "keys", ("{" + ",".join(f'"{i}":0' for i in range(size // 11)) + "}").encode()
    yield "small objects", ("{" + ",".join(f'"{i}":{{}}' for i in range(size // 12)) + "}").encode()
    yield "same keys", ("{" + ",".join('"a":{"a":0}' for _ in range(size // 12)) + "}").encode()
    yield "metadata", ('{"__metadata__":{' + ",".join(f'"{i}":""' for i in range(size // 12)) + "}}").encode()
    yield "long name", b'{"' + b"a" * size + b'": {}}'
    one = '"%s":{"dtype":"F32","shape":[1,1],"data_offsets":[%d,%d]}'
    for name in ("", "x", PREFIX, f"{PREFIX}{TARGET}.lora_A.weight", f"{PREFIX}lm_head.weight"):
        count = size // (len(one) + len(name) + 15)
        entries = (one % (f"{name}{i}", 4 * i, 4 * i + 4) for i in range(count))
        yield f"many {name}", ("{" + ",".join(entries) + "}").encode()
    yield "overlapping", ("{" + ",".join(one % (i, 0, 4) for i in range(size // 70)) + "}").encode()
    yield (
        "huge shape",
        json.dumps({"a": {"dtype": "F32", "shape": [2**61] * 9, "data_offsets": [0, 4]}}).encode(),
    )
    yield (
        "many dimensions",
        b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[' + _filled("9,", size).encode() + b"1]}}",
    )


def large_file(path: Path) -> None:
    """256 MiB in bf16: an embedding whole, and matrices of rank 8 on one layer."""
    chunk = torch.full((1 << 20,), 0.5, dtype=torch.bfloat16)

    def tensor(name: str, *shape: int) -> TensorToWrite:
        chunks = torch.Size(shape).numel() >> 20
        pieces = [chunk] * chunks if chunks else [torch.full(shape, 0.5).flatten()]
        return TensorToWrite(f"{PREFIX}{name}", torch.bfloat16, shape, lambda: pieces)

    write_tensors(
        path,
        [
            tensor("model.embed_tokens.weight", 32_768, 4096),
            tensor(f"{TARGET}.lora_A.weight", 8, 4096),
            tensor(f"{TARGET}.lora_B.weight", 4096, 8),
        ],
    )


def write_all(folder: Path) -> list[str]:
    """One folder for each evil adapter, below `folder`, in the order to read them in; returns their names."""
    names: list[str] = []

    def at(name: str, config: bytes) -> Path:
        place = folder / f"{len(names):03}"
        place.mkdir()
        names.append(name)
        (place / CONFIG).write_bytes(config)
        return place / WEIGHTS

    plain = json.dumps(SETTINGS).encode()
    write_tensors(at("valid", plain), small_tensors())
    for name, config in evil_configs():
        write_tensors(at(f"config: {name}", config), small_tensors())
    for name, header in evil_headers():
        with at(f"header: {name}", plain).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + 4 * header.count(b"F32"))
    large_file(at("large", json.dumps({**SETTINGS, "r": 8, "modules_to_save": ["embed_tokens"]}).encode()))
    return names


def small_tensors() -> list[TensorToWrite]:
    pair = (("A", (1, 4096)), ("B", (4096, 1)))
    return [
        TensorToWrite(
            f"{PREFIX}{TARGET}.lora_{which}.weight", torch.float32, shape, lambda: [torch.ones(4096)]
        )
        for which, shape in pair
    ]


def measured(folder: Path) -> dict[str, Any]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    code = None
    with tempfile.TemporaryDirectory() as target:
        files = folder / CONFIG, folder / WEIGHTS
        try:
            canonicalize(*files, LAYERS, 64, Path(target), base_tensor=lambda name: None)
        except AdapterFormatError as error:
            code = error.code
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"code": code, "seconds": round(seconds, 3), "grown": grown}


def main(folder: Path) -> None:
    for place in sorted(folder.iterdir()):
        print(json.dumps(measured(place)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
