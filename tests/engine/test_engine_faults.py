"""What goes wrong in one place of the engine stays there, and leaves nothing behind."""

from __future__ import annotations

import gc
import itertools
import socket
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.tiny import ADAPTERS, load_folder, save_adapter, save_base
from torch import nn

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import engine as engine_module
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.batch import StepBatch
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.kv_cache import HostCache
from onebase_engine.engine.messages import FrameReader, SequenceOutput
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.kernels.interface import TILE
from onebase_engine.kernels.reference import ReferenceKernels
from onebase_engine.kernels.weights import AdapterWeights
from onebase_server.processes import engine as process


@pytest.fixture(scope="module", autouse=True, params=[False, True], ids=["in turns", "ahead"])
def ahead(request: pytest.FixtureRequest) -> Iterator[None]:
    """How steps are planned: one after the other, or each while the one before is computed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReferenceKernels, "asynchronous", request.param)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    folder = save_base("llama", tmp_path_factory.mktemp("faults"))
    settings = BaseSettings(folder, quantization="none", dtype=torch.float32, compute_dtype=torch.float32)
    return load_base(settings)


def create(
    base: nn.Module, *, kv_blocks: int = 60, host_blocks: int = 0, slots: int = 2, max_sequences: int = 4
) -> Engine:
    limits = SchedulerLimits(max_sequences, 64, 200)
    return Engine(base, name="tiny", limits=limits, kv_blocks=kv_blocks, host_blocks=host_blocks, slots=slots)


def submit(
    name: str, prompt: list[int], n: int = 1, adapter: str | None = None, **options: Any
) -> protocol.Submit:
    sampling = protocol.Sampling(**{"temperature": 0.0, "max_tokens": 8, **options})
    adapters = [] if adapter is None else [protocol.AdapterRef(adapter)]
    return protocol.Submit(id=name, prompt=prompt, sampling=sampling, adapters=adapters, n=n)


def finish(engine: Engine) -> dict[tuple[str, int], list[SequenceOutput]]:
    """Step to the end: every row has exactly one final event, and everything is given back."""
    outputs = engine.take_outputs()
    for _ in range(500):
        if not engine.busy:
            break
        engine.step()
        outputs += engine.take_outputs()
    assert not engine.busy
    found: dict[tuple[str, int], list[SequenceOutput]] = {}
    for output in outputs:
        found.setdefault((output.id, output.choice), []).append(output)
    for events in found.values():
        assert [event.finish is not None for event in events] == [False] * (len(events) - 1) + [True]
    assert engine.pool.free == engine.pool.capacity
    assert engine.slots.used == 0
    return found


def tokens(events: list[SequenceOutput]) -> list[int]:
    return [token for event in events for token in event.tokens]


class Flaky:
    """The model's forward pass. An error that `fails` gives for a batch is raised once NaN is written."""

    def __init__(self, engine: Engine, fails: Callable[[StepBatch], Exception | None]) -> None:
        self._engine, self._forward, self._fails = engine, engine.model.forward, fails
        self.failures = 0
        engine.model.forward = self  # type: ignore[method-assign, assignment]

    def __call__(self, batch: StepBatch) -> torch.Tensor:
        logits = self._forward(batch)
        error = self._fails(batch)
        if error is None:
            return logits
        self.failures += 1
        cache = self._engine.model._attention.cache
        assert cache is not None
        for layer in cache.layers.values():
            for tensor in (layer.keys, layer.values):
                tensor[:, batch.contexts.write] = torch.nan
        raise error


def once_in(*calls: int) -> Callable[[StepBatch], Exception | None]:
    """Fails at the forward passes of these numbers, from 0."""
    counter = itertools.count()
    return lambda batch: RuntimeError("the kernel gave up") if next(counter) in calls else None


def on_token(token: int) -> Callable[[StepBatch], Exception | None]:
    """Fails whenever a batch holds the token."""
    return lambda batch: RuntimeError("a bad token") if token in batch.input_ids.tolist() else None


BAD = 300
"""A token of the vocabulary that no other prompt has."""


