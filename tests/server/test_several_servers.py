"""Servers that share a registry and a store: quotas hold on all, and jobs go on where a server is left."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from tests.postgres import postgres_server

from .access import Keys, bearer, client_with
from .support import Server, Starter, upload
from .training_support import ended, job_folder, make_job, messages, openai_client, step_of, wait_job

LEASE = {"ONEBASE_TEST_LEASE": "6"}
"""Where a lease must run out: short, and long enough for a server on a busy machine to renew it."""


def shared(folder: Path, registry: str | None = None) -> tuple[str, ...]:
    """Options of servers that share all that is in a folder, or the registry of a URL."""
    return (
        "--registry", registry or f"sqlite:///{folder / 'registry.db'}", "--store", str(folder / "store"),
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
    limited, watched = (keys.make("generate", quotas={"requests": limit}) for limit in (8, 10**6))
    free = keys.make("generate")
    options = shared(tmp_path)
    with serve_scripted("words", *options) as one, serve_scripted("words", *options) as other:
        assert [ask(one, key).status_code for key in (limited, watched) for _ in range(3)] == [200] * 6
        asked = 0

        def knows() -> bool:
            """Of the requests with the watched key, and so of those before them."""
            nonlocal asked
            left = ask(other, watched).headers["x-ratelimit-remaining-requests"]
            asked += 1
            time.sleep(0.2)
            return int(left) == 10**6 - 3 - asked

        other.wait_for(knows)
        answers = [ask(other, limited) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [429]
        error, headers = answers[-1].json()["error"], answers[-1].headers
        assert (error["quota"], error["limit"], headers["x-ratelimit-remaining-requests"]) == (
            "requests", 8, "0",
        )  # fmt: skip
        assert 1 <= int(headers["retry-after"]) <= 60
        assert ask(one, free).status_code == ask(other, free).status_code == 200


def test_a_stream_that_used_all_of_a_quota_goes_on_where_its_server_is_killed(
    routing: Starter, serve_scripted: Starter, keys: Keys, tmp_path: Path
) -> None:
    limited, admin = keys.make("generate", quotas={"sequences": 1, "requests": 1}), keys.make("admin")
    (tmp_path / "key").touch(0o600)
    (tmp_path / "key").write_text(admin)
    names, options = tmp_path / "replicas", shared(tmp_path)
    asked = {"prompt": "a b", "max_tokens": 150, "stream": True}
    with (
        serve_scripted("words", *options) as one,
        serve_scripted("words", *options) as other,
        ExitStack() as behind,
    ):
        names.write_text(one.url)
        how = ("--key-file", str(tmp_path / "key"), "--resume", "5")
        route = behind.enter_context(routing([], tmp_path, "--replicas", str(names), *how))
        http = behind.enter_context(client_with(route, limited))
        with http.stream("POST", "/generate", json=asked) as stream:
            assert stream.status_code == 200, stream.read()
            lines = stream.iter_lines()
            next(lines)
            other.wait_for(lambda: ask(other, limited).status_code == 429)
            names.write_text(f"{one.url}\n{other.url}")
            other.wait_for(lambda: http.get("/ready").json()["servers"] == 2)
            one.signal(signal.SIGKILL)
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "error" not in events[-1], events[-1]
        assert events[-1]["usage"]["completion_tokens"] == 150


# ---- deletions ---------------------------------------------------------------------------------


def errors_of(stream: Iterator[str]) -> list[str]:
    """The codes of a stream's errors; reads it to its end."""
    told = [json.loads(line[6:]) for line in stream if line.startswith('data: {"error"')]
    return [one["error"]["code"] for one in told]


@pytest.mark.parametrize("path", ["/v1/adapters/gone", "/v1/adapters/gone/versions/{}"])
def test_a_deletion_by_force_ends_streams_on_every_server_and_others_end_none(
    start_pair: Callable[..., Pair], path: str
) -> None:
    one, other = start_pair()
    with one.client() as http, other.client() as there, ExitStack() as running:
        versions = {}
        for name in ("gone", "kept", "left"):
            made = upload(http, name, name.encode(), query="wait=true&activate=true")
            versions[name] = made.json()["version"]
            other.wait_for(lambda: there.get(f"/v1/adapters/{name}").json().get("version"))  # noqa: B023
        body = {"prompt": "a b", "max_tokens": 80_000, "stream": True}
        streams = {}
        for name in versions:
            asked = there.stream("POST", "/generate", json={**body, "adapter": name})
            streams[name] = running.enter_context(asked).iter_lines()
            next(streams[name])

        assert http.delete("/v1/adapters/left").status_code == 200
        assert http.delete(path.format(versions["gone"]), params={"force": True}).status_code == 200
        assert errors_of(streams["gone"]) == ["adapter_deleted"]
        assert there.get("/v1/adapters/left").status_code == 404
        for name in ("kept", "left"):
            assert (
                sum(line.startswith("data: ") for line, _ in zip(streams[name], range(400), strict=False))
                >= 100
            )
        assert generate_on(there, "gone").status_code == 404


