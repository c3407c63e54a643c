"""Every sampling setting against plain numpy, and a row's token in any mix."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.harness import LiveBytes
from torch.utils._python_dispatch import TorchDispatchMode

from onebase_engine.engine import sampling
from onebase_engine.engine.messages import Sampling
from onebase_engine.engine.sampling import Drawn, score_tokens, uniform
from onebase_engine.engine.sequence import AdapterMix, SequenceState
from onebase_engine.kernels import reference as by_pytorch
from onebase_engine.kernels.cpu import load_library
from onebase_engine.kernels.interface import Draws, Kernels
from onebase_engine.kernels.reference import NUCLEUS_CANDIDATES, ReferenceKernels

VOCAB = 40
EOS = frozenset({2})
chosen: list[Kernels] = [ReferenceKernels()]


@pytest.fixture(scope="module", autouse=True, params=["torch", "kernels"])
def by(request: pytest.FixtureRequest) -> None:
    """What draws."""
    library = load_library() if request.param == "kernels" else None
    if request.param == "kernels" and library is None:
        pytest.skip("the library in C was not built")
    chosen[0] = library or ReferenceKernels()


def draw(raw: torch.Tensor, rows: list[SequenceState], eos_ids: frozenset[int]) -> list[Drawn]:
    return sampling.draw(raw, rows, eos_ids, chosen[0])


def row(
    prompt: list[int] | None = None, completion: list[int] | None = None, choice: int = 0, **options: Any
) -> SequenceState:
    made = SequenceState("r", choice, list(prompt or [5, 6]), Sampling(**options), AdapterMix(), 0, 0.0)
    made.tokens += completion or []
    return made


def logits(seed: int, rows: int = 1, vocab: int = VOCAB, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * 3).to(dtype)


def reference(raw: torch.Tensor, of: SequenceState) -> np.ndarray:
    """The distribution that the row's token is drawn from, step by step as the settings are defined."""
    s = of.sampling
    z = raw.double().numpy().copy()
    completion = of.tokens[of.prompt_length :]
    for token in set(of.tokens):
        z[token] = z[token] / s.repetition_penalty if z[token] > 0 else z[token] * s.repetition_penalty
    for token, count in Counter(completion).items():
        z[token] -= s.presence_penalty + s.frequency_penalty * count
    for token, bias in s.logit_bias.items():
        z[token] += bias
    if len(completion) < s.min_tokens:
        z[[*EOS, *s.stop_token_ids]] = -np.inf
    if s.temperature == 0:
        return np.eye(len(z))[int(np.argmax(z))]
    z = z / s.temperature
    if s.top_k:
        z[z < np.sort(z)[::-1][min(s.top_k, len(z)) - 1]] = -np.inf
    p = np.exp(z - z.max())
    p /= p.sum()
    keep = np.ones(len(p), dtype=bool)
    if s.top_p < 1:
        ordered = np.sort(p)[::-1]
        last = int((np.cumsum(ordered) < s.top_p).sum())
        keep &= p >= ordered[min(last, len(p) - 1)]
    keep &= p >= s.min_p * p.max()
    p = np.where(keep, p, 0)
    return p / p.sum()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 3},
    "top_k over the vocabulary": {"top_k": 10_000},
    "top_p": {"top_p": 0.9},
    "hot top_p": {"temperature": 2.0, "top_p": 0.6},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.2},
    "all filters": {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.1},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "all penalties": {"repetition_penalty": 0.7, "presence_penalty": -1.0, "frequency_penalty": 1.1},
    "logit_bias": {"logit_bias": {3: 6.0, 4: -100.0}},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (7, 8), "logit_bias": {2: 50.0, 7: 50.0}},
    "min_tokens reached": {"min_tokens": 4, "stop_token_ids": (7,), "logit_bias": {7: 3.0}},
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_setting_draws_from_the_distribution_that_it_defines(options: dict[str, Any]) -> None:
    """Inverse-CDF sampling: each seed gives the token at which the cumulated distribution passes u."""
    raw = logits(1)
    for seed in range(150):
        asked = row([5, 6, 9], [9, 9, 11, 3], seed=seed, **options)
        (drawn,) = draw(raw, [asked], EOS)
        cumulated = np.cumsum(reference(raw[0], asked))
        u = uniform(seed, 0, 4) if asked.sampling.temperature else 0.5
        near = np.abs(cumulated - u).min() < 1e-5
        assert drawn.token is not None
        assert near or drawn.token == int(np.searchsorted(cumulated, u, side="right")), seed
        assert reference(raw[0], asked)[drawn.token] > 0


