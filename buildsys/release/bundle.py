"""Signatures as they lie on disk, read so strictly that no bit of them is without a meaning.

A DSSE envelope (github.com/secure-systems-lab/dsse, protocol 1.0) around a statement; and the OpenSSF model signature, a Sigstore bundle
around such an envelope, whose payload lists every file (github.com/sigstore/model-transparency). JSON and base64 can say one thing in many
ways. Here there is one: what is read is written again, and has to come out byte for byte.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from buildsys.errors import BuildError
from buildsys.release.folder import AGAIN, json_object

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
STATEMENT_TYPE, PREDICATE_TYPE = "https://in-toto.io/Statement/v1", "https://model_signing/signature/v1.0"
IGNORABLE = frozenset({"model.sig", ".git", ".gitattributes", ".github", ".gitignore", ".cache/huggingface"})
"""What a model signature may leave out: itself, and what hubs and their clients add to a folder."""

MAX_BYTES = 64 << 20  # a list of 100,000 files takes about half of it

_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Envelope:
    """Signed bytes. `keyid` is securesystemslib's name of the key; `hint` the sha256 of its public PEM file, as `sha256sum` tells it."""

    payload: bytes
    signature: bytes  # ECDSA, DER
    keyid: str
    hint: str


@dataclass(frozen=True)
class Bundle:
    """A model signature: the files that it is about, by sha256."""

    envelope: Envelope
    signed_by: str  # "key", or "certificate": what cannot be checked with a key
    model: str  # what the signer calls the model
    files: Mapping[str, str]
    ignored: frozenset[str]


