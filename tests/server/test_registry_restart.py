"""PostgreSQL is restarted under a server: what runs goes on, what needs it waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from tests.postgres import PostgresServer, postgres_server

from onebase_adapters.registry import ApiKeys
from onebase_adapters.registry.database import Database

from .access import bearer
from .support import Server, Starter, pace, upload

STEPS = 400


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


def key_in(url: str) -> dict[str, str]:
    """The headers of an operator, for whom there is a key now."""
    database = Database(url)
    database.migrate()
    try:
        return bearer(ApiKeys(database).create("default", ["admin"])[1])
    finally:
        database.close()


def changes(http: httpx2.Client) -> list[httpx2.Response]:
    """What only the registry can do."""
    file = {"file": ("a.jsonl", b'{"text": "a"}')}
    return [
        http.post("/v1/adapters/red/deactivate"),
        http.post("/v1/files", data={"purpose": "fine-tune"}, files=file),
        http.get("/v1/fine_tuning/jobs"),
        http.delete("/v1/keys/ob-0"),
    ]


@pytest.mark.parametrize(
    "keys", [True, pytest.param(False, marks=pytest.mark.full)], ids=["with keys", "without keys"]
)
def test_streams_outlive_a_restart_of_the_registry_and_changes_work_again_after_it(
    postgres: PostgresServer, serve_scripted: Starter, tmp_path: Path, keys: bool
) -> None:
    url = postgres.database()
    headers = key_in(url) if keys else {}
    with (
        pace(tmp_path) as (environment, allow),
        serve_scripted("paced", "--registry", url, environment=environment) as server,
        httpx2.Client(base_url=server.url, timeout=300, headers=headers) as http,
    ):
        assert upload(http, "red", b"red", query="wait=true&activate=true").status_code == 200
        body = {"prompt": "some words", "max_tokens": STEPS, "adapter": "red", "stream": True}
        allow(2)
        with http.stream("POST", "/generate", json=body) as stream:
            lines = stream.iter_lines()
            assert "data: " in next(lines)

            postgres.stop()
            try:
                away(server, headers)
                allow(10)
                assert "data: " in next(line for line in lines if line)
                if not keys:
                    answer = http.post("/generate", json={"prompt": "b", "max_tokens": 2, "adapter": "red"})
                    assert (answer.status_code, answer.json()["adapter"][:4]) == (200, "red@")
            finally:
                postgres.start()

            server.wait_for(lambda: [one.status_code for one in changes(http)] == [200, 200, 200, 404])
            allow(STEPS)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert http.get("/v1/adapters/red").json()["active"] is False
        assert server.status_of("/ready") == 200


def away(server: Server, headers: dict[str, str]) -> None:
    """The server says of each change that it cannot be made now, and when to try again; it is healthy."""
    with httpx2.Client(base_url=server.url, timeout=60, headers=headers) as http:
        places = ["/v1/fine_tuning/jobs", *(["/version"] if headers else [])]
        server.wait_for(lambda: {http.get(place).status_code for place in places} == {503})
        for answer in [*changes(http), *map(http.get, places)]:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "registry_unavailable")
            assert int(answer.headers["retry-after"]) > 0
            assert "postgres@" not in answer.text
    assert (server.status_of("/health"), server.status_of("/ready")) == (200, 200)
