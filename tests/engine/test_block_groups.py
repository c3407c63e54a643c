"""Layers with a window release blocks that layers without one keep, and nobody's bits change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.scheduling import BLOCK, World, make_row
from tests.oracle import greedy
from tests.tiny import save_model
from torch import nn

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.drafts import Drafts
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.kv_cache import (
    MOST_GROUPS,
    RESERVED_BLOCKS,
    ZERO_BLOCK,
    BlockGroup,
    KVCache,
    Shape,
    Sight,
    block_groups,
    bytes_per_block,
    bytes_per_token,
    most_blocks,
    most_tokens,
)
from onebase_engine.engine.model import ServedModel
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_server.processes.engine import sizes

FULL, CPU = Sight(), torch.device("cpu")


def base_of(kinds: Sequence[tuple[int, Sight, Shape]]) -> tuple[dict[int, Shape], dict[int, Sight]]:
    """Shapes and sights of layers, of each kind so many."""
    layers = [(sight, shape) for count, sight, shape in kinds for _ in range(count)]
    return {n: shape for n, (_, shape) in enumerate(layers)}, {
        n: sight for n, (sight, _) in enumerate(layers)
    }


WINDOW = Sight(1024)
BASES: dict[str, tuple[list[tuple[int, Sight, Shape]], int, float]] = {
    "Gemma 3 1B": ([(4, FULL, (1, 256, 256)), (22, Sight(512), (1, 256, 256))], 7, 0.08),
    "Gemma 3 4B": ([(5, FULL, (4, 256, 256)), (29, WINDOW, (4, 256, 256))], 7, 0.03),
    "Gemma 3 27B": ([(10, FULL, (16, 128, 128)), (52, WINDOW, (16, 128, 128))], 13, 0.05),
    "Gemma 4 31B": ([(10, FULL, (4, 512, 512)), (50, WINDOW, (16, 256, 256))], 11, 0.0),
    "gpt-oss-20b": ([(12, FULL, (8, 64, 64)), (12, Sight(128), (8, 64, 64))], 2, 0.0),
    "OLMo 3 7B": ([(8, FULL, (32, 128, 128)), (24, Sight(4096), (32, 128, 128))], 4, 0.0),
    "with chunks": ([(12, FULL, (8, 128, 128)), (36, Sight(chunk=8192), (8, 128, 128))], 4, 0.0),
}
"""Of a base: its layers, how many groups they become, and the largest part of the blocks that is unused."""


@pytest.mark.parametrize("name", list(BASES))
def test_layers_of_known_bases_become_few_groups_that_waste_little(name: str) -> None:
    kinds, count, unused = BASES[name]
    shapes, sights = base_of(kinds)
    groups = block_groups(shapes, sights)
    assert len(groups) == count
    block = bytes_per_block(shapes, torch.bfloat16, 16, groups)
    assert 1 - 16 * bytes_per_token(shapes, torch.bfloat16) / (block * count) == pytest.approx(
        unused, abs=0.01
    )


def test_a_long_sequence_of_gemma_3_4b_takes_a_sixth_of_the_memory() -> None:
    shapes, sights = base_of(BASES["Gemma 3 4B"][0])
    groups, memory = block_groups(shapes, sights), 4 << 30
    blocks = memory // bytes_per_block(shapes, torch.bfloat16, 16, groups)
    before = memory // bytes_per_token(shapes, torch.bfloat16)
    assert before == 30_840
    assert most_tokens(groups, blocks, 16, 512, 1 << 20) > 5.5 * before
    assert blocks // len(groups) * 16 > 0.97 * before, "short sequences lose what stays unused"


KINDS = st.lists(
    st.tuples(
        st.integers(1, 12),
        st.builds(Sight, st.sampled_from([None, 4, 9])) | st.builds(Sight, chunk=st.just(8)),
        st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([8, 16, 24]), st.sampled_from([8, 16, 24])),
    ),
    min_size=1,
    max_size=4,
)


@given(kinds=KINDS, dtype=st.sampled_from([torch.bfloat16, torch.int8]), block=st.sampled_from([1, 4]))
def test_every_layer_is_in_one_group_and_no_number_lies_on_anothers_place(
    kinds: list[tuple[int, Sight, Shape]], dtype: torch.dtype, block: int
) -> None:
    shapes, sights = base_of(kinds)
    groups = block_groups(shapes, sights)
    assert sorted(layer for group in groups for layer in group.layers) == sorted(shapes)
    assert len(groups) <= MOST_GROUPS
    if len(groups) > 1:
        assert all({sights[layer] for layer in group.layers} == {group.sight} for group in groups)
    else:
        seen = {sights[layer] for layer in shapes}
        assert groups[0].sight in seen | {FULL}
        assert len(seen) == 1 or groups[0].sight.chunk is None
    cache = KVCache(shapes, 5, block, dtype, CPU, groups)
    assert sum(part.nbytes for part in cache.by_block) == 5 * bytes_per_block(shapes, dtype, block, groups)
    # Block 2 + n of group n, filled head by head with numbers of its own.
    expected: list[tuple[torch.Tensor, int]] = []
    for number, group in enumerate(groups[:3]):
        for layer in group.layers:
            one = cache.layers[layer]
            first = (2 + number) * group.stride * block
            for head in range(shapes[layer][0]):
                for part in (one.keys, one.values, *(scale[..., None] for scale in one.scales or ())):
                    own = part[head, first : first + block]
                    own.fill_(len(expected) % 120 + 1)
                    expected.append((own, len(expected) % 120 + 1))
    assert all((own == value).all() for own, value in expected)
    assert not any(part[:, :2].any() for part in cache.by_block), "nothing is written to reserved blocks"


@settings(max_examples=60)
@given(
    prompt=st.integers(1, 60),
    tokens=st.integers(1, 30),
    step_tokens=st.integers(1, 24),
    sights=st.lists(
        st.builds(Sight, st.sampled_from([None, 1, 3, 8, 9, 30]))
        | st.builds(Sight, chunk=st.integers(1, 20)),
        min_size=1,
        max_size=3,
    ),
)
def test_a_sequence_alone_needs_no_more_blocks_than_are_counted_for_it(
    prompt: int, tokens: int, step_tokens: int, sights: list[Sight]
) -> None:
    groups = [BlockGroup((), sight) for sight in sights]
    counted = most_blocks(groups, prompt + tokens, BLOCK, step_tokens)
    world = World.create(blocks=counted, sights=sights, step_tokens=step_tokens, max_length=200)
    for _ in range(2):  # the second time with a prefix, of which layers with a window have the end
        row = make_row(0, range(prompt), tokens)
        world.scheduler.check_limits(prompt, tokens, 0)
        world.scheduler.add(row)
        world.finish_all()
        assert row.generated == tokens
    assert world.scheduler.preemptions == 0
    assert world.pool.free == counted


def test_a_prefix_is_reused_up_to_where_every_group_has_what_the_next_token_sees() -> None:
    world = World.create(blocks=60, sights=[FULL, Sight(8)], step_tokens=8, max_length=200)
    first = make_row(0, range(48), 1)
    world.scheduler.add(first)
    world.finish_all()
    lost = world.pool.allocate(60 - 3) or []  # all but the last ones to be released: the text's beginning
    world.pool.release(lost)
    again = make_row(1, range(48), 1)
    world.scheduler.add(again)
    world.step()
    assert again.cached_tokens == 0, "of a beginning, what is before the window is not enough"
    world.finish_all()
    third = make_row(2, [*range(48), 7], 2)
    world.scheduler.add(third)
    world.step()
    assert third.cached_tokens == 48
    assert set(third.blocks[1][:10]) == {ZERO_BLOCK}


# ---- a whole engine ------------------------------------------------------------------------

SIZE, TOKENS = 16, 2 * 16
"""Of a block, and of the windows."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A Gemma 3 of seven layers, of which the sixth sees everything."""
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    config = tf.Gemma3TextConfig(
        vocab_size=320, hidden_size=128, intermediate_size=192, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=4200, initializer_range=0.15,
        sliding_window=TOKENS, query_pre_attn_scalar=32, tie_word_embeddings=False, layer_types=kinds,
    )  # fmt: skip
    return load_base(BaseSettings(save_model(config, tmp_path_factory.mktemp("gemma3"))))


