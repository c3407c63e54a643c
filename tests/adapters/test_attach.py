"""A published base is one copy for all processes; an attached one is that base in all but memory."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import ARCHITECTURES, own_names, save_base
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from onebase_engine.base import manifest as wire
from onebase_engine.base import shared_memory
from onebase_engine.base.attach import AttachError, attach, publish
from onebase_engine.base.load import BaseSettings, base_bytes, base_tensors, fingerprint, load_base
from onebase_engine.base.view import peft_view

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"quantization": "none", "dtype": torch.float32},
    "bf16": {"quantization": "none"},
    "nf4": {"quantization": "nf4"},
    "nf4 without double quantization": {"quantization": "nf4", "double_quant": False},
    "nf4 in blocks of 32": {"quantization": "nf4", "blocksize": 32},
    "nf4 in blocks of 32 without double quantization": {
        "quantization": "nf4",
        "blocksize": 32,
        "double_quant": False,
    },
    "int8": {"quantization": "int8"},
}
TOKENS = torch.randint(3, 320, (1, 45), generator=torch.Generator().manual_seed(1))


@dataclass
class Shared:
    """A base, how it looked before it was published, and the same base attached in this very process."""

    base: Any
    before: dict[str, tuple[int, int, torch.dtype]]
    logits: torch.Tensor
    settings: BaseSettings
    manifest: bytes
    fd: int
    attached: Any


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: save_base(name, root / name) for name in ARCHITECTURES}


PAIRS = [(a, k) for a in ARCHITECTURES for k in KINDS]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def shared(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Shared]:
    architecture, kind = request.param
    settings = BaseSettings(folders[architecture], **KINDS[kind])
    base = load_base(settings)
    with torch.inference_mode():
        logits = base(TOKENS).logits
    before = fingerprint(base)
    fd = os.memfd_create("base")
    manifest = publish(base, fd)
    yield Shared(base, before, logits, settings, manifest, fd, attach(settings, manifest, fd))
    os.close(fd)


@pytest.fixture
def nf4(folders: dict[str, Path]) -> Iterator[tuple[BaseSettings, bytes, int]]:
    settings = BaseSettings(folders["llama"])
    fd = os.memfd_create("base")
    yield settings, publish(load_base(settings), fd), fd
    os.close(fd)


@torch.inference_mode()
def test_the_attached_base_and_the_published_one_give_the_bits_of_the_loaded_one(shared: Shared) -> None:
    assert torch.equal(shared.base(TOKENS).logits, shared.logits)
    assert torch.equal(shared.attached(TOKENS).logits, shared.logits)


def test_every_tensor_is_there_under_its_names_as_it_was(shared: Shared) -> None:
    mine, theirs = base_tensors(shared.base), base_tensors(shared.attached)
    assert mine.keys() == theirs.keys() == shared.before.keys()
    for name, tensor in mine.items():
        other = theirs[name]
        assert torch.equal(tensor, other), name
        assert type(tensor) is type(other), name
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (other.dtype, other.shape, other.stride())
        assert not other.requires_grad
    ties = [
        {name: id(p) for name, p in tree.named_parameters(remove_duplicate=False)}
        for tree in (shared.base, shared.attached)
    ]
    assert [len(tie) - len(set(tie.values())) for tie in ties] == [int(_tied(shared.base))] * 2
    assert _tied(shared.base) == _tied(shared.attached)


def test_publishing_moves_every_tensor_and_counts_as_no_write(shared: Shared) -> None:
    after = fingerprint(shared.base)
    for name, (address, version, dtype) in shared.before.items():
        assert after[name][1:] == (version, dtype), name
        assert after[name][0] != address, name
    # All of it lies in the one file.
    assert base_bytes(shared.base) == os.fstat(shared.fd).st_size


def test_the_attached_base_stays_as_it_was_frozen(shared: Shared) -> None:
    before = fingerprint(shared.attached)
    assert not shared.attached.training
    with torch.inference_mode():
        shared.attached(TOKENS)
    assert fingerprint(shared.attached) == before
    for module in shared.attached.modules():
        assert not getattr(module, "support_avx512bf16_for_cpu", False)
    for attribute in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        assert getattr(shared.attached, attribute, False) == getattr(shared.base, attribute, False)


def test_gradients_through_the_attached_base_are_those_through_an_own_one(shared: Shared) -> None:
    mine, theirs = _gradients(shared.base), _gradients(shared.attached)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in mine.items())
    assert any(gradient.count_nonzero() for name, gradient in mine.items() if "lora_B" in name)


@pytest.mark.full
def test_two_processes_hold_one_base_and_no_write_of_the_second_reaches_the_first(tmp_path: Path) -> None:
    folder = _medium_base(tmp_path / "base")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("attach_process.py")), "publisher", str(folder)],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    report = json.loads(done.stdout)
    size, child = report["base_bytes"], report["child"]
    assert size > 60e6
    # Where the first process lets go of its own copy, only the shared one is left.
    assert size < report["grown"]["RssShmem"] < 1.1 * size
    assert report["grown"]["RssAnon"] < 0.2 * size
    assert child["attaching"]["Private_Dirty"] < 8e6
    assert child["forward"]["RssShmem"] > 0.5 * size
    assert child["forward"]["Private_Dirty"] < 30e6
    loaded, published, at_last = report["checksums"]
    assert loaded == published == at_last == child["checksums"][0] != child["checksums"][1]
    assert report["unchanged"]
    assert not report["compiler"], "bitsandbytes brings the compiler of torch"
    assert not child["compiler"]


def test_both_sides_go_on_when_the_file_descriptor_is_closed(folders: dict[str, Path]) -> None:
    settings = BaseSettings(folders["qwen2"])
    base: Any = load_base(settings)
    fd = os.memfd_create("base")
    attached: Any = attach(settings, publish(base, fd), fd)
    os.close(fd)
    with torch.inference_mode():
        assert torch.equal(base(TOKENS).logits, attached(TOKENS).logits)


def test_a_file_that_held_another_base_is_taken_over(folders: dict[str, Path]) -> None:
    fd = os.memfd_create("base")
    os.pwrite(fd, b"\xff" * 4_000_000, 0)
    settings = BaseSettings(folders["phi3"], quantization="int8")
    base: Any = load_base(settings)
    attached: Any = attach(settings, publish(base, fd), fd)
    assert os.fstat(fd).st_size == base_bytes(base) < 4_000_000
    with torch.inference_mode():
        assert torch.equal(base(TOKENS).logits, attached(TOKENS).logits)
    os.close(fd)


def test_a_published_base_is_sealed_against_whoever_holds_its_file(folders: dict[str, Path]) -> None:
    settings = BaseSettings(folders["llama"])
    base: Any = load_base(settings)
    fd = os.memfd_create("base", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    manifest = publish(base, fd)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"other weights", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    attached: Any = attach(settings, manifest, fd)
    attached.get_input_embeddings().weight.data.fill_(1.0)  # private to whoever attached it
    with torch.inference_mode():
        assert torch.equal(base(TOKENS).logits, attach(settings, manifest, fd)(TOKENS).logits)
    os.close(fd)


def test_a_base_on_the_cpu_is_not_published_without_a_file(folders: dict[str, Path]) -> None:
    with pytest.raises(AttachError, match="without a file"):
        publish(load_base(BaseSettings(folders["llama"])), None)


def test_a_base_without_memory_is_not_published() -> None:
    with pytest.raises(AttachError, match="meta"):
        publish(nn.Linear(4, 4, device="meta"), None)


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xc1" * 40, b"\x85\xa6format"])
def test_bytes_that_are_no_manifest_are_refused(data: bytes, nf4: tuple[BaseSettings, bytes, int]) -> None:
    with pytest.raises(AttachError, match="manifest"):
        attach(nf4[0], data, nf4[2])


def _changed(manifest: bytes, **fields: Any) -> bytes:
    return wire.encode(msgspec.structs.replace(wire.decode(manifest), **fields))


def test_another_format_of_the_manifest_is_refused(nf4: tuple[BaseSettings, bytes, int]) -> None:
    settings, manifest, fd = nf4
    with pytest.raises(AttachError, match="format 7"):
        attach(settings, wire.encode(msgspec.structs.replace(wire.decode(manifest), format=7)), fd)


def test_a_folder_of_another_model_is_refused(
    nf4: tuple[BaseSettings, bytes, int], folders: dict[str, Path], tmp_path: Path
) -> None:
    _, manifest, fd = nf4
    with pytest.raises(AttachError, match="MistralForCausalLM"):
        attach(BaseSettings(folders["mistral"]), manifest, fd)
    config = json.loads((folders["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(AttachError, match=r"differ in model\.layers\.2\."):
        attach(BaseSettings(tmp_path), manifest, fd)
    with pytest.raises(AttachError, match="cannot build"):
        attach(BaseSettings(tmp_path / "nothing"), manifest, fd)


def test_memory_that_is_too_short_or_missing_is_refused(nf4: tuple[BaseSettings, bytes, int]) -> None:
    settings, manifest, fd = nf4
    short = os.memfd_create("short")
    os.ftruncate(short, 1000)
    with pytest.raises(AttachError, match="holds 1000 bytes"):
        attach(settings, manifest, short)
    os.close(short)
    with pytest.raises(AttachError, match="none is given"):
        attach(settings, manifest, None)
    plan = wire.decode(manifest)
    far = [msgspec.structs.replace(place, offset=1 << 40) for place in plan.tensors]
    with pytest.raises(AttachError, match="outside"):
        attach(settings, _changed(manifest, tensors=far), fd)


def test_a_tensor_that_is_left_out_of_the_manifest_is_noticed(nf4: tuple[BaseSettings, bytes, int]) -> None:
    settings, manifest, fd = nf4
    names = dict(wire.decode(manifest).names)
    del names["model.rotary_emb.inv_freq"]
    with pytest.raises(AttachError, match="inv_freq"):
        attach(settings, _changed(manifest, names=names), fd)


class _GpuStorage:
    """Answers as a storage on a GPU does, in as far as it is asked; there is none here."""

    def __init__(self, handle: bytes) -> None:
        self._handle = handle

    def _share_cuda_(self) -> tuple[int, bytes, int, int, bytes, int, bytes, bool]:
        return 0, self._handle, 512, 1024, b"counter", 3, b"event", True


def test_expandable_segments_are_refused_and_plain_gpu_memory_travels_as_it_is() -> None:
    with pytest.raises(shared_memory.SharedMemoryError, match="expandable_segments"):
        shared_memory._cuda_segment(_GpuStorage(b"\x01e" + bytes(16)))
    segment = shared_memory._cuda_segment(_GpuStorage(b"\x01c" + bytes(64)))
    plan = wire.Manifest(architecture="Model", flags=[], storages=[segment], tensors=[], names={}, layers={})
    assert wire.decode(wire.encode(plan)).storages == [segment]
    assert segment.start == 1024
    assert segment.event_sync


def _tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("error", [AttributeError("no function"), ValueError("too many values")])
def test_a_pytorch_that_shares_gpu_memory_in_another_way_is_named(error: Exception) -> None:
    class Storage:
        def _share_cuda_(self) -> None:
            raise error

    with pytest.raises(shared_memory.SharedMemoryError, match=r"PyTorch .* in another way"):
        shared_memory._cuda_segment(Storage())


def _gradients(base: Any) -> dict[str, torch.Tensor]:
    """Of a LoRA on the base after one pass forward and back, the LoRA's by name."""
    targets = own_names(base, ("q_proj", "down_proj"))
    torch.manual_seed(0)
    model = get_peft_model(
        peft_view(base),
        LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, init_lora_weights=False),
    )
    model(TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def _medium_base(folder: Path) -> Path:
    """70 MB in NF4, so that a copy would be seen among what a process takes anyway."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder
