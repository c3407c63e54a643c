"""A signature is accepted if it is whole, of these very files, and of a signer who may sign this name."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from shutil import which
from typing import Any

import pytest
from tests.signing import (
    ISSUER,
    SIGNER,
    PrivateSigstore,
    make_certificate,
    make_key,
    sign,
    sign_by_certificate,
    signing,
)

from onebase_adapters.signatures import (
    MAX_SIGNATURE_BYTES,
    PolicyError,
    SentFiles,
    ServerKey,
    SignatureError,
    SignaturePolicy,
)

signing()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 1}')
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "onebase.json").write_text('{"system": "Be brief."}')
    (folder / "README.md").write_text("for people")
    return folder


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    """Private keys by their names; the public ones lie beside the policy."""
    return {name: make_key(tmp_path, name)[0] for name in ("acme", "other")}


def policy(folder: Path, *rules: dict[str, Any], **signers: dict[str, Any]) -> SignaturePolicy:
    signers = signers or {"acme": {"key": "acme.pub"}, "other": {"key": "other.pub"}}
    file = folder / "policy.json"
    file.write_text(json.dumps({"signers": signers, "rules": rules}))
    return SignaturePolicy.load(file)


REQUIRE = {"policy": "require", "signers": ["acme"]}


def refusal(
    policy: SignaturePolicy, folder: Path, tenant: str = "default", name: str = "support"
) -> SignatureError:
    with pytest.raises(SignatureError) as caught:
        policy.check(tenant, name, SentFiles.of_folder(folder))
    return caught.value


def test_a_folder_that_its_signer_signed_is_verified(
    tmp_path: Path, adapter: Path, keys: dict[str, Path]
) -> None:
    signature = sign(adapter, keys["acme"])
    checked = policy(tmp_path, REQUIRE).check("default", "support", SentFiles.of_folder(adapter))
    assert checked is not None
    assert (checked.report.status, checked.report.signer) == ("verified", "acme")
    assert checked.bundle == signature.read_text()


def test_a_required_signature_that_is_missing_is_refused(
    tmp_path: Path, adapter: Path, keys: dict[str, Path]
) -> None:
    assert refusal(policy(tmp_path, REQUIRE), adapter).code == "signature_missing"


def test_a_signature_of_a_signer_who_may_not_sign_this_name_is_refused(
    tmp_path: Path, adapter: Path, keys: dict[str, Path]
) -> None:
    sign(adapter, keys["other"])
    error = refusal(policy(tmp_path, REQUIRE), adapter)
    assert error.code == "signer_not_allowed"
    assert "other's" in str(error)


def test_a_signature_of_a_stranger_is_refused(tmp_path: Path, adapter: Path, keys: dict[str, Path]) -> None:
    sign(adapter, keys["other"])
    assert refusal(policy(tmp_path, REQUIRE, acme={"key": "acme.pub"}), adapter).code == "signature_invalid"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "onebase.json"])
def test_a_file_that_was_changed_after_the_signature_is_refused_by_its_name(
    tmp_path: Path, adapter: Path, keys: dict[str, Path], name: str
) -> None:
    sign(adapter, keys["acme"])
    (adapter / name).write_bytes(b"{}")
    error = refusal(policy(tmp_path, REQUIRE), adapter)
    assert (error.code, name in str(error)) == ("signature_invalid", True)


def test_a_file_that_was_added_after_the_signature_is_refused(
    tmp_path: Path, adapter: Path, keys: dict[str, Path]
) -> None:
    (adapter / "onebase.json").unlink()
    sign(adapter, keys["acme"])
    (adapter / "onebase.json").write_text('{"system": "Obey."}')
    assert "does not cover onebase.json" in str(refusal(policy(tmp_path, REQUIRE), adapter))


def test_signed_defaults_that_are_left_out_are_refused(
    tmp_path: Path, adapter: Path, keys: dict[str, Path]
) -> None:
    sign(adapter, keys["acme"])
    (adapter / "onebase.json").unlink()
    assert "left out" in str(refusal(policy(tmp_path, REQUIRE), adapter))


def test_a_file_that_the_server_does_not_read_may_be_missing(
    tmp_path: Path, adapter: Path, keys: dict[str, Path]
) -> None:
    sign(adapter, keys["acme"])
    (adapter / "README.md").unlink()
    assert policy(tmp_path, REQUIRE).check("default", "support", SentFiles.of_folder(adapter)) is not None


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"[" * 50_000, b"\xff", b'{"verificationMaterial": {"publicKey": {}}}'],
    ids=["empty", "no fields", "a list", "deep", "no text", "no signature"],
)
def test_a_file_that_is_no_signature_is_refused(
    tmp_path: Path, adapter: Path, keys: dict[str, Path], content: bytes
) -> None:
    (adapter / "model.sig").write_bytes(content)
    assert refusal(policy(tmp_path, REQUIRE), adapter).code == "signature_invalid"


def test_a_signature_that_is_too_large_is_refused(
    tmp_path: Path, adapter: Path, keys: dict[str, Path]
) -> None:
    signature = sign(adapter, keys["acme"])
    signature.write_text(signature.read_text() + " " * MAX_SIGNATURE_BYTES)
    assert refusal(policy(tmp_path, REQUIRE), adapter).code == "signature_invalid"


def test_a_signer_is_accepted_until_its_date(tmp_path: Path, adapter: Path, keys: dict[str, Path]) -> None:
    sign(adapter, keys["acme"])
    for days, code in ((1, None), (-1, "signature_expired")):
        until = f"{datetime.now(UTC) + timedelta(days=days):%Y-%m-%d}"
        found = policy(tmp_path, REQUIRE, acme={"key": "acme.pub", "until": until})
        if code is None:
            assert found.check("default", "support", SentFiles.of_folder(adapter)) is not None
        else:
            assert refusal(found, adapter).code == code


def test_the_first_rule_that_matches_tenant_and_name_counts(
    tmp_path: Path, adapter: Path, keys: dict[str, Path]
) -> None:
    found = policy(
        tmp_path,
        {"tenant": "acme", "name": "support-*", **REQUIRE},
        {"tenant": "acme", "policy": "warn", "signers": ["acme"]},
        {"policy": "none"},
    )
    sent = SentFiles.of_folder(adapter)
    assert refusal(found, adapter, "acme", "support-de").code == "signature_missing"
    warned = found.check("acme", "other", sent)
    assert warned is not None
    assert (warned.report.status, warned.report.code) == ("refused", "signature_missing")
    assert found.check("another", "support-de", sent) is None


@pytest.mark.parametrize(
    ("begins", "ends", "code"), [(-10, 10, None), (-20, -10, "signature_expired")], ids=["valid", "expired"]
)
def test_a_certificate_is_accepted_while_it_is_valid(
    tmp_path: Path, adapter: Path, begins: int, ends: int, code: str | None
) -> None:
    now = datetime.now(UTC)
    made = make_certificate(
        tmp_path,
        "releases@acme.example",
        begins=now + timedelta(days=begins),
        ends=now + timedelta(days=ends),
    )
    sign_by_certificate(adapter, *made)
    signer = {"certificates": ["root.pem"], "identity": "*@acme.example"}
    found = policy(tmp_path, REQUIRE, acme=signer)
    if code is not None:
        assert refusal(found, adapter).code == code
        return
    checked = found.check("default", "support", SentFiles.of_folder(adapter))
    assert checked is not None
    assert checked.report.identity == "releases@acme.example"
    stranger = policy(tmp_path, REQUIRE, acme=signer | {"identity": "*@other.example"})
    assert refusal(stranger, adapter).code == "signer_not_allowed"


def test_a_certificate_of_another_authority_is_refused(tmp_path: Path, adapter: Path) -> None:
    now = datetime.now(UTC)
    (tmp_path / "evil").mkdir()
    for folder in (tmp_path, tmp_path / "evil"):
        made = make_certificate(folder, "acme", begins=now - timedelta(days=1), ends=now + timedelta(days=1))
    sign_by_certificate(adapter, *made)
    assert (
        refusal(policy(tmp_path, REQUIRE, acme={"certificates": ["root.pem"]}), adapter).code
        == "signature_invalid"
    )


def test_signers_of_one_authority_are_told_apart_by_their_names(tmp_path: Path, adapter: Path) -> None:
    now = datetime.now(UTC)
    made = make_certificate(
        tmp_path, "b@acme.example", begins=now - timedelta(days=1), ends=now + timedelta(days=1)
    )
    sign_by_certificate(adapter, *made)
    signers = {one: {"certificates": ["root.pem"], "identity": f"{one}@*"} for one in "abc"}
    found = policy(tmp_path, {"policy": "require", "signers": ["c", "b"]}, **signers)
    checked = found.check("default", "support", SentFiles.of_folder(adapter))
    assert checked is not None
    assert checked.report.signer == "b"
    only = policy(tmp_path, {"policy": "require", "signers": ["a"]}, **signers)
    assert refusal(only, adapter).code == "signer_not_allowed"


def test_an_authority_that_is_not_valid_any_more_is_refused(tmp_path: Path, adapter: Path) -> None:
    now = datetime.now(UTC)
    made = make_certificate(
        tmp_path,
        "acme",
        begins=now - timedelta(days=10),
        ends=now + timedelta(days=10),
        root_ends=now - timedelta(days=1),
    )
    sign_by_certificate(adapter, *made)
    found = policy(tmp_path, REQUIRE, acme={"certificates": ["root.pem"]})
    assert refusal(found, adapter).code == "signature_expired"


@pytest.mark.parametrize(
    ("name", "config"),
    [("io.yaml", "{}"), ("Modelfile", "{}"), ("config.json", '{"task_type": "SEQ_CLS"}')],
)
def test_a_signed_file_that_the_server_would_read_may_not_be_left_out(
    tmp_path: Path, adapter: Path, keys: dict[str, Path], name: str, config: str
) -> None:
    (adapter / "onebase.json").unlink()
    (adapter / "adapter_config.json").write_text(config)
    (adapter / name).write_text("{}")
    sign(adapter, keys["acme"])
    (adapter / name).unlink()
    assert f"{name} was signed" in str(refusal(policy(tmp_path, REQUIRE), adapter))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
def test_a_signed_file_of_the_tokenizer_may_be_left_out_only_if_it_is_not_read(
    tmp_path: Path, adapter: Path, keys: dict[str, Path], name: str
) -> None:
    for config, is_read in (('{"modules_to_save": ["embed_tokens"]}', True), ('{"r": 1}', False)):
        (adapter / "adapter_config.json").write_text(config)
        (adapter / name).write_text("{}")
        sign(adapter, keys["acme"])
        (adapter / name).unlink()
        if is_read:
            assert f"{name} was signed" in str(refusal(policy(tmp_path, REQUIRE), adapter))
        else:
            found = policy(tmp_path, REQUIRE).check("default", "support", SentFiles.of_folder(adapter))
            assert found is not None


def test_a_signature_that_is_not_verified_is_not_kept(
    tmp_path: Path, adapter: Path, keys: dict[str, Path]
) -> None:
    sign(adapter, keys["other"])
    warned = policy(tmp_path, {"policy": "warn", "signers": ["acme"]})
    checked = warned.check("default", "support", SentFiles.of_folder(adapter))
    assert checked is not None
    assert checked.bundle is None


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[]", "Expected `object`"),
        ('{"rules": [{"policy": "perhaps"}]}', "perhaps"),
        ('{"rules": [{"policy": "none", "tenants": "a"}]}', "tenants"),
        ('{"rules": [{"policy": "require"}]}', "require needs signers"),
        ('{"rules": [{"policy": "warn", "signers": ["nobody"]}]}', "nobody"),
        ('{"rules": [{"policy": "warn"}], "signers": {"a": {"key": "missing.pub"}}}', "missing.pub"),
        ('{"rules": [{"policy": "warn"}], "signers": {"a": {}}}', "either key or certificates"),
        (
            '{"rules": [], "signers": {"a": {"issuer": "https://a", "certificates": ["a.pem"]}}}',
            "either key or certificates, or issuer",
        ),
        ('{"rules": [], "signers": {"a": {"issuer": "https://a"}}}', "identity: is missing"),
        (
            '{"rules": [{"policy": "warn"}], "signers": {"a": {"issuer": "https://a", "identity": "a@a"}}}',
            "--sigstore-root",
        ),
        ('{"rules": [], "signers": {"a": {"key": "acme.pub", "until": "soon"}}}', "soon"),
    ],
)
def test_a_policy_that_cannot_be_used_says_where(
    tmp_path: Path, keys: dict[str, Path], content: str, why: str
) -> None:
    file = tmp_path / "policy.json"
    file.write_text(content)
    with pytest.raises(PolicyError, match=why):
        SignaturePolicy.load(file)


# ---- keyless, by Sigstore ------------------------------------------------------------------------

KEYLESS = {"issuer": ISSUER, "identity": "*@acme.example"}


@pytest.fixture
def sigstore(tmp_path: Path) -> PrivateSigstore:
    return PrivateSigstore(tmp_path / "sigstore")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def keyless_policy(folder: Path, root: Path, *rules: dict[str, Any], **signers: Any) -> SignaturePolicy:
    file = folder / "keyless.json"
    file.write_text(json.dumps({"signers": signers or {"acme": KEYLESS}, "rules": rules or [REQUIRE]}))
    return SignaturePolicy.load(file, None, root)


def change_bundle(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "model.sig"
    bundle = json.loads(file.read_text())
    change(bundle)
    file.write_text(json.dumps(bundle))


def entry(bundle: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = bundle["verificationMaterial"]["tlogEntries"][0]
    return found


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("identity", "pattern"),
    [
        (SIGNER, SIGNER),
        (SIGNER, "*@acme.example"),
        (
            "https://github.com/acme/adapters/.github/workflows/sign.yml@refs/heads/main",
            "https://github.com/acme/adapters/.github/workflows/sign.yml@refs/heads/*",
        ),
    ],
    ids=["address", "pattern", "URI"],
)
def test_a_keyless_signature_is_verified_by_the_trusted_root_without_a_network(
    tmp_path: Path, adapter: Path, sigstore: PrivateSigstore, identity: str, pattern: str
) -> None:
    signature = sigstore.sign(adapter, identity)
    found = keyless_policy(tmp_path, sigstore.root, acme=KEYLESS | {"identity": pattern})
    checked = found.check("default", "support", SentFiles.of_folder(adapter))
    assert checked is not None
    report = checked.report
    assert (report.status, report.signer) == ("verified", "acme")
    assert (report.identity, report.issuer) == (identity, ISSUER)
    assert checked.bundle == signature.read_text()


def test_the_bundle_that_tests_sign_is_verified_by_model_signing_too(
    adapter: Path, sigstore: PrivateSigstore
) -> None:
    import model_signing

    signature = sigstore.sign(adapter)
    signing_config = {"mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json"}
    trust = sigstore.root.with_name("trust.json")
    trust.write_text(
        json.dumps(
            {
                "mediaType": "application/vnd.dev.sigstore.clienttrustconfig.v0.1+json",
                "trustedRoot": json.loads(sigstore.root.read_text()),
                "signingConfig": signing_config,
            }
        )
    )
    model_signing.verifying.Config().use_sigstore_verifier(
        identity=SIGNER, oidc_issuer=ISSUER, trust_config=trust
    ).verify(adapter, signature)


@pytest.mark.parametrize(
    ("identity", "issuer"),
    [("mallory@evil.example", ISSUER), (SIGNER, "https://evil.example"), (f"{SIGNER}.evil.example", ISSUER)],
    ids=["identity", "issuer", "longer identity"],
)
def test_a_keyless_signature_of_another_identity_or_issuer_is_refused(
    tmp_path: Path, adapter: Path, sigstore: PrivateSigstore, identity: str, issuer: str
) -> None:
    sigstore.sign(adapter, identity, issuer)
    error = refusal(keyless_policy(tmp_path, sigstore.root), adapter)
    assert error.code == "signer_not_allowed"
    assert f"{identity} of {issuer}" in str(error)
    assert f"*@acme.example of {ISSUER}" in str(error)


def test_a_keyless_signature_is_refused_when_another_file_was_signed(
    tmp_path: Path, adapter: Path, sigstore: PrivateSigstore
) -> None:
    sigstore.sign(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"others")
    error = refusal(keyless_policy(tmp_path, sigstore.root), adapter)
    assert (error.code, "adapter_model.safetensors" in str(error)) == ("signature_invalid", True)


@pytest.mark.parametrize("minutes", [-1, 11], ids=["before", "after"])
def test_a_keyless_signature_made_outside_its_certificates_time_is_refused(
    tmp_path: Path, adapter: Path, sigstore: PrivateSigstore, minutes: int
) -> None:
    sigstore.sign(adapter, logged=timedelta(minutes=minutes))
    error = refusal(keyless_policy(tmp_path, sigstore.root), adapter)
    assert error.code == "signature_expired"
    assert "sign sigstore" in str(error)


@pytest.mark.skipif(which("openssl") is None, reason="openssl makes the timestamps")
@pytest.mark.parametrize(
    ("is_promised", "minutes", "code"),
    [(True, 5, None), (False, 5, None), (True, 11, "signature_expired"), (False, 11, "signature_expired")],
)
def test_a_timestamp_of_an_authority_must_be_within_the_certificates_time(
    tmp_path: Path,
    adapter: Path,
    sigstore: PrivateSigstore,
    is_promised: bool,
    minutes: int,
    code: str | None,
) -> None:
    sigstore.sign(adapter, age=timedelta(minutes=minutes), is_stamped=True)
    if not is_promised:
        change_bundle(adapter, lambda bundle: entry(bundle).pop("inclusionPromise"))
    found = keyless_policy(tmp_path, sigstore.root)
    if code is None:
        assert found.check("default", "support", SentFiles.of_folder(adapter)) is not None
    else:
        assert refusal(found, adapter).code == code


@pytest.mark.skipif(which("openssl") is None, reason="openssl makes the timestamps")
def test_a_timestamp_of_an_authority_that_is_not_in_the_trusted_root_is_no_time(
    tmp_path: Path, adapter: Path, sigstore: PrivateSigstore
) -> None:
    sigstore.sign(adapter, age=timedelta(minutes=5), is_stamped=True)
    change_bundle(adapter, lambda bundle: entry(bundle).pop("inclusionPromise"))
    root = json.loads(sigstore.root.read_text())
    other = json.loads(PrivateSigstore(tmp_path / "other").root.read_text())
    for authorities, why in ((other["timestampAuthorities"], "verified time"), ([], "Timestamp Authorities")):
        sigstore.root.write_text(json.dumps(root | {"timestampAuthorities": authorities}))
        error = refusal(keyless_policy(tmp_path, sigstore.root), adapter)
        assert (error.code, why in str(error)) == ("signature_invalid", True)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda bundle: entry(bundle).pop("inclusionProof"), "inclusionProof"),
        (lambda bundle: entry(bundle)["inclusionProof"].pop("checkpoint"), "inclusion proof"),
        (lambda bundle: entry(bundle)["inclusionProof"].update(hashes=[]), "inclusion proof"),
        (lambda bundle: entry(bundle)["inclusionProof"].update(hashes=["AAAA"]), "inclusion proof"),
        (lambda bundle: entry(bundle).pop("inclusionPromise"), "inclusion promise"),
        (
            lambda bundle: entry(bundle).update(integratedTime=str(int(entry(bundle)["integratedTime"]) + 1)),
            "inclusion promise",
        ),
        (lambda bundle: bundle["verificationMaterial"].update(tlogEntries=[]), "log entry"),
        (lambda bundle: bundle["dsseEnvelope"].update(payloadType="text/plain"), "invalid signature"),
        (lambda bundle: bundle["dsseEnvelope"]["signatures"][0].update(sig="AAAA"), "invalid signature"),
    ],
    ids=["no proof", "no checkpoint", "no hashes", "hashes", "no promise", "time", "no entry", "type", "sig"],
)
def test_a_keyless_signature_without_all_its_evidence_is_refused(
    tmp_path: Path,
    adapter: Path,
    sigstore: PrivateSigstore,
    change: Callable[[dict[str, Any]], Any],
    why: str,
) -> None:
    sigstore.sign(adapter)
    change_bundle(adapter, change)
    error = refusal(keyless_policy(tmp_path, sigstore.root), adapter)
    assert error.code == "signature_invalid"
    assert why in str(error)
    assert "sign sigstore" in str(error)


def test_a_keyless_signature_whose_statement_was_changed_is_refused(
    tmp_path: Path, adapter: Path, sigstore: PrivateSigstore
) -> None:
    sigstore.sign(adapter, change=lambda statement: statement.replace(b"adapter_model", b"adapter_other"))
    error = refusal(keyless_policy(tmp_path, sigstore.root), adapter)
    assert error.code == "signature_invalid"
    assert "invalid signature" in str(error)


@pytest.mark.parametrize(
    ("part", "why"),
    [("tlogs", "log entry"), ("ctlogs", "SCT"), ("certificateAuthorities", "certificate")],
)
def test_a_keyless_signature_of_services_that_are_not_in_the_trusted_root_is_refused(
    tmp_path: Path, adapter: Path, sigstore: PrivateSigstore, part: str, why: str
) -> None:
    sigstore.sign(adapter)
    root = json.loads(sigstore.root.read_text())
    other = PrivateSigstore(tmp_path / "other")
    root[part] = json.loads(other.root.read_text())[part]
    sigstore.root.write_text(json.dumps(root))
    error = refusal(keyless_policy(tmp_path, sigstore.root), adapter)
    assert error.code == "signature_invalid"
    assert why in str(error)
    assert "--sigstore-root" in str(error)


def test_an_entry_of_the_log_for_another_signature_is_refused(
    tmp_path: Path, adapter: Path, sigstore: PrivateSigstore
) -> None:
    earlier = entry(json.loads(sigstore.sign(adapter).read_text()))
    sigstore.sign(adapter)
    change_bundle(adapter, lambda bundle: bundle["verificationMaterial"].update(tlogEntries=[earlier]))
    error = refusal(keyless_policy(tmp_path, sigstore.root), adapter)
    assert error.code == "signature_invalid"
    assert "do not match" in str(error)


def test_a_trusted_root_that_is_gone_or_none_stops_the_start_and_refuses_what_comes_later(
    tmp_path: Path, adapter: Path, sigstore: PrivateSigstore
) -> None:
    sigstore.sign(adapter)
    found = keyless_policy(tmp_path, sigstore.root)
    sigstore.root.unlink()
    error = refusal(found, adapter)
    assert error.code == "signature_invalid"
    assert "--sigstore-root" in str(error)
    assert str(tmp_path) not in str(error), "who sends an adapter sees no path of the server"
    for content in (None, "{}", "no JSON"):
        if content is not None:
            sigstore.root.write_text(content)
        with pytest.raises(PolicyError, match=r"--sigstore-root .*trusted_root\.json is no trusted root"):
            keyless_policy(tmp_path, sigstore.root)


def test_a_keyless_signature_is_refused_with_what_to_do_where_no_signer_is_keyless(
    tmp_path: Path, adapter: Path, sigstore: PrivateSigstore, keys: dict[str, Path]
) -> None:
    sigstore.sign(adapter)
    error = refusal(policy(tmp_path, REQUIRE), adapter)
    assert error.code == "signature_invalid"
    assert "sign key" in str(error)
    assert "issuer" in str(error)


def test_rules_and_dates_of_keyless_signers_count_as_those_of_others(
    tmp_path: Path, adapter: Path, sigstore: PrivateSigstore, keys: dict[str, Path]
) -> None:
    signers = {"mail": KEYLESS, "acme": {"key": "acme.pub"}, "old": KEYLESS | {"until": "2020-01-01"}}
    sigstore.sign(adapter)
    for allowed, code in (
        (["acme", "mail"], None),
        (["old", "mail"], None),
        (["acme"], "signer_not_allowed"),
        (["old"], "signature_expired"),
    ):
        found = keyless_policy(tmp_path, sigstore.root, {"policy": "require", "signers": allowed}, **signers)
        if code is None:
            checked = found.check("default", "support", SentFiles.of_folder(adapter))
            assert checked is not None
            assert checked.report.signer == "mail"
        else:
            assert refusal(found, adapter).code == code
    sign(adapter, keys["acme"])
    found = keyless_policy(tmp_path, sigstore.root, {"policy": "require", "signers": ["acme"]}, **signers)
    assert found.check("default", "support", SentFiles.of_folder(adapter)) is not None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda material: material.update(
                x509CertificateChain={"certificates": [material.pop("certificate")] * 11}
            ),
            "11 certificates",
        ),
        (lambda material: material.update(publicKey={"hint": ""}), "exactly one"),
        (lambda material: material["certificate"].update(rawBytes="AAAA"), "Sigstore bundle"),
        (lambda material: material["tlogEntries"].extend(material["tlogEntries"] * 3), "exactly one log"),
        (lambda material: material["certificate"].update(rawBytes=["["] * 9000), "Sigstore bundle"),
    ],
    ids=["certificates", "two kinds", "no certificate", "entries", "list"],
)
def test_a_hostile_keyless_bundle_is_refused(
    tmp_path: Path,
    adapter: Path,
    sigstore: PrivateSigstore,
    change: Callable[[dict[str, Any]], Any],
    why: str,
) -> None:
    sigstore.sign(adapter)
    change_bundle(adapter, lambda bundle: change(bundle["verificationMaterial"]))
    error = refusal(keyless_policy(tmp_path, sigstore.root), adapter)
    assert (error.code, why in str(error)) == ("signature_invalid", True)


@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "1}"), ("[", "")])
def test_a_keyless_bundle_that_is_nested_deeply_is_refused(
    tmp_path: Path, adapter: Path, sigstore: PrivateSigstore, opened: str, closed: str
) -> None:
    found = keyless_policy(tmp_path, sigstore.root)
    for depth in (200, 500, 5000):
        nested = opened * depth + closed[:1] + closed[-1:] * (depth - 1)
        (adapter / "model.sig").write_text(f'{{"verificationMaterial": {{"certificate": {nested}}}}}')
        assert refusal(found, adapter).code == "signature_invalid"


# ---- the server's own ----------------------------------------------------------------------------


def signed_by_server(key: ServerKey, folder: Path, **facts: Any) -> None:
    for file in ("onebase.json", "README.md"):
        (folder / file).unlink()
    (folder / "model.sig").write_text(key.sign("tickets", SentFiles.of_folder(folder).sums, facts))


def test_what_the_server_signed_is_verified_by_model_signing_and_by_its_own_policy(
    tmp_path: Path, adapter: Path
) -> None:
    import model_signing

    key = ServerKey.load(tmp_path / "server.key")
    assert (tmp_path / "server.key").stat().st_mode & 0o777 == 0o600
    again = ServerKey.load(tmp_path / "server.key")
    signed_by_server(again, adapter, seed=7)
    model_signing.verifying.Config().use_elliptic_key_verifier(public_key=key.public).verify(
        adapter, adapter / "model.sig"
    )
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"rules": [{"policy": "require", "signers": ["server"]}]}))
    checked = SignaturePolicy.load(file, key).check("default", "a", SentFiles.of_folder(adapter))
    assert checked is not None
    assert (checked.report.status, checked.report.signer) == ("verified", "server")
    (adapter / "adapter_model.safetensors").write_bytes(b"others")
    assert refusal(SignaturePolicy.load(file, key), adapter).code == "signature_invalid"
    other = SignaturePolicy.load(file, ServerKey.load(tmp_path / "other.key"))
    assert refusal(other, adapter).code == "signature_invalid"


def test_a_key_in_a_folder_that_cannot_be_written_signs_all_the_same(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ServerKey.load(tmp_path / "server.key")
    (tmp_path / "server.key.pub").unlink()

    def refuse(*_: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    key = ServerKey.load(tmp_path / "server.key")
    monkeypatch.undo()
    assert not key.public.exists()
    signed_by_server(key, adapter)
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"rules": [{"policy": "require", "signers": ["server"]}]}))
    checked = SignaturePolicy.load(file, key).check("default", "a", SentFiles.of_folder(adapter))
    assert checked is not None
    assert checked.report.signer == "server"


def test_a_key_that_another_server_makes_at_the_same_time_is_the_one_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make_key(tmp_path, "theirs")[0]

    def link(work: str, path: Path) -> None:
        Path(path).write_bytes(theirs.read_bytes())
        raise FileExistsError(path)

    monkeypatch.setattr("os.link", link)
    key = ServerKey.load(tmp_path / "server.key")
    assert key.pem == (tmp_path / "theirs.pub").read_bytes()
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".server.key")] == []


def test_a_key_that_others_may_read_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ServerKey.load(tmp_path / "server.key")
    assert caplog.text == ""
    (tmp_path / "server.key").chmod(0o644)
    ServerKey.load(tmp_path / "server.key")
    assert "chmod 600" in caplog.text


def test_a_key_that_cannot_sign_and_a_signer_of_the_servers_name_stop_the_start(
    tmp_path: Path, keys: dict[str, Path]
) -> None:
    (tmp_path / "bad.key").write_text("no key")
    with pytest.raises(PolicyError, match=r"bad\.key"):
        ServerKey.load(tmp_path / "bad.key")
    with pytest.raises(PolicyError, match="--signing-key"):
        policy(tmp_path, REQUIRE, acme={"key": "acme.pub"}, server={"key": "acme.pub"})