def engine_of(
    base: nn.Module,
    *,
    blocks: int = 2400,
    step_tokens: int = 128,
    draft_tokens: int = 0,
    host_blocks: int = 0,
    whole: bool = False,
    kv_dtype: torch.dtype | None = None,
) -> Engine:
    """`blocks`: of all groups; `whole`: all layers keep everything, in one group."""
    model = ServedModel(base, 1, kv_dtype=kv_dtype)
    assert [group.sight.window for group in model.groups] == [None, *[TOKENS] * 6]
    if whole:
        model.groups = (BlockGroup(tuple(range(7))),)
    limits = SchedulerLimits(8, step_tokens, 4200, draft_tokens)
    kv_blocks = RESERVED_BLOCKS + blocks
    return Engine(
        base, name="g", limits=limits, kv_blocks=kv_blocks, slots=1, model=model, host_blocks=host_blocks
    )


Scores = list[list[protocol.ScoredToken]]


def serve(
    engine: Engine, prompts: Sequence[list[int]], tokens: int, seen: Callable[[], object] = lambda: None
) -> Scores:
    """Serve the prompts together, and return each one's tokens with logprobs. `seen`: after every step."""
    sampling = protocol.Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=2)
    for number, prompt in enumerate(prompts):
        engine.submit(protocol.Submit(id=str(number), prompt=prompt, sampling=sampling))
    found: Scores = [[] for _ in prompts]
    while engine.busy:
        engine.step()
        seen()
        for output in engine.take_outputs():
            assert output.error_message is None, output.error_message
            found[int(output.id)] += output.logprobs or []
    assert engine.pool.free == engine.pool.capacity
    return found


