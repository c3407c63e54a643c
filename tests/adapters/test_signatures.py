"""A signature is accepted if it is whole, of these very files, and of a signer who may sign this name."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.signing import make_certificate, make_key, sign, sign_by_certificate, signing

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


def test_a_keyless_signature_is_refused_with_what_to_do(
    tmp_path: Path, adapter: Path, keys: dict[str, Path]
) -> None:
    signature = sign(adapter, keys["acme"])
    bundle = json.loads(signature.read_text())
    bundle["verificationMaterial"] = {"certificate": {"rawBytes": "AAAA"}, "tlogEntries": []}
    signature.write_text(json.dumps(bundle))
    assert "sign key" in str(refusal(policy(tmp_path, REQUIRE), adapter))


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


def test_a_key_that_cannot_sign_and_a_signer_of_the_servers_name_stop_the_start(
    tmp_path: Path, keys: dict[str, Path]
) -> None:
    (tmp_path / "bad.key").write_text("no key")
    with pytest.raises(PolicyError, match=r"bad\.key"):
        ServerKey.load(tmp_path / "bad.key")
    with pytest.raises(PolicyError, match="--signing-key"):
        policy(tmp_path, REQUIRE, acme={"key": "acme.pub"}, server={"key": "acme.pub"})
