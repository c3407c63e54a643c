"""API keys: made, listed and revoked by an operator; and where a client's own key goes, and never goes."""

from __future__ import annotations

import json
import logging
import traceback
from datetime import date
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.clients.test_client import Script, ok

from onebase import APIConnectionError, ApiKey, APIStatusError, Client, NewApiKey, OneBaseError

FACTS = {
    "id": "ob-0123456789abcdef",
    "tenant": "acme",
    "name": "ci",
    "scopes": ["generate", "train"],
    "created_at": 1.0,
    "expires_at": 3601.0,
    "revoked_at": None,
    "last_used_at": None,
    "quotas": {},
    "priority": 0,
}
KEY = ApiKey(**{**FACTS, "scopes": ("generate", "train")})  # type: ignore[arg-type]


def secret() -> str:
    """A key that no name in a test's own frame holds."""
    return "-".join(("ob", "0123456789abcdef", "s3cret"))


def unreadable(path: Path) -> Any:
    raise OSError(f"{path} cannot be read")


def test_keys_are_made_listed_and_revoked(sdk: Any) -> None:
    script = Script(ok({**FACTS, "key": "ob-new"}), ok({"data": [FACTS]}), ok({**FACTS, "revoked_at": 9.0}))

    made = sdk.call(
        lambda client: client.keys.create(["generate", "train"], tenant="acme", name="ci", expires_in=3600),
        script.transport,
    )
    listed = sdk.call(lambda client: client.keys.list(), script.transport)
    revoked = sdk.call(lambda client: client.keys.revoke(KEY.id), script.transport)

    assert isinstance(made, NewApiKey)
    assert (made.key, made.scopes, made.tenant) == ("ob-new", ("generate", "train"), "acme")
    assert "ob-new" not in repr(made)
    assert listed == (KEY,)
    assert revoked.revoked_at == 9.0
    assert [(one.method, one.url.path) for one in script.requests] == [
        ("POST", "/v1/keys"),
        ("GET", "/v1/keys"),
        ("DELETE", f"/v1/keys/{KEY.id}"),
    ]
    assert json.loads(script.requests[0].content) == {
        "scopes": ["generate", "train"],
        "tenant": "acme",
        "name": "ci",
        "expires_in_s": 3600,
    }


def test_quotas_and_priorities_of_keys_and_tenants_are_changed(sdk: Any) -> None:
    limited = {**FACTS, "quotas": {"sequences": 3}, "priority": 5}
    tenant = {"tenant": "acme", "quotas": {"bytes": 9}, "adapters": 1, "bytes": 4, "training_seconds": 1.5}
    script = Script(
        ok({**limited, "key": "ob-new"}), ok(limited), ok(tenant), ok({"data": [tenant]}), ok({"data": []})
    )
    actions: list[Any] = [
        lambda client: client.keys.create(["train"], quotas={"sequences": 3}, priority=5),
        lambda client: client.keys.update(KEY.id, quotas={"tokens": None}),
        lambda client: client.tenants.set_quotas("a/b", {"bytes": 9}),
        lambda client: client.tenants.list(),
        lambda client: client.usage(start=date(2026, 11, 1), end="2026-11-26", group_by=["day", "base"]),
    ]
    made, changed, one, every, nothing = (sdk.call(action, script.transport) for action in actions)

    assert (made.quotas, made.priority) == (changed.quotas, changed.priority) == ({"sequences": 3}, 5)
    assert every == (one,)
    assert (one.quotas, one.training_seconds) == ({"bytes": 9}, 1.5)
    assert nothing == ()
    sent = [(one.method, one.url.raw_path.decode(), one.content) for one in script.requests]
    assert {"quotas": {"sequences": 3}, "priority": 5}.items() <= json.loads(sent[0][2]).items()
    assert sent[1:] == [
        ("POST", f"/v1/keys/{KEY.id}", b'{"quotas": {"tokens": null}, "priority": null}'),
        ("POST", "/v1/tenants/a%2Fb", b'{"quotas": {"bytes": 9}}'),
        ("GET", "/v1/tenants", b""),
        ("GET", "/v1/usage?start=2026-11-01&end=2026-11-26&group_by=day%2Cbase", b""),
    ]


def test_a_key_comes_from_the_environment_unless_one_is_given(
    sdk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEBASE_API_KEY", "ob-environment\n")
    script = Script(ok({"data": []}), ok({"data": []}))
    sdk.call(lambda client: client.keys.list(), script.transport)
    sdk.call(lambda client: client.keys.list(), script.transport, api_key="ob-given")

    assert [one.headers["authorization"] for one in script.requests] == [
        "Bearer ob-environment",
        "Bearer ob-given",
    ]


@pytest.mark.parametrize("place", ["http://elsewhere.example/v1/keys", "http://127.0.0.1:8001/", "/v1/keys/"])
def test_a_redirect_is_an_error_and_the_key_does_not_follow_it(sdk: Any, place: str) -> None:
    script = Script(httpx2.Response(307, headers={"Location": place}), ok({"data": []}))
    with pytest.raises(OneBaseError):
        sdk.call(lambda client: client.keys.list(), script.transport, api_key="ob-given")

    assert len(script.requests) == 1


def test_no_repr_log_or_traceback_tells_the_key(
    sdk: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")

    def fail(request: httpx2.Request) -> httpx2.Response:
        if "sha256" in request.url.params:
            return httpx2.Response(200, json={"object": "list", "data": []})  # the file is not there yet
        if request.method == "GET":
            raise httpx2.ReadError("it broke")
        return httpx2.Response(401, json={"error": {"message": "not known", "code": "invalid_api_key"}})

    said = []
    with caplog.at_level(logging.DEBUG):
        for kind, action in (
            (APIConnectionError, lambda client: client.keys.list()),
            (APIStatusError, lambda client: client.keys.create(["train"])),
            (OSError, lambda client: client.files.upload(tmp_path / "rows.jsonl")),
        ):
            if kind is OSError:
                monkeypatch.setattr("onebase._http._AnnouncedFile", unreadable)
            with pytest.raises(kind) as failed:
                sdk.call(action, httpx2.MockTransport(fail), api_key=secret(), max_retries=0)
            frames = traceback.TracebackException.from_exception(failed.value, capture_locals=True).stack
            # The tests' own frames hold what they gave.
            said += [str(frame.locals) for frame in frames if "/tests/" not in frame.filename]
    with Client(api_key=secret()) as client:
        said += [repr(client), repr(client._http), repr(client._http.options)]

    assert any("User-Agent" in one for one in said)
    assert "s3cret" not in "".join(said) + caplog.text


@pytest.mark.parametrize("wrong", ["ob one", "ob\r\nX-Evil: 1", "schl\xfcssel", "ob\0"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_told(wrong: str) -> None:
    with pytest.raises(ValueError, match="api_key has a character") as refused:
        Client(api_key=wrong)
    assert wrong not in str(refused.value)
