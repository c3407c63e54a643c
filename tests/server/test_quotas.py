"""What one key and one tenant may ask for: counted exactly, told in headers, and nobody else's concern."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase import Client, RateLimitError
from onebase_adapters.registry import Quotas
from onebase_edge.errors import ApiError, QuotaExceededError
from onebase_edge.errors import QuotaSpentError as Limited
from onebase_server.tenancy.access import Caller
from onebase_server.tenancy.quotas import WINDOW_SECONDS, Limiter, Window, duration

from .access import Keys, bearer, client_with
from .support import Server, Starter, upload

BASE = "smollm2-135m-instruct"
HEADERS = [
    f"x-ratelimit-{fact}-{of}" for of in ("requests", "tokens") for fact in ("limit", "remaining", "reset")
]


# ---- the window ---------------------------------------------------------------------------------


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Step = tuple[float, int, int]
STEPS = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.125, 1.0, 7.5, 29.0, 59.5, 60.0]), st.integers(1, 60), st.integers(0, 60)
    ),
    max_size=40,
)


@given(limit=st.integers(1, 100), steps=STEPS, held=st.integers(0, 8))
def test_no_60_seconds_ever_have_more_than_the_limit(limit: int, steps: list[Step], held: int) -> None:
    """Requests use up to what they set aside, and end when up to `held` others have begun after them."""
    clock = Clock()
    limiter = Limiter(lambda _: (Quotas(tokens=limit), Quotas()), clock)
    caller = Caller("ob-1", "acme", frozenset())
    used: list[tuple[float, int]] = []
    running: list[tuple[Any, int]] = []
    for pause, wanted, spared in steps:
        clock.now += pause
        try:
            ticket = limiter.enter(caller)
            ticket.admit(wanted, 1)
        except ApiError:
            continue
        tokens = max(0, wanted - spared)
        used.append((clock.now, tokens))
        running.append((ticket, tokens))
        while len(running) > held:
            ended, took = running.pop(0)
            ended.sequences_ended()
            ended.settle(took)
    for ended, took in running:
        ended.settle(took)
    for begin, _ in used:
        assert sum(tokens for at, tokens in used if begin <= at < begin + 60.0) <= limit


@given(amounts=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=20))
def test_what_is_given_back_is_as_if_it_had_never_been_charged(amounts: list[tuple[int, int]]) -> None:
    corrected, exact = Window(), Window()
    charges = [corrected.add(max(pair), float(at)) for at, pair in enumerate(amounts)]
    for at, pair in enumerate(amounts):
        exact.add(min(pair), float(at))
    for charge, pair in zip(charges, amounts, strict=True):
        corrected.correct(charge, min(pair), 20.0)

    for now in (20.0, 60.0, 65.5, 80.0):
        corrected.forget(now)
        exact.forget(now)
        assert corrected.total == exact.total
        assert corrected.seconds_until(0, now) == exact.seconds_until(0, now)


@given(amounts=st.lists(st.integers(1, 50), min_size=1, max_size=20), most=st.integers(0, 100))
def test_after_the_time_that_is_told_there_is_room_and_not_before(amounts: list[int], most: int) -> None:
    window = Window()
    for at, amount in enumerate(amounts):
        window.add(amount, float(at))
    now = float(len(amounts))
    wait = window.seconds_until(most, now)

    assert wait <= WINDOW_SECONDS
    if wait > 0:
        window.forget(now + wait - 0.5)
        assert window.total > most
    window.forget(now + wait)
    assert window.total <= most


def test_what_has_no_limit_does_not_pile_up() -> None:
    clock = Clock()
    limiter = Limiter(lambda _: (Quotas(tokens=10**9), Quotas()), clock)
    caller = Caller("ob-1", "acme", frozenset())
    for _ in range(1000):
        clock.now += 1.0
        limiter.enter(caller).admit(1, 1)
    (account,) = limiter._accounts.values()
    assert len(account.requests._charges) == len(account.tokens._charges) == 60


def test_accounts_of_keys_that_ask_no_more_do_not_pile_up() -> None:
    clock = Clock()
    limiter = Limiter(lambda _: (Quotas(tokens=10**9), Quotas()), clock)
    for number in range(10_000):
        clock.now += 1.0
        ticket = limiter.enter(Caller(f"ob-{number}", "acme", frozenset()))
        ticket.admit(10, 1)
        ticket.sequences_ended()
        ticket.settle(10)
    assert 60 <= len(limiter._accounts) <= 150


def test_an_account_counts_what_a_ticket_adds_that_had_it_while_it_was_idle() -> None:
    clock = Clock()
    limiter = Limiter(lambda _: (Quotas(tokens=100), Quotas()), clock)
    caller = Caller("slow", "acme", frozenset())
    ticket = limiter.enter(caller)
    for number in range(1000):
        clock.now += 1.0
        limiter.enter(Caller(f"ob-{number}", "acme", frozenset()))
    assert ("key", "slow") not in limiter._accounts

    ticket.admit(90, 1)

    with pytest.raises(Limited, match="90 are used"):
        limiter.enter(caller).admit(20, 1)


def test_an_account_whose_rows_other_servers_count_is_kept_until_they_are_told_or_forget_them() -> None:
    clock = Clock()
    limiter = Limiter(lambda _: (Quotas(sequences=10), Quotas()), clock)
    ticket = limiter.enter(Caller("rows", "acme", frozenset()))
    ticket.admit(1, 5)
    clock.now += 100.0
    assert [use.sequences for use in limiter.report_uses()] == [5]
    ticket.sequences_ended()
    ticket.settle(1)
    del ticket
    for number in range(200):
        limiter.enter(Caller(f"ob-{number}", "acme", frozenset()))

    (use,) = [use for use in limiter.report_uses() if use.name == "rows"]
    assert use.sequences == 0


def test_what_an_owner_uses_is_reported_for_the_quotas_it_has_and_as_all_servers_know_it() -> None:
    clock = Clock()
    quotas = Quotas(requests=10, tokens=100, sequences=4, bytes=9)
    limiter, elsewhere = (Limiter(lambda _: (quotas, Quotas()), clock) for _ in range(2))
    for one in (limiter, elsewhere):
        one.enter(Caller("ob-1", "acme", frozenset())).admit(30, 2)
    limiter.hear(("elsewhere", use) for use in elsewhere.report_uses())

    assert limiter.used("key", "ob-1", quotas) == {"requests": 2, "tokens": 60, "sequences": 4}
    assert limiter.used("key", "ob-1", Quotas(tokens=100)) == {"tokens": 60}
    assert limiter.used("tenant", "ob-1", quotas) == {"requests": 0, "tokens": 0, "sequences": 0}
    clock.now += WINDOW_SECONDS
    assert limiter.used("key", "ob-1", quotas) == {"requests": 0, "tokens": 0, "sequences": 2}


def test_what_is_used_beyond_the_estimate_counts_from_then_on() -> None:
    window = Window()
    charge = window.add(10, 0.0)
    window.correct(charge, 25, 50.0)
    assert window.total == 25
    window.forget(60.0)
    assert window.total == 15
    window.forget(110.0)
    assert window.total == 0
    window.correct(charge, 5, 120.0)  # what has left the window cannot be given back to it
    assert window.total == 0


def test_a_refused_request_takes_nothing_and_what_never_ran_gives_all_back() -> None:
    clock = Clock()
    of_key, of_tenant = Quotas(requests=3), Quotas(tokens=100, sequences=2)
    limiter = Limiter(lambda _: (of_key, of_tenant), clock)
    caller = Caller("ob-1", "acme", frozenset())

    ticket = limiter.enter(caller)
    for tokens, rows, kind in ((101, 1, QuotaExceededError), (50, 3, QuotaExceededError)):
        with pytest.raises(kind):
            ticket.admit(tokens, rows)
    ticket.admit(60, 2)
    with pytest.raises(
        Limited, match=r"sequences: tenant 'acme' may have 2 sequences .completions. at once: 2 are running"
    ):
        limiter.enter(caller)
    ticket.sequences_ended()
    second = limiter.enter(caller)
    with pytest.raises(Limited, match=r"tokens: .* 60 are used, and this request counts 41") as refused:
        second.admit(41, 1)
    assert refused.value.retry_after == 60.0
    second.refund_request()
    ticket.close()
    assert limiter.enter(caller).headers() == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "1m0s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "100",
        "x-ratelimit-reset-tokens": "0s",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.0001, "1ms"), (0.12, "120ms"), (1, "1s"), (8.64, "8.64s"), (59.9999, "1m0s"),
        (60, "1m0s"), (360, "6m0s"), (61.5, "1m1.5s"),
    ],
)  # fmt: skip
def test_a_time_is_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rows_of_batches_take_half_of_a_quota_and_leave_the_rest_to_requests() -> None:
    clock = Clock()
    limiter = Limiter(lambda _: (Quotas(), Quotas(requests=10, tokens=100, sequences=4)), clock)
    live = Caller("ob-1", "acme", frozenset())
    batch = replace(live, background=True)
    rows = [limiter.enter(batch) for _ in range(2)]
    for ticket in rows:
        ticket.admit(10, 1)
    with pytest.raises(Limited, match="sequences") as waits:
        limiter.enter(batch)
    assert waits.value.retry_after == 1.0
    asked = limiter.enter(live)
    asked.admit(70, 2)
    for ticket in (*rows, asked):
        ticket.sequences_ended()
    with pytest.raises(Limited, match="tokens") as waits:
        limiter.enter(batch)
    clock.now += waits.value.retry_after or 0.0
    with pytest.raises(QuotaExceededError):
        limiter.enter(batch).admit(101, 1)
    limiter.enter(batch).admit(100, 4)


# ---- several servers ----------------------------------------------------------------------------


Move = tuple[float, int, int, bool]
MOVES = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.125, 1.0, 7.5, 29.0, 59.5, 60.0]),
        st.integers(0, 1),
        st.integers(1, 60),
        st.booleans(),
    ),
    max_size=40,
)


def exchange(limiters: list[Limiter]) -> None:
    """Each hears what the others have let in since it was told last."""
    told = [limiter.report_uses() for limiter in limiters]
    for number, limiter in enumerate(limiters):
        limiter.hear((f"process-{n}", use) for n, uses in enumerate(told) if n != number for use in uses)


@given(limit=st.integers(1, 100), moves=MOVES)
def test_servers_let_in_no_more_than_the_limit_but_for_what_they_have_not_told(
    limit: int, moves: list[Move]
) -> None:
    """Their clocks are not the same. The last of a move: whether they exchange what they let in before it."""
    clocks = [Clock(), Clock()]
    clocks[1].now += 12345.6
    limiters = [Limiter(lambda _: (Quotas(tokens=limit), Quotas()), clock) for clock in clocks]
    caller = Caller("ob-1", "acme", frozenset())
    let_in: list[tuple[float, int, int]] = []
    not_told: list[tuple[float, int, int]] = []
    for pause, server, wanted, told in moves:
        for clock in clocks:
            clock.now += pause
        if told:
            exchange(limiters)
            not_told = []
        now = clocks[0].now
        try:
            ticket = limiters[server].enter(caller)
            ticket.admit(wanted, 1)
        except Limited as refused:
            for clock in clocks:
                clock.now += refused.retry_after or 0.0
            limiters[server].enter(caller).refund_request()  # one token at least is free then
            continue
        except QuotaExceededError:
            continue
        ticket.sequences_ended()
        ticket.settle(wanted)
        let_in.append((now, server, wanted))
        not_told.append((now, server, wanted))
        unknown = [one for one in not_told if one[1] != server]
        known = [one for one in let_in if now - 60.0 < one[0] and one not in unknown]
        assert sum(tokens for _, _, tokens in known) <= limit


def test_rows_that_run_on_other_servers_count_until_they_end_or_nothing_is_heard_for_a_minute() -> None:
    clock = Clock()
    one, other = (Limiter(lambda _: (Quotas(), Quotas(sequences=2)), clock) for _ in range(2))
    caller = Caller("ob-1", "acme", frozenset())
    tickets = [one.enter(caller) for _ in range(2)]
    for ticket in tickets:
        ticket.admit(5, 1)
    exchange([one, other])
    with pytest.raises(Limited, match="2 are running"):
        other.enter(caller)
    tickets[0].sequences_ended()
    exchange([one, other])
    other.enter(caller).close()
    with pytest.raises(Limited):
        other.enter(caller).admit(1, 2)
    for _ in range(4):
        clock.now += 25.0
        exchange([one, other])  # told again, though nothing has changed
    with pytest.raises(Limited):
        other.enter(caller).admit(1, 2)
    clock.now += 61.0
    other.enter(caller).admit(1, 2)


def test_the_time_and_the_room_that_are_told_are_those_of_all_servers() -> None:
    clock = Clock()
    one, other = (Limiter(lambda _: (Quotas(requests=3), Quotas()), clock) for _ in range(2))
    caller = Caller("ob-1", "acme", frozenset())
    one.enter(caller)
    clock.now += 20.0
    one.enter(caller)
    exchange([one, other])
    assert other.enter(caller).headers() == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    with pytest.raises(Limited) as refused:
        other.enter(caller)
    assert refused.value.retry_after == 40.0
    uses = other.report_uses()
    assert not other.report_uses()
    other.report_again(uses)
    assert [use.requests for use in other.report_uses()] == [((0.0, 1),)]


# ---- a server -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def admin(keys: Keys) -> str:
    return keys.make("admin", tenant="operator")


@pytest.fixture(scope="module")
def server(serve_scripted: Starter, keys: Keys, admin: str) -> Iterator[Server]:
    with serve_scripted("words", data_dir=keys.file.parent) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> str:
    """A tenant of the test's own."""
    return f"t-{abs(hash(request.node.name)) % 10**8}"


