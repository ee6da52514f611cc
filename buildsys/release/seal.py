"""A judged artifact becomes a release: model card, provenance and digests beside the deployable files and, with a key, signatures.

Everything but the signatures is a function of what was built, so sealing again what is sealed already finds it in the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys import disk
from buildsys.publishers import Release
from buildsys.release.card import card
from buildsys.release.facts import Facts
from buildsys.release.provenance import ENVELOPE, SIGNATURE, STATEMENT, SUMS, documents, sums
from buildsys.step import digest
from buildsys.store import Artifact, Store

if TYPE_CHECKING:
    from buildsys.release.signing import Signer

VERSION = 1
CARD = "README.md"


def seal(facts: Facts, store: Store, signer: Signer | None) -> Artifact:
    """The release of one build: the artifact's files and those that speak of it. Raises BuildError where a key cannot sign."""
    held = facts.artifact.files
    written = {CARD: card(facts).encode()}
    files = {name: file.sha256 for name, file in held.items()} | _sha256(written)
    sizes = {name: file.size for name, file in held.items()} | {name: len(raw) for name, raw in written.items()}
    written |= documents(facts, files, sizes)
    terms = {"release": VERSION, "artifact": facts.artifact.digest(), "documents": _sha256(written)}
    key = digest({**terms, "signer": signer.fingerprint if signer is not None else None})
    found = store.find(key)
    if found is not None:
        return found
    if signer is None:
        written[SUMS] = sums(files | _sha256(written))
        return _commit(store, key, facts.artifact, written)
    written[ENVELOPE] = signer.envelope(written[STATEMENT])
    written[SUMS] = sums(files | _sha256(written))
    awaiting = _commit(store, digest({**terms, "awaits": _sha256(written)}), facts.artifact, written)
    written[SIGNATURE] = signer.sign(tree(facts, store, awaiting))
    return _commit(store, key, facts.artifact, written)


def tree(facts: Facts, store: Store, sealed: Artifact) -> Path:
    """The release as a folder, which knows the artifact that it holds."""
    return store.tree(sealed, facts.artifact.digest())


def _sha256(written: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(raw).hexdigest() for name, raw in written.items()}


def _commit(store: Store, key: str, artifact: Artifact, written: Mapping[str, bytes]) -> Artifact:
    with store.lock(key):
        found = store.find(key)
        if found is not None:
            return found
        store.drop(key)  # what a killed run left there may be read-only blobs already
        stage = store.stage(key)
        for name, raw in written.items():
            with disk.writing(stage / name):
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                (stage / name).write_bytes(raw)
        links = {name: store.path(artifact, name) for name in artifact.files if name not in written}
        return store.commit(key, stage, {"release": VERSION}, links)


def release(name: str, sealed: Artifact, tree: Path) -> Release:
    """What publishers are given."""
    files = {file: held.sha256 for file, held in sealed.files.items()}
    return Release(name, tree, files, {file: held.size for file, held in sealed.files.items()})
