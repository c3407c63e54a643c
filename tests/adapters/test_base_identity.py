"""Which base is which."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from onebase_engine.base.identity import SAMPLE_BYTES, SAMPLE_EVERY, BaseIdentityError, base_id

NF4 = {"quantization": "nf4", "blocksize": 64, "double_quant": True, "dtype": "bfloat16"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "base"
    made.mkdir()
    (made / "config.json").write_text('{"hidden_size": 8, "model_type": "llama"}')
    generator = np.random.default_rng(1)
    values = generator.integers(0, 255, SAMPLE_EVERY + 3 * SAMPLE_BYTES, dtype=np.uint8)
    save_file({"layer.weight": values}, made / "model-1.safetensors")
    save_file({"norm.weight": values[:100]}, made / "model-2.safetensors")
    return made


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 1]))


def rename_tensor(folder: Path) -> None:
    path = folder / "model-1.safetensors"
    path.write_bytes(path.read_bytes().replace(b"layer.weight", b"other.weight", 1))


def test_the_same_base_has_one_identity_in_any_folder_and_layout_of_its_config(
    folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(folder, copy)
    (copy / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}, indent=4))
    (copy / "README.md").write_text("not part of it")
    shuffled = dict(sorted(NF4.items(), reverse=True))
    assert base_id(folder, NF4) == base_id(copy, shuffled)
    assert len(base_id(folder, NF4)) == 64


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda f: (f / "config.json").write_text('{"hidden_size": 9}'), id="config"),
        pytest.param(lambda f: flip(f / "model-1.safetensors", 300), id="beginning"),
        pytest.param(lambda f: flip(f / "model-1.safetensors", SAMPLE_EVERY + 500), id="second sample"),
        pytest.param(
            lambda f: flip(f / "model-1.safetensors", (f / "model-1.safetensors").stat().st_size - 1),
            id="end",
        ),
        pytest.param(lambda f: flip(f / "model-2.safetensors", 120), id="second file"),
        pytest.param(lambda f: (f / "model-2.safetensors").unlink(), id="missing file"),
        pytest.param(lambda f: (f / "model-2.safetensors").rename(f / "model-3.safetensors"), id="name"),
        pytest.param(rename_tensor, id="header"),
    ],
)
def test_any_of_these_changes_makes_another_base(folder: Path, change: Callable[[Path], object]) -> None:
    before = base_id(folder, NF4)
    change(folder)
    assert base_id(folder, NF4) != before


@pytest.mark.parametrize("setting", [{"quantization": "int8"}, {"blocksize": 128}, {"double_quant": False}])
def test_another_quantization_is_another_base(folder: Path, setting: dict[str, object]) -> None:
    assert base_id(folder, {**NF4, **setting}) != base_id(folder, NF4)


def test_a_folder_that_is_no_base_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseIdentityError):
        base_id(tmp_path / "absent", NF4)
    for content in (b"", b"\xff" * 8, b"\x00" * 7, (1 << 40).to_bytes(8, "little") + b"{}"):
        (folder / "model-2.safetensors").write_bytes(content)
        with pytest.raises(BaseIdentityError, match="safetensors"):
            base_id(folder, NF4)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(BaseIdentityError, match="no safetensors file"):
        base_id(folder, NF4)
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(BaseIdentityError):
        base_id(folder, NF4)