def known(server: Server, key: str) -> str:
    """The key, once the server has read it."""
    server.wait_for(
        lambda: httpx2.get(f"{server.url}/version", headers=bearer(key), timeout=60).status_code == 200
    )
    return key


def ask(http: httpx2.Client, key: str, path: str = "/generate", **body: Any) -> httpx2.Response:
    defaults = (
        {"prompt": "word", "max_tokens": 2} if path == "/generate" else {"model": BASE, "max_tokens": 2}
    )
    return http.post(path, json={**defaults, **body}, headers=bearer(key))


def refused(answer: httpx2.Response, code: str, quota: str, of: str) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    found = (answer.status_code, error["code"], error["quota"], error["of"])
    assert found == (429, code, quota, of), answer.text
    assert error["message"].startswith(f"{quota}: ")
    if code == "rate_limit_exceeded":
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert "Try again in" in error["message"]
    else:
        assert "retry-after" not in answer.headers
        assert answer.headers["x-should-retry"] == "false"
    return error


def test_requests_of_a_key_end_at_its_quota_and_those_of_others_do_not(
    server: Server, http: httpx2.Client, keys: Keys, tenant: str
) -> None:
    limited = keys.make("generate", tenant=tenant, quotas={"requests": 2})
    free = known(server, keys.make("generate", tenant=tenant))
    for left in ("1", "0"):
        answer = ask(http, limited)
        assert answer.status_code == 200
        assert [answer.headers[name] for name in HEADERS[:2]] == ["2", left]
        assert answer.headers[HEADERS[2]].endswith("s")
        assert "x-ratelimit-limit-tokens" not in answer.headers

    error = refused(ask(http, limited), "rate_limit_exceeded", "requests", "key")
    assert error["limit"] == 2
    assert keys.record(limited).id in error["message"]
    assert "onebase keys set" in error["message"]
    broken = http.post("/generate", content=b"{", headers=bearer(limited))
    assert broken.status_code == 429  # before anything of the body is read
    answer = ask(http, free)
    assert answer.status_code == 200
    assert not set(HEADERS) & set(answer.headers)


