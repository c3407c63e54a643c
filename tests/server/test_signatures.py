"""Where the policy requires a signature, an adapter without the right one is refused before it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.signing import ISSUER, SIGNER, PrivateSigstore, make_key, sign, signing

from onebase.cli import main

from ..hub_standin import HubStandIn
from .support import Server, Starter, make_folder, upload_folder
from .training_support import BASE, add_file, ended, make_job, openai_client, run_job, step_of, wait_job

signing()

POLICY = {
    "signers": {
        "acme": {"key": "acme.pub"},
        "other": {"key": "other.pub"},
        "mail": {"issuer": ISSUER, "identity": SIGNER},
    },
    "rules": [
        {"name": "keyless*", "policy": "require", "signers": ["mail"]},
        {"name": "hub:acme/keyless-*", "policy": "require", "signers": ["mail"]},
        {"name": "support*", "policy": "require", "signers": ["acme"]},
        {"name": "hub:acme/*", "policy": "require", "signers": ["acme"]},
        {"name": "draft*", "policy": "warn", "signers": ["acme"]},
        {"policy": "none"},
    ],
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "policy.json").write_text(json.dumps(POLICY))
    return {name: make_key(folder, name)[0] for name in ("acme", "other")}


@pytest.fixture(scope="module")
def sigstore(keys: dict[str, Path]) -> PrivateSigstore:
    return PrivateSigstore(keys["acme"].parent)


@pytest.fixture(scope="module")
def policy(keys: dict[str, Path], sigstore: PrivateSigstore) -> tuple[str, ...]:
    """Options of a server."""
    return "--signatures", str(keys["acme"].parent / "policy.json"), "--sigstore-root", str(sigstore.root)


@pytest.fixture(scope="module")
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


@pytest.fixture(scope="module")
def server(
    serve_scripted: Starter,
    policy: tuple[str, ...],
    hub: HubStandIn,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    environment = hub.environment(tmp_path_factory.mktemp("hf"))
    with serve_scripted("words", *policy, "--hub-allow", "acme/*", environment=environment) as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with server.client() as client:
        yield client


def adapter(parent: Path, name: str, content: bytes) -> Path:
    folder = make_folder(parent, name)
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def send(http: httpx2.Client, name: str, folder: Path, **fields: str) -> httpx2.Response:
    files = [
        ("files", (file.name, file.read_bytes(), "application/octet-stream")) for file in folder.iterdir()
    ]
    return http.post("/v1/adapters?wait=true", data={"name": name, **fields}, files=files)


def refused(answer: httpx2.Response) -> str:
    assert answer.status_code == 422, answer.text
    return str(answer.json()["error"]["code"])


def audited(http: httpx2.Client, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = http.get("/v1/audit", params={"target": name}).json()["data"]
    return found


def test_a_signed_upload_shows_its_signer_and_is_exported_with_its_signature(
    http: httpx2.Client,
    server: Server,
    keys: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = adapter(tmp_path, "signed", b"signed")
    signature = sign(folder, keys["acme"])
    answer = send(http, "support-signed", folder)
    assert answer.status_code == 200, answer.text
    version = answer.json()
    assert version["signature"] == {"status": "verified", "signer": "acme"}
    assert audited(http, "support-signed")[-1]["details"]["signature"]["signer"] == "acme"
    target = tmp_path / "exported"
    where = ["--url", server.url]
    assert main(["adapters", "show", version["id"], *where]) == 0
    assert "signed by acme" in capsys.readouterr().out
    assert main(["adapters", "export", version["id"], "--format", "peft", "--out", str(target), *where]) == 0
    assert (target / "model.sig").read_text() == signature.read_text()


def test_the_command_sends_the_signature_of_a_folder(
    http: httpx2.Client, server: Server, keys: dict[str, Path], tmp_path: Path
) -> None:
    folder = adapter(tmp_path, "pushed", b"pushed")
    push = ["adapters", "push", str(folder), "--name", "support-pushed", "--url", server.url]
    assert main(push) == 1
    sign(folder, keys["acme"])
    assert main(push) == 0


@pytest.mark.parametrize(
    ("signer", "change", "code"),
    [
        (None, False, "signature_missing"),
        ("other", False, "signer_not_allowed"),
        ("acme", True, "signature_invalid"),
    ],
)
def test_what_the_policy_does_not_accept_is_refused_and_in_the_audit_log(
    http: httpx2.Client,
    server: Server,
    keys: dict[str, Path],
    tmp_path: Path,
    signer: str | None,
    change: bool,
    code: str,
) -> None:
    name = f"support-{code}"
    folder = adapter(tmp_path, "refused", code.encode())
    if signer is not None:
        sign(folder, keys[signer])
    if change:
        (folder / "adapter_model.safetensors").write_bytes(b"other weights")
    before = {str(path) for path in (server.data_dir / "store").rglob("*") if path.is_file()}
    assert refused(send(http, name, folder)) == code
    assert {str(path) for path in (server.data_dir / "store").rglob("*") if path.is_file()} == before
    assert http.get(f"/v1/adapters/{name}").status_code == 404
    (entry,) = audited(http, name)
    assert (entry["action"], entry["details"]["code"]) == ("adapter.refused", code)


def test_defaults_beside_a_signature_are_refused(
    http: httpx2.Client, keys: dict[str, Path], tmp_path: Path
) -> None:
    folder = adapter(tmp_path, "defaults", b"defaults")
    sign(folder, keys["acme"])
    assert refused(send(http, "support-x", folder, defaults='{"system": "Obey."}')) == "signature_invalid"


def test_a_policy_that_warns_takes_the_version_and_says_why(http: httpx2.Client, tmp_path: Path) -> None:
    answer = send(http, "draft", adapter(tmp_path, "draft", b"draft"))
    assert answer.status_code == 200, answer.text
    found = answer.json()["signature"]
    assert (found["status"], found["code"]) == ("refused", "signature_missing")


def test_a_name_without_a_policy_needs_no_signature(http: httpx2.Client, tmp_path: Path) -> None:
    answer = send(http, "free", adapter(tmp_path, "free", b"free"))
    assert answer.status_code == 200, answer.text
    assert answer.json()["signature"] is None


def test_a_pull_from_the_hub_needs_the_signature_too(
    http: httpx2.Client, hub: HubStandIn, keys: dict[str, Path], tmp_path: Path
) -> None:
    folder = adapter(tmp_path, "pulled", b"pulled")

    def pull(repo: str) -> httpx2.Response:
        hub.add_repo(repo, {file.name: file.read_bytes() for file in folder.iterdir()})
        return http.post("/v1/adapters?wait=true", json={"hub": {"repo": repo}})

    assert refused(pull("acme/unsigned")) == "signature_missing"
    sign(folder, keys["acme"])
    answer = pull("acme/signed")
    assert answer.status_code == 200, answer.text
    assert answer.json()["signature"]["signer"] == "acme"
    (folder / "model.sig").write_text(" " * (65 << 10))
    assert refused(pull("acme/large")) == "signature_invalid"


def test_signed_files_of_a_tokenizer_that_are_left_out_are_refused_however_they_come(
    http: httpx2.Client, hub: HubStandIn, keys: dict[str, Path], tmp_path: Path
) -> None:
    folder = adapter(tmp_path, "tokens", b"tokens")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["embed_tokens"]}))
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    sign(folder, keys["acme"])
    (folder / "chat_template.jinja").unlink()
    hub.add_repo("acme/tokens", {file.name: file.read_bytes() for file in folder.iterdir()})
    for answer in (
        send(http, "support-tokens", folder),
        http.post("/v1/adapters?wait=true", json={"hub": {"repo": "acme/tokens"}}),
    ):
        assert refused(answer) == "signature_invalid"
        assert "chat_template.jinja was signed" in answer.text


def test_a_version_that_is_there_already_can_be_signed_afterwards(
    http: httpx2.Client, keys: dict[str, Path], tmp_path: Path
) -> None:
    folder = adapter(tmp_path, "late", b"late")
    assert send(http, "draft-late", folder).json()["signature"]["status"] == "refused"
    sign(folder, keys["acme"])
    assert send(http, "draft-late", folder).json()["signature"]["status"] == "verified"


def test_a_verified_signature_is_not_lost_when_the_files_come_again_without_it(
    http: httpx2.Client, keys: dict[str, Path], tmp_path: Path
) -> None:
    folder = adapter(tmp_path, "again", b"again")
    sign(folder, keys["acme"])
    assert send(http, "draft-again", folder).json()["signature"]["status"] == "verified"
    (folder / "model.sig").unlink()
    assert send(http, "draft-again", folder).json()["signature"]["status"] == "verified"


@pytest.mark.parametrize(("name", "code"), [("support-large", "signature_invalid"), ("large", None)])
def test_a_signature_that_is_too_large_is_refused_only_where_one_is_needed(
    http: httpx2.Client, keys: dict[str, Path], tmp_path: Path, name: str, code: str | None
) -> None:
    folder = adapter(tmp_path, "large", name.encode())
    signature = sign(folder, keys["acme"])
    signature.write_text(signature.read_text() + " " * (64 << 10))
    answer = send(http, name, folder)
    if code is None:
        assert answer.status_code == 200, answer.text
    else:
        assert refused(answer) == code


def test_a_name_that_no_adapter_may_have_reaches_neither_the_audit_log_nor_the_log(
    http: httpx2.Client, server: Server, tmp_path: Path
) -> None:
    answer = send(http, "support\nforged", adapter(tmp_path, "forged", b"forged"))
    assert answer.status_code == 400, answer.text
    assert audited(http, "support\nforged") == []
    assert "\nforged" not in server.log


def test_a_merge_under_a_name_that_needs_a_signature_needs_signed_parents(
    http: httpx2.Client, keys: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        folder = adapter(tmp_path, name, name.encode())
        send(http, f"free-{name}", folder, activate="true").raise_for_status()
    parents = [{"name": f"free-{name}", "weight": 0.5} for name in ("one", "two")]
    body = {"name": "support-merged", "method": "linear", "adapters": parents}
    assert refused(http.post("/v1/adapters/merge", json=body)) == "signature_missing"
    assert audited(http, "support-merged")[0]["action"] == "adapter.refused"


def test_a_folder_at_startup_needs_the_signature_too(
    serve_scripted: Starter, keys: dict[str, Path], policy: tuple[str, ...], tmp_path: Path
) -> None:
    folder = adapter(tmp_path, "folder", b"folder")
    options = ["words", *policy, "--adapter"]
    with serve_scripted(*options, f"support={folder}", ready=False) as server:
        assert server.exit_status() != 0
        assert "signature_missing" in server.log
    sign(folder, keys["acme"])
    with serve_scripted(*options, f"support={folder}") as server, server.client() as http:
        (version,) = http.get("/v1/adapters/support/versions").json()["data"]
        assert (version["signature"]["signer"], version["active"]) == ("acme", True)


def test_a_folder_whose_version_is_ready_outlives_a_new_rule_and_may_be_signed_later(
    serve_scripted: Starter, keys: dict[str, Path], policy: tuple[str, ...], tmp_path: Path
) -> None:
    folder = adapter(tmp_path, "kept", b"kept")
    options, data = ("words", "--adapter", f"support={folder}"), tmp_path / "data"
    with serve_scripted(*options, data_dir=data):
        pass
    for signer in (None, "acme"):
        if signer is not None:
            sign(folder, keys[signer])
        with serve_scripted(*options, *policy, data_dir=data) as server, server.client() as http:
            (version,) = http.get("/v1/adapters/support/versions").json()["data"]
            assert version["active"]
            assert (version["signature"] or {}).get("signer") == signer


def test_a_policy_that_cannot_be_used_stops_the_start(serve_scripted: Starter, tmp_path: Path) -> None:
    file = tmp_path / "policy.json"
    file.write_text('{"rules": [{"policy": "perhaps"}]}')
    with serve_scripted("words", "--signatures", str(file), ready=False) as server:
        assert server.exit_status() != 0
        assert "perhaps" in server.log


# ---- keyless, by Sigstore ------------------------------------------------------------------------


def test_a_keyless_upload_shows_who_signed_by_which_issuer(
    http: httpx2.Client,
    server: Server,
    sigstore: PrivateSigstore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = adapter(tmp_path, "keyless", b"keyless")
    sigstore.sign(folder)
    answer = send(http, "keyless", folder)
    assert answer.status_code == 200, answer.text
    signature = {"status": "verified", "signer": "mail", "identity": SIGNER, "issuer": ISSUER}
    assert answer.json()["signature"] == signature
    assert audited(http, "keyless")[-1]["details"]["signature"] == signature
    assert main(["adapters", "show", answer.json()["id"], "--url", server.url]) == 0
    assert f"signed by mail ({SIGNER}, {ISSUER})" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("identity", "issuer", "minutes", "code"),
    [
        ("mallory@evil.example", ISSUER, 1, "signer_not_allowed"),
        (SIGNER, "https://evil.example", 1, "signer_not_allowed"),
        (SIGNER, ISSUER, 11, "signature_expired"),
        (SIGNER, ISSUER, None, "signature_invalid"),
    ],
    ids=["identity", "issuer", "time", "another log"],
)
def test_a_keyless_upload_that_is_refused_is_not_stored_and_is_in_the_audit_log(
    http: httpx2.Client,
    server: Server,
    sigstore: PrivateSigstore,
    tmp_path: Path,
    identity: str,
    issuer: str,
    minutes: int | None,
    code: str,
) -> None:
    folder = adapter(tmp_path, "refused", f"{identity} {issuer}".encode())
    if minutes is None:
        PrivateSigstore(tmp_path / "other").sign(folder)
    else:
        sigstore.sign(folder, identity, issuer, logged=timedelta(minutes=minutes))
    name = f"keyless-{hashlib.sha256(f'{identity}{issuer}{minutes}'.encode()).hexdigest()[:8]}"
    before = {str(path) for path in (server.data_dir / "store").rglob("*") if path.is_file()}
    assert refused(send(http, name, folder)) == code
    assert {str(path) for path in (server.data_dir / "store").rglob("*") if path.is_file()} == before
    assert http.get(f"/v1/adapters/{name}").status_code == 404
    (entry,) = audited(http, name)
    assert (entry["action"], entry["details"]["code"]) == ("adapter.refused", code)


def test_a_pull_from_the_hub_takes_a_keyless_signature_of_the_right_signer_only(
    http: httpx2.Client, hub: HubStandIn, sigstore: PrivateSigstore, tmp_path: Path
) -> None:
    folder = adapter(tmp_path, "pulled", b"keyless and pulled")

    def pull(repo: str) -> httpx2.Response:
        hub.add_repo(repo, {file.name: file.read_bytes() for file in folder.iterdir()})
        return http.post("/v1/adapters?wait=true", json={"hub": {"repo": repo}})

    sigstore.sign(folder, "mallory@evil.example")
    assert refused(pull("acme/keyless-wrong")) == "signer_not_allowed"
    assert audited(http, "hub:acme/keyless-wrong")[-1]["action"] == "adapter.refused"
    sigstore.sign(folder)
    answer = pull("acme/keyless-right")
    assert answer.status_code == 200, answer.text
    assert answer.json()["signature"]["identity"] == SIGNER


def test_a_folder_at_startup_needs_the_right_keyless_signature(
    serve_scripted: Starter, policy: tuple[str, ...], sigstore: PrivateSigstore, tmp_path: Path
) -> None:
    folder = adapter(tmp_path, "folder", b"keyless folder")
    options = ["words", *policy, "--adapter", f"keyless={folder}"]
    sigstore.sign(folder, "mallory@evil.example")
    with serve_scripted(*options, ready=False) as server:
        assert server.exit_status() != 0
        assert "signer_not_allowed" in server.log
    sigstore.sign(folder)
    with serve_scripted(*options) as server, server.client() as http:
        (version,) = http.get("/v1/adapters/keyless/versions").json()["data"]
        assert (version["signature"]["identity"], version["active"]) == (SIGNER, True)


def test_a_trusted_root_that_is_missing_stops_the_start(
    serve_scripted: Starter, policy: tuple[str, ...], tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing.json")
    for options in (policy[:2], (*policy[:3], missing)):
        with serve_scripted("words", *options, ready=False) as server:
            assert server.exit_status() != 0
            assert "--sigstore-root" in server.log


# ---- what jobs train -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(
    serve_scripted: Starter, keys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = keys["acme"].parent
    rule = {"name": "support*", "policy": "require", "signers": ["acme", "server"]}
    signers = {"acme": {"key": "acme.pub"}}
    (folder / "trained.json").write_text(json.dumps({"signers": signers, "rules": [rule]}))
    options = ("--signatures", str(folder / "trained.json"), "--signing-key", str(folder / "server.key"))
    with serve_scripted("words", *options) as server:
        yield server


def test_a_trained_version_is_signed_with_what_it_was_made_of_and_passes_a_gate(
    trained: Server, keys: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import model_signing

    http = trained.client()
    rule = {"name": "support-own", "signature": ["server"], "evaluation": {"margin": 0.05}}
    http.post("/v1/gates", json=rule).raise_for_status()
    client = openai_client(trained)
    job = run_job(trained, client, "rows scored", extra={"name": "support-own"}, seed=7)
    assert job.activated is True, job
    version = http.get(f"/v1/adapters/support-own/versions/{job.version}").json()
    statement = version["signature"]["statement"]
    assert (version["signature"]["status"], version["signature"]["signer"]) == ("verified", "server")
    assert statement["job"] == job.id
    assert statement["base"]["name"]
    assert len(statement["data"]["training"]["sha256"]) == 64
    assert statement["activation_decision"]["rule"] == "if_better"
    assert len(statement["recipe"]["sha256"]) == 64
    main(["adapters", "show", f"support-own@{job.version}", "--url", trained.url])
    assert "signed by server" in capsys.readouterr().out
    out = tmp_path / "export"
    exported = ("adapters", "export", "support-own", "--format", "peft", "--out", str(out))
    assert main([*exported, "--url", trained.url]) == 0
    model_signing.verifying.Config().use_elliptic_key_verifier(
        public_key=keys["acme"].parent / "server.key.pub"
    ).verify(out, out / "model.sig")
    weak = run_job(trained, client, "rows", extra={"name": "support-own"})
    assert weak.activated is False, "nothing shows that it is not worse"
    further = run_job(trained, client, "rows", model="support-own", extra={"name": "support-next"})
    assert further.status == "succeeded"


@pytest.mark.parametrize(
    ("signers", "options", "code"),
    [
        (["acme"], ("--signing-key",), "signer_not_allowed"),
        (["acme"], (), "signature_missing"),
        (["acme", "server"], ("--signing-key",), ""),
    ],
)
def test_nobody_trains_under_a_name_that_others_must_sign(
    serve_scripted: Starter, keys: dict[str, Path], signers: list[str], options: tuple[str, ...], code: str
) -> None:
    folder = keys["acme"].parent
    rule = {"name": "support*", "policy": "require", "signers": signers}
    file = folder / f"training-{'-'.join((*signers, *options))}.json"
    file.write_text(json.dumps({"signers": {"acme": {"key": "acme.pub"}}, "rules": [rule]}))
    key = [str(folder / "server.key")] * len(options)
    with serve_scripted("words", "--signatures", str(file), *options, *key) as server:
        http, client = server.client(), openai_client(server)
        asked = {"model": BASE, "training_file": add_file(client, "rows"), "activate": "never"}
        answer = http.post("/v1/fine_tuning/jobs", json={**asked, "name": "support-own"})
        if not code:
            assert answer.status_code == 200, answer.text
            return
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (422, code, "name")
        assert [one["details"]["code"] for one in audited(http, "support-own")] == [code]
        assert http.post("/v1/fine_tuning/jobs", json={**asked, "name": "mine"}).status_code == 200


def test_a_job_from_before_a_stricter_policy_makes_no_version_until_the_policy_lets_it(
    serve_scripted: Starter, keys: dict[str, Path], tmp_path: Path
) -> None:
    strict = keys["acme"].parent / "stricter.json"
    rules = [{"name": "support*", "policy": "require", "signers": ["acme"]}]
    strict.write_text(json.dumps({"signers": {"acme": {"key": "acme.pub"}}, "rules": rules}))
    with serve_scripted("words", data_dir=tmp_path / "data") as server:
        client = openai_client(server)
        job = make_job(client, "rows", extra={"name": "support-held", "hold": True})
        wait_job(server, client, job.id, lambda job: job.status == "paused")
    options = ("--signatures", str(strict))
    with serve_scripted("words", *options, data_dir=tmp_path / "data") as server, server.client() as http:
        client = openai_client(server)
        client.fine_tuning.jobs.resume(job.id)
        server.wait_for(lambda: ended(client.fine_tuning.jobs.retrieve(job.id)))
        failed = client.fine_tuning.jobs.retrieve(job.id)
        assert (failed.status, failed.error.code) == ("failed", "signature_missing")
        assert "have the operator add server" in failed.error.message.lower()
        assert http.get("/v1/adapters/support-held").status_code == 404
    signers: dict[str, Any] = {"acme": {"key": "acme.pub"}}
    rules[0]["signers"] = ["acme", "server"]
    strict.write_text(json.dumps({"signers": signers, "rules": rules}))
    options = (*options, "--signing-key", str(strict.parent / "server.key"))
    with serve_scripted("words", *options, data_dir=tmp_path / "data") as server, server.client() as http:
        client = openai_client(server)
        client.fine_tuning.jobs.resume(job.id)
        assert wait_job(server, client, job.id, ended).status == "succeeded"
        assert http.get("/v1/adapters/support-held").status_code == 200


def test_a_job_from_before_a_stricter_policy_goes_on_from_no_unsigned_or_deleted_version(
    serve_scripted: Starter, keys: dict[str, Path], tmp_path: Path
) -> None:
    folder = keys["acme"].parent
    rules = [{"name": "support*", "policy": "require", "signers": ["server"]}]
    (folder / "own.json").write_text(json.dumps({"signers": {}, "rules": rules}))
    jobs = {}
    with serve_scripted("words", data_dir=tmp_path / "data") as server, server.client() as http:
        client = openai_client(server)
        for name in ("unsigned", "deleted"):
            files = adapter(tmp_path, name, name.encode())
            upload_folder(http, name, files, "wait=true&activate=true").raise_for_status()
            asked = {"name": f"support-{name}", "activate": "always", "hold": True}
            jobs[name] = make_job(client, "rows", model=name, extra=asked).id
        for job in jobs.values():
            wait_job(server, client, job, lambda job: job.status == "paused")
        http.delete("/v1/adapters/deleted").raise_for_status()
    options = ("--signatures", str(folder / "own.json"), "--signing-key", str(folder / "server.key"))
    with serve_scripted("words", *options, data_dir=tmp_path / "data") as server, server.client() as http:
        client = openai_client(server)
        for name, why in (("unsigned", "has no verified signature"), ("deleted", "was deleted")):
            client.fine_tuning.jobs.resume(jobs[name])
            failed = wait_job(server, client, jobs[name], ended)
            assert (failed.status, failed.error.code) == ("failed", "signature_missing")
            assert why in failed.error.message
            assert failed.error.message.endswith(" Resume the job once the policy allows it.")
            assert "train again" not in failed.error.message, "what was trained is kept"
            assert http.get(f"/v1/adapters/support-{name}").status_code == 404
            (entry,) = audited(http, f"support-{name}")
            assert entry["details"]["code"] == "signature_missing"


@pytest.mark.parametrize("is_served_before", [False, True])
def test_a_checkpoint_of_a_job_from_before_a_stricter_policy_is_not_served(
    serve_scripted: Starter, keys: dict[str, Path], tmp_path: Path, is_served_before: bool
) -> None:
    strict = keys["acme"].parent / "strict-checkpoints.json"
    rules = [{"name": "support-kept", "policy": "require", "signers": ["acme"]}]
    strict.write_text(json.dumps({"signers": {"acme": {"key": "acme.pub"}}, "rules": rules}))
    with serve_scripted("words", data_dir=tmp_path / "data") as server:
        client = openai_client(server)
        job = make_job(client, "until-paused", extra={"name": "support-kept"})
        wait_job(server, client, job.id, lambda job: step_of(job) == 5)
        client.fine_tuning.jobs.pause(job.id)
        wait_job(server, client, job.id, lambda job: job.status == "paused")
        model = f"support-kept:{job.id}:step-5"
        asked = {"prompt": "one", "adapter": model, "max_tokens": 1}
        names = [model]
        if is_served_before:
            answer = server.client().post("/generate", json=asked).raise_for_status()
            names.append(answer.json()["adapter"])
            assert names[1].startswith(f"{model}@")
    options = ("--signatures", str(strict))
    with serve_scripted("words", *options, data_dir=tmp_path / "data") as server, server.client() as http:
        for name in names:
            with ThreadPoolExecutor(4) as pool:
                bodies = [{**asked, "adapter": name}] * 4
                answers = pool.map(lambda body: http.post("/generate", json=body), bodies)
                assert {refused(answer) for answer in answers} == {"signature_missing"}
            body = {"model": name, "training_file": add_file(openai_client(server), "rows"), "name": "other"}
            assert refused(http.post("/v1/fine_tuning/jobs", json=body)) == "signature_missing"
            session = http.post("/api/v1/create_session", json={}).json()["session_id"]
            sampled = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
            sampled["model_path"] = f"tinker://adapters/sampler_weights/{name}"
            assert refused(http.post("/api/v1/create_sampling_session", json=sampled)) == "signature_missing"
        refusals = [one for one in audited(http, "support-kept") if one["action"] == "adapter.refused"]
        assert len(refusals) == 1, "however often it is asked for"
        if not is_served_before:
            assert http.get(f"/v1/adapters/{model}").status_code == 404


def test_a_job_without_a_name_is_checked_under_the_one_that_it_gets(
    serve_scripted: Starter, keys: dict[str, Path]
) -> None:
    file = keys["acme"].parent / "unnamed.json"
    rules = [{"name": "ft-?*", "policy": "require", "signers": ["acme"]}]
    file.write_text(json.dumps({"signers": {"acme": {"key": "acme.pub"}}, "rules": rules}))
    with serve_scripted("words", "--signatures", str(file)) as server, server.client() as http:
        asked = {"model": BASE, "training_file": add_file(openai_client(server), "rows")}
        assert refused(http.post("/v1/fine_tuning/jobs", json=asked)) == "signature_missing"


def test_live_training_is_refused_where_others_must_sign_every_name(
    serve_scripted: Starter, keys: dict[str, Path]
) -> None:
    file = keys["acme"].parent / "everything.json"
    rules = [{"policy": "require", "signers": ["acme"]}]
    file.write_text(json.dumps({"signers": {"acme": {"key": "acme.pub"}}, "rules": rules}))
    with serve_scripted("words", "--signatures", str(file)) as server, server.client() as http:
        session = http.post("/api/v1/create_session", json={}).json()["session_id"]
        run = {"session_id": session, "model_seq_id": 0, "base_model": BASE, "lora_config": {"rank": 4}}
        answer = http.post("/api/v1/create_model", json=run)
        assert refused(answer) == "signature_missing"
        assert "Train under another name" not in answer.text, "its name is made of the run's"


def test_training_goes_on_from_no_unsigned_version_under_a_name_that_needs_signatures(
    trained: Server, tmp_path: Path
) -> None:
    http = trained.client()
    free = adapter(tmp_path, "free", b"unsigned")
    upload_folder(http, "free", free, "wait=true&activate=true").raise_for_status()
    file = add_file(openai_client(trained), "rows")
    asked = {"model": "free", "training_file": file, "name": "support-evil"}
    answer = http.post("/v1/fine_tuning/jobs", json={**asked, "activate": "never"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "signature_missing", "model")
    assert "which training under this name needs" in error["message"]
    found = http.get("/v1/audit", params={"action": "adapter.refused", "target": "support-evil"}).json()
    assert len(found["data"]) == 1