def text(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 320, (length,), generator=generator).tolist()


PROMPTS = [text(length, length) for length in (5, 31, 70, 150, 300)]


@pytest.fixture(scope="module")
def expected(base: nn.Module) -> Scores:
    """What PROMPTS get where every layer keeps every block."""
    return serve(engine_of(base, whole=True), PROMPTS, 40)


def test_a_sequence_of_4000_tokens_holds_windows_and_its_full_layers_blocks_and_gets_the_same_bits(
    base: nn.Module,
) -> None:
    engine, held = engine_of(base), []
    prompt = text(4000)

    def count() -> None:
        held.extend([[len(blocks) - blocks.count(ZERO_BLOCK) for blocks in row.blocks] for row in running])

    running = engine.scheduler.running
    found = serve(engine, [prompt], 40, count)
    assert found == serve(engine_of(base, whole=True), [prompt], 40)
    full, *windows = zip(*held, strict=True)
    assert max(full) == -(-4040 // SIZE)
    assert max(map(max, windows)) == (TOKENS + 128 - 3) // SIZE + 2, "the window, and what a step writes"
    assert max(map(max, [window[-30:] for window in windows])) <= TOKENS // SIZE + 1
    assert max(map(sum, held)) <= engine.scheduler.most_blocks(4040)
    assert (engine.longest, engine.kv_tokens) == (4200, 2400 * 4200 // engine.scheduler.most_blocks(4200))
    # Its blocks before the windows are prefixes still, and its end is all that is computed again.
    assert serve(engine, [prompt, [*prompt[:2000], 5]], 40)[0] == found[0]
    assert engine.counters.cached_tokens == 3984 + 2000


def test_memory_for_the_cache_becomes_blocks_of_any_group(base: nn.Module) -> None:
    model, limits = ServedModel(base, 1), SchedulerLimits(8, 128, 4200)
    token = model.kv_bytes_per_token
    config = protocol.EngineConfig(base_folder="", kv_memory=1000 * token)
    blocks = sizes(config, base, model, limits, None).blocks
    assert model.kv_bytes_per_block(16) * 7 == 16 * token
    assert model.kv_bytes_per_old_token * 7 == token
    assert blocks == 1000 * 7 // 16
    engine = Engine(base, name="g", limits=limits, kv_blocks=blocks, slots=1, model=model)
    assert engine.longest > 4000, "a sequence of four times the tokens that all layers could keep"


def test_texts_are_those_of_peft(base: nn.Module, expected: Scores) -> None:
    for prompt, scores in list(zip(PROMPTS, expected, strict=True))[:3]:
        assert [one.token for one in scores] == greedy(base, prompt, 40)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="together"),
        pytest.param({"step_tokens": 7}, id="chunks-of-seven"),
        pytest.param({"blocks": 60, "step_tokens": 24}, id="preemption"),
        pytest.param({"blocks": 60, "step_tokens": 24, "host_blocks": 400}, id="host-memory"),
    ],
)
def test_bits_do_not_depend_on_chunks_preemption_prefixes_or_host_memory(
    base: nn.Module, expected: Scores, changes: dict[str, Any]
) -> None:
    engine = engine_of(base, **changes)
    assert serve(engine, PROMPTS, 40) == expected
    assert serve(engine, PROMPTS[::-1], 40) == expected[::-1], "with prefixes"
    assert engine.counters.cached_tokens > 0
    assert (engine.scheduler.preemptions > 0) == ("blocks" in changes)
    assert (engine.counters.restored_tokens > 0) == ("host_blocks" in changes)


