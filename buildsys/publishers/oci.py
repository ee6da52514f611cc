"""Publishes to an OCI registry: a CNCF ModelPack artifact under a tag of its own, read back, and only then under the tag that people pull.

A blob that the registry has is not sent again, so a run that was killed goes on where it stopped, and two releases share their equal files.
What has no tag is nothing to a reader. Where the release holds an in-toto statement it hangs on the manifest as its referrer: by the
referrers API, or where a registry has none by the tag `sha256-<digest>` (OCI distribution specification 1.1).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, StrictBool, StrictInt, field_validator

from buildsys.console import size
from buildsys.errors import BuildError
from buildsys.publishers import TAG, Progress, Receipt, Release, tag, wanted
from buildsys.slots import Frozen
from buildsys.step import digest

if TYPE_CHECKING:
    from buildsys.hubs.modelpack import Document
    from buildsys.hubs.registry import Manifest, Registry

VERSION = 1
MIB = 1 << 20
HOST = r"(?:[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+|localhost|\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+(?=:))(?::[0-9]{1,5})?"
REPOSITORY = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*)*"
TAGS = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$"
RELEASES = re.compile(rf"{TAG}[0-9a-f]{{16}}")


class Knobs(Frozen):
    repo: str = Field(description="registry and repository: ghcr.io/my-org/my-model-4bit, localhost:5000/my-model")
    tag: str = Field(default="latest", pattern=TAGS, description="what people pull; each release has a tag of its own besides")
    insecure: StrictBool = Field(default=False, description="speak plain http; with this machine itself it always is")
    chunk_mib: Annotated[StrictInt, Field(ge=1, le=65_536)] | None = Field(
        default=None, description="the most that one request sends, where something limits them; left out: whole files"
    )

    @field_validator("repo")
    @classmethod
    def _is_one(cls, written: str) -> str:
        if "@" in written:
            raise ValueError("names a login or a digest; write the registry and the repository alone, and log in with `docker login`")
        if not re.fullmatch(f"{HOST}/{REPOSITORY}", written):
            raise ValueError("is not registry/repository in lower case, without https:// and without a tag: ghcr.io/my-org/my-model-4bit")
        return written

    @field_validator("tag")
    @classmethod
    def _is_free(cls, written: str) -> str:
        if written.startswith(TAG):
            raise ValueError(f"starts with {TAG}, as the tags of single releases do; leave it out for latest")
        return written


def destination(knobs: Knobs, folder: Path) -> str:
    """Where the recipe says."""
    return f"oci://{knobs.repo}:{knobs.tag}"


def plan(knobs: Knobs, release: Release, to: str) -> tuple[str, ...]:
    """What `publish` would do, in lines for people. Asks, sends nothing."""
    with _open(knobs) as registry:
        current, own = _current(registry, knobs), _own(registry, release)
        held = _files(current) if current is not None else {}
        if held == release.files:
            return (f"{to} already holds these {len(held)} files as {release.tag}; read them back, send nothing",)
        missing = [name for sha, name in _distinct(release).items() if own is None and not registry.has_blob(f"sha256:{sha}")]
        sent = size(sum(release.sizes[name] for name in missing))
        lines = [f"push {len(missing)} of {len(release.files)} files ({sent}) to {knobs.repo}, tagged {release.tag}"]
        lines.append(f"tag it {knobs.tag}" if current is None else f"move {knobs.tag} from {tag(digest(held))} to it")
        return (*lines, *(f"drop {name}" for name in sorted(held.keys() - release.files.keys())))


def publish(knobs: Knobs, release: Release, to: str, progress: Progress) -> Receipt:
    """Blobs, manifest, provenance; all of it read back; then the release's tag, and at last the one that people pull."""
    from buildsys.hubs.modelpack import MANIFEST

    with _open(knobs) as registry:
        before, own = _current(registry, knobs), _own(registry, release)
        _send(registry, knobs, release, progress)
        made = _document(own.raw) if own is not None else _describe(registry, release)
        _attach(registry, release, made)
        _read_back(registry, made, release.files, release.sizes, progress)
        if own is None:
            registry.put_manifest(release.tag, made.raw, MANIFEST)
        _point(registry, knobs, before, made)
    return _receipt(knobs, made, release.digest)


def verify(knobs: Knobs, release: Release, to: str, progress: Progress) -> Receipt:
    """Reads back what the tag holds: every layer's bytes, and that the release's provenance hangs on it."""
    from buildsys.hubs.modelpack import statement

    with _open(knobs) as registry:
        current = _current(registry, knobs)
        if current is None:
            raise BuildError(to, "holds nothing", "publish it")
        wrong = _differences(_files(current), release.files)
        if wrong:
            more = f" … and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise BuildError(to, "; ".join(wrong[:3]) + more, "publish again")
        made = _document(current.raw)
        _read_back(registry, made, release.files, release.sizes, progress)
        attached = statement(release.files, release.sizes, made)
        if attached is not None and attached.digest not in _referrers(registry, made)[0]:
            raise BuildError(to, f"its provenance is not attached: nothing refers to {made.digest} as {attached.digest}", "publish again")
    return _receipt(knobs, made, release.digest)


