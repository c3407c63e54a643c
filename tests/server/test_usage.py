"""What tenants use is counted, survives an absent registry, and is told as JSON and as CSV."""

from __future__ import annotations

import asyncio
import csv
import datetime
import io
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from onebase import Client
from onebase_adapters.registry import Registry, RegistryBusyError, UsageFigures, UsageKey
from onebase_adapters.registry.usage import FIGURES
from onebase_edge.background import Threads
from onebase_server.telemetry.measurements import TokenUsage
from onebase_server.tenancy import usage as usage_module
from onebase_server.tenancy.usage import OTHERS, TenantUsageRecorder, today, usage_csv

from .access import Keys, bearer, client_with
from .support import Server, Starter, upload

BASE = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def admin(keys: Keys) -> str:
    return keys.make("admin", tenant="operator")


@pytest.fixture(scope="module")
def acme(keys: Keys) -> str:
    return keys.make("generate", "adapters", "train", tenant="acme")


@pytest.fixture(scope="module")
def server(serve_scripted: Starter, keys: Keys, admin: str, acme: str) -> Iterator[Server]:
    with serve_scripted("words", data_dir=keys.file.parent) as server:
        yield server


def used(server: Server, key: str, **asked: Any) -> list[dict[str, Any]]:
    with client_with(server, key) as http:
        answer = http.get("/v1/usage", params=asked)
        assert answer.status_code == 200, answer.text
        data: list[dict[str, Any]] = answer.json()["data"]
        return data


# ---- a server -----------------------------------------------------------------------------------


def test_the_use_of_a_tenant_is_the_sum_of_what_its_answers_say(
    server: Server, keys: Keys, admin: str, tmp_path: Path
) -> None:
    key = keys.make("generate", "adapters", tenant="sums")
    server.wait_for(
        lambda: httpx2.get(f"{server.url}/version", headers=bearer(key), timeout=60).status_code == 200
    )
    with client_with(server, key) as http:
        for name in ("one", "two"):
            assert upload(http, name, name.encode(), activate="true").status_code == 200
        told = UsageFigures()
        bodies: list[dict[str, Any]] = [
            {"adapter": "one", "n": 2, "max_tokens": 3},
            {"adapter": "one", "max_tokens": 5},
            {"adapter": "one", "max_tokens": 50, "stop": "ord"},
        ]
        for body in bodies:
            counts = http.post("/generate", json={"prompt": "a word or two", **body}).json()["usage"]
            told.add(
                UsageFigures(1, counts["prompt_tokens"], counts["cached_tokens"], counts["completion_tokens"])
            )
        assert told.cached_tokens > 0
        http.post("/generate", json={"prompt": "word", "max_tokens": 1})
        pair = [{"name": "two", "weight": 0.3}, {"name": "one", "weight": 0.7}]
        http.post("/generate", json={"prompt": "word", "max_tokens": 1, "adapter": pair})
        refused = http.post("/generate", json={"prompt": "word", "max_tokens": 0})
        assert refused.status_code == 400

    rows = {row["adapter"]: row for row in used(server, key)}
    assert rows.keys() == {"", "one", "one+two"}
    assert {row["tenant"] for row in rows.values()} == {"sums"}
    assert {row["day"] for row in rows.values()} <= {today()} | {day_before(today())}
    assert {name: rows["one"][name] for name in FIGURES} == vars(told)
    assert [rows[name]["requests"] for name in ("", "one+two")] == [1, 1]
    (total,) = used(server, admin, group_by="tenant,base", tenant="sums")
    assert (total["requests"], total["base"]) == (5, BASE)


def day_before(day: str) -> str:
    return str(datetime.date.fromisoformat(day) - datetime.timedelta(days=1))


def test_a_stream_that_is_left_counts_what_was_computed(server: Server, keys: Keys) -> None:
    key = keys.make("generate", tenant="leaver")
    server.wait_for(
        lambda: httpx2.get(f"{server.url}/version", headers=bearer(key), timeout=60).status_code == 200
    )
    body = {"prompt": "word", "max_tokens": 10_000, "stream": True, "n": 2}
    with client_with(server, key) as http:
        with http.stream("POST", "/generate", json=body) as answer:
            lines = (line for line in answer.iter_lines() if line)
            for _ in range(10):
                next(lines)
        server.wait_for(lambda: bool(used(server, key)))
    (row,) = used(server, key)
    assert row["requests"] == 1
    assert 0 < row["prompt_tokens"] < 10  # once, however many choices
    assert 10 <= row["completion_tokens"] < 5000


