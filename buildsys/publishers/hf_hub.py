"""Publishes to a model repository of the Hugging Face hub: one commit, after which it holds the release and no more; read back; tagged.

A release's tag is `sha256-` and the first 16 digits of its digest; the commit that brings it has the same in its title. No history is ever
rewritten: a rollback is a commit on top whose files are those of an earlier release.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from buildsys.errors import BuildError
from buildsys.hubs import hub_state, hub_write
from buildsys.hubs.hub_download import digests
from buildsys.hubs.hub_repo import Listing, Repo, check_id, check_revision
from buildsys.publishers import TAG, Progress, Receipt, Release, tag, wanted
from buildsys.slots import Frozen
from buildsys.step import digest

VERSION = 1

_TRIES = 3
"""Commits that are tried where others commit meanwhile."""
_HUBS_OWN = (".gitattributes",)
_OF_A_NEW_REPOSITORY = (*_HUBS_OWN, "README.md")
_RELEASE = re.compile(rf"\b{TAG}([0-9a-f]{{16}})\b")


class Knobs(Frozen):
    repo: Annotated[str, AfterValidator(check_id)] = Field(description="owner/name of the model repository; made where it is not there")
    private: bool = Field(default=True, description="whether a repository that is made is private; one that is there stays as it is")
    branch: Annotated[str, AfterValidator(check_revision)] = Field(default="main", description="the branch that holds the release")
    pull_request: bool = Field(default=False, description="propose the release as a pull request, in place of a commit on the branch")
    keep: tuple[str, ...] = Field(default=(), description="files in the repository that are not the release's and stay, as globs: *.png")
    replace: bool = Field(default=False, description="delete and replace files even where nothing was published before")
    read_back: Literal["all", "listing"] = Field(
        default="all", description="all: download every file and hash it; listing: believe the hub's own sha256 of large files"
    )


@dataclass(frozen=True)
class _There:
    """Where a release goes, and what is there now."""

    repo: Repo  # its revision is the branch, or refs/pr/N of the open pull request that proposes the release
    refs: hub_state.References
    listing: Listing
    request: int = 0  # N


@dataclass(frozen=True)
class _Changes:
    """What makes the files that are there into those that are wanted."""

    put: tuple[str, ...]
    delete: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.put or self.delete)


Compare = Callable[[Listing], _Changes]
Prepare = Callable[[_There, _Changes], list[Any]]


def destination(knobs: Knobs, folder: Path) -> str:
    page = _repo(knobs).page
    return page if knobs.branch == "main" else f"{page}/tree/{knobs.branch}"


def plan(knobs: Knobs, release: Release, to: str) -> tuple[str, ...]:
    """What `publish` would do, in lines for people. Sends nothing; refuses what publish would refuse, as far as it can be seen."""
    _refuse_kept(knobs, release, to)
    there = _look(knobs, release.tag)
    tagging = () if knobs.pull_request else (f"tag it {release.tag}",)
    if there is None or not there.listing.commit:
        hub_write.refuse_reader(_repo(knobs), knobs.pull_request)
        kind = "private" if knobs.private else "public"
        made = f"branch {knobs.branch}" if there else f"{kind} repository {knobs.repo}; this machine's token sees none of that name"
        return (f"make the {made}", *(_line("add", release, name) for name in release.files), *tagging)
    _refuse_tag(knobs, release, there, to)
    changes = _changes(knobs, release, there.listing)
    if not changes:
        return (f"{there.repo} already holds these {len(release.files)} files; read them back, send nothing",)
    _refuse_foreign(knobs, there, changes, to)
    hub_write.refuse_reader(there.repo, knobs.pull_request)
    proposed = knobs.pull_request and not there.request
    lines = [f"a pull request for {knobs.branch}:" if proposed else f"one commit on {there.repo.revision}:"]
    lines += [_line("replace" if name in there.listing.files else "add", release, name) for name in changes.put]
    return (*lines, *(f"delete {name}" for name in changes.delete), *tagging)


def publish(knobs: Knobs, release: Release, to: str, progress: Progress) -> Receipt:
    """One commit on top of what is there, if anything differs; read back; tagged. Nothing shows on the branch before the commit."""
    _refuse_kept(knobs, release, to)
    there = _make(knobs, release.tag)
    _refuse_tag(knobs, release, there, to)

    def prepare(there: _There, changes: _Changes) -> list[Any]:
        _refuse_foreign(knobs, there, changes, to)
        additions = hub_write.added({name: release.tree / name for name in changes.put})
        hub_write.send(there.repo, additions, release.files, knobs.pull_request and not there.request, progress)
        return [*additions, *hub_write.deleted(changes.delete)]

    title = f"Publish {release.name} {release.tag}"
    there = _commit(knobs, there, title, lambda listing: _changes(knobs, release, listing), prepare, to)
    _read_back(knobs, release, there, to, progress)
    return _receipt(knobs, release.digest, there)


def verify(knobs: Knobs, release: Release, to: str, progress: Progress) -> Receipt:
    """Reads the published files back. Raises BuildError where one is missing, different or not of this release."""
    there = _present(knobs, release.tag, to)
    _read_back(knobs, release, there, to, progress)
    return Receipt(_url(knobs, release.digest, there), release.digest)


def rollback(knobs: Knobs, asked: str, to: str, progress: Progress) -> Receipt:
    """A commit on top that brings back the files of the release that was asked for, after they were read and found whole."""
    digits = wanted(asked)
    short, commit = _released(_present(knobs, "", to), digits, to)
    there = _present(knobs, TAG + short, to)
    earlier = hub_state.held(there.repo, commit)
    etags = {name: file.etag for name, file in earlier.files.items() if not _kept(knobs, name)}
    whole = digest(_hashes(knobs, earlier, etags, progress))
    if not (whole.startswith(short) and whole.startswith(digits)):
        what = f"what is at {TAG}{short} has the digest {whole}, not {max(short, digits, key=len)}: it was altered since"
        raise BuildError(to, what, "name another release, or publish this one again")

    def compare(listing: Listing) -> _Changes:
        now = {name: file.etag for name, file in listing.files.items()}
        put = tuple(name for name, etag in etags.items() if now.get(name) != etag)
        return _Changes(put, tuple(name for name in now if name not in etags and not _kept(knobs, name)))

    def prepare(there: _There, changes: _Changes) -> list[Any]:
        return [*hub_write.copied(changes.put, commit), *hub_write.deleted(changes.delete)]

    there = _commit(knobs, there, f"Roll back to {TAG}{short}", compare, prepare, to)
    if wrong := compare(there.listing):
        what = f"{there.listing.commit[:12]} does not hold what {commit[:12]} does: {_some([*wrong.put, *wrong.delete])}"
        raise BuildError(to, what, "run the same command again")
    return _receipt(knobs, whole, there)


def _repo(knobs: Knobs) -> Repo:
    return Repo("model", knobs.repo, knobs.branch)


def _look(knobs: Knobs, tag: str) -> _There | None:
    """None where there is no such repository; a listing without a commit where there is no such branch."""
    repo = _repo(knobs)
    refs = hub_state.references(repo)
    if refs is None:
        return None
    request = hub_state.open_request(repo, tag) if knobs.pull_request and tag else 0
    if request:
        proposed = replace(repo, revision=f"refs/pr/{request}")
        return _There(proposed, refs, hub_state.held(repo, proposed.revision), request)
    if knobs.branch not in refs.branches:
        return _There(repo, refs, Listing(repo, "", {}))
    return _There(repo, refs, hub_state.held(repo, refs.branches[knobs.branch]))


def _present(knobs: Knobs, tag: str, to: str) -> _There:
    there = _look(knobs, tag)
    if there is None:
        raise BuildError(to, "there is no such repository, or this machine's token may not see it", "publish first, or run `hf auth login`")
    if not there.listing.commit:
        raise BuildError(to, f"{knobs.repo} has no branch {knobs.branch}", "publish first, or correct publish.hf_hub.branch")
    return there


def _make(knobs: Knobs, tag: str) -> _There:
    """What is there, after the repository and the branch were made if they were not."""
    there = _look(knobs, tag)
    if there is None:
        hub_write.create(_repo(knobs), knobs.private)
        there = _look(knobs, tag)
    if there is not None and not there.listing.commit:
        hub_write.create_branch(_repo(knobs))
        there = _look(knobs, tag)
    if there is None or not there.listing.commit:
        fix = "look at its page; if it belongs to somebody else, correct publish.hf_hub.repo"
        raise BuildError(_repo(knobs).page, "was made, and is still not to be seen", fix)
    return there


def _commit(knobs: Knobs, there: _There, title: str, compare: Compare, prepare: Prepare, to: str) -> _There:
    """What is there once nothing differs from what is wanted. Another's commit that came between is respected, not overwritten."""
    for _ in range(_TRIES):
        changes = compare(there.listing)
        if not changes:
            return there
        proposes = knobs.pull_request and not there.request
        made = hub_write.commit(there.repo, prepare(there, changes), title, there.listing.commit, proposes)
        if made is not None:
            repo = replace(there.repo, revision=f"refs/pr/{made.request}") if made.request else there.repo
            return _There(repo, there.refs, hub_state.held(there.repo, made.id), made.request or there.request)
        before, there = there, replace(there, listing=hub_state.held(there.repo, there.repo.revision))
        if compare(there.listing):
            _refuse_conflict(knobs, before, there, to)
    raise BuildError(to, f"others committed there {_TRIES} times meanwhile", "wait until they end, then run the same command again")


