"""The simulation of many servers: nothing is lost in it, and what it says of the rule that is in use."""

from __future__ import annotations

import pytest

from bench.simulation import Figures, OneBase, Outcome, Scenario, requests, simulate

REPLICAS, ADAPTERS, SECONDS = 30, 3000, 20.0
FIGURES = Figures()


def outcome(scenario: Scenario, seed: int, *, endless: bool = False) -> Outcome:
    mean = FIGURES.prefill_seconds + 48 * FIGURES.token_seconds
    rate = scenario.load * REPLICAS * FIGURES.rows / mean
    coming = requests(scenario, rate, ADAPTERS, SECONDS, seed)
    return simulate(OneBase(seed), scenario, coming, REPLICAS, ADAPTERS, SECONDS, endless=endless)


def test_where_everything_is_in_memory_a_request_waits_for_its_prompt_alone() -> None:
    made = outcome(Scenario(load=0.3), 0, endless=True)
    assert made.waited(0.99) == pytest.approx(FIGURES.prefill_seconds)
    assert (made.cold, made.evictions, made.never) == (0, 0, 0)


@pytest.mark.parametrize("seed", [0, 1])
def test_after_the_loss_of_a_tenth_of_the_servers_requests_rather_wait_a_little_than_load(seed: int) -> None:
    made = outcome(Scenario(lost=REPLICAS // 10), seed)
    assert made.never == 0
    assert made.sent_again > 0
    assert made.cold / len(made.waits) < 0.005
    assert made.waited(0.99) < 0.3, "a load from the store takes 0.8 s"


def test_the_same_seed_is_the_same_load_and_outcome() -> None:
    scenario = Scenario(churn=0.01, crowd=0.2, slow=2)
    assert outcome(scenario, 3) == outcome(scenario, 3)
