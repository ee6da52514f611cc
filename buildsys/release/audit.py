"""`doit verify path=DIR [key=PUBLIC.pem]`: whether a served folder is what was published, and whether it is sound. Needs no network.

Works on any model's folder. Of a release of ours every file is told by digest (three times: SHA256SUMS, the statement, model.sig), so one
altered bit shows; of a stranger's folder it says what can be seen, and what could not be checked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.errors import BuildError
from buildsys.release import bundle, contents, signing
from buildsys.release.contents import Said
from buildsys.release.folder import AGAIN, Folder, Progress, content, differences, hashes, in_cache, json_object, merged, walk
from buildsys.release.provenance import (
    BUILD_TYPE,
    ENVELOPE,
    INPUTS,
    MEASUREMENTS,
    PREDICATE_TYPE,
    RECIPE,
    SIGNATURE,
    STATEMENT,
    STATEMENT_TYPE,
    SUMS,
    document,
    parse_sums,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

MAX_BYTES = 64 << 20
MAX_SHOWN = 600
SHOWN = 16  # digits of a key, as a build shows them
HUBS_OWN, NAMES_CODE = "configuration.json", ("plugins", "allow_remote")
GIVE = "give key=PUBLIC.pem"
ASK = "ask its publisher for a signed release, or leave key= away"


@dataclass(frozen=True)
class Audit:
    """What was looked at, in lines for people, and what is wrong; each finding names its file."""

    lines: tuple[str, ...]
    findings: tuple[BuildError, ...]


@dataclass(frozen=True)
class _Case:
    """A folder with the digests of its files, and the key that it is said to be signed with."""

    folder: Folder
    there: Mapping[str, str]  # name -> sha256
    public: EllipticCurvePublicKey | None

    def where(self, name: str) -> str:
        return str(self.folder.root / name)

    def has(self, *names: str) -> bool:
        return any(name in self.folder.files for name in names)

    def content(self, name: str) -> bytes:
        return content(self.folder.files[name], MAX_BYTES)

    def all_but(self, *names: str) -> dict[str, str]:
        return {name: sha256 for name, sha256 in self.there.items() if name not in names}

    @property
    def released(self) -> bool:
        """Whether it is a release of ours, or was one."""
        return self.has(STATEMENT, ENVELOPE, RECIPE, MEASUREMENTS, INPUTS)


def audit(folder: Path, key: Path | None, progress: Progress, called: str | None = None) -> Audit:
    """Everything that can be known of the folder without a network. Raises BuildError where there is no folder, or no key in `key`.

    `called`: the folder's name in findings, where the user has given it another than its path.
    """
    public = signing.public_key(key) if key is not None else None
    found = _without_the_hubs_own(walk(folder))
    if not found.files and not found.findings:
        raise BuildError(str(folder), "holds no files", "name the folder that holds config.json and *.safetensors")
    there, unread = hashes(found.files, progress)
    case = _Case(found, there, public)
    said: list[Said] = [*found.findings, *unread]
    parts = (_links, _digests, _statement, _signature)
    for part in (*(part(case) for part in parts), contents.safety(found), contents.tensors(found), contents.weights(found, progress)):
        try:
            said.extend(part)
        except BuildError as error:  # a file that cannot be read further; the other parts are looked at nevertheless
            said.append(error)
        except OSError as error:  # it was there a moment ago
            said.append(BuildError(str(error.filename or folder), f"cannot be read: {error.strerror}", "let nobody write there meanwhile"))
    if found.ignored:
        said.append(f"ignored     {', '.join(found.ignored)}: hubs and their clients add these")
    lines = tuple(_plain(one) for one in said if isinstance(one, str))
    findings = merged(one for one in said if isinstance(one, BuildError))
    return Audit(lines, tuple(_shown(one, str(folder), called) for one in findings))


def _without_the_hubs_own(found: Folder) -> Folder:
    """ModelScope writes a configuration.json into each repository: no file of a release that does not list it, unless it names code."""
    if HUBS_OWN not in found.files or not (SUMS in found.files or SIGNATURE in found.files):
        return found
    try:
        lists = [
            parse_sums(content(found.files[SUMS], MAX_BYTES), SUMS) if SUMS in found.files else {},
            bundle.read_bundle(content(found.files[SIGNATURE], MAX_BYTES), SIGNATURE).files if SIGNATURE in found.files else {},
        ]
        said = json_object(content(found.files[HUBS_OWN], MAX_BYTES), HUBS_OWN)
    except BuildError:
        return found  # of lists that cannot be read the others tell
    if HUBS_OWN in found.links or any(HUBS_OWN in listed for listed in lists) or any(said.get(name) for name in NAMES_CODE):
        return found
    files = {name: path for name, path in found.files.items() if name != HUBS_OWN}
    return replace(found, files=files, ignored=tuple(sorted((*found.ignored, HUBS_OWN))))


def _links(case: _Case) -> Iterator[Said]:
    """Links are no files: what they lead to can be another thing tomorrow, except in the hub's own cache."""
    cached = [name for name in case.folder.links if in_cache(case.folder.root, case.folder.files[name])]
    others = [name for name in case.folder.links if name not in cached]
    if cached:
        yield f"links       {len(cached)} files lie in the hub's cache, and are read there"
    for name in others:
        what = f"is a link to {case.folder.links[name]}"
        if case.released or case.has(SUMS, SIGNATURE):
            yield BuildError(case.where(name), f"{what}; a release holds files", AGAIN)
        else:
            yield f"links       {name} {what}: checked as it is now"


