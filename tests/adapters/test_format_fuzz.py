"""Any bytes at all: taken as what PEFT takes them for, or refused, soon and in little memory."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.adapters import evil_files
from tests.adapters.format_support import (
    CONFIG,
    EMBEDDING,
    HEAD,
    NORM,
    PAIR,
    PREFIX,
    Q0,
    ROWS,
    WEIGHTS,
    read,
    write,
)

from onebase_adapters.format.canonical import AdapterFormatError, AdapterSpec

PROCESS_BOUND = 128 << 20
"""Bytes that reading may add to the process, whatever the files hold."""

PROCESSOR_BOUND = 10.0
"""Seconds of processor time for a file; the slowest, of 270 MB, takes one, or four on a busy machine."""


def test_evil_files_end_soon_and_take_little_memory(tmp_path: Path) -> None:
    names = evil_files.write_all(tmp_path)
    done = subprocess.run(
        [sys.executable, evil_files.__file__ or "", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))
    assert sum(one["grown"] for one in told.values()) < PROCESS_BOUND
    slow = {name: one["seconds"] for name, one in told.items() if one["seconds"] > PROCESSOR_BOUND}
    assert not slow
    large = tmp_path / f"{len(names) - 1:03}" / WEIGHTS
    assert large.stat().st_size > 2 * PROCESS_BOUND
    large.unlink()
    assert (told["valid"]["code"], told["large"]["code"]) == (None, None)
    assert all(one["code"] for name, one in told.items() if name.startswith("header"))


# ---- bytes ----------------------------------------------------------------------------------

VALID: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "lora": ({"target_modules": ["layers.0.self_attn.q_proj"], "alpha_pattern": {"q_proj": 3}}, PAIR),
    "dora": ({"use_dora": True}, {**PAIR, f"{PREFIX}{Q0}.lora_magnitude_vector": torch.ones(6)}),
    "saved": (
        {"modules_to_save": [NORM, HEAD]},
        {
            f"{PREFIX}{NORM}.weight": torch.ones(8, dtype=torch.bfloat16),
            f"{PREFIX}{NORM}.bias": torch.ones(8, dtype=torch.float16),
            f"{PREFIX}{HEAD}.weight": torch.ones(10, 8),
        },
    ),
    "tokens": ({"trainable_token_indices": {EMBEDDING: [3, 7]}}, {**PAIR, ROWS: torch.ones(2, 8)}),
}
TOKENS = [b"null", b"true", b"[]", b"{}", b"-1", b"1e999", b"NaN", b'"', b"\\u0000", b"\xff", b"0", b"9" * 20]
TOKENS += [b"F16", b"F64", b"BF16", b"[0,64]", b"lora_B", b"base_layer", b"..", b":", b",", b"}", b"{", b"]"]


def mutated(raw: bytes, luck: random.Random) -> bytes:
    """One to four small accidents, most of them near the beginning, where headers are."""
    data = bytearray(raw)
    for _ in range(luck.randint(1, 4)):
        size = max(len(data), 1)
        at = luck.randrange(size if luck.random() < 0.5 else min(size, 700))
        length = luck.choice([1, 1, 2, 8, 40])
        accident = luck.randrange(6)
        if accident == 0:
            data[at : at + 1] = bytes([luck.randrange(256)])
        elif accident == 1:
            data[at : at + length] = b""
        elif accident == 2:
            data[at:at] = luck.choice(TOKENS)
        elif accident == 3:
            data[at : at + length] = luck.choice(TOKENS)
        elif accident == 4:
            other = luck.randrange(size)
            data[at:at] = data[other : other + length]
        else:
            del data[at if luck.random() < 0.2 else size :]
    return bytes(data)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", VALID)
def test_mutated_bytes_are_refused_or_taken_whole(kind: str, file: str, tmp_path: Path) -> None:
    folder = tmp_path / "mutated"
    folder.mkdir()
    fields, tensors = VALID[kind]
    write(folder, tensors, **fields)
    raw = (folder / file).read_bytes()
    luck, codes = random.Random(f"{kind} {file}"), set[str]()
    for _ in range(600):
        (folder / file).write_bytes(mutated(raw, luck))
        codes.add(read_or_refuse(folder, tmp_path))
    assert {"taken", "bad_config" if file == CONFIG else "bad_weights"} < codes


def read_or_refuse(folder: Path, scratch: Path) -> str:
    """The only exception that may leave `canonicalize` is its own, with a message that any encoder takes."""
    with tempfile.TemporaryDirectory(dir=scratch) as target:
        try:
            spec = read(folder, target=Path(target))
        except AdapterFormatError as error:
            code, message = error.code, str(error).encode()
        else:
            check_canonical(spec, Path(target))
            code, message = "taken", b""
    assert len(message) < 700
    return code


def check_canonical(spec: AdapterSpec, target: Path) -> None:
    """What was taken is whole: finite tensors, of the spec's modules and sizes, and a config."""
    tensors = load_file(target / WEIGHTS)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert spec.parameters == sum(tensor.numel() for tensor in tensors.values()) > 0
    owners = {module.name for module in spec.modules if module.parameters}
    assert all(any(name.startswith(f"{PREFIX}{owner}.") for owner in owners) for name in tensors)
    assert json.loads((target / CONFIG).read_text())["peft_type"] == "LORA"
    (spec.base_name or "").encode()


# ---- structure ------------------------------------------------------------------------------

fuzz = settings(
    max_examples=150,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
    *("peft_type", "task_type", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "base_model_name_or_path", "modules_to_save", "trainable_token_indices"),
    *("ensure_weight_tying", "loftq_config", "bias", "lora_dropout", "revision", "eva_config"),
]


@fuzz
@given(config=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4))
def test_any_values_in_the_config_are_taken_or_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    read_or_refuse(write(tmp_path, **config), tmp_path)


@fuzz
@given(
    header=json_values
    | st.dictionaries(
        st.sampled_from([*PAIR, ROWS, "__metadata__", "x"]),
        json_values
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "I8", None]) | json_values,
                "shape": st.lists(st.integers(-1, 9), max_size=3) | json_values,
                "data_offsets": st.lists(st.integers(-1, 200), max_size=3) | json_values,
            }
        ),
        max_size=3,
    ),
    size=st.integers(0, 200),
)
def test_any_header_is_taken_or_refused(tmp_path: Path, header: Any, size: int) -> None:
    write(tmp_path)
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * size)
    read_or_refuse(tmp_path, tmp_path)
