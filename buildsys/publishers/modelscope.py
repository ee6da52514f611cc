"""Publishes to a model repository on ModelScope (modelscope.cn, or the site that MODELSCOPE_ENDPOINT names): one commit, then a tag.

Large objects go first, so a killed run leaves the branch as it was and the next one sends only what is missing. The tag is the release's
digest and is set after the commit was read back. The commit endpoint takes no parent: if somebody else commits in the same moment, both
commits are kept, and this one is reported as not clean. Nothing is ever forced: a rollback is a commit on top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from buildsys.errors import BuildError
from buildsys.hubs import modelscope, modelscope_commit, modelscope_files
from buildsys.hubs.modelscope import Listing, speaking
from buildsys.publishers import TAG, Progress, Receipt, Release, tag, wanted
from buildsys.slots import Frozen
from buildsys.step import digest as digest_of

VERSION = 1

OWN = frozenset({".gitattributes", "configuration.json"})
"""What the hub writes into a repository itself: not dropped, and no part of a release that does not name it."""
OF_A_NEW_REPOSITORY = OWN | {"README.md"}
END_BYTES = 64 << 10


class Knobs(Frozen):
    repo: str = Field(description="the repository, owner/name; made by the first publish")
    branch: str = Field(default="master", description="the branch that shows the newest release")
    private: bool = Field(default=True, description="whether a repository that is made here is private; one that exists stays as it is")
    license: str = Field(
        default="Other", description="what the page of a repository that is made here says; the model card says it in full"
    )

    replace: bool = Field(default=False, description="drop and replace files even where nothing was published before")

    @field_validator("repo")
    @classmethod
    def _repo(cls, repo: str) -> str:
        return modelscope.check_repo(repo)

    @field_validator("branch")
    @classmethod
    def _branch(cls, branch: str) -> str:
        return modelscope.check_revision(branch)


def destination(knobs: Knobs, folder: Path) -> str:
    """The address of the repository's page; `folder` is of no interest here."""
    return modelscope.page(knobs.repo)


def plan(knobs: Knobs, release: Release, to: str) -> tuple[str, ...]:
    """What `publish` would do, in lines for people. Sends nothing; refuses what publish would refuse."""
    with speaking(to):
        api = _login(to)
        now = _now(api, knobs)
        if now is None:
            kind = "private" if knobs.private else "public"
            return (f"make the {kind} repository {to}", *(f"add {name} ({release.sizes[name]:,} bytes)" for name in release.files))
        tagged = _tagged(api, knobs, release)
        changed, drop = _difference(now, release.files)
        _refuse_foreign(api, knobs, now, [*changed, *drop])
    if not changed and not drop:
        return (
            f"{to} at {knobs.branch} already holds {len(release.files)} equal files; read them back{'' if tagged else ', set the tag'}",
        )
    verbs = {name: "replace" if name in now.files else "add" for name in changed}
    lines = [f"commit to {to} at {knobs.branch}, tag {release.tag}"]
    lines += [f"{verb} {name} ({release.sizes[name]:,} bytes)" for name, verb in verbs.items()]
    return (*lines, *(f"drop {name}" for name in drop))


def publish(knobs: Knobs, release: Release, to: str, progress: Progress) -> Receipt:
    """Brings the release, reads the branch back, sets the tag. Run again, it sends nothing."""
    with speaking(to):
        api = _login(to)
        now = _now(api, knobs) or _make(api, knobs, to)
        tagged = _tagged(api, knobs, release)
        changed, drop = _difference(now, release.files)
        if changed or drop:
            _refuse_foreign(api, knobs, now, [*changed, *drop])
            changes = [modelscope_commit.from_tree(release.tree, name, release.sizes[name], release.files[name]) for name in changed]
            modelscope_commit.upload(api, knobs.repo, changes, _bytes("upload", changes, progress))
            modelscope_commit.commit(api, knobs.repo, knobs.branch, changes, drop, f"Publish {release.name}, {release.tag}")
            now = _clean(modelscope.look(api, knobs.repo, knobs.branch), release.files)
        _probe(api, now, release, progress)
        if not tagged:
            api.legacy.create_tag(knobs.repo, "model", release.tag, now.revision)
            _clean(modelscope.look(api, knobs.repo, release.tag), release.files)
    return _receipt(to, release.digest)