def _digests(case: _Case) -> Iterator[Said]:
    """The files against SHA256SUMS."""
    if not case.has(SUMS):
        if case.released:
            yield BuildError(case.where(SUMS), "is missing; every release has it", AGAIN)
        else:
            yield f"digests     no {SUMS}: what the files were when they were published is not known"
        return
    listed, there = parse_sums(case.content(SUMS), case.where(SUMS)), case.all_but(SUMS, SIGNATURE)
    found: list[Said] = [*differences(listed, there, SUMS, case.folder.root), *_doubts(case, listed, there)]
    yield from found or [f"digests     {len(listed)} files are as {SUMS} says"]


def _doubts(case: _Case, listed: Mapping[str, str], there: Mapping[str, str]) -> Iterator[BuildError]:
    """Where the file that was changed may be SHA256SUMS itself: nothing signs it, and the statement does not side with it."""
    if case.has(SIGNATURE):
        return  # tells for itself what became of SHA256SUMS
    try:
        witness = _subjects(_read_statement(case), case) if case.has(STATEMENT) else {}
    except BuildError:
        witness = {}
    for name in sorted(listed.keys() | there.keys()):
        told = witness.get(name) == listed.get(name) if name not in (STATEMENT, ENVELOPE) and witness else False
        if listed.get(name) != there.get(name) and not told:
            yield BuildError(case.where(SUMS), f"does not fit {name}: one of the two was changed", AGAIN)
            return


def _signature(case: _Case) -> Iterator[Said]:
    """model.sig: as far as that is possible without the key, and whose it is with it."""
    if not case.has(SIGNATURE):
        if case.has(ENVELOPE):
            yield BuildError(case.where(SIGNATURE), f"is missing; {ENVELOPE} says that the release is signed", AGAIN)
        elif case.public is not None:
            yield BuildError(case.where(SIGNATURE), "is missing: the folder is not signed, and key= was given", ASK)
        else:
            yield "signature   unsigned: digests tell that the files belong together, not who made them"
        return
    signed = bundle.read_bundle(case.content(SIGNATURE), case.where(SIGNATURE))
    found: list[Said] = [*_covered(case, signed), *_names(case, signed)]
    left_out = [name for name in case.there if name != SIGNATURE and _is_below(name, signed.ignored)]
    if left_out:
        yield f"signature   leaves out {', '.join(left_out[:3])}{' …' if left_out[3:] else ''}"
    if case.public is not None:
        try:
            signing.verify_bundle(signed, case.public, case.where(SIGNATURE))
        except BuildError as error:
            found.append(error)
        yield from found or [f"signature   {len(signed.files)} files, signed by the key {signing.hint(case.public)[:SHOWN]}"]
        return
    yield from found
    if signed.signed_by == "key":
        yield f"signature   signed, not checked: {GIVE} (it names the key {signed.envelope.hint[:SHOWN]})"
    else:
        yield f"signature   signed with a {signed.signed_by}, not checked: see `model_signing verify --help`"


def _covered(case: _Case, signed: bundle.Bundle) -> Iterator[BuildError]:
    """The files against what was signed."""
    left_out = sorted(signed.ignored - bundle.IGNORABLE)
    if left_out:
        yield BuildError(case.where(SIGNATURE), f"leaves out {', '.join(left_out)}", "sign the whole folder")
    there = {name: sha256 for name, sha256 in case.there.items() if not _is_below(name, signed.ignored | {SIGNATURE})}
    yield from differences(signed.files, there, SIGNATURE, case.folder.root)


def _is_below(name: str, paths: frozenset[str]) -> bool:
    return any(f"{name}/".startswith(f"{path}/") for path in paths)


