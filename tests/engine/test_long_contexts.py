"""A row's bits are its own at lengths where the library's products change their order of summation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from onebase_engine.base.default_base import DEFAULT_BASE, resolve_base
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import attention, product_shapes
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.product_shapes import Heads, ProductShapes, find_shapes
from onebase_engine.engine.scheduler import Limits

LONGEST = 4224
Scores = list[protocol.TokenLogprob]

HEADS = {"grouped": (6, 2), "multi-head": (2, 2), "multi-query": (4, 1)}
"""Query heads and KV heads; each has its own smallest product."""
CASES = {
    "bf16 grouped": ("grouped", torch.bfloat16, False, 3990),
    "bf16 multi-head": ("multi-head", torch.bfloat16, False, 2500),
    "bf16 multi-query": ("multi-query", torch.bfloat16, False, 2500),
    "bf16 of fixed shape": ("grouped", torch.bfloat16, True, 2500),
    "fp32": ("grouped", torch.float32, False, 2500),
}
"""Of a base: its heads, its dtype, whether all products have one shape; and its rows' longest neighbour."""


@pytest.fixture(scope="module", params=list(CASES))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[nn.Module]:
    heads, dtype, fixed, longest = CASES[request.param]
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=320,
        hidden_size=64 * HEADS[heads][0],
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS[heads][0],
        num_key_value_heads=HEADS[heads][1],
        head_dim=64,
        max_position_embeddings=longest + 16,
        initializer_range=0.15,
    )
    folder = tmp_path_factory.mktemp("long")
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            # Sums of many like terms that matter: the rounding to bf16 hides most differences in order.
            layer.self_attn.q_proj.weight.mul_(0.05)
            layer.self_attn.o_proj.weight.mul_(20)
    model.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        if fixed:
            patch.setattr(attention, "find_shapes", lambda *_: ProductShapes(fixed=True))
        yield load_base(BaseSettings(folder, quantization="none", dtype=dtype))


def engine(base: nn.Module, *, step_tokens: int = 512, kv_blocks: int = 700, block_size: int = 16) -> Engine:
    return Engine(
        base,
        name="long",
        limits=Limits(16, step_tokens, LONGEST),
        kv_blocks=kv_blocks,
        block_size=block_size,
        slots=1,
    )


def prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    return [int(token) for token in torch.randint(3, 320, (length,), generator=generator)]


def serve(one: Engine, lengths: list[int], tokens: int = 16) -> dict[int, Scores]:
    """Serve prompts of these lengths together, and return each one's tokens with logprobs."""
    found: dict[int, Scores] = {length: [] for length in lengths}
    sampling = protocol.Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=4)
    for length in lengths:
        one.submit(protocol.Submit(id=str(length), prompt=prompt(length), sampling=sampling))
    while one.busy:
        one.step()
        for output in one.take_outputs():
            assert output.error_message is None, output.error_message
            found[int(output.id)] += output.logprobs or []
    return found


@pytest.fixture(scope="module")
def together(base: Any) -> dict[int, Scores]:
    """The rows of the tests below, together; some cross an edge while they are decoded."""
    return serve(engine(base), [700, 900, 1000, 1021, 1100, 2045, base.config.max_position_embeddings - 16])


def test_a_rows_logprobs_are_its_own_next_to_rows_of_other_lengths(
    base: nn.Module, together: dict[int, Scores]
) -> None:
    for length in (700, 1000, 1021, 1100, 2045):
        assert serve(engine(base), [length])[length] == together[length], length


def test_a_long_prompts_logprobs_do_not_depend_on_its_chunks(
    base: nn.Module, together: dict[int, Scores]
) -> None:
    for step_tokens in (100, 256, 1031):
        found = serve(engine(base, step_tokens=step_tokens), [900, 1100, 2045])
        assert found == {length: together[length] for length in found}, step_tokens


def test_a_long_rows_logprobs_are_the_same_after_a_prefix_hit(
    base: nn.Module, together: dict[int, Scores]
) -> None:
    one = engine(base)
    for length in (1021, 1100, 2045):
        assert serve(one, [length])[length] == serve(one, [length])[length] == together[length]
    assert one.counters.cached_tokens > 4000


def test_a_long_rows_logprobs_are_the_same_after_preemption(
    base: nn.Module, together: dict[int, Scores]
) -> None:
    # Room for the prompts and the watermark, and not for all of the answers.
    tight = engine(base, step_tokens=4000, kv_blocks=2 + 225 + 250 + 256 + 8, block_size=4)
    found = serve(tight, [900, 1000, 1021])
    assert tight.scheduler.preemptions > 0
    assert found == {length: together[length] for length in found}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("heads", list(HEADS))
