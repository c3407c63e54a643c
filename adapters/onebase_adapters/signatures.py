"""Signatures of adapters, by OpenSSF Model Signing, and the policy that says who may sign which.

A signature is a file `model.sig` next to an adapter's files: a Sigstore bundle with an in-toto statement that
lists the files and their SHA-256 sums, as `model_signing sign` writes it. It is verified before an adapter is
registered, proved or loaded; files of the Hub are converted and stored by then, and served by nothing.
Nothing is fetched for that: keyless signatures are verified by a trusted root that is given as a file.
https://github.com/sigstore/model-transparency
https://docs.sigstore.dev/about/bundle/
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from onebase_adapters.format.added_tokens import TOKENIZER_FILES, has_token_rows
from onebase_adapters.format.config import (
    MAX_CONFIG_BYTES,
    MLX_WEIGHTS_FILE,
    MODEL_CONFIG_FILE,
    names_labels,
)
from onebase_adapters.format.defaults import DEFAULTS_FILES
from onebase_adapters.store.blobs import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE
from onebase_protocol.adapters import SignatureReport

SIGNATURE_FILE = "model.sig"
MAX_SIGNATURE_BYTES = 64 << 10
MAX_CERTIFICATES = 10
"""Largest number of certificates in a signature."""
SIGNABLE_FILES = frozenset(
    {*ADAPTER_FILES, MLX_WEIGHTS_FILE, MODEL_CONFIG_FILE, *TOKENIZER_FILES, *DEFAULTS_FILES}
)
"""Names of all files that this server reads of an adapter."""

SignatureCode = Literal["signature_missing", "signature_invalid", "signature_expired", "signer_not_allowed"]
SIGNATURE_CODES: frozenset[str] = frozenset(get_args(SignatureCode))
INSTALL = "pip install 'onebase[signing]'"
OWN = "server"
"""Name of the signer of what this server trained, for the rules of a policy."""
_log = logging.getLogger(__name__)
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"
_PAYLOAD = "application/vnd.in-toto+json"
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_ISSUER = "1.3.6.1.4.1.57264.1.1"
_ISSUER_DER = "1.3.6.1.4.1.57264.1.8"
"""Extensions of a keyless signer's certificate with the issuer of its identity, as plain and as DER text.
https://github.com/sigstore/fulcio/blob/main/docs/oid-info.md"""


class PolicyError(ValueError):
    """A policy that cannot be used; the message names the file and the field."""