def _names(case: _Case, signed: bundle.Bundle) -> Iterator[BuildError]:
    """What model.sig and the statement both say, so that neither can be altered alone."""
    where = case.where(SIGNATURE)
    if case.has(SUMS) and case.public is None:
        listed = parse_sums(case.content(SUMS), case.where(SUMS)).items()
        apart = {name for name, _ in listed ^ signed.files.items()} - {SUMS}
        if apart:
            yield BuildError(where, f"and {SUMS} do not agree on {min(apart)}: one of the two was changed", AGAIN)
    if case.has(ENVELOPE) and signed.signed_by == "key":
        other = bundle.read_envelope(case.content(ENVELOPE), case.where(ENVELOPE)).hint
        if other != signed.envelope.hint:
            yield BuildError(where, f"names the key {signed.envelope.hint}, {ENVELOPE} names {other}", AGAIN)
    if case.has(STATEMENT) and case.public is None:
        recipe = _at(_read_statement(case), "predicate", "buildDefinition", "externalParameters", "name")
        if signed.model != recipe:
            yield BuildError(where, f"calls the model {signed.model!r}, {STATEMENT} calls it {recipe!r}", f"{GIVE} to check the signature")


def _statement(case: _Case) -> Iterator[Said]:
    """provenance/: the statement's form, its subjects, and the signature over it."""
    if not case.has(STATEMENT):
        if case.released:
            yield BuildError(case.where(STATEMENT), "is missing; every release has it", AGAIN)
        else:
            yield "provenance  none: from what, by whom and how it was made is not known"
        return
    said = _read_statement(case)
    there = case.all_but(STATEMENT, ENVELOPE, SUMS, SIGNATURE)
    found: list[Said] = list(differences(_subjects(said, case), there, STATEMENT, case.folder.root))
    try:
        signed = _enveloped(case)
    except BuildError as error:
        found.append(error)
    build, run = _at(said, "predicate", "buildDefinition"), _at(said, "predicate", "runDetails")
    inputs = _at(build, "resolvedDependencies")
    by = f"buildsys {_at(run, 'builder', 'version', 'buildsys')}, finished {_at(run, 'metadata', 'finishedOn')}"
    name = _at(build, "externalParameters", "name")
    yield from found or [f"provenance  recipe {name}, {len(inputs) if isinstance(inputs, list) else 'no'} input files, {by}; {signed}"]


def _enveloped(case: _Case) -> str:
    """The signature over the statement, in words; raises BuildError where it is not one over this statement by this key."""
    where = case.where(ENVELOPE)
    if not case.has(ENVELOPE):
        if case.public is not None:
            raise BuildError(where, "is missing: the statement is not signed, and key= was given", ASK)
        return "unsigned"
    raw, statement = case.content(ENVELOPE), case.content(STATEMENT)
    if case.public is not None:
        signing.verify_envelope(raw, statement, case.public, where)
        return "signed by the key"
    if bundle.read_envelope(raw, where).payload != statement:
        raise BuildError(where, f"signs another statement than {STATEMENT}", AGAIN)
    return f"signed, not checked: {GIVE}"


def _read_statement(case: _Case) -> dict[str, Any]:
    """The statement in the one spelling that it has."""
    raw, where = case.content(STATEMENT), case.where(STATEMENT)
    said = json_object(raw, where)
    if document(said) != raw:
        raise BuildError(where, "is not spelled as its writer spells it: a byte was changed", AGAIN)
    for wanted, path in (
        (STATEMENT_TYPE, ("_type",)),
        (PREDICATE_TYPE, ("predicateType",)),
        (BUILD_TYPE, ("predicate", "buildDefinition", "buildType")),
    ):
        if _at(said, *path) != wanted:
            raise BuildError(where, f"{'.'.join(path)} is {_at(said, *path)!r}, not {wanted!r}", AGAIN)
    return said


def _subjects(said: Mapping[str, Any], case: _Case) -> dict[str, str]:
    """The files that the statement is about, by sha256."""
    subjects = said.get("subject")
    listed: dict[str, str] = {}
    for one in subjects if isinstance(subjects, list) else [subjects]:
        name, sha256, size = _at(one, "name"), _at(one, "digest", "sha256"), _at(one, "annotations", "size")
        if not isinstance(name, str) or not isinstance(sha256, str) or name in listed:
            raise BuildError(case.where(STATEMENT), "its subjects are not files, each named once by sha256", AGAIN)
        if case.there.get(name) == sha256 and (there := case.folder.files[name].stat().st_size) != size:
            raise BuildError(case.where(STATEMENT), f"says that {name} holds {size} bytes; it holds {there}", AGAIN)
        listed[name] = sha256
    return listed


def _at(said: Any, *path: str) -> Any:
    """The value at `path`, or None where there is nothing of this shape."""
    for key in path:
        said = said.get(key) if isinstance(said, Mapping) else None
    return said


def _shown(one: BuildError, root: str, called: str | None) -> BuildError:
    """As a user reads it: the folder is called as he called it."""
    where = called + one.where.removeprefix(root) if called is not None and one.where.startswith(root) else one.where
    return BuildError(_plain(where), _plain(one.what), _plain(one.fix))


def _plain(text: str) -> str:
    """What a stranger's file says can be neither a command to a terminal nor a flood."""
    shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape", "surrogatepass").decode() for sign in text[:MAX_SHOWN])
    return shown + "…" * (len(text) > MAX_SHOWN)
