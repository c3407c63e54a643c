"""A tenant whose requests take more of the processor than its share waits, while others' requests run."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from onebase_edge.background import Threads
from onebase_edge.cross_site import CrossSiteMiddleware
from onebase_edge.settings import Settings
from onebase_engine.machine import count_seconds
from onebase_server.http.authorization import AuthenticationMiddleware
from onebase_server.http.deps import CALLER
from onebase_server.tenancy.access import Caller
from onebase_server.tenancy.pacing import ALLOWANCE_SECONDS, REFUSAL_SECONDS, RequestPacer, charged

NEVER = 1e-9
"""Share of a tenant that does not pay what it owes while a test runs."""
MUCH = 2 * ALLOWANCE_SECONDS
MANY = int(MUCH / REFUSAL_SECONDS)
"""Refusals that nobody may owe."""


def compute(seconds: float) -> None:
    """Take so much processor time of this thread."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class Requests:
    """Requests of tenants; `begun` has them in the order in which they began."""

    def __init__(self, pacer: RequestPacer) -> None:
        self.pacer = pacer
        self.begun: list[str] = []

    def start(self, name: str, seconds: float = 0.0, **how: Any) -> asyncio.Task[None]:
        """Begin a request, named by its tenant and a number, that takes so much processor time."""

        async def answer() -> None:
            self.begun.append(name)
            await asyncio.sleep(0)
            compute(seconds)

        return asyncio.create_task(self.pacer.serve(name.split()[0], answer, **how))

    async def run(self, name: str, seconds: float = 0.0, **how: Any) -> None:
        async with asyncio.timeout(30):
            await self.start(name, seconds, **how)

    @asynccontextmanager
    async def stream(self, tenant: str) -> AsyncIterator[None]:
        """A request of a tenant that runs meanwhile."""
        end = asyncio.Event()

        async def answer() -> None:
            await end.wait()

        task = asyncio.create_task(self.pacer.serve(tenant, answer))
        await asyncio.sleep(0)
        try:
            yield
        finally:
            end.set()
            await task


async def settle() -> None:
    """Let everything go on that needs no time."""
    for _ in range(20):
        await asyncio.sleep(0)
    await asyncio.sleep(0.02)


def play(script: Callable[[Requests], Awaitable[None]], share: float = NEVER) -> list[str]:
    async def run() -> list[str]:
        requests = Requests(RequestPacer(share))
        await script(requests)
        return requests.begun

    return asyncio.run(run())


def test_what_a_tenant_took_too_much_its_next_requests_wait_for_until_no_other_runs() -> None:
    async def script(requests: Requests) -> None:
        async with requests.stream("good"):
            await requests.run("evil 1", MUCH)
            waiting = [requests.start("evil 2"), requests.start("evil 3")]
            await settle()
            assert requests.begun == ["evil 1"]
            await requests.run("good 1")
        await asyncio.gather(*waiting)

    assert play(script) == ["evil 1", "good 1", "evil 2", "evil 3"]


def test_a_tenant_that_is_alone_never_waits() -> None:
    async def script(requests: Requests) -> None:
        for number in range(3):
            await requests.run(f"only {number}", MUCH)

    assert len(play(script)) == 3


def test_within_its_share_a_tenant_does_not_wait_beside_others() -> None:
    async def script(requests: Requests) -> None:
        async with requests.stream("good"):
            for number in range(20):
                await requests.run(f"other {number}")

    assert len(play(script)) == 20


def test_a_burst_is_not_let_in_whole_before_its_first_request_has_cost_anything() -> None:
    async def script(requests: Requests) -> None:
        async with requests.stream("good"):
            waiting = [requests.start(f"evil {number}") for number in range(200)]
            await settle()
            assert 10 < len(requests.begun) < 100
        await asyncio.gather(*waiting)

    assert play(script) == [f"evil {number}" for number in range(200)]


def test_what_is_owed_is_paid_with_time_and_is_never_more_than_that_of_a_moment() -> None:
    async def script(requests: Requests) -> None:
        async with requests.stream("good"), requests.stream("evil"):
            requests.pacer.charge("evil", 1e6)
            assert requests.start("evil 1")
            await asyncio.sleep(0)
            assert requests.begun == []
            await requests.run("evil 2")

    assert play(script, share=10.0) == ["evil 1", "evil 2"]


