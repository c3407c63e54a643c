"""How many KV blocks there are, and that unused ones cost nothing on the CPU."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.harness import Lab, LiveBytes, requests, run
from tests.tiny import save_base
from torch import nn
from transformers import LlamaConfig

from onebase_engine.base.layers import LayerShape, adaptable_layers, empty_base
from onebase_engine.base.load import BaseSettings, UnsupportedBaseError, load_base, needed_memory
from onebase_engine.engine import memory_budget
from onebase_engine.engine.batch import Packer
from onebase_engine.engine.kv_cache import (
    RESERVED_BLOCKS,
    STAGED_BLOCKS,
    BlockGroup,
    KVCache,
    bytes_per_token,
)
from onebase_engine.engine.memory_budget import (
    CONTEXT_BYTES,
    PROOF_BYTES,
    SHORTEST,
    MemoryBudgetError,
    _largest_plan,
    fit_step,
    host_block_count,
    kv_block_count,
    kv_memory_available,
    largest_step_bytes,
    slot_bytes,
    staging_bytes,
    verifier_bytes,
)
from onebase_engine.engine.messages import MAX_ADAPTER_TERMS, EngineConfig
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.recurrence import Recurrence
from onebase_engine.engine.sampling import _adjusts
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.engine.sequence import AdapterMix
from onebase_engine.kernels import reference
from onebase_engine.kernels.interface import RowGroup, RowMap, StateRuns
from onebase_engine.kernels.reference import ReferenceKernels
from onebase_engine.kernels.weights import LoraWeights
from onebase_engine.lora.linear import SlotLinear
from onebase_engine.lora.module import StepRows
from onebase_engine.machine import NO_LIMIT, container_free, free_memory, total_memory
from onebase_server.processes import engine as process
from onebase_server.processes.engine import sizes
from onebase_server.processes.job_memory import job_bytes

MB = 1_000_000
PAGE = os.sysconf("SC_PAGE_SIZE")


def test_free_memory_less_what_is_set_aside_is_cut_into_blocks() -> None:
    assert kv_block_count(MB, 10_000, 100 * MB) == 100
    assert kv_block_count(MB, 10_000, 100 * MB, aside={"jobs": 60 * MB, "slots": 10 * MB}) == 30


def test_no_more_blocks_are_taken_than_rows_could_use() -> None:
    assert kv_block_count(MB, 30, 100 * MB) == 30


def test_kv_memory_overrides_what_is_free_and_what_is_set_aside() -> None:
    assert kv_block_count(MB, 30, 5 * MB, kv_memory=50 * MB, aside={"jobs": 90 * MB}) == 50


@pytest.mark.parametrize(
    ("free", "kv_memory", "jobs"),
    [(100 * MB, 0, 100 * MB), (100 * MB, 0, 500 * MB), (100 * MB, RESERVED_BLOCKS * MB, 0), (0, 0, 0)],
)
def test_too_little_memory_is_refused_with_a_remedy(free: int, kv_memory: int, jobs: int) -> None:
    with pytest.raises(MemoryBudgetError, match="--kv-memory"):
        kv_block_count(MB, 1000, free, kv_memory=kv_memory, aside={"jobs (--train-memory)": jobs})


def test_a_refusal_says_who_takes_how_much_and_by_which_setting() -> None:
    aside = {"jobs (--train-memory)": 70 * MB, "slots (--slot-memory)": 0, "a step (--step-tokens)": 30 * MB}
    with pytest.raises(MemoryBudgetError) as refused:
        kv_block_count(MB, 1000, 100 * MB, aside=aside)
    assert str(refused.value) == (
        "no memory for the KV cache: 100 MB are available, less 70 MB for jobs (--train-memory), less 30 MB "
        "for a step (--step-tokens), and a block takes 1.00 MB; lower one of these, choose a smaller base or "
        "set --kv-memory"
    )


# ---- the largest step --------------------------------------------------------------------------


@given(
    free=st.integers(0, 10**6),
    token_bytes=st.integers(1, 300),
    max_length=st.integers(1, 20_000),
    fixed=st.integers(0, 10**6),
    growing=st.floats(0, 300),
    there=st.floats(0.5, 2),
)
def test_the_largest_step_and_the_cache_whose_contexts_it_reads_fit_together(
    free: int, token_bytes: int, max_length: int, fixed: int, growing: float, there: float
) -> None:
    """The step has a fixed part and one for each token of a context; the device may have less than is free,
    or more."""

    def step_at(length: int) -> int:
        assert 1 <= length <= max_length
        step = fixed + math.ceil(growing * length)
        if step > there * free:
            raise MemoryBudgetError("too large")
        return step

    try:
        step, length = fit_step(free, lambda tokens: token_bytes * tokens, max_length, step_at)
    except MemoryBudgetError:
        assert fixed + math.ceil(growing * min(SHORTEST, max_length)) > there * free
        return
    tokens = max(free - step, 0) // token_bytes
    if length < max_length:
        tokens = min(tokens, length)
    longest = min(tokens, max_length)
    assert fixed + math.ceil(growing * longest) <= step or not tokens
    assert not tokens or step + tokens * token_bytes <= free
    # Nothing is wasted: longer contexts would not fit.
    more = min(int(longest * 1.1) + 2, max_length)
    if not fixed and longest < max_length and there >= 1:
        assert growing * more + more * token_bytes > free - token_bytes - 2


def test_where_the_longest_contexts_fit_a_step_is_measured_once() -> None:
    asked: list[int] = []
    assert fit_step(1000, lambda tokens: tokens, 100, lambda length: asked.append(length) or 300) == (
        300,
        100,
    )
    assert asked == [100]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder = save_base("llama", tmp_path_factory.mktemp("base"))
    return load_base(BaseSettings(folder, quantization="none", dtype=torch.float32))


def _accelerated(base: nn.Module) -> ServedModel:
    return ServedModel(base, 2, kernels=ReferenceKernels(tiled=False))


def _step_bytes(model: ServedModel, base: nn.Module, limits: SchedulerLimits, rank: int = 4) -> int:
    return largest_step_bytes(
        model, adaptable_layers(base), limits, block_size=16, rank=rank, measure=LiveBytes.measure
    )


def test_the_largest_step_has_every_row_at_its_longest_context_and_no_more_tokens_than_a_step(
    base: nn.Module,
) -> None:
    model, passed = _accelerated(base), []
    whole = model.forward
    model.forward = lambda batch: passed.append(batch) or whole(batch)  # type: ignore[method-assign]
    for limits in (
        SchedulerLimits(8, 96, 200),
        SchedulerLimits(1, 50, 20),
        SchedulerLimits(30, 20, 100),
        SchedulerLimits(1, 1, 1),
    ):
        _step_bytes(model, base, limits)
        batch, replaced = passed
        assert replaced.positions.tolist() == batch.positions.tolist()
        assert {len(group.terms) for group in batch.token_map.groups} == {16}
        assert len(batch.input_ids) == limits.step_tokens
        assert batch.positions.max() == limits.max_length - 1
        rows = min(limits.max_sequences, limits.step_tokens)
        assert len(batch.sampled) >= rows
        assert (batch.positions[: rows - 1] == limits.max_length - 1).all()
        assert len(batch.logit_rows) >= limits.step_tokens - len(batch.scored)
        assert sum(len(group.rows) for group in batch.token_map.groups) == limits.step_tokens
        passed.clear()


@pytest.mark.parametrize("kind", ["a mix", "DoRA", "lora_bias"])
def test_the_largest_step_has_what_a_mix_and_what_replaces_rows_take(
    base: nn.Module, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "AT_ONCE", 20 * 320)
    model, limits, layers = _accelerated(base), SchedulerLimits(4, 64, 200), adaptable_layers(base)
    counted = _step_bytes(model, base, limits)
    model.allocate_kv(60, 16)
    adapter = memory_budget.thin_adapter(layers, 4, replaces=kind == "DoRA")
    if kind == "lora_bias":
        adapter = {name: replace(one, bias=torch.zeros(len(one.b))) for name, one in adapter.items()}
    digests = ["one", "other"] if kind == "a mix" else ["one"]
    model.move_slots(dict(enumerate(digests)), lambda digest: adapter)
    plan = _largest_plan(limits, AdapterMix(tuple((digest, 0.3) for digest in digests)), 16)
    batch = Packer(16, 1, [BlockGroup(())]).pack(plan, {digest: slot for slot, digest in enumerate(digests)})
    assert LiveBytes.measure(lambda: model.forward(batch)) <= counted
    assert not model.forward(batch).logits.isnan().any()


def test_rows_are_replaced_so_many_at_a_time_that_a_vocabulary_of_them_is_not_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = SlotLinear(
        nn.Linear(64, 320).requires_grad_(False), StepRows(), ReferenceKernels(tiled=False), slots=1
    )
    a, b = torch.randn(4, 64), torch.randn(320, 4)
    layer.put(0, LoraWeights(a, b, 0.3, gain=torch.rand(320)))
    x, found = torch.randn(40, 64), []
    for rows in (40, 7):
        layer.step.tokens = RowMap((RowGroup(tuple(range(1, 40)), ((0, 1.0),)),))
        monkeypatch.setattr(reference, "AT_ONCE", rows * 320)
        with LiveBytes() as meter:
            found.append((layer(x), meter.most))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] - found[1][1] > 4 * 30 * 320 * 4


def test_a_step_with_drafts_has_no_more_tokens_and_ends_where_contexts_end() -> None:
    for limits in (
        SchedulerLimits(8, 96, 200, 7),
        SchedulerLimits(64, 70, 200, 7),
        SchedulerLimits(3, 96, 4, 7),
    ):
        plan = _largest_plan(limits, AdapterMix(), 16)
        assert sum(segment.length for segment in plan.segments) == limits.step_tokens
        assert {one.stop + len(one.draft) for one in plan.segments} == {limits.max_length}


def test_logits_are_changed_before_every_draw_of_the_largest_step_also_those_behind_a_draft() -> None:
    plan = _largest_plan(SchedulerLimits(8, 96, 200, 7), AdapterMix(), 16)
    drawn = Packer(16, 1, [BlockGroup(())]).pack(plan, {}).sampled
    assert len(drawn) == 7 * 8 + 1
    assert all(_adjusts(row) for row in drawn)


def test_the_largest_step_of_a_hybrid_keeps_the_inputs_of_all_drafts_and_gives_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_base("lfm2", tmp_path)
    base = load_base(BaseSettings(folder, quantization="none", dtype=torch.float32))
    monkeypatch.setattr(ReferenceKernels, "drafts", True)
    model, rewind, kept = _accelerated(base), Recurrence.rewind, []

    def noted(self: Recurrence, rows: torch.Tensor, runs: StateRuns) -> None:
        kept.append([one.shape[0] for inputs, _ in self._kept for one in inputs])
        rewind(self, rows, runs)
        assert not self._kept

    monkeypatch.setattr(Recurrence, "rewind", noted)
    _step_bytes(model, base, SchedulerLimits(8, 96, 200, 7))
    assert kept == [[7 * 8]] * 2


@pytest.mark.parametrize(
    "more", [SchedulerLimits(8, 128, 200), SchedulerLimits(8, 64, 400), SchedulerLimits(40, 64, 200)]
)
def test_what_a_step_takes_grows_with_its_limits_and_is_given_back(
    base: nn.Module, more: SchedulerLimits
) -> None:
    model = _accelerated(base)
    assert _step_bytes(model, base, SchedulerLimits(8, 64, 200)) < _step_bytes(model, base, more)
    model.allocate_kv(60, 16)
    with pytest.raises(RuntimeError, match="KV cache"):
        model.allocate_kv(60, 16)


def test_an_engine_after_the_trial_of_its_largest_step_serves_what_it_serves_without(
    tmp_path: Path, base: nn.Module
) -> None:
    lab = Lab.create(base, tmp_path)
    asked = requests(6, seed=3, longest=30, tokens=4)
    model = _accelerated(base)
    _step_bytes(model, base, SchedulerLimits(8, 64, 200))
    served = run(lab.engine(model=model, slots=2), asked)
    assert served == run(lab.engine(model=_accelerated(base), slots=2), asked)
    assert not lab.disagreements(asked, served)


def test_the_cache_of_an_accelerator_is_what_is_free_less_what_was_measured_and_counted(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_budget, "CPU_SHARE", 1.0)
    model, limits, step = _accelerated(base), SchedulerLimits(64, 64, 500), 300 * MB
    token = model.kv_bytes_per_token
    counted = 3 * CONTEXT_BYTES + PROOF_BYTES + 2 * (2 << 20) + 50 * MB
    config = EngineConfig(base_folder="", train_memory=50 * MB, train_jobs=2)

    def sized(free: int, config: EngineConfig = config) -> int:
        monkeypatch.setattr(memory_budget.machine, "free_memory", lambda device: free)
        found = sizes(config, base, model, limits, lambda run: step)
        measured = 0 if config.kv_memory else step
        assert found.aside.get("the largest step (--step-tokens, --max-length)", 0) == measured
        return found.blocks

    assert sized(counted + step + 1000 * 16 * token) == 1000
    on_their_way = msgspec.structs.replace(config, prefix_memory=10**12)
    assert sized(counted + step + (1000 + STAGED_BLOCKS) * 16 * token, on_their_way) == 1000
    assert sized(counted + step + 10**12) == 64 * 32 + RESERVED_BLOCKS, "more could not be used"
    assert sized(0, msgspec.structs.replace(config, kv_memory=100 * 16 * token)) == 100
    with pytest.raises(MemoryBudgetError, match="less 300 MB for the largest step"):
        sized(counted + step)


def test_what_jobs_may_take_is_left_free_for_them_where_no_setting_says_how_much(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_budget, "CPU_SHARE", 1.0)
    model, limits = _accelerated(base), SchedulerLimits(64, 64, 500)
    config = EngineConfig(base_folder="", train_jobs=2)
    monkeypatch.setattr(memory_budget.machine, "free_memory", lambda device: 100 << 30)
    set_aside: dict[str, int] = {}
    monkeypatch.setattr(
        process, "kv_block_count", lambda *given, aside, **more: set_aside.update(aside) or 1000
    )
    sizes(config, base, model, limits, lambda run: 1)
    assert set_aside["jobs (--train-memory)"] == 2 * job_bytes(base.config, config) > 0
    sizes(msgspec.structs.replace(config, train_jobs=0), base, model, limits, lambda run: 1)
    assert set_aside["jobs (--train-memory)"] == 0
    sizes(msgspec.structs.replace(config, train_memory=7), base, model, limits, lambda run: 1)
    assert set_aside["jobs (--train-memory)"] == 7


@pytest.mark.parametrize(
    ("device", "sequences", "asked", "slots"),
    [
        ("cpu", 48, 0, 48), ("cpu", 4, 0, MAX_ADAPTER_TERMS), ("cpu", 48, 3, 3), ("cuda", 48, 0, 48),
        ("cuda", 4, 0, 4), ("cuda", 48, 3, 3), ("cpu", 4096, 0, 1024), ("cuda", 4096, 0, 1024),
    ],
)  # fmt: skip
def test_each_sequence_of_a_step_may_have_a_slot_unless_told_otherwise(
    device: str, sequences: int, asked: int, slots: int
) -> None:
    config = EngineConfig(base_folder="", max_slots=asked, max_sequences=sequences)
    assert process._slot_count(config, torch.device(device)) == slots


def test_more_kv_memory_than_a_gpu_has_is_refused_by_its_name_and_slots_get_a_part_of_what_it_leaves(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_budget, "CPU_SHARE", 1.0)
    monkeypatch.setattr(memory_budget.machine, "free_memory", lambda device: 1_000_000)
    model, limits = _accelerated(base), SchedulerLimits(4, 32, 200)
    model.device = torch.device("meta")  # as good as any accelerator

    def sized(kv_memory: int) -> tuple[int, int]:
        found = sizes(EngineConfig(base_folder="", kv_memory=kv_memory), base, model, limits, None)
        return found.blocks, found.slot_memory

    block = 16 * model.kv_bytes_per_token
    assert sized(900_000) == (900_000 // block, 25_000)
    assert sized(1_000_000) == (1_000_000 // block, 1), "0 would be no limit"
    assert staging_bytes(1) == 1
    with pytest.raises(MemoryBudgetError, match=r"--kv-memory asks for 2 MB, and 1 MB are free") as refused:
        sized(2_000_000)
    assert "--train-memory" not in str(refused.value)


def test_what_is_kept_of_a_step_that_failed_for_lack_of_memory_is_free_for_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = {"free": 10, "kept": 90}

    def give_back() -> None:
        there.update(free=there["free"] + there["kept"], kept=0)

    monkeypatch.setattr(torch.cuda, "empty_cache", give_back)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (there["free"], 100))
    assert kv_memory_available(torch.device("cuda")) == 100


@pytest.mark.parametrize(
    ("layers", "hidden", "inner", "heads", "proof"),
    [(16, 2048, 8192, 32, 1 << 30), (80, 8192, 28672, 64, 5e9)],
)
def test_the_verifier_gets_memory_for_a_proof_by_the_size_of_the_base(
    layers: int, hidden: int, inner: int, heads: int, proof: float
) -> None:
    """A Llama of 1B, and one of 70B, of which versions of rank 32 take 1.7 GB."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    assert verifier_bytes(empty_base(config)) - CONTEXT_BYTES == pytest.approx(proof, rel=0.02)


