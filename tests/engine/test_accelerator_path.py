"""The way of accelerators (products of the shape that the step has), run on the CPU: equal to PEFT as well.

Rows agree up to rounding there, so texts are compared, not bits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine import triton_on_cpu
from tests.engine.harness import Lab, Request, requests, run
from tests.engine.layers import same_in_int8
from tests.tiny import ARCHITECTURES, save_base
from torch import nn
from transformers import GraniteConfig

from onebase_engine.base.load import (
    BaseChangedError,
    BaseSettings,
    base_tensors,
    content_sum,
    load_base,
)
from onebase_engine.engine import fusion, model
from onebase_engine.engine.messages import Sampling, Submit
from onebase_engine.engine.model import ServedModel
from onebase_engine.kernels import cuda
from onebase_engine.kernels.interface import RowMap
from onebase_engine.kernels.reference import ReferenceKernels, ReferenceLinear

ASKED = requests(18, seed=7)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_rows_in_the_shape_of_the_step_equal_peft_alone(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "find_kernels", lambda *_: ReferenceKernels(tiled=False))
    settings = BaseSettings(
        save_base(architecture, tmp_path / "base"), quantization="none", dtype=torch.float32
    )
    lab = Lab.create(load_base(settings), tmp_path)
    expected = [lab.expected(request) for request in ASKED]
    for changes in ({}, {"slots": 2, "step_tokens": 20}):
        engine = lab.engine(**changes)
        assert not engine.model.kernels.tiled
        assert run(engine, ASKED) == expected
        assert engine.slots.used == 0
        engine.check_base()


class AddingLinear(ReferenceLinear):
    """Says that it adds to other rows where it computes, and counts how often it did."""

    adds = True
    added = 0

    def __call__(self, x: torch.Tensor, rows: RowMap, onto: torch.Tensor | None = None) -> torch.Tensor:
        AddingLinear.added += onto is not None
        return super().__call__(x, rows, onto)


class Adding(ReferenceKernels):
    joins = True

    def linear(self, base: Any, slots: int, *, unpacked: bool = False) -> ReferenceLinear:
        return AddingLinear(base, tiled=False)


def adding(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> ServedModel:
    monkeypatch.setattr(fusion, "_rotations", lambda *_: ())  # which PyTorch's attention does not take
    return ServedModel(base, 8, kernels=Adding(tiled=False))


def test_sums_that_are_part_of_products_change_no_bit_whatever_kind_of_adapter_acts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it replaces what `o_proj` or `down_proj` gives, or what a step has begun is not ended."""
    lab = Lab.create(
        load_base(BaseSettings(save_base("llama", tmp_path / "b"), quantization="none")), tmp_path
    )
    asked = [Request(tuple(range(5 + kind, 10 + kind)), kind, 3, at=kind // 5) for kind in range(15)]
    asked += [Request((4, 9, 200), None, 6), Request(tuple(range(3, 83)), 3, 3)]
    apart = lab.engine(model=ServedModel(lab.base, 8, kernels=ReferenceKernels(tiled=False)))
    engine = lab.engine(model=(served := adding(lab.base, monkeypatch)))
    AddingLinear.added = 0
    assert run(engine, asked[15:]) == run(apart, asked[15:])
    assert AddingLinear.added == 2 * 2 * engine.counters.steps
    layer = served._view.model.layers[0]
    with pytest.raises(TypeError):
        layer(torch.zeros(1, 1, 128, dtype=torch.bfloat16), position_embeddings=None)
    assert layer.self_attn.o_proj.onto is layer.mlp.down_proj.onto is None
    assert run(engine, asked) == run(apart, asked)


GRANITE = {"residual_multiplier": 0.5, "hidden_size": 128, "intermediate_size": 192, "vocab_size": 320}


@pytest.mark.parametrize(
    ("architecture", "config", "added"),
    [
        ("qwen3", None, True),
        ("granite", GraniteConfig(**GRANITE, num_attention_heads=4, num_key_value_heads=2), False),
        ("gemma3", None, False),
    ],
)
def test_sums_stay_apart_in_layers_that_do_more_than_add(
    architecture: str, config: Any, added: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if config is not None:
        monkeypatch.setitem(ARCHITECTURES, architecture, lambda: config)
    base = load_base(BaseSettings(save_base(architecture, tmp_path / "base"), quantization="none"))
    served = adding(base, monkeypatch)
    served.allocate_kv(20, 16)
    assert {"forward" in vars(layer) for layer in served._view.model.layers} == {added}


def test_int8s_are_read_as_in_tiles() -> None:
    same_in_int8(ReferenceKernels(tiled=False), (2, 3), 64, [140, 9], [100, 139, 140], window=60)


def test_an_accelerator_is_waited_for_once_a_step_whatever_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "find_kernels", lambda *_: ReferenceKernels(tiled=False))
    settings = BaseSettings(save_base("llama", tmp_path / "base"), quantization="none", dtype=torch.float32)
    engine = Lab.create(load_base(settings), tmp_path).engine()
    reads = _reads(monkeypatch)
    drawn: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_p": 0.9, "seed": 1},
        {"top_k": 7, "min_p": 0.1, "temperature": 1.5},
        {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
        {"logit_bias": {5: 3.0, 9: -100.0}, "min_tokens": 2, "stop_token_ids": [4]},
    ]
    for number, sampling in enumerate(drawn):
        engine.submit(Submit(id=str(number), prompt=[3, 5, 8], sampling=Sampling(max_tokens=4, **sampling)))
    steps = engine.counters.steps
    while engine.busy:
        engine.step()
    assert engine.counters.steps - steps == 4
    assert reads == ["tolist"] * 4


def test_blocks_go_to_host_memory_and_come_back_without_another_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "find_kernels", lambda *_: ReferenceKernels(tiled=False))
    settings = BaseSettings(save_base("llama", tmp_path / "base"), quantization="none", dtype=torch.float32)
    engine = Lab.create(load_base(settings), tmp_path).engine(kv_blocks=2 + 6, host_blocks=20)
    reads = _reads(monkeypatch)
    for first in (3, 80, 160, 3):
        run(engine, [Request(tuple(range(first, first + 70)), None, 3)])
    assert engine.counters.restored_tokens == 64
    assert reads == ["tolist"] * engine.counters.steps


def test_a_write_by_another_process_is_found_in_any_tensor_of_the_base(tmp_path: Path) -> None:
    base = load_base(BaseSettings(save_base("llama", tmp_path / "base"), quantization="nf4"))
    engine = Lab.create(base, tmp_path).engine()
    engine.watch_content()
    for tensor in base_tensors(base).values():
        engine.check_base()
        address, size = tensor.data_ptr(), tensor.nbytes
        memory = (ctypes.c_uint8 * size).from_address(address)
        memory[size - 1] ^= 1  # which no counter of PyTorch's sees
        with pytest.raises(BaseChangedError):
            engine.check_base()
        memory[size - 1] ^= 1


def test_no_step_waits_for_a_check_of_the_base_and_a_write_is_found_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(BaseSettings(save_base("llama", tmp_path / "base", layers=1), quantization="nf4"))
    engine = Lab.create(base, tmp_path).engine()
    slices = 4
    monkeypatch.setattr(
        engine.model.kernels,
        "content_sum",
        lambda tensors, device: cuda.ContentSum(tensors, device, slices),
        raising=False,
    )
    engine.watch_content()
    engine.begin_base_check()
    for _ in range(slices + 3):
        engine.watch_base()
    engine.submit(Submit(id="one", prompt=[3, 5], sampling=Sampling(max_tokens=9, ignore_eos=True)))
    tensor = base_tensors(base)["model.norm.weight"]
    memory = (ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr())
    launched: list[str] = []
    triton_on_cpu.tell(monkeypatch, launched.append)
    reads = _reads(monkeypatch)
    engine.begin_base_check()
    assert (launched, reads) == ([], [])
    memory[0] ^= 1  # behind the beginning, and before it is read
    for number in range(1, slices + 1):
        engine.watch_base()
        assert launched == ["_sum_bytes"] * number, "one launch a step"
    assert reads == []
    engine.watch_base()  # which only reads that the sum is made
    with pytest.raises(BaseChangedError):
        engine.watch_base()
    memory[0] ^= 1


def test_the_sum_over_the_base_sees_words_that_change_places_and_tensors_that_begin_anywhere() -> None:
    kept = torch.arange(5000, dtype=torch.int64)
    layer = nn.Module()
    layer.register_buffer("whole", kept)
    layer.register_buffer("none", kept[:0])
    for offset in (1, 2, 3):
        layer.register_buffer(f"part{offset}", torch.arange(99, dtype=torch.int32)[offset:])
    before = content_sum(layer)
    assert content_sum(layer) == before
    # In one row of the square, in one column, and behind it.
    for first, second in ((0, 1), (3, 73), (4990, 4999), (70, 140), (17, 4444)):
        kept[[first, second]] = kept[[second, first]]
        assert content_sum(layer) != before, (first, second)
        kept[[first, second]] = kept[[second, first]]
    for place, bit in ((0, 63), (69, 0), (70, 62), (4899, 63), (4999, 63)):
        kept[place] ^= -(1 << 63) if bit == 63 else 1 << bit
        assert content_sum(layer) != before, (place, bit)
        kept[place] ^= -(1 << 63) if bit == 63 else 1 << bit
    assert content_sum(layer) == before


def _reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What makes the host wait for a tensor, from now on."""
    reads: list[str] = []
    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, _noted(name, getattr(torch.Tensor, name), reads))
    return reads


def _noted(name: str, whole: Callable[..., Any], reads: list[str]) -> Callable[..., Any]:
    def read(tensor: torch.Tensor, *args: Any) -> Any:
        reads.append(name)
        return whole(tensor, *args)

    return read