def test_penalties_work_before_the_first_token() -> None:
    raw = logits(2)
    asked = row(
        [5, 6], [], temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=1.2
    )
    assert draw(raw, [asked], EOS)[0].token == int(np.argmax(reference(raw[0], asked)))


def test_min_tokens_works_without_any_token_that_could_end_the_text() -> None:
    raw = logits(2)
    assert draw(raw, [row(temperature=0.0, min_tokens=3)], frozenset())[0].token == int(raw[0].argmax())


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_a_very_low_temperature_is_greedy(temperature: float) -> None:
    raw = logits(3) * 10
    assert draw(raw, [row(temperature=temperature, seed=4)], EOS)[0].token == int(raw[0].argmax())


def test_top_p_reaches_past_the_candidates_that_are_tried_first() -> None:
    vocab = 4 * NUCLEUS_CANDIDATES
    raw = torch.linspace(0, 0.5, vocab)[None]
    tokens = {draw(raw, [row(top_p=0.9, seed=seed)], EOS)[0].token for seed in range(300)}
    allowed = np.flatnonzero(reference(raw[0], row(top_p=0.9)))
    assert len(allowed) > NUCLEUS_CANDIDATES
    assert min(t for t in tokens if t is not None) < vocab - NUCLEUS_CANDIDATES
    assert all(t is not None and t >= allowed.min() - 1 for t in tokens)


OPTIONS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 3, 20]),
        "top_p": st.sampled_from([1.0, 0.95, 0.5]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.5]),
        "logit_bias": st.sampled_from([{}, {3: 2.0}]),
        "min_tokens": st.integers(0, 2),
        "seed": st.integers(0, 5),
        "logprobs": st.sampled_from([None, 0, 3]),
    }
)


@settings(max_examples=60)
@given(
    options=st.lists(OPTIONS, min_size=2, max_size=6),
    seed=st.integers(0, 20),
    levels=st.sampled_from([2, 40]),
)
def test_a_rows_token_does_not_depend_on_its_company_even_with_ties(
    options: list[dict[str, Any]], seed: int, levels: int
) -> None:
    # Few distinct values, in bf16: most logits are tied with others, also across every threshold.
    raw = (logits(seed, len(options), 300) * levels / 12).round().div(levels / 12).to(torch.bfloat16)
    rows = [row([5, 6], [7, 3], choice=i, **option) for i, option in enumerate(options)]
    alone = [draw(raw[i : i + 1], [rows[i]], EOS)[0] for i in range(len(rows))]
    assert draw(raw, rows, EOS) == alone
    order = list(reversed(range(len(rows))))
    assert draw(raw[order], [rows[i] for i in order], EOS) == [alone[i] for i in order]


