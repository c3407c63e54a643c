"""A base over several GPUs gives what it gives on one: tokens and their probabilities, to the bit.

The GPUs are no real ones (`tests/fake_gpus.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers as tf
import triton
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import save_and_load
from tests.engine.harness import requests
from tests.fake_gpus import FakeGpus
from tests.tiny import ADAPTERS, load_folder, save_adapter, save_base

from onebase_adapters.format.canonical import CONFIG_FILE, WEIGHTS_FILE
from onebase_adapters.proof import modules
from onebase_adapters.proof.verifier import Verifier
from onebase_engine.base import shared_memory
from onebase_engine.base.attach import attach, publish
from onebase_engine.base.load import BaseSettings, UnsupportedBaseError, base_tensors, load_base
from onebase_engine.base.manifest import CudaSegment
from onebase_engine.base.several_gpus import shares
from onebase_engine.engine import engine, model
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.memory_budget import MemoryBudgetError, rounding_bytes, verifier_bytes
from onebase_engine.engine.messages import AdapterRef, EngineConfig, Sampling, Submit
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import Limits
from onebase_engine.kernels import cuda
from onebase_engine.kernels.reference import ReferenceKernels
from onebase_engine.lora.weights import AdapterWeights
from onebase_server.processes import engine as process
from onebase_server.processes.engine import sizes

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="with a GPU here Triton compiles for it, in this process"
)
KINDS = [2, 4, 7, 8, 11, 14]
"""Of the adapters: all linear layers, the head, the embedding, DoRA, norms that were saved, tokens."""


@pytest.fixture(autouse=True)
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """To one GPU versions are copied on a stream of its own, which fake ones have none of."""
    monkeypatch.setattr(engine, "copier", lambda devices: None)


def spread(folder: Path, gpus: FakeGpus, **settings: Any) -> Any:
    devices = tuple(torch.device("cuda", number) for number in range(gpus.count))
    return load_base(BaseSettings(folder, device=devices[0], devices=devices, **settings))


def answers(
    base: Any, served: ServedModel, versions: Sequence[AdapterWeights], prompts: Sequence[Any], **changes: int
) -> dict[str, list[Any]]:
    """Tokens and probabilities of rows that mix adapters, prefill and decode."""
    settings = {"step_tokens": 64, "kv_blocks": 400, "max_tokens": 3} | changes
    limits = Limits(32, settings["step_tokens"], 512, 0)
    served_by = Engine(
        base, name="tiny", limits=limits, kv_blocks=settings["kv_blocks"], slots=3, model=served
    )
    for number, weights in enumerate(versions):
        served_by.put_adapter(str(number), weights)
    for number, prompt in enumerate(prompts):
        mine = number % (len(versions) + 1)
        served_by.submit(
            Submit(
                id=str(number),
                prompt=list(prompt),
                sampling=Sampling(
                    temperature=0.7 * (number % 2),
                    seed=number,
                    max_tokens=settings["max_tokens"],
                    ignore_eos=True,
                    logprobs=2,
                ),
                adapters=[AdapterRef(str(mine - 1))] if mine else [],
            )
        )
    found: dict[str, list[Any]] = {}
    while served_by.busy:
        served_by.step()
        for output in served_by.take_outputs():
            assert output.finish != "error", output.error_message
            found.setdefault(output.id, []).append((output.tokens, output.logprobs))
    served_by.check_base()
    return found


def versions_of(folder: Path, kinds: Sequence[int], to: Path, **how: Any) -> list[AdapterWeights]:
    base = load_base(BaseSettings(folder, **how))
    folders = [save_adapter(base, ADAPTERS[kind], to / f"a{kind}", seed=kind) for kind in kinds]
    return [load_folder(base, one).weights for one in folders]


@pytest.mark.parametrize(
    ("architecture", "how", "kv_dtype"),
    [
        ("llama", {"blocksize": 32}, None),
        ("gemma3", {}, torch.int8),
        *(
            pytest.param(*one, marks=pytest.mark.full)
            for one in (
                ("qwen3", {"quantization": "int8"}, None),
                ("phi3", {}, torch.int8),
                ("gemma2", {"quantization": "none", "dtype": torch.float32}, torch.int8),
            )
        ),
    ],
)
def test_rows_have_the_bits_of_one_gpu(
    architecture: str,
    how: dict[str, Any],
    kv_dtype: torch.dtype | None,
    tmp_path: Path,
) -> None:
    layers = 3 if architecture in ("llama", "phi3") else 2
    folder = save_base(architecture, tmp_path / "base", layers=layers)
    versions = versions_of(folder, KINDS, tmp_path, **how)
    prompts = [one.prompt for one in requests(7, seed=3)]
    found = []
    for count in (1, layers):
        with FakeGpus(count).there() as gpus:
            base = spread(folder, gpus, **how)
            served = ServedModel(base, 3, kernels=ReferenceKernels(tiled=False), kv_dtype=kv_dtype)
            assert [device.index for device in served.devices] == list(range(count))
            found.append(answers(base, served, versions, prompts, kv_blocks=2 + 20))
    assert all(one == found[0] for one in found[1:])


@pytest.mark.full
@pytest.mark.parametrize(
    ("prompts", "blocks"),
    [
        ([[3, 5], [7]], 2 + 2),
        # With what is tried before layers are joined, and more rows than a product of few has.
        ([[3, 5, 8], [*range(61), 1, 2, 3, 4], [7]], 8),
    ],
    ids=["alone", "joined"],
)
def test_triton_launches_on_the_gpu_of_a_layer(prompts: list[list[int]], blocks: int, tmp_path: Path) -> None:
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(1)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    versions = versions_of(tmp_path / "base", [2, 4], tmp_path)
    found = []
    for count in (1, 2):
        with FakeGpus(count).there() as gpus:
            base = spread(tmp_path / "base", gpus)
            served = ServedModel(base, 3, kernels=cuda.CudaKernels())
            found.append(
                answers(base, served, versions, prompts, kv_blocks=blocks, step_tokens=80, max_tokens=2)
            )
        assert {gpu for name, gpu in gpus.launched if name in ("_finish", "_attend")} == set(range(count))
    assert found[0] == found[1]


def _brought(folder: Path) -> list[list[tuple[int, ...]]]:
    """Shapes of what is brought to a GPU in each of three steps that decode."""
    with FakeGpus(2).there() as gpus:
        base = spread(folder, gpus)
        limits = Limits(4, 64, 512, 0)
        served = ServedModel(base, 2, kernels=ReferenceKernels(tiled=False))
        engine = Engine(base, name="tiny", limits=limits, kv_blocks=20, slots=2, model=served)
        for number in range(2):
            sampling = Sampling(temperature=0.0, max_tokens=5, ignore_eos=True)
            engine.submit(Submit(id=str(number), prompt=[3, 5, 8], sampling=sampling))
        steps = []
        for _ in range(4):
            gpus.moved.clear()
            engine.step()
            steps.append(list(gpus.moved))
    return steps[1:]


def test_what_a_step_brings_to_a_gpu_does_not_depend_on_how_many_layers_it_has(tmp_path: Path) -> None:
    few, many = (_brought(save_base("llama", tmp_path / str(count), layers=count)) for count in (2, 5))
    assert few == many
    hidden = (1, 2, 128)
    assert all(step.count(hidden) == 2 for step in few), "there and back"


def attached(base: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What another process has of a base: its tensors, opened by handles."""
    storages: list[Any] = []

    def segments(tensors: Sequence[torch.Tensor], groups: Sequence[Sequence[int]]) -> Iterator[CudaSegment]:
        for number, members in enumerate(groups):
            tensor = tensors[members[0]]
            storages.append(tensor.untyped_storage())
            yield CudaSegment(tensor.device.index, b"", number, 0, b"", 0, b"", False)

    monkeypatch.setattr(shared_memory, "_segments", segments)
    monkeypatch.setattr(shared_memory, "_cuda_storage", lambda segment: storages[segment.size])
    return attach(BaseSettings(folder), publish(base, None), None)