@pytest.mark.parametrize("blocks", [60, 2400])
def test_steps_that_are_planned_ahead_give_the_same_texts(
    base: nn.Module, expected: Scores, blocks: int
) -> None:
    engine, planned = engine_of(base, blocks=blocks, step_tokens=24, host_blocks=400), []
    engine._async_scheduling = True
    sampling = protocol.Sampling(temperature=0.0, max_tokens=40, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        engine.submit(protocol.Submit(id=str(number), prompt=prompt, sampling=sampling))
    texts: list[list[int]] = [[] for _ in PROMPTS]
    while engine.busy:
        engine.step()
        planned.append(engine._next is not None)
        for output in engine.take_outputs():
            texts[int(output.id)] += output.tokens
    assert texts == [[one.token for one in scores] for scores in expected]
    assert sum(planned) > 40
    assert engine.pool.free == engine.pool.capacity


def test_drafts_that_are_taken_back_over_the_edge_of_a_window_change_no_bit(
    base: nn.Module, expected: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [prompt + [one.token for one in scores] for prompt, scores in zip(PROMPTS, expected, strict=True)]

    def propose(drafts: Drafts, tokens: Sequence[int], most: int, *_: object, **__: object) -> list[int]:
        """Every second guess is wrong from its third token on."""
        own = next(text for text in texts if text[: len(tokens)] == list(tokens))
        guess = own[len(tokens) : len(tokens) + most]
        return guess if len(tokens) % 2 else [*guess[:2], *(token ^ 1 for token in guess[2:])]

    monkeypatch.setattr(Drafts, "propose", propose)
    monkeypatch.setattr(Drafts, "worth", lambda drafts, rows, cost: 20)
    engine = engine_of(base, draft_tokens=20)
    assert serve(engine, PROMPTS, 40) == expected
    assert 50 < engine.counters.right_draft_tokens < engine.counters.draft_tokens


def test_int8_blocks_of_groups_give_the_bits_of_int8_blocks_of_all_layers(base: nn.Module) -> None:
    whole, divided = (engine_of(base, kv_dtype=torch.int8, whole=one) for one in (True, False))
    assert serve(divided, PROMPTS, 12) == serve(whole, PROMPTS, 12)
