"""Files of other trainers become the same adapter in PEFT's own form, or are refused by name."""

from __future__ import annotations

import io
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.adapters.format_support import CONFIG, PREFIX, WEIGHTS, logits, read_for, train, write_raw
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from onebase_adapters.format import conversion
from onebase_adapters.format.config import (
    MAX_HEADER_BYTES,
    MLX_WEIGHTS_FILE,
    NOTE,
    AdapterFormatError,
    check_config,
)

Q = "model.layers.0.self_attn.q_proj"
PAIR = {f"{Q}.lora_a": torch.ones(8, 2), f"{Q}.lora_b": torch.ones(2, 6)}
FIELDS: dict[str, Any] = {
    "fine_tune_type": "lora",
    "lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0},
    "num_layers": 16,
    "model": "mlx-community/Llama-3.2-1B-Instruct-4bit",
    "train": True,
    "seed": 0,
}


def config_of(**fields: Any) -> bytes:
    return json.dumps({**FIELDS, **fields}).encode()


def converted(folder: Path, **fields: Any) -> tuple[dict[str, Any], bytes]:
    """PEFT's config and weights of the adapter in a folder."""
    out = io.BytesIO()
    config = conversion.convert(config_of(**fields), folder / MLX_WEIGHTS_FILE, out.write)
    return json.loads(config), out.getvalue()


def code_of(folder: Path, **fields: Any) -> tuple[str, str]:
    with pytest.raises(AdapterFormatError) as refused:
        converted(folder, **fields)
    return refused.value.code, str(refused.value)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=12, num_hidden_layers=2, initializer_range=0.3, **sizes)
    model: nn.Module = LlamaForCausalLM(config).eval().requires_grad_(False)
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_is_the_adapter_that_peft_would_have_saved(
    base: nn.Module, tmp_path: Path, dora: bool, dtype: torch.dtype
) -> None:
    fields = {"target_modules": ["q_proj", "down_proj"], "use_dora": dora, "r": 3, "lora_alpha": 7.5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = train(base, tmp_path / "theirs", fields)
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(theirs / WEIGHTS).items()}
        save_file(tensors, theirs / WEIGHTS)
        ends = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}
        as_mlx = {}
        for name, tensor in tensors.items():
            own = name.removeprefix(PREFIX)
            for end, new in ends.items():
                own = own.removesuffix(".weight") if "magnitude" in own else own
                own = own.replace(end, new)
            as_mlx[own] = tensor.T.contiguous() if tensor.dim() == 2 else tensor
        save_file(as_mlx, tmp_path / MLX_WEIGHTS_FILE)
        folder, target = tmp_path / "made", tmp_path / "canonical"
        folder.mkdir()
        target.mkdir()
        kind, parameters = ("dora" if dora else "lora"), {"rank": 3, "scale": 2.5, "dropout": 0.1}
        config, weights = converted(tmp_path, fine_tune_type=kind, lora_parameters=parameters)
        (folder / CONFIG).write_text(json.dumps(config))
        (folder / WEIGHTS).write_bytes(weights)
        found = load_file(folder / WEIGHTS)
        assert {one.dtype for one in found.values()} == {dtype}
        assert len(found) == len(tensors)
        read_for(base, folder, target)
        text = torch.tensor([[5, 9, 1, 3, 6, 2]])
        expected = logits(base, theirs, text)
        assert torch.equal(logits(base, folder, text), expected)
        assert torch.equal(logits(base, target, text), expected)


def test_the_config_is_peft_s_and_the_same_each_time(tmp_path: Path) -> None:
    save_file(PAIR, tmp_path / MLX_WEIGHTS_FILE)
    config, weights = converted(tmp_path)
    assert (config, weights) == converted(tmp_path)
    facts = check_config(json.dumps(config).encode())
    assert (facts.rank, facts.alpha, facts.target_modules) == (2, 40.0, (Q,))
    assert facts.base_name == "mlx-community/Llama-3.2-1B-Instruct"


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(4, 40), st.sampled_from(["float32", "bfloat16"]))
def test_matrices_are_turned_in_pieces_of_any_size(rows: int, columns: int, block: int, kind: str) -> None:
    tensor = torch.randn(rows, columns).to(getattr(torch, kind))
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as place:
        patch.setattr(conversion, "_BLOCK_BYTES", block)
        folder = Path(place)
        save_file({f"{Q}.lora_a": tensor}, folder / MLX_WEIGHTS_FILE)
        _, weights = converted(folder)
        (folder / WEIGHTS).write_bytes(weights)
        (found,) = load_file(folder / WEIGHTS).values()
    assert torch.equal(found, tensor.T)


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"fine_tune_type": "full"}, "unsupported_kind", "fine_tune_type"),
        ({"fine_tune_type": None}, "unsupported_kind", "fine_tune_type"),
        ({"lora_parameters": None}, "bad_config", "rank"),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, "bad_config", "rank"),
        ({"lora_parameters": {"rank": True, "scale": 1.0}}, "bad_config", "rank"),
        ({"lora_parameters": {"rank": 1 << 40, "scale": 1.0}}, "bad_config", "rank"),
        ({"lora_parameters": {"rank": 2}}, "bad_config", "scale"),
        ({"lora_parameters": {"rank": 2, "scale": "2"}}, "bad_config", "scale"),
        ({"lora_parameters": {"rank": 2, "scale": 1e300}}, "bad_config", "scale"),
        ({"lora_parameters": {"rank": 2, "scale": 10.0, "alpha": 16}}, "bad_config", "alpha"),
    ],
)
def test_a_config_that_means_something_else_is_refused(
    tmp_path: Path, fields: dict[str, Any], code: str, named: str
) -> None:
    save_file(PAIR, tmp_path / MLX_WEIGHTS_FILE)
    found, message = code_of(tmp_path, **fields)
    assert found == code
    assert named in message


