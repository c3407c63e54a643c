"""GET /v1/audit and `client.audit`: who did what through a server, for its operator and for each tenant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from onebase import Client
from onebase.cli import main

from ..hub_standin import HubStandIn
from .access import Keys, client_with
from .support import CONFIG, Server, Starter, upload
from .training_support import BASE

SCOPES = ("generate", "adapters", "train")


@pytest.fixture(scope="module")
def known(keys: Keys) -> dict[str, str]:
    """Keys by the names that the tests give them, which the server knows from its start."""
    return {
        "admin": keys.make("admin"),
        "one": keys.make(*SCOPES, tenant="one"),
        "two": keys.make("adapters", tenant="two"),
        "other": keys.make("adapters"),
        "narrow": keys.make("generate", "train", tenant="two"),
    }


@pytest.fixture(scope="module")
def server(
    serve_scripted: Starter, keys: Keys, known: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    assert known
    with HubStandIn() as hub:
        hub.add_repo("acme/one", {"adapter_config.json": CONFIG.encode(), "adapter_model.safetensors": b"w"})
        environment = hub.environment(tmp_path_factory.mktemp("hf"))
        options = ("--hub-allow", "acme/*")
        with serve_scripted("words", *options, data_dir=keys.file.parent, environment=environment) as server:
            yield server


def entries(http: httpx2.Client, **query: Any) -> list[dict[str, Any]]:
    """Oldest first."""
    answer = http.get("/v1/audit", params={"limit": 1000, "order": "asc", **query})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def train(server: Server, http: httpx2.Client, name: str) -> str:
    """A job that activates what it trains; returns its id."""
    sent = {"file": ("a.jsonl", b"words\n")}
    file = http.post("/v1/files", data={"purpose": "fine-tune"}, files=sent).json()["id"]
    body = {"model": BASE, "training_file": file, "name": name, "activate": "always"}
    job: str = http.post("/v1/fine_tuning/jobs", json=body).json()["id"]

    def succeeded() -> bool:
        return bool(http.get(f"/v1/fine_tuning/jobs/{job}").json()["status"] == "succeeded")

    server.wait_for(succeeded)
    return job


def test_a_job_that_was_stopped_says_by_which_key(server: Server, keys: Keys) -> None:
    key = keys.make("generate", "train", tenant="stopping")
    key_id = keys.record(key).id
    with client_with(server, key) as http:
        server.wait_for(lambda: http.get("/v1/key").status_code == 200)  # the server looks once a second
        sent = {"file": ("a.jsonl", b"slow")}
        file = http.post("/v1/files", data={"purpose": "fine-tune"}, files=sent).json()["id"]
        body = {"model": BASE, "training_file": file}
        path = f"/v1/fine_tuning/jobs/{http.post('/v1/fine_tuning/jobs', json=body).json()['id']}"
        server.wait_for(lambda: ((http.get(path).json()["progress"] or {}).get("step") or 0) > 0)
        assert http.post(f"{path}/stop").json()["stopped"]["by"] == key_id
        server.wait_for(lambda: bool(http.get(path).json()["status"] == "succeeded"))
        job = http.get(path).json()
        told = http.get(f"{path}/events?limit=9").json()["data"]
    assert job["stopped"]["by"] == key_id
    ((message, data),) = [
        (one["message"], one["data"]) for one in told if (one["data"] or {}).get("kind") == "stopped"
    ]
    assert (data["by"], f"as key {key_id} asked" in message) == (key_id, True)
    with client_with(server, keys.make("admin", tenant="stopping")) as http:
        server.wait_for(lambda: http.get("/v1/key").status_code == 200)
        found = entries(http, target=job["id"])
    assert [(one["action"], one["key"]) for one in found] == [
        ("job.created", key_id), ("job.stopped", key_id), ("job.succeeded", key_id),
    ]  # fmt: skip


def test_what_a_key_does_and_what_is_done_for_it_later_is_told_with_its_id(
    server: Server, keys: Keys, known: dict[str, str]
) -> None:
    key = known["one"]
    key_id = keys.record(key).id
    with client_with(server, key) as http:
        http.headers["X-Request-Id"] = "gateway-17"
        upload(http, "sent", b"weights", query="wait=true&activate=true").raise_for_status()
        del http.headers["X-Request-Id"]
        http.post("/generate", json={"prompt": "word", "max_tokens": 1, "adapter": "hub:acme/one"})
        job = train(server, http, "taught")
        http.delete("/v1/adapters/sent?force=true").raise_for_status()
        found = entries(http)
    told = [(one["action"], one["target"], one["actor"]) for one in found if one["target"] != job]
    made, *told = told
    assert made == ("key.created", key_id, "")
    assert [one for one in told if not one[0].startswith("file")] == [
        ("adapter.uploaded", "sent", ""),
        ("adapter.activated", "sent", ""),  # once it was proved, long after the request
        ("adapter.pulled", "hub:acme/one", "first use"),
        ("adapter.activated", "hub:acme/one", "first use"),
        ("adapter.trained", "taught", f"job {job}"),
        ("adapter.activated", "taught", f"job {job}"),
        ("adapter.deleted", "sent", ""),
    ]
    assert [one["action"] for one in found if one["target"] == job] == ["job.created", "job.succeeded"]
    assert {one["key"] for one in found[1:]} == {key_id}
    assert {one["tenant"] for one in found} == {"one"}
    assert {one["request"] for one in found if one["target"] == "sent"} == {"gateway-17", ""}
    assert {one["base"] for one in found if one["action"].startswith("adapter")} == {BASE}
    assert len({one["server"] for one in found[1:]}) == 1
    secret = key.removeprefix(f"{key_id}-")
    assert secret not in str(found)


def test_a_tenant_reads_its_own_entries_and_an_operator_those_of_all(
    server: Server, keys: Keys, known: dict[str, str]
) -> None:
    with client_with(server, known["two"]) as http:
        upload(http, "of-two", b"two").raise_for_status()
        assert {entry["tenant"] for entry in entries(http)} == {"two"}
    with client_with(server, known["other"]) as http:
        assert entries(http, target="of-two") == entries(http, tenant="two") == []
    with client_with(server, known["admin"]) as http:
        (entry,) = entries(http, target="of-two")
        assert (entry["tenant"], entry["key"]) == ("two", keys.record(known["two"]).id)
        assert {entry["tenant"] for entry in entries(http, tenant="two")} == {"two"}
        assert {"two", "default"} <= {entry["tenant"] for entry in entries(http)}
    with client_with(server, known["narrow"]) as http:
        assert http.get("/v1/audit").status_code == 403


def test_what_was_refused_is_no_entry(server: Server, known: dict[str, str]) -> None:
    with client_with(server, known["admin"]) as http:
        before = entries(http)
        for key in ("ob-unknown", known["narrow"]):
            with client_with(server, key) as stranger:
                assert upload(stranger, "no", b"no").status_code in (401, 403)
        assert upload(http, "not a name/", b"no").status_code == 400
        assert http.post("/v1/adapters/none/rollback").status_code == 404
        assert entries(http) == before


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("action=adapter.eaten", "action"),
        ("after=audit-x", "after"),
        ("since=nan", "since"),
        ("limit=0", "limit"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_by_its_field(
    server: Server, known: dict[str, str], query: str, param: str
) -> None:
    with client_with(server, known["admin"]) as http:
        answer = http.get(f"/v1/audit?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in (param, f"query.{param}")


def test_the_sdk_and_the_command_page_through_it(
    server: Server,
    keys: Keys,
    known: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = known["admin"]
    made = [keys.record(keys.make("generate", tenant="pages")).id for _ in range(5)]
    with Client(server.url, api_key=key) as client:
        found = client.audit(tenant="pages", limit=None)
        assert [entry.target for entry in found] == made[::-1]
        assert [entry.target for entry in client.audit(tenant="pages", limit=2)] == made[:2:-1]
        later = client.audit(tenant="pages", after=found[2].id, oldest_first=True)
        assert [entry.target for entry in later] == made[3:]
    monkeypatch.setenv("ONEBASE_URL", server.url)
    monkeypatch.setenv("ONEBASE_API_KEY", key)
    assert main(["audit", "--tenant", "pages", "--since", "1d"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[3] for line in lines] == ["target", *made[::-1]]
    assert main(["audit", "--tenant", "pages", "--limit", "1", "--csv"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.startswith("id,at,tenant")
    assert made[-1] in row
    assert main(["audit", "--action", "eaten"]) == 1
    assert "action" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["audit", "--since", "yesterday"])
    assert "12h" in capsys.readouterr().err


def test_the_chain_is_checked_for_admins_alone_since_others_see_a_part_of_it(
    server: Server,
    known: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ONEBASE_URL", server.url)
    for name, status, said in (("admin", 0, ""), ("one", 1, "admin")):
        monkeypatch.setenv("ONEBASE_API_KEY", known[name])
        assert main(["audit", "verify"]) == status
        error = capsys.readouterr().err
        assert said in error
        assert "written after" not in error
