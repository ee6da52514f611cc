"""Signing: keys of every kind that people hand over, and signatures that ours and others' tools agree on, in both directions."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import released
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat, PublicFormat

from buildsys.errors import BuildError
from buildsys.release import bundle
from buildsys.release.provenance import SIGNATURE
from buildsys.release.signing import KEY, PASSWORD, Signer, hint, public_key, signer, verify_envelope, verify_model

STATEMENT = b'{\n "_type": "x"\n}\n'
CURVES = [ec.SECP256R1(), ec.SECP384R1()]
MAKES = "openssl ecparam -genkey -name prime256v1 -noout -out key.pem"


@pytest.fixture(params=CURVES, ids=lambda curve: str(curve.name))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    return released.keys(tmp_path, request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder, as read-only as a store's."""
    made = tmp_path / "tree"
    released.write(made, {"config.json": b"{}", "deploy/lmdeploy.yaml": b"tp: 1\n", "é name.txt": b"x", "model.safetensors": b"\0" * 999})
    for path in made.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    made.chmod(0o555)
    return made


def put(folder: Path, raw: bytes) -> Path:
    folder.chmod(0o755)
    (folder / SIGNATURE).write_bytes(raw)
    return folder / SIGNATURE


def cli(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """model-signing's own command."""
    return subprocess.run([sys.executable, "-m", "model_signing", *map(str, arguments)], capture_output=True, text=True, check=False)


# Others' tools


def test_model_signing_accepts_ours(pair: tuple[Path, Path], folder: Path) -> None:
    raw = Signer.read(pair[0]).sign(folder)
    assert not (folder / SIGNATURE).exists(), "signing writes nothing into the folder"
    put(folder, raw)
    by = ("verify", "key", folder, "--signature", folder / SIGNATURE, "--public_key", pair[1])
    assert cli(*by).returncode == 0
    released.write(folder, {".gitattributes": b"* -text\n", ".git/HEAD": b"x", ".cache/huggingface/x.metadata": b"x"})
    assert cli(*by).returncode == 0, "what hubs and their clients add is left out"
    (folder / "config.json").chmod(0o644)
    (folder / "config.json").write_bytes(b"[]")
    assert cli(*by).returncode != 0


def test_ours_accepts_model_signings(pair: tuple[Path, Path], folder: Path) -> None:
    folder.chmod(0o755)
    made = cli("sign", "key", folder, "--signature", folder / SIGNATURE, "--private_key", pair[0])
    assert made.returncode == 0, made.stderr
    verify_model(folder, public_key(pair[1]))


def test_securesystemslib_accepts_our_envelope(pair: tuple[Path, Path]) -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey  # type: ignore[attr-defined]

    raw = Signer.read(pair[0]).envelope(STATEMENT)
    read = Envelope.from_dict(json.loads(raw))
    key = SSlibKey.from_crypto(public_key(pair[1]))
    assert read.payload == STATEMENT and read.payload_type == "application/vnd.in-toto+json"
    assert list(read.verify([key], 1)) == [key.keyid]
    read.payload += b" "
    with pytest.raises(VerificationError):
        read.verify([key], 1)


def test_ours_accepts_securesystemslibs_envelope(pair: tuple[Path, Path]) -> None:
    """As it comes, with the hint that we add."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]

    made = Envelope(STATEMENT, "application/vnd.in-toto+json", {})
    made.sign(CryptoSigner(serialization.load_pem_private_key(pair[0].read_bytes(), None)))  # type: ignore[arg-type]
    said = made.to_dict()
    said["signatures"][0]["hint"] = hashlib.sha256(pair[1].read_bytes()).hexdigest()
    verify_envelope(bundle.write_envelope(said), STATEMENT, public_key(pair[1]))


def test_openssl_accepts_our_signature(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Without any library: DSSE's pre-authentication encoding, written out, under openssl."""
    said = json.loads(Signer.read(pair[0]).envelope(STATEMENT))
    kind = said["payloadType"].encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(STATEMENT), STATEMENT)
    released.write(tmp_path, {"signed": signed, "sig": base64.b64decode(said["signatures"][0]["sig"])})
    by = "sha256" if b"P-256" in openssl("openssl pkey -pubin -in public.pem -noout -text", tmp_path) else "sha384"
    assert openssl(f"openssl dgst -{by} -verify public.pem -signature sig signed", tmp_path) == b"Verified OK\n"