def test_a_request_costs_nothing_any_more_once_it_runs() -> None:
    async def script(requests: Requests) -> None:
        async with requests.stream("good"):
            await requests.run("other 1", MUCH, runs=lambda: True)
            await requests.run("other 2")

    assert play(script) == ["other 1", "other 2"]


def test_threads_are_charged_to_the_tenant_they_compute_for() -> None:
    async def script(requests: Requests) -> None:
        threads = Threads("read", 1)

        async def answer() -> None:
            await threads.run_for("evil", compute, MUCH)

        async with requests.stream("good"):
            await requests.pacer.serve("evil", answer)
            late = requests.start("evil 1")
            await settle()
            assert requests.begun == []
        await late

    play(script)


def test_threads_that_nobody_has_named_a_tenant_to_are_charged_to_the_request_also_after_its_end() -> None:
    async def script(requests: Requests) -> None:
        threads = Threads("disk", 1)
        works: list[asyncio.Task[None]] = []

        async def answer() -> None:
            works.append(asyncio.create_task(threads.run_blocking(compute, MUCH)))

        async with requests.stream("good"):
            await requests.pacer.serve("evil", answer)
            await threads.run_blocking(compute, MUCH)  # on nobody's behalf
            await asyncio.gather(*works)
            late = requests.start("evil 1")
            await requests.run("good 1")
            await settle()
            assert requests.begun == ["good 1"]
        await late

    play(script)


def test_what_another_process_computes_for_a_request_is_charged_too() -> None:
    async def script(requests: Requests) -> None:
        threads = Threads("disk", 1)

        async def answer() -> None:
            await threads.run_blocking(count_seconds, MUCH)

        async with requests.stream("good"):
            await requests.pacer.serve("evil", answer)
            late = requests.start("evil 1")
            await settle()
            assert requests.begun == []
        await late

    play(script)


def test_requests_that_cost_much_are_let_in_one_by_one_once_that_is_known() -> None:
    """Each is charged in a thread, after the next ones have come."""
    costly = ALLOWANCE_SECONDS / 4

    async def script(requests: Requests) -> None:
        threads = Threads("read", 1)
        begun: list[int] = []

        async def answer(number: int) -> None:
            begun.append(number)
            await threads.run_for("evil", compute, costly)

        for number in range(20):  # while nobody else is there
            await requests.pacer.serve("evil", partial(answer, number))
        requests.pacer._accounts["evil"].debt = 0.0
        begun.clear()
        async with requests.stream("good"):
            burst = [
                asyncio.create_task(requests.pacer.serve("evil", partial(answer, number)))
                for number in range(20)
            ]
            await settle()
            assert len(begun) < 10
        await asyncio.gather(*burst)

    play(script)


def test_a_request_that_is_given_up_while_it_waits_holds_up_no_other() -> None:
    async def script(requests: Requests) -> None:
        async with requests.stream("good"):
            await requests.run("evil 1", MUCH)
            given_up, other = requests.start("evil 2"), requests.start("evil 3")
            await settle()
            given_up.cancel()
            await asyncio.wait([given_up])
        async with asyncio.timeout(30):
            await other

    assert play(script) == ["evil 1", "evil 3"]


def test_errors_and_cancellation_reach_a_request_and_its_caller() -> None:
    async def script(requests: Requests) -> None:
        seen: list[str] = []

        async def fail() -> None:
            try:
                await asyncio.sleep(600)
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise ValueError("said") from None

        task = asyncio.create_task(requests.pacer.serve("one", fail))
        await settle()
        task.cancel()
        with pytest.raises(ValueError, match="said"):
            await task
        assert seen == ["cancelled"]
        await requests.run("one 1")

    assert play(script) == ["one 1"]