@pytest.mark.parametrize("estimated", [True, False], ids=["by its config", "while it is loaded"])
@pytest.mark.parametrize(("quantization", "remedy"), [("none", "--quantization nf4 or a"), ("nf4", "a")])
def test_a_base_for_which_a_gpu_has_no_room_is_refused_with_what_it_takes_and_what_is_free(
    quantization: Any, remedy: str, estimated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = BaseSettings(save_base("llama", tmp_path), quantization, device=torch.device("cuda"))
    needed, tried = needed_memory(settings), []

    def load(settings: BaseSettings) -> None:
        tried.append(settings)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(process, "load_kept_base", load)
    monkeypatch.setattr(process, "free_memory", lambda device: needed - estimated)
    with pytest.raises(UnsupportedBaseError, match=f"on cuda: .* are free. Choose {remedy} smaller base, "):
        process._load(settings)
    assert len(tried) == (not estimated)


def test_a_step_for_which_there_is_no_memory_is_tried_with_shorter_contexts_and_then_refused(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _accelerated(base)
    free = 4 * CONTEXT_BYTES + 2 * PROOF_BYTES
    monkeypatch.setattr(memory_budget.machine, "free_memory", lambda device: 2 * free)

    def full(run: Callable[[], object]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryBudgetError, match=r"512: lower --step-tokens or --max-sequences") as refused:
        sizes(EngineConfig(base_folder=""), base, model, SchedulerLimits(4, 32, 4096), full)
    model.allocate_kv(60, 16)  # nothing of it is left
    assert isinstance(cause := refused.value.__cause__, torch.OutOfMemoryError)
    assert cause.__traceback__ is None, "its frames hold tensors"


# ---- memory of the machine ---------------------------------------------------------------------


def test_host_memory_holds_as_many_blocks_as_it_may_in_half_of_what_is_free() -> None:
    assert host_block_count(MB, 0) == 0
    assert host_block_count(MB, 9 * MB - 1) == 8
    half = free_memory(torch.device("cpu")) // 2 // MB
    assert host_block_count(MB, NO_LIMIT) == pytest.approx(half, rel=0.5)


def test_the_free_memory_of_the_cpu_is_less_than_the_machine_has() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < kv_memory_available(torch.device("cpu")) < total


@pytest.mark.parametrize(("limit", "available"), [("1000", 1000 - (900 - 500)), ("max", NO_LIMIT)])
def test_the_page_cache_of_a_container_counts_as_free(tmp_path: Path, limit: str, available: int) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 400\nfile 500\ninactive_file 300\nactive_file 200\nshmem 0\n")
    assert container_free(tmp_path) == available


def test_without_cgroups_there_is_no_limit(tmp_path: Path) -> None:
    assert container_free(tmp_path) == NO_LIMIT


@pytest.mark.parametrize(("limit", "total"), [("1000", 1000), ("999999999", 4_096_000), ("max", 4_096_000)])
def test_memory_is_the_machines_or_the_containers_if_that_is_less(
    tmp_path: Path, limit: str, total: int
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       4000 kB\nMemAvailable:   2000 kB\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    assert total_memory(proc=tmp_path, cgroup=tmp_path) == total


def _tensors(cache: KVCache) -> list[torch.Tensor]:
    return [t for one in cache.layers.values() for t in (one.keys, one.values, *(one.scales or ()))]


def _resident(cache: KVCache) -> int:
    """Bytes of the cache that take memory or swap (Linux' pagemap, a word a page)."""
    found = 0
    for tensor in _tensors(cache):
        first, last = tensor.data_ptr() // PAGE, (tensor.data_ptr() + tensor.nbytes - 1) // PAGE
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:
            words = np.frombuffer(os.pread(pages.fileno(), 8 * (last - first + 1), 8 * first), np.uint64)
        found += int(np.count_nonzero(words >> 62)) * PAGE
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_kv_cache_on_the_cpu_takes_memory_only_once_written(dtype: torch.dtype) -> None:
    shapes = {0: (2, 64, 32), 1: (2, 64, 32)}
    cache = KVCache(shapes, 20_000, 16, dtype, torch.device("cpu"))
    size = sum(t.nbytes for t in _tensors(cache))
    assert size == 20_000 * 16 * bytes_per_token(shapes, dtype) > 50 * MB
    assert _resident(cache) < size / 10
    keys = cache.layers[0].keys
    assert not keys[:, :32].any()
    keys.fill_(1)
    assert _resident(cache) >= keys.nbytes


def test_keys_and_values_have_a_place_for_every_token_of_every_block() -> None:
    cache = KVCache({3: (2, 8, 4)}, 5, 16, torch.float32, torch.device("cpu"))
    assert cache.layers[3].keys.shape == (2, 80, 8)
    assert cache.layers[3].values.shape == (2, 80, 4)
    assert cache.layers[3].scales is None


def test_a_token_in_int8_takes_a_byte_a_number_and_two_for_each_scale() -> None:
    shapes = dict.fromkeys(range(32), (8, 128, 128))
    half = bytes_per_token(shapes, torch.int8)
    assert half == 32 * 8 * 2 * (128 + 2)
    assert bytes_per_token(shapes, torch.bfloat16) / half == pytest.approx(1.97, abs=0.01)


def test_slots_of_an_8b_llama_are_counted_in_bytes() -> None:
    attention = [
        LayerShape(4096, 4096),
        LayerShape(4096, 1024),
        LayerShape(4096, 1024),
        LayerShape(4096, 4096),
    ]
    norms = [LayerShape(4096, 4096, "norm")] * 65
    one = slot_bytes(attention * 32 + norms, slots=1, rank=32)
    assert one == 109_051_904, "109.05 MB for r=32 on q, k, v, o"


def test_slots_hold_matrices_of_every_expert() -> None:
    experts = [LayerShape(2048, 1536, "experts", count=128), LayerShape(768, 2048, "experts", count=128)]
    assert slot_bytes(experts * 48, slots=1, rank=16) == 2_516_582_400, "2.5 GB for r=16 on a 30B-A3B"