def write_envelope(said: Mapping[str, Any]) -> bytes:
    """One line of JSON; `said` is what a DSSE library makes. The inverse of `read_envelope`."""
    return json.dumps(said, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def read_envelope(raw: bytes, where: str) -> Envelope:
    """provenance/statement.intoto.jsonl."""
    said = json_object(raw, where)
    payload, signature = _dsse(said, where, {"keyid", "sig", "hint"})
    if write_envelope(said) != raw:
        raise _spelled(where)
    for name in ("keyid", "hint"):
        if not isinstance(signature[name], str) or not _HEX.fullmatch(signature[name]):
            raise BuildError(where, f"its {name} is not 64 hexadecimal digits", AGAIN)
    return Envelope(payload, _base64(signature["sig"], where), signature["keyid"], signature["hint"])


def read_bundle(raw: bytes, where: str) -> Bundle:
    """model.sig."""
    said = json_object(raw, where)
    _keys(said, {"mediaType", "verificationMaterial", "dsseEnvelope"}, where)
    material = said["verificationMaterial"]
    if said["mediaType"] != MEDIA_TYPE:
        raise BuildError(where, f"is a {said['mediaType']}, not a {MEDIA_TYPE}", AGAIN)
    if isinstance(material, dict) and {"certificate", "x509CertificateChain"} & material.keys():
        signed_by, hint = "certificate", ""
        payload, signature = _dsse(said["dsseEnvelope"], where, {"sig"} | {"keyid"} & _signature_keys(said))
    else:
        signed_by, hint = "key", _hint(material, where)
        payload, signature = _dsse(said["dsseEnvelope"], where, {"sig", "keyid"})
        if signature["keyid"] != "":
            raise BuildError(where, f"its keyid is {signature['keyid']!r}; model signatures leave it empty", AGAIN)
        if json.dumps(said, separators=(",", ":")).encode() != raw:
            raise _spelled(where)
    envelope = Envelope(payload, _base64(signature["sig"], where), "", hint)
    return Bundle(envelope, signed_by, *_signed(payload, where))


def _signature_keys(said: Mapping[str, Any]) -> set[str]:
    signatures = said["dsseEnvelope"].get("signatures") if isinstance(said["dsseEnvelope"], dict) else None
    one = signatures[0] if isinstance(signatures, list) and signatures else {}
    return set(one) if isinstance(one, dict) else set()


def _hint(material: Any, where: str) -> str:
    _keys(material, {"publicKey", "tlogEntries"}, where)
    _keys(material["publicKey"], {"hint"}, where)
    hint = material["publicKey"]["hint"]
    if material["tlogEntries"] != [] or not isinstance(hint, str) or not _HEX.fullmatch(hint):
        raise BuildError(where, "names no key by 64 hexadecimal digits, or has entries of a log that a key needs none of", AGAIN)
    return hint


def _dsse(said: Any, where: str, keys: set[str]) -> tuple[bytes, dict[str, Any]]:
    """The payload, and the one signature with exactly these keys."""
    _keys(said, {"payload", "payloadType", "signatures"}, where)
    if said["payloadType"] != PAYLOAD_TYPE:
        raise BuildError(where, f"signs a {said['payloadType']!r}, not {PAYLOAD_TYPE}", AGAIN)
    signatures = said["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise BuildError(where, "does not hold exactly one signature", AGAIN)
    _keys(signatures[0], keys, where)
    return _base64(said["payload"], where), signatures[0]


def _signed(payload: bytes, where: str) -> tuple[str, dict[str, str], frozenset[str]]:
    """The model's name, its files and what is left out, as model-signing writes them (their order in an object is not fixed)."""
    of = f"{where} (payload)"
    said = json_object(payload, of)
    _keys(said, {"_type", "subject", "predicateType", "predicate"}, of)
    predicate = said["predicate"]
    _keys(predicate, {"serialization", "resources"}, of)
    if said["_type"] != STATEMENT_TYPE or said["predicateType"] != PREDICATE_TYPE:
        raise BuildError(of, f"is a {said['predicateType']}, not a {PREDICATE_TYPE}", AGAIN)
    subjects = said["subject"]
    if not isinstance(subjects, list) or len(subjects) != 1:
        raise BuildError(of, "is not about exactly one model", AGAIN)
    _keys(subjects[0], {"name", "digest"}, of)
    _keys(subjects[0]["digest"], {"sha256"}, of)
    files = _resources(predicate["resources"], of)
    whole = hashlib.sha256(b"".join(bytes.fromhex(sha256) for sha256 in files.values())).hexdigest()
    if subjects[0]["digest"]["sha256"] != whole:
        raise BuildError(of, f"says that its files hash to {subjects[0]['digest']['sha256']}; they hash to {whole}", AGAIN)
    if json.dumps(said, indent=2).encode() != payload:
        raise _spelled(of)
    return str(subjects[0]["name"]), files, _ignored(predicate["serialization"], of)


def _resources(said: Any, where: str) -> dict[str, str]:
    files: dict[str, str] = {}
    for one in said if isinstance(said, list) else [said]:
        _keys(one, {"name", "digest", "algorithm"}, where)
        name, sha256 = one["name"], one["digest"]
        if one["algorithm"] != "sha256" or not isinstance(sha256, str) or not _HEX.fullmatch(sha256) or not isinstance(name, str):
            raise BuildError(where, f"lists {name!r} by {one['algorithm']!r} {sha256!r}, not by a sha256", AGAIN)
        if name in files:
            raise BuildError(where, f"lists {name!r} twice", AGAIN)
        files[name] = sha256
    return files


def _ignored(said: Any, where: str) -> frozenset[str]:
    if not isinstance(said, dict) or said.get("method") != "files" or said.get("hash_type") != "sha256":
        raise BuildError(where, "does not sign files by sha256", "check it with `model_signing verify`")
    _keys(said, {"method", "hash_type", "allow_symlinks"} | {"ignore_paths"} & said.keys(), where)
    ignored = said.get("ignore_paths", [])
    if said["allow_symlinks"] not in (False, True) or not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise BuildError(where, "does not say what it leaves out", AGAIN)
    return frozenset(ignored)


def _keys(said: Any, wanted: set[str], where: str) -> None:
    if not isinstance(said, dict) or said.keys() != wanted:
        found = ", ".join(sorted(said)) if isinstance(said, dict) else type(said).__name__
        raise BuildError(where, f"holds {found} where {', '.join(sorted(wanted))} belong", AGAIN)


def _base64(text: Any, where: str) -> bytes:
    """Bytes of the one base64 text that means them."""
    try:
        found = base64.b64decode(text if isinstance(text, str) else "?", validate=True)
    except (binascii.Error, ValueError):
        raise BuildError(where, "holds what is not base64", AGAIN) from None
    if base64.b64encode(found).decode() != text:
        raise _spelled(where)
    return found


def _spelled(where: str) -> BuildError:
    return BuildError(where, "is not spelled as its writer spells it: a byte was changed", AGAIN)
