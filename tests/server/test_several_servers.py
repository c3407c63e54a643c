"""Servers that share a registry and a store: quotas hold on all, and jobs go on where a server is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from .access import Keys, bearer
from .support import Server, Starter

LEASE = {"ONEBASE_TEST_LEASE": "3"}
BASE = "smollm2-135m-instruct"


def shared(folder: Path) -> tuple[str, ...]:
    """Options of servers that share all that is in a folder."""
    return (
        "--registry", f"sqlite:///{folder / 'registry.db'}", "--store", str(folder / "store"),
        "--sync-seconds", "0.1",
    )  # fmt: skip


# ---- quotas -------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    made = Keys(tmp_path)
    yield made
    made.close()


def ask(server: Server, key: str) -> httpx2.Response:
    return httpx2.post(
        f"{server.url}/generate", json={"prompt": "word", "max_tokens": 2}, headers=bearer(key), timeout=60
    )


def test_a_quota_holds_for_what_all_servers_let_in(
    serve_scripted: Starter, keys: Keys, tmp_path: Path
) -> None:
    limited, free = keys.make("generate", quotas={"requests": 40}), keys.make("generate")
    options = shared(tmp_path)
    with (
        serve_scripted("words", *options, environment=LEASE) as one,
        serve_scripted("words", *options, environment=LEASE) as other,
    ):
        assert [ask(one, limited).status_code for _ in range(3)] == [200, 200, 200]
        let_in = 0

        def knows_of_all() -> bool:
            nonlocal let_in
            answer = ask(other, limited)
            let_in += answer.status_code == 200
            time.sleep(0.2)
            return int(answer.headers["x-ratelimit-remaining-requests"]) == 40 - 3 - let_in

        other.wait_for(knows_of_all, 50)
        while (refused := ask(other, limited)).status_code == 200:
            let_in += 1
        assert let_in == 37
        error = refused.json()["error"]
        assert (error["quota"], error["limit"], refused.headers["x-ratelimit-remaining-requests"]) == (
            "requests", 40, "0",
        )  # fmt: skip
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        one.wait_for(lambda: ask(one, limited).status_code == 429, 50)
        assert ask(one, free).status_code == ask(other, free).status_code == 200
