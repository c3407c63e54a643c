"""Every row of a mixed batch equals what PEFT gives for it alone, in every architecture."""

from __future__ import annotations

import pytest
import torch
from tests.device import DEVICE
from tests.engine.harness import Lab, Request, requests, run
from tests.tiny import ADAPTERS, ARCHITECTURES, save_base

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine.engine import Engine

PRECISIONS = {
    "fp32": {"quantization": "none", "dtype": torch.float32},
    "nf4": {"quantization": "nf4", "dtype": torch.bfloat16},
}


# Each architecture as it is served, and every fourth in fp32, which other kernels compute.
PAIRS = [
    *((one, "nf4") for one in ARCHITECTURES),
    *(pytest.param((one, "fp32"), marks=pytest.mark.full) for one in list(ARCHITECTURES)[::4]),
]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    architecture, precision = request.param
    folder = tmp_path_factory.mktemp(f"{architecture}-{precision}")
    settings = BaseSettings(save_base(architecture, folder / "base"), **PRECISIONS[precision], device=DEVICE)
    return Lab.create(load_base(settings), folder)


ASKED = requests(18, seed=7)


@pytest.fixture(scope="module")
def engine(lab: Lab) -> Engine:
    return lab.engine()


@pytest.fixture(scope="module")
def texts(engine: Engine) -> list[list[int]]:
    """What ASKED get together, in an engine with room for all."""
    return run(engine, ASKED)


def test_rows_of_a_mixed_batch_equal_peft_alone_token_for_token(
    lab: Lab, engine: Engine, texts: list[list[int]]
) -> None:
    assert not lab.disagreements(ASKED, texts)
    assert engine.pool.free == engine.pool.capacity
    assert engine.slots.used == 0
    engine.check_base()


def test_a_prefix_that_is_cached_changes_no_text(engine: Engine, texts: list[list[int]]) -> None:
    before = engine.counters.cached_tokens
    assert run(engine, ASKED) == texts
    assert engine.counters.cached_tokens > before


def test_adapters_change_the_text_so_that_equality_means_something(engine: Engine) -> None:
    prompt = ASKED[0].prompt
    asked = [Request(prompt, adapter, 8) for adapter in (None, *range(len(ADAPTERS)))]
    assert len({tuple(text) for text in run(engine, asked)}) > 10


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"step_tokens": 5}, id="chunks-of-five-tokens"),
        pytest.param({"kv_blocks": 40, "block_size": 2, "slots": 2}, id="preemption-and-two-slots-for-all"),
    ],
)
def test_no_row_notices_chunking_preemption_eviction_or_company(
    lab: Lab, texts: list[list[int]], changes: dict[str, int]
) -> None:
    """The texts are those of the test above, which are PEFT's."""
    engine = lab.engine(**changes)
    assert run(engine, ASKED) == texts
    if "kv_blocks" in changes:
        # Where blocks before a window are released, there are enough.
        assert engine.scheduler.preemptions > 0 or any(group.sight.most for group in engine.model.groups)
    assert engine.pool.free == engine.pool.capacity