def test_a_body_that_is_announced_too_large_counts_as_a_request_and_its_answer_says_so(
    server: Server, http: httpx2.Client, keys: Keys, tenant: str
) -> None:
    limited = known(server, keys.make("generate", tenant=tenant, quotas={"requests": 2, "sequences": 1}))

    answers = [http.post("/generate", content=b"w" * 2_000_001, headers=bearer(limited)) for _ in range(2)]

    told = [(answer.status_code, *(answer.headers[name] for name in HEADERS[:2])) for answer in answers]
    assert told == [(413, "2", "1"), (413, "2", "0")]
    refused(ask(http, limited), "rate_limit_exceeded", "requests", "key")


def test_the_requests_of_all_keys_of_a_tenant_count_together_and_another_tenant_learns_nothing(
    server: Server, http: httpx2.Client, keys: Keys, admin: str, tenant: str
) -> None:
    first, second = (keys.make("generate", tenant=tenant, quotas={"requests": 10}) for _ in range(2))
    other = keys.make("generate", tenant=f"{tenant}-other")
    keys.tenants.set_quotas(tenant, {"requests": 2})
    known(server, other)
    assert ask(http, first).status_code == 200
    answer = ask(http, second)
    assert [answer.headers[name] for name in HEADERS[:2]] == ["2", "0"]  # the tenant has less left

    for key in (first, second):
        error = refused(ask(http, key), "rate_limit_exceeded", "requests", "tenant")
        assert f"tenant {tenant!r}" in error["message"]

    assert ask(http, other).status_code == 200
    seen = http.get("/v1/tenants", headers=bearer(other)).json()["data"]
    assert [(one["tenant"], one["quotas"]) for one in seen] == [(f"{tenant}-other", {})]
    every = {one["tenant"]: one for one in http.get("/v1/tenants", headers=bearer(admin)).json()["data"]}
    assert (every[tenant]["quotas"], every[tenant]["used"]) == ({"requests": 2}, {"requests": 2})
    of_tenant = [
        one for one in http.get("/v1/keys", headers=bearer(admin)).json()["data"] if one["tenant"] == tenant
    ]
    assert [one["used"] for one in of_tenant] == [{"requests": 1}, {"requests": 1}]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_tokens_are_set_aside_and_what_was_not_used_is_given_back(
    server: Server,
    http: httpx2.Client,
    keys: Keys,
    tenant: str,
    path: str,
    stream: bool,
) -> None:
    key = known(server, keys.make("generate", tenant=f"{tenant}-{stream}", quotas={"tokens": 500}))
    prompt = {"messages": [{"role": "user", "content": "word"}]} if "chat" in path else {"prompt": "word"}
    answer = ask(http, key, path, **prompt, max_tokens=3, stream=stream)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-ratelimit-limit-tokens"] == "500"
    told = int(answer.headers["x-ratelimit-remaining-tokens"])
    if not stream:
        usage = answer.json()["usage"]
        assert told == 500 - usage["prompt_tokens"] - usage["completion_tokens"]

    stopped = ask(http, key, path, **prompt, max_tokens=200, stop=" " if "chat" in path else "w")
    usage = stopped.json()["usage"]
    assert usage["completion_tokens"] < 200
    used = usage["prompt_tokens"] + usage["completion_tokens"]
    assert int(stopped.headers["x-ratelimit-remaining-tokens"]) == told - used

    error = refused(ask(http, key, path, **prompt, max_tokens=600), "insufficient_quota", "tokens", "key")
    assert "Lower max_tokens" in error["message"]
    error = refused(
        ask(http, key, path, **prompt, max_tokens=told - used), "rate_limit_exceeded", "tokens", "key"
    )
    assert "are used, and this request counts" in error["message"]