def crowd(engine: Engine, weights: AdapterWeights, culprit: Sequence[int] | None = None) -> None:
    """Rows of every kind: chunked and scored prompts, choices, sampled and greedy; the culprit among them."""
    engine.put_adapter("d", weights)
    for i in range(3):
        engine.submit(submit(f"decode{i}", [3 + i, 4], logprobs=3, adapter="d" if i else None))
    for _ in range(2):
        engine.step()
    if culprit is not None:
        engine.submit(submit("culprit", list(culprit), logit_bias={BAD: -100.0}))
    options: dict[str, Any] = {"logprobs": 3, "logit_bias": {BAD: -100.0}}
    engine.submit(submit("long", list(range(5, 150)), **options))
    engine.submit(submit("scored", list(range(8, 90)), prompt_logprobs=2, adapter="d", **options))
    engine.submit(submit("pair", list(range(9, 40)), n=2, temperature=1.0, seed=5, **options))


def facts(found: dict[tuple[str, int], list[SequenceOutput]]) -> dict[tuple[str, int], list[Any]]:
    """All that a row got, floats as they are."""
    return {
        key: [(e.tokens, e.logprobs, e.prompt_logprobs, e.finish, e.error_code) for e in events]
        for key, events in found.items()
        if key[0] != "culprit"
    }


