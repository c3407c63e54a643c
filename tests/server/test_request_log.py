"""The log of requests: each route, a kill, its limits, erasing, and replay."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from onebase.cli import main

from .access import Keys, client_with
from .conftest import REGISTRIES, Api, registry_url
from .support import Server, Starter, one_server, pace, upload, upload_folder
from .test_several_servers import shared

BASE = "smollm2-135m-instruct"
SECRET = "marigold seventeen"
ASKED = {"prompt": SECRET, "max_tokens": 6}


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    made = Keys(tmp_path)
    yield made
    made.close()


def logged(server: Server, http: httpx2.Client, count: int, query: str = "") -> list[dict[str, Any]]:
    """The log's requests, once there are so many that have ended."""
    found: list[dict[str, Any]] = []

    def is_there() -> bool:
        found[:] = http.get(f"/v1/requests?{query}").json()["data"]
        return len(found) == count and all(one["state"] != "running" for one in found)

    server.wait_for(is_there)
    return found


def on_disk(folder: Path, text: str) -> list[Path]:
    """The files that hold a text."""
    found = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # it is written anew
            if path.is_file() and text.encode() in path.read_bytes():
                found.append(path)
    return found


def ok(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def replay(http: httpx2.Client, request: str, **body: Any) -> httpx2.Response:
    return http.post(f"/v1/requests/{request}/replay", json=body)


def test_nothing_is_kept_unless_it_is_asked_for(serve_scripted: Starter, tmp_path: Path) -> None:
    with serve_scripted("words", data_dir=tmp_path / "data") as server, server.client() as http:
        assert http.post("/generate", json=ASKED).status_code == 200
        assert http.get("/v1/requests").json()["data"] == []
        assert not (tmp_path / "data" / "requests").exists()


MESSAGES = [{"role": "user", "content": SECRET}]
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", ASKED),
    ("/generate", {**ASKED, "n": 2, "stop": ["zzz"], "echo": True, "logprobs": 1}),
    ("/generate", {"messages": MESSAGES, "max_tokens": 5}),
    ("/", {"inputs": SECRET, "parameters": {"max_new_tokens": 5}}),
    ("/v1/completions", {"model": BASE, "prompt": [SECRET, "other"], "max_tokens": 5}),
    ("/v1/chat/completions", {"model": BASE, "messages": MESSAGES, "max_tokens": 5, "seed": 7}),
    ("/v1/responses", {"model": BASE, "input": SECRET, "max_output_tokens": 16, "store": False}),
    ("/v1/messages", {"model": BASE, "messages": MESSAGES, "max_tokens": 5}),
    ("/v1/completions", {"model": BASE, "prompt": f"{SECRET} " * 2000, "max_tokens": 5}),
]


def test_each_route_is_logged_and_its_request_gives_the_same_text_again(serve_scripted: Starter) -> None:
    with serve_scripted("words", "--request-log", "text") as server, server.client() as http:
        logged_paths: dict[str, str] = {}
        for path, body in ROUTES:
            sent = json.dumps(body, indent=1)  # in the log it is one line
            answer = http.post(path, content=sent, headers={"content-type": "application/json"})
            assert answer.status_code == 200, answer.text
            ids = {one["id"] for one in logged(server, http, len(logged_paths) + 1)} - logged_paths.keys()
            (new,) = ids
            logged_paths[new] = path
        for request, path in logged_paths.items():
            whole = http.get(f"/v1/requests/{request}").json()
            assert (whole["route"], whole["state"], whole["has_text"]) == (path, "done", True)
            assert SECRET in json.dumps(whole["body"])
            assert whole["answers"][0]["text"]
            told = replay(http, request)
            assert told.status_code == 200, told.text
            assert told.json()["equal"], told.text


def test_one_of_several_requests_is_logged_and_replayed_alone(serve_scripted: Starter) -> None:
    many = {"messages": MESSAGES, "stream": False, "requests": [{"max_tokens": 3}, {"max_tokens": 9}]}
    with serve_scripted("words", "--request-log", "text") as server, server.client() as http:
        assert http.post("/generate/many", json=many).status_code == 200
        found = logged(server, http, 2)
        assert sorted(one["answers"][0]["length"] > 0 for one in found) == [True, True]
        assert sorted(one["sampling"]["max_tokens"] for one in found) == [3, 9]
        for one in found:
            assert len(http.get(f"/v1/requests/{one['id']}").json()["body"]["requests"]) == 1
            assert replay(http, one["id"]).json()["equal"]


