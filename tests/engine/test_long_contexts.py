"""A row's bits are its own at lengths where the library's products change their order of summation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from tests.tiny import HYBRIDS
from torch import nn

from onebase_engine.base.default_base import DEFAULT_BASE, resolve_base
from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import messages as protocol
from onebase_engine.engine import model as served_model
from onebase_engine.engine.engine import Engine
from onebase_engine.engine.scheduler import SchedulerLimits
from onebase_engine.kernels.interface import AttentionSettings, Contexts, LayerCache
from onebase_engine.kernels.reference import ReferenceKernels

LONGEST = 4224
Scores = list[protocol.ScoredToken]

HEADS = {"grouped": (6, 2), "multi-head": (2, 2), "multi-query": (4, 1)}
"""Query heads and KV heads; each has its own smallest product."""
CASES = {
    "bf16 grouped": ("grouped", torch.bfloat16, False, 3990),
    "bf16 multi-head": ("multi-head", torch.bfloat16, False, 2500),
    "bf16 multi-query": ("multi-query", torch.bfloat16, False, 2500),
    "bf16 by PyTorch": ("grouped", torch.bfloat16, True, 2500),
    "fp32": ("grouped", torch.float32, False, 2500),
    "hybrid": ("grouped", torch.bfloat16, False, 3990),
}
"""Of a base: its heads, its dtype, whether PyTorch computes; and its rows' longest neighbour."""


REPEATED = ("bf16 multi-query", "bf16 by PyTorch", "fp32")
"""What `make check` alone tries."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=[pytest.mark.full] if case in REPEATED else []) for case in CASES],
)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[nn.Module]:
    heads, dtype, by_pytorch, longest = CASES[request.param]
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
    if request.param == "hybrid":
        config = HYBRIDS["qwen3_5"]()
        config.max_position_embeddings = longest + 16
    folder = tmp_path_factory.mktemp("long")
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            if not hasattr(layer, "self_attn"):
                continue
            # Sums of many like terms that matter: the rounding to bf16 hides most differences in order.
            layer.self_attn.q_proj.weight.mul_(0.05)
            layer.self_attn.o_proj.weight.mul_(20)
    model.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        if by_pytorch:
            patch.setattr(served_model, "find_kernels", lambda *_: ReferenceKernels())
        yield load_base(BaseSettings(folder, quantization="none", dtype=dtype))


def engine(base: nn.Module, *, step_tokens: int = 512, kv_blocks: int = 700, block_size: int = 16) -> Engine:
    return Engine(
        base,
        name="long",
        limits=SchedulerLimits(16, step_tokens, LONGEST),
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
def test_pytorchs_decode_sums_in_the_order_of_its_prefill_whatever_it_is_padded_to(
    heads: str, dtype: torch.dtype
) -> None:
    queries, kv = HEADS[heads]
    for length in (512, 1023, 1024, 2048):
        attention = _Attention(length, queries, kv, dtype)
        rows = [attention.last(first, at) for first in (0, length - 1, length - 5, 300) for at in (0, 3000)]
        assert all(torch.equal(row, rows[0]) for row in rows)
        assert rows[0].any()


class _Attention:
    """A context whose weighted sum of values is zero but for rounding: its order shows in every bit."""

    def __init__(self, length: int, queries: int, kv: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(length)
        key, value, query = torch.randn(3, -(-length // 2), 64, generator=generator).to(dtype)
        order = torch.randperm(length, generator=generator)
        k, v = (torch.cat([x, y])[order].repeat(kv, 1, 1) for x, y in ((key, key), (value, -value)))
        self._length = length
        self._projected = query[0].repeat(queries, length, 1), k, v
        keys, values = (torch.zeros(kv, 5120, 64, dtype=dtype) for _ in range(2))
        self._attention = ReferenceKernels().attention(LayerCache(keys, values, 16), AttentionSettings(0.1))
        self._table = np.full((2, 256), 2, dtype=np.int32)
        self._table[0] = np.arange(2, 258)

    def last(self, first: int, other: int) -> torch.Tensor:
        """The row at the end, computed from position `first` on, next to a row at position `other`."""
        at = np.arange(first, self._length, dtype=np.int32)
        position, owner, write = (
            np.append(some, one).astype(np.int32) for some, one in ((at, other), (at * 0, 1), (at + 32, 16))
        )
        q, k, v = (torch.cat([x[:, first:], x[:, :1]], dim=1) for x in self._projected)
        return self._attention(q, k, v, Contexts(position, owner, write[None], self._table[None]))[-2]


def first_layers(whole: Path, folder: Path, layers: int) -> Path:
    """Of a base in `whole`: layers are alike, and each takes its time."""
    config = json.loads((whole / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    (folder / "model.safetensors").symlink_to(whole / "model.safetensors")
    return folder


@pytest.mark.full
def test_rows_of_the_default_base_are_their_own_next_to_longer_ones(tmp_path: Path) -> None:
    base = load_base(BaseSettings(first_layers(resolve_base(DEFAULT_BASE).folder, tmp_path, 6)))
    together = serve(engine(base), [700, 1060], tokens=4)
    assert serve(engine(base, step_tokens=200), [1060], tokens=4) == {1060: together[1060]}
    assert serve(engine(base), [700], tokens=4) == {700: together[700]}