def test_a_request_without_max_tokens_sets_aside_what_is_usual_and_pays_what_it_took(
    server: Server, http: httpx2.Client, keys: Keys, tenant: str
) -> None:
    key = known(server, keys.make("generate", tenant=tenant, quotas={"tokens": 300}))
    body = {"messages": [{"role": "user", "content": "word"}], "model": BASE, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body, headers=bearer(key)) as answer:
        assert answer.status_code == 200
        left = int(answer.headers["x-ratelimit-remaining-tokens"])
        assert 0 <= left <= 300 - 256
        lines = (line for line in answer.iter_lines() if '"content"' in line)
        for _ in range(60):
            next(lines)
    # It was left: what is not computed is given back.
    server.wait_for(lambda: ask(http, key, max_tokens=1).status_code == 200)
    assert int(ask(http, key, max_tokens=1).headers["x-ratelimit-remaining-tokens"]) <= 300 - 60


def test_a_stream_that_is_left_gives_back_its_rows_and_its_tokens(
    server: Server, http: httpx2.Client, keys: Keys, tenant: str
) -> None:
    key = known(server, keys.make("generate", tenant=tenant, quotas={"tokens": 50_000, "sequences": 4}))
    body = {"prompt": "word", "max_tokens": 10_000, "n": 2, "stream": True}
    with http.stream("POST", "/generate", json=body, headers=bearer(key)) as first:
        with http.stream("POST", "/generate", json=body, headers=bearer(key)) as second:
            assert (first.status_code, second.status_code) == (200, 200)
            lines = second.iter_lines()  # kept: a stream whose lines are let go of is closed
            next(lines)
            error = refused(ask(http, key, max_tokens=1), "rate_limit_exceeded", "sequences", "key")
            assert "4 are running" in error["message"]
            assert int(second.headers["x-ratelimit-remaining-tokens"]) < 50_000 - 40_000

        server.wait_for(lambda: ask(http, key, max_tokens=1, n=2).status_code == 200)
        refused(ask(http, key, max_tokens=1, n=3), "rate_limit_exceeded", "sequences", "key")
        left = int(ask(http, key, max_tokens=1).headers["x-ratelimit-remaining-tokens"])
        assert 20_000 < left < 30_000

    server.wait_for(lambda: ask(http, key, max_tokens=1, n=4).status_code == 200)
    assert int(ask(http, key, max_tokens=1).headers["x-ratelimit-remaining-tokens"]) > 40_000
    error = refused(ask(http, key, max_tokens=1, n=5), "insufficient_quota", "sequences", "key")
    assert "Lower n" in error["message"]