@pytest.fixture(scope="module")
def weights(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> AdapterWeights:
    folder = save_adapter(base, ADAPTERS[0], tmp_path_factory.mktemp("adapter"), seed=1)
    return load_folder(base, folder).weights


@pytest.fixture(scope="module")
def undisturbed(base: nn.Module, weights: AdapterWeights) -> dict[tuple[str, int], list[Any]]:
    """What the crowd gets without a culprit and without a fault."""
    engine = create(base, max_sequences=8)
    crowd(engine, weights)
    return facts(finish(engine))


@pytest.mark.parametrize("step", range(8))
def test_a_step_that_fails_once_is_computed_again_and_no_row_notices(
    base: nn.Module, weights: AdapterWeights, undisturbed: dict[tuple[str, int], list[Any]], step: int
) -> None:
    engine = create(base, max_sequences=8)
    flaky = Flaky(engine, once_in(step))
    crowd(engine, weights)
    assert facts(finish(engine)) == undisturbed
    assert flaky.failures == 1
    assert engine.counters.failed_steps == 0


@pytest.mark.parametrize(
    "prompt",
    [
        pytest.param([BAD], id="its-first-token"),
        pytest.param([*range(4, 100), BAD, 7], id="its-second-chunk"),
        pytest.param([3, BAD, 5], id="its-prompt"),
    ],
)
def test_a_row_that_fails_every_step_ends_alone_and_its_neighbours_get_the_same_bits(
    base: nn.Module,
    weights: AdapterWeights,
    undisturbed: dict[tuple[str, int], list[Any]],
    prompt: list[int],
) -> None:
    engine = create(base, max_sequences=8)
    Flaky(engine, on_token(BAD))
    crowd(engine, weights, culprit=prompt)
    found = finish(engine)
    assert [event.error_code for event in found["culprit", 0]] == ["row_failed"]
    assert facts(found) == undisturbed
    assert engine.counters.failed_steps == 0


def test_a_decode_that_fails_is_found_among_many(base: nn.Module) -> None:
    expected, engine = create(base, max_sequences=8), create(base, max_sequences=8)
    Flaky(engine, on_token(BAD))
    for one in (expected, engine):
        for i in range(7):
            # The fifth row's second token is the bad one.
            bias = {BAD: 100.0} if i == 4 and one is engine else {BAD: -100.0}
            one.submit(submit("culprit" if i == 4 else str(i), [3 + i], logprobs=3, logit_bias=bias))
    found = finish(engine)
    assert [event.error_code for event in found["culprit", 0]] == [None, "row_failed"]
    assert facts(found) == facts(finish(expected))


def test_a_prefill_that_memory_does_not_hold_is_computed_in_smaller_chunks(
    base: nn.Module, weights: AdapterWeights, undisturbed: dict[tuple[str, int], list[Any]]
) -> None:
    engine = create(base, max_sequences=8)

    def full(batch: StepBatch) -> Exception | None:
        return torch.OutOfMemoryError("out of memory") if batch.contexts.write.shape[-1] > TILE else None

    asked: list[bool] = []

    def give_memory_back() -> bool:
        asked.append(True)
        return True

    engine.model.release_memory = give_memory_back  # type: ignore[method-assign]
    flaky = Flaky(engine, full)
    crowd(engine, weights)
    assert facts(finish(engine)) == undisturbed
    assert flaky.failures
    assert asked, "graphs of CUDA keep memory that the step needs"
    assert engine.counters.failed_steps == 0


def test_what_a_failed_step_has_written_is_read_by_nobody_who_gets_its_blocks(base: nn.Module) -> None:
    engine, expected = create(base, kv_blocks=2 + 6), create(base)
    Flaky(engine, on_token(BAD))
    for prompt in ([*range(3, 60), BAD], list(range(60, 130))):
        engine.submit(submit("row", prompt, logprobs=2, logit_bias={BAD: -100.0}))
        found = finish(engine)
    expected.submit(submit("row", list(range(60, 130)), logprobs=2, logit_bias={BAD: -100.0}))
    assert facts(found) == facts(finish(expected))


def test_a_step_in_which_every_row_fails_is_nobodys_fault_and_later_ones_are_served(base: nn.Module) -> None:
    engine, expected = create(base, max_sequences=4), create(base)
    Flaky(engine, once_in(2, *range(3, 10)))
    for i in range(4):
        engine.submit(submit(str(i), [3, 4 + i]))
    engine.submit(submit("later", [7, 8]))
    expected.submit(submit("later", [7, 8]))
    found = finish(engine)
    assert [found[str(i), 0][-1].error_code for i in range(4)] == ["step_failed"] * 4
    assert found["later", 0][-1].error_code is None
    assert tokens(found["later", 0]) == tokens(finish(expected)["later", 0])
    assert engine.counters.failed_steps == 1


def test_a_sampler_that_fails_for_every_row_fails_the_step(base: nn.Module) -> None:
    engine = create(base)
    for name in ("a", "b"):
        engine.submit(submit(name, [3, 4], logprobs=-1))
    found = finish(engine)
    assert [found[name, 0][-1].error_code for name in ("a", "b")] == ["step_failed"] * 2
    assert engine.counters.failed_steps == 1


@pytest.mark.parametrize("when", ["begun", "read"])
@pytest.mark.parametrize("rows", [1, 2])
def test_what_is_drawn_again_finds_the_memory_of_what_failed(
    base: nn.Module, when: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error's frames hold tensors, and where they also hold the error, until Python collects garbage."""
    monkeypatch.setattr(engine_module.logger, "disabled", True)  # pytest keeps what is logged
    engine, held = create(base), list[weakref.ref[torch.Tensor]]()
    draw, forward, left = engine.model.kernels.draw, engine.model.forward, list[int]()

    def failing(*args: Any) -> Any:
        def read() -> Any:
            work = torch.zeros(9)
            held.append(weakref.ref(work))
            raise torch.OutOfMemoryError("no memory for this")

        return read if when == "read" else read()

    def noted(batch: StepBatch) -> Any:
        left.append(sum(one() is not None for one in held))
        engine.model.kernels.draw = failing if len(left) < 3 else draw  # type: ignore[method-assign]
        found = forward(batch)
        held.append(weakref.ref(found.logits))
        return found

    engine.model.forward = noted  # type: ignore[method-assign]
    gc.disable()
    try:
        for i in range(rows):
            engine.submit(submit(str(i), [3, 4], logprobs=1))
        engine.step()
        engine.submit(submit("later", [3, 4], logprobs=1))
        engine.step()
    finally:
        gc.enable()
    assert len(left) > 1
    assert not any(left)


def test_a_version_that_no_slot_takes_fails_alone_and_leaves_nothing_in_its_slot(
    base: nn.Module, tmp_path: Path
) -> None:
    """As when an accelerator's memory runs out."""
    weights = load_folder(base, save_adapter(base, ADAPTERS[0], tmp_path, seed=1)).weights
    engine, expected = create(base, slots=2), create(base, slots=2)
    for one in (engine, expected):
        one.put_adapter("good", weights)
        one.put_adapter("halfway", {**weights, "model.norm": next(iter(weights.values()))})
    for name in ("before", "after"):
        expected.submit(submit(name, [3, 4], adapter="good"))
    alone = {key: tokens(events) for key, events in finish(expected).items()}
    engine.submit(submit("before", [3, 4], adapter="good"))
    engine.step()
    engine.submit(submit("halfway", [3, 4], n=2, adapter="halfway"))
    found = finish(engine)
    assert [found["halfway", choice][-1].error_code for choice in (0, 1)] == ["step_failed"] * 2
    assert "halfway" not in engine.slots.slot_of
    engine.submit(submit("after", [3, 4], adapter="good"))
    found |= finish(engine)
    assert {key: tokens(found[key]) for key in alone} == alone
    for module in engine.model._slots._modules.values():
        assert len(module.filled) <= 1


def test_what_a_failed_step_should_have_written_is_never_reused(base: nn.Module) -> None:
    engine = create(base)
    Flaky(engine, once_in(0, 1))
    prompt = list(range(3, 40))
    engine.submit(submit("failed", prompt))
    finish(engine)
    engine.submit(submit("again", prompt))
    assert finish(engine)["again", 0][0].cached_tokens == 0


def swapping(base: nn.Module, prompts: Sequence[Sequence[int]]) -> Engine:
    """An engine whose cache holds one of these prompts, and whose host memory has had the others."""
    engine = create(base, kv_blocks=2 + 7, host_blocks=40)
    for prompt in prompts:
        engine.submit(submit("before", list(prompt), logprobs=2))
        finish(engine)
    assert engine.pool.on_host
    return engine


PROMPTS = [range(3, 90), range(90, 180), range(180, 270)]


def test_a_step_that_fails_finds_what_came_back_from_host_memory_when_it_is_computed_again(
    base: nn.Module,
) -> None:
    engine, calm = swapping(base, PROMPTS), create(base)
    flaky = Flaky(engine, once_in(0))
    for one in (engine, calm):
        one.submit(submit("again", list(PROMPTS[0]), logprobs=2))
    found = finish(engine)
    assert flaky.failures == 1
    assert engine.counters.restored_tokens == 80 == found["again", 0][0].cached_tokens
    expected = finish(calm)
    assert [event.logprobs for event in found["again", 0]] == [e.logprobs for e in expected["again", 0]]


def test_an_engine_whose_only_row_waits_for_its_prefix_waits_for_nothing_else(base: nn.Module) -> None:
    engine, waits = swapping(base, PROMPTS), list[int]()
    engine.pool._most_back = 1
    engine._staging.wait = lambda: waits.append(engine.counters.steps)  # type: ignore[method-assign]
    engine.submit(submit("again", list(PROMPTS[0])))
    steps = engine.counters.steps
    for _ in range(4):
        engine.step()
    assert engine.counters.steps == steps
    assert engine.counters.restored_tokens == 4 * 16
    assert finish(engine)["again", 0][0].cached_tokens == 80
    assert waits == []


@pytest.mark.parametrize("steps", [0, 1])
def test_a_row_that_is_cancelled_leaves_what_came_back_from_host_memory_for_the_next(
    base: nn.Module, steps: int
) -> None:
    engine, calm = swapping(base, PROMPTS), create(base)
    engine.submit(submit("cancelled", list(PROMPTS[0])))
    for _ in range(steps):
        engine.step()
    engine.cancel(protocol.Cancel("cancelled"))
    finish(engine)
    for one in (engine, calm):
        one.submit(submit("again", list(PROMPTS[0]), logprobs=2))
    found, expected = finish(engine), finish(calm)
    assert found["again", 0][0].cached_tokens == 80 == engine.counters.restored_tokens
    assert [event.logprobs for event in found["again", 0]] == [e.logprobs for e in expected["again", 0]]


def test_a_row_whose_version_no_slot_takes_leaves_what_came_back_for_the_next(
    base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_folder(base, save_adapter(base, ADAPTERS[0], tmp_path, seed=1)).weights
    engine = create(base, kv_blocks=2 + 7, host_blocks=40, slots=1)
    engine.put_adapter("d", weights)
    for adapter, prompt in (("d", PROMPTS[0]), (None, PROMPTS[1]), (None, PROMPTS[2])):
        engine.submit(submit("before", list(prompt), adapter=adapter))
        finish(engine)
    engine.put_adapter("other", weights)
    engine.submit(submit("other", [3, 4], adapter="other"))
    finish(engine)
    with monkeypatch.context() as patched:
        failed = RuntimeError("no memory")
        patched.setattr(engine.model, "move_slots", lambda moves, _: dict.fromkeys(moves, failed))
        engine.submit(submit("fails", list(PROMPTS[0]), adapter="d"))
        assert finish(engine)["fails", 0][-1].error_code == "step_failed"
    assert engine.counters.restored_tokens == 80
    engine.submit(submit("again", list(PROMPTS[0]), adapter="d"))
    assert finish(engine)["again", 0][0].cached_tokens == 80


def test_where_host_memory_cannot_be_had_prefixes_are_dropped(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("80.0 GB of host memory cannot be page-locked")

    monkeypatch.setattr(HostCache, "__init__", refuse)
    engine = create(base, kv_blocks=2 + 7, host_blocks=40)
    assert "prefixes that leave the KV cache are dropped: 80.0 GB" in caplog.text
    for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[0]):
        engine.submit(submit("row", list(prompt)))
        finish(engine)
    assert (engine.stats().kv_blocks_host_total, engine.counters.cached_tokens) == (0, 0)


def test_copies_that_fail_end_the_engine(base: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks would not hold what the pool says; the next engine begins with empty ones."""
    engine = swapping(base, PROMPTS)
    monkeypatch.setattr(torch.Tensor, "index_copy_", lambda *_: 1 / 0)
    engine.submit(submit("again", list(PROMPTS[0])))
    with pytest.raises(ZeroDivisionError):
        engine.step()


def test_choices_of_a_preempted_leader_finish_with_the_text_they_have_alone(base: nn.Module) -> None:
    prompt = list(range(3, 35))
    roomy, tight = create(base), create(base, kv_blocks=2 + 6)
    for engine in (roomy, tight):
        engine.submit(submit("older", [9] * 16, max_tokens=40))
        engine.submit(submit("pair", prompt, n=3, max_tokens=20))
    expected, found = finish(roomy), finish(tight)
    assert tight.scheduler.preemptions
    assert {key: tokens(events) for key, events in found.items()} == {
        key: tokens(events) for key, events in expected.items()
    }


def test_waiting_rows_can_be_cancelled(base: nn.Module) -> None:
    engine = create(base, max_sequences=1)
    engine.submit(submit("running", [3]))
    engine.submit(submit("waiting", [4], n=2))
    engine.step()
    engine.cancel(protocol.Cancel("waiting"))
    found = finish(engine)
    assert [found["waiting", choice][0].finish for choice in (0, 1)] == ["cancelled"] * 2
    assert len(tokens(found["running", 0])) == 8


def test_a_version_unloaded_while_a_row_waits_for_it_serves_that_row_first(
    base: nn.Module, tmp_path: Path
) -> None:
    engine = create(base, slots=1)
    for i in range(2):
        folder = save_adapter(base, ADAPTERS[i], tmp_path / str(i), seed=i)
        engine.put_adapter(f"d{i}", load_folder(base, folder).weights)
    engine.submit(submit("a", [3, 4], adapter="d0"))
    engine.submit(submit("b", [3, 4], adapter="d1"))
    engine.step()
    engine.unload_adapter("d1")
    assert set(engine.versions.weights) == {"d0", "d1"}
    found = finish(engine)
    assert len(tokens(found["b", 0])) == 8
    assert set(engine.versions.weights) == {"d0"}
    engine.step()
    engine.submit(submit("late", [3], adapter="d1"))
    assert finish(engine)["late", 0][0].error_code == "adapter_not_loaded"


def test_a_weight_that_fp32_cannot_hold_is_refused(base: nn.Module) -> None:
    engine = create(base)
    request = protocol.Submit(
        id="r", prompt=[3], sampling=protocol.Sampling(), adapters=[protocol.AdapterRef("d", 1e39)]
    )
    engine.submit(request)
    (output,) = finish(engine)["r", 0]
    assert (output.error_code, output.error_param) == ("weight_out_of_range", "adapter")


@pytest.mark.parametrize("setting", ["logprobs", "prompt_logprobs"])
def test_a_row_that_raises_ends_alone(base: nn.Module, setting: str) -> None:
    neighbours = {"left": [3, 4], "right": [7, 8, 9]}
    expected = {}
    for name, prompt in neighbours.items():
        alone = create(base)
        alone.submit(submit(name, prompt))
        expected[name] = tokens(finish(alone)[name, 0])
    engine = create(base)
    engine.submit(submit("left", neighbours["left"]))
    # The api lets no such number through; torch refuses it.
    engine.submit(submit("raises", [5, 6], **{setting: -1}))
    engine.submit(submit("right", neighbours["right"]))
    found = finish(engine)
    assert [event.error_code for event in found["raises", 0]] == ["row_failed"]
    assert {name: tokens(found[name, 0]) for name in neighbours} == expected
    assert engine.counters.failed_steps == 0


def test_prompt_logprobs_that_fit_in_no_message_are_refused(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = [(2**31 - 1, -0.1)] * 20
    longest = protocol.SequenceOutput(
        id="r", prompt_logprobs=[protocol.ScoredToken(2**31 - 1, -0.1, top)] * 1000
    )
    per_token = engine_module.SCORED_TOKEN_BYTES + 20 * engine_module.ALTERNATIVE_BYTES
    assert len(msgspec.msgpack.encode(longest)) <= 1000 * per_token
    monkeypatch.setattr(engine_module, "MAX_SCORE_BYTES", 10 * per_token)
    engine = create(base)
    engine.submit(submit("fits", [3] * 10, prompt_logprobs=20))
    engine.submit(submit("longer", [3] * 11, prompt_logprobs=20))
    found = finish(engine)
    assert (found["longer", 0][0].error_code, found["longer", 0][0].error_param) == (
        "prompt_logprobs_too_large",
        "logprobs",
    )
    assert len(found["fits", 0][0].prompt_logprobs or []) == 9


def test_prompt_logprobs_of_two_rows_travel_in_two_messages(base: nn.Module) -> None:
    engine = create(base)
    for name in ("a", "b"):
        engine.submit(submit(name, [3, 4, 5], prompt_logprobs=1))
    engine.submit(submit("c", [6]))
    engine.step()
    ours, theirs = socket.socketpair()
    channel = process.EngineChannel(theirs, protocol.to_engine_decoder().decode)
    process._report(engine.take_outputs(), engine.stats(), channel)
    channel.close()
    data = b"".join(iter(lambda: ours.recv(1 << 16), b""))
    ours.close()
    decoder = protocol.to_api_decoder()
    messages = [decoder.decode(payload) for payload in FrameReader().feed(data)]
    assert [[row.id for row in m.outputs] for m in messages if isinstance(m, protocol.StepResult)] == [
        ["a"],
        ["b"],
        ["c"],
    ]


def test_messages_are_written_at_once_while_the_socket_has_room_and_else_in_their_order() -> None:
    ours, theirs = socket.socketpair()
    channel = process.EngineChannel(theirs, protocol.to_engine_decoder().decode)
    names = [f"{number}-{'x' * (number % 3 * 300_000)}" for number in range(8)]
    channel.send(protocol.AdapterUnloaded(names[0]))
    data = ours.recv(1 << 16, socket.MSG_DONTWAIT)
    for name in names[1:]:
        channel.send(protocol.AdapterUnloaded(name))  # with nobody who reads: none of them waits
    closing = threading.Thread(target=channel.close)
    closing.start()
    data += b"".join(iter(lambda: ours.recv(1 << 16), b""))
    closing.join()
    ours.close()
    decoder = protocol.to_api_decoder()
    assert [decoder.decode(one).digest for one in FrameReader().feed(data)] == names


def test_what_the_last_step_gave_is_told_before_the_process_ends(base: nn.Module) -> None:
    engine = create(base)
    ours, theirs = socket.socketpair()
    channel = process.EngineChannel(theirs, protocol.to_engine_decoder().decode)
    step = engine.step

    def last(meanwhile: Any = None) -> None:
        step(meanwhile)
        channel.post(protocol.Shutdown())

    engine.step = last  # type: ignore[method-assign]
    for name, most in (("ends", 1), ("runs", 8)):
        channel.post(submit(name, [3, 4], max_tokens=most))
    assert process._serve(engine, channel) == 0
    channel.close()
    data = b"".join(iter(lambda: ours.recv(1 << 16), b""))
    ours.close()
    decoder = protocol.to_api_decoder()
    messages = [decoder.decode(payload) for payload in FrameReader().feed(data)]
    told = [row for m in messages if isinstance(m, protocol.StepResult) for row in m.outputs]
    assert [(row.id, row.finish) for row in told] == [("ends", "length"), ("runs", None)]


def test_the_process_gives_up_after_steps_that_fail_one_after_the_other_even_with_idle_time_between(
    base: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "IDLE_SECONDS", 0.01)
    engine = create(base)
    Flaky(engine, once_in(*range(100)))
    ours, theirs = socket.socketpair()
    channel = process.EngineChannel(theirs, protocol.to_engine_decoder().decode)
    failed: list[str] = []

    def one_request_after_the_other() -> None:
        reader, decoder, asked = FrameReader(), protocol.to_api_decoder(), 0
        while data := ours.recv(1 << 16):
            for payload in reader.feed(data):
                step = decoder.decode(payload)
                assert isinstance(step, protocol.StepResult)
                failed.extend(output.error_code or "" for output in step.outputs if output.finish)
                if not step.outputs and asked == len(failed) < process.MAX_FAILED_STEPS:
                    asked += 1
                    ours.sendall(protocol.encode(submit(str(asked), [3])))

    api = threading.Thread(target=one_request_after_the_other)
    api.start()
    status = process._serve(engine, channel)
    channel.close()
    api.join()
    ours.close()
    assert status == 4
    assert failed == ["step_failed"] * process.MAX_FAILED_STEPS