def rollback(knobs: Knobs, asked: str, to: str, progress: Progress) -> Receipt:
    """Moves the tag to the release of that digest, which stands in the registry under a tag of its own, once it has been read back."""
    digits = wanted(asked)
    with _open(knobs) as registry:
        before = _current(registry, knobs)
        name = _named(registry, digits, to)
        found = registry.manifest(name)
        files = _files(found) if found is not None else {}
        whole = _digest(files)
        if found is not None and tag(whole) == name and not whole.startswith(digits):
            raise BuildError(to, f"{name} holds the release {whole}, not {digits}", "name the release that you mean")
        if found is None or tag(whole) != name:
            what = f"{name} holds files of another digest, {whole[:16]}: somebody moved that tag"
            raise BuildError(to, what, "roll back to another release, or publish again")
        made = _document(found.raw)
        _read_back(registry, made, files, _sizes(found), progress)
        _point(registry, knobs, before, made)
    return _receipt(knobs, made, whole)


def _named(registry: Registry, digits: str, to: str) -> str:
    """The tag of the one release whose digest starts so."""
    there = sorted(name for name in registry.tags() if RELEASES.fullmatch(name))
    found = [name for name in there if name.removeprefix(TAG).startswith(digits[:16])]
    if len(found) != 1:
        listed = ", ".join(name.removeprefix(TAG) for name in there) or "none"
        what = f"holds {'no release' if not found else 'several releases'} of digest {digits}; there are: {listed}"
        raise BuildError(to, what, "name one of these by its first 8 digits or more" if there else "publish one first")
    return found[0]


# What is there


@contextmanager
def _open(knobs: Knobs) -> Iterator[Registry]:
    from buildsys.hubs.registry import Registry
    from buildsys.hubs.registry_http import is_loopback

    host, _, repository = knobs.repo.partition("/")
    with Registry(host, repository, knobs.insecure or is_loopback(host)) as registry:
        yield registry


def _current(registry: Registry, knobs: Knobs) -> Manifest | None:
    """What the tag holds; refuses what no publish made, for example a container's image."""
    from buildsys.hubs.modelpack import unpack

    found = registry.manifest(knobs.tag)
    if found is not None and unpack(found.said) is None:
        kind = found.said.get("artifactType") or found.said.get("mediaType") or "something else"
        what = f"is {kind}, which no publish made"
        raise BuildError(f"{knobs.repo}:{knobs.tag}", what, "name another publish.oci.tag, or another repository")
    return found


def _own(registry: Registry, release: Release) -> Manifest | None:
    """The release's own tag, where it is published already."""
    found = registry.manifest(release.tag)
    if found is not None and _files(found) != release.files:
        what = f"{release.tag} holds other files than the release of that digest: somebody moved it"
        raise BuildError(registry.name, what, "delete that tag in the registry, then publish again")
    return found


def _files(manifest: Manifest) -> dict[str, str]:
    from buildsys.hubs.modelpack import unpack

    return unpack(manifest.said) or {}


def _sizes(manifest: Manifest) -> dict[str, int]:
    return dict(zip(_files(manifest), (int(layer["size"]) for layer in manifest.said["layers"]), strict=True))


def _digest(files: Mapping[str, str]) -> str:
    return digest(dict(files))


def _document(raw: bytes) -> Document:
    from buildsys.hubs.modelpack import Document

    return Document(raw)


def _receipt(knobs: Knobs, made: Document, whole: str) -> Receipt:
    return Receipt(f"oci://{knobs.repo}@{made.digest}", whole)


def _differences(held: Mapping[str, str], files: Mapping[str, str]) -> list[str]:
    missing = [f"{name} is missing" for name in files if name not in held]
    changed = [f"{name} has sha256 {held[name][:12]}, not {sha[:12]}" for name, sha in files.items() if held.get(name, sha) != sha]
    return [*missing, *changed, *(f"{name} was not published" for name in held if name not in files)]


def _distinct(release: Release) -> dict[str, str]:
    """Every content once, {sha256: a name of it}: a registry keeps no names."""
    return {sha: name for name, sha in sorted(release.files.items(), reverse=True)}


# Sending


def _send(registry: Registry, knobs: Knobs, release: Release, progress: Progress) -> None:
    """Every file that the registry has not."""
    missing = [(sha, name) for sha, name in sorted(_distinct(release).items()) if not registry.has_blob(f"sha256:{sha}")]
    total = sum(release.sizes[name] for _, name in missing)
    chunk_bytes = knobs.chunk_mib * MIB if knobs.chunk_mib is not None else None
    done = 0
    for sha, name in missing:
        tell = partial(_tell, progress, "push, MiB", done, total)
        with _reading(release.tree / name):
            _upload(registry, f"sha256:{sha}", release.sizes[name], release.tree / name, tell, chunk_bytes)
        done += release.sizes[name]