def openssl(command: str, folder: Path) -> bytes:
    return subprocess.run(command.split(), cwd=folder, capture_output=True, check=True).stdout


def test_keys_made_by_the_command_that_errors_name(tmp_path: Path) -> None:
    openssl(MAKES, tmp_path)
    openssl("openssl ec -in key.pem -pubout -out public.pem", tmp_path)
    made = Signer.read(tmp_path / "key.pem")
    verify_envelope(made.envelope(STATEMENT), STATEMENT, public_key(tmp_path / "public.pem"))
    der = openssl("openssl pkey -pubin -in public.pem -outform DER", tmp_path)
    assert made.fingerprint == hashlib.sha256(der).hexdigest()
    hint = json.loads(made.envelope(STATEMENT))["signatures"][0]["hint"]
    assert hint == hashlib.sha256((tmp_path / "public.pem").read_bytes()).hexdigest()


def test_parameters_before_the_key_are_no_obstacle(tmp_path: Path) -> None:
    """openssl ecparam without -noout writes two blocks."""
    openssl("openssl ecparam -genkey -name secp384r1 -out key.pem", tmp_path)
    assert len(Signer.read(tmp_path / "key.pem").fingerprint) == 64


# What is refused


def test_another_key_a_changed_statement_and_a_changed_folder(pair: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    ours, theirs = public_key(pair[1]), public_key(released.keys(tmp_path / "other")[1])
    raw = Signer.read(pair[0]).envelope(STATEMENT)
    verify_envelope(raw, STATEMENT, ours)
    with pytest.raises(BuildError, match="was signed by the key"):
        verify_envelope(raw, STATEMENT, theirs)
    with pytest.raises(BuildError, match="signs another statement"):
        verify_envelope(raw, STATEMENT + b" ", ours)
    with pytest.raises(BuildError, match="is missing: the folder is not signed"):
        verify_model(folder, ours)
    put(folder, Signer.read(pair[0]).sign(folder))
    verify_model(folder, ours)
    with pytest.raises(BuildError, match="was signed by the key"):
        verify_model(folder, theirs)
    (folder / "more.txt").touch()
    with pytest.raises(BuildError, match="was added"):
        verify_model(folder, ours)


@pytest.mark.parametrize("link", ["file", "dead", "folder"])
def test_a_folder_with_links_is_not_signed(link: str, folder: Path, tmp_path: Path) -> None:
    folder.chmod(0o755)
    (folder / "link").symlink_to({"file": folder / "config.json", "dead": "nowhere", "folder": tmp_path}[link])
    with pytest.raises(BuildError, match="cannot be signed") as caught:
        Signer.read(released.keys(tmp_path)[0]).sign(folder)
    assert "no plain file" in caught.value.fix


def test_a_key_file_that_changes_meanwhile(folder: Path, tmp_path: Path) -> None:
    made = Signer.read(released.keys(tmp_path)[0])
    released.keys(tmp_path)
    with pytest.raises(BuildError, match="does not read back: was signed by the key"):
        made.sign(folder)


@cache
def p256() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@cache
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def pem(key: Any, form: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
    return bytes(key.private_bytes(Encoding.PEM, form, NoEncryption()))


def ssh(key: Any) -> bytes:
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def der(key: Any) -> bytes:
    return bytes(key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))


PRIVATE: dict[str, tuple[Callable[[], bytes], str]] = {
    "RSA": (lambda: pem(rsa_key()), "is a key of another kind \\(RSAPrivateKey\\); elliptic-curve keys on P-256 or P-384 sign here"),
    "RSA, traditional": (lambda: pem(rsa_key(), PrivateFormat.TraditionalOpenSSL), "is an RSA key"),
    "DSA": (lambda: pem(dsa.generate_private_key(1024), PrivateFormat.TraditionalOpenSSL), "is a DSA key"),
    "Ed25519": (lambda: pem(ed25519.Ed25519PrivateKey.generate()), "is a key of another kind \\(Ed25519PrivateKey\\)"),
    "P-521": (lambda: pem(ec.generate_private_key(ec.SECP521R1())), "is a key on the curve secp521r1"),
    "secp256k1": (lambda: pem(ec.generate_private_key(ec.SECP256K1())), "is a key on the curve secp256k1"),
    "public": (lambda: released.public_pem(p256()), "is a public key; signing takes the private one"),
    "SSH": (lambda: ssh(p256()), "is an SSH key"),
    "SSH public": (lambda: p256().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH), "is an SSH key"),
    "encrypted": (lambda: released.private_pem(p256(), "secret"), f"is encrypted, and {PASSWORD} is not set"),
    "encrypted, traditional": (
        lambda: p256().private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"secret")),
        f"is encrypted, and {PASSWORD} is not set",
    ),
    "DER": (lambda: der(p256()), "is no PEM file: -----BEGIN PRIVATE KEY----- is not in it"),
    "empty": (lambda: b"", "is empty"),
    "damaged": (lambda: pem(p256()).replace(b"M", b"A", 3), "is damaged"),
    "cut": (lambda: pem(p256())[:90], "is damaged"),
    "certificate": (lambda: b"-----BEGIN CERTIFICATE-----\nMII\n-----END CERTIFICATE-----\n", "is a certificate, not a key"),
    "text": (lambda: b"my key", "is no PEM file"),
    "huge": (lambda: pem(p256()) + b"\n" * (1 << 20), "is no PEM file"),
}


