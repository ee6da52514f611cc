"""Keys, signing and checking: the provenance statement in a DSSE envelope, the whole folder by an OpenSSF model signature.

The signatures are made by securesystemslib and by model-signing, so that others' tools can check them; bundle.py reads them. Elliptic-curve
keys in PEM files (RFC 7468), as `openssl` writes them. Nothing here asks for a password: it comes from the environment.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from buildsys.errors import BuildError, BuildErrors
from buildsys.release import bundle
from buildsys.release.folder import content, differences, hashes, merged, walk
from buildsys.release.provenance import ENVELOPE, SIGNATURE, STATEMENT

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

KEY, PASSWORD = "BUILDSYS_SIGNING_KEY", "BUILDSYS_KEY_PASSWORD"
CURVES = {"secp256r1": "P-256", "secp384r1": "P-384"}
OTHER_KINDS = {
    b"OPENSSH PRIVATE KEY-----": "an SSH key",
    b"SSH2 PUBLIC KEY": "an SSH key",
    b"ssh-": "an SSH key",
    b"ecdsa-sha2-": "an SSH key",
    b"BEGIN PGP ": "a PGP key",
    b"BEGIN RSA ": "an RSA key",
    b"BEGIN DSA ": "a DSA key",
}
"""What shows in a file, and what the file is then. In base64 nothing of this can show."""
MAX_KEY_BYTES = 64 << 10
NEEDED = ("model_signing.hashing", "model_signing.manifest", "model_signing.signing", "securesystemslib.dsse", "securesystemslib.signer")

_KNOWN = " or ".join(CURVES.values())
_MAKE = "make a right one: openssl ecparam -genkey -name prime256v1 -noout -out key.pem"
_NOT_OURS = "download the folder again from where it was published, or ask its publisher for the key; do not serve this one"


@dataclass(frozen=True)
class Signer:
    """A private key that signs; it is read once, and shown nowhere."""

    path: Path
    _private: EllipticCurvePrivateKey = field(repr=False, compare=False)
    _password: bytes | None = field(repr=False, compare=False, default=None)

    @classmethod
    def read(cls, path: Path, password: str = "") -> Signer:
        """The key in a PEM file. `password` is used if the key is encrypted, and only then."""
        raw = _pem(path)
        _refuse_other_kinds(path, raw, private=True)
        _refuse_open_to_others(path)
        encrypted = b"BEGIN ENCRYPTED " in raw or b"4,ENCRYPTED" in raw
        if encrypted and not password:
            fix = f"set {PASSWORD} to its password, or name a key without one"
            raise BuildError(str(path), f"is encrypted, and {PASSWORD} is not set", fix)
        known = password.encode() if encrypted else None
        try:
            private = _load("cryptography.hazmat.primitives.serialization").load_pem_private_key(raw, known)
        except (ValueError, _load("cryptography.exceptions").UnsupportedAlgorithm):
            what = f"cannot be opened with the password in {PASSWORD}" if encrypted else "is damaged: it begins as a PEM file and is no key"
            raise BuildError(str(path), what, f"set {PASSWORD} to its password" if encrypted else _MAKE) from None
        _check_curve(path, private)
        return cls(path, private, known)

    @property
    def public(self) -> EllipticCurvePublicKey:
        return self._private.public_key()

    @property
    def fingerprint(self) -> str:
        """sha256 of the public key in DER."""
        return fingerprint(self.public)

    def envelope(self, statement: bytes) -> bytes:
        """provenance/statement.intoto.jsonl for exactly these bytes of provenance/statement.json."""
        envelope = _load("securesystemslib.dsse").Envelope(statement, bundle.PAYLOAD_TYPE, {})
        signature = envelope.sign(_load("securesystemslib.signer").CryptoSigner(self._private))
        signature.unrecognized_fields["hint"] = hint(self.public)  # as in model.sig: each tells if the other's was altered
        return bundle.write_envelope(envelope.to_dict())

    def sign(self, folder: Path) -> bytes:
        """model.sig of a folder that is complete but for it; writes nothing there."""
        config = _load("model_signing.signing").Config()
        config.use_elliptic_key_signer(private_key=self.path, password=self._password).set_hashing_config(_Hashing(_model_name(folder)))
        with tempfile.TemporaryDirectory(prefix="buildsys-") as beside:
            signature = Path(beside) / SIGNATURE
            try:
                config.sign(folder.resolve(), signature)
            except ValueError as error:  # a link or a pipe in the folder, or a key file that was changed since it was read
                raise BuildError(str(folder), f"cannot be signed: {error}", "take out what is no plain file, and sign again") from None
            raw = signature.read_bytes()
        try:
            verify_bundle(bundle.read_bundle(raw, SIGNATURE), self.public, SIGNATURE)
        except BuildError as error:
            what = f"what was signed does not read back: {error.what}"
            raise BuildError(str(self.path), what, "leave the key file alone meanwhile; pip install 'model-signing>=1.1,<1.2'") from None
        return raw


def signer(said: Mapping[str, str]) -> Signer | None:
    """The signer that `key=FILE` or BUILDSYS_SIGNING_KEY names; None where nobody asked to sign."""
    named = said.get("key") or os.environ.get(KEY)
    if named is None:
        return None
    if not named.strip():  # in CI: a secret that is not there. Nobody wants a release that is unsigned by accident.
        raise BuildError(KEY, "is empty", "unset it, or name a key file")
    for module in NEEDED:
        _load(module)  # what is missing is told now, and not when all is built
    return Signer.read(Path(named).expanduser(), os.environ.get(PASSWORD, ""))


def public_key(path: Path) -> EllipticCurvePublicKey:
    """The key that signatures are checked with."""
    path = path.expanduser()
    raw = _pem(path)
    _refuse_other_kinds(path, raw, private=False)
    try:
        public = _load("cryptography.hazmat.primitives.serialization").load_pem_public_key(raw)
    except (ValueError, _load("cryptography.exceptions").UnsupportedAlgorithm):
        what = "is damaged: it begins as a PEM file and is no public key"
        raise BuildError(str(path), what, "ask the publisher for the file again") from None
    _check_curve(path, public)
    return cast("EllipticCurvePublicKey", public)


def fingerprint(public: EllipticCurvePublicKey) -> str:
    """sha256 of the public key in DER: `openssl pkey -pubin -in public.pem -outform DER | sha256sum`."""
    return _sha256(public, "DER")


def hint(public: EllipticCurvePublicKey) -> str:
    """How a Sigstore bundle names a key: `sha256sum public.pem`, for the file that openssl writes."""
    return _sha256(public, "PEM")


def _sha256(public: EllipticCurvePublicKey, encoding: str) -> str:
    forms = _load("cryptography.hazmat.primitives.serialization")
    return hashlib.sha256(public.public_bytes(getattr(forms.Encoding, encoding), forms.PublicFormat.SubjectPublicKeyInfo)).hexdigest()


# Checking


def verify_envelope(raw: bytes, statement: bytes, public: EllipticCurvePublicKey, where: str = ENVELOPE) -> None:
    """Raises BuildError unless `raw` is this key's signature over exactly the bytes of provenance/statement.json."""
    envelope = bundle.read_envelope(raw, where)
    if envelope.payload != statement:
        raise BuildError(where, f"signs another statement than {STATEMENT}", _NOT_OURS)
    _verify(envelope, public, where)


