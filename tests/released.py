"""Releases made by hand, a step at a time, from what a workspace has built; and keys to sign them with."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import runs
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat, PublicFormat

from buildsys.release.facts import Facts, gather
from buildsys.release.provenance import ENVELOPE, SIGNATURE, STATEMENT, SUMS, documents, sums
from buildsys.release.signing import Signer
from buildsys.store import Store
from buildsys.verdict import judge


def facts(workspace: Path, recipe: str = "tiny") -> Facts:
    plan, store = runs.planned(workspace, recipe), Store(workspace / "artifacts")
    return gather(plan, store, judge(plan, store))


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


def digests(folder: Path) -> dict[str, str]:
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def release(workspace: Path, folder: Path, signer: Signer | None = None) -> Path:
    """A folder with everything that a release holds."""
    known, store = facts(workspace), Store(workspace / "artifacts")
    folder.mkdir(parents=True)
    for name in known.artifact.files:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(store.path(known.artifact, name), folder / name)
    write(folder, {"README.md": b"# tiny\n"})
    write(folder, documents(known, digests(folder), {name: (folder / name).stat().st_size for name in digests(folder)}))
    if signer is not None:
        write(folder, {ENVELOPE: signer.envelope((folder / STATEMENT).read_bytes())})
    write(folder, {SUMS: sums(digests(folder))})
    if signer is not None:
        write(folder, {SIGNATURE: signer.sign(folder)})
    return folder


def private_pem(key: ec.EllipticCurvePrivateKey, password: str = "", form: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
    return key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(password.encode()) if password else NoEncryption())


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def keys(folder: Path, curve: ec.EllipticCurve | None = None, password: str = "") -> tuple[Path, Path]:
    """A private key and its public half, in files."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    write(folder, {"key.pem": private_pem(key, password), "public.pem": public_pem(key)})
    return folder / "key.pem", folder / "public.pem"