@pytest.mark.parametrize(("raw", "said"), PRIVATE.values(), ids=PRIVATE)
def test_wrong_private_keys_are_told_apart(raw: Callable[[], bytes], said: str, tmp_path: Path) -> None:
    path = tmp_path / "k"
    path.write_bytes(raw())
    with pytest.raises(BuildError, match=said) as caught:
        Signer.read(path)
    assert caught.value.where == str(path)
    assert MAKES in caught.value.fix or PASSWORD in caught.value.fix or "openssl x509" in caught.value.fix


PUBLIC: dict[str, tuple[Callable[[], bytes], str]] = {
    "private": (lambda: pem(p256()), "is a private key; signatures are checked with the public one"),
    "RSA": (lambda: rsa_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "is a key of another kind"),
    "SSH": (PRIVATE["SSH public"][0], "is an SSH key"),
    "damaged": (lambda: released.public_pem(p256())[:60], "is damaged"),
    "empty": (lambda: b"", "is empty"),
    "text": (lambda: b"my key", "is no PEM file: -----BEGIN PUBLIC KEY----- is not in it"),
}


@pytest.mark.parametrize(("raw", "said"), PUBLIC.values(), ids=PUBLIC)
def test_wrong_public_keys_are_told_apart(raw: Callable[[], bytes], said: str, tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(raw())
    with pytest.raises(BuildError, match=said):
        public_key(tmp_path / "k")


def test_key_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "none.pem", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(BuildError, match=said):
            Signer.read(path)
        with pytest.raises(BuildError, match=said):
            public_key(path)


# Where the key comes from


def test_the_command_line_comes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    assert signer({}) is None
    first, second = released.keys(tmp_path / "a")[0], released.keys(tmp_path / "b")[0]
    monkeypatch.setenv(KEY, str(second))
    found, said = signer({}), signer({"key": str(first)})
    assert found is not None and said is not None
    assert found.fingerprint == Signer.read(second).fingerprint != said.fingerprint == Signer.read(first).fingerprint


def test_an_encrypted_key_signs_and_its_password_shows_nowhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, public = released.keys(tmp_path, password="c4n4ry")
    monkeypatch.setenv(PASSWORD, "c4n4ry")
    made = signer({"key": str(private)})
    assert made is not None and "c4n4ry" not in repr(made)
    raw = made.sign(folder)
    put(folder, raw)
    verify_model(folder, public_key(public))
    assert b"c4n4ry" not in raw + made.envelope(STATEMENT)
    monkeypatch.setenv(PASSWORD, "wr0ng")
    with pytest.raises(BuildError, match="cannot be opened with the password") as caught:
        signer({"key": str(private)})
    assert "wr0ng" not in str(caught.value)


def test_a_password_for_a_key_without_one_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD, "of another key")
    assert signer({"key": str(released.keys(tmp_path)[0])}) is not None