def _refuse_conflict(knobs: Knobs, before: _There, now: _There, to: str) -> None:
    old, new = ({name: file.etag for name, file in one.listing.files.items()} for one in (before, now))
    touched = sorted(name for name in {*old, *new} if old.get(name) != new.get(name) and not _kept(knobs, name))
    if touched:
        last = hub_state.history(now.repo, now.listing.commit)[0]
        who = ", ".join(last.authors) or "somebody"
        what = f"{who} committed {last.id[:12]} ({last.title}) meanwhile, which changes {_some(touched)}"
        fix = f"look at {now.repo.page}/commit/{last.id}; then run the same command again, or name what stays in publish.hf_hub.keep"
        raise BuildError(to, what, fix)


def _refuse_kept(knobs: Knobs, release: Release, to: str) -> None:
    kept = [name for name in release.files if _kept(knobs, name)]
    if kept:
        raise BuildError(to, f"publish.hf_hub.keep covers {_some(kept)}, which the release has too", "make its globs narrower")


def _refuse_tag(knobs: Knobs, release: Release, there: _There, to: str) -> None:
    """A tag of the release's name that stands for other content: somebody moved it."""
    commit = there.refs.tags.get(release.tag)
    if commit is None:
        return
    wrong = _changes(knobs, release, there.listing if commit == there.listing.commit else hub_state.held(there.repo, commit))
    if wrong:
        what = f"the tag {release.tag} is at {commit[:12]}, where {_some([*wrong.put, *wrong.delete])} differs from the release"
        raise BuildError(to, what, f"run `hf repos tag delete {knobs.repo} {release.tag}`, then publish again")