def test_a_proof_over_two_gpus_shows_what_it_shows_on_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in (model, modules):
        monkeypatch.setattr(where, "find_kernels", lambda *_: ReferenceKernels(tiled=False))
    monkeypatch.setattr(save_and_load, "infer_device", lambda: "cpu")
    folder = save_base("llama", tmp_path / "base")
    adapter = save_adapter(load_base(BaseSettings(folder)), ADAPTERS[2], tmp_path / "adapter", seed=1)
    shown = []
    for count in (1, 2):
        with FakeGpus(count).there() as gpus:
            base = attached(spread(folder, gpus), folder, monkeypatch)
            verifier = Verifier(base, max_rank=64, base_id="tiny")
            assert len(verifier.devices) == count
            proven = verifier.prove(
                adapter / CONFIG_FILE, adapter / WEIGHTS_FILE, tmp_path / "packed", probes=[[3, 5, 8]],
                probe_tokens=3, allow_noop=False, on_progress=lambda stage, part: None,
            )  # fmt: skip
        shown.append((proven.sha256, msgspec.structs.replace(proven.report.proof, seconds=0)))
    assert shown[0] == shown[1]
    assert shown[0][1].texts_changed == 1


# ---- where everything lies ---------------------------------------------------------------------


@given(st.integers(1, 6).flatmap(lambda gpus: st.tuples(st.integers(gpus, 90), st.lists(
    st.integers(1, 1 << 40), min_size=gpus, max_size=gpus))))  # fmt: skip
def test_each_gpu_takes_layers_in_proportion_to_its_room_and_at_least_one(
    case: tuple[int, list[int]],
) -> None:
    layers, room = case
    found = shares(layers, room)
    assert (sum(found), len(found)) == (layers, len(room))
    assert min(found) >= 1
    slack = 1 + sum(layers * own < sum(room) for own in room)
    wanted = [layers * own / sum(room) for own in room]
    assert all(abs(count - part) <= slack for count, part in zip(found, wanted, strict=True))


