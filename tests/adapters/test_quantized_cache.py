"""A base that was quantized once is read from the cache, bit for bit, and made anew where that fails."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_base
from torch import nn

from onebase_engine.base import load, quantized_cache
from onebase_engine.base.load import BaseSettings, UnsupportedBaseError, base_tensors, load_base
from onebase_engine.base.quantized_cache import KEPT, load_kept_base


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small base; the cache is a folder of the test's own."""
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized_cache, "LEAST", 0)
    monkeypatch.setattr(quantized_cache, "SPARED", 0)
    return save_base("llama", tmp_path / "base")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[BaseSettings]:
    """How often bases were loaded from their own files."""
    asked: list[BaseSettings] = []

    def counting(settings: BaseSettings) -> nn.Module:
        asked.append(settings)
        return load_base(settings)

    monkeypatch.setattr(quantized_cache, "load_base", counting)
    return asked


def kept(suffix: str = "") -> list[Path]:
    return sorted((Path(os.environ["ONEBASE_CACHE"]) / "quantized").glob(f"*{suffix}"))


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = base_tensors(one), base_tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_second_load_reads_what_the_first_made(
    quantization: Any, folder: Path, loads: list[BaseSettings]
) -> None:
    settings = BaseSettings(folder, quantization=quantization)
    first, second = load_kept_base(settings), load_kept_base(settings)
    assert len(loads) == 1
    assert_equal(first, second)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(first(ids).logits, second(ids).logits)


def test_a_small_base_is_not_kept(
    folder: Path, loads: list[BaseSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert quantized_cache.LEAST > 1 << 20
    monkeypatch.setattr(quantized_cache, "written", None)
    load_kept_base(BaseSettings(folder))


def test_a_base_that_would_leave_the_disk_too_full_is_not_kept(
    folder: Path, loads: list[BaseSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_cache, "SPARED", 1)
    load_kept_base(BaseSettings(folder))
    load_kept_base(BaseSettings(folder))
    assert len(loads) == 2
    assert kept() == []


def test_another_way_to_quantize_or_other_files_are_another_base(
    folder: Path, loads: list[BaseSettings]
) -> None:
    settings = BaseSettings(folder)
    load_kept_base(settings)
    load_kept_base(replace(settings, double_quant=False))
    load_kept_base(replace(settings, blocksize=32))
    (weights,) = folder.glob("*.safetensors")
    os.utime(weights, ns=(1, 1))
    load_kept_base(settings)
    assert len(loads) == 4


def test_what_is_refused_is_refused_from_the_cache_as_well(
    folder: Path, loads: list[BaseSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = BaseSettings(folder, blocksize=128)
    with monkeypatch.context() as patch:
        for module in (load, quantized_cache):
            patch.setattr(module, "check_quantized", lambda model, settings: None)
        load_kept_base(settings)
    with pytest.raises(UnsupportedBaseError, match="no multiple of blocksize 128"):
        load_kept_base(settings)
    assert len(loads) == 1


def test_an_unquantized_base_is_not_kept(folder: Path, loads: list[BaseSettings]) -> None:
    settings = BaseSettings(folder, quantization="none")
    load_kept_base(settings)
    load_kept_base(settings)
    assert len(loads) == 2
    assert not kept()


def _cut(tensors: Path, manifest: Path) -> None:
    os.truncate(tensors, tensors.stat().st_size // 2)


def _overwritten(tensors: Path, manifest: Path) -> None:
    with tensors.open("r+b") as file:
        file.seek(1000)
        file.write(b"x" * 100)


def _no_manifest(tensors: Path, manifest: Path) -> None:
    manifest.unlink()


def _no_tensors(tensors: Path, manifest: Path) -> None:
    tensors.unlink()


def _nonsense(tensors: Path, manifest: Path) -> None:
    manifest.write_bytes(b"nonsense")


@pytest.mark.parametrize("damage", [_cut, _overwritten, _no_manifest, _no_tensors, _nonsense])
def test_what_is_damaged_is_made_anew(damage: Any, folder: Path, loads: list[BaseSettings]) -> None:
    settings = BaseSettings(folder)
    first = load_kept_base(settings)
    damage(*kept(".tensors"), *kept(".manifest"))
    assert_equal(first, load_kept_base(settings))
    assert len(loads) == 2
    assert_equal(first, load_kept_base(settings))
    assert len(loads) == 2, "it was kept again"


def test_a_cache_that_cannot_be_written_costs_no_more_than_time(
    folder: Path, loads: list[BaseSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_CACHE", "/dev/null/cache")
    load_kept_base(BaseSettings(folder))
    load_kept_base(BaseSettings(folder))
    assert len(loads) == 2


def test_only_the_bases_used_last_stay(folder: Path, tmp_path: Path) -> None:
    def load(number: int) -> None:
        other = tmp_path / f"base{number}"
        if not other.exists():
            save_base("llama", other)
            (weights,) = other.glob("*.safetensors")
            os.utime(weights, ns=(number, number))
        load_kept_base(BaseSettings(other))

    for number in range(KEPT):
        load(number)
        os.utime(max(kept(".manifest"), key=lambda path: path.stat().st_mtime), (number, number))
    load(0)
    load(KEPT)
    assert len(kept(".manifest")) == len(kept(".tensors")) == KEPT
    before = {path.name for path in kept()}
    load(0)
    assert {path.name for path in kept()} == before, "the one used again stayed"