def test_an_admin_sees_all_tenants_and_others_see_their_own(server: Server, admin: str, acme: str) -> None:
    for key in (admin, acme):
        with client_with(server, key) as http:
            http.post("/generate", json={"prompt": "word", "max_tokens": 1})
    everybody = {row["tenant"] for row in used(server, admin, group_by="tenant")}
    assert {"acme", "operator"} <= everybody
    for asked in ({}, {"tenant": "acme"}, {"group_by": "tenant"}, {"group_by": "adapter,tenant,base,day"}):
        assert {row.get("tenant") for row in used(server, acme, **asked)} == {"acme"}
    with client_with(server, acme) as http:
        answers = [http.get("/v1/usage", params={"tenant": name}) for name in ("operator", "nobody")]
        assert {answer.status_code for answer in answers} == {403}
        assert answers[0].content == answers[1].content
        alone = sum(row["requests"] for row in used(server, acme, group_by="base"))
        assert alone == sum(row["requests"] for row in used(server, admin, group_by="base", tenant="acme"))


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"group_by": "key"}, "group_by"),
        ({"group_by": ""}, "group_by"),
        ({"group_by": "day,day"}, "group_by"),
        ({"group_by": "day;drop table usage"}, "group_by"),
        ({"start": "yesterday"}, "start"),
        ({"start": "2026-02-30"}, "start"),
        ({"end": "26-11-2026"}, "end"),
        ({"start": "2026-11-26", "end": "2026-11-25"}, "start"),
        ({"start": "2020-01-01", "end": "2026-11-25"}, "start"),
        ({"format": "xml"}, "query.format"),
    ],
)
def test_what_cannot_be_told_is_refused_by_its_name(
    server: Server, acme: str, asked: dict[str, str], param: str
) -> None:
    with client_with(server, acme) as http:
        answer = http.get("/v1/usage", params=asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_csv_is_what_the_json_says_and_starts_no_formula(
    server: Server, admin: str, keys: Keys, tmp_path: Path
) -> None:
    names = ("=1+1", "+cmd", "-2", "@sum", "\tx", 'he said "1, 2"', "plain")
    day = "2026-01-05"
    registry = Registry(f"sqlite:///{keys.file}", base_id="b", base_name="b")
    rows = {UsageKey("formulas", day, "=base", name): UsageFigures(requests=1) for name in names}
    registry.usage.write("w", 1, rows)
    registry.close()
    asked = {"start": day, "end": day, "tenant": "formulas", "group_by": "base,adapter"}
    assert {row["adapter"] for row in used(server, admin, **asked)} == {*names}
    with client_with(server, admin) as http:
        by_format = http.get("/v1/usage", params={**asked, "format": "csv"})
        by_accept = http.get("/v1/usage", params=asked, headers={"Accept": "text/csv"})
    assert by_format.text == by_accept.text
    assert by_format.headers["content-type"].startswith("text/csv")
    with Client(server.url, api_key=admin) as client:
        assert client.usage_csv(start=day, end=day, tenant="formulas", group_by=["base", "adapter"]) == (
            by_format.text
        )
        found = client.usage(
            start=datetime.date(2026, 1, 5), end=day, group_by=["adapter"], tenant="formulas"
        )
        assert {(row.adapter, row.requests, row.day) for row in found} == {(name, 1, None) for name in names}
    cells = [cell for line in csv.reader(io.StringIO(by_format.text)) for cell in line]
    assert cells[: 2 + len(FIGURES)] == ["base", "adapter", *FIGURES]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t")) for cell in cells)
    assert {"'=1+1", "'=base", 'he said "1, 2"', "plain"} <= {*cells}


def test_what_was_counted_while_the_registry_was_away_is_written_when_the_server_stops(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    file = tmp_path / "registry.db"
    with serve_scripted("words", data_dir=tmp_path) as server, server.client() as http:
        with closing(sqlite3.connect(file)) as database:
            database.execute("ALTER TABLE usage RENAME TO away")
        for _ in range(3):
            assert http.post("/generate", json={"prompt": "word", "max_tokens": 2}).status_code == 200
        server.wait_for(lambda: "usage is kept in memory" in server.log)
        answer = http.get("/v1/usage")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "registry_unavailable")
        with closing(sqlite3.connect(file)) as database:
            database.execute("ALTER TABLE away RENAME TO usage")
        server.signal(signal.SIGTERM)
        assert server.exit_status() == 0
    with closing(sqlite3.connect(file)) as database:
        rows = database.execute("SELECT tenant, adapter, requests, completion_tokens FROM usage").fetchall()
    assert rows == [("default", "", 3, 6)]


def test_the_training_of_a_job_is_counted(server: Server, acme: str) -> None:
    with client_with(server, acme) as http:
        file = {"file": ("a.jsonl", b"slow")}
        made = http.post("/v1/files", data={"purpose": "fine-tune"}, files=file).json()
        body = {"model": BASE, "training_file": made["id"], "seed": 1, "name": "learner"}
        job = http.post("/v1/fine_tuning/jobs", json=body).json()
        place = f"/v1/fine_tuning/jobs/{job['id']}"
        server.wait_for(lambda: bool((http.get(place).json()["progress"] or {}).get("tokens")))
        assert http.post(f"{place}/cancel").status_code == 200
        server.wait_for(lambda: "learner" in {row["adapter"] for row in used(server, acme)})
    (row,) = (row for row in used(server, acme) if row["adapter"] == "learner")
    assert row["training_seconds"] > 0
    assert row["training_tokens"] > 0
    assert row["requests"] == 0


# ---- the meter ----------------------------------------------------------------------------------


class Records:
    """A registry that is away while told so; writing goes through before it fails if `deaf`."""

    def __init__(self) -> None:
        self.away = self.deaf = False
        self.rows: dict[UsageKey, UsageFigures] = {}
        self.batches: list[int] = []

    def write(self, writer: str, batch: int, rows: dict[UsageKey, UsageFigures]) -> None:
        if self.away:
            raise RegistryBusyError("it is away")
        if batch not in self.batches:
            self.batches.append(batch)
            for key, figures in rows.items():
                self.rows.setdefault(key, UsageFigures()).add(figures)
        if self.deaf:
            raise RegistryBusyError("the connection broke")


def test_a_write_whose_end_was_not_heard_counts_once_and_nothing_is_lost() -> None:
    async def run() -> None:
        records = Records()
        meter = TenantUsageRecorder(records, Threads("usage", 1), "base")  # type: ignore[arg-type]
        meter.generated("acme", ["one"], TokenUsage(prompt=3, completion=2))
        records.deaf = True
        assert not await meter.flush()
        meter.generated("acme", ["one"], TokenUsage(prompt=3, completion=2))
        records.deaf, records.away = False, True
        assert not await meter.flush()
        records.away = False
        await meter.close()
        (figures,) = records.rows.values()
        assert figures == UsageFigures(requests=2, prompt_tokens=6, completion_tokens=4)

    asyncio.run(run())


def test_what_waits_has_a_bound_and_keeps_its_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_module, "MOST_WAITING", 3)

    async def run() -> None:
        records = Records()
        meter = TenantUsageRecorder(records, Threads("usage", 1), "base")  # type: ignore[arg-type]
        for number in range(10):
            meter.generated("acme", [f"adapter-{number}"], TokenUsage(prompt=1))
        await meter.flush()
        found = {key.adapter: figures.requests for key, figures in records.rows.items()}
        assert found == {"adapter-0": 1, "adapter-1": 1, "adapter-2": 1, OTHERS: 7}

    asyncio.run(run())


def test_no_line_of_csv_begins_with_a_formula_whatever_is_grouped() -> None:
    text = usage_csv(["adapter"], [({"adapter": "-1"}, UsageFigures(requests=1))])
    assert text.splitlines()[1].startswith("'-1,1,0")
