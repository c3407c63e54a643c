"""Keys, certificates and signed adapters, as users of OpenSSF Model Signing make them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


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
        .add_extension(_for_signatures(), critical=True)
        .sign(authority, hashes.SHA256())
    )
    files = folder / "leaf.key", folder / "leaf.pem", folder / "root.pem"
    files[0].write_bytes(_pem(key))
    for file, one in zip(files[1:], (leaf, root), strict=True):
        file.write_bytes(one.public_bytes(serialization.Encoding.PEM))
    return files


def _for_signatures() -> x509.KeyUsage:
    others = (
        "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
        "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(digital_signature=True, **dict.fromkeys(others, False))


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