class SignatureError(Exception):
    """A signature that the policy does not accept."""

    def __init__(self, code: SignatureCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class SignerEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A signer in the policy's file. Paths are relative to that file."""

    key: str = ""
    """Public key (PEM): NIST P-256, P-384 or P-521."""
    certificates: tuple[str, ...] = ()
    """Certificates (PEM) of the authorities that the signer's certificate must come from."""
    issuer: str = ""
    """OpenID Connect issuer (URL) that vouches for the identity of a keyless signer, by Sigstore."""
    identity: str = ""
    """Pattern of the signer's name: of the common name of its certificate, or of an alternative name; of a
    keyless signer, of the e-mail address or URI in its certificate."""
    until: str = ""
    """Date, as 2027-01-31, from which its signatures are refused."""


class PolicyRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule of the policy. The first one that matches tenant and name counts."""

    policy: Literal["none", "warn", "require"]
    tenant: str = "*"
    name: str = "*"
    signers: tuple[str, ...] = ()
    """Names of the signers whose signatures are accepted."""


class PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of the policy's file."""

    rules: tuple[PolicyRule, ...]
    signers: dict[str, SignerEntry] = {}


@dataclass(frozen=True)
class SentFiles:
    """The files of an adapter as they were sent. sums: SHA-256 (hex) by file name. bundle: the signature.
    takes_labels: whether its `config.json` adds label names. takes_tokens: whether its tokenizer's files may
    add tokens, a chat template and end tokens."""

    sums: Mapping[str, str]
    bundle: bytes | None = None
    takes_labels: bool = False
    takes_tokens: bool = False

    @classmethod
    def of(cls, files: Mapping[str, Path]) -> SentFiles:
        """Read files by their names. Raises OSError."""
        signature, config = files.get(SIGNATURE_FILE), files.get(CONFIG_FILE)
        weights = files.get(WEIGHTS_FILE) or files.get(MLX_WEIGHTS_FILE)
        known = b"" if config is None else _limited(config, MAX_CONFIG_BYTES)
        return cls(
            {name: _sum_of(file) for name, file in files.items() if name != SIGNATURE_FILE},
            None if signature is None else _limited(signature, MAX_SIGNATURE_BYTES),
            names_labels(known),
            weights is not None and has_token_rows(known, weights),
        )

    @classmethod
    def of_folder(cls, folder: Path) -> SentFiles:
        """Read the files of a folder that the server would use. Raises OSError."""
        names = sorted({*SIGNABLE_FILES, SIGNATURE_FILE})
        return cls.of({name: folder / name for name in names if (folder / name).is_file()})


def _sum_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _limited(file: Path, most: int) -> bytes:
    with file.open("rb") as opened:
        return opened.read(most + 1)


@dataclass(frozen=True)
class Checked:
    """Result of a check. bundle: the signature that was sent, as text, if it is verified."""

    report: SignatureReport
    bundle: str | None = field(default=None, repr=False)


class ServerKey:
    """Key with which a server signs the versions that it trained.

    public: file of the public key (PEM), which verifies them by `model_signing verify key`; it is missing
    where its folder cannot be written. pem: its content.
    """

    def __init__(self, private: Any, public: Path, pem: bytes) -> None:
        self._private = private
        self.public = public
        self.pem = pem

    @classmethod
    def load(cls, path: Path) -> ServerKey:
        """Read a private key (PEM, P-256); if there is no file, make a key. Its public key is next to it, as
        `path.pub`, if its folder can be written. Raises PolicyError."""
        if find_spec("cryptography") is None:
            raise PolicyError(f"A key to sign with needs the package model-signing: {INSTALL}")
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        public = path.with_name(path.name + ".pub")
        try:
            if not path.exists():
                _create_key(path)
            if mode := path.stat().st_mode & 0o077:
                _log.warning(
                    "%s: others may read or write this key (mode bits %03o). Restrict it: chmod 600",
                    path,
                    mode,
                )
            key = serialization.load_pem_private_key(path.read_bytes(), None)
            if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
                raise PolicyError(f"{path} is no private key of the curve P-256.")
        except (OSError, ValueError, TypeError) as error:
            raise PolicyError(f"{path} cannot be used as a key: {_first_line(error)}") from error
        pem = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        try:
            if not public.is_file() or public.read_bytes() != pem:
                public.write_bytes(pem)
        except OSError as error:
            _log.warning("the public key of %s is not beside it: %s", path, error)
        return cls(key, public, pem)

    def sign(self, name: str, sums: Mapping[str, str], facts: Mapping[str, Any]) -> str:
        """Return a Sigstore bundle with an in-toto statement: the files' SHA-256 sums (hex), as
        `model_signing` verifies them, and facts about how they were made, as `training` in its predicate."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec

        files = sorted(sums.items())
        root = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in files)).hexdigest()
        serialization = {
            "method": "files",
            "hash_type": "sha256",
            "allow_symlinks": False,
            "ignore_paths": [SIGNATURE_FILE],
        }
        resources = [{"name": file, "algorithm": "sha256", "digest": digest} for file, digest in files]
        predicate = {"serialization": serialization, "resources": resources, "training": dict(facts)}
        statement = {
            "_type": _STATEMENT,
            "subject": [{"name": name, "digest": {"sha256": root}}],
            "predicateType": _PREDICATE,
            "predicate": predicate,
        }
        payload = json.dumps(statement, ensure_ascii=False, separators=(",", ":")).encode()
        encoded = b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD), _PAYLOAD.encode(), len(payload), payload)
        signature = self._private.sign(encoded, ec.ECDSA(hashes.SHA256()))
        hint = hashlib.sha256(self.pem).hexdigest()
        bundle = {
            "mediaType": _BUNDLE,
            "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(payload).decode(),
                "payloadType": _PAYLOAD,
                "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
            },
        }
        return json.dumps(bundle)


def _create_key(path: Path) -> None:
    """Write a new private key; one that another server makes meanwhile stays. The file appears whole, or not
    at all. Raises OSError."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pem = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    number, work = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # of mode 600
    try:
        with open(number, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(work, path)
    finally:
        os.unlink(work)


@dataclass(frozen=True)
class SignaturePolicy:
    """Says who may sign which adapters. folder: what the signers' paths are relative to. root: file of the
    trusted root (JSON) by which keyless signatures are verified. own: public key (PEM) of the signer OWN."""

    rules: Sequence[PolicyRule] = ()
    signers: Mapping[str, SignerEntry] = field(default_factory=dict)
    folder: Path = Path()
    root: Path | None = None
    own: bytes = b""

    @classmethod
    def load(
        cls, path: Path | None, own: ServerKey | None = None, root: Path | None = None
    ) -> SignaturePolicy:
        """Read a policy, and check that all its keys and certificates can be used. Raises PolicyError.

        Args:
            own: the server's key, which makes it the signer OWN.
            root: Sigstore's trusted root, which keyless signers need.
        """
        added = {} if own is None else {OWN: SignerEntry(key=str(own.public.absolute()))}
        if path is None:
            return cls((), added, own=b"" if own is None else own.pem)
        try:
            found = msgspec.json.decode(path.read_bytes(), type=PolicyFile)
        except OSError as error:
            raise PolicyError(f"{path} cannot be read: {error}") from error
        except msgspec.MsgspecError as error:
            raise PolicyError(f"{path}: {error}") from error
        if OWN in found.signers:
            raise PolicyError(f"{path}: signers.{OWN}: this name is for --signing-key. Give it another one")
        pem = b"" if own is None else own.pem
        made = cls(found.rules, {**found.signers, **added}, path.absolute().parent, root, pem)
        made._check(path)
        return made

    def _check(self, path: Path) -> None:
        for number, rule in enumerate(self.rules):
            for name in rule.signers:
                if name not in self.signers:
                    raise PolicyError(f"{path}: rules[{number}].signers: there is no signer {name!r}")
            if rule.policy == "require" and not rule.signers:
                raise PolicyError(f"{path}: rules[{number}]: require needs signers")
        if self.is_active and find_spec("model_signing") is None:
            raise PolicyError(f"{path} needs the package model-signing: {INSTALL}")
        for name, signer in self.signers.items():
            if [bool(signer.key), bool(signer.certificates), bool(signer.issuer)].count(True) != 1:
                raise PolicyError(f"{path}: signers.{name}: give either key or certificates, or issuer")
            if signer.key and signer.identity:
                raise PolicyError(f"{path}: signers.{name}.identity: is for certificates and for issuer")
            if signer.issuer and not signer.identity:
                raise PolicyError(
                    f"{path}: signers.{name}.identity: is missing. Name an e-mail address or URI, or anyone "
                    f"with an account at {signer.issuer} could sign"
                )
            if signer.issuer and self.root is None:
                raise PolicyError(
                    f"{path}: signers.{name}.issuer: needs Sigstore's trusted root. Give its file as "
                    "--sigstore-root"
                )
            try:
                _ends_at(signer)
                if self.is_active and signer.issuer:
                    self._keyless_verifier()
                elif self.is_active:
                    self._verifier(name)
            except Exception as error:  # what the libraries raise for a file that is no key
                if signer.issuer:
                    where = f"signers.{name}.issuer: --sigstore-root {self.root}"
                    raise PolicyError(f"{path}: {where} is no trusted root: {_reason(error)}") from error
                raise PolicyError(f"{path}: signers.{name}: {error}") from error

    @property
    def is_active(self) -> bool:
        """Whether any rule has signatures looked at."""
        return any(rule.policy != "none" for rule in self.rules)

    def rule(self, tenant: str, name: str) -> PolicyRule:
        """Return the rule for an adapter."""
        for rule in self.rules:
            if fnmatchcase(tenant, rule.tenant) and fnmatchcase(name, rule.name):
                return rule
        return PolicyRule("none")

    def check(self, tenant: str, name: str, sent: SentFiles) -> Checked | None:
        """Verify the signature of files that were sent under a tenant's name. Blocks.

        Return None where the policy asks for no signature and there is none.

        Raises:
            SignatureError: the policy requires a signature that this is not.
        """
        rule = self.rule(tenant, name)
        if rule.policy == "none":
            return None
        try:
            report = self._verified(rule, sent)
        except SignatureError as error:
            if rule.policy == "require":
                raise
            return Checked(SignatureReport("refused", code=error.code, message=str(error)))
        return Checked(report, None if sent.bundle is None else sent.bundle.decode("utf-8", "replace"))

    def _verified(self, rule: PolicyRule, sent: SentFiles) -> SignatureReport:
        """Return the signer, and the name in its certificate. Raises SignatureError."""
        if sent.bundle is None:
            raise SignatureError(
                "signature_missing",
                f"There is no {SIGNATURE_FILE}, and this name needs a signature of "
                f"{' or '.join(rule.signers) or 'a signer'}. Sign the folder with `model_signing sign`.",
            )
        if len(sent.bundle) > MAX_SIGNATURE_BYTES:
            raise _invalid(f"{SIGNATURE_FILE} is over {MAX_SIGNATURE_BYTES} bytes.")
        if _is_keyless(sent.bundle):
            report, manifest = self._keyless_signer_of(sent.bundle, rule)
        else:
            with tempfile.TemporaryDirectory(prefix="onebase-signature-") as folder:
                file = Path(folder) / SIGNATURE_FILE
                file.write_bytes(sent.bundle)
                report, manifest = self._signer_of(file, rule)
        _check_files(manifest, sent)
        return report

    def _signer_of(self, file: Path, rule: PolicyRule) -> tuple[SignatureReport, Any]:
        """Return the signer who made a signature with a key or a certificate, and its manifest.

        Signers may share an authority, so one whom the rule does not name, or whose identity is another, does
        not end the search.

        Raises SignatureError.
        """
        from model_signing._signing.sign_sigstore_pb import Signature

        try:
            signature = Signature.read(file)
        except Exception as error:
            raise _invalid(f"{SIGNATURE_FILE} cannot be read: {_first_line(error)}.") from error
        refused: list[SignatureError] = []
        known = [name for name, signer in self.signers.items() if not signer.issuer]
        for name in dict.fromkeys(one for one in (*rule.signers, *known) if one in known):
            identity: str | None = None
            signer, chain = self.signers[name], []
            try:
                manifest = self._verifier(name).verify(signature)
            except Exception:  # of another signer, or forged: cryptography, OpenSSL and pydantic each say so
                continue
            try:
                if not signer.key:
                    found = signature.bundle.verification_material.x509_certificate_chain
                    chain = [bytes(one.raw_bytes) for one in found.certificates]
                    identity = _check_identity(chain[0], name, signer)
                self._check_signer(name, rule, chain)
            except SignatureError as error:
                refused.append(error)
                continue
            return SignatureReport("verified", signer=name, identity=identity), manifest
        if refused:
            raise _main_reason(refused)
        raise _invalid(
            f"{SIGNATURE_FILE} is no signature of a signer that this server knows "
            f"({', '.join(known) or 'none'})."
        )

    def _keyless_signer_of(self, bundle: bytes, rule: PolicyRule) -> tuple[SignatureReport, Any]:
        """Return the signer who made a signature without a key, by Sigstore, and its manifest.

        Raises SignatureError.
        """
        keyless = [name for name, signer in self.signers.items() if signer.issuer]
        if not keyless:
            raise _invalid(
                f"{SIGNATURE_FILE} was signed without a key, by Sigstore, and no signer of this server's "
                "policy does so. Sign with `model_signing sign key` or `model_signing sign certificate`, or "
                "have the operator add a signer with an issuer."
            )
        certificate, manifest = self._verified_keyless(bundle)
        issuer, identities = _keyless_identity(certificate)
        said = f"{', '.join(identities) or 'nobody'} of {issuer}"
        refused: list[SignatureError] = []
        for name in dict.fromkeys(one for one in (*rule.signers, *keyless) if one in keyless):
            signer = self.signers[name]
            identity = next((one for one in identities if fnmatchcase(one, signer.identity)), None)
            try:
                if identity is None or signer.issuer != issuer:
                    raise SignatureError(
                        "signer_not_allowed",
                        f"The signature is by {said}, and {name} is {signer.identity} of {signer.issuer}. "
                        "Have it signed by one who may, or have the operator add this signer.",
                    )
                self._check_signer(name, rule)
            except SignatureError as error:
                refused.append(error)
                continue
            return SignatureReport("verified", signer=name, identity=identity, issuer=issuer), manifest
        raise _main_reason(refused)

    def _verified_keyless(self, bundle: bytes) -> tuple[Any, Any]:
        """Return the signer's certificate of a keyless signature, and its manifest, whoever the signer is.

        The trusted root's authority must have made the certificate, its log of certificates must have seen
        that, its log of signatures must have this one, and the time of that or of its timestamp must be while
        the certificate was valid.

        Raises SignatureError.
        """
        from model_signing._signing.signing import dsse_payload_to_manifest
        from sigstore.errors import CertValidationError
        from sigstore.models import Bundle

        try:
            verifier = self._keyless_verifier()
        except Exception as error:  # what the libraries raise for a file that is no trusted root
            raise _invalid(
                f"This server's trusted root cannot be used: {_reason(error)}. The operator has to put the "
                "file of --sigstore-root in order."
            ) from error
        try:
            read = Bundle.from_json(bundle)
            certificate = read.signing_certificate
        except Exception as error:
            raise _invalid(
                f"{SIGNATURE_FILE} is no whole Sigstore bundle: {_reason(error)}. Sign again with "
                "`model_signing sign sigstore`."
            ) from error
        try:
            payload_type, payload = verifier.verify_dsse(read, _AnyIdentity())
            statement = json.loads(payload)
            if payload_type != _PAYLOAD or statement["_type"] != _STATEMENT:
                raise ValueError("what was signed is no in-toto statement")
            return certificate, dsse_payload_to_manifest(statement)
        except Exception as error:  # forged, or of another root: sigstore, cryptography and pydantic say so
            if isinstance(error, CertValidationError) and "not valid at validation time" in str(error):
                raise SignatureError(
                    "signature_expired",
                    "The signature was not made while its certificate was valid, from "
                    f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
                    f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M}, or an authority's was not valid "
                    "then. Sign again with `model_signing sign sigstore`.",
                ) from error
            raise _invalid(
                f"{SIGNATURE_FILE} is not verified by this server's trusted root: {_reason(error)}. Sign "
                "again with `model_signing sign sigstore`, or have the operator renew the file of "
                "--sigstore-root."
            ) from error

    def _keyless_verifier(self) -> Any:
        """Return Sigstore's verifier with the operator's trusted root, which is read again each time.

        It opens no connection.
        """
        from sigstore.models import TrustedRoot
        from sigstore.verify import Verifier

        return Verifier(trusted_root=TrustedRoot.from_file(str(self.root)))

    def _check_signer(self, name: str, rule: PolicyRule, chain: Sequence[bytes] = ()) -> None:
        """Raise SignatureError unless the rule accepts this signer now. chain: its certificates (DER)."""
        if name not in rule.signers:
            raise SignatureError(
                "signer_not_allowed",
                f"The signature is {name}'s, and only {' or '.join(rule.signers) or 'nobody'} may sign this "
                "name. Have the files signed by one who may, or send them under another name.",
            )
        if chain:
            self._check_dates(chain, name)
        signer = self.signers[name]
        ends = _ends_at(signer)
        if ends is not None and time.time() >= ends:
            raise SignatureError(
                "signature_expired", f"Signatures of {name} are accepted until {signer.until} only."
            )

    def _check_dates(self, chain: Sequence[bytes], name: str) -> None:
        """Raise SignatureError unless all certificates (DER) of a chain are valid now.

        The library verifies the chain as of the day on which the signer's certificate began; a bundle has no
        trusted time of its own.
        """
        from cryptography import x509
        from OpenSSL import crypto

        leaf, *others = [x509.load_der_x509_certificate(one) for one in chain]
        if not leaf.not_valid_before_utc <= datetime.now(UTC) < leaf.not_valid_after_utc:
            raise SignatureError(
                "signature_expired",
                f"The certificate of {name} is valid from {leaf.not_valid_before_utc:%Y-%m-%d} to "
                f"{leaf.not_valid_after_utc:%Y-%m-%d} only.",
            )
        store = crypto.X509Store()
        for file in self.signers[name].certificates:
            for one in x509.load_pem_x509_certificates((self.folder / file).read_bytes()):
                store.add_cert(crypto.X509.from_cryptography(one))
        between = [crypto.X509.from_cryptography(one) for one in others]
        try:
            crypto.X509StoreContext(store, crypto.X509.from_cryptography(leaf), between).verify_certificate()
        except crypto.X509StoreContextError as error:
            raise SignatureError(
                "signature_expired",
                f"The certificate of {name} comes from one that is not valid today: {_first_line(error)}.",
            ) from error

    def _verifier(self, name: str) -> Any:
        from model_signing._signing import sign_certificate, sign_ec_key

        signer = self.signers[name]
        if name == OWN and self.own:
            with tempfile.NamedTemporaryFile(prefix="onebase-key-") as file:
                file.write(self.own)
                file.flush()
                return sign_ec_key.Verifier(Path(file.name))
        if signer.key:
            return sign_ec_key.Verifier(self.folder / signer.key)
        return sign_certificate.Verifier([self.folder / one for one in signer.certificates])


class _AnyIdentity:
    """Identity policy for Sigstore's verifier, which then leaves it to the caller who may sign."""

    def verify(self, cert: Any) -> None:
        return


def _is_keyless(bundle: bytes) -> bool:
    """Return True if a bundle was signed without a key, by Sigstore. Raises SignatureError if it is none."""
    try:
        material = json.loads(bundle)["verificationMaterial"]
        if not isinstance(material, dict):
            raise TypeError("verificationMaterial is no object")
        kinds = {"publicKey", "x509CertificateChain", "certificate"} & material.keys()
        if len(kinds) != 1:
            raise ValueError(
                "verificationMaterial needs exactly one of publicKey, x509CertificateChain and certificate"
            )
        chain = material.get("x509CertificateChain", {"certificates": []})["certificates"]
        if len(chain) > MAX_CERTIFICATES:
            raise ValueError(f"it has {len(chain)} certificates, and {MAX_CERTIFICATES} are the most")
        is_logged = bool(material.get("tlogEntries"))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _invalid(f"{SIGNATURE_FILE} is no Sigstore bundle: {_first_line(error)}.") from error
    return "certificate" in kinds or ("x509CertificateChain" in kinds and is_logged)


def _keyless_identity(certificate: Any) -> tuple[str, list[str]]:
    """Return the issuer in a keyless signer's certificate, and its e-mail addresses and URIs.

    Raises SignatureError.
    """
    from cryptography import x509
    from cryptography.hazmat import asn1

    found = {one.oid.dotted_string: one.value for one in certificate.extensions}
    try:
        if _ISSUER_DER in found:
            issuer = asn1.decode_der(str, found[_ISSUER_DER].value)
        else:
            issuer = found[_ISSUER].value.decode()
        names = found[x509.SubjectAlternativeName.oid.dotted_string]
    except (LookupError, ValueError) as error:
        raise SignatureError(
            "signer_not_allowed", "The certificate of the signature does not say whose it is by which issuer."
        ) from error
    identities: list[str] = []
    for kind in (x509.RFC822Name, x509.UniformResourceIdentifier):
        identities += names.get_values_for_type(kind)
    return issuer, identities


def _check_identity(certificate: bytes, name: str, signer: SignerEntry) -> str | None:
    """Return the name in a signer's certificate (DER), if it has one. Raises SignatureError."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    found = x509.load_der_x509_certificate(certificate)
    common = [str(one.value) for one in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    others: list[str] = []
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        for kind in (x509.RFC822Name, x509.UniformResourceIdentifier, x509.DNSName):
            others += names.get_values_for_type(kind)
    except x509.ExtensionNotFound:
        pass
    if signer.identity and not any(fnmatchcase(one, signer.identity) for one in (*common, *others)):
        said = ", ".join((*common, *others)) or "nobody"
        raise SignatureError(
            "signer_not_allowed", f"The certificate is {said}'s, and {name} is {signer.identity}."
        )
    return next(iter((*common, *others)), None)


def _check_files(manifest: Any, sent: SentFiles) -> None:
    """Raise SignatureError unless the signed manifest covers what was sent."""
    if manifest.serialization_type["method"] != "files":
        raise _invalid("The signature is of parts of files. Sign whole files, as model_signing does.")
    signed: dict[str, str] = {}
    for one in manifest.resource_descriptors():
        if one.digest.algorithm != "sha256":
            raise _invalid(f"The signature has {one.digest.algorithm} sums. Sign with sha256, the default.")
        signed[str(one.identifier)] = one.digest.digest_hex
    for name, digest in sent.sums.items():
        if name not in signed:
            raise _invalid(f"The signature does not cover {name}.")
        if signed[name] != digest:
            raise _invalid(f"The signature is of another {name}.")
    needed = [next((name for name in DEFAULTS_FILES if name in signed), None)]
    needed += [MODEL_CONFIG_FILE] if sent.takes_labels and MODEL_CONFIG_FILE in signed else []
    needed += [name for name in TOKENIZER_FILES if sent.takes_tokens and name in signed]
    for wanted in needed:
        if wanted is not None and wanted not in sent.sums:
            raise _invalid(f"{wanted} was signed with the others, and is left out.")


def _invalid(message: str) -> SignatureError:
    return SignatureError("signature_invalid", message)


def _main_reason(refused: Sequence[SignatureError]) -> SignatureError:
    """Return the refusal to show of those for several signers: an expired signature before another's."""
    return next((one for one in refused if one.code == "signature_expired"), refused[0])


def _ends_at(signer: SignerEntry) -> float | None:
    """Return the Unix time from which a signer's signatures are refused. Raises ValueError."""
    if not signer.until:
        return None
    return datetime.fromisoformat(signer.until).replace(tzinfo=UTC).timestamp()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _reason(error: Exception) -> str:
    """Return an error's first reason: with the field if pydantic lists several, and without a file's path."""
    from pydantic import ValidationError

    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = error if isinstance(error, ValidationError) else error.__context__
    if isinstance(found, ValidationError):
        first = found.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(str(one) for one in first['loc'])}: {first['msg']}"[:200]
    return _first_line(error).rstrip(".")