@pytest.mark.parametrize("missing", ["model_signing.signing", "securesystemslib.signer", "cryptography.hazmat.primitives.serialization"])
def test_missing_packages_are_named_with_the_command(missing: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, _ = released.keys(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BuildError, match="are not installed here") as caught:
        made = Signer.read(private)
        made.envelope(STATEMENT)
        made.sign(folder)
    assert "pip install 'buildsys[signing]'" in caught.value.fix


@pytest.mark.parametrize("missing", ["model_signing.signing", "securesystemslib.dsse"])
def test_missing_packages_are_noticed_when_the_key_is_read(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private, _ = released.keys(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BuildError, match="are not installed here"):
        signer({"key": str(private)})


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_variable_does_not_mean_unsigned(empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, empty)
    with pytest.raises(BuildError, match="is empty") as caught:
        signer({})
    assert (caught.value.where, caught.value.fix) == (KEY, "unset it, or name a key file")
    assert signer({"key": str(released.keys(tmp_path)[0])}) is not None


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620])
def test_a_key_that_others_can_reach_is_refused_until_the_fix_is_run(mode: int, tmp_path: Path) -> None:
    private, public = released.keys(tmp_path / "a b")
    private.chmod(mode)
    with pytest.raises(BuildError, match=f"other users can reach \\(mode 0{mode:o}\\)") as caught:
        Signer.read(private)
    subprocess.run(["bash", "-c", caught.value.fix.removeprefix("run: ")], check=True)
    public.chmod(0o644)
    assert Signer.read(private).fingerprint and public_key(public)


def test_a_key_of_the_systems_is_the_systems_to_care_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a secret is mounted into a container: another user's, and readable by those who need it."""
    private, _ = released.keys(tmp_path)
    private.chmod(0o440)
    monkeypatch.setattr(os, "getuid", lambda: private.stat().st_uid + 1)
    assert Signer.read(private).fingerprint


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released.keys(tmp_path / ".keys")
    monkeypatch.setenv("HOME", str(tmp_path))
    made = signer({"key": "~/.keys/key.pem"})
    assert made is not None and hint(public_key(Path("~/.keys/public.pem"))) == hint(made.public)


# The form of a signature


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, bytes]:
    """A folder of two files, the key and its model.sig."""
    top = tmp_path_factory.mktemp("small")
    private, public = released.keys(top)
    released.write(top / "tree", {"a": b"1", "b/c": b"2"})
    raw = Signer.read(private).sign(top / "tree")
    put(top / "tree", raw)
    return top / "tree", public_key(public), raw