def generate_on(http: httpx2.Client, adapter: str) -> httpx2.Response:
    return http.post("/generate", json={"prompt": "a", "max_tokens": 1, "adapter": adapter})


# ---- jobs ---------------------------------------------------------------------------------------


Pair = tuple[Server, Server]


@pytest.fixture
def start_pair(serve_scripted: Starter, tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """Starts two servers that know each other, and could both train."""
    with ExitStack() as stack:

        def start(**how: Any) -> Pair:
            options = shared(tmp_path)
            one, other = (
                stack.enter_context(serve_scripted("words", *options, data_dir=tmp_path / name, **how))
                for name in ("one", "other")
            )
            return one, other

        yield start


@pytest.fixture
def pair(start_pair: Callable[..., Pair]) -> Pair:
    """Two whose leases run out soon."""
    return start_pair(environment=LEASE)


def rows(folder: Path, query: str, *parameters: str) -> list[Any]:
    with closing(sqlite3.connect(folder / "registry.db", timeout=30)) as database:
        return database.execute(query, parameters).fetchall()


def kept_step(folder: Path, job_id: str) -> int:
    """The step of a job from which any server can go on."""
    ((step,),) = rows(folder, "SELECT kept_step FROM training_jobs WHERE id = ?", job_id)
    return int(step)


def stop_between_writes(server: Server, folder: Path) -> None:
    """SIGSTOP; never while it writes to the registry, since SQLite would have everybody wait for it."""

    def stopped() -> bool:
        server.signal(signal.SIGSTOP)
        try:
            with closing(sqlite3.connect(folder / "registry.db", timeout=1)) as database:
                database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            server.signal(signal.SIGCONT)
            return False
        return True

    server.wait_for(stopped)


def check_delivered_once(server: Server, client: OpenAI, job_id: str, folder: Path) -> None:
    """The job has made one version, which is served, and left nothing to go on from."""
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model is not None
    with server.client() as http:
        (adapter,) = http.get("/v1/adapters").json()["data"]
        (version,) = http.get(f"/v1/adapters/{adapter['id']}/versions").json()["data"]
    assert adapter["version"] == version["version"]
    told = messages(client, job_id)
    assert sum("is proved" in one for one in told) == 1
    server.wait_for(lambda: not rows(folder, "SELECT * FROM job_files"))


def test_a_job_whose_server_is_killed_goes_on_elsewhere_from_its_last_checkpoint(
    pair: Pair, tmp_path: Path
) -> None:
    one, other = pair
    here, there = openai_client(one), openai_client(other)
    job = make_job(here, "stands-at-7", extra={"activate": "always"})
    wait_job(one, here, job.id, lambda job: step_of(job) == 7)
    one.wait_for(lambda: kept_step(tmp_path, job.id) == 5)
    assert not other.trainer_pids()
    one.process.kill()
    one.exit_status()
    wait_job(other, there, job.id, ended)
    told = messages(there, job.id)
    assert "Taken over by another server, resumed at step 5." in told
    assert "Continuing after step 5 of 10." in told
    check_delivered_once(other, there, job.id, tmp_path)
    assert job_folder(tmp_path / "one", job.id).exists()
    other.wait_for(lambda: not job_folder(tmp_path / "other", job.id).exists())  # once its end is recorded


def test_a_server_that_stood_still_while_its_job_was_taken_over_does_no_harm(
    pair: Pair, tmp_path: Path
) -> None:
    one, other = pair
    here, there = openai_client(one), openai_client(other)
    job = make_job(here, "stands-at-7", extra={"activate": "always"})
    wait_job(one, here, job.id, lambda job: step_of(job) == 7)
    one.wait_for(lambda: kept_step(tmp_path, job.id) == 5)
    (trainer,) = one.trainer_pids()
    stop_between_writes(one, tmp_path)
    wait_job(other, there, job.id, ended)
    told = messages(there, job.id)
    one.signal(signal.SIGCONT)
    one.wait_for(lambda: trainer not in one.trainer_pids())
    one.wait_for(lambda: not job_folder(tmp_path / "one", job.id).exists())
    assert messages(there, job.id) == told
    check_delivered_once(other, there, job.id, tmp_path)
    # It has jobs of its own as before.
    assert wait_job(one, here, make_job(here, "rows").id, ended).status == "succeeded"


def test_a_job_waits_for_no_busy_server_and_one_that_stops_leaves_its_jobs_to_others(
    start_pair: Callable[..., Pair], tmp_path: Path
) -> None:
    one, other = start_pair()
    here, there = openai_client(one), openai_client(other)
    long = make_job(here, "slow")
    wait_job(one, here, long.id, lambda job: step_of(job) > 5)
    quick = make_job(here, "rows")
    assert wait_job(other, there, quick.id, ended).status == "succeeded"
    assert "Taken over by another server, where it waits for its turn." in messages(there, quick.id)
    assert len(one.trainer_pids()) == 1
    # Asked for at another server it holds at the one that trains, and the other way round.
    assert there.fine_tuning.jobs.pause(long.id).status == "paused"
    one.wait_for(lambda: not one.trainer_pids())
    one.wait_for(lambda: kept_step(tmp_path, long.id) > 5)
    there.fine_tuning.jobs.resume(long.id)
    one.wait_for(lambda: len(one.trainer_pids()) + len(other.trainer_pids()) == 1)
    trains, stays = (one, other) if one.trainer_pids() else (other, one)
    trains.signal(signal.SIGTERM)
    trains.exit_status()
    stays.wait_for(lambda: len(stays.trainer_pids()) == 1)
    left = openai_client(stays)
    assert any(one.startswith("Taken over by another server, resumed") for one in messages(left, long.id))
    left.fine_tuning.jobs.cancel(long.id)
    stays.wait_for(lambda: not stays.trainer_pids())
    stays.wait_for(lambda: not rows(tmp_path, "SELECT * FROM job_files"))


def test_a_paused_job_of_a_server_that_is_gone_can_be_resumed_or_cancelled(
    pair: Pair, tmp_path: Path
) -> None:
    one, other = pair
    here, there = openai_client(one), openai_client(other)
    job, second = make_job(here, "long"), make_job(here, "rows", extra={"hold": True})
    wait_job(one, here, job.id, lambda job: step_of(job) > 5)
    here.fine_tuning.jobs.pause(job.id)
    wait_job(one, here, second.id, lambda job: job.status == "paused")
    one.wait_for(lambda: kept_step(tmp_path, job.id) > 5)
    one.process.kill()
    one.exit_status()
    assert there.fine_tuning.jobs.cancel(second.id).status == "cancelled"
    there.fine_tuning.jobs.resume(job.id)
    assert wait_job(other, there, job.id, ended).status == "succeeded"
    assert any(told.startswith("Taken over by another server, resumed") for told in messages(there, job.id))
    check_delivered_once(other, there, job.id, tmp_path)


def test_a_copy_of_a_data_folder_is_refused_beside_the_original_and_may_take_its_place(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"environment": LEASE}
    options, copy = shared(tmp_path), tmp_path / "copy"
    with serve_scripted("words", *options, data_dir=tmp_path / "original", **how) as original:
        here = openai_client(original)
        job = make_job(here, "stands-at-7", extra={"activate": "always"})
        wait_job(original, here, job.id, lambda job: step_of(job) == 7)
        shutil.copytree(tmp_path / "original", copy)
        told = messages(here, job.id)
        with serve_scripted(
            "words", *options, "--train-jobs", "0", data_dir=copy, ready=False, **how
        ) as again:
            while again.process.poll() is None:
                assert again.status_of("/ready") != 200
                time.sleep(0.1)
            assert again.exit_status() == 1
            assert "delete training/server-id in the copy" in " ".join(again.log.split())
        assert messages(here, job.id) == told
        original.process.kill()
        original.exit_status()
        with serve_scripted("words", *options, data_dir=copy, **how) as instead:
            assert wait_job(instead, openai_client(instead), job.id, ended).status == "succeeded"


@pytest.mark.full
def test_servers_that_cannot_reach_the_database_end_their_trainers_and_one_goes_on_later(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with postgres_server() as postgres, ExitStack() as stack:
        options = ("--registry", postgres.database(), "--store", str(tmp_path / "store"))
        one, other = (
            stack.enter_context(serve_scripted("words", *options, "--sync-seconds", "0.1", environment=LEASE))
            for _ in range(2)
        )
        here, there = openai_client(one), openai_client(other)
        job = make_job(here, "stands-at-7")
        wait_job(one, here, job.id, lambda job: step_of(job) == 7)
        postgres.stop()
        one.wait_for(lambda: not one.trainer_pids())
        assert not other.trainer_pids()
        postgres.start()
        assert wait_job(other, there, job.id, ended).status == "succeeded"
        told = messages(there, job.id)
        assert sum("is proved" in one for one in told) == 1
        one.process.kill()
        second = make_job(there, "rows")
        assert wait_job(other, there, second.id, ended).status == "succeeded"