def verify(knobs: Knobs, release: Release, to: str, progress: Progress) -> Receipt:
    """Reads every byte of the branch back. Raises BuildError where it is not this release."""
    with speaking(to):
        api = modelscope.connect()
        now = _now(api, knobs)
        if now is None:
            raise BuildError(to, "is not there (404); without a login, a private repository looks the same", "publish first, or log in")
        _read_back(api, _clean(now, release.files), release.files, progress)
    return _receipt(to, release.digest)


def rollback(knobs: Knobs, asked: str, to: str, progress: Progress) -> Receipt:
    """A commit on top that holds what the tag of an earlier release holds."""
    digits = wanted(asked)
    with speaking(to):
        api = _login(to)
        now = _now(api, knobs)
        if now is None:
            raise BuildError(to, "is not there (404), so there is nothing to go back to", "publish first")
        named = _find(api, knobs, digits, to)
        old = modelscope.look(api, knobs.repo, named)
        files = _released(old, named)
        if not (whole := digest_of(files)).startswith(digits):
            raise BuildError(to, f"{named} holds the release {whole}, not {digits}", "name the release that you mean")
        changed, drop = _difference(now, files)
        if changed or drop:
            sizes = {name: old.files[name].size for name in changed}
            changes = [modelscope_commit.from_hub(name, sizes[name], files[name], _content(api, old, name)) for name in changed]
            modelscope_commit.upload(api, knobs.repo, changes, lambda count: None)
            modelscope_commit.commit(api, knobs.repo, knobs.branch, changes, drop, f"Roll back to {named}")
            now = _clean(modelscope.look(api, knobs.repo, knobs.branch), files)
        _read_back(api, now, files, progress)
    return _receipt(to, whole)


def _receipt(to: str, whole: str) -> Receipt:
    return Receipt(f"{to}/files?version={tag(whole)}", whole)


def _login(to: str) -> Any:
    api = modelscope.connect()
    if not api.legacy.token:
        raise BuildError(to, "publishing needs a login, and there is none", modelscope.LOGIN)
    return api


def _now(api: Any, knobs: Knobs) -> Listing | None:
    """What the branch holds; None where there is no repository, or none that this account may see."""
    from modelscope_hub.errors import NotExistError

    try:
        return modelscope.look(api, knobs.repo, knobs.branch)
    except NotExistError:
        return None


def _make(api: Any, knobs: Knobs, to: str) -> Listing:
    from modelscope_hub.errors import AlreadyExistsError

    try:
        api.create_repo(knobs.repo, "model", visibility="private" if knobs.private else "public", license=knobs.license)
    except AlreadyExistsError:
        fix = "log in as an account that may, or name another publish.modelscope.repo"
        raise BuildError(to, "is there, but this account may not see it", fix) from None
    return modelscope.look(api, knobs.repo, knobs.branch)