def test_a_decode_sums_in_the_order_of_a_prefill_whatever_it_is_padded_to(
    heads: str, dtype: torch.dtype
) -> None:
    queries, kv = HEADS[heads]
    products = find_shapes(frozenset([Heads(kv, queries // kv, 64, 64)]), dtype, LONGEST)
    for length in (512, 1024, 2048, 4096):
        # The weighted sum of values is zero but for rounding, so that its order shows in every bit.
        generator = torch.Generator().manual_seed(length)
        key, value, query = torch.randn(3, length // 2, 64, generator=generator).to(dtype)
        order = torch.randperm(length, generator=generator)
        pairs = torch.cat([key, key])[order], torch.cat([value, -value])[order]
        ends = {products.padded(length), products.padded(length + 1), LONGEST + 128}
        rows: list[torch.Tensor] = []
        for padded in (end for end in ends if products.side(end) == products.side(length)):
            k, v = (nn.functional.pad(x, (0, 0, 0, padded - length)).repeat(kv, 1, 1) for x in pairs)
            for count in (1, 5, 128):
                q = query[0].repeat(kv, queries // kv * count, 1)
                hidden = (torch.arange(padded) >= length).expand(1 if count == 1 else q.shape[1], -1)
                scores = attention._Scores(0.1, softcap=None, window=None)
                rows += attention._attend(q, k, v, hidden, scores, products).reshape(-1, 64)
        assert all(torch.equal(row, rows[0]) for row in rows)
        assert rows[0].any()


@pytest.mark.full
def test_rows_of_the_default_base_are_their_own_next_to_longer_ones() -> None:
    base = load_base(BaseSettings(resolve_base(DEFAULT_BASE).folder))
    together = serve(engine(base), [700, 1060], tokens=4)
    assert serve(engine(base, step_tokens=200), [1060], tokens=4) == {1060: together[1060]}
    assert serve(engine(base), [700], tokens=4) == {700: together[700]}


def test_the_shapes_of_products_are_found_by_trial_and_lengths_never_cross_an_edge() -> None:
    shapes = product_shapes._try_shapes(frozenset([Heads(2, 3, 64, 64)]), torch.bfloat16, 2048)
    assert shapes.fixed or shapes.queries >= 2, "a single row is summed in another order"
    assert find_shapes(frozenset([Heads(2, 3, 64, 64)]), torch.float32, 2048) == ProductShapes(fixed=True)
    shapes = ProductShapes(edges=(1024, 4096))
    assert list(shapes.parts(1000, 5000)) == [(1000, 1024), (1024, 4096), (4096, 5000)]
    assert list(shapes.parts(1024, 4096)) == [(1024, 4096)]
    for length in range(1, 9000):
        padded = shapes.padded(length)
        assert length <= padded <= max(length + 63, length * 1.07)
        assert shapes.side(padded) == shapes.side(length)
        assert ProductShapes(fixed=True).padded(length) % 256 == 0


def test_what_a_trial_found_is_kept_for_this_machine_and_this_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials: list[ProductShapes] = []

    def trial(heads: frozenset[Heads], dtype: torch.dtype, longest: int) -> ProductShapes:
        trials.append(ProductShapes((longest,), len(trials) + 2))
        return trials[-1]

    def find(longest: int = 1024) -> ProductShapes:
        return find_shapes.__wrapped__(frozenset([Heads(2, 3, 64, 64)]), torch.bfloat16, longest)

    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(product_shapes, "_try_shapes", trial)
    assert [find(), find(), find(2048), find()] == [trials[0], trials[0], trials[1], trials[0]]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert find() == find() == trials[2]
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    assert find() == find() == trials[3]
    for broken in (b"", b"\xff", b"[]", b'{"edges": 3}'):
        for file in tmp_path.glob("*/*.json"):
            file.write_bytes(broken)
        assert find() == find() == trials[-1]
    assert len(trials) == 8
    monkeypatch.setenv("ONEBASE_CACHE", str(next(tmp_path.glob("*/*.json"))))
    assert [find(), find()] == trials[8:], "a cache that cannot be written costs a trial"
    monkeypatch.setenv("ONEBASE_CACHE", str(tmp_path / "unknown"))
    monkeypatch.setattr(product_shapes, "_processor", list)
    assert [find(), find()] == trials[10:], "nothing is kept for a processor that is not known"
    assert not (tmp_path / "unknown").exists()
