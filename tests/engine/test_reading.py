"""Rows that are only read, for a vector or for the logprobs of branches, among rows that generate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engine.harness import Lab, Request, requests, run, submission
from tests.tiny import load_folder, save_adapter, save_base

from onebase_engine.base.load import BaseSettings, load_base
from onebase_engine.engine import messages as protocol
from onebase_engine.engine.engine import Engine

PRECISIONS = {
    "fp32": {"quantization": "none", "dtype": torch.float32},
    "nf4": {"quantization": "nf4", "dtype": torch.bfloat16},
}
ASKED = requests(16, seed=5, longest=90)
KINDS = ("last", "mean")


@pytest.fixture(scope="module", params=list(PRECISIONS))
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp(request.param)
    base = load_base(BaseSettings(save_base("llama", folder / "base"), **PRECISIONS[request.param]))
    return Lab.create(base, folder)


def reading(name: str, request: Request, kind: str) -> protocol.Submit:
    plain = submission(name, request)
    return protocol.Submit(
        id=name,
        prompt=plain.prompt,
        sampling=protocol.Sampling(max_tokens=0),
        adapters=plain.adapters,
        tenant=request.tenant,
        pooling=protocol.Pooling(kind),
    )


def finish(engine: Engine) -> dict[str, list[protocol.SequenceOutput]]:
    found: dict[str, list[protocol.SequenceOutput]] = {}
    while True:
        for output in engine.take_outputs():
            assert output.error_message is None, output.error_message
            found.setdefault(output.id, []).append(output)
        if not engine.busy:
            return found
        engine.step()


def vectors(engine: Engine, asked: list[Request], *, between: bool = False) -> list[bytes]:
    """Of each request both kinds, asked for at once; `between`: next to rows that generate."""
    for i, request in enumerate(asked):
        for kind in KINDS:
            engine.submit(reading(f"{i}{kind}", request, kind))
        if between:
            engine.submit(submission(f"text{i}", request))
            engine.step()
    found = finish(engine)
    values = []
    for i in range(len(asked)):
        for kind in KINDS:
            (output,) = found[f"{i}{kind}"]
            assert output.finish == "stop"
            assert not output.tokens
            assert output.vector is not None
            values.append(output.vector)
    assert engine.pool.free == engine.pool.capacity
    return values


@pytest.fixture(scope="module")
def plain(lab: Lab) -> list[bytes]:
    return vectors(lab.engine(), ASKED)


def test_vectors_are_the_hidden_states_of_pefts_own_model(lab: Lab, plain: list[bytes]) -> None:
    for i, request in enumerate(ASKED):
        model = lab.base if request.adapter is None else lab.references[request.adapter]
        with torch.inference_mode():  # by PEFT's own forward, which finds where an activated LoRA is invoked
            states = model(input_ids=torch.tensor([request.prompt]), output_hidden_states=True).hidden_states
            hidden = states[-1][0].double()
        for kind, expected in zip(KINDS, (hidden[-1], hidden.mean(0)), strict=True):
            found = torch.from_numpy(np.frombuffer(plain[2 * i + KINDS.index(kind)], "<f4").copy()).double()
            if lab.base.dtype == torch.float32:
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert torch.cosine_similarity(found, expected, dim=0) > 0.998


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="as-they-come"),
        pytest.param({"step_tokens": 7}, id="short-chunks"),
        pytest.param({"step_tokens": 33, "max_sequences": 3}, id="few-places"),
        pytest.param({"kv_blocks": 52, "block_size": 2}, id="few-blocks"),
        pytest.param({"draft_tokens": 5}, id="drafts"),
    ],
)
def test_vectors_are_bit_equal_among_rows_that_generate(
    lab: Lab, plain: list[bytes], changes: dict[str, int]
) -> None:
    engine = lab.engine(**changes)
    assert vectors(engine, ASKED, between=True) == plain
    assert vectors(engine, ASKED[:3]) == plain[:6], "with blocks of the prompts in the cache"


def test_rows_that_generate_get_their_texts_among_rows_that_are_read(lab: Lab) -> None:
    asked = ASKED[:8]
    engine = lab.engine(step_tokens=40)
    for i, request in enumerate(asked):
        engine.submit(submission(str(i), request))
        engine.submit(reading(f"read{i}", request, "mean"))
    found = finish(engine)
    texts = [[token for output in found[str(i)] for token in output.tokens] for i in range(len(asked))]
    assert texts == run(lab.engine(), asked)


# ---- branches ------------------------------------------------------------------------------


def branching(name: str, request: Request, branches: list[list[int]]) -> protocol.Submit:
    plain = submission(name, request)
    return protocol.Submit(
        id=name,
        prompt=plain.prompt,
        sampling=protocol.Sampling(max_tokens=0, prompt_logprobs=0),
        adapters=plain.adapters,
        n=len(branches),
        branches=branches,
    )


BRANCHES = [[7], [7, 8], list(range(40, 75)), [9, 300, 4]]


def scores(engine: Engine, asked: list[Request]) -> list[list[list[protocol.ScoredToken]]]:
    for i, request in enumerate(asked):
        engine.submit(branching(f"b{i}", request, BRANCHES))
        engine.submit(submission(f"text{i}", request))
        engine.step()
    found = finish(engine)
    values = []
    for i in range(len(asked)):
        rows = {output.choice: output.prompt_logprobs for output in found[f"b{i}"]}
        assert not any(output.tokens for output in found[f"b{i}"])
        values.append([rows[choice] or [] for choice in range(len(BRANCHES))])
    assert engine.pool.free == engine.pool.capacity
    return values


def test_branches_have_the_logprobs_of_the_whole_text(lab: Lab) -> None:
    engine = lab.engine(step_tokens=512)
    for i, request in enumerate(ASKED):
        for k, branch in enumerate(BRANCHES):
            message = submission("whole", request)
            engine.submit(
                protocol.Submit(
                    id=f"{i} {k}",
                    prompt=[*message.prompt, *branch],
                    sampling=protocol.Sampling(max_tokens=1, prompt_logprobs=0),
                    adapters=message.adapters,
                )
            )
    whole = finish(engine)
    for i, found in enumerate(scores(lab.engine(), ASKED)):
        for k, (branch, one) in enumerate(zip(BRANCHES, found, strict=True)):
            assert [entry.token for entry in one] == branch
            (expected,) = (output.prompt_logprobs for output in whole[f"{i} {k}"] if output.prompt_logprobs)
            assert expected[-len(branch) :] == one


def test_branches_are_bit_equal_in_any_chunks_and_where_blocks_are_few(lab: Lab) -> None:
    plain = scores(lab.engine(), ASKED)
    assert scores(lab.engine(step_tokens=5), ASKED) == plain
    tight = lab.engine(kv_blocks=82, block_size=2, max_sequences=9)
    assert scores(tight, ASKED) == plain


def test_branches_share_what_was_computed_of_their_prompt(lab: Lab) -> None:
    engine = lab.engine()
    request = Request(tuple(range(3, 83)), 0, 1)
    engine.submit(branching("x", request, BRANCHES))
    cached = [output.cached_tokens for output in sorted(finish(engine)["x"], key=lambda one: one.choice)]
    assert cached == [0, 64, 64, 64], "whole blocks, and the token before a branch is computed again"


def test_a_branch_that_is_too_long_is_refused_alone(lab: Lab) -> None:
    engine = lab.engine()
    engine.submit(branching("long", ASKED[0], [[7], [7] * 512]))
    engine.submit(submission("fine", ASKED[0]))
    codes = {output.error_code for output in engine.take_outputs()}
    assert codes == {"context_length_exceeded"}
    assert finish(engine)["fine"][-1].finish == "length"


def test_pooling_each_token_without_a_classifier_is_refused_and_nobody_else_notices(lab: Lab) -> None:
    engine = lab.engine()
    engine.submit(reading("each", ASKED[1], "each"))
    (refused,) = engine.take_outputs()
    assert (refused.finish, refused.error_code, refused.error_param) == ("error", "no_classifier", "pooling")
    assert run(engine, [ASKED[0]]) == run(lab.engine(), [ASKED[0]])


def test_a_vector_that_overflows_fails_alone(lab: Lab, tmp_path: Path) -> None:
    settings = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    folder = save_adapter(lab.base, settings, tmp_path / "huge", seed=1, std=3e37)
    engine = lab.engine()
    engine.put_adapter("huge", load_folder(lab.base, folder).weights)
    engine.submit(
        protocol.Submit(
            id="huge",
            prompt=[5, 6, 7] * 9,
            sampling=protocol.Sampling(max_tokens=0),
            adapters=[protocol.AdapterRef("huge")],
            pooling=protocol.Pooling("mean"),
        )
    )
    engine.submit(
        protocol.Submit(
            id="branch",
            prompt=[5, 6, 7] * 9,
            sampling=protocol.Sampling(max_tokens=0, prompt_logprobs=0),
            adapters=[protocol.AdapterRef("huge")],
            branches=[[8, 9]],
        )
    )
    engine.submit(submission("fine", ASKED[0]))
    codes, tokens = set(), []
    while engine.busy:
        engine.step()
        for output in engine.take_outputs():
            codes.add((output.id, output.error_code))
            tokens += output.tokens
    assert codes >= {("huge", "not_finite"), ("branch", "not_finite")}
    assert tokens == run(lab.engine(), [ASKED[0]])[0]