def _difference(now: Listing, files: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Names to bring, and names to drop."""
    changed = [name for name, sha256 in files.items() if name not in now.files or now.files[name].sha256 != sha256]
    return changed, sorted(now.files.keys() - files.keys() - OWN)


def _refuse_foreign(api: Any, knobs: Knobs, now: Listing, touched: list[str]) -> None:
    """Files that no publish brought are not dropped or replaced, unless the recipe says so."""
    lost = [name for name in touched if name in now.files and name not in OF_A_NEW_REPOSITORY]
    if lost and not knobs.replace and not _tags(api, knobs):
        more = f" … and {len(lost) - 3} more" if lost[3:] else ""
        what = f"holds {', '.join(lost[:3])}{more}, and no release of ours; publishing would drop or replace them"
        raise BuildError(now.where, what, "name another repository, or set publish.modelscope.replace: true")


def _clean(now: Listing, files: Mapping[str, str]) -> Listing:
    """`now` itself, if it holds these files alone."""
    changed, foreign = _difference(now, files)
    if changed or foreign:
        missing = [f"{name} is missing" for name in changed if name not in now.files]
        other = [f"{name} has sha256 {now.files[name].sha256[:12]}, not {files[name][:12]}" for name in changed if name in now.files]
        found = [*missing, *other, *(f"{name} is not of the release" for name in foreign)]
        more = f" … and {len(found) - 3} more" if found[3:] else ""
        raise BuildError(
            f"{now.where} at {now.asked}", "; ".join(found[:3]) + more, "publish again; see on the page who else commits to it"
        )
    return now


def _tagged(api: Any, knobs: Knobs, release: Release) -> bool:
    """Whether the release's tag is there; one that holds something else is nobody's to move."""
    if release.tag not in _tags(api, knobs):
        return False
    held = modelscope.look(api, knobs.repo, release.tag)
    changed, foreign = _difference(held, release.files)
    if changed or foreign:
        what = f"its tag {release.tag} holds other files ({', '.join([*changed, *foreign][:3])})"
        raise BuildError(held.where, what, "delete that tag on the repository's page, then publish again")
    return True


def _tags(api: Any, knobs: Knobs) -> list[str]:
    _, tags = api.legacy.list_revisions_detail(knobs.repo, "model")
    return sorted(name for one in tags if (name := str(one.get("Revision"))).startswith(TAG))


def _find(api: Any, knobs: Knobs, digits: str, to: str) -> str:
    """The tag of a release, from its digest or the first digits of it."""
    tags = _tags(api, knobs)
    found = [name for name in tags if name.startswith(TAG + digits[:16])]
    if len(found) == 1:
        return found[0]
    there = ", ".join(name.removeprefix(TAG) for name in tags) or "none"
    what = f"{'several releases have' if found else 'no release has'} the digest {digits[:16]}; there are {there}"
    raise BuildError(to, what, "name one of these, by 8 digits or more")


def _released(old: Listing, named: str) -> dict[str, str]:
    """The files of a tagged release: those whose digest is in the tag's name. The hub's own files belong to it or not."""
    own = sorted(old.files.keys() & OWN)
    for kept in chain.from_iterable(combinations(own, count) for count in range(len(own) + 1)):
        files = {name: file.sha256 for name, file in old.files.items() if name not in OWN or name in kept}
        if tag(digest_of(files)) == named:
            return files
    raise BuildError(f"{old.where} at {named}", "holds other files than its name says", "roll back to another release")


def _content(api: Any, old: Listing, name: str) -> Callable[[], bytes]:
    return lambda: modelscope_files.whole(api, old, name)


# Reading back


def _bytes(what: str, of: list[modelscope_commit.Change], progress: Progress) -> Callable[[int], None]:
    """Counts bytes of large objects."""
    done, total = 0, sum(change.size for change in of if change.content is None)

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(what, done, total)

    return tick


def _probe(api: Any, now: Listing, release: Release, progress: Progress) -> None:
    """Small files whole; of a large one, whose digest the hub computed when it took it, that both ends can be had again."""
    for done, (name, size) in enumerate(release.sizes.items(), 1):
        spans = [(0, size)] if size <= 2 * END_BYTES else [(0, END_BYTES), (size - END_BYTES, size)]
        with (release.tree / name).open("rb") as file:
            for start, end in spans:
                file.seek(start)
                if b"".join(modelscope_files.stream(api, now, name, start, end)) != file.read(end - start):
                    raise BuildError(
                        f"{now.where} {name}", f"bytes {start} to {end} read back otherwise than they were sent", "publish again"
                    )
        progress("read back", done, len(release.sizes))


def _read_back(api: Any, now: Listing, files: Mapping[str, str], progress: Progress) -> None:
    done, total = 0, sum(now.files[name].size for name in files)

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress("read back", done, total)

    for name, sha256 in files.items():
        found = modelscope_files.read_back(api, now, name, tick)
        if found != sha256:
            raise BuildError(f"{now.where} at {now.asked}", f"{name} reads back with sha256 {found}, not {sha256}", "publish again")