def _describe(registry: Registry, release: Release) -> Document:
    """The manifest over the files, under no tag yet."""
    from buildsys.hubs.modelpack import MANIFEST, pack

    packed = pack(release.name, release.tag, release.files, release.sizes, _config(release))
    _put_blob(registry, packed.config)
    registry.put_manifest(packed.manifest.digest, packed.manifest.raw, MANIFEST)
    return packed.manifest


def _upload(registry: Registry, digest: str, size: int, path: Path, tell: Any, chunk_bytes: int | None) -> None:
    from buildsys.hubs.registry import pieces

    registry.upload(digest, size, partial(pieces, path), tell, chunk_bytes)


def _put_blob(registry: Registry, made: Document) -> None:
    if not registry.has_blob(made.digest):
        registry.upload(made.digest, len(made.raw), lambda offset: iter((made.raw[offset:],)), lambda done: None)


def _config(release: Release) -> dict[str, Any]:
    """The model's own config.json; what a folder without one is, only its files tell."""
    path = release.tree / "config.json"
    if "config.json" not in release.files:
        return {}
    with _reading(path):
        try:
            said = json.loads(path.read_bytes())
        except ValueError:
            return {}
    return said if isinstance(said, dict) else {}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BuildError(str(path), f"cannot be read: {error.strerror}", "build again, then publish") from None


def _tell(progress: Progress, what: str, before: int, total: int, done: int) -> None:
    progress(what, -(-(before + done) // MIB), -(-total // MIB))


def _attach(registry: Registry, release: Release, subject: Document) -> None:
    """The release's statement as a referrer of its manifest; once."""
    from buildsys.hubs.modelpack import EMPTY_RAW, INDEX, MANIFEST, referring, statement

    made = statement(release.files, release.sizes, subject)
    if made is None:
        return
    known, has_api, others = _referrers(registry, subject)
    if made.digest in known:
        return
    _put_blob(registry, _document(EMPTY_RAW))
    answered = registry.put_manifest(made.digest, made.raw, MANIFEST)
    if not has_api and "OCI-Subject" not in answered:
        registry.put_manifest(subject.digest.replace(":", "-"), referring(others, made).raw, INDEX)


def _referrers(registry: Registry, subject: Document) -> tuple[set[str], bool, list[Mapping[str, Any]]]:
    """Digests of what refers to a manifest, whether the registry keeps that list itself, and what a tag keeps where not."""
    from buildsys.hubs.registry import listed

    found = registry.referrers(subject.digest)
    if found is not None:
        return {str(one.get("digest")) for one in found}, True, []
    kept = registry.manifest(subject.digest.replace(":", "-"))
    entries = listed(kept.said) if kept is not None else []
    return {str(one.get("digest")) for one in entries}, False, entries


def _point(registry: Registry, knobs: Knobs, before: Manifest | None, made: Document) -> None:
    """Moves the tag in one step, unless somebody else did since this run began."""
    from buildsys.hubs.modelpack import MANIFEST

    now = registry.manifest(knobs.tag)
    if now is not None and now.digest == made.digest:
        return
    if (now and now.digest) != (before and before.digest):
        what = f"{knobs.tag} was moved to {now.digest if now else 'nothing'} by someone else meanwhile; it is left there"
        raise BuildError(f"{knobs.repo}:{knobs.tag}", what, "find out who publishes there, then publish again")
    registry.put_manifest(knobs.tag, made.raw, MANIFEST)
    after = registry.manifest(knobs.tag)
    if after is None or after.digest != made.digest:
        what = f"{knobs.tag} is {after.digest if after else 'nothing'} right after it was moved to {made.digest}"
        raise BuildError(f"{knobs.repo}:{knobs.tag}", what, "find out who publishes there, then publish again")


# Reading back


def _read_back(registry: Registry, made: Document, files: Mapping[str, str], sizes: Mapping[str, int], progress: Progress) -> None:
    """Every byte of the manifest and of what it names, hashed as it comes."""
    if registry.manifest(made.digest) is None:
        raise BuildError(registry.name, f"has no manifest {made.digest}, which it took", "publish again")
    config = json.loads(made.raw)["config"]
    names = {sha: name for name, sha in files.items()} | {config["digest"].removeprefix("sha256:"): "the artifact's config"}
    total, done = sum(sizes[name] for name in set(names.values()) & files.keys()) + config["size"], 0
    for sha, name in sorted(names.items()):
        if not registry.has_blob(f"sha256:{sha}"):
            raise BuildError(registry.name, f"{name} is missing: there is no blob sha256:{sha}", _DAMAGED)
        found = hashlib.sha256()
        for piece in registry.blob(f"sha256:{sha}"):
            found.update(piece)
            done += len(piece)
            _tell(progress, "read back, MiB", 0, max(total, done), done)
        if found.hexdigest() != sha:
            raise BuildError(registry.name, f"{name} reads back as sha256 {found.hexdigest()[:12]}, not {sha[:12]}", _DAMAGED)


_DAMAGED = "the registry's storage is damaged: have its operator delete that blob, then publish again"
