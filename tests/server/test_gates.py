"""Whoever activates, and however, passes the gates; each refusal says which gate and how to pass it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.server.test_several_servers import shared

import onebase
from onebase import Client, EvaluationGate, SliceScore
from onebase.cli import main

from .access import Keys, client_with
from .conftest import REGISTRIES, registry_url
from .support import Server, Starter, upload


@pytest.fixture(scope="module", params=REGISTRIES)
def server(
    request: pytest.FixtureRequest, serve_scripted: Starter, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("gated")
    url = registry_url(request, folder)
    keys = Keys(folder, url)
    made = {name: keys.make("adapters", "generate") for name in ("ann", "ben")}
    made |= {"admin": keys.make("admin"), "stranger": keys.make("adapters", tenant="others")}
    made["operator"] = keys.make("admin", "adapters", tenant="operators")
    made |= {f"id of {name}": keys.record(key).id for name, key in made.items()}
    keys.close()
    with serve_scripted("words", "--registry", url, data_dir=folder) as running:
        yield running, made


@pytest.fixture
def ann(server: tuple[Server, dict[str, str]]) -> Iterator[httpx2.Client]:
    with client_with(server[0], server[1]["ann"]) as http:
        yield http


@pytest.fixture
def ben(server: tuple[Server, dict[str, str]]) -> Iterator[httpx2.Client]:
    with client_with(server[0], server[1]["ben"]) as http:
        yield http


@pytest.fixture
def admin(server: tuple[Server, dict[str, str]]) -> Iterator[httpx2.Client]:
    with client_with(server[0], server[1]["admin"]) as http:
        yield http


def set_gate(http: httpx2.Client, **rule: Any) -> dict[str, Any]:
    answer = http.post("/v1/gates", json=rule)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def send(http: httpx2.Client, name: str, content: bytes, query: str = "wait=true") -> httpx2.Response:
    return upload(http, name, content, query=query)


def active(http: httpx2.Client, name: str) -> Any:
    return http.get(f"/v1/adapters/{name}").json()["version"]


def refused(answer: httpx2.Response, code: str) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (409, code), answer.text
    return error


def audit(http: httpx2.Client, **query: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = http.get("/v1/audit", params=query).json()["data"]
    return found


def test_each_way_to_activate_passes_the_same_gate(
    ann: httpx2.Client, ben: httpx2.Client, admin: httpx2.Client
) -> None:
    old = send(ann, "ways", b"old", "wait=true&activate=true").json()["version"]
    set_gate(admin, name="ways", approvals=1)
    version = send(ann, "ways", b"new").json()["version"]
    error = refused(ann.post("/v1/adapters/ways/activate", json={"version": version}), "gate_approval")
    assert [one["gate"] for one in error["gates"]] == ["approval"]
    assert f"onebase adapters approve ways@{version[:12]}" in error["message"]
    sent = send(ann, "ways", b"other", "wait=true&activate=true")
    refused(sent, "gate_approval")
    again = send(ann, "ways", b"new", "wait=true&activate=true")
    refused(again, "gate_approval")
    refused(ann.post("/v1/adapters/ways/rollout", json={"version": version, "percent": 5}), "gate_approval")
    ben.post("/v1/adapters/ways/rollout", json={"version": version, "shadow": 5}).raise_for_status()
    refused(ben.post("/v1/adapters/ways/rollout/share", json={"percent": 5}), "gate_approval")
    refused(ben.post("/v1/adapters/ways/rollout/promote"), "gate_approval")
    assert ann.get("/v1/adapters/ways/rollout").json()["state"] == "running"
    assert active(ann, "ways") == old
    acts = [one["details"]["act"] for one in audit(ann, action="gate.refused", target="ways")]
    assert set(acts) == {"activate", "start a rollout", "change a rollout", "promote"}
    ben.post(f"/v1/adapters/ways/versions/{version}/approval").raise_for_status()
    ann.post("/v1/adapters/ways/activate", json={"version": version}).raise_for_status()
    assert active(ann, "ways") == version
    ann.post("/v1/adapters/ways/rollback").raise_for_status()
    assert active(ann, "ways") == old


def test_a_tenant_reads_its_own_rules_and_only_an_admin_sets_them(
    server: tuple[Server, dict[str, str]], ann: httpx2.Client, admin: httpx2.Client
) -> None:
    mine = set_gate(admin, tenant="default", name="rules-*", proof="proved")
    other = set_gate(admin, tenant="others", name="rules-*", proof="proved")
    seen = {rule["id"] for rule in ann.get("/v1/gates").json()["data"]}
    assert mine["id"] in seen
    assert other["id"] not in seen
    with client_with(server[0], server[1]["stranger"]) as stranger:
        assert mine["id"] not in {rule["id"] for rule in stranger.get("/v1/gates").json()["data"]}
    assert ann.post("/v1/gates", json={"proof": "proved"}).status_code == 403
    assert ann.delete(f"/v1/gates/{mine['id']}").status_code == 403
    admin.delete(f"/v1/gates/{mine['id']}").raise_for_status()
    gone = admin.delete(f"/v1/gates/{mine['id']}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "gate_not_found")
    admin.delete(f"/v1/gates/{other['id']}").raise_for_status()


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/gates", {"name": "x"}, "signature"),
        ("/v1/gates", {"name": "x", "approvals": 2, "approvers": ["ob-1"]}, "approvals"),
        ("/v1/gates", {"name": "x", "evaluation": {"margin": 2}}, "evaluation.margin"),
        ("evaluation", {"metric": "m", "slices": []}, "slices"),
        ("evaluation", {"metric": "m", "slices": [{"rows": 2, "sum": 3, "squares": 2}]}, "slices[0].sum"),
        ("evaluation", {"metric": "m", "slices": [{"rows": 9, "sum": 9, "squares": 1}]}, "slices[0].squares"),
        ("evaluation", {"metric": "m", "slices": [{"rows": 1, "sum": 0, "squares": 0}] * 2}, "slices"),
    ],
)
def test_what_is_wrong_in_a_rule_or_an_evaluation_is_named(
    admin: httpx2.Client, path: str, body: dict[str, Any], param: str
) -> None:
    version = send(admin, "wrong", b"w").json()["version"]
    place = path if path.startswith("/") else f"/v1/adapters/wrong/versions/{version}/{path}"
    answer = admin.post(place, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_approval_and_reupload_at_once_never_let_in_what_was_not_approved(
    ann: httpx2.Client, ben: httpx2.Client, admin: httpx2.Client
) -> None:
    set_gate(admin, name="race", approvals=1)
    good = send(ann, "race", b"good").json()["version"]
    bad = send(ann, "race", b"bad").json()["version"]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ann.post, "/v1/adapters/race/activate", json={"version": bad}) for _ in range(6)]
        pool.submit(ben.post, f"/v1/adapters/race/versions/{good}/approval")
        sent = [pool.submit(send, ann, "race", b"bad", "wait=true&activate=true") for _ in range(2)]
        for one in (*asked, *sent):
            refused(one.result(), "gate_approval")
    assert active(ann, "race") is None
    ann.delete("/v1/adapters/race").raise_for_status()
    assert send(ann, "race", b"good").json()["version"] == good
    refused(ann.post("/v1/adapters/race/activate", json={"version": good}), "gate_approval")


def test_the_command_and_the_sdk_set_rules_approve_and_evaluate(
    server: tuple[Server, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{server[0].port}"
    keys = server[1]

    def run(who: str, *arguments: str) -> tuple[int, str]:
        status = main([*arguments, "--url", url, "--key", keys[who]])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    wanted = ("--name", "cli-*", "--approvals", "1", "--evaluation", "margin=0.5")
    status, text = run("admin", "gates", "set", *wanted)
    assert status == 0
    assert "evaluated: margin 0.5" in text
    with client_with(server[0], keys["ann"]) as http:
        version = send(http, "cli-a", b"one").json()["version"]
    status, text = run("ann", "adapters", "activate", "cli-a", version[:8])
    assert status == 1
    assert "not evaluated beside the base" in text
    assert run("ann", "adapters", "approve", f"cli-a@{version[:8]}")[0] == 1
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "a", "completion": "no such", "slice": "x"}
    rows.write_text(f"{json.dumps(row)}\n" * 8)
    evaluate = ("adapters", "evaluate", f"cli-a@{version}", "--data", str(rows), "--max-tokens", "2")
    status, text = run("ben", *evaluate)
    assert status == 0, text
    assert "evaluation: by exact_match it is not worse" in text
    assert run("ben", "adapters", "gates", "cli-a")[0] == 1
    status, text = run("ben", "adapters", "approve", f"cli-a@{version[:8]}")
    assert f"approved by {keys['id of ben']}" in text
    assert run("ann", "adapters", "gates", f"cli-a@{version[:8]}")[0] == 0
    assert run("ann", "adapters", "activate", "cli-a", version[:8])[0] == 0

    with Client(url, api_key=keys["admin"]) as client:
        gate = EvaluationGate(rows=10)
        rule = client.gates.set(name="sdk-*", evaluation=gate, approvers=[keys["id of ben"]])
        assert rule in client.gates.list()
        client.gates.delete(rule.id)
        with pytest.raises(onebase.NotFoundError):
            client.gates.delete(rule.id)
    score = SliceScore(slice="", rows=9, sum=1, squares=1)
    with Client(url, api_key=keys["ann"]) as client, pytest.raises(onebase.PermissionDeniedError):
        client.adapters.send_evaluation("cli-a", version, None, "m", [score])


def test_a_threshold_of_the_weights_is_found_on_good_versions_and_keeps_others_out(
    server: tuple[Server, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    ann = ("--url", f"http://127.0.0.1:{server[0].port}", "--key", server[1]["ann"])
    with (
        client_with(server[0], server[1]["ann"]) as http,
        client_with(server[0], server[1]["admin"]) as admin,
        client_with(server[0], server[1]["operator"]) as operator,
    ):
        send(http, "scored", b"score 9.9").raise_for_status()  # as one that a gate refused
        send(operator, "scored-too", b"score 9.8", "wait=true&activate=true").raise_for_status()
        operator.post("/v1/adapters/scored-too/share", json={"shared": True}).raise_for_status()
        assert "scored-too" in [one["name"] for one in http.get("/v1/adapters").json()["data"]]
        assert main(["gates", "calibrate", "--name", "scored*", *ann]) == 1
        for number in range(39):
            content = f"score {number / 10}".encode()
            send(http, "scored", content, "wait=true&activate=true").raise_for_status()
        capsys.readouterr()
        assert main(["gates", "calibrate", "--name", "scored*", "--json", *ann]) == 0
        found = json.loads(capsys.readouterr().out)
        figures = {"versions": 39, "least": 0.0, "median": 1.9, "largest": 3.8, "adapters": {"scored": 39}}
        assert found == {**figures, "threshold": 3.7, "false_alarms": 0.05}
        set_gate(admin, name="scored", weights=found["threshold"])
        for score, status in ((3.7, 200), (3.8, 409)):
            version = send(http, "scored", f"score {score}".encode()).json()["version"]
            answer = http.post("/v1/adapters/scored/activate", json={"version": version})
            assert answer.status_code == status, answer.text
        assert main(["adapters", "show", f"scored@{version}", *ann]) == 0
        assert "score of its weights 3.8" in capsys.readouterr().out
        few = ("gates", "calibrate", "--name", "scored", "--false-alarms", "0.01")
        assert main([*few, *ann]) == 0
        printed = capsys.readouterr()
        assert "Threshold 3.8" in printed.out
        assert "active, by adapter: scored (39)" in printed.out
        assert "too few for 0.01, which needs 99 or more" in printed.err


@pytest.mark.parametrize("kind", REGISTRIES)
def test_servers_of_one_registry_have_the_same_gates(
    serve_scripted: Starter, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    options = shared(tmp_path, registry_url(request, tmp_path, kind))
    with (
        serve_scripted("words", *options) as first,
        serve_scripted("words", *options) as second,
        first.client() as one,
        second.client() as two,
    ):
        version = send(one, "both", b"b").json()["version"]
        set_gate(one, name="both", signature=["acme"])
        refused(two.post("/v1/adapters/both/activate", json={"version": version}), "gate_signature")