class ByRows(TorchDispatchMode):  # type: ignore[misc, no-untyped-call]
    """A library like those for GPUs, and worse: it chooses by the number of rows how it adds up and which of
    equal numbers come first, and by a row's place in memory too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        rows = args[0].shape[0] if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 2 else 0
        if name == "topk" and rows % 2:
            values, places = func(args[0].flip(-1), *args[1:], **(kwargs or {}))
            return values, args[0].shape[-1] - 1 - places
        if name in ("cumsum", "sum", "mean", "_softmax") and result.is_floating_point():
            return result * (1 + 1e-3 * rows)
        if name == "_log_softmax" and rows and args[0].shape[-1] % 4:
            return result - 1e-3 * torch.arange(rows)[:, None]
        return result


@pytest.mark.parametrize("vocab", [300, 4 * NUCLEUS_CANDIDATES + 1])
def test_a_rows_token_does_not_depend_on_how_a_library_adds(vocab: int) -> None:
    kernels = ReferenceKernels(tiled=False)
    options = [*SETTINGS.values(), {"temperature": 9.0, "top_p": 0.99}, {"temperature": 30.0, "top_k": 9}]
    rows = [row([5, 6], [7], choice=i, **{"seed": 3, **one}) for i, one in enumerate(options * 3)]
    raw = logits(11, len(rows), vocab, torch.bfloat16)
    with ByRows():
        together = sampling.draw(raw, rows, EOS, kernels)
        alone = [sampling.draw(raw[i : i + 1], [one], EOS, kernels)[0] for i, one in enumerate(rows)]
    assert together == alone


@pytest.mark.parametrize("vocab", [17, 321, 1025])
def test_scores_and_alternatives_do_not_depend_on_how_a_library_adds_and_sorts(vocab: int) -> None:
    raw = (logits(5, 5, vocab) / 4).round()
    with ByRows():
        scores = score_tokens(raw, [1, 2, 3, 4, 5], 0)
        assert [score_tokens(raw[i : i + 1], [i + 1], 0)[0] for i in range(5)] == scores
        values, places = sampling._largest(raw, 9, ordered=True)
        alone = [sampling._largest(one[None], 9, ordered=True)[1][0].tolist() for one in raw]
    assert places.tolist() == alone == raw.sort(descending=True, stable=True).indices[:, :9].tolist()
    assert torch.equal(values, raw.gather(1, places))


def test_many_rows_are_drawn_some_after_the_other_for_the_same_tokens_in_less_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, vocab = 23, 4000
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    logits[7] = torch.nan
    numbers = np.arange(rows)
    draws = Draws(
        temperature=np.where(numbers % 4 == 0, 0.0, 0.5 + numbers).astype(np.float32),
        top_k=np.where(numbers % 5 == 1, 40, 0),
        top_p=np.where(numbers % 3 == 1, 0.9999, 1.0).astype(np.float32),
        min_p=np.where(numbers % 7 == 2, 0.1, 0.0).astype(np.float32),
        uniform=(numbers + 0.5) / rows,
    )
    mask = np.full(-(-vocab // 32), 0x5A5A5A5A, dtype=np.int32)
    allowed = [mask if number % 6 == 5 else None for number in range(rows)]
    drawn: list[list[int | None]] = []
    taken: list[int] = []
    kernels = ReferenceKernels(tiled=False)
    for at_once in (rows, 4):
        monkeypatch.setattr(by_pytorch, "DRAWN_AT_ONCE", at_once)
        taken.append(LiveBytes.measure(lambda: drawn.append(kernels.draw(list(logits), draws, allowed)())))
    assert drawn[0] == drawn[1]
    assert [number for number, token in enumerate(drawn[0]) if token is None] == [7]
    assert taken[1] < taken[0] / 3


def test_a_seed_gives_the_same_token_again_and_choices_and_positions_differ() -> None:
    raw = torch.zeros(1, 1000)

    def token(seed: int, choice: int = 0, completion: int = 0) -> int | None:
        return draw(raw, [row([5], [6] * completion, choice=choice, seed=seed)], EOS)[0].token

    assert [token(seed) for seed in range(20)] == [token(seed) for seed in range(20)]
    assert len({token(7, choice) for choice in range(20)}) > 15
    assert len({token(7, 0, count) for count in range(20)}) > 15
    assert len({token(seed) for seed in range(20)}) > 15


def test_the_whole_range_of_seeds_can_be_drawn_with() -> None:
    for seed in (0, -1, 2**63, 2**64 - 1):
        assert 0 <= uniform(seed, 0, 0) < 1


def test_the_frequencies_of_drawn_tokens_follow_the_softmax() -> None:
    raw = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, 1.5]])
    draws = 4000
    rows = [row(seed=seed) for seed in range(draws)]
    counts = Counter(drawn.token for drawn in draw(raw.expand(draws, -1), rows, frozenset()))
    expected = torch.softmax(raw[0].double(), dim=-1).numpy() * draws
    chi_square = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in range(6))
    assert chi_square < 20.5, "p < 0.001 for 5 degrees of freedom"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_fail_their_own_row_only(bad: float, temperature: float) -> None:
    raw = logits(5, 3)
    asked = [row(temperature=temperature, seed=i, top_p=0.9) for i in range(3)]
    clean = [draw(raw[i : i + 1], [asked[i]], EOS)[0] for i in range(3)]
    raw[1, 4] = bad
    drawn = draw(raw, asked, EOS)
    assert drawn[1].token is None
    assert [drawn[0], drawn[2]] == [clean[0], clean[2]]


def test_logprobs_are_the_raw_log_softmax_with_the_most_likely_first() -> None:
    raw = logits(6)
    asked = row(temperature=0.7, top_k=2, logit_bias={9: 40.0}, logprobs=5)
    (drawn,) = draw(raw, [asked], EOS)
    expected = torch.log_softmax(raw[0].double(), dim=-1)
    assert drawn.token == 9
    assert drawn.logprob is not None
    assert drawn.logprob.token == 9
    assert drawn.logprob.logprob == pytest.approx(float(expected[9]), abs=1e-5)
    best = expected.argsort(descending=True)[:5].tolist()
    assert [token for token, _ in drawn.logprob.top] == best
    assert [value for _, value in drawn.logprob.top] == pytest.approx(expected[best].tolist(), abs=1e-5)


def test_logprobs_of_zero_alternatives_hold_the_token_alone_and_none_gives_none() -> None:
    raw = logits(6)
    assert draw(raw, [row(temperature=0.0)], EOS)[0].logprob is None
    (drawn,) = draw(raw, [row(temperature=0.0, logprobs=0)], EOS)
    assert drawn.logprob is not None
    assert drawn.logprob.top == []


def test_more_alternatives_than_the_vocabulary_give_all_of_it() -> None:
    (drawn,) = draw(logits(6), [row(temperature=0.0, logprobs=VOCAB + 5)], EOS)
    assert drawn.logprob is not None
    assert sorted(token for token, _ in drawn.logprob.top) == list(range(VOCAB))


def test_prompt_scores_are_the_log_softmax_of_each_target() -> None:
    raw = logits(8, 4)
    scores = score_tokens(raw, [3, 1, 4, 1], 2)
    expected = torch.log_softmax(raw.double(), dim=-1)
    assert [score.token for score in scores] == [3, 1, 4, 1]
    for i, score in enumerate(scores):
        assert score.logprob == pytest.approx(float(expected[i, score.token]), abs=1e-5)
        assert [token for token, _ in score.top] == expected[i].argsort(descending=True)[:2].tolist()


@settings(max_examples=30)
@given(
    vocab=st.sampled_from([5, 17, 1024, 1025, 49_152, 151_937]), top=st.integers(0, 24),
    seed=st.integers(0, 50), rows=st.integers(1, 35), levels=st.sampled_from([2, 300]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)  # fmt: skip
def test_alternatives_are_the_most_likely_and_do_not_depend_on_neighbours_even_where_many_tie(
    vocab: int, top: int, seed: int, rows: int, levels: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(levels, (rows, vocab), generator=generator).to(dtype)
    tokens = torch.randint(vocab, (rows,), generator=generator).tolist()
    scores = score_tokens(raw, tokens, top)
    for index in {0, rows // 2, rows - 1}:
        score, expected = scores[index], torch.log_softmax(raw[index].float(), dim=-1)
        assert score_tokens(raw[index : index + 1], tokens[index : index + 1], top) == [score]
        assert (score.token, score.logprob) == (tokens[index], float(expected[tokens[index]]))
        assert [value for _, value in score.top] == expected.topk(min(top, vocab)).values.tolist()
        assert [value for _, value in score.top] == [float(expected[token]) for token, _ in score.top]
        assert len({token for token, _ in score.top}) == len(score.top)


@settings(max_examples=40)
@given(
    vocab=st.sampled_from([5, 17, 1024, 1025, 49_152, 151_937]), seed=st.integers(0, 50),
    temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0]), top_k=st.sampled_from([0, 1, 50, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3, 0.0]), min_p=st.sampled_from([0.0, 0.05]),
    spread=st.sampled_from([0.01, 1.0, 8.0]), dtype=st.sampled_from([torch.bfloat16, torch.float32]),
)  # fmt: skip
def test_kernels_draw_what_pytorch_does_for_vocabularies_of_any_size(
    vocab: int, seed: int, temperature: float, top_k: int, top_p: float, min_p: float, spread: float,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    kernels = load_library()
    if kernels is None:
        pytest.skip("the library in C was not built")
    raw = (logits(seed, 3, vocab) * spread).to(dtype)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    rows = [row(choice=i, seed=seed, **options) for i in range(3)]
    got = [one.token for one in sampling.draw(raw, rows, EOS, kernels)]
    for i, (token, expected) in enumerate(
        zip(got, sampling.draw(raw, rows, EOS, ReferenceKernels()), strict=True)
    ):
        if token != expected.token:
            # Both are kept, and what lies between them is no more than a rounding of the sum.
            assert token is not None
            assert expected.token is not None
            assert temperature
            weights = ((raw[i].double() - raw[i].double().max()) / temperature).exp()
            first, last = sorted((token, expected.token))
            kept = weights >= min(weights[token], weights[expected.token]) * (1 - 1e-5)
            between = (weights * kept)[first + 1 : last + 1].sum() - weights[last]
            assert between <= 2e-6 * weights.sum(), (token, expected.token, float(between / weights.sum()))


@given(data=st.data())
@settings(max_examples=60)
def test_what_a_grammar_forbids_is_as_if_its_logit_were_not_there(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
    count = data.draw(st.integers(1, 6))
    vocab = data.draw(st.sampled_from([40, 64, 257, 4099]))
    raw = logits(data.draw(st.integers(0, 99)), count, vocab, dtype)
    words = -(-vocab // 32)
    masks: list[sampling.Mask] = []
    rows = []
    plain = raw.clone()
    for number in range(count):
        rows.append(
            row(
                temperature=data.draw(st.sampled_from([0.0, 1.0])),
                logit_bias=dict(data.draw(st.sampled_from([{}, {1: 2.0}]))),  # such rows are in fp32
                top_k=data.draw(st.sampled_from([0, 3])),
                top_p=data.draw(st.sampled_from([1.0, 0.5])),
                seed=number,
            )
        )
        allowed = data.draw(st.sets(st.integers(0, vocab - 1), min_size=1))
        if data.draw(st.booleans()):
            masks.append(None)
            continue
        bits = np.zeros(words * 32, dtype=np.uint8)
        bits[list(allowed)] = 1
        bits[vocab:] = data.draw(st.integers(0, 1))  # of no token
        if data.draw(st.booleans()):
            raw[number, list(allowed)] = plain[number, list(allowed)] = -torch.inf
        masks.append(np.packbits(bits, bitorder="little").view(np.int32))
        forbidden = torch.from_numpy(bits[:vocab]) == 0
        # What a grammar allows is allowed, however unlikely.
        if forbidden.any() and (plain[number, ~forbidden] == -torch.inf).all():
            plain[number] = 0
            rows[number].sampling.logit_bias.clear()
        plain[number, forbidden] = -torch.inf

    drawn = sampling.draw(raw, rows, EOS, chosen[0], masks)

    expected = [draw(plain[number : number + 1], [rows[number]], EOS)[0] for number in range(count)]
    assert [one.token for one in drawn] == [one.token for one in expected]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_grammar_allows_nothing_gets_no_token_and_others_get_theirs(temperature: float) -> None:
    raw = logits(3, 3)
    rows = [row(temperature=temperature, seed=number) for number in range(3)]
    nothing = np.zeros(-(-VOCAB // 32), dtype=np.int32)
    behind = nothing.copy()
    behind[-1] = -1 << VOCAB % 32  # bits of no token
    tokens = [one.token for one in sampling.draw(raw, rows, EOS, chosen[0], [nothing, None, behind])]
    assert tokens == [None, draw(raw[1:2], rows[1:2], EOS)[0].token, None]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_fail_their_row_where_a_grammar_forbids_them_too(value: float) -> None:
    raw = logits(3, 2)
    raw[1, 7] = value
    but_7 = np.array([~(1 << 7)] * (-(-VOCAB // 32)), dtype=np.int32)
    tokens = [one.token for one in sampling.draw(raw, [row(), row()], EOS, chosen[0], [but_7, but_7])]
    assert tokens[0] is not None
    assert tokens[1] is None


def test_what_a_penalty_makes_infinite_fails_its_row_with_a_grammar_as_without() -> None:
    raw = logits(3)
    raw[0, 6] = 2.0
    over = row(temperature=0.0, repetition_penalty=1e-40)
    everything = np.full(-(-VOCAB // 32), -1, dtype=np.int32)
    assert draw(raw, [over], EOS)[0].token is None
    assert sampling.draw(raw, [over], EOS, chosen[0], [everything])[0].token is None