def test_the_ends_of_a_base_lie_on_the_first_gpu_and_leave_it_fewer_layers(tmp_path: Path) -> None:
    folder = save_base("llama", tmp_path / "base", layers=5)
    with FakeGpus(2).there() as gpus:
        even = spread(folder, gpus)
        gpus.free[0] = gpus.free[1] // 3
        uneven = spread(folder, gpus)
        for base, last in ((even, 2), (uneven, 1)):
            own = [next(layer.parameters()).device.index for layer in base.model.layers]
            assert own == [0] * last + [1] * (5 - last)
            rest = {
                tensor.device.index for name, tensor in base_tensors(base).items() if "layers" not in name
            }
            assert rest == {0}
            assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
        gpus.free[0] = 0
        with pytest.raises(UnsupportedBaseError, match="no decoder layer does not fit on cuda:0"):
            spread(folder, gpus)
        gpus.count = 6
        gpus.free = [1 << 34] * 6
        with pytest.raises(UnsupportedBaseError, match="5 decoder layers, which cannot lie on 6 GPUs"):
            spread(folder, gpus)


def test_the_gpu_with_room_for_the_fewest_tokens_says_how_many_there_are(tmp_path: Path) -> None:
    folder = save_base("llama", tmp_path / "base", layers=3)
    config = EngineConfig(base_folder="", gpus=2, train_jobs=0, slot_memory=80 << 20, prefix_memory=1 << 40)
    step = 300 << 20
    with FakeGpus(2).there() as gpus:
        base = spread(folder, gpus)
        served = ServedModel(base, 2, kernels=ReferenceKernels(tiled=False))
        block = [16 * served.kv_bytes_on(device) for device in served.devices]
        assert (block[1], sum(block)) == (2 * block[0], 16 * served.kv_bytes_per_token)
        aside = verifier_bytes(base) + rounding_bytes(served) + (100 << 20) + step

        def sized(*blocks: int, **changes: int) -> int:
            gpus.free = [aside + count * size for count, size in zip(blocks, block, strict=True)]
            changed = msgspec.structs.replace(config, **changes)
            return sizes(changed, base, served, Limits(64, 64, 500), lambda run: step)[0]

        assert sized(900, 700) == 700
        assert sized(500, 800) == 500
        assert sized(500, 800, kv_memory=40 * sum(block)) == 40
        with pytest.raises(MemoryBudgetError, match=r"--kv-memory asks for \d+ MB on cuda:1"):
            sized(500, 0, kv_memory=1 << 32)
        with pytest.raises(MemoryBudgetError, match="no memory for the KV cache"):
            sized(900, 1)


def test_gpus_that_are_not_there_or_not_alike_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices(gpus: int, device: Any = "auto") -> list[str]:
        return list(map(str, process._devices(EngineConfig(base_folder="", gpus=gpus, device=device))))

    with FakeGpus(3).there():
        assert (devices(1), devices(2)) == (["cuda"], ["cuda:0", "cuda:1"])
        with pytest.raises(UnsupportedBaseError, match="--gpus 4, but torch finds 3: lower it"):
            devices(4)
        with pytest.raises(UnsupportedBaseError, match="--gpus 2 needs GPUs, and --device is cpu"):
            devices(2, "cpu")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device.index))
        with pytest.raises(UnsupportedBaseError, match=r"one kind, .* these are sm_80 and sm_81"):
            devices(2)


def test_a_base_that_does_not_fit_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(settings: BaseSettings) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(process, "load_kept_base", full)
    settings = BaseSettings(Path(), device=torch.device("cuda"))
    with FakeGpus(2).there(), pytest.raises(UnsupportedBaseError, match=r"\(--gpus 2\), which is slow"):
        process._load(settings)
    with FakeGpus(1).there(), pytest.raises(UnsupportedBaseError, match="torch finds no other here"):
        process._load(settings)


def test_an_engine_over_several_gpus_says_that_it_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(model, "find_kernels", lambda *_: ReferenceKernels(tiled=False))
    sent: list[Any] = []

    class Channel:
        def send(self, message: Any) -> None:
            sent.append(message)

    channel: Any = Channel()
    folder = save_base("llama", tmp_path / "base")
    found = []
    with FakeGpus(2).there() as gpus:
        for count in (1, 2):
            config = EngineConfig(
                base_folder=str(folder), device="cuda", gpus=count, max_slots=2, max_rows=4, step_tokens=64
            )
            started = process._start(config, channel, None)
            found.append(sent[-1].base)
            assert started.pool.host_capacity == 0
    assert (found[0].device, found[0].spread) == ("cuda:0", "")
    assert found[1].device == "cuda:0, cuda:1"
    assert "on 2 GPUs, and that is slow: the GPUs work one after the other" in found[1].spread
    assert caplog.text.count(found[1].spread) == 1
    assert len(gpus.moved) > 0