def _refuse_foreign(knobs: Knobs, there: _There, changes: _Changes, to: str) -> None:
    """Files that no publish brought are not deleted or replaced, unless the recipe says so."""
    lost = [name for name in (*changes.put, *changes.delete) if name in there.listing.files and name not in _OF_A_NEW_REPOSITORY]
    if lost and not knobs.replace and not _releases(there):
        what = f"{there.repo} holds {_some(lost)}, and no release of ours; publishing would delete or replace them"
        raise BuildError(to, what, "name another repository or branch, or set publish.hf_hub.replace: true")


def _releases(there: _There) -> dict[str, str]:
    """Every release that can be had there: first digits of its digest -> a commit. The tags know, and the titles of commits."""
    titles = {commit.id: _RELEASE.search(commit.title) for commit in reversed(hub_state.history(there.repo, there.listing.commit))}
    named = {found[1]: commit for commit, found in titles.items() if found}
    tagged = {found[1]: commit for name, commit in there.refs.tags.items() if (found := _RELEASE.fullmatch(name))}
    return named | tagged


def _released(there: _There, digits: str, to: str) -> tuple[str, str]:
    known = _releases(there)
    found = [short for short in known if short.startswith(digits[:16])]
    if len(found) != 1:
        what = (
            f"{'no release' if not found else 'more than one release'} there begins with {digits}; there are {', '.join(known) or 'none'}"
        )
        raise BuildError(to, what, "name one of these" if known else "publish first")
    return found[0], known[found[0]]


