"""What a job tells, live: server-sent events that a client can go on after, by the id of the last one."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from openai import OpenAI

from onebase_adapters.registry import JobEvent, RegistryBusyError
from onebase_edge.background import Threads
from onebase_server.jobs import job_record
from onebase_server.jobs.job_record import JobNotifier, JobRecord
from onebase_training.events import Notice

from .support import PATIENCE, Server, Starter
from .training_support import job_folder, make_job, openai_client, run_job, step_of, wait_job


@pytest.fixture(scope="module")
def server(serve_scripted: Starter) -> Iterator[Server]:
    with serve_scripted("words") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return openai_client(server)


def stream(http: httpx2.Client, job_id: str, most: int = 10_000, **headers: str) -> list[dict[str, Any]]:
    """Events of a stream as `{"id", "event", "data"}`; to its end, or so many."""
    found: list[dict[str, Any]] = []
    with http.stream(
        "GET", f"/v1/fine_tuning/jobs/{job_id}/events", headers={"Accept": "text/event-stream", **headers}
    ) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, Any] = {}
        for line in answer.iter_lines():
            if line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                fields[name] = json.loads(value) if name == "data" else value
            elif fields:
                found.append(fields)
                fields = {}
            if len(found) == most:
                break
    return found


def test_a_stream_has_every_event_in_order_and_ends_with_the_job(server: Server, client: OpenAI) -> None:
    job = make_job(client, "rows")
    with server.client() as http:
        *told, last = stream(http, job.id)
    assert last["event"] == "done"
    assert (last["data"]["id"], last["data"]["status"]) == (job.id, "succeeded")
    listed = [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert [event["id"] for event in told] == listed[::-1]
    steps = [event["data"]["data"]["step"] for event in told if event["data"]["type"] == "metrics"]
    assert steps == list(range(1, 11))


def test_a_client_that_comes_back_misses_nothing_and_gets_nothing_twice(
    server: Server, client: OpenAI
) -> None:
    job = make_job(client, "rows")
    with server.client() as http:
        seen = stream(http, job.id, most=4)
        while "event" not in seen[-1]:
            seen += stream(http, job.id, most=4, **{"Last-Event-ID": seen[-1]["id"]})
    listed = [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert [event["id"] for event in seen[:-1]] == listed[::-1]


def test_events_come_while_the_job_runs(server: Server, client: OpenAI) -> None:
    job = make_job(client, "slow")
    with server.client() as http:
        seen = stream(http, job.id, most=12)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    assert any(event["data"]["type"] == "metrics" for event in seen)
    client.fine_tuning.jobs.cancel(job.id)


def test_a_stream_of_a_cancelled_job_has_all_that_its_run_told(server: Server, client: OpenAI) -> None:
    job = make_job(client, "slow")
    told: list[str] = []

    def follow() -> None:
        with server.client() as http:
            told.extend(event["id"] for event in stream(http, job.id) if "id" in event)

    thread = threading.Thread(target=follow)
    thread.start()
    wait_job(server, client, job.id, lambda job: step_of(job) > 5)
    client.fine_tuning.jobs.cancel(job.id)
    server.wait_for(lambda: not server.trainer_pids())
    thread.join()
    folder = job_folder(server.data_dir, job.id)
    server.wait_for(lambda: not folder.exists())  # its run has ended
    listed = [event.id for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert told == listed[::-1]


def test_several_follow_one_job(server: Server, client: OpenAI) -> None:
    job = make_job(client, "rows")
    streams: list[list[str]] = []

    def follow() -> None:
        with server.client() as http:
            streams.append([event.get("id", "") for event in stream(http, job.id)])

    threads = [threading.Thread(target=follow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(streams) == 4
    assert all(one == streams[0] for one in streams)


def test_a_stream_of_an_ended_job_is_its_history_and_its_end(server: Server, client: OpenAI) -> None:
    job = run_job(server, client, "broken")
    with server.client() as http:
        *told, last = stream(http, job.id)
        assert last["data"]["error"]["code"] == "invalid_file"
        (only,) = stream(http, job.id, **{"Last-Event-ID": told[-1]["id"]})
        assert only["event"] == "done"
        where = f"/v1/fine_tuning/jobs/{job.id}/events?stream=true"
        wrong = http.get(where, headers={"Last-Event-ID": "7"})
    assert wrong.status_code == 400


def test_a_server_that_stops_ends_its_streams(serve_scripted: Starter) -> None:
    with serve_scripted("words", "--drain-timeout", "60") as server:
        client = openai_client(server)
        job = make_job(client, "slow")
        wait_job(server, client, job.id, lambda job: job.status == "running")
        begun, ended = threading.Event(), threading.Event()

        def follow() -> None:
            where = f"/v1/fine_tuning/jobs/{job.id}/events?stream=true"
            with server.client() as http, http.stream("GET", where) as answer:
                for _ in answer.iter_lines():
                    begun.set()
            ended.set()

        thread = threading.Thread(target=follow)
        thread.start()
        assert begun.wait(PATIENCE)
        server.process.terminate()
        assert server.exit_status() == 0
        thread.join(PATIENCE)
        assert ended.is_set()


class _Away:
    """A registry's jobs that cannot be written the first times."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.told: list[str] = []

    def note(self, job_id: str, events: list[JobEvent], checkpoints: object, **facts: object) -> None:
        self.times -= 1
        if self.times >= 0:
            raise RegistryBusyError("away")
        self.told += [event.message for event in events]


@pytest.mark.parametrize(("retries", "told"), [(True, ["the last words"]), (False, [])])
def test_the_last_words_of_a_run_wait_for_a_registry_that_is_away(retries: bool, told: list[str]) -> None:
    records: Any = _Away(2)

    async def run() -> None:
        job: Any = SimpleNamespace(
            id="ftjob-1", tenant="default", server="server-1", progress=None, state="running"
        )
        record = JobRecord(job, records, Threads("records", 1), JobNotifier())
        record.retries = retries
        record.record_event(Notice(at=1.0, message="the last words", level="info"))
        await record.close()

    asyncio.run(run())
    assert records.told == told


class _Surprised(_Away):
    """A registry that fails the first times in a way that nobody thought of."""

    def note(self, job_id: str, events: list[JobEvent], checkpoints: object, **facts: object) -> None:
        self.times -= 1
        if self.times >= 0:
            raise KeyError("surprise")
        self.told += [event.message for event in events]


def test_what_a_run_reports_is_written_after_a_surprise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records: Any = _Surprised(2)
    monkeypatch.setattr(job_record, "FLUSH_SECONDS", 0.01)

    async def run() -> None:
        job: Any = SimpleNamespace(
            id="ftjob-1", tenant="default", server="server-1", progress=None, state="running"
        )
        record = JobRecord(job, records, Threads("records", 1), JobNotifier())
        record.record_event(Notice(at=1.0, message="a figure", level="info"))
        async with asyncio.timeout(60):
            while not records.told:
                await asyncio.sleep(0.01)
        await record.close()

    asyncio.run(run())
    assert records.told == ["a figure"]
    assert "KeyError: 'surprise'" in caplog.text
