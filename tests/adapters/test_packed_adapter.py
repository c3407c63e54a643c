"""A prepared file gives back the very tensors that were proved, and nothing else passes for one."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from onebase_engine.kernels.weights import (
    AdapterWeights,
    LoraWeights,
    SavedModule,
    TokenRows,
    composable,
    invocation_of,
    tensors_of,
    weights_bytes,
)
from onebase_engine.lora.packed_adapter import PackedAdapterError, read_packed_adapter, write_packed_adapter


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def weights() -> AdapterWeights:
    head = random(50, 16).bfloat16()
    return {
        "q": LoraWeights(random(4, 16), random(24, 4), 1.5),
        "v": LoraWeights(random(4, 16), random(24, 4), 2.0, bias=random(24)),
        "o": LoraWeights(random(3, 16), random(16, 3), 0.1, gain=random(16)),
        "norm": SavedModule(random(16).bfloat16(), random(16)),
        "lm_head": SavedModule(head),
        "embed": SavedModule(head),
        "tokens": TokenRows(torch.tensor([3, 7]), random(2, 16)),
    }


@pytest.fixture
def file(weights: AdapterWeights, tmp_path: Path) -> Path:
    path = tmp_path / "prepared.safetensors"
    write_packed_adapter(path, weights, base_id="base")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_kind_comes_back_bit_for_bit(weights: AdapterWeights, file: Path) -> None:
    found = read_packed_adapter(file, sha256(file), base_id="base")
    assert list(found) == list(weights)
    for name, module in weights.items():
        assert type(found[name]) is type(module)
        expected, got = dict(tensors_of(module)), dict(tensors_of(found[name]))
        assert expected.keys() == got.keys()
        assert all(
            torch.equal(tensor, got[part]) and tensor.dtype == got[part].dtype
            for part, tensor in expected.items()
        )
        if isinstance(module, LoraWeights):
            assert getattr(found[name], "scale") == module.scale  # noqa: B009


def test_tensors_lie_in_memory_of_their_own(weights: AdapterWeights, file: Path) -> None:
    found = read_packed_adapter(file)
    tensors = [tensor for module in found.values() for _, tensor in tensors_of(module)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors), "aligned as torch's own allocations"
    file.write_bytes(b"")
    assert weights_bytes(found) == weights_bytes(weights)
    assert torch.equal(found["q"].b, weights["q"].b)  # type: ignore[union-attr]


def test_an_activated_lora_is_of_a_kind_that_readers_without_invocations_refuse(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    weights = {"q": LoraWeights(random(4, 16), random(24, 4), 1.5, invocation=(9, 0, 9))}
    write_packed_adapter(path, weights, base_id="base")
    assert invocation_of(read_packed_adapter(path)) == (9, 0, 9)
    assert b'\\"kind\\": \\"alora\\"' in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b'\\"alora\\"', b'\\"lora\\" '))
    with pytest.raises(PackedAdapterError, match="invocation"):
        read_packed_adapter(path)


def test_shared_tensors_are_stored_and_counted_once(file: Path) -> None:
    found = read_packed_adapter(file)
    assert found["lm_head"].weight.data_ptr() == found["embed"].weight.data_ptr()  # type: ignore[union-attr]
    assert sum(tensor.shape == (50, 16) for tensor in load_file(file).values()) == 1
    assert weights_bytes(found) == sum(t.nbytes for t in load_file(file).values())


def test_any_flipped_byte_is_noticed(file: Path) -> None:
    expected, whole = sha256(file), file.read_bytes()
    for position in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        file.write_bytes(damaged)
        with pytest.raises(PackedAdapterError):
            read_packed_adapter(file, expected)


@settings(max_examples=300)
@given(edits=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3))
def test_any_bytes_are_read_or_refused_without_a_hash_too(
    file: Path, edits: list[tuple[float, bytes]]
) -> None:
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    damaged = bytearray(whole)
    for place, some in edits:
        start = int(place * (header - 4))
        damaged[start : start + len(some)] = some
    path = file.with_name("damaged")
    path.write_bytes(damaged)
    with contextlib.suppress(PackedAdapterError):
        read_packed_adapter(path)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "1",
        '{"a":{}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}',
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}',
        '{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":"1","data_offsets":[0,4]}}',
        '{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}',
        '{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}',
        '{"__metadata__":[],"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        "[" * 100_000,
    ],
)
def test_a_header_of_another_kind_is_refused(header: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    with pytest.raises(PackedAdapterError):
        read_packed_adapter(path)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(PackedAdapterError):
        read_packed_adapter(file)


def test_trailing_bytes_are_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(PackedAdapterError, match="longer"):
        read_packed_adapter(file)


def test_another_base_another_layout_and_a_missing_file_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(PackedAdapterError, match="another base"):
        read_packed_adapter(file, base_id="other")
    with pytest.raises(PackedAdapterError, match="cannot read"):
        read_packed_adapter(tmp_path / "nothing")
    save_file({"a": random(2)}, tmp_path / "plain")
    with pytest.raises(PackedAdapterError, match="layout"):
        read_packed_adapter(tmp_path / "plain")


@pytest.mark.parametrize(
    "module",
    [
        LoraWeights(random(4, 16), random(24, 5), 1.0),
        LoraWeights(random(4, 16).half(), random(24, 4), 1.0),
        LoraWeights(random(4, 16), random(24, 4), 1.0, bias=random(23)),
        SavedModule(random(4, 2), random(3)),
        TokenRows(torch.tensor([1, 2, 3]), random(2, 4)),
        TokenRows(torch.tensor([1.0, 2.0]), random(2, 4)),
    ],
    ids=["rank", "half precision", "bias", "saved bias", "rows", "indices"],
)
def test_tensors_that_do_not_fit_each_other_are_refused(
    module: LoraWeights | SavedModule | TokenRows, tmp_path: Path
) -> None:
    write_packed_adapter(tmp_path / "file", {"layer": module}, base_id="base")
    with pytest.raises(PackedAdapterError, match="fit each other"):
        read_packed_adapter(tmp_path / "file")


def test_tensors_beyond_the_described_ones_are_refused(file: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file) | {"more": random(3)}, tmp_path / "more", metadata=metadata)
    with pytest.raises(PackedAdapterError, match="other tensors"):
        read_packed_adapter(tmp_path / "more")


def test_a_file_that_cannot_be_written_is_an_os_error(weights: AdapterWeights, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_packed_adapter(tmp_path / "no" / "folder", weights, base_id="base")
    with pytest.raises(OSError, match="No space left"):
        write_packed_adapter(Path("/dev/full"), weights, base_id="base")


def test_only_plain_lora_composes(weights: AdapterWeights) -> None:
    assert composable({"q": weights["q"]})
    assert not any(composable({"q": weights["q"], name: weights[name]}) for name in weights if name != "q")


def test_folding_keeps_every_kind(weights: AdapterWeights) -> None:
    folded = {name: module.folded() for name, module in weights.items()}
    scaled = folded["v"]
    assert isinstance(scaled, LoraWeights)
    assert scaled.scale == 1.0
    assert torch.equal(scaled.bias, weights["v"].bias * 2)  # type: ignore[union-attr, operator, arg-type]
    assert folded["o"] is weights["o"]
    assert folded["norm"] is weights["norm"]