@pytest.mark.parametrize(("scopes", "begun"), [({"generate", "adapters"}, 1), ({"admin"}, 3)])
def test_the_server_paces_tenants_and_not_those_who_operate_it(scopes: set[str], begun: int) -> None:
    """A refusal is charged like any answer."""
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        compute(MUCH)

    async def serve(app: Any, scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    async def admit(scope: Any) -> None:
        scope[CALLER] = Caller("key", "evil", frozenset(scopes))  # type: ignore[arg-type]

    async def script(requests: Requests) -> None:
        services: Any = SimpleNamespace(pacer=requests.pacer, tracing=SimpleNamespace(serve=serve))
        middleware = AuthenticationMiddleware(app, SimpleNamespace(admit=admit), services)  # type: ignore[arg-type]

        async def answer(number: int) -> None:
            scope = {"type": "http", "method": "GET", "path": f"/{number}", "headers": []}
            await middleware(scope, None, None)  # type: ignore[arg-type]

        async with requests.stream("good"):
            tasks = [asyncio.create_task(answer(number)) for number in range(3)]
            await settle()
            assert len(seen) == begun
        await asyncio.gather(*tasks)
        assert seen == ["/0", "/1", "/2"]

    play(script)


def test_of_requests_that_arrive_while_one_was_just_let_in_each_pays_before_the_next() -> None:
    async def script(requests: Requests) -> None:
        async with requests.stream("good"):
            account = requests.pacer._account("evil")
            account.mean = account.debt = ALLOWANCE_SECONDS / 2
            account.timer = asyncio.get_running_loop().call_later(0.001, requests.pacer._wake, account)
            account.waiting.append(asyncio.get_running_loop().create_future())
            waiting = [requests.start(f"evil {number}") for number in range(20)]
            await settle()
            assert len(requests.begun) < 5
        await asyncio.gather(*waiting)

    play(script)


def test_refusals_of_all_clients_together_wait_for_their_turn_beside_requests_of_tenants() -> None:
    """Whether they have a key, or which address they come from, makes no difference."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("what is refused does not reach the app")

    async def script(requests: Requests) -> None:
        answers: Counter[tuple[str, int]] = Counter()
        door = CrossSiteMiddleware(app, Settings(), answers=answers, pacer=requests.pacer)
        most = int(ALLOWANCE_SECONDS / REFUSAL_SECONDS) + 2

        def request(number: int) -> dict[str, Any]:
            headers = [(b"host", b"evil.example")]
            return {
                "type": "http", "method": "GET", "path": "/", "headers": headers,
                "client": (f"203.0.113.{number % 250}", 1), "http_version": "1.1",
            }  # fmt: skip

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                sent.append(message["status"])

        sent: list[int] = []
        assert all(door.turned_away(request(number)) for number in range(2 * most)), "nobody else is there"
        requests.pacer._refused.debt = 0.0
        async with requests.stream("good"):
            asked = [request(number) for number in range(2 * most)]
            late = [one for one in asked if door.turned_away(one) is None]
            assert most <= len(late) < 2 * most
            tasks = [asyncio.create_task(door(one, None, send)) for one in late]  # type: ignore[arg-type]
            await settle()
            assert sent == []
            await requests.run("good 1")
        await asyncio.gather(*tasks)
        assert sent == [403] * len(late)
        assert answers["none", 403] == 4 * most

    assert play(script) == ["good 1"]


def test_refusals_that_wait_are_no_requests_for_which_a_tenant_has_to_wait() -> None:
    async def script(requests: Requests) -> None:
        async with requests.stream("good"):
            owed = [requests.pacer.refuse(None) for _ in range(MANY)]
            assert owed[0]
            assert not owed[-1]
            turn = asyncio.create_task(requests.pacer.wait_to_refuse(None))
            await settle()
        requests.pacer._refused.debt = 0.5
        await requests.run("only 1", MUCH)
        await requests.run("only 2", MUCH)
        await turn

    assert play(script) == ["only 1", "only 2"]


def test_refusals_of_a_tenants_key_are_charged_to_it_and_delay_nobody_elses() -> None:
    async def script(requests: Requests) -> None:
        async with requests.stream("good"):
            assert not all(requests.pacer.refuse("evil") for _ in range(MANY))
            assert requests.pacer.refuse(None)
            assert requests.pacer.refuse("third")

    play(script)


def test_parts_of_a_request_in_tasks_of_their_own_are_charged_to_its_tenant() -> None:
    async def script(requests: Requests) -> None:
        async def part() -> int:
            await asyncio.sleep(0)
            compute(MUCH)
            return 7

        async def answer() -> None:
            assert await asyncio.create_task(charged(part())) == 7

        await requests.pacer.serve("evil", answer)
        assert requests.pacer._account("evil").debt > ALLOWANCE_SECONDS

    play(script)


def test_requests_that_leave_while_they_wait_do_not_make_later_ones_look_cheap() -> None:
    async def script(requests: Requests) -> None:
        async with requests.stream("good"):
            await requests.run("evil 0", MUCH)
            mean = requests.pacer._account("evil").mean
            for number in range(1, 60):
                left = requests.start(f"evil {number}")
                await asyncio.sleep(0)
                left.cancel()
            await settle()
            assert requests.pacer._account("evil").mean == mean

    play(script)