def _kept(knobs: Knobs, name: str) -> bool:
    return name in _HUBS_OWN or any(fnmatch.fnmatchcase(name, glob) for glob in knobs.keep)


def _changes(knobs: Knobs, release: Release, listing: Listing) -> _Changes:
    put = tuple(name for name in release.files if not _equal(release, name, listing))
    return _Changes(put, tuple(name for name in listing.files if name not in release.files and not _kept(knobs, name)))


def _equal(release: Release, name: str, listing: Listing) -> bool:
    there = listing.files.get(name)
    if there is None or there.size != release.sizes[name]:
        return False
    return release.files[name] == there.sha256 if there.sha256 else digests(release.tree / name)[1] == there.blob_id


def _read_back(knobs: Knobs, release: Release, there: _There, to: str, progress: Progress) -> None:
    """Raises BuildError where what can be downloaded is not the release."""
    held = {name for name in there.listing.files if not _kept(knobs, name)}
    found = _hashes(knobs, there.listing, [name for name in release.files if name in held], progress)
    wrong = [f"{name} is missing" for name in release.files if name not in held]
    wrong += [f"{name} has sha256 {found[name][:12]}, not {sha[:12]}" for name, sha in release.files.items() if found.get(name, sha) != sha]
    wrong += [f"{name} was not published" for name in sorted(held - release.files.keys())]
    if wrong:
        more = f" … and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise BuildError(to, f"at {there.listing.commit[:12]} {'; '.join(wrong[:3])}{more}", "publish again")


def _hashes(knobs: Knobs, listing: Listing, names: Iterable[str], progress: Progress) -> dict[str, str]:
    """sha256 of each file as the hub gives it now."""
    files = {name: listing.files[name] for name in names}
    believed = {name: file.sha256 for name, file in files.items() if file.sha256 and knobs.read_back == "listing"}
    total, done = sum(file.size for name, file in files.items() if name not in believed), 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress("read back", min(done, total), total)

    return {name: believed.get(name) or hub_state.sha256_there(listing, name, tick) for name in files}


def _receipt(knobs: Knobs, whole: str, there: _There) -> Receipt:
    """Tags what was read back: a tag stands for content that was seen. Who only proposes may have no right to tag."""
    if not knobs.pull_request and tag(whole) not in there.refs.tags:
        hub_write.tag(there.repo, tag(whole), there.listing.commit)
    return Receipt(_url(knobs, whole, there), whole)


def _url(knobs: Knobs, whole: str, there: _There) -> str:
    if there.request:
        return f"{there.repo.page}/discussions/{there.request}"
    return f"{there.repo.page}/tree/{knobs.branch if knobs.pull_request else tag(whole)}"


def _line(what: str, release: Release, name: str) -> str:
    return f"{what} {name} ({release.sizes[name] / 2**20:,.1f} MiB)"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" … and {len(names) - 3} more" if len(names) > 3 else "")