def test_texts_that_are_read_have_as_many_rows_at_once_as_the_key_may_have(
    server: Server, http: httpx2.Client, keys: Keys, tenant: str
) -> None:
    key = known(server, keys.make("generate", tenant=tenant, quotas={"sequences": 2, "tokens": 100}))
    body = {"input": [[5, 6]] * 7}
    answer = http.post("/v1/embeddings", json=body, headers=bearer(key))
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == 7
    assert ask(http, key, max_tokens=1, n=2).status_code == 200, "all places are given back"


def test_one_tenants_refusals_cost_others_nothing_and_a_change_holds_within_a_second(
    server: Server, http: httpx2.Client, keys: Keys, admin: str, tenant: str
) -> None:
    key = keys.make("generate", tenant=tenant)
    keys.tenants.set_quotas(tenant, {"requests": 0})
    known(server, key)
    for _ in range(50):
        refused(ask(http, key), "insufficient_quota", "requests", "tenant")

    body = {"quotas": {"requests": 3, "sequences": 2}}
    changed = http.post(f"/v1/tenants/{tenant}", json=body, headers=bearer(admin))
    assert changed.json()["quotas"] == {"requests": 3, "sequences": 2}
    assert ask(http, key).headers["x-ratelimit-remaining-requests"] == "2"  # at once; refusals did not count
    keys.tenants.set_quotas(tenant, {"requests": None})  # by the command: within a second
    server.wait_for(
        lambda: "x-ratelimit-limit-requests" not in ask(http, key, max_tokens=0, echo=True).headers
    )