def verify_model(folder: Path, public: EllipticCurvePublicKey) -> None:
    """Raises BuildError unless model.sig is this key's signature over every file of the folder as it is now."""
    where = str(folder / SIGNATURE)
    found = walk(folder)
    if SIGNATURE not in found.files:
        raise BuildError(where, "is missing: the folder is not signed", _NOT_OURS)
    signed = bundle.read_bundle(content(found.files[SIGNATURE], bundle.MAX_BYTES), where)
    verify_bundle(signed, public, where)
    there, unread = hashes({name: path for name, path in found.files.items() if name != SIGNATURE})
    wrong = merged((*found.findings, *unread, *differences(signed.files, there, SIGNATURE, folder)))
    if wrong:
        raise BuildErrors(list(wrong))


def verify_bundle(signed: bundle.Bundle, public: EllipticCurvePublicKey, where: str) -> None:
    """Raises BuildError unless the list of files was signed by this key; what the files are now is not looked at."""
    if signed.signed_by != "key":
        what = f"was signed with a {signed.signed_by}, not with a key"
        raise BuildError(where, what, "leave key= away, and check it with `model_signing verify certificate` or `… sigstore`")
    _verify(signed.envelope, public, where)


def _verify(envelope: bundle.Envelope, public: EllipticCurvePublicKey, where: str) -> None:
    signer = _load("securesystemslib.signer")
    key = signer.SSlibKey.from_crypto(public)
    if envelope.hint != hint(public) or envelope.keyid not in ("", key.keyid):
        raise BuildError(where, f"was signed by the key {envelope.hint}; the key given is {hint(public)}", _NOT_OURS)
    signature = signer.Signature(key.keyid, envelope.signature.hex())
    signed = _load("securesystemslib.dsse").Envelope(envelope.payload, bundle.PAYLOAD_TYPE, {key.keyid: signature})
    try:
        signed.verify([key], 1)
    except _load("securesystemslib.exceptions").VerificationError:
        raise BuildError(where, "the signature is not this key's over what it signs", _NOT_OURS) from None


