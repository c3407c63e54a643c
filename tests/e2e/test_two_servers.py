"""Two servers on one PostgreSQL and one object store: what is proved at one is served by both, and each is
told of what the other changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import httpx2
import pytest
from tests.forks import Nursery
from tests.object_store import object_store
from tests.postgres import postgres_server
from tests.server.conftest import make_adapter
from tests.server.support import Server, launch, serving, upload_folder
from tests.training.runs import talking_base

PROMPT = "Three jars of honey for Anna in Lisbon, please."
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small one: what is stored and shared is the same for any."""
    return talking_base(tmp_path_factory.mktemp("base") / "small")


@pytest.fixture(scope="module")
def shared(base: Path) -> Iterator[tuple[list[str], dict[str, str]]]:
    """Options and environment of a server on the shared registry and store."""
    with postgres_server() as postgres, object_store() as bucket:
        environment = CREDENTIALS | {"AWS_ENDPOINT_URL": bucket}
        boto3.client(
            "s3",
            endpoint_url=bucket,
            aws_access_key_id="id",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        ).create_bucket(Bucket="onebase")
        options = ["--registry", postgres.database(), "--store", "s3://onebase/adapters"]
        options += ["--base", str(base), "--sync-seconds", "3600", "--kv-memory", "50MB"]
        options += ["--max-sequences", "4", "--threads", "1"]
        yield options, environment


def text(http: httpx2.Client, adapter: str) -> tuple[str, str]:
    """The text and the version that it came from."""
    messages = [{"role": "user", "content": PROMPT}]
    request: dict[str, Any] = {"messages": messages, "adapter": adapter, "temperature": 0, "max_tokens": 16}
    answer = http.post("/generate", json=request).raise_for_status().json()
    return answer["choices"][0]["text"], answer["adapter"]


def active(http: httpx2.Client) -> str | None:
    """The active version of `live`; None where it is not known, or not active."""
    answer = http.get("/v1/adapters/live")
    return answer.json()["version"] if answer.status_code == 200 else None


def push(http: httpx2.Client, folder: Path, query: str) -> str:
    """Upload a version of `live` and wait until it is proven; its digest."""
    answer = upload_folder(http, "live", folder, query=f"wait=true&{query}")
    assert answer.status_code == 200, answer.text
    digest: str = answer.json()["version"]
    return digest


@pytest.mark.full
def test_servers_on_one_registry_and_store_serve_the_same_versions(
    base: Path, shared: tuple[list[str], dict[str, str]], nursery: Nursery, tmp_path: Path
) -> None:
    options, environment = shared
    start = partial(launch, popen=nursery.popen("forks"))
    calm, loud = (make_adapter(base, tmp_path / str(seed), seed, rank=4) for seed in (1, 2))
    command = [sys.executable, "-m", "onebase_server"]
    with (
        serving(command, *options, environment=environment, start=start) as here,
        serving(command, *options, environment=environment, start=start) as there,
        here.client() as one,
        there.client() as other,
    ):
        first = push(one, calm, "activate=true")
        served = text(other, "live")  # not known there yet: it looks again
        assert served == text(one, "live")
        second = push(other, loud, "activate=false")
        assert served[0] != text(one, f"live@{second}")[0]
        assert active(one) == active(other) == first, "not active before somebody says so"

        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda http: _activate(http, second, first), (one, other)))
        assert sorted(answer.status_code for answer in answers) == [200, 409]
        (lost,) = (answer for answer in answers if answer.status_code == 409)
        assert lost.json()["error"]["current"] == second
        here.wait_for(lambda: active(one) == active(other) == second)

        _kill(here)
        assert other.post("/v1/adapters/live/rollback", json={}).json()["version"] == first
        assert text(other, "live") == served

    with serving(command, *options, environment=environment, start=start) as again, again.client() as http:
        assert active(http) == first
        assert text(http, "live") == served


def _activate(http: httpx2.Client, version: str, expected: str) -> httpx2.Response:
    return http.post("/v1/adapters/live/activate", json={"version": version, "expected": expected})


def _kill(server: Server) -> None:
    server.process.kill()
    server.process.wait()