def test_an_operator_changes_a_key_over_http(
    server: Server, http: httpx2.Client, admin: str, tenant: str
) -> None:
    body = {"tenant": tenant, "scopes": ["generate"], "quotas": {"sequences": 3}, "priority": 4}
    made = http.post("/v1/keys", json=body, headers=bearer(admin)).json()
    assert (made["quotas"], made["priority"]) == ({"sequences": 3}, 4)
    place = f"/v1/keys/{made['id']}"
    changed = http.post(place, json={"quotas": {"tokens": 9}}, headers=bearer(admin)).json()
    assert (changed["quotas"], changed["priority"]) == ({"tokens": 9, "sequences": 3}, 4)
    changed = http.post(
        place, json={"quotas": {"sequences": None}, "priority": -1}, headers=bearer(admin)
    ).json()
    assert (changed["quotas"], changed["priority"]) == ({"tokens": 9}, -1)
    listed = http.get("/v1/keys", headers=bearer(admin)).json()["data"]
    assert [one["priority"] for one in listed if one["id"] == made["id"]] == [-1]
    for wrong, param in (
        ({"quotas": {"bytes": 1}}, "quotas.bytes"),
        ({"quotas": {"sequences": -1}}, "quotas.sequences"),
        ({"priority": 5}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"quotas": {"sequences": "many"}}, "quotas"),
    ):
        answer = http.post(place, json=wrong, headers=bearer(admin))
        assert answer.status_code == 400
        assert param in answer.json()["error"]["message"]
    assert http.post("/v1/keys/ob-0", json={}, headers=bearer(admin)).status_code == 404