def test_any_bit_of_a_model_signature_counts(small: tuple[Path, Any, bytes]) -> None:
    """Every 11th bit, which meets each bit of a byte and every part of the file; the rest is drawn in test_audit.py."""
    folder, public, raw = small
    for at in range(0, 8 * len(raw), 11):
        changed = bytearray(raw)
        changed[at // 8] ^= 1 << at % 8
        put(folder, bytes(changed))
        with pytest.raises(BuildError):
            verify_model(folder, public)
    put(folder, raw)
    verify_model(folder, public)


def test_any_bit_of_an_envelope_counts(pair: tuple[Path, Path]) -> None:
    raw, public = Signer.read(pair[0]).envelope(STATEMENT), public_key(pair[1])
    for at in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[at // 8] ^= 1 << at % 8
        with pytest.raises(BuildError):
            verify_envelope(bytes(changed), STATEMENT, public)


def test_the_model_is_called_as_its_recipe_is(tmp_path: Path) -> None:
    private, _ = released.keys(tmp_path)
    told = {"predicate": {"buildDefinition": {"externalParameters": {"name": "tiny"}}}}
    released.write(tmp_path / "x-123", {"provenance/statement.json": json.dumps(told).encode()})
    released.write(tmp_path / "plain", {"a": b"1"})
    made = Signer.read(private)
    assert bundle.read_bundle(made.sign(tmp_path / "x-123"), SIGNATURE).model == "tiny"
    assert bundle.read_bundle(made.sign(tmp_path / "plain"), SIGNATURE).model == "plain"


def test_a_signature_by_certificate_is_recognized_and_not_passed(small: tuple[Path, Any, bytes]) -> None:
    folder, public, raw = small
    said = json.loads(raw)
    said["verificationMaterial"] = {"certificate": {"rawBytes": "MII="}, "tlogEntries": [{"logIndex": "1"}]}
    read = bundle.read_bundle(json.dumps(said).encode(), SIGNATURE)
    assert read.signed_by == "certificate" and read.files.keys() == {"a", "b/c"}
    put(folder, json.dumps(said).encode())
    with pytest.raises(BuildError, match="signed with a certificate, not with a key"):
        verify_model(folder, public)
    put(folder, raw)


def altered(raw: bytes, change: Any) -> bytes:
    said = json.loads(raw)
    payload = json.loads(base64.b64decode(said["dsseEnvelope"]["payload"]))
    change(said, payload)
    said["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload, indent=2).encode()).decode()
    return json.dumps(said, separators=(",", ":")).encode()


MALFORMED: dict[str, tuple[Any, str]] = {
    "another type": (lambda said, payload: said.update(mediaType="application/x"), "is a application/x"),
    "more material": (lambda said, payload: said["verificationMaterial"].update(x=1), "holds publicKey, tlogEntries, x where"),
    "a log": (lambda said, payload: said["verificationMaterial"].update(tlogEntries=[1]), "entries of a log"),
    "no signature": (lambda said, payload: said["dsseEnvelope"].update(signatures=[]), "exactly one signature"),
    "a key id": (lambda said, payload: said["dsseEnvelope"]["signatures"][0].update(keyid="x"), "its keyid is 'x'"),
    "another payload": (lambda said, payload: said["dsseEnvelope"].update(payloadType="x"), "signs a 'x'"),
    "another predicate": (lambda said, payload: payload.update(predicateType="x"), "is a x, not a"),
    "no file": (lambda said, payload: payload["predicate"].update(resources=[1]), "holds int where"),
    "twice": (lambda said, payload: payload["predicate"]["resources"].append(payload["predicate"]["resources"][0]), "lists 'a' twice"),
    "no sha256": (lambda said, payload: payload["predicate"]["resources"][0].update(algorithm="md5"), "not by a sha256"),
    "another whole": (lambda said, payload: payload["subject"][0]["digest"].update(sha256="0" * 64), "they hash to"),
    "two models": (lambda said, payload: payload["subject"].append({}), "not about exactly one model"),
    "shards": (lambda said, payload: payload["predicate"]["serialization"].update(method="shards"), "does not sign files by sha256"),
}


@pytest.mark.parametrize(("change", "what"), MALFORMED.values(), ids=MALFORMED)
def test_other_forms_are_refused(change: Any, what: str, small: tuple[Path, Any, bytes]) -> None:
    with pytest.raises(BuildError, match=what) as caught:
        bundle.read_bundle(altered(small[2], change), SIGNATURE)
    assert caught.value.where.startswith(SIGNATURE)


@pytest.mark.parametrize("raw", [b"", b"[]", b"1", b"\xff", b'{"a":1,"a":2}', b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000])
def test_rubbish_is_refused(raw: bytes) -> None:
    for read in (bundle.read_bundle, bundle.read_envelope):
        with pytest.raises(BuildError):
            read(raw, SIGNATURE)
