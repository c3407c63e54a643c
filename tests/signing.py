"""Keys, certificates and signed adapters, as users of OpenSSF Model Signing make them."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


def signing() -> None:
    """Skip the module where the extra `signing` is not installed."""
    pytest.importorskip("model_signing")


def make_key(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a private and a public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    private.write_bytes(_pem(key))
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def sign(folder: Path, private: Path) -> Path:
    """Sign a folder with a key, as `model_signing sign key` does. Return the signature."""
    import model_signing

    target = folder / "model.sig"
    model_signing.signing.Config().use_elliptic_key_signer(private_key=private).set_hashing_config(
        model_signing.hashing.Config().set_ignored_paths(paths=[target], ignore_git_paths=True)
    ).sign(folder, target)
    return target


def make_certificate(
    folder: Path, identity: str, *, begins: datetime, ends: datetime, root_ends: datetime | None = None
) -> tuple[Path, Path, Path]:
    """Write a key, a certificate for it, and that of the authority."""
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Acme authority")])
    root = (
        x509.CertificateBuilder()
        .subject_name(issuer)
        .issuer_name(issuer)
        .public_key(authority.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins - timedelta(days=1))
        .not_valid_after(root_ends or datetime.now(UTC) + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(authority, hashes.SHA256())
    )
    leaf = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .sign(authority, hashes.SHA256())
    )
    files = folder / "leaf.key", folder / "leaf.pem", folder / "root.pem"
    files[0].write_bytes(_pem(key))
    for file, one in zip(files[1:], (leaf, root), strict=True):
        file.write_bytes(one.public_bytes(serialization.Encoding.PEM))
    return files


def _key_usage(**used: bool) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**(dict.fromkeys(names, False) | used))


def sign_by_certificate(folder: Path, key: Path, certificate: Path, root: Path) -> Path:
    """Sign a folder as `model_signing sign certificate` does."""
    import model_signing

    target = folder / "model.sig"
    model_signing.signing.Config().use_certificate_signer(
        private_key=key, signing_certificate=certificate, certificate_chain=[root]
    ).set_hashing_config(
        model_signing.hashing.Config().set_ignored_paths(paths=[target], ignore_git_paths=True)
    ).sign(folder, target)
    return target


ISSUER = "https://accounts.example.com"
SIGNER = "releases@acme.example"


class PrivateSigstore:
    """A Sigstore of one's own: an authority, its log of certificates, and a log of signatures.

    root: its trusted root, as an operator gives it to a server. It signs as `model_signing sign sigstore`
    does; the services that this asks are functions here. Timestamps are of `openssl ts`.
    """

    def __init__(self, folder: Path, origin: str = "log.example.com") -> None:
        self._authority, self._certificate_log, self._log = (
            ec.generate_private_key(ec.SECP256R1()) for _ in range(3)
        )
        self._origin, self._folder = origin, folder
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Acme authority")])
        now = datetime.now(UTC)
        self._stamp_key = ec.generate_private_key(ec.SECP256R1())
        self._stamper = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Acme timestamps")]))
            .issuer_name(name)
            .public_key(self._stamp_key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=30))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING]), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .sign(self._authority, hashes.SHA256())
        )
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self._authority.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=30))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self._authority.public_key()), critical=False
            )
            .sign(self._authority, hashes.SHA256())
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.root = folder / "trusted_root.json"
        self.root.write_text(json.dumps(self._trusted_root()))

    def _trusted_root(self) -> dict[str, Any]:
        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            return {
                "baseUrl": f"https://{self._origin}",
                "hashAlgorithm": "SHA2_256",
                "publicKey": {
                    "rawBytes": _text(_spki(key)),
                    "keyDetails": "PKIX_ECDSA_P256_SHA_256",
                    "validFor": {"start": "2020-01-01T00:00:00Z"},
                },
                "logId": {"keyId": _text(_key_id(key))},
            }

        def authority(*chain: x509.Certificate) -> dict[str, Any]:
            return {
                "subject": {"organization": "Acme", "commonName": "Acme authority"},
                "uri": f"https://{self._origin}",
                "certChain": {"certificates": [{"rawBytes": _text(_der(one))} for one in chain]},
                "validFor": {"start": "2020-01-01T00:00:00Z"},
            }

        return {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "tlogs": [log(self._log)],
            "certificateAuthorities": [authority(self._certificate)],
            "ctlogs": [log(self._certificate_log)],
            "timestampAuthorities": [authority(self._stamper, self._certificate)],
        }

    def sign(
        self,
        folder: Path,
        identity: str = SIGNER,
        issuer: str = ISSUER,
        *,
        age: timedelta = timedelta(days=2),
        logged: timedelta = timedelta(minutes=1),
        is_stamped: bool = False,
        change: Callable[[bytes], bytes] = lambda statement: statement,
    ) -> Path:
        """Sign a folder. Return the signature.

        Args:
            age: time since the certificate began, which is valid for ten minutes.
            logged: time of the log's entry after that.
            is_stamped: adds a timestamp of an authority, of now.
            change: makes the payload of the envelope after it was signed and logged.
        """
        import model_signing
        from google.protobuf import json_format  # type: ignore[import-untyped]
        from model_signing._signing.signing import Payload

        target = folder / "model.sig"
        manifest = (
            model_signing.hashing.Config()
            .set_ignored_paths(paths=[target], ignore_git_paths=True)
            .hash(folder)
        )
        statement = json_format.MessageToJson(Payload(manifest).statement.pb).encode()
        begins = datetime.now(UTC).replace(microsecond=0) - age
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certify(key, identity, issuer, begins)
        kind = "application/vnd.in-toto+json"
        encoded = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(statement), statement)
        signature = key.sign(encoded, ec.ECDSA(hashes.SHA256()))
        body = {
            "apiVersion": "0.0.1",
            "kind": "dsse",
            "spec": {
                "envelopeHash": {"algorithm": "sha256", "value": "0" * 64},
                "payloadHash": {"algorithm": "sha256", "value": hashlib.sha256(statement).hexdigest()},
                "signatures": [
                    {
                        "signature": _text(signature),
                        "verifier": _text(certificate.public_bytes(serialization.Encoding.PEM)),
                    }
                ],
            },
        }
        bundle: dict[str, Any] = {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {
                "certificate": {"rawBytes": _text(_der(certificate))},
                "tlogEntries": [self._entry(_canonical(body), begins + logged)],
            },
            "dsseEnvelope": {
                "payload": _text(change(statement)),
                "payloadType": kind,
                "signatures": [{"sig": _text(signature)}],
            },
        }
        if is_stamped:
            stamps = {"rfc3161Timestamps": [{"signedTimestamp": _text(self._stamp(signature))}]}
            bundle["verificationMaterial"]["timestampVerificationData"] = stamps
        target.write_text(json.dumps(bundle))
        return target

    def _stamp(self, data: bytes) -> bytes:
        """Return a timestamp of now (RFC 3161)."""
        files = {
            "data": data,
            "serial": b"01",
            "stamper.key": _pem(self._stamp_key),
            "stamper.pem": self._stamper.public_bytes(serialization.Encoding.PEM),
            "openssl.cnf": b"[tsa]\nserial = serial\nsigner_digest = sha256\ndefault_policy = 1.2.3.4\n"
            b"digests = sha256\ness_cert_id_alg = sha256\n",
        }
        for name, content in files.items():
            (self._folder / name).write_bytes(content)
        query = "openssl ts -query -data data -sha256 -cert -out query"
        reply = (
            "openssl ts -reply -config openssl.cnf -section tsa -queryfile query -signer stamper.pem "
            "-inkey stamper.key -out reply"
        )
        for command in (query, reply):
            subprocess.run(command.split(), cwd=self._folder, check=True, capture_output=True, timeout=60)
        return (self._folder / "reply").read_bytes()

    def _certify(
        self, key: ec.EllipticCurvePrivateKey, identity: str, issuer: str, begins: datetime
    ) -> x509.Certificate:
        """Return a certificate of ten minutes, with the timestamp of the log of certificates."""
        name = x509.UniformResourceIdentifier(identity) if "://" in identity else x509.RFC822Name(identity)
        text = issuer.encode()
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(begins + timedelta(minutes=10))
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._authority.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(_extension("1.3.6.1.4.1.57264.1.1", text), critical=False)
            .add_extension(_extension("1.3.6.1.4.1.57264.1.8", b"\x0c%c" % len(text) + text), critical=False)
        )
        milliseconds = int(begins.timestamp() * 1000)

        def with_timestamp(signature: bytes) -> x509.Certificate:
            # RFC 6962, 3.2 and 3.3
            one = struct.pack(
                "!B32sQHBBH", 0, _key_id(self._certificate_log), milliseconds, 0, 4, 3, len(signature)
            )
            one += signature
            listed = struct.pack("!HH", len(one) + 2, len(one)) + one
            extension = _extension("1.3.6.1.4.1.11129.2.4.2", b"\x04%c" % len(listed) + listed)
            return builder.add_extension(extension, critical=False).sign(self._authority, hashes.SHA256())

        body = with_timestamp(bytes(72)).tbs_precertificate_bytes
        signed = struct.pack("!BBQH32s", 0, 0, milliseconds, 1, _key_id(self._authority))
        signed += len(body).to_bytes(3, "big") + body + b"\0\0"
        return with_timestamp(self._certificate_log.sign(signed, ec.ECDSA(hashes.SHA256())))

    def _entry(self, body: bytes, logged: datetime) -> dict[str, Any]:
        """Return the log's entry of a signature, the second of a tree of two."""
        sibling = hashlib.sha256(b"\0another entry").digest()
        root = hashlib.sha256(b"\1" + sibling + hashlib.sha256(b"\0" + body).digest()).digest()
        note = f"{self._origin}\n2\n{_text(root)}\n"
        signature = self._log.sign(note.encode(), ec.ECDSA(hashes.SHA256()))
        promised = {
            "body": _text(body),
            "integratedTime": int(logged.timestamp()),
            "logID": _key_id(self._log).hex(),
            "logIndex": 1,
        }
        promise = self._log.sign(_canonical(promised), ec.ECDSA(hashes.SHA256()))
        shown = f"{note}\n\u2014 {self._origin} {_text(_key_id(self._log)[:4] + signature)}\n"
        return {
            "logIndex": "1",
            "logId": {"keyId": _text(_key_id(self._log))},
            "kindVersion": {"kind": "dsse", "version": "0.0.1"},
            "integratedTime": str(promised["integratedTime"]),
            "inclusionPromise": {"signedEntryTimestamp": _text(promise)},
            "inclusionProof": {
                "logIndex": "1",
                "treeSize": "2",
                "rootHash": _text(root),
                "hashes": [_text(sibling)],
                "checkpoint": {"envelope": shown},
            },
            "canonicalizedBody": _text(body),
        }


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _canonical(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _key_id(key: ec.EllipticCurvePrivateKey) -> bytes:
    return hashlib.sha256(_spki(key)).digest()


def _extension(oid: str, value: bytes) -> x509.UnrecognizedExtension:
    return x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)