def test_both_clients_wait_as_long_as_they_are_told_and_give_up_where_that_does_not_help(
    server: Server, keys: Keys, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = known(server, keys.make("generate", tenant=tenant, quotas={"requests": 1, "tokens": 1000}))
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with Client(server.url, api_key=key, max_retries=1) as client:
        assert client.generate("word", max_tokens=2).text
        with pytest.raises(RateLimitError, match="requests: API key") as told:
            client.generate("word", max_tokens=2)
        assert told.value.code == "rate_limit_exceeded"
        assert (told.value.retry_after or 0) >= 30
        assert len(slept) == 1
        assert slept[0] >= 30
        keys.registry.change(keys.record(key).id, {"requests": None})
        server.wait_for(lambda: "rate" not in said(client, max_tokens=2000))
        slept.clear()
        assert said(client, max_tokens=2000) == "insufficient_quota"
        assert slept == []
    keys.registry.change(keys.record(key).id, {"requests": 0})
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=2) as client:
        with pytest.raises(openai.RateLimitError) as refusal:
            client.completions.create(model=BASE, prompt="word", max_tokens=2000)
        assert refusal.value.code == "insufficient_quota"
        assert slept == []


def endless() -> Iterator[bytes]:
    """More than anyone should send before being told that it is too much."""
    for _ in range(1000):
        yield b"x" * 65536


def said(client: Client, **sampling: Any) -> str:
    try:
        client.generate("word", **sampling)
    except RateLimitError as error:
        return error.code or ""
    return ""


def test_what_a_tenant_keeps_is_limited_and_the_answer_says_how(
    server: Server, http: httpx2.Client, keys: Keys, tenant: str
) -> None:
    key = known(server, keys.make("adapters", "train", tenant=tenant))
    with client_with(server, key) as mine:
        assert upload(mine, "one", b"first weights").status_code == 200
        keys.tenants.set_quotas(tenant, {"adapters": 1, "bytes": 10_000})

        answer = upload(mine, "two", b"other weights")
        assert answer.status_code == 429
        error = answer.json()["error"]
        assert (error["code"], error["quota"], error["limit"]) == ("insufficient_quota", "adapters", 1)
        assert answer.headers["x-should-retry"] == "false"
        assert upload(mine, "one", b"more weights").status_code == 200
        assert upload(mine, "one", b"x" * 10_000).json()["error"]["quota"] == "bytes"
        big = {"file": ("a.jsonl", b"x" * 10_000)}
        answer = mine.post("/v1/files", data={"purpose": "fine-tune"}, files=big)
        assert (answer.status_code, answer.json()["error"]["quota"]) == (429, "bytes")
        # Of a body whose length is not announced nothing is read, once the server has seen the quota.
        form = {"Content-Type": "multipart/form-data; boundary=x"}
        server.wait_for(
            lambda: (
                mine.post("/v1/files", content=endless(), headers=form).json()["error"].get("quota")
                == "bytes"
            )
        )
        assert mine.get("/v1/files").json()["data"] == []
        assert [one["id"] for one in mine.get("/v1/adapters").json()["data"]] == ["one"]


def test_a_job_ends_when_its_tenant_has_trained_long_enough_and_goes_on_when_it_may(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    keys = Keys(tmp_path)
    key = keys.make("train", "adapters", tenant="acme")
    with serve_scripted("words", data_dir=tmp_path) as server, client_with(server, key) as http:
        file = http.post(
            "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", b"slow")}
        ).json()
        body = {"model": BASE, "training_file": file["id"], "seed": 1}
        job = http.post("/v1/fine_tuning/jobs", json=body).json()
        place = f"/v1/fine_tuning/jobs/{job['id']}"

        def status() -> str:
            return str(http.get(place).json()["status"])

        server.wait_for(lambda: status() == "running")
        keys.tenants.set_quotas("acme", {"training_seconds": 1})
        server.wait_for(lambda: status() == "failed")
        failed = http.get(place).json()
        assert failed["error"]["code"] == "insufficient_quota"
        assert "'acme' has trained for 1 seconds" in failed["error"]["message"]
        assert failed["resumable"]
        for answer in (http.post("/v1/fine_tuning/jobs", json=body), http.post(f"{place}/resume")):
            assert (answer.status_code, answer.json()["error"]["quota"]) == (429, "training_seconds")

        keys.tenants.set_quotas("acme", {"training_seconds": None})
        assert http.post(f"{place}/resume").status_code == 200
        server.wait_for(lambda: status() == "running")
        (used,) = http.get("/v1/usage?group_by=adapter").json()["data"]
        assert used["adapter"] == failed["fine_tuned_model"] or used["training_seconds"] >= 1
        assert json.dumps(used)
    keys.close()