# Key files


def _pem(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_KEY_BYTES + 1)
    except OSError as error:
        raise BuildError(str(path), f"cannot be read: {error.strerror}", f"name a key file that you may read, or {_MAKE}") from None
    return raw


def _refuse_other_kinds(path: Path, raw: bytes, private: bool) -> None:
    """Tells what a file is that holds no key of the kind that is needed."""
    for sign, what in OTHER_KINDS.items():
        if sign in raw:
            raise BuildError(str(path), f"is {what}; elliptic-curve keys on {_KNOWN} sign here", _MAKE)
    if b"BEGIN CERTIFICATE" in raw:
        raise BuildError(str(path), "is a certificate, not a key", f"take the key in it: openssl x509 -in {path} -pubkey -noout")
    if private and b"PUBLIC KEY-----" in raw and b"PRIVATE KEY-----" not in raw:
        raise BuildError(str(path), "is a public key; signing takes the private one", f"name the private key; without one, {_MAKE}")
    if not private and b"PRIVATE KEY-----" in raw:
        fix = f"name its public half: openssl ec -in {path} -pubout -out public.pem"
        raise BuildError(str(path), "is a private key; signatures are checked with the public one", fix)
    if len(raw) > MAX_KEY_BYTES or b"-----BEGIN " not in raw:
        what = f"is no PEM file: -----BEGIN {'PRIVATE' if private else 'PUBLIC'} KEY----- is not in it"
        raise BuildError(str(path), what if raw else "is empty", f"turn a DER file into PEM: openssl ec -inform DER; or {_MAKE}")


def _refuse_open_to_others(path: Path) -> None:
    """As ssh has it: one's own private key is for oneself. Another's (a secret that a system mounts, say) is that one's to care for."""
    about = path.stat()
    if about.st_uid == os.getuid() and about.st_mode & 0o077:
        what = f"is a private key that other users can reach (mode {about.st_mode & 0o777:04o})"
        raise BuildError(str(path), what, f"run: chmod 600 {shlex.quote(str(path))}")


def _check_curve(path: Path, key: Any) -> None:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in CURVES:
        kind = f"on the curve {curve}" if curve else f"of another kind ({type(key).__name__.lstrip('_')})"
        raise BuildError(str(path), f"is a key {kind}; elliptic-curve keys on {_KNOWN} sign here", _MAKE)


# model-signing's side


def _model_name(folder: Path) -> str:
    """What a signature calls the model: the recipe's name where the folder tells it."""
    try:
        said = json.loads((folder / STATEMENT).read_bytes())
        return str(said["predicate"]["buildDefinition"]["externalParameters"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return folder.resolve().name


@dataclass(frozen=True)
class _Hashing:
    """model-signing's own hashing of a folder, under a name that is not the folder's: that may be a temporary one."""

    name: str

    def hash(self, folder: Path) -> Any:
        manifest = _load("model_signing.manifest")
        found = _load("model_signing.hashing").Config().set_ignored_paths(paths=sorted(bundle.IGNORABLE)).hash(folder)
        kind = manifest.SerializationType.from_args(found.serialization_type)
        return manifest.Manifest(self.name, [kind.new_item(one.identifier, one.digest) for one in found.resource_descriptors()], kind)


def _load(module: str) -> Any:
    """A module of a package that only signing needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = f"signing needs packages that are not installed here ({error.name or error})"
        raise BuildError("signing", what, "pip install 'buildsys[signing]' (in a checkout: pip install -e '.[signing]')") from None