@pytest.mark.parametrize(
    ("name", "shape", "code"),
    [
        (f"{Q}.weight", (2, 2), "foreign_tensor"),
        (f"{Q}.m", (2,), "foreign_tensor"),
        ("lora_a", (2, 2), "foreign_tensor"),
        ("model.embed_tokens.lora_a", (2, 2), "unsupported_kind"),
        ("model.layers.0.mlp.switch_mlp.up_proj.lora_a", (2, 2, 2), "bad_shape"),
    ],
)
def test_a_tensor_that_peft_has_no_place_for_is_refused_by_name(
    tmp_path: Path, name: str, shape: tuple[int, ...], code: str
) -> None:
    save_file({**PAIR, name: torch.ones(shape)}, tmp_path / MLX_WEIGHTS_FILE)
    found, message = code_of(tmp_path)
    assert found == code
    assert name.removesuffix(".lora_a") in message


def tensor(start: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


HEADERS: dict[str, tuple[Any, int]] = {
    "no object": ([], 0),
    "no JSON": (b"{", 0),
    "a gap": ({"a.lora_a": tensor(4, 8, [1])}, 8),
    "the same bytes twice": ({"a.lora_a": tensor(0, 4, [1]), "a.lora_b": tensor(0, 4, [1])}, 4),
    "more bytes": ({"a.lora_a": tensor(0, 4, [1])}, 8),
    "fewer bytes": ({"a.lora_a": tensor(0, 8, [2])}, 4),
    "a negative size": ({"a.lora_a": tensor(0, 4, [-1])}, 4),
    "a wrong size": ({"a.lora_a": tensor(0, 4, [2])}, 4),
    "no size": ({"a.lora_a": tensor(0, 0, [0])}, 0),
    "another type": ({"a.lora_a": {**tensor(0, 4, [1]), "dtype": "I32"}}, 4),
    "nothing of it": ({"a.lora_a": None}, 0),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_damaged_file_is_refused(tmp_path: Path, what: str) -> None:
    header, size = HEADERS[what]
    write_raw(tmp_path, header, bytes(size))
    (tmp_path / WEIGHTS).rename(tmp_path / MLX_WEIGHTS_FILE)
    assert code_of(tmp_path)[0] == "bad_weights"


@pytest.mark.parametrize("raw", [b"", b"\x08", (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}"])
def test_a_file_without_a_header_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / MLX_WEIGHTS_FILE).write_bytes(raw)
    assert code_of(tmp_path)[0] == "bad_weights"


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        (config_of(), True),
        (b'{"lora_parameters": 1}', True),
        (config_of(peft_type="LORA"), False),
        (b'{"peft_type": "LORA"}', False),
        (b"[]", False),
        (b"{", False),
        (b"[" * 100_000, False),
        (b"\xff", False),
        (b" " * (1 << 20) + b'{"lora_parameters": 1}', False),
    ],
)
def test_a_config_of_mlx_lm_is_told_from_others(raw: bytes, answer: bool) -> None:
    assert conversion.is_mlx(raw) == answer


# ---- names that a trainer wraps ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"),
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: name.removeprefix(PREFIX),
    ],
)
def test_wrapped_names_are_stored_as_peft_loads_them(
    base: nn.Module, tmp_path: Path, wrap: Callable[[str], str]
) -> None:
    fields = {"target_modules": ["q_proj"], "layers_to_transform": [0], "modules_to_save": ["model.norm"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = train(base, tmp_path / "theirs", fields)
        text = torch.tensor([[5, 9, 1, 3, 6, 2]])
        expected, plain = logits(base, theirs, text), load_file(theirs / WEIGHTS)
        config = (theirs / CONFIG).read_bytes()
        assert not conversion.needs_conversion(config, theirs / WEIGHTS)
        save_file({wrap(name): one for name, one in plain.items()}, theirs / WEIGHTS)
        assert conversion.needs_conversion(config, theirs / WEIGHTS)
        made = tmp_path / "made"
        made.mkdir()
        with (made / WEIGHTS).open("wb") as file:
            (made / CONFIG).write_bytes(conversion.convert(config, theirs / WEIGHTS, file.write))
        assert not conversion.needs_conversion(config, made / WEIGHTS)
        assert load_file(made / WEIGHTS).keys() == plain.keys()
        assert torch.equal(logits(base, made, text), expected)
        assert "is read as" in read_for(base, made).warnings[0]


@pytest.mark.parametrize(
    "names",
    [
        [f"{PREFIX}{Q}.lora_A.weight", f"{Q}.lora_B.weight"],
        [f"{PREFIX}{Q}.lora_A.a.weight", f"{PREFIX}{Q}.lora_B.b.weight"],
        [f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}_orig_mod.{Q}.lora_A.weight"],
    ],
)
def test_names_that_are_refused_later_are_stored_as_they_are(tmp_path: Path, names: list[str]) -> None:
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / WEIGHTS)
    assert not conversion.needs_conversion(b"{}", tmp_path / WEIGHTS)


def test_a_note_that_no_conversion_wrote_shows_nothing_odd(base: nn.Module, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = train(base, tmp_path, {"target_modules": ["q_proj"]})
    tensors = load_file(folder / WEIGHTS)
    for note in ("\x1b[31m", "x" * 501):
        save_file(tensors, folder / WEIGHTS, metadata={NOTE: note})
        assert read_for(base, folder).warnings == ()
