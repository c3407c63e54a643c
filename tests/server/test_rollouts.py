"""Rollouts on real servers: shares, copies, feedback, ends, two tenants, and two servers of one registry."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx2
import pytest
from tests.server.test_several_servers import shared

from onebase import Client
from onebase.cli import main
from onebase_edge.errors import QuotaSpentError, UnavailableError
from onebase_protocol.adapters import RolloutJudge
from onebase_server.adapters.catalog import RolloutPart
from onebase_server.inference.generation import GenerationRequest
from onebase_server.requests import rollouts
from onebase_server.requests.planner import OwnParts, Planner

from .access import Keys, client_with
from .support import Server, Starter, upload
from .training_support import BASE

ASKED = {"prompt": "a b c", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Keys]:
    made = Keys(tmp_path)
    yield made
    made.close()


OPENAI_PATHS = ("/v1/completions", "/v1/chat/completions")
TALK = [{"role": "user", "content": "a"}]


def two_versions(http: httpx2.Client, name: str, new: bytes = b"new") -> tuple[str, str]:
    """The digests of an active version and of one that is not."""
    old = upload(http, name, f"old {name}".encode(), query="wait=true&activate=true").json()["version"]
    return old, upload(http, name, new + name.encode()).json()["version"]


def start(http: httpx2.Client, name: str, version: str, **body: Any) -> dict[str, Any]:
    answer = http.post(f"/v1/adapters/{name}/rollout", json={"version": version, **body})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def ask(http: httpx2.Client, name: str, user: str | None = None, **body: Any) -> httpx2.Response:
    return http.post("/generate", json={**ASKED, "adapter": name, "user": user, **body})


def version_of(answer: httpx2.Response) -> str:
    """The beginning of the digest that an answer tells."""
    assert answer.status_code == 200, answer.text
    return str(answer.json()["adapter"]).partition("@")[2]


def rollout_of(http: httpx2.Client, name: str) -> dict[str, Any]:
    found: dict[str, Any] = http.get(f"/v1/adapters/{name}/rollout").json()
    return found


def counts(rollout: dict[str, Any], side: str) -> dict[str, Any]:
    return next((one for one in rollout["sides"] if one["side"] == side), {})


def scored(rollout: dict[str, Any], metric: str, side: str = "candidate") -> dict[str, Any]:
    return next(one for one in rollout["comparisons"] if (one["metric"], one["side"]) == (metric, side))


# ---- shares -------------------------------------------------------------------------------------


def test_a_share_of_the_users_gets_the_candidate_and_each_keeps_its_version(scripted: Server) -> None:
    with scripted.client() as http:
        old, new = two_versions(http, "shared-out")
        made = start(http, "shared-out", new, percent=30)
        assert (made["state"], made["active"], made["version"]) == ("running", old, new)
        users = [f"user-{number}" for number in range(60)]
        first = {user: version_of(ask(http, "shared-out", user)) for user in users}
        sides = Counter(new.startswith(version) for version in first.values())
        assert 6 <= sides[True] <= 30
        assert {user: version_of(ask(http, "shared-out", user)) for user in users[:20]} == {
            user: first[user] for user in users[:20]
        }
        chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "model": "shared-out"}
        for user in users[:5]:
            for named in ({"user": user}, {"safety_identifier": user}):
                answer = http.post("/v1/chat/completions", json={**chat, **named})
                label = f"shared-out@{first[user]}"
                assert (answer.json()["model"], answer.json()["system_fingerprint"]) == ("shared-out", label)
                assert answer.headers["x-onebase-adapter"] == label

        grown = http.post("/v1/adapters/shared-out/rollout/share", json={"percent": 70}).json()
        assert grown["percent"] == 70
        for user in users:
            if new.startswith(first[user]):
                assert version_of(ask(http, "shared-out", user)) == first[user]
        for pinned in (old, new):
            answer = ask(http, f"shared-out@{pinned}", users[0])
            assert pinned.startswith(version_of(answer))


@pytest.mark.parametrize(
    ("path", "body", "asker"),
    [
        ("/v1/chat/completions", {"messages": TALK, "max_tokens": 2}, "prompt_cache_key"),
        ("/v1/responses", {"input": "a b", "max_output_tokens": 2}, "prompt_cache_key"),
        ("/v1/messages", {"messages": TALK, "max_tokens": 2}, "metadata"),
    ],
)
def test_a_session_or_a_user_of_anthropics_keeps_its_version(
    scripted: Server, path: str, body: dict[str, Any], asker: str
) -> None:
    with scripted.client() as http:
        name = f"by-{path.rpartition('/')[2]}"
        _, new = two_versions(http, name)
        start(http, name, new, percent=50)

        def version(asked_by: str) -> str:
            named = {"user_id": asked_by} if asker == "metadata" else asked_by
            answer = http.post(path, json={**body, "model": name, asker: named})
            assert answer.status_code == 200, answer.text
            return answer.headers["x-onebase-adapter"]

        first = {one: version(one) for one in map("asker {}".format, range(30))}
        assert len(set(first.values())) == 2
        assert {one: version(one) for one in first} == first


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"adapter": "named", "prompt": "a b", "max_tokens": 2}),
        ("/v1/completions", {"model": "named", "prompt": "a b", "max_tokens": 2}),
        ("/v1/chat/completions", {"model": "named", "messages": TALK, "max_tokens": 2}),
        ("/v1/responses", {"model": "named", "input": "a b", "max_output_tokens": 2}),
        ("/v1/messages", {"model": "named", "messages": TALK, "max_tokens": 2}),
        ("/", {"inputs": "a b", "parameters": {"adapter_id": "named", "max_new_tokens": 2}}),
    ],
)
def test_each_route_names_the_version_that_answered(
    scripted: Server, path: str, body: dict[str, Any], stream: bool
) -> None:
    with scripted.client() as http:
        version = upload(http, "named", b"named", query="wait=true&activate=true").json()["version"]
        label = f"named@{version[:12]}"
        answer = http.post(path, json={**body, "stream": stream})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-onebase-adapter"] == label
        if path in OPENAI_PATHS:
            said = [line for line in answer.text.split("\n\n") if '"choices"' in line]
            assert said
            assert all(f'"system_fingerprint":"{label}"' in line for line in said)
        of_base: dict[str, dict[str, Any]] = {
            "/generate": {"prompt": "a b", "max_tokens": 2},
            "/": {"inputs": "a b", "parameters": {"max_new_tokens": 2}},
        }
        bare = http.post(path, json={**of_base.get(path, {**body, "model": BASE}), "stream": stream})
        assert bare.status_code == 200, bare.text
        assert "x-onebase-adapter" not in bare.headers
        assert label not in bare.text
        assert (f'"system_fingerprint":"{BASE}"' in bare.text) == (path in OPENAI_PATHS)


def test_without_a_user_a_key_has_one_version_and_requests_can_be_divided_instead(scripted: Server) -> None:
    with scripted.client() as http:
        _, new = two_versions(http, "by-key")
        start(http, "by-key", new, percent=50)
        assert len({version_of(ask(http, "by-key")) for _ in range(10)}) == 1
        http.post("/v1/adapters/by-key/rollout/rollback").raise_for_status()
        start(http, "by-key", new, percent=50, by="request")
        assert len({version_of(ask(http, "by-key", "ann")) for _ in range(20)}) == 2


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"percent": 0}, 400, "percent", "invalid_value"),
        ({"percent": 101}, 400, "percent", "invalid_value"),
        ({"percent": 10, "rules": {"errors": -1}}, 400, "rules.errors", "invalid_value"),
        ({"percent": 10, "version": "f" * 64}, 404, "version", "version_not_found"),
        ({"percent": 10, "version": "active"}, 409, None, "rollout_state"),
        ({"percent": 10, "judge": {"adapter": "nobody"}}, 404, "judge.adapter", "adapter_not_found"),
    ],
)
def test_what_cannot_be_rolled_out_is_refused_by_field(
    scripted: Server, body: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    with scripted.client() as http:
        old, new = two_versions(http, "refused")
        wanted = {"version": new, **body}
        if wanted["version"] == "active":
            wanted["version"] = old
        answer = http.post("/v1/adapters/refused/rollout", json=wanted)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
        assert http.get("/v1/adapters/refused/rollout").status_code == 404


def test_a_rollout_needs_an_active_version_first(scripted: Server) -> None:
    with scripted.client() as http:
        new = upload(http, "never-active", b"new").json()["version"]
        answer = http.post("/v1/adapters/never-active/rollout", json={"version": new, "percent": 10})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (409, "rollout_state")
        assert "activate one first" in error["message"]


def test_one_rollout_at_a_time_and_its_candidate_is_not_deleted_under_it(scripted: Server) -> None:
    with scripted.client() as http:
        _, new = two_versions(http, "busy")
        start(http, "busy", new, percent=10)
        again = http.post("/v1/adapters/busy/rollout", json={"version": new, "percent": 10})
        assert (again.status_code, again.json()["error"]["code"]) == (409, "rollout_state")
        deleted = http.delete(f"/v1/adapters/busy/versions/{new}")
        assert (deleted.status_code, deleted.json()["error"]["code"]) == (409, "adapter_in_use")
        assert http.delete(f"/v1/adapters/busy/versions/{new}?force=true").status_code == 200
        assert rollout_of(http, "busy")["state"] == "stopped"


def test_classifiers_have_no_rollouts_and_judge_none(scripted: Server) -> None:
    with scripted.client() as http:
        old = upload(http, "sorter", b"old sorter", query="wait=true&activate=true").json()["version"]
        config = json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"],
                             "task_type": "SEQ_CLS"})  # fmt: skip
        new = upload(http, "sorter", b"sorts", config).json()["version"]
        answer = http.post("/v1/adapters/sorter/rollout", json={"version": new, "percent": 10})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapter_task")
        _, other = two_versions(http, "sorted")
        for judge, status in ((f"sorter@{new}", 400), (f"sorter@{old}", 200)):
            body = {"version": other, "percent": 10, "judge": {"adapter": judge}}
            answer = http.post("/v1/adapters/sorted/rollout", json=body)
            assert answer.status_code == status, answer.text
            if status == 400:
                error = answer.json()["error"]
                assert (error["param"], error["code"]) == ("judge.adapter", "adapter_task")


# ---- ends ---------------------------------------------------------------------------------------


def test_a_candidate_that_fails_under_load_is_rolled_back_by_itself(scripted: Server) -> None:
    with scripted.client() as http, ThreadPoolExecutor(8) as pool:
        old, new = two_versions(http, "failing", b"sick")
        start(http, "failing", new, percent=50, promote=True)
        asked = 0
        while rollout_of(http, "failing")["state"] == "running" and asked < 2000:
            list(pool.map(lambda n: ask(http, "failing", f"user-{n}").status_code, range(asked, asked + 40)))
            asked += 40
        ended = rollout_of(http, "failing")
        assert (ended["state"], ended["ended_by"]) == ("rolled_back", f"rollout {ended['id']}")
        assert ended["reason"].startswith("errors: worse by ")
        assert counts(ended, "candidate")["errors"] == counts(ended, "candidate")["requests"] >= 10
        assert counts(ended, "active")["errors"] == 0
        after = [version_of(ask(http, "failing", f"user-{n}")) for n in range(30)]
        assert all(old.startswith(version) for version in after)
        entry = http.get("/v1/audit?action=rollout.rolled_back&target=failing").json()["data"][0]
        assert entry["version"] == new
        assert entry["details"]["figures"]["candidate"]["errors.sum"] >= 10
        assert scored(entry["details"], "errors")["verdict"] == "worse"


def test_a_candidate_that_stalls_is_rolled_back(scripted: Server) -> None:
    with scripted.client() as http, ThreadPoolExecutor(8) as pool:
        _, new = two_versions(http, "stalling", b"stuck")
        start(http, "stalling", new, percent=50, promote=True)
        asked = 0

        def wait_for_answer(number: int) -> int:
            return ask(http, "stalling", f"user-{number}", timeout_s=1.0).status_code

        while rollout_of(http, "stalling")["state"] == "running" and asked < 400:
            list(pool.map(wait_for_answer, range(asked, asked + 16)))
            asked += 16
        ended = rollout_of(http, "stalling")
        assert ended["state"] == "rolled_back"
        assert ended["reason"].startswith("errors: worse by ")
        assert counts(ended, "candidate")["aborted"] == 0


def test_feedback_rolls_back_a_candidate_that_users_dislike(scripted: Server) -> None:
    with scripted.client() as http:
        _, new = two_versions(http, "disliked")
        start(http, "disliked", new, percent=50)
        for number in range(400):
            answer = ask(http, "disliked", f"user-{number}")
            thumb = "down" if new.startswith(version_of(answer)) else "up"
            sent = http.post("/v1/feedback", json={"id": answer.json()["id"], "thumb": thumb})
            if sent.status_code == 404 or not sent.json()["counted"]:
                break  # it has ended
        ended = rollout_of(http, "disliked")
        assert ended["state"] == "rolled_back"
        assert ended["reason"].startswith("feedback: worse by ")
        assert scored(ended, "feedback")["candidate"]["mean"] == 0.0
        assert scored(ended, "feedback")["active"]["mean"] == 1.0


def test_a_candidate_that_is_not_worse_is_promoted_by_itself(scripted: Server) -> None:
    with scripted.client() as http, ThreadPoolExecutor(8) as pool:
        old, new = two_versions(http, "good")
        rules = {"requests": 40, "errors": 0.5, "first_token": 20, "per_token": 20, "refusals": 0.5}
        start(http, "good", new, percent=50, promote=True, rules=rules)
        asked = 0
        while rollout_of(http, "good")["state"] == "running" and asked < 2000:
            list(pool.map(lambda n: ask(http, "good", f"user-{n}").status_code, range(asked, asked + 40)))
            asked += 40
        ended = rollout_of(http, "good")
        assert ended["state"] == "promoted", ended
        assert http.get("/v1/adapters/good").json()["version"] == new
        assert http.get("/v1/adapters/good/history").json()["data"][0]["previous"] == old
        assert all(new.startswith(version_of(ask(http, "good", f"user-{n}"))) for n in range(10))


def test_a_promotion_that_a_gate_refuses_says_which_and_comes_once_it_is_open(scripted: Server) -> None:
    with scripted.client() as http, ThreadPoolExecutor(8) as pool:
        _, new = two_versions(http, "gated")
        rules = {"requests": 40, "errors": 0.5, "first_token": 20, "per_token": 20, "refusals": 0.5}
        start(http, "gated", new, percent=50, promote=True, rules=rules)
        gate = http.post("/v1/gates", json={"name": "gated", "signature": ["acme"]}).json()

        def waits_for() -> str:
            return "; ".join(rollout_of(http, "gated")["waits_for"])

        asked = 0
        while "signature: a signature of acme is needed" not in waits_for() and asked < 2000:
            list(pool.map(lambda n: ask(http, "gated", f"user-{n}").status_code, range(asked, asked + 40)))
            asked += 40
        assert "signature: a signature of acme is needed" in waits_for()
        assert rollout_of(http, "gated")["state"] == "running"
        http.delete(f"/v1/gates/{gate['id']}").raise_for_status()
        scripted.wait_for(lambda: rollout_of(http, "gated")["state"] == "promoted", 60)
        assert http.get("/v1/adapters/gated").json()["version"] == new


def test_streams_end_on_their_version_after_a_rollback(scripted: Server) -> None:
    with scripted.client() as http, ExitStack() as running:
        old, new = two_versions(http, "streamed")
        start(http, "streamed", new, percent=100)
        body = {**ASKED, "adapter": "streamed", "max_tokens": 150, "stream": True}
        lines = running.enter_context(http.stream("POST", "/generate", json=body)).iter_lines()
        next(lines)
        ended = http.post("/v1/adapters/streamed/rollout/rollback").json()
        assert (ended["state"], ended["reason"]) == ("rolled_back", "by hand")
        assert old.startswith(version_of(ask(http, "streamed")))
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert new.startswith(events[-1]["adapter"].partition("@")[2])
        assert events[-1]["usage"]["completion_tokens"] == 150


def test_activating_by_hand_ends_the_rollout(scripted: Server) -> None:
    with scripted.client() as http:
        _, new = two_versions(http, "by-hand")
        start(http, "by-hand", new, percent=10)
        assert http.post("/v1/adapters/by-hand/activate", json={"version": new}).status_code == 200
        assert rollout_of(http, "by-hand")["state"] == "promoted"
        gone = http.post("/v1/adapters/by-hand/rollout/rollback")
        assert (gone.status_code, gone.json()["error"]["code"]) == (409, "rollout_state")


# ---- copies -------------------------------------------------------------------------------------


def test_copies_run_for_nobody_and_count_against_no_quota(
    serve_scripted: Starter, keys: Keys, tmp_path: Path
) -> None:
    admin = keys.make("admin", "adapters", "generate", quotas={"requests": 1000})
    with serve_scripted("words", data_dir=tmp_path) as server, client_with(server, admin) as http:
        old, new = two_versions(http, "copied")
        start(http, "copied", new, shadow=100)
        asked = 0

        def copies() -> int:
            nonlocal asked
            answer = ask(http, "copied", f"user-{asked}")
            asked += 1
            assert old.startswith(version_of(answer))
            assert int(answer.headers["x-ratelimit-remaining-requests"]) == 1000 - asked
            found = counts(rollout_of(http, "copied"), "shadow")
            return int(found["requests"]) + int(found["skipped"])

        server.wait_for(lambda: copies() >= 12)
        found = rollout_of(http, "copied")
        assert counts(found, "candidate")["requests"] == 0
        assert counts(found, "shadow")["requests"] >= 1
        assert counts(found, "shadow")["completion_tokens"] == 4 * counts(found, "shadow")["requests"]
        server.wait_for(lambda: usage_of(http, "copied") == asked)


def usage_of(http: httpx2.Client, name: str) -> int:
    rows = http.get("/v1/usage?group_by=adapter").json()["data"]
    return int(next((row["requests"] for row in rows if row["adapter"] == name), 0))


def test_failing_copies_roll_back_and_no_user_sees_one(scripted: Server) -> None:
    with scripted.client() as http:
        old, new = two_versions(http, "sick-copies", b"sick")
        start(http, "sick-copies", new, shadow=100)
        for number in range(600):
            assert old.startswith(version_of(ask(http, "sick-copies", f"user-{number}")))
            if rollout_of(http, "sick-copies")["state"] != "running":
                break
        ended = rollout_of(http, "sick-copies")
        assert ended["state"] == "rolled_back"
        assert ended["reason"].startswith("errors of copies: worse by ")


def test_a_judge_looks_at_both_sides(scripted: Server) -> None:
    """The scripted engine says again what it was told, so that this judge says how the conversation began."""
    with scripted.client() as http:
        _, new = two_versions(http, "judged")
        upload(http, "judge", b"a judge", query="wait=true&activate=true")
        judge = {"adapter": "judge", "approves": "<|im_start|>", "percent": 100}
        start(http, "judged", new, percent=50, judge=judge)

        def both() -> bool:
            for number in range(16):
                version_of(ask(http, "judged", f"user-{number}"))
            one = scored(rollout_of(http, "judged"), "judge")
            return bool(min(one["active"]["n"], one["candidate"]["n"]) >= 2)

        scripted.wait_for(both)


# ---- tenants ------------------------------------------------------------------------------------


def test_a_rollout_and_its_feedback_are_of_one_tenant(
    serve_scripted: Starter, keys: Keys, tmp_path: Path
) -> None:
    ann, bob = (keys.make("adapters", "generate", tenant=tenant) for tenant in ("ann", "bob"))
    reader = keys.make("adapters", tenant="ann")
    with (
        serve_scripted("words", data_dir=tmp_path) as server,
        client_with(server, ann) as http,
        client_with(server, bob) as there,
        client_with(server, reader) as reading,
    ):
        _, new = two_versions(http, "ours")
        old_of_bob, _ = two_versions(there, "ours")
        start(http, "ours", new, percent=100)
        answer = ask(http, "ours", "ann")
        assert new.startswith(version_of(answer))
        assert old_of_bob.startswith(version_of(ask(there, "ours", "ann")))
        assert there.get("/v1/adapters/ours/rollout").status_code == 404
        assert there.post("/v1/adapters/ours/rollout/promote").status_code == 409
        rated = {"id": answer.json()["id"], "score": 0.5}
        assert there.post("/v1/feedback", json=rated).status_code == 404
        refused = reading.post("/v1/feedback", json=rated)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        sent = http.post("/v1/feedback", json=rated)
        assert (sent.status_code, sent.json()["counted"], sent.json()["score"]) == (200, True, 0.5)
        both = http.post("/v1/feedback", json={**rated, "thumb": "up"})
        assert (both.status_code, both.json()["error"]["param"]) == (400, "score")


def test_scores_are_limited_by_tenant(scripted: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "MOST_FEEDBACK", 2)
    service = rollouts.RolloutService.__new__(rollouts.RolloutService)
    service._feedback = {}
    for _ in range(2):
        service._count_feedback("ann")
    with pytest.raises(QuotaSpentError) as error:
        service._count_feedback("ann")
    assert error.value.details["quota"] == "feedback"
    service._count_feedback("bob")


# ---- tenants beside each other --------------------------------------------------------------------


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that needs a loop of its own."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def idle_service() -> rollouts.RolloutService:
    """A service that no server runs."""
    made: Any = rollouts.RolloutService
    service: rollouts.RolloutService = made(*(Mock() for _ in range(10)))
    return service


@in_a_loop
async def test_a_decision_that_waits_or_fails_stops_no_other_and_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looked: Counter[str] = Counter()

    async def look(service: rollouts.RolloutService, rollout: str) -> None:
        looked[rollout] += 1
        if rollout == "waits":
            await asyncio.Event().wait()
        if rollout == "fails":
            raise UnavailableError("there is no room", code="adapter_unavailable", retry_after=1.0)

    monkeypatch.setattr(rollouts.RolloutService, "_decide_one", look)
    monkeypatch.setattr(rollouts, "FLUSH_SECONDS", 0.0)
    service = idle_service()
    for _ in range(5):
        service._touched |= {"waits", "fails", "other"}
        service._decide()
        await asyncio.sleep(0.01)
    assert looked == {"waits": 1, "fails": 5, "other": 5}
    assert len([one for one in caplog.records if "is not decided yet" in one.message]) == 1
    monkeypatch.setattr(rollouts, "FLUSH_SECONDS", 1.0)
    for _ in range(3):
        service._decide()
        await asyncio.sleep(0.01)
    assert looked["fails"] == 6, "it is tried again after a pause"
    for task in service._deciding.values():
        task.cancel()


@in_a_loop
async def test_a_decision_that_takes_too_long_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def wait(service: rollouts.RolloutService, rollout: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(rollouts.RolloutService, "_decide_one", wait)
    monkeypatch.setattr(rollouts, "DECISION_SECONDS", 0.01)
    service = idle_service()
    service._touched.add("waits")
    service._decide()
    await asyncio.gather(*service._deciding.values())
    assert "it took more than 0.01 s" in caplog.text
    assert service._touched == {"waits"}


@in_a_loop
async def test_a_tenant_leaves_places_for_copies_and_answers_to_others() -> None:
    service = idle_service()
    ended = asyncio.Event()

    async def copy() -> None:
        await ended.wait()

    assert [service._start("ann", copy()) for _ in range(6)] == [True] * 4 + [False] * 2
    assert [service._start("bob", copy()) for _ in range(3)] == [True, True, False]
    assert service._start("cid", copy())
    ended.set()
    await asyncio.gather(*service._tasks)

    part: Any = Mock()
    part.rollout.settings = {"by": "request"}
    for tenant in ("ann", "bob"):
        request: Any = Mock(tenant=tenant)
        for _ in range(rollouts.MOST_ANSWERS):
            service.keep_answer(part, request)
    kept = Counter(one.tenant for one in service._answers)
    assert kept["ann"] == rollouts.MOST_ANSWERS // 2
    assert kept["bob"] == rollouts.MOST_ANSWERS // 4


@in_a_loop
async def test_a_judgement_without_a_place_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "MOST_COPIES", 0)
    service = idle_service()
    part = RolloutPart(Mock(id="rollout-1"), "candidate")
    service.judge(part, Mock(tenant="ann"), "text", RolloutJudge(adapter="judge"), 0.0)
    assert service.totals["rollout-1", "candidate"]["skipped"] == 1


@in_a_loop
async def test_candidates_are_loaded_one_by_one_for_their_tenants() -> None:
    service = idle_service()
    tenants: list[str] = []
    at_once, most = 0, 0

    @asynccontextmanager
    async def lease(uses: object, *, tenant: str) -> AsyncIterator[None]:
        nonlocal at_once, most
        tenants.append(tenant)
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        yield
        at_once -= 1

    service._residency = Mock(lease=lease)
    records: list[Any] = [
        Mock(tenant=tenant, rollout=Mock(candidate="c")) for tenant in ("ann", "bob", "cid")
    ]
    await asyncio.gather(*(service._warm(record) for record in records))
    assert (tenants, most) == (["ann", "bob", "cid"], 1)


def test_only_what_a_judge_reads_keeps_its_conversation() -> None:
    planner = Planner.__new__(Planner)
    planner._tokenizer = Mock()
    request = GenerationRequest("gen-1", "ann", (), Mock(), said=["hello"])
    own = OwnParts(planner._tokenizer)

    def planned(settings: dict[str, Any] | None) -> GenerationRequest:
        part = None if settings is None else RolloutPart(Mock(settings=settings), "active")
        return planner._with_choice(request, Mock(part=part), own)

    assert planned(None).said is None
    assert planned({"judge": None}).said is None
    assert planned({"judge": {"adapter": "polite"}}).said == ["hello"]


def test_phrases_of_refusals_are_compared_without_regard_to_apostrophes(scripted: Server) -> None:
    with scripted.client() as http:
        _, new = two_versions(http, "phrased")
        start(http, "phrased", new, percent=50, refusal_phrases=["Don\u2019t Know"])
        for apostrophe in ("'", "\u2019"):
            prompt = f"don{apostrophe}t know"
            assert ask(http, "phrased", prompt=prompt, max_tokens=12).status_code == 200
        scripted.wait_for(lambda: sum(side["refusals"] for side in rollout_of(http, "phrased")["sides"]) == 2)


# ---- several servers ----------------------------------------------------------------------------


@pytest.fixture
def pair(serve_scripted: Starter, tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """Starts servers of one registry and one store, by the names of their data folders."""
    with ExitStack() as stack:

        def start_one(name: str) -> Server:
            how = {"data_dir": tmp_path / name}
            return stack.enter_context(serve_scripted("words", *shared(tmp_path), **how))

        yield start_one


def test_a_rollout_holds_on_all_servers_of_a_registry_and_after_a_restart(
    pair: Callable[[str], Server],
) -> None:
    one, other = pair("one"), pair("other")
    with one.client() as http, other.client() as there:
        old, new = two_versions(http, "everywhere")
        rules = {"feedback": None}
        started = start(http, "everywhere", new, percent=40, rules=rules)
        other.wait_for(lambda: there.get("/v1/adapters/everywhere/rollout").status_code == 200)
        other.wait_for(lambda: new.startswith(version_of(ask(there, f"everywhere@{new}"))))
        users = [f"user-{number}" for number in range(20)]
        sides = {user: version_of(ask(http, "everywhere", user)) for user in users}
        other.wait_for(lambda: {user: version_of(ask(there, "everywhere", user)) for user in users} == sides)
        assert set(sides.values()) == {old[:12], new[:12]} or len(set(sides.values())) == 2

        rated = ask(there, "everywhere", users[0]).json()["id"]
        assert http.post("/v1/feedback", json={"id": rated, "thumb": "up"}).json()["counted"]
        other.wait_for(lambda: sum(s["requests"] for s in rollout_of(there, "everywhere")["sides"]) >= 41)
        before = {side["side"]: side["requests"] for side in rollout_of(http, "everywhere")["sides"]}

        http.post("/v1/adapters/everywhere/rollout/share", json={"percent": 100}).raise_for_status()
        other.wait_for(lambda: all(new.startswith(version_of(ask(there, "everywhere", u))) for u in users))

    with pair("third").client() as again:
        found = rollout_of(again, "everywhere")
        assert (found["id"], found["state"], found["percent"]) == (started["id"], "running", 100.0)
        assert all(counts(found, side)["requests"] >= number for side, number in before.items())
        assert new.startswith(version_of(ask(again, "everywhere", users[0])))
        again.post("/v1/adapters/everywhere/rollout/rollback").raise_for_status()
        assert old.startswith(version_of(ask(again, "everywhere", users[0])))
    with other.client() as there:
        other.wait_for(lambda: old.startswith(version_of(ask(there, "everywhere", users[0]))))
        assert rollout_of(there, "everywhere")["state"] == "rolled_back"


# ---- SDK and command ------------------------------------------------------------------------------


def test_the_sdk_starts_rates_changes_and_ends_a_rollout(scripted: Server) -> None:
    with scripted.client() as http, Client(scripted.url) as client:
        _, new = two_versions(http, "by-sdk")
        made = client.adapters.start_rollout("by-sdk", new[:12], percent=100, rules={"feedback": None})
        assert (made.version, made.percent, made.rules.feedback) == (new, 100.0, None)
        answer = client.generate("a b", adapter="by-sdk", max_tokens=2, user="ann")
        assert client.feedback(answer.id, thumb="up").counted
        assert client.adapters.change_rollout("by-sdk", percent=50).percent == 50.0
        assert client.adapters.rollback_rollout("by-sdk").state == "rolled_back"
        assert [one.id for one in client.adapters.rollouts("by-sdk")] == [made.id]
        client.adapters.start_rollout("by-sdk", new, shadow=100)
        assert client.adapters.promote_rollout("by-sdk").state == "promoted"
        assert client.adapters.retrieve("by-sdk").version == new
        with pytest.raises(ValueError, match="either score"):
            client.feedback(answer.id)


def test_the_command_starts_shows_changes_and_ends_a_rollout(
    scripted: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONEBASE_URL", scripted.url)

    def run(*arguments: str, status: int = 0) -> str:
        assert main(["adapters", "rollout", *arguments]) == status
        told = capsys.readouterr()
        return told.out + told.err

    with scripted.client() as http:
        _, new = two_versions(http, "by-command")
        rules = ("--rule", "requests=50", "--rule", "judge=none")
        said = run(f"by-command@{new[:12]}", "--percent", "50", "--auto", *rules)
        assert "by-command  running" in said
        assert f"{new[:12]}, 50% of requests: 0 requests" in said
        assert "requests: 0 of 50" in said
        for number in range(20):
            version_of(ask(http, "by-command", f"user-{number}"))
        scripted.wait_for(lambda: "undecided" in run("by-command"))
        assert "refusals" in run("by-command")
        assert json.loads(run("by-command", "--percent", "75", "--json"))["percent"] == 75
        assert "rolled back" in run("by-command", "--rollback")
        assert "No rollout" in run("by-command", "--promote", status=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a@12345678"], "--percent or --shadow"),
        (["a", "--auto"], "NAME@VERSION"),
        (["a", "--percent", "200"], "0 to 100"),
        (["a@12345678", "--percent", "5", "--rule", "speed=1"], "'speed' is no rule"),
        (["a", "--percent", "5", "--rollback"], "give nothing else"),
    ],
)
def test_the_command_refuses_options_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["adapters", "rollout", *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


# ---- metrics ------------------------------------------------------------------------------------


def test_prometheus_tells_the_sides_apart_by_version(scripted: Server) -> None:
    with scripted.client() as http:
        old, new = two_versions(http, "measured")
        start(http, "measured", new, percent=50)
        for number in range(20):
            version_of(ask(http, "measured", f"user-{number}"))

        def told() -> dict[str, int]:
            pattern = (
                r'onebase_rollout_requests_total\{adapter="measured",side="(\w+)",.*version="(\w+)"\} (\S+)'
            )
            lines = re.findall(pattern, http.get("/metrics").text)
            return {version: int(float(value)) for _, version, value in lines}

        scripted.wait_for(lambda: sum(told().values()) == 20)
        assert told().keys() == {old, new}
        assert 'onebase_rollout_percent{adapter="measured"' in http.get("/metrics").text
