"""Batches, as OpenAI's package makes them: answered like live requests, after them, and each row once."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types import Batch
from tests.disks import fill, small_disk

from .access import Keys, bearer
from .support import Server, Starter, pace, upload
from .test_batch_files import line

BASE = "smollm2-135m-instruct"
CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def keys_of(keys: Keys) -> dict[str, str]:
    scopes = {
        "admin": ("admin",),
        "acme": ("generate", "adapters"),
        "rival": ("generate",),
        "train": ("train",),
    }
    return {who: keys.make(*granted, tenant=who) for who, granted in scopes.items()}


@pytest.fixture(scope="module")
def server(serve_scripted: Starter, keys: Keys, keys_of: dict[str, str]) -> Iterator[Server]:
    with serve_scripted("words", data_dir=keys.file.parent) as server:
        yield server


@pytest.fixture
def acme(server: Server, keys_of: dict[str, str]) -> openai.OpenAI:
    return client_of(server, keys_of["acme"])


def client_of(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=2)


def row(custom_id: str, tokens: int = 3, model: str = BASE, **body: Any) -> Row:
    messages = [{"role": "user", "content": f"Say {custom_id}"}]
    return line(custom_id, body={"model": model, "messages": messages, "max_tokens": tokens, **body})


def begin(client: openai.OpenAI, rows: Sequence[Row | bytes], endpoint: str = CHAT) -> Batch:
    texts = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in rows]
    file = client.files.create(file=("rows.jsonl", b"\n".join(texts)), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,
        completion_window="24h",  # type: ignore[arg-type]
    )


def until(
    server: Server,
    client: openai.OpenAI,
    batch: Batch,
    reached: Callable[[Batch], bool],
    allow: Callable[[int], None] = lambda steps: None,
) -> Batch:
    """The batch once it is so far; `allow` lets a paced engine make a step before each look."""
    found = [batch]

    def look() -> bool:
        allow(1)
        found[0] = client.batches.retrieve(batch.id)
        return reached(found[0])

    server.wait_for(look)
    return found[0]


def end_of(server: Server, client: openai.OpenAI, batch: Batch) -> Batch:
    return until(server, client, batch, lambda now: now.status in ENDED)


def done(batch: Batch) -> int:
    counts = batch.request_counts
    return 0 if counts is None else counts.completed + counts.failed


def records(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()]


def ids_of(client: openai.OpenAI, batch: Batch) -> list[str]:
    files = [file_id for file_id in (batch.output_file_id, batch.error_file_id) if file_id]
    return sorted(record["custom_id"] for file_id in files for record in records(client, file_id))


# ---- what a batch answers -----------------------------------------------------------------------


def test_rows_with_any_adapters_are_answered_in_one_batch_as_live_requests_are(
    server: Server, acme: openai.OpenAI, keys_of: dict[str, str]
) -> None:
    with httpx2.Client(base_url=server.url, timeout=60, headers=bearer(keys_of["acme"])) as http:
        for name in ("red", "blue"):
            assert upload(http, name, name.encode(), activate="true").is_success
        wanted = [
            row("base"), row("red", model="red"), row("blue", model="blue"),
            row("tools", tools=[{"type": "function", "function": {"name": "now"}}], tool_choice="none"),
            row("nobody", model="nobody"), row("hot", temperature=9), row("long", tokens=100_000),
        ]  # fmt: skip
        batch = end_of(server, acme, begin(acme, wanted))
        live = {one["custom_id"]: http.post(CHAT, json=one["body"]) for one in wanted}

    assert (batch.status, batch.endpoint, batch.completion_window) == ("completed", CHAT, "24h")
    assert batch.errors is None
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 7, "completed": 4, "failed": 3}
    times = (batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at)
    assert sorted(time or 0 for time in times) == list(times)
    assert batch.expires_at == batch.created_at + 24 * 3600
    good, bad = records(acme, batch.output_file_id), records(acme, batch.error_file_id)
    assert sorted(one["custom_id"] for one in good) == ["base", "blue", "red", "tools"]
    assert {one["custom_id"] for one in bad} == {"nobody", "hot", "long"}
    for record in (*good, *bad):
        same, given = live[record["custom_id"]], record["response"]
        assert (given["status_code"], record["error"]) == (same.status_code, None)
        assert given["request_id"] == record["id"]
        assert shape(given["body"]) == shape(same.json())
    assert batch.usage is not None
    used = [one["response"]["body"]["usage"] for one in good]
    assert batch.usage.input_tokens == sum(one["prompt_tokens"] for one in used)
    assert batch.usage.output_tokens == sum(one["completion_tokens"] for one in used) == 12
    assert acme.batches.list(limit=1).data[0].id == batch.id
    assert batch.id in [one.id for one in acme.batches.list(limit=1)], "pages are walked"


def shape(body: Any) -> Any:
    """An answer without what is new each time."""
    new = ("id", "created", "cached_tokens", "created_at", "completed_at")
    if isinstance(body, dict):
        return {name: shape(value) for name, value in body.items() if name not in new}
    return [shape(value) for value in body] if isinstance(body, list) else body


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"model": BASE, "prompt": "one two", "max_tokens": 2}),
        ("/v1/responses", {"model": BASE, "input": "one two", "max_output_tokens": 2}),
        ("/v1/embeddings", {"input": ["one", "two"]}),
        ("/v1/rerank", {"query": "one", "documents": ["two", "three"]}),
        ("/score", {"text_1": "one", "text_2": "two"}),
        ("/v1/decide", {"prompt": "one", "choices": ["two", "three"]}),
    ],
)
def test_other_routes_have_batches_too(
    server: Server, acme: openai.OpenAI, endpoint: str, body: dict[str, Any]
) -> None:
    batch = end_of(server, acme, begin(acme, [line("one", url=endpoint, body=body)], endpoint))

    (record,) = records(acme, batch.output_file_id)
    live = httpx2.post(server.url + endpoint, json=body, headers=bearer(acme.api_key), timeout=60)
    assert shape(record["response"]["body"]) == shape(live.json())
    if endpoint == "/v1/responses":
        with pytest.raises(openai.NotFoundError):
            acme.responses.retrieve(record["response"]["body"]["id"])
    assert batch.usage is not None
    assert batch.usage.output_tokens == (2 if "tokens" in str(body) else 0)
    assert batch.usage.input_tokens > 0


def test_a_file_with_bad_lines_fails_with_all_of_them_and_nothing_is_answered(
    server: Server, acme: openai.OpenAI
) -> None:
    wrong = [row("a"), b"{", row("a"), line("b", url="/v1/embeddings")]
    batch = end_of(server, acme, begin(acme, wrong))

    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(one.line, one.code) for one in batch.errors.data] == [
        (2, "invalid_json_line"), (3, "duplicate_custom_id"), (4, "invalid_url"),
    ]  # fmt: skip
    assert (batch.output_file_id, batch.error_file_id, done(batch)) == (None, None, 0)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"endpoint": "/v1/models"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 3600}}, "output_expires_after"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
    ],
)
def test_what_a_batch_cannot_be_is_refused_by_name(
    server: Server, acme: openai.OpenAI, change: dict[str, Any], param: str
) -> None:
    file = acme.files.create(file=("rows.jsonl", json.dumps(row("a")).encode()), purpose="batch")
    asked = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **change}
    with pytest.raises(openai.BadRequestError) as raised:
        acme.batches.create(**asked)
    assert raised.value.param == param


# ---- whose it is --------------------------------------------------------------------------------


def test_a_batch_and_its_files_are_nobody_else_s(
    server: Server, acme: openai.OpenAI, keys_of: dict[str, str]
) -> None:
    batch = end_of(server, acme, begin(acme, [row("a")]))
    rival, train = client_of(server, keys_of["rival"]), client_of(server, keys_of["train"])

    assert batch.output_file_id is not None
    for look in (rival.batches.retrieve, rival.batches.cancel):
        with pytest.raises(openai.NotFoundError, match="There is no batch"):
            look(batch.id)
    for file_id in (batch.input_file_id, batch.output_file_id):
        with pytest.raises(openai.NotFoundError):
            rival.files.content(file_id)
    assert rival.batches.list().data == []
    assert rival.files.list().data == []
    with pytest.raises(openai.PermissionDeniedError, match="generate"):
        train.batches.list()
    with pytest.raises(openai.PermissionDeniedError, match="'generate'"):
        train.files.create(file=("rows.jsonl", b"{}"), purpose="batch")
    with pytest.raises(openai.PermissionDeniedError, match="'train'"):
        acme.files.create(file=("rows.jsonl", b"{}"), purpose="fine-tune")
    assert {file.purpose for file in acme.files.list()} == {"batch", "batch_output"}
    acme.files.delete(batch.output_file_id)
    with pytest.raises(openai.NotFoundError):
        acme.files.content(batch.output_file_id)


def test_a_batch_whose_key_is_revoked_ends_with_what_it_has_and_says_why(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    keys = Keys(tmp_path / "data")
    mine, other = (keys.make("generate", "admin") for _ in range(2))
    with (
        pace(tmp_path) as (environment, allow),
        serve_scripted(
            "paced", "--batch-requests", "2", data_dir=tmp_path / "data", environment=environment
        ) as server,
    ):
        client, admin = client_of(server, mine), client_of(server, other)
        batch = begin(client, [row(str(number), tokens=1) for number in range(300)])
        until(server, admin, batch, lambda now: done(now) >= 1, allow)
        keys.revoke(mine)
        server.wait_for(
            lambda: httpx2.get(f"{server.url}/version", headers=bearer(mine), timeout=60).status_code == 401
        )
        allow(20)
        batch = end_of(server, admin, batch)

        assert batch.status == "failed"
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert batch.errors.data[0].code == "invalid_api_key"
        assert "revoked" in (batch.errors.data[0].message or "")
        assert 1 <= len(records(admin, batch.output_file_id)) == done(batch) < 300
    keys.close()


def test_quotas_usage_audit_and_metrics_know_batches(
    server: Server, acme: openai.OpenAI, keys: Keys, keys_of: dict[str, str]
) -> None:
    keys.tenants.set_quotas("acme", {"sequences": 2})
    with httpx2.Client(base_url=server.url, timeout=60, headers=bearer(keys_of["admin"])) as http:
        usage = {"group_by": "tenant", "tenant": "acme"}
        before = http.get("/v1/usage", params=usage).json()["data"]
        batch = end_of(server, acme, begin(acme, [row(str(number)) for number in range(8)]))
        after = http.get("/v1/usage", params=usage).json()["data"]
        entries = http.get("/v1/audit", params={"target": batch.id, "order": "asc"}).json()["data"]
        figures = http.get("/metrics").text
    keys.tenants.set_quotas("acme", {"sequences": None})

    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (8, 0)
    assert after[0]["requests"] - (before[0]["requests"] if before else 0) == 8
    assert [entry["action"] for entry in entries] == ["batch.created", "batch.completed"]
    key = keys.record(keys_of["acme"]).id
    assert {entry["key"] for entry in entries} == {key}
    assert entries[1]["actor"] == f"batch {batch.id}"
    assert 'onebase_batches{state="completed"}' in figures
    assert "onebase_batch_requests_running 0.0" in figures


# ---- before whom it goes ------------------------------------------------------------------------


def test_a_live_request_finds_its_place_though_batches_take_all_that_are_free(
    serve_scripted: Starter,
) -> None:
    with (
        serve_scripted("words", "--max-sequences", "2", "--queue-limit", "0") as server,
        server.client() as http,
    ):
        client = client_of(server)
        batch = begin(client, [row(str(number), tokens=50_000) for number in range(6)])
        server.wait_for(lambda: "onebase_batch_requests_running 4.0" in http.get("/metrics").text)

        for _ in range(3):
            answer = http.post("/generate", json={"prompt": "one two", "max_tokens": 2})
            assert answer.status_code == 200

        assert http.get("/status").json()["requests"] == 0, "nobody waits for a batch"
        assert client.batches.cancel(batch.id).status == "cancelling"
        assert end_of(server, client, batch).status == "cancelled"


# ---- how it goes on -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_batch_goes_on_after_the_server_s_end_from_what_is_written_and_no_row_is_lost_or_doubled(
    serve_scripted: Starter, tmp_path: Path, number: signal.Signals
) -> None:
    rows = [row(str(place), tokens=1, model=BASE if place % 10 else "nobody") for place in range(60)]
    data = tmp_path / "data"
    with pace(tmp_path) as (environment, allow):
        with serve_scripted(
            "paced", "--batch-requests", "4", "--drain-timeout", "0", data_dir=data, environment=environment
        ) as server:
            client = client_of(server)
            batch = begin(client, rows)
            until(server, client, batch, lambda now: done(now) >= 12, allow)
            assert client.files.retrieve(batch.input_file_id).status == "processed"
            with pytest.raises(openai.ConflictError, match="needs it"):
                client.files.delete(batch.input_file_id)
            server.signal(number)
            if number == signal.SIGTERM:
                allow(40)
            server.exit_status()
        (folder,) = (data / "batches").glob("*/batch_*")
        with (folder / "output.jsonl").open("ab") as file:
            file.write(b'{"id":"batch_req_torn')
        kept = (folder / "output.jsonl").read_bytes().count(b"\n")
        assert kept >= 8

        with serve_scripted("words", data_dir=data) as server:
            client = client_of(server)
            batch = end_of(server, client, batch)

            assert batch.status == "completed"
            assert ids_of(client, batch) == sorted(one["custom_id"] for one in rows)
            assert len(records(client, batch.error_file_id)) == 6
            assert batch.request_counts is not None
            assert batch.request_counts.to_dict() == {"total": 60, "completed": 54, "failed": 6}
            assert batch.usage is not None
            assert batch.usage.output_tokens == 54
            server.wait_for(lambda: not folder.exists())  # what it wrote is in the store by now


def test_rows_that_an_engine_s_death_cuts_off_are_answered_by_the_next_one(serve_scripted: Starter) -> None:
    with serve_scripted("words") as server:
        client = client_of(server)
        batch = begin(client, [row(str(number), tokens=40) for number in range(100)])
        until(server, client, batch, lambda now: done(now) >= 10)
        os.kill(server.engine_pid(), signal.SIGKILL)
        batch = end_of(server, client, batch)

        assert batch.request_counts is not None
        assert batch.request_counts.to_dict() == {"total": 100, "completed": 100, "failed": 0}
        assert ids_of(client, batch) == sorted(map(str, range(100)))


def test_a_row_that_kills_every_engine_is_given_up_and_the_others_are_answered(
    serve_scripted: Starter,
) -> None:
    with serve_scripted("poison", "--batch-requests", "3") as server:
        client = client_of(server)
        rows = [row(str(number), tokens=5) for number in range(6)]
        batch = end_of(server, client, begin(client, [row("poison", tokens=1313), *rows]))

        assert batch.status == "completed"
        (bad,) = records(client, batch.error_file_id)
        assert bad["custom_id"] == "poison"
        assert bad["response"]["body"]["error"]["code"] == "crashes_engine"
        assert len(records(client, batch.output_file_id)) == 6


def test_a_cancelled_batch_keeps_what_it_has(serve_scripted: Starter, tmp_path: Path) -> None:
    with (
        pace(tmp_path) as (environment, allow),
        serve_scripted("paced", "--batch-requests", "2", environment=environment) as server,
    ):
        client = client_of(server)
        batch = begin(client, [row(str(number), tokens=1) for number in range(300)])
        until(server, client, batch, lambda now: done(now) >= 2, allow)
        client.batches.cancel(batch.id)
        allow(2)
        batch = end_of(server, client, batch)

        assert batch.status == "cancelled"
        assert batch.cancelling_at
        assert batch.cancelled_at
        assert 2 <= len(records(client, batch.output_file_id)) == done(batch) < 300
        assert client.batches.cancel(batch.id).status == "cancelled"
        whole = end_of(server, client, begin(client, [b"{"]))
        with pytest.raises(openai.ConflictError, match="nothing left to cancel"):
            client.batches.cancel(whole.id)


def test_rows_that_are_left_when_the_time_is_over_are_told_as_expired(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    with pace(tmp_path) as (environment, allow):
        with serve_scripted(
            "paced", "--batch-requests", "2", data_dir=data, environment=environment
        ) as server:
            client = client_of(server)
            batch = begin(client, [row(str(number), tokens=1) for number in range(60)])
            until(server, client, batch, lambda now: done(now) >= 1, allow)
            server.signal(signal.SIGKILL)
            server.exit_status()
        with closing(sqlite3.connect(data / "registry.db")) as database, database:
            database.execute("UPDATE batches SET expires_at = ?", (time.time() - 1,))
        with serve_scripted("words", data_dir=data) as server:
            client = client_of(server)
            batch = end_of(server, client, batch)

            assert batch.status == "expired"
            assert batch.expired_at is not None
            assert ids_of(client, batch) == sorted(map(str, range(60)))
            late = records(client, batch.error_file_id)
            assert {one["error"]["code"] for one in late} == {"batch_expired"}
            assert done(batch) == 60


def test_a_full_disk_holds_a_batch_up_and_loses_nothing_of_it(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with (
        small_disk(tmp_path / "disk", 24 << 20) as disk,
        serve_scripted("words", "--batch-requests", "8", data_dir=disk / "data") as server,
    ):
        client = client_of(server)
        batch = begin(client, [row(str(number), tokens=20) for number in range(400)])
        until(server, client, batch, lambda now: done(now) >= 8)
        filler = fill(disk)
        until(server, client, batch, lambda now: bool((now.model_extra or {})["waiting"]))
        filler.unlink()
        batch = end_of(server, client, batch)

        assert batch.status == "completed"
        assert ids_of(client, batch) == sorted(map(str, range(400)))


@pytest.mark.full
def test_the_openai_package_runs_a_batch_on_the_real_server(api: Any) -> None:
    client = openai.OpenAI(base_url=f"{api.server.url}/v1", api_key="none")
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    models = (BASE, "red", "blue", f"red@{api.digests['red'][:12]}")
    rows = [row(f"{n}-{model}", 6, model, temperature=0) for model in models for n in range(3)]
    rows.append(row("json", 30, temperature=0, response_format=form))
    batch = end_of(api.server, client, begin(client, rows))

    assert batch.status == "completed", batch.errors
    found = {one["custom_id"]: one["response"]["body"] for one in records(client, batch.output_file_id)}
    assert len(found) == len(rows)
    for asked in rows:
        live = api.http.post(CHAT, json=asked["body"]).json()
        assert found[asked["custom_id"]]["choices"] == live["choices"], asked["custom_id"]