def test_a_stream_that_its_reader_left_is_logged_as_far_as_it_went(serve_scripted: Starter) -> None:
    body = {"prompt": SECRET, "max_tokens": 5000, "stream": True}
    with serve_scripted("words", "--request-log", "text") as server, server.client() as http:
        with http.stream("POST", "/generate", json=body) as answer:
            next(answer.iter_lines())
        (cut,) = logged(server, http, 1)
        assert (cut["state"], cut["stream"]) == ("cut", True)
        text = http.get(f"/v1/requests/{cut['id']}").json()["answers"][0]["text"]
        assert 0 < len(text) == cut["answers"][0]["length"] < 5000
        stopped = server.client()
        with stopped.stream("POST", "/generate", json=body) as answer:
            lines = answer.iter_lines()
            name = json.loads(next(lines)[6:])["id"]
            assert http.post(f"/generate/{name}/cancel").status_code == 200
            list(lines)
        ended = next(one for one in logged(server, http, 2) if one["id"] == name)
        assert (ended["state"], ended["answers"][0]["finish_reason"]) == ("cut", "cancelled")


def test_a_request_whose_server_is_killed_is_there_as_interrupted(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    start = {"data_dir": tmp_path / "data"}
    with serve_scripted("words", "--request-log", "hashes", **start) as server, server.client() as http:
        first = http.post("/generate", json=ASKED).json()["id"]
        logged(server, http, 1)
        with http.stream("POST", "/generate", json={**ASKED, "max_tokens": 5000, "stream": True}) as answer:
            lines = answer.iter_lines()
            second = json.loads(next(lines)[6:])["id"]
            server.wait_for(lambda: len(http.get("/v1/requests").json()["data"]) == 2)
            server.signal(signal.SIGKILL)
            server.exit_status()
    with serve_scripted("words", "--request-log", "hashes", **start) as server, server.client() as http:
        states = {one["id"]: one["state"] for one in http.get("/v1/requests").json()["data"]}
        assert states == {first: "done", second: "interrupted"}
        assert replay(http, second).json()["error"]["code"] == "replay_no_answer"


def test_with_hashes_no_file_has_text_and_the_body_replays_the_request(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    options = ("--request-log", "hashes")
    with serve_scripted("words", *options, data_dir=tmp_path / "data") as server, server.client() as http:
        body = {**ASKED, "seed": 3, "temperature": 1.0, "user": "alice", "stop": [SECRET.upper()]}
        assert http.post("/generate", json=body).status_code == 200
        (one,) = logged(server, http, 1)
        assert not on_disk(tmp_path / "data" / "requests", "marigold")
        assert not on_disk(tmp_path / "data" / "requests", "alice")
        assert replay(http, one["id"]).json()["error"]["code"] == "replay_no_text"
        assert replay(http, one["id"], body=body).json()["equal"]
        other = replay(http, one["id"], body={**body, "prompt": "another"})
        assert (other.status_code, other.json()["error"]["code"]) == (409, "replay_prompt")
        more = replay(http, one["id"], body={**body, "n": 2})
        assert (more.status_code, more.json()["error"]["code"]) == (409, "replay_prompt")
        for changed in ({"temperature": 0.5}, {"max_tokens": body["max_tokens"] + 1}):
            differs = replay(http, one["id"], body={**body, **changed})
            assert (differs.status_code, differs.json()["error"]["code"]) == (409, "replay_prompt")
            assert f"body: {next(iter(changed))}: " in differs.json()["error"]["message"]
        assert replay(http, one["id"], body={**body, "logprobs": 1}).json()["equal"]
        for changed in ({"stop": None}, {"guided_regex": "[a-z ]+"}):
            differs = replay(http, one["id"], body={**body, **changed})
            assert (differs.status_code, differs.json()["error"]["code"]) == (409, "replay_prompt")
            assert "body: stop, the format of the answer" in differs.json()["error"]["message"]
        wrong = replay(http, one["id"], body={**body, "max_tokens": -1})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "body.max_tokens")


def test_a_limit_that_the_request_does_not_name_may_be_another_after_a_restart(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    body = {"model": BASE, "messages": MESSAGES, "stop": [SECRET]}
    options, data = ("--request-log", "hashes"), tmp_path / "data"
    with serve_scripted("words", *options, data_dir=data) as server, server.client() as http:
        assert http.post("/v1/chat/completions", json=body).status_code == 200
        (one,) = logged(server, http, 1)
        assert one["answers"][0]["finish_reason"] == "stop"
    shorter = (*options, "--max-length", "2000")
    with serve_scripted("words", *shorter, data_dir=data) as server, server.client() as http:
        assert one["sampling"]["max_tokens"] > 2000
        assert ok(replay(http, one["id"], body=body))["equal"]
        named = replay(http, one["id"], body={**body, "max_tokens": 50})
        assert (named.status_code, named.json()["error"]["code"]) == (409, "replay_prompt")


def test_a_body_with_other_settings_is_refused_for_another_version_too_until_the_logged_one_is_gone(
    serve_scripted: Starter,
) -> None:
    body = {**ASKED, "seed": 3, "temperature": 1.0, "adapter": "shop"}
    with serve_scripted("words", "--request-log", "hashes") as server, server.client() as http:
        old, new = (
            ok(upload(http, "shop", content, query="wait=true&activate=true"))["version"]
            for content in (b"old", b"new")
        )
        ok(http.post("/v1/adapters/shop/activate", json={"version": old}))
        ok(http.post("/generate", json=body))
        (one,) = logged(server, http, 1)
        assert ok(replay(http, one["id"], version=new, body=body))["adapters"][0]["version"] == new
        for changed in ({"temperature": 0.5}, {"max_tokens": 7}, {"stop": [SECRET]}):
            differs = replay(http, one["id"], version=new, body={**body, **changed})
            assert (differs.status_code, differs.json()["error"]["code"]) == (409, "replay_prompt")
            assert f"body: {next(iter(changed))}" in differs.json()["error"]["message"]
        ok(http.post("/v1/adapters/shop/activate", json={"version": new}))
        ok(http.delete(f"/v1/adapters/shop/versions/{old}"))
        assert ok(replay(http, one["id"], version=new, body=body))["adapters"][0]["version"] == new


def test_a_limit_that_the_request_does_not_name_counts_where_the_answer_would_not_fit_any_more(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    words = [f"word{number}" for number in range(40)]
    messages = [{"role": "user", "content": " ".join(words)}]
    body = {"model": BASE, "messages": messages, "stop": words[-1:]}
    options, data = ("--request-log", "hashes"), tmp_path / "data"
    with serve_scripted("words", *options, data_dir=data) as server, server.client() as http:
        ok(http.post("/v1/chat/completions", json=body))
        (one,) = logged(server, http, 1)
        assert one["answers"][0]["finish_reason"] == "stop"
        assert one["completion_tokens"] > 40
    shorter = (*options, "--max-length", str(one["prompt_tokens"] + 40))
    with serve_scripted("words", *shorter, data_dir=data) as server, server.client() as http:
        differs = replay(http, one["id"], body=body)
        assert (differs.status_code, differs.json()["error"]["code"]) == (409, "replay_prompt")
        assert "body: max_tokens: " in differs.json()["error"]["message"]


def test_a_request_whose_text_was_kept_has_the_limit_that_it_had(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    options, data = ("--request-log", "text"), tmp_path / "data"
    shorter = (*options, "--max-length", "60")
    with serve_scripted("words", *shorter, data_dir=data) as server, server.client() as http:
        ok(http.post("/generate", json={"prompt": SECRET}))
        (one,) = logged(server, http, 1)
        assert one["answers"][0]["finish_reason"] == "length"
        assert one["sampling"]["max_tokens"] < 60
    with serve_scripted("words", *options, data_dir=data) as server, server.client() as http:
        assert ok(replay(http, one["id"]))["equal"]


def test_entries_of_several_requests_that_are_no_objects_are_no_fault_of_the_server(
    serve_scripted: Starter,
) -> None:
    with serve_scripted("words", "--request-log", "hashes") as server, server.client() as http:
        many = {"requests": [{"prompt": SECRET}, 7], "stream": False}
        ok(http.post("/generate/many", json=many))
        (one,) = logged(server, http, 1)
        assert ok(replay(http, one["id"], body=many))["equal"]


def test_equal_prompts_of_two_tenants_have_different_hashes_and_neither_sees_the_others(
    serve_scripted: Starter, keys: Keys, tmp_path: Path
) -> None:
    made = {tenant: keys.make("generate", "adapters", tenant=tenant) for tenant in ("acme", "globex")}
    admin, weak = keys.make("admin"), keys.make("generate", tenant="acme")
    with serve_scripted("words", "--request-log", "text", data_dir=tmp_path) as server:
        hashes, ids = set(), {}
        for tenant, key in made.items():
            with client_with(server, key) as http:
                for _ in range(2):
                    assert http.post("/generate", json=ASKED).status_code == 200
                found = logged(server, http, 2)
                assert {one["tenant"] for one in found} == {tenant}
                assert len({tuple(one["prompts"]) for one in found}) == 1
                hashes |= {(one["prompts"][0], one["answers"][0]["hash"]) for one in found}
                ids[tenant] = found[0]["id"]
        assert len(hashes) == len(made)
        with client_with(server, made["acme"]) as http:
            assert http.get(f"/v1/requests/{ids['globex']}").status_code == 404
            assert http.get(f"/v1/requests/{ids['globex']}?tenant=globex").status_code == 403
            assert replay(http, ids["globex"]).status_code == 404
            assert http.delete("/v1/requests?all=true&tenant=globex").status_code == 403
        with client_with(server, weak) as http:
            assert http.get("/v1/requests").status_code == 403
        with client_with(server, admin) as http:
            assert len(logged(server, http, 2, "tenant=globex")) == 2
            told = http.post(f"/v1/requests/{ids['globex']}/replay?tenant=globex", json={})
            assert told.json()["equal"], told.text

            def requests_by_tenant() -> dict[str, int]:
                usage = http.get("/v1/usage", params={"group_by": "tenant"}).json()["data"]
                return {one["tenant"]: one["requests"] for one in usage}

            # The admin's tenant pays for the admin's replay.
            server.wait_for(lambda: sum(requests_by_tenant().values()) == 5)
            assert requests_by_tenant() == {"acme": 2, "globex": 2, keys.record(admin).tenant: 1}


def test_what_is_erased_is_in_no_file_and_the_rest_stays(
    serve_scripted: Starter, keys: Keys, tmp_path: Path
) -> None:
    acme, other = (keys.make("generate", "adapters", tenant=tenant) for tenant in ("acme", "other"))
    where = tmp_path / "requests"
    with (
        serve_scripted("words", "--request-log", "text", data_dir=tmp_path) as server,
        client_with(server, acme) as http,
        client_with(server, other) as elsewhere,
    ):
        for user, prompt in (("alice", "marigold one"), ("bob", "tulip two"), ("alice", "marigold three")):
            assert http.post("/generate", json={**ASKED, "prompt": prompt, "user": user}).status_code == 200
        assert elsewhere.post("/generate", json={**ASKED, "prompt": "marigold of others"}).status_code == 200
        logged(server, http, 3)
        logged(server, elsewhere, 1)
        assert len(logged(server, http, 2, "user=alice")) == 2
        with http.stream(
            "POST",
            "/generate",
            json={"prompt": "marigold runs", "max_tokens": 400, "stream": True, "user": "alice"},
        ) as running:
            lines = running.iter_lines()
            next(lines)
            assert http.delete("/v1/requests").status_code == 400
            told = http.delete("/v1/requests?user=alice").json()
            assert told["erased"] == 3
            assert len(list(lines)) > 300
        assert not on_disk(where, "marigold one") + on_disk(where, "marigold three")
        assert not on_disk(where, "marigold runs")
        assert on_disk(where, "tulip two")
        assert on_disk(where, "marigold of others")
        assert len(logged(server, http, 1)) == 1
        assert http.post("/generate", json={**ASKED, "user": "alice"}).status_code == 200
        logged(server, http, 2)
        assert http.delete("/v1/requests?all=true").json()["erased"] == 2
        assert logged(server, http, 0) == []
        assert not on_disk(where, "tulip") + on_disk(where, SECRET)
        assert on_disk(where, "marigold of others")
        entries = http.get("/v1/audit?action=requests.erased").json()["data"]
        assert [one["target"] for one in entries] == ["all", "user"]


def test_copies_for_a_shadow_and_their_judge_are_logged_and_erased_with_the_user(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with (
        serve_scripted("words", "--request-log", "text", data_dir=tmp_path) as server,
        server.client() as http,
    ):
        for name, content in (("copied", b"old"), ("judge", b"a judge")):
            assert upload(http, name, content, query="wait=true&activate=true").status_code == 200
        candidate = upload(http, "copied", b"new", query="wait=true").json()["version"]
        judge = {"adapter": "judge", "approves": "yes", "percent": 100}
        rollout = {"version": candidate, "shadow": 100, "judge": judge}
        assert http.post("/v1/adapters/copied/rollout", json=rollout).status_code == 200
        asked = {**ASKED, "adapter": "copied", "prompt": "marigold", "user": "alice"}
        assert http.post("/generate", json=asked).status_code == 200

        found = {one["route"]: one for one in logged(server, http, 4)}  # a judge of each answer

        assert set(found) == {"/generate", "shadow", "judge"}
        assert found["shadow"]["adapters"] == [{"name": "copied", "version": candidate, "weight": 1.0}]
        assert ok(http.get(f"/v1/requests/{found['shadow']['id']}"))["answers"][0]["text"]
        assert replay(http, found["judge"]["id"]).json()["error"]["code"] == "replay_route"
        assert logged(server, http, 1, "replayable=true") == [found["/generate"]]
        assert ok(http.delete("/v1/requests?user=alice"))["erased"] == 4
        assert logged(server, http, 0) == []
        assert not on_disk(tmp_path / "requests", "marigold")


def test_a_copy_of_a_request_that_was_erased_while_it_ran_is_not_logged(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with (
        pace(tmp_path) as (environment, allow),
        serve_scripted(
            "paced", "--request-log", "text", data_dir=tmp_path / "data", environment=environment
        ) as server,
        server.client() as http,
    ):
        assert upload(http, "copied", b"old", query="wait=true&activate=true").status_code == 200
        candidate = upload(http, "copied", b"new", query="wait=true").json()["version"]
        rollout = {"version": candidate, "shadow": 100}
        assert http.post("/v1/adapters/copied/rollout", json=rollout).status_code == 200
        asked = {"adapter": "copied", "prompt": "marigold", "user": "alice", "max_tokens": 9, "stream": True}
        allow(2)
        with http.stream("POST", "/generate", json=asked) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert ok(http.delete("/v1/requests?user=alice"))["erased"] == 1
            allow(1000)
            list(lines)

        def is_copied() -> bool:
            sides = http.get("/v1/adapters/copied/rollout").json()["sides"]
            return any(side["side"] == "shadow" and side["requests"] for side in sides)

        server.wait_for(is_copied)
        assert logged(server, http, 0) == []


def test_a_request_that_was_erased_while_its_body_was_read_is_not_logged(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with (
        serve_scripted("words", "--request-log", "text", data_dir=tmp_path) as server,
        server.client() as http,
        server.client() as other,
    ):

        def body() -> Iterator[bytes]:
            yield b'{"prompt": "marigold", "user": "alice", '
            ok(other.delete("/v1/requests?user=alice"))
            yield b'"max_tokens": 5}'

        sent = {"content-type": "application/json"}
        assert http.post("/generate", content=body(), headers=sent).status_code == 200
        assert ok(other.post("/generate", json={**ASKED, "user": "bob"}))
        assert len(logged(server, other, 1)) == 1
        assert not on_disk(tmp_path / "requests", 'marigold"')


@pytest.mark.parametrize("kind", REGISTRIES)
def test_what_one_server_erases_goes_from_the_others_of_its_registry_too(
    serve_scripted: Starter, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    options = (*shared(tmp_path, registry_url(request, tmp_path, kind)), "--request-log", "text")
    with (
        serve_scripted("words", *options) as one,
        serve_scripted("words", *options) as other,
        one.client() as http,
        other.client() as there,
    ):
        assert there.post("/generate", json=ASKED).status_code == 200
        logged(other, there, 1)
        assert on_disk(other.data_dir / "requests", SECRET)
        assert http.delete("/v1/requests?all=true").status_code == 200
        other.wait_for(lambda: not on_disk(other.data_dir / "requests", SECRET))
        assert there.get("/v1/requests").json()["data"] == []


def test_a_tenants_log_has_a_limit_and_loses_its_oldest_requests_first(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    options = ("--request-log", "text", "--request-log-size", "1MB", "--max-body", "2MB")
    with serve_scripted("words", *options, data_dir=tmp_path / "data") as server, server.client() as http:
        names = []
        for number in range(8):
            body = {"prompt": f"{number} " + "word " * 20_000, "max_tokens": 1}
            names.append(http.post("/generate", json=body).json()["id"])
        server.wait_for(lambda: http.get(f"/v1/requests/{names[-1]}").status_code == 200)

        def size() -> int:
            return sum(path.stat().st_size for path in (tmp_path / "data" / "requests").rglob("*.jsonl"))

        assert size() < 1_500_000
        assert http.get(f"/v1/requests/{names[0]}").status_code == 404


def test_an_answer_is_the_same_bit_for_bit_and_another_version_is_compared_with_it(
    api: Api, serve_real: Starter, tmp_path: Path
) -> None:
    """Drawn at a temperature, by the real engine, while another version is active."""
    options = ("--request-log", "text", "--kv-memory", "200MB", "--threads", "1")
    body = {"messages": MESSAGES, "max_tokens": 24, "temperature": 1.0, "logprobs": True, "n": 2}
    data = api.copy_of_data(tmp_path / "data")
    with serve_real(*options, data_dir=data) as server, server.client() as http:
        old = api.digests["red"]
        ok(http.post("/v1/adapters/red/activate", json={"version": old}))
        request = ok(http.post("/v1/chat/completions", json={**body, "model": "red"}))["id"]
        (one,) = logged(server, http, 1)
        assert [used["version"] for used in one["adapters"]] == [old]
        new = ok(upload_folder(http, "red", api.adapters["blue"], "wait=true&activate=true"))["version"]
        told = ok(replay(http, request))
        assert told["equal"], told
        assert told["adapters"][0]["version"] == old
        told = ok(replay(http, request, version=new[:12]))
        assert (told["equal"], told["adapters"][0]["version"]) == (False, new)
        choice = told["choices"][0]
        texts = http.get(f"/v1/requests/{request}").json()["answers"]
        assert texts[0]["text"][: choice["first_difference"]] == choice["text"][: choice["first_difference"]]
        assert choice["logged"] != choice["replayed"]
        answer = http.delete(f"/v1/adapters/red/versions/{old}")
        assert answer.status_code == 200, answer.text
        gone = replay(http, request)
        assert (gone.status_code, gone.json()["error"]["code"]) == (409, "replay_version")
        assert ok(replay(http, request, version=new))["equal"] is False


def test_a_full_disk_holds_up_no_answer_and_what_waits_is_written_later(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with serve_scripted("words", "--request-log", "hashes", data_dir=tmp_path / "d") as server:
        (place,) = (tmp_path / "d" / "requests").glob("*")
        place.rmdir()
        place.write_text("no folder")
        with server.client() as http:
            assert http.post("/generate", json=ASKED).status_code == 200
            place.unlink()
            place.mkdir()
            assert len(logged(server, http, 1)) == 1


def command(server: Server, *argv: str) -> int:
    return main([argv[0], "--url", server.url, *argv[1:]])


def test_the_command_lists_shows_replays_and_erases(
    serve_scripted: Starter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve_scripted("words", "--request-log", "text") as server, server.client() as http:
        ids = [ok(http.post("/generate", json={**ASKED, "user": user}))["id"] for user in ("alice", "bob")]
        logged(server, http, 2)
        assert command(server, "requests", "--since", "1h") == 0
        listed = capsys.readouterr().out
        assert all(one in listed for one in ids)
        assert command(server, "requests", ids[0]) == 0
        assert SECRET in capsys.readouterr().out
        assert command(server, "replay", ids[0]) == 0
        assert capsys.readouterr().out == "equal\n"
        other = tmp_path / "body.json"
        other.write_text(json.dumps({**ASKED, "max_tokens": 3}))
        assert command(server, "replay", ids[0], "--body", str(other)) == 1
        assert "max_tokens: the logged request had other settings" in capsys.readouterr().err
        assert command(server, "replay", "--since", "1h") == 0
        told = capsys.readouterr()
        assert told.out.count("equal") == 2
        assert "2 requests: 2 equal, 0 different, 0 not replayed" in told.err
        for number in range(50):  # replays, which are in the log too, hide no request
            assert replay(http, ids[number % 2]).json()["equal"]
        assert command(server, "replay", "--since", "1h", "--json") == 0
        assert [one["request"] for one in json.loads(capsys.readouterr().out)] == ids[::-1]
        assert command(server, "replay", "--since", "1h", "--limit", "1") == 0
        assert "There are more: only the last 1" in capsys.readouterr().err
        assert command(server, "replay", "--since", "1h", "--adapter", "none") == 1
        assert "Nothing was compared" in capsys.readouterr().err
        assert command(server, "replay", "--since", "1h", "--version", "3f2a9c41") == 1
        assert "0 equal, 0 different, 2 not replayed" in capsys.readouterr().err
        assert command(server, "requests", "--erase", "--user", "alice") == 0
        assert command(server, "replay", ids[0]) == 1
        assert "erased" in capsys.readouterr().err
        assert command(server, "requests", "--erase", "--everything", "--json") == 0
        assert json.loads(capsys.readouterr().out)["tenant"] == "default"
        with pytest.raises(SystemExit):
            command(server, "requests", "--erase")


@one_server
def test_behind_a_route_a_request_is_found_where_it_was_answered(
    routing: Starter, serve_scripted: Starter, tmp_path: Path
) -> None:
    options = (*shared(tmp_path), "--request-log", "text")
    with (
        serve_scripted("words", *options) as one,
        serve_scripted("words", *options) as other,
        routing([one, other], tmp_path) as route,
        route.client() as http,
    ):
        for server in (one, other):
            with server.client() as direct:
                request = ok(direct.post("/generate", json=ASKED))["id"]
                logged(server, direct, 1)
            assert ok(http.get(f"/v1/requests/{request}"))["id"] == request
            assert ok(replay(http, request))["equal"]
        assert http.get("/v1/requests").status_code == 503
        assert ok(http.delete("/v1/requests?all=true"))["tenant"] == "default"
        for server in (one, other):
            server.wait_for(lambda: not on_disk(server.data_dir / "requests", SECRET))  # noqa: B023


def test_what_cannot_be_written_in_time_is_dropped_and_counted(
    serve_scripted: Starter, tmp_path: Path
) -> None:
    with serve_scripted("words", "--request-log", "text", data_dir=tmp_path / "d") as server:
        (place,) = (tmp_path / "d" / "requests").glob("*")
        place.rmdir()
        place.write_text("no folder")
        with server.client() as http:
            body = {"prompt": "word " * 30_000, "max_tokens": 1}
            for _ in range(30):  # each is about 400 kB
                assert http.post("/generate", json=body).status_code == 200
            dropped = "onebase_request_log_dropped_lines_total"
            server.wait_for(lambda: count(http, dropped) > 0)
            place.unlink()
            place.mkdir()
            server.wait_for(lambda: count(http, "onebase_request_log_lines_total") > 0)
        assert on_disk(place, '"type":"dropped"')


def count(http: httpx2.Client, name: str) -> float:
    (line,) = (one for one in http.get("/metrics").text.splitlines() if one.startswith(f"{name} "))
    return float(line.split()[1])
